"""Narrow experts that are computed together give the same as each alone."""

from dataclasses import replace
from typing import Any, Literal
from unittest.mock import Mock

import pytest
import torch
from attending import attending_experts
from expert_samples import HIDDEN
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dht.manifest import ExpertSpec, Manifest, ModelSpec, OptimizerSpec
from dht.uid import UID
from expert_server.experts import grouped
from expert_server.experts.devices import ComputeDevice
from expert_server.experts.expert import Expert
from expert_server.experts.graphs import Rows, SharedGraph
from expert_server.experts.grouped import GroupedBlock
from expert_server.serving.batching import Direction, Result, WorkItem
from expert_server.serving.compute import can_join, compute, compute_together
from peer.errors import ExpertError
from peer.layers import KeyValueCache

UIDS = [UID(0, (row, column)) for row in range(2) for column in range(3)]


def make_manifest(
    kind: str = "transformer",
    norm: Literal["layer", "rms"] = "layer",
    activation: Literal["gelu", "swiglu"] = "gelu",
    **changes: Any,
) -> Manifest:
    model = ModelSpec(
        layers=1, hidden=HIDDEN, heads=2, context=32, feed_forward=32, norm=norm, activation=activation
    )
    optimizer = OptimizerSpec(learning_rate=1e-2, **changes)
    return Manifest(name="test", model=model, experts=ExpertSpec(grid=(2, 3), kind=kind), optimizer=optimizer)


def make_experts(manifest: Manifest, count: int = 3) -> list[Expert]:
    return [Expert(uid, manifest) for uid in UIDS[:count]]


def work(
    uid: UID, lengths: list[int], seed: int, direction: Direction, graph: Any = None, scale: float = 1.0
) -> WorkItem:
    generator = torch.Generator().manual_seed(seed)
    inputs, gradients = torch.randn(2, sum(lengths), HIDDEN, generator=generator).unbind()
    positions = torch.cat([torch.arange(length) * 2 for length in lengths])
    of_updates = scale * gradients if direction == "backward" else None
    rows = Rows(inputs, torch.tensor(lengths), positions, of_updates, graph)
    return WorkItem(uid, direction, rows, float("inf"), "a trainer", "a line", keep=direction == "forward")


def tensor_of(result: Result | ExpertError) -> Tensor:
    assert isinstance(result, Result)
    return result.tensor


def assert_alike(some: list[Expert], others: list[Expert]) -> None:
    for one, other in zip(some, others, strict=True):
        assert one.update_count == other.update_count
        torch.testing.assert_close(one.export_state(), other.export_state(), rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=12)
@given(
    st.sampled_from(["transformer", "ffn"]),
    st.sampled_from(["layer", "rms"]),
    st.sampled_from(["gelu", "swiglu"]),
    st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3), min_size=2, max_size=5),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_what_is_computed_together_is_what_each_expert_computes_alone(
    kind: str, norm: Any, activation: Any, lengths: list[list[int]], keeps_graph: bool, order: Any
) -> None:
    # With plain gradient steps, the rounding of tiny gradients changes little.
    manifest = make_manifest(kind, norm, activation, name="sgd", momentum=0.0)
    together, alone = (make_experts(manifest, len(lengths)) for _ in range(2))
    for step in range(2):
        seeds = [10 * step + number for number in range(len(lengths))]
        forward = [
            work(e.uid, own, seed, "forward") for e, own, seed in zip(together, lengths, seeds, strict=True)
        ]
        found = compute_together(together, forward)
        for expert, each, result in zip(alone, forward, found, strict=True):
            torch.testing.assert_close(tensor_of(result), tensor_of(compute(expert, [each])[0]))
        graphs = [result.graph if isinstance(result, Result) and keeps_graph else None for result in found]
        backward = [
            work(e.uid, own, seed, "backward", graph)
            for e, own, seed, graph in zip(together, lengths, seeds, graphs, strict=True)
        ]
        places = list(range(len(backward)))
        order.shuffle(places)
        found = compute_together([together[p] for p in places], [backward[p] for p in places])
        for place, result in zip(places, found, strict=True):
            expected = compute(alone[place], [work(UIDS[place], lengths[place], seeds[place], "backward")])
            torch.testing.assert_close(tensor_of(result), tensor_of(expected[0]), rtol=1e-4, atol=1e-5)
    assert_alike(together, alone)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_experts_of_encoder_and_decoder_are_not_computed_as_one(direction: Direction) -> None:
    """Each call of a trainer is for one layer, but a stranger's call may name any experts."""
    plain = make_manifest()
    model = plain.model.model_copy(update={"layers": 2, "causal": (False, True)})
    manifest = plain.model_copy(update={"model": model})
    uids = [UID(layer, (0, column)) for layer in range(2) for column in range(3)]
    with attending_experts():
        together, alone = ([Expert(uid, manifest) for uid in uids] for _ in range(2))
    works = [work(uid, [5, 3], seed, direction) for seed, uid in enumerate(uids)]
    for expert, each, result in zip(alone, works, compute_together(together, works), strict=True):
        torch.testing.assert_close(tensor_of(result), tensor_of(compute(expert, [each])[0]))
    only = works[:3]
    for expert, each, result in zip(alone[:3], only, compute_together(together[:3], only), strict=True):
        torch.testing.assert_close(
            tensor_of(result), tensor_of(compute(expert, [each])[0]), rtol=1e-4, atol=1e-5
        )


