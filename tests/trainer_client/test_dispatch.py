"""Fan-out with experts that fail, are late or never answer. Time is virtual: what is asserted of it is exact.

Unless a test says otherwise, expert i of a one-dimensional grid lives alone on peer i.
"""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

import numpy as np
import pytest
from expert_fakes import (
    SILENT,
    Behaviour,
    FakeDirectory,
    FakeSwarm,
    fails,
    make_manifest,
    make_peer_id,
    now,
    random_rows,
    virtual_time,
)
from grpc import StatusCode
from hypothesis import given, settings
from hypothesis import strategies as st

from dht.registry import NodeInfo
from dht.uid import UID
from peer.codec import Floats
from trainer_client.breaker import CircuitBreakers
from trainer_client.calls import Request
from trainer_client.dispatch import Dispatcher
from trainer_client.forward_pass import ForwardPass
from trainer_client.waiting import WaitPolicy

DEADLINE, GRACE = 10.0, 1.0
LENGTH = 4
LATE = Behaviour(after_s=3.0)  # after the grace time, before half of the deadline


def uid(number: int) -> UID:
    return UID(0, (number,))


def make_dispatcher(
    swarm: FakeSwarm,
    *,
    k_min: int = 2,
    grace_s: float = GRACE,
    directory: FakeDirectory | None = None,
    breakers: CircuitBreakers | None = None,
    most_hedged: float = 0.1,
) -> Dispatcher:
    """Inside the loop: its clock is the dispatcher's."""
    return Dispatcher(
        directory or swarm.directory(),
        swarm,
        WaitPolicy(DEADLINE, grace_s, k_min, most_hedged=most_hedged),
        breakers=breakers,
        clock=asyncio.get_running_loop().time,
    )


def make_swarm(experts: int, peers: int | None = None) -> FakeSwarm:
    return FakeSwarm(make_manifest((experts,)), peers)


def ranked(rows: int, experts: int, *first: int) -> list[Floats]:
    """Scores by which every row wants the experts `first`, best first, and then the others by number."""
    order = [*first, *(i for i in range(experts) if i not in first)]
    scores = np.empty((rows, experts), np.float32)
    scores[:, order] = -np.arange(experts, dtype=np.float32)
    return [scores]


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    with virtual_time() as runner:
        runner.run(coroutine)


def answered_by(result: ForwardPass, row: int) -> list[int]:
    """The experts that a row has answers of."""
    return sorted(result.coordinates[row, result.answered[row], 0].tolist())


def answered_by_all_rows(result: ForwardPass) -> list[int]:
    experts = answered_by(result, 0)
    assert all(answered_by(result, row) == experts for row in range(len(result.inputs)))
    return experts


def check_outputs(swarm: FakeSwarm, result: ForwardPass) -> None:
    """No row has an expert twice, and every answer stands in the slot of the expert that gave it."""
    for row, slots in enumerate(result.answered):
        experts = result.coordinates[row, slots].tolist()
        assert len(set(map(tuple, experts))) == len(experts)
    assert not result.outputs[~result.answered].any()
    computed = np.zeros_like(result.outputs)
    counted = np.zeros(result.answered.shape, int)
    for answer in result.answers:
        share = answer.share
        inputs = result.inputs[share.rows]
        tensor = swarm.compute(
            "forward", Request(share.uid, share.lengths.tolist(), share.positions.tolist(), inputs, None)
        )
        rows, slots = share.rows[answer.counts], share.slots[answer.counts]
        assert (result.coordinates[rows, slots] == share.uid.coordinate).all()
        computed[rows, slots] = tensor[answer.counts]
        counted[rows, slots] += 1
    np.testing.assert_array_equal(counted, result.answered)
    np.testing.assert_allclose(result.outputs, computed, rtol=0, atol=1e-5)


async def settle() -> None:
    """Lets every call that is under way come to its end."""
    await asyncio.sleep(3 * DEADLINE)


# Forward


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
        assert dispatcher.stats.failures == {"unavailable": 1}
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
        assert 4 < calls <= 8 * 4  # in eight rounds
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


# Breakers


async def forward_once(dispatcher: Dispatcher, experts: int, k: int = 3) -> ForwardPass:
    return await dispatcher.forward(0, random_rows(8), ranked(8, experts), k, LENGTH)


