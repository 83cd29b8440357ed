"""A trainer's experts, as its layers use them: finds who is live, sends rows forward, and sends gradients back.

Shapes: R rows, K slots of each row, W width of the experts, G_d size of grid dimension d.
"""

import asyncio
import contextlib
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from dht.announcements import NodeInfo
from dht.beam_search import Selection
from dht.directory import Directory, LiveExperts
from peer.codec import Floats
from peer.errors import UnreachableError
from peer.identity import PeerID
from trainer_client.dispatch.batches import (
    ExpertCaller,
    ForwardPass,
    NodeCall,
    Request,
    RoutedRows,
    SentBatch,
)
from trainer_client.dispatch.calls import Answers, CallTracker, DispatchMetrics, next_answers
from trainer_client.dispatch.forward import ForwardRun
from trainer_client.dispatch.policy import CircuitBreakers, Latencies, WaitPolicy
from trainer_client.dispatch.spot_checks import SpotChecks


class Dispatcher:
    """Calls the experts of all layers of one trainer. Its methods belong to the loop's thread."""

    def __init__(
        self,
        directory: Directory,
        caller: ExpertCaller,
        policy: WaitPolicy,
        *,
        breakers: CircuitBreakers | None = None,
        spot_checks: float = 0.0,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
        is_silent: Callable[[NodeInfo], bool] = lambda node: False,
        metrics: DispatchMetrics | None = None,
    ) -> None:
        """`spot_checks`: part of the answers that are compared with another replica's. All that is left to chance
        follows from `seed`. `is_silent`: whether a connection to the node was tried and does not stand.
        """
        self._directory = directory
        self._policy = policy
        self._calls = CallTracker(
            caller,
            breakers or CircuitBreakers(),
            clock,
            is_silent=is_silent,
            gone=directory.forget,
            metrics=metrics,
        )
        self._rng = random.Random(seed)  # noqa: S311  # spreads load, keeps no secret
        self._checks = SpotChecks(self._calls, spot_checks, random.Random(seed))  # noqa: S311
        self.metrics.live_experts.set_function(self.live_experts)
        self.metrics.open_breakers.set_function(self.open_breakers)
        self.metrics.banned.set_function(self.banned)

    @property
    def metrics(self) -> DispatchMetrics:
        return self._calls.metrics

    @property
    def latencies(self) -> Latencies:
        return self._calls.latencies

    def open_breakers(self) -> int:
        """Peers that are left alone now."""
        return len(self._calls.avoided())

    def banned(self) -> int:
        """Peers that are left alone now for wrong answers."""
        return self._calls.breakers.banned(self._calls.now())

    def live_experts(self) -> int:
        """Experts that can be called now."""
        return self._directory.view.live_experts(self._calls.avoided())

    async def close(self) -> None:
        """Ends the calls that are still under way; whoever waits for one goes on as if it had failed."""
        await self._checks.close()
        await self._calls.close()

    async def find(
        self, layer: int, scores: Sequence[Floats], k: int, bias: Floats | None = None
    ) -> LiveExperts:
        """A layer's experts that can be called now. On a grid too large to know whole, those among them that a search
        for each row's best k by `scores`, one [R, G_d] per grid dimension, and the experts' `bias` brings in.
        """
        if not self._directory.knows_all:
            with contextlib.suppress(UnreachableError):  # what is known must do
                await self._directory.search(layer, scores, k, self._calls.avoided(), bias)
        return self._directory.live(layer, self._calls.avoided())

    async def send(self, rows: RoutedRows, selection: Selection, live: LiveExperts) -> ForwardPass:
        """Sends each row to the experts selected for it among those that were `live`, and returns when enough answered.

        A row that gets too few answers is sent to its next best by `rows.scores` and `rows.bias`. Never raises for
        experts that fail.
        """
        context = live.view.manifest.model.context
        assert rows.sequence_length <= context, (
            f"{rows.sequence_length} rows in a sequence; this swarm's context is {context}"
        )
        run = ForwardRun(rows, live, self._directory, self._calls, self._policy, self._rng, self._checks)
        await run.until_enough(selection)
        self.metrics.unanswered_rows.inc(int((~run.result.answered.any(axis=1)).sum()))
        return run.result

    async def send_back(self, forward: ForwardPass, gradients: Floats) -> Floats:
        """Sends `gradients` [R, K, W] to the experts that answered; gives the gradient of the inputs [R, W].

        An expert that does not answer within the deadline contributes nothing.
        """
        deadline_s = self._policy.deadline_s(self._calls.call_times["backward"])
        ends = self._calls.now() + deadline_s
        total = np.zeros_like(forward.rows.inputs)
        answers: Answers = asyncio.Queue()
        waiting: Counter[PeerID] = Counter()  # answers that each peer has still to give
        for call in self._backward_calls(forward, gradients, deadline_s):
            self._calls.start(call, answers)
            waiting[call.node.peer_id] = len(call.requests)
        answered = 0
        while any(waiting.values()) and (left := ends - self._calls.now()) > 0:
            for answer in await next_answers(answers, left):
                waiting[answer.peer_id] -= 1
                if answer.tensor is not None:
                    total[answer.batch.rows] += answer.tensor  # a batch names each row once
                    answered += 1
        self.metrics.late_gradients.inc(len(forward.answers) - answered)
        for peer_id, missing in waiting.items():
            if missing:  # at the deadline: the next layer must not wait for this peer again
                self._calls.breakers.failed(peer_id, self._calls.now())
        return total

    def _backward_calls(self, forward: ForwardPass, gradients: Floats, deadline_s: float) -> list[NodeCall]:
        """One call to each peer whose answers count."""
        avoided, nodes = self._calls.avoided(), self._directory.view.nodes
        by_peer: dict[PeerID, list[Request]] = defaultdict(list)
        for sent in forward.answers:
            # a peer without a node has left since
            if sent.answered_by in nodes and sent.answered_by not in avoided:
                by_peer[sent.answered_by].append(_backward_request(sent, forward.rows.inputs, gradients))
        return [
            NodeCall(nodes[peer_id], "backward", requests, deadline_s)
            for peer_id, requests in by_peer.items()
        ]


def _backward_request(sent: SentBatch, inputs: Floats, gradients: Floats) -> Request:
    """With the gradients [R, K, W] of the batch's rows, zero where the slot has another expert's answer."""
    own = gradients[sent.batch.rows, sent.batch.slots]
    if not sent.counts.all():
        own[~sent.counts] = 0
    return Request(sent.batch, inputs[sent.batch.rows], own, kept=sent.kept)
