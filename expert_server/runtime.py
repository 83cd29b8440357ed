"""From requests to batches to the compute thread.

`BatchQueue` is the policy: it reads no clock and does no I/O. `Runtime` is the shell around it: one
asyncio task that takes batches, and one thread that computes them.

Shape suffixes: R = rows, S = segments, D = hidden.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from heapq import heapify, heappop, heappush
from itertools import count
from types import MappingProxyType
from typing import Literal, TypeAlias, TypeVar

import torch
from grpc import StatusCode
from torch import Tensor

from dht.manifest import Manifest
from dht.uid import UID
from expert_server.expert import BackwardPart, Expert, Graph
from peer.errors import ExpertError

T = TypeVar("T")
Direction: TypeAlias = Literal["forward", "backward"]
Key: TypeAlias = tuple[UID, Direction]

logger = logging.getLogger(__name__)

_RATE_MEMORY = 0.9  # weight that the measured rate keeps at each new batch
_RETRY_UNMEASURED_S = 1.0
_RETRY_LEAST_S, _RETRY_MOST_S = 0.05, 30.0


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """One expert's part of one call, validated. Floats are float32, integers int64."""

    uid: UID
    direction: Direction
    inputs: Tensor
    """[R, D]"""
    gradients: Tensor | None
    """[R, D], of the outputs; none in forward."""
    lengths: Tensor
    """[S], each at least 1, summing to R."""
    positions: Tensor
    """[R]"""
    deadline: float
    """Monotonic seconds, after which nobody waits for the result."""
    caller: str
    """Who asks, for the log."""
    keep: bool = False
    """In forward: whether a backward call is meant to follow."""
    graph: Graph | None = None
    """In backward: what the forward pass kept, if anything."""

    def __post_init__(self) -> None:
        assert (self.gradients is None) == (self.direction == "forward"), "gradients belong to backward alone"

    @property
    def rows(self) -> int:
        return self.inputs.shape[0]

    @property
    def key(self) -> Key:
        return self.uid, self.direction


@dataclass(slots=True, eq=False)
class Entry:
    """Work in the queue, known by identity; `order` counts arrivals."""

    work: Work
    order: int
    queued: bool = True


@dataclass(slots=True)
class Result:
    """`tensor` [R, D]: outputs in forward, gradients of the inputs in backward; on the CPU, float32."""

    tensor: Tensor
    update_count: int
    graph: Graph | None = None
    """Of a forward pass that was to be kept, unless it was merged with others."""


