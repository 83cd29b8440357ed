"""What a command shows: log lines for people or as JSON, stages of starting, and JSON lines for programs.

Tables that fit on the terminal.

The bar of a training, with what its last step brought.
"""

import json
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from enum import StrEnum
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from peer.errors import StartError, UserError

logger = logging.getLogger(__name__)

LOG_FILE_BYTES = 5_000_000
"""A log file that would grow beyond is kept as `….1`, in place of the one before."""
_WIDE = 10_000


class LogFormat(StrEnum):
    """How a command speaks: to people, or in JSON lines to programs."""

    TEXT = "text"
    JSON = "json"


class Terminal:
    """A command's standard output and standard error.

    Results go to standard output: the invite, tables, JSON lines. All else goes to standard error.
    """

    def __init__(self, log_format: LogFormat) -> None:
        self.json = log_format is LogFormat.JSON
        self.out = Console(soft_wrap=True, highlight=False, markup=False)
        self.err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
        self.live = self.err.is_terminal and not self.json
        """Whether somebody watches, so that lines may move."""

    def line(self, text: str) -> None:
        """A line on standard output, at once."""
        self.out.print(text)
        self.out.file.flush()

    def event(self, kind: str, values: Mapping[str, Any]) -> None:
        """A JSON line on standard output, at once."""
        self.line(to_json({"event": kind, **values}))

    @contextmanager
    def stages(self, first: str) -> Iterator[Callable[[str], None]]:
        """Gives a function that is told what happens now: a spinner when somebody watches, else a log line each."""
        if not self.live:
            logger.info(first)
            yield logger.info
            return
        with self.err.status(first) as status:
            yield status.update


class FittingTable:
    """A table that leaves out the columns that matter least, rather than break words, where all would be too wide."""

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
        gone = f" (too narrow for: {', '.join(without)})" if without else ""
        table = Table(title=self._title + gone)
        for n in shown:
            table.add_column(self._columns[n], overflow="fold")
        for row in self._rows:
            table.add_row(*(row[n] for n in shown))
        return table


class StepBar(Progress):
    """A bar, and below it a task's description, which takes several lines where the terminal is narrow."""

    def __init__(self, **options: Any) -> None:
        super().__init__(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), **options)

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.tasks:
            yield self.make_tasks_table([task])
            # the terminal's console leaves lines whole unless told otherwise
            yield Text(task.description, no_wrap=False, overflow="fold")


def set_up_logging(terminal: Terminal) -> None:
    """Sends all log records to the terminal's standard error. Call it before anything imports hivemind."""
    os.environ.setdefault("HIVEMIND_LOGLEVEL", "ERROR")
    # else whoever connects and speaks no TLS, such as a port scanner, makes gRPC write a line to standard error
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    # hivemind's import uses torch.jit, which torch has deprecated
    warnings.filterwarnings("ignore", message=r".*torch\.jit.*")
    handler = _TerminalHandler(terminal.err)
    handler.setFormatter(_JsonFormatter() if terminal.json else _TextFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Inside, all log lines also go to a file, which stays small; so does what ends it. Raises StartError."""
    try:
        handler = _LogFileHandler(
            path, maxBytes=LOG_FILE_BYTES, backupCount=1, encoding="utf-8", errors="backslashreplace"
        )
    except OSError as error:
        raise StartError(f"can't write {path}: {error.strerror}; pass another --state") from error
    handler.setFormatter(_TextFormatter("%Y-%m-%d %H:%M:%S"))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    except UserError as error:
        handler.handle(_record(str(error)))  # the terminal gets it as its last line
        raise
    except Exception as error:
        handler.handle(_record(f"ended by a {type(error).__name__}", error))
        raise
    finally:
        root.removeHandler(handler)
        handler.close()


def to_json(values: Mapping[str, Any]) -> str:
    """One line of JSON; a float that is not finite becomes null."""
    return json.dumps(
        {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        },
        allow_nan=False,
    )


def check_writable(path: Path, option: str) -> None:
    """Better known now than at the end. What the file holds stays. Raises StartError."""
    try:
        path.open("ab").close()
    except OSError as error:
        raise _not_written(path, option, error) from error


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """What `--json FILE` asks for. Raises StartError."""
    try:
        path.write_text(to_json(values) + "\n")
    except OSError as error:
        raise _not_written(path, "--json", error) from error


def _not_written(path: Path, option: str, error: OSError) -> StartError:
    return StartError(f"can't write {path}: {error.strerror}; pass another {option} FILE")


class _TerminalHandler(logging.Handler):
    """Writes by way of rich, so that lines stand above what moves."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(self.format(record))


class _LogFileHandler(RotatingFileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """A full disk costs lines of the file, which the terminal has too."""

    def close(self) -> None:
        with suppress(OSError):  # what could not be written is tried once more
            super().close()


class _TextFormatter(logging.Formatter):
    def __init__(self, clock: str = "%H:%M:%S") -> None:
        super().__init__()
        self._clock = clock

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime(self._clock, time.localtime(record.created))
        level = "" if record.levelno < logging.WARNING else f"{_level(record)}: "
        text = f"{clock} {level}{record.getMessage()}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


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
    """hivemind renames WARNING, so the number decides."""
    return {logging.WARNING: "warning", logging.ERROR: "error"}.get(record.levelno, record.levelname.lower())
