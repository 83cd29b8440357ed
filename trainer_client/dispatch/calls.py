"""Calls under way: starts calls to nodes, notes how they went, and hands over an answer to every request."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from grpc import StatusCode
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from dht.announcements import NodeInfo
from peer.bounded import BoundedDict
from peer.errors import ExpertError
from peer.identity import PeerID
from peer.loop import TaskSet
from peer.metrics import SECONDS, start_at_zero, total, totals
from trainer_client.dispatch.batches import Answer, Direction, ExpertBatch, ExpertCaller, NodeCall, Request
from trainer_client.dispatch.policy import AnswerScreening, CallTimes, CircuitBreakers, Latencies

logger = logging.getLogger(__name__)

# an expert's own status, after which the peer that hosts it is as good as before
_NOT_THE_PEERS_FAULT = {StatusCode.NOT_FOUND, StatusCode.INTERNAL, StatusCode.INVALID_ARGUMENT}

_LOST = {StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED}
_CLOSED = ExpertError(StatusCode.CANCELLED, "the trainer ended the call")
_PROVEN_S = 30.0
"""A peer that answered so lately is most probably there."""
_HEARD = 4096
"""Peers of which it is known when they answered last, at most."""

Answers: TypeAlias = asyncio.Queue[Answer]


class DispatchMetrics:
    """What one trainer counts of its calls to experts."""

    def __init__(self, metrics: CollectorRegistry | None = None) -> None:
        def counter(name: str, description: str, *labels: str) -> Counter:
            return Counter(f"talkoot_trainer_{name}", description, labels, registry=metrics)

        def gauge(name: str, description: str) -> Gauge:
            return Gauge(f"talkoot_trainer_{name}", description, registry=metrics)

        self.calls = counter("calls", "Calls to nodes.")
        self.failures = counter("failures", "Calls, and parts of them, that failed, by gRPC status.", "cause")
        self.call_seconds = Histogram(
            "talkoot_trainer_call_seconds",
            "Duration of calls that were answered in full.",
            ["direction"],
            buckets=SECONDS,
            registry=metrics,
        )
        start_at_zero(self.call_seconds, "forward", "backward")
        self.bytes = counter("bytes", "Payload to and from nodes, in bytes.", "direction")
        start_at_zero(self.bytes, "sent", "received")
        self.fp32_bytes = counter(
            "fp32_bytes", "What that payload would take as fp32, in bytes.", "direction"
        )
        start_at_zero(self.fp32_bytes, "sent", "received")
        self.reselected_rows = counter(
            "reselected_rows", "Rows sent to other experts because the first did not answer."
        )
        self.unanswered_rows = counter("unanswered_rows", "Rows that went on with no expert.")
        self.repeated_calls = counter("repeated_calls", "Calls repeated because the first was lost.")
        self.hedged_calls = counter("hedged_calls", "Forward calls also sent to a second replica.")
        self.hedges_won = counter(
            "hedges_won", "Parts of hedged calls that the second replica answered first."
        )
        self.spot_checks = counter("spot_checks", "Answers compared with another replica's.")
        self.differing_answers = counter(
            "differing_answers", "Spot checks in which the two differed grossly."
        )
        self.outvoted_answers = counter(
            "outvoted_answers", "Differing answers that a third replica showed to be wrong."
        )
        self.late_gradients = counter("late_gradients", "Gradients that did not come in time.")
        self.wrong_answers = counter("wrong_answers", "Answers that no honest node gives.")
        self.skipped_updates = counter("skipped_updates", "Optimizer steps that experts refused.")
        self.rollbacks = counter("rollbacks", "Times that an expert went back to its last good state.")
        self.live_experts = gauge("live_experts", "Experts that can be called now.")
        self.open_breakers = gauge(
            "open_breakers", "Nodes avoided for a while because they failed or were busy."
        )
        self.banned = gauge("banned", "Nodes avoided for a while because of wrong answers.")

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
            "spot_checks": self.spot_checks,
            "differing_answers": self.differing_answers,
            "outvoted_answers": self.outvoted_answers,
            "wrong_answers": self.wrong_answers,
            "skipped_updates": self.skipped_updates,
            "rollbacks": self.rollbacks,
        }
        counts = {name: int(total(metric)) for name, metric in named.items()}
        return counts | {"failures": self.failures_by_cause()}

    def failures_by_cause(self) -> dict[str, int]:
        """By the gRPC status in lower case."""
        return {cause: int(count) for cause, count in totals(self.failures, "cause").items()}


class CallTracker:
    """The calls of one trainer. Its methods belong to the loop's thread."""

    def __init__(
        self,
        caller: ExpertCaller,
        breakers: CircuitBreakers,
        clock: Callable[[], float] = time.monotonic,
        *,
        is_silent: Callable[[NodeInfo], bool] = lambda node: False,
        gone: Callable[[PeerID], None] = lambda peer_id: None,
        metrics: DispatchMetrics | None = None,
    ) -> None:
        """`is_silent`: whether a connection to the node was tried and does not stand. `gone` is told of peers whose
        call failed so.
        """
        self.metrics = metrics or DispatchMetrics()
        self.latencies = Latencies()
        self.breakers = breakers
        self.now = clock
        self.is_silent = is_silent
        self.call_times: dict[Direction, CallTimes] = {"forward": CallTimes(), "backward": CallTimes()}
        self._caller = caller
        self._gone = gone
        self._heard_at = BoundedDict[PeerID, float](_HEARD)
        """When each peer answered last, the last one at the end."""
        self._screening = AnswerScreening()
        self._tasks = TaskSet()
        self._closed = False

    def avoided(self) -> frozenset[PeerID]:
        """The peers to leave alone now."""
        return self.breakers.open_at(self.now())

    def proven(self) -> frozenset[PeerID]:
        """The peers that answered lately."""
        since = self.now() - _PROVEN_S
        return frozenset(peer_id for peer_id, heard_at in self._heard_at.items() if heard_at > since)

    def start(self, call: NodeCall, sink: Answers) -> None:
        """Starts a call that puts an answer to each of its requests into `sink`, also when nobody reads them any more.

        Where the call fails, the answers say so.
        """
        if self._closed:
            _fail(call, [request.batch for request in call.requests], _CLOSED, sink)
            return
        self._tasks.spawn(self._make(call, sink), "call a node")

    async def close(self) -> None:
        """Ends the calls that are still under way; whoever waits for one goes on as if it had failed."""
        self._closed = True
        await self._tasks.aclose()

    async def _make(self, call: NodeCall, sink: Answers) -> None:
        self.metrics.calls.inc()
        peer_id = call.node.peer_id
        call_times = self.call_times[call.direction]
        waiting = {request.batch: request for request in call.requests}
        did_well, failure, began = True, _CLOSED, self.now()
        try:
            async for answer in self._caller.call(call):
                if len(waiting) == len(call.requests):
                    self.latencies.note_node(peer_id, self.now() - began)
                    self._heard_at[peer_id] = self.now()
                answer = self._screened(waiting.pop(answer.batch), answer)
                if answer.error is not None:
                    self._note_failure(peer_id, answer.error)
                    did_well &= answer.error.status in _NOT_THE_PEERS_FAULT
                self._note_guard(answer)
                sink.put_nowait(answer)
            if did_well:
                took_s = self.now() - began
                self.breakers.succeeded(peer_id)
                call_times.add(took_s)
                self.latencies.note(call.direction, took_s)
                self.metrics.call_seconds.labels(call.direction).observe(took_s)
        except ExpertError as error:
            failure = error
            lost_quickly = error.status is StatusCode.UNAVAILABLE and self.now() - began < call.deadline_s / 2
            self._note_failure(peer_id, error, lost_quickly)
            if error.status is StatusCode.DEADLINE_EXCEEDED:
                call_times.add_unfinished(self.now() - began)
            if error.status in _LOST and self.is_silent(call.node):
                self._gone(peer_id)
        except Exception:
            # a mistake in how answers are read: the peer that found it is left alone, and training goes on
            logger.exception("could not read the answers of node %s", peer_id)
            failure = ExpertError(StatusCode.DATA_LOSS, "its answers can't be read")
            self._note_failure(peer_id, failure)
        finally:
            _fail(call, waiting, failure, sink)

    def _screened(self, request: Request, answer: Answer) -> Answer:
        """An answer that can't be an honest expert's counts as none, and its peer is banned for a while."""
        if answer.tensor is None:
            return answer
        peer_id = answer.peer_id
        if request.gradients is not None:
            fault = self._screening.fault_of_gradient(request.gradients, answer.tensor)
        else:
            fault = self._screening.find_fault(peer_id, request.inputs, answer.tensor)
        if fault is None:
            return answer
        error = ExpertError(StatusCode.DATA_LOSS, f"expert {answer.batch.uid} gave a {fault} answer")
        logger.warning("node %s: %s: banned for a while", peer_id, error)
        return Answer(answer.batch, peer_id, None, error)

    def _note_guard(self, answer: Answer) -> None:
        self.metrics.skipped_updates.inc(answer.skipped_update)
        self.metrics.rollbacks.inc(answer.rolled_back)
        if answer.rolled_back:
            logger.warning(
                "expert %s of node %s went back to its last good state", answer.batch.uid, answer.peer_id
            )

    def _note_failure(self, peer_id: PeerID, error: ExpertError, lost_quickly: bool = False) -> None:
        self.metrics.failures.labels(error.status.name.lower()).inc()
        now = self.now()
        if error.status is StatusCode.DATA_LOSS:
            self.metrics.wrong_answers.inc()
            self.breakers.distrust(peer_id, now)
        elif error.status is StatusCode.RESOURCE_EXHAUSTED:
            self.breakers.busy(peer_id, now, error.retry_after_s)
        elif error.status not in _NOT_THE_PEERS_FAULT:
            self.breakers.failed(peer_id, now, quickly=lost_quickly)
        logger.debug("node %s: %s: %s", peer_id, error.status.name, error)


def _fail(call: NodeCall, batches: Iterable[ExpertBatch], error: ExpertError, sink: Answers) -> None:
    for batch in batches:
        lost = error.status in _LOST
        sink.put_nowait(Answer(batch, call.node.peer_id, None, error, call_lost=lost))


async def next_answers(answers: Answers, timeout_s: float) -> list[Answer]:
    """All answers that are there, after waiting for the next one if there is none; none when the time is over."""
    found: list[Answer] = []
    if answers.empty():
        try:
            async with asyncio.timeout(timeout_s):
                found.append(await answers.get())
        except TimeoutError:
            return []
    while not answers.empty():
        found.append(answers.get_nowait())
    return found
