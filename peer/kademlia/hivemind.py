"""Everything that the DHT uses of hivemind, and `install`, which patches hivemind's classes for the whole process.

Only this module, `peer.identity` and `peer.transport` import hivemind. What belongs to one DHT node or one p2pd is
replaced where it starts: `peer.kademlia.node.start_dht` and `peer.transport.p2pd.start_daemon`.
tests/peer/kademlia/test_hivemind_contract.py lists every private name that we use and every method that we replace.
"""

import logging
import os

from hivemind.dht.node import DHTNode
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID, RoutingTable
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.p2p import P2PContext
from hivemind.proto import dht_pb2
from hivemind.utils import MSGPackSerializer, timed_storage
from hivemind.utils.logging import use_hivemind_log_handler

__all__ = [
    "DHTID",
    "DHTLocalStorage",
    "DHTNode",
    "DHTProtocol",
    "DHTRecord",
    "DictionaryDHTValue",
    "MSGPackSerializer",
    "P2PContext",
    "RecordValidatorBase",
    "RoutingTable",
    "dht_pb2",
    "install",
    "quiet_hivemind",
    "timed_storage",
]


def install() -> None:
    """Patches hivemind's classes. Call it before a DHT node starts; calling it again changes nothing."""
    # hivemind compares the subkeys of two entries that expire at the same moment. A record's subkey is bytes and an
    # index entry's a number, and both may come under one key: comparing them would fail the store, or the whole answer.
    timed_storage.HeapEntry.__lt__ = _expires_before


def quiet_hivemind() -> None:
    """Removes hivemind's own log handler, so that its errors appear as our log lines."""
    use_hivemind_log_handler("nowhere")
    logging.getLogger("hivemind").setLevel(os.environ["HIVEMIND_LOGLEVEL"])


def _expires_before(one: timed_storage.HeapEntry, other: timed_storage.HeapEntry) -> bool:
    return bool(one.expiration_time < other.expiration_time)
