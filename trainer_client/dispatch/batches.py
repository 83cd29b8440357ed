"""The records of one training step, and the array functions that group its rows by expert.

A step's rows are all tokens of a batch, sequence after sequence. Each row is sent to K experts, one for each of its
slots. `group_by_expert` gathers the rows of one expert into an `ExpertBatch`; the batches that go to one node travel
together in one `NodeCall`. `ExpertCaller` is the network as dispatch sees it: tests put a function in its place.

Shapes: R rows, K slots of each row, W width of the experts, G_d size of grid dimension d, r rows of one batch, s its
segments (the rows of one sequence each), n rows whose experts are chosen again.
"""

from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, Protocol, Self, TypeAlias

import numpy as np

from dht.announcements import NodeInfo
from dht.beam_search import Selection
from dht.directory import PrefixTables
from dht.uid import UID
from peer.codec import Booleans, Floats, Integers
from peer.errors import ExpertError
from peer.identity import PeerID

Direction: TypeAlias = Literal["forward", "backward"]


@dataclass(frozen=True)
class RoutedRows:
    """What is sent in one forward pass of a layer."""

    layer: int
    inputs: Floats  # [R, W]
    scores: Sequence[Floats]  # one [R, G_d] per grid dimension; rows that lack answers choose again by them
    k: int
    sequence_length: int  # row r is position r % sequence_length of sequence r // sequence_length
    keep: bool  # a backward pass is meant to follow
    bias: Floats | None = None  # of the grid's shape, added to the scores of experts when rows choose again

    @property
    def grid(self) -> tuple[int, ...]:
        return tuple(table.shape[1] for table in self.scores)


@dataclass(frozen=True, eq=False)
class ExpertBatch:
    """The rows that go to one expert, in order of sequence and position, and the slot that each came from."""

    uid: UID
    rows: Integers  # [r], indices into the step's rows
    slots: Integers  # [r], which of the row's K choices this expert is
    lengths: Integers  # [s], rows of each segment
    positions: Integers  # [r], in their sequences


@dataclass(frozen=True)
class KeptForward:
    """How to name a forward pass that the node that answered it has kept."""

    request_id: bytes
    index: int


@dataclass(frozen=True, eq=False)
class Request:
    """What one expert is asked."""

    batch: ExpertBatch
    inputs: Floats  # [r, W]
    gradients: Floats | None = None  # [r, W], of the updates; None in forward
    keep: bool = False
    """In forward: whether a backward call is meant to follow."""
    kept: KeptForward | None = None
    """In backward: where the node keeps the inputs, so that they need not be sent again."""


@dataclass(frozen=True)
class NodeCall:
    """One call to one node, with the requests to all its experts."""

    node: NodeInfo
    direction: Direction
    requests: Sequence[Request]
    deadline_s: float


@dataclass(frozen=True)
class Answer:
    """What one expert answered for a batch: a tensor, or why there is none.

    Names the batch and not the request, so that what was sent can be freed as soon as its call has ended.
    """

    batch: ExpertBatch
    peer_id: PeerID
    tensor: Floats | None  # [r, W]
    error: ExpertError | None = None
    call_lost: bool = False
    """The whole call broke off or reached its deadline; the node has said nothing of the expert."""
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

    def call(self, call: NodeCall) -> AsyncIterator[Answer]:
        """Yields one answer to each request, in any order. Raises ExpertError when the call failed as a whole; then no
        more answers come.
        """
        ...


@dataclass(eq=False)
class SentBatch:
    """A batch from its first forward call to its backward call. Holds no tensors."""

    batch: ExpertBatch
    peers: list[PeerID] = field(default_factory=list)
    """Who has still to answer: one peer, or two when the first was slow."""
    attempts: int = 0
    hedge: PeerID | None = None
    answered_by: PeerID | None = None
    kept: KeptForward | None = None
    counts: Booleans = field(
        init=False
    )  # [r], the rows for which the answer counts: others may have come before

    def __post_init__(self) -> None:
        self.counts = np.zeros(len(self.batch.rows), dtype=bool)

    @property
    def is_waiting(self) -> bool:
        """Neither answered nor failed by all who were asked."""
        return self.answered_by is None and bool(self.peers)


