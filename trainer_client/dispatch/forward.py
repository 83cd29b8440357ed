"""One forward pass: sends rows to experts, waits no longer than agreed, and chooses again where too few answered.

Shapes: R rows, K experts for each row, D hidden size.
"""

import asyncio
import random
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dht.announcements import NodeInfo
from dht.beam_search import Selection, default_beam_size, select_experts
from dht.directory import Directory, PrefixTables, View
from dht.uid import UID
from peer.identity import PeerID
from trainer_client.dispatch.batches import (
    AnsweredShare,
    Booleans,
    Direction,
    ExpertBatch,
    ForwardPass,
    Integers,
    RoutedRows,
    group_by_expert,
    prefer_proven,
    refill,
    request_of,
)
from trainer_client.dispatch.calls import CallTracker, NodeCall, Outcome, Outcomes, next_outcomes
from trainer_client.dispatch.policy import WaitPolicy
from trainer_client.dispatch.spot_checks import SpotChecks

_MAX_ROUNDS = 8
"""Times that a row's experts are chosen in one call."""
_FREE_ROUNDS = 2
"""After so many choices a row prefers experts of peers that answered lately: its others were dead twice."""


@dataclass(frozen=True)
class Reach:
    """How a trainer reaches experts."""

    directory: Directory
    outgoing: CallTracker
    policy: WaitPolicy
    rng: random.Random
    checks: SpotChecks

    def deadline_s(self, direction: Direction) -> float:
        """Of the next calls."""
        return self.policy.deadline_s(self.outgoing.call_times[direction])


@dataclass
class _Asked:
    """A share that was sent, and who has still to answer it: one peer, or two when the first was slow."""

    share: ExpertBatch
    peers: list[PeerID]
    calls: int = 0
    hedge: PeerID | None = None
    done: bool = False
    """Answered, or failed by all."""


