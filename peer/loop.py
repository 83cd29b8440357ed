"""The asyncio loop of a process, the tasks on it, and what happens when they fail.

A node runs its loop on the main thread, a trainer on a thread beside torch. What peers and the DHT do wrong is
expected: each task handles it, and rounds are tried again (`RetryingRounds`). Any other exception is a mistake in the
program, and a stranger may know what provokes it. It never ends the process: it is logged and counted (`Restarts`), and
the task starts again (`keep_running`) or goes on with what comes next (`tolerating`).
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from peer.errors import TalkootError, UnreachableError
from peer.metrics import SECONDS, total
from peer.platform.loop import new_event_loop, result_of

logger: logging.Logger = logging.getLogger(__name__)

T = TypeVar("T")
Step: TypeAlias = Callable[[], Coroutine[Any, Any, None]]

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
"""Before a task is started again. The pause doubles with each failure, until the task has run for the longest one."""

_TOO_OFTEN, _LATELY_RESTARTED_S = 3, 900.0
"""A task that fails this often within this many seconds is unsteady."""

_CLOSE_S = 30.0
"""Longest wait for a loop's thread: uvloop waits in `close` for what is open and cannot be closed."""
_CLEAN_UP_S = 20.0
"""Longest wait for tasks that were cancelled before their loop is closed."""
_SLICE_S = 0.002
"""A slice lasts as long as 20 signatures take to check."""
_TICK_S = 0.025
_LATELY_S = 60.0
_MOST_MISSED = 4000
"""Ticks counted for one late one: enough for a stall of 100 s, and soon done."""


def is_cancelled() -> bool:
    """Whether this task is cancelled, and not only the call that it waits for.

    gRPC cancels the calls of a channel that is closed, as a pool closes one to make room for others.
    """
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


def new_loop() -> asyncio.AbstractEventLoop:
    """A loop that does not log what is no fault.

    That is a stream's handler that was cancelled, which Python 3.11 takes for an error, and a call that ended after its
    loop was closed: all loops of a process share gRPC's queue, and another one hears of it.
    """
    loop = new_event_loop()
    loop.set_exception_handler(_report)
    return loop


def _report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    exception, handle = context.get("exception"), repr(context.get("handle"))
    is_of_closed_loop = isinstance(exception, RuntimeError) and "PollerCompletionQueue" in handle
    if not isinstance(exception, asyncio.CancelledError) and not is_of_closed_loop:
        loop.default_exception_handler(context)


class LoopThread:
    """A loop on its own thread, for a process whose main thread runs torch. Close it when done."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop = new_loop()
        self._thread = threading.Thread(target=self._run, name="talkoot-loop", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        """Runs the coroutine on the loop and waits for its result. Never call it on the loop's own thread.

        A KeyboardInterrupt while waiting cancels the coroutine; so does TimeoutError.
        """
        assert threading.current_thread() is not self._thread, "run() would wait for itself"
        future = self.submit(coroutine)
        try:
            return result_of(future, timeout_s)
        except BaseException:
            future.cancel()
            raise

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> "Future[T]":
        """Starts the coroutine on the loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def close(self) -> None:
        """Cancels what still runs, waits for it, and ends the thread. Closing twice is harmless."""
        if self.loop.is_closed():
            return
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(_CLOSE_S)
        if self._thread.is_alive():
            logger.warning("the event loop did not close within %.0f s, and is left as it is", _CLOSE_S)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        # what was cancelled before cleans up by now: another cancel would cut that short
        if ending := [task for task in asyncio.all_tasks(self.loop) if task.cancelling()]:
            self.loop.run_until_complete(asyncio.wait(ending, timeout=_CLEAN_UP_S))
        left = asyncio.all_tasks(self.loop)
        for task in left:
            task.cancel()
        self.loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()


