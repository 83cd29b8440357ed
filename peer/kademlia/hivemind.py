"""Everything that the DHT uses of hivemind.

Only this module, `peer.identity` and `peer.transport` import hivemind. What belongs to one DHT node or one p2pd is
replaced where it starts: `peer.kademlia.node.start_dht` and `peer.transport.p2pd.start_daemon`.
tests/peer/kademlia/test_hivemind_contract.py lists every private name that we use and every method that we replace.
"""

import logging
import os

from hivemind.dht import node, protocol, routing
from hivemind.dht.node import DHTNode
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID, RoutingTable
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.p2p import P2PContext
from hivemind.proto import dht_pb2
from hivemind.utils import MSGPackSerializer, timed_storage
from hivemind.utils.logging import use_hivemind_log_handler

from peer import clock

__all__ = [
    "DHTID",
    "DHTNode",
    "DHTProtocol",
    "DHTRecord",
    "MSGPackSerializer",
    "P2PContext",
    "RecordValidatorBase",
    "RoutingTable",
    "dht_pb2",
    "quiet_hivemind",
    "timed_storage",
]


for _module in (node, protocol, routing, timed_storage):
    _module.get_dht_time = clock.now  # as all other code, it must not jump when this machine's clock is set


def quiet_hivemind() -> None:
    """Removes hivemind's own log handler, so that its errors appear as our log lines."""
    use_hivemind_log_handler("nowhere")
    logging.getLogger("hivemind").setLevel(os.environ["HIVEMIND_LOGLEVEL"])
