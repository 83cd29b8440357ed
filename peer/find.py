"""Asks a peer of the DHT for keys, as hivemind's `call_find` does, without the price of its answer.

hivemind makes a PeerID of every neighbour that an answer names, 20 for each key, and writes each in base 58: half of
the time that a look-up computes. Here they stay bytes until somebody is asked.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.p2p import PeerID
from hivemind.proto import dht_pb2

from peer.answers import keep_valid
from peer.transport.p2pd import P2PD_ERRORS
from peer.errors import WireError
from peer.kademlia.validation import unpack

_MAX_PEER_ID_BYTES = 64


@dataclass(frozen=True)
class Answer:
    """What a peer said of one key."""

    value: DictionaryDHTValue | None
    """Entries that the validator accepts; None when there are none."""
    nearer: dict[int, bytes]
    """Kademlia ID → PeerID of nodes that it knows nearest to the key."""


@dataclass(frozen=True)
class Reply:
    """What a peer said."""

    node: int | None
    """The Kademlia ID that it has; others may have named it by another. None for a client."""
    answers: dict[DHTID, Answer]


async def find(protocol: DHTProtocol, peer: PeerID, keys: Sequence[DHTID]) -> Reply | None:
    """None when the peer does not answer within hivemind's `wait_timeout`, or not what was asked."""
    request = dht_pb2.FindRequest(keys=[key.to_bytes() for key in keys], peer=protocol.node_info)
    try:
        response = await protocol.get_stub(peer).rpc_find(request, timeout=protocol.wait_timeout)
    except P2PD_ERRORS:
        response = None
    if response is None or len(response.results) != len(keys):
        await protocol.update_routing_table(None, peer, responded=False)
        return None
    node = None
    if len(response.peer.node_id) == DHTID.HASH_NBYTES:  # a client has none
        node = DHTID.from_bytes(response.peer.node_id)
        await protocol.update_routing_table(node, peer)
    results = zip(keys, response.results, strict=True)
    return Reply(node, {key: _answer(protocol, key, result) for key, result in results})


def _answer(protocol: DHTProtocol, key: DHTID, result: dht_pb2.FindResult) -> Answer:
    named = list(zip(result.nearest_node_ids, result.nearest_peer_ids, strict=False))[: protocol.bucket_size]
    once = {
        peer: int.from_bytes(node, "big")
        for node, peer in named
        if len(node) == DHTID.HASH_NBYTES and len(peer) <= _MAX_PEER_ID_BYTES
    }
    nearer = {node: peer for peer, node in once.items()}
    if result.type != dht_pb2.FOUND_DICTIONARY:
        return Answer(None, nearer)  # nobody should store plain values
    try:
        value = unpack(result.value)
    except WireError:
        return Answer(None, nearer)
    if not isinstance(value, DictionaryDHTValue):
        return Answer(None, nearer)
    if protocol.record_validator is not None:
        keep_valid(protocol.record_validator, key.to_bytes(), value)
    return Answer(value, nearer)
