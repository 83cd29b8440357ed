"""What a peer knows of one layer's prefixes, on a grid that it can't know whole."""

from collections.abc import Collection, Sequence

import numpy as np

from dht.beam_search import Floats, select_experts

Coordinate = tuple[int, ...]


class LayerIndex:
    """Prefix tables that are filled as prefixes are read. What was read and is empty is known as well."""

    def __init__(self, grid: tuple[int, ...]) -> None:
        self.alive = [np.zeros(grid[: d + 1], dtype=bool) for d in range(len(grid))]
        """For each grid dimension, of shape grid[:d+1]: True where the prefix is known to be active."""
        self._known = [np.zeros(grid[:d], dtype=bool) for d in range(len(grid))]

    def knows(self, prefix: Coordinate) -> bool:
        return len(prefix) < len(self._known) and bool(self._known[len(prefix)][prefix])

    def knows_all_of(self, length: int) -> bool:
        """Whether every active prefix of so many coordinates is known."""
        return length > 0 and bool(self._known[length][self.alive[length - 1]].all())

    def note(self, prefix: Coordinate, active: Collection[int]) -> None:
        """These coordinates after the prefix are active, and no others."""
        row = self.alive[len(prefix)][prefix]
        row[:] = False
        row[list(active)] = True
        self._known[len(prefix)][prefix] = True

    def drop(self, expert: Coordinate) -> None:
        """Nobody hosts the expert, whatever its prefix says; until the prefix is read again."""
        self.alive[-1][expert] = False

    def best(self, scores: Sequence[Floats], width: int, everything: bool = False) -> list[Coordinate]:
        """The prefixes in the beams of all rows: the `width` best active ones of each.

        `scores` has one float32 [R, G_d] for each dimension of these prefixes. `everything`: as if all were active.
        """
        tables = self.alive[: len(scores)]
        if everything:
            tables = [np.ones_like(table) for table in tables]
        chosen = select_experts(scores, tables, width, width)
        return [tuple(c) for c in np.unique(chosen.coordinates[chosen.valid], axis=0).tolist()]
