"""Steps of enough rows: gradients accumulate over calls, and none is lost or counted twice."""

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from expert_samples import (
    AN_UID,
    HIDDEN,
    LENGTHS,
    POSITIONS,
    ROWS,
    backward,
    gradients_that_overflow_when_summed,
    make_manifest,
    parameters_of,
    random_rows,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils import get_total_norm

from expert_server.experts.accumulation import MOST_APART
from expert_server.experts.expert import Expert, expert_bytes
from expert_server.experts.format import ACCUMULATED, ACCUMULATED_ROWS, ACCUMULATED_SIZES, State, StateForm
from expert_server.experts.graphs import ForwardGraph, Rows
from expert_server.experts.guard import CHECK_EVERY_UPDATES, StepOutcome
from peer.errors import ExpertError, StateError

MANY = 10**6


def make_expert(
    rows_per_update: int = MANY, name: Literal["adamw", "adam", "sgd"] = "adamw", warmup_updates: int = 0
) -> Expert:
    return Expert(
        AN_UID, make_manifest(rows_per_update=rows_per_update, name=name, warmup_updates=warmup_updates)
    )


def call(seed: int, scale: float = 1.0, graph: ForwardGraph | None = None) -> Rows:
    return Rows(random_rows(seed), LENGTHS, POSITIONS, scale * random_rows(seed + 100), graph)


def joined(parts: list[Rows]) -> Rows:
    return Rows(
        torch.cat([part.inputs for part in parts]),
        torch.cat([part.lengths for part in parts]),
        torch.cat([part.positions for part in parts]),
        torch.cat([part.gradients for part in parts if part.gradients is not None]),
    )


def change(expert: Expert, parts: list[Rows]) -> Tensor:
    """How these calls change the expert's parameters, in one step or several."""
    before = torch.cat([each.flatten() for each in parameters_of(expert)])
    for part in parts:
        expert.backward([part])
    expert.end_accumulation()
    expert.settle()
    return torch.cat([each.flatten() for each in parameters_of(expert)]) - before


@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.tuples(st.floats(0.5, 4), st.booleans()), min_size=1, max_size=5),
    st.integers(0, 1000),
)
def test_calls_that_accumulate_take_the_step_of_one_call_with_all_rows(
    calls: list[tuple[float, bool]], seed: int
) -> None:
    split = make_expert(ROWS * len(calls), "sgd")
    whole = make_expert(1, "sgd")
    parts = [call(seed + number, scale) for number, (scale, _) in enumerate(calls)]
    gradients = []
    for part, (_, has_graph) in zip(parts, calls, strict=True):
        assert split.update_count == 0
        graph = split.forward_with_graph(part)[1] if has_graph else None
        rows = Rows(part.inputs, part.lengths, part.positions, part.gradients, graph)
        gradients += split.backward([rows])[0]
    assert (split.update_count, split.accumulated_rows) == (1, 0)
    (expected,), _ = whole.backward([joined(parts)])
    torch.testing.assert_close(torch.cat(gradients), expected)
    torch.testing.assert_close(parameters_of(split), parameters_of(whole))


def test_fewer_rows_than_a_step_needs_change_nothing_but_are_answered() -> None:
    expert, plain = make_expert(ROWS + 1), make_expert(1)
    before = parameters_of(expert)
    _, graph = expert.forward_with_graph(call(7))
    (gradient,), outcome = expert.backward([call(0)], may_defer=True)
    torch.testing.assert_close(gradient, plain.backward([call(0)])[0][0])
    assert (outcome, expert.update_count, expert.step_is_due) == (StepOutcome.NONE, 0, False)
    assert expert.accumulated_rows == ROWS
    torch.testing.assert_close(parameters_of(expert), before, atol=0, rtol=0)
    assert expert.is_good(graph), "no step has overwritten the parameters it was made with"
    assert all(parameter.grad is None for parameter in expert.block.parameters())
    assert expert.backward([call(1)])[1] is StepOutcome.TAKEN
    assert (expert.update_count, expert.accumulated_rows) == (1, 0)


def test_a_batch_of_enough_rows_takes_the_step_that_it_always_took() -> None:
    expert, plain = make_expert(ROWS), make_expert(1)
    for seed in range(3):
        expert.backward([call(seed)])
        plain.backward([call(seed)])
    torch.testing.assert_close(parameters_of(expert), parameters_of(plain), atol=0, rtol=0)


def test_the_step_size_follows_steps_and_not_calls() -> None:
    expert = make_expert(2 * ROWS, warmup_updates=4)
    sizes = []
    for seed in range(8):
        expert.backward([call(seed)])
        sizes.append(expert.optimizer.learning_rate)
    assert sizes[1::2] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])


