"""Strangers besiege a node's port: silent streams and connections, resets, cancels and calls without end.

Every attack comes over real sockets from a process of its own. Meanwhile a trainer that was there before, and trainers
that come during the attack, are served; nothing is written to the log; and the loop is never blocked for long.
"""

import asyncio
import contextlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import psutil
import pytest
from loop_lags import LoopLags, exposed_at
from stranger import HostileCaller, Stranger
from victim import MANIFEST_TOML, HonestCaller, NodeVictim, founder, honest_caller
from wire_methods import all_methods, name_of

from dht.announcements import NodeInfo
from dht.manifest import Manifest
from peer.loop import LoopThread

ATTACKS = {
    "rapid-reset": 8000,
    "small-calls": 4000,
    "idle-tls": 150,
}
"""The attacks, and how many streams or connections each makes in a second."""
MORE_ATTACKS = {
    "silent-connections": 1000,
    "cancels": 4000,
    "silent-opens": 200,
    "rapid-reset-nowhere": 8000,
    "unknown-methods": 4000,
    "silent-streams": 200,
    "half-hello": 200,
    "connects": 2000,
    "pings": 4000,
    "settings": 4000,
    "continuation": 2000,
}
SHORT_S, LONG_S = 1.5, 10.0
SCRIPT = Path(__file__).parents[1] / "support" / "http2_attacks.py"


class Besieged:
    """A node, and how to reach it."""

    def __init__(self, node: NodeVictim, info: NodeInfo, swarm_id: str, manifest: Manifest) -> None:
        self.node, self.info, self.swarm_id, self.manifest = node, info, swarm_id, manifest

    @contextlib.asynccontextmanager
    async def caller(self) -> AsyncIterator[HonestCaller]:
        async with honest_caller(self.info, self.swarm_id, self.manifest) as caller:
            yield caller

    def said(self) -> list[str]:
        """The lines in its log, apart from the figures that it logs now and then."""
        return [line for line in self.node.log_lines if " serving: " not in line]

    def stranger(self) -> HostileCaller:
        return HostileCaller(self.info, self.swarm_id)

    async def attack(self, name: str, seconds: float, rate: float) -> dict[str, int]:
        """Runs an attack, and returns what it did."""
        address = str(self.info.addresses[0])
        command = [sys.executable, "-I", str(SCRIPT), address, name, str(seconds), str(rate)]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, timeout=seconds + 120)
        assert done.returncode == 0, done.stderr
        made: dict[str, int] = json.loads(done.stdout)
        return made


@pytest.fixture(scope="module")
def besieged(loop: LoopThread, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Besieged]:
    async def found(node: NodeVictim) -> tuple[NodeInfo, str]:
        async with Stranger.joined(node.invite) as stranger:
            return await stranger.node(node.invite.keys.author), stranger.keys.swarm_id

    folder = tmp_path_factory.mktemp("besieged")
    with founder(folder, checkpoint_every_s=1) as node:
        info, swarm_id = loop.run(found(node), 120)
        yield Besieged(node, info, swarm_id, Manifest.from_toml(_manifest(folder)))


def _manifest(folder: Path) -> Path:
    path = folder / "manifest.toml"
    path.write_text(MANIFEST_TOML)
    return path


async def withstand(besieged: Besieged, name: str, seconds: float, rate: float) -> None:
    before = besieged.said()
    async with besieged.caller() as trainer:
        assert await trainer.call(), trainer.last_error
        lags = await asyncio.to_thread(LoopLags, exposed_at(besieged.node.metrics_address))
        attack = asyncio.create_task(besieged.attack(name, seconds, rate))
        calls = came = 0
        while not attack.done():
            await trainer.call()
            async with besieged.caller() as newcomer:
                came += await newcomer.call()
                calls += 1
            await asyncio.sleep(0.02)
        made = await attack
        assert sum(made.get(key, 0) for key in ("sent", "opened")) > 50, "the attack was no attack"
        assert trainer.share >= 0.95, (trainer.last_error, made)
        assert came >= 0.9 * calls, (came, calls, made)
        await asyncio.to_thread(lags.check_when_quiet if seconds > SHORT_S else lags.check)
        began = time.monotonic()
        while not await trainer.call():
            assert time.monotonic() < began + trainer.bystander.allows(5.0), "it is not back to normal"
    assert besieged.node.alive
    assert besieged.said() == before, "nothing is logged"


