"""A dispatcher and a fake swarm, in virtual time: expert i of a one-dimensional grid is only at peer i."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
from expert_fakes import (
    Behaviour,
    FakeDirectory,
    FakeSwarm,
    make_manifest,
    random_rows,
    send_to_best,
    virtual_time,
    works_of,
)

from dht.announcements import NodeInfo
from dht.uid import UID
from peer.codec import Floats
from trainer_client.credit import CreditAccounts
from trainer_client.dispatch.batches import ForwardPass, NodeCall, shares
from trainer_client.dispatch.dispatcher import Dispatcher
from trainer_client.dispatch.health import Responds
from trainer_client.dispatch.policy import CircuitBreakers, WaitPolicy

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
    responds: Responds | None = None,
    is_silent: Callable[[NodeInfo], bool] = lambda node: False,
    credit: CreditAccounts | None = None,
) -> Dispatcher:
    """Call it inside the loop, whose clock the dispatcher uses."""
    return Dispatcher(
        directory or swarm.directory(),
        swarm,
        WaitPolicy(DEADLINE, grace_s, k_min, most_hedged=most_hedged),
        breakers=breakers,
        clock=asyncio.get_running_loop().time,
        responds=responds,
        is_silent=is_silent,
        credit=credit,
    )


def make_swarm(experts: int, peers: int | None = None) -> FakeSwarm:
    return FakeSwarm(make_manifest((experts,)), peers)


def ranked(rows: int, experts: int, *first: int) -> list[Floats]:
    """Scores by which every row prefers the experts `first`, best first, and then the others by number."""
    order = [*first, *(i for i in range(experts) if i not in first)]
    scores = np.empty((rows, experts), np.float32)
    scores[:, order] = -np.arange(experts, dtype=np.float32)
    return [scores]


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    with virtual_time() as runner:
        runner.run(coroutine)


def answered_by(result: ForwardPass, row: int) -> list[int]:
    """The experts whose answers are in a row's result."""
    return sorted(result.coordinates[row, result.answered[row], 0].tolist())


def answered_by_all_rows(result: ForwardPass) -> list[int]:
    experts = answered_by(result, 0)
    assert all(answered_by(result, row) == experts for row in range(len(result.updates)))
    return experts


def check_outputs(swarm: FakeSwarm, result: ForwardPass) -> None:
    """Checks that no row has an expert twice, and that every row's answer is the mean over its experts."""
    for row, slots in enumerate(result.answered):
        experts = result.coordinates[row, slots].tolist()
        assert len(set(map(tuple, experts))) == len(experts)
    computed = np.zeros_like(result.updates)
    counted = np.zeros(result.answered.shape, int)
    for sent in result.answers:
        batch = sent.batch
        call = NodeCall(sent.node, "forward", batch, 1.0, result.rows.inputs[batch.rows], sent.weights)
        assert (result.coordinates[batch.rows] == batch.coordinates)[sent.counts].all()
        assert not (sent.counts & ~batch.asked).any()
        share = shares(sent.weights, sent.counts)
        np.testing.assert_allclose(result.shares[batch.rows][sent.counts], share[sent.counts], rtol=1e-6)
        leads = sent.counts.argmax(axis=1)
        assert (result.leads[batch.rows] == leads[:, None])[sent.counts].all()
        for part, work in works_of(call):
            counts = sent.counts[part.places, part.slots]
            rows, updates = batch.rows[part.places], swarm.compute("forward", work)
            weighed = share[part.places, part.slots][:, None] * updates
            computed[rows[counts], leads[part.places][counts]] += weighed[counts]
        counted[batch.rows] += sent.counts
    np.testing.assert_array_equal(counted, result.answered)
    np.testing.assert_allclose(result.updates, computed, rtol=0, atol=1e-5)


async def settle() -> None:
    """Waits until every call under way has ended."""
    await asyncio.sleep(3 * DEADLINE)


async def forward_once(dispatcher: Dispatcher, experts: int, k: int = 3) -> ForwardPass:
    return await send_to_best(dispatcher, random_rows(8), ranked(8, experts), k, LENGTH)


def random_gradients(result: ForwardPass, seed: int = 1) -> Floats:
    return np.random.default_rng(seed).standard_normal(result.updates.shape, dtype=np.float32)
