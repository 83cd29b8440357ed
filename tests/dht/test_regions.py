"""Where nodes announce their experts, and that readers find all of them there, however many there are."""

import asyncio
import contextlib
import math
import random
import tracemalloc
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loop_holds import holds

from benchmarks.simulated_p2p import Link, VirtualLoop, simulated_world
from benchmarks.simulated_swarm import SimulatedPeer, SimulatedSwarm
from dht.announcements import Replica, ReplicaAnnouncement, ReplicaState, announced, read_replicas
from dht.experts import ExpertRegistry
from dht.manifest import Manifest
from dht.records import INDEX_PIECE, MAX_REPLICAS_OF_RECORD, sign_record
from dht.regions import (
    CROWDED_BYTES,
    LEFT_BY_HOSTS,
    LEFT_BY_READERS,
    STAYS_AT_ROW,
    Prefix,
    Region,
    RegionMap,
)
from dht.registry import Entries
from dht.uid import UID
from peer.errors import RecordError, UnreachableError
from peer.identity import PeerID
from peer.kademlia.lookups import Item
from peer.kademlia.search import DEFAULT_LIMITS
from peer.kademlia.validation import MAX_KEY_BYTES
from peer.loop import TimeSlices
from peer.wire import records_pb2

SERVING, WITHDRAWN = ReplicaState.SERVING, ReplicaState.WITHDRAWN
ME = PeerID(b"\x12\x20" + bytes(32))
NOBODY = Region({}, frozenset(), 0, 0)
SPLIT = Region({}, frozenset({0, 1}), 0, 0)
FULL = Region({}, frozenset(), 40, CROWDED_BYTES + 1)
SOMEBODY = Region(
    {UID(0, (0, 1)): [Replica(UID(0, (0, 1)), ME, SERVING, 0, 0, 0.0, 0.0)]}, frozenset(), 1, 700
)


class Clock:
    def __init__(self) -> None:
        self.time = 1e9

    def now(self) -> float:
        return self.time


def play(scenario: Callable[[VirtualLoop, SimulatedSwarm], Coroutine[Any, Any, None]], nodes: int) -> None:
    with simulated_world() as loop:

        async def run() -> None:
            swarm = await SimulatedSwarm.start(loop, nodes, 16, Link(rtt_s=0.05), seed=1, in_place=True)
            await scenario(loop, swarm)

        loop.run_until_complete(run())


async def announce(peer: SimulatedPeer, *uids: UID, lifetime_s: float = 90.0) -> None:
    await peer.experts.announce([ReplicaAnnouncement(uid, SERVING, 1) for uid in uids], lifetime_s)


def test_a_claim_of_an_expert_that_others_serve_keeps_no_index_entry_alive() -> None:
    async def scenario(loop: VirtualLoop, swarm: SimulatedSwarm) -> None:
        claimant, host, reader = swarm.peers[:3]
        uid = UID(1, (1, 1))
        for peer in (claimant, host):
            for prefix in ((1, ()), (1, (1,))):
                peer.experts.regions.note(prefix, [0], SPLIT)
        await announce(host, uid, lifetime_s=100.0)
        await asyncio.sleep(40)
        assert hosts_of(await claimant.experts.replicas([uid])) == {uid: {host.peer_id}}
        claim = ReplicaAnnouncement(uid, ReplicaState.CLAIMED, has_hosts=True)
        await claimant.experts.announce([claim], 150.0)

        async def active() -> frozenset[int]:
            return (await reader.experts.prefixes([(1, (1,))], 4))[1, (1,)]

        assert await active() == {1}
        await asyncio.sleep(70)
        assert await active() == set(), "the host has died, and the claim may have failed long ago"
        await announce(claimant, uid, lifetime_s=100.0)
        assert await active() == {1}, "it serves the expert now"

    play(scenario, nodes=8)


def hosts_of(found: dict[UID, tuple[Replica, ...]]) -> dict[UID, set[PeerID]]:
    return {uid: {replica.peer_id for replica in replicas} for uid, replicas in found.items()}


def believe(nodes: float, *peers: SimulatedPeer) -> None:
    """Lets these peers estimate that there are so many DHT nodes for each layer."""
    for peer in peers:
        peer.experts.regions._nodes = lambda: nodes
        peer.experts.regions._estimate = 0.0, -math.inf


def depths(peer: SimulatedPeer) -> set[int]:
    return {len(coordinate) for _, coordinate in peer.experts.home_of.values()}


@given(st.sets(st.tuples(st.integers(0, 9), st.integers(0, 4095)), max_size=40), st.integers(0, 2**31))
def test_what_a_record_says_of_a_region_is_read_from_it(
    below: set[tuple[int, int]], queued_rows: int
) -> None:
    uids = [UID(3, (7, *some)) for some in sorted(below)]
    said = [ReplicaAnnouncement(uid, SERVING, n) for n, uid in enumerate(uids)]
    payload = announced(said, 1, queued_rows)
    payload.expires_at = 5.0
    assert read_replicas(payload, 3, (7,), ME) == {
        uid: Replica(uid, ME, SERVING, n, queued_rows, 0.0, 5.0) for n, uid in enumerate(uids)
    }


