"""A small expert, its rows and its steps, for tests."""

from typing import Literal

import torch
from torch import Tensor

from dht.manifest import ExpertSpec, Manifest, ModelSpec, OptimizerSpec
from dht.uid import UID
from expert_server.experts.expert import Expert
from expert_server.experts.graphs import ForwardGraph, Rows

HIDDEN = 16
ROWS = 12
LENGTHS = torch.tensor([5, 4, 3])
POSITIONS = torch.tensor([0, 1, 4, 5, 9, 0, 2, 3, 7, 1, 2, 3])
AN_UID = UID(1, (0, 1))


def make_manifest(
    seed: int = 3,
    learning_rate: float = 1e-2,
    warmup_updates: int = 0,
    decay_updates: int = 0,
    clip_norm: float = 1.0,
    name: Literal["adamw", "adam", "sgd"] = "adamw",
    momentum: float | None = None,
    rows_per_update: int = 1,
) -> Manifest:
    model = ModelSpec(
        layers=2, hidden=HIDDEN, heads=2, context=32, local_layers=1, feed_forward=32, seed=seed
    )
    optimizer = OptimizerSpec(
        name=name,
        learning_rate=learning_rate,
        momentum=momentum,
        weight_decay=0.1,
        clip_norm=clip_norm,
        rows_per_update=rows_per_update,
        warmup_updates=warmup_updates,
        decay_updates=decay_updates,
    )
    return Manifest(
        name="test", model=model, experts=ExpertSpec(grid=(2, 2), kind="transformer"), optimizer=optimizer
    )


def random_rows(seed: int) -> Tensor:
    return torch.randn(ROWS, HIDDEN, generator=torch.Generator().manual_seed(seed))


def backward(expert: Expert, inputs: Tensor, gradients: Tensor, graph: ForwardGraph | None = None) -> Tensor:
    (gradient,), _ = expert.backward([Rows(inputs, LENGTHS, POSITIONS, gradients, graph)])
    return gradient


def parameters_of(expert: Expert) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in expert.block.parameters()]


def gradients_that_overflow_when_summed() -> Tensor:
    """Each gradient is finite, and so is that of the input. The gradient of a bias, which is the sum over the rows, is
    not.
    """
    gradients = torch.zeros(ROWS, HIDDEN)
    gradients[:, 0] = 5e37
    return gradients
