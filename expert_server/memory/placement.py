"""Which shards of memories a node hosts: which need a host most, and what a node reads to know that.

The choices are pure functions of what hosts announce. A shard with too few replicas is taken by the nodes that prefer
its region most, by rendezvous hashing. At the first look, about as many nodes take it as there are missing replicas,
and twice as many at each further look. So a thousand nodes that see the same need do not all act on it. A surplus
replica is only dropped for a shard that lacks replicas, when the disk is full, and never by the hosts that prefer it
most: even if all others drop theirs at the same moment, enough are left.

Nodes prefer regions, not single shards. So the shards of a region lie at few hosts, which makes fewer announcements,
and fewer hosts to ask in a search.
"""

import asyncio
import hashlib
import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache

from dht.announcements import ReplicaState
from dht.library import MemoryRegistry, RegionHost
from dht.memory import MemoryID, MemoryManifest, ShardInfo
from dht.registry import some_of
from peer.bounded import Owner
from peer.identity import PeerID
from peer.rates import FairLine

_FIRM_LOOKS = 4
"""A replica can be spared if it could be before, too, at a look that is the first of so many. There is one look in a
period, and announcements live for at most three.
"""
_READ_FOR_OWN = 2
"""How many random regions of a memory a node reads in a look for each that it hosts itself."""
FEWEST_READ, MOST_READ = 8, 256
"""The fewest and the most random regions that a node reads in a look, if there are as many."""
READ_AGAIN, READ_TO_DROP = 32, 64
"""The most regions that are read because they lacked replicas, and of its own ones because a node lacks room."""
_MOST_DOUBLINGS = 40


_RegionOfMemory = tuple[MemoryID, int]


@dataclass(frozen=True)
class ShardKey:
    """One shard of one memory."""

    memory: MemoryID
    root: bytes

    def __str__(self) -> str:
        return f"{self.root.hex()[:8]} of memory {self.memory}"


@dataclass(frozen=True)
class SeenShard:
    """A shard as a look saw it."""

    info: ShardInfo
    region: int
    serving: frozenset[PeerID]
    leaving: frozenset[PeerID]
    """Hosts that leave. They still give it to others."""


@lru_cache(maxsize=4096)  # the shards of a region come one after another
def preference(memory: MemoryID, region: int, peer_id: PeerID) -> int:
    """How much a peer prefers a region: 64 bits, larger is more."""
    return _drawn(f"{memory} {region}@{peer_id.to_base58()}")


def is_called(preferred: int, missing: int, looks: int, nodes: float) -> bool:
    """Whether it is a peer's turn to take a shard that lacks this many replicas. `preferred`: how much the peer prefers
    its region. `looks`: how many looks in a row found that, from 1. `nodes`: about how many nodes look.
    """
    called = missing << min(looks - 1, _MOST_DOUBLINGS)
    return called >= nodes or preferred >= 2**64 - int(2**64 * (called / nodes))