class LoopLag:
    """Measures how late the loop is, by a timer of its own. Its methods belong to the loop's thread.

    Nothing else happens while a callback holds the loop, the timer included. One late tick therefore stands for all
    those that it kept from coming: each is counted as late as it would have been. So the histogram's quantiles are
    weighted by time, and say how long something that happens at any moment has to wait.
    """

    def __init__(
        self, metrics: CollectorRegistry | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.seconds: Histogram = Histogram(
            "talkoot_loop_lag_seconds",
            "How late the event loop ran a timer that is due 40 times a second.",
            buckets=SECONDS,
            registry=metrics,
        )
        longest = Gauge(
            "talkoot_loop_longest_lag_seconds",
            "The latest that the event loop ran this timer in the last one to two minutes.",
            registry=metrics,
        )
        longest.set_function(lambda: self.longest_s)
        self._clock = clock
        self._due = 0.0
        self._lately = self._before = 0.0
        self._lately_until = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def longest_s(self) -> float:
        return max(self._lately, self._before)

    def start(self) -> None:
        """Forgets the longest lag of an earlier time."""
        now = self._clock()
        self._due, self._lately_until = now + _TICK_S, now + _LATELY_S
        self._lately = self._before = 0.0
        self._wait()

    def stop(self) -> None:
        """Stopping twice is harmless."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def tick(self) -> None:
        """Notes how late it is now."""
        now = self._clock()
        if now > self._lately_until:
            self._lately, self._before, self._lately_until = 0.0, self._lately, now + _LATELY_S
        late = max(0.0, now - self._due)
        self._lately = max(self._lately, late)
        self.seconds.observe(late)
        for missed in range(1, min(int(late / _TICK_S), _MOST_MISSED) + 1):
            self.seconds.observe(late - missed * _TICK_S)
        self._due = now + _TICK_S

    def _wait(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_TICK_S, self._tick)

    def _tick(self) -> None:
        self.tick()
        self._wait()


class Restarts:
    """What failed unexpectedly in this process, and went on or started again. One for each process."""

    def __init__(
        self, metrics: CollectorRegistry | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._count = Counter(
            "talkoot_task_restarts",
            "Times that a task failed unexpectedly, and was started again or went on.",
            registry=metrics,
        )
        self._clock = clock
        self._lately: dict[str, deque[float]] = {}

    def note(self, name: str) -> None:
        """`name`: what the task does, such as `announce`. One of a few: no peer may choose it."""
        self._count.inc()
        self._lately.setdefault(name, deque(maxlen=_TOO_OFTEN)).append(self._clock())

    @property
    def total(self) -> int:
        return int(total(self._count))

    @property
    def unsteady(self) -> tuple[str, ...]:
        """The tasks that failed too often lately."""
        since = self._clock() - _LATELY_RESTARTED_S
        return tuple(name for name, at in self._lately.items() if len(at) == _TOO_OFTEN and at[0] >= since)


class TimeSlices:
    """For work that many small steps make up: between them, other tasks get a turn whenever a slice is over."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    async def pause(self) -> None:
        """Returns at once while the slice lasts."""
        if time.perf_counter() - self._began > _SLICE_S:
            await asyncio.sleep(0)
            self._began = time.perf_counter()


class TaskSet:
    """Tasks that their owner ends. Each is held until it is done.

    TalkootErrors are left to those who await the task. Any other exception is a mistake in the program, and the loop's
    exception handler logs it at once, not when the task is collected.
    """

    def __init__(self, restarts: Restarts | None = None, first_pause_s: float = _FIRST_PAUSE_S) -> None:
        """`restarts`, `first_pause_s`: of supervised tasks, as in `keep_running`."""
        self._restarts = restarts
        self._first_pause_s = first_pause_s
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def spawn(self, coroutine: Coroutine[Any, Any, T], name: str) -> "asyncio.Task[T]":
        """Starts a task. `name`: what it does, such as `announce this trainer`."""
        task = asyncio.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._note_end)
        return task

    def supervise(self, name: str, run: Step) -> None:
        """Starts a task that is started again whenever it fails."""
        self.spawn(keep_running(name, run, self._restarts, first_pause_s=self._first_pause_s), name)

    async def join(self) -> None:
        """Waits for the tasks that run now, whatever becomes of them. Not for supervised ones, which never end."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @contextmanager
    def including_current(self) -> Iterator[None]:
        """Holds the task that runs now, for callbacks that are tasks of somebody else."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            yield
        finally:
            self._tasks.discard(task)

    async def aclose(self) -> None:
        """Cancels what still runs and waits for it, except for the task that closes. Closing twice is harmless."""
        current = asyncio.current_task()
        while tasks := self._tasks - {current}:  # those that end may have started others
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _note_end(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, TalkootError):
            if self._restarts is not None:
                self._restarts.note(task.get_name())
            context = {"message": f"could not {task.get_name()}", "exception": error, "task": task}
            task.get_loop().call_exception_handler(context)


