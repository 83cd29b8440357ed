"""One forward pass: sends rows to experts, waits no longer than agreed, and chooses again where too few answered.

Shapes: R rows, K experts for each row, D hidden size.
"""

import asyncio
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from hivemind.p2p import PeerID

from dht.beam import Selection, default_beam_size, select_experts
from dht.directory import Directory, PrefixTables, View
from dht.uid import UID
from peer.codec import Floats
from trainer_client.calls import KeptAt, Request
from trainer_client.outgoing import NodeCall, Outcome, Outcomes, Outgoing, next_outcomes
from trainer_client.shares import Booleans, Integers, Share, make_shares, refill

_MAX_ROUNDS = 8
"""Times that a row's experts are chosen in one call."""


@dataclass(frozen=True)
class WaitPolicy:
    """How long to wait for experts. Times in seconds."""

    call_deadline_s: float
    """No call lasts longer."""
    grace_s: float
    """How long to wait for the rest once every row has `k_min` answers."""
    k_min: int
    """A row with fewer answers has its experts chosen again."""

    def next_look(self, began: float, enough_at: float | None, hedged: bool) -> float:
        """When the next decision is due, if nothing comes before.

        At half of the deadline rows that lack answers are sent to other experts too, which leaves those the other half.
        """
        ends = began + self.call_deadline_s
        if enough_at is not None:
            return min(ends, enough_at + self.grace_s)
        return ends if hedged else began + self.call_deadline_s / 2


@dataclass(frozen=True)
class AnsweredShare:
    """A share that was answered, by whom, and for which of its rows [r] the answer counts."""

    share: Share
    peer_id: PeerID
    counts: Booleans
    kept: KeptAt | None = None

    def request(self, inputs: Floats, gradients: Floats) -> Request:
        """Its backward request: the gradients [R, K, D] of its rows, zero where the slot has another's answer."""
        own = gradients[self.share.rows, self.share.slots]
        if not self.counts.all():
            own[~self.counts] = 0
        return _request(self.share, inputs, own, kept=self.kept)


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


@dataclass(frozen=True)
class Reach:
    """How a trainer reaches experts."""

    directory: Directory
    outgoing: Outgoing
    policy: WaitPolicy
    rng: random.Random


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


