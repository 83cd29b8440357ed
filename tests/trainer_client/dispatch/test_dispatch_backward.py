"""Gradients are sent to the experts whose answers count, and the results are summed. Time is virtual."""

import asyncio
from collections.abc import AsyncGenerator, Sequence

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
    ExpertWork,
    FakeSwarm,
    fails,
    make_manifest,
    make_peer_id,
    now,
    random_rows,
    send_to_best,
)
from grpc import StatusCode

from dht.receipts import Work
from peer import metrics
from peer.codec import Floats
from trainer_client.credit import CreditAccounts
from trainer_client.dispatch.batches import CallReply, ExpertReply, ForwardPass, NodeCall
from trainer_client.dispatch.dispatcher import Dispatcher


def late_gradients(dispatcher: Dispatcher) -> float:
    return metrics.total(dispatcher.metrics.late_gradients)


def gradients_of(swarm: FakeSwarm, result: ForwardPass, gradients: Floats, without: Sequence[int]) -> Floats:
    """The expected gradients, by autograd over whole batches: the contributions of the experts that answered, row by
    row.
    """
    inputs = result.rows.inputs
    total = np.zeros_like(inputs)
    for sent in result.answers:
        batch = sent.batch
        for part in batch.parts():
            if part.uid.coordinate[0] in without or not sent.counts[part.places, part.slots].any():
                continue
            rows = batch.rows[part.places]
            own = np.zeros((len(rows), inputs.shape[1]), np.float32)
            for i, (place, slot) in enumerate(zip(part.places, part.slots, strict=True)):
                if sent.counts[place, slot]:
                    lead = result.leads[rows[i], slot]
                    own[i] = result.shares[rows[i], slot] * gradients[rows[i], lead]
            work = ExpertWork(part.uid, inputs[rows], *batch.segments(part.places), own)
            total[rows] += swarm.compute("backward", work)
    return total


def test_gradient_is_the_sum_over_the_experts() -> None:
    async def scenario() -> None:
        swarm = make_swarm(5)
        dispatcher = make_dispatcher(swarm)
        result = await forward_once(dispatcher, 5)
        gradients = random_gradients(result)
        total, _ = await dispatcher.send_back(result, gradients)
        np.testing.assert_allclose(total, gradients_of(swarm, result, gradients, ()), atol=1e-5)
        assert np.abs(total).min() > 0
        assert sorted(call.uids for call in swarm.called("backward")) == [[uid(0)], [uid(1)], [uid(2)]]
        assert late_gradients(dispatcher) == 0

    run(scenario())


@pytest.mark.parametrize(
    ("behaviour", "ends_at", "contributes"),
    [
        (fails(), 0.0, False),
        (fails(StatusCode.INTERNAL, after_s=0.5), 0.5, False),
        (SILENT, GRACE, False),
        (LATE, GRACE, False),
        (Behaviour(after_s=0.9 * GRACE), 0.9 * GRACE, True),
    ],
)
def test_expert_contributes_to_the_gradient_if_it_answers_within_the_grace_time(
    behaviour: Behaviour, ends_at: float, contributes: bool
) -> None:
    async def scenario() -> None:
        swarm = make_swarm(5)
        dispatcher = make_dispatcher(swarm)
        result = await forward_once(dispatcher, 5)
        swarm.behaviours[uid(1)] = behaviour
        gradients = random_gradients(result)
        total, _ = await dispatcher.send_back(result, gradients)
        without = () if contributes else (1,)
        np.testing.assert_allclose(total, gradients_of(swarm, result, gradients, without), atol=1e-5)
        assert now() == ends_at
        assert late_gradients(dispatcher) == len(without)

    run(scenario())


