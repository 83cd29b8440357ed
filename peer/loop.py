"""The asyncio loop of a process, the tasks on it, and what happens when they fail.

A node runs its loop on the main thread, a trainer on a thread beside torch. Errors of peers and of the DHT are
expected: each task handles them, and rounds are tried again (`RetryingRounds`). Any other exception is a bug, and a
stranger may know how to trigger it. It never ends the process: it is logged and counted (`Restarts`), and the task is
restarted (`keep_running`) or continues with its next work (`tolerating`).
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from peer.errors import TalkootError, UnreachableError
from peer.metrics import SECONDS
from peer.platform.loop import new_event_loop, result_of

logger: logging.Logger = logging.getLogger(__name__)

T = TypeVar("T")
Step: TypeAlias = Callable[[], Coroutine[Any, Any, None]]

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
"""Pauses before a task is started again. They double with each failure, until the task has run for the longest one."""

_TOO_OFTEN, _LATELY_RESTARTED_S = 3, 900.0
"""A task that fails this often within this many seconds is unsteady."""

_CLOSE_S = 30.0
"""The longest wait for a loop's thread: `close` of uvloop waits for handles that are open and can't be closed."""
_CLEAN_UP_S = 20.0
"""The longest wait for cancelled tasks before their loop is closed."""
_SLICE_S = 0.002
"""A slice lasts as long as 20 signatures take to check."""
_LONGEST_AGAIN_S = 5.0
"""The longest pause before a round is tried again: others wait at most a minute for an announcement that is late."""
_TICK_S = 0.025
_LATELY_S = 60.0
_MOST_MISSED = 4000
"""The most ticks that one late tick stands for: as many as a stall of 100 s misses."""


def is_cancelled() -> bool:
    """Whether this task was cancelled, and not just the call that it awaits.

    gRPC cancels the calls of a channel that is closed, for example when a pool makes room.
    """
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


def new_loop() -> asyncio.AbstractEventLoop:
    """A loop that does not log two things that are not errors.

    One is a stream's handler that was cancelled, which Python 3.11 takes for an error. The other is a gRPC call that
    ended after its loop was closed: all loops of a process share gRPC's queue, so another loop hears of it.
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
        self._end: asyncio.Future[None] = self.loop.create_future()
        self._is_ending = False
        self._submitting = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="talkoot-loop", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        """Runs the coroutine on the loop and waits for its result. Never call it on the loop's own thread.

        A KeyboardInterrupt or a TimeoutError while it waits cancels the coroutine.
        """
        assert threading.current_thread() is not self._thread, "run() would wait for itself"
        future = self.submit(coroutine)
        try:
            return result_of(future, timeout_s)
        except BaseException:
            future.cancel()
            raise

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> "Future[T]":
        """Starts the coroutine on the loop. Raises RuntimeError once the loop is closing: nothing would ever end it."""
        with self._submitting:
            if self._is_ending:
                coroutine.close()
                raise RuntimeError("the event loop is closed")
            return asyncio.run_coroutine_threadsafe(_traced(coroutine), self.loop)

    def close(self) -> None:
        """Cancels what still runs, waits for it, and ends the thread. Closing twice is harmless."""
        if self.loop.is_closed():
            return
        self.loop.call_soon_threadsafe(self._finish)
        self._thread.join(_CLOSE_S)
        if self._thread.is_alive():
            logger.warning("the event loop did not close within %.0f s, and is left as it is", _CLOSE_S)

    def _finish(self) -> None:
        if not self._end.done():
            self._end.set_result(None)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self._run_until(self._end)
        with self._submitting:
            self._is_ending = True
        self._run_until(self.loop.create_task(asyncio.sleep(0)))  # starts what was submitted before
        # tasks that were cancelled before this clean up first: another cancel would cut that short
        if ending := [task for task in asyncio.all_tasks(self.loop) if task.cancelling()]:
            self._run_until(self.loop.create_task(asyncio.wait(ending, timeout=_CLEAN_UP_S)))
        left = asyncio.all_tasks(self.loop)
        for task in left:
            task.cancel()
        if left:
            self._run_until(asyncio.gather(*left, return_exceptions=True))
        self._run_until(self.loop.create_task(self.loop.shutdown_asyncgens()))
        self._run_until(self.loop.create_task(self.loop.shutdown_default_executor()))
        self.loop.close()

    def _run_until(self, done: "asyncio.Future[Any]") -> None:
        """A SystemExit or a KeyboardInterrupt ends the task that raised it and stops the loop. So the loop is started
        again: otherwise, everybody who waits for another task would wait forever.
        """
        while not done.done():
            try:
                self.loop.run_until_complete(done)
            except (SystemExit, KeyboardInterrupt):
                logger.exception("the event loop was stopped, and continues")


