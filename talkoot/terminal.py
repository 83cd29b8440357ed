"""What a command shows: results and JSON lines, log lines, stages of starting, tables and progress bars."""

import copy
import errno
import json
import logging
import math
import os
import re
import shlex
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from enum import StrEnum
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import IO, Any, TextIO, cast

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from peer.errors import StartError, UserError
from peer.files import kind_of, write_atomically
from peer.platform.files import nobody_reads, open_plainly
from peer.rates import TokenBucket

logger: logging.Logger = logging.getLogger(__name__)

LOG_FILE_BYTES = 5_000_000
"""A log file that would grow larger is renamed to `….1`, which replaces the one before."""
_WIDE = 10_000
_ONLY_IN_PLACE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY}
"""Errors of a folder in which no new file can be made, or of a file that is mounted by itself."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""Characters that could control a terminal, or change the order in which others are shown (UAX #9)."""
_LINES_WAITING = 1000
"""The most log lines that wait for the end of a text; older ones are left out."""
_LINES, _LINE_EVERY_S = 50, 3.0
"""How many lines one line of code may log at once, and the pause between further ones. At this rate, a single line of
code logs at most 4 MB a day; the log file holds 5 MB.
"""


class LogFormat(StrEnum):
    """Whether a command writes for people, or JSON lines for programs."""

    TEXT = "text"
    JSON = "json"


class Terminal:
    """A command's standard output and standard error.

    Results go to standard output: invites, tables, JSON lines. Everything else goes to standard error. Once nobody
    reads one of them any more, what is written there is dropped.
    """

    def __init__(
        self,
        log_format: LogFormat,
        on_unread: Callable[[], None] | None = None,
        *,
        is_service: bool = False,
    ) -> None:
        """`on_unread` is called once, on any thread, when nobody reads standard output any more. `is_service`: the
        command continues even if its output can't be written.
        """
        self.json: bool = log_format is LogFormat.JSON
        self._out = _Output(sys.stdout, self._note_unread, only_informs=is_service)
        self._err = _Output(sys.stderr, self._note_unread, only_informs=True)
        self.out: Console = _console(self._out)
        self.err: Console = _console(self._err, stderr=True)
        self.live: bool = _can_redraw(self.err) and not self.json
        """Whether somebody is watching, so that lines may be redrawn."""
        self.out_is_live: bool = _can_redraw(self.out) and not self.json
        """The same for standard output."""

        self._waiting: deque[str] | None = None
        """Log lines that are shown when the text is finished; None: they are shown at once."""

        self._on_unread = on_unread
        self._noting = threading.Lock()

    @property
    def is_unread(self) -> bool:
        """Whether nobody reads standard output any more."""
        return self._out.is_unread

    @property
    def unread_outputs(self) -> list[str]:
        """Names those of the two outputs that nobody reads any more."""
        outputs = {"standard output": self._out, "standard error": self._err}
        return [name for name, output in outputs.items() if output.is_unread]

    def _note_unread(self, output: "_Output") -> None:
        with self._noting:
            if output.is_unread:  # another thread was first
                return
            was_read = not self.is_unread
            both = (self._out, self._err)
            for each in [each for each in both if each is output or each.is_same_as(output)]:
                each.drop()
        if was_read and self.is_unread and self._on_unread is not None:
            self._on_unread()

    def log(self, line: str) -> None:
        """Prints a log line on standard error, above what is redrawn there."""
        if self._waiting is None:
            self.err.print(line)
        else:
            self._waiting.append(line)

    @contextmanager
    def text(self) -> Iterator[Callable[[str], None]]:
        """Yields a function that writes pieces of a text to standard output at once. Control characters become U+FFFD:
        experts influence the text. Log lines follow the text, because they would break into its last line, on a
        terminal or in a file that gets both.
        """
        self._waiting = deque(maxlen=_LINES_WAITING)

        def write(piece: str) -> None:
            self.out.file.write(_CONTROL.sub("\ufffd", piece))
            self.out.file.flush()

        try:
            yield write
        finally:
            try:
                write("\n")
            finally:
                self._show_waiting()

    def interrupt_text(self) -> None:
        """Shows log lines at once again, on lines of their own, because the text may not go on for a while."""
        if self._waiting is not None:
            self.err.print()
            self._show_waiting()

    def _show_waiting(self) -> None:
        lines, self._waiting = self._waiting or (), None
        for line in lines:
            self.err.print(line)

    def line(self, text: str) -> None:
        """Prints a line on standard output at once."""
        self.out.print(text)
        self.out.file.flush()

    def event(self, kind: str, values: Mapping[str, Any]) -> None:
        """Prints a JSON line on standard output at once."""
        self.line(to_json({"event": kind, **values}))

    @contextmanager
    def stages(self, first: str) -> Iterator[Callable[[str], None]]:
        """Yields a function that shows the current stage: with a spinner on a terminal, otherwise as a log line."""
        if not self.live:
            logger.info(first)
            yield logger.info
            return
        # as text, because rich reads plain strings as markup here, and a stranger's words may be among them
        with self.err.status(Text(first)) as status:
            yield lambda stage: status.update(Text(stage))