@dataclass
class ForwardPass:
    """What a forward pass brought, and what the backward pass needs."""

    rows: RoutedRows
    coordinates: Integers  # [R, K, dims], of the expert in each slot
    updates: Floats  # [R, K, W], zeros where nobody answered
    answered: Booleans  # [R, K]
    answers: list[SentBatch] = field(default_factory=list)
    """The batches whose answers count, in the order in which these came."""

    @classmethod
    def of(cls, rows: RoutedRows) -> Self:
        """Before anybody has answered."""
        count, width = rows.inputs.shape
        return cls(
            rows,
            np.zeros((count, rows.k, len(rows.scores)), dtype=np.int64),
            np.zeros((count, rows.k, width), dtype=np.float32),
            np.zeros((count, rows.k), dtype=bool),
        )


def group_by_expert(
    layer: int, coordinates: Integers, wanted: Booleans, grid: tuple[int, ...], sequence_length: int
) -> Iterator[ExpertBatch]:
    """One batch for each expert that `wanted` [R, K] slots name in `coordinates` [R, K, dims]."""
    rows, slots = np.nonzero(wanted)  # in order of rows
    experts = np.ravel_multi_index(tuple(coordinates[rows, slots].T), grid)
    order = np.argsort(experts, kind="stable")  # by expert, and within it still in order of rows
    rows, slots, experts = rows[order], slots[order], experts[order]
    sequences, positions = np.divmod(rows, sequence_length)
    is_first = _changes(experts)
    begins = np.flatnonzero(is_first | _changes(sequences))  # of segments
    lengths = np.diff(begins, append=len(rows))
    starts = np.flatnonzero(is_first)  # of batches
    places = np.stack(np.unravel_index(experts[starts], grid), axis=-1).tolist()
    batch_bounds = pairwise([*starts, len(rows)])
    segment_bounds = pairwise([*np.searchsorted(begins, starts), len(begins)])
    for place, (start, end), (first, last) in zip(places, batch_bounds, segment_bounds, strict=True):
        part = slice(start, end)
        yield ExpertBatch(
            UID(layer, tuple(place)), rows[part], slots[part], lengths[first:last], positions[part]
        )


def _changes(numbers: Integers) -> Booleans:
    """Where one differs from the one before, the first included."""
    changes = np.ones(len(numbers), dtype=bool)
    np.not_equal(numbers[1:], numbers[:-1], out=changes[1:])
    return changes


def is_live(coordinates: Integers, tables: PrefixTables) -> Booleans:
    """Which of the experts at `coordinates` [..., dims] are live."""
    live: Booleans = tables[-1][tuple(np.moveaxis(coordinates, -1, 0))]
    return live


def prefer_proven(sure: Selection, others: Selection, wary: Booleans) -> Selection:
    """For the `wary` rows [n] the `sure` experts come before the `others`; each expert once."""
    # (n, others, sure)
    same = (others.coordinates[:, :, None, :] == sure.coordinates[:, None, :, :]).all(axis=-1)
    preferred = sure.valid & wary[:, None]
    left = others.valid & ~(same & preferred[:, None, :]).any(axis=-1)
    return Selection(
        np.concatenate([sure.coordinates, others.coordinates], axis=1),
        np.concatenate([sure.scores, others.scores], axis=1),
        np.concatenate([preferred, left], axis=1),
    )


def refill(
    coordinates: Integers, taken: Booleans, free: Booleans, fresh: Selection
) -> tuple[Integers, Booleans]:
    """Puts each row's best fresh experts into its free slots, none that the row has already.

    `coordinates` [n, K, dims] are the rows' slots. `taken` [n, K] are those that hold an expert, `free` [n, K] those to
    be filled, and no slot is both. `fresh` has more experts for the same rows, best first. Returns the new coordinates,
    and which slots were filled [n, K].
    """
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
