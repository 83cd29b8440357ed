"""`talkoot logs`: prints what a node logged, and follows its log file while it is rotated."""

import os
import time
from pathlib import Path
from typing import IO

from peer.errors import DataError
from talkoot.terminal import Terminal
from talkoot.node.control import LOG_FILE, node_folder

_LOOK_EVERY_S = 0.2


class Follower:
    """Reads the lines of a log file that grows and is rotated: first those that are there, then the new ones."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        self._rest = b""

    def lines(self) -> list[str]:
        """The lines that were completed since the last call."""
        data = b"" if self._file is None else self._file.read()
        if not self._is_current():
            self.close()
            try:
                self._file = self._path.open("rb")
            except FileNotFoundError:
                pass  # between the two steps of a rotation
            else:
                data += self._file.read()
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [_printable(line.decode(errors="backslashreplace")) for line in lines]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _is_current(self) -> bool:
        """Whether the open file is still the one that has the name."""
        if self._file is None:
            return False
        try:
            named = self._path.stat()
        except FileNotFoundError:
            return False
        opened = os.fstat(self._file.fileno())
        return (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)


def run_logs(terminal: Terminal, state: Path | None, count: int, *, follow: bool) -> None:
    """Prints the last `count` lines. Raises DataError when there is no log, or it can't be read."""
    path = node_folder(state) / LOG_FILE
    if not path.exists():
        raise DataError(
            f"no file {path}: a node writes it when it starts; pass the --state that it was started with"
        )
    follower = Follower(path)
    try:
        lines = follower.lines()
        if len(lines) < count:
            lines = _older_lines(path) + lines
        _print(terminal, lines[-count:] if count else [])
        while follow:
            time.sleep(_LOOK_EVERY_S)
            _print(terminal, follower.lines())
    except OSError as error:
        raise DataError(
            f"can't read {path}: {error.strerror}; run this as the user whose node it is"
        ) from error
    finally:
        follower.close()


def _older_lines(path: Path) -> list[str]:
    rotated = Follower(path.with_name(f"{path.name}.1"))
    try:
        return rotated.lines()
    finally:
        rotated.close()


def _print(terminal: Terminal, lines: list[str]) -> None:
    if lines:
        terminal.line("\n".join(lines))


def _printable(line: str) -> str:
    """Log lines quote what peers said, which must not steer a terminal."""
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() or c == "\t" else ascii(c)[1:-1] for c in line)
