"""The beam search against brute force: the paper's SelectExperts must find the top k of the live experts."""

import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loop_lags import least_cpu_s

from dht import beam_search
from dht.beam_search import PrefixIndex, Selection, default_beam_size, select_experts
from dht.directory import PrefixTables, prefix_tables
from peer.codec import Booleans, Floats


@dataclass(frozen=True)
class Case:
    scores: list[Floats]
    alive: PrefixTables
    k: int

    @property
    def widest(self) -> int:
        """The number of prefixes of the widest dimension, apart from the last."""
        return max([1, *(int(table.sum()) for table in self.alive[:-1])])


@st.composite
def cases(draw: st.DrawFn, max_dims: int = 3, live: float | None = None) -> Case:
    grid = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=max_dims)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = draw(st.integers(0, 6))
    levels = draw(st.sampled_from([2, 1000]))  # two levels give many ties
    scores = [(rng.integers(-levels, levels, (rows, size)) / 8).astype(np.float32) for size in grid]
    share = draw(st.sampled_from([0.0, 0.1, 0.5, 0.9])) if live is None else live
    return Case(scores, prefix_tables(rng.random(grid) < share), draw(st.integers(1, 6)))


def brute_force(
    scores: Sequence[Floats], alive_last: Booleans, k: int, bias: Floats | None = None
) -> Selection:
    rows, grid = len(scores[0]), alive_last.shape
    total = np.zeros((rows, 1), np.float32)
    for table in scores:
        total = (total[:, :, None] + table[:, None, :]).reshape(rows, total.shape[1] * table.shape[1])
    if bias is not None:
        total = total + bias.reshape(-1)
    total = np.where(alive_last.reshape(-1), total, -np.inf).astype(np.float32)
    slots = min(k, total.shape[1])
    best = np.argsort(-total, axis=1, kind="stable")[:, :slots]
    best_scores = np.full((rows, k), -np.inf, np.float32)
    best_scores[:, :slots] = np.take_along_axis(total, best, axis=1)
    valid = np.isfinite(best_scores)
    experts = np.where(valid, np.pad(best, ((0, 0), (0, k - slots))), 0)
    return Selection(np.stack(np.unravel_index(experts, grid), -1), np.where(valid, best_scores, 0), valid)


def assert_same(found: Selection, expected: Selection) -> None:
    np.testing.assert_array_equal(found.valid, expected.valid)
    np.testing.assert_array_equal(found.scores, expected.scores)
    np.testing.assert_array_equal(found.coordinates, expected.coordinates)


@given(cases(max_dims=4))
def test_beam_over_all_live_prefixes_equals_brute_force(case: Case) -> None:
    found = select_experts(case.scores, case.alive, case.k, case.widest)
    assert_same(found, brute_force(case.scores, case.alive[-1], case.k))


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.02, 0.3, 0.8, 1.0]), st.sampled_from([2, 20, 10_000]))
def test_what_a_large_grid_leaves_out_is_never_among_the_best(seed: int, share: float, levels: int) -> None:
    """In a large grid, each row's best coordinates are tried first. The cases include ties, huge scores and few live
    experts.
    """
    rng = np.random.default_rng(seed)
    grid, k = (int(rng.integers(2, 12)), int(rng.integers(12, 40))), int(rng.integers(1, 5))
    scale = np.float32(rng.choice([1 / 8, 1e30]))
    scores = [(rng.integers(-levels, levels, (12, size)) * scale).astype(np.float32) for size in grid]
    scores[0][0] = 1e30  # beside which the others' scores are lost
    clipped = [np.clip(table, np.float32(-1e30), np.float32(1e30)) for table in scores]
    alive = prefix_tables(rng.random(grid) < share)
    found = select_experts(scores, alive, k, beam_size=grid[0])
    assert_same(found, brute_force(clipped, alive[-1], k))


@given(cases(max_dims=4), st.booleans(), st.integers(0, 2**32 - 1))
def test_with_a_score_for_each_expert_the_choice_equals_brute_force(
    case: Case, has_bias: bool, seed: int
) -> None:
    rng, live = np.random.default_rng(seed), case.alive[-1]
    scores = rng.integers(-9, 9, (len(case.scores[0]), live.size)).astype(np.float32)
    bias = rng.integers(-9, 9, live.shape).astype(np.float32) if has_bias else None
    found = select_experts([scores], case.alive, case.k, bias=bias)
    assert_same(found, brute_force([scores], live, case.k, bias))


