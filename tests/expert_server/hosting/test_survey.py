"""What a node reads about its swarm: everything about layers that have not split, and a little about the others."""

import asyncio
import random
import tracemalloc
from collections.abc import Collection, Mapping
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dht.announcements import Replica, ReplicaState
from dht.manifest import Manifest
from dht.regions import Prefix, Region, RegionMap
from dht.uid import UID
from expert_server.hosting.manager import HostingManager
from expert_server.hosting.placement import (
    _LOOKERS,
    _ROWS_FOR,
    FEW,
    MOST_PREFIXES,
    MOST_REGIONS,
    MOST_VACANT,
    SAMPLED,
    HostingSurvey,
)
from expert_server.settings import NodeSettings
from peer.identity import PeerID

ME, OTHER, THIRD = (PeerID(b"\x12\x20" + bytes([n]) * 32) for n in (1, 2, 3))


class FakeRegistry:
    """A registry in which the same peers host some experts. It counts what is read."""

    def __init__(self, hosted: Collection[UID]) -> None:
        self.hosted = set(hosted)
        self.hosts = [OTHER]
        self.dead: Collection[UID] = ()
        """Those whose hosts' records have expired, but not the index entries that lead there."""
        self.first_rows: Collection[Prefix] = ()
        """Those of the rows asked for last that would be read if their layers had split."""
        self.unread: dict[UID, int] = {}
        self.registry = self
        self.prefixes_read = self.experts_read = 0
        self.time = 1000.0
        self.regions = RegionMap(self.now, random.Random(0))
        self.lookups = self
        self.estimated_nodes = 10.0

    def now(self) -> float:
        return self.time

    def split(self, *layers: int) -> None:
        """Splits the layers. The node knows this once it has read their keys."""
        for layer in layers:
            self.regions.note((layer, ()), [0], Region({}, frozenset({0, 1}), 0, 0))

    async def prefixes(
        self, prefixes: Collection[Prefix], size: int, *, most: int
    ) -> dict[Prefix, frozenset[int]]:
        assert most == MOST_REGIONS
        self.first_rows = [*prefixes][:most]
        self.prefixes_read += len(prefixes)
        active: dict[Prefix, set[int]] = {prefix: set() for prefix in prefixes}
        for uid in self.hosted:
            prefix = uid.layer, uid.coordinate[:-1]
            if prefix in active:
                active[prefix].add(uid.coordinate[-1])
        return {prefix: frozenset(some) for prefix, some in active.items()}

    async def replicas(
        self, uids: Collection[UID], *, just_read: bool = False
    ) -> dict[UID, tuple[Replica, ...]]:
        self.experts_read += len(uids)
        replica = ReplicaState.SERVING, 0, 0, 0.0, self.time + 30.0
        return {
            uid: tuple(
                Replica(uid, host, *replica) for host in self.hosts if uid in self.hosted - {*self.dead}
            )
            for uid in uids
        }


class FakeReplicas:
    """Stands for `LocalReplicas` of a node that hosts nothing. It records what the node would claim."""

    def __init__(self) -> None:
        self.experts: dict[UID, object] = {}
        self.count = 0
        self.leaving = False
        self.checkpoints = self
        self.wanted: list[UID] = []

    async def newest(self) -> dict[UID, int]:
        return {}

    def withheld(self) -> set[UID]:
        return set()

    async def take(
        self, wanted: list[UID], usual: int | None, enough: int, seen: Mapping[UID, Collection[Replica]]
    ) -> list[UID]:
        self.wanted += wanted
        return []


def manifest_of(grid: tuple[int, ...]) -> Manifest:
    return Manifest.model_validate({"name": "swarm", "model": {"layers": 2}, "experts": {"grid": grid}})


def make_survey(
    grid: tuple[int, ...], registry: FakeRegistry, seed: int = 0, peer_id: PeerID = ME
) -> HostingSurvey:
    return HostingSurvey(registry, manifest_of(grid), peer_id, random.Random(seed))  # type: ignore[arg-type]  # a stand-in


def make_manager(registry: FakeRegistry, replicas: FakeReplicas, settings: NodeSettings) -> HostingManager:
    host = SimpleNamespace(peer_id=ME, has_failed=lambda peer_id: False)
    swarm = SimpleNamespace(experts=registry, manifest=manifest_of((16, 16)), host=host)
    return HostingManager(settings, swarm, replicas, registry.now)  # type: ignore[arg-type]  # stand-ins


def all_uids(grid: tuple[int, int]) -> list[UID]:
    return [UID(layer, (i, j)) for layer in range(2) for i in range(grid[0]) for j in range(grid[1])]


def test_a_small_grid_is_read_whole() -> None:
    registry = FakeRegistry(all_uids((4, 4))[:7])
    found = asyncio.run(make_survey((4, 4), registry).read([]))
    assert set(found) == set(all_uids((4, 4)))


def test_after_a_look_no_region_that_was_just_read_is_kept() -> None:
    registry = FakeRegistry(all_uids((4, 4)))
    registry.split(0, 1)
    assert registry.regions.recent((0, ()), [0]) is not None
    asyncio.run(make_survey((4, 4), registry).read([]))
    assert registry.regions.recent((0, ()), [0]) is None


