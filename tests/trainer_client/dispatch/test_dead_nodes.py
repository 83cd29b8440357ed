"""Nodes that have just died and are still announced: others are asked in their place. Time is virtual."""

import asyncio
from collections.abc import Callable

import numpy as np
import pytest
from expert_fakes import (
    SILENT,
    FakeDirectory,
    FakeSwarm,
    fails,
    make_manifest,
    make_peer_id,
    now,
    random_rows,
    send_to_best,
    virtual_time,
)
from grpc import StatusCode

from dht.announcements import NodeInfo
from peer.codec import Floats
from peer.metrics import total
from trainer_client.dispatch.dispatcher import Dispatcher
from trainer_client.dispatch.policy import WaitPolicy

DEADLINE, ROWS, LENGTH, K = 8.0, 64, 16, 4
EXPERTS = 200


def make_dispatcher(
    swarm: FakeSwarm, directory: FakeDirectory, is_silent: Callable[[NodeInfo], bool], k_min: int = K
) -> Dispatcher:
    clock = asyncio.get_running_loop().time
    policy = WaitPolicy(DEADLINE, 1.0, k_min)
    return Dispatcher(directory, swarm, policy, clock=clock, is_silent=is_silent)


def random_scores(experts: int, seed: int = 0) -> list[Floats]:
    return [np.random.default_rng(seed).standard_normal((ROWS, experts), dtype=np.float32)]


def by_number(experts: int) -> list[Floats]:
    return [np.tile(-np.arange(experts, dtype=np.float32), (ROWS, 1))]


@pytest.mark.parametrize("connections_show_it", [True, False])
@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_of_nodes_three_in_ten_silent_all_are_replaced_within_the_deadline(
    seed: int, connections_show_it: bool
) -> None:
    swarm = FakeSwarm(make_manifest((EXPERTS,)))
    dead = set(np.random.default_rng(seed).permutation(EXPERTS)[: EXPERTS * 3 // 10].tolist())
    peers = {make_peer_id(number) for number in dead}
    swarm.behaviours |= dict.fromkeys(peers, SILENT)

    async def scenario() -> None:
        dispatcher = make_dispatcher(
            swarm, swarm.directory(), lambda node: connections_show_it and node.peer_id in peers
        )
        result = await send_to_best(dispatcher, random_rows(ROWS), random_scores(EXPERTS, seed), K, LENGTH)
        assert result.answered.all()
        assert now() <= DEADLINE * (1 / 2 if connections_show_it else 3 / 4)

    with virtual_time() as runner:
        runner.run(scenario())


def test_a_node_without_a_connection_is_replaced_at_a_quarter_of_the_deadline_and_then_forgotten() -> None:
    swarm, dead = FakeSwarm(make_manifest((8,))), make_peer_id(1)
    directory = swarm.directory()
    swarm.behaviours[dead] = SILENT

    async def scenario() -> None:
        dispatcher = make_dispatcher(swarm, directory, lambda node: node.peer_id == dead)
        result = await send_to_best(dispatcher, random_rows(ROWS), by_number(8), K, LENGTH)
        assert result.answered.all()
        assert now() == DEADLINE / 4
        assert dispatcher.live_experts() == 7, "nobody calls it while the call lasts"
        assert directory.forgotten == [], "its answer might still come"
        await asyncio.sleep(DEADLINE)
        assert directory.forgotten == [dead]

    with virtual_time() as runner:
        runner.run(scenario())


def test_a_slow_node_whose_connection_stands_is_waited_for() -> None:
    swarm = FakeSwarm(make_manifest((8,)))
    swarm.behaviours[make_peer_id(1)] = fails(StatusCode.DEADLINE_EXCEEDED, after_s=DEADLINE * 0.4)

    async def scenario() -> None:
        directory = swarm.directory()
        dispatcher = make_dispatcher(swarm, directory, lambda node: False)
        await send_to_best(dispatcher, random_rows(ROWS), by_number(8), K, LENGTH)
        assert now() == DEADLINE * 0.4
        assert directory.forgotten == []

    with virtual_time() as runner:
        runner.run(scenario())


def test_in_place_of_a_silent_node_its_experts_are_asked_of_another_host() -> None:
    swarm, other = FakeSwarm(make_manifest((8,))), make_peer_id(99)
    swarm.behaviours |= {make_peer_id(number): SILENT for number in range(8)}

    async def scenario() -> None:
        directory = swarm.directory(more_hosts=[other])
        dispatcher = make_dispatcher(swarm, directory, lambda node: node.peer_id != other)
        result = await send_to_best(dispatcher, random_rows(ROWS), by_number(8), K, LENGTH)
        assert result.answered.all()
        assert (np.sort(result.coordinates[..., 0], axis=1) == np.arange(K)).all(), "the best experts"
        assert total(dispatcher.metrics.reselected_rows) == 0

    with virtual_time() as runner:
        runner.run(scenario())


def test_a_refused_connection_is_forgotten_at_once_and_a_call_that_broke_off_is_not() -> None:
    refusing, breaking = make_peer_id(0), make_peer_id(1)
    swarm = FakeSwarm(make_manifest((8,)))
    swarm.behaviours |= {refusing: fails(), breaking: fails()}

    async def scenario() -> None:
        directory = swarm.directory()
        dispatcher = make_dispatcher(swarm, directory, lambda node: node.peer_id == refusing)
        await send_to_best(dispatcher, random_rows(ROWS), by_number(8), K, LENGTH)
        assert now() == 0
        assert directory.forgotten == [refusing]

    with virtual_time() as runner:
        runner.run(scenario())


def test_who_was_let_down_twice_chooses_among_those_that_answered_lately() -> None:
    """Experts 0 to 7 are dead, 8 to 11 would answer, and 12 to 15 have answered before."""
    swarm, scores = FakeSwarm(make_manifest((16,))), by_number(16)
    swarm.behaviours |= {make_peer_id(number): fails() for number in range(8)}

    async def scenario() -> None:
        dispatcher = make_dispatcher(swarm, swarm.directory(), lambda node: False)
        await send_to_best(dispatcher, random_rows(ROWS), [-scores[0]], K, LENGTH)
        result = await send_to_best(dispatcher, random_rows(ROWS), scores, K, LENGTH)
        assert (np.sort(result.coordinates[..., 0], axis=1) == np.arange(12, 16)).all()

    with virtual_time() as runner:
        runner.run(scenario())