def test_what_accumulated_can_take_its_step_early() -> None:
    expert, plain = make_expert(), make_expert(1)
    assert expert.end_accumulation() is StepOutcome.NONE
    for replica in (expert, plain):
        replica.backward([call(0)])
    assert expert.end_accumulation() is StepOutcome.TAKEN
    assert expert.step_is_due
    expert.settle()
    torch.testing.assert_close(parameters_of(expert), parameters_of(plain), atol=0, rtol=0)


def spoil_parameters(expert: Expert) -> None:
    rows = Rows(random_rows(5), LENGTHS, POSITIONS, gradients_that_overflow_when_summed())
    assert expert.backward([rows])[1] is StepOutcome.SKIPPED


def spoil_inputs(expert: Expert) -> None:
    with pytest.raises(ExpertError):
        backward(expert, random_rows(5), torch.full((ROWS, HIDDEN), 3e38))


@pytest.mark.parametrize("spoil", [spoil_parameters, spoil_inputs])
def test_a_call_that_overflows_takes_nothing_from_what_others_accumulated(
    spoil: Callable[[Expert], None],
) -> None:
    expert, like = make_expert(2 * ROWS), make_expert(2 * ROWS)
    expert.backward([call(0)])
    spoil(expert)
    assert (expert.update_count, expert.accumulated_rows) == (0, ROWS)
    expert.backward([call(1)])
    for seed in (0, 1):
        like.backward([call(seed)])
    assert expert.update_count == 1
    torch.testing.assert_close(parameters_of(expert), parameters_of(like), atol=0, rtol=0)


def test_a_sum_that_overflows_is_dropped_and_its_step_skipped() -> None:
    expert = make_expert(2 * ROWS)
    before = parameters_of(expert)
    # A gradient whose norm has a square that float32 can hold, and one that is four times as large, which it cannot
    # hold.
    gradients = random_rows(100) * 1e19 / gradient_norm(call(0))
    rows = Rows(random_rows(0), LENGTHS, POSITIONS, gradients)
    assert expert.backward([rows])[1] is StepOutcome.NONE
    assert expert.backward([rows])[1] is StepOutcome.SKIPPED
    assert (expert.update_count, expert.accumulated_rows) == (0, 0)
    torch.testing.assert_close(parameters_of(expert), before, atol=0, rtol=0)


def gradient_norm(part: Rows) -> float:
    assert part.gradients is not None
    block = make_expert().block
    block(part.inputs, part.lengths, part.positions).backward(part.gradients)
    return float(get_total_norm([p.grad for p in block.parameters() if p.grad is not None]))


def test_gradients_of_another_size_do_not_share_a_step() -> None:
    honest, huge = call(0, 1e-3), call(1, 1e6)
    expert = make_expert()
    together = change(expert, [honest, huge])
    assert expert.update_count == 2
    alone, drowned = change(make_expert(), [honest]), change(make_expert(), [huge])
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(together - drowned, alone, dim=0) > 0.7


@settings(deadline=None, max_examples=25)
@given(st.lists(st.one_of(st.floats(-6, 6).map(lambda power: 10.0**power), st.just(0.0)), max_size=8))
def test_gradients_that_share_a_step_are_of_one_size(scales: list[float]) -> None:
    expert = make_expert()
    sharing: list[float] = []
    updates = 0
    for scale in scales:
        expert.backward([Rows(random_rows(0), LENGTHS, POSITIONS, scale * random_rows(1))])
        if expert.update_count > updates:
            sharing.clear()
        updates = expert.update_count
        sharing += [scale] if scale else []
        if sharing:
            assert max(sharing) <= 1.001 * MOST_APART * min(sharing), "however slowly they grow"


def test_parameters_that_turn_bad_lose_what_was_accumulated_with_them() -> None:
    expert = make_expert(2 * ROWS)
    for seed in range(2 * (CHECK_EVERY_UPDATES - 1)):
        expert.backward([call(seed)])
    expert.backward([call(50)])
    with torch.no_grad():
        for parameter in expert.block.parameters():
            parameter.mul_(1e3)
    with pytest.raises(ExpertError):
        expert.forward(Rows(torch.full((ROWS, HIDDEN), 3e38), LENGTHS, POSITIONS))
    assert expert.guard.rollbacks == 1
    assert expert.accumulated_rows == 0


# State


