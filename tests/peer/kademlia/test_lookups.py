"""Look-ups and stores among simulated peers: real DHT nodes in virtual time."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator

import pytest

from benchmarks.simulated_p2p import Link, VirtualLoop, simulated_world
from benchmarks.simulated_swarm import SimulatedPeer, SimulatedSwarm
from dht.announcements import ReplicaAnnouncement, ReplicaState
from dht.uid import UID
from peer.errors import UnreachableError
from peer.identity import PeerID
from peer.kademlia.lookups import pause_after_sample
from peer.kademlia.routing import ID_BITS, id_bytes, key_id_of, node_id_of
from peer.kademlia.search import NEIGHBOURS, RttEstimator
from peer.wire import dht_pb2

HOME = UID(0, (0, 1))


@pytest.fixture
def world() -> Iterator[VirtualLoop]:
    with simulated_world() as loop:
        yield loop


def play(
    loop: VirtualLoop,
    scenario: Callable[[SimulatedSwarm], Awaitable[None]],
    nodes: int = 12,
    experts: int = 24,
    in_place: bool = True,
) -> None:
    """`in_place`: whether the swarm is put in place. Otherwise its peers join and announce, which takes 20 times as
    long.
    """

    async def run() -> None:
        await scenario(
            await SimulatedSwarm.start(loop, nodes, experts, Link(rtt_s=0.1), seed=1, in_place=in_place)
        )

    loop.run_until_complete(run())


def test_a_dead_peer_costs_one_estimated_timeout_and_not_three_seconds(world: VirtualLoop) -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        reader = swarm.peers[0]
        for _ in range(3):  # gets to know how long an answer takes
            await reader.experts.replicas([HOME])
        swarm.kill(0.4)
        swarm.network.peers[reader.peer_id.to_bytes()] = reader.transport
        began = world.time()
        found = await reader.experts.replicas(swarm.manifest.uids())
        assert world.time() - began < 1.2
        assert all(found.values()), "five holders each, so that some live"

    play(world, scenario)


def test_slow_peers_are_waited_for_when_there_are_no_others(world: VirtualLoop) -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        reader = swarm.peers[0]
        for _ in range(3):
            await reader.experts.replicas([HOME])
        swarm.network.link = Link(rtt_s=2.0)
        found = await reader.experts.replicas(swarm.manifest.uids())
        assert all(found.values())
        await reader.experts.announce([ReplicaAnnouncement(HOME, ReplicaState.SERVING)], 60.0)

    play(world, scenario, nodes=3)


@pytest.mark.parametrize("nodes", [3, 6])
def test_late_answers_for_the_first_keys_alone_do_not_hold_a_look_up_up(
    world: VirtualLoop, nodes: int
) -> None:
    """Peers are slower than usual, and one key fills their messages."""

    async def scenario(swarm: SimulatedSwarm) -> None:
        reader = swarm.peers[0]
        for _ in range(3):
            await reader.experts.replicas([HOME])
        swarm.network.link = Link(rtt_s=2.0)
        for peer in swarm.peers:
            cut_off(peer)
        began = world.time()
        with contextlib.suppress(UnreachableError):
            await reader.experts.replicas(swarm.manifest.uids())
        assert world.time() - began < 12

    play(world, scenario, nodes=nodes)


def cut_off(peer: SimulatedPeer) -> None:
    """The peer's answers have room for only one key."""
    answer = peer.transport.handlers["find"]

    async def answers_one(sender: PeerID, request: bytes) -> bytes:
        response = dht_pb2.FindResponse.FromString(await answer(sender, request))
        del response.results[1:]
        return response.SerializeToString()

    peer.transport.handlers["find"] = answers_one


def silence(peer: SimulatedPeer, *calls: str) -> None:
    """The peer never answers these calls."""

    async def waits(sender: PeerID, request: bytes) -> bytes:
        await asyncio.get_running_loop().create_future()
        return b""

    for call in calls:
        peer.transport.handlers[call] = waits