@pytest.mark.parametrize(
    "replicas",
    [
        [{"state": 2, "following": [1]}, {"state": 2, "following": [1]}],
        [{"state": 2}],
        [{"state": 9, "following": [1]}],
    ],
    ids=["twice", "of-the-prefix-itself", "unknown-state"],
)
def test_a_record_with_a_wrong_replica_is_refused_whole(replicas: Any) -> None:
    payload = records_pb2.RecordPayload(hosting={"replicas": replicas})
    with pytest.raises(RecordError):
        read_replicas(payload, 0, (1,), ME)


@pytest.mark.parametrize("at_layer", [FULL, SPLIT], ids=["full", "split"])
def test_a_node_announces_at_the_layer_until_it_is_crowded_and_follows_others_down(at_layer: Region) -> None:
    clock, uid = Clock(), UID(0, (2, 3))
    regions = RegionMap(clock.now, random.Random(1))
    assert regions.unread([uid], []) == [uid]
    regions.note((0, ()), [0], NOBODY)
    assert regions.unread([uid], []) == []
    assert regions.homes([uid]) == {uid: (0, ())}
    regions.note((0, ()), [0], at_layer)
    assert regions.unread([uid], []) == [uid], "the row is not known"
    regions.note((0, (2,)), [0], NOBODY)
    assert regions.homes([uid]) == {uid: (0, (2,))}
    regions.note((0, (2,)), [0], at_layer)
    assert regions.homes([uid]) == {uid: uid}
    several = [UID(0, (2, n)) for n in range(STAYS_AT_ROW)]
    assert set(regions.homes(several).values()) == {(0, (2,))}


def test_whoever_hides_the_index_in_one_look_sends_no_host_back_to_where_nobody_reads() -> None:
    clock, uid = Clock(), UID(0, (2, 3))
    regions = RegionMap(clock.now, random.Random(1))
    for _ in range(2):
        clock.time += 10
        regions.note((0, ()), [0], SPLIT)
        regions.note((0, (2,)), [0], NOBODY)
    regions.note((0, ()), [0], NOBODY)
    assert regions.homes([uid]) == {uid: (0, (2,))}
    assert regions.depths(uid) == [1]
    clock.time += 1000
    for prefix in ((0, ()), (0, (2,))):
        regions.note(prefix, [0], NOBODY)
    assert regions.homes([uid]) == {uid: (0, ())}
    assert regions.depths(uid) == [0], "by now, nobody has said for long that it has split"


def test_in_a_large_swarm_nobody_announces_at_the_layer_and_in_a_larger_one_nobody_begins_there() -> None:
    clock, uid, nodes = Clock(), UID(0, (2, 3)), [LEFT_BY_HOSTS - 1]
    regions = RegionMap(clock.now, random.Random(1), (4, 4), lambda: nodes[0])
    for prefix in ((0, ()), (0, (2,))):
        regions.note(prefix, [0], NOBODY)
    assert regions.homes([uid]) == {uid: (0, ())}
    nodes[0] = LEFT_BY_HOSTS
    assert regions.homes([uid]) == {uid: (0, ())}, "the estimate is not made again at once"
    clock.time += 60
    assert regions.homes([uid]) == {uid: (0, (2,))}
    assert regions.depths(uid) == [0], "others may think that the swarm is smaller"
    assert not regions.has_split(0)
    nodes[0], clock.time = LEFT_BY_READERS, clock.time + 60
    assert regions.homes([uid]) == {uid: (0, (2,))}
    assert [regions.depths(below) for below in ((0, ()), (0, (2,)), uid)] == [[0], [1], [1]]
    assert regions.has_split(0)


def test_the_estimate_is_for_each_layer_and_a_grid_without_rows_has_only_the_layer() -> None:
    spec = {"name": "simulated", "model": {"layers": 4}, "experts": {"grid": (8, 8)}}
    registry: Any = SimpleNamespace(
        now=Clock().now,
        rng=random.Random(1),
        keys=None,
        lookups=SimpleNamespace(estimated_nodes=4.0 * LEFT_BY_READERS),
    )
    for layers, grid, begins in ((4, (8, 8), 1), (5, (8, 8), 0), (4, (64,), 0)):
        spec |= {"model": {"layers": layers}, "experts": {"grid": grid}}
        regions = ExpertRegistry(registry, Manifest.model_validate(spec)).regions
        uid = UID(0, (0,) * len(grid))
        assert regions.depths(uid) == [begins]
        assert regions.unread([uid], []) == [uid]
        regions.note((0, ()), [0], NOBODY)
        assert regions.homes([uid]) == {uid: (0, (0,) if len(grid) > 1 else ())}


@pytest.mark.parametrize(
    ("writers", "readers"),
    [
        (LEFT_BY_HOSTS - 1, LEFT_BY_READERS - 1),
        (LEFT_BY_HOSTS, LEFT_BY_READERS),
        (LEFT_BY_HOSTS, 0),
        (LEFT_BY_READERS, 1),
        (1, LEFT_BY_READERS),
    ],
    ids=["all-at-layer", "all-at-rows", "reader-expects-few", "reader-expects-one", "writers-expect-one"],
)
def test_everybody_is_found_if_peers_estimate_the_size_of_the_swarm_differently(
    writers: int, readers: int
) -> None:
    """Some rows of the grid are empty."""

    async def scenario(loop: VirtualLoop, swarm: SimulatedSwarm) -> None:
        uids, reader = [UID(1, (row, n)) for row in range(4) for n in range(4)], swarm.peers[0]
        believe(writers, *swarm.peers[1:])
        believe(readers, reader)
        hosts = {uid: swarm.peers[n] for n, uid in enumerate(uids[:7], 1)}
        for uid, peer in hosts.items():
            await announce(peer, uid)
            assert depths(peer) == {int(writers >= LEFT_BY_HOSTS)}
        for _ in range(3):
            found = hosts_of(await reader.experts.replicas(uids))
            assert found == {uid: {hosts[uid].peer_id} if uid in hosts else set() for uid in uids}
            active = await reader.experts.prefixes([(1, (row,)) for row in range(4)], 4)
            assert [*map(len, active.values())] == [4, 3, 0, 0]
            await asyncio.sleep(20)

    play(scenario, nodes=8)


