"""Neighbours from hosts of a real swarm: DHT, TLS and gRPC on this machine. They may go, and training goes on."""

import asyncio
import contextlib
from functools import partial
from pathlib import Path

from memory_samples import SampleMemory
from memory_swarm import MemorySwarm

from peer.loop import LoopThread
from trainer_client.data.tokenizer import ByteTokenizer
from trainer_client.memory.memories import Memory
from trainer_client.retrieval.attention import NOTHING, RetrievalSpec
from trainer_client.retrieval.lookup import NeighbourLookup

WORDS = SampleMemory.with_words()
SPEC = RetrievalSpec(chunk=32, neighbours=2, length=200)
LIMIT_S = 180.0


def test_passages_come_from_the_hosts_that_are_left_and_none_from_none(
    loop: LoopThread, tmp_path: Path
) -> None:
    texts = [passage.text for passage in WORDS.passages[:6]]
    chunks = [list(text[:32].encode()) for text in texts]

    async def scenario() -> None:
        async with contextlib.AsyncExitStack() as stack:
            swarm = await MemorySwarm.found(stack, tmp_path, WORDS)
            first, second = await swarm.host(), await swarm.host()
            retriever = await (await swarm.searcher()).open("docs")
            memory = Memory(retriever, partial(loop.run, timeout_s=LIMIT_S))
            known = {passage.text for passage in WORDS.passages}
            found = []
            for stopped in (first, second, None):
                # A new look-up each time, without anything in memory.
                lookup = NeighbourLookup(memory, ByteTokenizer(), SPEC)
                found.append(await asyncio.to_thread(lookup.written, chunks))
                if stopped is not None:
                    await stopped.stop()
            for some in found[:2]:
                assert all({passage.text for passage in each.passages} <= known for each in some)
                assert all((each.tokens_NL[0] != NOTHING).any() for each in some)
            assert [each.passages for each in found[0]] == [each.passages for each in found[1]]
            assert [each.passages for each in found[2]] == [()] * 6
            assert (lookup.counts.chunks, lookup.counts.without) == (6, 6)

    loop.run(scenario(), LIMIT_S)