async def side_by_side(works: Iterable[Coroutine[Any, Any, None]], most: int) -> None:
    """Runs them in their order, a limited number at a time: one that waits for a slow peer does not hold the others up.

    Raises the first exception of any, and ends the others.
    """
    queue = iter(works)

    async def take_turns() -> None:
        for work in queue:
            await work

    tasks = [asyncio.create_task(take_turns()) for _ in range(most)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def first_few(
    works: Iterable[Coroutine[Any, Any, T | None]], enough: int, patience_s: float
) -> list[T]:
    """Runs them in their order, `enough` at the same time, until enough of them gave something other than None.

    Once one has, the rest get `patience_s` seconds more. Raises the first exception of any, and ends the others.
    """
    queue, found = iter(works), list[T]()

    async def take_turns() -> None:
        for work in queue:
            if (result := await work) is not None:
                found.append(result)
                return

    tasks = [asyncio.create_task(take_turns()) for _ in range(enough)]
    try:
        for task in asyncio.as_completed(tasks):
            await task
            if found:
                break
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await asyncio.gather(*tasks)
        return found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def first_of(*works: Coroutine[Any, Any, T]) -> T:
    """Runs them side by side until one ends, and cancels the others. Returns or raises what that one does."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return next(task for task in tasks if task in done).result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def keep_running(
    name: str,
    run: Step,
    restarts: Restarts | None = None,
    *,
    fatal: type[Exception] | tuple[type[Exception], ...] = (),
    first_pause_s: float = _FIRST_PAUSE_S,
) -> None:
    """Runs it until it returns or raises a `fatal` exception. After any other it is logged, counted and run again.

    That includes a CancelledError that something it awaits has raised, unless this task is cancelled itself.
    """
    pause_s, now = first_pause_s, asyncio.get_running_loop().time
    while True:
        began = now()
        try:
            return await run()
        except fatal:
            raise
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and is_cancelled():
                raise
            if restarts is not None:
                restarts.note(name)
            if now() - began > _LONGEST_PAUSE_S:
                pause_s = first_pause_s
            logger.exception("could not %s; trying again in %.0f s", name, pause_s)
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


@contextmanager
def tolerating(name: str, restarts: Restarts | None = None) -> Iterator[None]:
    """Guards one of several things, so that the others are done all the same. TalkootErrors pass, and nothing else."""
    try:
        yield
    except TalkootError:
        raise
    except Exception:
        if restarts is not None:
            restarts.note(name)
        logger.exception("could not %s", name)


class RetryingRounds:
    """Runs the steps of a round, and remembers by the round's name whether the DHT failed in it the last time."""

    def __init__(
        self, again_s: float, metrics: CollectorRegistry | None = None, restarts: Restarts | None = None
    ) -> None:
        """`again_s`: until the next round, in seconds, for the log. `restarts`: counts steps that fail otherwise."""
        self.failures: Counter = Counter(
            "talkoot_dht_failures", "DHT rounds that failed or timed out.", registry=metrics
        )
        self._again_s = again_s
        self._restarts = restarts
        self._failing: set[str] = set()

    @property
    def are_failing(self) -> bool:
        """Whether one of them failed the last time."""
        return bool(self._failing)

    async def run(self, name: str, *steps: Step) -> None:
        """Runs all steps, also when the DHT does not answer in one of them, or one fails unexpectedly."""
        failures = []
        for step in steps:
            try:
                with tolerating(name, self._restarts):
                    await step()
            except UnreachableError as error:
                failures.append(error)
        if failures:
            self.failures.inc()
            self._failing.add(name)
            logger.warning("%s; trying again in %.0f s", failures[0], self._again_s)
        else:
            self._failing.discard(name)
