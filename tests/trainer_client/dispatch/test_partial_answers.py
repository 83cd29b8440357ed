"""A node that answers only a part of each call, or a part of it late, gets few calls if others host its experts.

Time is virtual.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import pytest
from dispatch_swarm import LENGTH, forward_once, make_dispatcher, random_gradients, run
from expert_fakes import (
    FakeDirectory,
    FakeSwarm,
    make_manifest,
    make_node,
    make_peer_id,
    make_replica,
    now,
    random_rows,
    send_to_best,
)
from grpc import StatusCode

from dht.directory import View
from peer.codec import Booleans
from peer.errors import ExpertError
from peer.identity import PeerID
from trainer_client.dispatch.batches import AnsweredRows, CallReply, ExpertReply, NodeCall
from trainer_client.dispatch.dispatcher import Dispatcher

EXPERTS, ROWS, SECONDS = 8, 8, 20.0
HOSTS = [make_peer_id(number) for number in range(4)]
LIAR = HOSTS[0]
HONEST_S, PAUSE_S = 0.1, 0.3
USUAL_STEPS = SECONDS / (PAUSE_S + 2 * HONEST_S)

Replies: TypeAlias = AsyncGenerator[CallReply, None]
Lie: TypeAlias = Callable[[NodeCall, list[CallReply]], Replies]
"""What the liar answers to a call, given the right replies."""


class Hosts(FakeSwarm):
    """Four hosts of all experts. Honest ones answer after 0.1 s."""

    def __init__(self, lie: Lie, experts: int = EXPERTS) -> None:
        super().__init__(make_manifest((experts,)), len(HOSTS))
        self._lie = lie

    async def call(self, call: NodeCall) -> Replies:
        if call.node.peer_id == LIAR:
            async for reply in self._lie(call, [reply async for reply in super().call(call)]):
                yield reply
            return
        await asyncio.sleep(HONEST_S)
        async for reply in super().call(call):
            yield reply


@dataclass
class Outcome:
    steps: int
    share: float
    """The liar's share of the rows."""
    lost: float
    """The share of the forward answers that were lost."""


def dispatcher_of(swarm: Hosts, hosts: Sequence[PeerID] = HOSTS) -> Dispatcher:
    """`hosts`: the peers that have all experts."""
    replicas = {uid: tuple(make_replica(uid, host) for host in hosts) for uid in swarm.manifest.uids()}
    view = View(swarm.manifest, replicas, {host: make_node(host) for host in hosts}, 1.0)
    return make_dispatcher(swarm, directory=FakeDirectory(view))


async def train(lie: Lie, experts: int = EXPERTS, seconds: float = SECONDS) -> Outcome:
    swarm, rng = Hosts(lie, experts), np.random.default_rng(0)
    dispatcher = dispatcher_of(swarm)
    steps, answered = 0, []
    while now() < seconds:
        scores = [rng.standard_normal((ROWS, experts), dtype=np.float32)]
        result = await send_to_best(dispatcher, random_rows(ROWS), scores, 3, LENGTH)
        await dispatcher.send_back(result, random_gradients(result))
        answered.append(result.answered.mean())
        steps += 1
        await asyncio.sleep(PAUSE_S)
    await dispatcher.close()
    sent = [(call.peer_id, int(call.made.slots.sum())) for call in swarm.calls]
    share = sum(rows for peer_id, rows in sent if peer_id == LIAR) / sum(rows for _, rows in sent)
    return Outcome(steps, share, 1 - float(np.mean(answered)))


def some_rows(reply: AnsweredRows, which: Booleans) -> Iterator[AnsweredRows]:
    """These rows of an answer, if there are any."""
    products = None if reply.products is None else reply.products[which]
    places, answered, tensor = reply.places[which], reply.answered[which], reply.tensor[which]
    if len(places):
        yield replace(reply, places=places, answered=answered, tensor=tensor, products=products)


def half_late(late_s: float) -> Lie:
    """The first half of each call's rows at once, and the others late."""

    async def lie(call: NodeCall, replies: list[CallReply]) -> Replies:
        rows, late = len(call.batch.rows), list[AnsweredRows]()
        for reply in replies:
            if isinstance(reply, AnsweredRows):
                late += some_rows(reply, 2 * reply.places >= rows)
                for early in some_rows(reply, 2 * reply.places < rows):
                    yield early
            else:
                yield reply
        await asyncio.sleep(late_s)
        for reply in late:
            yield reply

    return lie


