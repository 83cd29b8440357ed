"""Nodes that no longer respond are given up early, and slow nodes are waited for. Time is virtual."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from dispatch_swarm import (
    DEADLINE,
    answered_by_all_rows,
    check_outputs,
    forward_once,
    make_dispatcher,
    make_swarm,
    random_gradients,
    run,
    settle,
    uid,
)
from expert_fakes import SILENT, WELL, Behaviour, FakeDirectory, FakeSwarm, make_peer_id, now

from dht.announcements import NodeInfo
from peer import metrics
from peer.identity import PeerID
from trainer_client.dispatch.dispatcher import Dispatcher
from trainer_client.dispatch.health import HealthChecks
from trainer_client.dispatch.policy import LEAST_KNOWN, CallTimes, WaitPolicy

EXPERTS = 5
USUAL = 0.1
"""How long calls took lately. Slower ones are slow."""
CHECK = 0.75
"""How long a node may take to answer a health check."""
FROZEN = make_peer_id(1)


class Health:
    """Answers health checks for all nodes but the frozen one."""

    def __init__(self, swarm: FakeSwarm) -> None:
        self._swarm = swarm
        self.round_trip_s = 0.0
        self.connects = False
        """Whether connections to the frozen node are tried."""
        self.asked: list[tuple[PeerID, float]] = []

    def freeze(self) -> None:
        self._swarm.behaviours[FROZEN] = SILENT

    def thaw(self) -> None:
        self._swarm.behaviours[FROZEN] = WELL

    async def responds(self, node: NodeInfo, deadline_s: float) -> bool:
        self.asked.append((node.peer_id, now()))
        if self._swarm.behaviours.get(node.peer_id) is not SILENT and self.round_trip_s <= deadline_s:
            await asyncio.sleep(self.round_trip_s)
            return True
        await asyncio.sleep(deadline_s)
        return False

    def is_silent(self, node: NodeInfo) -> bool:
        return self.connects and node.peer_id == FROZEN


def make_checked(
    k_min: int = 3, directory: FakeDirectory | None = None
) -> tuple[FakeSwarm, Health, Dispatcher]:
    """A swarm, its health, and a dispatcher that knows how long calls take."""
    swarm = make_swarm(EXPERTS)
    health = Health(swarm)
    dispatcher = make_dispatcher(
        swarm, k_min=k_min, directory=directory, responds=health.responds, is_silent=health.is_silent
    )
    for call_times in dispatcher.latencies.calls.values():
        for _ in range(LEAST_KNOWN):
            call_times.add(USUAL)
    for peer_id in swarm.peer_of.values():
        dispatcher.latencies.note_node(peer_id, USUAL, now())
    return swarm, health, dispatcher


def calls_to_frozen(swarm: FakeSwarm) -> int:
    return sum(call.peer_id == FROZEN for call in swarm.calls)


def test_in_backward_a_frozen_node_is_given_up_before_the_deadline() -> None:
    async def scenario() -> None:
        _, health, dispatcher = make_checked()
        result = await forward_once(dispatcher, EXPERTS)
        health.freeze()
        gradients, _ = await dispatcher.send_back(result, random_gradients(result))
        assert now() == pytest.approx(USUAL + CHECK)
        assert gradients.any(axis=1).all(), "the other nodes have answered"
        assert metrics.total(dispatcher.metrics.late_gradients) == 1
        assert health.asked == [(FROZEN, USUAL)]

    run(scenario())


def test_in_forward_other_experts_are_asked_in_place_of_those_of_a_frozen_node() -> None:
    async def scenario() -> None:
        swarm, health, dispatcher = make_checked()
        health.freeze()
        result = await forward_once(dispatcher, EXPERTS)
        assert now() == pytest.approx(USUAL + CHECK)
        assert answered_by_all_rows(result) == [0, 2, 3]
        check_outputs(swarm, result)
        assert dispatcher.metrics.failures_by_cause() == {"deadline_exceeded": 1}

    run(scenario())


@pytest.mark.parametrize("seconds", [USUAL + CHECK + 0.1, 2.9])
def test_a_slow_node_that_responds_is_waited_for(seconds: float) -> None:
    async def scenario() -> None:
        swarm, health, dispatcher = make_checked()
        result = await forward_once(dispatcher, EXPERTS)
        swarm.behaviours[FROZEN] = Behaviour(after_s=seconds)
        await dispatcher.send_back(result, random_gradients(result))
        assert now() == pytest.approx(seconds)
        assert metrics.total(dispatcher.metrics.late_gradients) == 0
        assert {peer_id for peer_id, _ in health.asked} == {FROZEN}
        assert dispatcher.open_breakers() == 0

    run(scenario())


def test_a_node_behind_a_slow_line_has_more_time() -> None:
    async def scenario() -> None:
        swarm, health, dispatcher = make_checked()
        result = await forward_once(dispatcher, EXPERTS)
        dispatcher.latencies.nodes[FROZEN] = 1.2
        health.round_trip_s = 1.0
        assert health.round_trip_s > CHECK
        swarm.behaviours[FROZEN] = Behaviour(after_s=2.9)
        await dispatcher.send_back(result, random_gradients(result))
        assert now() == pytest.approx(2.9)
        assert metrics.total(dispatcher.metrics.late_gradients) == 0
        assert dispatcher.open_breakers() == 0

    run(scenario())


def test_a_node_that_is_being_connected_to_has_until_the_deadline() -> None:
    async def scenario() -> None:
        swarm, health, dispatcher = make_checked()
        result = await forward_once(dispatcher, EXPERTS)
        health.connects = True
        swarm.behaviours[FROZEN] = Behaviour(after_s=2.9)
        await dispatcher.send_back(result, random_gradients(result))
        assert now() == pytest.approx(2.9)
        assert metrics.total(dispatcher.metrics.late_gradients) == 0
        assert health.asked == []

    run(scenario())


def test_a_node_that_freezes_later_in_a_slow_call_is_given_up_too() -> None:
    async def scenario() -> None:
        swarm, health, dispatcher = make_checked()
        result = await forward_once(dispatcher, EXPERTS)
        swarm.behaviours[uid(1)] = SILENT  # its expert takes long
        sending = asyncio.create_task(dispatcher.send_back(result, random_gradients(result)))
        await asyncio.sleep(USUAL + CHECK / 2)
        health.freeze()
        await sending
        assert now() == pytest.approx(USUAL + 2 * CHECK)

    run(scenario())


def test_a_frozen_node_is_not_called_until_it_responds() -> None:
    async def scenario() -> None:
        swarm, health, dispatcher = make_checked()
        health.freeze()
        await forward_once(dispatcher, EXPERTS)
        given_up_at = now()
        for _ in range(20):
            await forward_once(dispatcher, EXPERTS)
            await asyncio.sleep(0.5)
        assert calls_to_frozen(swarm) == 1, "no step waits for it again"
        assert dispatcher.live_experts() == EXPERTS - 1
        health.thaw()
        frozen_s = now() - given_up_at
        await asyncio.sleep(frozen_s)  # the pauses between checks grow with the time that it was silent
        assert dispatcher.live_experts() == EXPERTS
        result = await forward_once(dispatcher, EXPERTS)
        assert answered_by_all_rows(result) == [0, 1, 2]

    run(scenario())


def test_calls_that_wait_for_the_same_node_share_a_check() -> None:
    async def scenario() -> None:
        _, health, dispatcher = make_checked()
        layers = [await forward_once(dispatcher, EXPERTS) for _ in range(3)]
        health.freeze()
        gradients = [dispatcher.send_back(result, random_gradients(result)) for result in layers]
        await asyncio.gather(*gradients)
        assert now() == pytest.approx(USUAL + CHECK)
        assert health.asked == [(FROZEN, USUAL)]

    run(scenario())


def test_a_frozen_node_that_is_no_longer_announced_is_forgotten() -> None:
    async def scenario() -> None:
        directory = make_swarm(EXPERTS).directory()
        _, health, dispatcher = make_checked(directory=directory)
        health.freeze()
        await forward_once(dispatcher, EXPERTS)
        assert dispatcher.open_breakers() == 1
        nodes = {peer_id: node for peer_id, node in directory.view.nodes.items() if peer_id != FROZEN}
        directory.view = replace(directory.view, nodes=nodes)
        asked = len(health.asked)
        await settle()
        assert dispatcher.open_breakers() == 0
        assert len(health.asked) == asked

    run(scenario())


def test_a_node_that_never_responds_is_asked_a_few_times() -> None:
    async def scenario() -> None:
        _, health, dispatcher = make_checked()
        health.freeze()
        await forward_once(dispatcher, EXPERTS)
        await asyncio.sleep(1000.0)
        assert 5 < len(health.asked) < 20
        times = np.array([at for _, at in health.asked])
        assert (np.diff(times) >= 1.0).all()
        assert (np.diff(times) <= 10.0 + CHECK).all(), "this trainer's own line may have been cut"
        assert dispatcher.open_breakers() == 0

    run(scenario())


def test_a_quick_call_needs_no_health_check() -> None:
    async def scenario() -> None:
        _, health, dispatcher = make_checked()
        result = await forward_once(dispatcher, EXPERTS)
        await dispatcher.send_back(result, random_gradients(result))
        await asyncio.sleep(DEADLINE)
        assert health.asked == []

    run(scenario())


def test_no_node_is_checked_before_it_is_known_how_long_calls_take() -> None:
    """If this trainer's line is slow, a check waits behind the rows on their way, however well the node is."""

    async def scenario() -> None:
        swarm = make_swarm(EXPERTS)
        health = Health(swarm)
        dispatcher = make_dispatcher(swarm, k_min=3, responds=health.responds)
        result = await forward_once(dispatcher, EXPERTS)
        swarm.behaviours[FROZEN] = Behaviour(after_s=0.9 * DEADLINE)
        await dispatcher.send_back(result, random_gradients(result))
        assert metrics.total(dispatcher.metrics.late_gradients) == 0
        assert health.asked == []

    run(scenario())


