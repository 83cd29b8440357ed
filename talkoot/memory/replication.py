"""Which of a memory's shards are hosted, and by whom, for those who have its manifest."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from dht.announcements import ReplicaState
from dht.library import CellHost, LibraryEntry, MemoryRegistry
from dht.memory import Cell, MemoryManifest
from peer.formatting import counted
from peer.identity import PeerID

_CELLS_AT_ONCE = 512
"""In one look-up, which has one deadline."""


@dataclass(frozen=True)
class Replication:
    """Which of a memory's shards others serve."""

    by_root: Mapping[bytes, frozenset[PeerID]]
    """Who serves each shard, those of the manifest alone."""

    @classmethod
    def of(
        cls, manifest: MemoryManifest, found: Mapping[Cell, Iterable[CellHost]], besides: PeerID | None = None
    ) -> Self:
        """`found`: what hosts announce. `besides`: who does not count."""
        return cls(
            {
                shard.root: frozenset(
                    host.peer_id
                    for host in found.get(shard.cell, ())
                    if host.state is ReplicaState.SERVING
                    and host.peer_id != besides
                    and shard.short in host.shards
                )
                for shard in manifest.shards
            }
        )

    def below(self, wanted: int) -> int:
        """Shards with fewer replicas."""
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
    cells, found = list(manifest.by_cell), dict[Cell, Sequence[CellHost]]()
    for begin in range(0, len(cells), _CELLS_AT_ONCE):
        found |= await memories.cell_hosts(entry.memory, cells[begin : begin + _CELLS_AT_ONCE])
    return Replication.of(manifest, found, besides)


def entry_values(entry: LibraryEntry) -> dict[str, object]:
    """As `--json` prints it."""
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
