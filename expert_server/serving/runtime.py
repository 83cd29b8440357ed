"""The work queue and the compute threads of a node.

`Runtime` is the shell around the policy in `batching.py`: the event loop adds work, and a few threads take it in
batches, each for a different expert. A thread that ends a batch starts the next one itself: if it waited for the event
loop, it would be idle meanwhile. Optimizer steps are taken when no batch waits, or before the expert's next batch,
because no answer needs them. Accumulated gradients lead to a step after a while, however few rows they have.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import chain
from math import inf
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from grpc import StatusCode
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from dht.uid import UID
from expert_server.experts.expert import Expert
from expert_server.experts.graphs import SharedPass
from expert_server.experts.grouped import LEAST_ROWS, MOST_EXPERTS, MOST_ROWS
from expert_server.serving.batching import BatchQueue, Entry, Result, WorkItem
from expert_server.serving.compute import can_join, compute, compute_together
from peer.errors import ExpertError, TalkootError
from peer.metrics import SECONDS, start_at_zero

logger: logging.Logger = logging.getLogger(__name__)

T = TypeVar("T")

_MOST_AT_ONCE = 4
"""The most batches at once: more would keep more tensors in memory and gain little."""
_GATHER_S = 0.005
"""How long results wait for others, so that they are reported together: waking the loop for each result would take
processor time from the compute threads. Backward work waits as long for the work of other experts that shares its
forward pass.
"""
_LONGEST_ACCUMULATION_S = 30.0
"""An expert takes a step this long after its first accumulated gradients, even if there are too few rows."""
_BATCH_ROWS = tuple(4.0**power for power in range(8))
_STOPPING = "this node is stopping"


class RuntimeMetrics:
    """What a runtime counts. Its threads use these metrics without a lock."""

    def __init__(self, metrics: CollectorRegistry | None = None) -> None:
        self.batches: Counter = Counter("talkoot_batches", "Batches computed.", registry=metrics)
        self.batch_rows: Histogram = Histogram(
            "talkoot_batch_rows", "Rows in a batch.", registry=metrics, buckets=_BATCH_ROWS
        )
        self.batch_s: Histogram = Histogram(
            "talkoot_batch_seconds", "Time to compute a batch.", registry=metrics, buckets=SECONDS
        )
        self.rows: Counter = Counter("talkoot_rows", "Rows computed, forward and backward.", registry=metrics)
        self.updates: Counter = Counter("talkoot_updates", "Optimizer steps taken.", registry=metrics)
        self.skipped_updates: Counter = Counter(
            "talkoot_skipped_updates",
            "Optimizer steps skipped for gradients that were not finite.",
            registry=metrics,
        )
        self.withheld_updates: Counter = Counter(
            "talkoot_withheld_updates",
            "Backward work without a step, as its caller was held back.",
            registry=metrics,
        )
        self.clipped_rows: Counter = Counter(
            "talkoot_clipped_rows",
            "Rows whose gradients were scaled down, as they were large beside those of other callers.",
            registry=metrics,
        )
        self.rollbacks: Counter = Counter(
            "talkoot_rollbacks", "Experts rolled back to their last good state.", registry=metrics
        )
        self.compute_s: Counter = Counter(
            "talkoot_compute_seconds",
            "Time the compute threads were busy, all together counted as one.",
            registry=metrics,
        )
        failed = Counter(
            "talkoot_failed_work_items", "Work items without a result, by cause.", ["cause"], registry=metrics
        )
        self.failed: Counter = start_at_zero(failed, "expired", "refused", "failed")


class _Task:
    """A function given to `run`, and its future result."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.future: Future[Any] = Future()
        self._function = function

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            result = self._function()
        except TalkootError as error:  # it is raised where the result is awaited
            # without a traceback, which would keep this thread's frames in memory, and the error with them
            self.future.set_exception(error.with_traceback(None))
        except BaseException as error:  # noqa: BLE001  # as above
            self.future.set_exception(error)
        else:
            self.future.set_result(result)

    def refuse(self) -> None:
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(ExpertError(StatusCode.UNAVAILABLE, _STOPPING))


