"""Self-centred clipping: another peer's copy moves one's own no further than one's own updates do. Pure.

After ClippedGossip (He, Karimireddy & Jaggi, arXiv 2202.01545, section 4): each tensor x becomes
x + s · min(1, τ/‖d‖) · d, where d leads from one's own copy to the other's. The paper derives τ from how far honest
peers differ, which is not known here. Instead, τ is twice the median distance that this peer's own updates moved the
tensor from one meeting to the next. So no other peer can influence it.
"""

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from math import hypot
from statistics import median
from typing import TypeAlias

import torch
from torch import Tensor

Tensors: TypeAlias = Mapping[str, Tensor]
Distances: TypeAlias = Mapping[str, float]
"""Euclidean norms, by tensor name."""

MEETINGS = 16
"""How many of its own moves are remembered for each tensor."""
_RADIUS = 2.0
"""τ, in units of this peer's own moves. An equally fast replica moves as far, so 2 is enough even if both move in
opposite directions.
"""
_REACH = 8.0
"""In radii: a copy that is further away than this is refused."""
_BUCKETS = 1021
"""Numbers in a sketch. A prime, so that the numbers in a column of a matrix do not share one bucket."""
_SKETCHED_AT_ONCE = 64 * _BUCKETS
"""Numbers that are sketched at once: they and their copies stay in the processor's cache."""
_SIGNS = 16 * _SKETCHED_AT_ONCE
_SHIFT = 65_537
"""How far the signs are shifted after each `_SIGNS` numbers. Below 10⁹ numbers, no sign is used twice in a bucket.
"""


class OwnMoves:
    """How far this peer's own updates moved each tensor of one copy between meetings.

    It keeps a sketch of the copy as it was after the last meeting, and the last `MEETINGS` distances.
    """

    def __init__(self, start: Tensors | None = None) -> None:
        """`start`: the copy as it is now, if it is known."""
        self._start: dict[str, Tensor] = {}
        self._moves: dict[str, deque[float]] = {}
        self._idle_meetings = 0
        """Meetings since this peer's last own update."""
        self.start(start or {})

    def are_none(self, present: Distances) -> bool:
        """Whether the copy is known to have taken no own updates yet."""
        return bool(self._start) and not self._moves and not present

    def start(self, tensors: Tensors) -> None:
        """Measures moves from these tensors, after something other than own updates has changed the copy."""
        self._start = {name: _sketch(tensor) for name, tensor in tensors.items()}

    def lose_start(self) -> None:
        """Call it if something other than own updates has changed the copy, and its tensors are not known."""
        self._start = {}

    def present(self, base: Tensors) -> dict[str, float]:
        """How far own updates have moved each tensor from the start to `base`. Tensors that did not move are left out.

        Exact for tensors of up to 1,021 numbers, and about 2% off for larger ones.
        """
        moves = {
            name: float(torch.linalg.vector_norm(_sketch(base[name]) - start))
            for name, start in self._start.items()
            if name in base
        }
        return {name: move for name, move in moves.items() if move > 0}

    def radii(self, present: Distances) -> dict[str, float]:
        """τ of each tensor that has ever moved. `present`: how far own updates have moved them since the last meeting.

        At each further meeting without own updates, τ shrinks to 1/2, 1/3, 1/4 … of its value: n partners that meet an
        idle copy move it by about ln n radii, not by n.
        """
        names = self._moves.keys() | present.keys()
        factor = _RADIUS if present else _RADIUS / (1 + self._idle_meetings)
        return {name: factor * self._median(name, present) for name in names}

    def reach(self, present: Distances, names: Collection[str]) -> float:
        """How far another peer's copy may be from this one, over these tensors together.

        The move since the last meeting counts too, so that two peers can average again even after a long time apart.
        """
        usual = hypot(*(self._median(name, present) for name in names))
        now = hypot(*(present.get(name, 0.0) for name in names))
        return _REACH * _RADIUS * max(usual, now)

    def note(self, present: Distances) -> None:
        """Records a successful meeting. `present`: how far own updates had moved the tensors before it."""
        self._idle_meetings = 0 if present else self._idle_meetings + 1
        for name, move in present.items():
            self._moves.setdefault(name, deque(maxlen=MEETINGS)).append(move)

    def _median(self, name: str, present: Distances) -> float:
        moves = [*self._moves.get(name, ())]
        if name in present:
            moves = [*moves[-MEETINGS + 1 :], present[name]]
        return median(moves) if moves else 0.0