class _TracedTimeoutError(TimeoutError):
    """Says where it was raised. asyncio copies a plain TimeoutError for another thread, and drops its traceback."""


async def _traced(coroutine: Coroutine[Any, Any, T]) -> T:
    try:
        return await coroutine
    except TimeoutError as error:
        if type(error) is not TimeoutError:
            raise
        raise _TracedTimeoutError(*error.args) from error


class LoopLag:
    """Measures how late the loop is, by a timer of its own. Call its methods on the loop's thread.

    While a callback blocks the loop, the timer can't fire. So a late tick stands for all ticks that were missed, and
    each is counted as late as it would have been. So the histogram's quantiles are weighted by time: they say how long
    an event at a random moment has to wait.
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
        """Starts the timer, and forgets the longest lag so far."""
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
        """Records how late the timer is now."""
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
    """Counts what failed unexpectedly in this process and then continued or was restarted. One for each process."""

    def __init__(
        self, metrics: CollectorRegistry | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.count: Counter = Counter(
            "talkoot_task_restarts",
            "Times that a task failed unexpectedly, and was started again or went on.",
            registry=metrics,
        )
        self._clock = clock
        self._lately: dict[str, deque[float]] = {}

    def note(self, name: str) -> None:
        """`name`: what the task does, such as `announce`. It is one of a few names; no peer may choose it."""
        self.count.inc()
        self._lately.setdefault(name, deque(maxlen=_TOO_OFTEN)).append(self._clock())

    @property
    def unsteady(self) -> tuple[str, ...]:
        """The tasks that have failed too often lately."""
        since = self._clock() - _LATELY_RESTARTED_S
        return tuple(name for name, at in self._lately.items() if len(at) == _TOO_OFTEN and at[0] >= since)


class TimeSlices:
    """For work of many small steps: whenever a time slice is over, other tasks get a turn."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    async def pause(self) -> None:
        """Returns at once until the slice is over."""
        if time.perf_counter() - self._began > _SLICE_S:
            await asyncio.sleep(0)
            self._began = time.perf_counter()


class TaskSet:
    """Tasks that their owner ends. The set holds a reference to each until it is done.

    TalkootErrors are left to those who await the task. Any other exception is a bug, which the loop's exception handler
    logs at once.
    """

    def __init__(self, restarts: Restarts | None = None, first_pause_s: float = _FIRST_PAUSE_S) -> None:
        """`restarts`, `first_pause_s`: for supervised tasks, as in `keep_running`."""
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
        """Waits until the current tasks have ended, successfully or not. Not for supervised ones, which never end."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @contextmanager
    def including_current(self) -> Iterator[None]:
        """Adds the current task to the set, for callbacks that run in tasks which others made."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            yield
        finally:
            self._tasks.discard(task)

    async def aclose(self) -> None:
        """Cancels all tasks but the current one, and waits for them. Closing twice is harmless."""
        current = asyncio.current_task()
        while tasks := self._tasks - {current}:  # tasks that end may have started others
            await cancel_all(tasks)

    def _note_end(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, TalkootError):
            if self._restarts is not None:
                self._restarts.note(task.get_name())
            context = {"message": f"could not {task.get_name()}", "exception": error, "task": task}
            task.get_loop().call_exception_handler(context)


async def cancel_all(tasks: Collection["asyncio.Task[Any]"]) -> None:
    """Cancels the tasks, and waits until they have ended and their callbacks have run."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    # from Python 3.12 on, `gather` returns at once if all have ended, and lets no callback run
    await asyncio.sleep(0)


async def to_thread_whole(function: Callable[..., T], *arguments: Any) -> T:
    """`asyncio.to_thread`, but if it is cancelled, it first waits for the function's end. For writes: a thread can't be
    cancelled, and the next write must not begin before it has ended.
    """
    running = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise


async def to_daemon_thread(function: Callable[..., T], *arguments: Any) -> T:
    """`asyncio.to_thread`, but if it is cancelled, neither the loop's end nor that of the process waits for the
    function. For what may take long, and leaves nothing half-done.
    """
    result: Future[T] = Future()

    def run() -> None:
        result.set_running_or_notify_cancel()
        try:
            result.set_result(function(*arguments))
        except BaseException as error:  # noqa: BLE001  # raised where the result is awaited
            result.set_exception(error)

    threading.Thread(target=run, name="talkoot-daemon", daemon=True).start()
    return await asyncio.wrap_future(result)


async def side_by_side(works: Iterable[Coroutine[Any, Any, None]], most: int) -> None:
    """Runs the works in order, at most `most` at a time, so that one that waits for a slow peer does not hold up the
    others.

    Raises the first exception, and ends the others.
    """
    queue = iter(works)

    async def take_turns() -> None:
        for work in queue:
            await work

    tasks = [asyncio.create_task(take_turns()) for _ in range(most)]
    try:
        await asyncio.gather(*tasks)
    finally:
        await cancel_all(tasks)
        tasks.clear()  # as in `first_of`


async def first_few(
    works: Iterable[Coroutine[Any, Any, T | None]], enough: int, patience_s: float
) -> list[T]:
    """Runs the works in order, `enough` at a time, until `enough` of them have returned something other than None.

    Once one has, the others get `patience_s` more seconds. Raises the first exception, and ends the others.
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
        await cancel_all(tasks)


