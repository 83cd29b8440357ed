"""A server sends escape sequences and line breaks that others quote: they show one line of plain text."""

import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from callers import numbered_identities
from grpc import StatusCode
from real_swarm import MANIFEST, UIDS, Play, Village, playing
from rich.console import Console
from stranger import Stranger
from victim import honest_caller

from expert_server.probe import call_dial_back
from peer.errors import TransferError, UnreachableError
from peer.loop import LoopThread
from peer.rpc.channels import ChannelPool
from peer.wire import expert_pb2, probe_pb2
from talkoot.terminal import LogFormat, Terminal

FORGED = "\x1b[2J\x1b]0;owned\x07\n12:00:00 error: your key is\r\u202e gone\n" + "x" * 2000


@pytest.fixture
def play(loop: LoopThread, tmp_path: Path) -> Play:
    return playing(loop, numbered_identities(1), tmp_path)


async def refuse(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
    async for _ in requests:
        await context.abort(StatusCode.FAILED_PRECONDITION, FORGED)
    yield b""


async def answer_with_errors(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
    """Answers in the right form, with an expert's error in the stranger's words."""
    async for _ in requests:
        pass
    error = expert_pb2.ExpertReply(index=0, status=StatusCode.NOT_FOUND.value[0], message=FORGED)
    yield expert_pb2.CallReply(experts=[error]).SerializeToString()


async def not_dialled(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
    async for _ in requests:
        yield probe_pb2.DialBackReply(address="127.0.0.1", message=FORGED).SerializeToString()


def check(text: str) -> None:
    assert "12:00:00 error: your key is gone xxx" in text, "the stranger's words are quoted"
    assert text.isprintable()
    assert len(text) < 500


def test_what_a_server_says_is_quoted_as_one_line_of_plain_text(play: Play) -> None:
    async def scenario(village: Village) -> None:
        node = await village.found(experts=1)
        async with Stranger.joined(await node.swarm.invite()) as stranger:
            await stranger.serve(
                {
                    "talkoot.v1.StateService/Fetch": refuse,
                    "talkoot.v1.ExpertService/Forward": refuse,
                    "talkoot.v1.ProbeService/DialBack": not_dialled,
                }
            )
            await stranger.publish_node(name=FORGED, software_version=FORGED)
            info = await stranger.node(stranger.peer_id)
            assert (info.name + info.software_version).isprintable()
            with pytest.raises(TransferError) as fetched:
                await node.replicas.states.fetch(info, UIDS[0])
            check(str(fetched.value))
            async with honest_caller(info, stranger.keys.swarm_id, MANIFEST, UIDS) as caller:
                assert not await caller.call()
            check(caller.last_error)
            pool = ChannelPool()
            dialled = await call_dial_back(await pool.reach(info), stranger.keys.swarm_id, 1)
            check(dialled.message)
            await pool.close()

    play(scenario)


def test_an_error_of_one_expert_and_a_refused_session_are_quoted_so_too(play: Play) -> None:
    async def scenario(village: Village) -> None:
        node = await village.found(experts=1)
        async with Stranger.joined(await node.swarm.invite()) as stranger:
            await stranger.serve({"talkoot.v1.ExpertService/Forward": answer_with_errors})
            await stranger.publish_node()
            info = await stranger.node(stranger.peer_id)
            async with honest_caller(info, stranger.keys.swarm_id, MANIFEST, UIDS) as caller:
                assert not await caller.call()
            check(caller.last_error)
            await stranger.serve(
                {f"talkoot.v1.SessionService/{name}": refuse for name in ("Challenge", "Open")},
                sessions=False,
            )
            await stranger.publish_node(lifetime_s=90)
            info = await stranger.node(stranger.peer_id)
            async with honest_caller(info, stranger.keys.swarm_id, MANIFEST, UIDS) as caller:
                assert not await caller.call()
            check(caller.last_error)
            with pytest.raises((TransferError, UnreachableError)) as refused:
                await node.replicas.states.fetch(info, UIDS[0])
            check(str(refused.value))

    play(scenario)


def test_a_strangers_words_beside_a_spinner_are_no_markup() -> None:
    """`talkoot stop` shows the node's last log line there, and a stranger may be quoted in it."""
    words = "refused by [fe80::1]:31337: [/x][link=https://owned.example]here[/link]"
    terminal, shown = Terminal(LogFormat.TEXT), io.StringIO()
    terminal.err, terminal.live = Console(file=shown, force_terminal=True, soft_wrap=True, width=120), True
    with terminal.stages(words) as stage:
        stage(words)
    assert words in shown.getvalue()
