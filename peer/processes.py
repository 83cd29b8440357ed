"""Child processes that never outlive their parent, what killed ones leave, and state folders for one process."""

import contextlib
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

_SOCKET_FOLDER = Path("/tmp")  # noqa: S108  # hivemind puts its sockets there, whatever TMPDIR says
_LONGEST_FOLDER = 55
"""Bytes: of the 107 that a unix socket's path may have, what its folder of its own and its name leave."""

# Runs between fork and exec of the child, in an interpreter of its own: asks the kernel for SIGKILL when the parent
# ends (PR_SET_PDEATHSIG = 1), and looks whether it has ended already. A process group of its own keeps Ctrl-C from the
# child: the parent gets it, and still needs the child to leave in order.
_DIE_WITH_PARENT = (
    "import ctypes,os,sys;"
    "ctypes.CDLL(None).prctl(1,9)==0 or sys.exit('prctl failed');"
    "os.getppid()==int(sys.argv[1]) or sys.exit(1);"
    "os.setpgid(0,0);"
    "os.execv(sys.argv[2],sys.argv[2:])"
)


def die_with_parent(arguments: Sequence[str]) -> list[str]:
    """The command line that runs `arguments` so that the kernel kills it when this process ends, however it ends."""
    return [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *arguments]


def sweep_dead_sockets() -> None:
    """Removes the unix sockets of hivemind processes that were killed: nobody holds them any more."""
    for path in _SOCKET_FOLDER.glob("hivemind-p2p*.sock"):
        if _is_unbound(path):
            path.unlink(missing_ok=True)


def socket_folder() -> Path:
    """Where folders of unix sockets go: with the temporary files, or in /tmp when that makes their paths too long."""
    folder = Path(tempfile.gettempdir())
    return folder if len(os.fsencode(folder)) <= _LONGEST_FOLDER else _SOCKET_FOLDER


def sweep_dead_folders(prefix: str) -> None:
    """Removes folders of unix sockets whose names end with the number of a process that is no more, and a word."""
    for folder in socket_folder().glob(f"{prefix}*"):
        number = folder.name.removeprefix(prefix).partition("-")[0]
        if number.isdecimal() and not Path(f"/proc/{number}").exists():
            with contextlib.suppress(OSError):  # it may be another user's
                if all(map(_is_unbound, folder.iterdir())):  # else of another process namespace
                    shutil.rmtree(folder)


def _is_unbound(path: Path) -> bool:
    """Whether nobody has a unix stream socket, in another network namespace either, which /proc does not show.

    A datagram socket can't connect to one that somebody has, so who listens there is not disturbed.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        probe.settimeout(0.2)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return True
        except OSError:
            return False  # not ours to judge
    return False
