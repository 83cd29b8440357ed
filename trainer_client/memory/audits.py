"""Checks that the hosts of a memory leave nothing out, for a peer that has no queries of its own.

A random passage of a random shard is chosen, and a vector near the passage's own is the query. Two hosts of the cell
are asked for it. Anything that either of them left out or made up is found as in any search (`checks`). So this needs
the memory's list of shards, but not its encoder, which is much larger.
"""

import asyncio
import logging
import random
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from dht.library import LibraryEntry, MemoryRegistry
from dht.memory import MemoryID, MemoryManifest, Place, ShardInfo, Vectors, number_of
from dht.swarm import Swarm
from peer.bounded import BoundedDict
from peer.errors import ExpertError, TransferError, UnreachableError, WireError
from peer.identity import PeerID
from peer.rates import RateLimit
from peer.rpc.channels import ChannelPool
from peer.rpc.parts import PartClient
from peer.rpc.sessions import SessionClient
from peer.wire import session_pb2
from trainer_client.memory.calls import Fault, GrpcMemoryCaller, HostCalls, RetrieverMetrics, loop_time
from trainer_client.memory.directory import MemoryDirectory, MemoryParts, Opened, PartCache
from trainer_client.memory.encoder import to_vectors
from trainer_client.memory.retriever import Located, Retriever

logger: logging.Logger = logging.getLogger(__name__)

_PASSAGES = 10
"""Passages wanted from each host, which is asked for twice as many: see `MOST_WANTED`."""
_LIMIT_S = 60.0
"""The longest time for one check, including the list of shards."""
_READ_S = 10.0
_OPEN = 4
"""How many memories' lists of shards stay parsed. One of 100,000 shards takes some 30 MB."""
_NOISE = 0.5
"""The length of the noise, as a share of the vector's."""


@dataclass(frozen=True)
class Audit:
    """The result of one check."""

    compared: int
    """Queries that two hosts have answered: 0 or 1."""
    faulty: Mapping[PeerID, Fault]
    """Hosts that left out a passage, or lied."""


class Auditor:
    """Checks hosts of memories, one cell at a time. For one event loop; close it when done."""

    def __init__(
        self,
        swarm: Swarm,
        channels: ChannelPool,
        folder: Path,
        metrics: RetrieverMetrics,
        rng: random.Random | None = None,
    ) -> None:
        """`channels`: closed together with this. `folder`: where lists of shards are kept."""
        self._swarm = swarm
        self._channels = channels
        self._metrics = metrics
        self._rng = rng or random.SystemRandom()
        self._registry = MemoryRegistry(swarm.registry)
        rights = (session_pb2.RIGHT_MEMORY,)
        self._sessions = SessionClient(swarm.host.identity, swarm.keys.swarm_id, rights, swarm.admission)
        self._parts = PartClient(swarm.keys.swarm_id, self._sessions, channels, RateLimit(None))
        self._caller = GrpcMemoryCaller(channels, self._sessions)
        self._cache = PartCache(folder)
        self._opened = BoundedDict[MemoryID, Opened](_OPEN)

    async def close(self) -> None:
        await self._sessions.close()
        await self._channels.close()

    async def check(self, entry: LibraryEntry) -> Audit:
        """Asks two hosts of a cell for the same passages. If no two hosts answer, nothing is compared."""
        calls = HostCalls(
            self._caller, str(entry.memory), guard=self._swarm.guard, metrics=self._metrics, rng=self._rng
        )
        try:
            async with asyncio.timeout(_LIMIT_S):
                await self._check(entry, calls)
        except (TransferError, UnreachableError, WireError, TimeoutError) as error:
            logger.debug("hosts of memory %s were not checked: %s", entry.memory, error)
        return Audit(calls.checks, dict(calls.faulty.items()))

    async def _check(self, entry: LibraryEntry, calls: HostCalls) -> None:
        registry = self._swarm.registry
        parts = MemoryParts(entry.memory, self._registry, registry, self._parts, self._cache)
        opened = self._opened.get(entry.memory)
        if opened is None or opened.entry != entry:
            opened = self._opened[entry.memory] = await parts.open(entry, with_index=False)
        directory = MemoryDirectory(self._registry, registry, parts, opened)
        retriever = Retriever(directory, calls, self._swarm.keys.swarm_id, rng=self._rng, checked_share=1.0)
        shard, grid = self._rng.choice(opened.manifest.shards), opened.manifest.grid
        scores_1C = np.zeros((1, prod(grid)), np.float32)
        scores_1C[0, number_of(shard.cell, grid)] = 1.0
        try:
            located = await directory.locate(scores_1C, 1, frozenset())
            vector_D = await self._a_vector_in(shard, opened.manifest, located, retriever)
            if vector_D is not None:
                await retriever.search_vectors(self._near(vector_D), scores_1C, _PASSAGES, 1)
                await retriever.checked()
        finally:
            await retriever.close()

    def _near(self, vector_D: Vectors) -> Vectors:
        """A vector like a query's, which belongs to no passage: it alone does not tell hosts that this is a check. [1,
        D]
        """
        length = float(np.linalg.norm(vector_D.astype(np.float32)))
        rng = np.random.default_rng(self._rng.getrandbits(64))
        noise_D = rng.standard_normal(len(vector_D), np.float32) * (_NOISE * length / len(vector_D) ** 0.5)
        return to_vectors((vector_D + noise_D)[None])

    async def _a_vector_in(
        self, shard: ShardInfo, manifest: MemoryManifest, located: Located, retriever: Retriever
    ) -> Vectors | None:
        """The vector of a random passage in the shard; None if it was revoked, or no host gives it."""
        place = Place(shard.root, self._rng.randrange(shard.leaves))
        hosts = list(located.hosts.get(shard.root, ()))
        for host in self._rng.sample(hosts, min(2, len(hosts))):
            with suppress(ExpertError):
                found = await retriever.read([place], manifest, located.nodes[host], loop_time() + _READ_S)
                if place in found:
                    return found[place].vector_D
        return None
