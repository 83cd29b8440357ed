"""Quantiles are those of the latest calls, and memory does not grow with the number of calls."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dht.announcements import Latency
from dht.uid import UID
from peer.identity import PeerID
from peer.metrics import total
from trainer_client.dispatch.batches import AnsweredRows, CallEnded, ExpertReply, NodeBatch, NodeCall
from trainer_client.dispatch.calls import CallTracker, Replies
from trainer_client.dispatch.policy import CallTimes, CircuitBreakers, Latencies


def peer(number: int) -> PeerID:
    return PeerID(b"\x12\x20" + number.to_bytes(32, "big"))


def test_quantiles_are_of_values_that_were_seen() -> None:
    call_times = CallTimes()
    assert call_times.quantiles() is None
    for hundredths in range(1, 101):
        call_times.add(hundredths / 100)
    assert call_times.quantiles() == Latency(0.5, 0.99)


def test_old_calls_are_forgotten_in_quantiles() -> None:
    call_times = CallTimes()
    for _ in range(600):
        call_times.add(9.0)
    for _ in range(600):
        call_times.add(0.001)
    assert call_times.quantiles() == Latency(0.001, 0.001)


def test_a_nodes_mean_moves_towards_its_calls() -> None:
    latencies = Latencies()
    latencies.note_node(peer(1), 1.0, 0.0)
    latencies.note_node(peer(1), 2.0, 1.0)
    assert latencies.nodes == {peer(1): pytest.approx(1.25)}


def test_the_nodes_called_longest_ago_are_forgotten() -> None:
    latencies = Latencies()
    for number in range(5000):
        latencies.note_node(peer(number), 1.0, 0.0)
    assert list(latencies.nodes) == [peer(number) for number in range(904, 5000)]


def test_a_node_that_has_not_answered_for_a_minute_counts_as_unknown() -> None:
    latencies = Latencies()
    latencies.note_node(peer(1), 9.0, 0.0)
    latencies.note_node(peer(2), 1.0, 10.0)
    latencies.note_node(peer(3), 1.0, 20.0)
    latencies.note_node(peer(2), 1.0, 30.0)
    assert set(latencies.nodes_lately(59.9)) == {peer(1), peer(2), peer(3)}
    assert set(latencies.nodes_lately(60.0)) == {peer(2), peer(3)}
    assert set(latencies.nodes_lately(80.0)) == {peer(2)}
    latencies.note_node(peer(1), 1.0, 80.0)
    assert latencies.nodes_lately(80.0)[peer(1)] == 1.0, "the slow call of old no longer counts"


def test_a_slow_node_does_not_look_quick_by_early_replies() -> None:
    """Its time is that of the last row."""
    batch, rows = NodeBatch.apart([UID(0, (0, 0))], [8], range(8)), np.random.default_rng(0)
    inputs, answers = rows.standard_normal((2, 8, 4), np.float32)
    now = 0.0

    class SlowCaller:
        async def call(self, call: NodeCall) -> AsyncIterator[Any]:
            nonlocal now
            yield ExpertReply(batch, batch.uids[0])
            for first, last, at in ((0, 1, 0.5), (1, 4, 9.0), (4, 8, 20.0)):
                now = at
                places = np.arange(first, last)
                yield AnsweredRows(batch, places, np.ones((last - first, 1), np.bool_), answers[places])

    async def scenario() -> None:
        caller: Any = SlowCaller()
        tracker = CallTracker(caller, CircuitBreakers(), lambda: now)
        node: Any = SimpleNamespace(peer_id=peer(1))
        replies = Replies()
        tracker.start(NodeCall(node, "forward", batch, 60.0, inputs, np.ones((8, 1), np.float32)), replies)
        async with asyncio.timeout(60):
            while not isinstance(await replies.get(), CallEnded):
                pass
        assert total(tracker.metrics.failures) == 0
        assert tracker.latencies.nodes == {peer(1): 20.0}
        await tracker.close()

    asyncio.run(scenario())
