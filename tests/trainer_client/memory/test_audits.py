"""What the checks of a memory's hosts fetch."""

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from expert_fakes import make_peer_id, now, virtual_time
from memory_folders import SampleMemory

from dht.library import LibraryEntry
from dht.memory import MAX_MANIFEST_BYTES, Part
from peer.errors import TransferError
from trainer_client.memory.audits import Auditor
from trainer_client.memory.calls import RetrieverMetrics


def test_a_publisher_of_ever_new_revisions_fills_no_checkers_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    entry = LibraryEntry.of(
        SampleMemory.make().manifest, Part(bytes(32), MAX_MANIFEST_BYTES), make_peer_id(1)
    )
    fetched = 0

    async def fetch(listed: LibraryEntry, *, with_encoder: bool) -> Any:
        nonlocal fetched
        fetched += listed.manifest.size
        raise TransferError("it stops after this list")

    async def scenario() -> None:
        nothing: Any = None
        swarm: Any = SimpleNamespace(
            registry=SimpleNamespace(keys=nothing),
            keys=SimpleNamespace(swarm_id="sauna"),
            session_client=lambda right: nothing,
        )
        auditor = Auditor(swarm, nothing, tmp_path, RetrieverMetrics())
        for _ in range(3600 // 15):
            await asyncio.sleep(15.0)
            await auditor.check([replace(entry, revision=2 + int(now()))])

    monkeypatch.setattr("trainer_client.memory.audits.MemoryParts", lambda *_: SimpleNamespace(open=fetch))
    with virtual_time() as runner:
        runner.run(scenario())
    assert 3 * MAX_MANIFEST_BYTES <= fetched <= 3 * MAX_MANIFEST_BYTES + 16 * 2**10 * 3600
