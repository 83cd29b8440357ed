"""A second replica is asked if the first is slow, and deadlines follow recent call times. Time is virtual."""

import asyncio
import random
from collections.abc import AsyncGenerator, Sequence
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
    make_node,
    make_peer_id,
    make_replica,
    random_rows,
    send_to_best,
    virtual_time,
)
from grpc import StatusCode

from dht.directory import View
from dht.uid import UID
from peer.codec import Floats
from peer.metrics import total
from trainer_client.dispatch.batches import CallReply, Direction, ForwardPass, NodeCall
from trainer_client.dispatch.dispatcher import Dispatcher
from trainer_client.dispatch.policy import LEAST_KNOWN, WaitPolicy

LENGTH, ROWS = 4, 8
SCORES = [np.zeros((ROWS, 3), np.float32)]
OTHER = make_peer_id(9)


def make_swarm() -> FakeSwarm:
    """Three experts on three peers; peer 9 has a replica of each."""
    return FakeSwarm(make_manifest((3,)))


def make_dispatcher(
    swarm: FakeSwarm, hosts: Sequence[int] = (9,), seed: int = 0, **policy: float
) -> Dispatcher:
    return Dispatcher(
        swarm.directory(more_hosts=[make_peer_id(number) for number in hosts]),
        swarm,
        WaitPolicy(9.0, 1.0, 3, **policy),
        seed=seed,
        clock=asyncio.get_running_loop().time,
    )


async def forward(dispatcher: Dispatcher, k: int = 3) -> Floats:
    """The mean over the experts of each row, all with the same weight."""
    result = await send_to_best(dispatcher, random_rows(ROWS), SCORES, k, LENGTH)
    assert result.answered.all()
    return mean_of(result)


def mean_of(result: ForwardPass) -> Floats:
    mean: Floats = np.take_along_axis(result.updates, result.leads[..., None], axis=1).mean(axis=1)
    return mean


def test_another_replica_answers_for_one_that_is_silent() -> None:
    """It is asked at a third of the deadline. No row is sent to another expert, and no expert is late."""
    swarm = make_swarm()

    async def scenario() -> None:
        expected = await forward(make_dispatcher(swarm, hosts=()))
        swarm.calls.clear()
        slow = make_dispatcher(swarm, most_hedged=1.0)
        swarm.behaviours |= {make_peer_id(number): SILENT for number in range(3)}
        np.testing.assert_allclose(await forward(slow), expected, atol=1e-6)
        hedges = [call for call in swarm.calls if call.began == pytest.approx(3.0)]
        assert {call.peer_id for call in hedges} == {OTHER}
        assert total(slow.metrics.hedged_calls) == len(hedges) == 1
        assert total(slow.metrics.hedges_won) == len(hedges[0].uids) > 0
        assert total(slow.metrics.reselected_rows) == 0
        await slow.close()

    with virtual_time() as runner:
        runner.run(scenario())


def test_the_first_answer_counts_and_gradients_go_only_to_its_giver() -> None:
    """The slow replica answers first after all. The hedge's answer comes when nobody waits for it."""
    swarm = make_swarm()

    async def scenario() -> None:
        dispatcher = make_dispatcher(swarm, most_hedged=1.0)
        swarm.behaviours |= {make_peer_id(number): Behaviour(after_s=3.5) for number in range(3)}
        swarm.behaviours[OTHER] = Behaviour(after_s=1.0)
        result = await send_to_best(dispatcher, random_rows(ROWS), SCORES, 3, LENGTH, keep=True)
        assert total(dispatcher.metrics.hedged_calls) == 1
        assert total(dispatcher.metrics.hedges_won) == 0
        await dispatcher.send_back(result, np.ones_like(result.updates))
        rows = [swarm.rows_sent("backward", uid) for uid in swarm.manifest.uids()]
        assert rows == [ROWS] * 3
        await dispatcher.close()

    with virtual_time() as runner:
        runner.run(scenario())


