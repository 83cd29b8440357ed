"""A terminal of which nobody reads one or both outputs any more: nothing fails by it, on any thread."""

import errno
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, NamedTuple

import pytest
from rich.live import Live

from peer.errors import StartError
from talkoot.terminal import LogFormat, Terminal, log_file, set_up_logging

LOGGER = logging.getLogger("talkoot.test")


class Pipe(NamedTuple):
    reader: IO[str]
    writer: IO[str]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def pipe(stack: ExitStack) -> Pipe:
    read, write = os.pipe()
    return Pipe(stack.enter_context(open(read)), stack.enter_context(open(write, "w", buffering=1)))


@pytest.fixture
def calls() -> list[str]:
    """The threads on which the terminal said that nobody reads standard output."""
    return []


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> "Make":
    return Make(monkeypatch, calls)


class Make:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> None:
        self._monkeypatch, self._calls = monkeypatch, calls

    def __call__(self, out: IO[str], err: IO[str], log_format: LogFormat = LogFormat.TEXT) -> Terminal:
        """A terminal with these outputs, which shows the log, as a command's does."""
        self._monkeypatch.setattr(sys, "stdout", out)
        self._monkeypatch.setattr(sys, "stderr", err)
        root = logging.getLogger()
        self._monkeypatch.setattr(root, "handlers", [])
        self._monkeypatch.setattr(root, "level", logging.INFO)
        terminal = Terminal(log_format, lambda: self._calls.append(threading.current_thread().name))
        set_up_logging(terminal)
        return terminal


@pytest.mark.parametrize("log_format", LogFormat)
def test_log_lines_of_any_thread_are_dropped_and_the_log_file_says_so_once(
    make: Make, stack: ExitStack, calls: list[str], tmp_path: Path, log_format: LogFormat
) -> None:
    shared = pipe(stack)
    terminal = make(shared.writer, shared.writer, log_format)
    reached_the_end = threading.Event()

    def work() -> None:
        LOGGER.info("joining the DHT")
        LOGGER.info("reading the manifest")
        reached_the_end.set()

    path = tmp_path / "node.log"
    with log_file(path):
        LOGGER.info("making ready")
        shared.reader.close()
        thread = threading.Thread(target=work, name="loop")
        thread.start()
        thread.join()
        terminal.event("state", {})
        with terminal.text() as write:
            write("Once upon a time")
        with Live("a panel", console=terminal.err, auto_refresh=False) as live:
            live.refresh()
    assert reached_the_end.is_set()
    assert calls == ["loop"]
    assert [line.split(" ", 2)[2] for line in path.read_text().splitlines()] == [
        "making ready",
        "warning: nobody reads standard output and standard error any more, so nothing is shown there",
        "joining the DHT",
        "reading the manifest",
    ]


def test_results_arrive_though_nobody_reads_the_log(make: Make, stack: ExitStack, calls: list[str]) -> None:
    out, err = pipe(stack), pipe(stack)
    terminal = make(out.writer, err.writer)
    err.reader.close()
    LOGGER.warning("an expert did not answer")
    terminal.line("loss 5.7")
    assert terminal.unread_outputs == ["standard error"]
    assert (out.reader.readline(), calls) == ("loss 5.7\n", [])


def test_the_log_arrives_though_nobody_reads_results(make: Make, stack: ExitStack, calls: list[str]) -> None:
    out, err = pipe(stack), pipe(stack)
    terminal = make(out.writer, err.writer)
    out.reader.close()
    for n in range(3):
        terminal.line(f"step {n}")
    LOGGER.info("leaving")
    assert err.reader.readline().endswith(" leaving\n")
    assert (terminal.unread_outputs, len(calls)) == (["standard output"], 1)
    out.writer.write("what others print to it does not fail either\n")


def test_a_closed_terminal_is_read_by_nobody(make: Make, stack: ExitStack, calls: list[str]) -> None:
    ours, theirs = os.openpty()
    screen = stack.enter_context(os.fdopen(theirs, "w", buffering=1))
    make(screen, screen)
    os.close(ours)
    LOGGER.info("serving")
    assert len(calls) == 1


def test_on_a_full_disk_log_lines_are_missing_but_a_missing_result_is_an_error(
    make: Make, stack: ExitStack, calls: list[str]
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    full = os.open("/dev/full", os.O_WRONLY)
    disk = stack.enter_context(os.fdopen(full, "w", buffering=1))
    terminal = make(disk, disk)
    try:
        LOGGER.info("evaluating")
        with pytest.raises(StartError, match=rf"standard output: {os.strerror(errno.ENOSPC)}; "):
            terminal.line("loss 5.7")
        Terminal(LogFormat.JSON, is_service=True).event("state", {})
        assert (terminal.unread_outputs, calls) == ([], [])
    finally:
        os.dup2(os.open(os.devnull, os.O_WRONLY), full)  # closing writes again