async def first_success(
    works: Iterable[Coroutine[Any, Any, T | None]],
    head_start_s: float,
    drop: Callable[[T], object] = lambda result: None,
) -> T | None:
    """The first result other than None; None if no work has one. Starts the works in order: the next one when one has
    ended, or after `head_start_s`, and then beside the others.

    `drop` is called with results that are not returned. Raises the first exception, and ends the others.
    """
    queue, running = iter(works), set[asyncio.Task[T | None]]()
    found: T | None = None
    try:
        while found is None:
            if (work := next(queue, None)) is not None:
                running.add(asyncio.create_task(work))
            elif not running:
                break
            patience_s = None if work is None else head_start_s
            done, _ = await asyncio.wait(running, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if found is None:
                    running.discard(task)
                    found = task.result()
        return found
    finally:
        try:
            await cancel_all(running)
        except asyncio.CancelledError:  # while others end: nobody gets what was found
            if found is not None:
                drop(found)
            raise
        finally:
            for task in running:
                if not task.cancelled() and task.exception() is None and (late := task.result()) is not None:
                    drop(late)


async def first_of(*works: Coroutine[Any, Any, T]) -> T:
    """Runs the works side by side until one ends, and cancels the others. Returns or raises what that one does."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return next(task for task in tasks if task.done()).result()
    finally:
        await cancel_all(tasks)
        tasks.clear()  # an error that passes here keeps this frame, and with it itself, in memory


async def keep_running(
    name: str,
    run: Step,
    restarts: Restarts | None = None,
    *,
    fatal: type[Exception] | tuple[type[Exception], ...] = (),
    first_pause_s: float = _FIRST_PAUSE_S,
) -> None:
    """Runs `run` until it returns or raises a `fatal` exception. Any other exception is logged and counted, and `run`
    is called again. So is a CancelledError from something that it awaits, unless this task itself was cancelled.
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
    """Guards one of several works: if it fails unexpectedly, the others are still done. TalkootErrors are raised."""
    try:
        yield
    except TalkootError:
        raise
    except Exception:
        if restarts is not None:
            restarts.note(name)
        logger.exception("could not %s", name)


class RetryingRounds:
    """Runs the steps of a round, and remembers for each round whether the DHT failed in it the last time."""

    def __init__(
        self, every_s: float, metrics: CollectorRegistry | None = None, restarts: Restarts | None = None
    ) -> None:
        """`every_s`: the shortest time between two rounds, in seconds. `restarts`: counts other failures of steps."""
        self.failures: Counter = Counter(
            "talkoot_dht_failures", "DHT rounds that failed or timed out.", registry=metrics
        )
        self._again_s = min(every_s / 2, _LONGEST_AGAIN_S)
        self._restarts = restarts
        self._failing: set[str] = set()

    @property
    def are_failing(self) -> bool:
        """Whether the DHT failed in any round the last time."""
        return bool(self._failing)

    async def run(self, name: str, *steps: Step) -> bool:
        """Runs all steps, even if the DHT does not answer in one of them, or one fails unexpectedly. Returns whether it
        answered in all.
        """
        failures = []
        for step in steps:
            try:
                with tolerating(name, self._restarts):
                    await step()
            except UnreachableError as error:
                failures.append(str(error))  # not its traceback, which would keep this frame in memory
        if failures:
            self.failures.inc()
            self._failing.add(name)
            logger.warning("%s; trying again", failures[0])
        else:
            self._failing.discard(name)
        return not failures

    async def insist(self, name: str, *steps: Step) -> bool:
        """Runs all steps. If the DHT does not answer in one of them, all are soon tried once more: a peer that had to
        rejoin must announce everything again. Returns whether it answered in all in the end.
        """
        if await self.run(name, *steps):
            return True
        await asyncio.sleep(self._again_s)
        return await self.run(name, *steps)
