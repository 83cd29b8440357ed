"""A stranger asks a node again and again to adopt experts. That does not spoil the hand-over of a node that leaves."""

import asyncio
import contextlib
import time
from pathlib import Path

import grpc
import pytest
from callers import numbered_identities
from real_swarm import UIDS, Play, Village, end, playing
from stranger import HostileCaller, Stranger, new_identities

from peer import PROTOCOL_VERSION
from peer.loop import LoopThread
from peer.metrics import total
from peer.wire import state_pb2

STRANGERS = 3


@pytest.fixture
def play(loop: LoopThread, tmp_path: Path) -> Play:
    return playing(loop, numbered_identities(2), tmp_path)


async def ask_to_adopt(caller: HostileCaller, asks: list[int]) -> None:
    """Asks for ever. Records how many experts each request was accepted for."""
    request = state_pb2.AskRequest(
        protocol_version=PROTOCOL_VERSION,
        swarm_id=caller.swarm_id,
        reason=state_pb2.ASK_REASON_ADOPT,
        uids=map(str, UIDS),
    ).SerializeToString()
    while True:
        with contextlib.suppress(grpc.aio.AioRpcError):
            answer = await caller.unary("talkoot.v1.StateService/Ask", request)
            asks.append(state_pb2.AskReply.FromString(answer).accepted)
        await asyncio.sleep(0.01)


def test_a_leaving_nodes_experts_are_adopted_while_strangers_ask_for_them(play: Play) -> None:
    async def scenario(village: Village) -> None:
        leaver = await village.found(experts=4, drain_timeout_s=60, announce_every_s=3.0)
        heir = await village.join(1, await leaver.swarm.invite(), experts=0, spare=8, announce_every_s=3.0)
        await village.run(heir)
        running = await village.run(leaver)
        uids = set(leaver.runtime.experts)
        async with (
            Stranger.joined(await heir.swarm.invite()) as stranger,
            contextlib.AsyncExitStack() as stack,
        ):
            node = await stranger.node(heir.swarm.host.peer_id)
            callers = [
                HostileCaller(node, stranger.keys.swarm_id, each) for each in new_identities(STRANGERS)
            ]
            for caller in callers:
                stack.push_async_callback(caller.close)
                await caller.open_session()
            asks: list[int] = []
            asking = [asyncio.create_task(ask_to_adopt(caller, asks)) for caller in callers]
            await end(running)
            began = time.monotonic()
            await leaver.stop()
            took_s = time.monotonic() - began
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
        assert set(heir.runtime.experts) == uids
        assert total(leaver.hosting.handed_over) == len(uids) == 4
        assert took_s < 30
        assert 0 < sum(asks) < 3 * len(asks), "they asked too slowly to matter"

    play(scenario)
