"""What tests ask of processes that may end while they are asked."""

from collections.abc import Iterable

import psutil


def runs(process: psutil.Process) -> bool:
    """Whether it still runs; a process that nobody has collected yet does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:  # it ended between the two
        return False


def gone(processes: Iterable[psutil.Process]) -> bool:
    return not any(map(runs, processes))


def name_of(process: psutil.Process) -> str:
    """Empty if it has gone."""
    try:
        return str(process.name())
    except psutil.Error:
        return ""


def children_with(word: str) -> list[psutil.Process]:
    """This process's children that have it in their command line."""
    return [child for child in psutil.Process().children() if word in _command_line(child)]


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
