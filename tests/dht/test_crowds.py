"""A crowd of made-up peers beside a key hides nothing, in a swarm of simulated peers."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from benchmarks.simulated_p2p import Link, SimulatedIdentity, SimulatedP2P, VirtualLoop, simulated_world
from benchmarks.simulated_swarm import SimulatedPeer, SimulatedSwarm
from dht.directory import Directory
from dht.uid import UID
from peer.identity import PeerID
from peer.kademlia.hivemind import DHTID, dht_pb2
from peer.kademlia.node import ping
from peer.kademlia.validation import node_id_of

HONEST = 20
EXPERTS = 16
HIDDEN = UID(0, (2, 3))
_TRIED = 8000
"""Key pairs that are made to find those nearest to a key."""


def play(scenario: Callable[[VirtualLoop, SimulatedSwarm], Awaitable[None]]) -> None:
    with simulated_world() as loop:

        async def run() -> None:
            await scenario(loop, await SimulatedSwarm.start(loop, HONEST, EXPERTS, Link(rtt_s=0.1), seed=1))

        loop.run_until_complete(run())


async def crowd(swarm: SimulatedSwarm, key: str, number: int) -> list[PeerID]:
    """Peers nearer to the key than all others. They are known to all, store nothing, and know only each other."""
    place = DHTID.generate(source=key)
    tried: list[Any] = [SimulatedIdentity(10**6 + n) for n in range(_TRIED)]
    tried.sort(key=lambda identity: node_id_of(identity.peer_id.to_bytes()) ^ place)
    liars = tried[:number]
    names = [liar.peer_id.to_bytes() for liar in liars]

    async def find(request: Any, context: Any) -> Any:
        own = dht_pb2.NodeInfo(node_id=bytes(20))
        nothing = dht_pb2.FindResult(type=dht_pb2.NOT_FOUND, nearest_peer_ids=names[:20])
        return dht_pb2.FindResponse(results=[nothing] * len(request.keys), peer=own)

    async def store(request: Any, context: Any) -> Any:
        own = dht_pb2.NodeInfo(node_id=bytes(20))
        return dht_pb2.StoreResponse(store_ok=[True] * len(request.keys), peer=own)

    async def pong(request: Any, context: Any) -> Any:
        return dht_pb2.PingResponse(peer=dht_pb2.NodeInfo(node_id=bytes(20)), available=True)

    for liar in liars:
        p2p = SimulatedP2P(swarm.network, liar.peer_id)
        p2p.handlers |= {f"DHTProtocol.rpc_{name}": do for name, do in _named(find, store, pong).items()}
    for peer in swarm.peers:
        for liar in liars:
            await ping(peer.dht.protocol, liar.peer_id, 3.0)
    return [liar.peer_id for liar in liars]


def _named(find: Any, store: Any, pong: Any) -> dict[str, Any]:
    return {"find": find, "store": store, "ping": pong}


async def trainer(loop: VirtualLoop, swarm: SimulatedSwarm) -> tuple[SimulatedPeer, Directory]:
    """One that has just joined, through any honest peer."""
    peer = await swarm.make_peer(serves_dht=False)
    await swarm.join(peer)
    return peer, Directory(peer.registry, swarm.manifest, refresh_every_s=10, now=loop.unix_time)


async def look_around(swarm: SimulatedSwarm) -> None:
    """The nodes look at the expert, as they do all the time to see which need another host."""
    for peer in swarm.peers:
        await peer.registry.replicas([HIDDEN])


@pytest.mark.parametrize("beside", ["prefix", "node"])
def test_with_as_many_hostile_keys_beside_a_key_as_there_are_nodes_a_trainer_finds_every_expert(
    beside: str,
) -> None:
    async def scenario(loop: VirtualLoop, swarm: SimulatedSwarm) -> None:
        keys = {"prefix": swarm.keys.prefix(0), "node": swarm.keys.node(swarm.hosts[HIDDEN].peer_id)}
        await crowd(swarm, keys[beside], HONEST)
        await asyncio.sleep(600)  # what was stored before is gone
        await swarm.announce_all(300.0)
        found = 0
        for _ in range(2):
            _, directory = await trainer(loop, swarm)
            await directory.refresh()
            view = await directory.refresh()  # the first one reads no prefixes
            found += view.live_experts() == EXPERTS
        assert found == 2

    play(scenario)


def test_of_a_crowd_too_large_to_ask_them_all_the_witnesses_tell() -> None:
    """Four times as many as nodes, and more than one look-up asks."""

    async def scenario(loop: VirtualLoop, swarm: SimulatedSwarm) -> None:
        await crowd(swarm, swarm.keys.expert(HIDDEN), 4 * HONEST)
        await asyncio.sleep(600)
        await swarm.announce_all(300.0)
        for _ in range(3):
            await look_around(swarm)
        seen = 0
        for _ in range(5):
            peer, _ = await trainer(loop, swarm)
            for _ in range(4):
                peer.dht.protocol.storage.clear()
                seen += bool((await peer.registry.replicas([HIDDEN]))[HIDDEN])
        assert seen >= 19

    play(scenario)
