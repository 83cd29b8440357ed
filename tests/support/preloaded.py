"""Starts Python programs in child processes that have imported torch already.

A fresh interpreter takes two seconds of processor time to import torch, and another for gRPC and Talkoot, and the tests
start hundreds of programs. So each process of tests has a server that imports what they need, and forks for each
program. The new process takes its arguments, environment, folder and streams from the request, and runs what a fresh
interpreter would run. It is a child of the process of tests, and ends with it.

Tests of what a program imports, and of how it looks to the system, start a fresh interpreter.
"""

import atexit
import ctypes
import gc
import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import IO, Any

_MODULES = (
    *("torch", "numpy", "scipy.stats", "safetensors.torch"),  # for programs that are not of Talkoot
    *("talkoot.cli", "talkoot.node.launch", "talkoot.train.generate", "talkoot.train.session"),
    *("talkoot.dashboard.server", "talkoot.serve.server", "talkoot.memory.search", "talkoot.status"),
    *("peer.transport.p2pd", "uvicorn.protocols.http.h11_impl"),
)
"""What commands import."""
_QUIET = {"GRPC_VERBOSITY": "ERROR", "GRPC_ENABLE_FORK_SUPPORT": "false"}
"""What Talkoot sets in the environment before it imports gRPC, which reads it then."""
_ROOT = Path(__file__).parents[2]
_LONGEST_REQUEST = 2**18
_DEADLINE_S = 300.0
"""So long that a machine where twenty programs wait for each core can import everything."""
_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36
"""As linux/prctl.h numbers them."""
_KILL = 9
_NETWORK = 0x40000000
"""CLONE_NEWNET of linux/sched.h."""
_ONE_FORK = threading.Lock()


class Preloaded(subprocess.Popen[Any]):
    """Runs `python WORDS`, where the words begin with `-m MODULE`, `-c CODE` or a file, after `-W ignore` or nothing.
    The other arguments are those of `Popen`.

    It starts a fresh interpreter on systems other than Linux, and with variables in `env` that Python or the loader
    reads when a program starts.
    """

    def __init__(
        self,
        *words: str,
        stdin: int | IO[Any] | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        env: Mapping[str, str] | None = None,
        text: bool | None = None,
        start_new_session: bool = False,
        network: str | None = None,
    ) -> None:
        """`network`: the network namespace of the process, by the name that `ip netns` gives it."""
        self._request: Mapping[str, Any] = {
            "parent": os.getpid(),
            "words": words,
            "environment": dict(os.environ if env is None else env),
            "folder": os.getcwd(),
            "in_new_session": start_new_session,
            "network": network,
        }
        inside = [] if network is None else ["ip", "netns", "exec", network]
        super().__init__(
            [*inside, sys.executable, *words],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env=env,
            text=text,
            start_new_session=start_new_session,
        )

    def _execute_child(self, *arguments: Any) -> None:
        """Stands in for the method of `Popen` that starts the process and sets its pid."""
        if sys.platform != "linux" or not (server := _server()).can_be(self._request["environment"]):
            super()._execute_child(*arguments)  # type: ignore[misc]  # it is not public
            return
        pipes = arguments[10:16]
        streams = [own if end == -1 else end for own, end in enumerate((pipes[0], pipes[3], pipes[5]))]
        try:
            self.pid = server.fork(self._request, streams)
            self._child_created = True
        finally:
            self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]  # the child's ends


def run_preloaded(
    *words: str, env: Mapping[str, str], limit_s: float = _DEADLINE_S
) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end, as `subprocess.run` does, and returns what it printed."""
    pipe = subprocess.PIPE
    with Preloaded(*words, stdout=pipe, stderr=pipe, env=env, text=True) as process:
        try:
            out, err = process.communicate(timeout=limit_s)
        finally:
            process.kill()
    return subprocess.CompletedProcess(words, process.returncode, out, err)


class _Server:
    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(_DEADLINE_S)
        self._read_at_start = _read_at_start(os.environ)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=os.environ
                | {"OMP_NUM_THREADS": "1"},  # read when torch is loaded; tests share the machine
                pass_fds=[theirs.fileno()],
            )

    def can_be(self, environment: Mapping[str, str]) -> bool:
        """Whether its processes are what a program with this environment is."""
        return _read_at_start(environment) == self._read_at_start

    def fork(self, request: Mapping[str, Any], streams: Sequence[int]) -> int:
        """Returns the pid of a new child of this process."""
        prctl = ctypes.CDLL(None).prctl
        with _ONE_FORK:
            prctl(_SET_CHILD_SUBREAPER, 1)
            try:
                socket.send_fds(self._socket, [json.dumps(request).encode()], streams)
                return int(self._socket.recv(32))
            finally:
                prctl(_SET_CHILD_SUBREAPER, 0)

    def close(self) -> None:
        self._socket.close()
        self._process.wait(_DEADLINE_S)


@cache
def _server() -> _Server:
    server = _Server()
    atexit.register(server.close)
    return server


def _read_at_start(environment: Mapping[str, str]) -> dict[str, str]:
    prefixes = ("PYTHON", "LD_", "GRPC_")
    return _QUIET | {name: value for name, value in environment.items() if name.startswith(prefixes)}


def _serve(requests: socket.socket) -> None:
    """Forks for each request. Returns in the processes that it forks."""
    os.environ.update(_QUIET)
    sys.path[0] = str(_ROOT)
    with warnings.catch_warnings(action="ignore"):
        for module in _MODULES:
            importlib.import_module(module)
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would not have the other threads"
    gc.freeze()
    while True:
        message, streams, _, _ = socket.recv_fds(requests, _LONGEST_REQUEST, 3)
        if not message:
            sys.exit()
        if (between := os.fork()) == 0:
            if os.fork():
                os._exit(0)  # so the process of tests inherits the new one
            return _become(json.loads(message), streams, requests)
        os.waitpid(between, 0)
        for stream in streams:
            os.close(stream)


def _become(request: Mapping[str, Any], streams: Sequence[int], requests: socket.socket) -> None:
    """Makes this process what a fresh interpreter would be."""
    deadline = time.monotonic() + _DEADLINE_S
    while os.getppid() != request["parent"]:
        if time.monotonic() > deadline:
            os._exit(1)
        time.sleep(0.001)
    libc = ctypes.CDLL(None)
    libc.prctl(_SET_PDEATHSIG, _KILL)
    requests.send(str(os.getpid()).encode())
    requests.close()
    for own, stream in enumerate(streams):
        os.dup2(stream, own)
        os.close(stream)
    if request["in_new_session"]:
        os.setsid()
    if request["network"] is not None:
        with open(f"/run/netns/{request['network']}") as namespace:
            if libc.setns(namespace.fileno(), _NETWORK):
                sys.exit("setns failed")
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = request["words"]
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  # as long as the process runs
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115


def _run() -> None:
    """Does what the interpreter does with `sys.argv` before a program sees it."""
    if sys.argv[:2] == ["-W", "ignore"]:
        warnings.simplefilter("ignore")
        del sys.argv[:2]
    how = sys.argv[0]
    sys.path[0] = str(Path(how).resolve().parent) if how[0] != "-" else os.getcwd()
    if how == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    elif how == "-c":
        sys.modules["__main__"] = main = ModuleType("__main__")
        exec(compile(sys.argv.pop(1), "<string>", "exec"), main.__dict__)
    else:
        runpy.run_path(how, run_name="__main__")


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
    _run()
