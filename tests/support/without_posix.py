"""Runs `talkoot` on Linux as if Python had no more than it has on Windows.

    python without_posix.py node --new swarm.toml …

There is no uvloop, no p2pd, no module and no function that only POSIX has, and the loop has what Windows' has. The code
of `peer.platform` takes its branches for Windows; the few functions of Windows that these call are stood in for. Only
`socket.AF_UNIX` stays, because gRPC's poller for Linux needs it.
"""

import ast
import asyncio
import ctypes
import fcntl
import importlib.machinery
import importlib.util
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import CodeType, ModuleType, SimpleNamespace
from typing import Any

ABSENT = {
    os: (
        "O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "O_PATH", "chown", "fchmod", "fchown",
        "fork", "forkpty", "getegid", "geteuid", "getgid", "getloadavg", "getpgid", "getpgrp", "getuid",
        "killpg", "lockf", "mkfifo", "nice", "pidfd_open", "posix_fallocate", "posix_spawn", "pread",
        "preadv", "pwrite", "sched_getaffinity", "sched_setaffinity", "setpgid", "setsid", "setuid",
        "sysconf", "uname", "wait3", "wait4",
    ),
    signal: (
        "SIGALRM", "SIGCHLD", "SIGCONT", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGQUIT", "SIGSTOP", "SIGUSR1",
        "SIGUSR2", "alarm", "pause", "pthread_kill", "pthread_sigmask", "setitimer", "sigpending",
        "sigtimedwait", "sigwait", "siginterrupt",
    ),
    time: (
        "CLOCK_BOOTTIME", "CLOCK_MONOTONIC", "CLOCK_MONOTONIC_RAW", "CLOCK_REALTIME", "clock_gettime",
        "tzset",
    ),
    asyncio: (
        "open_unix_connection", "start_unix_server",
    ),
    select: (
        "poll",
    ),
}  # fmt: skip
"""What Python has only on Linux, or only on Linux and macOS."""
ABSENT_MODULES = ("fcntl", "grp", "hivemind", "pwd", "resource", "syslog", "termios", "tty", "uvloop")
_IMPORTED_BEFORE = (
    "grpc.aio",
    "multiprocessing",
    "platformdirs",
    "psutil",
    "rich.live",
    "torch",
    "typer.testing",
    "uvicorn",
)
"""Modules of other packages that must see the machine as it is."""


class Loop(asyncio.SelectorEventLoop):
    """A loop without the methods that Windows' default loop lacks."""

    def _absent(self, *_: object, **__: object) -> Any:
        raise NotImplementedError

    add_reader = add_writer = _absent
    add_signal_handler = remove_signal_handler = _absent
    create_unix_connection = create_unix_server = _absent


class _WindowsBranches(importlib.machinery.SourceFileLoader):
    """Compiles a module with `sys.platform` replaced by its value on Windows."""

    def get_code(self, fullname: str) -> CodeType:
        tree = _Constants().visit(ast.parse(self.get_data(self.path)))
        return compile(ast.fix_missing_locations(tree), self.path, "exec")

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        made: Any = module
        if hasattr(made, "ctypes"):
            made.ctypes = SimpleNamespace(**vars(ctypes), WinDLL=lambda name, use_last_error: _Kernel())


class _Constants(ast.NodeTransformer):
    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        if ast.unparse(node) == "sys.platform":
            return ast.copy_location(ast.Constant("win32"), node)
        self.generic_visit(node)
        return node


class _Finder:
    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith("peer.platform."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        assert spec is not None
        assert spec.origin is not None
        spec.loader = _WindowsBranches(name, spec.origin)
        return spec


def pretend(before: Sequence[str] = _IMPORTED_BEFORE) -> None:
    """Pretends from now on. No module of Talkoot may have been imported; `before`: other modules that must be imported
    first.
    """
    assert not any(name.partition(".")[0] in {"peer", "talkoot"} for name in sys.modules)
    for name in before:
        importlib.import_module(name)
    _stand_in_for_windows()
    for module, names in ABSENT.items():
        for name in names:
            delattr(module, name)
    for name in ABSENT_MODULES:
        sys.modules[name] = None  # type: ignore[assignment]  # as the import system documents it
    asyncio.new_event_loop = Loop
    sys.meta_path.insert(0, _Finder)


def _stand_in_for_windows() -> None:
    locks: Any = ModuleType("msvcrt")
    flock, exclusively = fcntl.flock, fcntl.LOCK_EX | fcntl.LOCK_NB

    def locking(descriptor: int, mode: int, size: int) -> None:
        try:
            flock(descriptor, exclusively)
        except BlockingIOError as error:
            raise PermissionError(error.errno, error.strerror) from error

    locks.locking, locks.LK_NBLCK = locking, 2
    sys.modules["msvcrt"] = locks
    system: Any = os
    system.O_BINARY = 0
    if sys.version_info >= (3, 13):
        system.process_cpu_count = os.cpu_count  # Linux's uses a function that is absent
    folders: Any = shutil
    folders._use_fd_functions = False
    if sys.version_info >= (3, 14):
        folders._rmtree_impl = folders._rmtree_unsafe  # it has looked before
    os.environ["USERNAME"] = "somebody"  # or getpass asks `pwd`
    signals: Any = signal
    signals.SIGBREAK, signals.CTRL_BREAK_EVENT = signal.SIGUSR2, signal.SIGUSR2
    processes: Any = subprocess
    processes.CREATE_NEW_PROCESS_GROUP = 0  # POSIX takes no other flags
    import psutil

    found: Any = psutil
    found.IDLE_PRIORITY_CLASS, found.BELOW_NORMAL_PRIORITY_CLASS = 19, 10
    found.Process.num_handles = found.Process.num_fds


class _Kernel:
    """Stands for kernel32.dll: all calls succeed."""

    def __getattr__(self, name: str) -> Any:
        def succeed(*_: object) -> int:
            return 1

        setattr(self, name, succeed)
        return succeed


if __name__ == "__main__":
    sys.path = [path for path in sys.path if path != os.path.dirname(os.path.abspath(__file__))]
    pretend()
    from talkoot.cli import main

    main()
