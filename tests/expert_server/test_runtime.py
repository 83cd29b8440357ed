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
from expert_server.batching import Direction, Work
from expert_server.computing import Result
from expert_server.expert import BackwardPart, Expert
from expert_server.runtime import Runtime
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
) -> Work:
    generator = torch.Generator().manual_seed(seed)
    inputs, gradients = torch.randn(2, rows, HIDDEN, generator=generator).unbind()
    lengths = torch.tensor([rows] if rows < 3 else [2, rows - 2])
    positions = torch.cat([torch.arange(n) for n in lengths.tolist()])
    backward = direction == "backward"
    return Work(uid, direction, inputs, gradients if backward else None, lengths, positions, deadline, caller)


def backward_alone(work: Work) -> Tensor:
    assert work.gradients is not None
    expert = Expert(work.uid, MANIFEST)
    return expert.backward([BackwardPart(work.inputs, work.gradients, work.lengths, work.positions)])[0]


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
            async with asyncio.timeout(30):
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
        assert self._release.wait(10)


class HeldExpert(Expert):
    """Computes forward passes when it is let go."""

    def __init__(self, uid: UID = FIRST) -> None:
        super().__init__(uid, MANIFEST)
        self._reached, self._release = threading.Event(), threading.Event()
        self.threads: list[int] = []
        """Of torch, in each forward pass."""

    def forward(self, x_RD: Tensor, lengths_S: Tensor, positions_R: Tensor) -> Tensor:
        self.threads.append(torch.get_num_threads())
        self._reached.set()
        assert self._release.wait(10)
        return super().forward(x_RD, lengths_S, positions_R)

    async def is_computing(self) -> bool:
        return await asyncio.to_thread(self._reached.wait, 10)

    def let_go(self) -> None:
        self._release.set()


async def submit_in_order(runtime: Runtime, *works: Work) -> list[asyncio.Task[Result]]:
    """Starts the calls, and returns once all of them are queued."""
    tasks = [asyncio.create_task(runtime.submit(work)) for work in works]
    await asyncio.sleep(0)
    return tasks


async def status_of(call: Awaitable[Result]) -> StatusCode:
    with pytest.raises(ExpertError) as caught:
        await call
    return caught.value.status


def test_merged_forward_gives_each_caller_what_it_would_get_alone() -> None:
    expert = Expert(FIRST, MANIFEST)
    runtime = make_runtime(expert)
    works = [make_work(rows, seed=rows) for rows in (3, 1, 7)]

    async def scenario() -> None:
        results = await asyncio.gather(*map(runtime.submit, works))
        for work, result in zip(works, results, strict=True):
            alone = expert.forward(work.inputs, work.lengths, work.positions)
            torch.testing.assert_close(result.tensor, alone)
        assert (runtime.stats.batches, runtime.stats.rows, runtime.stats.updates) == (1, 11, 0)

    with_runtime(runtime, scenario)


def test_merged_backward_takes_one_step_and_gives_each_caller_its_gradient() -> None:
    runtime = make_runtime(Expert(FIRST, MANIFEST))
    works = [make_work(rows, direction="backward", seed=rows) for rows in (3, 1, 7)]

    async def scenario() -> None:
        results = await asyncio.gather(*map(runtime.submit, works))
        for work, result in zip(works, results, strict=True):
            torch.testing.assert_close(result.tensor, backward_alone(work))
        assert [result.update_count for result in results] == [1, 1, 1]
        assert (runtime.stats.batches, runtime.stats.updates) == (1, 1)

    with_runtime(runtime, scenario)


def test_an_expert_that_is_not_here_is_not_found() -> None:
    runtime = make_runtime(Expert(FIRST, MANIFEST))

    async def scenario() -> None:
        assert await status_of(runtime.submit(make_work(uid=SECOND))) is StatusCode.NOT_FOUND

    with_runtime(runtime, scenario)


def test_expired_work_is_refused_and_not_computed() -> None:
    runtime = make_runtime(Expert(FIRST, MANIFEST), clock=lambda: 5.0)

    async def scenario() -> None:
        assert await status_of(runtime.submit(make_work(deadline=5.0))) is StatusCode.DEADLINE_EXCEEDED
        assert (runtime.stats.expired, runtime.stats.batches) == (1, 0)

    with_runtime(runtime, scenario)


def test_a_full_queue_refuses() -> None:
    runtime = make_runtime(Expert(FIRST, MANIFEST), max_queued_rows=5)

    async def scenario() -> None:
        fits, refused = await submit_in_order(runtime, make_work(4), make_work(2))
        assert await status_of(refused) is StatusCode.RESOURCE_EXHAUSTED
        await fits
        assert (runtime.stats.refused, runtime.stats.batches) == (1, 1)

    with_runtime(runtime, scenario)


