"""What the rules against liars cost a swarm in which nobody lies: one swarm that leaves them out every other while.

Both sides of the comparison are of one run, in short windows that alternate, so that whatever else the machine does
meets both alike. Steps per second say what users see. Processor time per step says it where the machine is busy with
other work: a swarm on few cores is as fast as it is frugal.
"""

import asyncio
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console

from benchmarks.chaos.hostile import HostilePlan, HostileSwarm
from peer.codec import Floats

LEAST_SPEED = 0.98
"""Of the swarm without rules."""
_UNLIMITED_STEPS = 1_000_000
_SETTLES_S = 0.5
"""After each change, so that the calls which began before have ended."""
_WINDOW_S = 3.0
_WARM_UP_S = 10.0
_SAID_EVERY = 10


@dataclass(frozen=True)
class Window:
    """A while with or without the rules."""

    with_rules: bool
    began: float
    ended: float
    cpu_s: float
    """Of all peers."""


async def measure(plan: HostilePlan, without: str, pairs: int, console: Console) -> dict[str, Any]:
    """Speeds in so many pairs of windows, with and without these rules of `attacks.RULES`."""
    plan = replace(plan, steps=_UNLIMITED_STEPS)
    with tempfile.TemporaryDirectory(prefix="talkoot-overhead-") as folder:
        keys = Path(folder) / "keys"
        keys.mkdir()
        swarm = HostileSwarm(plan, 0, None, Path(folder), keys, without)
        windows: list[Window] = []
        try:
            await swarm.start_nodes()
            await swarm.start_trainers()
            await asyncio.sleep(_WARM_UP_S)
            for number in range(pairs):
                # with, without, without, with: a drift of the machine's speed cancels, too
                for with_rules in (True, False) if number % 2 == 0 else (False, True):
                    windows.append(await _watch(swarm, with_rules))
                if number % _SAID_EVERY == 0:
                    console.log(f"{number + 1} of {pairs} pairs of windows")
            await asyncio.sleep(_SETTLES_S)
            ended_at = [trainer.ended_at for trainer in swarm.trainers]
        finally:
            faults = await swarm.stop()
    found = ratios([(w, sum(steps_in(ends, w.began, w.ended) for ends in ended_at)) for w in windows])
    return {
        "without": without,
        "check_share": plan.check_share,
        "windows": [asdict(window) for window in windows],
        "faults": faults,
        "reached": found["speed"] >= LEAST_SPEED,
        **found,
    }


async def _watch(swarm: HostileSwarm, with_rules: bool) -> Window:
    if with_rules:
        swarm.begins.unlink(missing_ok=True)
    else:
        swarm.begins.touch()
    await asyncio.sleep(_SETTLES_S)
    began, cpu_s = time.monotonic(), _cpu_s(swarm.pids)
    await asyncio.sleep(_WINDOW_S)
    return Window(with_rules, began, time.monotonic(), _cpu_s(swarm.pids) - cpu_s)


def steps_in(ended_at: Sequence[float], begin: float, end: float) -> float:
    """Of one trainer. A step that lies only partly in between counts as that part."""
    if not ended_at:
        return 0.0
    at = np.interp([begin, end], ended_at, np.arange(len(ended_at)))
    return float(at[1] - at[0])


def ratios(windows: Sequence[tuple[Window, float]]) -> dict[str, float]:
    """The speed with rules, as a multiple of that without, by the clock and by processor time, each with its standard
    error over the pairs of windows, which follow each other. `windows`: with the steps in each.
    """
    pairs = [
        sorted(pair, key=lambda each: each[0].with_rules)
        for pair in zip(windows[::2], windows[1::2], strict=True)
    ]
    steps = np.array([[steps for _, steps in pair] for pair in pairs])
    clock = np.array([[window.ended - window.began for window, _ in pair] for pair in pairs])
    cpu = np.array([[window.cpu_s for window, _ in pair] for pair in pairs])
    speed, speed_error = _ratio(steps, clock)
    by_cpu, by_cpu_error = _ratio(steps, cpu)
    return {
        "speed": speed,
        "speed_error": speed_error,
        "speed_by_cpu": by_cpu,
        "speed_by_cpu_error": by_cpu_error,
    }


def _ratio(steps: Floats, seconds: Floats) -> tuple[float, float]:
    """Of steps per second with rules and without, over all pairs [P, 2] together, and its standard error by the
    jackknife: leaving out one pair after another.
    """

    def of(steps: Floats, seconds: Floats) -> Floats:
        pace = steps / seconds
        ratio: Floats = pace[..., 1] / pace[..., 0]
        return ratio

    ratio, count = float(of(steps.sum(0), seconds.sum(0))), len(steps)
    if count < 2:
        return ratio, inf
    others = of(steps.sum(0) - steps, seconds.sum(0) - seconds)
    return ratio, float(np.sqrt((count - 1) * others.var()))


def _cpu_s(pids: Iterable[int]) -> float:
    return sum(times.user + times.system for times in (psutil.Process(pid).cpu_times() for pid in pids))