@pytest.mark.parametrize(
    ("k_min", "others_s", "after_s", "ends_at", "contributes"),
    [
        (2, 3.0, 5.9, 5.9, True),  # experts that need 3 s give the last one 3 s more
        (2, 3.0, 6.1, 6.0, False),
        (2, 6.0, 9.9, 9.9, True),
        (2, 6.0, 10.1, DEADLINE, False),
        (3, 0.0, 9.9, 9.9, True),  # without it, no row has enough
        (3, 0.0, 10.1, DEADLINE, False),
    ],
)
def test_backward_waits_for_the_rest_as_long_again_as_it_took_until_each_row_had_enough(
    k_min: int, others_s: float, after_s: float, ends_at: float, contributes: bool
) -> None:
    async def scenario() -> None:
        swarm = make_swarm(5)
        dispatcher = make_dispatcher(swarm, k_min=k_min)
        result = await forward_once(dispatcher, 5)
        swarm.behaviours |= {uid(number): Behaviour(after_s=others_s) for number in (0, 2)}
        swarm.behaviours[uid(1)] = Behaviour(after_s=after_s)
        gradients = random_gradients(result)
        total, _ = await dispatcher.send_back(result, gradients)
        assert now() == pytest.approx(ends_at)
        without = () if contributes else (1,)
        np.testing.assert_allclose(total, gradients_of(swarm, result, gradients, without), atol=1e-5)

    run(scenario())


def test_expert_that_answers_after_the_grace_time_has_trained_and_is_not_avoided() -> None:
    async def scenario() -> None:
        swarm = make_swarm(5)
        dispatcher = make_dispatcher(swarm)
        result = await forward_once(dispatcher, 5)
        swarm.behaviours[uid(1)] = LATE
        await dispatcher.send_back(result, random_gradients(result))
        assert dispatcher.open_breakers() == 0
        await settle()
        assert dispatcher.open_breakers() == 0
        assert swarm.rows_sent("backward", uid(1)) == 8

    run(scenario())


@pytest.mark.parametrize(("after_s", "experts"), [(0.9 * GRACE, 3), (1.1 * GRACE, 2)])
def test_credit_is_for_gradients_that_came_in_time(after_s: float, experts: int) -> None:
    async def scenario() -> None:
        swarm, credit = make_swarm(5), CreditAccounts()
        dispatcher = make_dispatcher(swarm, credit=credit)
        result = await forward_once(dispatcher, 5)
        assert credit.all_pairs == 8 * 3
        swarm.behaviours[uid(1)] = Behaviour(after_s=after_s)
        await dispatcher.send_back(result, random_gradients(result))
        await settle()
        assert credit.all_pairs == 8 * 3 + 8 * experts

    run(scenario())


class Boasting(FakeSwarm):
    """Peer 1 reports at once that its experts took a step, and gives gradients after the grace time, if at all."""

    async def call(self, call: NodeCall) -> AsyncGenerator[CallReply, None]:
        boasts = call.direction == "backward" and call.node.peer_id == make_peer_id(1)
        if boasts:
            for expert in call.batch.uids:
                yield ExpertReply(call.batch, expert)
            await asyncio.sleep(3 * GRACE)
        async for reply in super().call(call):
            if not (boasts and isinstance(reply, ExpertReply)):
                yield reply


def test_credit_is_for_steps_whose_gradients_came_in_time() -> None:
    async def scenario() -> None:
        swarm, credit = Boasting(make_manifest((3,))), CreditAccounts()
        dispatcher = make_dispatcher(swarm, credit=credit)
        result = await forward_once(dispatcher, 3)
        await dispatcher.send_back(result, random_gradients(result))
        await settle()
        await credit.save()
        work = {node.peer_id: account.work for node, account in credit.due(now())}
        assert work[make_peer_id(0)] == Work(pairs=2 * 8, updates=1)
        assert work[make_peer_id(1)] == Work(pairs=8)

    run(scenario())


