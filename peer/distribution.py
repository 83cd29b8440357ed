"""How values are spread: counts in buckets, as a Prometheus histogram has them."""

from bisect import bisect_left
from collections.abc import Sequence

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Bounds for how long calls and computations take."""


class Distribution:
    """Counts values. As large after many as after few."""

    def __init__(self, bounds: Sequence[float]) -> None:
        """`bounds`: the upper ones, ascending; there is one bucket more, for what lies beyond."""
        self.total = 0.0
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)

    @property
    def count(self) -> int:
        return sum(self._counts)

    def note(self, value: float) -> None:
        self.total += value
        self._counts[bisect_left(self._bounds, value)] += 1

    def buckets(self) -> list[tuple[str, float]]:
        """Upper bound → how many values are no larger."""
        counts, so_far = list(self._counts), 0
        found = []
        for bound, count in zip([*map(str, self._bounds), "+Inf"], counts, strict=True):
            so_far += count
            found.append((bound, float(so_far)))
        return found
