"""Batches and refilling, against what a loop over rows and slots would do."""

from collections import defaultdict

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dht.beam_search import Selection
from dht.uid import UID
from peer.codec import Booleans, Integers
from trainer_client.dispatch.batches import (
    ExpertBatch,
    group_by_expert,
    prefer_proven,
    refill,
)

grids = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)
seeds = st.integers(0, 2**32 - 1)


def coordinates_of(rng: np.random.Generator, shape: tuple[int, ...], grid: tuple[int, ...]) -> Integers:
    return np.stack([rng.integers(size, size=shape) for size in grid], axis=-1)


def distinct_coordinates(rng: np.random.Generator, rows: int, k: int, grid: tuple[int, ...]) -> Integers:
    """[rows, k, dims], in each row k different experts."""
    chosen = [rng.choice(int(np.prod(grid)), size=k, replace=False) for _ in range(rows)]
    return np.stack(np.unravel_index(np.array(chosen, dtype=np.int64).reshape(rows, k), grid), axis=-1)


@given(grids, st.integers(1, 4), st.integers(0, 3), st.integers(1, 7), st.floats(0, 1), seeds)
def test_batches_cover_the_wanted_slots_each_once_with_whole_sequences_as_segments(
    grid: tuple[int, ...], k: int, sequences: int, length: int, density: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    rows = sequences * length
    coordinates = coordinates_of(rng, (rows, k), grid)
    wanted = rng.random((rows, k)) < density
    expected: dict[UID, list[tuple[int, int]]] = defaultdict(list)
    for row in range(rows):
        for slot in range(k):
            if wanted[row, slot]:
                expected[UID(3, tuple(coordinates[row, slot].tolist()))].append((row, slot))

    batches = list(group_by_expert(3, coordinates, wanted, grid, length))

    assert sorted(batch.uid for batch in batches) == sorted(expected)  # and so none twice
    for batch in batches:
        pairs = expected[batch.uid]
        assert list(zip(batch.rows.tolist(), batch.slots.tolist(), strict=True)) == pairs
        assert batch.positions.tolist() == [row % length for row, _ in pairs]
        in_sequence: dict[int, int] = defaultdict(int)
        for row, _ in pairs:
            in_sequence[row // length] += 1
        assert batch.lengths.tolist() == list(in_sequence.values())


def test_batch_of_two_sequences_by_hand() -> None:
    coordinates = np.array([[[0, 1], [1, 0]]] * 6)
    wanted = np.array([[1, 0], [0, 1], [1, 1], [1, 0], [0, 0], [1, 0]], dtype=bool)
    first, second = group_by_expert(0, coordinates, wanted, (2, 2), 3)
    assert first.uid == UID(0, (0, 1))
    assert first.rows.tolist() == [0, 2, 3, 5]
    assert first.slots.tolist() == [0, 0, 0, 0]
    assert first.lengths.tolist() == [2, 2]
    assert first.positions.tolist() == [0, 2, 0, 2]
    assert second.uid == UID(0, (1, 0))
    assert second.rows.tolist() == [1, 2]
    assert second.lengths.tolist() == [2]


def test_where_nothing_is_wanted_there_are_no_batches() -> None:
    assert list(group_by_expert(0, np.zeros((4, 2, 2), np.int64), np.zeros((4, 2), bool), (3, 3), 2)) == []
    assert list(group_by_expert(0, np.zeros((0, 2, 2), np.int64), np.zeros((0, 2), bool), (3, 3), 2)) == []


def test_coordinates_of_slots_that_are_not_wanted_may_be_anything() -> None:
    coordinates = np.array([[[0], [99]], [[-5], [1]]])
    batches = list(group_by_expert(0, coordinates, np.array([[True, False], [False, True]]), (2,), 2))
    assert [(batch.uid.coordinate, batch.rows.tolist()) for batch in batches] == [((0,), [0]), ((1,), [1])]


@st.composite
def refills(draw: st.DrawFn) -> tuple[Integers, Booleans, Selection]:
    grid = draw(grids.filter(lambda grid: np.prod(grid) >= 2))
    count = int(np.prod(grid))
    rows, k, fresh = draw(st.integers(0, 5)), draw(st.integers(1, min(4, count))), draw(st.integers(1, count))
    rng = np.random.default_rng(draw(seeds))
    valid = np.arange(fresh) < rng.integers(0, fresh + 1, (rows, 1))  # best first: the invalid come last
    selection = Selection(
        np.where(valid[..., None], distinct_coordinates(rng, rows, fresh, grid), 0),
        np.zeros((rows, fresh), np.float32),
        valid,
    )
    return distinct_coordinates(rng, rows, k, grid), rng.random((rows, k)) < 0.5, selection


def refill_slot_by_slot(
    coordinates: Integers, taken: Booleans, fresh: Selection
) -> tuple[list[list[tuple[int, ...]]], list[list[bool]]]:
    new, filled = [], []
    for row in range(len(coordinates)):
        slots = [tuple(coordinate) for coordinate in coordinates[row].tolist()]
        have = {slot for slot, is_taken in zip(slots, taken[row], strict=True) if is_taken}
        usable = [
            tuple(coordinate)
            for coordinate, is_valid in zip(fresh.coordinates[row].tolist(), fresh.valid[row], strict=True)
            if is_valid and tuple(coordinate) not in have
        ]
        fill = [not is_taken and bool(usable) for is_taken in taken[row]]
        for slot, is_taken in enumerate(taken[row]):
            fill[slot] = not is_taken and bool(usable)
            if fill[slot]:
                slots[slot] = usable.pop(0)
        new.append(slots)
        filled.append(fill)
    return new, filled


@given(refills())
def test_refill_does_what_a_loop_over_slots_would(case: tuple[Integers, Booleans, Selection]) -> None:
    coordinates, taken, fresh = case
    new, filled = refill(coordinates, taken, ~taken, fresh)
    expected_new, expected_filled = refill_slot_by_slot(coordinates, taken, fresh)
    assert [[tuple(c) for c in row] for row in new.tolist()] == expected_new
    assert filled.tolist() == expected_filled


@given(refills())
def test_no_row_has_an_expert_twice_after_a_refill_and_taken_slots_stay(
    case: tuple[Integers, Booleans, Selection],
) -> None:
    coordinates, taken, fresh = case
    before = coordinates.copy()
    new, filled = refill(coordinates, taken, ~taken, fresh)
    np.testing.assert_array_equal(coordinates, before)
    np.testing.assert_array_equal(new[~filled], coordinates[~filled])
    assert not (taken & filled).any()
    for row in range(len(new)):
        used = [tuple(c) for c in new[row][taken[row] | filled[row]].tolist()]
        assert len(set(used)) == len(used)


def test_the_best_fresh_experts_fill_the_free_slots_in_order_and_the_rest_stays_free() -> None:
    coordinates = np.array([[[0], [1], [2], [3]]])
    fresh = Selection(np.array([[[1], [7], [5]]]), np.zeros((1, 3), np.float32), np.array([[True] * 3]))
    new, filled = refill(coordinates, taken := np.array([[False, True, False, False]]), ~taken, fresh)
    assert new.tolist() == [[[7], [1], [5], [3]]]
    assert filled.tolist() == [[True, False, True, False]]


def test_batches_after_a_refill_hold_only_the_filled_slots() -> None:
    coordinates = np.array([[[0], [1]], [[0], [1]]])
    fresh = Selection(np.array([[[2]], [[1]]]), np.zeros((2, 1), np.float32), np.array([[True], [True]]))
    new, filled = refill(coordinates, taken := np.array([[True, False], [False, True]]), ~taken, fresh)
    batches: list[ExpertBatch] = list(group_by_expert(0, new, filled, (3,), 2))
    assert [(batch.uid.coordinate, batch.rows.tolist()) for batch in batches] == [((2,), [0])]


@given(refills(), refills(), seeds)
def test_wary_rows_take_the_sure_experts_first_and_each_expert_once(
    one: tuple[Integers, Booleans, Selection], two: tuple[Integers, Booleans, Selection], seed: int
) -> None:
    sure, others = one[2], two[2]
    rows = min(len(sure.valid), len(others.valid))
    sure, others = first_rows(sure, rows), first_rows(others, rows)
    if sure.coordinates.shape[2] != others.coordinates.shape[2]:
        others = sure
    wary = np.random.default_rng(seed).random(rows) < 0.5
    both = prefer_proven(sure, others, wary)
    for row in range(rows):
        found = experts_of(both, row)
        known = experts_of(sure, row) if wary[row] else []
        assert found == [*known, *(expert for expert in experts_of(others, row) if expert not in known)]


def first_rows(selection: Selection, rows: int) -> Selection:
    return Selection(selection.coordinates[:rows], selection.scores[:rows], selection.valid[:rows])


def experts_of(selection: Selection, row: int) -> list[tuple[int, ...]]:
    return [tuple(c) for c in selection.coordinates[row, selection.valid[row]].tolist()]