def test_dead_peer_is_left_alone_until_its_breaker_lets_it_be_tried_again() -> None:
    async def scenario() -> None:
        swarm = make_swarm(5)
        swarm.behaviours[make_peer_id(0)] = fails()
        dispatcher = make_dispatcher(swarm, breakers=CircuitBreakers(first_s=2.0))
        await forward_once(dispatcher, 5)
        assert dispatcher.live_experts() == 5  # a call that is lost quickly may be the line's fault
        await forward_once(dispatcher, 5)
        assert dispatcher.live_experts() == 4
        result = await forward_once(dispatcher, 5)
        assert answered_by_all_rows(result) == [1, 2, 3]
        await asyncio.sleep(2.0)
        assert dispatcher.live_experts() == 5
        swarm.behaviours.clear()
        result = await forward_once(dispatcher, 5)
        assert answered_by_all_rows(result) == [0, 1, 2]

    run(scenario())


def test_expert_of_a_dead_peer_is_called_at_its_other_host() -> None:
    async def scenario() -> None:
        swarm = make_swarm(2, peers=1)
        swarm.behaviours[make_peer_id(0)] = fails()
        directory = swarm.directory(more_hosts=[make_peer_id(9)])
        dispatcher = make_dispatcher(swarm, directory=directory)
        for _ in range(20):
            result = await forward_once(dispatcher, 2, k=2)
        assert result.answered.all()
        assert dispatcher.live_experts() == 2
        assert [call.peer_id for call in swarm.calls].count(make_peer_id(0)) == 2

    run(scenario())


def test_a_slow_failure_is_not_forgiven() -> None:
    async def scenario() -> None:
        swarm = make_swarm(5)
        swarm.behaviours[make_peer_id(0)] = fails(after_s=DEADLINE / 2 + 0.1)
        dispatcher = make_dispatcher(swarm, grace_s=DEADLINE, breakers=CircuitBreakers(first_s=2.0))
        await forward_once(dispatcher, 5)
        assert dispatcher.live_experts() == 4

    run(scenario())


@pytest.mark.parametrize("whole_call", [True, False])
def test_busy_peer_is_left_alone_as_long_as_it_asks_and_no_longer(whole_call: bool) -> None:
    async def scenario() -> None:
        swarm = make_swarm(5)
        busy = Behaviour(StatusCode.RESOURCE_EXHAUSTED, retry_after_s=7.0)
        swarm.behaviours[make_peer_id(0) if whole_call else uid(0)] = busy
        dispatcher = make_dispatcher(swarm, breakers=CircuitBreakers(first_s=100.0))
        await forward_once(dispatcher, 5)
        assert dispatcher.stats.failures == {"resource_exhausted": 1}
        assert dispatcher.live_experts() == 4
        await asyncio.sleep(6.9)
        assert dispatcher.live_experts() == 4
        await asyncio.sleep(0.1)
        assert dispatcher.live_experts() == 5

    run(scenario())


@pytest.mark.parametrize(("status", "live"), [(StatusCode.INVALID_ARGUMENT, 4), (StatusCode.UNKNOWN, 3)])
def test_call_that_is_refused_as_a_whole_is_not_always_the_peers_fault(status: StatusCode, live: int) -> None:
    async def scenario() -> None:
        swarm = make_swarm(4)
        swarm.behaviours[make_peer_id(0)] = fails(status)
        dispatcher = make_dispatcher(swarm)
        await forward_once(dispatcher, 4)
        assert dispatcher.live_experts() == live

    run(scenario())


@pytest.mark.parametrize(
    ("status", "avoided"),
    [
        (StatusCode.NOT_FOUND, False),
        (StatusCode.INTERNAL, False),
        (StatusCode.INVALID_ARGUMENT, False),
        (StatusCode.DEADLINE_EXCEEDED, True),
        (StatusCode.UNAVAILABLE, True),
        (StatusCode.DATA_LOSS, True),
    ],
)
def test_peer_is_avoided_for_an_experts_failure_only_where_the_peer_is_to_blame(
    status: StatusCode, avoided: bool
) -> None:
    async def scenario() -> None:
        swarm = make_swarm(6, peers=3)
        swarm.behaviours[uid(0)] = Behaviour(status)
        dispatcher = make_dispatcher(swarm)
        result = await forward_once(dispatcher, 6, k=4)  # experts 0 and 3 live on peer 0
        assert answered_by_all_rows(result) == [1, 2, 3]
        assert dispatcher.live_experts() == (4 if avoided else 6)

    run(scenario())


