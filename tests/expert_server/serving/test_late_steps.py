"""Gradients that an expert has accumulated lead to a step after a while, and a node counts the steps that were
taken.
"""

import asyncio
import time

import pytest
from runtime_samples import FIRST, MANIFEST, SECOND, make_runtime, make_work, submit, with_runtime

from dht.uid import UID
from expert_server.experts.expert import Expert
from expert_server.serving import runtime as runtime_module
from expert_server.serving.runtime import Runtime
from peer.metrics import total

OPTIMIZER = MANIFEST.optimizer.model_copy(update={"rows_per_update": 100})
PATIENT = MANIFEST.model_copy(update={"optimizer": OPTIMIZER})


async def stepped(runtime: Runtime, uid: UID = FIRST, updates: int = 1, counted: int = 1) -> None:
    """Waits until the expert has taken `updates` steps, and the node has counted `counted` steps of all experts."""
    while True:
        if runtime.experts[uid].update_count == updates and total(runtime.metrics.updates) >= counted:
            return
        await asyncio.sleep(0.001)


async def submit_backward(runtime: Runtime, uid: UID = FIRST) -> int:
    return (await submit(runtime, make_work(uid=uid, direction="backward"))).update_count


def test_a_node_with_nothing_to_do_takes_the_step_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_module, "_LONGEST_ACCUMULATION_S", 0.05)
    runtime = make_runtime(Expert(FIRST, PATIENT), Expert(SECOND, PATIENT), clock=time.monotonic)

    async def scenario() -> None:
        assert await submit_backward(runtime) == 0
        await stepped(runtime)
        for uid in (FIRST, SECOND):
            await submit_backward(runtime, uid)
        await stepped(runtime, FIRST, updates=2)
        await stepped(runtime, SECOND, counted=3)
        assert not any(expert.accumulated_rows for expert in runtime.experts.values())

    with_runtime(runtime, scenario)


def test_no_step_is_taken_before_its_time_and_a_late_one_before_the_next_batch() -> None:
    now = 0.0
    expert, like = Expert(FIRST, PATIENT), Expert(FIRST, MANIFEST)
    runtime = make_runtime(expert, clock=lambda: now)

    async def scenario() -> None:
        nonlocal now
        assert await submit_backward(runtime) == 0
        now = 29.0
        assert await submit_backward(runtime) == 0
        assert expert.accumulated_rows == 8
        now = 30.0
        assert await submit_backward(runtime) == 1
        assert expert.accumulated_rows == 4, "the new rows are for the next step"
        now = 59.0
        assert await submit_backward(runtime) == 1, "whose time begins with them"

    with_runtime(runtime, scenario)
    like.backward([make_work(direction="backward").rows])
    assert like.update_count == expert.update_count


def test_what_a_new_expert_brings_along_has_its_step_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_module, "_LONGEST_ACCUMULATION_S", 0.05)
    runtime = make_runtime(clock=time.monotonic)
    expert = Expert(FIRST, PATIENT)
    expert.backward([make_work(direction="backward").rows])

    async def scenario() -> None:
        runtime.add(expert)
        await stepped(runtime)
        runtime.remove(FIRST)

    with_runtime(runtime, scenario)
