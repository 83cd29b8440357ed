"""A call that fails leaves nothing in the trainer's memory."""

import asyncio
import weakref
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import numpy as np
from collector import without_collector
from expert_fakes import make_peer_id
from grpc import StatusCode

from dht.uid import UID
from peer.errors import ExpertError
from trainer_client.dispatch.batches import CallEnded, NodeBatch, NodeCall
from trainer_client.dispatch.calls import CallTracker, Replies
from trainer_client.dispatch.policy import CircuitBreakers


class FailingCaller:
    async def call(self, call: NodeCall) -> AsyncIterator[Any]:
        raise ExpertError(StatusCode.UNAVAILABLE, "its computer was switched off")
        yield


async def fail(rows: np.ndarray[Any, Any]) -> CallEnded:
    """Calls a node, and returns the end of the call."""
    caller: Any = FailingCaller()
    node: Any = SimpleNamespace(peer_id=make_peer_id(1))
    tracker, replies = CallTracker(caller, CircuitBreakers()), Replies()
    batch = NodeBatch.apart([UID(0, (0, 0))], [len(rows)], range(len(rows)))
    tracker.start(NodeCall(node, "forward", batch, 60.0, rows, np.ones((len(rows), 1), np.float32)), replies)
    ended = await asyncio.wait_for(replies.get(), 60)
    await tracker.close()
    assert isinstance(ended, CallEnded)
    return ended


def test_the_rows_of_a_failed_call_are_freed_without_the_garbage_collector() -> None:
    rows = np.ones((8, 4), np.float32)
    left = weakref.ref(rows)
    with without_collector():
        ended = asyncio.run(fail(rows))
        assert ended.lost
        del rows
        assert left() is None
