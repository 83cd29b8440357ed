"""Strangers open sessions at full speed, with many keys and many connections. Honest newcomers are still admitted."""

import asyncio
import contextlib
import time
from collections import Counter
from pathlib import Path

import grpc
import pytest
from loop_lags import LoopLags, exposed_at
from stranger import HostileCaller, Stranger, new_identities
from victim import MANIFEST_TOML, founder, honest_caller

from dht.announcements import NodeInfo
from dht.manifest import Manifest
from peer.loop import LoopThread

ATTACK_S = 1.0
CONNECTIONS = 12
AT_ONCE = 8
"""The number of calls under way on each connection."""
KEYS = 66
ATTEMPTS = 200
"""Fewer attempts would not be an attack."""
NEWCOMERS = 20


class Flood:
    """Asks for sessions as fast as it can. Every other statement has a fake signature, which takes no time to make."""

    def __init__(self, node: NodeInfo, swarm_id: str) -> None:
        self.outcomes: Counter[str] = Counter()
        self._callers = [HostileCaller(node, swarm_id) for _ in range(CONNECTIONS)]
        self._keys = new_identities(KEYS)

    async def run(self) -> None:
        await asyncio.gather(*(self._ask(n) for n in range(CONNECTIONS * AT_ONCE)))

    async def close(self) -> None:
        for caller in self._callers:
            await caller.close()

    async def _ask(self, number: int) -> None:
        caller = self._callers[number % CONNECTIONS]
        while True:
            number += 1
            try:
                statement = caller.statement(await caller.challenge(), self._keys[number % KEYS])
                if number % 2:
                    statement.signature = bytes(256)
                await caller.unary("talkoot.v1.SessionService/Open", statement.SerializeToString())
            except grpc.aio.AioRpcError as error:
                self.outcomes[error.code().name] += 1
            else:
                self.outcomes["opened"] += 1


@pytest.mark.slow
def test_honest_newcomers_open_sessions_while_strangers_flood(loop: LoopThread, tmp_path: Path) -> None:
    manifest = Manifest.from_toml(write(tmp_path / "manifest.toml"))

    async def scenario(node_address: str) -> None:
        async with contextlib.AsyncExitStack() as stack:
            stranger = await stack.enter_async_context(Stranger.joined(node.invite))
            info = (await stranger.nodes())[0]
            swarm_id = stranger.keys.swarm_id
            trainer = await stack.enter_async_context(honest_caller(info, swarm_id, manifest))
            assert await trainer.call(), trainer.last_error
            lags = LoopLags(exposed_at(node_address))
            flood = Flood(info, swarm_id)
            stack.push_async_callback(flood.close)
            attack = asyncio.create_task(flood.run())
            calls = asyncio.create_task(trainer.call_for(ATTACK_S, 0.05))
            came = failed = 0
            began = time.monotonic()
            while (
                time.monotonic() < began + ATTACK_S or came < NEWCOMERS or flood.outcomes.total() <= ATTEMPTS
            ):
                assert time.monotonic() < began + 240, f"{came} newcomers, {flood.outcomes.total()} attempts"
                async with honest_caller(info, swarm_id, manifest) as newcomer:
                    came += 1
                    failed += not await newcomer.call()
            await calls
            attack.cancel()
            await asyncio.gather(attack, return_exceptions=True)
            lasted_s = time.monotonic() - began
            assert flood.outcomes["opened"] <= 200 * lasted_s + 100, "checks are bounded"
            assert failed <= 0.05 * came
            assert trainer.share >= 0.95, trainer.last_error
            await asyncio.to_thread(lags.check)

    with founder(tmp_path) as node:
        loop.run(scenario(node.metrics_address), 300)


def write(path: Path) -> Path:
    path.write_text(MANIFEST_TOML)
    return path
