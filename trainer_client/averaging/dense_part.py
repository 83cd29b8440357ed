"""The dense part of a model, as trainers exchange it: its form, its encoding, and how it is merged.

A dense part consists of the trainer's own parameters, without the optimizer's moments, and the float buffers that are
saved with them: the biases that balance the experts' load. `SharedParameters` stands between the thread that trains the
dense part and the averaging code, which may read it at any time. It changes only at the end of a step.
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
from typing import Self

import torch
from pydantic import Field
from torch import Tensor, nn

from peer.checkpoints import CheckpointHeader, Outline, decode_checkpoint, encode_checkpoint, is_finite
from peer.clipping import Distances, OwnMoves, Tensors, at_base, believed_updates, clip, distance
from peer.errors import OutOfReachError, StateError
from peer.medoid import mean_square

MAX_BUFFER = 1e9
"""The largest number in a buffer. A bias is only a few times as large as the gate's scores."""
MAX_AGE = 10**12
"""The limit in steps. Nobody trains for so long. A higher claim counts as this many, so that lies don't add up."""
_MOST_SCALE = 4.0
"""Another trainer's numbers may be at most this many times as large as this trainer's, overall or in one tensor."""
_LEAST_LIKENESS = 0.25
"""The smallest cosine between another trainer's dense part and this trainer's. Both started equal. After moving three
times the start's norm, the cosine is still 0.3; noise or flipped signs give 0 or less.
"""
_MERGES_REMEMBERED = 64
"""The most averagings that `take_merges` returns."""


class Header(CheckpointHeader):
    """The header of an encoded dense part."""

    swarm_id: str
    fingerprint: str
    age: int = Field(ge=0)


@dataclass(frozen=True)
class DenseForm:
    """Two dense parts can be averaged only if their forms are equal: swarm, names, shapes, dtypes and meanings."""

    swarm_id: str
    fingerprint: bytes
    """SHA-256 of everything below, 32 bytes."""
    kinds: Mapping[str, tuple[torch.Size, torch.dtype]]
    """Shape and dtype of each parameter and buffer, by name."""
    buffers: frozenset[str]
    """The names of buffers. They have no gradient, so their size and direction say nothing about training."""

    @classmethod
    def of(cls, model: nn.Module, swarm_id: str, *meanings: str) -> Self:
        """`meanings`: what the shapes do not show, such as the token of each row of the embedding."""
        buffers = shared_buffers(model)
        tensors = {**dict(model.named_parameters()), **buffers}
        kinds = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        return cls(swarm_id, fingerprint_of(swarm_id, kinds, *meanings), kinds, frozenset(buffers))

    @property
    def max_bytes(self) -> int:
        """The limit for an encoded dense part, names and header included."""
        numbers = sum(shape.numel() * dtype.itemsize for shape, dtype in self.kinds.values())
        return numbers + self.max_outline_bytes

    @property
    def max_outline_bytes(self) -> int:
        """The limit for its names and its header."""
        return 1024 * (len(self.kinds) + 4)

    def to_bytes(self, tensors: Tensors, age: int) -> bytes:
        """`tensors`: contiguous, on the CPU."""
        header = Header(swarm_id=self.swarm_id, fingerprint=self.fingerprint.hex(), age=age)
        return encode_checkpoint(header, dict(tensors))

    def from_bytes(self, data: bytes, age: int) -> dict[str, Tensor]:
        """Raises StateError if the data is not a dense part of this form and age, or if a number is not finite or, in a
        buffer, too large.
        """

        def check(header: Header, outline: Outline) -> None:
            said = (header.swarm_id, header.fingerprint, header.age)
            if said != (self.swarm_id, self.fingerprint.hex(), age):
                raise StateError("it is not the dense part that was offered")
            if outline != self.kinds:
                raise StateError("its tensors are not those of this model")

        _, tensors = decode_checkpoint(data, Header, check, self.max_outline_bytes)
        if not all(map(is_finite, tensors.values())):
            raise StateError("it has numbers that are not finite")
        require_bounded({name: tensors[name] for name in self.buffers})
        return tensors

    def trained(self, tensors: Tensors) -> Tensors:
        """The parameters among them."""
        return {name: tensor for name, tensor in tensors.items() if name not in self.buffers}