class Runtime:
    """Computes work for the experts of one node in batches, one at a time for each expert.

    Experts with work share the threads: many small batches run side by side, and a large one gets all threads. Call all
    public methods on the event loop's thread; none of them blocks it.
    """

    def __init__(
        self,
        experts: dict[UID, Expert],
        *,
        max_queued_rows: int,
        max_batch_rows: int,
        threads: int,
        clock: Callable[[], float] = time.monotonic,
        metrics: CollectorRegistry | None = None,
    ) -> None:
        """`threads`: for all batches together. `clock`: the clock of deadlines."""
        self.metrics: RuntimeMetrics = RuntimeMetrics(metrics)
        self.trained: set[UID] = set()
        """Experts that have taken a step here."""
        self._clock = clock
        self._lock = threading.Lock()
        """Guards what all threads use: the queue, the experts in service, and the jobs in progress."""
        self._queue = BatchQueue(max_queued_rows, max_batch_rows)
        self._experts = dict(experts)
        self._busy: set[UID] = set()
        """Experts that have a job in progress."""
        self._tasks: deque[_Task] = deque()
        """Functions given to `run`. Each waits until no job is in progress."""
        self._exclusive = self._stopped = False
        self._gathering: dict[SharedPass, tuple[str, set[UID]]] = {}
        """Shared forward passes for which backward work waits until the rest arrives, for at most `_GATHER_S`.

        For each, the caller, and the experts of the work that waits.
        """
        self._due: dict[UID, None] = {}
        """Experts whose optimizer step is due, oldest first."""
        self._accumulating: dict[UID, tuple[int, float]] = {}
        """Experts with accumulated gradients, oldest first: the update count at that time, and when to take a step."""
        self._timer: asyncio.TimerHandle | None = None
        """Wakes the loop when the first of the accumulated gradients must lead to a step."""
        self._running = self._computing = 0
        """Jobs in progress, and how many of them are not steps."""
        self._done: list[tuple[Sequence[Entry], Sequence[Result | ExpertError]]] = []
        """Batches whose results the loop has not delivered yet."""
        self._is_told = self._is_starting = False
        """Whether the loop has been told to deliver results and to start waiting work."""
        self._waiting: set[Entry] = set()
        self._leaving = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._threads = threads
        self._at_once = min(threads, _MOST_AT_ONCE)
        self._pool = ThreadPoolExecutor(max_workers=self._at_once, thread_name_prefix="compute")
        Gauge("talkoot_experts", "Experts hosted.", registry=metrics).set_function(self._experts.__len__)
        waiting = Gauge("talkoot_queued_rows", "Rows that wait to be computed.", registry=metrics)
        waiting.set_function(lambda: self.queued_rows)

    @property
    def experts(self) -> Mapping[UID, Expert]:
        """The experts in service. `add` and `remove` change them."""
        return MappingProxyType(self._experts)

    @property
    def queued_rows(self) -> int:
        """Rows that wait to be computed."""
        return self._queue.rows

    async def start(self) -> None:
        assert self._loop is None, "a runtime starts once"
        self._loop = asyncio.get_running_loop()
        for expert in self._experts.values():
            self._note_accumulation(expert)

    async def stop(self) -> None:
        """Fails waiting work, lets jobs in progress finish, and ends the threads."""
        with self._lock:
            self._stopped = True
            if self._timer is not None:
                self._timer.cancel()
            waiting, tasks = self._queue.clear(), list(self._tasks)
            self._tasks.clear()
        self._fail(waiting, StatusCode.UNAVAILABLE, _STOPPING)
        for task in tasks:
            task.refuse()
        await asyncio.to_thread(self._pool.shutdown)

    def enqueue(self, work: WorkItem) -> Entry:
        """Queues work. The entry's future gets the result; cancelling it takes the work out of the queue.

        Raises ExpertError, as does the future: NOT_FOUND, RESOURCE_EXHAUSTED, DEADLINE_EXCEEDED, UNAVAILABLE or
        INTERNAL.
        """
        if self._loop is None or self._stopped:
            raise ExpertError(StatusCode.UNAVAILABLE, "this node is not serving")
        if work.uid not in self._experts:
            raise ExpertError(StatusCode.NOT_FOUND, _not_hosted(work.uid))
        if self._leaving:
            raise ExpertError(StatusCode.UNAVAILABLE, "this node is leaving")
        entry = self._push(work, self._loop.create_future())
        self._waiting.add(entry)
        entry.future.add_done_callback(partial(self._forget, entry))
        if not self._is_starting:  # later, so that other work from this turn of the loop can join
            self._is_starting = True
            self._loop.call_soon(self._start_enqueued)
        return entry

    def refuse(self, leaving: bool = True) -> None:
        """Refuses new work with UNAVAILABLE from now on, or accepts it again if `leaving` is False."""
        self._leaving = leaving

    @property
    def is_refusing(self) -> bool:
        return self._leaving

    async def settle(self) -> None:
        """Waits until all accepted work is done."""
        while self._waiting:
            await asyncio.wait([entry.future for entry in self._waiting])

    def add(self, expert: Expert) -> None:
        """Puts an expert into service. It replaces one with the same UID."""
        with self._lock:
            self._experts[expert.uid] = expert
            self._note_accumulation(expert)

    def remove(self, uid: UID) -> None:
        """Takes an expert out of service. Waiting work for it fails with NOT_FOUND."""
        with self._lock:
            del self._experts[uid]
            self._due.pop(uid, None)
            self._accumulating.pop(uid, None)
            waiting = self._queue.remove(uid)
        self._fail(waiting, StatusCode.NOT_FOUND, _not_hosted(uid))

    async def run(self, function: Callable[[], T]) -> T:
        """Runs a function on a compute thread while no batch is in progress, ahead of waiting batches.

        Everything else that reads or writes an expert's tensors must use this. Raises what the function raises, and
        ExpertError (UNAVAILABLE) if the runtime stops first.
        """
        task = _Task(function)
        with self._lock:
            if self._stopped:
                raise ExpertError(StatusCode.UNAVAILABLE, _STOPPING)
            self._tasks.append(task)
        self._start()
        try:
            result: T = await asyncio.wrap_future(task.future)
        finally:
            del task  # an error that passes here keeps this frame, and with it itself, in memory
        return result

    def _push(self, work: WorkItem, future: "asyncio.Future[Result]") -> Entry:
        try:
            with self._lock:
                displaced = self._queue.make_room(work)
                retry_after_s = [self._queue.retry_after_s(other.work.caller) for other in displaced]
                entry = self._queue.push(work, future, self._discard)
                if work.shared is not None:
                    self._gather(work, work.shared)
        except ExpertError:
            self.metrics.failed.labels("refused").inc()
            raise
        if displaced:
            self.metrics.failed.labels("refused").inc(len(displaced))
        message = "no room: others wait, and more than your share of the queue was yours"
        for other, seconds in zip(displaced, retry_after_s, strict=True):
            self._fail([other], StatusCode.RESOURCE_EXHAUSTED, message, seconds)
        return entry

    def _gather(self, work: WorkItem, shared: SharedPass) -> None:
        if shared not in self._gathering and self._loop is not None:
            self._loop.call_later(_GATHER_S, self._end_gathering, shared)
        _, uids = self._gathering.setdefault(shared, (work.caller, set()))
        uids.add(work.uid)
        if len(uids) == len(shared.counts):
            del self._gathering[shared]

    def _end_gathering(self, shared: SharedPass) -> None:
        with self._lock:
            was_waiting = self._gathering.pop(shared, None)
        if was_waiting:
            self._start()

    def _forget(self, entry: Entry, future: "asyncio.Future[Result]") -> None:
        self._waiting.remove(entry)
        if future.cancelled():
            self._discard(entry)

    def _discard(self, entry: Entry) -> None:
        with self._lock:
            self._queue.discard(entry)

    def _start_enqueued(self) -> None:
        self._is_starting = False
        self._start()

    def _start(self) -> None:
        """Starts what can start now. Called on any thread whenever work has arrived or ended."""
        with self._lock:
            if self._tasks:
                if not (self._busy or self._exclusive):
                    self._exclusive = True
                    self._pool.submit(self._run_task, self._tasks.popleft())
                return
            jobs: list[list[tuple[Expert, list[Entry]]]] = []
            held: dict[str, set[UID]] = {}
            for caller, uids in self._gathering.values():
                held.setdefault(caller, set()).update(uids)
            while not (self._exclusive or self._stopped) and self._running < self._at_once:
                batch, expired = self._queue.pop(self._clock(), self._busy, held)
                if expired and self._loop is not None:
                    self._loop.call_soon_threadsafe(self._expire, expired)
                if batch:
                    self._busy.add(batch[0].work.uid)
                    alike = [(entry.work.uid, [entry]) for entry in self._alike(batch)]
                    work_of = [(batch[0].work.uid, batch), *alike]
                else:
                    work_of = [(uid, []) for uid in self._free_steps()]
                if not work_of:
                    break
                for uid, _ in work_of:
                    self._due.pop(uid, None)
                    self._busy.add(uid)
                jobs.append([(self._experts[uid], entries) for uid, entries in work_of])
                self._running += 1
                self._computing += bool(batch)
            threads = max(1, self._threads // max(1, self._running))
            for job in jobs:
                self._pool.submit(self._run_batches if job[0][1] else self._run_steps, job, threads)

    def _alike(self, batch: Sequence[Entry]) -> list[Entry]:
        """Work of other experts that can be computed together with a batch. Empty if the batch has several work
        items.
        """
        first = batch[0].work
        if len(batch) != 1 or not self._can_join(first):
            return []
        least = LEAST_ROWS if self._experts[first.uid].grouped_block is not None else 0
        share = max(least, (len(first.rows) + self._queue.rows) // self._at_once)
        return self._queue.pop_alike(batch[0], self._busy, min(share, MOST_ROWS), self._can_join)

    def _can_join(self, work: WorkItem) -> bool:
        return can_join(self._experts[work.uid], work)

    def _free_steps(self) -> list[UID]:
        """An expert whose step is due and which has no job in progress. If it is narrow, together with other such
        experts.
        """
        now = self._clock()
        late = (uid for uid, (_, step_at) in self._accumulating.items() if step_at <= now)
        free = [uid for uid in dict.fromkeys(chain(self._due, late)) if uid not in self._busy]
        narrow = [uid for uid in free if self._experts[uid].grouped_block is not None]
        return narrow[:MOST_EXPERTS] if free[:1] == narrow[:1] else free[:1]

    def _run_task(self, task: "_Task") -> None:
        torch.set_num_threads(self._threads)
        task.run()
        with self._lock:
            self._exclusive = False
        self._start()

    def _run_batches(self, job: Sequence[tuple[Expert, Sequence[Entry]]], threads: int) -> None:
        assert self._loop is not None, "the runtime was started"
        torch.set_num_threads(threads)  # affects only this thread
        began = self._clock()
        batch = [entry for _, entries in job for entry in entries]
        if job[0][0].grouped_block is not None:
            results = self._compute([expert for expert, _ in job], batch)
        else:  # work that isn't computed together fails separately, too
            results = [result for expert, entries in job for result in self._compute([expert], entries)]
        seconds = self._clock() - began
        rows = sum(len(entry.work.rows) for entry in batch)
        for expert, entries in job:
            expert.rows += sum(len(entry.work.rows) for entry in entries)
        self.metrics.batches.inc()
        self.metrics.batch_rows.observe(rows)
        self.metrics.batch_s.observe(seconds)
        self.metrics.rows.inc(rows)
        self.metrics.compute_s.inc(seconds * threads / self._threads)
        with self._lock:
            self._queue.measure(rows, seconds / self._running)
            self._computing -= 1
            self._end(job)
        self._start()
        with self._lock:
            self._done.append((batch, results))
            is_last, is_told, self._is_told = not self._computing, self._is_told, True
        if is_last:
            self._loop.call_soon_threadsafe(self._deliver)
        elif not is_told:
            self._loop.call_soon_threadsafe(self._loop.call_later, _GATHER_S, self._deliver)

    def _run_steps(self, job: Sequence[tuple[Expert, Sequence[Entry]]], threads: int) -> None:
        torch.set_num_threads(threads)
        began = self._clock()
        for expert, _ in job:
            with self._counting_updates([expert]):
                try:
                    self._end_late_accumulation(expert)
                    expert.settle()
                except Exception:  # the thread must continue, as in `_compute`
                    logger.exception("expert %s failed in an optimizer step", expert.uid)
        self.metrics.compute_s.inc((self._clock() - began) * threads / self._threads)
        with self._lock:
            self._end(job)
        self._start()

    def _end(self, job: Sequence[tuple[Expert, Sequence[Entry]]]) -> None:
        self._running -= 1
        for expert, _ in job:
            self._busy.remove(expert.uid)
            if self._experts.get(expert.uid) is expert:
                if expert.step_is_due:
                    self._due[expert.uid] = None
                self._note_accumulation(expert)

    def _note_accumulation(self, expert: Expert) -> None:
        uid, count = expert.uid, expert.update_count
        began_at_count, _ = self._accumulating.get(uid, (None, 0.0))
        if not expert.accumulated_rows:
            self._accumulating.pop(uid, None)
        elif began_at_count != count:
            self._accumulating.pop(uid, None)
            self._accumulating[uid] = count, self._clock() + _LONGEST_ACCUMULATION_S
            if self._timer is None and self._loop is not None:
                self._loop.call_soon_threadsafe(self._set_timer)

    def _set_timer(self) -> None:
        """Sets the timer for the first step of accumulated gradients. Late ones are taken as soon as threads
        are free.
        """
        with self._lock:
            now = self._clock()
            waits_s = (step_at - now for _, step_at in self._accumulating.values() if step_at > now)
            wait_s = min(waits_s, default=None)
            if self._timer is not None:
                self._timer.cancel()
            self._timer = None
            if wait_s is not None and self._loop is not None and not self._stopped:
                self._timer = self._loop.call_later(wait_s, self._look_for_late_steps)

    def _look_for_late_steps(self) -> None:
        self._set_timer()
        self._start()

    def _end_late_accumulation(self, expert: Expert) -> None:
        """Ends a busy expert's accumulation, on the thread that computes it."""
        _, step_at = self._accumulating.get(expert.uid, (0, inf))
        if step_at <= self._clock():
            expert.end_accumulation()

    @contextmanager
    def _counting_updates(self, experts: Sequence[Expert]) -> Iterator[None]:
        """Counts the updates that the experts took, even if the batch fails."""
        before = [(expert.update_count, expert.guard.rollbacks) for expert in experts]
        yield
        for expert, (updates, rollbacks) in zip(experts, before, strict=True):
            if expert.update_count > updates:
                self.trained.add(expert.uid)
            # the count is lower after a rollback to the state before another peer's
            self.metrics.updates.inc(max(0, expert.update_count - updates))
            self.metrics.rollbacks.inc(expert.guard.rollbacks - rollbacks)

    def _compute(self, experts: Sequence[Expert], batch: Sequence[Entry]) -> list[Result | ExpertError]:
        """Computes one batch of one expert, or one work item of each."""
        works = [entry.work for entry in batch]
        with self._counting_updates(experts):
            try:
                for expert in experts:
                    self._end_late_accumulation(expert)
                results = (
                    compute(experts[0], works) if len(experts) == 1 else compute_together(experts, works)
                )
            except Exception as error:  # one broken batch must not end the others
                callers = ", ".join(sorted({entry.work.caller for entry in batch}))
                names = ", ".join(str(expert.uid) for expert in experts)
                logger.exception("expert %s failed on a batch from %s", names, callers)
                message = f"expert {names} failed: {type(error).__name__}"
                results = [ExpertError(StatusCode.INTERNAL, message) for _ in batch]
        for work, result in zip(works, results, strict=True):
            if isinstance(result, ExpertError):
                self.metrics.failed.labels("failed").inc()
                continue
            self.metrics.skipped_updates.inc(result.skipped_update)
            self.metrics.withheld_updates.inc(result.withheld_update)
            self.metrics.clipped_rows.inc(len(work.rows) * result.is_clipped)
        return results

    def _expire(self, entries: Sequence[Entry]) -> None:
        self.metrics.failed.labels("expired").inc(len(entries))
        self._fail(entries, StatusCode.DEADLINE_EXCEEDED, "the deadline passed while this work waited")

    def _deliver(self) -> None:
        with self._lock:
            done, self._done = self._done, []
            self._is_told = False
        for batch, results in done:
            self._give(batch, results)

    def _give(self, batch: Sequence[Entry], results: Sequence[Result | ExpertError]) -> None:
        for entry, result in zip(batch, results, strict=True):
            if entry.future.done():
                continue
            if isinstance(result, ExpertError):
                entry.future.set_exception(result)
            else:
                entry.future.set_result(result)

    def _fail(
        self, entries: Iterable[Entry], status: StatusCode, message: str, retry_after_s: float = 0.0
    ) -> None:
        for entry in entries:
            if not entry.future.done():
                entry.future.set_exception(ExpertError(status, message, retry_after_s=retry_after_s))


def _not_hosted(uid: UID) -> str:
    return f"expert {uid} is not hosted here"
