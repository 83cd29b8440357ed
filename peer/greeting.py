"""How a peer enters the DHT of others: it dials them, they dial back, and both compare their clocks."""

import asyncio
import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.p2p import PeerID
from hivemind.proto import dht_pb2

from peer.transport.p2pd import P2PD_ERRORS, Daemon
from peer.errors import ClockError, HiddenError
from peer.formatting import counted

CLOCK_TOLERANCE_S = 3.0
"""hivemind's own bound: with larger differences records expire too early for some, or are refused."""


@dataclass(frozen=True)
class Greeting:
    """What a peer said when it was greeted."""

    addresses: tuple[str, ...]
    node_id: DHTID
    clock_offset_s: float
    """By how much its clock is ahead of ours, the half of the round trip taken off."""
    reaches_us: bool
    """Whether it could dial back."""


async def greet(daemon: Daemon, dht: DHTNode, addresses: Sequence[str], deadline_s: float) -> list[Greeting]:
    """Greets the peers at these addresses, all at once; then looks for this peer's neighbours among theirs.

    `deadline_s` is for each dial, each greeting and the look. Gives what those said who answered.
    """
    by_peer: dict[bytes, list[str]] = {}
    for address in addresses:
        peer_id = PeerID.from_base58(address.rsplit("/p2p/", 1)[1])
        if peer_id != daemon.peer_id:
            by_peer.setdefault(peer_id.to_bytes(), []).append(address)
    answers = await asyncio.gather(
        *(_greet_one(daemon, dht, PeerID(peer), listed, deadline_s) for peer, listed in by_peer.items())
    )
    greetings = [answer for answer in answers if answer is not None]
    if greetings:
        # not broken off at the deadline: what it finds later still fills the routing table
        look = asyncio.create_task(dht.find_nearest_nodes([dht.node_id]))
        await asyncio.wait([look], timeout=deadline_s)
    return greetings


async def _greet_one(
    daemon: Daemon, dht: DHTNode, peer_id: PeerID, addresses: Sequence[str], deadline_s: float
) -> Greeting | None:
    protocol = dht.protocol
    try:
        await daemon.connect(peer_id, addresses, deadline_s)
        asked_at = time.time()
        request = dht_pb2.PingRequest(peer=protocol.node_info, validate=True)
        answer = await protocol.get_stub(peer_id).rpc_ping(request, timeout=deadline_s)
        took_s = time.time() - asked_at
    except P2PD_ERRORS:
        return None
    if len(answer.peer.node_id) != DHTID.HASH_NBYTES:
        return None  # it serves no DHT keys
    node_id = DHTID.from_bytes(answer.peer.node_id)
    dht.blacklist.register_success(peer_id)  # it may stand there since before it was started again
    await protocol.update_routing_table(node_id, peer_id)
    offset_s = answer.dht_time - asked_at - took_s / 2
    return Greeting(tuple(addresses), node_id, offset_s, answer.available)


def check_greetings(greetings: Collection[Greeting], serves_dht: bool) -> None:
    """Raises ClockError when this clock is wrong by most others', HiddenError when nobody reaches this peer."""
    offsets = (greeting.clock_offset_s for greeting in greetings)
    by_size = sorted((math.inf if math.isnan(offset) else offset for offset in offsets), key=abs)
    offset_s = by_size[(len(by_size) - 1) // 2]
    if abs(offset_s) > CLOCK_TOLERANCE_S:
        side = "behind" if offset_s > 0 else "ahead of"
        raise ClockError(
            f"this machine's clock is {abs(offset_s):.0f} s {side} those of most of the "
            f"{counted(len(by_size), 'peer')} asked: set it right, at most {CLOCK_TOLERANCE_S:.0f} s are tolerated"
        )
    if serves_dht and not any(greeting.reaches_us for greeting in greetings):
        raise HiddenError(
            f"none of the {counted(len(greetings), 'peer')} asked can reach this one: open its DHT port to the others, "
            "or pass the address by which they reach this machine as --host"
        )