def test_brief_work_of_large_experts_is_computed_one_by_one() -> None:
    model = ModelSpec(hidden=256, feed_forward=1024)
    manifest = Manifest(name="test", model=model, experts=ExpertSpec(grid=(2, 2)))
    experts = [Expert(uid, manifest) for uid in manifest.uids()[:4]]
    rows = [Rows(torch.randn(1, 256), torch.tensor([1]), torch.tensor([0])) for _ in experts]
    works = [
        WorkItem(expert.uid, "forward", own, float("inf"), "a trainer", "a line")
        for expert, own in zip(experts, rows, strict=True)
    ]
    assert all(map(can_join, experts, works))
    for expert, own, result in zip(experts, rows, compute_together(experts, works), strict=True):
        torch.testing.assert_close(tensor_of(result), expert.forward(own))


def shared_forward(experts: list[Expert], seeds: list[int]) -> list[SharedGraph]:
    works = [work(e.uid, [4, 2], seed, "forward") for e, seed in zip(experts, seeds, strict=True)]
    graphs = [result.graph for result in compute_together(experts, works) if isinstance(result, Result)]
    found = [graph for graph in graphs if isinstance(graph, SharedGraph)]
    assert len(found) == len(experts)
    return found


def gradients_of(expert: Expert, seed: int) -> Tensor:
    """The gradient of the inputs with the present parameters."""
    rows = work(expert.uid, [4, 2], seed, "backward").rows
    x_RD = rows.inputs.requires_grad_()
    updates_RD = expert.block(x_RD, rows.lengths, rows.positions) - x_RD
    assert rows.gradients is not None
    return torch.autograd.grad(updates_RD, x_RD, rows.gradients)[0]


def backward_together(
    experts: list[Expert], seeds: list[int], graphs: list[SharedGraph]
) -> list[Result | ExpertError]:
    return compute_together(
        experts,
        [
            work(e.uid, [4, 2], seed, "backward", graph)
            for e, seed, graph in zip(experts, seeds, graphs, strict=True)
        ],
    )


SEEDS = [1, 2, 3, 4]


def test_a_shared_pass_keeps_the_parameters_it_was_made_with() -> None:
    experts = make_experts(make_manifest(), 4)
    graphs = shared_forward(experts, SEEDS)
    expected = [gradients_of(expert, seed) for expert, seed in zip(experts, SEEDS, strict=True)]
    for expert in experts:
        compute(expert, [work(expert.uid, [3], 9, "backward")])
        expert.settle()
    assert graphs[0].version.bytes > sum(p.nbytes for e in experts for p in e.parameters)
    found = backward_together(experts, SEEDS, graphs)
    torch.testing.assert_close([tensor_of(result) for result in found], expected)
    assert [expert.update_count for expert in experts] == [2, 2, 2, 2]
    assert graphs[0].version.bytes == 0, "it is used up"


def replace_state(expert: Expert) -> None:
    expert.import_state(expert.export_state(), 0)


def test_a_pass_of_an_expert_that_was_replaced_is_computed_again() -> None:
    experts = make_experts(make_manifest(), 4)
    graphs = shared_forward(experts, SEEDS)
    with torch.no_grad():
        next(iter(experts[1].parameters)).mul_(0.5)
    replace_state(experts[1])
    expected = [gradients_of(expert, seed) for expert, seed in zip(experts, SEEDS, strict=True)]
    found = backward_together(experts, SEEDS, graphs)
    torch.testing.assert_close([tensor_of(result) for result in found], expected)
    assert graphs[0].version.is_whole


