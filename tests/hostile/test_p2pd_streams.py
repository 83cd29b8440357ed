"""Streams that each claim a long message make p2pd take memory without end: it is started again."""

import asyncio
import time
from functools import partial
from pathlib import Path

import pytest
from callers import numbered_identities
from real_swarm import ONCE_EACH, Play, Village, eventually, playing, serving
from stranger import Stranger

from dht.swarm import Swarm
from expert_server.node import Node
from expert_server.status import NodeState
from peer.identity import PeerID
from peer.loop import LoopThread

pytestmark = pytest.mark.filterwarnings("ignore:path is deprecated:DeprecationWarning")  # hivemind's, on 3.11

CLAIM = b"\x80\xf8\x07"
"""130,048 bytes follow, as a varint. p2pd makes room for them, and waits."""
LIMIT_BYTES = 96 * 2**20
"""In place of 256 MiB, so that a few hundred streams are enough."""


@pytest.fixture
def play(loop: LoopThread, tmp_path: Path) -> Play:
    return playing(loop, numbered_identities(3), tmp_path)


async def hold_streams(stranger: Stranger, victim: PeerID, count: int) -> None:
    """Until p2pd has ended, at the latest."""
    for _ in range(count):
        daemon = stranger.swarm.host.p2p
        _, writer = await daemon.open_stream(victim, "DHTProtocol.rpc_ping", 5.0)
        writer.write(CLAIM + bytes(130_000))
        await writer.drain()


async def is_serving_again(node: Node) -> bool:
    return node.swarm.host.restarts >= 1 and node.status().state is NodeState.SERVING


def test_p2pd_that_takes_too_much_memory_is_started_again(
    play: Play, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(village: Village) -> None:
        node = await village.found(experts=8, announce_every_s=1.0)
        task = await village.run(node)
        invite = await node.swarm.invite()
        observer = await village.observe(1, invite)
        before = node.swarm.host.p2p.memory_bytes
        assert 0 < before < LIMIT_BYTES, "as p2pd usually takes"
        async with Stranger.joined(invite, serves_dht=False) as stranger:
            attack = asyncio.gather(
                hold_streams(stranger, node.swarm.host.peer_id, 700), return_exceptions=True
            )
            await eventually(partial(is_serving_again, node))
            attack.cancel()
        assert not task.done()
        assert "MiB of memory, which is too much; starting it again" in caplog.text
        ended = time.monotonic()
        await eventually(lambda: sees_all(observer))
        assert time.monotonic() - ended < 5.0, "back to normal"

    monkeypatch.setattr("peer.host._MOST_DAEMON_BYTES", LIMIT_BYTES)
    play(scenario)


async def sees_all(observer: Swarm) -> bool:
    return await serving(observer) == ONCE_EACH
