"""Rows whose experts fail or are late are sent to other experts once. Time is virtual, so assertions about it are
exact.
"""

import asyncio

import numpy as np
import pytest
from dispatch_swarm import (
    DEADLINE,
    LENGTH,
    answered_by,
    answered_by_all_rows,
    check_outputs,
    make_dispatcher,
    make_swarm,
    ranked,
    run,
    uid,
)
from expert_fakes import (
    SILENT,
    Behaviour,
    fails,
    make_peer_id,
    now,
    random_rows,
    send_to_best,
)

from peer.metrics import total
from trainer_client.dispatch.policy import CircuitBreakers


def test_rows_of_a_dead_peer_are_given_to_the_next_best_experts() -> None:
    async def scenario() -> None:
        swarm = make_swarm(8, peers=4)  # peer 0 has experts 0 and 4
        swarm.behaviours[make_peer_id(0)] = fails()
        dispatcher = make_dispatcher(swarm)
        scores = ranked(8, 8, 0, 4, 1)  # two of three at the dead peer: one answer is below k_min
        result = await send_to_best(dispatcher, random_rows(8), scores, 3, LENGTH)
        assert answered_by_all_rows(result) == [1, 2, 3]
        check_outputs(swarm, result)
        assert now() == 0
        assert total(dispatcher.metrics.reselected_rows) == 8
        assert dispatcher.metrics.failures_by_cause() == {"unavailable": 2}  # it was asked once more
        assert total(dispatcher.metrics.unanswered_rows) == 0

    run(scenario())


def test_rows_that_have_k_min_without_the_dead_peer_are_not_sent_again() -> None:
    async def scenario() -> None:
        swarm = make_swarm(8)
        swarm.behaviours[uid(0)] = fails()
        dispatcher = make_dispatcher(swarm)
        result = await send_to_best(dispatcher, random_rows(8), ranked(8, 8), 3, LENGTH)
        assert answered_by_all_rows(result) == [1, 2]
        assert total(dispatcher.metrics.calls) == 3
        assert total(dispatcher.metrics.reselected_rows) == 0

    run(scenario())


def test_only_rows_that_lack_answers_are_sent_to_others() -> None:
    async def scenario() -> None:
        swarm = make_swarm(6)
        swarm.behaviours[uid(0)] = fails()
        scores = ranked(8, 6)
        scores[0][:4] = ranked(4, 6, 1, 2)[0]  # the first sequence doesn't want expert 0
        result = await send_to_best(make_dispatcher(swarm), random_rows(8), scores, 2, LENGTH)
        assert [answered_by(result, row) for row in range(8)] == [[1, 2]] * 8
        assert swarm.rows_sent("forward", uid(2)) == 8
        assert [call.batch.lengths.tolist() for call in swarm.calls if call.uids == [uid(2)]] == [
            [4],
            [4],
        ]
        check_outputs(swarm, result)

    run(scenario())


def test_rows_of_peers_that_fail_one_after_another_are_all_chosen_again() -> None:
    """What counts is how often experts were chosen for a row, not how many failures came before."""

    async def scenario() -> None:
        experts, dead = 12, 6
        swarm = make_swarm(experts)
        for i in range(dead):
            swarm.behaviours[make_peer_id(i)] = fails(after_s=0.1 * (i + 1))
        scores = np.concatenate([ranked(1, experts, i, dead + i)[0] for i in range(dead)])
        scores[:, :dead] -= 100 * (scores[:, :dead] < 0)  # a dead expert is only ever somebody's best
        result = await send_to_best(make_dispatcher(swarm), random_rows(dead), [scores], 2, dead)
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
        result = await send_to_best(dispatcher, random_rows(8), ranked(8, 8), 3, LENGTH)
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
            await send_to_best(dispatcher, random_rows(8), ranked(8, 4), 2, LENGTH)
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
        result = await send_to_best(dispatcher, random_rows(8), ranked(8, 8), 4, LENGTH)
        assert now() == DEADLINE
        assert not result.answered.any()
        assert not result.answers
        assert total(dispatcher.metrics.unanswered_rows) == 8

    run(scenario())


def test_where_everybody_is_slow_the_first_answers_count_though_others_were_asked_too() -> None:
    async def scenario() -> None:
        swarm = make_swarm(8)
        swarm.behaviours |= {make_peer_id(i): Behaviour(after_s=0.7 * DEADLINE) for i in range(8)}
        dispatcher = make_dispatcher(swarm)
        result = await send_to_best(dispatcher, random_rows(8), ranked(8, 8), 3, LENGTH)
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
        result = await send_to_best(
            make_dispatcher(swarm, directory=directory, most_hedged=0),
            random_rows(8),
            ranked(8, 6, 0, 5),
            2,
            LENGTH,
        )
        assert swarm.rows_sent("forward", uid(0)) == swarm.rows_sent("forward", uid(5)) == 8
        assert answered_by_all_rows(result) == [1, 2]
        check_outputs(swarm, result)

    run(scenario())


def test_late_experts_that_nobody_can_replace_may_answer_until_the_deadline() -> None:
    async def scenario() -> None:
        swarm = make_swarm(2)
        swarm.behaviours |= {uid(i): Behaviour(after_s=0.8 * DEADLINE) for i in range(2)}
        result = await send_to_best(make_dispatcher(swarm), random_rows(8), ranked(8, 2), 2, LENGTH)
        assert result.answered.all()
        assert now() == pytest.approx(0.8 * DEADLINE)
        check_outputs(swarm, result)

    run(scenario())


@pytest.mark.parametrize(("left", "is_replaced"), [(0.2, True), (0.1, False)])
def test_an_expert_that_fails_near_the_end_is_not_replaced_by_others_that_would_be_too_late(
    left: float, is_replaced: bool
) -> None:
    async def scenario() -> None:
        swarm = make_swarm(4)
        swarm.behaviours[uid(0)] = swarm.behaviours[uid(1)] = SILENT
        # it is asked when a quarter of the deadline is left
        swarm.behaviours[make_peer_id(2)] = fails(after_s=(0.25 - left) * DEADLINE)
        swarm.behaviours[uid(3)] = Behaviour(after_s=0.15 * DEADLINE)
        breakers = CircuitBreakers(first_s=10 * DEADLINE)
        dispatcher = make_dispatcher(swarm, k_min=1, breakers=breakers)
        result = await send_to_best(dispatcher, random_rows(8), ranked(8, 4), 1, LENGTH)
        assert result.answered.all() == is_replaced
        await asyncio.sleep(2 * DEADLINE)
        assert make_peer_id(3) not in breakers.open_at(now())

    run(scenario())
