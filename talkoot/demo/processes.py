"""The demo's processes: each runs a `talkoot` command that reports its progress in JSON lines."""

import asyncio
import contextlib
import json
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from peer.errors import StartError
from peer.platform.processes import CHILD_FLAGS, ask_to_end, die_with_parent

_LEAVES_WITHIN_S = 10.0
_LINES_SHOWN = 8
_LONGEST_LINE = 2**24
"""In bytes. The status of a swarm is one line."""
_TALKOOT = ("-m", "talkoot")
_CODE = re.compile(r" \[T[0-9]{3}\]$")

Hear = Callable[["DemoProcess", Mapping[str, Any] | None], None]
"""Called with each JSON line of a process, and with None when it has ended."""


class DemoProcesses:
    """All processes of the demo. Stop them when done."""

    def __init__(self, folder: Path, on_event: Callable[["DemoProcess", Mapping[str, Any]], None]) -> None:
        """`on_event` is called with each JSON line of each process. Log lines go to files in `folder`."""
        self._folder = folder
        self._on_event = on_event
        self._changed = asyncio.Event()
        self._all: list[DemoProcess] = []

    async def start(
        self,
        name: str,
        arguments: Sequence[str],
        program: Sequence[str] = _TALKOOT,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> "DemoProcess":
        """Runs `talkoot` with the arguments, or another Python `program`. `environment`: variables in addition to this
        process's.
        """
        process = await DemoProcess.start(name, (*program, *arguments), self._folder, self._hear, environment)
        self._all.append(process)
        return process

    async def until(self, condition: Callable[[], bool], limit_s: float, awaited: str) -> None:
        """Waits for a condition on the events so far. Raises StartError if a process fails or the time is up."""
        try:
            async with asyncio.timeout(limit_s):
                while not condition():
                    self._changed.clear()
                    await self._changed.wait()
                    for process in self._all:
                        if process.exit_status and not process.killed:
                            raise process.failure()
        except TimeoutError:
            raise StartError(
                f"waited {limit_s:.0f} s for {awaited}: is this machine busy with other work?"
            ) from None

    async def stop(self) -> None:
        """Ends all of them at once. Stopping twice is harmless."""
        await asyncio.gather(*(process.stop() for process in self._all))

    def _hear(self, process: "DemoProcess", event: Mapping[str, Any] | None) -> None:
        if event is not None:
            self._on_event(process, event)
        self._changed.set()


class DemoProcess:
    """A `talkoot` command in a process of its own, which ends when this process ends in any way."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, errors: Path, hear: Hear) -> None:
        """Reads the process's output from now on, on the running loop."""
        self.name = name
        self.pid: int = process.pid
        self.killed = False
        self._process = process
        self._errors = errors
        self._reading = asyncio.create_task(self._read(hear))

    @classmethod
    async def start(
        cls, name: str, arguments: Sequence[str], folder: Path, hear: Hear, environment: Mapping[str, str]
    ) -> Self:
        """Runs Python with the arguments."""
        errors = folder / f"{name.replace(' ', '-')}.log"
        command = die_with_parent([sys.executable, "-P", *arguments])
        with errors.open("wb") as file:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=file,
                limit=_LONGEST_LINE,
                creationflags=CHILD_FLAGS,
                # one thread each, because pools on few cores wait for each other; torch's caches go when the demo ends
                env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder), **environment},
            )
        return cls(name, process, errors, hear)

    @property
    def exit_status(self) -> int | None:
        """None while the process runs."""
        return self._process.returncode

    def kill(self) -> None:
        """Ends the process at once, so that it can't leave in an orderly way."""
        self.killed = True
        self._process.kill()

    def failure(self) -> StartError:
        """Why it ended early, with its last lines."""
        with self._errors.open(errors="replace") as file:
            lines = [line.strip() for line in deque(file, _LINES_SHOWN)]
        said = [_message(line) for line in lines if line]
        clear = [line for line in said if line.startswith("error: ")]
        reason = clear[-1].removeprefix("error: ") if clear else " | ".join(said) or "no output"
        reason = _CODE.sub("", reason)  # this error has its own code
        return StartError(f"{self.name} ended early with exit status {self.exit_status}: {reason}")

    async def stop(self) -> None:
        """Asks the process to leave, and kills it if it does not. Stopping twice is harmless."""
        if self.exit_status is None:
            with contextlib.suppress(ProcessLookupError):
                ask_to_end(self.pid)
            try:
                async with asyncio.timeout(_LEAVES_WITHIN_S):
                    await self._process.wait()
            except TimeoutError:
                self.kill()
        await self._reading

    async def _read(self, hear: Hear) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            hear(self, json.loads(line))
        await self._process.wait()
        hear(self, None)


def _message(line: str) -> str:
    """The message of a JSON log line; any other line as it is."""
    try:
        values = json.loads(line)
    except ValueError:
        return line
    return str(values.get("message", line)) if isinstance(values, dict) else line