@dataclass(frozen=True, eq=False)
class Clipped:
    """A copy after it was averaged with another."""

    tensors: dict[str, Tensor]
    belief: float
    """The share of the distance to the other copy that was accepted, 0 to 1; 0 if the copies were equal."""


def clip(current: Tensors, base: Tensors, theirs: Tensors, radii: Distances, share: float) -> Clipped:
    """Moves `current` by `share` of the way from `base` to `theirs`, no tensor further than `share` times its radius.

    Changes between `base` and `current` are kept. A tensor without a radius stays as it is. All arguments have the
    tensors of `current`, in the same shapes, with finite numbers. Computed in float64, so that equal copies stay equal.
    """
    tensors, away, believed = {}, 0.0, 0.0
    for name, tensor in current.items():
        way = theirs[name].to(torch.float64, copy=True).sub_(base[name])
        length = float(torch.linalg.vector_norm(way))
        factor = min(1.0, radii.get(name, 0.0) / length) if length else 1.0
        away, believed = hypot(away, length), hypot(believed, factor * length)
        tensors[name] = way.mul_(share * factor).add_(tensor).to(tensor.dtype)
    return Clipped(tensors, min(1.0, believed / away) if away else 0.0)


def at_base(merged: Tensors, current: Tensors, base: Tensors) -> dict[str, Tensor]:
    """`merged` without the own updates from `base` to `current`, which count for the next move. Tensors that they did
    not change, or that `base` lacks, are the same as in `merged`, bit by bit.
    """
    tensors = dict(merged)
    for name in merged.keys() & base.keys():
        if not torch.equal(current[name], base[name]):
            tensors[name] = merged[name].double() - (current[name].double() - base[name].double())
    return tensors


def distance(base: Tensors, theirs: Tensors) -> float:
    """The distance between the two copies, over all tensors of `base` together."""
    return hypot(
        *(
            float(torch.linalg.vector_norm(theirs[name].to(torch.float64, copy=True).sub_(tensor)))
            for name, tensor in base.items()
        )
    )


def believed_updates(mine: int, claimed: int, share: float, belief: float) -> int:
    """The update count after a meeting of a copy that had `mine` updates."""
    return mine + int(share * belief * max(0, claimed - mine))


def sketch_bytes(tensor: Tensor) -> int:
    """The size of the sketch that `OwnMoves` keeps of this tensor."""
    return torch.float64.itemsize * min(tensor.numel(), _BUCKETS)


def _sketch(tensor: Tensor) -> Tensor:
    """A linear map to a few numbers that preserves distances: the numbers with random signs, summed in buckets.

    The estimate of a squared distance has a relative standard deviation of √(2 / buckets) if the numbers are spread
    evenly (Charikar, Chen & Farach-Colton, Finding frequent items in data streams, 2002).
    """
    numbers = tensor.detach().cpu().flatten()
    count = len(numbers)
    if count <= _BUCKETS:
        return numbers.to(torch.float64, copy=True)
    sketch, signs = torch.zeros(_BUCKETS, dtype=torch.float64), _signs()
    for at in range(0, count, _SKETCHED_AT_ONCE):
        part = numbers[at : at + _SKETCHED_AT_ONCE].double()
        begin = (at + at // _SIGNS * _SHIFT) % _SIGNS
        part.mul_(signs[begin : begin + len(part)])
        whole = len(part) // _BUCKETS * _BUCKETS
        sketch += part[:whole].view(-1, _BUCKETS).sum(0)
        sketch[: len(part) - whole] += part[whole:]
    return sketch


@cache
def _signs() -> Tensor:
    """`_SIGNS` signs, and the first `_SKETCHED_AT_ONCE` of them again. Drawn once, because drawing takes longer than
    summing.
    """
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (_SIGNS,), generator=generator, dtype=torch.int8).mul_(2).sub_(1)
    return torch.cat([signs, signs[:_SKETCHED_AT_ONCE]])
