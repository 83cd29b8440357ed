"""Searching a grid that is too large to know completely, and which replica of an expert is called."""

import asyncio
import math
import random
from collections.abc import Collection, Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dht.announcements import NodeInfo, Replica, ReplicaState
from dht.beam_search import PrefixIndex, select_experts
from dht.directory import Directory, View
from dht.manifest import Manifest
from dht.regions import Prefix
from dht.uid import UID
from peer.codec import Floats
from peer.errors import UnreachableError
from peer.identity import PeerID
from peer.transport.endpoints import Endpoint

GRID = (30, 20)
FIRST, SECOND = (PeerID(b"\x12\x20" + bytes([n]) * 32) for n in (1, 2))


@pytest.fixture(autouse=True)
def few_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dht.directory._MAX_READ", 400)


class FakeRegistry:
    """Has some active experts, some of which a node serves."""

    def __init__(self, active: Collection[tuple[int, ...]], served: Collection[tuple[int, ...]]) -> None:
        self.active = set(active)
        self.registry = self
        self.served = set(served)
        self.reads: list[str] = []
        self.experts_read: list[UID] = []
        self.ahead: list[UID] = []

    def read_ahead(self, uids: Iterable[UID]) -> None:
        self.ahead += uids

    async def prefixes(
        self, prefixes: Collection[Prefix], size: int, **_: Any
    ) -> dict[Prefix, frozenset[int]]:
        if prefixes:
            self.reads.append(f"{len(prefixes)} prefixes")
        return {
            (layer, start): frozenset(c[len(start)] for c in self.active if c[: len(start)] == start)
            for layer, start in prefixes
        }

    async def replicas(self, uids: Collection[UID], **_: Any) -> dict[UID, tuple[Replica, ...]]:
        if uids:
            self.reads.append(f"{len(uids)} experts")
            self.experts_read += uids
        return {uid: (make_replica(uid, FIRST),) if uid.coordinate in self.served else () for uid in uids}

    async def nodes(self, peer_ids: Collection[PeerID], **limits: object) -> dict[PeerID, NodeInfo]:
        return {peer_id: make_node(peer_id) for peer_id in peer_ids}


def make_replica(uid: UID, peer_id: PeerID, queued_rows: int = 0) -> Replica:
    return Replica(uid, peer_id, ReplicaState.SERVING, 0, queued_rows, 0.0, math.inf)


def make_node(peer_id: PeerID, expires_at: float = math.inf) -> NodeInfo:
    return NodeInfo(peer_id=peer_id, addresses=(Endpoint("127.0.0.1:1"),), expires_at=expires_at)


def make_directory(registry: Any) -> Directory:
    manifest = Manifest.model_validate(
        {"name": "swarm", "model": {"layers": 1}, "experts": {"grid": GRID}, "routing": {"top_k": 4}}
    )
    return Directory(registry, manifest, refresh_every_s=60, rng=random.Random(1))


def random_scores(seed: int, rows: int = 5) -> list[Floats]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((rows, size)).astype(np.float32) for size in GRID]


def random_experts(share: float, seed: int) -> list[tuple[int, ...]]:
    alive = np.random.default_rng(seed).random(GRID) < share
    return [tuple(c) for c in np.argwhere(alive).tolist()]


def best(scores: list[Floats], experts: Collection[tuple[int, ...]]) -> Any:
    """What a beam search finds that knows all experts."""
    alive = np.zeros(GRID, dtype=bool)
    for coordinate in experts:
        alive[coordinate] = True
    return select_experts(scores, [np.asarray(alive.any(axis=1)), alive], 4)


@given(st.integers(0, 2**32), st.sampled_from([0.3, 0.8, 1.0]))
def test_a_search_finds_what_a_beam_search_of_all_live_experts_does(seed: int, share: float) -> None:
    experts, scores = random_experts(share, seed), random_scores(seed, rows=1)
    directory = make_directory(FakeRegistry(experts, experts))
    view = asyncio.run(directory.search(0, scores, 4))
    found = select_experts(scores, view.tables(0), 4)
    np.testing.assert_array_equal(found.coordinates, best(scores, experts).coordinates)


