"""Fan-out with experts that fail, are late or never answer. Time is virtual: what is asserted of it is exact."""

import asyncio
from typing import Any

import numpy as np
import pytest
from dispatch_swarm import (
    DEADLINE,
    GRACE,
    LATE,
    LENGTH,
    answered_by,
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
)
from grpc import StatusCode
from hypothesis import given, settings
from hypothesis import strategies as st

from dht.registry import NodeInfo
from trainer_client.breaker import CircuitBreakers


def test_all_experts_answer_and_the_call_returns_at_once() -> None:
    async def scenario() -> None:
        swarm = make_swarm(6)
        dispatcher = make_dispatcher(swarm)
        result = await dispatcher.forward(0, random_rows(8), ranked(8, 6, 4, 1, 5), 3, LENGTH)
        assert result.answered.all()
        assert answered_by_all_rows(result) == [1, 4, 5]
        check_outputs(swarm, result)
        assert now() == 0
        assert dispatcher.stats.calls == 3
        assert not dispatcher.stats.failures

    run(scenario())


def test_each_server_gets_one_call_with_all_its_experts() -> None:
    async def scenario() -> None:
        swarm = make_swarm(6, peers=2)
        result = await make_dispatcher(swarm).forward(0, random_rows(8), ranked(8, 6), 4, LENGTH)
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
        result = await make_dispatcher(swarm).forward(0, random_rows(8), ranked(8, 4), 3, LENGTH)
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
        result = await make_dispatcher(swarm).forward(0, random_rows(8), ranked(8, 4), 3, LENGTH)
        assert answered_by_all_rows(result) == [0, 1, 2]
        assert now() == pytest.approx(0.2 + 0.9 * GRACE)

    run(scenario())


def test_slow_experts_are_waited_for_while_a_row_lacks_k_min_and_nobody_else_is_asked() -> None:
    async def scenario() -> None:
        swarm = make_swarm(6)
        swarm.behaviours[uid(1)] = swarm.behaviours[uid(2)] = LATE
        result = await make_dispatcher(swarm).forward(0, random_rows(8), ranked(8, 6), 3, LENGTH)
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
        result = await dispatcher.forward(0, random_rows(8), ranked(8, 4), 3, LENGTH)
        assert answered_by_all_rows(result) == [0, 1]
        assert now() == pytest.approx(0.1)

    run(scenario())


def test_late_answer_changes_nothing_after_the_call_has_returned() -> None:
    async def scenario() -> None:
        swarm = make_swarm(3)
        swarm.behaviours[uid(2)] = LATE
        result = await make_dispatcher(swarm).forward(0, random_rows(8), ranked(8, 3), 3, LENGTH)
        outputs, answers = result.outputs.copy(), len(result.answers)
        await settle()
        assert swarm.ended == 3
        np.testing.assert_array_equal(result.outputs, outputs)
        assert len(result.answers) == answers

    run(scenario())


def test_rows_of_a_dead_peer_are_given_to_the_next_best_experts() -> None:
    async def scenario() -> None:
        swarm = make_swarm(8, peers=4)  # peer 0 has experts 0 and 4
        swarm.behaviours[make_peer_id(0)] = fails()
        dispatcher = make_dispatcher(swarm)
        scores = ranked(8, 8, 0, 4, 1)  # two of three at the dead peer: one answer is below k_min
        result = await dispatcher.forward(0, random_rows(8), scores, 3, LENGTH)
        assert answered_by_all_rows(result) == [1, 2, 3]
        check_outputs(swarm, result)
        assert now() == 0
        assert dispatcher.stats.reselected_rows == 8
        assert dispatcher.stats.failures == {"unavailable": 2}  # it was asked once more
        assert dispatcher.stats.unanswered_rows == 0

    run(scenario())


def test_rows_that_have_k_min_without_the_dead_peer_are_not_sent_again() -> None:
    async def scenario() -> None:
        swarm = make_swarm(8)
        swarm.behaviours[uid(0)] = fails()
        dispatcher = make_dispatcher(swarm)
        result = await dispatcher.forward(0, random_rows(8), ranked(8, 8), 3, LENGTH)
        assert answered_by_all_rows(result) == [1, 2]
        assert dispatcher.stats.calls == 3
        assert dispatcher.stats.reselected_rows == 0

    run(scenario())


def test_only_rows_that_lack_answers_are_sent_to_others() -> None:
    async def scenario() -> None:
        swarm = make_swarm(6)
        swarm.behaviours[uid(0)] = fails()
        scores = ranked(8, 6)
        scores[0][:4] = ranked(4, 6, 1, 2)[0]  # the first sequence doesn't want expert 0
        result = await make_dispatcher(swarm).forward(0, random_rows(8), scores, 2, LENGTH)
        assert [answered_by(result, row) for row in range(8)] == [[1, 2]] * 8
        assert swarm.rows_sent("forward", uid(2)) == 8
        assert [call.requests[0].lengths for call in swarm.calls if call.uids == [uid(2)]] == [[4], [4]]
        check_outputs(swarm, result)

    run(scenario())


