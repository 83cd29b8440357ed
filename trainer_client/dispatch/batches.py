"""The records of one training step, and the array functions that group its rows by node.

A step's rows are all tokens of a batch, sequence after sequence. Each row is sent to K experts, one for each of its
slots. All rows for one node travel together: each row once, however many of the node's experts it is for. The node
answers a row with S = sum of u f / sum of u over the experts that answered, where u are relative weights and f the
experts' updates. A row's answer is either used as a whole or not at all. `ExpertCaller` is the network as dispatch sees
it: tests put a function in its place.

Shapes: R rows, S segments (the rows of one sequence each), K slots of each row, W width of the experts, G_d size of
score table d, n rows of one batch, s its segments, m some of its rows.
"""

from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, NamedTuple, Protocol, Self, TypeAlias

import numpy as np
from grpc import StatusCode

from dht.announcements import NodeInfo
from dht.beam_search import Selection, score_columns
from dht.directory import PrefixTables
from dht.uid import UID
from peer.codec import Booleans, Floats, Integers, decode_scalars, encode_scalars
from peer.errors import ExpertError
from peer.identity import PeerID
from peer.layers import KeyValueCache
from peer.wire import expert_pb2

Direction: TypeAlias = Literal["forward", "backward"]

LEAST_WEIGHT = np.float32(1e-6)
"""The smallest weight, relative to that of the row's best expert at the same node. Smaller ones are raised to it, so
that all are normal numbers.
"""


@dataclass(frozen=True, eq=False)
class Segments:
    """The segments of a step's rows: consecutive rows that belong to one sequence."""

    lengths: Integers  # [S], each at least 1
    positions: Integers  # [R], of each row in its sequence

    @classmethod
    def whole(cls, sequences: int, length: int) -> Self:
        """Segments of whole sequences of this length."""
        return cls(np.full(sequences, length), np.tile(np.arange(length), sequences))

    @classmethod
    def after(cls, firsts: Integers, lengths: Integers) -> Self:
        """`firsts` [S]: the position of the first row of each."""
        starts = np.repeat(np.cumsum(lengths) - lengths - firsts, lengths)
        return cls(lengths, np.arange(len(starts)) - starts)

    @property
    def of_rows(self) -> Integers:
        """[R]: the segment of each row."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)


@dataclass(frozen=True, slots=True)
class HeldRows:
    """The rows of a sequence that one expert keeps."""

    peer_id: PeerID
    """The replica that keeps them."""
    count: int


@dataclass(eq=False)
class HeldSequence:
    """What the experts of one layer keep of a sequence's rows, so that the next row can be computed without sending
    those again.
    """

    experts: dict[UID, HeldRows] = field(default_factory=dict)
    numbers: dict[PeerID, int] = field(default_factory=dict)
    """The numbers by which each node knows the sequence."""
    caches: dict[UID, KeyValueCache] = field(default_factory=dict)
    """Caches of experts in this process."""
    is_routed_as_one: bool = False
    """Whether all rows go to the same experts."""
    is_answered: bool = True
    """Whether all experts to which the last rows were sent have answered."""
    can_go_on: bool = True
    """Whether these experts keep all rows that were sent to them."""
    forgetful: set[PeerID] = field(default_factory=set)
    """Nodes that did not keep rows, or no longer had them."""
    avoided: frozenset[PeerID] = frozenset()
    """Nodes that are asked only for experts that no other node has."""


@dataclass(frozen=True)
class RoutedRows:
    """The rows of one forward pass of a layer."""

    layer: int
    grid: tuple[int, ...]
    inputs: Floats  # [R, W]
    scores: Sequence[Floats]  # of a `Gate`: for weights, and to choose again
    k: int
    segments: Segments
    keep: bool  # a backward pass is meant to follow
    bias: Floats | None = None  # of the grid's shape, added to the scores of experts when rows choose again
    held: Sequence[HeldSequence] | None = None
    """For each segment, what experts keep of the earlier rows, and should keep of these. None: experts keep nothing.
    """

    def caches_of(self, part: "ExpertPart") -> list[KeyValueCache]:
        """The caches of an expert in this process, for each segment of its rows; empty if nothing is to be kept."""
        if self.held is None:
            return []
        sequences = [self.held[number] for number in np.unique(self.segments.of_rows[part.places]).tolist()]
        return [sequence.caches.setdefault(part.uid, KeyValueCache()) for sequence in sequences]

    def logits(self, rows: Integers, coordinates: Integers) -> Floats:
        """The logits of the experts at `coordinates` [n, K, dims], for these rows. [n, K]"""
        tables = zip(self.scores, score_columns(self.scores, coordinates, self.grid), strict=True)
        logits: Floats = np.sum([table[rows[:, None], column] for table, column in tables], axis=0)
        return logits


class ExpertPart(NamedTuple):
    """One expert's part of a batch."""

    uid: UID
    places: Integers  # [m], rising: which of the batch's rows
    slots: Integers  # [m], which of the row's K choices this expert is