class BatchQueue:
    """Bounded queue that merges work of one expert and direction into batches, earliest deadline first."""

    def __init__(self, max_queued_rows: int, max_batch_rows: int) -> None:
        self.rows = 0
        self._max_queued_rows = max_queued_rows
        self._max_batch_rows = max_batch_rows
        self._order = count()
        self._entries: dict[Key, list[tuple[float, int, Entry]]] = {}
        """A heap for each key; none is empty."""
        self._heads: list[tuple[float, int, Key]] = []
        """A heap with the head of every heap in `_entries`, and some that are heads no more."""
        self._measured_rows = self._measured_s = 0.0

    def push(self, work: Work, now: float) -> Entry:
        """Raises ExpertError (RESOURCE_EXHAUSTED) when the rows don't fit beside those that wait."""
        if self.rows + work.rows > self._max_queued_rows:
            raise ExpertError(
                StatusCode.RESOURCE_EXHAUSTED,
                f"no room for {work.rows} rows: {self.rows} of at most {self._max_queued_rows} wait already",
                retry_after_s=self.retry_after_s(),
            )
        entry = Entry(work, next(self._order))
        heappush(self._entries.setdefault(work.key, []), (work.deadline, entry.order, entry))
        self.rows += work.rows
        if self._entries[work.key][0][2] is entry:
            self._note_head(work.key)
        return entry

    def pop(self, now: float) -> tuple[list[Entry], list[Entry]]:
        """Takes the next batch, and apart from it all work whose deadline has passed."""
        expired: list[Entry] = []
        while (key := self._first_key()) is not None:
            if self._entries[key][0][0] > now:
                return self._take_batch(key), expired
            expired.append(self._take(key))
        return [], expired

    def discard(self, entry: Entry) -> None:
        """Takes out work that nobody waits for; no matter if it is out already."""
        if entry.queued:
            key = entry.work.key
            self._entries[key] = [item for item in self._entries[key] if item[2] is not entry]
            heapify(self._entries[key])
            self._removed(entry)
            self._head_changed(key)

    def remove(self, uid: UID) -> list[Entry]:
        """Takes out all work for one expert."""
        directions: tuple[Direction, ...] = ("forward", "backward")
        removed = [item[2] for d in directions for item in self._entries.pop((uid, d), [])]
        return [self._removed(entry) for entry in removed]

    def clear(self) -> list[Entry]:
        """Takes out everything."""
        return [entry for uid in {uid for uid, _ in self._entries} for entry in self.remove(uid)]

    def measure(self, rows: int, seconds: float) -> None:
        """Notes how long a batch took."""
        self._measured_rows = _RATE_MEMORY * self._measured_rows + rows
        self._measured_s = _RATE_MEMORY * self._measured_s + seconds

    def retry_after_s(self) -> float:
        """Estimates when the work that waits now will be done, from the measured rows per second."""
        if not self._measured_rows:
            return _RETRY_UNMEASURED_S
        estimate = self.rows * self._measured_s / self._measured_rows
        return min(max(estimate, _RETRY_LEAST_S), _RETRY_MOST_S)

    def _take_batch(self, key: Key) -> list[Entry]:
        batch = [self._take(key)]
        rows = batch[0].work.rows
        while key in self._entries:
            rows += self._entries[key][0][2].work.rows
            if rows > self._max_batch_rows:
                break
            batch.append(self._take(key))
        return batch

    def _take(self, key: Key) -> Entry:
        entry = heappop(self._entries[key])[2]
        self._head_changed(key)
        return self._removed(entry)

    def _removed(self, entry: Entry) -> Entry:
        entry.queued = False
        self.rows -= entry.work.rows
        return entry

    def _head_changed(self, key: Key) -> None:
        if self._entries[key]:
            self._note_head(key)
        else:
            del self._entries[key]

    def _first_key(self) -> Key | None:
        """The key whose work has the earliest deadline."""
        while self._heads:
            _, order, key = self._heads[0]
            if key in self._entries and self._entries[key][0][1] == order:
                return key
            heappop(self._heads)
        return None

    def _note_head(self, key: Key) -> None:
        deadline, order, _ = self._entries[key][0]
        heappush(self._heads, (deadline, order, key))
        if len(self._heads) > 2 * len(self._entries) + 64:
            self._heads = [(items[0][0], items[0][1], key) for key, items in self._entries.items()]
            heapify(self._heads)


@dataclass(slots=True)
class RuntimeStats:
    """Counts since the start; only `queued_rows` is of now. `failed` counts works of batches that failed."""

    batches: int = 0
    rows: int = 0
    updates: int = 0
    skipped_updates: int = 0
    expired: int = 0
    refused: int = 0
    failed: int = 0
    queued_rows: int = 0
    busy_s: float = 0.0