@given(cases(live=1.0))
def test_beam_of_k_finds_the_highest_scores_where_every_expert_is_live(case: Case) -> None:
    found = select_experts(case.scores, case.alive, case.k, case.k)
    np.testing.assert_array_equal(found.scores, brute_force(case.scores, case.alive[-1], case.k).scores)


@pytest.mark.parametrize("weighed", [4096, 0], ids=["one by one", "by prefixes"])
@settings(deadline=None)
@given(case=cases(max_dims=4), levels=st.sampled_from([1, 1000]), seed=st.integers(0, 2**32 - 1))
def test_experts_with_biases_are_chosen_as_brute_force_does(
    weighed: int, case: Case, levels: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    bias = (rng.integers(-levels, levels + 1, case.alive[-1].shape) / 8).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beam_search, "_MOST_WEIGHED", weighed)
        found = select_experts(case.scores, case.alive, case.k, case.widest, bias)
    assert_same(found, brute_force(case.scores, case.alive[-1], case.k, bias))


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.1, 1.0, 4.0]))
def test_among_many_experts_with_biases_a_beam_of_all_prefixes_finds_the_best(seed: int, size: float) -> None:
    """Here each row's best coordinates are tried first."""
    rng = np.random.default_rng(seed)
    grid, k = (70, 80), int(rng.integers(1, 5))
    # Multiples of 1/1024 have exact sums, so that rounding decides nothing.
    scores = [(rng.normal(0, 1024, (4, side)).round() / 1024).astype(np.float32) for side in grid]
    bias = (rng.normal(0, 1024 * size, grid).round() / 1024).astype(np.float32)
    alive = prefix_tables(rng.random(grid) < 0.9)
    assert alive[-1].sum() > 4096
    found = select_experts(scores, alive, k, grid[0], bias)
    assert_same(found, brute_force(scores, alive[-1], k, bias))


@given(cases(), st.integers(0, 2**32 - 1))
def test_with_biases_too_nothing_is_found_below_a_dead_prefix(case: Case, seed: int) -> None:
    rng = np.random.default_rng(seed)
    bias = np.zeros(case.alive[-1].shape, np.float32)
    alive = [table & (rng.random(table.shape) < 0.7) for table in case.alive[:-1]] + [case.alive[-1]]
    found = select_experts(case.scores, alive, case.k, case.widest, bias)
    assert_same(found, select_experts(case.scores, alive, case.k, case.widest))


def test_a_bias_of_zeros_changes_nothing() -> None:
    rng = np.random.default_rng(5)
    scores = [rng.standard_normal((64, 16)).astype(np.float32) for _ in range(2)]
    alive = prefix_tables(rng.random((16, 16)) < 0.7)
    found = select_experts(scores, alive, 4, bias=np.zeros((16, 16), np.float32))
    assert_same(found, select_experts(scores, alive, 4))


@given(cases(max_dims=2), st.integers(1, 5))
def test_wider_beam_is_never_worse_on_two_dimensions(case: Case, width: int) -> None:
    narrow = select_experts(case.scores, case.alive, case.k, width)
    wide = select_experts(case.scores, case.alive, case.k, width + 1)
    lowest = np.float32(-np.inf)
    assert (np.where(wide.valid, wide.scores, lowest) >= np.where(narrow.valid, narrow.scores, lowest)).all()


@given(cases(max_dims=4), st.integers(1, 3))
def test_narrow_beam_gives_distinct_live_experts_best_first(case: Case, width: int) -> None:
    found = select_experts(case.scores, case.alive, case.k, width)
    assert (found.valid[:, :-1] >= found.valid[:, 1:]).all(), "the valid slots come first"
    for row, (coordinates, scores, valid) in enumerate(
        zip(found.coordinates, found.scores, found.valid, strict=True)
    ):
        experts = [tuple(c) for c in coordinates[valid].tolist()]
        assert len(set(experts)) == len(experts)
        assert all(case.alive[-1][expert] for expert in experts)
        assert (np.diff(scores[valid]) <= 0).all()
        for expert, score in zip(experts, scores[valid], strict=True):
            assert score == sum(table[row, x] for table, x in zip(case.scores, expert, strict=True))
    assert (found.coordinates[~found.valid] == 0).all()
    assert found.valid[:, 0].all() or not case.alive[-1].any(), "one live expert is enough to be found"


