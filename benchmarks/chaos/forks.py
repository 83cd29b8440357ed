"""Peers that are forked from a process which has imported all that they need, and nothing else.

Each is a process of its own, as if it had been started by the command. But ten starts cost a second instead of half a
minute.
"""

import asyncio
import ctypes
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from benchmarks.chaos import attacks
from talkoot.demo.processes import DemoProcess, Hear

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["benchmarks.chaos.attacks", "talkoot.node.launch", "talkoot.train.session"])
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "GRPC_VERBOSITY": "ERROR"}
"""What torch and gRPC read when they are imported."""
_PR_SET_PDEATHSIG = 1
_LOOK_EVERY_S = 0.02


class _Fork:
    """What `DemoProcess` needs of a process."""

    def __init__(
        self, process: BaseProcess, stdout: asyncio.StreamReader, pipe: asyncio.ReadTransport
    ) -> None:
        assert process.pid is not None, "it has been started"
        self.pid: int = process.pid
        self.stdout = stdout
        self._process = process
        self._pipe = pipe

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    async def wait(self) -> int:
        while (status := self.returncode) is None:  # noqa: ASYNC110  # it sets no event
            await asyncio.sleep(_LOOK_EVERY_S)
        self._pipe.close()
        return status


async def start(
    name: str, arguments: Sequence[str], folder: Path, hear: Hear, environment: Mapping[str, str]
) -> DemoProcess:
    """As `DemoProcess.start`, but runs `attacks.main` with the arguments."""
    errors = folder / f"{name}.log"
    reading, writing = _FORKS.Pipe(duplex=False)
    os.environ.update(_ENVIRONMENT)  # the process that all are forked from starts with the first
    process = _FORKS.Process(target=_run, args=(writing, errors, arguments, dict(environment)), daemon=True)
    process.start()
    writing.close()
    stdout = asyncio.StreamReader()
    with reading:
        pipe, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stdout), os.fdopen(os.dup(reading.fileno()), "rb")
        )
    return DemoProcess(name, _Fork(process, stdout, pipe), errors, hear)


def _run(writing: Connection, errors: Path, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """In the new process."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setpgid(0, 0)  # Ctrl-C is for its parent
    with errors.open("wb") as file:
        os.dup2(writing.fileno(), 1)
        os.dup2(file.fileno(), 2)
    writing.close()
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", 1, closefd=False)
    os.environ.update(environment)
    tempfile.tempdir = str(errors.parent)
    attacks.main(arguments)