@pytest.mark.parametrize("nodes", [2, 3, 12])
@pytest.mark.parametrize("calls", [["store"], ["store", "find"]])
def test_a_silent_peer_does_not_hold_announcements_up(
    world: VirtualLoop, nodes: int, calls: list[str]
) -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        peer, liar = swarm.peers[:2]
        for _ in range(3):
            await peer.experts.announce([ReplicaAnnouncement(HOME, ReplicaState.SERVING)], 60.0)
        silence(liar, *calls)
        key = key_id_of(swarm.keys.prefix(HOME.layer))
        for n in range(1, 4):
            began = world.time()
            announcing = asyncio.create_task(
                peer.experts.announce([ReplicaAnnouncement(HOME, ReplicaState.SERVING)], 60.0 + n)
            )
            await asyncio.sleep(0.001)
            until = world.unix_time() - 0.001 + 60 + n
            own = peer.dht.storage.get(key)[peer.peer_id.to_bytes()]
            assert own.expires_at == pytest.approx(until), "its own copy waits for nobody"
            await announcing
            assert world.time() - began < 2.5
            holders = [
                other
                for other in swarm.peers
                if (entry := other.dht.storage.get(key).get(peer.peer_id.to_bytes()))
                and entry.expires_at == own.expires_at
            ]
            assert len(holders) >= min(5, nodes - 1), "others take the silent one's place"

    play(world, scenario, nodes=nodes)


def test_a_slow_peer_holds_announcements_up_for_a_second_at_most(world: VirtualLoop) -> None:
    """This holds however often it shows that it is slow, and though its answers count as others' do."""

    async def scenario(swarm: SimulatedSwarm) -> None:
        peer, liar = swarm.peers[:2]
        store = liar.transport.handlers["store"]

        async def dawdle(sender: PeerID, request: bytes) -> bytes:
            await asyncio.sleep(2.8)
            return await store(sender, request)

        liar.transport.handlers["store"] = dawdle
        for n in range(10):
            began = world.time()
            await peer.experts.announce([ReplicaAnnouncement(HOME, ReplicaState.SERVING)], 60.0 + n)
            assert world.time() - began < 1.5

    play(world, scenario, nodes=3)


async def know_one(swarm: SimulatedSwarm, bootstrap: SimulatedPeer) -> SimulatedPeer:
    """A client that has pinged one peer and knows no others."""
    client = await swarm.make_peer(serves_dht=False)
    await client.dht.ping(bootstrap.peer_id)
    return client


@pytest.mark.parametrize("seed", [0, 1])
def test_a_newcomer_that_knows_one_peer_finds_all_though_questions_are_lost(
    world: VirtualLoop, seed: int
) -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        swarm.network.rng.seed(seed)
        for _ in range(10):
            client = await know_one(swarm, swarm.rng.choice(swarm.peers))
            swarm.network.link = Link(loss=0.2)
            assert all((await client.experts.replicas(swarm.manifest.uids())).values())
            swarm.network.link = Link()

    play(world, scenario, nodes=30, experts=60)


def test_keys_for_which_nobody_answers_are_not_taken_for_empty(world: VirtualLoop) -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        (lonely,) = swarm.peers
        client, handlers = await know_one(swarm, lonely), lonely.transport.handlers
        answer = handlers["find"]
        wanted = id_bytes(key_id_of(swarm.keys.prefix(HOME.layer)))

        async def answers_some(sender: PeerID, request: bytes) -> bytes:
            if wanted in dht_pb2.FindRequest.FromString(request).keys:
                await asyncio.get_running_loop().create_future()
            return await answer(sender, request)

        handlers["find"] = answers_some
        with pytest.raises(UnreachableError, match="no DHT peer answered"):
            await client.experts.replicas(swarm.manifest.uids())

    play(world, scenario, nodes=1, experts=24)


def test_peers_that_claim_the_places_beside_a_key_are_not_found_there(world: VirtualLoop) -> None:
    """Otherwise a liar could put itself, or honest peers that don't store the key, in place of its holders."""

    async def scenario(swarm: SimulatedSwarm) -> None:
        reader, key = swarm.peers[0], key_id_of(swarm.keys.prefix(HOME.layer))
        for n, liar in enumerate(swarm.peers[6:], 1):
            liar.dht.info.node_id = id_bytes(key ^ n)
            await liar.dht.ping(reader.peer_id)
        found = (await reader.lookups.find([key]))[key]
        places = {node_id_of(peer.peer_id.to_bytes()) for peer in swarm.peers}
        assert set(found.search.nearest()) <= places
        assert {node for node, _ in reader.dht.table} <= places
        assert found.entries

    play(world, scenario)


