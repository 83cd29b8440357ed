"""What service managers have in common: programs that the system starts for their user, and running its own tools."""

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from peer.errors import StartError

_DEADLINE_S = 30.0


@dataclass(frozen=True)
class Program:
    """A program that is started when its user logs in or the machine starts."""

    command: tuple[str, ...]
    folder: Path
    """The folder that it runs in, and the only one that it writes to."""


class ServiceManager(Protocol):
    """What starts the program: the modules `systemd`, `launchd` and `task_scheduler`. All functions raise
    StartError.
    """

    NAME: str
    """The name of the service in the system's tools."""
    WAITS_FOR_THE_END: bool
    """Whether `stop`, and `start` if the program runs already, ask the program to end and wait until it has."""
    ENCODING: str
    """The encoding of the definition's file."""

    def path(self) -> Path:
        """The path of the file that defines the service."""

    def definition(self, program: Program, *, sandboxed: bool) -> str:
        """The content of that file."""

    def folder_in(self, definition: str) -> Path:
        """The program's folder. Raises ValueError if the file was written by something else."""

    def require(self) -> None:
        """Raises StartError, which names an alternative, if the system can't do it for this user."""

    def can_sandbox(self) -> bool: ...

    def start(self, *, again: bool) -> None:
        """Starts the service now and from now on. `again`: it was installed before, and its file may be new."""

    def stop(self) -> None:
        """Stops the service now and for good. Its file is removed afterwards."""

    def forget(self) -> None:
        """Called after the file was removed or restored."""

    def describe(self) -> tuple[bool | None, str]:
        """Whether the service runs, None if the system does not say, and what the system says in words."""

    def advice(self) -> str:
        """What else the user has to do; empty if nothing."""


INSTEAD = "start `talkoot node --join INVITE` from your own start-up scripts instead"


def run(*command: str) -> str:
    """Returns the output of a tool. If the tool fails, raises StartError with that output."""
    ended = attempt(*command)
    if ended.returncode:
        raise StartError(f"`{' '.join(command)}` failed: {reason(ended)}")
    return ended.stdout


def attempt(*command: str) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_DEADLINE_S, errors="replace")
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, "", f"no {command[0]} here")
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no answer within {_DEADLINE_S:.0f} s")


def reason(ended: "subprocess.CompletedProcess[str]") -> str:
    lines: Sequence[str] = (ended.stderr.strip() or ended.stdout.strip()).splitlines()
    return lines[-1] if lines else f"exit status {ended.returncode}"
