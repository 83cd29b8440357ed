"""The gate's scores, logits and weights, compared with their formulas (the paper, section 3.1)."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peer.codec import Integers
from trainer_client.routers import Gate, mixture_weights

GRID = (3, 4)


def every_coordinate(rows: int) -> Integers:
    return np.array([list(product(range(GRID[0]), range(GRID[1])))] * rows)


@pytest.fixture
def gate() -> Gate:
    torch.default_generator.manual_seed(0)
    return Gate(width=8, sizes=GRID)


def test_there_is_one_score_for_each_coordinate_of_each_dimension(gate: Gate) -> None:
    x_RD = torch.randn(5, 8)
    scores = gate(x_RD)
    assert [tuple(table.shape) for table in scores] == [(5, 3), (5, 4)]
    torch.testing.assert_close(torch.cat(scores, dim=1), x_RD @ gate.linear.weight.T + gate.linear.bias)


def test_a_narrow_gate_reads_the_first_columns() -> None:
    gate, x_RD = Gate(width=5, sizes=GRID, has_noise=True), torch.randn(5, 8, requires_grad=True)
    scores = torch.cat(gate(x_RD), dim=1)
    torch.testing.assert_close(scores, x_RD[:, :5] @ gate.linear.weight.T + gate.linear.bias)
    torch.autograd.backward([scores.sum(), *(spread.sum() for spread in gate.spreads(x_RD))])
    assert x_RD.grad is not None
    assert x_RD.grad[:, :5].all()
    assert not x_RD.grad[:, 5:].any()


def test_a_logit_is_the_sum_of_its_coordinates_scores(gate: Gate) -> None:
    scores = gate(torch.randn(5, 8))
    logits = gate.logits(scores, every_coordinate(5), GRID)
    assert logits.shape == (5, 12)
    torch.testing.assert_close(logits, (scores[0][:, :, None] + scores[1][:, None, :]).flatten(1))


def test_without_product_keys_a_logit_is_the_experts_own_score() -> None:
    (scores,) = Gate(width=8, sizes=(12,))(torch.randn(5, 8))
    torch.testing.assert_close(Gate.logits((scores,), every_coordinate(5), GRID), scores)


def test_the_gradient_reaches_only_the_scores_that_were_chosen(gate: Gate) -> None:
    scores = tuple(table.detach().requires_grad_() for table in gate(torch.randn(2, 8)))
    coordinates = np.array([[[0, 1], [2, 1]], [[1, 0], [1, 3]]])
    torch.autograd.backward(gate.logits(scores, coordinates, GRID).sum())
    assert scores[0].grad is not None
    assert scores[1].grad is not None
    assert scores[0].grad.tolist() == [[1, 0, 1], [0, 2, 0]]
    assert scores[1].grad.tolist() == [[0, 2, 0, 0], [1, 0, 0, 1]]


def test_scores_are_float32_whatever_the_input_and_autocast(gate: Gate) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = gate(torch.randn(2, 8).bfloat16())
    assert {table.dtype for table in scores} == {torch.float32}


def test_late_expert_is_left_out_of_the_softmax() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    weights = mixture_weights(logits, torch.tensor([[True, False, True, False]]))
    whole = math.exp(1) + math.exp(3)
    torch.testing.assert_close(weights, torch.tensor([[math.exp(1) / whole, 0, math.exp(3) / whole, 0]]))


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.floats(0.1, 100))
def test_weights_are_the_softmax_over_those_that_answered(seed: int, experts: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(8, experts, generator=generator)
    answered = torch.rand(8, experts, generator=generator) < 0.5
    weights = mixture_weights(logits, answered)
    for row in range(8):
        expected = torch.zeros(experts)
        if answered[row].any():
            expected[answered[row]] = logits[row, answered[row]].softmax(dim=0)
        torch.testing.assert_close(weights[row], expected)


def test_row_without_answers_weighs_nothing_and_gives_no_gradient() -> None:
    logits = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights = mixture_weights(logits, torch.tensor([[False] * 3, [True, True, False]]))
    torch.autograd.backward(weights.square().sum())
    assert weights[0].tolist() == [0, 0, 0]
    assert logits.grad is not None
    assert logits.grad[0].tolist() == [0, 0, 0]
    assert logits.grad[1, 2] == 0
    assert logits.grad[1, :2].abs().min() > 0


@pytest.mark.parametrize("lost", [math.nan, math.inf, -math.inf])
def test_logit_of_an_unanswered_slot_can_hold_anything(lost: float) -> None:
    logits = torch.tensor([[lost, 0.0], [lost, lost]], requires_grad=True)
    weights = mixture_weights(logits, torch.tensor([[False, True], [False, False]]))
    torch.autograd.backward(weights.square().sum())
    assert weights.tolist() == [[0, 1], [0, 0]]
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_noise_starts_at_nothing() -> None:
    gate = Gate(8, (3, 4), has_noise=True)
    assert not any(spread.any() for spread in gate.spreads(torch.randn(5, 8)))
