"""Fan-out to experts that fail, are late or never answer. Time is virtual, so assertions about it are exact."""

import asyncio
from collections.abc import AsyncGenerator

import numpy as np
import pytest
from dispatch_swarm import (
    DEADLINE,
    GRACE,
    LATE,
    LENGTH,
    answered_by_all_rows,
    check_outputs,
    forward_once,
    make_dispatcher,
    make_swarm,
    random_gradients,
    ranked,
    run,
    settle,
    uid,
)
from expert_fakes import (
    SILENT,
    Behaviour,
    FakeSwarm,
    fails,
    make_manifest,
    make_peer_id,
    now,
    random_rows,
    send_to_best,
)
from grpc import StatusCode
from hypothesis import given
from hypothesis import strategies as st

from peer.metrics import total
from trainer_client.dispatch.batches import CallReply, NodeCall


def test_all_experts_answer_and_the_call_returns_at_once() -> None:
    async def scenario() -> None:
        swarm = make_swarm(6)
        dispatcher = make_dispatcher(swarm)
        result = await send_to_best(dispatcher, random_rows(8), ranked(8, 6, 4, 1, 5), 3, LENGTH)
        assert result.answered.all()
        assert answered_by_all_rows(result) == [1, 4, 5]
        check_outputs(swarm, result)
        assert now() == 0
        assert total(dispatcher.metrics.calls) == 3
        assert not dispatcher.metrics.failures_by_cause()

    run(scenario())


def test_each_server_gets_one_call_with_all_its_experts() -> None:
    async def scenario() -> None:
        swarm = make_swarm(6, peers=2)
        result = await send_to_best(make_dispatcher(swarm), random_rows(8), ranked(8, 6), 4, LENGTH)
        assert result.answered.all()
        assert {call.peer_id: call.uids for call in swarm.calls} == {
            make_peer_id(0): [uid(0), uid(2)],
            make_peer_id(1): [uid(1), uid(3)],
        }

    run(scenario())


def test_late_expert_is_left_out_once_every_row_has_k_min_and_the_grace_time_is_over() -> None:
    async def scenario() -> None:
        swarm = make_swarm(4)
        swarm.behaviours[uid(2)] = LATE
        result = await send_to_best(make_dispatcher(swarm), random_rows(8), ranked(8, 4), 3, LENGTH)
        assert now() == GRACE
        assert answered_by_all_rows(result) == [0, 1]
        check_outputs(swarm, result)
        assert len(swarm.calls) == 3  # nobody else was asked

    run(scenario())


def test_grace_time_is_given_to_the_others_also_after_the_first_whole_call_has_ended() -> None:
    async def scenario() -> None:
        swarm = make_swarm(4)
        swarm.behaviours[uid(1)] = Behaviour(after_s=0.2)
        swarm.behaviours[uid(2)] = Behaviour(after_s=0.2 + 0.9 * GRACE)
        result = await send_to_best(make_dispatcher(swarm), random_rows(8), ranked(8, 4), 3, LENGTH)
        assert answered_by_all_rows(result) == [0, 1, 2]
        assert now() == pytest.approx(0.2 + 0.9 * GRACE)

    run(scenario())


def test_slow_experts_are_waited_for_while_a_row_lacks_k_min_and_nobody_else_is_asked() -> None:
    async def scenario() -> None:
        swarm = make_swarm(6)
        swarm.behaviours[uid(1)] = swarm.behaviours[uid(2)] = LATE
        result = await send_to_best(make_dispatcher(swarm), random_rows(8), ranked(8, 6), 3, LENGTH)
        assert answered_by_all_rows(result) == [0, 1, 2]
        assert now() == LATE.after_s
        assert len(swarm.calls) == 3

    run(scenario())


def test_with_no_grace_time_the_call_returns_as_soon_as_there_is_enough() -> None:
    async def scenario() -> None:
        swarm = make_swarm(4)
        swarm.behaviours[uid(1)] = Behaviour(after_s=0.1)
        swarm.behaviours[uid(2)] = Behaviour(after_s=0.2)
        dispatcher = make_dispatcher(swarm, grace_s=0.0)
        result = await send_to_best(dispatcher, random_rows(8), ranked(8, 4), 3, LENGTH)
        assert answered_by_all_rows(result) == [0, 1]
        assert now() == pytest.approx(0.1)

    run(scenario())


def test_late_answer_changes_nothing_after_the_call_has_returned() -> None:
    async def scenario() -> None:
        swarm = make_swarm(3)
        swarm.behaviours[uid(2)] = LATE
        result = await send_to_best(make_dispatcher(swarm), random_rows(8), ranked(8, 3), 3, LENGTH)
        outputs, answers = result.updates.copy(), len(result.answers)
        await settle()
        assert swarm.ended == 3
        np.testing.assert_array_equal(result.updates, outputs)
        assert len(result.answers) == answers

    run(scenario())


def test_all_experts_dead_ends_at_once_with_nothing_and_no_exception() -> None:
    async def scenario() -> None:
        swarm = make_swarm(30)
        swarm.behaviours |= {make_peer_id(i): fails() for i in range(30)}
        dispatcher = make_dispatcher(swarm)
        result = await send_to_best(dispatcher, random_rows(8), ranked(8, 30), 4, LENGTH)
        assert now() == 0
        assert not result.answered.any()
        assert not result.updates.any()
        assert total(dispatcher.metrics.unanswered_rows) == 8
        calls = len(swarm.calls)
        assert 4 < calls <= 2 * 8 * 4  # in eight rounds, each expert at most twice
        for gradients in await dispatcher.send_back(result, np.ones((8, 4, 8), np.float32)):
            assert not gradients.any()
        assert len(swarm.calls) == calls

    run(scenario())


