"""The bound of `benchmarks.moe` for narrow experts: all of them in one process, without network.

There are three ways to compute them, of which the fastest counts: one expert after another, as one grouped product for
each linear layer (`torch.nn.functional.grouped_mm`), and as one product of batches, each padded to the largest expert's
rows (`torch.baddbmm`). A step is forward, backward and fused Adam; nothing is clipped or checked. Only one step is done
at a time: with two, one would change the parameters that the other computes with.

Shape suffixes: B = sequences, R = tokens, K = experts of a token, P = pairs of a token and an expert, ordered by
expert, E = experts, S = segments, D = hidden size, W = width of the experts, I and O = inner and outer columns.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peer.layers import TransformerLayer, make_norm

Way: TypeAlias = Literal["loop", "grouped", "padded"]
WAYS: tuple[Way, ...] = ("loop", "grouped", "padded")


@dataclass(frozen=True)
class Sizes:
    """The sizes of one mixture layer."""

    shape: tuple[int, int, int]
    """[B, T, D]"""
    grid: tuple[int, ...]
    width: int
    heads: int
    feed_forward: int
    top_k: int

    def expert(self) -> TransformerLayer:
        return TransformerLayer(self.width, self.heads, self.feed_forward)


class NarrowBound:
    """Norm, gate, projections and experts. Each token chooses its own experts."""

    def __init__(self, sizes: Sizes, way: Way) -> None:
        self._sizes = sizes
        hidden = sizes.shape[-1]
        self._norm = make_norm("layer", hidden)
        self._gate = nn.Linear(hidden, sum(sizes.grid))
        self._down = nn.Linear(hidden, sizes.width, bias=False)
        self._up = nn.Linear(sizes.width, hidden, bias=False)
        experts = [sizes.expert() for _ in range(prod(sizes.grid))]
        self._experts = _Loop(experts) if way == "loop" else _AtOnce(experts, way)
        self._optimizers = [
            torch.optim.Adam(block.parameters(), lr=1e-3, fused=True) for block in self._experts.blocks
        ]

    def step(self) -> None:
        length, top_k = self._sizes.shape[1], self._sizes.top_k
        x_RD = torch.randn(self._sizes.shape, requires_grad=True).flatten(0, 1)
        h_RD = self._norm(x_RD)
        rows, columns = torch.split(self._gate(h_RD), list(self._sizes.grid), dim=1)
        logits_RE = (rows[:, :, None] + columns[:, None, :]).flatten(1)
        top_RK, chosen_RK = logits_RE.topk(top_k, dim=1)
        chosen_P, order_P = chosen_RK.flatten().sort(stable=True)
        tokens_P = order_P // top_k
        segments_S, lengths_S = torch.unique_consecutive(
            chosen_P * len(x_RD) + tokens_P // length, return_counts=True
        )
        z_PW = self._down(h_RD).index_select(0, tokens_P)
        counts_E = torch.bincount(chosen_P, minlength=logits_RE.shape[1])
        segments_E = torch.bincount(segments_S // len(x_RD), minlength=len(counts_E))
        u_PW = self._experts(z_PW, lengths_S, tokens_P % length, counts_E, segments_E) - z_PW
        weights_P1 = top_RK.softmax(dim=1).flatten()[order_P, None]
        sum_RW = torch.zeros(len(x_RD), self._sizes.width).index_add(0, tokens_P, u_PW * weights_P1)
        torch.autograd.backward((x_RD + self._up(sum_RW)).square().mean())
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad()


def step_on_one_core(sizes: Sizes, way: Way) -> Callable[[], None]:
    """Returns a step that several threads may do at once: each has experts of its own."""
    own = threading.local()

    def step() -> None:
        torch.set_num_threads(1)  # For this thread only.
        if not hasattr(own, "bound"):
            own.bound = NarrowBound(sizes, way)
        own.bound.step()

    return step


class _Loop(nn.Module):
    """Computes one expert after another."""

    def __init__(self, experts: Sequence[TransformerLayer]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(experts)

    def forward(
        self, z_PW: Tensor, lengths_S: Tensor, positions_P: Tensor, counts_E: Tensor, segments_E: Tensor
    ) -> Tensor:
        counts = counts_E.tolist()
        parts = zip(
            self.blocks,
            torch.split(z_PW, counts),
            torch.split(lengths_S, segments_E.tolist()),
            torch.split(positions_P, counts),
            strict=True,
        )
        return torch.cat([block(*part) for block, *part in parts if len(part[0])])


class _AtOnce(nn.Module):
    """Computes all experts at once, in one block whose layers hold the parameters of all."""

    def __init__(self, experts: Sequence[TransformerLayer], way: Way) -> None:
        super().__init__()
        self._rows = _Rows(way == "grouped")
        block = experts[0]
        for path, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear | nn.LayerNorm):
                same = [expert.get_submodule(path) for expert in experts]
                make = _Linear if isinstance(layer, nn.Linear) else _Norm
                block.set_submodule(path, make(same, self._rows))
        self.blocks = nn.ModuleList([block])

    def forward(
        self, z_PW: Tensor, lengths_S: Tensor, positions_P: Tensor, counts_E: Tensor, segments_E: Tensor
    ) -> Tensor:
        self._rows.set(counts_E)
        output_PW: Tensor = self.blocks[0](z_PW, lengths_S, positions_P)
        return output_PW


class _Rows:
    """How many rows each expert has, and where they are among the padded rows."""

    counts_E: Tensor
    ends_E: Tensor
    slots_P: Tensor
    most: int

    def __init__(self, is_grouped: bool) -> None:
        self.is_grouped = is_grouped

    def set(self, counts_E: Tensor) -> None:
        self.counts_E, self.ends_E, self.most = counts_E, counts_E.cumsum(0), int(counts_E.max())
        shifts_E = torch.arange(len(counts_E)) * self.most - (self.ends_E - counts_E)
        self.slots_P = torch.arange(int(counts_E.sum())) + shifts_E.repeat_interleave(counts_E)


class _Layer(nn.Module):
    def __init__(self, same: Sequence[nn.Module], rows: _Rows) -> None:
        super().__init__()
        self.rows = rows
        for name, _ in same[0].named_parameters():
            stack = torch.stack([layer.get_parameter(name).detach() for layer in same])
            self.register_parameter(name, nn.Parameter(stack))
        for name in ("weight", "bias"):
            if not hasattr(self, name):
                self.register_parameter(name, None)

    def spread(self, vectors_EO: Tensor) -> Tensor:
        """Each expert's vector for each of its rows."""
        result: Tensor = _Spread.apply(vectors_EO, self.rows.counts_E)
        return result


