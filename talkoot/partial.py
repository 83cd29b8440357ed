"""Folders that appear complete or not at all: they are written as `NAME.partial`, and moved to their place at
the end.
"""

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Self

from peer.errors import SettingsError, StartError
from peer.platform.files import CAN_UNLINK_OPEN_FILES, lock, open_plainly, sync_folder, user_id

PARTIAL = ".partial"
"""The suffix of a folder that is being written."""
LOCK = "lock"
"""The file that the folder's writer locks."""


class PartialFolder:
    """A folder that one process writes. It still contains what an earlier writer left in it."""

    def __init__(self, path: Path) -> None:
        """`path`: its final place. Raises UserError if something is there, or the folder is in use."""
        require_new(path)
        self.path = path
        self.partial: Path = path.with_name(path.name + PARTIAL)
        """The folder during writing. All files in it become part of the final folder."""
        with naming_failures(path):
            self.partial.mkdir(parents=True, exist_ok=True)
            _require_own(self.partial)
            self._lock = _locked(self.partial)

    def finish(self, *own: str) -> None:
        """Moves the folder to its place, and then removes the lock and the writer's `own` files from it: a writer that
        is killed before leaves what the next one continues with. Raises OSError.
        """
        if not CAN_UNLINK_OPEN_FILES:
            self.close()
        sync_folder(self.partial)
        os.replace(self.partial, self.path)
        for name in (*own, LOCK):
            (self.path / name).unlink()
        for folder in (self.path, self.path.parent):
            sync_folder(folder)
        self.close()

    def close(self) -> None:
        """Leaves the contents for another writer to continue with."""
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def require_new(path: Path) -> None:
    """Raises SettingsError unless the path is free or an empty folder that has a name; and StartError."""
    with naming_failures(path):
        is_empty_folder = path.name and path.is_dir() and not any(path.iterdir())
        if path.is_symlink() or (path.exists() and not is_empty_folder):
            raise SettingsError(f"{path} exists: pass the path of a new or empty folder")


def check_new(path: Path, option: str) -> None:
    """Checks now whether a new folder can be written, rather than at the end. Leaves things as they were. Raises
    UserError.
    """
    require_new(path)
    place = path.with_name(path.name + PARTIAL)
    try:
        while not place.exists():
            place = place.parent
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise StartError(
            f"can't write {path}: {error.strerror or error}; pass another {option} DIR"
        ) from error


@contextmanager
def naming_failures(path: Path) -> Iterator[None]:
    """Turns an OSError into a StartError that names the path."""
    try:
        yield
    except OSError as error:
        raise StartError(
            f"can't write {path}: {error.strerror or error}; fix this, and run the same command again"
        ) from error


def open_for_writing(path: Path) -> BinaryIO:
    """Opens a new file, or empties an existing one. Raises OSError, also if it is a link."""
    return os.fdopen(open_plainly(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), "wb")


def _require_own(folder: Path) -> None:
    """Raises SettingsError unless the folder is empty, or was left by an earlier writer of this user."""
    about = folder.lstat()
    is_own = stat.S_ISDIR(about.st_mode) and user_id() in {None, about.st_uid}
    if not is_own or (any(folder.iterdir()) and not (folder / LOCK).exists()):
        raise SettingsError(
            f"{folder} is not what an earlier run of yours left: remove it, or pass another folder"
        )


def _locked(folder: Path) -> BinaryIO:
    """Raises StartError while another process is writing there."""
    file = open_for_writing(folder / LOCK)
    try:
        lock(file.fileno())
    except BlockingIOError:
        file.close()
        raise StartError(
            f"another process is writing {folder}: wait for it, or pass another folder"
        ) from None
    return file
