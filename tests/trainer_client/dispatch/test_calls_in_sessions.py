"""A trainer's calls prove who makes them. If a session has ended, the call is tried once more, and nothing else
happens.
"""

from unittest.mock import patch

import grpc
import pytest
from callers import a_caller
from expert_fakes import ask
from grpc import StatusCode
from real_node import GENEROUS, HIDDEN, UIDS, a_node, request, rows

from peer.errors import ExpertError
from peer.loop import LoopThread
from peer.rpc.channels import ChannelPool, Contact
from peer.rpc.sessions import SESSION_KEY
from peer.wire import session_pb2
from trainer_client.dispatch.grpc_caller import GrpcCaller

STALE = ((SESSION_KEY, bytes(16)),)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_session_that_has_ended_is_opened_again_and_the_call_repeated(
    loop: LoopThread, direction: str
) -> None:
    async def scenario() -> None:
        channels = ChannelPool()
        async with a_node(GENEROUS) as (node, runtime):
            sessions = a_caller("kept-swarm")
            caller = GrpcCaller(channels, "kept-swarm", HIDDEN, sessions=sessions)
            sessions._known[node.peer_id] = STALE, float("inf")
            with patch.object(sessions, "_open", wraps=sessions._open) as opened:
                if direction == "forward":
                    answers = await ask(caller, node, "forward", request(UIDS[0]))
                else:
                    answers = await ask(caller, node, "backward", request(UIDS[0], rows(2)))
                assert answers.answered == UIDS[:1]
                assert opened.call_count == 1
                assert runtime.experts[UIDS[0]].update_count == (direction == "backward")
                await ask(caller, node, "forward", request(UIDS[0]))
                assert opened.call_count == 1
        await channels.close()

    loop.run(scenario(), 120)


class CrowdedPool(ChannelPool):
    """Closes each channel as soon as it is given out, as if others needed the room."""

    async def reach(self, peer: Contact) -> grpc.aio.Channel:
        channel = await super().reach(peer)
        await channel.close()
        return channel


@pytest.mark.parametrize("has_session", [False, True])
def test_a_node_is_not_to_blame_for_a_channel_that_the_trainer_closes(
    loop: LoopThread, has_session: bool
) -> None:
    async def scenario() -> None:
        channels, crowded, sessions = ChannelPool(), CrowdedPool(), a_caller("kept-swarm")
        async with a_node(GENEROUS) as (node, _):
            if has_session:
                await sessions.metadata(node.peer_id, await channels.reach(node), 60)
            with pytest.raises(ExpertError, match="the channel was closed") as caught:
                await ask(
                    GrpcCaller(crowded, "kept-swarm", HIDDEN, sessions=sessions),
                    node,
                    "forward",
                    request(UIDS[0]),
                )
            assert caught.value.status is StatusCode.UNAVAILABLE
        await crowded.close()
        await channels.close()

    loop.run(scenario(), 120)


def test_who_asks_for_forward_alone_may_not_go_backward(loop: LoopThread) -> None:
    async def scenario() -> None:
        channels = ChannelPool()
        async with a_node(GENEROUS) as (node, runtime):
            reader = a_caller("kept-swarm", rights=(session_pb2.RIGHT_FORWARD,))
            caller = GrpcCaller(channels, "kept-swarm", HIDDEN, sessions=reader)
            assert (await ask(caller, node, "forward", request(UIDS[0]))).answered == UIDS[:1]
            with pytest.raises(ExpertError, match="RIGHT_BACKWARD") as caught:
                await ask(caller, node, "backward", request(UIDS[0], rows(2)))
            assert caught.value.status is StatusCode.PERMISSION_DENIED
            assert runtime.experts[UIDS[0]].update_count == 0
        await channels.close()

    loop.run(scenario(), 120)


def test_without_a_session_nothing_is_done(loop: LoopThread) -> None:
    async def scenario() -> None:
        channels = ChannelPool()
        async with a_node(GENEROUS) as (node, runtime):
            with pytest.raises(ExpertError, match="open one") as caught:
                await ask(
                    GrpcCaller(channels, "kept-swarm", HIDDEN), node, "backward", request(UIDS[0], rows(2))
                )
            assert caught.value.status is StatusCode.UNAUTHENTICATED
            assert runtime.experts[UIDS[0]].update_count == 0
        await channels.close()

    loop.run(scenario(), 120)
