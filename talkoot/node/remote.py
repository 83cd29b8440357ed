"""`talkoot pause`, `resume`, `stop` and `logs`: commands for a running node, on the same machine."""

import os
import re
import time
from pathlib import Path
from typing import IO

import psutil

from peer.errors import ControlError, DataError, SettingsError, UserError
from peer.files import kind_of
from peer.formatting import counted
from peer.platform.processes import how_to_kill
from talkoot.node.control import (
    LOG_FILE,
    MAX_PAUSE_S,
    ControlClient,
    ControlStatus,
    node_folder,
    state_option,
)
from talkoot.terminal import Terminal, escaped

_LEAVES_WITHIN_S = 90.0
"""How long a node may take to leave: it finishes calls, saves its experts and hands them over, each with a deadline."""
_GIVEN_UP = "other nodes serve"
_LOOK_EVERY_S = 0.2
_UNITS_S = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def run_pause(terminal: Terminal, state: Path | None, duration: str | None) -> None:
    """Shows what the pause takes offline, and pauses. Raises UserError if no node runs there, or if it refuses."""
    for_s = None if duration is None else parse_duration_s(duration)
    with ControlClient(node_folder(state)) as control:
        before = control.ask("status")
        terminal.line(taken_offline(before, "resumes"))
    with ControlClient(node_folder(state)) as control:
        after = control.ask("pause", for_s=for_s)
        terminal.line(words(after))
    if before.experts and after.offline is not None:
        terminal.line(given_up(before.experts, after.offline, "resumes"))


def run_resume(terminal: Terminal, state: Path | None) -> None:
    """Raises UserError if no node runs there, or if it refuses."""
    with ControlClient(node_folder(state)) as control:
        terminal.line(words(control.ask("resume")))


def run_stop(terminal: Terminal, state: Path | None, *, wait: bool) -> None:
    """Raises UserError if no node runs there, or if its process does not end in time."""
    folder = node_folder(state)
    with ControlClient(folder) as control:
        log = Follower(folder / LOG_FILE)
        process = _handle(control.pid, folder)
        try:
            log.lines()  # skips what was logged before
            status = control.ask("stop")
            if status.experts:
                terminal.line(taken_offline(status, "starts again"))
            if not wait:
                terminal.line(f"asked process {control.pid} to leave; {words(status)}")
                return
            said = _wait_until_gone(terminal, process, log, folder)
        finally:
            log.close()
    if said:
        terminal.line(said)
    terminal.line(f"stopped; its identity and checkpoints stay in {folder}")


def run_logs(terminal: Terminal, state: Path | None, count: int, *, follow: bool) -> None:
    """Prints the last `count` lines. Raises DataError if there is no log, or if it can't be read."""
    path = node_folder(state) / LOG_FILE
    follower = Follower(path)
    try:
        if kind_of(path) is None:
            raise DataError(
                f"no file {path}: a node writes it when it starts; pass the --state that it was started with"
            )
        lines = follower.lines()
        if len(lines) < count:
            lines = _older_lines(path) + lines
        _print(terminal, lines[-count:] if count else [])
        while follow:
            time.sleep(_LOOK_EVERY_S)
            _print(terminal, follower.lines())
    except OSError as error:
        raise DataError(
            f"can't read {path}: {error.strerror}; run this as the user who runs the node"
        ) from error
    finally:
        follower.close()


def taken_offline(status: ControlStatus, until: str) -> str:
    """What a node takes offline, in words. `until`: what it does when it hosts again."""
    if not status.experts:
        return "it hosts no expert: nothing goes offline"
    experts = counted(status.experts, "expert")
    if not status.alone:
        return f"as far as it has seen, other nodes serve all of its {experts} too: nothing goes offline"
    more = status.alone - len(status.alone_uids)
    named = ", ".join(status.alone_uids) + (f" and {more} more" if more else "")
    return (
        f"as far as it has seen, no other node serves {status.alone} of its {experts}: {named}. Nodes with room are "
        f"asked to take them over first; what none takes is offline until this one {until}"
    )