def test_backward_passes_wait_for_a_frozen_peer_until_its_first_call_fails() -> None:
    """So no longer than the deadline, and the grace time of the pass that is under way then."""

    async def scenario() -> None:
        swarm = make_swarm(5)
        dispatcher = make_dispatcher(swarm)
        layers = [await forward_once(dispatcher, 5) for _ in range(20)]
        swarm.behaviours[make_peer_id(1)] = SILENT
        for result in layers:
            await dispatcher.send_back(result, random_gradients(result))
        assert now() == DEADLINE + GRACE
        assert late_gradients(dispatcher) == 20
        assert swarm.rows_sent("backward", uid(1)) == 8 * (DEADLINE / GRACE + 1)

    run(scenario())


def test_backward_is_sent_only_to_experts_whose_answer_counts() -> None:
    async def scenario() -> None:
        swarm = make_swarm(8)
        swarm.behaviours[uid(0)] = fails(StatusCode.NOT_FOUND)
        swarm.behaviours[uid(1)] = Behaviour(after_s=0.9 * DEADLINE)
        dispatcher = make_dispatcher(swarm, k_min=3)
        result = await send_to_best(dispatcher, random_rows(8), ranked(8, 8), 3, LENGTH)
        assert answered_by_all_rows(result) == [2, 3, 4]
        await settle()
        await dispatcher.send_back(result, random_gradients(result))
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
        await dispatcher.send_back(result, random_gradients(result))
        assert sorted(call.uids for call in swarm.called("backward")) == [[uid(0)], [uid(3)], [uid(4)]]

    run(scenario())


def test_expert_that_lost_some_of_its_slots_is_sent_zero_gradients_for_them() -> None:
    """Its outputs for other rows attended to these rows, which are therefore part of its gradient."""

    async def scenario() -> None:
        swarm = make_swarm(4)
        # Rows 0, 2, 4, 6 want experts 0 and 1; the odd ones want 0 and 2, which takes longer than half of the deadline.
        scores = ranked(8, 4, 0, 1)
        scores[0][1::2] = ranked(4, 4, 0, 2)[0]
        swarm.behaviours[uid(0)] = Behaviour(after_s=6.0)
        swarm.behaviours[uid(2)] = Behaviour(after_s=5.5)
        swarm.behaviours[uid(1)] = Behaviour(after_s=1.0)
        swarm.behaviours[uid(3)] = Behaviour(after_s=0.6)  # asked at 5 s by all: answers before expert 0
        dispatcher = make_dispatcher(swarm)
        inputs = random_rows(8)
        result = await send_to_best(dispatcher, inputs, scores, 2, LENGTH)
        check_outputs(swarm, result)
        partial = [sent for sent in result.answers if not sent.counts.any(axis=1).all()]
        assert partial, "the scenario must have an expert that lost slots"
        swarm.behaviours.clear()
        await settle()
        gradients = random_gradients(result)
        total, _ = await dispatcher.send_back(result, gradients)
        np.testing.assert_allclose(total, gradients_of(swarm, result, gradients, ()), atol=1e-5)
        calls = {call.uids[0]: call.made for call in swarm.called("backward")}
        for sent in partial:
            call = calls[sent.batch.uids[0]]
            assert call.gradients is not None
            assert call.batch.rows.tolist() == sent.batch.rows.tolist()
            counts = sent.counts.any(axis=1)
            assert not call.gradients[~counts].any()
            assert call.gradients[counts].any(axis=1).all()

    run(scenario())


def test_peer_whose_record_has_expired_since_gets_no_gradients() -> None:
    async def scenario() -> None:
        swarm = make_swarm(4)
        directory = swarm.directory()
        dispatcher = make_dispatcher(swarm, directory=directory)
        result = await forward_once(dispatcher, 4)
        directory.view = FakeSwarm(swarm.manifest, peers=1).directory().view  # only peer 0 is known
        gradients = random_gradients(result)
        total, _ = await dispatcher.send_back(result, gradients)
        np.testing.assert_allclose(total, gradients_of(swarm, result, gradients, (1, 2)), atol=1e-5)
        assert now() == 0
        assert late_gradients(dispatcher) == 2

    run(scenario())
