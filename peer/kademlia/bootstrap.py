"""How a node joins the DHT: it dials peers, and they dial back."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from peer.identity import PeerID
from peer.kademlia.lookups import Lookups
from peer.kademlia.node import KademliaNode
from peer.kademlia.search import NEIGHBOURS
from peer.transport.addresses import Multiaddress


@dataclass(frozen=True)
class BootstrapReply:
    """The answer of a peer at a bootstrap address."""

    addresses: tuple[Multiaddress, ...]
    reaches_us: bool
    """Whether that peer could dial this one back."""


async def join_through(
    dht: KademliaNode, addresses: Sequence[Multiaddress], deadline_s: float
) -> list[BootstrapReply]:
    """Pings the peers at these addresses in parallel, then looks up this peer's own neighbours.

    `deadline_s` applies to each ping and the look-up. Returns the replies of those that answered.
    """
    by_peer: dict[PeerID, list[Multiaddress]] = {}
    for address in addresses:
        if address.peer_id != dht.peer_id:
            dht.transport.contacts.note(address)
            by_peer.setdefault(address.peer_id, []).append(address)
    answers = await asyncio.gather(
        *(_greet(dht, peer, listed, deadline_s) for peer, listed in by_peer.items())
    )
    replies = [answer for answer in answers if answer is not None]
    if replies:
        # not cancelled at the deadline: nodes that it finds later still enter the routing table
        look = dht.spawn(meet_neighbours(dht), "meet DHT neighbours")
        await asyncio.wait([look], timeout=deadline_s)
    return replies


async def meet_neighbours(dht: KademliaNode) -> None:
    """Looks up this peer's own ID. Every peer that answers on the way enters the routing table."""
    await Lookups(dht).find([dht.node_id], NEIGHBOURS)


async def _greet(
    dht: KademliaNode, peer_id: PeerID, addresses: Sequence[Multiaddress], deadline_s: float
) -> BootstrapReply | None:
    answer = await dht.ping(peer_id, deadline_s, dials_back=True)
    if answer is None:
        return None
    dht.backoff.succeeded(peer_id)  # calls to it may still be held back from before its restart
    return BootstrapReply(tuple(addresses), answer.available)