def test_a_part_of_a_pass_is_computed_again() -> None:
    experts = make_experts(make_manifest(), 4)
    graphs = shared_forward(experts, SEEDS)
    expected = [gradients_of(expert, seed) for expert, seed in zip(experts, SEEDS, strict=True)]
    found = backward_together(experts[1:3], SEEDS[1:3], graphs[1:3])
    found += backward_together(experts[::3], SEEDS[::3], graphs[::3])
    order = [found[n] for n in (2, 0, 1, 3)]
    torch.testing.assert_close([tensor_of(result) for result in order], expected)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_numbers_of_one_expert_that_overflow_cost_the_others_nothing(direction: Direction) -> None:
    together, alone = make_experts(make_manifest(), 4), make_experts(make_manifest(), 4)
    works = [work(e.uid, [4, 2], seed, direction) for e, seed in zip(together, SEEDS, strict=True)]
    huge = works[2].rows.gradients if direction == "backward" else works[2].rows.inputs
    assert huge is not None
    huge.fill_(3e38)
    found = compute_together(together, works)
    for place, (expert, each) in enumerate(zip(alone, works, strict=True)):
        (expected,) = compute(expert, [each])
        if place == 2:
            assert isinstance(found[place], ExpertError)
            assert isinstance(expected, ExpertError)
            assert str(found[place]) == str(expected)
        else:
            torch.testing.assert_close(tensor_of(found[place]), tensor_of(expected))
    assert [e.update_count for e in together] == [e.update_count for e in alone]


def test_sequences_go_on_together_as_each_does_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    together, alone = make_experts(make_manifest(), 4), make_experts(make_manifest(), 4)
    caches = [[[KeyValueCache() for _ in range(2)] for _ in together] for _ in range(2)]
    shared = Mock(wraps=GroupedBlock.forward, side_effect=GroupedBlock.forward)
    monkeypatch.setattr(GroupedBlock, "forward", lambda self, *given: shared(self, *given))

    def extend(step: int, spoilt: int | None = None) -> list[Result | ExpertError]:
        works = []
        for number, expert in enumerate(together):
            rows = replace(
                work(expert.uid, [1, 1], 10 * step + number, "forward").rows,
                positions=torch.tensor([step, step]),
            )
            if number == spoilt:
                rows.inputs.fill_(3e38)
            works.append(
                WorkItem(
                    expert.uid,
                    "forward",
                    replace(rows, caches=caches[0][number]),
                    float("inf"),
                    "a trainer",
                    "a line",
                )
            )
        found = compute_together(together, works)
        for number, (expert, each, result) in enumerate(zip(alone, works, found, strict=True)):
            by_itself = replace(each, rows=replace(each.rows, caches=caches[1][number]))
            (expected,) = compute(expert, [by_itself])
            if isinstance(expected, Result):
                torch.testing.assert_close(tensor_of(result), expected.tensor, rtol=1e-4, atol=1e-5)
            else:
                assert str(result) == str(expected)
        return found

    for step in range(3):
        extend(step)
    assert isinstance(extend(3, spoilt=2)[2], ExpertError)
    assert [[cache.length for cache in each] for each in caches[0]] == [[4, 4], [4, 4], [3, 3], [4, 4]]
    assert shared.call_count == 4
    caches[0][1][0].version += 1
    caches[1][1][0].version += 1
    found = extend(4)
    assert [isinstance(each, Result) for each in found] == [True, False, True, True]
    assert "has changed since" in str(found[1])


def test_gradients_computed_together_accumulate() -> None:
    manifest = make_manifest(name="sgd", momentum=0.0, rows_per_update=12)
    together, alone = make_experts(manifest, 4), make_experts(manifest, 4)
    for seed in range(3):
        works = [work(expert.uid, [4, 2], seed, "backward") for expert in together]
        compute_together(together, works)
        for expert, each in zip(alone, works, strict=True):
            compute(expert, [each])
    assert [(e.update_count, e.accumulated_rows) for e in together] == [(1, 6)] * 4
    assert_alike(together, alone)


def test_only_narrow_experts_of_our_own_kinds_on_the_cpu_are_computed_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expert = make_experts(make_manifest(), 1)[0]
    block, device = expert.block, expert.device
    assert expert.grouped_block is not None
    monkeypatch.setattr(grouped, "OWN_KINDS", {})
    assert GroupedBlock.of(block, make_manifest(), device) is None, "of another package"
    monkeypatch.undo()
    bf16 = ComputeDevice(precision="bf16")
    assert GroupedBlock.of(block, make_manifest(), bf16) is None
    monkeypatch.setattr(grouped, "_MOST_NUMBERS", 100)
    assert GroupedBlock.of(block, make_manifest(), device) is None, "wide"
    monkeypatch.undo()
    odd = make_manifest()
    odd = odd.model_copy(update={"model": odd.model.model_copy(update={"feed_forward": 30})})
    assert make_experts(odd, 1)[0].grouped_block is None, "its products would not be aligned"


def test_work_with_a_good_graph_of_its_own_does_not_join() -> None:
    expert = make_experts(make_manifest(), 1)[0]
    forward = work(expert.uid, [4], 0, "forward")
    (result,) = compute(expert, [forward])
    assert isinstance(result, Result)
    assert can_join(expert, forward)
    assert not can_join(expert, work(expert.uid, [4], 0, "backward", result.graph))
    assert can_join(expert, work(expert.uid, [4], 0, "backward"))