def test_what_is_known_is_not_read_again() -> None:
    experts = random_experts(1.0, 0)
    registry = FakeRegistry(experts, experts)
    directory = make_directory(registry)

    async def scenario() -> None:
        await directory.search(0, random_scores(1, rows=50), 4)
        assert len(registry.reads) == 3, (
            "both levels of prefixes, of different sizes, together; then the experts"
        )
        registry.reads.clear()
        await directory.search(0, random_scores(1, rows=50), 4)
        assert registry.reads == []

    asyncio.run(scenario())


def test_the_first_search_for_few_rows_reads_likely_experts_beside_the_prefixes() -> None:
    experts = random_experts(0.8, 0)
    registry, scores = FakeRegistry(experts, experts), random_scores(1, rows=1)
    directory = make_directory(registry)

    async def scenario() -> None:
        view = await directory.search(0, scores, 4)
        assert sorted(registry.reads) == ["1 prefixes", "16 prefixes", "4 experts"]
        assert set(view.replicas) <= set(registry.ahead)
        assert len(registry.ahead) == 12
        await directory.search(0, random_scores(2, rows=1), 4)
        assert len(registry.ahead) == 12, "what is active is known now"

    asyncio.run(scenario())


def test_the_first_search_for_many_rows_guesses_nothing() -> None:
    registry = FakeRegistry(random_experts(1.0, 0), random_experts(1.0, 0))
    asyncio.run(make_directory(registry).search(0, random_scores(1, rows=200), 4))
    assert registry.ahead == []


def test_no_expert_is_read_twice_when_few_of_the_likely_ones_live() -> None:
    experts = random_experts(0.1, 0)
    registry = FakeRegistry(experts, experts)
    asyncio.run(make_directory(registry).search(0, random_scores(1, rows=1), 4))
    assert len(registry.experts_read) == len(set(registry.experts_read)) >= 4


class Hurried(FakeRegistry):
    """A registry that finds another host than the experts' own if it is asked for an urgent answer."""

    async def replicas(
        self, uids: Collection[UID], *, at_once: bool = False, **_: Any
    ) -> dict[UID, tuple[Replica, ...]]:
        found = await super().replicas(uids)
        return {uid: (make_replica(uid, SECOND),) for uid in found} if at_once else found


def test_a_host_that_can_not_be_called_hides_no_other_that_announces_further_down() -> None:
    class Uncallable(Hurried):
        async def nodes(self, peer_ids: Collection[PeerID], **limits: object) -> dict[PeerID, NodeInfo]:
            return await super().nodes(set(peer_ids) - {SECOND})

    registry = Uncallable([(7, 3)], [(7, 3)])
    view = asyncio.run(make_directory(registry).search(0, random_scores(1, rows=1), 4))
    assert [replica.peer_id for replica in view.hosts(UID(0, (7, 3)))] == [FIRST]


def test_an_avoided_host_that_was_found_first_hides_no_other_that_announces_further_down() -> None:
    async def scenario() -> None:
        registry, scores = Hurried([(7, 3)], [(7, 3)]), random_scores(1, rows=1)
        directory, uid = make_directory(registry), UID(0, (7, 3))
        view = await directory.search(0, scores, 4)
        assert [replica.peer_id for replica in view.hosts(uid)] == [SECOND]
        view = await directory.search(0, scores, 4, frozenset({SECOND}))
        assert [replica.peer_id for replica in view.hosts(uid)] == [FIRST]
        registry.reads.clear()
        await directory.search(0, scores, 4, frozenset({FIRST, SECOND}))
        assert registry.reads == [], "what was read whole is not read again"

    asyncio.run(scenario())