def test_many_keys_travel_in_few_calls(world: VirtualLoop) -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        before = swarm.network.traffic.by_method["find"]
        found = await swarm.peers[0].experts.replicas(swarm.manifest.uids())
        assert all(found.values())
        assert swarm.network.traffic.by_method["find"] - before <= 3 * len(swarm.peers)

    play(world, scenario)


def test_256_experts_are_renewed_with_a_bounded_number_of_stores(world: VirtualLoop) -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        peer = swarm.peers[0]
        announced = [ReplicaAnnouncement(uid, ReplicaState.SERVING, 1) for uid in swarm.manifest.uids()]
        await peer.experts.announce(announced, 300.0)
        calls = swarm.network.traffic.by_method
        finds, stores, began = calls["find"], calls["store"], world.time()
        await peer.experts.announce(announced, 301.0)
        assert world.time() - began < 1.0
        assert calls["store"] - stores <= 8, "one record, at a few holders"
        assert calls["find"] == finds, "the same ones"

    play(world, scenario, experts=256)


def test_records_are_stored_at_the_nearest_nodes(world: VirtualLoop) -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        for peer in swarm.peers:
            key = key_id_of(swarm.keys.node(peer.peer_id))
            holders = {p.dht.node_id for p in swarm.peers if p.dht.storage.get(key)}
            nearest = sorted((p.dht.node_id for p in swarm.peers), key=key.__xor__)
            assert holders >= set(nearest[:5])

    play(world, scenario, nodes=20, in_place=False)


@pytest.mark.slow
def test_a_search_finds_the_nearest_of_all_nodes(world: VirtualLoop) -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        hits = asked = 0
        for n in range(20):
            key, reader = key_id_of(f"key {n}"), swarm.rng.choice(swarm.peers)
            found = (await reader.lookups.find([key], NEIGHBOURS))[key].search.nearest()
            nearest = sorted((peer.dht.node_id for peer in swarm.peers), key=key.__xor__)[:20]
            assert found == sorted(found, key=key.__xor__)
            assert found[0] == nearest[0]
            hits += len({*found} & {*nearest})
            asked += len(nearest)
        assert hits >= 0.97 * asked

    play(world, scenario, nodes=50, in_place=False)


def test_a_node_that_knows_nobody_finds_itself_and_what_it_stores(world: VirtualLoop) -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        lonely = await swarm.make_peer()
        await lonely.experts.announce([ReplicaAnnouncement(HOME, ReplicaState.SERVING)], 60.0)
        keys = [key_id_of(swarm.keys.prefix(HOME.layer)), key_id_of("nothing")]
        found = await lonely.lookups.find(keys)
        assert [found[key].search.nearest() for key in keys] == [[lonely.dht.node_id]] * 2
        assert [bool(found[key].entries) for key in keys] == [True, False]

    play(world, scenario, nodes=1)


def test_a_client_whose_peers_are_all_silent_is_told_so(world: VirtualLoop) -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        client = await swarm.make_peer(serves_dht=False)
        await swarm.join(client)
        swarm.kill(1.0)
        with pytest.raises(UnreachableError, match="no DHT peer answered"):
            await client.experts.replicas([HOME])
        with pytest.raises(UnreachableError, match="no DHT peer"):
            await client.experts.announce([ReplicaAnnouncement(HOME, ReplicaState.SERVING)], 60.0)

    play(world, scenario)


def test_a_bootstrap_that_answers_and_knows_nobody_is_enough_for_two(world: VirtualLoop) -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        lonely, newcomer = await swarm.make_peer(), await swarm.make_peer()
        await swarm.join(newcomer, [lonely])
        assert await newcomer.experts.replicas([HOME]) == {HOME: ()}
        await lonely.experts.announce([ReplicaAnnouncement(HOME, ReplicaState.SERVING)], 60.0)
        (replica,) = (await newcomer.experts.replicas([HOME]))[HOME]
        assert replica.peer_id == lonely.peer_id
        assert await newcomer.experts.prefixes([(0, ()), (0, (0,))], 1000) == {(0, ()): {0}, (0, (0,)): {1}}

    play(world, scenario, nodes=2)