@given(cases(), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_prefix_marked_live_over_dead_experts_takes_no_slot_of_the_beam(
    case: Case, width: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    stale = [table | (rng.random(table.shape) < 0.5) for table in case.alive[:-1]]
    found = select_experts(case.scores, [*stale, case.alive[-1]], case.k, width)
    assert_same(found, select_experts(case.scores, case.alive, case.k, width))


def test_expert_below_a_dead_prefix_is_not_found() -> None:
    scores = [np.zeros((1, 2), np.float32), np.zeros((1, 2), np.float32)]
    alive = [np.array([False, True]), np.ones((2, 2), np.bool_)]
    found = select_experts(scores, alive, k=4)
    assert found.coordinates[found.valid].tolist() == [[1, 0], [1, 1]]


def test_with_a_score_for_each_expert_too_nothing_is_found_below_a_dead_prefix() -> None:
    alive = (np.array([True, False]), np.ones((2, 2), dtype=bool))
    found = select_experts([np.arange(4, dtype=np.float32)[None]], alive, 4)
    assert found.coordinates[found.valid].tolist() == [[0, 1], [0, 0]]


def test_equal_scores_go_to_the_lower_coordinate() -> None:
    scores = [np.array([[0.0, -0.0, 0.0]], np.float32), np.array([[-0.0, 0.0]], np.float32)]
    found = select_experts(scores, prefix_tables(np.ones((3, 2), np.bool_)), k=3)
    assert found.coordinates.tolist() == [[[0, 0], [0, 1], [1, 0]]]


def test_fewer_live_experts_than_k_leave_the_last_slots_invalid() -> None:
    alive = np.zeros((4, 4), np.bool_)
    alive[1, 2] = alive[3, 0] = True
    scores = [np.array([[0, 1, 0, 3]], np.float32), np.array([[0, 0, 5, 0]], np.float32)]
    found = select_experts(scores, prefix_tables(alive), k=4)
    assert found.valid.tolist() == [[True, True, False, False]]
    assert found.coordinates[0, :2].tolist() == [[1, 2], [3, 0]]
    assert found.scores[0, :2].tolist() == [6, 3]


def test_nothing_is_found_in_a_dead_layer() -> None:
    scores = [np.zeros((3, 4), np.float32), np.zeros((3, 4), np.float32)]
    assert not select_experts(scores, prefix_tables(np.zeros((4, 4), np.bool_)), k=2).valid.any()


def test_scores_that_are_not_finite_still_choose_live_experts() -> None:
    scores = [
        np.array([[np.nan, 0, np.inf]], np.float32),
        np.array([[-np.inf, np.inf]], np.float32),
    ]
    found = select_experts(scores, prefix_tables(np.ones((3, 2), np.bool_)), k=6)
    assert found.valid.all()
    assert np.isfinite(found.scores).all()
    assert found.coordinates[0, 0].tolist() == [2, 1]
    assert found.coordinates[0, -1].tolist() == [0, 0]


def test_rows_in_several_blocks_are_chosen_as_if_alone() -> None:
    rng = np.random.default_rng(1)
    scores = [rng.standard_normal((5, 600)).astype(np.float32) for _ in range(2)]
    alive = prefix_tables(rng.random((600, 600)) < 0.5)
    found = select_experts(scores, alive, k=4, beam_size=200)
    for row in range(5):
        alone = select_experts([table[row : row + 1] for table in scores], alive, k=4, beam_size=200)
        np.testing.assert_array_equal(found.coordinates[row], alone.coordinates[0])


@pytest.mark.parametrize("k", [1, 4, 8])
def test_default_beam_finds_nearly_all_where_nine_of_ten_experts_are_missing(k: int) -> None:
    rng = np.random.default_rng(2)
    scores = [rng.standard_normal((512, 32)).astype(np.float32) for _ in range(2)]
    alive = prefix_tables(rng.random((32, 32)) < 0.1)
    found = select_experts(scores, alive, k, default_beam_size(k))
    expected = brute_force(scores, alive[-1], k)
    hits = (found.coordinates[:, :, None] == expected.coordinates[:, None]).all(axis=-1).any(axis=1)
    assert hits.mean() > 0.97


@pytest.mark.parametrize("has_bias", [False, True])
def test_memory_does_not_grow_with_the_number_of_rows(
    monkeypatch: pytest.MonkeyPatch, has_bias: bool
) -> None:
    monkeypatch.setattr("dht.beam_search._CANDIDATES_AT_ONCE", 2**14)
    rng = np.random.default_rng(4)
    scores = [rng.standard_normal((4000, 32)).astype(np.float32) for _ in range(2)]
    bias = np.zeros((32, 32), np.float32) if has_bias else None
    tracemalloc.start()
    try:
        select_experts(scores, prefix_tables(np.ones((32, 32), np.bool_)), k=4, bias=bias)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


def test_an_index_of_prefixes_knows_what_was_read_and_what_leads_to_no_expert() -> None:
    index = PrefixIndex((3, 4))
    assert not index.knows(())
    index.note((), [0, 2])
    assert index.knows(())
    assert not index.knows((0,))
    assert not index.knows((0, 1)), "an expert is no prefix"
    assert not index.knows_all_of(1)
    assert marked(index) == ([(0,), (2,)], []), "what was not read may lead to experts"
    index.note((0,), [1, 3])
    assert not index.knows_all_of(1)
    index.note((2,), [])
    assert index.knows_all_of(1)
    assert not index.knows_all_of(0), "the first coordinates are not below a prefix"
    assert marked(index) == ([(0,)], [(0, 1), (0, 3)])
    only = np.zeros((3, 4), np.bool_)
    only[0, 1:] = True
    assert marked(index, only) == ([], [])
    only[0, 1] = False
    assert marked(index, only) == ([(0,)], [(0, 1)])
    index.drop((0, 3))
    assert marked(index) == ([(0,)], [(0, 1)])
    index.note((0,), [3])
    assert marked(index) == ([(0,)], [(0, 3)]), "what was read last replaces what was read before"


def marked(index: PrefixIndex, passed_over: Booleans | None = None) -> tuple[list[tuple[int, ...]], ...]:
    return tuple(list(map(tuple, np.argwhere(table).tolist())) for table in index.tables(passed_over))


def test_the_best_prefixes_to_read_next_are_active_ones_of_all_rows() -> None:
    index = PrefixIndex((3, 4))
    index.note((), [0, 2])
    scores = [np.array([[1.0, 9.0, 3.0], [5.0, 9.0, 3.0]], np.float32)]
    assert index.best(scores, 1) == [(0,), (2,)], "one for each row"
    assert index.best(scores, 1, everything=True) == [(1,)]
    index.note((2,), [])
    assert index.best(scores, 1) == [(0,)]
    index.note((0,), [1])
    only = np.zeros((3, 4), np.bool_)
    only[0, 1] = True
    assert index.best(scores, 1, only) == []


def test_tables_that_do_not_fit_the_grid_are_refused() -> None:
    with pytest.raises(AssertionError, match="don't fit the grid"):
        select_experts([np.zeros((1, 4), np.float32)], [np.ones(3, np.bool_)], k=1)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("live", [0.1, 1.0])
def test_a_thousand_rows_are_chosen_in_milliseconds(live: float, has_bias: bool) -> None:
    """It takes 2.5 ms here, and 2 to 14 ms with biases. The bound leaves room for a busy machine."""
    rng = np.random.default_rng(3)
    scores = [rng.standard_normal((1024, 32)).astype(np.float32) for _ in range(2)]
    alive = prefix_tables(rng.random((32, 32)) < live)
    bias = rng.standard_normal((32, 32)).astype(np.float32) if has_bias else None
    assert least_cpu_s(lambda: select_experts(scores, alive, k=4, bias=bias)) < 0.05
