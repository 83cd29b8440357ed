"""One forward pass: sends rows to the chosen experts, waits as long as the policy says, and chooses again for rows that
lack answers. A row has slots, each for one expert at a time. Several nodes may be asked for one slot: a second replica
if the first is slow, or the node of another expert if the first expert was given up. The first answer to a slot counts.

Shapes: R rows, K slots of each row, n rows of one batch, or rows whose experts are chosen again.
"""

import asyncio
import random
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from dht.announcements import NodeInfo
from dht.beam_search import Selection, default_beam_size, select_experts
from dht.directory import Directory, LiveExperts, PrefixTables
from dht.uid import UID
from peer.codec import Booleans, Integers, codec_of
from peer.identity import PeerID
from peer.metrics import total
from trainer_client.dispatch.batches import (
    AnsweredRows,
    CallEnded,
    ExpertReply,
    ForwardPass,
    NodeBatch,
    NodeCall,
    RoutedRows,
    SentBatch,
    is_live,
    prefer_proven,
    refill,
    relative_weights,
)
from trainer_client.dispatch.calls import CallTracker, Replies, Reply, next_replies
from trainer_client.dispatch.policy import WaitPolicy
from trainer_client.dispatch.sequences import new_numbers
from trainer_client.dispatch.spot_checks import SpotChecks

_MAX_ROUNDS = 8
"""How many times a row's experts are chosen in one pass, at most."""
_FREE_ROUNDS = 2
"""After this many choices, a row prefers experts of peers that answered recently, because its experts were dead twice.
"""
_LEAST_LEFT = 1 / 8
"""If less than this share of the deadline is left, experts that failed are not replaced: others would be too late, and
would be avoided for that.
"""


