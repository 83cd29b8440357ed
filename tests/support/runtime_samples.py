"""Runtimes with tiny experts, work for them, and experts that can be paused."""

import asyncio
import threading
from collections.abc import Awaitable, Callable

import pytest
import torch
import uvloop
from grpc import StatusCode
from torch import Tensor

from dht.manifest import ExpertSpec, Manifest, ModelSpec
from dht.uid import UID
from expert_server.experts.expert import Expert
from expert_server.experts.graphs import Rows
from expert_server.serving.batching import Direction, Result, WorkItem
from expert_server.serving.runtime import Runtime
from peer.errors import ExpertError

HIDDEN = 16
FIRST, SECOND = UID(0, (0, 0)), UID(0, (0, 1))
NEVER = float("inf")
MANIFEST = Manifest(
    name="test",
    model=ModelSpec(layers=1, hidden=HIDDEN, heads=2, context=32, local_layers=0, feed_forward=32, seed=0),
    experts=ExpertSpec(grid=(2, 2), kind="transformer"),
)


def make_work(
    rows: int = 4,
    uid: UID = FIRST,
    direction: Direction = "forward",
    deadline: float = NEVER,
    seed: int = 0,
    caller: str = "a trainer",
) -> WorkItem:
    generator = torch.Generator().manual_seed(seed)
    inputs, gradients = torch.randn(2, rows, HIDDEN, generator=generator).unbind()
    lengths = torch.tensor([rows] if rows < 3 else [2, rows - 2])
    positions = torch.cat([torch.arange(n) for n in lengths.tolist()])
    backward = direction == "backward"
    rows_of_work = Rows(inputs, lengths, positions, gradients if backward else None)
    return WorkItem(uid, direction, rows_of_work, deadline, caller, caller)


def backward_alone(work: WorkItem) -> Tensor:
    expert = Expert(work.uid, MANIFEST)
    (gradient,), _ = expert.backward([work.rows])
    return gradient


def make_runtime(
    *experts: Expert,
    max_queued_rows: int = 1000,
    threads: int = 1,
    clock: Callable[[], float] | None = None,
) -> Runtime:
    return Runtime(
        {expert.uid: expert for expert in experts},
        max_queued_rows=max_queued_rows,
        max_batch_rows=100,
        threads=threads,
        clock=clock or (lambda: 0.0),
    )


def with_runtime(runtime: Runtime, scenario: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await runtime.start()
        try:
            async with asyncio.timeout(60):
                await scenario()
        finally:
            await runtime.stop()

    uvloop.run(main())


class HeldThread:
    """Keeps the compute thread of a runtime busy until the block ends."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._reached, self._release = threading.Event(), threading.Event()

    async def __aenter__(self) -> None:
        self._task = asyncio.create_task(self._runtime.run(self._hold))
        assert await asyncio.to_thread(self._reached.wait, 10)

    async def __aexit__(self, *_: object) -> None:
        self._release.set()
        await self._task

    def _hold(self) -> None:
        self._reached.set()
        assert self._release.wait(60)


class HeldExpert(Expert):
    """An expert whose forward passes wait until they are let go, and which is not computed together with others."""

    grouped_block = None

    def __init__(self, uid: UID = FIRST) -> None:
        super().__init__(uid, MANIFEST)
        self._reached, self._release = threading.Event(), threading.Event()
        self.threads: list[int] = []
        """The number of torch threads in each forward pass."""

    def forward(self, rows: Rows) -> Tensor:
        self.threads.append(torch.get_num_threads())
        self._reached.set()
        assert self._release.wait(60)
        return super().forward(rows)

    async def is_computing(self) -> bool:
        return await asyncio.to_thread(self._reached.wait, 10)

    def let_go(self) -> None:
        self._release.set()


async def submit(runtime: Runtime, work: WorkItem) -> Result:
    """Submits work, and waits for the result."""
    return await runtime.enqueue(work).future


async def submit_in_order(runtime: Runtime, *works: WorkItem) -> list[asyncio.Task[Result]]:
    """Starts the calls, and returns once all of them are queued."""
    tasks = [asyncio.create_task(submit(runtime, work)) for work in works]
    await asyncio.sleep(0)
    return tasks


async def status_of(call: Awaitable[Result]) -> StatusCode:
    with pytest.raises(ExpertError) as caught:
        await call
    return caught.value.status
