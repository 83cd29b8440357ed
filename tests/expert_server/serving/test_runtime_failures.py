"""Work that fails, is removed or is given up in a runtime harms nobody else."""

import asyncio
import threading

import pytest
import torch
from grpc import StatusCode
from runtime_samples import (
    FIRST,
    HIDDEN,
    MANIFEST,
    SECOND,
    HeldExpert,
    HeldThread,
    backward_alone,
    make_runtime,
    make_work,
    status_of,
    submit,
    submit_in_order,
    with_runtime,
)
from torch import Tensor

from expert_server.experts.expert import Expert
from expert_server.experts.graphs import Rows
from expert_server.experts.guard import CHECK_EVERY_UPDATES
from peer.errors import ExpertError
from peer.metrics import total


def test_a_caller_that_leaves_during_its_batch_harms_nobody() -> None:
    expert = HeldExpert()
    runtime = make_runtime(expert)

    async def scenario() -> None:
        gone, stays = await submit_in_order(runtime, make_work(4), make_work(5))
        assert await expert.is_computing()
        assert runtime.queued_rows == 0
        gone.cancel()
        expert.let_go()
        assert (await stays).tensor.shape == (5, HIDDEN)

    with_runtime(runtime, scenario)


class BrokenExpert(Expert):
    """An expert that fails as torch may: out of memory, or in a kernel."""

    def forward(self, rows: Rows) -> Tensor:
        raise RuntimeError("no kernel image is available")


def test_an_unforeseen_error_fails_its_batch_and_the_runtime_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    runtime = make_runtime(BrokenExpert(FIRST, MANIFEST), Expert(SECOND, MANIFEST))

    async def scenario() -> None:
        tasks = await submit_in_order(runtime, make_work(), make_work(), make_work(uid=SECOND))
        assert [await status_of(task) for task in tasks[:2]] == [StatusCode.INTERNAL] * 2
        await tasks[2]
        assert (total(runtime.metrics.failed, cause="failed"), total(runtime.metrics.batches)) == (2, 2)

    with_runtime(runtime, scenario)
    (record,) = caplog.records
    assert record.exc_info is not None
    assert "expert 0.0.0 failed on a batch from a trainer" in record.message


def test_numbers_that_overflow_fail_their_own_work_alone() -> None:
    expert = Expert(FIRST, MANIFEST)
    runtime = make_runtime(expert)
    works = [make_work(direction="backward", seed=seed) for seed in range(3)]
    assert works[1].rows.gradients is not None
    works[1].rows.gradients.fill_(3e38)

    async def scenario() -> None:
        good, bad, other = await submit_in_order(runtime, *works)
        assert await status_of(bad) is StatusCode.INTERNAL
        torch.testing.assert_close((await good).tensor, backward_alone(works[0]))
        assert (await other).tensor.isfinite().all()
        assert total(runtime.metrics.failed, cause="failed") == 1
        assert (total(runtime.metrics.batches), total(runtime.metrics.updates)) == (1, 2)

    with_runtime(runtime, scenario)


def test_gradients_that_skip_the_update_do_not_take_it_from_others() -> None:
    expert = Expert(FIRST, MANIFEST)
    runtime = make_runtime(expert)
    works = [make_work(direction="backward", seed=seed) for seed in range(2)]
    assert works[1].rows.gradients is not None
    works[1].rows.gradients.fill_(0)
    works[1].rows.gradients[:, 0] = (
        1e38  # finite, and so is the gradient of the inputs; that of a bias is their sum
    )

    async def scenario() -> None:
        results = await asyncio.gather(*await submit_in_order(runtime, *works))
        assert (total(runtime.metrics.updates), total(runtime.metrics.skipped_updates)) == (1, 1)
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
        assert await status_of(submit(runtime, make_work())) is StatusCode.NOT_FOUND
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
        assert await status_of(submit(runtime, make_work())) is StatusCode.UNAVAILABLE
        with pytest.raises(ExpertError, match="stopping"):
            await runtime.run(lambda: None)

    with_runtime(runtime, scenario)


def test_a_stopped_runtime_leaves_no_thread() -> None:
    threads = set(threading.enumerate())
    runtime = make_runtime(Expert(FIRST, MANIFEST), threads=4)

    async def scenario() -> None:
        await submit(runtime, make_work())
        assert [t for t in threading.enumerate() if t.name.startswith("compute")]

    with_runtime(runtime, scenario)
    assert set(threading.enumerate()) <= threads


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
        await submit(runtime, make_work())

    with_runtime(runtime, scenario)


def test_rollbacks_are_counted_also_when_the_batch_fails() -> None:
    expert = Expert(FIRST, MANIFEST)
    runtime = make_runtime(expert)

    async def scenario() -> None:
        await submit(runtime, make_work(direction="backward"))
        with torch.no_grad():
            next(expert.block.parameters()).fill_(torch.nan)
        assert await status_of(submit(runtime, make_work())) is StatusCode.INTERNAL
        assert (await submit(runtime, make_work())).tensor.isfinite().all()
        assert (total(runtime.metrics.rollbacks), total(runtime.metrics.updates)) == (1, 1)

    with_runtime(runtime, scenario)


def test_a_rollback_to_an_earlier_update_count_is_no_failure_of_the_node() -> None:
    """The count goes down when a state from another peer turns out to be bad."""
    expert, given = Expert(FIRST, MANIFEST), Expert(FIRST, MANIFEST)
    for seed in range(2 * CHECK_EVERY_UPDATES):
        given.backward([make_work(direction="backward", seed=seed).rows])
    expert.import_state(given.export_state(), given.update_count, "a peer")
    runtime = make_runtime(expert)

    async def scenario() -> None:
        with torch.no_grad():
            for parameter in expert.block.parameters():
                parameter.mul_(1e6)
        for _ in range(CHECK_EVERY_UPDATES):
            await submit(runtime, make_work(direction="backward"))
        assert expert.guard.rollbacks == total(runtime.metrics.rollbacks) == 1
        assert expert.update_count < given.update_count
        await submit(runtime, make_work())

    with_runtime(runtime, scenario)
