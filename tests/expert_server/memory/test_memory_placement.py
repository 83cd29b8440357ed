"""Which nodes host which shards: they choose differently, all shards get enough replicas, and none loses its
last one.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dht.announcements import ReplicaState
from dht.library import RegionHost
from dht.memory import MemoryID, ShardInfo
from expert_server.memory.placement import (
    FEWEST_READ,
    MOST_READ,
    READ_AGAIN,
    READ_TO_DROP,
    MemorySurvey,
    Placement,
    SeenShard,
    ShardKey,
    is_called,
    preference,
    seen_shards,
)
from peer.identity import PeerID

ENOUGH = 2
MEMORY = MemoryID("docs", "abcdefghijkl")


def peer(number: int) -> PeerID:
    return PeerID(b"\x12\x20" + number.to_bytes(32))


def shard(number: int, size: int = 100) -> ShardInfo:
    return ShardInfo((number,), number.to_bytes(8) + bytes(24), 1, size)


def as_seen(info: ShardInfo, serving: frozenset[PeerID], leaving: frozenset[PeerID]) -> SeenShard:
    """Each cell is a region of its own."""
    return SeenShard(info, info.cell[0], serving, leaving)


@dataclass
class Node:
    peer_id: PeerID
    room: int
    """The number of shards that the node has room for."""
    mine: set[ShardKey] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.placement = Placement(self.peer_id, ENOUGH)


class Town:
    """Nodes that look one after another, in a random order. Each sees what all others host."""

    def __init__(self, nodes: int, shards: int | Sequence[ShardInfo], room: int, seed: int) -> None:
        self.rng = random.Random(seed)
        infos = [shard(n) for n in range(shards)] if isinstance(shards, int) else shards
        self.shards = {ShardKey(MEMORY, info.root): info for info in infos}
        self.nodes = [Node(peer(1000 * seed + n), room) for n in range(nodes)]
        self.hosts: dict[ShardKey, set[PeerID]] = {key: set() for key in self.shards}
        self.dropped = 0

    def round(self, estimate: int | None = None) -> None:
        """Lets every node look once. `estimate`: how many nodes they think there are."""
        self.rng.shuffle(self.nodes)
        for node in self.nodes:
            self.look(node, estimate or len(self.nodes))

    def look(self, node: Node, nodes: int) -> None:
        node.placement.note(self.seen(), node.mine)
        for key in node.placement.to_take({MEMORY: nodes}):
            if len(node.mine) >= node.room:
                for gone in node.placement.to_drop(100):
                    node.mine.discard(gone)
                    self.hosts[gone].discard(node.peer_id)
                    self.dropped += 1
            if len(node.mine) < node.room:
                node.mine.add(key)
                self.hosts[key].add(node.peer_id)

    def seen(self) -> dict[ShardKey, SeenShard]:
        return {
            key: as_seen(info, frozenset(self.hosts[key]), frozenset()) for key, info in self.shards.items()
        }

    def counts(self) -> list[int]:
        return [len(some) for some in self.hosts.values()]


@given(
    st.integers(2, 12),
    st.integers(1, 30),
    st.integers(0, 2**32),
    st.sampled_from([None, 3, 100]),
)
@settings(deadline=None, max_examples=50)
def test_all_shards_get_enough_replicas_and_then_nothing_moves(
    nodes: int, shards: int, seed: int, estimate: int | None
) -> None:
    town = Town(nodes, shards, room=shards, seed=seed % 1000)
    for _ in range(10):
        town.round(estimate)
    assert min(town.counts()) >= ENOUGH
    before = {key: set(some) for key, some in town.hosts.items()}
    for _ in range(10):
        town.round(estimate)
    assert town.hosts == before
    assert town.dropped == 0


@given(st.integers(0, 2**32))
@settings(deadline=None, max_examples=20)
def test_room_for_just_enough_is_used_up_and_nothing_is_lost(seed: int) -> None:
    """There are twelve nodes for twenty shards with two replicas each."""
    town = Town(12, 20, room=5, seed=seed % 1000)
    had: set[ShardKey] = set()
    for _ in range(60):
        town.round()
        held = {key for key, some in town.hosts.items() if some}
        assert had <= held
        had = held
    assert min(town.counts()) >= 1
    assert sum(count >= ENOUGH for count in town.counts()) >= 18


@pytest.mark.parametrize("shards", [1, 300])
def test_a_thousand_nodes_that_see_the_same_need_do_not_all_follow_it(shards: int) -> None:
    town = Town(1000, shards, room=shards, seed=3)
    takers, seen = Counter[ShardKey](), town.seen()
    for node in town.nodes:
        node.placement.note(seen, ())
        takers.update(node.placement.to_take({MEMORY: 1000}))
    assert sum(takers.values()) <= 3 * shards + 10
    assert max(takers.values(), default=0) <= 12


@given(st.integers(1, 5000), st.integers(1, 2), st.integers(0, 2**32))
def test_sooner_or_later_everybody_is_called_and_nobody_is_forgotten(
    nodes: int, missing: int, seed: int
) -> None:
    preferred = preference(MEMORY, seed % 4096, peer(seed))
    called = [is_called(preferred, missing, looks, nodes) for looks in range(1, 60)]
    assert called == sorted(called)
    assert called[-1]
    assert is_called(preferred, missing, 1, missing)


@given(st.sets(st.integers(0, 50), min_size=3, max_size=12), st.integers(0, 2**32))
def test_if_all_drop_at_once_enough_are_left(hosts: set[int], number: int) -> None:
    info = shard(number % 2**32)
    key = ShardKey(MEMORY, info.root)
    serving = frozenset(map(peer, hosts))
    left = 0
    for host in serving:
        placement = Placement(host, ENOUGH)
        for _ in range(6):
            assert placement.to_drop(100) == []
            placement.note({key: as_seen(info, serving, frozenset())}, {key})
            if placement.to_drop(100):
                break
        else:
            left += 1
            continue
        region = number % 2**32
        own = preference(MEMORY, region, host)
        assert all(preference(MEMORY, region, p) > own for p in placement.keener(key))
    assert left == ENOUGH


def test_a_replica_is_dropped_only_for_as_much_as_is_needed() -> None:
    keys = {ShardKey(MEMORY, shard(n).root): shard(n, 100 + n) for n in range(4)}
    others = frozenset(map(peer, range(1, 40)))
    me = peer(0)
    placement = Placement(me, ENOUGH)
    for _ in range(4):
        placement.note({k: as_seen(i, others | {me}, frozenset()) for k, i in keys.items()}, set(keys))
    assert len(placement.to_drop(50)) == 1
    assert len(placement.to_drop(200)) == 2
    assert len(placement.to_drop(10_000)) == 4, "more can't be dropped now"


def test_a_memory_of_many_lacking_shards_takes_no_turns_of_others() -> None:
    placement, junk, own = Placement(peer(1), ENOUGH), MemoryID("junk", "abcdefghijkl"), peer(2)
    seen = {ShardKey(junk, shard(n).root): as_seen(shard(n), frozenset(), frozenset()) for n in range(1000)}
    wanted = [ShardKey(MEMORY, shard(n).root) for n in range(10)]
    seen |= {key: as_seen(shard(n), frozenset({own}), frozenset()) for n, key in enumerate(wanted)}
    placement.note(seen, set())
    assert set(placement.to_take({key.memory: 1 for key in seen})[:20]) >= set(wanted)


def test_a_publisher_of_many_memories_takes_no_more_turns_than_others() -> None:
    placement, hosts = Placement(peer(1), ENOUGH), frozenset({peer(2)})
    many = [ShardKey(MemoryID(f"junk-{n}", "another00000"), shard(0).root) for n in range(32)]
    wanted = [ShardKey(MEMORY, shard(n).root) for n in range(10)]
    seen = {key: as_seen(shard(n), hosts, frozenset()) for n, key in enumerate([*many, *wanted])}
    placement.note(seen, set())
    assert set(placement.to_take({key.memory: 1 for key in seen})[:20]) >= set(wanted)


def test_a_look_between_two_at_what_is_lacking_calls_more_and_spares_nothing_sooner() -> None:
    me, others = peer(0), frozenset(map(peer, range(1, 40)))
    infos = {name: shard(number) for number, name in enumerate(("lacking", "lost", "enough", "mine"))}
    keys = {name: ShardKey(MEMORY, info.root) for name, info in infos.items()}
    serving = {"lacking": frozenset([peer(1)]), "lost": frozenset[PeerID](), "enough": others, "mine": others}
    seen = {keys[name]: as_seen(info, serving[name], frozenset()) for name, info in infos.items()}
    placement = Placement(me, ENOUGH)
    placement.note(seen, {keys["mine"]})
    assert placement.lacking() == [keys["lacking"]], "nobody can give what is lost"
    for _ in range(20):
        placement.note({keys["lacking"]: seen[keys["lacking"]]}, {keys["mine"]}, is_between=True)
    assert placement.lacking() == placement.to_take({MEMORY: 1000}) == [keys["lacking"]]
    placement.note(seen, {keys["mine"]})
    assert placement.to_drop(100) == [], "these were only two looks"
    for _ in range(2):
        placement.note(seen, {keys["mine"]})
    assert placement.to_drop(100) == [keys["mine"]]


def test_a_replica_to_spare_need_not_be_seen_in_every_look() -> None:
    info, key, others = shard(1), ShardKey(MEMORY, shard(1).root), frozenset(map(peer, range(1, 40)))
    spare, needed = as_seen(info, others, frozenset()), as_seen(info, frozenset(), frozenset())
    placement = Placement(peer(0), ENOUGH)
    for looks in (2, 8):
        placement.note({key: spare}, {key})
        for _ in range(looks):
            placement.note({}, {key})
        assert placement.to_drop(100) == [], "the last look did not see it"
        placement.note({key: spare}, {key})
        assert placement.to_drop(100) == [key]
        placement.note({key: needed}, {key})
        placement.note({key: spare}, {key})
        assert placement.to_drop(100) == [], "it was needed meanwhile"
        placement.forget(MEMORY)


def test_what_lacked_is_looked_for_until_a_look_finds_enough() -> None:
    keys = [ShardKey(MEMORY, shard(n).root) for n in range(2)]
    lacks = [as_seen(shard(n), frozenset({peer(1)}), frozenset()) for n in range(2)]
    placement = Placement(peer(0), ENOUGH)
    placement.note(dict(zip(keys, lacks, strict=True)), ())
    placement.note({keys[0]: lacks[0]}, ())
    assert placement.lacking() == keys
    placement.note({keys[0]: lacks[0], keys[1]: as_seen(shard(1), frozenset(), frozenset())}, ())
    assert placement.lacking() == keys[:1], "nobody can give the other one any more"
    placement.note({keys[0]: as_seen(shard(0), frozenset(map(peer, (1, 2))), frozenset())}, ())
    assert placement.lacking() == []


def test_a_node_never_takes_what_it_hosts() -> None:
    info, me = shard(1), peer(0)
    placement, key = Placement(me, ENOUGH), ShardKey(MEMORY, shard(1).root)
    placement.note({key: as_seen(info, frozenset({me}), frozenset())}, {key})
    assert placement.to_take({MEMORY: 1}) == placement.lacking() == []


def test_what_only_a_leaving_host_has_is_looked_for_again() -> None:
    placement, key = Placement(peer(0), ENOUGH), ShardKey(MEMORY, shard(1).root)
    placement.note({key: as_seen(shard(1), frozenset(), frozenset({peer(1)}))}, ())
    assert placement.lacking() == [key]


def test_the_replica_with_the_most_others_is_dropped_first_and_none_that_the_last_look_left_out() -> None:
    me = peer(0)
    placement, keys = Placement(me, ENOUGH), [ShardKey(MEMORY, shard(n).root) for n in range(8)]
    seen = {
        key: as_seen(shard(n), frozenset(map(peer, range(20 + n))), frozenset()) for n, key in enumerate(keys)
    }
    for _ in range(4):
        placement.note(seen, set(keys))
    able = [key for key in keys if len(placement.keener(key)) >= ENOUGH]
    assert len(able) > 2
    assert placement.to_drop(200) == [able[-1], able[-2]]
    placement.note({key: seen[key] for key in able[:-1]}, set(keys))
    assert placement.to_drop(100) == [able[-2]]


def test_a_memory_that_changed_is_counted_anew() -> None:
    info, key, others = shard(1), ShardKey(MEMORY, shard(1).root), frozenset(map(peer, range(1, 40)))
    placement = Placement(peer(0), ENOUGH)
    for _ in range(4):
        placement.note({key: as_seen(info, others, frozenset())}, {key})
    assert placement.to_drop(100) == [key]
    placement.forget(MEMORY)
    placement.note({key: as_seen(info, others, frozenset())}, {key})
    assert placement.to_drop(100) == []


def test_the_shards_of_a_region_lie_at_few_hosts() -> None:
    infos = [ShardInfo((n // 10,), n.to_bytes(8) + bytes(24), 1, 100) for n in range(400)]
    town = Town(40, infos, room=len(infos), seed=5)
    for _ in range(6):
        town.round()
    assert min(town.counts()) >= ENOUGH
    hosts: dict[int, set[PeerID]] = {}
    for key, some in town.hosts.items():
        hosts.setdefault(town.shards[key].cell[0], set()).update(some)
    assert fmean(map(len, hosts.values())) < 2 * ENOUGH, "if it were by shards, there would be about 16"


def test_nodes_that_are_called_for_the_same_region_begin_with_different_shards_of_it() -> None:
    infos = [ShardInfo((n // 10,), n.to_bytes(8) + bytes(24), 1, 100) for n in range(100)]
    seen = {ShardKey(MEMORY, i.root): SeenShard(i, 0, frozenset(), frozenset()) for i in infos}
    first = []
    for number in range(4):
        placement = Placement(peer(number), ENOUGH)
        placement.note(seen, ())
        first += placement.to_take({MEMORY: 1})[:5]
    assert len(set(first)) > 15


def test_a_node_takes_all_shards_of_the_region_that_it_prefers_first_and_of_that_cell_by_cell() -> None:
    infos = [ShardInfo((n % 20,), n.to_bytes(8) + bytes(24), 1, 100) for n in range(100)]
    seen = {
        ShardKey(MEMORY, info.root): SeenShard(info, info.cell[0] // 4, frozenset({peer(9)}), frozenset())
        for info in infos
    }
    placement = Placement(peer(1), ENOUGH)
    placement.note(seen, ())
    taken = placement.to_take({MEMORY: 1})
    regions = [seen[key].region for key in taken]
    assert regions == sorted(regions, key=lambda region: -preference(MEMORY, region, peer(1)))
    cells = [seen[key].info.cell for key in taken]
    assert sum(cell != before for before, cell in pairwise(cells)) == 20 - 1


def test_different_regions_of_a_memory_are_preferred_by_different_nodes() -> None:
    first = {max(range(20), key=lambda p: preference(MEMORY, region, peer(p))) for region in range(50)}
    assert len(first) > 8


# What a node reads


class Regions:
    """The announcements of some memories, with one shard in each region."""

    def __init__(self, *sizes: int) -> None:
        """`sizes`: the number of regions of each memory. Each has a host that serves, and one that leaves."""
        self.memories = [MemoryID(f"docs-{n}", "abcdefghijkl") for n in range(len(sizes))]
        self.infos = [shard(n) for n in range(max(sizes, default=0))]
        self.read: list[tuple[MemoryID, int]] = []
        self.manifests: dict[MemoryID, Any] = {
            memory: SimpleNamespace(
                by_region={info.cell[0]: (info,) for info in self.infos[:size]},
                region_of={info: info.cell[0] for info in self.infos[:size]},
                by_root={info.root: info for info in self.infos[:size]},
            )
            for memory, size in zip(self.memories, sizes, strict=True)
        }
        memories: Any = self
        self.survey = MemorySurvey(memories)

    def keys(self, numbers: Iterable[int], memory: int = 0) -> set[ShardKey]:
        return {ShardKey(self.memories[memory], self.infos[number].root) for number in numbers}

    def look(
        self,
        mine: Collection[ShardKey] = (),
        lacking: Collection[ShardKey] = (),
        *,
        is_busy: bool = False,
        is_short: bool = False,
    ) -> dict[ShardKey, SeenShard]:
        self.read.clear()
        seen = asyncio.run(
            self.survey.read(self.manifests, mine, lacking, is_busy=is_busy, is_short=is_short)
        )
        assert len(seen) == len(self.read) == len(set(self.read))
        return seen

    async def region_hosts(
        self, memory: MemoryID, regions: Collection[int]
    ) -> dict[int, tuple[RegionHost, ...]]:
        self.read += [(memory, region) for region in regions]
        states = ReplicaState.SERVING, ReplicaState.LEAVING
        return {
            n: tuple(
                RegionHost(peer(of), state, frozenset({self.infos[n].short}))
                for of, state in enumerate(states)
            )
            for n in regions
        }


@given(st.integers(1, 3000), st.integers(0, 300))
@settings(deadline=None, max_examples=50)
def test_a_node_reads_two_regions_for_each_that_it_hosts_and_at_least_a_few(
    regions: int, hosted: int
) -> None:
    played = Regions(regions)
    read = len(played.look(played.keys(range(min(regions, hosted)))))
    assert read == min(regions, MOST_READ, max(2 * hosted, FEWEST_READ))
    assert played.survey.shares == pytest.approx({played.memories[0]: read / regions})


def test_what_a_node_reads_does_not_depend_on_what_strangers_announce() -> None:
    regions = Regions(1000)
    honest, strangers = regions.region_hosts, [peer(1000 + n) for n in range(250)]

    async def with_strangers(memory: MemoryID, regions: Collection[int]) -> dict[int, tuple[RegionHost, ...]]:
        found = await honest(memory, regions)
        made_up = tuple(
            RegionHost(each, ReplicaState.SERVING, frozenset({b"made up!"})) for each in strangers
        )
        return {region: (*hosts, *made_up) for region, hosts in found.items()}

    regions.region_hosts = with_strangers  # type: ignore[method-assign]  # strangers
    assert [len(regions.look(regions.keys(range(100)))) for _ in range(4)] == [200] * 4


def test_each_memory_is_read_as_much_as_the_node_hosts_of_it() -> None:
    regions = Regions(1000, 1000)
    regions.look(regions.keys(range(100), memory=1))
    read = Counter(memory for memory, _ in regions.read)
    assert [read[memory] for memory in regions.memories] == [4, 200]
    assert regions.survey.shares == pytest.approx(dict(zip(regions.memories, (0.004, 0.2), strict=True)))


def test_of_very_many_regions_no_more_are_read_than_fit_into_a_look() -> None:
    regions = Regions(2000, 500)
    mine = regions.keys(range(600)) | regions.keys(range(100), memory=1)
    assert len(regions.look(mine)) == MOST_READ
    wanted = [1200, 200]
    fits = MOST_READ / sum(wanted)
    assert [regions.survey.shares[memory] for memory in regions.memories] == pytest.approx(
        [fits * wanted[0] / 2000, fits * wanted[1] / 500]
    )


def test_a_node_sees_who_serves_and_who_leaves() -> None:
    regions = Regions(FEWEST_READ)
    seen = regions.look()
    assert seen.keys() == regions.keys(range(FEWEST_READ))
    assert set(seen.values()) == {
        as_seen(info, frozenset({peer(0)}), frozenset({peer(1)})) for info in regions.infos
    }


def test_a_node_that_has_just_taken_shards_reads_as_much_as_it_may() -> None:
    regions = Regions(200)
    assert len(regions.look()) == FEWEST_READ
    assert len(regions.look(is_busy=True)) == 200
    assert regions.survey.shares == {regions.memories[0]: FEWEST_READ / 200}, "others are not busy"


def test_what_lacked_and_what_may_be_dropped_is_read_as_well() -> None:
    regions = Regions(3000)
    lacking, mine = regions.keys(range(READ_AGAIN)), regions.keys(range(100, 100 + READ_TO_DROP))
    seen = regions.look(mine, lacking, is_short=True)
    assert seen.keys() >= lacking | mine
    assert len(seen) <= len(lacking) + len(mine) + 2 * len(mine) + FEWEST_READ
    many = regions.look(regions.keys(range(3000)), regions.keys(range(3000)), is_short=True)
    assert MOST_READ <= len(many) <= MOST_READ + READ_AGAIN + READ_TO_DROP


def test_all_regions_are_read_sooner_or_later() -> None:
    regions, found = Regions(600), set[ShardKey]()
    for _ in range(1200):
        found.update(regions.look())
    assert len(found) == 600


def test_without_any_memory_nothing_is_read() -> None:
    regions = Regions()
    assert regions.look() == {}
    assert regions.survey.shares == {}


def test_what_was_lacking_is_read_again_as_far_as_it_is_still_listed() -> None:
    regions = Regions(300)
    gone = {ShardKey(MemoryID("old", "abcdefghijkl"), bytes(32)), ShardKey(regions.memories[0], b"gone")}
    seen = asyncio.run(regions.survey.read_again(regions.manifests, regions.keys([1, 29]) | gone))
    assert seen.keys() == regions.keys([1, 29])
    regions.read.clear()
    asyncio.run(regions.survey.read_again(regions.manifests, regions.keys(range(300))))
    assert len(set(regions.read)) == len(regions.read) == READ_AGAIN


def test_only_shards_that_a_host_names_are_its_own() -> None:
    host = RegionHost(peer(1), ReplicaState.SERVING, frozenset({shard(1).short}))
    seen = seen_shards(MEMORY, 0, [shard(1), shard(2)], [host])
    assert [len(found.serving) for found in seen.values()] == [1, 0]
