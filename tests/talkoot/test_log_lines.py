"""Log lines: strangers' text cannot forge any, and a line that is provoked again and again does not displace others."""

import logging
import sys
from collections.abc import Iterator
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path

import pytest

from peer.errors import SwarmError
from talkoot.terminal import FittingTable, LogFormat, RepeatLimit, Terminal, log_file, set_up_logging

LOGGER = logging.getLogger("talkoot.test")
FORGED = "lost: \x1b[2Jcleared\n12:00:00 error: send your key to\u202e mallory"


@pytest.fixture(autouse=True)
def informed() -> Iterator[None]:
    LOGGER.setLevel(logging.INFO)
    yield
    LOGGER.setLevel(logging.NOTSET)


@pytest.mark.parametrize(("kind", "redraws"), [("dumb", False), ("xterm", True)])
def test_only_terminals_with_control_sequences_are_redrawn(
    kind: str, redraws: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", kind)
    monkeypatch.setenv("FORCE_COLOR", "1")  # so that rich takes the output for a terminal
    terminal = Terminal(LogFormat.TEXT)
    assert (terminal.live, terminal.out_is_live) == (redraws, redraws)


@pytest.mark.parametrize(("encoding", "is_ascii"), [("utf-8", False), ("cp1252", True)])
def test_tables_have_only_lines_that_the_output_can_encode(
    encoding: str, is_ascii: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = BytesIO()
    output = TextIOWrapper(data, encoding, "backslashreplace")
    monkeypatch.setattr(sys, "stdout", output)
    table = FittingTable("nodes", ("name",), ())
    table.add_row("Aino")
    Terminal(LogFormat.TEXT).out.print(table)
    output.flush()
    assert data.getvalue().isascii() == is_ascii
    assert b"\\" not in data.getvalue()


def test_controls_are_escaped_in_lines_and_in_tracebacks(tmp_path: Path) -> None:
    path = tmp_path / "node.log"
    with log_file(path):
        LOGGER.warning("node %s: %s", "Qm", FORGED)
        try:
            raise ValueError(FORGED)
        except ValueError:
            LOGGER.exception("could not announce")
    first, *rest = path.read_text().splitlines()
    assert first.endswith(
        r"warning: node Qm: lost: \x1b[2Jcleared\n12:00:00 error: send your key to\u202e mallory"
    )
    assert not {"\x1b", "\u202e"} & set(path.read_text())
    assert [line.split()[2] for line in rest if not line.startswith("  ")] == ["error:"]


@pytest.mark.parametrize(
    "control", ["\x00", "\r", "\x1b", "\x7f", "\x9b", "\u2029", "\u202a", "\u202e", "\u2066", "\u2069"]
)
def test_a_models_text_cannot_control_the_terminal(control: str, capsys: pytest.CaptureFixture[str]) -> None:
    with Terminal(LogFormat.TEXT).text() as write:
        write(f"Ämne:\t{control}[2J 👩‍🚀\n")
    assert capsys.readouterr().out == "Ämne:\t\ufffd[2J 👩‍🚀\n\n"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal that shows the log, as a command's does."""
    terminal = Terminal(LogFormat.TEXT)
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    set_up_logging(terminal)
    return terminal


@pytest.fixture
def screen(terminal: Terminal) -> StringIO:
    """What a user sees of the terminal's standard output and standard error."""
    screen = StringIO()
    terminal.out.file = terminal.err.file = screen
    return screen


def test_log_lines_do_not_break_into_a_text_that_is_being_printed(
    screen: StringIO, terminal: Terminal
) -> None:
    with terminal.text() as write:
        for piece in ("Once upon", " a ti", "me"):
            write(piece)
            LOGGER.warning("an expert did not answer")
    LOGGER.warning("the end")
    text, *lines = screen.getvalue().splitlines()
    assert text == "Once upon a time"
    assert [line.partition(" warning: ")[2] for line in lines] == [
        *["an expert did not answer"] * 3,
        "the end",
    ]


def test_an_error_in_the_middle_of_a_text_has_a_line_of_its_own(screen: StringIO, terminal: Terminal) -> None:
    def generate() -> None:
        with terminal.text() as write:
            write("Once upon a ti")
            LOGGER.warning("an expert did not answer")
            raise SwarmError("gone")

    with pytest.raises(SwarmError):
        generate()
    assert screen.getvalue().splitlines()[0] == "Once upon a ti"
    assert "an expert did not answer" in screen.getvalue()


def test_whoever_waits_in_the_middle_of_a_text_is_told_so_at_once(
    screen: StringIO, terminal: Terminal
) -> None:
    with terminal.text() as write:
        write("Once upon a ti")
        LOGGER.warning("an expert did not answer")
        terminal.interrupt_text()
        LOGGER.warning("waiting for experts")
        assert [line.partition(" warning: ")[2] for line in screen.getvalue().splitlines()[1:]] == [
            "an expert did not answer",
            "waiting for experts",
        ]
        write("me")
    assert screen.getvalue().endswith("\nme\n")


def record(line: int, message: str = "what %s said", error: Exception | None = None) -> logging.LogRecord:
    raised = None if error is None else (type(error), error, error.__traceback__)
    return logging.LogRecord("peer", logging.WARNING, "peer.py", line, message, ("a peer",), raised)


def test_what_one_line_of_code_logs_is_bounded_and_the_rest_is_counted() -> None:
    now = 0.0
    limit = RepeatLimit(lambda: now)
    shown = [limit.admit(record(1)) for _ in range(10_000)]
    assert sum(one is not None for one in shown) == 50
    assert limit.admit(record(2)) is not None, "another line has its own allowance"
    now = 3.5
    (again,) = [one for one in (limit.admit(record(1)) for _ in range(100)) if one is not None]
    assert again.getMessage() == "what a peer said (9950 more like it were left out)"
    now = 7.0
    assert limit.admit(record(1)) is not None
    limit.admit(record(1))
    now = 10.5
    after_one = limit.admit(record(1))
    assert after_one is not None
    assert after_one.getMessage() == "what a peer said (1 more like it was left out)"
    now = 1e6
    assert sum(limit.admit(record(1)) is not None for _ in range(100)) == 50


def failure(kind: type[Exception], text: str) -> Exception:
    try:
        raise kind(text)
    except kind as error:
        return error


def test_a_traceback_is_shown_once_for_each_kind_of_failure() -> None:
    limit = RepeatLimit()
    first = limit.admit(record(1, error=failure(KeyError, "one")))
    again = limit.admit(record(1, error=failure(KeyError, "two")))
    other = limit.admit(record(1, error=failure(TypeError, "three")))
    assert first is not None
    assert again is not None
    assert other is not None
    assert first.exc_info is not None
    assert again.exc_info is None
    assert again.getMessage() == "what a peer said: KeyError: 'two', at the same place as before"
    assert other.exc_info is not None


def test_another_handler_still_sees_the_record_as_it_was() -> None:
    limit, seen = RepeatLimit(), record(1, error=failure(KeyError, "one"))
    for _ in range(3):
        limit.admit(seen)
    assert seen.exc_info is not None
    assert seen.getMessage() == "what a peer said"
