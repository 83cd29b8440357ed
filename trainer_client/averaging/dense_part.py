"""The dense part between the thread that trains it and those who average it: read at any time, changed after a step.

The dense part of a model as trainers give it to each other: its form, its bytes, and which of another's are taken.

Pure. A dense part is the parameters alone, without the optimizer's moments.
"""

import contextlib
import hashlib
import json
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Self, TypeAlias

import torch
from pydantic import Field
from torch import Tensor, nn

from peer.averaging import interpolate
from peer.checkpoints import CheckpointHeader, decode_checkpoint, encode_checkpoint
from peer.errors import StateError

Tensors: TypeAlias = Mapping[str, Tensor]

MAX_AGE = 10**12
"""Nobody trains so long: what claims to be older counts as so old, so that lies do not add up."""
_MOST_SCALE = 4.0
"""Times what one's own numbers measure, or a part of it, that another's may."""
_LEAST_LIKENESS = 0.25
"""Cosine between another's dense part and one's own. They begin equal: training away from there by three times what
the start measures leaves 0.3; noise or a turned sign have 0 or less."""


class Header(CheckpointHeader):
    """What a dense part says of itself."""

    swarm_id: str
    fingerprint: str
    age: int = Field(ge=0)


@dataclass(frozen=True)
class DenseForm:
    """What two dense parts have in common that can be averaged."""

    swarm_id: str
    fingerprint: bytes
    """SHA-256 over it all, 32 bytes."""
    kinds: Mapping[str, tuple[torch.Size, torch.dtype]]
    """Of each parameter, by its name."""

    @classmethod
    def of(cls, model: nn.Module, swarm_id: str, *meanings: str) -> Self:
        """`meanings`: what shapes don't tell, such as which token each row of the embedding is of."""
        kinds = {name: (tensor.shape, tensor.dtype) for name, tensor in model.named_parameters()}
        told = sorted((name, list(shape), str(dtype)) for name, (shape, dtype) in kinds.items())
        text = json.dumps([swarm_id, told, meanings])
        return cls(swarm_id, hashlib.sha256(text.encode()).digest(), kinds)

    @property
    def max_bytes(self) -> int:
        """What a dense part may have on the wire, names and header included."""
        numbers = sum(shape.numel() * dtype.itemsize for shape, dtype in self.kinds.values())
        return numbers + 1024 * (len(self.kinds) + 4)

    def to_bytes(self, tensors: Tensors, age: int) -> bytes:
        """Tensors on the CPU, contiguous."""
        header = Header(swarm_id=self.swarm_id, fingerprint=self.fingerprint.hex(), age=age)
        return encode_checkpoint(header, dict(tensors))

    def from_bytes(self, data: bytes, age: int) -> dict[str, Tensor]:
        """Raises StateError when they are no dense part of this form and age, and when a number is not finite."""

        def check(header: Header) -> None:
            said = (header.swarm_id, header.fingerprint, header.age)
            if said != (self.swarm_id, self.fingerprint.hex(), age):
                raise StateError("it is another dense part than was offered")

        _, tensors = decode_checkpoint(data, Header, check)
        found = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        if found != dict(self.kinds):
            raise StateError("its tensors are not those of this model")
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise StateError("it has numbers that are not finite")
        return tensors


def require_near(mine: Tensors, theirs: Tensors) -> float:
    """How far the two are from each other, as a part of what mine measures. Both of one form, and finite.

    Raises StateError when theirs can't come from the same beginning by training: another scale, in the whole or in one
    tensor, or another direction. This keeps out what is broken, not who lies well.
    """
    own, other, product = _square(mine), _square(theirs), 0.0
    count = max(1, sum(tensor.numel() for tensor in mine.values()))
    for name, tensor in mine.items():
        product += float((tensor.double() * theirs[name].double()).sum())
        # tensors that begin as zeros may grow to what the others measure
        usual = max(_mean_square(tensor), own / count)
        if _mean_square(theirs[name]) > _MOST_SCALE**2 * usual:
            raise StateError(f"its {name:.80} is far larger than this trainer's")
    if not own / _MOST_SCALE**2 <= other <= own * _MOST_SCALE**2:
        raise StateError("its numbers are of another magnitude than this trainer's")
    if product < _LEAST_LIKENESS * math.sqrt(own * other):
        raise StateError("it is no kin of this trainer's: the two did not begin alike")
    return math.sqrt(max(0.0, own + other - 2 * product) / own) if own else 0.0