def test_an_expert_whose_first_replica_fails_is_still_waited_for_at_the_second() -> None:
    """The first replica fails at 3.5 s. The second was asked at 3 s and answers at 4 s."""
    swarm = make_swarm()

    async def scenario() -> None:
        dispatcher = make_dispatcher(swarm, most_hedged=1.0)
        swarm.behaviours |= {make_peer_id(number): fails(after_s=3.5) for number in range(3)}
        swarm.behaviours[OTHER] = Behaviour(after_s=1.0)
        await forward(dispatcher)
        assert asyncio.get_running_loop().time() == pytest.approx(4.0)
        assert total(dispatcher.metrics.hedges_won) > 0
        assert total(dispatcher.metrics.reselected_rows) == 0
        await dispatcher.close()

    with virtual_time() as runner:
        runner.run(scenario())


def test_an_expert_that_fails_at_both_replicas_has_failed() -> None:
    swarm = make_swarm()
    broken = UID(0, (1,))

    async def scenario() -> None:
        dispatcher = make_dispatcher(swarm, most_hedged=1.0)
        swarm.behaviours[broken] = fails(StatusCode.INTERNAL, after_s=4.0)
        result = await send_to_best(dispatcher, random_rows(ROWS), SCORES, 3, LENGTH)
        assert result.answered.sum() == 2 * ROWS
        assert swarm.rows_sent("forward", broken) == 2 * ROWS
        assert dispatcher.metrics.failures_by_cause() == {"internal": 2}
        await dispatcher.close()

    with virtual_time() as runner:
        runner.run(scenario())


def test_no_more_is_hedged_than_the_policy_allows() -> None:
    swarm = make_swarm()
    swarm.behaviours |= {uid: Behaviour(after_s=4.0) for uid in swarm.manifest.uids()}

    async def scenario() -> None:
        dispatcher = make_dispatcher(swarm, most_hedged=0.1)
        for _ in range(20):
            await send_to_best(dispatcher, random_rows(ROWS), SCORES, 3, LENGTH)
        assert 0 < total(dispatcher.metrics.hedged_calls) <= 0.1 * total(dispatcher.metrics.calls) + 1
        await dispatcher.close()

    with virtual_time() as runner:
        runner.run(scenario())


def test_backward_calls_are_never_sent_twice() -> None:
    swarm = make_swarm()

    async def scenario() -> None:
        dispatcher = make_dispatcher(swarm, most_hedged=1.0)
        result = await send_to_best(dispatcher, random_rows(ROWS), SCORES, 3, LENGTH)
        swarm.behaviours |= {make_peer_id(number): SILENT for number in (0, 1, 2, 9)}
        await dispatcher.send_back(result, np.ones_like(result.updates))
        assert [swarm.rows_sent("backward", uid) for uid in swarm.manifest.uids()] == [ROWS] * 3
        await dispatcher.close()

    with virtual_time() as runner:
        runner.run(scenario())


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_after_quick_calls_a_silent_peer_costs_the_shortest_deadline(direction: Direction) -> None:
    swarm = make_swarm()

    async def scenario() -> None:
        time = asyncio.get_running_loop().time
        dispatcher = make_dispatcher(swarm, hosts=(), least_deadline_s=1.5)
        while swarm.ended < 4 * LEAST_KNOWN:
            result = await send_to_best(dispatcher, random_rows(ROWS), SCORES, 3, LENGTH)
            await dispatcher.send_back(result, np.ones_like(result.updates))
        if direction == "forward":
            swarm.behaviours |= dict.fromkeys(swarm.manifest.uids(), SILENT)
            began = time()
            await send_to_best(dispatcher, random_rows(ROWS), SCORES, 3, LENGTH)
        else:
            swarm.behaviours |= dict.fromkeys(swarm.manifest.uids(), SILENT)
            began = time()
            await dispatcher.send_back(result, np.ones_like(result.updates))
        assert time() - began == pytest.approx(1.5, abs=0.1)
        await dispatcher.close()

    with virtual_time() as runner:
        runner.run(scenario())


