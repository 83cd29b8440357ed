"""Batches, answers and replacing lost rows, compared with loops over rows and slots."""

from collections import defaultdict
from itertools import product

import numpy as np
from expert_fakes import make_node, make_peer_id, random_rows
from hypothesis import given
from hypothesis import strategies as st

from dht.beam_search import Selection
from dht.uid import UID
from peer.codec import Booleans, Integers, decode_scalars, encode_scalars
from peer.wire import expert_pb2
from trainer_client.dispatch.batches import (
    LEAST_WEIGHT,
    AnsweredRows,
    CallProgress,
    ForwardPass,
    NodeBatch,
    NodeCall,
    RoutedRows,
    Segments,
    SentBatch,
    prefer_proven,
    refill,
    relative_weights,
    shares,
)

grids = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)
seeds = st.integers(0, 2**32 - 1)
NODE = make_node(make_peer_id(0))


def coordinates_of(rng: np.random.Generator, shape: tuple[int, ...], grid: tuple[int, ...]) -> Integers:
    return np.stack([rng.integers(size, size=shape) for size in grid], axis=-1)


def distinct_coordinates(rng: np.random.Generator, rows: int, k: int, grid: tuple[int, ...]) -> Integers:
    """[rows, k, dims]: k different experts in each row."""
    chosen = [rng.choice(int(np.prod(grid)), size=k, replace=False) for _ in range(rows)]
    return np.stack(np.unravel_index(np.array(chosen, dtype=np.int64).reshape(rows, k), grid), axis=-1)


def cut(rows: int, length: int) -> Segments:
    """Segments of this length. The last one may be shorter."""
    lengths = np.array([min(length, rows - begin) for begin in range(0, rows, length)], np.int64)
    return Segments.after(np.zeros_like(lengths), lengths)


def distinct_batch(rng: np.random.Generator, rows: int, k: int, length: int, density: float) -> NodeBatch:
    """A batch for experts of a 2 x 3 grid. Each row has k different ones, some of which are asked."""
    coordinates = distinct_coordinates(rng, rows, k, (2, 3))
    return NodeBatch.of(3, coordinates, rng.random((rows, k)) < density, (2, 3), cut(rows, length))


def pairs_of(batch: NodeBatch) -> dict[UID, list[tuple[int, int]]]:
    """The rows and slots of each expert, according to the batch's parts."""
    return {
        part.uid: list(zip(batch.rows[part.places].tolist(), part.slots.tolist(), strict=True))
        for part in batch.parts()
    }


