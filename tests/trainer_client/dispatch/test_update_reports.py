"""A trainer tells each node how many updates of its experts it has got from all nodes, over real sockets."""

import asyncio
from contextlib import AsyncExitStack

import numpy as np
from callers import a_caller
from real_node import GENEROUS, HIDDEN, UIDS, a_node, rows

from dht.announcements import NodeInfo
from peer.loop import LoopThread
from peer.metrics import total
from peer.rpc.channels import ChannelPool
from trainer_client.dispatch.batches import CallEnded, Direction, NodeBatch, NodeCall
from trainer_client.dispatch.calls import CallTracker, Replies
from trainer_client.dispatch.grpc_caller import GrpcCaller
from trainer_client.dispatch.policy import CircuitBreakers

BATCH = NodeBatch.apart(UIDS[:1], [6], range(6))
ONES = np.ones((6, 1), np.float32)


async def call(tracker: CallTracker, node: NodeInfo, direction: Direction, keep: bool = False) -> None:
    gradients = rows(2) if direction == "backward" else None
    replies = Replies()
    tracker.start(NodeCall(node, direction, BATCH, 60.0, rows(1), ONES, gradients, keep=keep), replies)
    while not isinstance(await replies.get(), CallEnded):
        pass
    assert total(tracker.metrics.failures) == 0


def test_a_node_learns_how_many_updates_others_took(loop: LoopThread) -> None:
    async def scenario() -> None:
        async with AsyncExitStack() as stack:
            (slow, slow_runtime), (quick, quick_runtime) = [
                await stack.enter_async_context(a_node(GENEROUS)) for name in ("a", "b")
            ]
            channels = ChannelPool()
            stack.push_async_callback(channels.close)
            caller = GrpcCaller(channels, "kept-swarm", HIDDEN, sessions=a_caller("kept-swarm"))
            tracker = CallTracker(caller, CircuitBreakers(), asyncio.get_running_loop().time)
            stack.push_async_callback(tracker.close)
            for node, times in ((slow, 1), (quick, 40), (slow, 1), (quick, 40)):
                for _ in range(times):
                    await call(tracker, node, "forward", keep=True)
                    await call(tracker, node, "backward")
            await call(tracker, slow, "forward")
            of_slow, of_quick = (r.experts[UIDS[0]].reports for r in (slow_runtime, quick_runtime))
            ((_, seen),) = of_slow._trainers.items()
            assert (seen.here, seen.elsewhere, seen.total) == (1, 40, 41), "evaluation reports nothing"
            assert of_slow.is_left_behind()
            ((_, seen),) = of_quick._trainers.items()
            assert (seen.here, seen.elsewhere, seen.total) == (79, 1, 81)
            assert not of_quick.is_left_behind()
            assert not slow_runtime.experts[UIDS[1]].reports._trainers

    loop.run(scenario(), 120)
