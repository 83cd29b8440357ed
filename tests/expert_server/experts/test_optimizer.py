"""The optimizers of experts are torch's, number for number, and torch's compiler is not imported for them."""

import subprocess
import sys
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dht.manifest import OptimizerSpec
from expert_server.experts.optimizer import Optimizer

SHAPES = [(7, 5), (5,), (3, 2, 2), (1,), ()]


def torchs(parameters: list[Tensor], spec: OptimizerSpec) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": spec.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    match spec.name:
        case "adamw":
            return torch.optim.AdamW(groups, lr=spec.learning_rate, fused=True)
        case "adam":
            return torch.optim.Adam(groups, lr=spec.learning_rate, fused=True)
        case "sgd":
            return torch.optim.SGD(groups, lr=spec.learning_rate, momentum=spec.sgd_momentum, fused=True)


def random_parameters(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in SHAPES]


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["adamw", "adam", "sgd"]),
    momentum=st.sampled_from([None, 0.0, 0.5]),
    weight_decay=st.sampled_from([0.0, 0.1, 1.0]),
    sizes=st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=6),
    scale=st.sampled_from([1e-12, 1.0, 1e12]),
    seed=st.integers(0, 2**32 - 1),
)
def test_steps_are_torchs_number_for_number(
    name: Literal["adamw", "adam", "sgd"],
    momentum: float | None,
    weight_decay: float,
    sizes: list[float],
    scale: float,
    seed: int,
) -> None:
    spec = OptimizerSpec(name=name, momentum=momentum if name == "sgd" else None, weight_decay=weight_decay)
    ours, theirs = random_parameters(seed), random_parameters(seed)
    optimizer, reference = Optimizer(ours, spec), torchs(theirs, spec)
    generator = torch.Generator().manual_seed(seed + 1)
    for size in sizes:
        optimizer.learning_rate = size
        for group in reference.param_groups:
            group["lr"] = size
        for mine, its in zip(ours, theirs, strict=True):
            mine.grad = scale * torch.randn(mine.shape, generator=generator)
            its.grad = mine.grad.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, atol=0, rtol=0)
    for mine, its in zip(ours, theirs, strict=True):
        kept = {key: value for key, value in reference.state[its].items() if value is not None}
        torch.testing.assert_close(optimizer.state.get(mine, {}), kept, atol=0, rtol=0)


@pytest.mark.parametrize("name", ["adamw", "adam"])
def test_a_parameter_without_a_gradient_rests_and_is_remembered(name: Literal["adamw", "adam"]) -> None:
    spec = OptimizerSpec(name=name)
    ours, theirs = random_parameters(0), random_parameters(0)
    optimizer, reference = Optimizer(ours, spec), torchs(theirs, spec)
    for skipped in (0, 2, 1, 4):
        for number, (mine, its) in enumerate(zip(ours, theirs, strict=True)):
            mine.grad = its.grad = None if number == skipped else torch.full_like(mine, 0.5 + number)
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, atol=0, rtol=0)
    assert [float(optimizer.state[p]["step"]) for p in ours] == [3, 3, 3, 4, 3]


def test_steps_are_counted_on_from_a_state_that_was_replaced() -> None:
    parameters = random_parameters(0)
    optimizer = Optimizer(parameters, OptimizerSpec())
    for other_steps in (None, 7.0, 3.0):
        if other_steps is not None:
            optimizer.state[parameters[2]]["step"] = torch.tensor(other_steps)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in parameters] == [3, 3, 4, 3, 3]


def test_gradients_are_gone_after_zero_grad() -> None:
    parameters = random_parameters(0)
    optimizer = Optimizer(parameters, OptimizerSpec())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in parameters)


A_NODES_WORK = """
import sys
import torch
import talkoot.node.launch
from dht.manifest import ExpertSpec, Manifest, ModelSpec
from dht.uid import UID
from expert_server.experts.expert import Expert, expert_bytes
from expert_server.experts.graphs import Rows

model = ModelSpec(hidden=16, heads=2, feed_forward=32)
manifest = Manifest(name="test", model=model, experts=ExpertSpec(kind="transformer"))
assert expert_bytes(manifest) > 0
expert = Expert(UID(0, (0, 0)), manifest)
rows, positions = torch.ones(3, 16), torch.arange(3)
_, graph = expert.forward_with_graph(Rows(rows, torch.tensor([3]), positions))
expert.backward([Rows(rows, torch.tensor([3]), positions, 1e3 * rows, graph)])
expert.import_state(expert.export_state(), expert.update_count)
assert expert.update_count == 1
print(*sys.modules)
"""


def test_what_a_node_does_imports_no_more_than_it_needs() -> None:
    command = [sys.executable, "-W", "ignore", "-c", A_NODES_WORK]
    modules = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240).stdout.split()
    assert "expert_server.node" in modules
    assert not {"torch._dynamo", "torch._inductor", "sympy"} & set(modules)
    assert not {"hivemind.averaging", "hivemind.moe", "hivemind.optim"} & set(modules)
