"""Hosts of a memory that forge, promote, leave out, stall or flood, over real gRPC: no lie is believed."""

import contextlib
import random
from collections.abc import Iterator

import pytest
from memory_samples import Lie, SampleHost, SampleMemory
from memory_swarm import MemorySwarm

from peer.loop import LoopThread
from peer.metrics import total
from trainer_client.memory.memories import Memories
from trainer_client.memory.retriever import Retriever

LIMIT_S = 120.0
WORDS = SampleMemory.with_words()
K = 5
QUERIES = range(0, 120, 10)
PROVEN_LIES: tuple[Lie, ...] = (
    "forged text", "wrong vectors", "inflated scores", "wrong texts", "wrong positions", "junk", "too many",
    "other order", "long lists", "tiny fields",
)  # fmt: skip
"""Lies for which the host is banned."""
FAILURES: tuple[Lie, ...] = (
    "says missing", "reads nothing", "all revoked", "stalls", "stalls at reading", "fails", "busy", "oversized",
    "denies the memory",
)  # fmt: skip


@pytest.fixture(scope="module")
def swarm(loop: LoopThread, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MemorySwarm]:
    """An honest host of all shards, and another that lies when it is told to."""
    folder = tmp_path_factory.mktemp("swarm")

    async def start(stack: contextlib.AsyncExitStack) -> MemorySwarm:
        swarm = await MemorySwarm.found(stack, folder, WORDS)
        await swarm.host()
        await swarm.host(lies=True)
        return swarm

    stack = contextlib.AsyncExitStack()
    try:
        yield loop.run(start(stack), LIMIT_S)
    finally:
        loop.run(stack.aclose(), LIMIT_S)


@pytest.fixture
def searcher(loop: LoopThread, swarm: MemorySwarm) -> Iterator[Memories]:
    memories = loop.run(swarm.searcher(), LIMIT_S)
    try:
        yield memories
    finally:
        loop.run(memories.close(), LIMIT_S)


def liar_in(swarm: MemorySwarm, lie: Lie | None) -> SampleHost:
    liar = swarm.hosts[1].liar
    assert liar is not None
    liar.lie = lie
    liar.calls.clear()
    return liar


def opened(loop: LoopThread, searcher: Memories) -> Retriever:
    """Chooses the same hosts in each run, and asks both. By chance, one of 4,000 tests would ask only one of them."""
    retriever = loop.run(searcher.open(), LIMIT_S)
    retriever.calls._rng = retriever._rng = random.Random(0)
    return retriever


async def search_all(retriever: Retriever) -> None:
    """Searches each query by itself, and checks that what is found is complete and true."""
    for number in QUERIES:
        query_D = WORDS.vectors_ND[number].astype(int)
        (result,) = await retriever.search(
            [WORDS.passages[number].text], K, 100, by_words=False, deadline_s=LIMIT_S
        )
        scores = [round(hit.similarity * int(query_D @ query_D)) for hit in result.hits]
        assert scores == [
            score for score, _ in WORDS.best(WORDS.vectors_ND[number], WORDS.manifest.by_cell, K)
        ]
        for hit, score in zip(result.hits, scores, strict=True):
            n = hit.passage.title.removeprefix("title ")
            assert hit.passage == WORDS.passages[int(n)]
            assert score == int(query_D @ WORDS.vectors_ND[int(n)].astype(int))


async def avoided_by(retriever: Retriever) -> frozenset[object]:
    return frozenset(retriever.calls.avoided())


@pytest.mark.parametrize("lie", PROVEN_LIES)
def test_a_liar_is_not_believed_and_is_banned(
    loop: LoopThread, swarm: MemorySwarm, searcher: Memories, lie: Lie, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A lie that a busy machine brings late must not be beaten by the other host's answer, and never be read.
    monkeypatch.setattr("trainer_client.memory.calls._CALL_DEADLINE_S", LIMIT_S)
    liar = liar_in(swarm, lie)
    retriever = opened(loop, searcher)
    loop.run(search_all(retriever), LIMIT_S)
    assert liar.calls, "it was never asked"
    assert loop.run(avoided_by(retriever)) == {swarm.hosts[1].swarm.host.peer_id}
    assert total(retriever.calls.metrics.lies) == 1


@pytest.mark.parametrize("lie", FAILURES)
def test_a_host_that_fails_stalls_or_floods_costs_no_passage(
    loop: LoopThread, swarm: MemorySwarm, searcher: Memories, lie: Lie
) -> None:
    liar = liar_in(swarm, lie)
    retriever = opened(loop, searcher)
    loop.run(search_all(retriever), LIMIT_S)
    assert liar.calls, "it was never asked"
    assert not total(retriever.calls.metrics.lies)


@pytest.mark.parametrize("lie", ["omits", "omits best", "deflated scores"])
def test_a_host_that_leaves_passages_out_is_noticed(
    loop: LoopThread, swarm: MemorySwarm, searcher: Memories, lie: Lie
) -> None:
    """It is noticed within 1,000 queries. Here they come in batches, some of which are checked."""
    liar_in(swarm, lie)
    retriever = opened(loop, searcher)
    texts = [passage.text for passage in WORDS.passages]

    async def search() -> bool:
        for _ in range(8):
            results = await retriever.search(texts, K, 100, by_words=False)
            assert all(hit.passage in WORDS.passages for result in results for hit in result.hits)
            await retriever.checked()
            if retriever.calls.avoided():
                return True
        return False

    assert loop.run(search(), LIMIT_S), "not noticed in 960 queries"
    assert loop.run(avoided_by(retriever)) == {swarm.hosts[1].swarm.host.peer_id}
    # From now on only the honest host is asked.
    loop.run(search_all(retriever), LIMIT_S)
