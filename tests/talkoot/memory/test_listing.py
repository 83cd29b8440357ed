"""What `talkoot memory list` and `inspect` show of a swarm's memories, whatever their publishers wrote."""

import contextlib
import io
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from callers import numbered_identity
from memory_folders import SampleMemory
from memory_hosts import serving
from rich.console import Console
from simulated_readings import memory

from dht.library import LibraryEntry, MemoryRegistry
from dht.manifest import Manifest
from dht.memory import MemoryID, Part
from dht.swarm import Swarm, found_swarm
from peer.errors import LibraryError
from peer.host import NetworkConfig
from peer.loop import LoopThread
from talkoot.memory.listing import _inspect, _list, _memories_table
from talkoot.memory.replication import sizes_in_words
from talkoot.terminal import LogFormat, Terminal

MEMORY = SampleMemory.make()
FOUNDER = numbered_identity(0)
MANIFEST = Manifest.model_validate(
    {
        "name": "sauna",
        "model": {"layers": 1, "hidden": 8, "heads": 2, "context": 8, "feed_forward": 8},
        "experts": {"grid": [2, 2]},
        "routing": {"top_k": 2},
    }
)


def printed(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


async def founder(stack: contextlib.AsyncExitStack) -> Swarm:
    swarm = await found_swarm(FOUNDER, MANIFEST, NetworkConfig("127.0.0.1"))
    stack.push_async_callback(swarm.stop)
    return swarm


def test_a_swarm_without_memories_says_so(loop: LoopThread, capsys: pytest.CaptureFixture[str]) -> None:
    async def scenario() -> None:
        async with contextlib.AsyncExitStack() as stack:
            swarm = await founder(stack)
            await _list(Terminal(LogFormat.TEXT), swarm)
            assert "no memory is published in swarm sauna-" in capsys.readouterr().out
            await _list(Terminal(LogFormat.JSON), swarm)
            assert printed(capsys)["memories"] == []
            with pytest.raises(LibraryError, match="no memory is published"):
                await _inspect(Terminal(LogFormat.TEXT), swarm, "python-docs")

    loop.run(scenario(), 120)


def test_a_terminal_of_80_columns_shows_the_licences() -> None:
    out = io.StringIO()
    entry = replace(
        memory(replicas=(2, 1)).entry,
        memory=MemoryID.of("wikipedia-of-all-of-it", FOUNDER.peer_id),
        licenses=("CC-BY-SA-4.0", "GFDL-1.3-or-later", "MIT"),
        about="All articles of the encyclopedia, with their tables and notes",
    )
    Console(file=out, width=80).print(_memories_table([replace(memory(replicas=(2, 1)), entry=entry)]))
    for text in ("wikipedia-of-all-of-it", "CC-BY-SA-4.0", "GFDL-1.3-or-later", "MIT"):
        assert text in out.getvalue()


def test_a_memory_is_listed_and_inspected_with_its_hosts(
    loop: LoopThread, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with contextlib.AsyncExitStack() as stack:
            swarm = await founder(stack)
            store = MEMORY.write(tmp_path)
            entry = LibraryEntry.of(store.manifest, store.part, FOUNDER.peer_id)
            memories = MemoryRegistry(swarm.registry)
            await memories.publish_library([entry])

            await _list(Terminal(LogFormat.JSON), swarm)
            (listed,) = printed(capsys)["memories"]
            assert (listed["name"], listed["passages"], listed["fewest_replicas"]) == ("python-docs", 80, 0)
            with pytest.raises(LibraryError, match="nobody hosts python-docs-"):
                await _inspect(Terminal(LogFormat.TEXT), swarm, "python-docs")

            await serving(stack, swarm, entry.memory, store)
            await _list(Terminal(LogFormat.JSON), swarm)
            (listed,) = printed(capsys)["memories"]
            assert (listed["fewest_replicas"], listed["hosts"]) == (1, 1)
            await _inspect(Terminal(LogFormat.JSON), swarm, str(entry.memory))
            shown = printed(capsys)
            assert [shard["root"] for shard in shown["shards"]] == [root.hex() for root in MEMORY.roots]
            assert all(shard["hosts"] == [FOUNDER.peer_id.to_base58()] for shard in shown["shards"])
            assert shown["hosts"] == [{"peer_id": FOUNDER.peer_id.to_base58(), "name": None, "shards": 4}]
            await _inspect(Terminal(LogFormat.TEXT), swarm, "python-docs")
            text = capsys.readouterr().out
            sizes = sizes_in_words(entry.total_bytes, store.manifest.encoder.size)
            assert f"80 passages in 4 shards of 4 cells, {sizes}\n" in text
            assert "0 have 2 replicas or more, 4 have 1, 0 have none" in text
            with pytest.raises(LibraryError, match="pass one of python-docs-"):
                await _inspect(Terminal(LogFormat.TEXT), swarm, "wikipedia")

    loop.run(scenario(), 120)


def test_a_host_that_gives_another_manifest_is_not_believed(
    loop: LoopThread, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with contextlib.AsyncExitStack() as stack:
            swarm = await founder(stack)
            store = MEMORY.write(tmp_path)
            entry = LibraryEntry.of(store.manifest, store.part, FOUNDER.peer_id)
            await serving(stack, swarm, entry.memory, store)
            other = Part(b"o" * 32, store.part.size)
            listed = LibraryEntry.of(store.manifest, other, FOUNDER.peer_id)
            await MemoryRegistry(swarm.registry).publish_library([listed])
            with pytest.raises(LibraryError, match="no live host could send the list of shards"):
                await _inspect(Terminal(LogFormat.TEXT), swarm, "python-docs")

    loop.run(scenario(), 120)


def test_texts_of_publishers_are_plain_lines(loop: LoopThread, capsys: pytest.CaptureFixture[str]) -> None:
    async def scenario() -> None:
        async with contextlib.AsyncExitStack() as stack:
            swarm = await founder(stack)
            about = f"red \x1b[31m and [bold]markup[/bold] {time.time():.0f}"
            entry = LibraryEntry.of(MEMORY.manifest, Part(b"m" * 32, 100), FOUNDER.peer_id)
            await MemoryRegistry(swarm.registry).publish_library(
                [LibraryEntry(**{**vars(entry), "about": about})]
            )
            await _list(Terminal(LogFormat.TEXT), swarm)
            assert "\x1b" not in capsys.readouterr().out

    loop.run(scenario(), 120)
