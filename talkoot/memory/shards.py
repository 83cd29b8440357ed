"""Writes the shards of a memory: each passage goes into a primary shard of its first cell, and a secondary one of its
second.

Shapes: N passages, T cells of each passage, D numbers in a vector.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np

from dht.memory import MAX_LEAVES, MAX_SHARD_BYTES, Cell, Passage, Place, ShardInfo, Vectors
from dht.uid import coordinate_of
from expert_server.memory.shard import PrimaryShard, SecondaryShard, Shard
from peer.codec import Integers
from peer.files import write_atomically
from peer.merkle import HASH_BYTES

_MOST_BYTES = MAX_SHARD_BYTES - 2**16
_PRIMARY_BYTES, _SECONDARY_BYTES = 8, 5
"""Bytes of a passage in a shard, in addition to its text and vector."""


class Passages(Protocol):
    """Passages by number."""

    def __getitem__(self, number: int, /) -> Passage: ...

    def size(self, number: int) -> int:
        """The size of the serialized passage, in bytes."""


def write_shards(
    folder: Path,
    passages: Passages,
    vectors_ND: Vectors,
    cells_NT: Integers,
    grid: tuple[int, ...],
    numbers: Integers,
    watch: Callable[[int], None] = lambda written: None,
) -> list[ShardInfo]:
    """Writes the passages with these `numbers` into the folder. `cells_NT`: the numbers of one cell or two.

    `watch` is called with the number of entries written. Raises OSError.
    """
    shards: list[ShardInfo] = []
    written = 0

    def write(kind: type[Shard], data: bytes, cell: Cell, leaves: int) -> bytes:
        nonlocal written
        root = kind.root_of(data)
        write_atomically(folder / root.hex(), data)
        shards.append(ShardInfo(cell, root, leaves, len(data), kind is SecondaryShard))
        written += leaves
        watch(written)
        return root

    dimensions = vectors_ND.shape[1]
    roots: list[bytes] = []
    shard_N, position_N = np.zeros(len(vectors_ND), np.int32), np.zeros(len(vectors_ND), np.int32)
    for cell, inside in _by_cell(cells_NT[:, 0], numbers, grid):
        sizes = (passages.size(number) + dimensions + _PRIMARY_BYTES for number in inside.tolist())
        for some in _parts(inside, sizes):
            data = PrimaryShard.build([passages[number] for number in some.tolist()], vectors_ND[some])
            shard_N[some], position_N[some] = len(roots), np.arange(len(some))
            roots.append(write(PrimaryShard, data, cell, len(some)))
    for column in cells_NT.T[1:]:
        for cell, inside in _by_cell(column, numbers, grid):
            # a root for each, although most have theirs from a few shards
            sizes = (dimensions + _SECONDARY_BYTES + HASH_BYTES for _ in inside)
            for some in _parts(inside, sizes):
                texts = [
                    Place(roots[shard], position)
                    for shard, position in zip(shard_N[some].tolist(), position_N[some].tolist(), strict=True)
                ]
                write(SecondaryShard, SecondaryShard.build(texts, vectors_ND[some]), cell, len(some))
    return shards


def _by_cell(cells_N: Integers, numbers: Integers, grid: tuple[int, ...]) -> Iterator[tuple[Cell, Integers]]:
    """For each cell with passages, their numbers, in order."""
    ordered = numbers[np.argsort(cells_N[numbers], kind="stable")]
    bounds = np.searchsorted(cells_N[ordered], range(prod(grid) + 1))
    for cell, (begin, end) in enumerate(pairwise(bounds.tolist())):
        if begin < end:
            yield coordinate_of(cell, grid), ordered[begin:end]


def _parts(numbers: Integers, sizes: Iterator[int]) -> Iterator[Integers]:
    """The passages in parts, each as large as fits into a shard."""
    begin = size = 0
    for end, each in enumerate(sizes):
        if end > begin and (size + each > _MOST_BYTES or end - begin == MAX_LEAVES):
            yield numbers[begin:end]
            begin, size = end, 0
        size += each
    yield numbers[begin:]
