"""Fan-out: sends rows to experts, waits no longer than agreed, and chooses again where too few answered.

Shapes: R rows, K experts for each row, D hidden size.
"""

import asyncio
import logging
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from grpc import StatusCode
from hivemind.p2p import PeerID

from dht.beam import Selection, default_beam_size, select_experts
from dht.directory import Directory, View
from dht.registry import NodeInfo
from dht.uid import UID
from peer.codec import Floats
from peer.errors import ExpertError
from trainer_client.breaker import CircuitBreakers
from trainer_client.calls import Answer, Direction, ExpertCaller, KeptAt, Request
from trainer_client.shares import Booleans, Integers, Share, make_shares, refill

logger = logging.getLogger(__name__)

_MAX_ROUNDS = 3
"""Times that a row's experts are chosen in one call."""

# an expert's own status, after which the peer that hosts it is as good as before
_NOT_THE_PEERS_FAULT = {StatusCode.NOT_FOUND, StatusCode.INTERNAL, StatusCode.INVALID_ARGUMENT}


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


@dataclass
class DispatchStats:
    """Counted since the start."""

    calls: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    """By cause: the gRPC status in small letters."""
    reselected_rows: int = 0
    unanswered_rows: int = 0
    """Rows that went on with no expert at all."""
    late_backward: int = 0
    """Shares whose gradient did not come in time."""


@dataclass
class _Outcome:
    """One share's end: its answer, or None when it failed."""

    share: Share
    peer_id: PeerID
    answer: Answer | None