def trained(calls: int) -> Expert:
    expert = make_expert(5 * ROWS // 2)
    for seed in range(calls):
        expert.backward([call(seed)])
    return expert


@pytest.mark.parametrize("calls", [0, 1, 2, 3, 4])
def test_an_imported_expert_goes_on_with_what_was_accumulated(calls: int) -> None:
    stayed, restored = trained(calls), trained(1)
    restored.import_state(trained(calls).export_state(), stayed.update_count)
    assert restored.accumulated_rows == stayed.accumulated_rows
    for expert in (stayed, restored):
        for seed in range(10, 15):
            expert.backward([call(seed)])
    torch.testing.assert_close(restored.export_state(), stayed.export_state(), atol=0, rtol=0)


def test_a_state_without_accumulated_gradients_replaces_those_that_were_there() -> None:
    expert, other = trained(1), trained(3)
    assert (expert.accumulated_rows, other.accumulated_rows) == (ROWS, 0)
    expert.import_state(other.export_state(), other.update_count)
    assert expert.accumulated_rows == 0


GRADIENT = ACCUMULATED + "gradient.attention_input.weight"
WRONG: dict[str, tuple[Callable[[State], State], str]] = {
    "no rows": (lambda s: {n: t for n, t in s.items() if n != ACCUMULATED_ROWS}, "lacks"),
    "no sizes": (lambda s: {n: t for n, t in s.items() if n != ACCUMULATED_SIZES}, "lacks"),
    "too many rows": (lambda s: s | {ACCUMULATED_ROWS: torch.tensor(5 * ROWS // 2)}, "at most 29"),
    "fewer than none": (lambda s: s | {ACCUMULATED_ROWS: torch.tensor(-1)}, "at most 29"),
    "rows of another type": (lambda s: s | {ACCUMULATED_ROWS: torch.tensor(1.0)}, "float32"),
    "negative size": (lambda s: s | {ACCUMULATED_SIZES: -s[ACCUMULATED_SIZES]}, "negative"),
    "sizes in the wrong order": (
        lambda s: s | {ACCUMULATED_SIZES: s[ACCUMULATED_SIZES] * torch.tensor([2.0, 1.0])},
        "can't have sizes",
    ),
    "no least size": (
        lambda s: s | {ACCUMULATED_SIZES: s[ACCUMULATED_SIZES] * torch.tensor([0.0, 1.0])},
        "can't have sizes",
    ),
    "no gradients": (
        lambda s: {n: t for n, t in s.items() if not n.startswith(ACCUMULATED + "gradient")},
        "lacks the accumulated gradients",
    ),
    "shape": (lambda s: s | {GRADIENT: s[GRADIENT][:1]}, r"is \(\(1, 16\)"),
    "NaN": (lambda s: s | {GRADIENT: s[GRADIENT] * torch.nan}, "not finite"),
    "another parameter": (lambda s: s | {ACCUMULATED + "gradient.more": torch.zeros(1)}, "unknown"),
}


@pytest.mark.parametrize(("spoil", "message"), WRONG.values(), ids=WRONG)
def test_accumulated_gradients_that_cannot_be_are_refused(
    spoil: Callable[[State], State], message: str
) -> None:
    expert = trained(2)
    before = expert.export_state()
    with pytest.raises(StateError, match=message):
        expert.import_state(spoil(trained(1).export_state()), 0)
    torch.testing.assert_close(expert.export_state(), before, atol=0, rtol=0)


@pytest.mark.parametrize(("gradient", "size"), [(1e30, 0.0), (1e30, 1e-3), (3e38, 1.0), (1e-30, 0.0)])
def test_a_stranger_accumulates_no_gradients_that_drown_those_of_others(gradient: float, size: float) -> None:
    state = {
        name: torch.full_like(tensor, gradient) if name.startswith(ACCUMULATED + "gradient") else tensor
        for name, tensor in trained(1).export_state().items()
    }
    state[ACCUMULATED_SIZES] = torch.tensor([size, size], dtype=torch.float64)
    expert = trained(2)
    before = expert.export_state()
    with pytest.raises(StateError, match="far larger than"):
        expert.import_state(state, 0, "QmStranger")
    torch.testing.assert_close(expert.export_state(), before, atol=0, rtol=0)


def test_where_each_batch_has_its_step_accumulated_gradients_are_refused() -> None:
    with pytest.raises(StateError, match="unknown 'accumulated"):
        make_expert(1).import_state(trained(1).export_state(), 0)


def test_the_size_counts_accumulated_gradients() -> None:
    weights = sum(parameter.nbytes for parameter in make_expert().parameters)
    plain, accumulates = (make_manifest(rows_per_update=rows) for rows in (1, MANY))
    assert expert_bytes(accumulates) == expert_bytes(plain) + weights
    assert StateForm.of(accumulates).max_bytes >= StateForm.of(plain).max_bytes + weights