class _Output:
    """Standard output or standard error, as a file for rich. Once nobody reads it, it drops what is written."""

    def __init__(
        self, stream: TextIO, note_unread: Callable[["_Output"], None], *, only_informs: bool
    ) -> None:
        """`note_unread` is called when it turns out that nobody reads it. `only_informs`: on other errors, such as a
        full disk, text is missing from it, but the command continues. Otherwise, they raise StartError.
        """
        self._stream = stream
        self._note_unread = note_unread
        self._only_informs = only_informs
        self._is_terminal = stream.isatty()  # now, because a terminal that is closed is none any more
        self.encoding: str = stream.encoding
        """Unless it is a form of Unicode, rich draws tables and bars in ASCII."""
        self.is_unread: bool = False

    def write(self, text: str) -> int:
        with self._tolerating():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._tolerating():
            self._stream.flush()

    def isatty(self) -> bool:
        return self._is_terminal

    def fileno(self) -> int:
        return self._stream.fileno()

    def is_same_as(self, other: "_Output") -> bool:
        """Whether both go to the same pipe, terminal or file."""
        try:
            own, others = os.fstat(self.fileno()), os.fstat(other.fileno())
        except OSError:
            return False
        return own.st_ino != 0 and os.path.samestat(own, others)

    def drop(self) -> None:
        """Drops from now on what this process writes, and what is still in the buffer."""
        self.is_unread = True
        with suppress(OSError):
            null = os.open(os.devnull, os.O_WRONLY)
            try:
                os.dup2(null, self.fileno())
            finally:
                os.close(null)

    @contextmanager
    def _tolerating(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if nobody_reads(error, self._is_terminal):
                self._note_unread(self)
            elif not self._only_informs:
                raise results_not_written(error) from error


def _console(output: _Output, *, stderr: bool = False) -> Console:
    file = cast(IO[str], output)  # it has what rich uses
    return Console(file=file, stderr=stderr, soft_wrap=True, highlight=False, markup=False)


def _can_redraw(console: Console) -> bool:
    """On a terminal without control sequences (`TERM=dumb`), rich would show live output only when it ends."""
    return console.is_terminal and not console.is_dumb_terminal


class FittingTable:
    """A table that leaves out the least important columns if it would be too wide for the terminal. For commands with
    `--json`, which shows all.
    """

    def __init__(self, title: str, columns: Sequence[str], first_to_go: Sequence[str]) -> None:
        self._title, self._columns, self._first_to_go = title, tuple(columns), tuple(first_to_go)
        self._rows: list[tuple[str, ...]] = []

    def add_row(self, *cells: str) -> None:
        """One cell for each column."""
        self._rows.append(cells)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for left_out in range(len(self._first_to_go) + 1):
            table = self._table(self._first_to_go[:left_out])
            if console.measure(table, options=options.update(width=_WIDE)).maximum <= options.max_width:
                break
        yield table

    def _table(self, without: Sequence[str]) -> Table:
        shown = [n for n, column in enumerate(self._columns) if column not in without]
        gone = (
            f" (too narrow for: {', '.join(without)}; widen the terminal, or pass --json)" if without else ""
        )
        table = Table(title=self._title + gone)
        for n in shown:
            table.add_column(self._columns[n], overflow="fold")
        for row in self._rows:
            table.add_row(*(row[n] for n in shown))
        return table


class FittingScreen:
    """As many lines of its parts as fit the terminal's height. If some don't fit, the last line says how many."""

    def __init__(self, *parts: RenderableType) -> None:
        self._parts = Group(*parts)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # the terminal's console does not wrap lines unless told to
        lines = console.render_lines(
            self._parts, options.update(height=None, no_wrap=False, overflow="fold"), pad=False
        )
        height = console.height
        missing = len(lines) - height + 1 if len(lines) > height else 0
        for line in lines[: height - 1] if missing else lines:
            yield from line
            yield Segment.line()
        if missing:
            yield Text(f"… {missing} more lines: enlarge the window", style="dim")


class StepBar(Progress):
    """A progress bar with the task's description below it, on several lines if the terminal is narrow."""

    def __init__(self, **options: Any) -> None:
        super().__init__(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), **options)

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.tasks:
            yield self.make_tasks_table([task])
            # the terminal's console does not wrap lines unless told to
            yield Text(task.description, no_wrap=False, overflow="fold")


