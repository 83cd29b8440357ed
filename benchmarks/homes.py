"""Runs a swarm's programs on the machines of an emulated internet, and reads what they print."""

import itertools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from benchmarks.namespaces import Internet, Machine

START_S = 120.0


@dataclass(frozen=True)
class Program:
    """A running command on a machine, and its output."""

    process: subprocess.Popen[bytes]
    folder: Path

    def events(self, kind: str) -> list[dict[str, Any]]:
        lines = (self.folder / "out").read_text().splitlines()
        events = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
        return [event for event in events if event["event"] == kind]

    @property
    def said(self) -> str:
        return (self.folder / "err").read_text()

    def wait_for(self, what: str, is_so: Callable[[], object]) -> None:
        deadline = time.monotonic() + START_S
        while not is_so():
            assert self.process.poll() is None, f"ended before {what}:\n{self.said}"
            assert time.monotonic() < deadline, f"waited in vain for {what}:\n{self.said}"
            time.sleep(0.1)

    def wait_until_reached(self, way: str) -> None:
        self.wait_for(way, lambda: any(e["reachability"].startswith(way) for e in self.events("state")))

    def wait_until_updated(self) -> None:
        self.wait_for("updates", lambda: self.events("state")[-1]["updates"] > 0)


class Village:
    """Starts programs on machines. `close` ends all of them."""

    def __init__(self, net: Internet, folder: Path) -> None:
        self.net = net
        self._folder = folder
        self._programs: list[Program] = []
        self._numbers = itertools.count()

    def run(self, machine: Machine, command: str, *arguments: object) -> Program:
        folder = self._folder / str(next(self._numbers))
        folder.mkdir()
        if "--state" not in arguments:
            arguments = (*arguments, "--state", folder / "state")
        words = ["-m", "talkoot", command, "--log-format", "json", *map(str, arguments)]
        with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
            process = self._start(machine, words, out, err)
        program = Program(process, folder)
        self._programs.append(program)
        return program

    def node(self, machine: Machine, *arguments: object) -> Program:
        return self.run(
            machine, "node", "--host", machine.address, "--threads", 1, "--announce-every-s", 1, *arguments
        )

    def _start(
        self, machine: Machine, words: Sequence[str], out: BinaryIO, err: BinaryIO
    ) -> "subprocess.Popen[bytes]":
        """Starts Python with these words."""
        return subprocess.Popen(machine.command([sys.executable, *words]), stdout=out, stderr=err)

    def close(self) -> None:
        for program in self._programs:
            program.process.send_signal(signal.SIGKILL)
            program.process.wait()