def test_failures_are_counted_by_cause() -> None:
    async def scenario() -> None:
        swarm = make_swarm(8, peers=4)
        swarm.behaviours[uid(0)] = swarm.behaviours[uid(4)] = fails(StatusCode.NOT_FOUND)  # both on peer 0
        swarm.behaviours[make_peer_id(1)] = fails(StatusCode.DATA_LOSS)
        swarm.behaviours[make_peer_id(2)] = SILENT
        dispatcher = make_dispatcher(swarm, k_min=1)
        await forward_once(dispatcher, 8, k=8)
        assert now() == GRACE
        assert dispatcher.stats.failures == {"not_found": 2, "data_loss": 1}
        await settle()
        assert dispatcher.stats.failures == {"not_found": 2, "data_loss": 1, "deadline_exceeded": 1}
        assert dispatcher.stats.calls == 4

    run(scenario())


# Backward


def gradients_of(swarm: FakeSwarm, result: ForwardPass, gradients: Floats, without: Sequence[int]) -> Floats:
    """By autograd over whole shares: what the experts that answered contribute, row by row."""
    total = np.zeros_like(result.inputs)
    for answer in result.answers:
        share = answer.share
        if share.uid.coordinate[0] not in without:
            of_share = np.zeros((len(share.rows), result.inputs.shape[1]), np.float32)
            for i, (row, slot) in enumerate(zip(share.rows, share.slots, strict=True)):
                if answer.counts[i]:
                    of_share[i] = gradients[row, slot]
            inputs = result.inputs[share.rows]
            request = Request(share.uid, share.lengths.tolist(), share.positions.tolist(), inputs, of_share)
            total[share.rows] += swarm.compute("backward", request)
    return total


def random_gradients(result: ForwardPass, seed: int = 1) -> Floats:
    return np.random.default_rng(seed).standard_normal(result.outputs.shape, dtype=np.float32)


def test_gradient_is_the_sum_over_the_experts() -> None:
    async def scenario() -> None:
        swarm = make_swarm(5)
        dispatcher = make_dispatcher(swarm)
        result = await forward_once(dispatcher, 5)
        gradients = random_gradients(result)
        total = await dispatcher.backward(result, gradients)
        np.testing.assert_allclose(total, gradients_of(swarm, result, gradients, ()), atol=1e-5)
        assert np.abs(total).min() > 0
        assert sorted(call.uids for call in swarm.called("backward")) == [[uid(0)], [uid(1)], [uid(2)]]
        assert dispatcher.stats.late_backward == 0

    run(scenario())


@pytest.mark.parametrize(
    ("behaviour", "ends_at"),
    [
        (fails(), 0.0),
        (fails(StatusCode.INTERNAL, after_s=1.0), 1.0),
        (SILENT, DEADLINE),
        (LATE, LATE.after_s),
    ],
)
def test_expert_that_fails_in_backward_contributes_nothing_and_one_that_is_slow_contributes_all(
    behaviour: Behaviour, ends_at: float
) -> None:
    async def scenario() -> None:
        swarm = make_swarm(5)
        dispatcher = make_dispatcher(swarm)
        result = await forward_once(dispatcher, 5)
        swarm.behaviours[uid(1)] = behaviour
        gradients = random_gradients(result)
        total = await dispatcher.backward(result, gradients)
        without = () if behaviour is LATE else (1,)
        np.testing.assert_allclose(total, gradients_of(swarm, result, gradients, without), atol=1e-5)
        assert now() == ends_at
        assert dispatcher.stats.late_backward == len(without)

    run(scenario())


def test_backward_waits_for_a_frozen_peer_only_once() -> None:
    async def scenario() -> None:
        swarm = make_swarm(5)
        dispatcher = make_dispatcher(swarm)
        layers = [await forward_once(dispatcher, 5) for _ in range(3)]
        swarm.behaviours[make_peer_id(1)] = SILENT
        for result in layers:
            await dispatcher.backward(result, random_gradients(result))
        assert now() == DEADLINE
        assert dispatcher.stats.late_backward == 3
        assert swarm.rows_sent("backward", uid(1)) == 8

    run(scenario())