def fingerprint_of(swarm_id: str, kinds: Outline, *meanings: str) -> bytes:
    """The fingerprint of a dense part with these parameters and buffers. `meanings`: as in `DenseForm.of`."""
    told = sorted((name, list(shape), str(dtype)) for name, (shape, dtype) in kinds.items())
    return hashlib.sha256(json.dumps([swarm_id, told, meanings]).encode()).digest()


def shared_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The float buffers that are saved with a model, by name."""
    saved = model.state_dict().keys()
    return {name: b for name, b in model.named_buffers() if name in saved and b.is_floating_point()}


def require_bounded(buffers: Tensors) -> None:
    """Raises StateError if a number is not finite, or is beyond ±`MAX_BUFFER`."""
    for name, tensor in buffers.items():
        if not (tensor.abs() <= MAX_BUFFER).all():  # also true for NaN
            raise StateError(f"its {name:.80} has numbers that are not finite or beyond ±{MAX_BUFFER:.0e}")


def require_near(mine: Tensors, theirs: Tensors) -> float:
    """The norm of the difference, relative to the norm of `mine`. Both have the same form and finite numbers.

    Raises StateError if training from the same start can't have led to `theirs`, because its direction differs too
    much, or its scale, overall or in one tensor. This keeps out broken dense parts, not a clever liar.
    """
    own, other, product = _square(mine), _square(theirs), 0.0
    count = max(1, sum(tensor.numel() for tensor in mine.values()))
    for name, tensor in mine.items():
        product += float((tensor.double() * theirs[name].double()).sum())
        # tensors that begin as zeros may grow to the scale of the others
        usual = max(mean_square(tensor), own / count)
        if mean_square(theirs[name]) > _MOST_SCALE**2 * usual:
            raise StateError(f"its {name:.80} is far larger than this trainer's")
    if not own / _MOST_SCALE**2 <= other <= own * _MOST_SCALE**2:
        raise StateError("the size of its numbers differs too much from this trainer's")
    if product < _LEAST_LIKENESS * math.sqrt(own * other):
        raise StateError(
            "it is unrelated to this trainer's dense part: the two did not start from the same parameters"
        )
    return math.sqrt(max(0.0, own + other - 2 * product) / own) if own else 0.0


def _square(tensors: Tensors) -> float:
    return sum(float(tensor.double().square().sum()) for tensor in tensors.values())


@dataclass(frozen=True, eq=False)
class DensePart:
    """A copy of the dense part at one moment, on the CPU."""

    tensors: dict[str, Tensor]
    age: int
    """Steps that have gone into it, including those of other trainers that it was averaged with."""
    generation: int = 0
    """How many times it had been replaced as a whole."""


@dataclass(frozen=True, eq=False)
class PeerDensePart:
    """Another trainer's dense part, checked."""

    tensors: Tensors
    age: int
    difference: float
    """The norm of the difference to this trainer's own, relative to the norm of the latter."""
    moves: Distances
    """How far this trainer's own steps had moved its dense part by the same moment, since its last averaging."""


@dataclass(frozen=True)
class DenseMerge:
    """One averaging, from this trainer's side."""

    peer: str
    """The other trainer's PeerID."""
    share: float
    """The other trainer's weight in the average."""
    age: int
    """The age of this trainer's dense part after the averaging."""
    difference: float
    """The norm of the difference between the two, relative to the norm of this trainer's own."""
    belief: float
    """The share of the difference that was not clipped away, 0 to 1."""


@dataclass(frozen=True, eq=False)
class _Waiting:
    peer: str
    base: DensePart
    theirs: PeerDensePart
    share: float
    done: "Future[DenseMerge]" = field(default_factory=Future)


