"""Child processes that never outlive their parent, and the sockets that killed processes leave behind."""

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
"""Bytes. A unix socket's path has at most 107, and its own folder and name need the rest."""

# Runs in a fresh interpreter, which then becomes the child. It asks the kernel for SIGKILL when the parent ends
# (PR_SET_PDEATHSIG = 1), and checks that the parent has not ended already. A separate process group keeps Ctrl-C from
# the child: only the parent gets it, which still needs the child in order to leave properly.
_DIE_WITH_PARENT = (
    "import ctypes,os,sys;"
    "ctypes.CDLL(None).prctl(1,9)==0 or sys.exit('prctl failed');"
    "os.getppid()==int(sys.argv[1]) or sys.exit(1);"
    "os.setpgid(0,0);"
    "os.execv(sys.argv[2],sys.argv[2:])"
)


def die_with_parent(arguments: Sequence[str]) -> list[str]:
    """The command line that runs `arguments` as a child that the kernel kills when this process ends in any way."""
    return [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *arguments]


def sweep_dead_sockets() -> None:
    """Removes the unix sockets that hivemind left when its process was killed."""
    for path in _SOCKET_FOLDER.glob("hivemind-p2p*.sock"):
        if _is_unbound(path):
            path.unlink(missing_ok=True)


def socket_folder() -> Path:
    """The folder for folders of unix sockets: the temporary folder, or /tmp if that makes their paths too long."""
    folder = Path(tempfile.gettempdir())
    return folder if len(os.fsencode(folder)) <= _LONGEST_FOLDER else _SOCKET_FOLDER


def sweep_dead_folders(prefix: str) -> None:
    """Removes folders of unix sockets named `<prefix><process id>-<word>`, if that process has ended."""
    for folder in socket_folder().glob(f"{prefix}*"):
        number = folder.name.removeprefix(prefix).partition("-")[0]
        if number.isdecimal() and not Path(f"/proc/{number}").exists():
            with contextlib.suppress(OSError):  # it may belong to another user
                if all(
                    map(_is_unbound, folder.iterdir())
                ):  # otherwise it belongs to another process namespace
                    shutil.rmtree(folder)


def _is_unbound(path: Path) -> bool:
    """Whether no process holds a unix stream socket, even in another network namespace, which /proc would not show.

    The probe is a datagram socket. It can't connect to a stream socket, so it does not disturb a listener.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        probe.settimeout(0.2)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return True
        except OSError:
            return False  # unknown
    return False