@dataclass(frozen=True, eq=False)
class NodeBatch:
    """Rows that go to one node in one call, in the order of sequence and position, and the experts that each is for."""

    rows: Integers  # [n], rising: indices into the step's rows
    lengths: Integers  # [s], rows of each segment
    positions: Integers  # [n], in their sequences
    uids: tuple[UID, ...]  # the experts, each once, in the order of their coordinates
    experts: Integers  # [n, K], which of `uids` is asked for each slot; -1 where none is

    @classmethod
    def of(
        cls,
        layer: int,
        coordinates: Integers,
        wanted: Booleans,
        grid: tuple[int, ...],
        segments: Segments,
    ) -> Self:
        """A batch of all R rows of a step, for the experts in the `wanted` [R, K] slots of `coordinates` [R,
        K, dims].
        """
        numbers, which = np.unique(
            np.ravel_multi_index(tuple(coordinates[wanted].T), grid), return_inverse=True
        )
        experts = np.full(wanted.shape, -1)
        experts[wanted] = which.ravel()
        places = np.stack(np.unravel_index(numbers, grid), axis=-1).tolist()
        uids = tuple(UID(layer, tuple(place)) for place in places)
        return cls(np.arange(len(wanted)), segments.lengths, segments.positions, uids, experts)

    @classmethod
    def apart(cls, uids: Sequence[UID], lengths: Sequence[int], positions: Sequence[int]) -> Self:
        """The same rows, with a separate row for each expert, so that each expert answers separately."""
        rows, experts = len(positions), len(uids)
        which = np.repeat(np.arange(experts), rows)
        lengths_S, positions_N = np.tile(lengths, experts), np.tile(positions, experts)
        return cls(np.arange(rows * experts), lengths_S, positions_N, tuple(uids), which[:, None])

    @property
    def asked(self) -> Booleans:
        """The slots that the node is asked for: [n, K]."""
        return self.experts >= 0

    @cached_property
    def coordinates(self) -> Integers:
        """The coordinates of the experts that are asked, and arbitrary values elsewhere: [n, K, dims]."""
        dims = len(self.uids[0].coordinate) if self.uids else 1
        places = np.array([uid.coordinate for uid in self.uids], dtype=np.int64).reshape(-1, dims)
        return np.concatenate([places, np.full((1, dims), -1)])[self.experts]

    @cached_property
    def ranks(self) -> Integers:
        """The rank of each slot that is asked, i.e. how many of its row's experts come before it in `uids`: [n, K]."""
        before = self.asked[:, None, :] & (self.experts[:, None, :] < self.experts[:, :, None])
        ranks: Integers = before.sum(axis=2)
        return ranks

    @cached_property
    def segment_of_row(self) -> Integers:
        """[n]"""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    def parts(self) -> Iterator[ExpertPart]:
        """The part of each expert, in the order of `uids`."""
        places, slots = np.nonzero(self.asked)
        experts = self.experts[places, slots]
        order = np.argsort(experts, kind="stable")
        ends = np.bincount(experts, minlength=len(self.uids)).cumsum()
        for uid, part in zip(self.uids, np.split(order, ends[:-1]), strict=False):
            yield ExpertPart(uid, places[part], slots[part])

    def segments(self, places: Integers) -> tuple[Integers, Integers]:
        """The number of rows of each segment, and the positions, of these rows alone."""
        lengths = np.bincount(self.segment_of_row[places], minlength=len(self.lengths))
        return lengths[lengths > 0], self.positions[places]

    def only(self, slots: Booleans) -> tuple["NodeBatch", Integers]:
        """A batch that asks only for these `slots` [n, K], and the indices of its rows."""
        experts = np.where(slots, self.experts, -1)
        places = np.flatnonzero((experts >= 0).any(axis=1))
        experts = experts[places]
        used = np.unique(experts[experts >= 0])
        renumbered = np.full(len(self.uids) + 1, -1)  # the last one is for -1
        renumbered[used] = np.arange(len(used))
        lengths, positions = self.segments(places)
        uids = tuple(self.uids[number] for number in used.tolist())
        return NodeBatch(self.rows[places], lengths, positions, uids, renumbered[experts]), places

    def experts_in(self, slots: Booleans) -> list[UID]:
        """The experts asked for in `slots` [n, K]."""
        numbers = self.experts[slots & self.asked]
        return [self.uids[number] for number in np.unique(numbers).tolist()]


