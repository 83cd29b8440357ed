"""Graphs of forward passes that outlive optimizer steps: their gradients are for the parameters of the forward pass."""

import copy
import gc
from typing import Any
from weakref import ref

import pytest
import torch
from expert_samples import (
    AN_UID,
    LENGTHS,
    POSITIONS,
    ROWS,
    backward,
    make_manifest,
    parameters_of,
    random_rows,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from expert_server.experts import expert as expert_module
from expert_server.experts import graphs as graphs_module
from expert_server.experts.expert import Expert
from expert_server.experts.graphs import ForwardGraph, Rows
from expert_server.experts.guard import StepOutcome


@pytest.fixture(autouse=True)
def every_graph_is_worth_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_module, "_ROWS_WORTH_A_COPY", ROWS)


def forward(expert: Expert, seed: int) -> ForwardGraph:
    return expert.forward_with_graph(Rows(random_rows(seed), LENGTHS, POSITIONS))[1]


def part(seed: int, graph: ForwardGraph | None) -> Rows:
    return Rows(random_rows(seed), LENGTHS, POSITIONS, random_rows(seed + 100), graph)


class Reference:
    """Steps an expert with gradients that are computed on whole copies of its block."""

    def __init__(self) -> None:
        self.expert = Expert(AN_UID, make_manifest())

    def gradients(self, seed: int, parameters: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        block = copy.deepcopy(self.expert.block)
        with torch.no_grad():
            for parameter, value in zip(block.parameters(), parameters, strict=True):
                parameter.copy_(value)
        x = random_rows(seed).requires_grad_()
        wanted = [x, *block.parameters()]
        of_inputs, *others = torch.autograd.grad(
            block(x, LENGTHS, POSITIONS) - x, wanted, random_rows(seed + 100)
        )
        return of_inputs, others

    def backward(self, made: list[tuple[int, list[Tensor]]]) -> list[Tensor]:
        found = [self.gradients(seed, parameters) for seed, parameters in made]
        for parameter, *gradients in zip(
            self.expert.block.parameters(), *(own for _, own in found), strict=True
        ):
            parameter.grad = torch.stack(gradients).sum(0)
        self.expert._prepare_step({})
        self.expert.settle()
        return [of_inputs for of_inputs, _ in found]


def test_a_graph_gives_the_gradients_of_the_parameters_that_it_was_made_with() -> None:
    expert, reference = Expert(AN_UID, make_manifest()), Reference()
    graph, before = forward(expert, 0), parameters_of(expert)
    for seed in (1, 2):
        expert.backward([part(seed, None)])
        reference.backward([(seed, parameters_of(reference.expert))])
    assert expert.is_good(graph)
    (expected,) = reference.backward([(0, before)])
    (gradient,), _ = expert.backward([part(0, graph)])
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(parameters_of(expert), parameters_of(reference.expert))


def test_few_rows_are_computed_again_with_the_parameters_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_module, "_ROWS_WORTH_A_COPY", ROWS + 1)
    expert, plain = Expert(AN_UID, make_manifest()), Expert(AN_UID, make_manifest())
    graph = forward(expert, 0)
    for one in (expert, plain):
        backward(one, random_rows(2), random_rows(3))
    assert not expert.is_good(graph)
    torch.testing.assert_close(
        backward(expert, random_rows(0), random_rows(1), graph),
        backward(plain, random_rows(0), random_rows(1)),
    )


def test_a_graph_that_was_used_or_given_up_costs_the_next_step_no_copy() -> None:
    expert = Expert(AN_UID, make_manifest())
    where = [parameter.data_ptr() for parameter in expert.block.parameters()]
    given_up, used = forward(expert, 0), forward(expert, 1)
    del given_up
    expert.backward([part(1, used)])
    assert [parameter.data_ptr() for parameter in expert.block.parameters()] == where
    assert used.version.bytes == 0


def test_older_parameters_are_counted_and_gone_with_their_last_graph() -> None:
    expert = Expert(AN_UID, make_manifest())
    first, second = forward(expert, 0), forward(expert, 1)
    expert.backward([part(2, None)])
    weights = sum(parameter.nbytes for parameter in expert.block.parameters())
    assert first.version is second.version
    assert first.version.bytes == weights
    newer = forward(expert, 3)
    assert newer.version is not first.version
    gone = ref(first.version)
    for seed, graph in ((0, first), (1, second)):
        expert.backward([part(seed, graph)])
    gc.disable()  # they are not to wait for it
    try:
        del first, second, graph
        assert gone() is None
    finally:
        gc.enable()


