"""The dense part between the thread that trains it and those who average it: read at any time, changed after a step."""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from peer.averaging import drawn
from trainer_client.dense import MAX_AGE, Tensors

_MERGES_REMEMBERED = 64
"""Until somebody asks for them."""


@dataclass(frozen=True, eq=False)
class DensePart:
    """As it was at one moment: a copy, on the CPU."""

    tensors: dict[str, Tensor]
    age: int
    """Steps that it has behind it, those of others that it was averaged with too."""


@dataclass(frozen=True)
class Merge:
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
    done: "Future[Merge]" = field(default_factory=Future)


class SharedPart:
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
        self._merges: deque[Merge] = deque(maxlen=_MERGES_REMEMBERED)

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
    ) -> "Future[Merge]":
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

    def take_merges(self) -> list[Merge]:
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
            parameter.copy_(drawn(current, then, waiting.theirs[name], waiting.share))
        self.age = min(max(base.age, waiting.their_age) + self.age - base.age, MAX_AGE)
        merge = Merge(waiting.peer, waiting.share, self.age, waiting.difference)
        self._merges.append(merge)
        waiting.done.set_result(merge)
