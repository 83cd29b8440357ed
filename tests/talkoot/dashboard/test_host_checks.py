"""The dashboard now and then asks two hosts of a memory for the same passages, and shows hosts that leave some out."""

import asyncio
import contextlib
import json
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memory_samples import SampleMemory
from memory_swarm import MemorySwarm
from real_swarm import LOCAL

from dht.library import MemoryRegistry
from peer.loop import LoopThread
from talkoot.dashboard.server import dashboard
from talkoot.dashboard.settings import DashboardSettings
from talkoot.dashboard.watcher import WatchIntervals
from talkoot.web import address_of, listen
from trainer_client.memory.audits import Auditor
from trainer_client.memory.calls import RetrieverMetrics

LIMIT_S = 120.0
WORDS = SampleMemory.with_words()


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=LIMIT_S) as reply:
        return str(reply.read(), "utf-8")


async def until(url: str, condition: Callable[[Any], bool]) -> Any:
    """Waits for the condition. Returns the row of the only memory."""
    ends = time.monotonic() + LIMIT_S / 2
    while True:
        rows = json.loads(await asyncio.to_thread(fetch, url + "api/v1/memories"))["memories"]
        if rows and condition(rows[0]):
            return rows[0]
        assert time.monotonic() < ends, rows
        await asyncio.sleep(0.05)


def test_hosts_of_a_memory_are_checked_and_who_leaves_passages_out_is_named(
    loop: LoopThread, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with contextlib.AsyncExitStack() as stack:
            swarm = await MemorySwarm.found(stack, tmp_path, WORDS)
            await swarm.host()
            liar = await swarm.host(lies=True)
            assert liar.liar is not None
            (tmp_path / "dashboard").mkdir()
            listener = listen(LOCAL, 0)
            stack.callback(listener.close)
            intervals = WatchIntervals(0.2, memories_every_s=0.2, checks_every_s=0.02)
            await stack.enter_async_context(
                dashboard(
                    await swarm.invite(),
                    DashboardSettings.load(),
                    tmp_path / "dashboard",
                    listener,
                    intervals,
                )
            )
            url = address_of(listener)
            row = await until(url, lambda row: row["checks"] >= 5)
            assert (row["omissions"], row["lies"], row["caught"]) == (0, 0, [])
            liar.liar.lie = "omits best"
            row = await until(url, lambda row: row["omissions"] >= 1)
            assert row["caught"] == [liar.swarm.host.peer_id.to_base58()]
            liar.liar.lie = "inflated scores"
            await until(url, lambda row: row["lies"] >= 1)
            metrics = await asyncio.to_thread(fetch, url + "metrics")
            assert 'talkoot_retriever_lies_total{kind="omission"} 0.0' not in metrics
            assert 'talkoot_retriever_lies_total{kind="omission"}' in metrics

    loop.run(scenario(), LIMIT_S)


def test_a_memory_with_one_host_has_nothing_to_compare(loop: LoopThread, tmp_path: Path) -> None:
    async def scenario() -> list[tuple[int, int]]:
        async with contextlib.AsyncExitStack() as stack:
            swarm = await MemorySwarm.found(stack, tmp_path, WORDS)
            auditor = Auditor(
                swarm.founder, swarm.founder.host.channels(8), tmp_path / "lists", RetrieverMetrics()
            )
            stack.push_async_callback(auditor.close)
            libraries = await MemoryRegistry(swarm.founder.registry).libraries()
            ((entry,),) = libraries.values()
            audits = [await auditor.check([entry])]  # nobody gives the list of shards
            host = await swarm.host()
            audits.append(await auditor.check([entry]))
            await swarm.host()
            while not (audit := await auditor.check([entry])).compared:
                pass  # it was not known when these searches began, or was late
            audits.append(audit)
            kept = {path.stat().st_size for path in (tmp_path / "lists").iterdir()}
            assert len(kept) == 2
            assert WORDS.manifest.encoder.size not in kept
            await host.stop()
            audits.append(await auditor.check([entry]))
            assert {audit.memory for audit in audits} == {entry.memory}
            return [(audit.compared, len(audit.faulty)) for audit in audits]

    assert loop.run(scenario(), LIMIT_S) == [(0, 0), (0, 0), (1, 0), (0, 0)]
