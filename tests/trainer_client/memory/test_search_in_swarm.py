"""Searches in a real swarm: DHT, TLS and gRPC on this machine."""

import asyncio
import contextlib
import hashlib
import random
import time
from collections.abc import Callable, Collection, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from memory_samples import SampleMemory
from memory_swarm import MemorySwarm

from dht.announcements import NodeInfo, ReplicaState
from dht.library import LibraryEntry, MemoryRegistry
from dht.memory import MemoryID, Part
from dht.registry import Registry
from peer.errors import LibraryError, UnreachableError
from peer.identity import PeerID
from peer.loop import LoopThread
from peer.metrics import total
from trainer_client.memory.directory import MemoryDirectory, PartCache
from trainer_client.memory.memories import Memory
from trainer_client.memory.retriever import SearchResult

WORDS = SampleMemory.with_words()
DUAL_WORDS = SampleMemory.with_words(is_dual=True)
LIMIT_S = 120.0

Play = Callable[[Callable[[MemorySwarm], Coroutine[Any, Any, None]]], None]


@pytest.fixture
def memory() -> SampleMemory:
    return WORDS


@pytest.fixture
def play(loop: LoopThread, tmp_path: Path, memory: SampleMemory) -> Play:
    def run(scenario: Callable[[MemorySwarm], Coroutine[Any, Any, None]]) -> None:
        async def in_swarm() -> None:
            async with contextlib.AsyncExitStack() as stack:
                await scenario(await MemorySwarm.found(stack, tmp_path, memory))

        loop.run(in_swarm(), LIMIT_S)

    return run


def expected(memory: SampleMemory, number: int, k: int) -> list[int]:
    """The scores of an exhaustive search for a passage of the memory."""
    query_D = memory.vectors_ND[number]
    return [score for score, _ in memory.best(query_D, memory.manifest.by_cell, k)]


def check_whole(memory: SampleMemory, number: int, result: SearchResult, k: int = 5) -> None:
    query_D = memory.vectors_ND[number].astype(int)
    assert not result.missing
    scores = [round(hit.similarity * int(query_D @ query_D)) for hit in result.hits]
    assert scores == expected(memory, number, k)
    assert all(hit.passage in memory.passages for hit in result.hits)


def test_a_memory_is_searched_where_its_shards_are(play: Play) -> None:
    async def scenario(swarm: MemorySwarm) -> None:
        roots = sorted(WORDS.files)
        await swarm.host(roots[::2])
        await swarm.host(roots[1::2])
        retriever = await (await swarm.searcher()).open("docs")
        numbers = list(range(0, 120, 3))
        texts = [WORDS.passages[number].text for number in numbers]
        results = await retriever.search([*texts, "nothing known"], 5, 100, by_words=False)
        for number, result in zip(numbers, results, strict=False):
            check_whole(WORDS, number, result)
        assert results[-1] == SearchResult((), is_understood=False)
        # One call to each host for all queries, and one to fetch texts.
        assert total(retriever.calls.metrics.calls, method="Search") == 2

    play(scenario)


def test_a_query_that_is_a_passage_finds_it_first(play: Play) -> None:
    async def scenario(swarm: MemorySwarm) -> None:
        await swarm.host()
        memories = await swarm.searcher()
        retriever = await memories.open()
        assert await memories.open(str(swarm.memory_id)) is retriever
        (result,) = await retriever.search([WORDS.passages[7].text], 3, 4)
        assert result.hits[0].passage == WORDS.passages[7]
        assert result.hits[0].served_by == swarm.hosts[0].swarm.host.peer_id

    play(scenario)


@pytest.mark.parametrize("is_whole", [True, False])
def test_the_index_is_read_only_if_nobody_hosts_a_cell_that_is_near(
    play: Play, monkeypatch: pytest.MonkeyPatch, is_whole: bool
) -> None:
    asked = list[MemoryID]()
    active_regions = MemoryRegistry.active_regions

    async def counted(registry: MemoryRegistry, entry: LibraryEntry, *how: Any) -> frozenset[int]:
        asked.append(entry.memory)
        return await active_regions(registry, entry, *how)

    monkeypatch.setattr(MemoryRegistry, "active_regions", counted)

    async def scenario(swarm: MemorySwarm) -> None:
        first = WORDS.manifest.shards[0].cell
        await swarm.host(
            [root for root, shard in WORDS.manifest.by_root.items() if is_whole or shard.cell == first]
        )
        retriever = await (await swarm.searcher()).open()
        asked.clear()
        (result,) = await retriever.search([WORDS.passages[7].text], 3, 4)
        assert bool(result.missing) == (not is_whole)
        assert len(asked) == (not is_whole)
        await retriever.search([WORDS.passages[9].text], 3, 4)
        assert len(asked) == (not is_whole), "what lives is known now"

    play(scenario)