def test_rows_of_peers_that_fail_one_after_another_are_all_chosen_again() -> None:
    """What counts is how often a row was chosen for, not how many failures came before."""

    async def scenario() -> None:
        experts, dead = 12, 6
        swarm = make_swarm(experts)
        for i in range(dead):
            swarm.behaviours[make_peer_id(i)] = fails(after_s=0.1 * (i + 1))
        scores = np.concatenate([ranked(1, experts, i, dead + i)[0] for i in range(dead)])
        scores[:, :dead] -= 100 * (scores[:, :dead] < 0)  # a dead expert is only ever somebody's best
        result = await make_dispatcher(swarm).forward(0, random_rows(dead), [scores], 2, dead)
        assert (result.answered.sum(axis=1) == 2).all()
        check_outputs(swarm, result)

    run(scenario())


@pytest.mark.parametrize("half_of_the_experts_are_frozen", [False, True])
def test_rows_of_frozen_peers_are_given_to_others_at_half_of_the_deadline(
    half_of_the_experts_are_frozen: bool,
) -> None:
    async def scenario() -> None:
        swarm = make_swarm(8)
        frozen = range(3) if half_of_the_experts_are_frozen else [2]
        for i in frozen:
            swarm.behaviours[make_peer_id(i)] = SILENT
        dispatcher = make_dispatcher(swarm, k_min=3)
        result = await dispatcher.forward(0, random_rows(8), ranked(8, 8), 3, LENGTH)
        assert now() == DEADLINE / 2
        assert (result.answered.sum(axis=1) >= 3).all()
        assert not set(answered_by_all_rows(result)) & set(frozen)
        check_outputs(swarm, result)
        assert [call.deadline_s for call in swarm.calls] == [DEADLINE] * 3 + [DEADLINE / 2] * len(frozen)

    run(scenario())


def test_frozen_peer_is_not_asked_again_while_its_first_call_lasts() -> None:
    async def scenario() -> None:
        swarm = make_swarm(4)
        swarm.behaviours[make_peer_id(0)] = SILENT
        dispatcher = make_dispatcher(swarm, breakers=CircuitBreakers(first_s=5.0))
        for _ in range(3):
            await dispatcher.forward(0, random_rows(8), ranked(8, 4), 2, LENGTH)
        assert now() == DEADLINE / 2  # the second and third call cost no time
        assert swarm.rows_sent("forward", uid(0)) == 8
        await asyncio.sleep(DEADLINE / 2 + 4.9)
        assert dispatcher.live_experts() == 3  # its call has failed by now
        await asyncio.sleep(0.2)
        assert dispatcher.live_experts() == 4

    run(scenario())


def test_everybody_frozen_ends_by_the_deadline_with_nothing() -> None:
    async def scenario() -> None:
        swarm = make_swarm(8)
        swarm.behaviours |= {make_peer_id(i): SILENT for i in range(8)}
        dispatcher = make_dispatcher(swarm)
        result = await dispatcher.forward(0, random_rows(8), ranked(8, 8), 4, LENGTH)
        assert now() == DEADLINE
        assert not result.answered.any()
        assert not result.answers
        assert dispatcher.stats.unanswered_rows == 8

    run(scenario())


def test_where_everybody_is_slow_the_first_answers_count_though_others_were_asked_too() -> None:
    async def scenario() -> None:
        swarm = make_swarm(8)
        swarm.behaviours |= {make_peer_id(i): Behaviour(after_s=0.7 * DEADLINE) for i in range(8)}
        dispatcher = make_dispatcher(swarm)
        result = await dispatcher.forward(0, random_rows(8), ranked(8, 8), 3, LENGTH)
        assert answered_by_all_rows(result) == [0, 1, 2]
        assert now() == pytest.approx(0.7 * DEADLINE)
        assert len(swarm.calls) == 6
        check_outputs(swarm, result)

    run(scenario())


def test_late_expert_is_not_asked_again_at_another_of_its_hosts() -> None:
    async def scenario() -> None:
        swarm = make_swarm(6)
        swarm.behaviours[uid(0)] = Behaviour(after_s=0.7 * DEADLINE)
        swarm.behaviours[uid(5)] = Behaviour(after_s=0.9 * DEADLINE)
        directory = swarm.directory(more_hosts=[make_peer_id(9)])
        result = await make_dispatcher(swarm, directory=directory, most_hedged=0).forward(
            0, random_rows(8), ranked(8, 6, 0, 5), 2, LENGTH
        )
        assert swarm.rows_sent("forward", uid(0)) == swarm.rows_sent("forward", uid(5)) == 8
        assert answered_by_all_rows(result) == [1, 2]
        check_outputs(swarm, result)

    run(scenario())


