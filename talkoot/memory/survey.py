"""How many replicas the shards of a memory have, by what its hosts announce in the DHT."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from dht.announcements import ReplicaState
from dht.library import WANTED_REPLICAS, LibraryEntry, MemoryRegistry
from peer.identity import PeerID

_MOST_CELLS = 4096
"""Of one memory. A larger one is surveyed in part."""


@dataclass(frozen=True)
class Survey:
    """A memory's replicas at one moment."""

    entry: LibraryEntry
    replicas: Mapping[bytes, int]
    """Peers that serve each shard, by the first bytes of its root. Those that nobody serves are not among them."""
    hosts: frozenset[PeerID]
    is_whole: bool
    """Whether all active cells were looked up."""

    @property
    def served(self) -> int:
        """Shards that somebody serves. Anybody can announce shards that the memory has not."""
        return min(len(self.replicas), self.entry.shards)

    @property
    def fewest(self) -> int:
        """Replicas of the shard that has the fewest."""
        return 0 if len(self.replicas) < self.entry.shards else min(self.replicas.values(), default=0)

    @property
    def mean(self) -> float:
        """Replicas of a shard on average."""
        return sum(self.replicas.values()) / max(1, self.entry.shards, len(self.replicas))

    def below(self, wanted: int = WANTED_REPLICAS) -> int:
        """Shards with fewer replicas than that."""
        enough = sum(count >= wanted for count in self.replicas.values())
        return max(0, self.entry.shards - enough)


async def survey(memories: MemoryRegistry, entry: LibraryEntry) -> Survey:
    """Looks up who serves the memory's shards. Raises UnreachableError."""
    active = sorted(await memories.active_cells(entry.memory, entry.grid))
    looked_up = active[:_MOST_CELLS]
    replicas: Counter[bytes] = Counter()
    hosts = set()
    for some in (await memories.cell_hosts(entry.memory, looked_up)).values():
        for host in some:
            if host.state is ReplicaState.SERVING:
                hosts.add(host.peer_id)
                replicas.update(host.shards)
    return Survey(entry, replicas, frozenset(hosts), len(looked_up) == len(active))