def test_what_a_refresh_has_read_whole_is_not_read_again_when_its_host_is_avoided() -> None:
    async def scenario() -> None:
        registry, scores = Hurried([(7, 3)], [(7, 3)]), random_scores(1, rows=1)
        directory = make_directory(registry)
        await directory.search(0, scores, 4)
        view = await directory.refresh()
        assert [replica.peer_id for replica in view.hosts(UID(0, (7, 3)))] == [FIRST]
        registry.reads.clear()
        await directory.search(0, scores, 4, frozenset({FIRST}))
        assert registry.reads == []

    asyncio.run(scenario())


def test_a_row_that_has_found_its_experts_is_not_searched_further() -> None:
    active, scores = random_experts(1.0, 0), random_scores(2, rows=1)
    missing = {tuple(c) for c in best(scores, active).coordinates[0].tolist()}
    other = next(
        more
        for seed in range(3, 100)
        if missing.isdisjoint(
            map(tuple, best(more := random_scores(seed, rows=1), active).coordinates[0].tolist())
        )
    )
    registry = FakeRegistry(active, set(active) - missing)
    both = [np.concatenate(tables) for tables in zip(scores, other, strict=True)]
    asyncio.run(make_directory(registry).search(0, both, 4))
    wide = FakeRegistry(active, set(active) - missing)
    asyncio.run(make_directory(wide).search(0, scores, 4))
    assert len(set(registry.experts_read)) <= len(set(wide.experts_read)) + 4


def test_a_search_for_many_rows_reads_a_bounded_number_of_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dht.directory._MAX_READ", 10)
    registry = FakeRegistry(random_experts(1.0, 0), [])
    asyncio.run(make_directory(registry).search(0, random_scores(1, rows=200), 4))
    read = [int(said.split()[0]) for said in registry.reads if "prefixes" in said]
    assert read
    assert max(read) <= 10


def test_experts_that_nobody_hosts_make_room_for_the_next_best_and_are_not_asked_for_again() -> None:
    active, scores = random_experts(1.0, 0), random_scores(2, rows=1)
    first = {tuple(c) for c in best(scores, active).coordinates[0].tolist()}
    registry = FakeRegistry(active, set(active) - first)
    directory = make_directory(registry)

    async def scenario() -> None:
        view = await directory.search(0, scores, 4)
        found = select_experts(scores, view.tables(0), 4)
        np.testing.assert_array_equal(found.coordinates, best(scores, registry.served).coordinates)
        registry.reads.clear()
        await directory.search(0, scores, 4)
        assert registry.reads == []

    asyncio.run(scenario())


def test_made_up_experts_with_the_best_scores_hide_no_living_one_further_down() -> None:
    scores = random_scores(1, rows=1)
    by_score = [(row, column) for row in np.argsort(-scores[0][0])[:3].tolist() for column in range(GRID[1])]
    by_score.sort(key=lambda c: -(scores[0][0, c[0]] + scores[1][0, c[1]]))
    lives = by_score[45]
    directory = make_directory(FakeRegistry(by_score, [lives]))
    view = asyncio.run(directory.search(0, scores, 4))
    assert view.hosts(UID(0, lives))


def test_a_search_among_made_up_coordinates_reads_a_bounded_number_and_loses_nothing_that_lives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dht.directory._MAX_READ", 100)
    served = random_experts(1.0, 0)[::60]
    registry = FakeRegistry(random_experts(1.0, 0), served)
    directory = make_directory(registry)

    async def scenario() -> None:
        seen: set[UID] = set()
        for number in range(40):
            registry.reads.clear()
            view = await directory.search(0, random_scores(number, rows=200), 4)
            read = [int(said.split()[0]) for said in registry.reads if "experts" in said]
            assert sum(read) <= 100
            alive = {uid for uid in view.replicas if view.hosts(uid)}
            assert alive >= seen, "an expert that lives stays in the view"
            assert len(view.replicas) <= 100
            seen = alive
        assert {uid.coordinate for uid in seen} == set(served), "what lives is found in time"

    asyncio.run(scenario())