class ForwardRun:
    """One forward pass of one layer, while it lasts. Belongs to the loop's thread."""

    def __init__(self, reach: Reach, rows: RoutedRows) -> None:
        count, width = rows.inputs.shape
        k = rows.k
        self._reach = reach
        self._rows = rows
        self._clock = reach.outgoing.now
        self._deadline_s = reach.deadline_s("forward")
        self._ends = self._clock() + self._deadline_s
        self._rounds = np.zeros(count, dtype=np.int64)  # times that each row's experts were chosen
        self._outcomes: Outcomes = asyncio.Queue()
        self._pending = np.zeros((count, k), dtype=bool)
        self._failed: set[UID] = set()  # or late: not asked again for any row
        self._asked: dict[int, _Asked] = {}  # by the share's identity
        self._nodes: dict[PeerID, NodeInfo] = {}  # that were called
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
        began, policy = self._clock(), self._reach.policy
        self._choose(np.arange(len(self._goal)))
        looks = self._looks(began)
        enough_at: float | None = None
        while self._pending.any():
            if enough_at is None and self._has_enough():
                enough_at = self._clock()
            if enough_at is not None:
                look_at = min(self._ends, enough_at + policy.grace_s)
            else:
                look_at = looks[0][0] if looks else self._ends
            outcomes = await next_outcomes(self._outcomes, look_at - self._clock())
            lost = [outcome for outcome in outcomes if self._settle(outcome)]
            if outcomes:
                self._call_again(lost)
                if enough_at is None:
                    self._choose_again()
            elif enough_at is not None or not looks:
                return
            else:
                looks.popleft()[1]()

    def _looks(self, began: float) -> deque[tuple[float, Callable[[], None]]]:
        """What is done, and when, while rows lack answers."""
        part_s = self._deadline_s / 4
        looks = [
            (
                began + self._reach.policy.hedge_after_s(self._reach.outgoing.call_times["forward"]),
                self._hedge,
            ),
            (began + part_s, self._replace_silent),
            (began + 2 * part_s, self._give_up_late),  # leaves other experts the other half
            (began + 3 * part_s, self._give_up_late),
        ]
        return deque(sorted(looks, key=lambda look: look[0]))

    def _call_again(self, lost: Sequence[Outcome]) -> None:
        """Makes calls that were lost once more: a forward call changes nothing at the node."""
        outgoing, view = self._reach.outgoing, self._reach.directory.view
        by_peer: dict[PeerID, list[ExpertBatch]] = defaultdict(list)
        for outcome in lost:
            if (peer_id := self._peer_to_repeat(view, outcome)) is None:
                self._fail(self._asked[id(outcome.share)])
            else:
                by_peer[peer_id].append(outcome.share)
        for peer_id, shares in by_peer.items():
            outgoing.stats.repeated_forward += 1
            self._call(view, peer_id, shares)

    def _peer_to_repeat(self, view: View, outcome: Outcome) -> PeerID | None:
        """Another replica, else the same one if it may well be there; nobody for a share that was asked twice, and
        without more than half of the time.
        """
        outgoing, share, first = self._reach.outgoing, outcome.share, outcome.peer_id
        is_wanted = self._pending[self._own_slots(share)].any() and self._asked[id(share)].calls == 1
        if not is_wanted or self._ends - self._clock() <= self._deadline_s / 2:
            return None
        avoided = outgoing.avoided()
        other = view.replica(share.uid, self._reach.rng, avoided | {first}, outgoing.latencies.nodes)
        if other is not None:
            return other.peer_id
        is_there = first in view.nodes and not outgoing.is_silent(view.nodes[first])
        return first if is_there and first not in avoided else None

    def _has_enough(self) -> bool:
        return bool((self.result.answered.sum(axis=1) >= self._goal).all())

    def _choose_again(self) -> None:
        """Sends to other experts the rows that can't reach their goal any more."""
        hoped = (self.result.answered | self._pending).sum(axis=1)
        lacking = self._lacking(hoped)
        if len(lacking):
            self._choose(lacking)

    def _give_up_late(self) -> None:
        """Sends to other experts the rows that have not reached their goal by now."""
        self._give_up([asked for asked in self._asked.values() if not asked.done])

    def _replace_silent(self) -> None:
        """Of peers that can't even be connected to little is to be hoped: others are asked, replicas first."""
        is_silent = self._reach.outgoing.is_silent
        silent = [
            asked
            for asked in self._asked.values()
            if not asked.done and all(is_silent(self._nodes[peer_id]) for peer_id in asked.peers)
        ]
        self._leave_alone(silent)
        self._give_up(self._ask_replicas(silent))

    def _give_up(self, late: Sequence[_Asked]) -> None:
        """Sends to other experts the rows that lack answers without these; theirs still count when they come."""
        given_up = np.zeros_like(self._pending)
        for asked in late:
            given_up[self._own_slots(asked.share)] = True
        given_up &= self._pending
        lacking = self._lacking((self.result.answered | (self._pending & ~given_up)).sum(axis=1))
        if not len(lacking):
            return
        self._leave_alone(late)
        self._failed.update(asked.share.uid for asked in late)
        kept = np.ones(len(self._goal), dtype=bool)
        kept[lacking] = False
        given_up[kept] = False
        self._pending &= ~given_up  # others may have these slots
        self._choose(lacking)
        self._pending |= given_up  # where nobody else was found, the late expert keeps its slot

    def _lacking(self, answers: Integers) -> Integers:
        """The rows with fewer answers than they need, but those that were sent often enough."""
        return np.flatnonzero((answers < self._goal) & (self._rounds < _MAX_ROUNDS))

    def _leave_alone(self, late: Sequence[_Asked]) -> None:
        """Nobody calls these peers before this call is over."""
        now = self._clock()
        for asked in late:
            for peer_id in asked.peers:
                self._reach.outgoing.breakers.busy(peer_id, now, self._ends - now)

    def _hedge(self) -> None:
        """Asks another replica of each expert that is slow, as far as the policy allows. The first answer counts."""
        outgoing = self._reach.outgoing

        def may_hedge() -> bool:
            return self._reach.policy.may_hedge(outgoing.stats.hedged_calls, outgoing.stats.calls)

        self._ask_replicas([asked for asked in self._asked.values() if not asked.done], may_hedge)

    def _ask_replicas(
        self, some: Sequence[_Asked], may_ask: Callable[[], bool] = lambda: True
    ) -> list[_Asked]:
        """Calls another replica of each expert too; gives those that have no other."""
        outgoing, view = self._reach.outgoing, self._reach.directory.view
        by_peer: dict[PeerID, list[ExpertBatch]] = defaultdict(list)
        alone = []
        for asked in some:
            avoided = outgoing.avoided() | set(asked.peers)
            other = view.replica(asked.share.uid, self._reach.rng, avoided)
            if other is None:
                alone.append(asked)
            else:
                by_peer[other.peer_id].append(asked.share)
        for peer_id, shares in by_peer.items():
            if may_ask():
                outgoing.stats.hedged_calls += 1
                for share in shares:
                    self._asked[id(share)].hedge = peer_id
                self._call(view, peer_id, shares)
        return alone

    def _choose(self, rows: Integers) -> None:
        """Fills the free slots of these rows with the best live experts that they don't have, and calls those."""
        is_first = not self._rounds.any()
        self._rounds[rows] += 1
        if not is_first:
            self._reach.outgoing.stats.reselected_rows += len(rows)
        view = self._reach.directory.view
        avoided = self._reach.outgoing.avoided()
        taken = (self.result.answered | self._pending)[rows]
        tables = self._tables(view, avoided)
        fresh = self._rows.first if is_first else None
        if fresh is None or not _all_live(fresh, tables):
            fresh = self._best(rows, tables)
        often = self._rounds[rows] > _FREE_ROUNDS
        if often.any():
            unproven = view.nodes.keys() - self._reach.outgoing.proven()
            fresh = prefer_proven(self._best(rows, self._tables(view, avoided | unproven)), fresh, often)
        coordinates, filled = refill(self.result.coordinates[rows], taken, fresh)
        self.result.coordinates[rows] = coordinates
        wanted = np.zeros_like(self._pending)
        wanted[rows] = filled
        self._send(wanted, view, avoided)
        if is_first:
            # no row can get more answers than there are live experts
            self._goal = np.minimum(self._goal, np.maximum(1, self._pending.sum(axis=1)))

    def _best(self, rows: Integers, tables: PrefixTables) -> Selection:
        scores = [table[rows] for table in self._rows.scores]
        return select_experts(scores, tables, self._rows.k, default_beam_size(self._rows.k))

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
        by_peer: dict[PeerID, list[ExpertBatch]] = defaultdict(list)
        for share in group_by_expert(
            result.layer, result.coordinates, wanted, self._rows.grid, result.sequence_length
        ):
            replica = view.replica(share.uid, reach.rng, avoided, reach.outgoing.latencies.nodes)
            if replica is not None:
                by_peer[replica.peer_id].append(share)
                self._pending[share.rows, share.slots] = True
        for peer_id, shares in by_peer.items():
            self._call(view, peer_id, shares)

    def _call(self, view: View, peer_id: PeerID, shares: Sequence[ExpertBatch]) -> None:
        for share in shares:
            asked = self._asked.setdefault(id(share), _Asked(share, []))
            asked.peers.append(peer_id)
            asked.calls += 1
        self._nodes[peer_id] = view.nodes[peer_id]
        requests = [request_of(share, self.result.inputs, None, keep=self._rows.keep) for share in shares]
        left = self._ends - self._clock()
        self._reach.outgoing.start(
            NodeCall(view.nodes[peer_id], "forward", shares, requests, left, self._outcomes)
        )

    def _settle(self, outcome: Outcome) -> bool:
        """Takes an answer into those of its slots that have none yet, also where another expert was asked since.

        Gives whether the outcome is that its last call was lost.
        """
        share, result = outcome.share, self.result
        asked = self._asked[id(share)]
        asked.peers.remove(outcome.peer_id)
        if asked.done:
            return False
        if outcome.answer is None or outcome.answer.tensor is None:
            if not asked.peers and not outcome.lost:
                self._fail(asked)
            return outcome.lost and not asked.peers
        asked.done = True
        self._reach.outgoing.stats.hedges_won += outcome.peer_id == asked.hedge
        first = ~result.answered[share.rows, share.slots]
        if not first.any():
            return False
        rows, slots = share.rows[first], share.slots[first]
        result.coordinates[rows, slots] = share.uid.coordinate
        result.outputs[rows, slots] = outcome.answer.tensor[first]
        result.answered[rows, slots] = True
        self._pending[rows, slots] = False
        result.answers.append(AnsweredShare(share, outcome.peer_id, first, outcome.answer.kept))
        if self._reach.checks.is_due():
            request = request_of(share, result.inputs, None)
            self._reach.checks.begin(self._reach.directory.view, outcome, request, self._deadline_s)
        return False

    def _fail(self, asked: _Asked) -> None:
        asked.done = True
        self._pending[self._own_slots(asked.share)] = False
        self._failed.add(asked.share.uid)

    def _own_slots(self, share: ExpertBatch) -> tuple[Integers, Integers]:
        """The rows and slots that are still this share's, and no other expert's."""
        own = (self.result.coordinates[share.rows, share.slots] == share.uid.coordinate).all(axis=-1)
        return share.rows[own], share.slots[own]


def _all_live(selection: Selection, tables: PrefixTables) -> bool:
    return bool(tables[-1][tuple(selection.coordinates[selection.valid].T)].all())