def relative_weights(logits: Floats, asked: Booleans, codec: "expert_pb2.Codec") -> Floats:
    """The weights u [n, K] of the experts `asked` in each row, relative to the best of them, which has 1; others have
    0.

    u is exp(logit - the row's largest), at least `LEAST_WEIGHT`: routers weigh a row's experts in these ratios. It is
    rounded as calls with this codec round it, so that the node uses exactly these weights.
    """
    finite = np.where(np.isnan(logits), -1e30, np.clip(logits, -1e30, 1e30)).astype(np.float32)
    highest = np.where(asked, finite, -np.inf).max(axis=1, keepdims=True, initial=-1e30)
    weights = np.maximum(np.exp(np.where(asked, finite - highest, 0)), LEAST_WEIGHT)
    weights = np.where(asked, weights, 0).astype(np.float32)
    return decode_scalars(encode_scalars(weights.ravel(), codec), codec).reshape(weights.shape)


@dataclass(frozen=True)
class NodeCall:
    """One call to one node."""

    node: NodeInfo
    direction: Direction
    batch: NodeBatch
    deadline_s: float
    inputs: Floats  # [n, W]
    weights: Floats  # [n, K], of the experts asked
    gradients: Floats | None = None
    """[n, W], in backward: the gradients of the answers S; zero if an answer does not count."""
    keep: bool = False
    """In forward: whether a backward call will follow."""
    kept: bytes | None = None
    """In backward: the id of the forward call, if the node has kept it."""
    counts: Booleans | None = None
    """[n, K], in backward: the slots whose answers count."""
    numbers: Sequence[int] = ()
    """In forward: for each segment, the number under which the node should keep its rows for the next call. Empty: it
    keeps none.
    """
    held: Integers | None = None
    """[s, experts], with `numbers`: how many earlier rows of a segment each expert has. None: none."""
    updates: Sequence[int] = ()
    """With `keep`: how many updates of each expert of the batch this trainer has got so far, from any node."""

    @property
    def slots(self) -> Booleans:
        """[n, K], the slots whose experts are asked; in backward, only those whose answers count."""
        return self.batch.asked if self.counts is None else self.counts

    def in_full(self) -> "NodeCall":
        """A backward call with everything that a node needs if it has kept nothing.

        It asks for the slots that count. Rows whose answers don't count are also sent, without a gradient, to experts
        that count for other rows, because experts attend to earlier rows.
        """
        assert self.counts is not None
        assert self.gradients is not None
        numbers = np.unique(self.batch.experts[self.counts])
        counted = self.counts.any(axis=1, keepdims=True)
        slots = np.where(counted, self.counts, np.isin(self.batch.experts, numbers))
        batch, places = self.batch.only(slots)
        weights = np.where(batch.asked, self.weights[places], np.float32(0))
        return replace(
            self,
            batch=batch,
            inputs=self.inputs[places],
            weights=weights,
            gradients=self.gradients[places],
            kept=None,
            counts=self.counts[places],
        )