def test_who_comes_to_a_full_queue_gets_room_from_the_one_that_filled_it() -> None:
    runtime = make_runtime(Expert(FIRST, MANIFEST), max_queued_rows=8)

    async def scenario() -> None:
        works = [make_work(4, caller="greedy"), make_work(4, caller="greedy"), make_work(2, caller="other")]
        first, displaced, other = await submit_in_order(runtime, *works)
        with pytest.raises(ExpertError, match="others wait") as caught:
            await displaced
        assert caught.value.status is StatusCode.RESOURCE_EXHAUSTED
        assert caught.value.retry_after_s > 0
        await asyncio.gather(first, other)
        assert (runtime.stats.refused, runtime.stats.rows) == (1, 6)

    with_runtime(runtime, scenario)


def test_work_of_a_caller_that_is_gone_is_not_computed() -> None:
    runtime = make_runtime(Expert(FIRST, MANIFEST))

    async def scenario() -> None:
        async with HeldThread(runtime):
            gone, stays = await submit_in_order(runtime, make_work(5), make_work(6))
            gone.cancel()
            await asyncio.wait([gone])
            assert runtime.stats.queued_rows == 6
        await stays
        assert (runtime.stats.rows, runtime.stats.queued_rows) == (6, 0)

    with_runtime(runtime, scenario)


def test_a_caller_that_leaves_during_its_batch_harms_nobody() -> None:
    expert = HeldExpert()
    runtime = make_runtime(expert)

    async def scenario() -> None:
        gone, stays = await submit_in_order(runtime, make_work(4), make_work(5))
        assert await expert.is_computing()
        assert runtime.stats.queued_rows == 0
        gone.cancel()
        expert.let_go()
        assert (await stays).tensor.shape == (5, HIDDEN)

    with_runtime(runtime, scenario)


class BrokenExpert(Expert):
    """Fails as torch may: out of memory, a wrong kernel."""

    def forward(self, x_RD: Tensor, lengths_S: Tensor, positions_R: Tensor) -> Tensor:
        raise RuntimeError("no kernel image is available")


def test_an_unforeseen_error_fails_its_batch_and_the_runtime_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    runtime = make_runtime(BrokenExpert(FIRST, MANIFEST), Expert(SECOND, MANIFEST))

    async def scenario() -> None:
        tasks = await submit_in_order(runtime, make_work(), make_work(), make_work(uid=SECOND))
        assert [await status_of(task) for task in tasks[:2]] == [StatusCode.INTERNAL] * 2
        await tasks[2]
        assert (runtime.stats.failed, runtime.stats.batches) == (2, 2)

    with_runtime(runtime, scenario)
    (record,) = caplog.records
    assert record.exc_info is not None
    assert "expert 0.0.0 failed on a batch from a trainer" in record.message


def test_numbers_that_overflow_fail_their_own_work_alone() -> None:
    expert = Expert(FIRST, MANIFEST)
    runtime = make_runtime(expert)
    works = [make_work(direction="backward", seed=seed) for seed in range(3)]
    assert works[1].gradients is not None
    works[1].gradients.fill_(3e38)

    async def scenario() -> None:
        good, bad, other = await submit_in_order(runtime, *works)
        assert await status_of(bad) is StatusCode.INTERNAL
        torch.testing.assert_close((await good).tensor, backward_alone(works[0]))
        assert (await other).tensor.isfinite().all()
        assert (runtime.stats.batches, runtime.stats.failed, runtime.stats.updates) == (1, 1, 2)

    with_runtime(runtime, scenario)


def test_gradients_that_skip_the_update_do_not_take_it_from_others() -> None:
    expert = Expert(FIRST, MANIFEST)
    runtime = make_runtime(expert)
    works = [make_work(direction="backward", seed=seed) for seed in range(2)]
    assert works[1].gradients is not None
    works[1].gradients.fill_(0)
    works[1].gradients[:, 0] = (
        1e38  # finite, and so is the gradient of the inputs; that of a bias is their sum
    )

    async def scenario() -> None:
        results = await asyncio.gather(*await submit_in_order(runtime, *works))
        assert (runtime.stats.updates, runtime.stats.skipped_updates) == (1, 1)
        assert [result.skipped_update for result in results] == [False, True]

    with_runtime(runtime, scenario)


def test_removing_an_expert_fails_its_waiting_work() -> None:
    expert = HeldExpert()
    runtime = make_runtime(expert, Expert(SECOND, MANIFEST))

    async def scenario() -> None:
        (computing,) = await submit_in_order(runtime, make_work())
        assert await expert.is_computing()
        waiting, other = await submit_in_order(runtime, make_work(), make_work(uid=SECOND))
        runtime.remove(FIRST)
        assert await status_of(waiting) is StatusCode.NOT_FOUND
        assert await status_of(runtime.submit(make_work())) is StatusCode.NOT_FOUND
        expert.let_go()
        await asyncio.gather(computing, other)
        assert list(runtime.experts) == [SECOND]

    with_runtime(runtime, scenario)


