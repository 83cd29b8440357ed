"""Answers to rows, by the formulas of proto/expert.proto, when any experts fail or are late."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dht.uid import UID
from expert_server.serving import answers as answers_module
from expert_server.serving.answers import AnswerAssembler, RowAnswers
from expert_server.serving.assignment import Assignment, products, sum_by_row

WIDTH = 4
Pair = tuple[int, int]
"""An expert and a row."""


def make_assignment(
    rows_of: list[list[int]], weights: list[float] | None = None, lengths: list[int] | None = None
) -> Assignment:
    rows = np.concatenate([np.array(rows, np.int64) for rows in rows_of])
    count = int(rows.max()) + 1
    return Assignment(
        [UID(0, (expert,)) for expert in range(len(rows_of))],
        np.array(lengths or [count]),
        np.arange(count),
        np.cumsum([len(rows) for rows in rows_of]),
        rows,
        np.ones(len(rows), np.float32) if weights is None else np.array(weights, np.float32),
    )


@st.composite
def assignments(draw: st.DrawFn) -> Assignment:
    """Up to six experts. Each row is for between one and all of them."""
    experts = draw(st.integers(1, 6))
    experts_of_row = draw(st.lists(st.sets(st.integers(0, experts - 1), min_size=1), min_size=1, max_size=12))
    rows_of = [[row for row, own in enumerate(experts_of_row) if e in own] for e in range(experts)]
    rows_of = [rows for rows in rows_of if rows]
    magnitude = st.one_of(st.floats(1e-6, 1.0), st.sampled_from([1e38, 1e-38, 1e-45]))
    pairs = sum(map(len, rows_of))
    weights = draw(st.lists(magnitude, min_size=pairs, max_size=pairs))
    cuts = draw(st.sets(st.integers(1, max(1, len(experts_of_row) - 1))))
    edges = [0, *sorted(cut for cut in cuts if cut < len(experts_of_row)), len(experts_of_row)]
    return make_assignment(rows_of, weights, np.diff(edges).tolist())


def tensors_of(assignment: Assignment, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    counts = np.diff(assignment.ends, prepend=0).tolist()
    return [torch.randn(count, WIDTH, generator=generator) for count in counts]


def place_of(assignment: Assignment, expert: int, row: int) -> int:
    rows: list[int] = assignment.rows[assignment.pairs_of(expert)].tolist()
    return rows.index(row)


def answer_of(
    assignment: Assignment, tensors: list[Tensor], row: int, own: list[int], weighs: bool
) -> Tensor:
    """The formula for one row, with the answers of the experts `own`."""
    weights = [
        float(assignment.weights[assignment.pairs_of(e)][place_of(assignment, e, row)]) if weighs else 1.0
        for e in own
    ]
    parts = [u * tensors[e][place_of(assignment, e, row)].double() for u, e in zip(weights, own, strict=True)]
    total = torch.stack(parts).sum(0)
    return (total / sum(weights) if weighs else total).float()


@settings(max_examples=50)
@given(assignments(), st.data(), st.booleans(), st.integers(0, 2**31))
def test_each_row_is_answered_once_with_what_the_formula_says(
    assignment: Assignment, data: st.DataObject, weighs: bool, seed: int
) -> None:
    """Experts finish in any order or together, some fail, and the flush comes at any time."""
    count, experts = len(assignment), len(assignment.uids)
    tensors = tensors_of(assignment, seed)
    order = data.draw(st.permutations(range(experts)))
    fails = data.draw(st.sets(st.integers(0, experts - 1)))
    is_expected = np.array(
        data.draw(st.lists(st.booleans(), min_size=len(assignment.rows), max_size=len(assignment.rows)))
    )
    expected = data.draw(st.sampled_from([None, is_expected]))
    cuts = sorted(data.draw(st.sets(st.integers(1, experts))) | {experts})
    flush_at = data.draw(st.integers(0, len(cuts)))
    assembler = AnswerAssembler(assignment, WIDTH, weighs=weighs, expected=expected)
    own_of = {
        row: [
            e
            for e in range(experts)
            if row in assignment.rows[assignment.pairs_of(e)]
            and (expected is None or expected[assignment.pairs_of(e)][place_of(assignment, e, row)])
        ]
        for row in range(count)
    }
    there, over = set[int](), set[int]()
    answered: dict[int, list[int]] = {}
    begin = 0
    for turn, end in enumerate([*cuts, experts]):
        found: list[RowAnswers] = []
        if turn < len(cuts):
            outcomes = [(e, None if e in fails else tensors[e]) for e in order[begin:end]]
            over |= set(order[begin:end])
            there |= {e for e in order[begin:end] if e not in fails}
            begin = end
            found += assembler.take(outcomes)
        if turn == flush_at:
            found += assembler.flush()
        for each in found:
            places = np.split(each.pairs, np.cumsum(each.counts)[:-1])
            for row, pairs, tensor in zip(each.rows.tolist(), places, each.tensor, strict=True):
                assert row not in answered
                answered[row] = own = [int(np.searchsorted(assignment.ends, pair, "right")) for pair in pairs]
                assert own == [e for e in own_of[row] if e in there]
                assert set(own_of[row]) <= over or turn >= flush_at
                expected_tensor = answer_of(assignment, tensors, row, own, weighs)
                torch.testing.assert_close(tensor, expected_tensor, rtol=1e-5, atol=1e-6)
        for row, own in own_of.items():
            is_ready = set(own) <= over or turn >= flush_at
            assert (row in answered) == bool(is_ready and set(own) & there) or row in answered
    assert answered.keys() == {row for row, own in own_of.items() if set(own) - fails}
    for e in range(experts):
        assert not assembler.is_needed(e)


@given(assignments(), st.integers(0, 2**31))
def test_an_experts_segments_are_those_of_the_call_of_its_rows_alone(
    assignment: Assignment, seed: int
) -> None:
    owners = np.repeat(np.arange(len(assignment.lengths)), assignment.lengths)
    for expert, lengths in enumerate(assignment.segments()):
        own = owners[assignment.rows[assignment.pairs_of(expert)]].tolist()
        assert lengths.tolist() == [own.count(segment) for segment in sorted(set(own))]


@settings(max_examples=50)
@given(assignments(), st.data())
def test_a_message_says_which_experts_are_in_which_rows(assignment: Assignment, data: st.DataObject) -> None:
    is_in = np.array(
        data.draw(st.lists(st.booleans(), min_size=len(assignment.rows), max_size=len(assignment.rows)))
    )
    rows = np.array([r for r in range(len(assignment)) if is_in[assignment.rows == r].any()], np.int64)
    if not len(rows):
        return
    pairs, places, counts = assignment.of_rows(rows, is_in)
    message = RowAnswers(rows, pairs, places, counts, torch.empty(0)).message(assignment, 7, b"1.5!")
    all_experts = [
        sorted(pair for pair, row in enumerate(assignment.rows) if row == r) for r in range(len(assignment))
    ]
    said = list(message.rows) or list(range(len(assignment)))
    masks = list(message.masks) or [2 ** len(all_experts[row]) - 1 for row in said]
    assert said == rows.tolist()
    found = [
        all_experts[row][bit]
        for row, mask in zip(said, masks, strict=True)
        for bit in range(64)
        if mask >> bit & 1
    ]
    assert found == pairs.tolist()
    assert all(is_in[found])
    assert (message.payload_bytes, message.products) == (7, b"1.5!")


def test_a_row_may_have_64_experts() -> None:
    assignment = make_assignment([[0]] * 64)
    assembler = AnswerAssembler(assignment, WIDTH, weighs=True)
    outcomes = [(expert, torch.full((1, WIDTH), float(expert))) for expert in range(64)]
    (found,) = assembler.take([*outcomes[:63], (63, None)])
    assert found.message(assignment, 0).masks == [2**63 - 1]
    assembler = AnswerAssembler(assignment, WIDTH, weighs=True)
    (found,) = assembler.take([(0, None), *outcomes[1:]])
    assert found.message(assignment, 0).masks == [2**64 - 2]


def test_many_rows_come_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers_module, "_MOST_PAIRS", 6)
    assignment = make_assignment([list(range(10)), list(range(10))])
    assembler = AnswerAssembler(assignment, WIDTH, weighs=True)
    tensors = [torch.randn(10, WIDTH) for _ in range(2)]
    blocks = list(assembler.take(list(enumerate(tensors))))
    assert [block.rows.tolist() for block in blocks] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    torch.testing.assert_close(torch.cat([block.tensor for block in blocks]), (tensors[0] + tensors[1]) / 2)


def test_sums_and_products_that_overflow_are_clipped() -> None:
    largest = torch.finfo(torch.float32).max
    assignment = make_assignment([[0], [0]])
    tensor = torch.full((2, WIDTH), largest)
    pairs, _, counts = assignment.of_rows(np.array([0]), np.ones(2, np.bool_))
    assert (sum_by_row(tensor, pairs, counts) == largest).all()
    numbers = np.array([[largest, largest], [largest, -largest], [1.0, 2.0]], np.float32)
    updates = np.array([[3.0, 4.0], [largest, largest], [largest, largest]], np.float32)
    found = products(numbers, np.arange(3), updates, np.array([1, 2, 0]))
    assert np.isfinite(found).all()
    assert (found[0], found[2]) == (largest, 11.0)


def test_products_do_not_depend_on_how_many_are_computed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    gradients, updates = (rng.standard_normal((9, WIDTH), dtype=np.float32) for _ in range(2))
    rows, pairs = rng.integers(0, 9, 20), rng.integers(0, 9, 20)
    expected = (gradients[rows].astype(np.float64) * updates[pairs]).sum(1)
    for numbers in (1, 3 * WIDTH, 2**16):
        monkeypatch.setattr("expert_server.serving.assignment._BLOCK_NUMBERS", numbers)
        np.testing.assert_allclose(products(gradients, rows, updates, pairs), expected, rtol=1e-5, atol=1e-6)


def test_other_threads_keep_torchs_threads() -> None:
    before = torch.get_num_threads()
    sum_by_row(torch.ones(1, WIDTH), np.array([0]), np.array([1]))
    assert torch.get_num_threads() == before
