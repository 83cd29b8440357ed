"""How late a loop runs under attack, from the metric that nodes, trainers and dashboards expose. For tests."""

import asyncio
import gc
import hashlib
import threading
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Self

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.parser import text_string_to_metric_families

LONGEST_STALL_S, P99_S = 0.5, 0.1
"""The limits that a loop must meet, whatever strangers do."""
_BYSTANDER_S = 0.05

Read = Callable[[], Iterable[Metric]]


def exposed_at(address: str) -> Read:
    """Returns a function that reads the metrics of another process. That function blocks."""

    def read() -> Iterable[Metric]:
        with urllib.request.urlopen(address, timeout=60) as answer:
            return text_string_to_metric_families(answer.read().decode())

    return read


class Bystander(threading.Thread):
    """Sleeps and computes again and again, to measure how long the machine keeps any process waiting."""

    def __init__(self) -> None:
        super().__init__(name="bystander", daemon=True)
        self.longest_s = 0.0
        """The longest time by which it woke up too late."""
        self.over = threading.Event()
        self._spent_s = self._computed_s = 0.0

    @property
    def slowdown(self) -> float:
        """How many times as long as on an idle core a computation took."""
        return self._spent_s / self._computed_s if self._computed_s else 1.0

    def allows(self, limit_s: float) -> float:
        """How long something may take here that must take at most `limit_s` on an idle core.

        Other processes compute as much more slowly as this one, and may have waited as long as this one did: twice,
        since most operations involve two processes, and the metric's buckets are wide.
        """
        return limit_s * self.slowdown + 2 * self.longest_s

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()

    def run(self) -> None:
        data = bytes(2**22)
        while not self.over.is_set():
            began, computed_s = time.monotonic(), time.thread_time()
            hashlib.sha256(data)  # it needs no turn of the interpreter
            self._spent_s += time.monotonic() - began
            self._computed_s += time.thread_time() - computed_s
            began = time.monotonic()
            time.sleep(_BYSTANDER_S)
            self.longest_s = max(self.longest_s, time.monotonic() - began - _BYSTANDER_S)


class LoopLags:
    """The lags since this was made. `read`: reads the metrics of another process that is checked."""

    def __init__(self, read: Read | CollectorRegistry) -> None:
        self._read = read.collect if isinstance(read, CollectorRegistry) else read
        self._before = self._buckets()
        self._bystander = Bystander()
        if not isinstance(read, CollectorRegistry):
            self._bystander.start()

    def quantile(self, share: float) -> float:
        """The upper bound in seconds of the bucket that contains this share of the time; for 1.0, the longest stall."""
        now = self._buckets()
        since = {bound: count - self._before[bound] for bound, count in now.items()}
        ticks = since[float("inf")]
        assert ticks > 0, "the loop did not run at all, or nobody measures it"
        return min(bound for bound, count in since.items() if count >= share * ticks)

    def check(self) -> None:
        """Checks the longest stall. This limit also holds on a machine that other tests keep busy."""
        self._bystander.over.set()
        stall_s, bystander = self.quantile(1.0), self._bystander
        assert stall_s <= bystander.allows(LONGEST_STALL_S), (
            f"the loop stalled for up to {stall_s} s; a bystander waited {bystander.longest_s:.3f} s at most, and "
            f"computed {bystander.slowdown:.1f} times too slowly"
        )

    def check_when_quiet(self) -> None:
        """Checks the 99th percentile as well, in slow tests: while other tests run, processes wait for a core more
        often.
        """
        self.check()
        assert self.quantile(0.99) <= P99_S, f"the loop's p99 is up to {self.quantile(0.99)} s"

    def _buckets(self) -> dict[float, float]:
        return {
            float(sample.labels["le"]): sample.value
            for family in self._read()
            for sample in family.samples
            if sample.name == "talkoot_loop_lag_seconds_bucket"
        }


async def longest_slice(work: Callable[[], Awaitable[object]]) -> float:
    """The most CPU time in seconds that the loop spends on the work between two turns of another task.

    It is the smallest of three tries, since a try that the machine disturbs says nothing about the work.
    """
    return min([await _longest_slice(work()) for _ in range(3)])


async def _longest_slice(work: Awaitable[object]) -> float:
    longest = 0.0

    async def watch() -> None:
        nonlocal longest
        while True:
            began = time.thread_time()
            await asyncio.sleep(0)
            longest = max(longest, time.thread_time() - began)

    watching = asyncio.create_task(watch())
    try:
        with no_collection():
            await work
    finally:
        watching.cancel()
    return longest


def least_cpu_s(work: Callable[[], object], clock: Callable[[], float] = time.thread_time) -> float:
    """The least CPU time in seconds of five tries. `clock`: `time.process_time` for work on several threads."""
    taken_s = []
    with no_collection():
        for _ in range(5):
            began = clock()
            work()
            taken_s.append(clock() - began)
    return min(taken_s)


@contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection until the block ends, for measurements: one visits all objects of earlier tests, which
    takes up to 0.3 s.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
