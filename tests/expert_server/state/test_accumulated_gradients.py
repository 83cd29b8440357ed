"""Accumulated gradients are part of an expert's state: on disk, for another node, and in an average."""

from pathlib import Path

import torch
from checkpoint_samples import AN_UID, MANIFEST, SWARM, assert_same, make_store, step

from expert_server.experts.expert import Expert
from expert_server.experts.format import ACCUMULATED, StateForm, from_bytes
from expert_server.hosting.averaging import average_into, averaged
from expert_server.serving.runtime import Runtime
from expert_server.state.checkpoints import Checkpoints
from expert_server.state.transfer import SnapshotTaker
from peer.loop import LoopThread
from peer.metrics import total

OPTIMIZER = MANIFEST.optimizer.model_copy(update={"rows_per_update": 12})
PATIENT = MANIFEST.model_copy(update={"optimizer": OPTIMIZER})
"""An expert that takes a step for every third call of `step`, which has 5 rows."""


def make_expert(calls: int) -> Expert:
    return step(Expert(AN_UID, PATIENT), calls)


def test_an_expert_is_saved_again_when_more_has_accumulated(loop: LoopThread, tmp_path: Path) -> None:
    expert = make_expert(0)

    async def scenario() -> None:
        runtime = Runtime({AN_UID: expert}, max_queued_rows=100, max_batch_rows=100, threads=1)
        store = make_store(tmp_path, manifest=PATIENT)
        checkpoints = Checkpoints(store, runtime)
        for calls in (1, 0, 1, 1, 0, 1):
            step(expert, calls)
            await checkpoints.save_changed()
        assert total(checkpoints.saved) == 4
        restored = make_expert(0)
        assert await Checkpoints(make_store(tmp_path, manifest=PATIENT), runtime).restore(restored)
        assert (restored.update_count, restored.accumulated_rows) == (1, 5)
        assert_same(restored.export_state(), expert.export_state())
        await runtime.stop()

    loop.run(scenario(), 60)


def test_a_snapshot_is_of_what_has_accumulated_by_now(loop: LoopThread) -> None:
    expert = make_expert(1)

    async def scenario() -> None:
        runtime = Runtime({AN_UID: expert}, max_queued_rows=100, max_batch_rows=100, threads=1)
        taker = SnapshotTaker(runtime, SWARM, lambda uid: {})
        first = await taker.take(AN_UID)
        assert await taker.take(AN_UID) is first
        step(expert)
        second = await taker.take(AN_UID)
        assert (first.accumulated_rows, second.accumulated_rows) == (5, 10)
        checkpoint = from_bytes(second.data, SWARM, AN_UID, 0, StateForm.of(PATIENT))
        assert_same(checkpoint.state, expert.export_state())
        assert checkpoint.accumulated_rows == 10
        await runtime.stop()

    loop.run(scenario(), 60)


def test_each_replica_keeps_what_it_has_accumulated_when_they_average() -> None:
    one, other = make_expert(3 + 1), make_expert(2)
    mine, theirs = one.export_state(), other.export_state()
    found, _ = averaged(mine, mine, theirs, {}, 0.5, 1)
    names = {name for name in mine if name.startswith(ACCUMULATED)}
    assert names == {name for name in found if name.startswith(ACCUMULATED)}
    assert_same({name: found[name] for name in names}, {name: mine[name] for name in names})
    one.import_state(found, 1)
    assert one.accumulated_rows == 5
    before = make_expert(3).export_state()
    found, _ = averaged(before, before, theirs, {}, 0.5, 1)
    assert not any(name.startswith(ACCUMULATED) for name in found)


def test_gradients_that_led_to_a_step_during_an_average_do_not_come_back(loop: LoopThread) -> None:
    one, other = make_expert(2), make_expert(2)

    async def scenario() -> None:
        runtime = Runtime({AN_UID: one}, max_queued_rows=100, max_batch_rows=100, threads=1)
        base = await SnapshotTaker(runtime, SWARM, lambda uid: {}).take(AN_UID)
        step(one)
        average_into(one, base, other.checkpoint(), SWARM, 0.5)
        assert (one.update_count, one.accumulated_rows) == (1, 0)
        await runtime.stop()

    loop.run(scenario(), 60)
    # Both started with the same parameters, so the average comes from the steps.
    torch.testing.assert_close(one.export_state(), make_expert(3).export_state())