def _drawn(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


@dataclass
class _Need:
    """A shard that has too few replicas, as far as a node knows."""

    looks: int
    """How many looks in a row found that."""
    has_source: bool
    """Whether some host could give it at the last one."""


class Placement:
    """What one node should take and drop, given what its looks saw. Slow with many shards, so call it off the event
    loop.
    """

    def __init__(self, peer_id: PeerID, enough: int) -> None:
        """`enough`: the replicas wanted for a shard."""
        self._peer_id = peer_id
        self._enough = enough
        self._seen: Mapping[ShardKey, SeenShard] = {}
        self._lacking: dict[ShardKey, _Need] = {}
        self._looks = 0
        """How many looks there were, without those between two."""
        self._spare: dict[ShardKey, int] = {}
        """This node's shards for which all looks that saw them since this one found enough other hosts that prefer them
        more.
        """
        self._forgotten: set[MemoryID] = set()

    def note(
        self, seen: Mapping[ShardKey, SeenShard], mine: Collection[ShardKey], is_between: bool = False
    ) -> None:
        """Records a look. Shards that it did not see keep their counts. `is_between`: whether it was a look between
        two.
        """
        forgotten, self._forgotten = self._forgotten, set()
        for counts in (self._lacking, self._spare):
            for key in [key for key in counts if key.memory in forgotten]:
                del counts[key]
        self._seen = seen
        self._looks += not is_between
        for key, shard in seen.items():
            if key not in mine and len(shard.serving) < self._enough:
                looks = self._lacking[key].looks if key in self._lacking else 0
                self._lacking[key] = _Need(looks + 1, bool(shard.serving or shard.leaving))
            else:
                self._lacking.pop(key, None)
            if key in mine and len(self._keener(key)) >= self._enough:
                self._spare.setdefault(key, self._looks)
            else:
                self._spare.pop(key, None)

    def lacking(self) -> list[ShardKey]:
        """The shards that had too few replicas at the last look that saw them, and that some host could give."""
        return [key for key, need in self._lacking.items() if need.has_source]

    def forget(self, memory: MemoryID) -> None:
        """Forgets a memory's counts, because its shards have changed. For any thread."""
        self._forgotten.add(memory)

    def to_take(self, nodes: Mapping[MemoryID, float]) -> list[ShardKey]:
        """The shards that this node should take now. Publishers take turns, then the memories of each, and each memory
        has the shards with the fewest replicas first.

        `nodes`: about how many nodes look at each shard of a memory.
        """
        found = []
        for key, need in self._lacking.items():
            shard = self._seen.get(key)
            if shard is None:
                continue
            missing = self._enough - len(shard.serving)
            if is_called(self._preference(key), missing, need.looks, nodes.get(key.memory, math.inf)):
                found.append(key)
        # nodes that are called for the same region begin with different cells of it, and take whole ones if they can
        order, own = dict[ShardKey, tuple[int, ...]](), self._peer_id.to_base58()
        for key in found:
            shard = self._seen[key]
            order[key] = len(shard.serving), -self._preference(key), _drawn(f"{shard.info.cell}@{own}")
        found.sort(key=order.__getitem__)
        line = FairLine[ShardKey]()
        for key in found:
            line.put(Owner(key.memory.publisher, key.memory), key)
        return [line.pop() for _ in range(len(line))]

    def to_drop(self, size: int) -> list[ShardKey]:
        """This node's shards to drop so that this much space becomes free, or as much of it as possible now. Those with
        the most replicas come first.
        """
        firm = self._looks + 1 - _FIRM_LOOKS
        able = [key for key, since in self._spare.items() if since <= firm and key in self._seen]
        dropped = []
        for key in sorted(able, key=lambda k: (-len(self._seen[k].serving), self._preference(k))):
            if size <= 0:
                break
            dropped.append(key)
            size -= self._seen[key].info.size
        return dropped

    def keener(self, key: ShardKey) -> list[PeerID]:
        """The serving hosts that prefer one of this node's shards more strongly than this node does. The first prefers
        it most.
        """
        region = self._seen[key].region
        hosts = self._keener(key)
        return sorted(hosts, key=lambda peer_id: preference(key.memory, region, peer_id), reverse=True)

    def _keener(self, key: ShardKey) -> list[PeerID]:
        shard, own = self._seen[key], self._preference(key)
        return [p for p in shard.serving if preference(key.memory, shard.region, p) > own]

    def _preference(self, key: ShardKey) -> int:
        """How much this node prefers the region of a shard that the last look saw."""
        return preference(key.memory, self._seen[key].region, self._peer_id)


class MemorySurvey:
    """What one node reads about memories in each look: random regions, and those that lacked replicas before.

    For each region that it hosts, a node reads two random ones of the same memory. Each region has two hosts or more,
    so it is read about four times in a period, in a swarm of any size, and whatever strangers announce. Nodes that host
    less read a few regions, too.
    """

    def __init__(self, memories: MemoryRegistry) -> None:
        self.shares: dict[MemoryID, float] = {}
        """The share of each memory's regions that the node usually reads, at the last look."""
        self._memories = memories

    async def read(
        self,
        manifests: Mapping[MemoryID, MemoryManifest],
        mine: Collection[ShardKey],
        lacking: Collection[ShardKey],
        *,
        is_busy: bool,
        is_short: bool,
    ) -> dict[ShardKey, SeenShard]:
        """What hosts announce of the shards in some regions. Raises UnreachableError.

        `is_busy`: whether the node has just taken shards. Then a memory may be new, and more regions are read.
        `is_short`: whether it lacks room. Then more of its own regions are read, to see what it can drop.
        """
        regions = await asyncio.to_thread(
            self._random_regions, manifests, _regions_of(manifests, mine), is_busy
        )
        regions.update(some_of(_regions_of(manifests, lacking), READ_AGAIN))
        if is_short:
            regions.update(some_of(_regions_of(manifests, mine), READ_TO_DROP))
        return await asyncio.to_thread(_seen_in, manifests, await self._read(regions))

    async def read_again(
        self, manifests: Mapping[MemoryID, MemoryManifest], lacking: Collection[ShardKey]
    ) -> dict[ShardKey, SeenShard]:
        """Reads the regions of these shards again, or some of them if there are many. Raises UnreachableError."""
        regions = some_of(_regions_of(manifests, lacking), READ_AGAIN)
        return await asyncio.to_thread(_seen_in, manifests, await self._read(regions))

    def _random_regions(
        self, manifests: Mapping[MemoryID, MemoryManifest], own: Collection[_RegionOfMemory], is_busy: bool
    ) -> set[_RegionOfMemory]:
        """Slow with large memories."""
        hosted = Counter(memory for memory, _ in own)
        share_of_fewest = FEWEST_READ / max(
            1, sum(len(manifest.by_region) for manifest in manifests.values())
        )
        wanted = {
            memory: min(
                len(manifest.by_region),
                max(_READ_FOR_OWN * hosted[memory], math.ceil(share_of_fewest * len(manifest.by_region))),
            )
            for memory, manifest in manifests.items()
        }
        fits = min(1.0, MOST_READ / max(1, sum(wanted.values())))
        self.shares = {memory: fits * n / len(manifests[memory].by_region) for memory, n in wanted.items()}
        drawn = set[_RegionOfMemory]()
        for memory, n in wanted.items():
            regions = manifests[memory].by_region
            drawn.update((memory, region) for region in (regions if is_busy else some_of(regions, n)))
        return set(some_of(drawn, MOST_READ))

    async def _read(
        self, regions: Collection[_RegionOfMemory]
    ) -> dict[_RegionOfMemory, Collection[RegionHost]]:
        wanted: dict[MemoryID, list[int]] = {}
        for memory, region in regions:
            wanted.setdefault(memory, []).append(region)
        found: dict[_RegionOfMemory, Collection[RegionHost]] = {}
        for memory, some in wanted.items():
            hosts = await self._memories.region_hosts(memory, some)
            found |= {(memory, region): hosts[region] for region in some}
        return found


def _regions_of(
    manifests: Mapping[MemoryID, MemoryManifest], keys: Collection[ShardKey]
) -> set[_RegionOfMemory]:
    """The regions of those of these shards that are still listed."""
    return {
        (key.memory, manifest.region_of[info])
        for key in keys
        if (manifest := manifests.get(key.memory)) is not None
        and (info := manifest.by_root.get(key.root)) is not None
    }


def _seen_in(
    manifests: Mapping[MemoryID, MemoryManifest], hosts: Mapping[_RegionOfMemory, Collection[RegionHost]]
) -> dict[ShardKey, SeenShard]:
    """Slow: a memory may have 131,072 shards."""
    seen: dict[ShardKey, SeenShard] = {}
    for (memory, region), some in hosts.items():
        seen |= seen_shards(memory, region, manifests[memory].by_region[region], some)
    return seen


def seen_shards(
    memory: MemoryID, region: int, shards: Collection[ShardInfo], hosts: Collection[RegionHost]
) -> dict[ShardKey, SeenShard]:
    """What the hosts of a region announce about these shards of it. Slow if many announce many."""
    found = {}
    for info in shards:
        having = [host for host in hosts if info.short in host.shards]
        found[ShardKey(memory, info.root)] = SeenShard(
            info,
            region,
            frozenset(host.peer_id for host in having if host.state is ReplicaState.SERVING),
            frozenset(host.peer_id for host in having if host.state is ReplicaState.LEAVING),
        )
    return found
