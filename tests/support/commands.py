"""Runs the `talkoot` command: in a process of its own, or in this process, which has imported everything already."""

import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest import mock

import psutil
from preloaded import run_preloaded
from typer.testing import CliRunner

from talkoot.cli import app

HOST = "127.0.0.1"
DEADLINE_S = 120.0
_LISTEN = "-listen=/unix"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "talkoot", *arguments]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the command in a process that has imported torch."""
    return run_preloaded("-m", "talkoot", *arguments, env=os.environ | environment)


def run_here(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the command in this process: for commands that end before they start or join anything."""
    with _as_before():
        ended = CliRunner().invoke(app, arguments, env=environment)
    if ended.exception is not None and not isinstance(ended.exception, SystemExit):
        raise ended.exception
    return subprocess.CompletedProcess(arguments, ended.exit_code, ended.stdout, ended.stderr)


@contextmanager
def _as_before() -> Iterator[None]:
    """Undoes what a command changes in its process."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)
    handlers = {number: signal.getsignal(number) for number in numbers}
    root = logging.getLogger()
    level, hivemind_level = root.level, logging.getLogger("hivemind").level
    try:
        with warnings.catch_warnings(), mock.patch.dict(os.environ):
            yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        root.setLevel(level)
        logging.getLogger("hivemind").setLevel(hivemind_level)


def wait_until(condition: Callable[[], bool], what: str, limit_s: float = DEADLINE_S) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {limit_s} s in vain for {what}"
        time.sleep(0.05)


def assert_one_clear_line(ended: subprocess.CompletedProcess[str], *said: str) -> None:
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert ended.returncode == 2, ended.stderr
    assert len(errors) == 1, ended.stderr
    assert ended.stderr.endswith(errors[0] + "\n"), ended.stderr
    assert "Traceback" not in ended.stderr
    for part in said:
        assert part in errors[0]


def sockets_of(processes: Iterable[psutil.Process]) -> set[Path]:
    """The sockets of the p2pd processes among these, including the one for each client."""
    folders = set()
    for process in processes:
        with suppress(psutil.Error):
            listens = [word for word in process.cmdline() if word.startswith(_LISTEN)]
            folders |= {Path(word.removeprefix(_LISTEN)).parent for word in listens}
    return {path for folder in folders for path in folder.glob("*")}