class Dispatcher:
    """Calls the experts of all layers of one trainer. Its methods belong to the loop's thread."""

    def __init__(
        self,
        directory: Directory,
        caller: ExpertCaller,
        policy: WaitPolicy,
        *,
        breakers: CircuitBreakers | None = None,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stats = DispatchStats()
        self._directory = directory
        self._caller = caller
        self._policy = policy
        self._breakers = breakers or CircuitBreakers()
        self._rng = random.Random(seed)  # noqa: S311  # spreads load, keeps no secret
        self._clock = clock
        self._calls: set[asyncio.Task[None]] = set()
        self._closed = False

    def live_experts(self) -> int:
        """Experts that can be called now."""
        return self._directory.view.live_experts(self._breakers.open_at(self._clock()))

    async def close(self) -> None:
        """Ends the calls that are still under way; whoever waits for one goes on as if it had failed."""
        self._closed = True
        for call in self._calls:
            call.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)

    async def forward(
        self,
        layer: int,
        inputs: Floats,
        scores: Sequence[Floats],
        k: int,
        sequence_length: int,
        keep: bool = False,
    ) -> ForwardPass:
        """Sends each row to its top-k live experts by `scores` (one [R, G_d] per grid dimension).

        Row r is position `r % sequence_length` of sequence `r // sequence_length`. `keep`: a
        backward call is meant to follow. Never raises for experts that fail.
        """
        run = _Forward(self, layer, inputs, scores, k, sequence_length, keep)
        await run.until_enough()
        result = run.result
        self.stats.unanswered_rows += int((~result.answered.any(axis=1)).sum())
        return result

    async def backward(self, forward: ForwardPass, gradients: Floats) -> Floats:
        """Sends `gradients` [R, K, D] to the experts that answered; gives the gradient of the inputs [R, D].

        An expert that does not answer within the deadline contributes nothing.
        """
        began = self._clock()
        total = np.zeros_like(forward.inputs)
        outcomes: asyncio.Queue[list[_Outcome]] = asyncio.Queue()
        avoided = self._breakers.open_at(began)
        by_peer: dict[PeerID, list[AnsweredShare]] = defaultdict(list)
        for answer in forward.answers:
            if answer.peer_id not in avoided:
                by_peer[answer.peer_id].append(answer)
        view = self._directory.view
        waiting: dict[PeerID, int] = {}
        for peer_id, answers in by_peer.items():
            node = view.nodes.get(peer_id)
            if node is None:
                continue  # its record has expired since
            shares = [answer.share for answer in answers]
            requests = [answer.request(forward.inputs, gradients) for answer in answers]
            self._start_call(node, "backward", shares, requests, self._policy.call_deadline_s, outcomes)
            waiting[peer_id] = len(shares)
        answered, ends = 0, began + self._policy.call_deadline_s
        while any(waiting.values()) and (left := ends - self._clock()) > 0:
            for outcome in await _next_outcomes(outcomes, left):
                waiting[outcome.peer_id] -= 1
                if outcome.answer is not None and outcome.answer.tensor is not None:
                    total[outcome.share.rows] += outcome.answer.tensor  # a share names each row once
                    answered += 1
        self.stats.late_backward += len(forward.answers) - answered
        for peer_id, shares_left in waiting.items():
            if shares_left:  # at the deadline: the next layer must not wait for this peer again
                self._breakers.failed(peer_id, self._clock())
        return total

    def _start_call(
        self,
        node: NodeInfo,
        direction: Direction,
        shares: Sequence[Share],
        requests: Sequence[Request],
        deadline_s: float,
        outcomes: "asyncio.Queue[list[_Outcome]]",
    ) -> None:
        """Starts a call that puts the outcome of every share into `outcomes`, also when nobody reads them any more."""
        if self._closed:
            outcomes.put_nowait([_Outcome(share, node.peer_id, None) for share in shares])
            return
        task = asyncio.create_task(self._call(node, direction, shares, requests, deadline_s, outcomes))
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def _call(
        self,
        node: NodeInfo,
        direction: Direction,
        shares: Sequence[Share],
        requests: Sequence[Request],
        deadline_s: float,
        outcomes: "asyncio.Queue[list[_Outcome]]",
    ) -> None:
        self.stats.calls += 1
        waiting = dict(enumerate(shares))
        did_well = True
        try:
            async for answer in self._caller.call(node, direction, requests, deadline_s):
                share = waiting.pop(answer.index)
                if answer.error is not None:
                    self._note_failure(node.peer_id, answer.error)
                    did_well &= answer.error.status in _NOT_THE_PEERS_FAULT
                outcomes.put_nowait([_Outcome(share, node.peer_id, answer if answer.error is None else None)])
            if did_well:
                self._breakers.succeeded(node.peer_id)
        except ExpertError as error:
            self._note_failure(node.peer_id, error)
        finally:
            if waiting:  # no empty list: that would look like a time-out
                outcomes.put_nowait([_Outcome(share, node.peer_id, None) for share in waiting.values()])

    def _note_failure(self, peer_id: PeerID, error: ExpertError) -> None:
        self.stats.failures[error.status.name.lower()] += 1
        now = self._clock()
        if error.status is StatusCode.RESOURCE_EXHAUSTED:
            self._breakers.busy(peer_id, now, error.retry_after_s)
        elif error.status not in _NOT_THE_PEERS_FAULT:
            self._breakers.failed(peer_id, now)
        logger.debug("node %s: %s: %s", peer_id, error.status.name, error)


