"""What a searcher fetches to follow a memory's publisher. Time is virtual."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from expert_fakes import make_peer_id, now, virtual_time
from memory_folders import SampleMemory

from dht.library import LibraryEntry
from dht.memory import MAX_MANIFEST_BYTES, Part
from trainer_client.memory.directory import MemoryDirectory


def test_a_publisher_of_ever_new_revisions_fills_no_searchers_line() -> None:
    manifest, publisher = SampleMemory.make().manifest, make_peer_id(1)
    entry = LibraryEntry.of(manifest, Part(bytes(32), MAX_MANIFEST_BYTES), publisher)
    fetched = 0

    async def libraries() -> Any:
        return {publisher: (replace(entry, revision=2 + int(now())),)}

    async def fetch(listed: LibraryEntry, before: Any) -> Any:
        nonlocal fetched
        fetched += listed.manifest.size
        return SimpleNamespace(entry=listed, manifest=manifest)

    async def scenario() -> None:
        memories: Any = SimpleNamespace(libraries=libraries)
        parts: Any = SimpleNamespace(open=fetch)
        opened: Any = SimpleNamespace(entry=entry, manifest=manifest)
        nothing: Any = None
        directory = MemoryDirectory(memories, nothing, parts, opened)
        for _ in range(3600 // 30):
            await asyncio.sleep(30.0)
            await directory.follow()

    with virtual_time() as runner:
        runner.run(scenario())
    assert 3 * MAX_MANIFEST_BYTES <= fetched <= 3 * MAX_MANIFEST_BYTES + 16 * 2**10 * 3600
