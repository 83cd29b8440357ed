"""Which rows of a call each of its experts computes, with which weights, and how answers are computed from the experts'
results.

An expert's part of a row is a pair. Pairs are ordered expert by expert, and by row within an expert.

Shape suffixes: E = experts, S = segments, R = rows, P = pairs, A = some rows, Q = the pairs of those, row by row, D =
width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dht.uid import UID
from peer.codec import Booleans, Floats, Integers

_LARGEST = torch.finfo(torch.float32).max
_BLOCK_NUMBERS = 2**16
"""Numbers multiplied at once: copies of all rows of large calls would take as much memory as the calls."""
_RADIX_ROWS = 2**16
"""numpy sorts numbers up to this limit by radix sort, which takes a fraction of the time."""


@dataclass(frozen=True, eq=False)
class Assignment:
    """The rows of one call, and the experts of each."""

    uids: Sequence[UID]
    """[E], all different."""
    lengths: Integers
    """[S]: the lengths of the segments; each at least 1, with sum R."""
    positions: Integers
    """[R]"""
    ends: Integers
    """[E]: how many pairs this expert and those before it have together."""
    rows: Integers
    """[P], ascending within each expert. Each row has at least one pair."""
    weights: Floats
    """[P], finite and above 0."""

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def nbytes(self) -> int:
        arrays = (self.lengths, self.positions, self.ends, self.rows, self.weights, self.by_row, self.starts)
        return sum(array.nbytes for array in arrays)

    @cached_property
    def by_row(self) -> Integers:
        """[P]: the pairs row by row, those of one row in the order of the experts."""
        keys = self.rows.astype(np.uint16) if len(self) <= _RADIX_ROWS else self.rows
        return np.argsort(keys, kind="stable")

    @cached_property
    def starts(self) -> Integers:
        """[R + 1]: where each row's pairs begin in `by_row`."""
        return np.concatenate([[0], np.cumsum(np.bincount(self.rows, minlength=len(self)))])

    @cached_property
    def most_experts(self) -> int:
        """The largest number of experts of any row."""
        return int(np.diff(self.starts).max())

    @cached_property
    def _slices(self) -> list[slice]:
        return [slice(begin, end) for begin, end in pairwise([0, *self.ends.tolist()])]

    def pairs_of(self, expert: int) -> slice:
        return self._slices[expert]

    @cached_property
    def first_pairs(self) -> list[Integers]:
        """For each expert, the first pair of each of its segments. An expert's segments are the call's, without rows of
        other experts.
        """
        return self._by_expert(self._first_pairs)

    @cached_property
    def _first_pairs(self) -> Integers:
        is_first = np.ones(len(self.rows), np.bool_)
        is_first[1:] = np.diff(self.segment_of_row[self.rows]) != 0
        is_first[self.ends[:-1]] = True
        return np.flatnonzero(is_first)

    def _by_expert(self, numbers: Integers) -> list[Integers]:
        """`numbers`: one for each segment of each expert."""
        bounds = [0, *np.searchsorted(self._first_pairs, self.ends).tolist()]
        return [numbers[begin:end] for begin, end in pairwise(bounds)]

    @cached_property
    def segment_of_row(self) -> Integers:
        """[R]"""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    def segments(self) -> list[Tensor]:
        """The lengths of each expert's segments."""
        lengths = np.diff(self._first_pairs, append=len(self.rows))
        return [torch.from_numpy(own) for own in self._by_expert(lengths)]

    def of_rows(self, rows_A: Integers, is_in: Booleans) -> tuple[Integers, Integers, Integers]:
        """The pairs of some rows that are in the mask `is_in` [P].

        Returns the pairs [Q], each pair's place among all pairs of its row [Q], and the number of pairs of each row
        [A].
        """
        counts_A = self.starts[rows_A + 1] - self.starts[rows_A]
        begins_A = np.cumsum(counts_A) - counts_A
        places_Q = np.arange(counts_A.sum()) - np.repeat(begins_A, counts_A)
        pairs_Q = self.by_row[np.repeat(self.starts[rows_A], counts_A) + places_Q]
        is_in_Q = is_in[pairs_Q]
        counts_A = np.add.reduceat(is_in_Q, begins_A, dtype=np.int64) if len(rows_A) else counts_A
        return pairs_Q[is_in_Q], places_Q[is_in_Q], counts_A

    def shares(self, pairs_Q: Integers, counts_A: Integers) -> Floats:
        """Each pair's weight divided by the sum of those of its row [Q]. `counts_A`: pairs of each row, none 0."""
        weights_Q = self.weights[pairs_Q].astype(np.float64)  # in float64, so that sums do not overflow
        sums_A = np.add.reduceat(weights_Q, np.cumsum(counts_A) - counts_A)
        shares_Q: Floats = (weights_Q / np.repeat(sums_A, counts_A)).astype(np.float32)
        return shares_Q


def sum_by_row(
    tensor_PD: Tensor, pairs_Q: Integers, counts_A: Integers, shares_Q: Floats | None = None
) -> Tensor:
    """The sum of each row's pairs [A, D], multiplied by `shares_Q`; finite if the summands are."""
    with _one_thread():
        sums_AD: Tensor = F.embedding_bag(
            torch.from_numpy(pairs_Q),
            tensor_PD,
            torch.from_numpy(np.cumsum(counts_A) - counts_A),
            mode="sum",
            per_sample_weights=None if shares_Q is None else torch.from_numpy(shares_Q),
        )
        return sums_AD.clamp_(-_LARGEST, _LARGEST)


def products(gradients_RD: Floats, rows_Q: Integers, updates_PD: Floats, pairs_Q: Integers) -> Floats:
    """The dot product of each pair's update and its row's gradient [Q], clipped to finite numbers."""
    products_Q = np.empty(len(pairs_Q), np.float32)
    step = max(1, _BLOCK_NUMBERS // gradients_RD.shape[1])
    with np.errstate(over="ignore", invalid="ignore"):
        for at in range(0, len(pairs_Q), step):
            block = slice(at, at + step)
            gradients, updates = gradients_RD[rows_Q[block]], updates_PD[pairs_Q[block]]
            np.einsum("qd,qd->q", gradients, updates, out=products_Q[block])
        return np.nan_to_num(products_Q, copy=False)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Makes torch use one thread for what the event loop, or a thread beside it, computes. Starting more would cost
    more than they save.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # affects only this thread
    try:
        yield
    finally:
        torch.set_num_threads(threads)
