"""Child processes that never outlive their parent, and state folders that one process uses at a time."""

import fcntl
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from peer.errors import StartError

# Runs between fork and exec of the child, in an interpreter of its own: asks the kernel for SIGKILL when the parent
# ends (PR_SET_PDEATHSIG = 1), and looks whether it has ended already.
_DIE_WITH_PARENT = (
    "import ctypes,os,sys;"
    "ctypes.CDLL(None).prctl(1,9)==0 or sys.exit('prctl failed');"
    "os.getppid()==int(sys.argv[1]) or sys.exit(1);"
    "os.execv(sys.argv[2],sys.argv[2:])"
)


def die_with_parent(arguments: Sequence[str]) -> list[str]:
    """The command line that runs `arguments` so that the kernel kills it when this process ends, however it ends."""
    return [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *arguments]


class StateFolder:
    """A peer's folder on disk, held by one process at a time; the kernel lets go of it when the process ends."""

    def __init__(self, path: Path) -> None:
        """Raises StartError when the folder can't be used or another process uses it."""
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock: IO[str] = (path / "lock").open("w")
        except OSError as error:
            raise StartError(
                f"can't use the state folder {path}: {error.strerror}; pass another --state"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise StartError(
                f"another process uses the state folder {path}: stop it, or pass another --state"
            ) from None

    def close(self) -> None:
        self._lock.close()
