"""How many replicas the shards of a memory have, and who hosts them, according to the DHT."""

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

from dht.announcements import ReplicaState
from dht.library import WANTED_REPLICAS, LibraryEntry, MemoryRegistry, RegionHost
from dht.memory import MAX_SHARDS, MemoryManifest
from peer.formatting import bytes_in_words, counted
from peer.identity import PeerID
from peer.loop import TimeSlices

_REGIONS_AT_ONCE = 64
"""How many regions of a memory are surveyed at once."""


@dataclass(frozen=True)
class Replication:
    """The peers that serve the shards of a memory, for a peer that has its manifest."""

    by_root: Mapping[bytes, frozenset[PeerID]]
    """The peers that serve each shard of the manifest; no other shards."""

    @classmethod
    def of(
        cls,
        manifest: MemoryManifest,
        found: Mapping[int, Iterable[RegionHost]],
        besides: PeerID | None = None,
    ) -> Self:
        """`found`: the hosts' announcements. `besides`: peers that don't count."""
        return cls(
            {
                shard.root: frozenset(
                    host.peer_id
                    for host in found.get(region, ())
                    if host.state is ReplicaState.SERVING
                    and host.peer_id != besides
                    and shard.short in host.shards
                )
                for region, shards in manifest.by_region.items()
                for shard in shards
            }
        )

    def below(self, wanted: int) -> int:
        """How many shards have fewer replicas than that."""
        return sum(len(hosts) < wanted for hosts in self.by_root.values())

    @property
    def fewest(self) -> int:
        return min(map(len, self.by_root.values()), default=0)

    @property
    def hosts(self) -> frozenset[PeerID]:
        return frozenset().union(*self.by_root.values())

    @property
    def in_words(self) -> str:
        alone, none = self.below(2) - self.below(1), self.below(1)
        return (
            f"of {counted(len(self.by_root), 'shard')}, {len(self.by_root) - self.below(2)} have 2 replicas or more, "
            f"{alone} have 1, {none} have none; {counted(len(self.hosts), 'host')}"
        )


async def replication(
    memories: MemoryRegistry, entry: LibraryEntry, manifest: MemoryManifest, besides: PeerID | None = None
) -> Replication:
    """Looks up who serves the memory's shards. Raises UnreachableError."""
    found = await memories.region_hosts(entry.memory, manifest.by_region)
    return await asyncio.to_thread(Replication.of, manifest, found, besides)


@dataclass(frozen=True)
class Survey:
    """The replicas of a memory's shards, for a peer without its manifest."""

    entry: LibraryEntry
    replicas: Mapping[bytes, int]
    """The number of peers that serve each shard, by the first bytes of its root. Shards that nobody serves
    are missing.
    """
    hosts: frozenset[PeerID]

    @property
    def served(self) -> int:
        """How many shards are served by somebody. It may be too high, because anybody can announce shards that the
        memory does not have.
        """
        return min(len(self.replicas), self.entry.shards)

    @property
    def fewest(self) -> int:
        """The number of replicas of the shard that has the fewest."""
        return 0 if len(self.replicas) < self.entry.shards else min(self.replicas.values(), default=0)

    @property
    def mean(self) -> float:
        """The mean number of replicas of a shard."""
        return sum(self.replicas.values()) / max(1, self.entry.shards, len(self.replicas))

    def below(self, wanted: int = WANTED_REPLICAS) -> int:
        """How many shards have fewer replicas than that."""
        enough = sum(count >= wanted for count in self.replicas.values())
        return max(0, self.entry.shards - enough)


async def survey(memories: MemoryRegistry, entry: LibraryEntry) -> Survey:
    """Looks up who serves the memory's shards. Raises UnreachableError."""
    active = sorted(await memories.active_regions(entry))
    replicas: Counter[bytes] = Counter()
    hosts, slices = set(), TimeSlices()
    for begin in range(0, len(active), _REGIONS_AT_ONCE):
        found = await memories.region_hosts(entry.memory, active[begin : begin + _REGIONS_AT_ONCE])
        for some in found.values():
            for host in some:
                if host.state is ReplicaState.SERVING:
                    hosts.add(host.peer_id)
                    for shard in host.shards:
                        if shard in replicas or len(replicas) < MAX_SHARDS:
                            replicas[shard] += 1
                await slices.pause()  # strangers may say that they host everything
    return Survey(entry, replicas, frozenset(hosts))


def sizes_in_words(shard_bytes: int, encoder_bytes: int) -> str:
    """A memory's size: the hosts share the shards, and each host and searcher has the encoder."""
    return f"{bytes_in_words(shard_bytes)} of shards and {bytes_in_words(encoder_bytes)} of encoder"


def entry_values(entry: LibraryEntry) -> dict[str, object]:
    """The values as `--json` prints them."""
    return {
        "memory": str(entry.memory),
        "name": entry.memory.name,
        "publisher": entry.publisher.to_base58(),
        "revision": entry.revision,
        "passages": entry.passages,
        "shards": entry.shards,
        "bytes": entry.total_bytes,
        "licenses": list(entry.licenses),
        "about": entry.about,
    }
