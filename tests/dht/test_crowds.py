"""A crowd of invented peers next to a key hides nothing, in a swarm of simulated peers."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from dht_peers import forget_all

from benchmarks.simulated_p2p import Link, SimulatedIdentity, SimulatedTransport, VirtualLoop, simulated_world
from benchmarks.simulated_swarm import SimulatedPeer, SimulatedSwarm
from dht.directory import Directory
from dht.uid import UID
from dht.upkeep import lifetime_s
from peer.identity import PeerID
from peer.kademlia.routing import BUCKET_SIZE, ID_BITS, key_id_of, node_id_of
from peer.wire import dht_pb2

HONEST = 20
EXPERTS = 16
HIDDEN = UID(0, (2, 3))
_TRIED = 8000
"""The number of key pairs that are made to find the ones nearest to a key."""


def play(scenario: Callable[[VirtualLoop, SimulatedSwarm], Awaitable[None]]) -> None:
    with simulated_world() as loop:

        async def run() -> None:
            link = Link(rtt_s=0.1)
            await scenario(
                loop, await SimulatedSwarm.start(loop, HONEST, EXPERTS, link, seed=1, in_place=True)
            )

        loop.run_until_complete(run())


def nearest(key: str) -> list[PeerID]:
    """Made-up peers, those nearest to the key first."""
    place = key_id_of(key)
    made: list[Any] = [SimulatedIdentity(10**6 + n) for n in range(_TRIED)]
    return sorted((one.peer_id for one in made), key=lambda peer_id: node_id_of(peer_id.to_bytes()) ^ place)


def filling_buckets(key: str, buckets: int, each: int) -> list[PeerID]:
    """Made-up peers for the buckets nearest to the key in most peers' routing tables: `each` for every bucket."""
    place, shift = key_id_of(key), ID_BITS - 5  # full buckets far from a peer's own ID hold 1/32 of all IDs
    by_bucket: dict[int, list[PeerID]] = {}
    for peer_id in nearest(key):
        by_bucket.setdefault((node_id_of(peer_id.to_bytes()) ^ place) >> shift, []).append(peer_id)
    return [peer_id for bucket in range(buckets) for peer_id in by_bucket[bucket][:each]]


async def crowd(swarm: SimulatedSwarm, liars: Sequence[PeerID]) -> None:
    """Adds peers that everybody knows. They store nothing and name only each other."""
    names, rng = [liar.to_bytes() for liar in liars], random.Random(1)
    own = dht_pb2.NodeInfo(node_id=bytes(20))

    async def find(sender: PeerID, request: bytes) -> bytes:
        asked = len(dht_pb2.FindRequest.FromString(request).keys)
        named = rng.sample(names, BUCKET_SIZE)
        nothing = dht_pb2.FindResult(type=dht_pb2.RESULT_TYPE_NOT_FOUND, nearest_peer_ids=named)
        return dht_pb2.FindResponse(results=[nothing] * asked, peer=own).SerializeToString()

    async def store(sender: PeerID, request: bytes) -> bytes:
        brought = len(dht_pb2.StoreRequest.FromString(request).keys)
        return dht_pb2.StoreResponse(store_ok=[True] * brought, peer=own).SerializeToString()

    async def pong(sender: PeerID, request: bytes) -> bytes:
        return dht_pb2.PingResponse(peer=own, available=True).SerializeToString()

    for liar in liars:
        transport = SimulatedTransport(swarm.network, liar)
        transport.handlers |= {"find": find, "store": store, "ping": pong}
    for peer in swarm.peers:
        for liar in liars:
            await peer.dht.ping(liar)


async def trainer(loop: VirtualLoop, swarm: SimulatedSwarm) -> tuple[SimulatedPeer, Directory]:
    """A trainer that has just joined through a random honest peer."""
    peer = await swarm.make_peer(serves_dht=False)
    await swarm.join(peer)
    return peer, Directory(peer.experts, swarm.manifest, refresh_every_s=10, now=loop.unix_time)


async def look_around(swarm: SimulatedSwarm) -> None:
    """All nodes look at the expert, as they regularly do to see which experts need another host."""
    for peer in swarm.peers:
        await peer.experts.replicas([HIDDEN])


