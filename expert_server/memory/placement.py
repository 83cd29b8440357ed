"""Which shards of memories a node hosts: which need a host most, and what a node reads to know that.

The choices are pure functions of what hosts announce. A shard with too few replicas is taken by the nodes that prefer
its cell most, by rendezvous hashing. At the first look, about as many nodes take it as there are missing replicas, and
twice as many at each further look. So a thousand nodes that see the same need do not all act on it. A surplus replica
is only dropped for a shard that lacks replicas, when the disk is full, and never by the hosts that prefer it most: even
if all others drop theirs at the same moment, enough are left.

Nodes prefer cells, not single shards. So the shards of a cell lie at few hosts, which makes fewer announcements, and
fewer hosts to ask in a search.
"""

import asyncio
import hashlib
import math
import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache

from dht.announcements import ReplicaState
from dht.library import CellHost, MemoryRegistry
from dht.memory import Cell, MemoryID, MemoryManifest, ShardInfo
from peer.bounded import Owner
from peer.identity import PeerID
from peer.rates import FairLine

_FIRM_LOOKS = 4
"""How many whole looks in a row must find that the same replica can be spared. There is one in a period, and
announcements live for at most three.
"""
_READERS = 4
"""About how many hosts read each cell in a period."""
FEWEST_READ, MOST_READ = 32, 512
"""The fewest and the most cells that a node reads in one look. If there are fewer, it reads all."""
READ_AGAIN = 256
"""The most shards whose hosts are read again between two looks."""
_MOST_DOUBLINGS = 40


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
    serving: frozenset[PeerID]
    leaving: frozenset[PeerID]
    """Hosts that leave. They still give it to others."""


@lru_cache(maxsize=4096)  # the shards of a cell come one after another
def preference(memory: MemoryID, cell: Cell, peer_id: PeerID) -> int:
    """How much a peer prefers a cell: 64 bits, larger is more."""
    return _drawn(f"{memory} {cell}@{peer_id.to_base58()}")


def is_called(preferred: int, missing: int, looks: int, nodes: float) -> bool:
    """Whether it is a peer's turn to take a shard that lacks this many replicas. `preferred`: how much the peer prefers
    its cell. `looks`: how many looks in a row found that, from 1. `nodes`: about how many nodes look.
    """
    called = missing << min(looks - 1, _MOST_DOUBLINGS)
    return called >= nodes or preferred >= 2**64 - int(2**64 * (called / nodes))


