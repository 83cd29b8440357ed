"""What the rules against liars cost a swarm in which nobody lies: one swarm that switches them off and on in turns.

Both sides of the comparison come from the same run, in short windows that alternate, so that other work on the machine
affects both alike. Steps per second show what users notice. Where the machine is busy with other work, processor time
per step shows it instead. Both need many windows. The processor time of the rules' own code is exact after a few of
them.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from math import inf
from typing import Any

import numpy as np
import psutil
from rich.console import Console

from benchmarks.chaos.attacks import RULES
from benchmarks.chaos.hostile import HostilePlan, HostileSwarm
from benchmarks.scratch import scratch_folder
from peer.codec import Floats

MOST_COST = 0.02
"""The largest share of all processor time that the rules may cost. A swarm that is limited by its processors slows down
by that share.
"""
_UNLIMITED_STEPS = 1_000_000
_SETTLES_S = 0.5
"""The pause after each switch, so that the calls which began before it have ended."""
_WINDOW_S = 3.0
_WARM_UP_S = 10.0
_SAID_EVERY = 10


@dataclass(frozen=True)
class Window:
    """A short time with the rules, or without them."""

    with_rules: bool
    began: float
    ended: float
    cpu_s: float
    """Processor time of all peers in this window."""
    spent_s: tuple[float, ...]
    """The part of that time spent in each of `RULES`, or, without the rules, in the code that replaces them."""


async def measure(plan: HostilePlan, pairs: int, console: Console) -> dict[str, Any]:
    """Measures the swarm's speed in `pairs` pairs of windows, with and without the rules in `plan.without`."""
    plan = replace(plan, steps=_UNLIMITED_STEPS)
    with scratch_folder() as folder:
        keys = folder / "keys"
        keys.mkdir()
        swarm = HostileSwarm(plan, 0, None, folder, keys)
        windows: list[Window] = []
        try:
            await swarm.start_nodes()
            await swarm.start_trainers()
            await asyncio.sleep(_WARM_UP_S)
            for number in range(pairs):
                # With, without, without, with: so a steady drift of the machine's speed cancels out.
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
        "without": plan.without,
        "check_share": plan.check_share,
        "windows": [asdict(window) for window in windows],
        "faults": faults,
        "reached": found["cost"][0] <= MOST_COST,
        **found,
    }


async def _watch(swarm: HostileSwarm, with_rules: bool) -> Window:
    if with_rules:
        swarm.begins.unlink(missing_ok=True)
    else:
        swarm.begins.touch()
    await asyncio.sleep(_SETTLES_S)
    began, cpu_s, spent_s = time.monotonic(), _cpu_s(swarm.pids), swarm.spent_s()
    await asyncio.sleep(_WINDOW_S)
    cpu_s = _cpu_s(swarm.pids) - cpu_s
    spent = tuple(after - before for before, after in zip(spent_s, swarm.spent_s(), strict=True))
    return Window(with_rules, began, time.monotonic(), cpu_s, spent)


def steps_in(ended_at: Sequence[float], begin: float, end: float) -> float:
    """The steps that one trainer took between two times. A step that lies only partly in between counts for
    that part.
    """
    if not ended_at:
        return 0.0
    at = np.interp([begin, end], ended_at, np.arange(len(ended_at)))
    return float(at[1] - at[0])


def ratios(windows: Sequence[tuple[Window, float]]) -> dict[str, Any]:
    """What the rules cost over all pairs of consecutive windows. `windows`: each with the number of steps taken in it.

    `costs`: for each rule, the share of all peers' processor time that its own code takes, less what the code takes
    that replaces it. Other work on the machine does not distort this, since both times are from the same seconds.
    `speed`: the steps per second with rules, relative to those without, by the clock; `speed_by_cpu`: by processor
    time. These include what the rules cost elsewhere. Each figure comes with its standard error.
    """
    pairs = [
        sorted(pair, key=lambda each: each[0].with_rules)
        for pair in zip(windows[::2], windows[1::2], strict=True)
    ]
    steps = np.array([[steps for _, steps in pair] for pair in pairs])
    clock = np.array([[window.ended - window.began for window, _ in pair] for pair in pairs])
    cpu = np.array([[window.cpu_s for window, _ in pair] for pair in pairs])
    spent = np.array([[window.spent_s for window, _ in pair] for pair in pairs])
    return {
        "speed": _over_pairs(_of_plain, steps, clock),
        "speed_by_cpu": _over_pairs(_of_plain, steps, cpu),
        "cost": _over_pairs(_beyond_plain, spent.sum(2), cpu),
        "costs": {rule: _over_pairs(_beyond_plain, spent[..., n], cpu) for n, rule in enumerate(RULES)},
    }


def _of_plain(steps: Floats, seconds: Floats) -> float:
    """The speed with rules relative to that without. The arrays are [2]: without rules, then with them."""
    pace = steps / seconds
    return float(pace[1] / pace[0])


def _beyond_plain(spent_s: Floats, cpu_s: Floats) -> float:
    share = spent_s / cpu_s
    return float(share[1] - share[0])


def _over_pairs(figure: Callable[[Floats, Floats], float], *columns: Floats) -> tuple[float, float]:
    """The figure over the sums of all pairs [P, 2], and its standard error by the jackknife, which leaves out one pair
    at a time.
    """
    sums, count = [column.sum(0) for column in columns], len(columns[0])
    found = figure(*sums)
    if count < 2:
        return found, inf
    others = [figure(*(s - c[n] for s, c in zip(sums, columns, strict=True))) for n in range(count)]
    return found, float(np.sqrt((count - 1) * np.var(others)))


def _cpu_s(pids: Iterable[int]) -> float:
    return sum(times.user + times.system for times in (psutil.Process(pid).cpu_times() for pid in pids))