def test_every_coordinate_of_a_large_grid_is_read_and_no_value_passes_4_kilobytes(
    world: VirtualLoop,
) -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        for first in range(0, 1000, 250):
            uids = [UID(1, (coordinate, 999)) for coordinate in range(first, first + 250)]
            await swarm.peers[0].experts.announce(
                [ReplicaAnnouncement(uid, ReplicaState.SERVING) for uid in uids], 60.0
            )
        reader = await swarm.make_peer(serves_dht=False)
        await swarm.join(reader)
        swarm.network.traffic.largest = 0
        found = await reader.experts.prefixes([(1, ()), (1, (7,))], 1000)
        assert found == {(1, ()): set(range(1000)), (1, (7,)): {999}}
        assert 1_000 < swarm.network.traffic.largest < 4_000

    play(world, scenario, nodes=4)


def test_a_second_look_up_starts_at_the_holders(world: VirtualLoop) -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        client = await swarm.make_peer(serves_dht=False)
        await swarm.join(client)
        key = key_id_of(swarm.keys.prefix(HOME.layer))
        await client.lookups.find([key])
        found = (await client.lookups.find([key]))[key]
        assert found.entries
        assert found.search.found_after == 1
        assert found.search.rounds <= 2

    play(world, scenario, nodes=24)


def test_samples_show_within_which_distance_the_holders_are_and_honest_look_ups_stay_cheap(
    world: VirtualLoop,
) -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        for reader in swarm.peers[:5]:
            await reader.lookups.sample()
            assert 2 < reader.lookups.usual_reach() * 100 / 2**160 < 11
            await reader.experts.replicas([HOME])  # samples once more
            await asyncio.sleep(1)
            before = swarm.network.traffic.by_method["find"]
            await reader.experts.replicas([UID(0, (1, 1))])
            assert swarm.network.traffic.by_method["find"] - before <= 20

    play(world, scenario, nodes=100)


def test_a_peer_that_was_alone_at_first_soon_stores_at_few_of_those_that_have_joined(
    world: VirtualLoop,
) -> None:
    async def scenario(swarm: SimulatedSwarm) -> None:
        (founder,) = swarm.peers
        assert founder.lookups.estimated_nodes <= 5
        for _ in range(23):
            await swarm.join(await swarm.make_peer(), [founder])
        await founder.experts.replicas([HOME])
        await asyncio.sleep(2)
        assert 12 < founder.lookups.estimated_nodes < 48
        stores = swarm.network.traffic.by_method["store"]
        uids = [UID(0, (0, number)) for number in range(4)]
        for uid in uids:
            await founder.experts.announce([ReplicaAnnouncement(uid, ReplicaState.SERVING)], 60.0)
        assert swarm.network.traffic.by_method["store"] - stores <= 10 * len(uids)

    play(world, scenario, nodes=1)


def test_the_more_a_sample_costs_the_later_the_next_one_is_at_each_peers_own_pace() -> None:
    for cost, mean_s in ((0, 300), (3_000, 300), (30_000, 500), (120_000, 900), (10**9, 900)):
        pauses = [pause_after_sample(cost, node) for node in (0, 2 ** (ID_BITS - 1), 2**ID_BITS - 1)]
        assert pauses == pytest.approx([0.5 * mean_s, mean_s, 1.5 * mean_s])


def test_a_request_that_fails_through_a_bug_counts_as_unanswered(
    world: VirtualLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a look-up would wait for an answer that never comes."""

    async def breaks(*question: object) -> None:
        raise RuntimeError("a mistake")

    async def scenario(swarm: SimulatedSwarm) -> None:
        client = await swarm.make_peer(serves_dht=False)
        await swarm.join(client)
        monkeypatch.setattr(client.dht, "find", breaks)
        monkeypatch.setattr(asyncio.get_running_loop(), "call_exception_handler", lambda context: None)
        async with asyncio.timeout(60):
            with pytest.raises(UnreachableError, match="no DHT peer answered"):
                await client.experts.replicas([HOME])

    play(world, scenario)


def test_the_timeout_follows_the_round_trips() -> None:
    trips = RttEstimator()
    assert trips.timeout_s == 1.0
    for _ in range(50):
        trips.note(0.1)
    assert trips.timeout_s == 0.3, "never less"
    for _ in range(50):
        trips.note(2.0)
    assert 2.0 < trips.timeout_s <= 3.0
