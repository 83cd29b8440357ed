"""From requests to batches to the compute thread.

`Runtime` is the shell around the policy in `batching.py`: one asyncio task that takes batches, and one thread that
computes them.

Shape suffixes: R = rows, D = hidden.
"""

import asyncio
import logging
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
        self._leaving = False
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
        if self._leaving:
            raise ExpertError(StatusCode.UNAVAILABLE, "this node is leaving")
        if work.uid not in self._experts:
            raise ExpertError(StatusCode.NOT_FOUND, _not_hosted(work.uid))
        self._refuse(self._queue.make_room(work))
        try:
            entry = self._queue.push(work)
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

    def refuse(self, leaving: bool = True) -> None:
        """From now on new work is refused with UNAVAILABLE; with False it is taken again."""
        self._leaving = leaving

    async def settle(self) -> None:
        """Waits for the work that was taken to be done."""
        while self._waiting:
            await asyncio.wait(list(self._waiting.values()))

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
        updates, skipped, rollbacks = expert.update_count, expert.skipped_updates, expert.guard.rollbacks
        start = self._clock()
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
        self._stats.rollbacks += expert.guard.rollbacks - rollbacks

    def _deliver(self, batch: list[Entry], results: Sequence[Result | ExpertError]) -> None:
        for entry, result in zip(batch, results, strict=True):
            future = self._waiting.get(entry)
            if future is None or future.done():
                continue
            if isinstance(result, ExpertError):
                future.set_exception(result)
            else:
                future.set_result(result)

    def _refuse(self, entries: Sequence[Entry]) -> None:
        self._stats.refused += len(entries)
        for entry in entries:
            retry_after_s = self._queue.retry_after_s(entry.work.caller)
            message = "no room: others wait, and more than your share of the queue was yours"
            self._fail([entry], StatusCode.RESOURCE_EXHAUSTED, message, retry_after_s)

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
