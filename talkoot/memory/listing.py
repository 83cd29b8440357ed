"""`talkoot memory list` and `talkoot memory inspect NAME`: the memories of a swarm, and who hosts one of them."""

import time
from collections.abc import Collection, Mapping

from rich.table import Table
from rich.text import Text

from dht.admission import Role
from dht.announcements import NodeInfo
from dht.library import LibraryEntry, MemoryRegistry, find_memory
from dht.memory import MAX_MANIFEST_BYTES, MemoryManifest
from dht.swarm import Swarm
from peer.errors import LibraryError, TransferError
from peer.formatting import bytes_in_words, counted
from peer.identity import PeerID
from peer.rates import RateLimit
from peer.rpc.parts import PartClient, check_sha256
from peer.wire import session_pb2
from talkoot.ephemeral import run_in_swarm
from talkoot.memory.replication import Replication, Survey, entry_values, replication, sizes_in_words, survey
from talkoot.terminal import FittingTable, Terminal

_CHANNELS = 16
_MOST_ROWS = 64
"""The most rows of a grid that are shown."""


def run_list(terminal: Terminal, join: str | None) -> None:
    """Raises UserError."""
    run_in_swarm(terminal, join, lambda swarm: _list(terminal, swarm))


def run_inspect(terminal: Terminal, join: str | None, name: str) -> None:
    """Raises UserError, also if the memory's manifest can't be fetched."""
    run_in_swarm(terminal, join, lambda swarm: _inspect(terminal, swarm, name), tuple(Role))


async def _list(terminal: Terminal, swarm: Swarm) -> None:
    memories = MemoryRegistry(swarm.registry)
    libraries = await memories.libraries()
    surveys = [await survey(memories, entry) for entries in libraries.values() for entry in entries]
    if terminal.json:
        terminal.event("memories", {"memories": [_values(each) for each in surveys]})
    elif surveys:
        terminal.out.print(_memories_table(surveys))
    else:
        terminal.line(f"no memory is published in swarm {swarm.keys.swarm_id}")


def _values(found: Survey) -> dict[str, object]:
    return {
        **entry_values(found.entry),
        "fewest_replicas": found.fewest,
        "mean_replicas": round(found.mean, 2),
        "hosts": len(found.hosts),
    }


def _memories_table(surveys: list[Survey]) -> FittingTable:
    columns = ("name", "publisher", "revision", "passages", "licences", "shards", "replicas", "about")
    table = FittingTable(
        "memories, and the replicas of the shard with the fewest",
        columns,
        ("about", "revision", "publisher", "passages", "shards", "licences"),
    )
    for found in sorted(surveys, key=lambda each: (each.entry.memory.name, each.entry.memory.publisher)):
        entry = found.entry
        table.add_row(
            entry.memory.name,
            entry.memory.publisher,
            str(entry.revision),
            f"{entry.passages:,}",
            ", ".join(entry.licenses) or "-",
            f"{entry.shards}, {bytes_in_words(entry.total_bytes)}",
            str(found.fewest) if found.fewest else f"none of {counted(found.below(1), 'shard')}",
            entry.about or "-",
        )
    return table


async def _inspect(terminal: Terminal, swarm: Swarm, name: str) -> None:
    memories = MemoryRegistry(swarm.registry)
    entry = find_memory(await memories.libraries(), name)
    with terminal.stages("looking for its hosts"):
        some = await memories.some_nodes(entry)
        if not some:
            raise LibraryError(f"nobody hosts {entry.memory} now; its publisher can publish it again")
        manifest = await _fetch_manifest(swarm, entry, some.values())
        replicas = await replication(memories, entry, manifest)
        hosts = await swarm.registry.nodes(replicas.hosts)
    if terminal.json:
        terminal.event("memory", _memory_values(entry, manifest, replicas, hosts))
        return
    terminal.out.print(Text(_in_words(entry, manifest)))
    if len(manifest.grid) <= 2 and manifest.grid[0] <= _MOST_ROWS:
        terminal.out.print(_cells_table(manifest, replicas))
    terminal.out.print(_hosts_table(replicas, hosts))
    terminal.line(replicas.in_words)


