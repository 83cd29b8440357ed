"""Calls in progress: starts calls to nodes, records how they went, and passes on the nodes' replies."""

import asyncio
import logging
import random
import time
from collections import Counter as Counts
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
from grpc import StatusCode
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from dht.announcements import NodeInfo
from dht.directory import View
from dht.uid import UID
from peer.bounded import BoundedDict
from peer.codec import Booleans, Integers
from peer.errors import ExpertError
from peer.formatting import printable
from peer.identity import PeerID
from peer.loop import TaskSet
from peer.metrics import SECONDS, start_at_zero, total, totals
from trainer_client.credit import CreditAccounts
from trainer_client.dispatch.batches import (
    AnsweredRows,
    CallEnded,
    CallProgress,
    ExpertCaller,
    ExpertReply,
    Kept,
    NodeCall,
)
from trainer_client.dispatch.health import HealthChecks
from trainer_client.dispatch.policy import AnswerScreening, CircuitBreakers, Latencies
from trainer_client.dispatch.replicas import NOT_ASKED, choose_replicas

logger: logging.Logger = logging.getLogger(__name__)

# an expert's own status, which says nothing against the peer that hosts it
_NOT_THE_PEERS_FAULT = {StatusCode.NOT_FOUND, StatusCode.INTERNAL, StatusCode.INVALID_ARGUMENT}

_LOST = {StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED}
_PROVEN_S = 30.0
"""A peer that answered within this time is very probably still there."""
_LATE = 0.9
"""A call that ends after this share of its deadline was waited for until then."""
_UNANSWERED_S = 30.0
"""After a replica did not answer all its rows, others are preferred to it for this long. That is also the longest time
that a busy node asks for.
"""
_HEARD = _UNANSWERED = 4096
"""For how many peers it is remembered when they answered last, and how many replicas are known that did not."""

Reply: TypeAlias = AnsweredRows | ExpertReply | CallEnded
Replies: TypeAlias = asyncio.Queue[Reply]


class DispatchMetrics:
    """What one trainer counts about its calls to experts."""

    def __init__(self, metrics: CollectorRegistry | None = None) -> None:
        def counter(name: str, description: str, *labels: str) -> Counter:
            return Counter(f"talkoot_trainer_{name}", description, labels, registry=metrics)

        def gauge(name: str, description: str) -> Gauge:
            return Gauge(f"talkoot_trainer_{name}", description, registry=metrics)

        self.calls: Counter = counter("calls", "Calls to nodes.")
        self.failures: Counter = counter(
            "failures", "Calls, and parts of them, that failed, by gRPC status.", "cause"
        )
        self.call_seconds: Histogram = Histogram(
            "talkoot_trainer_call_seconds",
            "Duration of calls that were answered in full.",
            ["direction"],
            buckets=SECONDS,
            registry=metrics,
        )
        start_at_zero(self.call_seconds, "forward", "backward")
        self.bytes: Counter = counter("bytes", "Payload to and from nodes, in bytes.", "direction")
        start_at_zero(self.bytes, "sent", "received")
        self.fp32_bytes: Counter = counter(
            "fp32_bytes", "What that payload would take as fp32, in bytes.", "direction"
        )
        start_at_zero(self.fp32_bytes, "sent", "received")
        self.reselected_rows: Counter = counter(
            "reselected_rows", "Rows sent to other experts because the first did not answer."
        )
        self.unanswered_rows: Counter = counter("unanswered_rows", "Rows that went on with no expert.")
        self.forgotten_sequences: Counter = counter(
            "forgotten_sequences", "Times that an expert no longer had the earlier rows of sequences."
        )
        self.repeated_calls: Counter = counter("repeated_calls", "Calls repeated because the first was lost.")
        self.hedged_calls: Counter = counter("hedged_calls", "Forward calls also sent to a second replica.")
        self.hedges_won: Counter = counter(
            "hedges_won", "Experts of hedged calls that the second replica answered first."
        )
        self.spot_checks: Counter = counter(
            "spot_checks", "Answers of which rows were to be computed again here, by outcome.", "outcome"
        )
        # "moved_on" and "not_given" don't judge the answer: the node gave no parameters to check it with
        start_at_zero(self.spot_checks, "passed", "failed", "moved_on", "not_given")
        self.checked_rows: Counter = counter("checked_rows", "Rows computed again here and compared.")
        self.evasive: Gauge = gauge("evasive_nodes", "Nodes of whose last answers none could be checked.")
        self.late_gradients: Counter = counter("late_gradients", "Gradients that did not come in time.")
        self.wrong_answers: Counter = counter("wrong_answers", "Answers that no honest node gives.")
        self.skipped_updates: Counter = counter("skipped_updates", "Optimizer steps that experts refused.")
        self.rollbacks: Counter = counter(
            "rollbacks", "Times that an expert went back to its last good state."
        )
        self.live_experts: Gauge = gauge("live_experts", "Experts that can be called now.")
        self.open_breakers: Gauge = gauge(
            "open_breakers", "Nodes avoided for a while because they failed or were busy."
        )
        self.banned: Gauge = gauge("banned", "Nodes avoided for a while because of wrong answers.")

    def values(self) -> dict[str, Any]:
        """The counts by name, with the failures by cause."""
        named = {
            "calls": self.calls,
            "hedged_calls": self.hedged_calls,
            "hedges_won": self.hedges_won,
            "repeated_calls": self.repeated_calls,
            "reselected_rows": self.reselected_rows,
            "unanswered_rows": self.unanswered_rows,
            "late_gradients": self.late_gradients,
            "checked_rows": self.checked_rows,
            "wrong_answers": self.wrong_answers,
            "skipped_updates": self.skipped_updates,
            "rollbacks": self.rollbacks,
        }
        counts = {name: int(total(metric)) for name, metric in named.items()}
        failed = int(total(self.spot_checks, outcome="failed"))
        return counts | {"failed_spot_checks": failed, "failures": self.failures_by_cause()}

    def failures_by_cause(self) -> dict[str, int]:
        """By gRPC status, in lower case."""
        return {cause: int(count) for cause, count in totals(self.failures, "cause").items()}


