"""What a searcher knows of a memory's hosts, and what it fetches to follow its publisher."""

import asyncio
import hashlib
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from expert_fakes import make_peer_id, now, virtual_time
from loop_holds import holds
from memory_folders import SampleMemory
from memory_samples import peer_ids

from benchmarks.simulated_p2p import Link, simulated_world
from benchmarks.simulated_swarm import LIFETIME_S, Placing, SimulatedSwarm
from dht.announcements import ReplicaState
from dht.library import LibraryEntry, MemoryRegistry, RegionHost
from dht.memory import MAX_MANIFEST_BYTES, Cell, Part, ShardInfo
from dht.uid import coordinate_of, number_of
from peer.errors import TransferError
from peer.identity import PeerID
from trainer_client.memory.directory import MemoryDirectory, MemoryParts, PartCache


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


def test_a_new_revision_is_followed_although_nobody_searches() -> None:
    """A trainer that has found all passages of its text takes them from its disk, but must not read revoked ones."""
    manifest, publisher = SampleMemory.make().manifest, make_peer_id(1)
    entry = LibraryEntry.of(manifest, Part(bytes(32), 100), publisher)
    revision, opened = 1, SimpleNamespace(entry=entry, manifest=manifest)

    async def libraries() -> Any:
        return {publisher: (replace(entry, revision=revision),)}

    async def fetch(listed: LibraryEntry, before: Any) -> Any:
        return SimpleNamespace(entry=listed, manifest=replace(manifest, revision=listed.revision))

    async def region_hosts(*_: Any, **__: Any) -> Any:
        return {}

    async def scenario() -> int:
        nonlocal revision
        memories = SimpleNamespace(libraries=libraries, region_hosts=region_hosts)
        parts = SimpleNamespace(open=fetch)
        directory = MemoryDirectory(*cast(Any, (memories, None, parts, opened)))
        keeping = asyncio.create_task(directory.keep_fresh())
        await asyncio.sleep(3600.0)
        revision = 2
        await asyncio.sleep(60.0)
        keeping.cancel()
        return directory.manifest.revision

    with virtual_time() as runner:
        assert runner.run(scenario()) == 2