def test_a_small_grid_is_read_whole_and_what_lived_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dht.directory._MAX_READ", 600)
    experts = random_experts(0.5, 0)
    registry = FakeRegistry(experts, experts)
    directory = make_directory(registry)

    async def scenario() -> None:
        assert (await directory.refresh()).live_experts() == len(experts)
        assert registry.reads == ["600 experts", "16 experts"], (
            "no prefix leads to some, which are looked for too"
        )
        registry.reads.clear()
        registry.served.clear()
        assert (await directory.refresh()).live_experts() == 0
        assert registry.reads == ["600 experts", "16 experts", f"{len(experts)} experts"]

    asyncio.run(scenario())


@pytest.mark.parametrize(("active", "served"), [([], []), (random_experts(0.1, 3), [])])
def test_an_empty_swarm_and_one_of_dead_experts_are_searched_in_vain(
    active: list[tuple[int, ...]], served: list[tuple[int, ...]]
) -> None:
    registry = FakeRegistry(active, served)
    view = asyncio.run(make_directory(registry).search(0, random_scores(1), 4))
    assert view.live_experts() == 0
    assert not select_experts(random_scores(1), view.tables(0), 4).valid.any()
    assert len(registry.reads) < 12


def test_one_live_expert_is_found_for_a_top_4() -> None:
    registry = FakeRegistry([(7, 3)], [(7, 3)])
    view = asyncio.run(make_directory(registry).search(0, random_scores(1), 4))
    found = select_experts(random_scores(1), view.tables(0), 4)
    assert found.valid.tolist() == [[True, False, False, False]] * 5
    assert found.coordinates[:, 0].tolist() == [[7, 3]] * 5


def test_a_refresh_keeps_what_was_searched_for_and_reads_few_others() -> None:
    experts = random_experts(1.0, 0)
    registry = FakeRegistry(experts, experts)
    directory = make_directory(registry)

    async def scenario() -> None:
        searched = set((await directory.search(0, random_scores(1), 4)).replicas)
        registry.served -= {next(iter(searched)).coordinate}
        view = await directory.refresh()
        assert set(view.replicas) >= searched
        assert len(view.replicas) <= len(searched) + 64
        assert view.live_experts() == len(view.replicas) - 1

    asyncio.run(scenario())


def test_a_search_that_nobody_answers_leaves_the_view() -> None:
    class Silent(FakeRegistry):
        async def prefixes(
            self, prefixes: Collection[Prefix], size: int, **_: Any
        ) -> dict[Prefix, frozenset[int]]:
            raise UnreachableError("no DHT peer answered")

    directory = make_directory(Silent([], []))
    before = directory.view
    with pytest.raises(UnreachableError):
        asyncio.run(directory.search(0, random_scores(1), 4))
    assert directory.view is before


@given(st.integers(0, 2**32), st.integers(1, 6))
def test_the_index_names_the_prefixes_of_all_rows_beams(seed: int, width: int) -> None:
    index, rng = PrefixIndex((6, 5)), np.random.default_rng(seed)
    active = np.flatnonzero(rng.random(6) < 0.5).tolist()
    index.note((), active)
    scores = rng.standard_normal((3, 6)).astype(np.float32)
    expected = {(c,) for row in scores for c in sorted(active, key=lambda c: -row[c])[:width]}
    assert set(index.best([scores], width)) == expected
    assert index.knows(())
    assert not index.knows((0,))


class TwoHosts(FakeRegistry):
    """FIRST serves the even rows of the grid, SECOND the odd ones."""

    expires_at = 1e12

    async def replicas(self, uids: Collection[UID], **_: Any) -> dict[UID, tuple[Replica, ...]]:
        return {uid: (make_replica(uid, (FIRST, SECOND)[uid.coordinate[0] % 2]),) for uid in uids}

    async def nodes(self, peer_ids: Collection[PeerID], **limits: object) -> dict[PeerID, NodeInfo]:
        return {peer_id: make_node(peer_id, self.expires_at) for peer_id in peer_ids}


