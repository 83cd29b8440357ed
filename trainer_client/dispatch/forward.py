"""One forward pass: sends rows to the chosen experts, waits no longer than agreed, and chooses again for rows that lack
answers.

Shapes: R rows, K slots of each row, n rows whose experts are chosen again.
"""

import asyncio
import random
from collections import defaultdict, deque
from collections.abc import Callable, Sequence

import numpy as np

from dht.announcements import NodeInfo
from dht.beam_search import Selection, default_beam_size, select_experts
from dht.directory import Directory, LiveExperts, PrefixTables
from dht.uid import UID
from peer.codec import Booleans, Integers
from peer.identity import PeerID
from peer.metrics import total
from trainer_client.dispatch.batches import (
    Answer,
    ExpertBatch,
    ForwardPass,
    NodeCall,
    Request,
    RoutedRows,
    SentBatch,
    group_by_expert,
    is_live,
    prefer_proven,
    refill,
)
from trainer_client.dispatch.calls import Answers, CallTracker, next_answers
from trainer_client.dispatch.policy import WaitPolicy
from trainer_client.dispatch.spot_checks import SpotChecks

_MAX_ROUNDS = 8
"""Times that a row's experts are chosen in one pass."""
_FREE_ROUNDS = 2
"""After so many choices a row prefers experts of peers that answered lately: its others were dead twice."""