class ForwardFanOut:
    """One forward pass of one layer, while it lasts. Belongs to the loop's thread."""

    def __init__(self, reach: Reach, rows: RoutedRows) -> None:
        count, width = rows.inputs.shape
        k = rows.k
        self._reach = reach
        self._rows = rows
        self._clock = reach.outgoing.now
        self._began = self._clock()
        self._rounds = np.zeros(count, dtype=np.int64)  # times that each row's experts were chosen
        self._outcomes: Outcomes = asyncio.Queue()
        self._pending = np.zeros((count, k), dtype=bool)
        self._failed: set[UID] = set()  # or late: not asked again for any row
        self._asked: dict[UID, PeerID] = {}  # who was asked last for each expert
        self._goal = np.full(count, min(reach.policy.k_min, k))  # answers that each row needs
        self.result = ForwardPass(
            rows.layer,
            rows.sequence_length,
            rows.inputs,
            np.zeros((count, k, width), dtype=np.float32),
            np.zeros((count, k), dtype=bool),
            np.zeros((count, k, len(rows.scores)), dtype=np.int64),
        )

    async def until_enough(self) -> None:
        """Returns when all have answered, or enough and the grace time is over, or at the deadline."""
        self._choose(np.arange(len(self._goal)))
        enough_at: float | None = None
        hedged = False
        while self._pending.any():
            if enough_at is None and self._has_enough():
                enough_at = self._clock()
            look_at = self._reach.policy.next_look(self._began, enough_at, hedged)
            outcomes = await next_outcomes(self._outcomes, look_at - self._clock())
            for outcome in outcomes:
                self._settle(outcome)
            if not outcomes and (hedged or enough_at is not None):
                return
            if enough_at is None:
                hedged |= not outcomes
                self._choose_again(timed_out=not outcomes)

    def _has_enough(self) -> bool:
        return bool((self.result.answered.sum(axis=1) >= self._goal).all())

    def _choose_again(self, timed_out: bool) -> None:
        """Sends to other experts the rows that can't reach their goal, or did not in half of the time."""
        answered = self.result.answered.sum(axis=1)
        hoped = answered if timed_out else answered + self._pending.sum(axis=1)
        lacking = np.flatnonzero((hoped < self._goal) & (self._rounds < _MAX_ROUNDS))
        if not len(lacking):
            return
        self._reach.outgoing.stats.reselected_rows += len(lacking)
        late = np.zeros_like(self._pending)
        if timed_out:
            self._note_late()
            late[lacking] = self._pending[lacking]
        self._pending &= ~late  # others may have these slots
        self._choose(lacking)
        self._pending |= late  # where nobody else was found, the late expert keeps its slot

    def _note_late(self) -> None:
        """Experts that still have not answered are not asked again, nor are their peers before this call is over."""
        now = self._clock()
        left = self._began + self._reach.policy.call_deadline_s - now
        for coordinate in np.unique(self.result.coordinates[self._pending], axis=0).tolist():
            uid = UID(self.result.layer, tuple(coordinate))
            self._failed.add(uid)
            self._reach.outgoing.breakers.busy(self._asked[uid], now, left)

    def _choose(self, rows: Integers) -> None:
        """Fills the free slots of these rows with the best live experts that they don't have, and calls those."""
        is_first = not self._rounds.any()
        self._rounds[rows] += 1
        view = self._reach.directory.view
        avoided = self._reach.outgoing.avoided()
        taken = (self.result.answered | self._pending)[rows]
        tables = self._tables(view, avoided)
        fresh = self._rows.first if is_first else None
        if fresh is None or not _all_live(fresh, tables):
            scores = [table[rows] for table in self._rows.scores]
            fresh = select_experts(scores, tables, self._rows.k, default_beam_size(self._rows.k))
        coordinates, filled = refill(self.result.coordinates[rows], taken, fresh)
        self.result.coordinates[rows] = coordinates
        wanted = np.zeros_like(self._pending)
        wanted[rows] = filled
        self._send(wanted, view, avoided)
        if is_first:
            # no row can get more answers than there are live experts
            self._goal = np.minimum(self._goal, np.maximum(1, self._pending.sum(axis=1)))

    def _tables(self, view: View, avoided: frozenset[PeerID]) -> PrefixTables:
        """Of the live experts that have not failed in this pass."""
        tables = view.tables(self.result.layer, avoided)
        if self._failed:
            alive = tables[-1].copy()
            for uid in self._failed:
                alive[uid.coordinate] = False
            tables = (*tables[:-1], alive)
        return tables

    def _send(self, wanted: Booleans, view: View, avoided: frozenset[PeerID]) -> None:
        """One call to each server, with all shares of its experts."""
        reach, result = self._reach, self.result
        by_peer: dict[PeerID, list[Share]] = defaultdict(list)
        for share in make_shares(
            result.layer, result.coordinates, wanted, self._rows.grid, result.sequence_length
        ):
            replica = view.replica(share.uid, reach.rng, avoided, reach.outgoing.times_s)
            if replica is not None:
                by_peer[replica.peer_id].append(share)
                self._asked[share.uid] = replica.peer_id
                self._pending[share.rows, share.slots] = True
        left = self._began + self._reach.policy.call_deadline_s - self._clock()
        for peer_id, shares in by_peer.items():
            requests = [_request(share, result.inputs, None, keep=self._rows.keep) for share in shares]
            reach.outgoing.start(
                NodeCall(view.nodes[peer_id], "forward", shares, requests, left, self._outcomes)
            )

    def _settle(self, outcome: Outcome) -> None:
        """Takes an answer into those of its slots that have none yet, also where another expert was asked since."""
        share, result = outcome.share, self.result
        if outcome.answer is None or outcome.answer.tensor is None:
            own = (result.coordinates[share.rows, share.slots] == share.uid.coordinate).all(axis=-1)
            self._pending[share.rows[own], share.slots[own]] = False
            self._failed.add(share.uid)
            return
        first = ~result.answered[share.rows, share.slots]
        if not first.any():
            return
        rows, slots = share.rows[first], share.slots[first]
        result.coordinates[rows, slots] = share.uid.coordinate
        result.outputs[rows, slots] = outcome.answer.tensor[first]
        result.answered[rows, slots] = True
        self._pending[rows, slots] = False
        result.answers.append(AnsweredShare(share, outcome.peer_id, first, outcome.answer.kept))


def _all_live(selection: Selection, tables: PrefixTables) -> bool:
    return bool(tables[-1][tuple(selection.coordinates[selection.valid].T)].all())


def _request(
    share: Share,
    inputs: Floats,
    gradients: Floats | None,
    *,
    keep: bool = False,
    kept: KeptAt | None = None,
) -> Request:
    return Request(
        share.uid,
        share.lengths.tolist(),
        share.positions.tolist(),
        inputs[share.rows],
        gradients,
        keep,
        kept,
    )
