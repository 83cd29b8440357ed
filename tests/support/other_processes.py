"""Questions about processes that may end at any time."""

from collections.abc import Iterable

import psutil


def runs(process: psutil.Process) -> bool:
    """Whether the process still runs. A process that has ended but was not waited for does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:  # it ended between the two
        return False


def gone(processes: Iterable[psutil.Process]) -> bool:
    return not any(map(runs, processes))


def name_of(process: psutil.Process) -> str:
    """The process's name. Empty if it has gone."""
    try:
        return str(process.name())
    except psutil.Error:
        return ""


def children_with(word: str) -> list[psutil.Process]:
    """This process's children that have the word in their command line."""
    return [child for child in psutil.Process().children() if word in _command_line(child)]


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
