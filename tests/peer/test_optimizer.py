"""Steps equal those of torch's optimizers, number by number."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peer.choices import OptimizerName
from peer.optimizer import Optimizer

SHAPES = [(7, 5), (5,), (3, 2, 2), (1,), ()]


def torchs(
    parameters: list[Tensor], name: OptimizerName, weight_decay: float, momentum: float = 0.9
) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    match name:
        case "adamw":
            return torch.optim.AdamW(groups, lr=1e-3, fused=True)
        case "adam":
            return torch.optim.Adam(groups, lr=1e-3, fused=True)
        case "sgd":
            return torch.optim.SGD(groups, lr=1e-3, momentum=momentum, fused=True)


def random_parameters(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in SHAPES]


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["adamw", "adam", "sgd"]),
    momentum=st.sampled_from([0.9, 0.0, 0.5]),
    weight_decay=st.sampled_from([0.0, 0.1, 1.0]),
    sizes=st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=6),
    scale=st.sampled_from([1e-12, 1.0, 1e12]),
    seed=st.integers(0, 2**32 - 1),
)
def test_steps_are_torchs_number_for_number(
    name: OptimizerName,
    momentum: float,
    weight_decay: float,
    sizes: list[float],
    scale: float,
    seed: int,
) -> None:
    ours, theirs = random_parameters(seed), random_parameters(seed)
    optimizer = Optimizer(ours, name, 1e-3, weight_decay, momentum)
    reference = torchs(theirs, name, weight_decay, momentum)
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
def test_a_parameter_without_a_gradient_rests_and_is_remembered(name: OptimizerName) -> None:
    ours, theirs = random_parameters(0), random_parameters(0)
    optimizer, reference = Optimizer(ours, name, 1e-3, 0.01), torchs(theirs, name, 0.01)
    for skipped in (0, 2, 1, 4):
        for number, (mine, its) in enumerate(zip(ours, theirs, strict=True)):
            mine.grad = its.grad = None if number == skipped else torch.full_like(mine, 0.5 + number)
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, atol=0, rtol=0)
    assert [float(optimizer.state[p]["step"]) for p in ours] == [3, 3, 3, 4, 3]


def test_steps_are_counted_on_from_a_state_that_was_replaced() -> None:
    parameters = random_parameters(0)
    optimizer = Optimizer(parameters, "adamw", 1e-3, 0.01)
    for other_steps in (None, 7.0, 3.0):
        if other_steps is not None:
            state = {parameter: dict(moments) for parameter, moments in optimizer.state.items()}
            state[parameters[2]]["step"] = torch.tensor(other_steps)
            optimizer.replace_state(state)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in parameters] == [3, 3, 4, 3, 3]


def test_gradients_are_gone_after_zero_grad() -> None:
    parameters = random_parameters(0)
    optimizer = Optimizer(parameters, "adamw", 1e-3, 0.01)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in parameters)