def test_empty_view_ends_at_once_with_nothing() -> None:
    async def scenario() -> None:
        swarm = make_swarm(6)
        dispatcher = make_dispatcher(swarm, directory=swarm.directory(live=[]))
        result = await send_to_best(dispatcher, random_rows(8), ranked(8, 6), 4, LENGTH)
        assert not result.answered.any()
        assert total(dispatcher.metrics.unanswered_rows) == 8
        assert not swarm.calls
        assert dispatcher.live_experts() == 0

    run(scenario())


def test_no_rows_need_no_experts() -> None:
    async def scenario() -> None:
        swarm = make_swarm(6)
        result = await send_to_best(make_dispatcher(swarm), random_rows(0), ranked(0, 6), 4, LENGTH)
        assert result.updates.shape == (0, 4, 8)
        assert not swarm.calls

    run(scenario())


def test_one_live_expert_is_enough_for_top_4() -> None:
    async def scenario() -> None:
        swarm = make_swarm(6)
        dispatcher = make_dispatcher(swarm, directory=swarm.directory(live=[uid(5)]))
        result = await send_to_best(dispatcher, random_rows(8), ranked(8, 6), 4, LENGTH)
        assert answered_by_all_rows(result) == [5]
        assert now() == 0
        assert total(dispatcher.metrics.reselected_rows) == 0
        check_outputs(swarm, result)

    run(scenario())


def test_fewer_live_experts_than_k_min_are_waited_for_only_the_grace_time_together() -> None:
    async def scenario() -> None:
        swarm = make_swarm(6)
        swarm.behaviours[uid(1)] = Behaviour(after_s=0.3)
        directory = swarm.directory(live=[uid(0), uid(1)])
        dispatcher = make_dispatcher(swarm, k_min=4, directory=directory)
        result = await send_to_best(dispatcher, random_rows(8), ranked(8, 6), 4, LENGTH)
        assert answered_by_all_rows(result) == [0, 1]
        assert now() == pytest.approx(0.3)
        assert len(swarm.calls) == 2

    run(scenario())


behaviours = st.sampled_from(
    [Behaviour(), Behaviour(), Behaviour(after_s=0.5), LATE, Behaviour(after_s=6.0), SILENT]
    + [
        fails(status)
        for status in (StatusCode.UNAVAILABLE, StatusCode.NOT_FOUND, StatusCode.RESOURCE_EXHAUSTED)
    ]
    + [fails(after_s=0.3), fails(StatusCode.DATA_LOSS, after_s=7.0)]
)


@given(st.data())
def test_whatever_fails_a_call_ends_in_time_with_the_right_outputs_and_no_expert_twice(
    data: st.DataObject,
) -> None:
    async def scenario() -> None:
        peers = data.draw(st.integers(1, 9))
        k, k_min = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
        swarm = FakeSwarm(make_manifest((3, 3)), peers)
        for number in range(peers):
            swarm.behaviours[make_peer_id(number)] = data.draw(behaviours)
        for expert in swarm.manifest.uids():
            swarm.behaviours[expert] = data.draw(behaviours)
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
        dispatcher = make_dispatcher(swarm, k_min=k_min)
        scores = [rng.standard_normal((12, 3), dtype=np.float32) for _ in range(2)]
        result = await send_to_best(dispatcher, random_rows(12), scores, k, LENGTH)
        assert now() <= DEADLINE
        check_outputs(swarm, result)
        began = now()
        for gradients in await dispatcher.send_back(result, random_gradients(result)):
            assert np.isfinite(gradients).all()
        assert now() <= began + DEADLINE
        await settle()
        assert swarm.ended == len(swarm.calls)

    run(scenario())


def test_nothing_is_left_running_after_close() -> None:
    async def scenario() -> None:
        swarm = make_swarm(4)
        swarm.behaviours |= {uid(1): LATE, make_peer_id(2): SILENT}
        dispatcher = make_dispatcher(swarm, k_min=1)
        await forward_once(dispatcher, 4)
        assert swarm.ended == 1
        await dispatcher.close()
        assert swarm.ended == len(swarm.calls) == 3
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert now() == GRACE

    run(scenario())


def test_forward_and_backward_that_are_under_way_end_at_close_and_start_nothing_more() -> None:
    async def scenario() -> None:
        swarm = make_swarm(8)
        dispatcher = make_dispatcher(swarm)
        result = await forward_once(dispatcher, 8)
        swarm.behaviours |= {make_peer_id(i): SILENT for i in range(8)}
        forward = asyncio.create_task(forward_once(dispatcher, 8))
        backward = asyncio.create_task(dispatcher.send_back(result, random_gradients(result)))
        await asyncio.sleep(1.0)
        calls = len(swarm.calls)
        assert calls == 9
        await dispatcher.close()
        assert not (await forward).answered.any()
        assert not any(gradients.any() for gradients in await backward)
        assert now() == 1.0
        assert len(swarm.calls) == swarm.ended == calls
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(scenario())


def test_caller_with_a_fault_of_its_own_costs_its_batches_and_no_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Faulty(FakeSwarm):
        def call(self, call: NodeCall) -> AsyncGenerator[CallReply, None]:
            if call.node.peer_id == make_peer_id(0):
                raise ZeroDivisionError("a bug")
            return super().call(call)

    async def scenario() -> None:
        swarm = Faulty(make_manifest((4,)))
        dispatcher = make_dispatcher(swarm)
        result = await forward_once(dispatcher, 4)
        assert answered_by_all_rows(result) == [1, 2]
        assert now() == 0
        (logged,) = [record.exc_info for record in caplog.records if record.exc_info]
        assert logged[0] is ZeroDivisionError, "it is not swallowed"
        assert total(dispatcher.metrics.wrong_answers) == 1, "the peer that found it is left alone"

    run(scenario())