def test_in_a_large_swarm_the_key_of_a_layer_is_read_only_if_nothing_is_below() -> None:
    async def scenario(loop: VirtualLoop, swarm: SimulatedSwarm) -> None:
        reader = swarm.peers[0].experts
        believe(LEFT_BY_READERS, *swarm.peers)
        await announce(swarm.peers[1], UID(1, (0, 1)))
        read: list[Prefix] = []
        note = reader.regions.note
        reader.regions.note = lambda prefix, *rest: read.append(prefix) or note(prefix, *rest)  # type: ignore
        await reader.replicas([UID(1, (0, n)) for n in range(4)])
        assert (1, ()) not in read
        await reader.replicas([UID(1, (1, n)) for n in range(4)])
        assert read.count((1, ())) == 1

    play(scenario, nodes=8)


def test_a_walk_goes_on_below_a_row_that_shows_nothing_in_one_look() -> None:
    """In a grid of three dimensions, and while the layer is not known to have split."""

    async def scenario(loop: VirtualLoop, swarm: SimulatedSwarm) -> None:
        host, reader = swarm.peers[1:3]
        uid = UID(1, (0, 0, 1))
        for peer in (host, reader):
            peer.experts.regions._grid = (4, 4, 4)
        believe(LEFT_BY_READERS, host, reader)
        for prefix in ((1, (0,)), (1, (0, 0))):
            host.experts.regions.note(prefix, [0], SPLIT)
            host.experts.regions.note(prefix, [0], SPLIT)
        await announce(host, uid)
        assert host.experts.home_of[uid] == uid
        reader.experts.regions.note((1, (0,)), [0], SPLIT)
        region = ExpertRegistry._region

        async def hidden(self: ExpertRegistry, prefix: Prefix, *rest: Any) -> Region:
            return NOBODY if prefix == (1, (0,)) else await region(self, prefix, *rest)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(ExpertRegistry, "_region", hidden)
            found = hosts_of(await reader.experts.replicas([uid]))
        assert found == {uid: {host.peer_id}}

    play(scenario, nodes=8)


