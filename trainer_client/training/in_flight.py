"""Several training steps at once over shared parameters, so that a slow link costs staleness instead of time.

Asynchronous training (Ryabinin & Gusev 2020, section 3.3): each step computes on a copy of the parameters taken when it
began, and its gradients are applied to the parameters at its end.
"""

import math
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)
R = TypeVar("R")

MAX_IN_FLIGHT = 32
"""The most steps that `in_flight = "auto"` runs at once."""
_SAFETY = 2.0
"""How many steps more than the mean needs, in standard deviations. See `InFlightController`."""
_SMALLEST_WINDOW = 4
_WINDOWS_REMEMBERED = 3
_PROBE_AFTER = 50.0
_STEPS_FOR_ONE_MORE = 4


def staleness_limit(step: int) -> int:
    """How many steps may be in flight without harm after `step` steps: one at first, and one more every 4 steps. A
    gradient is as many updates old as there were other steps in flight. At first, the parameters move fast, so old
    gradients do harm; later, the same staleness costs little.
    """
    return 1 + step // _STEPS_FOR_ONE_MORE


class InFlightController:
    """Finds how many steps at once keep the bottleneck busy.

    That number is the bottleneck's rate times the duration of a step that runs alone (as in BBR: Cardwell et al. 2016,
    ACM Queue 14(5)), plus twice its square root, because steps are uneven and come in bunches (square-root staffing:
    Halfin & Whitt 1981, Operations Research 29(3)). The duration of a lone step is measured at the start and at
    intervals. The duration of a step among others can't be used: it includes waiting for them, so the number would grow
    and grow.
    """

    def __init__(self, limit: int) -> None:
        self.count = 1
        """How many steps should be in flight now."""
        self._limit = limit
        self._alone_s: float | None = None
        self._alone_at = 0.0
        self._lone_steps = 0
        self._rates: deque[float] = deque(maxlen=_WINDOWS_REMEMBERED)
        self._window_began: float | None = None
        self._done_in_window = 0

    def note(self, seconds: float, ended_at: float, alone: bool) -> None:
        """Records a step and its duration. `alone`: no other step was in flight at the time."""
        if self.count == 1:
            if alone:
                self._note_alone(seconds, ended_at)
            return
        if self._window_began is None:
            self._window_began = ended_at  # the first step that ends after a change began before it
            return
        self._done_in_window += 1
        if self._done_in_window >= max(_SMALLEST_WINDOW, self.count):
            self._end_window(ended_at)

    def _note_alone(self, seconds: float, ended_at: float) -> None:
        self._lone_steps += 1
        if self._lone_steps == 1:
            return  # this step opened the connections
        self._alone_s, self._alone_at = seconds, ended_at
        if not self._rates:
            self._rates.append(1 / max(seconds, 1e-9))
        self._open_window(self._needed())

    def _end_window(self, now: float) -> None:
        assert self._window_began is not None
        assert self._alone_s is not None
        rate = self._done_in_window / max(now - self._window_began, 1e-9)
        self._rates.append(rate)
        is_probe = now - self._alone_at > _PROBE_AFTER * self._alone_s
        self._open_window(1 if is_probe else self._needed())

    def _needed(self) -> int:
        assert self._alone_s is not None
        busy = max(self._rates) * self._alone_s
        return max(2, round(busy + _SAFETY * math.sqrt(busy)))

    def _open_window(self, count: int) -> None:
        self.count = min(count, self._limit)
        self._window_began, self._done_in_window = None, 0


@dataclass(frozen=True)
class Finished(Generic[M, R]):
    """A finished step, and the copy with its gradients: return the copy with `InFlight.release`."""

    copy: M
    result: R
    staleness: int
    """How often the shared parameters were updated while it ran."""
    seconds: float
    ended_at: float
    alone: bool


@dataclass(eq=False)
class _Begun(Generic[M]):
    copy: M
    version: int
    at: float
    alone: bool


class InFlight(Generic[M, R]):
    """The running steps, each on its own thread. For one thread, the only one that changes the shared model."""

    def __init__(self, shared: M, make_copy: Callable[[], M], limit: int) -> None:
        """`make_copy` returns a model with the same shapes as the shared one; it is called at most `limit` times."""
        self._shared = shared
        self._make_copy = make_copy
        # a new thread inherits the number of cores that any thread has set last
        self._threads = ThreadPoolExecutor(
            limit, "talkoot-step", initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)
        )
        self._free: list[M] = []
        self._begun: dict[Future[R], _Begun[M]] = {}
        self._version = 0

    def __len__(self) -> int:
        return len(self._begun)

    def begin(self, work: Callable[[M], R]) -> None:
        """Starts `work` on a copy of the current shared model."""
        copy = self._free.pop() if self._free else self._make_copy()
        _copy_tensors(self._shared, copy)
        alone = not self._begun
        for other in self._begun.values():
            other.alone = False
        begun = _Begun(copy, self._version, time.monotonic(), alone)
        self._begun[self._threads.submit(work, copy)] = begun

    def next(self) -> Finished[M, R]:
        """Waits until any step ends. Raises what the step raised."""
        done, _ = wait(self._begun, return_when=FIRST_COMPLETED)
        future = min(done, key=lambda one: self._begun[one].at)
        begun = self._begun.pop(future)
        now = time.monotonic()
        return Finished(
            begun.copy, future.result(), self._version - begun.version, now - begun.at, now, begun.alone
        )

    def release(self, finished: Finished[M, R], *, updated: bool) -> None:
        """Takes the copy back. `updated`: whether its gradients changed the shared parameters."""
        self._version += updated
        self._free.append(finished.copy)

    def close(self) -> None:
        """Abandons the running steps. Each ends with the calls that it awaits."""
        self._threads.shutdown(wait=False, cancel_futures=True)


@torch.no_grad()
def _copy_tensors(source: nn.Module, target: nn.Module) -> None:
    torch._foreach_copy_([*target.parameters(), *target.buffers()], [*source.parameters(), *source.buffers()])
