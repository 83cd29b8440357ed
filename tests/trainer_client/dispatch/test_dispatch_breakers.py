"""Peers that fail are avoided, as long as the failures are their fault. Time is virtual."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from dispatch_swarm import (
    DEADLINE,
    GRACE,
    LENGTH,
    answered_by_all_rows,
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
    WELL,
    Behaviour,
    FakeSwarm,
    fails,
    make_peer_id,
    now,
    random_rows,
    send_to_best,
)
from grpc import StatusCode

from peer.identity import PeerID
from peer.metrics import total
from trainer_client.dispatch.batches import HeldSequence
from trainer_client.dispatch.dispatcher import Dispatcher
from trainer_client.dispatch.policy import CircuitBreakers


def test_what_a_peer_said_that_refused_a_call_is_known_until_it_answers() -> None:
    async def scenario() -> None:
        swarm = make_swarm(3)
        dispatcher = make_dispatcher(swarm)
        swarm.behaviours[make_peer_id(0)] = fails(StatusCode.UNKNOWN)
        await forward_once(dispatcher, 3)
        assert not dispatcher.refusal()
        swarm.behaviours[make_peer_id(1)] = fails(StatusCode.PERMISSION_DENIED)
        await forward_once(dispatcher, 3)
        assert dispatcher.refusal()
        swarm.behaviours.clear()
        await asyncio.sleep(30.0)
        await forward_once(dispatcher, 3)
        assert not dispatcher.refusal()

    run(scenario())


def test_dead_peer_is_left_alone_until_its_breaker_lets_it_be_tried_again() -> None:
    async def scenario() -> None:
        swarm = make_swarm(5)
        swarm.behaviours[make_peer_id(0)] = fails()
        dispatcher = make_dispatcher(swarm, breakers=CircuitBreakers(first_s=2.0))
        await forward_once(dispatcher, 5)
        assert dispatcher.live_experts() == 5  # after two calls: those may have been the line's fault
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
        assert [call.peer_id for call in swarm.calls].count(make_peer_id(0)) == 4

    run(scenario())


STINGY = make_peer_id(1)


@dataclass
class Stingy:
    """A peer that answers each forward call at once, and only some backward calls."""

    swarm: FakeSwarm
    answers: Callable[[int], bool]
    """Whether it answers its n-th backward call."""
    peer_id: PeerID = STINGY

    async def step(self, dispatcher: Dispatcher, experts: int) -> None:
        self.swarm.behaviours[self.peer_id] = WELL
        result = await forward_once(dispatcher, experts)
        if not self.answers(self.calls):
            self.swarm.behaviours[self.peer_id] = SILENT
        await dispatcher.send_back(result, random_gradients(result))
        await asyncio.sleep(3.0)

    @property
    def calls(self) -> int:
        return sum(call.peer_id == self.peer_id for call in self.swarm.called("backward"))


def test_a_peer_that_answers_forward_and_never_backward_is_waited_for_less_and_less_often() -> None:
    async def scenario() -> None:
        swarm = make_swarm(5)
        stingy, dispatcher = Stingy(swarm, lambda number: False), make_dispatcher(swarm)
        while now() < 400.0:
            await stingy.step(dispatcher, 5)
        # before each of the pauses of 2, 4, 8 s and so on, the calls of the 10 s until the first one fails
        assert 4 <= stingy.calls <= 16, "once in 4 s without pauses, so 100 times"

    run(scenario())


def test_a_peer_that_lets_every_second_backward_call_time_out_gets_few_calls_if_others_host_its_experts() -> (
    None
):
    async def scenario() -> None:
        swarm = make_swarm(5)
        stingy = Stingy(swarm, lambda number: number % 2 == 0)
        others = [make_peer_id(8), make_peer_id(9)]
        for peer_id in (*swarm.peer_of.values(), *others):
            swarm.behaviours[peer_id] = Behaviour(after_s=0.1)
        dispatcher = make_dispatcher(swarm, directory=swarm.directory(more_hosts=others))
        while now() < 200.0:
            await stingy.step(dispatcher, 5)
        assert 1 <= stingy.calls < 10

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
        assert dispatcher.metrics.failures_by_cause() == {"resource_exhausted": 1}
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


def test_a_peer_that_forgot_rows_which_it_was_never_sent_is_avoided() -> None:
    async def scenario() -> None:
        swarm = make_swarm(6, peers=3)
        swarm.behaviours[uid(0)] = Behaviour(StatusCode.FAILED_PRECONDITION)
        dispatcher = make_dispatcher(swarm)
        held = [HeldSequence(), HeldSequence()]
        await send_to_best(dispatcher, random_rows(8), ranked(8, 6), 4, LENGTH, held=held)
        assert dispatcher.live_experts() == 4
        assert total(dispatcher.metrics.forgotten_sequences) == 0

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
        assert dispatcher.metrics.failures_by_cause() == {"not_found": 2, "data_loss": 1}
        await settle()
        assert dispatcher.metrics.failures_by_cause() == {
            "not_found": 2,
            "data_loss": 1,
            "deadline_exceeded": 1,
        }
        assert total(dispatcher.metrics.calls) == 4

    run(scenario())
