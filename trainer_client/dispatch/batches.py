"""Who gets which rows: groups a layer's chosen experts into one share of rows for each. Pure functions on arrays.

Shapes: R rows (all tokens of a batch, sequence after sequence), K experts for each row, r rows of one share.

What one expert is asked and answers, and the network as dispatch sees it: tests put a function in its place.

What is sent in one forward pass of one layer, and what it brought.

Shapes: R rows, K experts for each row, D hidden size.
"""

from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dht.announcements import NodeInfo
from dht.beam_search import Selection
from dht.uid import UID
from peer.codec import Floats
from peer.errors import ExpertError
from peer.identity import PeerID

Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]


@dataclass(frozen=True)
class ExpertBatch:
    """The rows that go to one expert, in order of sequence and position, and the slot each came from."""

    uid: UID
    rows: Integers  # [r], indices into the batch's rows
    slots: Integers  # [r], which of the row's K choices this expert is
    lengths: Integers  # [segments], rows of each sequence
    positions: Integers  # [r], in their sequences


def group_by_expert(
    layer: int, coordinates: Integers, wanted: Booleans, grid: tuple[int, ...], sequence_length: int
) -> Iterator[ExpertBatch]:
    """One share for each expert that `wanted` [R, K] slots name in `coordinates` [R, K, dims]."""
    rows, slots = np.nonzero(wanted)  # in order of rows
    experts = np.ravel_multi_index(tuple(coordinates[rows, slots].T), grid)
    order = np.argsort(experts, kind="stable")  # by expert, and within it still in order of rows
    rows, slots, experts = rows[order], slots[order], experts[order]
    sequences, positions = np.divmod(rows, sequence_length)
    is_first = _changes(experts)
    begins = np.flatnonzero(is_first | _changes(sequences))  # of segments
    lengths = np.diff(begins, append=len(rows))
    starts = np.flatnonzero(is_first)  # of shares
    places = np.stack(np.unravel_index(experts[starts], grid), axis=-1).tolist()
    share_bounds = pairwise([*starts, len(rows)])
    segment_bounds = pairwise([*np.searchsorted(begins, starts), len(begins)])
    for place, (start, end), (first, last) in zip(places, share_bounds, segment_bounds, strict=True):
        part = slice(start, end)
        yield ExpertBatch(
            UID(layer, tuple(place)), rows[part], slots[part], lengths[first:last], positions[part]
        )


def _changes(numbers: Integers) -> Booleans:
    """Where one differs from the one before, the first included."""
    changes = np.ones(len(numbers), dtype=bool)
    np.not_equal(numbers[1:], numbers[:-1], out=changes[1:])
    return changes


def prefer_proven(sure: Selection, others: Selection, wary: Booleans) -> Selection:
    """For the `wary` rows [n] the `sure` experts come before the `others`; each expert once."""
    same = (others.coordinates[:, :, None, :] == sure.coordinates[:, None, :, :]).all(
        axis=-1
    )  # (n, others, sure)
    preferred = sure.valid & wary[:, None]
    left = others.valid & ~(same & preferred[:, None, :]).any(axis=-1)
    return Selection(
        np.concatenate([sure.coordinates, others.coordinates], axis=1),
        np.concatenate([sure.scores, others.scores], axis=1),
        np.concatenate([preferred, left], axis=1),
    )


def refill(coordinates: Integers, taken: Booleans, fresh: Selection) -> tuple[Integers, Booleans]:
    """Puts each row's best fresh experts into its free slots, none that the row has already.

    `coordinates` [n, K, dims] and `taken` [n, K] are the rows' slots; `fresh` has more experts for the same rows, best
    first. Returns the new coordinates, and which slots were filled [n, K].
    """
    free = ~taken
    same = (fresh.coordinates[:, :, None, :] == coordinates[:, None, :, :]).all(axis=-1)  # (n, fresh, K)
    usable = fresh.valid & ~(same & taken[:, None, :]).any(axis=-1)  # (n, fresh)
    # the j-th free slot of a row takes the row's j-th usable fresh expert
    slot_rank = np.where(free, free.cumsum(axis=1) - 1, -1)  # (n, K)
    fresh_rank = np.where(usable, usable.cumsum(axis=1) - 1, -2)  # (n, fresh)
    match = slot_rank[:, :, None] == fresh_rank[:, None, :]  # (n, K, fresh)
    filled = match.any(axis=-1)
    source = match.argmax(axis=-1)  # (n, K)
    chosen = np.take_along_axis(fresh.coordinates, source[:, :, None], axis=1)
    return np.where(filled[:, :, None], chosen, coordinates), filled