def directory_of(
    grid: tuple[int, ...],
    by_cell: Mapping[Cell, Sequence[ShardInfo]],
    announced: Mapping[Cell, tuple[RegionHost, ...]],
    peers: Collection[PeerID],
) -> MemoryDirectory:
    """What is known of a memory with these shards and hosts. Changes of `announced` count."""
    nodes = {peer: SimpleNamespace(peer_id=peer) for peer in peers}

    shards = tuple(shard for some in by_cell.values() for shard in some)
    manifest = replace(SampleMemory.make().manifest, grid=grid, shards=shards)

    async def region_hosts(memory: Any, regions: Collection[int], **_: Any) -> Any:
        return {region: tuple(hosts_of(region)) for region in regions}

    def hosts_of(region: int) -> Iterator[RegionHost]:
        shards = manifest.by_region[region]
        shorts = frozenset(shard.short for shard in shards)
        for cell in dict.fromkeys(shard.cell for shard in shards):
            if {manifest.region_of[shard] for shard in by_cell[cell]} == {region}:
                yield from announced[cell]
            else:
                for host in announced[cell]:
                    if own := host.shards & shorts:
                        yield replace(host, shards=own)

    async def nodes_of(asked: Collection[PeerID], **_: Any) -> Any:
        return {peer: nodes[peer] for peer in asked}

    def spawn(reading: Any) -> None:
        reading.close()

    nothing: Any = None
    memories: Any = SimpleNamespace(region_hosts=region_hosts)
    registry: Any = SimpleNamespace(nodes=nodes_of, lookups=SimpleNamespace(spawn=spawn))
    opened: Any = SimpleNamespace(
        entry=SimpleNamespace(memory=None),
        manifest=manifest,
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
        cell: tuple(RegionHost(peer, ReplicaState.SERVING, some) for peer in peers)
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
        cell: (RegionHost(peer, ReplicaState.SERVING, frozenset({shard.short})),)
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


def test_a_cell_with_shards_in_two_regions_is_known_once_both_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dht.memory.MAX_SHARDS_OF_REGION", 2)
    grid, (one, other) = (2, 2), peer_ids(2)
    cells = [coordinate_of(n, grid) for n in range(4)]
    by_cell = {cell: [ShardInfo(cell, bytes([*cell, n] * 11), 9, 99) for n in range(3)] for cell in cells}
    announced: dict[Cell, tuple[RegionHost, ...]] = {
        cell: (
            RegionHost(one, ReplicaState.SERVING, frozenset(shard.short for shard in shards)),
            RegionHost(other, ReplicaState.SERVING, frozenset({shards[2].short})),
        )
        for cell, shards in by_cell.items()
    }
    expected = {
        cell: {one: {shard.root for shard in shards}, other: {shards[2].root}}
        for cell, shards in by_cell.items()
    }

    async def scenario() -> None:
        directory = directory_of(grid, by_cell, announced, [one, other])

        async def known() -> Any:
            return (await directory.locate(np.ones((1, 4), np.float32), 4, frozenset())).hosts

        assert await known() == expected
        announced[cells[0]] = ()
        await directory._read_hosts([0])
        assert await known() == expected, "the other half was not read"
        for _ in range(2):
            await directory.refresh()
        assert await known() == {cell: hosts for cell, hosts in expected.items() if cell != cells[0]}

    monkeypatch.setattr("trainer_client.memory.directory._READ_IN_TURN", 5)
    asyncio.run(scenario())


async def searcher_in(swarm: SimulatedSwarm, memory: SampleMemory) -> MemoryDirectory:
    """A searcher of a memory of which each shard is hosted by two of the swarm's peers."""
    author, manifest = swarm.keys.author, memory.manifest
    entry = LibraryEntry.of(manifest, Part(bytes(32), 100), author)
    placing, rng = Placing([peer.dht for peer in swarm.peers]), random.Random(1)
    hosting: dict[int, dict[int, tuple[ReplicaState, list[bytes]]]] = {}
    for shard in manifest.shards:
        for number in rng.sample(range(8), 2):
            region = manifest.region_of[shard]
            own = hosting.setdefault(number, {}).setdefault(region, (ReplicaState.SERVING, []))
            own[1].append(shard.root)
    for number, regions in hosting.items():
        peer = swarm.peers[number]
        usual, peer.registry.lookups = peer.registry.lookups, placing
        await MemoryRegistry(peer.registry).announce(entry.memory, regions, LIFETIME_S)
        peer.registry.lookups = usual
    peer = await swarm.make_peer(serves_dht=False)
    await swarm.join(peer)
    nothing: Any = None
    opened: Any = SimpleNamespace(
        entry=entry, manifest=manifest, filled_C=np.ones(prod(manifest.grid), np.bool_)
    )
    return MemoryDirectory(MemoryRegistry(peer.registry), peer.registry, nothing, opened)


def test_keeping_what_is_known_of_many_cells_fresh_fills_no_searchers_line() -> None:
    """A model that learns with a memory searches all of its cells. It used to read all of them every 15 s."""
    memory = SampleMemory.make(grid=(32, 16), each=1)
    with simulated_world() as loop:

        async def scenario() -> None:
            swarm = await SimulatedSwarm.start(loop, 60, 16, Link(0.1), 1, with_contacts=True)
            directory = await searcher_in(swarm, memory)
            dht, registry = directory._registry._dht, directory._registry
            read = set[int]()
            read_hosts = directory._read_hosts

            async def noting(regions: Collection[int], *, again: bool = False) -> None:
                assert len(regions) <= 16
                read.update(regions)
                await read_hosts(regions, again=again)

            scores_QC = np.eye(512, dtype=np.float32)
            located = await directory.locate(scores_QC, 1, frozenset())
            assert all(len(located.hosts[cell]) == 2 for (cell,) in located.cells)
            directory._read_hosts = noting  # type: ignore[method-assign]  # counts
            keeping = asyncio.create_task(directory.keep_fresh())
            spent, whole = registry.spent_bytes, dht.spent_bytes
            began = loop.time()
            while loop.time() < began + 0.9 * LIFETIME_S:
                await asyncio.sleep(20.0)
                await directory.locate(scores_QC, 1, frozenset())
            spent_apart = dht.spent_bytes - whole
            keeping.cancel()
            assert len(read) == 32
            assert 8 * spent_apart / (loop.time() - began) < 20_000
            assert registry.spent_bytes - spent < 0.1 * spent_apart, "it must not delay looks for experts"

        loop.run_until_complete(scenario())


class OneHostEach:
    """What is known of a few cells with one host each, in which somebody searches all of them every second."""

    def __init__(self, grid: tuple[int, ...] = (2, 2)) -> None:
        self.peer, self.other = peer_ids(2)
        cells = [coordinate_of(n, grid) for n in range(prod(grid))]
        self.by_cell = {cell: [ShardInfo(cell, bytes([n] * 32), 9, 99)] for n, cell in enumerate(cells)}
        self.announced = {cell: self.hosted_by(self.peer, cell) for cell in cells}
        self.directory = directory_of(grid, self.by_cell, self.announced, [self.peer, self.other])
        self.registry = cast(Any, self.directory._registry)
        self.registry.lookups.spawn = asyncio.create_task
        self.memories = cast(Any, self.directory._memories)
        self.reads = list[float]()
        """When hosts were read again."""
        read_hosts = self.directory._read_hosts

        async def noting(regions: Collection[int], *, again: bool = False) -> None:
            if again:
                self.reads.append(now())
            await read_hosts(regions, again=again)

        self.directory._read_hosts = noting  # type: ignore[method-assign]  # counts

    def hosted_by(self, peer: PeerID, cell: Cell) -> tuple[RegionHost, ...]:
        return (RegionHost(peer, ReplicaState.SERVING, frozenset(s.short for s in self.by_cell[cell])),)

    async def search(self, *silent: PeerID) -> set[Cell]:
        """The cells that a search misses. `silent`: hosts that give no answer."""
        cells = len(self.by_cell)
        located = await self.directory.locate(np.ones((1, cells), np.float32), cells, frozenset())
        missing = set(located.missing[0])
        missing |= {cell for cell, hosts in located.hosts.items() if not hosts.keys() - set(silent)}
        self.directory.note(set(located.cells[0]), missing)
        await asyncio.sleep(1.0)
        return missing

    def pauses(self) -> list[float]:
        return [after - before for before, after in pairwise(self.reads)]


def about(*pauses_s: float) -> list[Any]:
    return [pytest.approx(pause_s, abs=1.5) for pause_s in pauses_s]


def test_cells_whose_hosts_give_no_answer_are_read_again_soon_and_then_ever_more_rarely() -> None:
    async def scenario() -> None:
        memory, moved = OneHostEach(), (1, 1)
        memory.announced[moved] = memory.hosted_by(memory.other, moved)
        assert not await memory.search()
        while now() < 1000:
            assert await memory.search(memory.other) == {moved}
        assert memory.pauses() == about(15, 30, 60, 120, 240, 240, 240)
        # its shards move to another host
        memory.announced[moved] = memory.hosted_by(memory.peer, moved)
        while await memory.search(memory.other):
            assert now() < 1300
        # and back
        memory.announced[moved] = memory.hosted_by(memory.other, moved)
        await memory.directory._read_hosts([3])
        memory.reads.clear()
        began = now()
        while now() < began + 40:
            assert await memory.search(memory.other) == {moved}
        assert memory.pauses() == about(15), "anew"

    with virtual_time() as runner:
        runner.run(scenario())


def test_a_region_is_read_again_no_more_often_if_several_of_its_cells_are_missing() -> None:
    async def scenario() -> None:
        memory = OneHostEach((4, 8))  # there are two cells in each region
        assert not await memory.search()
        while now() < 600:
            cell = (0, int(now()) % 2)
            memory.directory.note({cell}, {cell})
            await asyncio.sleep(1.0)
        assert memory.pauses() == about(15, 30, 60, 120, 240)

    with virtual_time() as runner:
        runner.run(scenario())


def test_a_revision_that_arrives_while_hosts_are_read_is_not_overwritten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        memory = OneHostEach((8, 32))  # there are 16 cells in each region
        directory, opened = memory.directory, cast(Any, memory.directory._opened)
        added = {cell: ShardInfo(cell, bytes([*cell] * 16), 9, 99) for cell in [(0, 14), (0, 15)]}
        for cell, shard in added.items():
            host = RegionHost(memory.other, ReplicaState.SERVING, frozenset({shard.short}))
            memory.announced[cell] += (host,)
        having, first = directory._having, list[Cell]()

        def revising(shards: Sequence[ShardInfo], hosts: Any) -> Any:
            if not first:
                first.append(shards[0].cell)
                later = replace(opened.manifest, shards=(*opened.manifest.shards, *added.values()))
                directory._opened = cast(Any, SimpleNamespace(**vars(opened) | {"manifest": later}))
                directory._forget_hosts()
            return having(shards, hosts)

        monkeypatch.setattr(directory, "_having", revising)
        await directory._read_hosts([0])
        for cell in added.keys() - {*first}:
            assert directory._hosts[cell].serving[memory.other] == {added[cell].root}

    with virtual_time() as runner:
        runner.run(scenario())


def test_a_cell_with_shards_in_very_many_regions_delays_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dht.memory.MAX_SHARDS_OF_REGION", 1)
    grid, (peer,) = (2, 2), peer_ids(1)
    counts = {(0, 0): 40, (0, 1): 1, (1, 0): 1, (1, 1): 1}
    by_cell: dict[Cell, list[ShardInfo]] = {
        cell: [ShardInfo(cell, bytes([*cell, n, n] * 8), 9, 99) for n in range(count)]
        for cell, count in counts.items()
    }
    announced: dict[Cell, tuple[RegionHost, ...]] = {
        cell: (RegionHost(peer, ReplicaState.SERVING, frozenset(shard.short for shard in shards)),)
        for cell, shards in by_cell.items()
    }

    async def scenario() -> None:
        directory = directory_of(grid, by_cell, announced, [peer])
        await directory.locate(np.ones((1, 4), np.float32), 4, frozenset())
        announced.update(dict.fromkeys(by_cell, ()))
        for _ in range(4):
            await directory.refresh()
        assert not any(map(any, directory._hosts.values()))

    asyncio.run(scenario())


def test_a_cell_is_found_soon_after_it_is_hosted_though_the_index_is_old() -> None:
    async def scenario() -> None:
        memory, late = OneHostEach(), {(0, 1), (1, 1)}
        memory.announced |= dict.fromkeys(late, ())
        index_read = list[float]()

        async def active_regions(*_: Any) -> frozenset[int]:
            index_read.append(now())
            return frozenset(number_of(cell, (2, 2)) for cell, hosts in memory.announced.items() if hosts)

        memory.memories.active_regions = active_regions
        while now() < 100:
            assert await memory.search() == late
        assert len(index_read) == 1
        assert memory.pauses() == about(15, 30)
        memory.announced[0, 1] = memory.hosted_by(memory.peer, (0, 1))
        while await memory.search() != {(1, 1)}:
            assert now() < 130
        # of cells that are not in the index, nobody has read the hosts
        directory = memory.directory
        directory._forget()
        directory._hosts[0, 0] = directory._having(memory.by_cell[0, 0], memory.announced[0, 0])
        directory._active_C = np.array([True, False, False, False])
        index_read.clear()
        began = now()
        while await memory.search() != {(1, 1)}:
            assert now() < began + 5
        assert index_read == [began]

    with virtual_time() as runner:
        runner.run(scenario())


def test_hosts_are_read_again_once_at_a_time_and_soon_again_after_a_long_silence() -> None:
    async def scenario() -> None:
        memory, answers = OneHostEach(), asyncio.Event()
        assert not await memory.search()
        region_hosts = memory.memories.region_hosts

        async def slow(*what: Any, **how: Any) -> Any:
            await answers.wait()
            return await region_hosts(*what, **how)

        memory.memories.region_hosts = slow
        while now() < 100:
            await memory.search(memory.peer)
        assert len(memory.reads) == 1
        answers.set()
        while now() < 500:
            await memory.search(memory.peer)
        assert memory.pauses()[-1] >= 100
        memory.directory._forget()
        memory.reads.clear()
        began = now()
        while now() < began + 20:
            await memory.search(memory.peer)
        assert memory.pauses() == about(15)

    with virtual_time() as runner:
        runner.run(scenario())


def test_contacts_that_a_search_has_just_read_are_not_dropped_by_a_refresh() -> None:
    async def scenario() -> None:
        memory, answers = OneHostEach(), asyncio.Event()
        contact: Any = SimpleNamespace(peer_id=memory.peer, expires_at=1e9)
        memory.announced[0, 0] = tuple(replace(host, node=contact) for host in memory.announced[0, 0])
        memory.announced[1, 1] = memory.hosted_by(memory.other, (1, 1))
        nodes = memory.registry.nodes

        async def slow(*what: Any, **how: Any) -> Any:
            await answers.wait()
            return await nodes(*what, **how)

        memory.registry.nodes = slow
        reading = asyncio.create_task(memory.directory._read_hosts([0, 3]))
        await asyncio.sleep(1.0)
        await memory.directory.refresh()
        answers.set()
        await reading
        assert memory.directory._nodes.keys() == {memory.peer, memory.other}

    with virtual_time() as runner:
        runner.run(scenario())


def test_of_many_strangers_few_node_records_are_read_again() -> None:
    async def scenario() -> None:
        memory, asked = OneHostEach(), list[int]()
        memory.announced[1, 1] = tuple(memory.hosted_by(peer, (1, 1))[0] for peer in peer_ids(256))

        async def nodes(peers: Collection[PeerID], **_: Any) -> Any:
            asked.append(len(peers))
            return {}

        memory.registry.nodes = nodes
        await memory.directory._read_hosts(range(4), again=True)
        assert asked == [128]

    with virtual_time() as runner:
        runner.run(scenario())


def test_if_one_part_of_a_memory_can_not_be_had_the_other_is_no_longer_fetched(tmp_path: Path) -> None:
    sample, publisher = SampleMemory.make(), make_peer_id(1)
    manifest = sample.manifest.serialize()
    listed = Part(hashlib.sha256(manifest).digest(), len(manifest))
    entry = LibraryEntry.of(sample.manifest, listed, publisher)
    fetching, is_fetching = set[bytes](), asyncio.Event()

    async def some_nodes(*_: Any) -> Any:
        return {}

    async def fetch_any(nodes: Any, memory: str, name: bytes, size: int, check: Any) -> bytes:
        if name == listed.sha256:
            return manifest
        fetching.add(name)
        try:
            if name == sample.manifest.encoder.sha256:
                is_fetching.set()
                await asyncio.Event().wait()
            await is_fetching.wait()
            raise TransferError("nobody has it")
        finally:
            fetching.remove(name)

    async def scenario() -> None:
        memories: Any = SimpleNamespace(some_nodes=some_nodes)
        client: Any = SimpleNamespace(fetch_any=fetch_any)
        parts = MemoryParts(entry.memory, memories, client, PartCache(tmp_path))
        with pytest.raises(TransferError, match="nobody has it"):
            await parts.open(entry)
        assert not fetching

    asyncio.run(scenario())