@pytest.mark.parametrize("beside", ["prefix", pytest.param("node", marks=pytest.mark.slow)])
def test_with_as_many_hostile_keys_beside_a_key_as_there_are_nodes_a_trainer_finds_every_expert(
    beside: str,
) -> None:
    async def scenario(loop: VirtualLoop, swarm: SimulatedSwarm) -> None:
        keys = {"prefix": swarm.keys.prefix(0), "node": swarm.keys.node(swarm.hosts[HIDDEN].peer_id)}
        await crowd(swarm, nearest(keys[beside])[:HONEST])
        await asyncio.sleep(600)  # what was stored before is gone
        await swarm.announce_all(300.0)
        await look_around(swarm)
        found = 0
        for _ in range(2):
            _, directory = await trainer(loop, swarm)
            await directory.refresh()
            view = await directory.refresh()  # the first one reads no prefixes
            found += view.live_experts() == EXPERTS
        assert found == 2

    play(scenario)


def test_known_experts_stay_in_view_as_long_as_they_live_when_their_prefixes_are_hidden(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(loop: VirtualLoop, swarm: SimulatedSwarm) -> None:
        peer, directory = await trainer(loop, swarm)
        assert (await directory.refresh()).live_experts() == EXPERTS

        async def nothing(prefixes: Any, size: int) -> Any:
            return {prefix: set() for prefix in prefixes}

        monkeypatch.setattr(peer.experts, "prefixes", nothing)
        for _ in range(2):
            assert (await directory.refresh()).live_experts() == EXPERTS
        await asyncio.sleep(700)
        assert (await directory.refresh()).live_experts() == 0, "nobody announced them any more"
        assert not any((await directory.refresh()).replicas.values())

    play(scenario)


@pytest.mark.slow
def test_a_crowd_too_large_to_ask_them_all_hides_nothing() -> None:
    """The crowd is four times as large as the honest nodes, and larger than the number of near peers that one look-up
    asks.
    """

    async def scenario(loop: VirtualLoop, swarm: SimulatedSwarm) -> None:
        await crowd(swarm, nearest(swarm.keys.prefix(HIDDEN.layer))[: 4 * HONEST])
        await asyncio.sleep(600)
        await swarm.announce_all(300.0)
        for _ in range(3):
            await look_around(swarm)
        seen = 0
        for _ in range(5):
            peer, _ = await trainer(loop, swarm)
            for _ in range(4):
                forget_all(peer.dht.storage)
                seen += bool((await peer.experts.replicas([HIDDEN]))[HIDDEN])
        assert seen >= 19

    play(scenario)


@pytest.mark.slow
def test_witnesses_find_what_a_crowd_hides_that_fills_all_buckets_near_a_key() -> None:
    """There are more liars near the key than a look-up asks there, and all peers know so many of them that look-ups
    reach hardly any honest node. What one witness returns is stored, and found by others.
    """

    async def scenario(loop: VirtualLoop, swarm: SimulatedSwarm) -> None:
        await crowd(swarm, filling_buckets(swarm.keys.prefix(HIDDEN.layer), buckets=4, each=25))
        await asyncio.sleep(600)
        await swarm.announce(swarm.hosts[HIDDEN], [HIDDEN], 600.0)
        for _ in range(6):
            await look_around(swarm)
        peer, _ = await trainer(loop, swarm)
        seen = [(await peer.experts.replicas([HIDDEN]))[HIDDEN] for peer in (*swarm.peers, peer)]
        assert sum(map(bool, seen)) == HONEST + 1

    play(scenario)


def test_writers_and_new_readers_get_past_a_crowd_that_fills_all_buckets_near_a_key() -> None:
    """Nobody else looks for the expert, so no copies spread. The host's last record is one that it stores without
    looking for the nearest nodes, if it usually does.
    """

    async def scenario(loop: VirtualLoop, swarm: SimulatedSwarm) -> None:
        await crowd(swarm, filling_buckets(swarm.keys.prefix(HIDDEN.layer), buckets=4, each=25))
        await asyncio.sleep(600)
        host, period_s = swarm.hosts[HIDDEN], 60.0
        for _ in range(4):
            await swarm.announce(host, [HIDDEN], lifetime_s(period_s))
            await asyncio.sleep(period_s)
        seen = 0
        for _ in range(6):
            peer, _ = await trainer(loop, swarm)
            seen += bool((await peer.experts.replicas([HIDDEN]))[HIDDEN])
        assert seen == 6

    play(scenario)