def set_up_logging(terminal: Terminal) -> None:
    """Sends all log records to the terminal's standard error."""
    # otherwise any client that does not use TLS, such as a port scanner, makes gRPC write to standard error
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    handler = _TerminalHandler(terminal)
    handler.setFormatter(_JsonFormatter() if terminal.json else _TextFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Also writes log lines and the final error to a file of bounded size while inside. Raises StartError."""
    try:
        handler = _LogFileHandler(path)
    except OSError as error:
        raise StartError(f"can't write {path}: {error.strerror}; pass another --state") from error
    handler.setFormatter(_TextFormatter("%Y-%m-%d %H:%M:%S"))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    except UserError as error:
        handler.handle(_record(str(error)))  # the terminal shows it as the last line
        raise
    except Exception as error:
        handler.handle(_record(f"ended by a {type(error).__name__}", error))
        raise
    finally:
        root.removeHandler(handler)
        handler.close()


def option_text(option: str, path: Path | None) -> str:
    """An option with a path, for a command that is shown to be typed: with a space before it; empty without a path."""
    return "" if path is None else f" {option} {shlex.quote(str(path))}"


def escaped(text: str) -> str:
    """One line without control characters, because log lines quote what peers sent."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\t" else ascii(c)[1:-1] for c in text)


def to_json(values: Mapping[str, Any]) -> str:
    """One line of JSON; a float that is not finite becomes null."""
    return json.dumps(
        {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        },
        allow_nan=False,
    )


def check_writable(path: Path, option: str, *, makes_folder: bool = False) -> None:
    """Checks now whether a file can be written, rather than at the end. Leaves things as they were, except that with
    `makes_folder`, it makes the folder if it is missing. Raises StartError.
    """
    try:
        is_new = kind_of(path) is None
        if makes_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
        if is_new:
            path.unlink()
    except OSError as error:
        raise _not_written(path, option, error) from error


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes the file of `--json FILE`. Raises StartError."""
    write_output(path, (to_json(values) + "\n").encode(), "--json")


def write_output(path: Path, data: bytes, option: str) -> None:
    """Writes the file that an option names. Raises StartError."""
    try:
        write_whole(path, data)
    except OSError as error:
        raise _not_written(path, option, error) from error


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file that the user named. On a full disk, what was there stays. Raises OSError."""
    if kind_of(path) not in {None, stat.S_IFREG}:  # such as /dev/stdout
        path.write_bytes(data)
        return
    try:
        write_atomically(path.resolve(), data)
    except OSError as error:
        if error.errno not in _ONLY_IN_PLACE:
            raise
        path.write_bytes(data)


def results_not_written(error: OSError) -> StartError:
    return StartError(f"can't write the results to standard output: {error.strerror}; send them elsewhere")


def _not_written(path: Path, option: str, error: OSError) -> StartError:
    return StartError(f"can't write {path}: {error.strerror}; pass another {option} FILE")


