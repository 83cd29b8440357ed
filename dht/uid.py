"""Names of experts: `layer.i.j`, a layer number and a coordinate in that layer's grid; and the coordinates of grids."""

import re
from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

from peer.errors import WireError

_UID_PATTERN = re.compile(r"(0|[1-9][0-9]{0,5})(\.(0|[1-9][0-9]{0,5})){1,8}")


class UID(NamedTuple):
    """An expert's name. `layer` counts from 0; `coordinate` has one number per grid dimension."""

    layer: int
    coordinate: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.layer}.{'.'.join(map(str, self.coordinate))}"

    @classmethod
    def parse(cls, text: str) -> "UID":
        """Raises WireError if the text is not a UID in its one normal form."""
        if not _UID_PATTERN.fullmatch(text):
            raise WireError(f"not an expert UID: {text[:80]!r}; expected layer.i.j, such as 0.3.1")
        layer, *coordinate = map(int, text.split("."))
        return cls(layer, tuple(coordinate))


def grid_coordinates(grid: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """All coordinates of a grid, in row-major order."""
    return product(*map(range, grid))


def number_of(coordinate: Sequence[int], grid: Sequence[int]) -> int:
    """A coordinate's number in row-major order."""
    number = 0
    for index, size in zip(coordinate, grid, strict=True):
        number = number * size + index
    return number


def coordinate_of(number: int, grid: Sequence[int]) -> tuple[int, ...]:
    """The coordinate with this number in row-major order."""
    coordinate: list[int] = []
    for size in reversed(grid):
        number, index = divmod(number, size)
        coordinate.append(index)
    return tuple(reversed(coordinate))
