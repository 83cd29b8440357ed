"""Replicas that answer otherwise than others of the same expert, found by asking a second and a third."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import numpy as np
import pytest
from expert_fakes import FakeSwarm, make_manifest, make_peer_id, random_rows, send_to_best, virtual_time
from hypothesis import given
from hypothesis import strategies as st

from peer.codec import Floats
from peer.metrics import total
from trainer_client.dispatch.batches import Answer, NodeCall, Request
from trainer_client.dispatch.dispatcher import Dispatcher
from trainer_client.dispatch.policy import CircuitBreakers, WaitPolicy
from trainer_client.dispatch.spot_checks import TOLERANCE, difference, outlier

ROWS, LENGTH = 8, 4
LIAR = 0

Lie = Callable[[Request, Floats], Floats]

LIES: dict[str, Lie] = {
    "gives its inputs back": lambda request, answer: request.inputs.copy(),
    "gives zeros": lambda request, answer: np.zeros_like(answer),
    "gives noise": lambda request, answer: random_rows(len(answer), seed=5),
    "gives next to nothing": lambda request, answer: 0.01 * answer,
    "gives the opposite": lambda request, answer: -answer,
}


class LyingSwarm(FakeSwarm):
    """One expert with replicas on several peers, of which peer 0 answers wrongly."""

    def __init__(self, lie: Lie | None = None, update_counts: dict[int, int] | None = None) -> None:
        super().__init__(make_manifest((1,)))
        self.lie = lie
        self._update_counts = {make_peer_id(n): count for n, count in (update_counts or {}).items()}

    async def call(self, call: NodeCall) -> AsyncIterator[Answer]:
        peer_id = call.node.peer_id
        async for answer in super().call(call):
            tensor = answer.tensor
            assert tensor is not None
            if self.lie is not None and peer_id == make_peer_id(LIAR):
                (request,) = call.requests
                tensor = self.lie(request, tensor)
            yield replace(answer, tensor=tensor, update_count=self._update_counts.get(peer_id, 7))


def checked(swarm: FakeSwarm, hosts: int, passes: int = 20, part: float = 1.0) -> Dispatcher:
    """After some forward passes, of which each answer is checked."""

    async def scenario() -> Dispatcher:
        dispatcher = Dispatcher(
            swarm.directory(more_hosts=[make_peer_id(number) for number in range(1, hosts)]),
            swarm,
            WaitPolicy(9.0, 1.0, 1),
            spot_checks=part,
            clock=asyncio.get_running_loop().time,
        )
        for _ in range(passes):
            scores = [np.zeros((ROWS, 1), np.float32)]
            await send_to_best(dispatcher, random_rows(ROWS), scores, 1, LENGTH)
            await asyncio.sleep(0.1)  # virtual
        await dispatcher.close()
        return dispatcher

    with virtual_time() as runner:
        return runner.run(scenario())


def left_alone(dispatcher: Dispatcher) -> set[object]:
    return set(dispatcher._calls.avoided())


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_of_three_replicas_the_one_that_lies_is_left_alone(lie: Lie) -> None:
    swarm = LyingSwarm(lie)
    dispatcher = checked(swarm, hosts=3)
    assert total(dispatcher.metrics.outvoted_answers) == 1
    assert left_alone(dispatcher) == {make_peer_id(LIAR)}
    asked = [call.began for call in swarm.calls if call.peer_id == make_peer_id(LIAR)]
    assert max(asked) < 1.5, "it was asked again after it had been found out"


def test_of_two_that_differ_nobody_is_blamed() -> None:
    dispatcher = checked(LyingSwarm(LIES["gives noise"]), hosts=2)
    assert total(dispatcher.metrics.differing_answers) > 0
    assert total(dispatcher.metrics.outvoted_answers) == 0
    assert not left_alone(dispatcher)


def test_replicas_that_agree_are_counted_and_nothing_else_happens() -> None:
    dispatcher = checked(LyingSwarm(), hosts=3)
    assert total(dispatcher.metrics.spot_checks) == 20
    assert (total(dispatcher.metrics.differing_answers), total(dispatcher.metrics.outvoted_answers)) == (0, 0)
    assert not left_alone(dispatcher)


def test_replicas_with_other_update_counts_are_not_compared() -> None:
    dispatcher = checked(LyingSwarm(LIES["gives noise"], {0: 1, 1: 2, 2: 3}), hosts=3)
    assert total(dispatcher.metrics.spot_checks) == 0


@pytest.mark.parametrize(("part", "least", "most"), [(0.0, 0, 0), (0.2, 10, 40)])
def test_only_the_part_that_was_asked_for_is_checked(part: float, least: int, most: int) -> None:
    dispatcher = checked(LyingSwarm(), hosts=2, passes=100, part=part)
    assert least <= total(dispatcher.metrics.spot_checks) <= most
    assert total(dispatcher.metrics.calls) == 100 + total(dispatcher.metrics.spot_checks)


def test_a_single_replica_is_not_checked() -> None:
    assert total(checked(LyingSwarm(LIES["gives noise"]), hosts=1).metrics.calls) == 20


# Pure parts


@given(st.integers(0, 99), st.floats(0, 0.2), st.integers(0, 2))
def test_drifted_replicas_agree_and_the_odd_one_is_found_wherever_it_stands(
    seed: int, drift: float, at: int
) -> None:
    rng = np.random.default_rng(seed)
    updates = rng.standard_normal((6, 8), dtype=np.float32)
    answers = [updates * np.float32(1 + drift * rng.uniform(-1, 1)) for _ in range(3)]
    assert outlier(answers) is None
    answers[at] = -updates
    assert outlier(answers) == at
    assert difference(answers[at], answers[at - 1]) > TOLERANCE


def test_three_that_all_differ_blame_nobody() -> None:
    assert outlier(list(np.random.default_rng(0).standard_normal((3, 6, 8), dtype=np.float32))) is None


def test_experts_that_add_nothing_are_equal() -> None:
    nothing = np.zeros((4, 8), np.float32)
    assert difference(nothing, nothing) == 0


def test_a_distrusted_peer_stays_so_whatever_else_it_does_well() -> None:
    breakers, peer = CircuitBreakers(longest_s=100.0), make_peer_id(1)
    breakers.failed(peer, 0.0)
    breakers.distrust(peer, 0.0)
    breakers.succeeded(peer)
    assert breakers.open_at(99.0) == {peer}
    assert breakers.open_at(101.0) == frozenset()
    breakers.failed(peer, 200.0)
    assert breakers.open_at(201.0) == {peer}
    assert breakers.open_at(203.0) == frozenset(), "a first failure again"