@pytest.mark.parametrize("name", ATTACKS)
def test_a_flood_costs_nobody_else(loop: LoopThread, besieged: Besieged, name: str) -> None:
    loop.run(withstand(besieged, name, SHORT_S, ATTACKS[name]), 120)


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTACKS | MORE_ATTACKS)
def test_a_long_flood_costs_nobody_else(loop: LoopThread, besieged: Besieged, name: str) -> None:
    loop.run(withstand(besieged, name, LONG_S, (ATTACKS | MORE_ATTACKS)[name]), 120)


def test_silent_streams_of_one_session_take_no_place_from_others(
    loop: LoopThread, besieged: Besieged
) -> None:
    async def scenario() -> None:
        stranger = besieged.stranger()
        try:
            await stranger.open_session()
            streams = [
                stranger.stream("talkoot.v1.ExpertService/Forward", channel=stranger.new_channel())
                for _ in range(4)
                for _ in range(25)
            ]
            silent = asyncio.gather(*(stream.wait_for_connection() for stream in streams))
            async with besieged.caller() as trainer:
                async with asyncio.timeout(60.0):  # a busy machine needs longer
                    while trainer.calls <= 10:
                        await trainer.call_for(2.0)
                assert trainer.failed == 0, trainer.last_error
            silent.cancel()
            for stream in streams:
                stream.cancel()
        finally:
            await stranger.close()

    loop.run(scenario(), 120)


def test_no_method_without_a_session_leaves_a_trace_in_the_log(loop: LoopThread, besieged: Besieged) -> None:
    methods = [name_of(method) for method in all_methods()]
    assert len(methods) > 20
    before = besieged.said()

    async def scenario() -> None:
        stranger = besieged.stranger()
        try:
            for method in [*methods, "nobody/Nothing"]:
                for request in (b"", b"\xff" * 9):
                    with contextlib.suppress(grpc.aio.AioRpcError):
                        await stranger.unary(method, request)
        finally:
            await stranger.close()

    loop.run(scenario(), 120)
    assert besieged.said() == before


def test_a_node_with_64_free_descriptors_serves_and_saves(loop: LoopThread, besieged: Besieged) -> None:
    node = besieged.node
    limits = resource.prlimit(node.process.pid, resource.RLIMIT_NOFILE)
    used = psutil.Process(node.process.pid).num_fds()

    async def scenario() -> None:
        async with besieged.caller() as trainer:
            assert await trainer.call(), trainer.last_error
            saved = node.metric("talkoot_checkpoints_saved_total")
            attack = asyncio.create_task(besieged.attack("silent-connections", 2.0, 400))
            while not attack.done():
                await trainer.call("backward")
                async with besieged.caller() as newcomer:
                    await newcomer.call()
                    assert newcomer.failed == 0, newcomer.last_error
            assert trainer.share >= 0.95, trainer.last_error
            assert psutil.Process(node.process.pid).num_fds() < used + 64
            await asyncio.to_thread(
                node.until, lambda: node.metric("talkoot_checkpoints_saved_total") > saved, "a checkpoint"
            )

    resource.prlimit(node.process.pid, resource.RLIMIT_NOFILE, (used + 64, limits[1]))
    try:
        loop.run(scenario(), 120)
    finally:
        resource.prlimit(node.process.pid, resource.RLIMIT_NOFILE, limits)
    assert node.metric("talkoot_checkpoint_failures_total") == 0