@dataclass(frozen=True, eq=False)
class AnsweredRows:
    """A node's answers to some rows of a batch."""

    batch: NodeBatch
    places: Integers  # [m], rising: which of the batch's rows
    answered: Booleans  # [m, K], the slots whose experts are in the answer
    tensor: Floats  # [m, W], S; in backward the gradients of the inputs
    products: Floats | None = None
    """[m, K], in backward: the dot products of the gradient of S and each expert's update; 0 elsewhere."""


@dataclass(frozen=True)
class ExpertReply:
    """How one expert's part of a call ended."""

    batch: NodeBatch
    uid: UID
    error: ExpertError | None = None
    """Why the expert is in no row's answer."""
    update_count: int = 0
    """Optimizer steps the replica has taken."""
    skipped_update: bool = False
    """In backward: the expert's guard refused the step."""
    rolled_back: bool = False
    """In backward: the expert was rolled back to its last good state."""
    version: int = 0
    """In forward: the version of the parameters that computed its rows, according to the node. 0: it names none."""

    @property
    def has_forgotten(self) -> bool:
        """Whether a node has forgotten the earlier rows: its parameters have changed since, or it needed the memory."""
        return self.error is not None and self.error.status is StatusCode.FAILED_PRECONDITION


@dataclass(frozen=True)
class Kept:
    """The node has kept a forward call under this id. It comes before the last rows of the call."""

    batch: NodeBatch
    request_id: bytes


@dataclass(frozen=True)
class CallEnded:
    """The end of a call: no more replies follow."""

    batch: NodeBatch
    peer_id: PeerID
    lost: bool = False
    """Whether it broke off or reached its deadline, so that the node's missing replies are unknown."""


CallReply: TypeAlias = AnsweredRows | ExpertReply | Kept


class ExpertCaller(Protocol):
    """The network, as dispatch sees it."""

    def call(self, call: NodeCall) -> AsyncGenerator[CallReply, None]:
        """Yields one reply from each expert, and at most one answer to each row. A row's answer follows the replies of
        its experts. Raises ExpertError if the call failed as a whole.

        If a backward call had to be sent again in full, its replies refer to the batch of `NodeCall.in_full`, and only
        answer slots that count.
        """
        ...


@dataclass(eq=False)
class CallProgress:
    """The state of a call that was started."""

    kept: bytes | None = None
    """In forward: set once the node has kept the call, or its rows for the next call."""


@dataclass(eq=False)
class SentBatch:
    """A batch that was sent to one node, from its forward call to its backward call. Holds no tensors."""

    batch: NodeBatch
    node: NodeInfo
    weights: Floats  # [n, K]
    progress: CallProgress
    is_hedge: bool = False
    numbers: Sequence[int] = ()
    """For each segment, the number under which the node should keep its rows."""
    versions: dict[UID, int] = field(default_factory=dict)
    """The version of the parameters of each expert that has computed."""
    open: Booleans = field(init=False)  # [n, K], the slots of which something may still come
    counts: Booleans = field(init=False)  # [n, K], the slots whose answers count

    def __post_init__(self) -> None:
        self.open = self.batch.asked
        self.counts = np.zeros_like(self.open)


