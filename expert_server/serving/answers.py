"""Assembles the answers to a call's rows as its experts finish. Pure.

A row is answered once: when all of its experts have finished, or after `flush` with those that have.

Shape suffixes as in assignment.py: R = rows, P = pairs, A = some rows, Q = the pairs of those, row by row, D = width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from expert_server.serving.assignment import Assignment, sum_by_row
from peer.codec import Booleans, Integers
from peer.wire import expert_pb2

_MOST_PAIRS = 2**16
"""The most pairs in one AnsweredRows message, which then takes less than 1 MiB."""


@dataclass(frozen=True, slots=True, eq=False)
class RowAnswers:
    """Answers to some rows of a call."""

    rows: Integers
    """[A], ascending."""
    pairs: Integers
    """[Q]: the pairs whose experts are in the answers."""
    places: Integers
    """[Q]: each pair's place among all pairs of its row."""
    counts: Integers
    """[A]: how many pairs each row has in its answer."""
    tensor: Tensor
    """[A, D]"""

    def message(
        self, assignment: Assignment, payload_bytes: int, products: bytes = b""
    ) -> expert_pb2.AnsweredRows:
        masks: Sequence[int] = ()
        if len(self.pairs) < (assignment.starts[self.rows + 1] - assignment.starts[self.rows]).sum():
            bits = np.uint64(1) << self.places.astype(np.uint64)
            masks = np.bitwise_or.reduceat(bits, np.cumsum(self.counts) - self.counts).tolist()
        rows = () if len(self.rows) == len(assignment) else self.rows.tolist()
        return expert_pb2.AnsweredRows(rows=rows, masks=masks, products=products, payload_bytes=payload_bytes)


class AnswerAssembler:
    """Takes the outcome of each expert, and returns the answers that this makes ready."""

    def __init__(
        self, assignment: Assignment, width: int, *, weighs: bool, expected: Booleans | None = None
    ) -> None:
        """`weighs`: whether answers are weighted means, as in forward, or sums. `expected`: a mask of the expected
        pairs [P].
        """
        self.tensor: Tensor = torch.empty(len(assignment.rows), width)
        """[P, D]: the experts' results, valid where `_there`."""
        self.sent: Booleans = np.zeros(len(assignment.rows), np.bool_)
        """[P]: which pairs are in the answers so far."""
        self._assignment = assignment
        self._weighs = weighs
        self._expected = np.ones_like(self.sent) if expected is None else expected
        self._there = np.zeros_like(self.sent)
        self._missing = np.bincount(assignment.rows[self._expected], minlength=len(assignment))
        """[R]: how many experts of each row have not finished."""
        self._is_done = self._missing == 0
        """[R]: whether a row has been answered, or all of its experts have failed."""
        self._is_flushed = False

    def take(self, outcomes: Sequence[tuple[int, Tensor | None]]) -> Iterator[RowAnswers]:
        """`outcomes`: an expert's index, and its numbers for its rows, or None if it failed; each expert once."""
        touched = [np.empty(0, np.int64)]
        for expert, tensor in outcomes:
            pairs = self._assignment.pairs_of(expert)
            rows = self._assignment.rows[pairs][self._expected[pairs]]
            self._missing[rows] -= 1
            touched.append(rows)
            if tensor is not None:
                self.tensor[pairs] = tensor
                self._there[pairs] = self._expected[pairs]
        return self._answer(np.unique(np.concatenate(touched)))

    def flush(self) -> Iterator[RowAnswers]:
        """From now on, rows are answered with the experts that have finished, if there are any."""
        self._is_flushed = True
        return self._answer(np.arange(len(self._assignment)))

    def is_needed(self, expert: int) -> bool:
        """Whether a row of this expert is still unanswered."""
        return not self._is_done[self._assignment.rows[self._assignment.pairs_of(expert)]].all()

    def _answer(self, rows_A: Integers) -> Iterator[RowAnswers]:
        rows_A = rows_A[~self._is_done[rows_A]]
        if not self._is_flushed:
            rows_A = rows_A[self._missing[rows_A] == 0]
        most = max(1, _MOST_PAIRS // self._assignment.most_experts)
        for begin in range(0, len(rows_A), most):
            yield from self._answer_block(rows_A[begin : begin + most])

    def _answer_block(self, rows_A: Integers) -> Iterator[RowAnswers]:
        pairs_Q, places_Q, counts_A = self._assignment.of_rows(rows_A, self._there)
        self._is_done[rows_A] = (counts_A > 0) | (self._missing[rows_A] == 0)
        rows_A, counts_A = rows_A[counts_A > 0], counts_A[counts_A > 0]
        if len(rows_A):
            self.sent[pairs_Q] = True
            shares_Q = self._assignment.shares(pairs_Q, counts_A) if self._weighs else None
            tensor_AD = sum_by_row(self.tensor, pairs_Q, counts_A, shares_Q)
            yield RowAnswers(rows_A, pairs_Q, places_Q, counts_A, tensor_AD)
