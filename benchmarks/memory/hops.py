"""How long first and later searches take in swarms of 100 to 10,000 simulated nodes, with round trips of 100 ms.

The DHT, the directory and the retriever are the real ones, in simulated time. Computing takes no simulated time, and is
measured separately. Every region has replicas at two random nodes. Searchers have the manifest, the encoder and the
codebook already.
"""

import random
import statistics
import time
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, cast

import numpy as np

from benchmarks.discovery_simulated import measure_choices
from benchmarks.memory.built import BuiltMemory, open_shards
from benchmarks.memory.lying import RTT_S, ShardHost, SlowCaller
from benchmarks.memory.recall import K
from benchmarks.simulated_p2p import Link, VirtualLoop, simulated_world
from benchmarks.simulated_swarm import LIFETIME_S, Placing, SimulatedSwarm
from dht.announcements import ReplicaState
from dht.library import LibraryEntry, MemoryRegistry
from dht.memory import MemoryManifest, Part, Vectors
from dht.uid import number_of
from expert_server.memory.shard import Shard
from peer.codec import Floats
from trainer_client.memory.calls import HostCalls
from trainer_client.memory.directory import MemoryDirectory, MemoryParts, Opened
from trainer_client.memory.retriever import Retriever

REPLICAS = 2
ASKED = 8
_SEED = 1


def measure(
    memory: BuiltMemory, folder: Path, texts: Sequence[str], sizes: Sequence[int], searchers: int
) -> dict[str, Any]:
    """Measures each number of nodes. `folder`: where the memory is. The texts are divided among the searchers."""
    manifest = MemoryManifest.parse((folder / "manifest").read_bytes())
    shards = {info.root: shard for info, shard in open_shards(folder, manifest)}
    vectors_QD = memory.encoder.encode(texts)
    vectors_QD = vectors_QD[vectors_QD.any(axis=1)]
    found = {}
    for nodes in sizes:
        with simulated_world() as loop:
            trial = _Trial(loop, memory, manifest, shards)
            found[str(nodes)] = loop.run_until_complete(
                trial.run(nodes, vectors_QD, memory.codebook.scores(vectors_QD), searchers)
            )
    return found


class _Trial:
    """One swarm."""

    def __init__(
        self,
        loop: VirtualLoop,
        memory: BuiltMemory,
        manifest: MemoryManifest,
        shards: Mapping[bytes, Shard],
    ) -> None:
        self._loop = loop
        self._memory = memory
        self._manifest = manifest
        self._shards = shards

    async def run(self, nodes: int, vectors_QD: Vectors, scores_QC: Floats, searchers: int) -> dict[str, Any]:
        link = Link(RTT_S)
        swarm = await SimulatedSwarm.start(self._loop, nodes, 256, link, _SEED, with_contacts=True)
        experts = await measure_choices(self._loop, swarm, 1, searchers)
        hosts, entry = await self._announce(swarm)
        cold_ms, known_ms, cpu_ms = list[float](), list[float](), list[float]()
        cold_calls = []
        for mine in np.array_split(np.arange(len(vectors_QD)), searchers):
            retriever = await self._searcher(swarm, hosts, entry)
            for number, row in enumerate([*mine, *mine]):
                if number == len(mine):  # now it knows all hosts, but has no passage
                    retriever = Retriever(
                        retriever.directory, retriever.calls, swarm.keys.swarm_id, checked_share=0.0
                    )
                before, began, cpu = swarm.network.traffic.calls, self._loop.time(), time.process_time()
                (result,) = await retriever.search_vectors(
                    vectors_QD[row : row + 1], scores_QC[row : row + 1], K, ASKED
                )
                took_ms = 1000 * (self._loop.time() - began)
                assert result.hits
                assert not result.missing
                if number == 0:
                    cold_ms.append(took_ms)
                    cold_calls.append(swarm.network.traffic.calls - before)
                elif number >= len(mine):
                    known_ms.append(took_ms)
                    cpu_ms.append(1000 * (time.process_time() - cpu))
            await retriever.close()
        return {
            "cold_ms_mean": statistics.mean(cold_ms),
            "cold_ms_max": max(cold_ms),
            "cold_calls_mean": statistics.mean(cold_calls),
            "warm_ms_mean": statistics.mean(known_ms),
            "warm_ms_max": max(known_ms),
            "warm_cpu_ms": statistics.median(cpu_ms),
            "experts_cold_ms_mean": experts["callable_ms_mean"],
            "experts_cold_calls_mean": experts["calls_mean"],
        }

    async def _announce(self, swarm: SimulatedSwarm) -> tuple[list[ShardHost], LibraryEntry]:
        """Puts into the DHT who hosts which shards, without any calls."""
        rng = random.Random(_SEED)
        placed: dict[int, dict[bytes, Shard]] = {}
        for shards in self._manifest.by_region.values():
            own = {shard.root: self._shards[shard.root] for shard in shards}
            for number in rng.sample(range(len(swarm.peers)), REPLICAS):
                placed.setdefault(number, {}).update(own)
        author, manifest = swarm.keys.author, self._manifest
        data = manifest.serialize()
        entry = LibraryEntry.of(manifest, Part(bytes(32), len(data)), author)
        placing = Placing([peer.dht for peer in swarm.peers])
        hosts = []
        for number, some in placed.items():
            peer = swarm.peers[number]
            hosts.append(ShardHost(peer.peer_id, manifest, some))
            regions: dict[int, tuple[ReplicaState, list[bytes]]] = {}
            for root in some:
                region = manifest.region_of[manifest.by_root[root]]
                regions.setdefault(region, (ReplicaState.SERVING, []))[1].append(root)
            lookups, peer.registry.lookups = peer.registry.lookups, placing
            await MemoryRegistry(peer.registry).announce(entry.memory, regions, LIFETIME_S)
            peer.registry.lookups = lookups
        return hosts, entry

    async def _searcher(
        self, swarm: SimulatedSwarm, hosts: Sequence[ShardHost], entry: LibraryEntry
    ) -> Retriever:
        """A searcher that has just joined, and knows none of the memory's hosts."""
        peer = await swarm.make_peer(serves_dht=False)
        await swarm.join(peer)
        filled_C = np.zeros(prod(self._manifest.grid), np.bool_)
        filled_C[[number_of(cell, self._manifest.grid) for cell in self._manifest.by_cell]] = True
        memory = self._memory
        opened = Opened(entry, self._manifest, filled_C, memory.codebook, memory.encoder)
        no_parts = cast(MemoryParts, None)  # fetched only for other revisions
        directory = MemoryDirectory(MemoryRegistry(peer.registry), peer.registry, no_parts, opened)
        calls = HostCalls(SlowCaller(hosts), str(entry.memory), rng=random.Random(_SEED))
        return Retriever(directory, calls, swarm.keys.swarm_id, rng=random.Random(_SEED), checked_share=0.0)