Direction: TypeAlias = Literal["forward", "backward"]


@dataclass(frozen=True)
class Request:
    """What one expert is asked: its rows in segments, inputs and, backward, the gradients of its outputs."""

    uid: UID
    lengths: Sequence[int]
    """Rows of each segment."""
    positions: Sequence[int]
    """Of each row in its sequence."""
    inputs: Floats
    """[R, D]"""
    gradients: Floats | None
    """[R, D], or None in forward."""
    keep: bool = False
    """In forward: whether a backward call is meant to follow."""
    kept: "KeptForward | None" = None
    """In backward: where the node keeps the inputs, so that they need not be sent again."""


@dataclass(frozen=True)
class KeptForward:
    """How to name a forward pass that the node that answered it has kept."""

    request_id: bytes
    index: int


@dataclass(frozen=True)
class Answer:
    """What one expert answered: a tensor [R, D], or why it did not."""

    index: int
    """Which of the requests this answers."""
    tensor: Floats | None
    error: ExpertError | None = None
    update_count: int = 0
    """Optimizer steps the replica has taken."""
    kept: KeptForward | None = None
    """In forward: set when the node has kept what it was sent."""
    skipped_update: bool = False
    """In backward: the expert's guard refused the step."""
    rolled_back: bool = False
    """In backward: the expert went back to its last good state."""


class ExpertCaller(Protocol):
    """The network, as dispatch sees it."""

    def call(
        self, node: NodeInfo, direction: Direction, requests: Sequence[Request], deadline_s: float
    ) -> AsyncIterator[Answer]:
        """Yields answers in any order. Raises ExpertError when the call as a whole failed; then no more come."""
        ...


@dataclass(frozen=True)
class RoutedRows:
    """What is sent in one forward pass, and the scores by which each row chooses its k experts."""

    layer: int
    inputs: Floats  # [R, D]
    scores: Sequence[Floats]  # one [R, G_d] per grid dimension
    k: int
    sequence_length: int
    keep: bool
    first: Selection | None
    """Whom to ask first; None: the best. Where one of them has gone since, all rows ask their best."""

    @property
    def grid(self) -> tuple[int, ...]:
        return tuple(table.shape[1] for table in self.scores)


@dataclass(frozen=True)
class AnsweredShare:
    """A share that was answered, by whom, and for which of its rows [r] the answer counts."""

    share: ExpertBatch
    peer_id: PeerID
    counts: Booleans
    kept: KeptForward | None = None

    def request(self, inputs: Floats, gradients: Floats) -> Request:
        """Its backward request: the gradients [R, K, D] of its rows, zero where the slot has another's answer."""
        own = gradients[self.share.rows, self.share.slots]
        if not self.counts.all():
            own[~self.counts] = 0
        return request_of(self.share, inputs, own, kept=self.kept)


@dataclass
class ForwardPass:
    """What the forward calls of one layer brought, and what the backward calls need."""

    layer: int
    sequence_length: int
    inputs: Floats  # [R, D]
    outputs: Floats  # [R, K, D]; zeros where nobody answered
    answered: Booleans  # [R, K]
    coordinates: Integers  # [R, K, dims], of the expert in each slot
    answers: list[AnsweredShare] = field(default_factory=list)


def request_of(
    share: ExpertBatch,
    inputs: Floats,
    gradients: Floats | None,
    *,
    keep: bool = False,
    kept: KeptForward | None = None,
) -> Request:
    """What the expert of a share is asked, of the pass's inputs [R, D]."""
    return Request(
        share.uid,
        share.lengths.tolist(),
        share.positions.tolist(),
        inputs[share.rows],
        gradients,
        keep,
        kept,
    )