class LittleMemory(TorchDispatchMode):
    """A device with room for one more copy."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch gives it no types
        self._copies = 0

    def __torch_dispatch__(self, function: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        if function is torch.ops.aten.clone.default:
            self._copies += 1
            if self._copies > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return function(*given, **(named or {}))


def test_parameters_that_only_fit_in_part_are_not_copied() -> None:
    expert, plain = Expert(AN_UID, make_manifest()), Expert(AN_UID, make_manifest())
    graph = forward(expert, 0)
    _, outcome = expert.backward([part(1, None)], may_defer=True)
    assert outcome is StepOutcome.TAKEN
    with LittleMemory(), pytest.raises(torch.OutOfMemoryError):
        expert.settle()
    torch.testing.assert_close(parameters_of(expert), parameters_of(plain), atol=0, rtol=0)
    for one in (expert, plain):
        one.backward([part(2, None)])
    torch.testing.assert_close(parameters_of(expert), parameters_of(plain))
    (gradient,), _ = expert.backward([part(0, graph)])
    (expected,), _ = Expert(AN_UID, make_manifest()).backward([part(0, None)])
    torch.testing.assert_close(gradient, expected)


def test_a_backward_pass_that_fails_leaves_no_gradients_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    expert, plain = Expert(AN_UID, make_manifest()), Expert(AN_UID, make_manifest())
    broken, whole = forward(expert, 0), forward(expert, 1)

    run_backward = graphs_module.run_backward

    def run_and_fail(updates: Tensor, gradients: Tensor) -> None:
        run_backward(updates, gradients)
        raise RuntimeError("on purpose")

    monkeypatch.setattr(expert_module, "run_backward", run_and_fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        expert.backward([part(0, broken)])
    monkeypatch.setattr(expert_module, "run_backward", run_backward)
    expert.backward([part(1, whole)])
    plain.backward([part(1, None)])
    torch.testing.assert_close(parameters_of(expert), parameters_of(plain))


def test_no_graph_outlives_a_state_that_came_in() -> None:
    expert, other = Expert(AN_UID, make_manifest()), Expert(AN_UID, make_manifest())
    old, current = forward(expert, 0), None
    expert.backward([part(1, None)])
    current = forward(expert, 2)
    backward(other, random_rows(5), random_rows(6))
    expert.import_state(other.export_state(), 7)
    assert not expert.is_good(old)
    assert not expert.is_good(current)
    where = [parameter.data_ptr() for parameter in expert.block.parameters()]
    expert.backward([part(3, None)])
    assert [parameter.data_ptr() for parameter in expert.block.parameters()] == where


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("forward"), st.integers(0, 20)),
        st.tuples(st.just("backward"), st.sets(st.integers(0, 20), min_size=1, max_size=3)),
        st.tuples(st.just("drop"), st.integers(0, 20)),
    ),
    max_size=12,
)


@given(ACTIONS, st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_order_of_passes_gives_what_whole_copies_give(
    actions: list[tuple[str, int | set[int]]], may_defer: bool
) -> None:
    expert, reference = Expert(AN_UID, make_manifest()), Reference()
    graphs: dict[int, tuple[ForwardGraph, list[Tensor]]] = {}
    for action, what in actions:
        if isinstance(what, set):
            made, parts = [], []
            expert.settle()
            for seed in sorted(what):
                graph, parameters = graphs.pop(seed, (None, parameters_of(expert)))
                made.append((seed, parameters))
                parts.append(part(seed, graph))
            expected = reference.backward(made)
            gradients, _ = expert.backward(parts, may_defer=may_defer)
            torch.testing.assert_close(gradients, expected)
        elif action == "forward":
            graph = forward(expert, what)
            graphs[what] = graph, parameters_of(expert)
        else:
            graphs.pop(what, None)
    expert.settle()
    torch.testing.assert_close(parameters_of(expert), parameters_of(reference.expert))
    assert expert.update_count == reference.expert.update_count