class ForwardRun:
    """One forward pass of one layer, while it lasts. For the loop's thread."""

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
        """`live`: the experts that the rows' experts were selected from."""
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
        self._deadline_s = policy.deadline_s(calls.latencies.calls["forward"])
        self._ends = self._began + self._deadline_s
        self._replies: Replies = asyncio.Queue()
        self._sent: dict[NodeBatch, SentBatch] = {}
        self._asked: dict[UID, list[PeerID]] = defaultdict(list)
        self._failed: set[UID] = set()  # or late: not asked again for any row
        # calls under way that may answer each slot with its expert, and all that were made for that
        self._waiting = np.zeros((count, rows.k), dtype=np.int64)
        self._tries = np.zeros((count, rows.k), dtype=np.int64)
        self._rounds = np.zeros(count, dtype=np.int64)  # times that each row's experts were chosen
        self._goal = np.full(count, min(policy.k_min, rows.k))  # answers that each row needs
        self.result: ForwardPass = ForwardPass.of(rows)

    async def until_enough(self, selection: Selection) -> None:
        """Returns when all slots have answers, or when enough have and the grace time is over, or at the deadline."""
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
            replies = await next_replies(self._replies, look_at - self._clock())
            lost = [sent for reply in replies if (sent := self._settle(reply))]
            if replies:
                self._repeat_lost(lost)
                if enough_at is None:
                    self._reselect_lacking()
            elif enough_at is not None or not looks:
                return
            else:
                looks.popleft()[1]()

    def _looks(self) -> deque[tuple[float, Callable[[], None]]]:
        """What to do, and when, while rows lack answers."""
        hedge_after_s = self._policy.hedge_after_s(self._calls.latencies.calls["forward"])
        part_s = self._deadline_s / 4
        looks = [
            (self._began + hedge_after_s, self._hedge),
            (self._began + part_s, self._replace_silent),
            (self._began + 2 * part_s, self._give_up_late),  # leaves the second half to other experts
            (self._began + 3 * part_s, self._give_up_late),
        ]
        return deque(sorted(looks, key=lambda look: look[0]))

    @property
    def _pending(self) -> Booleans:
        """The slots that may still get an answer from their expert: [R, K]."""
        return self._waiting > 0

    # Choosing and sending

    def _send_chosen(self, selection: Selection) -> None:
        """Sends each row to the experts selected for it. An expert that has disappeared meanwhile is replaced, for that
        row only.
        """
        now = self._live_now()
        coordinates, wanted = selection.coordinates, selection.valid
        if now.tables is not self._live.tables:
            coordinates, wanted = self._replace_gone(coordinates, wanted, now.tables)
        self._rounds += 1
        self.result.coordinates[:] = coordinates
        self._send(wanted, now, self._live.hosts)
        # no row can get more answers than there are live experts
        self._goal = np.minimum(self._goal, np.maximum(1, self._pending.sum(axis=1)))

    def _replace_gone(
        self, coordinates: Integers, wanted: Booleans, tables: PrefixTables
    ) -> tuple[Integers, Booleans]:
        """Replaces experts in the wanted slots [R, K] that are no longer live by the rows' next best."""
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
        """Fills these rows' free slots with their best live experts that have not failed, and sends the rows there."""
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
        self._tries[wanted] = 0
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

    def _send(self, wanted: Booleans, live: LiveExperts, hosts: Mapping[UID, PeerID] | None = None) -> None:
        """Sends the wanted slots [R, K], in one call to each node. `hosts`: the replica to ask for an expert, if it is
        still there.
        """
        batch = self._batch(wanted)
        replicas = {
            uid: peer_id
            for uid in batch.uids
            if (peer_id := (hosts or {}).get(uid)) is not None
            and peer_id in live.view.nodes
            and peer_id not in live.avoided
        }
        others = [uid for uid in batch.uids if uid not in replicas]
        replicas |= self._calls.replicas(others, live.view, self._rng, live.avoided)
        for peer_id, part in _by_peer(batch, replicas).items():
            self._call(live.view.nodes[peer_id], part)

    def _batch(self, wanted: Booleans) -> NodeBatch:
        """A batch of all rows, with the experts in the wanted slots [R, K]."""
        rows = self._rows
        return NodeBatch.of(rows.layer, self.result.coordinates, wanted, rows.grid, rows.segments)

    def _call(self, node: NodeInfo, batch: NodeBatch, is_hedge: bool = False) -> None:
        logits = self._rows.logits(batch.rows, self.result.coordinates[batch.rows])
        weights = relative_weights(logits, batch.asked, codec_of(self._live.view.manifest.wire.codec))
        inputs, left_s = self._rows.inputs[batch.rows], self._ends - self._clock()
        numbers = new_numbers(len(batch.lengths)) if self._rows.held is not None else ()
        call = NodeCall(
            node, "forward", batch, left_s, inputs, weights, keep=self._rows.keep, numbers=numbers
        )
        progress = self._calls.start(call, self._replies)
        self._sent[batch] = SentBatch(batch, node, weights, progress, is_hedge, numbers)
        self._waiting[batch.rows] += batch.asked
        self._tries[batch.rows] += batch.asked
        for uid in batch.uids:
            self._asked[uid].append(node.peer_id)

    # Replies

    def _settle(self, reply: Reply) -> SentBatch | None:
        """Handles a reply. Returns the batch if its call was lost before everything was answered."""
        sent = self._sent[reply.batch]
        match reply:
            case AnsweredRows():
                self._take(sent, reply)
            case ExpertReply(error=None):
                sent.versions[reply.uid] = reply.version
            case ExpertReply():
                self._fail(sent, sent.batch.experts == sent.batch.uids.index(reply.uid))
            case CallEnded(lost=True):
                return sent
            case CallEnded():
                self._fail(sent, sent.open)
        return None

    def _take(self, sent: SentBatch, reply: AnsweredRows) -> None:
        """Takes an answer, even if another expert has been asked since."""
        accepted = self.result.accept(sent, reply)
        rows = sent.batch.rows[reply.places]
        self._waiting[rows] = np.where(accepted, 0, self._waiting[rows])
        unanswered = self._close(sent, np.ones_like(accepted), reply.places)
        left_out = sent.batch.experts[reply.places][unanswered & ~reply.answered]
        self._failed.update(sent.batch.uids[number] for number in np.unique(left_out).tolist())
        if not accepted.any():
            return
        self._calls.credit.note(sent.node, pairs=int(accepted.sum()))
        if sent.is_hedge:
            experts = sent.batch.experts[reply.places][accepted]
            self._calls.metrics.hedges_won.inc(len(np.unique(experts)))
        self._checks.note(sent, reply, self._rows.inputs)

    def _close(self, sent: SentBatch, slots: Booleans, places: Integers | None = None) -> Booleans:
        """Records that no answer will come for these slots of a batch, or of some `places` in it. Returns the slots
        that no other call can answer any more.
        """
        at = slice(None) if places is None else places
        rows = sent.batch.rows[at]
        closed = slots & sent.open[at] & self._is_own(sent.batch, at) & (self._waiting[rows] > 0)
        sent.open[at] &= ~slots
        self._waiting[rows] -= closed
        unanswered: Booleans = closed & (self._waiting[rows] == 0)
        return unanswered

    def _fail(self, sent: SentBatch, slots: Booleans) -> None:
        self._failed.update(sent.batch.experts_in(self._close(sent, slots)))

    def _is_own(self, batch: NodeBatch, at: "Integers | slice" = slice(None)) -> Booleans:
        """Which slots of a batch still belong to the same expert: [n, K], for all rows, or only for those `at` some
        places.
        """
        own: Booleans = (self.result.coordinates[batch.rows[at]] == batch.coordinates[at]).all(axis=-1)
        return own & batch.asked[at]

    def _has_enough(self) -> bool:
        return bool((self.result.answered.sum(axis=1) >= self._goal).all())

    # Rows that lack answers

    def _reselect_lacking(self) -> None:
        """Sends rows that can no longer get enough answers to other experts, as long as these have time to answer."""
        if self._ends - self._clock() < _LEAST_LEFT * self._deadline_s:
            return
        lacking = self._lacking((self.result.answered | self._pending).sum(axis=1))
        if len(lacking):
            self._reselect(lacking)

    def _lacking(self, answers: Integers) -> Integers:
        """The rows with fewer answers than they need, except those that were sent often enough."""
        return np.flatnonzero((answers < self._goal) & (self._rounds < _MAX_ROUNDS))

    def _repeat_lost(self, lost: Sequence[SentBatch]) -> None:
        """Repeats calls that were lost, which is harmless because a forward call changes nothing at the node.

        Asks other replicas, or else the same one if it may still be there. Does nothing for slots that were sent twice,
        or if no more than half of the time is left.
        """
        again = np.zeros_like(self._pending)
        first: dict[UID, NodeInfo] = {}
        for sent in lost:
            slots, rows = self._close(sent, sent.open), sent.batch.rows
            again[rows] |= slots & (self._tries[rows] == 1)
            self._failed.update(sent.batch.experts_in(slots & (self._tries[rows] > 1)))
            first |= dict.fromkeys(sent.batch.uids, sent.node)
        if not again.any():
            return
        batch, avoided = self._batch(again), self._calls.avoided()
        replicas: dict[UID, PeerID] = {}
        if self._ends - self._clock() > self._deadline_s / 2:
            replicas = {
                uid: node.peer_id
                for uid, node in first.items()
                if node.peer_id in self._directory.view.nodes
                and node.peer_id not in avoided
                and not self._calls.is_silent(node)
            } | self._other_replicas(batch)
        for peer_id, part in _by_peer(batch, replicas).items():
            self._calls.metrics.repeated_calls.inc()
            self._call(self._directory.view.nodes[peer_id], part)
        self._failed.update(uid for uid in batch.uids if uid not in replicas)

    def _other_replicas(self, batch: NodeBatch) -> dict[UID, PeerID]:
        """Replicas of the batch's experts on peers that were not asked for them in this pass."""
        view, avoided = self._directory.view, self._calls.avoided()
        return self._calls.replicas(batch.uids, view, self._rng, avoided, self._asked)

    def _hedge(self) -> None:
        """Also asks another replica of each slow expert, if the policy allows it. The first answer counts."""
        metrics = self._calls.metrics

        def may_hedge() -> bool:
            return self._policy.may_hedge(total(metrics.hedged_calls), total(metrics.calls))

        self._ask_replicas(self._pending, may_hedge)

    def _ask_replicas(self, slots: Booleans, may_ask: Callable[[], bool] = lambda: True) -> Booleans:
        """Also calls another replica of each expert in the slots [R, K]. Returns the slots whose experts have
        no other.
        """
        batch = self._batch(slots)
        replicas = self._other_replicas(batch)
        for peer_id, part in _by_peer(batch, replicas).items():
            if may_ask():
                self._calls.metrics.hedged_calls.inc()
                self._call(self._directory.view.nodes[peer_id], part, is_hedge=True)
        alone = [number for number, uid in enumerate(batch.uids) if uid not in replicas]
        return np.isin(batch.experts, alone)

    def _replace_silent(self) -> None:
        """Asks other replicas, or else other experts, in place of peers that can't be connected to."""
        heard = np.zeros_like(self._pending)
        for sent in self._sent.values():
            if not self._calls.is_silent(sent.node):
                heard[sent.batch.rows] |= sent.open & self._is_own(sent.batch)
        silent = self._pending & ~heard
        if silent.any():
            self._leave_alone(silent)
            self._give_up(self._ask_replicas(silent))

    def _give_up_late(self) -> None:
        """Sends rows that still lack answers to other experts."""
        self._give_up(self._pending)

    def _give_up(self, late: Booleans) -> None:
        """Gives up waiting for these slots [R, K] in rows that lack answers, and sends the rows to other experts. Late
        answers still count.
        """
        lacking = self._lacking((self.result.answered | (self._pending & ~late)).sum(axis=1))
        if not len(lacking):
            return
        self._leave_alone(late)
        self._failed.update(self._batch(late).uids)
        given_up = np.zeros_like(late)
        given_up[lacking] = late[lacking]
        waited = np.where(given_up, self._waiting, 0)
        self._waiting -= waited  # other experts may have these slots
        self._reselect(lacking)
        # if no other expert was found, the late one keeps its slot
        self._waiting = np.where(given_up & ~self._pending, waited, self._waiting)

    def _leave_alone(self, slots: Booleans) -> None:
        """Avoids the peers that these slots [R, K] wait for until this pass is over."""
        now = self._clock()
        for sent in self._sent.values():
            if (sent.open & self._is_own(sent.batch) & slots[sent.batch.rows]).any():
                self._calls.breakers.busy(sent.node.peer_id, now, self._ends - now)


def _by_peer(batch: NodeBatch, replicas: Mapping[UID, PeerID]) -> dict[PeerID, NodeBatch]:
    """The slots to ask each peer for. `replicas`: the peer for each expert of the batch that has one."""
    peers = list(dict.fromkeys(replicas[uid] for uid in batch.uids if uid in replicas))
    numbers = {peer_id: number for number, peer_id in enumerate(peers)}
    of_experts = [numbers[replicas[uid]] if uid in replicas else -1 for uid in batch.uids]
    at = np.array([*of_experts, -1])[batch.experts]
    return {peer_id: batch.only(at == number)[0] for number, peer_id in enumerate(peers)}
