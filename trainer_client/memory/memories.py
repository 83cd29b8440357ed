"""The memories of a swarm, for a peer that searches them.

Each is opened once: its index is fetched and kept on disk, and the DHT's records of its hosts stay fresh while it is
searched.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, overload

from dht.library import LibraryEntry, MemoryRegistry, find_memory
from dht.memory import MemoryID, Part, Vectors
from dht.swarm import Stage, Swarm
from peer.loop import TaskSet
from peer.rates import RateLimit
from peer.rpc.channels import ChannelPool
from peer.rpc.parts import PartClient
from peer.wire import session_pb2
from trainer_client.credit import CreditAccounts
from trainer_client.dispatch.grpc_caller import SessionWarmer
from trainer_client.memory.calls import GrpcMemoryCaller, HostCalls, RetrieverMetrics
from trainer_client.memory.directory import MemoryDirectory, MemoryParts, PartCache
from trainer_client.memory.retriever import Retriever, SearchResult, Turn

logger: logging.Logger = logging.getLogger(__name__)


class Memories:
    """Opens memories. For one event loop; close it when done."""

    def __init__(
        self, swarm: Swarm, channels: ChannelPool, folder: Path, credit: CreditAccounts | None = None
    ) -> None:
        """`channels`: left open. `folder`: for the parts of memories that are kept on disk. `credit`: records the
        hosts' work.
        """
        self._credit = credit
        self._swarm = swarm
        self._channels = channels
        self._cache = PartCache(folder)
        self._registry = MemoryRegistry(swarm.registry)
        self._sessions = swarm.session_client(session_pb2.RIGHT_MEMORY)
        self._tasks = TaskSet(swarm.host.restarts)
        self._opened: dict[MemoryID, Retriever] = {}
        self._opening = asyncio.Lock()
        self._metrics: RetrieverMetrics | None = None

    async def open(self, name: str | None = None, stage: Stage = logger.debug) -> Retriever:
        """The memory of that name or id; None: the only one. `stage`: called with each step, in words.

        Raises LibraryError if there is none or its index can't be fetched, and UnreachableError if the DHT does not
        answer.
        """
        async with self._opening:
            stage("reading which memories there are")
            entry = find_memory(await self._registry.libraries(), name)
            found = self._opened.get(entry.memory)
            if found is None:
                found = self._opened[entry.memory] = await self._open(entry, stage)
            return found

    async def close(self) -> None:
        """Ends searches in progress."""
        await self._tasks.aclose()
        for retriever in self._opened.values():
            await retriever.close()
        await self._sessions.close()

    async def _open(self, entry: LibraryEntry, stage: Stage) -> Retriever:
        swarm, swarm_id = self._swarm, self._swarm.keys.swarm_id
        client = PartClient(swarm_id, self._sessions, self._channels, RateLimit(None))
        parts = MemoryParts(entry.memory, self._registry, client, self._cache, stage)
        directory = await MemoryDirectory.open(entry, self._registry, swarm.registry, parts)
        self._metrics = self._metrics or RetrieverMetrics(swarm.metrics)
        caller = GrpcMemoryCaller(self._channels, self._sessions)
        calls = HostCalls(
            caller, str(entry.memory), guard=swarm.guard, metrics=self._metrics, credit=self._credit
        )
        warmer = SessionWarmer(self._sessions, self._channels, lambda: directory.nodes)
        self._tasks.supervise("keep what is known of a memory fresh", directory.keep_fresh)
        self._tasks.supervise("open sessions with hosts of a memory", warmer.run)
        return Retriever(directory, calls, swarm_id)


class Memory:
    """One memory, for threads other than the loop's."""

    def __init__(self, retriever: Retriever, run: Callable[[Coroutine[Any, Any, Any]], Any]) -> None:
        """`run`: runs a coroutine on the loop."""
        self._retriever = retriever
        self._run = run

    @property
    def id(self) -> MemoryID:
        return self._retriever.directory.memory

    @property
    def revision(self) -> int:
        """The newest revision that its publisher has signed, as far as this peer knows."""
        return self._retriever.directory.manifest.revision

    @property
    def encoder(self) -> Part:
        """The file of its encoder, the same in all revisions."""
        return self._retriever.directory.manifest.encoder

    @property
    def dimensions(self) -> int:
        """How many numbers a vector has."""
        return self._retriever.directory.manifest.dimensions

    def encode(self, texts: Sequence[str]) -> Vectors:
        """The vectors by which texts are searched, [Q, D]. Zeros for a text without any word that the encoder knows."""
        return self._retriever.directory.encode(texts)[0]

    @overload
    def search(  # type: ignore[overload-overlap]  # a text is a sequence of texts to mypy; the first one wins
        self, texts: str, k: int = 10, cells: int = 8, *, by_words: bool = True, turn: Turn | None = None
    ) -> SearchResult: ...

    @overload
    def search(
        self,
        texts: Sequence[str],
        k: int = 10,
        cells: int = 8,
        *,
        by_words: bool = True,
        turn: Turn | None = None,
    ) -> list[SearchResult]: ...

    def search(
        self,
        texts: str | Sequence[str],
        k: int = 10,
        cells: int = 8,
        *,
        by_words: bool = True,
        turn: Turn | None = None,
    ) -> SearchResult | list[SearchResult]:
        """The k best passages for a text, or for each of many, among those in the `cells` cells nearest to it.

        Up to 256 texts together cost one call to each host. `by_words`: words that a passage shares with the text
        count, too; this reads three times as many passages. `turn`: replaces the vectors that the memory's encoder
        gives the texts, before the search. Raises DataError for a text that is too long, and UnreachableError if the
        DHT does not answer.
        """
        many = [texts] if isinstance(texts, str) else texts
        results: list[SearchResult] = self._run(
            self._retriever.search(many, k, cells, by_words=by_words, turn=turn)
        )
        return results[0] if isinstance(texts, str) else results