@pytest.mark.parametrize("late_s", [0.7, 3.0])
def test_a_node_whose_last_rows_are_always_late_does_not_look_quick(late_s: float) -> None:
    """In both directions. The first time is within the grace time, so each pass waits for it."""

    async def scenario() -> None:
        outcome = await train(half_late(late_s))
        assert 0 < outcome.share < 0.05
        assert outcome.steps > USUAL_STEPS / 2

    run(scenario())


def leaves_out(first: int, status: StatusCode | None) -> Lie:
    """Of a call's experts, every second one from `first` on fails with this status. None: it is left out of answers
    that have another expert, as if it had been too slow.
    """

    async def lie(call: NodeCall, replies: list[CallReply]) -> Replies:
        for reply in replies:
            if isinstance(reply, ExpertReply) and status and reply.batch.uids.index(reply.uid) % 2 == first:
                yield ExpertReply(reply.batch, reply.uid, ExpertError(status, "a lie"))
            elif isinstance(reply, AnsweredRows):
                experts = reply.batch.experts[reply.places]
                answered = reply.answered & (experts % 2 != first)
                if status is None:
                    answered |= reply.answered & ~answered.any(axis=1, keepdims=True)
                products = (
                    None if reply.products is None else np.where(answered, reply.products, np.float32(0))
                )
                for some in some_rows(
                    replace(reply, answered=answered, products=products), answered.any(axis=1)
                ):
                    yield some
            else:
                yield reply

    return lie


def refuses(status: StatusCode) -> Lie:
    async def lie(call: NodeCall, replies: list[CallReply]) -> Replies:
        raise ExpertError(status, "a lie", 1e-9)
        yield

    return lie


@pytest.mark.parametrize(
    "lie",
    [
        leaves_out(1, None),
        leaves_out(1, StatusCode.INTERNAL),
        leaves_out(0, StatusCode.NOT_FOUND),
        leaves_out(1, StatusCode.RESOURCE_EXHAUSTED),
        refuses(StatusCode.INVALID_ARGUMENT),
        refuses(StatusCode.RESOURCE_EXHAUSTED),
    ],
)
def test_a_node_that_leaves_out_experts_of_each_call_costs_few_answers(lie: Lie) -> None:
    """Whatever reason it gives. It has a quarter of all replicas."""

    async def scenario() -> None:
        outcome = await train(lie)
        assert outcome.lost < 0.025
        assert 0 < outcome.share < 0.15

    run(scenario())


def test_a_node_whose_experts_fail_late_slows_few_passes_down() -> None:
    """Each of its replicas is asked again after half a minute. With many experts, that would be all the time."""

    async def lie(call: NodeCall, replies: list[CallReply]) -> Replies:
        await asyncio.sleep(2.4)
        for expert in call.batch.uids:
            yield ExpertReply(call.batch, expert, ExpertError(StatusCode.INTERNAL, "a lie"))

    async def scenario() -> None:
        outcome = await train(lie, experts=64, seconds=3 * SECONDS)
        assert 0 < outcome.share < 0.02
        assert outcome.steps > 0.7 * 3 * USUAL_STEPS

    run(scenario())


def test_a_replica_that_did_not_answer_is_asked_again_after_half_a_minute_or_if_there_is_no_other() -> None:
    async def scenario() -> None:
        hosts = HOSTS[:2]
        swarm = Hosts(refuses(StatusCode.NOT_FOUND))
        dispatcher = dispatcher_of(swarm, hosts)

        async def calls_of_liar(passes: int) -> int:
            before = len(swarm.calls)
            for _ in range(passes):
                await forward_once(dispatcher, EXPERTS)
            return sum(call.peer_id == LIAR for call in swarm.calls[before:])

        while not await calls_of_liar(1):
            pass
        assert await calls_of_liar(20) <= 2, "each of the three experts once"
        await asyncio.sleep(30.0)
        assert await calls_of_liar(20) > 0
        alone = dispatcher_of(swarm, [LIAR])
        for _ in range(3):
            before = len(swarm.calls)
            await forward_once(alone, EXPERTS)
            assert len(swarm.calls) > before

    run(scenario())