class ForwardRun:
    """One forward pass of one layer, while it lasts. Belongs to the loop's thread."""

    def __init__(
        self,
        rows: RoutedRows,
        live: LiveExperts,
        directory: Directory,
        calls: CallTracker,
        policy: WaitPolicy,
        rng: random.Random,
        checks: SpotChecks,
    ) -> None:
        """`live`: what the rows' experts were selected from."""
        count = len(rows.inputs)
        self._rows = rows
        self._live = live
        self._directory = directory
        self._calls = calls
        self._policy = policy
        self._rng = rng
        self._checks = checks
        self._clock = calls.now
        self._began = self._clock()
        self._deadline_s = policy.deadline_s(calls.call_times["forward"])
        self._ends = self._began + self._deadline_s
        self._answers: Answers = asyncio.Queue()
        self._sent: dict[ExpertBatch, SentBatch] = {}
        self._nodes: dict[PeerID, NodeInfo] = {}  # that were called
        self._failed: set[UID] = set()  # or late: not asked again for any row
        self._pending = np.zeros((count, rows.k), dtype=bool)  # slots that somebody was asked for
        self._rounds = np.zeros(count, dtype=np.int64)  # times that each row's experts were chosen
        self._goal = np.full(count, min(policy.k_min, rows.k))  # answers that each row needs
        self.result = ForwardPass.of(rows)

    async def until_enough(self, selection: Selection) -> None:
        """Returns when all have answered, or enough and the grace time is over, or at the deadline."""
        self._send_chosen(selection)
        looks = self._looks()
        enough_at: float | None = None
        while self._pending.any():
            if enough_at is None and self._has_enough():
                enough_at = self._clock()
            if enough_at is not None:
                look_at = min(self._ends, enough_at + self._policy.grace_s)
            else:
                look_at = looks[0][0] if looks else self._ends
            answers = await next_answers(self._answers, look_at - self._clock())
            lost = [answer for answer in answers if self._settle(answer)]
            if answers:
                self._repeat_lost(lost)
                if enough_at is None:
                    self._reselect_lacking()
            elif enough_at is not None or not looks:
                return
            else:
                looks.popleft()[1]()

    def _looks(self) -> deque[tuple[float, Callable[[], None]]]:
        """What is done, and when, while rows lack answers."""
        hedge_after_s = self._policy.hedge_after_s(self._calls.call_times["forward"])
        part_s = self._deadline_s / 4
        looks = [
            (self._began + hedge_after_s, self._hedge),
            (self._began + part_s, self._replace_silent),
            (self._began + 2 * part_s, self._give_up_late),  # leaves other experts the other half
            (self._began + 3 * part_s, self._give_up_late),
        ]
        return deque(sorted(looks, key=lambda look: look[0]))

    # Choosing and sending

    def _send_chosen(self, selection: Selection) -> None:
        """Sends each row to the experts selected for it. One that has gone since is replaced, for that row alone."""
        now = self._live_now()
        coordinates, wanted = selection.coordinates, selection.valid
        if now.tables is not self._live.tables:
            coordinates, wanted = self._replace_gone(coordinates, wanted, now.tables)
        self._rounds += 1
        self.result.coordinates[:] = coordinates
        self._send(wanted, now)
        # no row can get more answers than there are live experts
        self._goal = np.minimum(self._goal, np.maximum(1, self._pending.sum(axis=1)))

    def _replace_gone(
        self, coordinates: Integers, wanted: Booleans, tables: PrefixTables
    ) -> tuple[Integers, Booleans]:
        """Gives the wanted slots [R, K] of experts that are not live any more to the rows' next best."""
        gone = wanted & ~is_live(coordinates, tables)
        rows = np.flatnonzero(gone.any(axis=1))
        if not len(rows):
            return coordinates, wanted
        coordinates, wanted = coordinates.copy(), wanted & ~gone
        fresh = self._best(rows, tables)
        coordinates[rows], filled = refill(coordinates[rows], wanted[rows], gone[rows], fresh)
        wanted[rows] |= filled
        self._calls.metrics.reselected_rows.inc(len(rows))
        return coordinates, wanted

    def _reselect(self, rows: Integers) -> None:
        """Fills these rows' free slots with their best live experts that have not failed, and sends them there."""
        self._rounds[rows] += 1
        self._calls.metrics.reselected_rows.inc(len(rows))
        now = self._live_now()
        fresh = self._best(rows, self._without_failed(now.tables))
        often = self._rounds[rows] > _FREE_ROUNDS
        if often.any():
            unproven = now.view.nodes.keys() - self._calls.proven()
            proven = self._directory.live(self._rows.layer, now.avoided | unproven)
            fresh = prefer_proven(self._best(rows, self._without_failed(proven.tables)), fresh, often)
        taken = (self.result.answered | self._pending)[rows]
        coordinates, filled = refill(self.result.coordinates[rows], taken, ~taken, fresh)
        self.result.coordinates[rows] = coordinates
        wanted = np.zeros_like(self._pending)
        wanted[rows] = filled
        self._send(wanted, now)

    def _live_now(self) -> LiveExperts:
        return self._directory.live(self._rows.layer, self._calls.avoided())

    def _best(self, rows: Integers, tables: PrefixTables) -> Selection:
        scores = [table[rows] for table in self._rows.scores]
        return select_experts(scores, tables, self._rows.k, default_beam_size(self._rows.k), self._rows.bias)

    def _without_failed(self, tables: PrefixTables) -> PrefixTables:
        if not self._failed:
            return tables
        experts = tables[-1].copy()
        for uid in self._failed:
            experts[uid.coordinate] = False
        return (*tables[:-1], experts)

    def _send(self, wanted: Booleans, live: LiveExperts) -> None:
        """The wanted slots, with one call to each node for all its experts."""
        by_peer: dict[PeerID, list[SentBatch]] = defaultdict(list)
        for batch in group_by_expert(
            self._rows.layer, self.result.coordinates, wanted, self._rows.grid, self._rows.sequence_length
        ):
            replica = live.view.replica(batch.uid, self._rng, live.avoided, self._calls.latencies.nodes)
            if replica is not None:
                by_peer[replica.peer_id].append(SentBatch(batch))
                self._pending[batch.rows, batch.slots] = True
        for peer_id, batches in by_peer.items():
            self._call(live.view.nodes[peer_id], batches)

    def _call(self, node: NodeInfo, batches: Sequence[SentBatch]) -> None:
        for sent in batches:
            self._sent[sent.batch] = sent
            sent.peers.append(node.peer_id)
            sent.attempts += 1
        self._nodes[node.peer_id] = node
        requests = [self._request(sent.batch, self._rows.keep) for sent in batches]
        self._calls.start(NodeCall(node, "forward", requests, self._ends - self._clock()), self._answers)

    def _request(self, batch: ExpertBatch, keep: bool) -> Request:
        return Request(batch, self._rows.inputs[batch.rows], keep=keep)

    # Answers

    def _settle(self, answer: Answer) -> bool:
        """Takes an answer into those of its slots that have none yet, also where another expert was asked since.

        Gives whether the batch's last call was lost.
        """
        sent, result = self._sent[answer.batch], self.result
        batch = sent.batch
        sent.peers.remove(answer.peer_id)
        if sent.answered_by is not None:
            return False
        if answer.tensor is None:
            if not sent.peers and not answer.call_lost:
                self._fail(sent)
            return answer.call_lost and not sent.peers
        sent.answered_by, sent.kept = answer.peer_id, answer.kept
        self._calls.metrics.hedges_won.inc(answer.peer_id == sent.hedge)
        sent.counts = ~result.answered[batch.rows, batch.slots]
        if not sent.counts.any():
            return False
        rows, slots = batch.rows[sent.counts], batch.slots[sent.counts]
        result.coordinates[rows, slots] = batch.uid.coordinate
        result.updates[rows, slots] = answer.tensor[sent.counts]
        result.answered[rows, slots] = True
        self._pending[rows, slots] = False
        result.answers.append(sent)
        if self._checks.is_due():
            request = self._request(batch, keep=False)
            self._checks.begin(self._directory.view, answer, request, self._deadline_s)
        return False

    def _fail(self, sent: SentBatch) -> None:
        self._pending[self._own_slots(sent.batch)] = False
        self._failed.add(sent.batch.uid)

    def _own_slots(self, batch: ExpertBatch) -> tuple[Integers, Integers]:
        """The rows and slots that are still this batch's, and no other expert's."""
        own = (self.result.coordinates[batch.rows, batch.slots] == batch.uid.coordinate).all(axis=-1)
        return batch.rows[own], batch.slots[own]

    def _has_enough(self) -> bool:
        return bool((self.result.answered.sum(axis=1) >= self._goal).all())

    # Rows that lack answers

    def _reselect_lacking(self) -> None:
        """Sends to other experts the rows that can't reach their goal any more."""
        lacking = self._lacking((self.result.answered | self._pending).sum(axis=1))
        if len(lacking):
            self._reselect(lacking)

    def _lacking(self, answers: Integers) -> Integers:
        """The rows with fewer answers than they need, but those that were sent often enough."""
        return np.flatnonzero((answers < self._goal) & (self._rounds < _MAX_ROUNDS))

    def _repeat_lost(self, lost: Sequence[Answer]) -> None:
        """Makes calls that were lost once more: a forward call changes nothing at the node."""
        by_node: dict[PeerID, tuple[NodeInfo, list[SentBatch]]] = {}
        for answer in lost:
            sent = self._sent[answer.batch]
            node = self._node_to_repeat(sent, answer.peer_id)
            if node is None:
                self._fail(sent)
            else:
                by_node.setdefault(node.peer_id, (node, []))[1].append(sent)
        for node, batches in by_node.values():
            self._calls.metrics.repeated_calls.inc()
            self._call(node, batches)

    def _node_to_repeat(self, sent: SentBatch, first: PeerID) -> NodeInfo | None:
        """Another replica's, else the same one if it may well be there; none for a batch that was sent twice, and
        without more than half of the time.
        """
        is_wanted = self._pending[self._own_slots(sent.batch)].any() and sent.attempts == 1
        if not is_wanted or self._ends - self._clock() <= self._deadline_s / 2:
            return None
        view, avoided = self._directory.view, self._calls.avoided()
        other = view.replica(sent.batch.uid, self._rng, avoided | {first}, self._calls.latencies.nodes)
        if other is not None:
            return view.nodes[other.peer_id]
        node = view.nodes.get(first)
        is_there = node is not None and not self._calls.is_silent(node)
        return node if is_there and first not in avoided else None

    def _hedge(self) -> None:
        """Asks another replica of each expert that is slow, as far as the policy allows. The first answer counts."""
        metrics = self._calls.metrics

        def may_hedge() -> bool:
            return self._policy.may_hedge(total(metrics.hedged_calls), total(metrics.calls))

        self._ask_replicas([sent for sent in self._sent.values() if sent.is_waiting], may_hedge)

    def _ask_replicas(
        self, batches: Sequence[SentBatch], may_ask: Callable[[], bool] = lambda: True
    ) -> list[SentBatch]:
        """Calls another replica of each expert too; gives the batches of those that have no other."""
        view = self._directory.view
        by_peer: dict[PeerID, list[SentBatch]] = defaultdict(list)
        alone = []
        for sent in batches:
            other = view.replica(sent.batch.uid, self._rng, self._calls.avoided() | set(sent.peers))
            if other is None:
                alone.append(sent)
            else:
                by_peer[other.peer_id].append(sent)
        for peer_id, together in by_peer.items():
            if may_ask():
                self._calls.metrics.hedged_calls.inc()
                for sent in together:
                    sent.hedge = peer_id
                self._call(view.nodes[peer_id], together)
        return alone

    def _replace_silent(self) -> None:
        """Of peers that can't even be connected to little is to be hoped: others are asked, replicas first."""
        silent = [
            sent
            for sent in self._sent.values()
            if sent.is_waiting and all(self._calls.is_silent(self._nodes[peer_id]) for peer_id in sent.peers)
        ]
        self._leave_alone(silent)
        self._give_up(self._ask_replicas(silent))

    def _give_up_late(self) -> None:
        """Sends to other experts the rows that have not reached their goal by now."""
        self._give_up([sent for sent in self._sent.values() if sent.is_waiting])

    def _give_up(self, late: Sequence[SentBatch]) -> None:
        """Sends to other experts the rows that lack answers without these; theirs still count when they come."""
        given_up = np.zeros_like(self._pending)
        for sent in late:
            given_up[self._own_slots(sent.batch)] = True
        given_up &= self._pending
        lacking = self._lacking((self.result.answered | (self._pending & ~given_up)).sum(axis=1))
        if not len(lacking):
            return
        self._leave_alone(late)
        self._failed.update(sent.batch.uid for sent in late)
        kept = np.ones(len(self._goal), dtype=bool)
        kept[lacking] = False
        given_up[kept] = False
        self._pending &= ~given_up  # others may have these slots
        self._reselect(lacking)
        self._pending |= given_up  # where nobody else was found, the late expert keeps its slot

    def _leave_alone(self, late: Sequence[SentBatch]) -> None:
        """Nobody calls these peers before this pass is over."""
        now = self._clock()
        for sent in late:
            for peer_id in sent.peers:
                self._calls.breakers.busy(peer_id, now, self._ends - now)
