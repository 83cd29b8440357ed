"""What a searcher knows of a memory's hosts, and what it fetches to follow its publisher."""

import asyncio
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from math import prod
from types import SimpleNamespace
from typing import Any

import numpy as np
from expert_fakes import make_peer_id, now, virtual_time
from loop_holds import holds
from memory_folders import SampleMemory
from memory_samples import peer_ids

from dht.announcements import ReplicaState
from dht.library import CellHost, LibraryEntry
from dht.memory import MAX_MANIFEST_BYTES, Cell, Part, ShardInfo
from dht.uid import coordinate_of
from peer.identity import PeerID
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


def directory_of(
    grid: tuple[int, ...],
    by_cell: Mapping[Cell, Sequence[ShardInfo]],
    announced: Mapping[Cell, tuple[CellHost, ...]],
    peers: Collection[PeerID],
) -> MemoryDirectory:
    """What is known of a memory with these shards and hosts."""
    nodes = {peer: SimpleNamespace(peer_id=peer) for peer in peers}

    async def cell_hosts(memory: Any, cells: Collection[Cell], **_: Any) -> Any:
        return {cell: announced[cell] for cell in cells}

    async def nodes_of(asked: Collection[PeerID], **_: Any) -> Any:
        return {peer: nodes[peer] for peer in asked}

    def spawn(reading: Any) -> None:
        reading.close()

    nothing: Any = None
    memories: Any = SimpleNamespace(cell_hosts=cell_hosts)
    registry: Any = SimpleNamespace(nodes=nodes_of, lookups=SimpleNamespace(spawn=spawn))
    opened: Any = SimpleNamespace(
        entry=SimpleNamespace(memory=None),
        manifest=SimpleNamespace(grid=grid, by_cell=by_cell),
        filled_C=np.ones(prod(grid), np.bool_),
    )
    return MemoryDirectory(memories, registry, nothing, opened)


def test_strangers_that_announce_all_shards_of_many_cells_do_not_hold_a_searchers_loop() -> None:
    """The hosts of 64 cells of 64 shards are read and located. Each cell has two honest hosts and 254 strangers."""
    grid, rng = (8, 8), random.Random(0)
    cells = [coordinate_of(number, grid) for number in range(64)]
    by_cell = {cell: [ShardInfo(cell, rng.randbytes(32), 100, 30_000) for _ in range(64)] for cell in cells}
    peers = peer_ids(256)
    shorts = {cell: frozenset(shard.short for shard in shards) for cell, shards in by_cell.items()}
    announced = {
        cell: tuple(CellHost(peer, ReplicaState.SERVING, some) for peer in peers)
        for cell, some in shorts.items()
    }

    async def shares() -> list[float]:
        directory = directory_of(grid, by_cell, announced, peers)

        async def locate() -> None:
            located = await directory.locate(np.ones((1, 64), np.float32), 64, frozenset())
            assert located.hosts.keys() == by_cell.keys()
            assert all(len(hosts) == 64 for hosts in located.hosts.values())

        found = []
        for _ in range(4):  # the first one also imports modules
            directory._forget()
            found.append(await holds(locate()))
        return [longest_s / whole_s for longest_s, whole_s in found]

    assert min(asyncio.run(shares())) < 1 / 3


def test_many_queries_in_a_memory_of_many_cells_do_not_hold_a_searchers_loop() -> None:
    """As when a model learns with a large memory."""
    grid, (peer,) = (64, 64), peer_ids(1)
    cells = [coordinate_of(number, grid) for number in range(prod(grid))]
    by_cell = {cell: [ShardInfo(cell, bytes([*cell] * 16), 100, 30_000)] for cell in cells}
    announced = {
        cell: (CellHost(peer, ReplicaState.SERVING, frozenset({shard.short})),)
        for cell, (shard,) in by_cell.items()
    }
    scores_QC = np.random.default_rng(0).standard_normal((256, prod(grid)), np.float32)
    nearest_Qk = np.argsort(-scores_QC, axis=1)[:, :8]  # sorting all takes longer than to find the nearest
    nearest = [[cells[number] for number in some] for some in nearest_Qk.tolist()]

    async def shares() -> list[float]:
        directory = directory_of(grid, by_cell, announced, [peer])

        async def locate() -> None:
            located = await directory.locate(scores_QC, 8, frozenset())
            assert located.cells == nearest

        return [longest_s / whole_s for longest_s, whole_s in [await holds(locate()) for _ in range(3)]]

    assert min(asyncio.run(shares())) < 1 / 4
