"""What a command shows: log lines for people or as JSON, stages of starting, and JSON lines for programs."""

import json
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

from rich.console import Console

logger = logging.getLogger(__name__)


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


def set_up_logging(terminal: Terminal) -> None:
    """Sends all log records to the terminal's standard error. Call it before anything imports hivemind."""
    os.environ.setdefault("HIVEMIND_LOGLEVEL", "ERROR")
    # hivemind's import uses torch.jit, which torch has deprecated
    warnings.filterwarnings("ignore", message=r".*torch\.jit.*")
    handler = _TerminalHandler(terminal.err)
    handler.setFormatter(_JsonFormatter() if terminal.json else _TextFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def quiet_hivemind() -> None:
    """Takes hivemind's own log handler away; its errors come as our log lines. Call it once hivemind is imported."""
    from hivemind.utils.logging import use_hivemind_log_handler

    use_hivemind_log_handler("nowhere")
    logging.getLogger("hivemind").setLevel(os.environ["HIVEMIND_LOGLEVEL"])


def to_json(values: Mapping[str, Any]) -> str:
    """One line of JSON; a float that is not finite becomes null."""
    return json.dumps(
        {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        },
        allow_nan=False,
    )


class _TerminalHandler(logging.Handler):
    """Writes by way of rich, so that lines stand above what moves."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(self.format(record))


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
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


def _level(record: logging.LogRecord) -> str:
    """hivemind renames WARNING, so the number decides."""
    return {logging.WARNING: "warning", logging.ERROR: "error"}.get(record.levelno, record.levelname.lower())
