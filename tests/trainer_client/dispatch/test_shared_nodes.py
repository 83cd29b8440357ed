"""Nodes that have several of a row's experts: each row is sent once, and answered as a whole. Time is virtual."""

import time
from collections.abc import AsyncGenerator
from dataclasses import replace

import numpy as np
import pytest
from dispatch_swarm import (
    DEADLINE,
    LATE,
    LENGTH,
    answered_by_all_rows,
    check_outputs,
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

from peer.metrics import total
from trainer_client.dispatch.batches import AnsweredRows, CallReply, ExpertReply, NodeCall


def test_a_row_travels_once_to_each_of_its_nodes_with_the_weights_of_its_experts() -> None:
    async def scenario() -> None:
        swarm = make_swarm(6, peers=2)
        scores = ranked(8, 6, 4, 1, 2, 3)
        result = await send_to_best(make_dispatcher(swarm), random_rows(8), scores, 4, LENGTH)
        check_outputs(swarm, result)
        assert {call.peer_id: call.uids for call in swarm.calls} == {
            make_peer_id(0): [uid(2), uid(4)],
            make_peer_id(1): [uid(1), uid(3)],
        }
        assert [len(call.made.inputs) for call in swarm.calls] == [8, 8]
        by_peer = {call.peer_id: call.made for call in swarm.calls}
        np.testing.assert_allclose(by_peer[make_peer_id(0)].weights[0], [1, 0, np.exp(-2), 0], rtol=1e-5)
        np.testing.assert_allclose(by_peer[make_peer_id(1)].weights[0], [0, 1, 0, np.exp(-2)], rtol=1e-5)
        assert result.leads.tolist() == [[0, 1, 0, 1]] * 8

    run(scenario())


def test_a_row_is_answered_when_all_of_its_experts_at_a_node_are_over() -> None:
    async def scenario() -> None:
        swarm = make_swarm(4, peers=2)
        swarm.behaviours[uid(2)] = Behaviour(after_s=0.5)  # at the node of expert 0
        result = await send_to_best(make_dispatcher(swarm), random_rows(8), ranked(8, 4), 4, LENGTH)
        assert answered_by_all_rows(result) == [0, 1, 2, 3]
        assert now() == pytest.approx(0.5)
        check_outputs(swarm, result)

    run(scenario())


def test_an_expert_that_fails_is_left_out_of_its_nodes_answers_and_its_weight_goes_to_the_others() -> None:
    async def scenario() -> None:
        swarm = make_swarm(4, peers=2)
        swarm.behaviours[uid(2)] = fails(StatusCode.INTERNAL)
        result = await send_to_best(make_dispatcher(swarm), random_rows(8), ranked(8, 4), 4, LENGTH)
        assert answered_by_all_rows(result) == [0, 1, 3]
        assert len(swarm.calls) == 2
        check_outputs(swarm, result)

    run(scenario())


def test_rows_that_lack_answers_without_it_go_to_another_node() -> None:
    async def scenario() -> None:
        swarm = make_swarm(8, peers=4)
        swarm.behaviours[uid(4)] = fails(StatusCode.INTERNAL)  # with expert 0 at peer 0
        dispatcher = make_dispatcher(swarm, k_min=3)
        result = await send_to_best(dispatcher, random_rows(8), ranked(8, 8, 0, 4, 1), 3, LENGTH)
        assert answered_by_all_rows(result) == [0, 1, 2]
        check_outputs(swarm, result)
        assert total(dispatcher.metrics.reselected_rows) == 8

    run(scenario())


class LeavingOutSwarm(FakeSwarm):
    """Says that all experts have computed, but leaves number 4 out of all answers."""

    async def call(self, call: NodeCall) -> AsyncGenerator[CallReply, None]:
        async for reply in super().call(call):
            if isinstance(reply, AnsweredRows):
                left_out = (call.batch.coordinates[reply.places] == 4).all(axis=2)
                answered = reply.answered & ~left_out
                reply = replace(reply, answered=answered)
                if not answered.any():
                    continue
            yield reply


def test_an_expert_that_its_node_leaves_out_of_a_row_is_not_asked_again() -> None:
    async def scenario() -> None:
        swarm = LeavingOutSwarm(make_manifest((8,)), peers=4)
        dispatcher = make_dispatcher(swarm, k_min=3)
        result = await send_to_best(dispatcher, random_rows(8), ranked(8, 8, 0, 4, 1), 3, LENGTH)
        assert answered_by_all_rows(result) == [0, 1, 2]
        assert swarm.rows_sent("forward", uid(4)) == 8

    run(scenario())


class RowByRowSwarm(FakeSwarm):
    """Answers each row separately, with an update of zero."""

    async def call(self, call: NodeCall) -> AsyncGenerator[CallReply, None]:
        for each in call.batch.uids:
            yield ExpertReply(call.batch, each)
        for row in np.arange(len(call.batch.rows)):
            asked = call.batch.asked[row : row + 1]
            yield AnsweredRows(call.batch, np.array([row]), asked, np.zeros_like(call.inputs[:1]))


def test_answers_of_one_row_each_cost_the_loop_no_more_in_a_large_call() -> None:
    """If each answer cost as much as all rows of its call, this would take 64 times as long instead of 8 times."""

    async def scenario() -> None:
        swarm = RowByRowSwarm(make_manifest((4,)), peers=1)
        took_s = []
        for rows in (512, 4096):
            began = time.process_time()
            result = await send_to_best(make_dispatcher(swarm), random_rows(rows), ranked(rows, 4), 4, LENGTH)
            took_s.append(time.process_time() - began)
            assert result.answered.all()
        assert took_s[1] < 3 * 8 * took_s[0]

    run(scenario())


def test_a_node_with_a_silent_expert_answers_with_the_others_before_the_deadline() -> None:
    async def scenario() -> None:
        swarm = make_swarm(2, peers=1)
        swarm.behaviours[uid(1)] = SILENT
        result = await send_to_best(make_dispatcher(swarm), random_rows(8), ranked(8, 2), 2, LENGTH)
        assert answered_by_all_rows(result) == [0]
        assert now() == 0.8 * DEADLINE
        check_outputs(swarm, result)

    run(scenario())


def test_backward_has_one_call_to_each_node_and_a_failing_expert_leaves_the_rest() -> None:
    async def scenario() -> None:
        swarm = make_swarm(6, peers=2)
        dispatcher = make_dispatcher(swarm)
        result = await send_to_best(dispatcher, random_rows(8), ranked(8, 6), 4, LENGTH)
        swarm.behaviours[uid(2)] = fails(StatusCode.INTERNAL)
        inputs, logits = await dispatcher.send_back(result, random_gradients(result))
        assert len(swarm.called("backward")) == 2
        assert inputs.any(axis=1).all()
        assert logits.any(axis=0).tolist() == [True, True, False, True]
        assert total(dispatcher.metrics.late_gradients) == 1

    run(scenario())


def test_a_late_node_whose_rows_others_have_answered_is_not_sent_backward() -> None:
    async def scenario() -> None:
        swarm = make_swarm(4, peers=2)
        swarm.behaviours[make_peer_id(0)] = LATE
        dispatcher = make_dispatcher(swarm, grace_s=0.5)
        result = await send_to_best(dispatcher, random_rows(8), ranked(8, 4), 4, LENGTH)
        assert answered_by_all_rows(result) == [1, 3]
        await settle()
        await dispatcher.send_back(result, random_gradients(result))
        assert [call.peer_id for call in swarm.called("backward")] == [make_peer_id(1)]

    run(scenario())
