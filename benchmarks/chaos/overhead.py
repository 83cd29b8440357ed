"""What the rules against liars cost a swarm in which nobody lies: one swarm that leaves them out every other while.

Both sides of the comparison are of one run, in windows that alternate, so that whatever else the machine does meets
both alike. Steps per second say what users see. Processor time per step says it where the machine is busy with other
work: a swarm on few cores is as fast as it is frugal.
"""

import asyncio
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from math import inf, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console

from benchmarks.chaos.hostile import HostilePlan, HostileSwarm

LEAST_SPEED = 0.98
"""Of the swarm without rules."""
_UNLIMITED_STEPS = 1_000_000
_SETTLES_S = 1.0
"""After each change, so that the calls which began before have ended."""
_WARM_UP_S = 10.0


@dataclass(frozen=True)
class Window:
    """A while with or without the rules."""

    with_rules: bool
    began: float
    ended: float
    cpu_s: float
    """Of all peers."""


async def measure(
    plan: HostilePlan, without: str, window_s: float, pairs: int, console: Console
) -> dict[str, Any]:
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
                    windows.append(await _watch(swarm, with_rules, window_s))
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


async def _watch(swarm: HostileSwarm, with_rules: bool, window_s: float) -> Window:
    if with_rules:
        swarm.begins.unlink(missing_ok=True)
    else:
        swarm.begins.touch()
    await asyncio.sleep(_SETTLES_S)
    began, cpu_s = time.monotonic(), _cpu_s(swarm.pids)
    await asyncio.sleep(window_s)
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
    by_clock, by_cpu = [], []
    for one, other in zip(windows[::2], windows[1::2], strict=True):
        (plain, plain_steps), (ruled, steps) = sorted((one, other), key=lambda pair: pair[0].with_rules)
        if plain_steps and steps:
            by_clock.append(steps / (ruled.ended - ruled.began) / plain_steps * (plain.ended - plain.began))
            by_cpu.append(plain.cpu_s / plain_steps / ruled.cpu_s * steps)
    return {
        "speed": statistics.median(by_clock),
        "speed_error": _error(by_clock),
        "speed_by_cpu": statistics.median(by_cpu),
        "speed_by_cpu_error": _error(by_cpu),
    }


def _error(values: list[float]) -> float:
    """Of the median, about."""
    return 1.25 * statistics.stdev(values) / sqrt(len(values)) if len(values) > 1 else inf


def _cpu_s(pids: Iterable[int]) -> float:
    return sum(times.user + times.system for times in (psutil.Process(pid).cpu_times() for pid in pids))