def test_late_experts_that_nobody_can_replace_may_answer_until_the_deadline() -> None:
    async def scenario() -> None:
        swarm = make_swarm(2)
        swarm.behaviours |= {uid(i): Behaviour(after_s=0.8 * DEADLINE) for i in range(2)}
        result = await make_dispatcher(swarm).forward(0, random_rows(8), ranked(8, 2), 2, LENGTH)
        assert result.answered.all()
        assert now() == pytest.approx(0.8 * DEADLINE)
        check_outputs(swarm, result)

    run(scenario())


def test_all_experts_dead_ends_at_once_with_nothing_and_no_exception() -> None:
    async def scenario() -> None:
        swarm = make_swarm(30)
        swarm.behaviours |= {make_peer_id(i): fails() for i in range(30)}
        dispatcher = make_dispatcher(swarm)
        result = await dispatcher.forward(0, random_rows(8), ranked(8, 30), 4, LENGTH)
        assert now() == 0
        assert not result.answered.any()
        assert not result.outputs.any()
        assert dispatcher.stats.unanswered_rows == 8
        calls = len(swarm.calls)
        assert 4 < calls <= 2 * 8 * 4  # in eight rounds, each expert at most twice
        gradients = await dispatcher.backward(result, np.ones((8, 4, 8), np.float32))
        assert not gradients.any()
        assert len(swarm.calls) == calls

    run(scenario())


def test_empty_view_ends_at_once_with_nothing() -> None:
    async def scenario() -> None:
        swarm = make_swarm(6)
        dispatcher = make_dispatcher(swarm, directory=swarm.directory(live=[]))
        result = await dispatcher.forward(0, random_rows(8), ranked(8, 6), 4, LENGTH)
        assert not result.answered.any()
        assert dispatcher.stats.unanswered_rows == 8
        assert not swarm.calls
        assert dispatcher.live_experts() == 0

    run(scenario())


def test_no_rows_need_no_experts() -> None:
    async def scenario() -> None:
        swarm = make_swarm(6)
        result = await make_dispatcher(swarm).forward(0, random_rows(0), ranked(0, 6), 4, LENGTH)
        assert result.outputs.shape == (0, 4, 8)
        assert not swarm.calls

    run(scenario())


def test_one_live_expert_is_enough_for_top_4() -> None:
    async def scenario() -> None:
        swarm = make_swarm(6)
        dispatcher = make_dispatcher(swarm, directory=swarm.directory(live=[uid(5)]))
        result = await dispatcher.forward(0, random_rows(8), ranked(8, 6), 4, LENGTH)
        assert answered_by_all_rows(result) == [5]
        assert now() == 0
        assert dispatcher.stats.reselected_rows == 0
        check_outputs(swarm, result)

    run(scenario())


def test_fewer_live_experts_than_k_min_are_waited_for_only_the_grace_time_together() -> None:
    async def scenario() -> None:
        swarm = make_swarm(6)
        swarm.behaviours[uid(1)] = Behaviour(after_s=0.3)
        directory = swarm.directory(live=[uid(0), uid(1)])
        dispatcher = make_dispatcher(swarm, k_min=4, directory=directory)
        result = await dispatcher.forward(0, random_rows(8), ranked(8, 6), 4, LENGTH)
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


@settings(max_examples=150)
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
        result = await dispatcher.forward(0, random_rows(12), scores, k, LENGTH)
        assert now() <= DEADLINE
        check_outputs(swarm, result)
        began = now()
        gradients = await dispatcher.backward(result, np.ones_like(result.outputs))
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
        backward = asyncio.create_task(dispatcher.backward(result, random_gradients(result)))
        await asyncio.sleep(1.0)
        calls = len(swarm.calls)
        assert calls == 9
        await dispatcher.close()
        assert not (await forward).answered.any()
        assert not (await backward).any()
        assert now() == 1.0
        assert len(swarm.calls) == swarm.ended == calls
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(scenario())


def test_caller_with_a_fault_of_its_own_costs_its_shares_and_no_time() -> None:
    class Faulty(FakeSwarm):
        def call(self, node: NodeInfo, *arguments: Any) -> Any:
            if node.peer_id == make_peer_id(0):
                raise ZeroDivisionError("a bug")
            return super().call(node, *arguments)

    async def scenario() -> None:
        errors: list[object] = []
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: errors.append(context["exception"])
        )
        swarm = Faulty(make_manifest((4,)))
        result = await forward_once(make_dispatcher(swarm), 4)
        assert answered_by_all_rows(result) == [1, 2]
        assert now() == 0
        await asyncio.sleep(1.0)
        assert [type(error) for error in errors] == [ZeroDivisionError]  # not swallowed

    run(scenario())
