"""Tables that fit on the terminal."""

from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

_WIDE = 10_000


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