def test_many_experts_of_one_node_are_announced_in_several_records() -> None:
    regions = RegionMap(Clock().now, random.Random(1))
    uids = [UID(0, (n // 100, n % 100)) for n in range(MAX_REPLICAS_OF_RECORD + 1)]
    homes = Counter(regions.homes(uids).values())
    assert max(homes.values()) == 100
    assert all(len(coordinate) == 1 for _, coordinate in homes)


def test_what_was_read_before_the_clock_was_set_back_is_read_again() -> None:
    clock = Clock()
    regions = RegionMap(clock.now, random.Random(1))
    regions.note((0, ()), [0], NOBODY)
    assert regions.recent((0, ()), [0]) is NOBODY
    clock.time -= 3600
    assert regions.recent((0, ()), [0]) is None
    regions.note((1, ()), [0], NOBODY)
    assert len(regions._just_read) == 1, "what nobody uses again is not kept"


def test_a_prefix_that_has_split_and_is_empty_is_passed_over_for_a_while() -> None:
    clock, uid = Clock(), UID(0, (2, 3))
    regions = RegionMap(clock.now, random.Random(1))
    assert regions.depths(uid) == [0]
    regions.note((0, ()), [0], SPLIT)
    regions.note((0, ()), [0, 1], SPLIT)
    assert regions.depths(uid) == [0, 1], "whoever has answered may hide them"
    clock.time += 10
    regions.note((0, ()), [0], SPLIT)
    assert regions.depths(uid) == [1]
    replica = Replica(uid, ME, SERVING, 0, 0, 0.0, 0.0)
    regions.note((0, ()), [0], Region({uid: [replica]}, SPLIT.active, 1, 700))
    assert regions.depths(uid) == [0, 1], "somebody is there, or says that others are below"
    for _ in range(2):
        clock.time += 10
        regions.note((0, ()), [0], SPLIT)
        regions.note((0, (2,)), [0], SPLIT)
    assert regions.depths(uid) == [2]
    clock.time += 10_000
    assert regions.depths(uid) == [0]


@given(
    st.lists(
        st.tuples(
            st.sampled_from([0.0, 1.0, 200.0, 299.0, 300.0, 700.0]),
            st.sampled_from([(), (0,), (1,), (2,), (0, 1), (1, 1), (2, INDEX_PIECE)]),
            st.sampled_from([[0], [1], [0, 1]]),
            st.sampled_from([NOBODY, SPLIT, FULL, SOMEBODY]),
        ),
        max_size=30,
    )
)
def test_what_a_peer_forgets_makes_no_difference(
    reads: list[tuple[float, tuple[int, ...], list[int], Region]],
) -> None:
    clock = Clock()
    forgets, remembers = (RegionMap(clock.now, random.Random(1)) for _ in range(2))
    uids = [UID(0, (0, 1)), UID(0, (1, 1)), UID(0, (2, INDEX_PIECE))]
    for passes_s, coordinate, pieces, region in reads:
        clock.time += passes_s
        read = [] if len(coordinate) == 2 else pieces
        forgets.note((0, coordinate), read, region)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RegionMap, "_forget_some", lambda regions, now: None)
            remembers.note((0, coordinate), read, region)
        assert forgets.unread(uids, []) == remembers.unread(uids, [])
        assert forgets.homes(uids) == remembers.homes(uids)
        assert forgets.has_split(0) == remembers.has_split(0)
        for uid in uids:
            assert {*forgets.depths(uid)} >= {*remembers.depths(uid)}, "it reads more rather than less"


def test_a_writer_relies_only_on_the_pieces_of_the_index_that_it_has_read_lately() -> None:
    clock, near, far = Clock(), UID(0, (2, 3)), UID(0, (INDEX_PIECE + 2, 3))
    regions = RegionMap(clock.now, random.Random(1))
    regions.note((0, ()), [0], NOBODY)
    assert regions.unread([near, far], []) == [far]
    clock.time += 200
    regions.note((0, ()), [1], NOBODY)
    assert regions.unread([near, far], []) == []
    for _ in range(2):
        clock.time += 100
        regions.note((0, ()), [0], NOBODY)
        assert regions.unread([near, far], []) == [], "a look-up of one expert makes it forget no other"
    clock.time += 101
    regions.note((0, ()), [0], NOBODY)
    assert regions.unread([near, far], []) == [far]


def test_a_piece_of_the_index_that_leads_nowhere_any_more_does_not_count_as_long_as_others_do() -> None:
    clock, near, far = Clock(), UID(0, (2, 3)), UID(0, (INDEX_PIECE + 2, 3))
    regions = RegionMap(clock.now, random.Random(1))
    regions.note((0, ()), [0, 1], Region({}, frozenset({2, INDEX_PIECE + 2}), 0, 0))
    assert regions.homes([near, far]) == {near: (0, (2,)), far: (0, (INDEX_PIECE + 2,))}
    for _ in range(4):
        clock.time += 250
        regions.note((0, ()), [0, 1], SPLIT)
        regions.note((0, (2,)), [0], SOMEBODY)
    assert regions.homes([near, far]) == {near: (0, (2,)), far: (0, ())}
    assert regions.depths(far) == [0]


@pytest.mark.parametrize("first", [NOBODY, FULL], ids=["empty", "full"])
def test_a_peer_forgets_prefixes_that_it_has_not_read_for_long(first: Region) -> None:
    clock = Clock()
    regions = RegionMap(clock.now, random.Random(1))
    for row in range(2000):
        regions.note((0, (row,)), [0], SOMEBODY if row else first)
        clock.time += 10
    assert len(regions._seen) < 60, "it has read 30 in the last five minutes"


def test_a_row_that_has_split_is_read_again_at_once_only_for_experts_that_are_announced_there() -> None:
    clock, stays, other = Clock(), UID(0, (0, 1)), UID(0, (0, 2))
    regions = RegionMap(clock.now, random.Random(1), (4, 4))
    row = Region(SOMEBODY.replicas, frozenset({2}), 1, 700)
    for times in range(3):
        regions.note((0, ()), [0], SPLIT)
        regions.note((0, (0,)), [0], row)
        assert regions.depths(stays)[-2:] == [1, 2]
        assert (1 in regions.depths(other)) is (times < 2), "one answer, or two at one moment, may be a lie"
        clock.time += 1 + 3 * times
    assert regions.depths((0, (0,)))[-1] == 1, "what is active there is read anyway"
    clock.time += 300
    assert 1 in regions.depths(other), "others may announce there by now"


def test_what_is_announced_outside_the_grid_or_was_not_read_hides_nobody_and_costs_nothing() -> None:
    """Anybody may announce experts with coordinates of any size, or more of them than anybody reads."""
    clock, uid, far = Clock(), UID(0, (0, 2)), UID(0, (0, 2**32 - 1))
    regions = RegionMap(clock.now, random.Random(1), (4, 4))
    replica = Replica(far, ME, SERVING, 0, 0, 0.0, 0.0)

    def read(unread: int) -> list[int]:
        for _ in range(3):
            regions.note((0, ()), [0], Region({UID(0, (2**31, 0)): [replica]}, frozenset({0}), 1, 700))
            regions.note((0, (0,)), [0], Region({far: [replica]}, frozenset({2}), 1, 700, unread))
            clock.time += 3
        return regions.depths(uid)

    tracemalloc.start()
    try:
        assert read(unread=5)[-2:] == [1, 2]
        clock.time += 300
        assert read(unread=0)[-1:] == [2]
        assert 1 not in regions.depths(uid)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 1e6, "a set of bits up to that coordinate would take 512 MB"


def test_an_entry_of_few_hosts_is_renewed_at_once_when_many_more_are_made_up() -> None:
    """Until then, it has lived as long as the announcements of the few."""
    regions, home = RegionMap(Clock().now, random.Random(1)), (0, (2, 3))
    for depth in (0, 1):
        assert regions.index_lives(home, depth) == 1
    regions.note(home, [], Region({}, frozenset(), 4096, 0))
    regions.note((0, (2,)), [0], Region({}, frozenset(range(128)), 0, 0))
    assert [regions.index_lives(home, depth) for depth in (0, 1)] == [16, 4]


def test_where_no_keeper_is_the_hosts_of_a_row_renew_its_entry_all_the_same() -> None:
    """Ten hosts share a row of a swarm in which eighty DHT nodes share the others."""
    home, lapsed = (0, (2, 3)), 0
    for seed in range(20):
        hosts = [
            RegionMap(Clock().now, random.Random(20 * seed + n), (4, 16), lambda: 320.0) for n in range(10)
        ]
        for host in hosts:
            host.note(home, [], Region({}, frozenset(), 1, 0))
            host.note((0, (2,)), [0], Region({}, frozenset(range(10)), 0, 0))
        until = 16
        for period in range(320):
            if any(host.index_lives(home, 0) for host in hosts):
                until = period + 16
            lapsed += until <= period
    assert lapsed < 0.01 * 20 * 320


def test_hosts_further_down_show_that_a_prefix_is_still_split_for_an_hour() -> None:
    clock, uid = Clock(), UID(0, (2, 3))
    regions = RegionMap(clock.now, random.Random(1))
    for _ in range(2):
        clock.time += 10
        regions.note((0, ()), [0], SPLIT)
        regions.note((0, (2,)), [0], SPLIT)
    for _ in range(11):
        clock.time += 250
        regions.note(uid, [], Region({}, frozenset(), 1, 700))
        assert regions.depths(uid) == [2]
        assert regions.has_split(0)
    clock.time += 850
    regions.note(uid, [], Region({}, frozenset(), 1, 700))
    clock.time += 1000
    assert regions.depths(uid) == [0]


def test_a_host_further_down_does_not_make_a_prefix_split() -> None:
    clock, uid = Clock(), UID(0, (2, 3))
    regions = RegionMap(clock.now, random.Random(1))
    for _ in range(2):
        regions.note((0, ()), [0], NOBODY)
    regions.note(uid, [], Region({}, frozenset(), 1, 700))
    assert regions.homes([uid]) == {uid: (0, ())}
    assert regions.depths(uid) == [0]


def test_of_many_hosts_below_an_index_entry_a_few_renew_it() -> None:
    clock = Clock()
    regions, home = RegionMap(clock.now, random.Random(1)), (0, (2, 3))
    lives = {regions.index_lives(home, depth) for depth in (0, 1) for _ in range(100)}
    assert lives == {1}, "an entry that few hosts renew must not outlive them for long"
    regions.note(home, [], Region({}, frozenset(), 40, 0))
    regions.note((0, (2,)), [0], Region({}, frozenset(range(16)), 0, 0))
    drawn = [[regions.index_lives(home, depth) for _ in range(6400)] for depth in (0, 1)]
    assert [set(lives) for lives in drawn] == [{0, 16}, {0, 4}], "an entry further up lives longer"
    assert 400 <= drawn[0].count(16) < 460, "in its turn, and seldom besides"
    assert 1600 <= drawn[1].count(4) < 2600
    clock.time += 301
    assert all(regions.index_lives(home, 1) for _ in range(100)), "the others may be gone"


def test_a_host_that_stays_at_a_row_which_has_split_takes_turns_with_those_below_it() -> None:
    regions, row = RegionMap(Clock().now, random.Random(1)), (0, (2,))
    regions.note(row, [0], Region({}, frozenset(), 4, 0))
    assert {regions.index_lives(row, 0) for _ in range(100)} == {1}
    regions.note(row, [0], Region({}, frozenset(range(60)), 4, 0))
    drawn = [regions.index_lives(row, 0) for _ in range(6400)]
    assert set(drawn) == {0, 16}
    assert 400 <= drawn.count(16) < 480, "in its turn, and seldom besides"


def test_a_row_that_splits_meanwhile_does_not_keep_its_hosts_from_renewing_in_time() -> None:
    """The entries below the row may be made up."""
    regions, row = RegionMap(Clock().now, random.Random(1)), (0, (2,))
    for _ in range(100):
        regions.note(row, [0], Region({}, frozenset(), 400, 0))
        while not (lives := regions.index_lives(row, 0)):
            pass
        assert lives == 4
        regions.note(row, [0], Region({}, frozenset(range(128)), 400, 0))
        assert any(regions.index_lives(row, 0) for _ in range(4))


def test_an_index_entry_does_not_outlive_the_few_hosts_that_it_leads_to_nor_a_claim_for_long() -> None:
    """While it is there, readers don't see that nobody serves the expert."""

    async def scenario(loop: VirtualLoop, swarm: SimulatedSwarm) -> None:
        claimant, host, reader = swarm.peers[:3]
        claimed, served = UID(1, (1, 1)), UID(1, (2, 2))
        claim = [ReplicaAnnouncement(uid, ReplicaState.CLAIMED) for uid in (claimed, served)]
        for peer in (claimant, host):
            for prefix in ((1, ()), (1, (1,)), (1, (2,))):
                peer.experts.regions.note(prefix, [0], SPLIT)
        await announce(host, served, lifetime_s=150.0)
        await claimant.experts.announce(claim, 150.0)

        async def active() -> list[frozenset[int]]:
            rows = [(1, (1,)), (1, (2,))]
            found = await reader.experts.prefixes(rows, 4)
            return [found[row] for row in rows]

        assert await active() == [{1}, {2}]
        await asyncio.sleep(100)
        assert await active() == [set(), {2}], "the claim may have failed long ago"
        await asyncio.sleep(60)
        assert await active() == [set(), set()]

    play(scenario, nodes=8)


def test_regions_of_single_experts_are_remembered_only_as_long_as_they_count() -> None:
    clock = Clock()
    regions = RegionMap(clock.now, random.Random(1))
    for number in range(1000):
        clock.time += 1
        regions.note((0, (2, number)), [], NOBODY)
    assert len(regions._seen) + len(regions._hosts) == 300


@pytest.mark.parametrize(("depth", "most"), [(0, 16), (1, 4)])
def test_made_up_hosts_and_entries_keep_no_host_from_renewing_the_index_in_time(
    depth: int, most: int
) -> None:
    """An entry lives for 16 or four lifetimes, and each of these is longer than a period."""
    clock = Clock()
    regions, home = RegionMap(clock.now, random.Random(1)), (0, (2, 3))
    regions.note(home, [], Region({}, frozenset(), 4096, 0))
    regions.note((0, (2,)), [0], Region({}, frozenset(range(128)), 0, 0))
    renewed = [regions.index_lives(home, depth) for _ in range(1000)]
    times = [time for time, renews in enumerate(renewed) if renews]
    assert max(after - before for before, after in pairwise(times)) == most


def test_made_up_entries_below_a_row_keep_its_few_hosts_from_nothing() -> None:
    """In a large swarm, in which hardly any peer is a keeper of the row's entry."""
    row = 0, (2,)
    for hosts in (1, 3, 8):
        drawn = []
        for seed in range(hosts):
            regions = RegionMap(Clock().now, random.Random(seed), (256, 256), lambda: 1e6)
            regions.note(row, [0, 1], Region({}, frozenset(range(256)), hosts, 700))
            drawn.append([regions.index_lives(row, 0) for _ in range(300)])
        renewed = [time for time, lives in enumerate(zip(*drawn, strict=True)) if any(lives)]
        assert max(after - before for before, after in pairwise([0, *renewed])) <= 16


def test_a_keeper_writes_an_index_entry_again_that_the_dht_did_not_take() -> None:
    async def scenario(loop: VirtualLoop, swarm: SimulatedSwarm) -> None:
        peer, home = swarm.peers[0], (1, (2, 2))
        regions, store = peer.experts.regions, peer.registry.store
        for prefix in ((1, ()), (1, (2,))):
            regions.note(prefix, [0], SPLIT)
        regions.note(home, [], Region({}, frozenset(), 4096, 0))
        row_entry = swarm.keys.prefix(1), 2
        sent: list[bool] = []

        async def spied(items: Sequence[Item]) -> None:
            sent.append(row_entry in {(item.key, item.subkey) for item in items})
            if sum(sent) in (1, 2) and sent[-1]:
                raise UnreachableError("nobody answers")
            await store(items)

        peer.registry.store = spied  # type: ignore[method-assign]  # for this test
        while sum(sent) < 3:
            assert len(sent) < 32
            with contextlib.suppress(UnreachableError):
                await announce(peer, UID(*home))
        assert sent[-3:] == [True] * 3, "until it is there"
        for _ in range(8):
            await announce(peer, UID(*home))
        assert sent[-8:] == [False] * 8

    play(scenario, nodes=8)


def test_in_a_large_swarm_enough_hosts_renew_the_index_whatever_others_make_up() -> None:
    """There are eighty DHT nodes for each row, and eight of them always renew the entry that leads there."""
    keepers, home = 0, (0, (2, 3))
    for seed in range(1000):
        regions = RegionMap(Clock().now, random.Random(seed), (4, 4096), lambda: 4 * 80.0)
        regions.note(home, [], Region({}, frozenset(), 4096, 0))
        regions.note((0, (2,)), [0], Region({}, frozenset(range(128)), 0, 0))
        keepers += sum(bool(regions.index_lives(home, 0)) for _ in range(64)) >= 4
        assert any(regions.index_lives(home, 1) for _ in range(4)), "few nodes share an expert"
    assert 70 < keepers < 130


def test_everybody_is_found_while_regions_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifty nodes have one expert each, and one has all: more than fit at the layer's key, and then at the
    rows' keys.
    """
    monkeypatch.setattr("dht.regions.CROWDED_BYTES", 6 * 1024)
    monkeypatch.setattr("dht.regions.ROW_CROWDED_BYTES", 6 * 1024)

    async def scenario(loop: VirtualLoop, swarm: SimulatedSwarm) -> None:
        uids = swarm.manifest.uids()
        hosts = {peer.peer_id: uids[n % len(uids)] for n, peer in enumerate(swarm.peers)}
        reader = await swarm.make_peer(serves_dht=False)
        await swarm.join(reader)
        large, *small = swarm.peers
        for _ in range(6):
            await announce(large, *uids)
            for peer in small:
                await announce(peer, hosts[peer.peer_id])
            for only_active in (False, True):
                found = hosts_of(await reader.experts.replicas(uids, only_active=only_active))
                assert all(large.peer_id in some for some in found.values())
                missing = [peer for peer in small if peer.peer_id not in found[hosts[peer.peer_id]]]
                assert not missing
            rows = [(0, (row,)) for row in range(4)]
            active = await reader.experts.prefixes(rows, 4)
            assert all(some == frozenset(range(4)) for some in active.values())
            await asyncio.sleep(60)
        assert all(0 not in depths(peer) for peer in swarm.peers), "all have moved down"
        assert depths(large) == {1}, "one record for each row"
        for peer in small:
            await peer.experts.withdraw([hosts[peer.peer_id]], 90.0)
        found = hosts_of(await reader.experts.replicas(uids))
        assert all(some == {large.peer_id} for some in found.values())

    play(scenario, nodes=51)


@pytest.mark.parametrize("nodes", [0, LEFT_BY_READERS], ids=["few", "crowd"])
def test_who_marks_a_layer_as_split_hides_nobody(nodes: int) -> None:
    async def scenario(loop: VirtualLoop, swarm: SimulatedSwarm) -> None:
        uids, reader = swarm.manifest.uids(), swarm.peers[0]
        believe(nodes, *swarm.peers)
        keys = [swarm.keys.prefix(0), *(swarm.keys.prefix(0, (row,)) for row in range(4))]
        await swarm.announce_all(600.0)
        before = hosts_of(await reader.experts.replicas(uids))
        assert all(before.values())
        for _ in range(3):
            until = loop.unix_time() + 500
            await swarm.peers[1].lookups.store([Item(key, c, key, until) for key in keys for c in (0, 99)])
            for only_active in (False, True, False):
                assert hosts_of(await reader.experts.replicas(uids, only_active=only_active)) == before
            await swarm.announce_all(600.0)
            await asyncio.sleep(120)

    play(scenario, nodes=8)


def test_a_newer_record_with_a_shorter_life_takes_the_place_of_the_older() -> None:
    async def scenario(loop: VirtualLoop, swarm: SimulatedSwarm) -> None:
        peer, (one, two, *_) = swarm.peers[2], [UID(0, (0, n)) for n in range(4)]
        await announce(peer, one, two, lifetime_s=500.0)
        await peer.experts.withdraw([one], 20.0)
        found = hosts_of(await swarm.peers[3].experts.replicas([one, two]))
        assert peer.peer_id not in found[one]
        assert peer.peer_id in found[two]

    play(scenario, nodes=8)


def test_an_expert_that_is_no_longer_announced_goes_although_others_beside_it_are_renewed() -> None:
    async def scenario(loop: VirtualLoop, swarm: SimulatedSwarm) -> None:
        peer, one, two = swarm.peers[1], UID(0, (1, 1)), UID(0, (1, 2))
        await announce(peer, one, two, lifetime_s=20.0)
        await asyncio.sleep(30)
        await announce(peer, two)
        found = hosts_of(await swarm.peers[3].experts.replicas([one, two]))
        assert peer.peer_id not in found[one]
        assert peer.peer_id in found[two]

    play(scenario, 8)


def test_what_is_announced_and_withdrawn_side_by_side_is_not_undone() -> None:
    async def scenario(loop: VirtualLoop, swarm: SimulatedSwarm) -> None:
        peer, reader = swarm.peers[2], swarm.peers[3]
        one, two = UID(0, (0, 0)), UID(0, (1, 0))

        async def hosted() -> set[UID]:
            found = hosts_of(await reader.experts.replicas([one, two]))
            return {uid for uid, hosts in found.items() if peer.peer_id in hosts}

        await asyncio.gather(peer.experts.withdraw([two], 90.0), announce(peer, two))
        await announce(peer, one)
        assert await hosted() == {one, two}
        peer.experts.regions.note((0, ()), [0], SPLIT)
        for row in (0, 1):
            peer.experts.regions.note((0, (row,)), [0], NOBODY)
        for stays, goes in ((one, two), (two, one)):
            await asyncio.gather(announce(peer, one, two), peer.experts.withdraw([goes], 90.0))
            assert depths(peer) == {1}
            assert await hosted() == {stays}

    play(scenario, nodes=8)


def test_a_record_of_experts_that_do_not_exist_shows_none() -> None:
    async def scenario(loop: VirtualLoop, swarm: SimulatedSwarm) -> None:
        uids, liar = swarm.manifest.uids(), swarm.peers[1]
        before = hosts_of(await swarm.peers[0].experts.replicas(uids))
        made_up = [{"state": 2, "following": [n, 4000]} for n in range(MAX_REPLICAS_OF_RECORD)]
        key, until = swarm.keys.prefix(0), loop.unix_time() + 600
        payload = records_pb2.RecordPayload(key=key, expires_at=until, hosting={"replicas": made_up})
        stranger: Any = swarm.peers[1].identity
        record = sign_record(stranger, payload)
        assert await liar.lookups.store([Item(key, liar.peer_id.to_bytes(), record, until)])
        found = hosts_of(await swarm.peers[0].experts.replicas(uids))
        mine = {uid: hosts - {liar.peer_id} for uid, hosts in before.items()}
        assert {uid: hosts - {liar.peer_id} for uid, hosts in found.items()} == mine
        active = await swarm.peers[0].experts.prefixes([(0, ())], 4)
        assert active[0, ()] <= frozenset(range(4))
        payload.hosting.replicas.add(state=2, following=[0, 0])
        payload.expires_at = until + 1
        record = sign_record(stranger, payload)
        assert not await liar.lookups.store([Item(key, liar.peer_id.to_bytes(), record, until + 1)])

    play(scenario, nodes=8)


def test_whoever_writes_much_does_not_choose_which_records_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(loop: VirtualLoop, swarm: SimulatedSwarm) -> None:
        experts, layer, read = swarm.peers[0].experts, (0, ()), Counter[object]()

        def count(prefix: object, key: str, subkey: object, value: object) -> dict[UID, Replica]:
            read[subkey] += 1
            return {}

        monkeypatch.setattr(experts, "_replicas_in", count)
        entries = Entries((name, (bytes(MAX_KEY_BYTES // 2), 0.0)) for name in (b"a", b"b", b"c", b"d"))
        key = experts.registry.keys.prefix(*layer)
        for _ in range(100):
            await experts._region(layer, [key], {key: entries}, TimeSlices())
        assert read.keys() == {b"a", b"b", b"c", b"d"}, "two have room"
        assert max(read.values()) < 90

    play(scenario, 8)


def test_an_expert_whose_hosts_are_all_read_again_counts_no_unread_ones() -> None:
    async def scenario(loop: VirtualLoop, swarm: SimulatedSwarm) -> None:
        experts, uid = swarm.peers[0].experts, UID(0, (1, 1))
        experts.unread[uid] = 7  # as after a look at a crowd
        assert (await experts.replicas([uid]))[uid]
        assert uid not in experts.unread

    play(scenario, 8)


@pytest.mark.parametrize("moved_down", [True, False])
def test_of_two_announcements_of_a_replica_that_has_moved_the_later_one_counts(
    monkeypatch: pytest.MonkeyPatch, moved_down: bool
) -> None:
    async def scenario(loop: VirtualLoop, swarm: SimulatedSwarm) -> None:
        experts, uid, host = swarm.peers[0].experts, UID(0, (1, 1)), swarm.peers[1].peer_id
        earlier, later = (Replica(uid, host, SERVING, count, 0, 0.0, 1e12 + count) for count in (1, 2))
        at_layer, at_row = (earlier, later) if moved_down else (later, earlier)

        async def walk(*_: object, **__: object) -> Any:
            regions = {(0, ()): at_layer, (0, (1,)): at_row}
            return {at: Region({uid: [one]}, frozenset(), 1, 100) for at, one in regions.items()}, [uid]

        monkeypatch.setattr(experts, "_walk", walk)
        assert await experts.replicas([uid]) == {uid: (later,)}

    play(scenario, 8)


def test_records_that_announce_nothing_any_more_do_not_count_as_hosts_that_were_not_read() -> None:
    async def scenario(loop: VirtualLoop, swarm: SimulatedSwarm) -> None:
        experts, layer = swarm.peers[0].experts, (0, ())
        until = experts.registry.now() + 60
        entries = Entries()
        for number, peer in enumerate(swarm.peers):
            said = ReplicaAnnouncement(UID(0, (1, 1)), SERVING if number < 2 else WITHDRAWN, 1)
            for item in peer.experts._region_items(layer, [said], until, 0).values():
                entries[item.subkey] = item.value, until
        entries.unread = 40
        key = experts.registry.keys.prefix(*layer)
        region = await experts._region(layer, [key], {key: entries}, TimeSlices())
        assert (region.hosts, region.unread) == (2, 10)

    play(scenario, 8)


def test_a_region_that_strangers_filled_does_not_hold_the_loop() -> None:
    async def scenario(loop: VirtualLoop, swarm: SimulatedSwarm) -> None:
        experts, layer = swarm.peers[0].experts, (0, ())
        until = experts.registry.now() + 60
        said = [ReplicaAnnouncement(UID(0, divmod(n, 64)), SERVING) for n in range(MAX_REPLICAS_OF_RECORD)]
        entries = Entries()
        for peer in swarm.peers:
            for item in peer.experts._region_items(layer, said, until, 0).values():
                entries[item.subkey] = item.value, until
        key = experts.registry.keys.prefix(*layer)

        async def read() -> None:
            region = await experts._region(layer, [key], {key: entries}, TimeSlices())
            assert region.hosts == len(swarm.peers)

        longest_s, whole_s = await holds(read())
        assert longest_s < whole_s / 3

    play(scenario, 12)


def test_who_is_in_a_hurry_waits_for_nothing_below_a_region_that_has_a_host_or_has_not_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(loop: VirtualLoop, swarm: SimulatedSwarm) -> None:
        uid, others = UID(0, (1, 1)), [UID(0, (2, n)) for n in range(4)]
        reader = await swarm.make_peer(serves_dht=False)
        await swarm.join(reader)
        experts, registry, asked = reader.experts, reader.registry, list[str]()
        get, below = registry.get, {registry.keys.prefix(*some) for some in (uid, *others)}

        async def slow_below(keys: Any, *limits: Any) -> Any:
            asked.extend(keys)
            if not below.isdisjoint(keys):
                await asyncio.sleep(1000)
            return await get(keys, *limits)

        monkeypatch.setattr(registry, "get", slow_below)
        began = loop.time()
        experts.read_ahead([uid, *others])
        found, again = await asyncio.gather(
            *(experts.replicas([uid, *others], limits=DEFAULT_LIMITS, at_once=True) for _ in range(2))
        )
        assert loop.time() - began < 1000
        assert found == again
        assert all(found.values())
        assert len(asked) == len(set(asked)), "what is being read is not asked for again"

    play(scenario, 8)
