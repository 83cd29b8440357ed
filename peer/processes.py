"""Child processes that never outlive their parent, and the sockets that killed processes leave behind."""

import contextlib
import os
import re
import resource
import shutil
import socket
import stat
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil

_PREFIX = "talkoot-sockets-"
"""Of a folder's name. The process id and a random word follow."""
_PROCESS_ID = re.compile(r"[0-9]{1,9}")
_LONGEST_PARENT = 40
"""Bytes. A unix socket's path has at most 107, and its own folder and name need the rest."""

# Runs in a fresh interpreter, which then becomes the child. It asks the kernel for SIGKILL when the parent ends
# (PR_SET_PDEATHSIG = 1), and checks that the parent has not ended already. macOS has no prctl. A separate process group
# keeps Ctrl-C from the child: only the parent gets it, which still needs the child in order to leave properly.
_DIE_WITH_PARENT = (
    "import ctypes,os,sys;"
    "libc=ctypes.CDLL(None);"
    "hasattr(libc,'prctl') and libc.prctl(1,9) and sys.exit('prctl failed');"
    "os.getppid()==int(sys.argv[1]) or sys.exit(1);"
    "os.setpgid(0,0);"
    "os.execv(sys.argv[2],sys.argv[2:])"
)


def die_with_parent(arguments: Sequence[str]) -> list[str]:
    """The command line that runs `arguments` as a child that the kernel kills when this process ends in any way.

    On macOS the child has to notice by itself, as p2pd does: it ends when its client's connection does.
    """
    return [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *arguments]


def raise_descriptor_limit() -> None:
    """Lets this process and its children have as many open files and connections as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # macOS names no number
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def private_socket_folder() -> "tempfile.TemporaryDirectory[str]":
    """A new folder for unix sockets that only this user can enter, whatever the umask. Its owner removes it."""
    parent = Path(tempfile.gettempdir())
    if len(os.fsencode(parent)) > _LONGEST_PARENT:
        parent = Path("/tmp")  # noqa: S108  # the folder itself has an unpredictable name
    return tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{os.getpid()}-", dir=parent)


def sweep_socket_folders() -> None:
    """Removes the socket folders of this user's processes that were killed."""
    for parent in {Path(tempfile.gettempdir()), Path("/tmp")}:  # noqa: S108  # where the others may be
        for folder in parent.glob(f"{_PREFIX}*"):
            number = folder.name.removeprefix(_PREFIX).partition("-")[0]
            if _PROCESS_ID.fullmatch(number) and not psutil.pid_exists(int(number)):
                with contextlib.suppress(OSError):
                    _remove_dead(folder)


def _remove_dead(folder: Path) -> None:
    """Only a folder of this user in which nothing but dead sockets is. Others live in another process namespace."""
    about = folder.lstat()
    if stat.S_ISDIR(about.st_mode) and about.st_uid == os.geteuid():
        paths = list(folder.iterdir())
        if all(path.is_socket() and _is_unbound(path) for path in paths):
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