class CallTracker:
    """The calls of one trainer. Call its methods on the loop's thread."""

    def __init__(
        self,
        caller: ExpertCaller,
        breakers: CircuitBreakers,
        clock: Callable[[], float] = time.monotonic,
        *,
        is_silent: Callable[[NodeInfo], bool] = lambda node: False,
        gone: Callable[[PeerID], None] = lambda peer_id: None,
        health: HealthChecks | None = None,
        metrics: DispatchMetrics | None = None,
        credit: CreditAccounts | None = None,
    ) -> None:
        """`is_silent`: whether connecting to the node was tried and it is not connected. `gone` is called for peers to
        which the connection failed. `health`: None: nodes are not checked while calls are slow. `credit`: records the
        nodes' work.
        """
        self.metrics: DispatchMetrics = metrics or DispatchMetrics()
        self.credit: CreditAccounts = credit or CreditAccounts()
        self.latencies: Latencies = Latencies()
        self.breakers = breakers
        self.now = clock
        self.is_silent = is_silent
        self._caller = caller
        self._gone = gone
        self._health = health
        self._heard_at = BoundedDict[PeerID, float](_HEARD)
        """When each peer answered last, the latest at the end."""
        self.refusals: BoundedDict[PeerID, str] = BoundedDict[PeerID, str](_HEARD)
        """What peers said that refused this trainer for want of permission, and have not answered since."""
        self._unanswered_at = BoundedDict[tuple[UID, PeerID], float](_UNANSWERED)
        """When each replica last failed to answer some of its rows, the latest at the end."""
        self._screening = AnswerScreening()
        self._updates = Counts[UID]()
        """How many updates of each expert were made for this trainer."""
        self._tasks = TaskSet()
        self._closed = False

    def avoided(self) -> frozenset[PeerID]:
        """The peers not to call now."""
        avoided = self.breakers.open_at(self.now())
        return avoided if self._health is None else avoided | self._health.unresponsive

    def proven(self) -> frozenset[PeerID]:
        """The peers that answered recently."""
        since = self.now() - _PROVEN_S
        return frozenset(peer_id for peer_id, heard_at in self._heard_at.items() if heard_at > since)

    def replicas(
        self,
        uids: Iterable[UID],
        view: View,
        rng: random.Random,
        avoided: frozenset[PeerID],
        asked: Mapping[UID, Collection[PeerID]] = NOT_ASKED,
    ) -> dict[UID, PeerID]:
        """The replica of each expert to call, as `choose_replicas` chooses them by how earlier calls went."""
        now, failed = self.now(), defaultdict[UID, list[PeerID]](list)
        while self._unanswered_at and next(iter(self._unanswered_at.values())) <= now - _UNANSWERED_S:
            self._unanswered_at.popitem(last=False)
        for uid, peer_id in self._unanswered_at:
            failed[uid].append(peer_id)
        return choose_replicas(uids, view, rng, avoided, self.latencies.nodes_lately(now), asked, failed)

    def start(self, call: NodeCall, sink: Replies) -> CallProgress:
        """Starts a call that puts its replies into `sink`, and finally a CallEnded, even if nobody reads them
        any more.
        """
        progress = CallProgress()
        if self._closed:
            sink.put_nowait(CallEnded(call.batch, call.node.peer_id))
        else:
            self._tasks.spawn(self._make(call, progress, sink), "call a node")
        return progress

    async def close(self) -> None:
        """Ends the calls in progress. Tasks that wait for one continue as if it had failed."""
        self._closed = True
        await self._tasks.aclose()
        if self._health is not None:
            await self._health.close()

    async def _make(self, call: NodeCall, progress: CallProgress, sink: Replies) -> None:
        self.metrics.calls.inc()
        peer_id = call.node.peer_id
        call_times = self.latencies.calls[call.direction]
        began = self.now()
        if call.keep:
            call = replace(call, updates=[self._updates[uid] for uid in call.batch.uids])
        lost, due = False, call.slots.copy()
        try:
            if await self._receive(call, began, progress, sink, due):
                took_s = self.now() - began
                self.breakers.succeeded(peer_id, call.direction)
                call_times.add(took_s)
                self.metrics.call_seconds.labels(call.direction).observe(took_s)
        except ExpertError as error:
            lost = error.status in _LOST
            lost_quickly = error.status is StatusCode.UNAVAILABLE and self.now() - began < call.deadline_s / 2
            self._note_failure(peer_id, error, call.direction, lost_quickly)
            if error.status is StatusCode.DEADLINE_EXCEEDED:
                took_s = self.now() - began
                call_times.add_unfinished(took_s)
                if took_s > _LATE * call.deadline_s:  # otherwise it did not respond to health checks
                    self.latencies.note_node(peer_id, took_s, self.now())
            if lost and self.is_silent(call.node):
                self._gone(peer_id)
        except Exception:
            # a bug in reading answers: the peer that triggered it is left alone, and training continues
            logger.exception("could not read the answers of node %s", peer_id)
            self._note_failure(peer_id, ExpertError(StatusCode.DATA_LOSS, "its answers can't be read"))
        finally:
            if not lost:
                self._note_unanswered(call, due, self.now() - began)
            sink.put_nowait(CallEnded(call.batch, peer_id, lost))

    async def _receive(
        self, call: NodeCall, began: float, progress: CallProgress, sink: Replies, due: Booleans
    ) -> bool:
        """Passes the replies on. Returns whether all are successes. `due` [n, K]: the slots that the node should
        answer; those that it answers are cleared. Raises ExpertError.
        """
        peer_id = call.node.peer_id
        did_well, heard, answered = True, False, False
        async with self._watching(call), aclosing(self._caller.call(call)) as replies:
            async for reply in replies:
                if not heard:
                    self._heard_at[peer_id] = self.now()
                    self.refusals.pop(peer_id, None)
                    heard = True
                if isinstance(reply, Kept):
                    progress.kept = reply.request_id
                    continue
                if isinstance(reply, AnsweredRows):
                    answered = True
                    due[_places_in(call, reply)] &= ~reply.answered
                elif call.held is not None and reply.has_forgotten:
                    due[reply.batch.experts == reply.batch.uids.index(reply.uid)] = False
                did_well &= self._note(call, reply)
                sink.put_nowait(reply)
        # not before the last row: a node could send some early to look quick
        if answered and not due.any():
            self.latencies.note_node(peer_id, self.now() - began, self.now())
        return did_well

    def _note_unanswered(self, call: NodeCall, due: Booleans, took_s: float) -> None:
        """`due` [n, K]: the slots that the node should have answered, and did not. Such a call makes no node look
        quick, but it can make one look slow.
        """
        peer_id = call.node.peer_id
        for uid in call.batch.experts_in(due):
            self._unanswered_at[uid, peer_id] = self.now()
        usual_s = self.latencies.calls[call.direction].quantile(0.5)
        if (
            due.any()
            and usual_s is not None
            and took_s > max(usual_s, self.latencies.nodes.get(peer_id, 0.0))
        ):
            self.latencies.note_node(peer_id, took_s, self.now())

    def _watching(self, call: NodeCall) -> AbstractAsyncContextManager[None]:
        if self._health is None:
            return nullcontext()
        usual_s = self.latencies.nodes.get(call.node.peer_id)
        return self._health.during(call.node, self.latencies.calls[call.direction], usual_s)

    def _note(self, call: NodeCall, reply: AnsweredRows | ExpertReply) -> bool:
        """Returns whether the reply is a success. Raises ExpertError for an answer that no honest node gives. The call
        then ends, and its peer is banned for a while.
        """
        peer_id = call.node.peer_id
        if isinstance(reply, ExpertReply):
            self._note_guard(peer_id, reply)
            if reply.error is None:
                is_update = call.direction == "backward" and not reply.skipped_update
                self._updates[reply.uid] += is_update
                return True
            if call.held is not None and reply.has_forgotten:
                self.metrics.forgotten_sequences.inc()
                return True
            self._note_failure(peer_id, reply.error, call.direction)
            return reply.error.status in _NOT_THE_PEERS_FAULT
        fault = self._screening.find_fault(call, reply)
        if fault is not None:
            raise ExpertError(
                StatusCode.DATA_LOSS, f"the answer for {call.batch.uids[0]} and others is {fault}"
            )
        return True

    def _note_guard(self, peer_id: PeerID, reply: ExpertReply) -> None:
        self.metrics.skipped_updates.inc(reply.skipped_update)
        self.metrics.rollbacks.inc(reply.rolled_back)
        if reply.rolled_back:
            logger.warning("expert %s of node %s went back to its last good state", reply.uid, peer_id)

    def note_wrong(self, peer_id: PeerID, said: str) -> None:
        """Bans the peer for a while, because it gave an answer that no honest node gives."""
        self._note_failure(peer_id, ExpertError(StatusCode.DATA_LOSS, said))

    def _note_failure(
        self, peer_id: PeerID, error: ExpertError, kind: str = "", lost_quickly: bool = False
    ) -> None:
        self.metrics.failures.labels(error.status.name.lower()).inc()
        now = self.now()
        if error.status is StatusCode.PERMISSION_DENIED:
            self.refusals[peer_id] = printable(str(error))
        if error.status is StatusCode.DATA_LOSS:
            self.metrics.wrong_answers.inc()
            self.breakers.distrust(peer_id, now)
            logger.warning("node %s: %s: banned for a while", peer_id, error)
        elif error.status is StatusCode.RESOURCE_EXHAUSTED:
            self.breakers.busy(peer_id, now, error.retry_after_s)
        elif error.status not in _NOT_THE_PEERS_FAULT:
            self.breakers.failed(peer_id, now, kind, quickly=lost_quickly)
        logger.debug("node %s: %s: %s", peer_id, error.status.name, error)


def _places_in(call: NodeCall, reply: AnsweredRows) -> Integers:
    """The indices of the answered rows in the call's batch. In backward, the reply may refer to a part of it."""
    return np.searchsorted(call.batch.rows, reply.batch.rows[reply.places])


async def next_replies(replies: Replies, timeout_s: float) -> list[Reply]:
    """All available replies, after waiting for the next one if there are none. Empty once the time is over."""
    found: list[Reply] = []
    if replies.empty():
        try:
            async with asyncio.timeout(timeout_s):
                found.append(await replies.get())
        except TimeoutError:
            return []
    while not replies.empty():
        found.append(replies.get_nowait())
    return found
