"""Gradients that an expert adds up over calls and callers, until there are enough rows for an optimizer step.

The sum equals that of one batch with all the rows. It is not divided by a number of rows or calls, because trainers
already send gradients of a mean.
"""

from collections.abc import Mapping, Sequence
from math import sqrt
from types import MappingProxyType
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from expert_server.experts.graphs import Rows

MOST_APART = 10.0
"""Gradients share an optimizer step if their sizes per row differ by at most this factor."""


class AccumulatedGradients:
    """The sum of the parameters' gradients over all rows of one or more backward passes."""

    def __init__(
        self,
        gradients: list[Tensor | None],
        rows: int,
        sizes: tuple[float, float],
        callers: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        """`gradients`: one for each parameter, or None if it has none. `sizes`, `callers`: see the attributes."""
        self.gradients = gradients
        self.rows: int = rows
        self.sizes: tuple[float, float] = sizes
        """The smallest and the largest root mean square of a pass's gradients of the updates. Zeros are left out.
        """
        self.callers: dict[str, int] = dict(callers)
        """How many of the rows each caller sent, as far as that is known."""

    @classmethod
    def take_from(
        cls, parameters: Sequence[nn.Parameter], parts: Sequence[Rows], callers: Mapping[str, int]
    ) -> Self:
        """Takes the gradients away from the parameters. `parts`: the rows that they belong to."""
        gradients = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        size = size_of(parts)
        return cls(gradients, sum(map(len, parts)), (size, size), callers)

    def give_to(self, parameters: Sequence[nn.Parameter]) -> None:
        """Makes these the gradients of the parameters."""
        for parameter, gradient in zip(parameters, self.gradients, strict=True):
            parameter.grad = gradient

    @property
    def are_finite(self) -> bool:
        return bool(get_total_norm([each for each in self.gradients if each is not None]).isfinite())

    def are_like(self, others: Self) -> bool:
        """Whether the two may share a step. In a shared step, a much smaller one would have no effect."""
        least, most = self._sizes_with(others)
        return most <= MOST_APART * least

    def add(self, others: Self) -> None:
        """Adds the others, which must not be used any more."""
        for number, (mine, its) in enumerate(zip(self.gradients, others.gradients, strict=True)):
            if mine is None:
                self.gradients[number] = its
            elif its is not None:
                mine += its
        self.rows += others.rows
        for caller, rows in others.callers.items():
            self.callers[caller] = self.callers.get(caller, 0) + rows
        self.sizes = self._sizes_with(others)

    def _sizes_with(self, others: Self) -> tuple[float, float]:
        sizes = [size for size in (*self.sizes, *others.sizes) if size > 0]
        return min(sizes, default=0.0), max(sizes, default=0.0)


def size_of(parts: Sequence[Rows]) -> float:
    """The root mean square of these parts' gradients of the updates."""
    tensors = [part.gradients for part in parts if part.gradients is not None]
    squares = sum(_norm(each) ** 2 for each in tensors)
    return sqrt(squares / max(1, sum(each.numel() for each in tensors)))


def _norm(tensor: Tensor) -> float:
    norm = float(torch.linalg.vector_norm(tensor))
    if 1e-15 < norm < 1e15:
        return norm
    # the squares may overflow or underflow float32; float64 takes fifty times as long
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