@pytest.mark.parametrize("is_searched", [True, False])
def test_a_dead_peers_replicas_are_gone_at_once_until_it_announces_itself_anew(
    is_searched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_searched:
        monkeypatch.setattr("dht.directory._MAX_READ", 10_000)
    experts = random_experts(1.0, 0)
    registry, scores = TwoHosts(experts, experts), random_scores(1)
    directory = make_directory(registry)

    async def rows_of_choice() -> set[int]:
        if is_searched:
            await directory.search(0, scores, 4)
        chosen = select_experts(scores, directory.view.tables(0), 4)
        assert chosen.valid.all()
        return set((chosen.coordinates[..., 0] % 2).ravel().tolist())

    async def scenario() -> None:
        await directory.refresh()
        assert await rows_of_choice() == {0, 1}
        directory.forget(FIRST)
        assert await rows_of_choice() == {1}
        await directory.refresh()
        assert await rows_of_choice() == {1}, "the old record is still in the DHT"
        registry.expires_at += 10
        await directory.refresh()
        assert await rows_of_choice() == {0, 1}

    asyncio.run(scenario())


def rows_of(scores: list[Floats], view: View, avoided: frozenset[PeerID]) -> set[int]:
    """The parity of the chosen experts' rows: even rows are FIRST's, odd rows SECOND's."""
    chosen = select_experts(scores, view.tables(0, avoided), 4)
    assert chosen.valid.all()
    return set((chosen.coordinates[..., 0] % 2).ravel().tolist())


@pytest.mark.parametrize("seed", range(20))
def test_a_search_passes_over_peers_that_are_avoided(seed: int) -> None:
    experts, scores = random_experts(1.0, 0), random_scores(seed, rows=1)
    directory, avoided = make_directory(TwoHosts(experts, experts)), frozenset({FIRST})

    async def scenario() -> None:
        view = await directory.search(0, scores, 4, avoided)
        assert rows_of(scores, view, avoided) == {1}
        found = select_experts(scores, view.tables(0, avoided), 4)
        odd = [expert for expert in experts if expert[0] % 2]
        np.testing.assert_array_equal(found.coordinates, best(scores, odd).coordinates)

    asyncio.run(scenario())


def test_a_peer_that_was_avoided_is_found_again_when_it_may_be_called() -> None:
    experts, scores = random_experts(1.0, 0), random_scores(3)
    directory, avoided = make_directory(TwoHosts(experts, experts)), frozenset({FIRST})

    async def scenario() -> None:
        await directory.search(0, scores, 4, avoided)
        view = await directory.search(0, scores, 4)
        found = select_experts(scores, view.tables(0), 4)
        np.testing.assert_array_equal(found.coordinates, best(scores, experts).coordinates)

    asyncio.run(scenario())


def test_a_search_that_may_call_nobody_ends() -> None:
    experts = random_experts(1.0, 0)
    registry = TwoHosts(experts, experts)
    directory, everybody = make_directory(registry), frozenset({FIRST, SECOND})
    view = asyncio.run(directory.search(0, random_scores(1), 4, everybody))
    assert not select_experts(random_scores(1), view.tables(0, everybody), 4).valid.any()
    assert len(registry.reads) < 12


def test_prefixes_that_lead_nowhere_take_no_place_in_the_beam() -> None:
    index = PrefixIndex((4, 3))
    index.note((), [0, 1, 2, 3])
    index.note((3,), [])
    index.note((2,), [0, 1])
    scores = np.arange(4, dtype=np.float32)[None]
    passed_over = np.zeros((4, 3), dtype=bool)
    assert index.best([scores], 1) == [(2,)]
    passed_over[2] = True
    assert index.best([scores], 1, passed_over) == [(1,)]
    index.drop((2, 0))
    index.drop((2, 1))
    assert index.best([scores], 2) == [(0,), (1,)]


def test_a_peer_that_is_not_known_can_be_forgotten() -> None:
    directory = make_directory(FakeRegistry([], []))
    directory.forget(FIRST)
    assert directory.view.live_experts() == 0


def test_peers_that_were_found_dead_are_forgotten_once_their_records_have_expired(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    experts = random_experts(1.0, 0)
    directory = make_directory(TwoHosts(experts, experts))
    asyncio.run(directory.search(0, random_scores(1), 4))
    directory.forget(FIRST)
    assert directory._gone
    monkeypatch.setattr(directory, "_now", lambda: TwoHosts.expires_at + 1)
    asyncio.run(directory.refresh())
    assert not directory._gone


def test_few_tables_are_kept_however_often_other_peers_are_avoided() -> None:
    view = make_directory(FakeRegistry([], [])).view
    for number in range(200):
        avoided = frozenset({PeerID(number.to_bytes(34))})
        assert view.tables(0, avoided) is view.tables(0, avoided), "they are made once"
    assert len(view._tables) <= 64


def test_a_swarm_that_does_not_answer_is_said_once_until_it_does(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers = iter([False, False, False, True, False, False])
    directory = make_directory(SimpleNamespace(registry=SimpleNamespace(spent_bytes=0)))
    monkeypatch.setattr(directory, "_refresh_every_s", 0.001)

    async def refresh() -> None:
        match next(answers, None):
            case True:
                directory.failures = 0
            case False:
                raise UnreachableError("no DHT peer answered")
            case _:
                raise EOFError

    monkeypatch.setattr(directory, "refresh", refresh)
    with pytest.raises(EOFError):
        asyncio.run(directory.keep_fresh())
    assert caplog.text.count("can't refresh the view of the swarm: no DHT peer answered") == 2


class Question:
    """About the records of nodes."""

    def __init__(self) -> None:
        self.asked, self.answer = asyncio.Event(), asyncio.Event()


class SlowNodes(FakeRegistry):
    """Each row of the grid has its own host. Answers to these questions about nodes come when they are released."""

    def __init__(self, *questions: Question) -> None:
        super().__init__(random_experts(1.0, 0), [])
        self.questions = iter(questions)

    async def replicas(self, uids: Collection[UID], **_: Any) -> dict[UID, tuple[Replica, ...]]:
        hosts = {uid: PeerID(b"\x12\x20" + bytes([uid.coordinate[0]]) * 32) for uid in uids}
        return {uid: (make_replica(uid, host),) for uid, host in hosts.items()}

    async def nodes(self, peer_ids: Collection[PeerID], **limits: object) -> dict[PeerID, NodeInfo]:
        if (question := next(self.questions, None)) is not None:
            question.asked.set()
            await question.answer.wait()
        return await super().nodes(peer_ids)


def scores_for(first: int) -> list[Floats]:
    """Ten rows, whose best experts are in ten rows of the grid from this one on."""
    scores = [np.zeros((10, size), np.float32) for size in GRID]
    scores[0][range(10), range(first, first + 10)] = 100
    return scores


def live(directory: Directory) -> set[tuple[int, ...]]:
    return {tuple(coordinate) for coordinate in np.argwhere(directory.live(0).tables[-1]).tolist()}


def test_searches_at_the_same_time_lose_nothing_that_the_other_found() -> None:
    async def scenario() -> None:
        first, second = Question(), Question()
        directory = make_directory(SlowNodes(first, second))
        searches = [asyncio.create_task(directory.search(0, scores_for(row), 8)) for row in (1, 11)]
        for question in (first, second):
            await question.asked.wait()
        first.answer.set()
        second.answer.set()
        await asyncio.gather(*searches)
        assert live(directory) == {(row, column) for row in range(1, 21) for column in range(8)}

    asyncio.run(scenario())


def test_a_refresh_keeps_what_a_search_found_meanwhile() -> None:
    async def scenario() -> None:
        question = Question()
        directory = make_directory(SlowNodes(question))
        refreshing = asyncio.create_task(directory.refresh())
        await question.asked.wait()
        await directory.search(0, scores_for(1), 8)
        found = live(directory)
        assert len(found) == 80
        question.answer.set()
        await refreshing
        assert live(directory) > found
        newest = {uid.coordinate for uid in [*directory.view.replicas][-40:]}
        assert newest < found, "if there are too many, the first ones are dropped"

    asyncio.run(scenario())
