"""Runs the contenders of a benchmark in process groups of their own, and kills everything that they leave behind."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import Any

from peer.platform.processes import die_with_parent

_STOPS = (signal.SIGINT, signal.SIGTERM)
_TRIES = 3


def end_in_order_when_stopped() -> None:
    """On the first Ctrl-C or SIGTERM (which `timeout` sends), ends this process and all that it started.

    Later signals are ignored, so that the clean-up is not interrupted.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        for other in _STOPS:
            signal.signal(other, signal.SIG_IGN)
        sys.exit(128 + number)

    for number in _STOPS:
        signal.signal(number, stop)


def run_apart(module: str, arguments: Sequence[str], limit_s: float) -> dict[str, Any]:
    """Runs a module, and returns the line of JSON that it prints as its result.

    A run that takes too long is tried again: hivemind.moe forks while threads run, and sometimes hangs because of it.
    Raises SystemExit with the module's output if it fails.
    """
    command, environment = _command(module, arguments)
    for _ in range(_TRIES):
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
            try:
                status = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                continue
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            output.seek(0)
            said = output.read()
        if status:
            raise SystemExit(f"{' '.join(arguments)} failed:\n{said}")
        (last,) = [line for line in said.splitlines() if line.startswith("{")][-1:]
        result: dict[str, Any] = json.loads(last)
        return result
    raise SystemExit(f"{' '.join(arguments)} hung, {_TRIES} times")


class Child:
    """A module in a process group of its own. It reads lines, and prints lines of JSON."""

    def __init__(self, module: str, arguments: Sequence[str]) -> None:
        self._arguments = arguments
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # open as long as the process
        command, environment = _command(module, arguments)
        self._process = subprocess.Popen(
            die_with_parent(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            process_group=0,
            bufsize=0,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._pipe, self._output = self._process.stdin, self._process.stdout
        self._said = b""

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self, line: str = "") -> None:
        """Raises BrokenPipeError."""
        self._pipe.write(line.encode() + b"\n")

    def hear(self, limit_s: float | None = None) -> dict[str, Any]:
        """The next line of JSON. Raises TimeoutError, and SystemExit with the module's errors if it has ended."""
        ends = None if limit_s is None else time.monotonic() + limit_s
        while True:
            line, newline, rest = self._said.partition(b"\n")
            if newline:
                self._said = rest
                if line.startswith(b"{"):
                    result: dict[str, Any] = json.loads(line)
                    return result
                continue
            left_s = None if ends is None else max(0.0, ends - time.monotonic())
            ready, _, _ = select.select([self._output], [], [], left_s)
            if not ready:
                raise TimeoutError
            if not (more := os.read(self._output.fileno(), 65536)):
                self._errors.seek(0)
                raise SystemExit(f"{' '.join(self._arguments)} failed:\n{self._errors.read()}")
            self._said += more

    def close(self) -> None:
        """Kills the process, and all that it started in its group. Closing twice is harmless."""
        if self._errors.closed:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._pipe.close()
        self._output.close()
        self._errors.close()


class Standby:
    """A module that prints a line of JSON when it has started, and then answers each line it is sent with another.

    It allows one contender to start while another is starting. A module that hangs is started again.
    """

    def __init__(self, module: str, arguments: Sequence[str], limit_s: float) -> None:
        """`limit_s`: the longest time that starting, and each answer, may take."""
        self._module = module
        self._arguments = arguments
        self._limit_s = limit_s
        self._start()

    def ask(self, question: str) -> dict[str, Any]:
        """Sends a question and returns the answer. Raises SystemExit with the module's errors if it fails."""
        for _ in range(_TRIES):
            with suppress(TimeoutError, BrokenPipeError):
                self.wait_until_started()
                self._child.tell(question)
                return self._child.hear(self._limit_s)
            self.close()
            self._start()
        raise SystemExit(f"{' '.join(self._arguments)} hung, {_TRIES} times")

    def _start(self) -> None:
        self._child = Child(self._module, self._arguments)
        self._has_started = False

    def wait_until_started(self) -> None:
        """Waits for the module to start. Raises TimeoutError when it takes too long; `ask` then starts it again."""
        if not self._has_started:
            self._child.hear(self._limit_s)
            self._has_started = True

    def close(self) -> None:
        self._child.close()


def _command(module: str, arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    environment = os.environ | {"HIVEMIND_LOGLEVEL": "ERROR"}
    if {"talkoot", "bound", "--trainer"} & set(arguments):
        # The command `talkoot` sets this too. On a busy machine, OpenMP threads that spin make the work several times
        # slower.
        environment["OMP_WAIT_POLICY"] = "passive"
    return [sys.executable, "-W", "ignore", "-m", module, *arguments], environment
