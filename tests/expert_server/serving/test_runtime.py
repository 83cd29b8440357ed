"""Work of many callers: it is merged and bounded, and each caller gets what it would get alone."""

import asyncio

import pytest
import torch
from grpc import StatusCode
from runtime_samples import (
    FIRST,
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

from expert_server.experts.expert import Expert
from peer import clock
from peer.errors import ExpertError
from peer.metrics import total


def test_merged_forward_gives_each_caller_what_it_would_get_alone() -> None:
    expert = Expert(FIRST, MANIFEST)
    runtime = make_runtime(expert)
    works = [make_work(rows, seed=rows) for rows in (3, 1, 7)]

    async def scenario() -> None:
        results = await asyncio.gather(*(submit(runtime, work) for work in works))
        for work, result in zip(works, results, strict=True):
            alone = expert.forward(work.rows)
            torch.testing.assert_close(result.tensor, alone)
        assert (total(runtime.metrics.batches), total(runtime.metrics.rows)) == (1, 11)
        assert (total(runtime.metrics.updates), runtime.trained) == (0, set())
        assert (expert.rows, expert.updated_at) == (11, 0.0)

    with_runtime(runtime, scenario)


def test_merged_backward_takes_one_step_and_gives_each_caller_its_gradient() -> None:
    expert, began = Expert(FIRST, MANIFEST), clock.now()
    runtime = make_runtime(expert)
    works = [make_work(rows, direction="backward", seed=rows) for rows in (3, 1, 7)]

    async def scenario() -> None:
        results = await asyncio.gather(*(submit(runtime, work) for work in works))
        for work, result in zip(works, results, strict=True):
            torch.testing.assert_close(result.tensor, backward_alone(work))
        assert [result.update_count for result in results] == [1, 1, 1]
        assert (total(runtime.metrics.batches), total(runtime.metrics.updates)) == (1, 1)
        assert (expert.rows, expert.updated_at >= began) == (11, True)
        runtime.remove(FIRST)
        assert runtime.trained == {FIRST}

    with_runtime(runtime, scenario)


def test_an_expert_that_is_not_here_is_not_found() -> None:
    runtime = make_runtime(Expert(FIRST, MANIFEST))

    async def scenario() -> None:
        assert await status_of(submit(runtime, make_work(uid=SECOND))) is StatusCode.NOT_FOUND

    with_runtime(runtime, scenario)


def test_expired_work_is_refused_and_not_computed() -> None:
    runtime = make_runtime(Expert(FIRST, MANIFEST), clock=lambda: 5.0)

    async def scenario() -> None:
        assert await status_of(submit(runtime, make_work(deadline=5.0))) is StatusCode.DEADLINE_EXCEEDED
        assert (total(runtime.metrics.failed, cause="expired"), total(runtime.metrics.batches)) == (1, 0)

    with_runtime(runtime, scenario)


def test_a_full_queue_refuses() -> None:
    runtime = make_runtime(Expert(FIRST, MANIFEST), max_queued_rows=5)

    async def scenario() -> None:
        fits, refused = await submit_in_order(runtime, make_work(4), make_work(2))
        assert await status_of(refused) is StatusCode.RESOURCE_EXHAUSTED
        await fits
        assert (total(runtime.metrics.failed, cause="refused"), total(runtime.metrics.batches)) == (1, 1)

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
        assert (total(runtime.metrics.failed, cause="refused"), total(runtime.metrics.rows)) == (1, 6)

    with_runtime(runtime, scenario)


def test_work_of_a_caller_that_is_gone_is_not_computed() -> None:
    runtime = make_runtime(Expert(FIRST, MANIFEST))

    async def scenario() -> None:
        async with HeldThread(runtime):
            gone, stays = await submit_in_order(runtime, make_work(5), make_work(6))
            gone.cancel()
            await asyncio.wait([gone])
            assert runtime.queued_rows == 6
        await stays
        assert (total(runtime.metrics.rows), runtime.queued_rows) == (6, 0)

    with_runtime(runtime, scenario)


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
        await submit(runtime, make_work())
        assert (first.threads, second.threads) == ([2, 4], [2])

    with_runtime(runtime, scenario)


def test_an_expert_has_one_batch_under_way() -> None:
    expert, other = HeldExpert(), Expert(SECOND, MANIFEST)
    runtime = make_runtime(expert, other, threads=4)

    async def scenario() -> None:
        (first,) = await submit_in_order(runtime, make_work())
        assert await expert.is_computing()
        waiting = await submit_in_order(runtime, make_work(), make_work(direction="backward"))
        await submit(runtime, make_work(uid=SECOND))
        assert expert.threads == [4]
        assert runtime.queued_rows == 8
        expert.let_go()
        await asyncio.gather(first, *waiting)

    with_runtime(runtime, scenario)


def test_what_is_run_has_all_experts_for_itself() -> None:
    expert, other = HeldExpert(), Expert(SECOND, MANIFEST)
    runtime = make_runtime(expert, other, threads=4)

    async def scenario() -> None:
        (computing,) = await submit_in_order(runtime, make_work())
        assert await expert.is_computing()
        running = asyncio.create_task(runtime.run(lambda: total(runtime.metrics.batches)))
        await asyncio.sleep(0)
        (waiting,) = await submit_in_order(runtime, make_work(uid=SECOND))
        await asyncio.to_thread(lambda: None)
        assert not running.done()
        assert runtime.queued_rows == 4
        expert.let_go()
        await asyncio.gather(computing, waiting)
        assert await running <= 1  # the second batch came after it

    with_runtime(runtime, scenario)


def test_many_callers_of_many_experts_all_get_their_own_rows() -> None:
    uids = [FIRST, SECOND]
    runtime = make_runtime(*(Expert(uid, MANIFEST) for uid in uids))
    works = [make_work(1 + n % 5, uids[n % 2], seed=n, deadline=float(1 + n % 7)) for n in range(60)]

    async def scenario() -> None:
        results = await asyncio.gather(*(submit(runtime, work) for work in works))
        for work, result in zip(works, results, strict=True):
            alone = runtime.experts[work.uid].forward(work.rows)
            torch.testing.assert_close(result.tensor, alone)
        assert total(runtime.metrics.rows) == sum(len(work.rows) for work in works)

    with_runtime(runtime, scenario)