def test_backward_is_sent_only_to_experts_whose_answer_counts() -> None:
    async def scenario() -> None:
        swarm = make_swarm(8)
        swarm.behaviours[uid(0)] = fails(StatusCode.NOT_FOUND)
        swarm.behaviours[uid(1)] = Behaviour(after_s=0.9 * DEADLINE)
        dispatcher = make_dispatcher(swarm, k_min=3)
        result = await dispatcher.forward(0, random_rows(8), ranked(8, 8), 3, LENGTH)
        assert answered_by_all_rows(result) == [2, 3, 4]
        await settle()
        await dispatcher.backward(result, random_gradients(result))
        assert sorted(call.uids for call in swarm.called("backward")) == [[uid(2)], [uid(3)], [uid(4)]]

    run(scenario())


def test_late_expert_whose_slots_have_all_been_answered_by_others_gets_no_gradients() -> None:
    async def scenario() -> None:
        swarm = make_swarm(6)
        swarm.behaviours |= {uid(1): Behaviour(after_s=5.5), uid(2): SILENT}
        swarm.behaviours |= {uid(3): Behaviour(after_s=0.2), uid(4): Behaviour(after_s=0.9)}  # asked at 5 s
        dispatcher = make_dispatcher(swarm)
        result = await forward_once(dispatcher, 6)
        assert now() == pytest.approx(5.9)  # so that expert 1 has answered meanwhile
        assert answered_by_all_rows(result) == [0, 3, 4]
        check_outputs(swarm, result)
        await dispatcher.backward(result, random_gradients(result))
        assert sorted(call.uids for call in swarm.called("backward")) == [[uid(0)], [uid(3)], [uid(4)]]

    run(scenario())


def test_expert_that_lost_some_of_its_slots_is_sent_zero_gradients_for_them() -> None:
    """Its outputs for the other rows have looked back at these, so they are part of its gradient."""

    async def scenario() -> None:
        swarm = make_swarm(4)
        # rows 0, 2, 4, 6 want experts 0 and 1; the odd ones 0 and 2, which is slower than half of the deadline
        scores = ranked(8, 4, 0, 1)
        scores[0][1::2] = ranked(4, 4, 0, 2)[0]
        swarm.behaviours[uid(0)] = Behaviour(after_s=6.0)
        swarm.behaviours[uid(2)] = Behaviour(after_s=5.5)
        swarm.behaviours[uid(1)] = Behaviour(after_s=1.0)
        swarm.behaviours[uid(3)] = Behaviour(after_s=0.6)  # asked at 5 s by all: answers before expert 0
        dispatcher = make_dispatcher(swarm)
        inputs = random_rows(8)
        result = await dispatcher.forward(0, inputs, scores, 2, LENGTH)
        check_outputs(swarm, result)
        partial = [answer for answer in result.answers if not answer.counts.all()]
        assert partial, "the scenario must have an expert that lost slots"
        swarm.behaviours.clear()
        await settle()
        gradients = random_gradients(result)
        total = await dispatcher.backward(result, gradients)
        np.testing.assert_allclose(total, gradients_of(swarm, result, gradients, ()), atol=1e-5)
        sent = {call.uids[0]: call.requests[0] for call in swarm.called("backward")}
        for answer in partial:
            request = sent[answer.share.uid]
            assert request.gradients is not None
            assert len(request.gradients) == len(answer.share.rows)
            assert not request.gradients[~answer.counts].any()
            assert request.gradients[answer.counts].any(axis=1).all()

    run(scenario())


def test_peer_whose_record_has_expired_since_gets_no_gradients() -> None:
    async def scenario() -> None:
        swarm = make_swarm(4)
        directory = swarm.directory()
        dispatcher = make_dispatcher(swarm, directory=directory)
        result = await forward_once(dispatcher, 4)
        directory.view = FakeSwarm(swarm.manifest, peers=1).directory().view  # only peer 0 is known
        gradients = random_gradients(result)
        total = await dispatcher.backward(result, gradients)
        np.testing.assert_allclose(total, gradients_of(swarm, result, gradients, (1, 2)), atol=1e-5)
        assert now() == 0
        assert dispatcher.stats.late_backward == 2

    run(scenario())


# The end


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