def test_a_first_search_needs_no_node_records(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def no_nodes(
        registry: Registry, peer_ids: Collection[PeerID], **options: object
    ) -> dict[PeerID, NodeInfo]:
        assert not peer_ids, "a node record was looked up"
        return {}

    monkeypatch.setattr("trainer_client.memory.directory._REFRESH_EVERY_S", LIMIT_S)

    async def scenario(swarm: MemorySwarm) -> None:
        await swarm.host()
        await swarm.host()
        memories = await swarm.searcher()
        monkeypatch.setattr(Registry, "nodes", no_nodes)
        retriever = await memories.open()
        (result,) = await retriever.search([WORDS.passages[7].text], 5, 100, by_words=False)
        check_whole(WORDS, 7, result)

    play(scenario)


@pytest.mark.parametrize("memory", [DUAL_WORDS])
def test_questions_have_an_encoder_of_their_own_that_the_hosts_give(play: Play) -> None:
    async def scenario(swarm: MemorySwarm) -> None:
        await swarm.host()
        retriever = await (await swarm.searcher()).open()
        wanted = DUAL_WORDS.passages[7]
        question = " ".join(f"word{59 - int(word.removeprefix('word'))}" for word in wanted.text.split())
        (result,) = await retriever.search([question], 3, 100, by_words=False)
        assert result.hits[0].passage == wanted
        assert result.hits[0].similarity == 1

    play(scenario)


def test_texts_in_cells_that_were_not_asked_are_found_by_the_dht(play: Play) -> None:
    async def scenario(swarm: MemorySwarm) -> None:
        infos = WORDS.manifest.shards
        await swarm.host([info.root for info in infos if info.is_secondary])
        having = await swarm.host([info.root for info in infos if not info.is_secondary])
        retriever = await (await swarm.searcher()).open()
        elsewhere = 0
        for number in range(0, 120, 6):
            vectors_QD, scores_QC = retriever.directory.encode([WORDS.passages[number].text])
            (cells,) = (await retriever.directory.locate(scores_QC, 1, frozenset())).cells
            (result,) = await retriever.search([WORDS.passages[number].text], 4, 1, by_words=False)
            scores = [score for score, _ in WORDS.best(vectors_QD[0], cells, 4)]
            whole = int(vectors_QD[0].astype(int) @ vectors_QD[0].astype(int))
            assert [round(hit.similarity * whole) for hit in result.hits] == scores
            assert {hit.served_by for hit in result.hits} == {having.swarm.host.peer_id}
            for hit in result.hits:
                text = WORDS.places[WORDS.passages.index(hit.passage)]
                elsewhere += WORDS.manifest.by_root[text.root].cell not in cells
        assert elsewhere

    play(scenario)


def test_a_publisher_that_leaves_is_asked_only_if_nobody_else_can_be(play: Play) -> None:
    async def scenario(swarm: MemorySwarm) -> None:
        publisher = await swarm.host()
        await swarm.announce(publisher, WORDS.files, ReplicaState.LEAVING)
        retriever = await (await swarm.searcher()).open()
        (result,) = await retriever.search([WORDS.passages[7].text], 3, 100)
        assert {hit.served_by for hit in result.hits} == {publisher.swarm.host.peer_id}
        other = await swarm.host()
        assert isinstance(retriever.directory, MemoryDirectory)
        await retriever.directory.refresh()
        (result,) = await retriever.search([WORDS.passages[8].text], 3, 100)
        calls = total(retriever.calls.metrics.calls, method="Search")
        located = await retriever.directory.locate(np.zeros((1, 6), np.float32), 6, frozenset())
        assert {host for hosts in located.hosts.values() for host in hosts} == {other.swarm.host.peer_id}
        assert calls == 2

    play(scenario)


def test_half_of_the_hosts_die_and_no_query_fails(play: Play) -> None:
    async def scenario(swarm: MemorySwarm) -> None:
        roots = sorted(WORDS.files)
        rng = random.Random(0)
        rng.shuffle(roots)
        half = len(roots) // 2
        for part in (roots[:half], roots[half:], roots[:half], roots[half:]):
            await swarm.host(part)
        retriever = await (await swarm.searcher()).open()

        async def check(number: int) -> None:
            text = WORDS.passages[number].text
            (result,) = await retriever.search([text], 5, 100, by_words=False)
            check_whole(WORDS, number, result)

        for number in range(20):
            await check(number)
        await swarm.hosts[0].stop()
        await swarm.hosts[3].stop()
        for number in range(20, 40):
            await check(number)

    play(scenario)


def test_a_host_that_leaves_while_it_is_searched_is_still_known_to_that_search(play: Play) -> None:
    async def scenario(swarm: MemorySwarm) -> None:
        host = await swarm.host()
        directory = (await (await swarm.searcher()).open()).directory
        assert isinstance(directory, MemoryDirectory)
        scores_1C = np.ones((1, prod(WORDS.manifest.grid)), np.float32)
        located = await directory.locate(scores_1C, 100, frozenset())
        await host.swarm.registry.leave(400.0)
        ends = time.monotonic() + LIMIT_S / 2
        while directory.nodes and time.monotonic() < ends:
            with contextlib.suppress(UnreachableError):
                await directory.refresh()
        assert not directory.nodes
        assert {peer for hosts in located.hosts.values() for peer in hosts} == located.nodes.keys() != set()

    play(scenario)


def test_a_new_revision_is_followed_and_what_it_revokes_is_never_returned(play: Play) -> None:
    async def scenario(swarm: MemorySwarm) -> None:
        host = await swarm.host()
        retriever = await (await swarm.searcher()).open()
        text = WORDS.passages[7].text
        (result,) = await retriever.search([text], 3, 100)
        assert result.hits[0].passage == WORDS.passages[7]
        newer = WORDS.revoking(7)
        await swarm.publish(newer)
        # Nobody has the new manifest yet, so the old revision stays.
        with pytest.raises(UnreachableError, match="revision 2"):
            await retriever.directory.follow()
        (store,) = host.servicer._stores.values()
        await asyncio.to_thread(store.follow, newer.manifest.serialize())
        assert (await retriever.directory.follow()).revision == 2
        assert isinstance(retriever.directory, MemoryDirectory)
        assert not retriever.directory._hosts, "hosts may have shards that are new"
        (result,) = await retriever.search([text], 3, 100)
        assert len(result.hits) == 3
        assert WORDS.passages[7] not in [hit.passage for hit in result.hits]

    play(scenario)


@pytest.mark.parametrize("memory", [replace(WORDS, manifest=replace(WORDS.manifest, encoder_kind="vast"))])
def test_an_encoder_that_this_version_does_not_have_is_one_clear_error(play: Play) -> None:
    async def scenario(swarm: MemorySwarm) -> None:
        await swarm.host()
        with pytest.raises(LibraryError, match=r"memory docs-\S+ can't be used: .*'vast'.*: update it"):
            await (await swarm.searcher()).open()

    play(scenario)


def test_an_index_is_fetched_once_and_kept_on_disk(play: Play, tmp_path: Path) -> None:
    async def scenario(swarm: MemorySwarm) -> None:
        host = await swarm.host()
        memories = await swarm.searcher()
        await memories.open()
        kept = sorted(path.name for path in (tmp_path / "searcher0").iterdir())
        assert len(kept) == 3
        await host.stop()
        # With the same folder, another peer has everything, though no host could give it.
        again = await swarm.searcher(0 + 1)
        again._cache = memories._cache
        await again.open()
        # A file that was changed is not trusted.
        (tmp_path / "searcher0" / kept[0]).write_bytes(b"changed")
        third = await swarm.searcher(2)
        third._cache = memories._cache
        with pytest.raises(LibraryError, match="no live host"):
            await third.open()

    play(scenario)


def test_two_processes_share_one_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each has its own object. Whatever the other one evicts, an entry is read whole or not at all."""
    files = [bytes([n]) * 1000 for n in range(12)]
    parts = [Part(hashlib.sha256(data).digest(), len(data)) for data in files]

    def use(seed: int) -> int:
        cache, rng, found = PartCache(tmp_path / "cache", 8000), random.Random(seed), 0
        for _ in range(300):
            n = rng.randrange(len(files))
            data = cache.get(parts[n])
            assert data in (None, files[n])
            found += data is not None
            if data is None:
                cache.put(files[n])
        return found

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(use, range(2)))
    left = list((tmp_path / "cache").iterdir())
    assert not caplog.messages
    assert sum(path.stat().st_size for path in left) <= 9000
    assert all(hashlib.sha256(path.read_bytes()).hexdigest() == path.name for path in left)


def test_several_processes_write_the_same_part_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = b"part" * 1000

    def write(number: int) -> None:
        for _ in range(200):
            PartCache(tmp_path / "cache").put(data)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert not caplog.messages
    assert PartCache(tmp_path / "cache").get(Part(hashlib.sha256(data).digest(), len(data))) == data
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_who_names_no_memory_or_a_wrong_one_hears_which_there_are(play: Play) -> None:
    async def scenario(swarm: MemorySwarm) -> None:
        memories = await swarm.searcher()
        with pytest.raises(LibraryError, match=f"no memory 'dosc'.*{swarm.memory_id}"):
            await memories.open("dosc")
        with pytest.raises(LibraryError, match="no live host of memory docs"):
            await memories.open()
        await swarm.publish()
        with pytest.raises(LibraryError, match="talkoot memory publish"):
            await memories.open("docs")

    play(scenario)


def test_the_same_search_from_another_thread(loop: LoopThread, tmp_path: Path) -> None:
    async def start(stack: contextlib.AsyncExitStack) -> Memory:
        swarm = await MemorySwarm.found(stack, tmp_path, WORDS)
        await swarm.host()
        return Memory(await (await swarm.searcher()).open(), loop.run)

    stack = contextlib.AsyncExitStack()
    try:
        memory = loop.run(start(stack), LIMIT_S)
        one = memory.search(WORDS.passages[3].text, k=2)
        assert one.hits[0].passage == WORDS.passages[3]
        assert memory.search([WORDS.passages[3].text], k=2) == [one]
        assert memory.id.name == "docs"
    finally:
        loop.run(stack.aclose(), LIMIT_S)