class RepeatLimit:
    """Limits what each line of code logs. Otherwise a stranger who triggers a line again and again could push
    everything else out of the log. After many lines in a short time, one passes now and then, and says how many were
    left out. The traceback of a failure is shown once.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._places: dict[tuple[str, int], tuple[TokenBucket, int]] = {}
        """For each line of code, how much it may still log, and how many of its records were left out."""
        self._traced: set[tuple[str, int, str]] = set()

    def admit(self, record: logging.LogRecord) -> logging.LogRecord | None:
        """The record to show; None if it is left out."""
        place, now = (record.pathname, record.lineno), self._clock()
        bucket, left_out = self._places.get(place) or (TokenBucket(1 / _LINE_EVERY_S, _LINES, now), 0)
        refused = bucket.take(1.0, now) > 0
        if refused:
            bucket.give_back(1.0)
        self._places[place] = bucket, left_out + 1 if refused else 0
        if refused:
            return None
        shown, text = copy.copy(record), record.getMessage()
        if left_out:
            text += f" ({left_out} more like it {'was' if left_out == 1 else 'were'} left out)"
        if record.exc_info and (error := record.exc_info[1]) is not None and not self._is_new(error):
            text += f": {type(error).__name__}: {error}, at the same place as before"
            shown.exc_info = shown.exc_text = None
        shown.msg, shown.args = text, ()
        return shown

    def _is_new(self, error: BaseException) -> bool:
        """Whether this is the first error of its type at this line of code."""
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        place = ("", 0) if trace is None else (trace.tb_frame.f_code.co_filename, trace.tb_lineno)
        known = (*place, type(error).__name__) in self._traced
        self._traced.add((*place, type(error).__name__))
        return not known


class _TerminalHandler(logging.Handler):
    def __init__(self, terminal: Terminal) -> None:
        super().__init__()
        self._terminal = terminal
        self._limit = RepeatLimit()
        self._told: list[str] = []
        """The outputs of which the log says that nobody reads them."""

    def emit(self, record: logging.LogRecord) -> None:
        if (shown := self._limit.admit(record)) is not None:
            self._terminal.log(self.format(shown))
        # here and not where it is noticed: there, a thread that holds the console's lock would wait for this handler
        if unread := [name for name in self._terminal.unread_outputs if name not in self._told]:
            self._told += unread
            logger.warning("nobody reads %s any more, so nothing is shown there", " and ".join(unread))


class _LogFileHandler(RotatingFileHandler):
    def __init__(self, path: Path) -> None:
        super().__init__(
            path, maxBytes=LOG_FILE_BYTES, backupCount=1, encoding="utf-8", errors="backslashreplace"
        )
        self._limit = RepeatLimit()

    def _open(self) -> TextIOWrapper:
        """Opens the log, but follows no link, which another user may have planted."""
        descriptor = open_plainly(Path(self.baseFilename), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        return open(descriptor, "a", encoding=self.encoding, errors=self.errors)

    def emit(self, record: logging.LogRecord) -> None:
        if (shown := self._limit.admit(record)) is not None:
            super().emit(shown)

    def handleError(self, record: logging.LogRecord) -> None:
        """On a full disk, lines are missing from the file, but not on the terminal."""

    def close(self) -> None:
        with suppress(OSError):  # closing tries again to write what could not be written
            super().close()


class _TextFormatter(logging.Formatter):
    def __init__(self, clock: str = "%H:%M:%S") -> None:
        super().__init__()
        self._clock = clock

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime(self._clock, time.localtime(record.created))
        level = "" if record.levelno < logging.WARNING else f"{_level(record)}: "
        lines = [f"{clock} {level}{escaped(record.getMessage())}"]
        if record.exc_info:
            # indented, because the lines of an error's text must not look like lines of the log
            lines += [f"  {escaped(line)}" for line in self.formatException(record.exc_info).split("\n")]
        return "\n".join(lines)


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        values = {
            "time": record.created,
            "level": _level(record),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            values["exception"] = self.formatException(record.exc_info)
        return to_json(values)


def _record(message: str, error: Exception | None = None) -> logging.LogRecord:
    raised = None if error is None else (type(error), error, error.__traceback__)
    return logging.LogRecord(__name__, logging.ERROR, __file__, 0, message, (), raised)


def _level(record: logging.LogRecord) -> str:
    """The level, by its number, because hivemind renames WARNING."""
    return {logging.WARNING: "warning", logging.ERROR: "error"}.get(record.levelno, record.levelname.lower())
