"""Computes several narrow experts at once, with one product for all of them instead of one for each.

A small matrix product takes less time than the Python calls around it. So the experts' matrices are copied into stacks,
and each linear layer is one grouped product, `torch.nn.functional.grouped_mm`. Everything else is computed as for one
expert with all the rows, because rows of different experts never share a segment. Only Talkoot's own kinds of experts
can be grouped, because other packages' blocks may treat neighbouring rows differently.

Shape suffixes: E = experts, R = rows of all of them, expert after expert, S = segments, D = width, I and O = inner and
outer columns of a linear layer.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dht.manifest import Manifest
from expert_server.blocks import OWN_KINDS
from expert_server.experts.devices import ComputeDevice
from expert_server.experts.graphs import GraphMeter, ParameterGradients, Rows, SharedPass, run_backward

LEAST_EXPERTS, MOST_EXPERTS = 4, 16
"""The fewest and the most experts computed at once. With fewer, nothing is gained. With more, their tensors no longer
fit into a core's cache.
"""
LEAST_ROWS, MOST_ROWS = 512, 2048
"""The most rows computed at once: the first number if other threads would otherwise be idle, else the second."""
_MOST_NUMBERS = 2**18
"""The most numbers in the parameters of an expert that is computed with others. Larger ones gain less, and the copies
of 16 would take over 16 MiB for each pass that is kept.
"""
_ALIGNMENT = 4
"""Rows of matrices must begin at multiples of 16 bytes: of this many numbers."""


class GroupedBlock:
    """A block without its own parameters, which computes several experts with theirs. For one thread at a time."""

    def __init__(self, block: nn.Module) -> None:
        """`block`: one expert's block, which is not changed."""
        names = [name for name, _ in block.named_parameters()]
        self._block = deepcopy(block)
        self._split = _Split()
        self._layers: dict[str, tuple[_GroupedLayer, str]] = {}
        """For each parameter, its layer and its name in that layer."""
        self._replace_layers(self._block, "")
        self._places = [self._layers[name] for name in names]
        self._meter = GraphMeter()

    @classmethod
    def of(cls, block: nn.Module, manifest: Manifest, device: ComputeDevice) -> Self | None:
        """The grouped form of this block; None if experts of this kind are computed one by one."""
        matrices = [parameter for parameter in block.parameters() if parameter.dim() > 1]
        fits = (
            manifest.experts.kind in OWN_KINDS
            and device.torch_device.type == "cpu"
            and device.precision == "fp32"
            and hasattr(F, "grouped_mm")
            and sum(parameter.numel() for parameter in block.parameters()) <= _MOST_NUMBERS
            and not any(columns % _ALIGNMENT for matrix in matrices for columns in matrix.shape)
        )
        return cls(block) if fits else None

    def forward(
        self, parameters: Sequence[Sequence[Tensor]], parts: Sequence[Rows], keep: bool
    ) -> SharedPass:
        """Computes each expert's part. `parameters`: for each expert, its own, in the block's order. `keep`: with
        a graph.
        """
        stacks = [torch.stack([each.detach() for each in same]) for same in zip(*parameters, strict=True)]
        x_RD = torch.cat([part.inputs.detach() for part in parts])
        for tensor in (x_RD, *stacks):
            tensor.requires_grad_(keep)
        for (layer, name), stack in zip(self._places, stacks, strict=True):
            layer.stacks[name] = stack
        counts = [len(part) for part in parts]
        self._split.set(counts)
        lengths_S = torch.cat([part.lengths for part in parts])
        positions_R = torch.cat([part.positions for part in parts])
        others = (caches,) if (caches := Rows.joined_caches(parts)) else ()
        try:
            with torch.set_grad_enabled(keep), self._meter.measuring(x_RD, stacks):
                u_RD: Tensor = self._block(x_RD, lengths_S, positions_R, *others) - x_RD
        finally:
            for layer, _ in self._places:
                layer.stacks.clear()
        size = self._meter.bytes_of(len(x_RD)) + sum(stack.nbytes for stack in stacks) if keep else 0
        return SharedPass(x_RD, u_RD, stacks, counts, size)

    def _replace_layers(self, module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                layer: _GroupedLayer = _GroupedLinear(self._split)
            elif isinstance(child, nn.LayerNorm | nn.RMSNorm):
                layer = _GroupedNorm(self._split, child)
            else:
                self._replace_layers(child, f"{prefix}{name}.")
                continue
            self._layers |= {f"{prefix}{name}.{own}": (layer, own) for own, _ in child.named_parameters()}
            setattr(module, name, layer)


def backward(
    shared: SharedPass, gradients: Sequence[Tensor]
) -> tuple[list[Tensor], list[ParameterGradients]]:
    """Returns the gradients of each expert's inputs [R, D], and of each expert's parameters.

    `gradients`: for each expert, the gradients of its updates. The pass can't be used again.
    """
    x_RD, u_RD, stacks = shared.take()
    run_backward(u_RD, torch.cat(list(gradients)))
    assert x_RD.grad is not None, "the input is part of the update"
    of_stacks = [stack.grad for stack in stacks if stack.grad is not None]
    norms = [torch.linalg.vector_norm(each.flatten(1), dim=1) for each in of_stacks]
    norms_E = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    are_finite = bool(np.isfinite(x_RD.grad.numpy()).all())
    of_parameters = [
        ParameterGradients(tensors, norm, are_finite)
        for *tensors, norm in zip(*(each.unbind() for each in of_stacks), norms_E.unbind(), strict=True)
    ]
    return list(torch.split(x_RD.grad, shared.counts)), of_parameters


class _Split:
    """How many of the rows belong to each expert."""

    counts: Sequence[int]
    counts_E: Tensor
    ends_E: Tensor

    def set(self, counts: Sequence[int]) -> None:
        self.counts, self.counts_E = counts, torch.tensor(counts)
        self.ends_E = self.counts_E.cumsum(0).to(torch.int32)


class _GroupedLayer(nn.Module):
    def __init__(self, split: _Split) -> None:
        super().__init__()
        self.split = split
        self.stacks: dict[str, Tensor] = {}
        """The stacked parameters of all experts by name, while a pass is computed."""

    def spread(self, name: str) -> Tensor:
        """Repeats each expert's vector for each of its rows."""
        return _spread(self.stacks[name], self.split)


class _GroupedLinear(_GroupedLayer):
    def forward(self, x_RI: Tensor) -> Tensor:
        weights_EIO = self.stacks["weight"].transpose(1, 2)
        y_RO = F.grouped_mm(x_RI, weights_EIO, offs=self.split.ends_E)
        return y_RO + self.spread("bias") if "bias" in self.stacks else y_RO


class _GroupedNorm(_GroupedLayer):
    def __init__(self, split: _Split, norm: nn.LayerNorm | nn.RMSNorm) -> None:
        super().__init__(split)
        self._shape, self._epsilon = list(norm.normalized_shape), norm.eps

    def forward(self, x_RD: Tensor) -> Tensor:
        if "bias" not in self.stacks:
            return F.rms_norm(x_RD, self._shape, eps=self._epsilon) * self.spread("weight")
        y_RD = F.layer_norm(x_RD, self._shape, eps=self._epsilon or 0.0)
        return torch.addcmul(self.spread("bias"), y_RD, self.spread("weight"))


class _Spread(torch.autograd.Function):
    """Repeats each expert's vector for each of its rows.

    torch's own backward pass of this takes over ten times as long, and its segment sums up to five times.
    """

    @staticmethod
    def forward(ctx: Any, vectors_ED: Tensor, split: _Split) -> Tensor:
        ctx.counts = split.counts
        return vectors_ED.repeat_interleave(split.counts_E, 0)

    @staticmethod
    def backward(ctx: Any, gradients_RD: Tensor) -> tuple[Tensor, None]:
        sums_ED = gradients_RD.new_empty(len(ctx.counts), gradients_RD.shape[1])
        for part_RD, sum_D in zip(torch.split(gradients_RD, ctx.counts), sums_ED.unbind(), strict=True):
            torch.sum(part_RD, 0, out=sum_D)
        return sums_ED, None


_spread: Callable[[Tensor, _Split], Tensor] = _Spread.apply
