"""What was wanted of a figure, and whether it was reached."""

from collections.abc import Iterable
from dataclasses import dataclass

from rich.table import Table


@dataclass(frozen=True)
class Verdict:
    """One figure, and what was wanted of it."""

    what: str
    goal: str
    figure: str
    is_reached: bool | None = None
    """None: nothing was wanted."""

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