class _Forward:
    """One forward fan-out, while it lasts."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        layer: int,
        inputs: Floats,
        scores: Sequence[Floats],
        k: int,
        sequence_length: int,
        keep: bool,
    ) -> None:
        rows, width = inputs.shape
        self._dispatcher = dispatcher
        self._policy = dispatcher._policy
        self._clock = dispatcher._clock
        self._scores = scores
        self._keep = keep
        self._grid = tuple(table.shape[1] for table in scores)
        self._began = self._clock()
        self._rounds = np.zeros(rows, dtype=np.int64)  # times that each row's experts were chosen
        self._outcomes: asyncio.Queue[list[_Outcome]] = asyncio.Queue()
        self._pending = np.zeros((rows, k), dtype=bool)
        self._failed: set[UID] = set()  # or late: not asked again for any row
        self._asked: dict[UID, PeerID] = {}  # who was asked last for each expert
        self._goal = np.full(rows, min(self._policy.k_min, k))  # answers that each row needs
        self.result = ForwardPass(
            layer,
            sequence_length,
            inputs,
            np.zeros((rows, k, width), dtype=np.float32),
            np.zeros((rows, k), dtype=bool),
            np.zeros((rows, k, len(scores)), dtype=np.int64),
        )

    async def until_enough(self) -> None:
        """Returns when all have answered, or enough and the grace time is over, or at the deadline."""
        self._choose(np.arange(len(self._goal)))
        enough_at: float | None = None
        hedged = False
        while self._pending.any():
            if enough_at is None and self._has_enough():
                enough_at = self._clock()
            look_at = self._policy.next_look(self._began, enough_at, hedged)
            outcomes = await _next_outcomes(self._outcomes, look_at - self._clock())
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
        self._dispatcher.stats.reselected_rows += len(lacking)
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
        left = self._began + self._policy.call_deadline_s - now
        for coordinate in np.unique(self.result.coordinates[self._pending], axis=0).tolist():
            uid = UID(self.result.layer, tuple(coordinate))
            self._failed.add(uid)
            self._dispatcher._breakers.busy(self._asked[uid], now, left)

    def _choose(self, rows: Integers) -> None:
        """Fills the free slots of these rows with the best live experts that they don't have, and calls those."""
        is_first = not self._rounds.any()
        self._rounds[rows] += 1
        view = self._dispatcher._directory.view
        avoided = self._dispatcher._breakers.open_at(self._clock())
        taken = (self.result.answered | self._pending)[rows]
        fresh = self._select(rows, view, avoided, taken.shape[1])
        coordinates, filled = refill(self.result.coordinates[rows], taken, fresh)
        self.result.coordinates[rows] = coordinates
        wanted = np.zeros_like(self._pending)
        wanted[rows] = filled
        self._send(wanted, view, avoided)
        if is_first:
            # no row can get more answers than there are live experts
            self._goal = np.minimum(self._goal, np.maximum(1, self._pending.sum(axis=1)))

    def _select(self, rows: Integers, view: View, avoided: frozenset[PeerID], count: int) -> Selection:
        tables = view.tables(self.result.layer, avoided)
        if self._failed:
            alive = tables[-1].copy()
            for uid in self._failed:
                alive[uid.coordinate] = False
            tables = (*tables[:-1], alive)
        scores = [table[rows] for table in self._scores]
        return select_experts(scores, tables, count, default_beam_size(count))

    def _send(self, wanted: Booleans, view: View, avoided: frozenset[PeerID]) -> None:
        """One call to each server, with all shares of its experts."""
        dispatcher, result = self._dispatcher, self.result
        by_peer: dict[PeerID, list[Share]] = defaultdict(list)
        for share in make_shares(
            result.layer, result.coordinates, wanted, self._grid, result.sequence_length
        ):
            replica = view.replica(share.uid, dispatcher._rng, avoided)
            if replica is not None:
                by_peer[replica.peer_id].append(share)
                self._asked[share.uid] = replica.peer_id
                self._pending[share.rows, share.slots] = True
        left = self._began + self._policy.call_deadline_s - self._clock()
        for peer_id, shares in by_peer.items():
            requests = [_request(share, result.inputs, None, keep=self._keep) for share in shares]
            dispatcher._start_call(view.nodes[peer_id], "forward", shares, requests, left, self._outcomes)

    def _settle(self, outcome: _Outcome) -> None:
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


async def _next_outcomes(outcomes: "asyncio.Queue[list[_Outcome]]", timeout_s: float) -> list[_Outcome]:
    """The next outcomes; none when the time is over."""
    try:
        async with asyncio.timeout(timeout_s):
            return await outcomes.get()
    except TimeoutError:
        return []


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
