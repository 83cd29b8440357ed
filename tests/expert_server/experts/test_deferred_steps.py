"""The optimizer step, which is taken after the answer has been sent."""

import asyncio
import threading
from collections.abc import Callable

import pytest
import torch
from expert_samples import (
    AN_UID,
    LENGTHS,
    POSITIONS,
    gradients_that_overflow_when_summed,
    make_manifest,
    parameters_of,
    random_rows,
)
from runtime_samples import FIRST, MANIFEST, SECOND, make_runtime, make_work, submit, with_runtime

from dht.uid import UID
from expert_server.experts.expert import Expert
from expert_server.experts.graphs import Rows
from expert_server.experts.guard import CHECK_EVERY_UPDATES, StepOutcome

Read = Callable[[Expert], object]


def stepped(may_defer: bool, updates: int = 1) -> Expert:
    expert = Expert(AN_UID, make_manifest())
    for seed in range(updates):
        part = Rows(random_rows(seed), LENGTHS, POSITIONS, random_rows(seed + 100))
        expert.backward([part], may_defer=may_defer)
    return expert


READERS: dict[str, Read] = {
    "settle": Expert.settle,
    "forward": lambda expert: expert.forward(Rows(random_rows(7), LENGTHS, POSITIONS)),
    "forward with graph": lambda expert: expert.forward_with_graph(Rows(random_rows(7), LENGTHS, POSITIONS)),
    "export": Expert.export_state,
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS.keys())
def test_whatever_reads_the_state_takes_the_step_first(read: Read) -> None:
    expert, like = stepped(may_defer=True), stepped(may_defer=False)
    assert expert.step_is_due
    assert expert.update_count == 1
    read(expert)
    assert not expert.step_is_due
    torch.testing.assert_close(parameters_of(expert), parameters_of(like), rtol=0, atol=0)


def test_the_next_backward_pass_is_of_the_new_parameters() -> None:
    many, like = stepped(may_defer=True, updates=3), stepped(may_defer=False, updates=3)
    many.settle()
    torch.testing.assert_close(many.export_state(), like.export_state(), rtol=0, atol=0)


def test_a_state_that_comes_in_is_not_changed_by_a_step_that_was_due() -> None:
    expert, other = stepped(may_defer=True), stepped(may_defer=False, updates=2)
    expert.import_state(other.export_state(), 2)
    expert.settle()
    torch.testing.assert_close(parameters_of(expert), parameters_of(other), rtol=0, atol=0)


def test_what_the_guard_looks_at_is_not_left_for_later() -> None:
    assert stepped(may_defer=True, updates=CHECK_EVERY_UPDATES - 1).step_is_due
    assert not stepped(may_defer=True, updates=CHECK_EVERY_UPDATES).step_is_due


def test_a_skipped_update_leaves_nothing_due() -> None:
    expert = Expert(AN_UID, make_manifest())
    before = parameters_of(expert)
    part = Rows(random_rows(0), LENGTHS, POSITIONS, gradients_that_overflow_when_summed())
    _, outcome = expert.backward([part], may_defer=True)
    assert (expert.step_is_due, outcome, expert.update_count) == (False, StepOutcome.SKIPPED, 0)
    expert.settle()
    torch.testing.assert_close(parameters_of(expert), before, rtol=0, atol=0)


class SlowStepper(Expert):
    """An expert that waits for permission before it takes its step, and is not computed together with others."""

    grouped_block = None

    def __init__(self, uid: UID) -> None:
        super().__init__(uid, MANIFEST)
        self.release, self.settled = threading.Event(), threading.Event()

    def settle(self) -> bool:
        if not self.step_is_due:
            return True
        assert self.release.wait(60)
        is_good = super().settle()
        self.settled.set()
        return is_good


def test_the_answer_does_not_wait_for_the_step_and_the_step_not_for_more_work() -> None:
    expert = SlowStepper(FIRST)
    runtime = make_runtime(expert)

    async def scenario() -> None:
        result = await submit(runtime, make_work(direction="backward"))
        assert result.update_count == 1
        assert not expert.settled.is_set()
        expert.release.set()
        assert await asyncio.to_thread(expert.settled.wait, 10)

    with_runtime(runtime, scenario)


def test_batches_of_other_experts_come_before_steps() -> None:
    first = SlowStepper(FIRST)
    runtime = make_runtime(first, Expert(SECOND, MANIFEST))  # with one thread

    async def scenario() -> None:
        works = [make_work(direction="backward"), make_work(uid=SECOND, direction="backward")]
        await asyncio.gather(*(submit(runtime, work) for work in works))
        assert not first.settled.is_set()
        first.release.set()

    with_runtime(runtime, scenario)


def test_what_runs_on_the_threads_sees_the_step_taken() -> None:
    expert = Expert(FIRST, MANIFEST)
    runtime = make_runtime(expert)
    alone = Expert(FIRST, MANIFEST)
    work = make_work(direction="backward")
    alone.backward([work.rows])

    async def scenario() -> None:
        await submit(runtime, work)
        torch.testing.assert_close(await runtime.run(expert.export_state), alone.export_state())

    with_runtime(runtime, scenario)


def test_a_step_that_fails_is_logged_and_the_expert_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    expert = SlowStepper(FIRST)
    runtime = make_runtime(expert)

    def fail() -> None:
        raise RuntimeError("no memory")

    async def scenario() -> None:
        await submit(runtime, make_work(direction="backward"))
        expert.optimizer.step = fail  # type: ignore[method-assign]
        expert.release.set()
        await runtime.run(lambda: None)
        assert not expert.step_is_due
        await submit(runtime, make_work())

    with_runtime(runtime, scenario)
    assert "failed in an optimizer step" in caplog.text


def test_a_short_batch_does_not_wait_for_a_long_one() -> None:
    held = SlowStepper(FIRST)
    runtime = make_runtime(held, Expert(SECOND, MANIFEST), threads=2)

    async def scenario() -> None:
        await submit(runtime, make_work(direction="backward"))
        long = asyncio.create_task(submit(runtime, make_work()))  # it takes the step first
        await submit(runtime, make_work(uid=SECOND))
        assert not long.done()
        held.release.set()
        await long

    with_runtime(runtime, scenario)
