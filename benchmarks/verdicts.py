"""Measured figures, and whether they reached their targets."""

from collections.abc import Iterable
from dataclasses import dataclass

from rich.table import Table


@dataclass(frozen=True)
class Verdict:
    """One figure with its target."""

    what: str
    goal: str
    figure: str
    is_reached: bool | None = None
    """Whether the target was reached. None: there is no target."""

    @property
    def words(self) -> str:
        return {None: "", True: "reached", False: "missed"}[self.is_reached]


def table_of(title: str, verdicts: Iterable[Verdict]) -> Table:
    table = Table(title=title)
    for column in ("what", "goal", "figure", ""):
        table.add_column(column)
    for verdict in verdicts:
        table.add_row(verdict.what, verdict.goal, verdict.figure, verdict.words)
    return table
