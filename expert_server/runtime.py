"""From requests to batches to the compute thread.

`Runtime` is the shell around the policy in `batching.py`: the event loop's thread brings work, and one thread takes it
in batches and computes them. The compute thread takes its batches itself: a turn through the loop between two of them
would leave it idle, and the loop is busiest when work waits.

Shape suffixes: R = rows, D = hidden.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import TypeVar

import torch
from grpc import StatusCode
from torch import Tensor

from dht.manifest import Manifest
from dht.uid import UID
from expert_server.batching import BatchQueue, Entry, Work
from expert_server.expert import BackwardPart, Expert, Graph
from peer.errors import ExpertError

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Result:
    """`tensor` [R, D]: outputs in forward, gradients of the inputs in backward; on the CPU, float32."""

    tensor: Tensor
    update_count: int
    graph: Graph | None = None
    """Of a forward pass that was to be kept, unless it was merged with others."""


@dataclass(frozen=True, slots=True)
class _Computed:
    """What one batch brought: a result for each work, and how long it took and what it changed."""

    results: Sequence[Result | ExpertError]
    seconds: float
    updates: int
    skipped_updates: int
    rollbacks: int


@dataclass(slots=True)
class RuntimeStats:
    """Counts since the start; only `queued_rows` is of now. `failed` counts works of batches that failed."""

    batches: int = 0
    rows: int = 0
    updates: int = 0
    skipped_updates: int = 0
    rollbacks: int = 0
    expired: int = 0
    refused: int = 0
    failed: int = 0
    queued_rows: int = 0
    busy_s: float = 0.0


class Runtime:
    """Computes work for the experts of one node, in batches, on one thread.

    All public methods belong to the event loop's thread, and none of them blocks it.
    """

    def __init__(
        self,
        experts: dict[UID, Expert],
        *,
        max_queued_rows: int,
        max_batch_rows: int,
        threads: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`threads`: of torch, within one operation. `clock`: what deadlines are measured by."""
        self._clock = clock
        self._lock = threading.Lock()
        """Of what both threads use: the queue, the experts in service, and the two flags."""
        self._queue = BatchQueue(max_queued_rows, max_batch_rows)
        self._experts = dict(experts)
        self._computing = False
        """Whether the thread computes a batch, or will look for one."""
        self._stopped = False
        self._waiting: dict[Entry, asyncio.Future[Result]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stats = RuntimeStats()
        self._thread = ThreadPoolExecutor(
            max_workers=1,
            thread_name_prefix="compute",
            initializer=torch.set_num_threads,
            initargs=(threads,),
        )

    @property
    def experts(self) -> Mapping[UID, Expert]:
        """The experts in service; `add` and `remove` change them."""
        return MappingProxyType(self._experts)

    @property
    def stats(self) -> RuntimeStats:
        """The counters as they are now."""
        return replace(self._stats, queued_rows=self._queue.rows)

    async def start(self) -> None:
        assert self._loop is None, "a runtime starts once"
        self._loop = asyncio.get_running_loop()

    async def stop(self) -> None:
        """Fails the work that waits, lets the batch that is being computed end, and ends the thread."""
        with self._lock:
            self._stopped = True
            waiting = self._queue.clear()
        self._fail(waiting, StatusCode.UNAVAILABLE, "this node is stopping")
        await asyncio.to_thread(self._thread.shutdown)

    async def submit(self, work: Work) -> Result:
        """Waits for the result; when cancelled, takes the work out of the queue.

        Raises ExpertError: NOT_FOUND, RESOURCE_EXHAUSTED, DEADLINE_EXCEEDED, UNAVAILABLE or INTERNAL.
        """
        if self._loop is None or self._stopped:
            raise ExpertError(StatusCode.UNAVAILABLE, "this node is not serving")
        if work.uid not in self._experts:
            raise ExpertError(StatusCode.NOT_FOUND, _not_hosted(work.uid))
        entry = self._push(work)
        self._waiting[entry] = self._loop.create_future()
        self._loop.call_soon(self._wake_thread)  # not now: what else this turn of the loop brings may join
        try:
            return await self._waiting[entry]
        finally:
            del self._waiting[entry]
            with self._lock:
                self._queue.discard(entry)

    def add(self, expert: Expert) -> None:
        """Takes an expert into service, in place of one with the same UID."""
        with self._lock:
            self._experts[expert.uid] = expert

    def remove(self, uid: UID) -> None:
        """Takes an expert out of service; the work that waits for it fails with NOT_FOUND."""
        with self._lock:
            del self._experts[uid]
            waiting = self._queue.remove(uid)
        self._fail(waiting, StatusCode.NOT_FOUND, _not_hosted(uid))

    async def build(self, uid: UID, manifest: Manifest) -> Expert:
        """Builds an expert and takes it into service."""
        expert = await self.run(partial(Expert, uid, manifest))
        self.add(expert)
        return expert

    async def run(self, function: Callable[[], T]) -> T:
        """Runs a function on the compute thread, between two batches.

        Whatever reads or writes an expert's tensors goes this way.
        """
        if self._stopped:
            raise ExpertError(StatusCode.UNAVAILABLE, "this node is stopping")
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    def _push(self, work: Work) -> Entry:
        try:
            with self._lock:
                displaced = self._queue.make_room(work)
                entry = self._queue.push(work)
        except ExpertError:
            self._stats.refused += 1
            raise
        self._stats.refused += len(displaced)
        for other in displaced:
            message = "no room: others wait, and more than your share of the queue was yours"
            retry_after_s = self._queue.retry_after_s(other.work.caller)
            self._fail([other], StatusCode.RESOURCE_EXHAUSTED, message, retry_after_s)
        return entry

    def _wake_thread(self) -> None:
        with self._lock:
            if not (self._computing or self._stopped):
                self._computing = True
                self._thread.submit(self._compute_next)

    def _compute_next(self) -> None:
        """On the compute thread: computes one batch, and comes back for the next behind what `run` has brought."""
        assert self._loop is not None, "the runtime was started"
        with self._lock:
            batch, expired = self._queue.pop(self._clock())
            expert = self._experts[batch[0].work.uid] if batch else None
        if expired:
            self._loop.call_soon_threadsafe(self._expire, expired)
        if expert is not None:
            self._loop.call_soon_threadsafe(self._finish, batch, self._compute(expert, batch))
        with self._lock:
            self._computing = bool(self._queue.rows) and not self._stopped
            if self._computing:
                self._thread.submit(self._compute_next)

    def _compute(self, expert: Expert, batch: Sequence[Entry]) -> "_Computed":
        updates, skipped, rollbacks = expert.update_count, expert.skipped_updates, expert.guard.rollbacks
        start = self._clock()
        try:
            results = compute(expert, [entry.work for entry in batch])
        except Exception as error:
            # the outermost loop of the role: one broken batch must not end the others
            callers = ", ".join(sorted({entry.work.caller for entry in batch}))
            logger.exception("expert %s failed on a batch from %s", expert.uid, callers)
            message = f"expert {expert.uid} failed: {type(error).__name__}"
            results = [ExpertError(StatusCode.INTERNAL, message) for _ in batch]
        return _Computed(
            results,
            self._clock() - start,
            expert.update_count - updates,
            expert.skipped_updates - skipped,
            expert.guard.rollbacks - rollbacks,
        )

    def _expire(self, entries: Sequence[Entry]) -> None:
        self._stats.expired += len(entries)
        self._fail(entries, StatusCode.DEADLINE_EXCEEDED, "the deadline passed while this work waited")

    def _finish(self, batch: Sequence[Entry], computed: "_Computed") -> None:
        rows = sum(entry.work.rows for entry in batch)
        with self._lock:
            self._queue.measure(rows, computed.seconds)
        stats = self._stats
        stats.batches += 1
        stats.rows += rows
        stats.failed += sum(isinstance(result, ExpertError) for result in computed.results)
        stats.busy_s += computed.seconds
        stats.updates += computed.updates
        stats.skipped_updates += computed.skipped_updates
        stats.rollbacks += computed.rollbacks
        self._deliver(batch, computed.results)

    def _deliver(self, batch: Sequence[Entry], results: Sequence[Result | ExpertError]) -> None:
        for entry, result in zip(batch, results, strict=True):
            future = self._waiting.get(entry)
            if future is None or future.done():
                continue
            if isinstance(result, ExpertError):
                future.set_exception(result)
            else:
                future.set_result(result)

    def _fail(
        self, entries: Iterable[Entry], status: StatusCode, message: str, retry_after_s: float = 0.0
    ) -> None:
        for entry in entries:
            future = self._waiting.get(entry)
            if future is not None and not future.done():
                future.set_exception(ExpertError(status, message, retry_after_s=retry_after_s))


def compute(expert: Expert, batch: Sequence[Work]) -> list[Result | ExpertError]:
    """Computes work of one expert and direction as one batch, in backward with one optimizer step.

    When the batch fails each work is computed by itself, so that one caller's numbers spoil no other's.
    """
    step = _forward if batch[0].direction == "forward" else _backward
    skipped = expert.skipped_updates
    try:
        results: list[Result | ExpertError] = list(step(expert, batch))
        if len(batch) == 1 or expert.skipped_updates == skipped:
            return results
        expert.skipped_updates = skipped  # whose gradients they were, the works tell one by one
    except ExpertError as error:
        if len(batch) == 1:
            return [error]
    alone = [replace(work, graph=None) for work in batch]  # graphs are used up
    return [result for work in alone for result in compute(expert, [work])]


def _forward(expert: Expert, batch: Sequence[Work]) -> list[Result]:
    if len(batch) == 1 and batch[0].keep:
        work = batch[0]
        output_RD, graph = expert.forward_with_graph(work.inputs, work.lengths, work.positions)
        return [Result(output_RD, expert.update_count, graph)]
    output_RD = expert.forward(
        _joined([work.inputs for work in batch]),
        _joined([work.lengths for work in batch]),
        _joined([work.positions for work in batch]),
    )
    parts = torch.split(output_RD, [work.rows for work in batch])
    return [Result(part, expert.update_count) for part in parts]


def _backward(expert: Expert, batch: Sequence[Work]) -> list[Result]:
    """Works with a good graph go by themselves, the others as one; all of them before one optimizer step."""
    ready = [work for work in batch if expert.is_current(work.graph)]
    others = [work for work in batch if not expert.is_current(work.graph)]
    parts = [_part([work], work.graph) for work in ready]
    if others:
        parts.append(_part(others, None))
    gradients = expert.backward(parts)
    by_work = dict(zip(ready, gradients, strict=False))
    if others:
        split = torch.split(gradients[-1], [work.rows for work in others])
        by_work |= dict(zip(others, split, strict=True))
    return [Result(by_work[work], expert.update_count) for work in batch]


def _part(works: Sequence[Work], graph: Graph | None) -> BackwardPart:
    return BackwardPart(
        _joined([work.inputs for work in works]),
        _joined([work.gradients for work in works if work.gradients is not None]),
        _joined([work.lengths for work in works]),
        _joined([work.positions for work in works]),
        graph,
    )


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _not_hosted(uid: UID) -> str:
    return f"expert {uid} is not hosted here"