class UnsteadySwarm(FakeSwarm):
    """Each call is quick, slow, silent or fails, by a schedule that follows from a seed."""

    def __init__(self, seed: int) -> None:
        super().__init__(make_manifest((4,)))
        self._schedule = random.Random(seed)

    async def call(self, call: NodeCall) -> AsyncGenerator[CallReply, None]:
        chance = self._schedule.random()
        after_s = self._schedule.expovariate(2)
        if chance < 0.1:
            self.behaviours[call.node.peer_id] = fails(after_s=after_s)
        else:
            self.behaviours[call.node.peer_id] = SILENT if chance < 0.15 else Behaviour(after_s=after_s)
        async for answer in super().call(call):
            yield answer


def history(seed: int, schedule: int, passes: int = 10) -> tuple[list[object], dict[str, Any]]:
    """Every call of all passes, forward and backward, with their results and counts."""
    swarm = UnsteadySwarm(schedule)
    seen: list[object] = []
    scores = np.random.default_rng(0).standard_normal((ROWS, 4), dtype=np.float32)

    async def scenario() -> Dispatcher:
        dispatcher = Dispatcher(
            swarm.directory(more_hosts=[make_peer_id(9), make_peer_id(8)]),
            swarm,
            WaitPolicy(9.0, 0.1, 2, least_deadline_s=1.0, most_hedged=0.5),
            seed=seed,
            clock=asyncio.get_running_loop().time,
        )
        for _ in range(passes):
            result = await send_to_best(dispatcher, random_rows(ROWS), [scores], 2, LENGTH)
            gradients = await dispatcher.send_back(result, np.ones_like(result.updates))
            arrays = (result.updates, result.coordinates, *gradients)
            seen.append(tuple(array.tobytes() for array in arrays))
            await asyncio.sleep(3.0)  # virtual: breakers close again
        await dispatcher.close()
        return dispatcher

    with virtual_time() as runner:
        stats = runner.run(scenario()).metrics.values()
    seen += [(c.peer_id, c.direction, c.uids, c.deadline_s, c.began) for c in swarm.calls]
    return seen, stats


def test_all_that_happens_follows_from_the_seed_and_the_faults() -> None:
    first, stats = history(seed=1, schedule=2)
    assert history(seed=1, schedule=2) == (first, stats)
    assert history(seed=2, schedule=2)[0] != first
    assert history(seed=1, schedule=3)[0] != first


def test_with_faults_all_kinds_of_counters_move() -> None:
    _, stats = history(seed=1, schedule=2, passes=25)
    named = (
        "hedged_calls",
        "hedges_won",
        "repeated_calls",
        "reselected_rows",
        "late_gradients",
    )
    for name in named:
        assert stats[name] > 0, name
    assert stats["failures"].keys() >= {"unavailable", "deadline_exceeded"}


def test_a_hedge_for_one_expert_of_a_slow_node_does_not_cost_the_row_the_others() -> None:
    """The node's answer has all three experts, so it replaces the hedge's answer, and backward calls only that node."""

    async def scenario() -> None:
        swarm = FakeSwarm(make_manifest((3,)), peers=1)
        directory = swarm.directory()
        (first, *_) = swarm.manifest.uids()
        replicas = dict(directory.view.replicas)
        replicas[first] += (make_replica(first, OTHER),)
        nodes = {**directory.view.nodes, OTHER: make_node(OTHER)}
        slow, quick = make_peer_id(0), OTHER
        swarm.behaviours[slow] = Behaviour(after_s=4.0)
        dispatcher = Dispatcher(
            FakeDirectory(View(swarm.manifest, replicas, nodes, 1.0)),
            swarm,
            WaitPolicy(9.0, 1.0, 3),
            clock=asyncio.get_running_loop().time,
        )
        dispatcher.latencies.nodes[quick] = 100.0  # is not asked first
        dispatcher.latencies.nodes[slow] = 0.1
        result = await send_to_best(dispatcher, random_rows(ROWS), SCORES, 3, LENGTH)
        assert {call.peer_id for call in swarm.calls} == {slow, quick}
        assert result.answered.all()
        assert (result.leads == 0).all(), "one answer"
        await dispatcher.send_back(result, np.ones_like(result.updates))
        assert [call.peer_id for call in swarm.called("backward")] == [slow]

    with virtual_time() as runner:
        runner.run(scenario())
