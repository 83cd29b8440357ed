"""How fast steps are done over a link, with a fixed number of steps in flight or with as many as a trainer's `auto`
chooses.

Contenders that have started at the same time take turns, so that each measures alone.
"""

import fcntl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import linear_regression

from torch import nn

from trainer_client.training.in_flight import InFlight, InFlightController

Carried = Callable[[], tuple[int, int]]
"""Returns the bytes sent and received since the start."""

_BRIEF_S = 3.0
_SETTLES_IN = 7
"""How long `auto` takes to find its number, in durations of a step that is alone in flight: in each it doubles about
once.
"""
_LEAST_WARM_S = 1.0


def pace_of(
    step: Callable[[], None], samples: int, seconds: float, in_flight: int, carried: Carried
) -> dict[str, float]:
    """Runs steps on `in_flight` threads. Returns samples, and Mbit in each direction, per second, while all threads are
    busy.
    """
    least = 2 if seconds < _BRIEF_S else 3
    ends: list[list[float]] = [[] for _ in range(in_flight)]
    enough = threading.Event()

    def run(own: list[float]) -> None:
        step()  # Not measured: connections are opened and optimizers start.
        while not enough.is_set():
            step()
            own.append(time.perf_counter())

    def wait_for(count: int) -> tuple[float, tuple[int, int]]:
        while min(map(len, ends)) < count:
            time.sleep(0.002)
            if not all(thread.is_alive() for thread in threads):
                raise SystemExit("a step failed")
        return time.perf_counter(), carried()

    threads = [threading.Thread(target=run, args=(own,), daemon=True) for own in ends]
    for thread in threads:
        thread.start()
    began, before = wait_for(1)
    time.sleep(seconds)
    ended, after = wait_for(least)
    paces = [(len(own) - 1) / (own[-1] - own[0]) for own in map(list, ends)]
    enough.set()
    for thread in threads:
        thread.join()
    return {"samples_per_s": samples * sum(paces), **_mbit(before, after, ended - began)}


def auto_pace_of(
    make_model: Callable[[], nn.Module],
    step: Callable[[nn.Module], None],
    samples: int,
    seconds: float,
    limit: int,
    carried: Carried,
) -> dict[str, float]:
    """The pace of a trainer with `--in-flight auto`: each step runs on a copy of the model, and `auto` says how many
    run at once.
    """
    steps: InFlight[nn.Module, None] = InFlight(make_model(), make_model, limit)
    enough = InFlightController(limit)
    least = 3 if seconds < _BRIEF_S else 10
    began = warm_until = time.monotonic()
    ends: list[float] = []
    counts: list[int] = []
    before = carried()
    while len(ends) <= least or ends[-1] < ends[0] + seconds:
        while len(steps) < enough.count:
            steps.begin(step)
        counts.append(len(steps))
        finished = steps.next()
        steps.release(finished, updated=True)
        enough.note(finished.seconds, finished.ended_at, finished.alone)
        if finished.alone and not ends:
            settles_s = (_SETTLES_IN / 2 if seconds < _BRIEF_S else _SETTLES_IN) * finished.seconds
            warm_until = began + max(_LEAST_WARM_S, settles_s)
        if ends or (finished.ended_at > warm_until and not finished.alone):
            ends.append(finished.ended_at)
        else:
            before, counts = carried(), []
    after = carried()
    while len(steps):  # So the next measurement begins with nothing in flight.
        steps.release(steps.next(), updated=True)
    steps.close()
    # Several steps end at once. The slope through all ends depends less on the first and the last end.
    steps_per_s = linear_regression(ends, range(len(ends))).slope
    return {
        "samples_per_s": samples * steps_per_s,
        **_mbit(before, after, ends[-1] - ends[0]),
        "in_flight": sum(counts) / len(counts),
    }


def _mbit(before: tuple[int, int], after: tuple[int, int], seconds: float) -> dict[str, float]:
    up, down = (8e-6 * (b - a) / seconds for a, b in zip(before, after, strict=True))
    return {"up_mbit": up, "down_mbit": down}


class MeasuringTurns:
    """Lets contenders in several processes take turns at measuring, once all have started."""

    def __init__(self, folder: Path | None, contenders: int, limit_s: float) -> None:
        """`folder`: shared by all contenders; None: there is only one. `limit_s`: the longest time that one waits for
        the others to start; they may have failed.
        """
        self._folder = folder
        self._contenders = contenders
        self._limit_s = limit_s

    @contextmanager
    def turn(self, name: str) -> Iterator[None]:
        if self._folder is None:
            yield
            return
        (self._folder / f"{name}.ready").touch()
        ends = time.monotonic() + self._limit_s
        while len(list(self._folder.glob("*.ready"))) < self._contenders and time.monotonic() < ends:
            time.sleep(0.1)
        with (self._folder / "turn").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
            yield
