"""Atomic file writes, and a state folder that one process locks and no other user can write to."""

import errno
import logging
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from peer.errors import RecordError, StateFolderError
from peer.platform.files import lock, open_plainly, sync_folder, user_id

logger: logging.Logger = logging.getLogger(__name__)

_NOTHING_THERE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EINVAL}
"""The last one: Windows says so of a name with a `*`."""

T = TypeVar("T")


class StateFolder:
    """A peer's folder on disk, locked by one process at a time. The kernel frees the lock when the process ends."""

    def __init__(self, path: Path, option: str = "--state") -> None:
        """`option`: the one that chooses the folder, for errors. Raises StateFolderError if the folder can't be used,
        others can write to it, or this process or another uses it.
        """
        self.path = path
        try:
            require_folder(path, option)
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            _protect(path, option)
            for inner in path.iterdir():
                if inner.is_dir() and not inner.is_symlink():
                    _protect(inner, option)
            self._lock = os.fdopen(open_plainly(path / "lock", os.O_WRONLY | os.O_CREAT), "wb")
        except OSError as error:
            raise StateFolderError(
                f"can't use the state folder {path}: {error.strerror}; pass another {option}"
            ) from error
        try:
            lock(self._lock.fileno())
        except BlockingIOError:
            self._lock.close()
            message = f"another process uses the state folder {path}: stop it, or pass another {option}"
            raise StateFolderError(message, is_in_use=True) from None

    def close(self) -> None:
        self._lock.close()


class PlainFile:
    """A file that is read part by part, and kept closed in between. For any thread."""

    def __init__(self, path: Path) -> None:
        """Raises OSError if it can't be opened, or is a link or a pipe."""
        self.path = path
        descriptor, self.identity = self._open()
        """`identity` differs for another file of the same name."""
        os.close(descriptor)
        self.size: int = self.identity[2]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, part: slice, /) -> bytes:
        """Raises OSError, as `read_into` does."""
        start, end, step = part.indices(self.size)
        assert step == 1, "only what lies together is read"
        data = bytearray(max(0, end - start))
        self.read_into(memoryview(data), start)
        return bytes(data)

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Fills the buffer, whose items are bytes. Raises OSError, also if another file now has this name."""
        try:
            descriptor, identity = self._open()
            with os.fdopen(descriptor, "rb", buffering=0) as file:
                if identity != self.identity:
                    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
                file.seek(start)
                left = buffer
                while left:
                    count = file.readinto(left)
                    if not count:
                        raise OSError(errno.EIO, "it ends too early")
                    left = left[count:]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def _open(self) -> tuple[int, tuple[int, int, int]]:
        descriptor = open_plainly(self.path, os.O_RDONLY)
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "it is not a plain file", str(self.path))
        return descriptor, (about.st_ino, about.st_mtime_ns, about.st_size)


def kind_of(path: Path) -> int | None:
    """The kind of what is there, such as `stat.S_IFREG` or `stat.S_IFDIR`; None: nothing, or a link that leads nowhere.
    Raises OSError if this user may not know, unlike `Path.exists` and its like from Python 3.14 on.
    """
    try:
        return stat.S_IFMT(path.stat().st_mode)
    except OSError as error:
        if error.errno not in _NOTHING_THERE:
            raise
    except ValueError:  # no name contains a zero
        pass
    return None


def require_folder(path: Path, option: str = "--state") -> None:
    """Raises StateFolderError if something else than a folder is there."""
    if os.path.exists(path) and not path.is_dir():
        raise StateFolderError(
            f"can't use the state folder {path}: it is not a folder; pass another {option}"
        )


def _protect(folder: Path, option: str) -> None:
    """Makes this user's folder writable for nobody else. Raises StateFolderError if others can still write to it, and
    OSError.
    """
    about, me = folder.stat(), user_id()
    if me is None:
        return
    if {about.st_uid, folder.lstat().st_uid} - {me, 0}:
        raise StateFolderError(f"the state folder {folder} belongs to another user: pass another {option}")
    others = stat.S_IMODE(about.st_mode) & 0o022
    if not others:
        return
    if about.st_uid == me:
        folder.chmod(stat.S_IMODE(about.st_mode) & ~0o022)
    elif others & stat.S_IWOTH:  # a group that root gave the folder may contain this user alone
        raise StateFolderError(
            f"every user can write to the state folder {folder}: pass a new folder inside it as {option}"
        )
    # anybody who could write here may have planted something before
    for path in folder.iterdir():
        if path.is_symlink() or path.lstat().st_uid not in {me, 0}:
            raise StateFolderError(
                f"other users could write to the state folder {folder}, and {path.name!r} there may be theirs: "
                f"remove it, or pass another {option}"
            )


def write_atomically(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Writes to a temporary file (`.NAME.new`), syncs it and renames it, so that no reader sees a partial file.

    `mode`: the file's permissions before the umask. If it raises OSError, the old file is still there.
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


def sweep(folder: Path) -> None:
    """Removes the temporary files that killed writers left in a folder, as far as it can."""
    for path in folder.glob(".*.new"):
        with suppress(OSError):
            path.unlink()


def read_state_file(path: Path, most_bytes: int, parse: Callable[[bytes], T], lost: str) -> T | None:
    """The result of `parse`, which raises ValueError or RecordError. None if the file is missing or broken.

    `lost`: what it means that the file is broken, for the log.
    """
    try:
        with path.open("rb") as file:
            return parse(file.read(most_bytes))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecordError) as error:
        logger.warning("%s can't be read, so %s: %s", path, lost, str(error).split("\n")[0])
        return None


def write_state_file(path: Path, data: bytes, lost: str) -> bool:
    """Writes atomically, and makes the folder. Returns whether that was possible. A full disk only causes a warning.

    `lost`: what it means that the file could not be written, for the log.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(path, data)
    except OSError as error:
        logger.warning("could not write %s: %s; %s", path, error.strerror or error, lost)
        return False
    return True


def _open_new(path: Path, mode: int) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        return os.open(path, flags, mode)
    except FileExistsError:
        path.unlink()  # left by a killed writer, perhaps with wider permissions
        return os.open(path, flags, mode)
