"""A folder that this process may not look into, even if it is root's."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NOBODY = 65534


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Closes the folder, and lets this process be nobody if it is root: nothing is closed to root."""
    me = os.geteuid()
    folder.chmod(0)
    try:
        if me == 0:
            os.seteuid(NOBODY)
        yield
    finally:
        os.seteuid(me)
        folder.chmod(0o700)