def test_stopping_fails_waiting_work_and_delivers_what_is_being_computed() -> None:
    expert = HeldExpert()
    runtime = make_runtime(expert)

    async def scenario() -> None:
        (computing,) = await submit_in_order(runtime, make_work())
        assert await expert.is_computing()
        (waiting,) = await submit_in_order(runtime, make_work())
        stopping = asyncio.create_task(runtime.stop())
        assert await status_of(waiting) is StatusCode.UNAVAILABLE
        expert.let_go()
        await stopping
        assert computing.done()
        assert computing.result().tensor.shape == (4, HIDDEN)
        await runtime.stop()
        assert await status_of(runtime.submit(make_work())) is StatusCode.UNAVAILABLE
        with pytest.raises(ExpertError, match="stopping"):
            await runtime.run(lambda: None)

    with_runtime(runtime, scenario)


def test_a_stopped_runtime_leaves_no_thread() -> None:
    threads = set(threading.enumerate())
    runtime = make_runtime(Expert(FIRST, MANIFEST), threads=4)

    async def scenario() -> None:
        await runtime.submit(make_work())
        assert [t for t in threading.enumerate() if t.name.startswith("compute")]

    with_runtime(runtime, scenario)
    assert set(threading.enumerate()) <= threads


def test_experts_are_computed_beside_each_other_and_share_the_threads() -> None:
    first, second = HeldExpert(), HeldExpert(SECOND)
    runtime = make_runtime(first, second, threads=4)

    async def scenario() -> None:
        tasks = await submit_in_order(runtime, make_work(), make_work(uid=SECOND))
        assert await first.is_computing()
        assert await second.is_computing()
        first.let_go()
        second.let_go()
        await asyncio.gather(*tasks)
        await runtime.submit(make_work())
        assert (first.threads, second.threads) == ([2, 4], [2])

    with_runtime(runtime, scenario)


def test_an_expert_has_one_batch_under_way() -> None:
    expert, other = HeldExpert(), Expert(SECOND, MANIFEST)
    runtime = make_runtime(expert, other, threads=4)

    async def scenario() -> None:
        (first,) = await submit_in_order(runtime, make_work())
        assert await expert.is_computing()
        waiting = await submit_in_order(runtime, make_work(), make_work(direction="backward"))
        await runtime.submit(make_work(uid=SECOND))
        assert expert.threads == [4]
        assert runtime.stats.queued_rows == 8
        expert.let_go()
        await asyncio.gather(first, *waiting)

    with_runtime(runtime, scenario)


def test_what_is_run_has_all_experts_for_itself() -> None:
    expert, other = HeldExpert(), Expert(SECOND, MANIFEST)
    runtime = make_runtime(expert, other, threads=4)

    async def scenario() -> None:
        (computing,) = await submit_in_order(runtime, make_work())
        assert await expert.is_computing()
        running = asyncio.create_task(runtime.run(lambda: runtime.stats.batches))
        await asyncio.sleep(0)
        (waiting,) = await submit_in_order(runtime, make_work(uid=SECOND))
        await asyncio.to_thread(lambda: None)
        assert not running.done()
        assert runtime.stats.queued_rows == 4
        expert.let_go()
        await asyncio.gather(computing, waiting)
        assert await running <= 1  # the second batch came after it

    with_runtime(runtime, scenario)


def test_what_is_run_may_fail_or_be_given_up() -> None:
    runtime = make_runtime(Expert(FIRST, MANIFEST))

    async def scenario() -> None:
        with pytest.raises(ZeroDivisionError):
            await runtime.run(lambda: 1 // 0)
        async with HeldThread(runtime):
            given_up = asyncio.create_task(runtime.run(lambda: pytest.fail("nobody waits for it")))
            await asyncio.sleep(0)
            given_up.cancel()
            stays = asyncio.create_task(runtime.run(lambda: "done"))
            await asyncio.wait([given_up])
        assert await stays == "done"
        await runtime.submit(make_work())

    with_runtime(runtime, scenario)


def test_many_callers_of_many_experts_all_get_their_own_rows() -> None:
    uids = [FIRST, SECOND]
    runtime = make_runtime(*(Expert(uid, MANIFEST) for uid in uids))
    works = [make_work(1 + n % 5, uids[n % 2], seed=n, deadline=float(1 + n % 7)) for n in range(60)]

    async def scenario() -> None:
        results = await asyncio.gather(*map(runtime.submit, works))
        for work, result in zip(works, results, strict=True):
            alone = runtime.experts[work.uid].forward(work.inputs, work.lengths, work.positions)
            torch.testing.assert_close(result.tensor, alone)
        assert runtime.stats.rows == sum(work.rows for work in works)

    with_runtime(runtime, scenario)


def test_rollbacks_are_counted_also_when_the_batch_fails() -> None:
    expert = Expert(FIRST, MANIFEST)
    runtime = make_runtime(expert)

    async def scenario() -> None:
        await runtime.submit(make_work(direction="backward"))
        with torch.no_grad():
            next(expert.block.parameters()).fill_(torch.nan)
        assert await status_of(runtime.submit(make_work())) is StatusCode.INTERNAL
        assert (await runtime.submit(make_work())).tensor.isfinite().all()
        assert (runtime.stats.rollbacks, runtime.stats.updates) == (1, 1)

    with_runtime(runtime, scenario)
