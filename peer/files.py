"""Files that are whole or not there, whatever happens to the writer."""

import os
from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Writes under another name (`.NAME.new`), syncs, and renames: who reads the file never sees half of it.

    `mode`: what the file may be used for at most, less what the umask takes. Raises OSError; what was there stays then.
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
        path.unlink()  # what a killed writer left: it may be readable for more
        return os.open(path, flags, mode)


def sync_folder(folder: Path) -> None:
    """Makes what was renamed or made in a folder last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