class SharedParameters:
    """A model's parameters and saved buffers, shared between the training thread and others.

    One thread takes optimizer steps inside `stepping`. Others read the parameters and hand in what should be merged.
    Merging happens at the end of the next step, so no step waits and no forward pass sees a change.
    """

    def __init__(self, model: nn.Module, age: int = 0) -> None:
        """`age`: steps that have already gone into the parameters."""
        self.model = model
        self.steps: int = 0
        """Steps taken by this trainer."""
        self._age = age
        self._generation = 0
        self._subscribers: tuple[Callable[[], None], ...] = ()
        buffers = shared_buffers(model)
        self._buffers = buffers.keys()
        self._tensors = {**dict(model.named_parameters()), **buffers}
        self._own_moves = OwnMoves(self._tensors)
        self._changing = threading.Lock()
        self._waiting: deque[_Waiting] = deque()
        self._merges: deque[DenseMerge] = deque(maxlen=_MERGES_REMEMBERED)

    @property
    def age(self) -> int:
        """Steps that have gone into the parameters, including those of other trainers that they were averaged with."""
        return self._age

    def subscribe(self, on_step: Callable[[], None]) -> Callable[[], None]:
        """Calls `on_step` after each step, on the training thread, until the returned function is called."""
        self._subscribers += (on_step,)

        def unsubscribe() -> None:
            self._subscribers = tuple(each for each in self._subscribers if each is not on_step)

        return unsubscribe

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        """Held while the optimizer changes the parameters in place. Readers wait meanwhile."""
        with self._changing:
            yield
            self._age = min(self._age + 1, MAX_AGE)
            self.steps += 1
            while self._waiting:
                self._merge(self._waiting.popleft())
        for on_step in self._subscribers:
            on_step()

    def read(self) -> DensePart:
        """A copy of the parameters and buffers. May be called on any thread."""
        with self._changing:
            tensors = {name: t.detach().cpu().contiguous().clone() for name, t in self._tensors.items()}
            return DensePart(tensors, self._age, self._generation)

    def moves_to(self, base: DensePart) -> Distances:
        """How far this trainer's own steps had moved the parameters since the last averaging when `base` was read. May
        be called on any thread, while no merge is pending.
        """
        return self._own_moves.present(base.tensors)

    def require_in_reach(self, base: DensePart, theirs: Tensors, moves: Distances) -> None:
        """Raises OutOfReachError if `theirs` is further from `base` than trainers of similar speed are from each other.

        `moves`: the moves up to `base`. A trainer that has not moved can't judge a distance, so it never raises; but
        `merge` then changes nothing. May be called when `moves_to` may.
        """
        names = self._tensors.keys() - self._buffers
        reach = self._own_moves.reach(moves, names)
        if reach and distance({name: base.tensors[name] for name in names}, theirs) > reach:
            raise OutOfReachError(
                "it is further from this trainer's dense part than this trainer's own steps explain"
            )

    def merge(self, peer: str, base: DensePart, theirs: PeerDensePart, share: float) -> "Future[DenseMerge]":
        """Moves the parameters, at the end of the next step, by up to `share` of the way from `base` to `theirs`.

        `base` was read from this object, and `theirs` is what the other trainer had at that time. Each tensor moves no
        further than this trainer's own steps move it between averagings (`peer.clipping`). The age grows by the
        accepted share of the difference. If the parameters have been replaced since `base` was read, nothing changes,
        and the result is a StateError. May be called on any thread.
        """
        waiting = _Waiting(peer, base, theirs, share)
        self._waiting.append(waiting)
        return waiting.done

    @torch.no_grad()
    def replace(self, tensors: Tensors, age: int) -> None:
        """Replaces the parameters by saved ones, or at the start by another trainer's. Don't call it during a step."""
        with self._changing:
            for name, tensor in self._tensors.items():
                tensor.copy_(tensors[name])
            self._own_moves = OwnMoves(self._tensors)
            self._age = min(age, MAX_AGE)
            self._generation += 1

    def take_merges(self) -> list[DenseMerge]:
        """The averagings since the last call, oldest first."""
        with self._changing:
            merges = list(self._merges)
            self._merges.clear()
            return merges

    @torch.no_grad()
    def _merge(self, waiting: _Waiting) -> None:
        if not waiting.done.set_running_or_notify_cancel():
            return
        base, theirs, share = waiting.base, waiting.theirs, waiting.share
        if base.generation != self._generation:
            waiting.done.set_exception(StateError("the dense part was replaced while it was averaged"))
            return
        current = {name: tensor.cpu() for name, tensor in self._tensors.items()}
        radii = self._own_moves.radii(theirs.moves)
        clipped = clip(current, base.tensors, theirs.tensors, radii, share)
        self._own_moves.note(theirs.moves)
        self._own_moves.start(at_base(clipped.tensors, current, base.tensors))
        for name, tensor in self._tensors.items():
            tensor.copy_(clipped.tensors[name])
        believed = believed_updates(base.age, theirs.age, share, clipped.belief)
        self._age = min(believed + self._age - base.age, MAX_AGE)
        merge = DenseMerge(waiting.peer, share, self._age, theirs.difference, clipped.belief)
        self._merges.append(merge)
        waiting.done.set_result(merge)
