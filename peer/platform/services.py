"""Programs that the system starts for their user, and how its own tools are called."""

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from peer.errors import StartError

_DEADLINE_S = 30.0


@dataclass(frozen=True)
class Program:
    """What is started, when its user logs in or the machine does."""

    command: tuple[str, ...]
    folder: Path
    """Where it runs, and the only place that it writes to."""


class ServiceManager(Protocol):
    """What starts it: the modules `systemd`, `launchd` and `task_scheduler`. All functions raise StartError."""

    NAME: str
    """The name of the service in the system's tools."""
    WAITS_FOR_THE_END: bool
    """Whether `stop`, and `start` of one that runs, ask the program to leave and wait until it has."""
    ENCODING: str
    """The encoding of the definition's file."""

    def path(self) -> Path:
        """The path of the file that defines the service."""

    def definition(self, program: Program, *, sandboxed: bool) -> str:
        """What is in that file."""

    def folder_in(self, definition: str) -> Path:
        """The program's folder. Raises ValueError if the file is of another maker."""

    def require(self) -> None:
        """Raises StartError, with an alternative, when the system can't do it for this user."""

    def can_sandbox(self) -> bool: ...

    def start(self, *, again: bool) -> None:
        """Has the service started from now on, and starts it. `again`: it was installed, and its file may be new."""

    def stop(self) -> None:
        """Has it no longer started, and stops it. Its file is removed afterwards."""

    def forget(self) -> None:
        """After the file was removed or put back."""

    def describe(self) -> tuple[bool | None, str]:
        """Whether it runs, None if the system does not say, and what the system says in words."""

    def advice(self) -> str:
        """What else its user has to do; empty if nothing."""


INSTEAD = "start `talkoot node --join INVITE` from your own start-up scripts instead"


def run(*command: str) -> str:
    """Returns what a tool printed. Raises StartError with what it said when it fails."""
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