@given(grids, st.integers(1, 4), st.integers(0, 3), st.integers(1, 7), st.floats(0, 1), seeds)
def test_a_batch_has_the_wanted_slots_each_once_with_whole_sequences_as_segments(
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

    batch, _ = NodeBatch.of(3, coordinates, wanted, grid, Segments.whole(sequences, length)).only(wanted)

    assert list(batch.uids) == sorted(expected)  # and so none twice
    assert pairs_of(batch) == expected
    assert batch.rows.tolist() == [row for row in range(rows) if wanted[row].any()]
    np.testing.assert_array_equal(batch.asked, wanted[batch.rows])
    if wanted.any():
        np.testing.assert_array_equal(batch.coordinates[batch.asked], coordinates[batch.rows][batch.asked])
    for part in batch.parts():
        lengths, positions = batch.segments(part.places)
        of_rows = batch.rows[part.places].tolist()
        assert positions.tolist() == [row % length for row in of_rows]
        in_sequence: dict[int, int] = defaultdict(int)
        for row in of_rows:
            in_sequence[row // length] += 1
        assert lengths.tolist() == list(in_sequence.values())


@given(st.integers(1, 4), st.integers(0, 3), st.integers(1, 7), st.floats(0, 1), st.floats(0, 1), seeds)
def test_a_part_of_a_batch_has_what_is_left_of_its_rows_and_experts(
    k: int, sequences: int, length: int, density: float, share: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    batch, _ = (whole := distinct_batch(rng, sequences * length, k, length, density)).only(whole.asked)
    slots = rng.random(batch.asked.shape) < share
    part, places = batch.only(slots)
    left = {
        uid: kept
        for uid, pairs in pairs_of(batch).items()
        if (kept := [(row, slot) for row, slot in pairs if slots[batch.rows.tolist().index(row), slot]])
    }
    assert pairs_of(part) == left
    assert list(part.uids) == list(left) == batch.experts_in(slots)
    np.testing.assert_array_equal(part.rows, batch.rows[places])
    lengths, positions = batch.segments(places)
    assert (part.lengths.tolist(), part.positions.tolist()) == (lengths.tolist(), positions.tolist())
    assert lengths.sum() == len(places)


def test_a_batch_of_two_sequences_by_hand() -> None:
    coordinates = np.array([[[0, 1], [1, 0]]] * 6)
    wanted = np.array([[1, 0], [0, 1], [1, 1], [1, 0], [0, 0], [1, 0]], dtype=bool)
    batch, _ = NodeBatch.of(0, coordinates, wanted, (2, 2), Segments.whole(2, 3)).only(wanted)
    assert batch.uids == (UID(0, (0, 1)), UID(0, (1, 0)))
    assert batch.rows.tolist() == [0, 1, 2, 3, 5]
    assert batch.lengths.tolist() == [3, 2]
    assert batch.positions.tolist() == [0, 1, 2, 0, 2]
    assert batch.experts.tolist() == [[0, -1], [-1, 1], [0, 1], [0, -1], [0, -1]]
    assert batch.ranks[2].tolist() == [0, 1]
    first, second = batch.parts()
    assert batch.segments(first.places)[0].tolist() == [2, 2]
    assert batch.segments(second.places)[1].tolist() == [1, 2]


def test_where_nothing_is_wanted_there_is_nothing_in_a_batch() -> None:
    for rows in (0, 4):
        nothing, segments = np.zeros((rows, 2), np.bool_), Segments.whole(rows // 2, 2)
        batch = NodeBatch.of(0, np.zeros((rows, 2, 2), np.int64), nothing, (3, 3), segments)
        assert list(batch.parts()) == []
        assert len(batch.only(batch.asked)[0].rows) == 0


def test_coordinates_of_slots_that_are_not_wanted_may_be_anything() -> None:
    coordinates = np.array([[[0], [99]], [[-5], [1]]])
    batch = NodeBatch.of(0, coordinates, np.array([[True, False], [False, True]]), (2,), Segments.whole(1, 2))
    assert pairs_of(batch) == {UID(0, (0,)): [(0, 0)], UID(0, (1,)): [(1, 1)]}


# Weights


@given(st.integers(1, 5), st.integers(1, 5), st.floats(0, 1), st.floats(1e-3, 1e3), seeds)
def test_relative_weights_have_the_ratios_of_a_softmax(
    rows: int, k: int, density: float, scale: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    logits = (scale * rng.standard_normal((rows, k))).astype(np.float32)
    asked = rng.random((rows, k)) < density
    found = relative_weights(logits, asked, expert_pb2.CODEC_FP32)
    assert found.dtype == np.float32
    assert not found[~asked].any()
    for row in range(rows):
        if asked[row].any():
            exact = np.exp(logits[row, asked[row]].astype(np.float64) - logits[row, asked[row]].max())
            np.testing.assert_allclose(found[row, asked[row]], np.maximum(exact, LEAST_WEIGHT), rtol=1e-5)
            assert found[row].max() == 1
    rounded = relative_weights(logits, asked, expert_pb2.CODEC_INT4)
    np.testing.assert_allclose(rounded, found, rtol=2**-8)
    sent = decode_scalars(encode_scalars(rounded.ravel(), expert_pb2.CODEC_INT4), expert_pb2.CODEC_INT4)
    np.testing.assert_array_equal(sent.reshape(rounded.shape), rounded)


def test_relative_weights_of_a_gate_that_diverged_are_still_weights() -> None:
    codecs = (expert_pb2.CODEC_FP32, expert_pb2.CODEC_INT4)
    for logits, codec in product(
        ([np.nan, 0], [np.inf, np.inf], [-np.inf, 1], [np.nan, np.nan], [3e38, -3e38]), codecs
    ):
        found = relative_weights(np.array([logits], np.float32), np.ones((1, 2), np.bool_), codec)
        assert found.min() >= 0.99 * LEAST_WEIGHT
        assert found.max() == 1


# Answers


def random_answer(rng: np.random.Generator, batch: NodeBatch) -> AnsweredRows:
    """Answers to some rows of a batch, from some of their experts."""
    answered = batch.asked & (rng.random(batch.asked.shape) < 0.7)
    places = np.flatnonzero(answered.any(axis=1) & (rng.random(len(batch.rows)) < 0.7))
    tensor = rng.standard_normal((len(places), 8), dtype=np.float32)
    return AnsweredRows(batch, places, answered[places], tensor)


@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 5), seeds)
def test_a_row_is_answered_once_for_each_slot_and_each_answer_counts_as_a_whole_or_not_at_all(
    rows: int, k: int, answers: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    scores = [np.zeros((rows, size), np.float32) for size in (2, 3)]
    result = ForwardPass.of(RoutedRows(0, (2, 3), random_rows(rows), scores, k, cut(rows, 4), keep=True))
    batches, counts = list[SentBatch](), list[np.ndarray]()
    found: list[
        tuple[int, list[int], int, int, np.ndarray]
    ] = []  # row, slots, number of the batch, place, tensor
    for number in range(answers):
        batch, _ = (whole := distinct_batch(rng, rows, k, 4, 0.7)).only(whole.asked)
        weights = np.where(batch.asked, rng.uniform(0.1, 1, batch.asked.shape), 0).astype(np.float32)
        sent = SentBatch(batch, NODE, weights, CallProgress())
        batches.append(sent)
        counts.append(np.zeros_like(batch.asked))
        reply = random_answer(rng, batch)
        accepted = result.accept(sent, reply)
        for index, place in enumerate(reply.places.tolist()):
            row, slots = int(batch.rows[place]), np.flatnonzero(reply.answered[index]).tolist()
            earlier = [answer for answer in found if answer[0] == row and set(answer[1]) & set(slots)]
            if earlier and not {slot for answer in earlier for slot in answer[1]} < set(slots):
                continue
            for answer in earlier:
                found = [other for other in found if other is not answer]
                counts[answer[2]][answer[3], answer[1]] = False
            counts[number][place, slots] = True
            found.append((row, slots, number, place, reply.tensor[index]))
        np.testing.assert_array_equal(accepted, counts[number][reply.places])
        assert (sent in result.answers) == counts[number].any()
    for sent, expected in zip(batches, counts, strict=True):
        np.testing.assert_array_equal(sent.counts, expected)
    tensors: dict[tuple[int, int], np.ndarray] = {}  # by row and leading slot
    there: dict[tuple[int, int], tuple[UID, int, float]] = {}  # by row and slot: expert, leading slot, share
    for row, slots, number, place, tensor in found:
        tensors[row, slots[0]] = tensor
        batch, weights = batches[number].batch, batches[number].weights
        for slot in slots:
            share = weights[place, slot] / weights[place, slots].sum()
            there[row, slot] = batch.uids[batch.experts[place, slot]], slots[0], share
    assert set(zip(*(i.tolist() for i in np.nonzero(result.answered)), strict=True)) == set(there)
    for (row, slot), (uid, lead, share) in there.items():
        assert tuple(result.coordinates[row, slot].tolist()) == uid.coordinate
        assert result.leads[row, slot] == lead
        np.testing.assert_allclose(result.shares[row, slot], share, rtol=1e-5)
    for row in range(rows):
        for slot in range(k):
            np.testing.assert_array_equal(result.updates[row, slot], tensors.get((row, slot), np.zeros(8)))


def test_a_batch_that_is_answered_in_parts_is_sent_back_once() -> None:
    batch = distinct_batch(np.random.default_rng(0), 4, 2, 4, 1.0)
    result = ForwardPass.of(
        RoutedRows(
            0,
            (3, 3),
            np.zeros((4, 8), np.float32),
            [np.zeros((4, 3), np.float32)] * 2,
            2,
            cut(4, 4),
            keep=True,
        )
    )
    sent = SentBatch(batch, NODE, np.ones(batch.asked.shape, np.float32), CallProgress())
    for place in range(4):
        part = np.array([place])
        result.accept(sent, AnsweredRows(batch, part, batch.asked[part], np.zeros((1, 8), np.float32)))
    assert result.answers == [sent]


@given(st.integers(1, 8), st.integers(1, 4), seeds)
def test_a_backward_call_in_full_asks_for_what_counts_and_lets_experts_see_the_rows_that_they_saw(
    rows: int, k: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    batch, _ = (whole := distinct_batch(rng, rows, k, 4, 0.7)).only(whole.asked)
    counts = np.zeros_like(batch.asked)
    reply = random_answer(rng, batch)
    counts[reply.places] = reply.answered
    counted = np.asarray(counts.any(axis=1))
    gradients = np.where(counted[:, None], random_rows(len(batch.rows)), np.float32(0))
    weights = np.where(batch.asked, np.float32(1), np.float32(0))
    call = NodeCall(
        NODE, "backward", batch, 1.0, random_rows(len(batch.rows), seed=1), weights, gradients,
        kept=b"id", counts=counts,
    )  # fmt: skip
    full = call.in_full()
    assert full.kept is None
    assert full.counts is not None
    assert full.gradients is not None
    before, after = pairs_of(batch), pairs_of(full.batch)
    counting = {uid for uid in batch.uids if uid in batch.experts_in(counts)}
    assert set(after) == counting
    place = {int(row): number for number, row in enumerate(batch.rows)}
    for uid, pairs in after.items():
        assert pairs == [
            (row, slot) for row, slot in before[uid] if counts[place[row], slot] or not counted[place[row]]
        ]
    there = [place[int(row)] for row in full.batch.rows]
    np.testing.assert_array_equal(full.inputs, call.inputs[there])
    np.testing.assert_array_equal(full.gradients, gradients[there])
    np.testing.assert_array_equal(full.counts, counts[there])
    np.testing.assert_array_equal(full.weights > 0, full.batch.asked)


def test_shares_are_those_of_the_experts_that_answered() -> None:
    weights = np.array([[1, 3, 4], [1, 3, 4]], np.float32)
    found = shares(weights, np.array([[True, True, False], [False, False, False]]))
    assert found.tolist() == [[0.25, 0.75, 0], [0, 0, 0]]


# Choosing again


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


def test_a_batch_after_a_refill_holds_only_the_filled_slots() -> None:
    coordinates = np.array([[[0], [1]], [[0], [1]]])
    fresh = Selection(np.array([[[2]], [[1]]]), np.zeros((2, 1), np.float32), np.array([[True], [True]]))
    new, filled = refill(coordinates, taken := np.array([[True, False], [False, True]]), ~taken, fresh)
    assert pairs_of(NodeBatch.of(0, new, filled, (3,), Segments.whole(1, 2))) == {UID(0, (2,)): [(0, 1)]}


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