def _square(tensors: Tensors) -> float:
    return sum(float(tensor.double().square().sum()) for tensor in tensors.values())


def _mean_square(tensor: Tensor) -> float:
    return float(tensor.double().square().mean()) if tensor.numel() else 0.0


_MERGES_REMEMBERED = 64
"""Until somebody asks for them."""


@dataclass(frozen=True, eq=False)
class DensePart:
    """As it was at one moment: a copy, on the CPU."""

    tensors: dict[str, Tensor]
    age: int
    """Steps that it has behind it, those of others that it was averaged with too."""


@dataclass(frozen=True)
class DenseMerge:
    """One averaging, as this trainer sees it."""

    peer: str
    """The other trainer's PeerID."""
    share: float
    """What part of the average the other was."""
    age: int
    """Of this trainer's dense part afterwards."""
    difference: float
    """How far the two were from each other, as a part of what this trainer's measured."""


@dataclass(frozen=True, eq=False)
class _Waiting:
    peer: str
    base: DensePart
    theirs: Tensors
    their_age: int
    share: float
    difference: float
    done: "Future[DenseMerge]" = field(default_factory=Future)


class SharedParameters:
    """A model's parameters. One thread takes optimizer steps, inside `stepping`; others read, and hand in what is to be
    merged, which happens at the end of the next step: so no step ever waits, and no forward pass sees a change.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.age = 0
        """Steps that the dense part has behind it, those of others that it was averaged with too."""
        self.steps = 0
        """Taken here."""
        self.on_step: Callable[[], None] = lambda: None
        """Is told of each step, on the thread that takes it."""
        self._parameters = dict(model.named_parameters())
        self._changing = threading.Lock()
        self._waiting: deque[_Waiting] = deque()
        self._merges: deque[DenseMerge] = deque(maxlen=_MERGES_REMEMBERED)

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        """While the optimizer changes the parameters, in place. Whoever reads them waits meanwhile."""
        with self._changing:
            yield
            self.age = min(self.age + 1, MAX_AGE)
            self.steps += 1
            while self._waiting:
                self._merge(self._waiting.popleft())
        self.on_step()

    def read(self) -> DensePart:
        """Any thread may."""
        with self._changing:
            tensors = {name: p.detach().cpu().contiguous().clone() for name, p in self._parameters.items()}
            return DensePart(tensors, self.age)

    def merge(
        self, peer: str, base: DensePart, theirs: Tensors, their_age: int, share: float, difference: float
    ) -> "Future[DenseMerge]":
        """At the end of the next step the parameters move by `share` of the way from `base`, which was read here, to
        what another trainer had then. Any thread may call this.
        """
        waiting = _Waiting(peer, base, theirs, their_age, share, difference)
        self._waiting.append(waiting)
        return waiting.done

    @torch.no_grad()
    def replace(self, tensors: Tensors, age: int) -> None:
        """Another trainer's dense part, to begin with. Not while a step is under way."""
        with self._changing:
            for name, parameter in self._parameters.items():
                parameter.copy_(tensors[name])
            self.age = min(age, MAX_AGE)

    def take_merges(self) -> list[DenseMerge]:
        """Those since the last time, oldest first."""
        with self._changing:
            merges = list(self._merges)
            self._merges.clear()
            return merges

    @torch.no_grad()
    def _merge(self, waiting: _Waiting) -> None:
        if not waiting.done.set_running_or_notify_cancel():
            return
        base = waiting.base
        for name, parameter in self._parameters.items():
            current, then = parameter.cpu(), base.tensors[name]
            parameter.copy_(interpolate(current, then, waiting.theirs[name], waiting.share))
        self.age = min(max(base.age, waiting.their_age) + self.age - base.age, MAX_AGE)
        merge = DenseMerge(waiting.peer, waiting.share, self.age, waiting.difference)
        self._merges.append(merge)
        waiting.done.set_result(merge)
