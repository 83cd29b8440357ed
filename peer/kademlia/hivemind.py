"""All that the DHT is built on of hivemind: its classes as they are, and the mends that hold for the whole process.

Only this module, `peer.identity` and `peer.transport` import hivemind. So an upgrade is looked through here, and in the
test of what is relied on (tests/peer/kademlia/test_hivemind_contract.py).
"""

import logging
import os

from hivemind.dht.node import DHTNode
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
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
    "dht_pb2",
    "install",
    "quiet_hivemind",
    "timed_storage",
]


def install() -> None:
    """Mends hivemind's classes for this process. Whoever starts a DHT node calls it; doing so again changes nothing."""
    # hivemind compares subkeys where two entries expire at the same moment. A record's is bytes and an index entry's a
    # number, and both may come under one key: comparing them fails, and with it the store, or the whole answer.
    timed_storage.HeapEntry.__lt__ = _expires_before


def quiet_hivemind() -> None:
    """Takes hivemind's own log handler away, so that its errors come as our log lines."""
    use_hivemind_log_handler("nowhere")
    logging.getLogger("hivemind").setLevel(os.environ["HIVEMIND_LOGLEVEL"])


def _expires_before(one: timed_storage.HeapEntry, other: timed_storage.HeapEntry) -> bool:
    return bool(one.expiration_time < other.expiration_time)