class Runtime:
    """Computes work for the experts of one node, in batches, on one thread.

    All methods belong to the event loop's thread, and none of them blocks it.
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
        self._experts = dict(experts)
        self._clock = clock
        self._queue = BatchQueue(max_queued_rows, max_batch_rows)
        self._waiting: dict[Entry, asyncio.Future[Result]] = {}
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._stopped = False
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
        assert self._task is None, "a runtime starts once"
        self._task = asyncio.create_task(self._serve(), name="expert runtime")

    async def stop(self) -> None:
        """Fails the work that waits, lets the batch that is being computed end, and ends the thread."""
        self._stopped = True
        self._fail(self._queue.clear(), StatusCode.UNAVAILABLE, "this node is stopping")
        self._wake.set()
        try:
            if self._task is not None:
                await asyncio.shield(self._task)
        finally:
            await asyncio.to_thread(self._thread.shutdown)

    async def submit(self, work: Work) -> Result:
        """Waits for the result; when cancelled, takes the work out of the queue.

        Raises ExpertError: NOT_FOUND, RESOURCE_EXHAUSTED, DEADLINE_EXCEEDED, UNAVAILABLE or INTERNAL.
        """
        if self._task is None or self._stopped:
            raise ExpertError(StatusCode.UNAVAILABLE, "this node is not serving")
        if work.uid not in self._experts:
            raise ExpertError(StatusCode.NOT_FOUND, _not_hosted(work.uid))
        try:
            entry = self._queue.push(work, self._clock())
        except ExpertError:
            self._stats.refused += 1
            raise
        self._waiting[entry] = asyncio.get_running_loop().create_future()
        self._wake.set()
        try:
            return await self._waiting[entry]
        finally:
            del self._waiting[entry]
            self._queue.discard(entry)

    def add(self, expert: Expert) -> None:
        """Takes an expert into service, in place of one with the same UID."""
        self._experts[expert.uid] = expert

    def remove(self, uid: UID) -> None:
        """Takes an expert out of service; the work that waits for it fails with NOT_FOUND."""
        del self._experts[uid]
        self._fail(self._queue.remove(uid), StatusCode.NOT_FOUND, _not_hosted(uid))

    async def build(self, uid: UID, manifest: Manifest, device: torch.device | str = "cpu") -> Expert:
        """Builds an expert and takes it into service."""
        expert = await self.run(partial(Expert, uid, manifest, device))
        self.add(expert)
        return expert

    async def run(self, function: Callable[[], T]) -> T:
        """Runs a function on the compute thread, between two batches.

        Whatever reads or writes an expert's tensors goes this way.
        """
        if self._stopped:
            raise ExpertError(StatusCode.UNAVAILABLE, "this node is stopping")
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def _serve(self) -> None:
        while not self._stopped:
            batch, expired = self._queue.pop(self._clock())
            self._stats.expired += len(expired)
            self._fail(expired, StatusCode.DEADLINE_EXCEEDED, "the deadline passed while this work waited")
            if batch:
                await self._run_batch(batch)
            elif not expired:
                self._wake.clear()
                await self._wake.wait()

    async def _run_batch(self, batch: list[Entry]) -> None:
        expert = self._experts[batch[0].work.uid]
        updates, skipped, start = expert.update_count, expert.skipped_updates, self._clock()
        try:
            results = await self.run(partial(compute, expert, [entry.work for entry in batch]))
        except ExpertError as error:  # the runtime was stopped
            self._fail(batch, error.status, str(error))
        except Exception as error:
            # the outermost loop of the role: one broken batch must not end the others
            callers = ", ".join(sorted({entry.work.caller for entry in batch}))
            logger.exception("expert %s failed on a batch from %s", expert.uid, callers)
            self._stats.failed += len(batch)
            self._fail(batch, StatusCode.INTERNAL, f"expert {expert.uid} failed: {type(error).__name__}")
        else:
            rows = sum(entry.work.rows for entry in batch)
            self._queue.measure(rows, self._clock() - start)
            self._stats.rows += rows
            self._stats.failed += sum(isinstance(result, ExpertError) for result in results)
            self._deliver(batch, results)
        self._stats.batches += 1
        self._stats.busy_s += self._clock() - start
        self._stats.updates += expert.update_count - updates
        self._stats.skipped_updates += expert.skipped_updates - skipped

    def _deliver(self, batch: list[Entry], results: Sequence[Result | ExpertError]) -> None:
        for entry, result in zip(batch, results, strict=True):
            future = self._waiting.get(entry)
            if future is None or future.done():
                continue
            if isinstance(result, ExpertError):
                future.set_exception(result)
            else:
                future.set_result(result)

    def _fail(self, entries: Iterable[Entry], status: StatusCode, message: str) -> None:
        for entry in entries:
            future = self._waiting.get(entry)
            if future is not None and not future.done():
                future.set_exception(ExpertError(status, message))


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
