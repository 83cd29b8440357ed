"""Sequences whose rows experts keep, and a host that answers further rows late. Time is virtual."""

import asyncio
from collections.abc import AsyncGenerator, Sequence

import numpy as np
from dispatch_swarm import LENGTH, make_dispatcher, run
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

from dht.directory import View
from peer.identity import PeerID
from trainer_client.dispatch.batches import CallReply, HeldSequence, Kept, NodeCall, RoutedRows, Segments
from trainer_client.dispatch.dispatcher import Dispatcher
from trainer_client.routers import best

SLOW, QUICK = make_peer_id(0), make_peer_id(1)
QUICK_S = 0.05
SCORES = [np.zeros((LENGTH, 1), np.float32)]


class Hosts(FakeSwarm):
    """Hosts of one expert, which keep the rows of sequences. One of them answers first rows at once, and further rows
    as late as trainers wait for them.
    """

    async def call(self, call: NodeCall) -> AsyncGenerator[CallReply, None]:
        is_late = call.node.peer_id == SLOW and call.held is not None
        await asyncio.sleep(0.9 * call.deadline_s if is_late else QUICK_S)
        *first, last = [reply async for reply in super().call(call)]
        for reply in first:
            yield reply
        if call.numbers:
            yield Kept(call.batch, bytes(16))
        yield last


def dispatcher_of(hosts: Sequence[PeerID]) -> Dispatcher:
    swarm = Hosts(make_manifest((1,)))
    (uid,) = swarm.manifest.uids()
    nodes = {host: make_node(host) for host in hosts}
    view = View(swarm.manifest, {uid: tuple(make_replica(uid, host) for host in hosts)}, nodes, 1.0)
    return make_dispatcher(swarm, directory=FakeDirectory(view))


async def begin_at_slow(dispatcher: Dispatcher) -> HeldSequence:
    """A sequence whose first rows the slow host keeps, after some other calls."""
    for _ in range(50):
        held = HeldSequence()
        result = await send_to_best(dispatcher, random_rows(LENGTH), SCORES, 1, LENGTH, held=[held])
    while result.answers[0].node.peer_id != SLOW:
        held = HeldSequence()
        result = await send_to_best(dispatcher, random_rows(LENGTH), SCORES, 1, LENGTH, held=[held])
    assert held.can_go_on
    return held


async def add_row(dispatcher: Dispatcher, held: HeldSequence) -> None:
    scores, segments = [SCORES[0][:1]], Segments.after(np.array([LENGTH]), np.array([1]))
    live = await dispatcher.find(0, scores, 1)
    rows = RoutedRows(0, live.tables[-1].shape, random_rows(1), scores, 1, segments, False, held=[held])
    result = await dispatcher.send(rows, best(scores, live.tables, 1), live)
    assert result.answered.all()


def test_a_sequence_leaves_a_host_that_answers_further_rows_late_if_another_is_quick() -> None:
    async def scenario() -> None:
        dispatcher = dispatcher_of([SLOW, QUICK])
        held = await begin_at_slow(dispatcher)
        await add_row(dispatcher, held)
        assert held.is_answered
        assert not held.can_go_on
        for _ in range(10):  # sent again from the first row, and continued at the other host
            began, held = now(), HeldSequence()
            await send_to_best(dispatcher, random_rows(LENGTH), SCORES, 1, LENGTH, held=[held])
            await add_row(dispatcher, held)
            assert held.can_go_on
            assert now() - began < 3 * QUICK_S

    run(scenario())


def test_a_sequence_stays_with_a_slow_host_that_is_the_only_one() -> None:
    async def scenario() -> None:
        dispatcher = dispatcher_of([SLOW])
        held = await begin_at_slow(dispatcher)
        await add_row(dispatcher, held)
        assert held.can_go_on

    run(scenario())
