"""The passages found for chunks of text, on disk, so that a text is looked up once for each revision of a memory."""

import hashlib
import json
import logging
import sqlite3
import threading
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from google.protobuf.message import DecodeError

from dht.memory import Passage
from peer.errors import WireError
from peer.wire import memory_pb2

logger: logging.Logger = logging.getLogger(__name__)

CACHE_BYTES = 2**30
_PAGE_BYTES = 4096
_DROPPED = 16
"""A full cache drops one in this many of its entries, the oldest first."""
_LARGEST_ENTRY = 2**20
"""The largest entry in bytes, decompressed."""
_TABLE = (
    "CREATE TABLE IF NOT EXISTS found (key BLOB PRIMARY KEY, memory TEXT, revision INTEGER, passages BLOB)"
)
_BROKEN = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class NeighbourCache:
    """Passages by memory, revision and chunk. For any thread of one process at a time. Close it when done.

    If the disk fails, the cache is lost, but training continues.
    """

    def __init__(self, path: Path, limit_bytes: int = CACHE_BYTES) -> None:
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._path, self._limit_bytes = path, limit_bytes
        self._forgotten: tuple[str, int] | None = None
        """The last memory and revision for which earlier entries were deleted. Deleting them reads the whole file.
        """
        try:
            self._open()
        except sqlite3.Error:
            # not a database, a broken one, or one of something else
            self._begin_anew()

    def get(self, memory: str, revision: int, texts: Sequence[str]) -> dict[str, list[Passage]]:
        """The existing entries, by text."""
        found = dict[str, list[Passage]]()
        with self._lock:
            for text in texts:
                if self._connection is None:
                    break
                try:
                    row = self._connection.execute(
                        "SELECT passages FROM found WHERE key = ?", (_key(memory, revision, text),)
                    ).fetchone()
                except sqlite3.Error as error:
                    self._failed(error)
                    break
                if row is not None and (passages := _parsed(row[0])) is not None:
                    found[text] = passages
        return found

    def put(self, memory: str, revision: int, found: Mapping[str, Sequence[Passage]]) -> None:
        """Stores entries, and deletes those of earlier revisions, because passages may have been revoked."""
        rows = [
            (_key(memory, revision, text), memory, revision, _serialized(passages))
            for text, passages in found.items()
        ]
        with self._lock:
            if self._connection is None:
                return
            try:
                if self._forgotten != (memory, revision):
                    self._connection.execute(
                        "DELETE FROM found WHERE memory = ? AND revision < ?", (memory, revision)
                    )
                    self._forgotten = memory, revision
                self._insert(self._connection, rows)
            except sqlite3.Error as error:
                self._failed(error)

    def close(self) -> None:
        with self._lock:
            self._drop()

    def _open(self) -> None:
        self._connection = connection = sqlite3.connect(
            self._path, check_same_thread=False, isolation_level=None
        )
        # may be lost if the machine fails, because it is only a cache
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("PRAGMA journal_mode = MEMORY")
        connection.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
        connection.execute(f"PRAGMA max_page_count = {max(8, self._limit_bytes // _PAGE_BYTES)}")
        connection.execute(_TABLE)
        connection.execute("SELECT key, memory, revision, passages FROM found LIMIT 0")

    def _begin_anew(self) -> None:
        """Starts an empty cache. Its passages will be looked up again."""
        self._drop()
        with suppress(OSError):
            self._path.unlink(missing_ok=True)
        try:
            self._open()
        except sqlite3.Error as error:
            self._give_up(error)

    def _failed(self, error: sqlite3.Error) -> None:
        # an extended error code has the plain one in its last byte
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _BROKEN:
            logger.warning("%s is broken, so it starts empty: %s", self._path, error)
            self._begin_anew()
        else:
            self._give_up(error)

    def _insert(self, connection: sqlite3.Connection, rows: Iterable[tuple[bytes, str, int, bytes]]) -> None:
        for row in rows:
            while True:
                try:
                    connection.execute("INSERT OR REPLACE INTO found VALUES (?, ?, ?, ?)", row)
                    break
                except sqlite3.OperationalError as error:
                    if error.sqlite_errorcode != sqlite3.SQLITE_FULL:
                        raise
                    (count,) = connection.execute("SELECT COUNT(*) FROM found").fetchone()
                    if not count:
                        return
                    connection.execute(
                        "DELETE FROM found WHERE rowid IN (SELECT rowid FROM found ORDER BY rowid LIMIT ?)",
                        (max(1, count // _DROPPED),),
                    )

    def _give_up(self, error: sqlite3.Error) -> None:
        logger.warning(
            "passages are looked up again each time, because %s can't be used: %s", self._path, error
        )
        self._drop()

    def _drop(self) -> None:
        if self._connection is not None:
            with suppress(sqlite3.Error):
                self._connection.close()
        self._connection = None


def _key(memory: str, revision: int, text: str) -> bytes:
    return hashlib.sha256(json.dumps([memory, revision, text]).encode()).digest()


def _serialized(passages: Sequence[Passage]) -> bytes:
    found = [memory_pb2.ProvenPassage(passage=each.message()) for each in passages]
    return zlib.compress(memory_pb2.ReadReply(passages=found).SerializeToString(), 1)


def _parsed(data: bytes) -> list[Passage] | None:
    """None if the data is not what `_serialized` writes."""
    try:
        unpacked = zlib.decompressobj().decompress(data, _LARGEST_ENTRY)
        return [Passage.parse(each.passage) for each in memory_pb2.ReadReply.FromString(unpacked).passages]
    except (DecodeError, WireError, zlib.error):
        return None
