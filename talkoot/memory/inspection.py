"""`talkoot memory inspect DIR`: verifies a memory in a folder, or what a node keeps of one, and shows what is in it."""

import datetime
import stat
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from dht.memory import Passage
from expert_server.memory.shard import PrimaryShard
from expert_server.memory.store import MemoryStore
from peer.errors import LibraryError, WireError
from peer.files import kind_of
from peer.formatting import bytes_in_words, counted, printable
from talkoot.memory.build import skew
from talkoot.terminal import Terminal

_SHOWN = 3
"""How many passages are shown. They are from different shards."""
_CHARACTERS = 300
"""How many characters of a passage are shown."""


@dataclass(frozen=True)
class Inspection:
    """The contents of a memory's folder: all of it, or the shards that a node hosts."""

    folder: str
    name: str
    revision: int
    about: str
    created_at: float
    passages: int
    """Passages whose texts are in these shards, without revoked ones."""
    revoked: int
    licenses: tuple[str, ...]
    grid: tuple[int, ...]
    cells: int
    """Cells that have passages."""
    skew: float
    shards: int
    """Shards in the folder."""
    shards_total: int
    shard_bytes: int
    encoder: str
    encoder_bytes: int
    dimensions: int
    bytes: int
    """The size of all parts."""
    samples: tuple[Passage, ...]


def run_inspect(terminal: Terminal, folder: Path) -> None:
    """Raises LibraryError if the folder is not a complete memory."""
    try:
        kind = kind_of(folder)
    except OSError as error:
        raise LibraryError(f"can't read {folder}: {error.strerror}; check its permissions") from error
    if kind != stat.S_IFDIR:
        raise LibraryError(
            f"{folder} is not a folder: pass one that `talkoot memory build` wrote, or a memory's name with "
            "--join INVITE"
        )
    with terminal.stages("verifying the memory") as stage:
        found = inspect_memory(folder, stage if terminal.live else lambda text: None)
    if terminal.json:
        terminal.event("memory", asdict(found))
        return
    here = f"{found.shards:,}" + (f" of {found.shards_total:,}" if found.shards < found.shards_total else "")
    table = Table(title=f"{found.name}, revision {found.revision}", show_header=False)
    for label, value in (
        ("about", found.about),
        ("made", f"{datetime.datetime.fromtimestamp(found.created_at, datetime.UTC):%Y-%m-%d %H:%M} UTC"),
        ("passages", f"{found.passages:,}" + (f", and {found.revoked:,} revoked" if found.revoked else "")),
        ("licences", ", ".join(found.licenses)),
        (
            "cells",
            f"{found.cells} of {' × '.join(map(str, found.grid))}, the fullest {found.skew:.1f} times the mean",
        ),
        ("shards", f"{here}, {bytes_in_words(found.shard_bytes)}"),
        ("encoder", f"{found.encoder}, {found.dimensions} dimensions, {bytes_in_words(found.encoder_bytes)}"),
        ("in all", bytes_in_words(found.bytes)),
    ):
        table.add_row(label, Text(value))
    terminal.out.print(table)
    for passage in found.samples:
        where = f"{passage.title} ({passage.source}, character {passage.offset:,}, {passage.license})"
        terminal.line("")
        terminal.line(printable(where))
        terminal.line(printable(passage.text, _CHARACTERS))


def inspect_memory(folder: Path, stage: Callable[[str], None] = lambda text: None) -> Inspection:
    """Reads and verifies everything in the folder. Raises LibraryError."""
    store = open_memory(folder, stage, whole=False)
    manifest, shards = store.manifest, store.shards
    primary = [shard for shard in shards.values() if isinstance(shard, PrimaryShard)]
    samples = []
    for shard in primary[:: -(-len(primary) // _SHOWN) or 1]:
        (entry,) = shard.read([len(shard) // 2])
        if entry.passage is not None:
            samples.append(entry.passage)
    return Inspection(
        str(folder),
        manifest.name,
        manifest.revision,
        manifest.about,
        manifest.created_at,
        sum(shard.live for shard in primary),
        len(manifest.revoked),
        manifest.licenses,
        manifest.grid,
        len(manifest.by_cell),
        skew(manifest),
        len(shards),
        len(manifest.shards),
        store.shard_bytes,
        manifest.encoder_kind,
        manifest.encoder.size,
        manifest.dimensions,
        store.nbytes,
        tuple(samples),
    )


def open_memory(
    folder: Path, stage: Callable[[str], None] = lambda text: None, *, whole: bool = True
) -> MemoryStore:
    """Opens a memory's folder, and checks each part. `whole`: no part may be missing. Raises LibraryError."""
    try:
        store = MemoryStore.open(folder)
        roots = store.roots()
        missing = len(store.manifest.shards) - len(roots)
        if whole and (missing or store.missing_parts()):
            what = counted(missing, "shard") if missing else "its encoder or codebook"
            raise LibraryError(f"{folder} lacks {what}: build the memory again, or copy its folder whole")
        for number, root in enumerate(roots, 1):
            stage(f"checking shard {number} of {len(roots)}")
            store.load(root)
    except FileNotFoundError as error:
        raise LibraryError(
            f"{folder} is not a memory ({error.filename} is missing): `talkoot memory build` writes one"
        ) from error
    except OSError as error:
        raise LibraryError(f"can't read {folder}: {error.strerror or error}") from error
    except WireError as error:
        raise LibraryError(f"{folder} is damaged: {error}; build the memory again") from error
    return store