@dataclass
class ForwardPass:
    """The results of a forward pass, and what the backward pass needs."""

    rows: RoutedRows
    coordinates: Integers  # [R, K, dims], of the expert in each slot
    updates: Floats  # [R, K, W], each answer S in the first slot of its experts; zeros elsewhere
    leads: Integers  # [R, K], the slot that each slot's answer is in; its own where nobody answered
    shares: Floats  # [R, K], each expert's share u / sum of u in its answer; 0 where nobody answered
    answered: Booleans  # [R, K]
    answers: list[SentBatch] = field(default_factory=list)
    """The batches that have answers that count, in the order of their first one."""

    @classmethod
    def of(cls, rows: RoutedRows) -> Self:
        """The state of the pass before any answer."""
        count, width = rows.inputs.shape
        return cls(
            rows,
            np.zeros((count, rows.k, len(rows.grid)), dtype=np.int64),
            np.zeros((count, rows.k, width), dtype=np.float32),
            np.tile(np.arange(rows.k), (count, 1)),
            np.zeros((count, rows.k), dtype=np.float32),
            np.zeros((count, rows.k), dtype=bool),
        )

    def accept(self, sent: SentBatch, reply: AnsweredRows) -> Booleans:
        """Accepts an answer to a row if none of its slots has an answer yet. Also accepts an answer that has all slots
        of the row's earlier answers and more; it replaces those. (Otherwise, an early answer to a hedge would exclude a
        node's answer for several experts.) Returns the slots [m, K] of the reply's rows that were answered.
        """
        batch, rows = sent.batch, sent.batch.rows[reply.places]
        taken = reply.answered & self.answered[rows]
        replaced = self._replaced(rows, reply.answered, taken)
        is_free = np.logical_or(~taken.any(axis=1), replaced.any(axis=1))
        accepted: Booleans = reply.answered & is_free[:, None]
        is_free = accepted.any(axis=1)
        places, slots = reply.places[is_free], reply.answered[is_free]
        if not len(places):
            return accepted
        if replaced.any():
            self._take_back(rows, replaced)
        sent.counts[places] |= slots
        rows, lead = batch.rows[places], slots.argmax(axis=1)
        self.coordinates[rows] = np.where(slots[..., None], batch.coordinates[places], self.coordinates[rows])
        self.updates[rows, lead] = reply.tensor[is_free]
        self.leads[rows] = np.where(slots, lead[:, None], self.leads[rows])
        self.shares[rows] = np.where(slots, shares(sent.weights[places], slots), self.shares[rows])
        self.answered[rows] |= slots
        if sent not in self.answers:
            self.answers.append(sent)
        return accepted

    def _replaced(self, rows: Integers, slots: Booleans, taken: Booleans) -> Booleans:
        """The slots [m, K] of earlier answers to `rows` that an answer with these `slots` would replace. `taken` [m,
        K]: those that have an answer.
        """
        leads, which = self.leads[rows], np.nonzero(taken)
        overlaps = np.zeros_like(taken)
        overlaps[which[0], leads[which]] = True
        earlier = self.answered[rows] & np.take_along_axis(overlaps, leads, axis=1)
        is_more = np.logical_and(~(earlier & ~slots).any(axis=1), (slots & ~earlier).any(axis=1))
        replaced: Booleans = earlier & is_more[:, None]
        return replaced

    def _take_back(self, rows: Integers, slots: Booleans) -> None:
        """Removes answers, as if these slots [m, K] had not been answered. Other answers in the same rows
        still count.
        """
        some = slots.any(axis=1)
        rows, slots = rows[some], slots[some]
        self.updates[rows] = np.where(slots[..., None], np.float32(0), self.updates[rows])
        for sent in self.answers:
            found, of, places = np.intersect1d(rows, sent.batch.rows, assume_unique=True, return_indices=True)
            if len(found):
                sent.counts[places] &= ~slots[of]


def shares(weights: Floats, slots: Booleans) -> Floats:
    """The share of each expert in the weighted mean over `slots` [m, K]; 0 elsewhere, and in rows without any."""
    weights = np.where(slots, weights, np.float32(0))
    total = weights.sum(axis=1, keepdims=True)
    result: Floats = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    return result


def is_live(coordinates: Integers, tables: PrefixTables) -> Booleans:
    """Which of the experts at `coordinates` [..., dims] are live."""
    live: Booleans = tables[-1][tuple(np.moveaxis(coordinates, -1, 0))]
    return live


def prefer_proven(sure: Selection, others: Selection, wary: Booleans) -> Selection:
    """In the `wary` rows [n], puts the `sure` experts before the `others`, without duplicates."""
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
    """Puts each row's best fresh experts into its free slots, except those that the row already has.

    `coordinates` [n, K, dims]: the rows' slots. `taken` [n, K]: slots that hold an expert. `free` [n, K]: slots to
    fill; no slot is both. `fresh`: more experts for the same rows, best first. Returns the new coordinates, and the
    slots that were filled [n, K].
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