class _Linear(_Layer):
    weight: Tensor
    bias: Tensor | None

    def forward(self, x_PI: Tensor) -> Tensor:
        rows, weights_EIO = self.rows, self.weight.transpose(1, 2)
        if rows.is_grouped:
            y_PO = F.grouped_mm(x_PI, weights_EIO, offs=rows.ends_E.to(torch.int32))
            return y_PO if self.bias is None else y_PO + self.spread(self.bias)
        padded = x_PI.new_zeros(len(weights_EIO) * rows.most, x_PI.shape[1])
        x_EPI = padded.index_copy(0, rows.slots_P, x_PI).view(len(weights_EIO), rows.most, -1)
        if self.bias is None:
            y_EPO = torch.bmm(x_EPI, weights_EIO)
        else:
            y_EPO = torch.baddbmm(self.bias[:, None], x_EPI, weights_EIO)
        return y_EPO.flatten(0, 1).index_select(0, rows.slots_P)


class _Norm(_Layer):
    weight: Tensor
    bias: Tensor

    def forward(self, x_PW: Tensor) -> Tensor:
        return torch.addcmul(
            self.spread(self.bias), F.layer_norm(x_PW, x_PW.shape[1:]), self.spread(self.weight)
        )


class _Spread(torch.autograd.Function):
    """Repeats row e of a matrix counts[e] times. torch's own backward pass of that takes several times as long."""

    @staticmethod
    def forward(ctx: Any, vectors_EO: Tensor, counts_E: Tensor) -> Tensor:
        ctx.save_for_backward(counts_E)
        return vectors_EO.repeat_interleave(counts_E, 0)

    @staticmethod
    def backward(ctx: Any, gradients_PO: Tensor) -> tuple[Tensor, None]:
        (counts_E,) = ctx.saved_tensors
        return torch.segment_reduce(gradients_PO, "sum", lengths=counts_E), None
