"""Peers that this one has nothing to do with: those named at the start, and those in a file that is read again."""

import logging
from collections.abc import Collection, Iterable
from pathlib import Path

import base58
from hivemind.p2p import PeerID

from peer.errors import SettingsError

logger = logging.getLogger(__name__)

MAX_DENIED = 65_536
_LONGEST_FILE = 8 * 2**20
"""Bytes; of a longer file only these are read."""


class Denylist:
    """One PeerID a line in the file; what follows a `#` is a comment. This peer's owner can add lines at any time."""

    def __init__(self, path: Path | None = None, denied: Collection[str] = ()) -> None:
        """`path`: may not be there yet. Raises SettingsError when one of `denied` is no PeerID."""
        self._path = path
        self._always = frozenset(map(parse_denied, denied))
        self._from_file: frozenset[PeerID] = frozenset()
        self._stamp: tuple[int, int] | None = None
        self.reread()

    def __contains__(self, peer_id: object) -> bool:
        return peer_id in self._always or peer_id in self._from_file

    def __len__(self) -> int:
        return len(self._always | self._from_file)

    def reread(self) -> bool:
        """Reads the file if it has changed. Says whether it has. A file that can't be read changes nothing."""
        if self._path is None:
            return False
        try:
            status = self._path.stat()
            stamp = status.st_mtime_ns, status.st_size
            if stamp == self._stamp:
                return False
            with self._path.open(encoding="utf-8", errors="replace") as file:
                lines = file.read(_LONGEST_FILE).splitlines()
        except FileNotFoundError:
            changed = self._stamp is not None
            self._from_file, self._stamp = frozenset(), None
            return changed
        except OSError as error:
            logger.warning("can't read the denylist %s: %s", self._path, error.strerror)
            return False
        self._stamp = stamp
        self._from_file = frozenset(self._parsed(lines))
        return True

    def _parsed(self, lines: Iterable[str]) -> Iterable[PeerID]:
        count = 0
        for number, line in enumerate(lines, 1):
            text = line.partition("#")[0].strip()
            if not text:
                continue
            count += 1
            if count > MAX_DENIED:
                logger.warning("%s: only the first %d peers are denied", self._path, MAX_DENIED)
                return
            try:
                yield parse_denied(text)
            except SettingsError as error:
                logger.warning("%s, line %d: %s", self._path, number, error)


def parse_denied(text: str) -> PeerID:
    """Raises SettingsError."""
    try:
        data = base58.b58decode(text)
    except ValueError:
        data = b""
    if len(data) != 34 or data[:2] != b"\x12\x20":
        raise SettingsError(
            f"{text[:80]!r} is no PeerID: `talkoot status --json` shows those of a swarm's peers"
        )
    return PeerID(data)
