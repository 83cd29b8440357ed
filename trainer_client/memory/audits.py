"""Checks that the hosts of a memory leave nothing out, for a peer that has no queries of its own. Its searches look
like those of others: the first query is near the middle of a cell, and each further one is near a passage that the
previous query found. A second replica gets the same queries, which shows what a host leaves out or makes up (`checks`).
This needs the memory's list of shards and its codebook, but not its encoder, which is much larger.
"""

import asyncio
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dht.library import LibraryEntry, ManifestPace, MemoryRegistry
from dht.memory import MemoryID, Vectors
from dht.swarm import Swarm
from dht.uid import number_of
from peer.bounded import BoundedDict
from peer.errors import TransferError, UnreachableError, WireError
from peer.identity import PeerID
from peer.rates import RateLimit
from peer.rpc.channels import ChannelPool
from peer.rpc.parts import PartClient
from peer.wire import session_pb2
from trainer_client.memory.calls import (
    Fault,
    GrpcMemoryCaller,
    HostCalls,
    RetrieverMetrics,
    RevisionClaims,
    loop_time,
)
from trainer_client.memory.codebook import Codebook
from trainer_client.memory.directory import MemoryDirectory, MemoryParts, Opened, PartCache
from trainer_client.memory.encoder import to_vectors
from trainer_client.memory.retriever import Retriever

logger: logging.Logger = logging.getLogger(__name__)

_PASSAGES, _CELLS = 30, 8
"""How many passages and cells a check asks for: as many as a search for ten passages."""
_QUERIES = 16
"""How many queries in a row are for the same memory. Once its hosts are known, further queries need few look-ups."""
_LIMIT_S = 60.0
"""The longest time for one check, including the list of shards."""
_OPEN = 4
"""How many memories' lists of shards stay parsed. One of 100,000 shards takes some 30 MB."""
_NOISE = 0.5
"""The length of the noise, as a share of the vector's."""


@dataclass(frozen=True)
class Audit:
    """The result of one check."""

    memory: MemoryID
    compared: int
    """Queries that two hosts answered: 0 or 1."""
    faulty: Mapping[PeerID, Fault]
    """Hosts that left out a passage, or lied."""


@dataclass
class _Walk:
    """Queries of one memory. Each is near a passage that the previous one found."""

    entry: LibraryEntry
    codebook: Codebook
    calls: HostCalls
    retriever: Retriever
    vector_D: npt.NDArray[np.generic]
    left: int = _QUERIES


class Auditor:
    """Checks the hosts of memories, one search at a time. For one event loop; close it when done."""

    def __init__(
        self,
        swarm: Swarm,
        channels: ChannelPool,
        folder: Path,
        metrics: RetrieverMetrics,
    ) -> None:
        """`channels`: are closed with it. `folder`: where lists of shards are kept."""
        self._swarm = swarm
        self._channels = channels
        self._metrics = metrics
        self._rng = random.SystemRandom()
        self._registry = MemoryRegistry(swarm.registry)
        self._sessions = swarm.session_client(session_pb2.RIGHT_MEMORY)
        self._parts = PartClient(swarm.keys.swarm_id, self._sessions, channels, RateLimit(None))
        self._caller = GrpcMemoryCaller(channels, self._sessions)
        self._cache = PartCache(folder)
        self._opened = BoundedDict[MemoryID, Opened](_OPEN)
        self._pace = ManifestPace()
        self._claims = RevisionClaims()
        self._walk: _Walk | None = None

    async def close(self) -> None:
        await self._end_walk()
        await self._sessions.close()
        await self._channels.close()

    async def check(self, entries: Sequence[LibraryEntry]) -> Audit:
        """Makes one search of one of these memories. Nothing is compared unless two hosts of a shard answer."""
        walk = self._walk
        if walk is None or not walk.left or walk.entry not in entries:
            await self._end_walk()
        entry = self._walk.entry if self._walk else self._rng.choice(entries)
        try:
            async with asyncio.timeout(_LIMIT_S):
                walk = self._walk = self._walk or await self._begin(entry)
                return await self._search(walk)
        except (TransferError, UnreachableError, WireError, TimeoutError) as error:
            logger.debug("hosts of memory %s were not checked: %s", entry.memory, error)
            await self._end_walk()
            return Audit(entry.memory, 0, {})

    async def _begin(self, entry: LibraryEntry) -> _Walk:
        """Raises TransferError, UnreachableError and WireError."""
        registry, memory = self._swarm.registry, entry.memory
        parts = MemoryParts(memory, self._registry, self._parts, self._cache)
        opened = self._opened.get(memory)
        if opened is None or opened.entry != entry:
            if not self._pace.allows(entry, loop_time()):
                raise TransferError("enough of its publisher's lists were read lately")
            opened = self._opened[memory] = await parts.open(entry, with_encoder=False)
        calls = HostCalls(
            self._caller,
            str(memory),
            guard=self._swarm.guard,
            metrics=self._metrics,
            rng=self._rng,
            claims=self._claims,
        )
        directory = MemoryDirectory(self._registry, registry, parts, opened)
        retriever = Retriever(directory, calls, self._swarm.keys.swarm_id, rng=self._rng, checked_share=1.0)
        cell = self._rng.choice(opened.manifest.shards).cell
        middle_D = opened.codebook.centroids_CD[number_of(cell, opened.manifest.grid)]
        return _Walk(entry, opened.codebook, calls, retriever, middle_D)

    async def _search(self, walk: _Walk) -> Audit:
        walk.left -= 1
        compared, query_1D = walk.calls.checks, self._near(walk.vector_D)
        scores_1C = await asyncio.to_thread(walk.codebook.scores, query_1D)
        (result,) = await walk.retriever.search_vectors(query_1D, scores_1C, _PASSAGES, _CELLS)
        await walk.retriever.checked()
        if result.hits:
            walk.vector_D = self._rng.choice(result.hits).vector_D
        faulty = dict(walk.calls.faulty)
        if faulty or not result.hits:
            walk.left = 0  # its hosts are banned in it, or there are none
        return Audit(walk.entry.memory, walk.calls.checks - compared, faulty)

    async def _end_walk(self) -> None:
        if self._walk is not None:
            await self._walk.retriever.close()
        self._walk = None

    def _near(self, vector_D: npt.NDArray[np.generic]) -> Vectors:
        """A query near this vector: [1, D]"""
        numbers_D = vector_D.astype(np.float32)
        rng = np.random.default_rng(self._rng.getrandbits(64))
        noise_D = rng.standard_normal(len(numbers_D), np.float32)
        length = float(np.linalg.norm(numbers_D)) / len(numbers_D) ** 0.5
        return to_vectors((numbers_D + _NOISE * length * noise_D)[None])
