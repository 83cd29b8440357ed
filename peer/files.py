"""Atomic file writes, and a state folder that one process locks."""

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from typing import IO

from peer.errors import StateFolderError


class StateFolder:
    """A peer's folder on disk, locked by one process at a time. The kernel frees the lock when the process ends."""

    def __init__(self, path: Path) -> None:
        """Raises StateFolderError if the folder can't be used or another process uses it."""
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock: IO[str] = (path / "lock").open("w")
        except OSError as error:
            raise StateFolderError(
                f"can't use the state folder {path}: {error.strerror}; pass another --state"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise StateFolderError(
                f"another process uses the state folder {path}: stop it, or pass another --state"
            ) from None

    def close(self) -> None:
        self._lock.close()


def write_atomically(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Writes to a temporary file (`.NAME.new`), syncs it and renames it, so that no reader sees a partial file.

    `mode`: the file's permissions before the umask. Raises OSError, and then leaves the old file.
    """
    temporary = path.with_name(f".{path.name}.new")
    try:
        with os.fdopen(_open_new(temporary, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _open_new(path: Path, mode: int) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        return os.open(path, flags, mode)
    except FileExistsError:
        path.unlink()  # left by a killed writer, and perhaps with wider permissions
        return os.open(path, flags, mode)


def sync_folder(folder: Path) -> None:
    """Makes new and renamed entries of a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
