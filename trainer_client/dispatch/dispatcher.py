"""Fan-out: the calls that one trainer makes to the experts of all layers, forward and backward.

Shapes: R rows, K experts for each row, D hidden size.
"""

import asyncio
import contextlib
import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from dht.announcements import NodeInfo
from dht.beam_search import Selection
from dht.directory import Directory, PrefixTables
from peer.codec import Floats
from peer.errors import UnreachableError
from peer.identity import PeerID
from trainer_client.dispatch.batches import AnsweredShare, ExpertCaller, ForwardPass, RoutedRows
from trainer_client.dispatch.calls import CallTracker, DispatchStats, NodeCall, Outcomes, next_outcomes
from trainer_client.dispatch.forward import ForwardRun, Reach
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
    ) -> None:
        """`spot_checks`: part of the answers that are compared with another replica's. All that is left to chance
        follows from `seed`. `is_silent`: whether a connection to the node was tried and does not stand.
        """
        self._outgoing = CallTracker(
            caller, breakers or CircuitBreakers(), clock, is_silent=is_silent, gone=directory.forget
        )
        rng = random.Random(seed)  # noqa: S311  # spreads load, keeps no secret
        self._checks = SpotChecks(self._outgoing, spot_checks, random.Random(seed))  # noqa: S311
        self._reach = Reach(directory, self._outgoing, policy, rng, self._checks)

    @property
    def stats(self) -> DispatchStats:
        return self._outgoing.stats

    @property
    def latencies(self) -> Latencies:
        return self._outgoing.latencies

    def open_breakers(self) -> int:
        """Peers that are left alone now."""
        return len(self._outgoing.avoided())

    def banned(self) -> int:
        """Peers that are left alone now for wrong answers."""
        return self._outgoing.breakers.banned(self._outgoing.now())

    def live_experts(self) -> int:
        """Experts that can be called now."""
        return self._reach.directory.view.live_experts(self._outgoing.avoided())

    async def alive(self, layer: int) -> PrefixTables:
        """The prefix tables of a layer's experts that can be called now."""
        return self._reach.directory.view.tables(layer, self._outgoing.avoided())

    async def close(self) -> None:
        """Ends the calls that are still under way; whoever waits for one goes on as if it had failed."""
        await self._checks.close()
        await self._outgoing.close()

    async def forward(
        self,
        layer: int,
        inputs: Floats,
        scores: Sequence[Floats],
        k: int,
        sequence_length: int,
        keep: bool = False,
        first: Selection | None = None,
    ) -> ForwardPass:
        """Sends each row to the experts in `first`, by default its top-k live ones by `scores` (one [R, G_d] per grid
        dimension). Where too few answer, rows are sent to the next by `scores`.

        Row r is position `r % sequence_length` of sequence `r // sequence_length`. `keep`: a
        backward call is meant to follow. Never raises for experts that fail.
        """
        directory = self._reach.directory
        context = directory.view.manifest.model.context
        assert sequence_length <= context, (
            f"{sequence_length} rows in a sequence; this swarm's context is {context}"
        )
        if not directory.knows_all:
            first = None  # of those that were known before
            with contextlib.suppress(UnreachableError):  # then they must do
                await directory.search(layer, scores, k)
        rows = RoutedRows(layer, inputs, scores, k, sequence_length, keep, first)
        run = ForwardRun(self._reach, rows)
        await run.until_enough()
        result = run.result
        self.stats.unanswered_rows += int((~result.answered.any(axis=1)).sum())
        return result

    async def backward(self, forward: ForwardPass, gradients: Floats) -> Floats:
        """Sends `gradients` [R, K, D] to the experts that answered; gives the gradient of the inputs [R, D].

        An expert that does not answer within the deadline contributes nothing.
        """
        deadline_s = self._reach.deadline_s("backward")
        ends = self._outgoing.now() + deadline_s
        total = np.zeros_like(forward.inputs)
        outcomes: Outcomes = asyncio.Queue()
        waiting = self._start_backward(forward, gradients, deadline_s, outcomes)
        answered = 0
        while any(waiting.values()) and (left := ends - self._outgoing.now()) > 0:
            for outcome in await next_outcomes(outcomes, left):
                waiting[outcome.peer_id] -= 1
                if outcome.answer is not None and outcome.answer.tensor is not None:
                    total[outcome.share.rows] += outcome.answer.tensor  # a share names each row once
                    answered += 1
        self.stats.late_backward += len(forward.answers) - answered
        for peer_id, shares_left in waiting.items():
            if shares_left:  # at the deadline: the next layer must not wait for this peer again
                self._outgoing.breakers.failed(peer_id, self._outgoing.now())
        return total

    def _start_backward(
        self, forward: ForwardPass, gradients: Floats, deadline_s: float, outcomes: Outcomes
    ) -> dict[PeerID, int]:
        """One call to each peer that answered; gives how many shares each has still to answer."""
        avoided = self._outgoing.avoided()
        by_peer: dict[PeerID, list[AnsweredShare]] = defaultdict(list)
        for answer in forward.answers:
            if answer.peer_id not in avoided:
                by_peer[answer.peer_id].append(answer)
        nodes = self._reach.directory.view.nodes
        waiting: dict[PeerID, int] = {}
        for peer_id, answers in by_peer.items():
            node = nodes.get(peer_id)
            if node is None:
                continue  # its record has expired since
            shares = [answer.share for answer in answers]
            requests = [answer.request(forward.inputs, gradients) for answer in answers]
            self._outgoing.start(NodeCall(node, "backward", shares, requests, deadline_s, outcomes))
            waiting[peer_id] = len(shares)
        return waiting