def given_up(experts: int, offline: int, until: str) -> str:
    """What became of the experts that a node gave up, in words. `until`: what it does when it hosts again."""
    served = f"{_GIVEN_UP} {experts - offline} of the {counted(experts, 'expert')} that it gave up"
    return (
        f"{served}; {offline} {'is' if offline == 1 else 'are'} offline until it {until}"
        if offline
        else served
    )


def words(status: ControlStatus) -> str:
    """What a node is doing, as one line."""
    state = status.pause_reason if status.state == "paused" and status.pause_reason else status.state
    return (
        f"{state}; {status.experts} of at most {counted(status.capacity, 'expert')}, "
        f"{counted(status.updates, 'update')}, {counted(status.peers, 'DHT peer')}"
    )


def parse_duration_s(text: str, option: str = "--for", longest_s: float = MAX_PAUSE_S) -> float:
    """Seconds in a text such as 90s, 30m, 1h30m or 2d. Raises SettingsError."""
    parts = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text.strip(), re.ASCII)
    seconds = sum(
        int(number[:9]) * unit_s  # longer numbers are too large anyway
        for number, unit_s in zip(parts.groups() if parts else (), _UNITS_S.values(), strict=False)
        if number
    )
    if not 0 < seconds <= longest_s:
        raise SettingsError(
            f"{option} {text}: pass a time such as 30m, 2h or 1d, at most {longest_s / 86400:.0f}d"
        )
    return float(seconds)


class Follower:
    """Reads a log file that grows and is rotated: first the existing lines, then each new one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        self._rest = b""

    def lines(self) -> list[str]:
        """The lines completed since the last call."""
        data = b"" if self._file is None else self._file.read()
        if not self._is_current():
            self.close()
            try:
                self._file = self._path.open("rb")
            except FileNotFoundError:
                pass  # in the middle of a rotation
            else:
                data += self._file.read()
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [escaped(line.decode(errors="backslashreplace")) for line in lines]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _is_current(self) -> bool:
        """Whether the path still names the open file."""
        if self._file is None:
            return False
        try:
            named = self._path.stat()
        except FileNotFoundError:
            return False
        opened = os.fstat(self._file.fileno())
        return (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)


def _handle(pid: int, folder: Path) -> psutil.Process:
    """A handle of this process, which stays valid even if another process gets its number."""
    try:
        return psutil.Process(pid)
    except psutil.Error as error:
        raise UserError(f"the node of {folder} runs in another container: stop it there") from error


def _wait_until_gone(terminal: Terminal, process: psutil.Process, log: Follower, folder: Path) -> str:
    """Waits for the process to end, and shows what the node logs meanwhile. Returns what it logs about the experts that
    it gave up, because it can't be asked any more; empty if nothing.
    """
    deadline = time.monotonic() + _LEAVES_WITHIN_S
    said: list[str] = []
    with terminal.stages("leaving the swarm") as stage:
        while _runs(process):
            if time.monotonic() > deadline:
                raise ControlError(
                    f"process {process.pid} is still running after {_LEAVES_WITHIN_S:.0f} s: `talkoot logs"
                    f"{state_option(folder)}` shows what it is doing; `{how_to_kill(process.pid)}` kills it, and loses "
                    "what it has not saved"
                )
            time.sleep(_LOOK_EVERY_S)
            said += (new := _messages(log))
            for line in new[-1:]:
                stage(line)
    return next((line for line in reversed(said + _messages(log)) if line.startswith(_GIVEN_UP)), "")


def _messages(log: Follower) -> list[str]:
    """The new lines without their dates and times."""
    return [line.split(" ", 2)[-1] for line in log.lines()]


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _older_lines(path: Path) -> list[str]:
    rotated = Follower(path.with_name(f"{path.name}.1"))
    try:
        return rotated.lines()
    finally:
        rotated.close()


def _print(terminal: Terminal, lines: list[str]) -> None:
    if lines:
        terminal.line("\n".join(lines))