async def _fetch_manifest(swarm: Swarm, entry: LibraryEntry, hosts: Collection[NodeInfo]) -> MemoryManifest:
    """Fetches the manifest from any of these hosts. Raises LibraryError."""
    sessions = swarm.session_client(session_pb2.RIGHT_MEMORY)
    parts = PartClient(swarm.keys.swarm_id, sessions, swarm.host.channels(_CHANNELS), RateLimit(None))

    def check(data: bytes) -> MemoryManifest:
        return MemoryManifest.parse(check_sha256(entry.manifest.sha256, data))

    try:
        size = min(entry.manifest.size, MAX_MANIFEST_BYTES)
        return await parts.fetch_any(hosts, str(entry.memory), entry.manifest.sha256, size, check)
    except TransferError as error:
        raise LibraryError(
            f"no live host could send the list of shards of {entry.memory}, so it can't be inspected now: {error}"
        ) from error
    finally:
        await parts.close()


def _in_words(entry: LibraryEntry, manifest: MemoryManifest) -> str:
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime(manifest.created_at))
    about = f": {entry.about}" if entry.about else ""
    revoked = f", {counted(len(manifest.revoked), 'passage', ',')} revoked" if manifest.revoked else ""
    return (
        f"{entry.memory}{about}\n"
        f"publisher {entry.publisher.to_base58()}; revision {manifest.revision} of {made}{revoked}\n"
        f"{counted(entry.passages, 'passage', ',')} in {counted(len(manifest.shards), 'shard')} of "
        f"{counted(len(manifest.by_cell), 'cell')}, {sizes_in_words(manifest.shard_bytes, manifest.encoder.size)}\n"
        f"encoder {manifest.encoder_kind}, {manifest.dimensions} dimensions; "
        f"licences: {', '.join(manifest.licenses) or 'none given'}"
    )


def _cells_table(manifest: MemoryManifest, replicas: Replication) -> Table:
    """For each cell, the fewest replicas of any of its shards. The columns are the grid's last dimension."""
    rows, columns = (manifest.grid[0], manifest.grid[1]) if len(manifest.grid) == 2 else (1, manifest.grid[0])
    table = Table(title="replicas of the shard with the fewest in each cell")
    for name in ("", *map(str, range(columns))):
        table.add_column(name, justify="right")
    for row in range(rows):
        cells = [(row, column) if len(manifest.grid) == 2 else (column,) for column in range(columns)]
        fewest = [
            min((len(replicas.by_root[shard.root]) for shard in manifest.by_cell.get(cell, ())), default=None)
            for cell in cells
        ]
        table.add_row(str(row), *("" if count is None else str(count or "-") for count in fewest))
    return table


def _hosts_table(replicas: Replication, hosts: Mapping[PeerID, NodeInfo]) -> Table:
    table = Table(title="hosts")
    for column in ("peer", "name", "shards", "all memories, last announced"):
        table.add_column(column, overflow="fold")
    for peer_id, shards in sorted(_shards_by_host(replicas).items(), key=lambda each: -each[1]):
        node = hosts.get(peer_id)
        of_all = (
            "?"
            if node is None
            else f"{counted(node.memory_shards, 'shard')}, {bytes_in_words(node.memory_bytes)}"
        )
        table.add_row(peer_id.short, (node and node.name) or "-", str(shards), of_all)
    return table


def _shards_by_host(replicas: Replication) -> dict[PeerID, int]:
    return {host: sum(host in hosts for hosts in replicas.by_root.values()) for host in replicas.hosts}


def _memory_values(
    entry: LibraryEntry, manifest: MemoryManifest, replicas: Replication, hosts: Mapping[PeerID, NodeInfo]
) -> dict[str, object]:
    return {
        **entry_values(entry),
        "licenses": list(manifest.licenses),
        "created_at": manifest.created_at,
        "encoder": manifest.encoder_kind,
        "dimensions": manifest.dimensions,
        "grid": list(manifest.grid),
        "revoked": [
            {"shard": place.root.hex(), "position": place.position} for place in sorted(manifest.revoked)
        ],
        "shards": [
            {
                "cell": list(shard.cell),
                "root": shard.root.hex(),
                "passages": shard.leaves,
                "has_texts": not shard.is_secondary,
                "bytes": shard.size,
                "hosts": [host.to_base58() for host in replicas.by_root[shard.root]],
            }
            for shard in manifest.shards
        ],
        "hosts": [
            {
                "peer_id": peer_id.to_base58(),
                "name": (peer_id in hosts and hosts[peer_id].name) or None,
                "shards": shards,
            }
            for peer_id, shards in _shards_by_host(replicas).items()
        ],
    }
