"""The demo's processes: each runs a `talkoot` command, and tells in JSON lines what it does."""

import asyncio
import json
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from peer.errors import StartError
from peer.processes import die_with_parent

_LEAVES_WITHIN_S = 10.0
_LINES_SHOWN = 8
_CODE = re.compile(r" \[T[0-9]{3}\]$")


class DemoProcesses:
    """All processes of the demo. Stop them when done."""

    def __init__(self, folder: Path, on_event: Callable[["DemoProcess", Mapping[str, Any]], None]) -> None:
        """`on_event` gets each JSON line of each child. Log lines go to files in `folder`."""
        self._folder = folder
        self._on_event = on_event
        self._changed = asyncio.Event()
        self._all: list[DemoProcess] = []

    async def start(self, name: str, arguments: Sequence[str]) -> "DemoProcess":
        """Runs `talkoot` with the arguments."""
        child = await DemoProcess.start(name, arguments, self._folder, self._hear)
        self._all.append(child)
        return child

    async def until(self, condition: Callable[[], bool], limit_s: float, awaited: str) -> None:
        """Waits for a condition on what was heard. Raises StartError when a child fails or the time is up."""
        try:
            async with asyncio.timeout(limit_s):
                while not condition():
                    self._changed.clear()
                    await self._changed.wait()
                    for child in self._all:
                        if child.exit_status and not child.killed:
                            raise child.failure()
        except TimeoutError:
            raise StartError(
                f"waited {limit_s:.0f} s in vain for {awaited}: is this machine busy with other work?"
            ) from None

    async def stop(self) -> None:
        """Ends all of them at once. Stopping twice is harmless."""
        await asyncio.gather(*(child.stop() for child in self._all))

    def _hear(self, child: "DemoProcess", event: Mapping[str, Any] | None) -> None:
        if event is not None:
            self._on_event(child, event)
        self._changed.set()


class DemoProcess:
    """A `talkoot` command in a process of its own, which ends with this process, however it ends."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, errors: Path) -> None:
        self.name = name
        self.pid = process.pid
        self.killed = False
        self._process = process
        self._errors = errors
        self._reading: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls,
        name: str,
        arguments: Sequence[str],
        folder: Path,
        hear: Callable[["DemoProcess", Mapping[str, Any] | None], None],
    ) -> Self:
        """Runs `talkoot` with the arguments. `hear` gets each JSON line, and None when the process has ended."""
        errors = folder / f"{name.replace(' ', '-')}.log"
        command = die_with_parent([sys.executable, "-P", "-m", "talkoot.cli", *arguments])
        with errors.open("wb") as file:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=file,
                # one thread each: several pools on few cores wait for each other; what torch caches goes with the demo
                env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder)},
            )
        child = cls(name, process, errors)
        child._reading = asyncio.create_task(child._read(hear))
        return child

    @property
    def exit_status(self) -> int | None:
        """None while it runs."""
        return self._process.returncode

    def kill(self) -> None:
        """SIGKILL: it gets no chance to say goodbye."""
        self.killed = True
        self._process.kill()

    def failure(self) -> StartError:
        """Why it ended early, with the last lines that it wrote."""
        with self._errors.open(errors="replace") as file:
            lines = [line.strip() for line in deque(file, _LINES_SHOWN)]
        said = [_message(line) for line in lines if line]
        clear = [line for line in said if line.startswith("error: ")]
        reason = clear[-1].removeprefix("error: ") if clear else " | ".join(said) or "it said nothing"
        reason = _CODE.sub("", reason)  # this error has its own
        return StartError(f"{self.name} ended early with exit status {self.exit_status}: {reason}")

    async def stop(self) -> None:
        """Asks it to leave, and kills it when it does not. Stopping twice is harmless."""
        if self.exit_status is None:
            self._process.terminate()
            try:
                async with asyncio.timeout(_LEAVES_WITHIN_S):
                    await self._process.wait()
            except TimeoutError:
                self.kill()
        if self._reading is not None:
            await self._reading

    async def _read(self, hear: Callable[["DemoProcess", Mapping[str, Any] | None], None]) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            hear(self, json.loads(line))
        await self._process.wait()
        hear(self, None)


def _message(line: str) -> str:
    """What a log line says; a line that is no JSON says itself."""
    try:
        values = json.loads(line)
    except ValueError:
        return line
    return str(values.get("message", line)) if isinstance(values, dict) else line
