"""Locks, owners and links of files, and outputs that nobody reads any more."""

import errno
import os
import sys
import time
from pathlib import Path

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

CAN_UNLINK_OPEN_FILES = sys.platform != "win32"
_TRY_EVERY_S = 0.05


def lock(descriptor: int) -> None:
    """Locks a file until it is closed or the process ends. Raises BlockingIOError while another process has it."""
    if sys.platform == "win32":
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError(error.errno, error.strerror) from error
    else:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def wait_for_lock(descriptor: int, deadline_s: float) -> None:
    """Locks a file as soon as no other process has it locked. Raises BlockingIOError at the deadline."""
    deadline = time.monotonic() + deadline_s
    while True:
        try:
            return lock(descriptor)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
        time.sleep(_TRY_EVERY_S)


def user_id() -> int | None:
    """This process's user id, as `stat` gives the owners of files. None on Windows, where access lists keep
    others out.
    """
    if sys.platform == "win32":
        return None
    return os.geteuid()


def open_plainly(path: Path, flags: int, mode: int = 0o600) -> int:
    """Opens a file that is not a link, for names that others may have redirected. Opening a pipe never blocks.

    Raises OSError.
    """
    if sys.platform == "win32":
        if path.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        return os.open(path, flags | os.O_BINARY, mode)
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, mode)


def nobody_reads(error: OSError, was_terminal: bool) -> bool:
    """Whether an output could not be written because the program that read it has ended, or its terminal is closed.

    Windows reports a pipe without a reader as an invalid argument.
    """
    if isinstance(error, BrokenPipeError):
        return True
    if sys.platform == "win32":
        return error.errno == errno.EINVAL
    return was_terminal and error.errno == errno.EIO


def sync_folder(folder: Path) -> None:
    """Makes new and renamed entries of a folder survive a power cut. Windows syncs no folders."""
    if sys.platform != "win32":
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
