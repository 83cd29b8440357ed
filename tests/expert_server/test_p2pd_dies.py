"""p2pd of a node is killed again and again: only streams through routers are affected, and it is started again."""

import os
import signal
from functools import partial
from pathlib import Path

import pytest
from callers import numbered_identities
from real_swarm import LOCAL, MANIFEST, ONCE_EACH, Play, Village, eventually, playing, serving

from dht.swarm import found_swarm
from expert_server.status import NodeState
from peer.host import NetworkConfig
from peer.loop import LoopThread
from peer.metrics import total
from peer.transport import libp2p
from peer.transport.libp2p import Libp2p

KILLS = 2


@pytest.fixture
def play(loop: LoopThread, tmp_path: Path) -> Play:
    return playing(loop, numbered_identities(2), tmp_path)


def test_a_killed_p2pd_interrupts_nothing(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(village: Village) -> None:
        swarm = await found_swarm(village.identities[0], MANIFEST, NetworkConfig(LOCAL, p2pd=True))
        node = await village.start(swarm, {"experts": 8, "announce_every_s": 1.0})
        task = await village.run(node)
        peer = swarm.host._libp2p
        observer = await village.observe(1, await swarm.invite())

        async def is_serving() -> bool:
            return peer.alive and await serving(observer) == ONCE_EACH

        await eventually(is_serving)
        before = await swarm.host.tunnel_addresses()
        for kills in range(1, KILLS + 1):
            assert peer._daemon is not None
            os.kill(peer._daemon._child.pid, signal.SIGKILL)
            await eventually(partial(is_down, peer))
            assert await swarm.host.tunnel_addresses() == []
            assert await serving(observer) == ONCE_EACH
            assert node.status().state is NodeState.SERVING
            await eventually(partial(is_back, peer, kills))
            assert await swarm.host.tunnel_addresses() == before
        assert not task.done()

    monkeypatch.setattr(libp2p, "_RESTART_PAUSES_S", (0.5,))
    play(scenario)


async def is_down(peer: Libp2p) -> bool:
    return not peer.alive


async def is_back(peer: Libp2p, restarts: int) -> bool:
    return peer.alive and total(peer.restarts) == restarts