def test_a_call_that_was_given_up_counts_as_a_slow_one() -> None:
    """So deadlines grow if checks fail because this trainer's line has become slow."""

    async def scenario() -> None:
        _, health, dispatcher = make_checked()
        result = await forward_once(dispatcher, EXPERTS)
        health.freeze()
        await dispatcher.send_back(result, random_gradients(result))
        assert dispatcher.latencies.calls["backward"].quantile(1.0) == pytest.approx(USUAL + CHECK)

    run(scenario())


def test_a_time_limit_within_the_call_is_not_taken_for_a_node_that_does_not_respond() -> None:
    async def scenario() -> None:
        swarm = make_swarm(EXPERTS)
        health, times = Health(swarm), CallTimes()
        for _ in range(LEAST_KNOWN):
            times.add(USUAL)
        checks = HealthChecks(
            health.responds, health.is_silent, lambda peer_id: None, WaitPolicy(DEADLINE, 1.0, 3)
        )
        with pytest.raises(TimeoutError):
            async with (
                checks.during(swarm.directory().view.nodes[FROZEN], times, USUAL),
                asyncio.timeout(0.01),
            ):
                await asyncio.sleep(1.0)
        await checks.close()

    run(scenario())


def test_closing_ends_checks() -> None:
    async def scenario() -> None:
        _, health, dispatcher = make_checked()
        health.freeze()
        await forward_once(dispatcher, EXPERTS)
        await dispatcher.close()
        asked = len(health.asked)
        await asyncio.sleep(1000.0)
        assert len(health.asked) == asked

    run(scenario())