def test_of_layers_that_have_split_each_look_reads_a_few_experts_and_vacant_ones_again() -> None:
    uids = all_uids((16, 16))
    registry, lonely = FakeRegistry(uids), UID(1, (3, 5))
    registry.split(0, 1)
    survey, mine = make_survey((16, 16), registry), uids[:64]

    async def scenario() -> None:
        seen_of_mine: set[UID] = set()
        for _ in range(64 // FEW):
            registry.experts_read = registry.prefixes_read = 0
            found = await survey.read(mine)
            seen_of_mine |= found.keys() & set(mine)
            assert registry.experts_read <= 3 * FEW
            assert registry.prefixes_read <= FEW + 5
        assert seen_of_mine == set(mine), "all in turns"
        registry.hosted.discard(lonely)
        looks = 0
        while (await survey.read(mine)).get(lonely) != ():
            looks += 1
            assert looks <= 32 * 6, "each of 32 rows in its turn, of 6 looks"
        for _ in range(10):
            assert (await survey.read(mine))[lonely] == (), "that row is read again"

    asyncio.run(scenario())


def test_where_peers_are_many_and_rows_are_few_peers_look_at_rows_in_turns() -> None:
    uids = all_uids((16, 16))
    registry = FakeRegistry(uids)
    registry.split(0, 1)
    registry.estimated_nodes = 8.0 * _LOOKERS * 32

    async def scenario() -> None:
        busy, waiting = make_survey((16, 16), registry), make_survey((16, 16), registry)
        read = []
        for _ in range(_ROWS_FOR * 8 * 4):
            registry.prefixes_read = 0
            await busy.read(uids[:1])
            read.append(registry.prefixes_read)
            registry.prefixes_read = 0
            await waiting.read([], saved=uids[:1])
            assert registry.prefixes_read, "a node that hosts nothing does not wait"
        assert sum(map(bool, read)) == len(read) / 8
        turns = [read[n : n + _ROWS_FOR] for n in range(0, len(read), _ROWS_FOR)]
        assert all(all(turn) or not any(turn) for turn in turns), "several looks in a row"

    asyncio.run(scenario())


def test_a_new_node_first_reads_several_rows_of_a_layer_that_has_split() -> None:
    registry = FakeRegistry(all_uids((16, 16)))
    registry.split(0, 1)
    survey, mine = make_survey((16, 16), registry), UID(0, (0, 0))
    read = []

    async def scenario() -> None:
        for looks, hosted in ((6, ()), (6, ()), (6, (mine,))):
            rows = set[Prefix]()
            for _ in range(looks):
                await survey.read(hosted)
                rows.update(registry.first_rows)
            read.append(rows)

    asyncio.run(scenario())
    assert [*map(len, read)] == [8, 1, 2], "its own row and another one, once it hosts something"


def test_newcomers_read_different_rows_of_a_layer_that_turns_out_to_have_split() -> None:
    registry = FakeRegistry(all_uids((64, 4)))
    read = []
    for peer_id in (ME, OTHER):
        survey = make_survey((64, 4), registry, peer_id=peer_id)
        for _ in range(2):
            asyncio.run(survey.read([]))
            read.append({*registry.first_rows})
    assert read[0] == read[1], "an expert must be found vacant twice in a row"
    assert len(read[0] & read[2]) < 0.7 * MOST_REGIONS
    assert {layer for layer, _ in read[0]} == {0, 1}


def test_experts_that_others_took_since_an_earlier_look_are_not_claimed() -> None:
    uids = all_uids((16, 16))
    registry, replicas = FakeRegistry(uids), FakeReplicas()
    registry.split(0, 1)
    manager = make_manager(registry, replicas, NodeSettings(experts=16, replicas=2))

    async def scenario() -> None:
        for _ in range(20):
            await manager.look()
        assert len({*replicas.wanted}) > 4, "a single host is too few"
        registry.hosts.append(THIRD)
        for _ in range(3):
            replicas.wanted.clear()
            await manager.look()
            assert len(replicas.wanted) <= 1, "an idle node adds a third replica of one expert"

    asyncio.run(scenario())


def test_what_was_found_vacant_is_read_again_until_it_is_adopted_though_its_index_entry_lives_on() -> None:
    """Rows in which all seems to be active are read in turns, and a few of their experts, drawn at random."""
    registry, replicas = FakeRegistry(all_uids((16, 16))), FakeReplicas()
    registry.split(0, 1)
    manager = make_manager(registry, replicas, NodeSettings(experts=16, replicas=1))

    async def scenario() -> None:
        for _ in range(4 * _ROWS_FOR - 1):
            await manager.look()
        registry.dead = dead = {*manager._survey.just_read}
        for look in (manager.look, *3 * [manager.look_again], manager.look):  # the last one has other rows
            replicas.wanted.clear()
            await look()
        assert dead
        assert dead <= {*replicas.wanted}

    asyncio.run(scenario())


def test_that_a_layer_has_split_is_not_learnt_again_by_reading_all_its_rows() -> None:
    registry = FakeRegistry(all_uids((16, 16)))
    registry.split(0, 1)
    survey = make_survey((16, 16), registry)
    asyncio.run(survey.read([]))
    registry.time += 2000.0
    registry.prefixes_read = 0
    asyncio.run(survey.read([]))
    assert registry.prefixes_read <= 2 * FEW
    for _ in range(20):  # the layers have joined again, as its rows in its turn show
        asyncio.run(survey.read([]))
    assert set(asyncio.run(survey.read([]))) == set(all_uids((16, 16)))


def test_what_was_seen_counts_until_it_expires() -> None:
    uids = all_uids((16, 16))
    registry = FakeRegistry(uids)
    survey = make_survey((16, 16), registry)

    async def scenario() -> None:
        assert set(await survey.read([])) == set(uids)
        registry.split(0, 1)
        assert all((await survey.read([])).values())
        registry.time += 29
        assert set(await survey.read([])) == set(uids)
        registry.time += 2
        assert 0 < len(await survey.read([])) <= 6 * FEW, "what was read lately"

    asyncio.run(scenario())


@settings(max_examples=10)
@given(st.integers(0, 2**32), st.integers(0, 300))
def test_of_a_large_grid_all_that_is_vacant_is_found_and_few_others_are_read(seed: int, missing: int) -> None:
    grid, rng = (40, 40), random.Random(seed)
    uids = all_uids(grid)
    vacant = set(rng.sample(uids, missing))
    registry, mine = FakeRegistry(set(uids) - vacant), rng.sample(uids, 5)
    found = asyncio.run(make_survey(grid, registry, seed).read(mine))
    assert {uid for uid, hosts in found.items() if not hosts} == vacant
    assert set(mine) <= set(found)
    assert registry.prefixes_read == 2 * 40
    assert registry.experts_read <= missing + SAMPLED + len(mine)


def test_what_had_a_host_comes_before_what_never_had_one() -> None:
    uids = all_uids((40, 40))
    registry = FakeRegistry(uids[:200])
    survey = make_survey((40, 40), registry)

    async def scenario() -> None:
        first = await survey.read([])
        assert sum(not hosts for hosts in first.values()) == MOST_VACANT
        registry.hosted -= set(uids[:100])
        second = await survey.read([])
        assert {uid for uid, hosts in second.items() if not hosts} >= set(uids[:100])
        assert all(map(survey.had_host, uids[:200]))
        assert not any(map(survey.had_host, uids[200:]))

    asyncio.run(scenario())


def test_a_huge_grid_costs_no_more_and_what_is_vacant_is_seen_twice() -> None:
    registry = FakeRegistry([])
    survey = make_survey((1000, 1000), registry)

    async def scenario() -> None:
        first, second = await survey.read([]), await survey.read([])
        assert registry.prefixes_read == 2 * MOST_PREFIXES
        assert len(first) == MOST_VACANT
        assert first.keys() == second.keys()
        for _ in range(_ROWS_FOR - 1):
            later = await survey.read([])
        assert later.keys() != first.keys(), "after a while it looks elsewhere"

    asyncio.run(scenario())


def test_a_manifest_of_millions_of_rows_costs_no_list_of_them() -> None:
    """A list of the rows alone would take 16 MB here, and 512 MB for the largest grid."""
    registry = FakeRegistry([])
    survey = make_survey((1024, 1024, 1), registry)
    tracemalloc.start()
    try:
        asyncio.run(survey.read([]))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert registry.prefixes_read == MOST_PREFIXES
    assert most < 8e6


def test_experts_of_which_nothing_was_read_take_no_memory() -> None:
    registry = FakeRegistry([UID(0, (3, 5))])
    make_survey((4, 4), registry)  # what is imported late is not counted
    tracemalloc.start()
    try:
        survey = make_survey((1024, 1024), registry)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 1e6
    assert not survey.had_host(UID(0, (3, 5)))


@pytest.mark.parametrize("grid", [(500, 1000), (1000, 1000)], ids=["all-rows", "some-rows"])
def test_an_expert_that_died_alone_in_its_row_is_seen_however_large_the_grid(
    grid: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expert_server.hosting.placement.MOST_VACANT", 16)
    lonely = UID(1, (grid[0] - 1, 999))
    registry = FakeRegistry([lonely])
    survey = make_survey(grid, registry)

    async def scenario() -> None:
        for _ in range(100):
            await survey.read([])
            if survey.had_host(lonely):
                break
        assert survey.had_host(lonely)
        registry.hosted.clear()
        for _ in range(20):
            found = await survey.read([])
            assert found[lonely] == ()
            assert len(found) <= 16

    asyncio.run(scenario())


def test_an_expert_off_the_grid_that_somebody_hosts_does_no_harm() -> None:
    stray = UID(7, (9, 9, 9))
    found = asyncio.run(make_survey((4, 4), FakeRegistry([stray])).read([stray]))
    assert set(found) == set(all_uids((4, 4)))