def _drawn(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


class Placement:
    """What one node should take and drop, given what its looks saw. Slow with many shards, so call it off the event
    loop.
    """

    def __init__(self, peer_id: PeerID, enough: int) -> None:
        """`enough`: the replicas wanted for a shard."""
        self._peer_id = peer_id
        self._enough = enough
        self._seen: Mapping[ShardKey, SeenShard] = {}
        self._lacking: dict[ShardKey, int] = {}
        """For each shard, how many looks in a row found too few replicas."""
        self._spare: dict[ShardKey, int] = {}
        """For each of this node's shards, how many looks in a row found enough other hosts that prefer it more."""
        self._forgotten: set[MemoryID] = set()

    def note(self, seen: Mapping[ShardKey, SeenShard], mine: Collection[ShardKey]) -> None:
        """Records a look. Shards that it did not see keep their counts."""
        forgotten, self._forgotten = self._forgotten, set()
        for counts in (self._lacking, self._spare):
            for key in [key for key in counts if key.memory in forgotten]:
                del counts[key]
        self._seen = seen
        for key, shard in seen.items():
            lacks = len(shard.serving) < self._enough
            self._count(self._lacking, key, lacks and key not in mine)
            self._count(self._spare, key, key in mine and len(self._keener(key)) >= self._enough)

    def lacking(self) -> list[ShardKey]:
        """The shards that had too few replicas at the last look that saw them, and that some host can give."""
        return [
            key
            for key in self._lacking
            if (shard := self._seen.get(key)) is not None and (shard.serving or shard.leaving)
        ]

    def forget(self, memory: MemoryID) -> None:
        """Forgets a memory's counts, because its shards have changed. For any thread."""
        self._forgotten.add(memory)

    def to_take(self, nodes: float) -> list[ShardKey]:
        """The shards that this node should take now. Publishers take turns, then the memories of each, and each memory
        has the shards with the fewest replicas first.

        `nodes`: about how many nodes look at each shard.
        """
        found = []
        for key, looks in self._lacking.items():
            shard = self._seen.get(key)
            if shard is None:
                continue
            missing = self._enough - len(shard.serving)
            if is_called(self._preference(key), missing, looks, max(1, nodes)):
                found.append(key)
        # nodes that are called for the same cell begin with different shards of it
        own = self._peer_id.to_base58()
        found.sort(
            key=lambda k: (len(self._seen[k].serving), -self._preference(k), _drawn(f"{k.root.hex()}@{own}"))
        )
        line = FairLine[ShardKey]()
        for key in found:
            line.put(Owner(key.memory.publisher, key.memory), key)
        return [line.pop() for _ in range(len(line))]

    def to_drop(self, size: int) -> list[ShardKey]:
        """This node's shards to drop so that this much space becomes free, those with the most replicas first.

        Empty if that is not possible.
        """
        able = [key for key, looks in self._spare.items() if looks >= _FIRM_LOOKS and key in self._seen]
        dropped = []
        for key in sorted(able, key=lambda k: (-len(self._seen[k].serving), self._preference(k))):
            if size <= 0:
                break
            dropped.append(key)
            size -= self._seen[key].info.size
        return dropped if size <= 0 else []

    def keener(self, key: ShardKey) -> list[PeerID]:
        """The serving hosts that prefer one of this node's shards more strongly than this node does. The first prefers
        it most.
        """
        cell = self._seen[key].info.cell
        hosts = self._keener(key)
        return sorted(hosts, key=lambda peer_id: preference(key.memory, cell, peer_id), reverse=True)

    def _keener(self, key: ShardKey) -> list[PeerID]:
        shard, own = self._seen[key], self._preference(key)
        return [p for p in shard.serving if preference(key.memory, shard.info.cell, p) > own]

    def _preference(self, key: ShardKey) -> int:
        """How much this node prefers the cell of a shard that the last look saw."""
        return preference(key.memory, self._seen[key].info.cell, self._peer_id)

    @staticmethod
    def _count(counts: dict[ShardKey, int], key: ShardKey, is_so: bool) -> None:
        if is_so:
            counts[key] = counts.get(key, 0) + 1
        else:
            counts.pop(key, None)


class MemorySurvey:
    """What one node reads about memories in each look: random cells, fewer the more hosts there are."""

    def __init__(self, memories: MemoryRegistry) -> None:
        self.share = 1.0
        """The share of all cells that a host usually reads in a look, at the last one."""
        self._memories = memories
        self._rng = random.SystemRandom()
        self._hosts = 0
        """How many hosts the last look saw."""

    async def read(
        self, manifests: Mapping[MemoryID, MemoryManifest], is_busy: bool
    ) -> dict[ShardKey, SeenShard]:
        """What hosts announce of the shards in some cells. Raises UnreachableError.

        `is_busy`: whether the node has just taken shards. Then a memory may be new, and as many cells as possible are
        read.
        """
        cells = [(memory, cell) for memory, manifest in manifests.items() for cell in manifest.by_cell]
        most = min(MOST_READ, len(cells))
        wanted = min(most, max(FEWEST_READ, math.ceil(_READERS * len(cells) / max(1, self._hosts))))
        found = await self._read(self._rng.sample(cells, most if is_busy else wanted))
        self.share = wanted / max(1, len(cells))
        self._hosts = len({host.peer_id for hosts in found.values() for host in hosts})
        return await asyncio.to_thread(_seen_in, manifests, found)

    async def read_again(
        self, manifests: Mapping[MemoryID, MemoryManifest], keys: Collection[ShardKey]
    ) -> dict[ShardKey, SeenShard]:
        """Reads the hosts of these shards again, or of some of them if there are many. Raises UnreachableError."""
        drawn = self._rng.sample(list(keys), min(READ_AGAIN, len(keys)))
        cells = {
            (key.memory, info.cell)
            for key in drawn
            if key.memory in manifests and (info := manifests[key.memory].by_root.get(key.root)) is not None
        }
        seen = await asyncio.to_thread(_seen_in, manifests, await self._read(cells))
        return {key: seen[key] for key in drawn if key in seen}

    async def _read(
        self, cells: Collection[tuple[MemoryID, Cell]]
    ) -> dict[tuple[MemoryID, Cell], Collection[CellHost]]:
        wanted: dict[MemoryID, list[Cell]] = {}
        for memory, cell in cells:
            wanted.setdefault(memory, []).append(cell)
        found: dict[tuple[MemoryID, Cell], Collection[CellHost]] = {}
        for memory, some in wanted.items():
            hosts = await self._memories.cell_hosts(memory, some)
            found |= {(memory, cell): hosts[cell] for cell in some}
        return found


def _seen_in(
    manifests: Mapping[MemoryID, MemoryManifest], hosts: Mapping[tuple[MemoryID, Cell], Collection[CellHost]]
) -> dict[ShardKey, SeenShard]:
    """Slow: a memory may have 131,072 shards."""
    seen: dict[ShardKey, SeenShard] = {}
    for (memory, cell), some in hosts.items():
        seen |= seen_shards(memory, manifests[memory].by_cell[cell], some)
    return seen


def seen_shards(
    memory: MemoryID, shards: Collection[ShardInfo], hosts: Collection[CellHost]
) -> dict[ShardKey, SeenShard]:
    """What the hosts of a cell announce about these shards of it. Slow if many announce many."""
    found = {}
    for info in shards:
        having = [host for host in hosts if info.short in host.shards]
        found[ShardKey(memory, info.root)] = SeenShard(
            info,
            frozenset(host.peer_id for host in having if host.state is ReplicaState.SERVING),
            frozenset(host.peer_id for host in having if host.state is ReplicaState.LEAVING),
        )
    return found
