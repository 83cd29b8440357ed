"""A trainer's experts, as its layers use them: finds the live ones, sends rows forward, and sends gradients back.

Shapes: R rows, K slots of each row, W width of the experts, G_d size of grid dimension d.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from dht.announcements import NodeInfo
from dht.beam_search import Selection
from dht.directory import Directory, LiveExperts
from dht.uid import UID
from peer.codec import Booleans, Floats, codec_of
from peer.encoding import rounding_error
from peer.errors import UnreachableError
from peer.identity import PeerID
from trainer_client.credit import CreditAccounts
from trainer_client.dispatch.batches import (
    AnsweredRows,
    CallEnded,
    ExpertCaller,
    ExpertReply,
    ForwardPass,
    NodeBatch,
    NodeCall,
    RoutedRows,
    SentBatch,
)
from trainer_client.dispatch.calls import CallTracker, DispatchMetrics, Replies, next_replies
from trainer_client.dispatch.forward import ForwardRun
from trainer_client.dispatch.health import HealthChecks, Responds
from trainer_client.dispatch.policy import (
    CircuitBreakers,
    Latencies,
    WaitPolicy,
    are_bounded,
    products_fit,
)
from trainer_client.dispatch.sequences import go_on, note_held
from trainer_client.dispatch.spot_checks import Checking, SpotChecks


class Dispatcher:
    """Calls the experts of all layers of one trainer. Call its methods on the loop's thread."""

    def __init__(
        self,
        directory: Directory,
        caller: ExpertCaller,
        policy: WaitPolicy,
        *,
        breakers: CircuitBreakers | None = None,
        checking: Checking | None = None,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
        is_silent: Callable[[NodeInfo], bool] = lambda node: False,
        responds: Responds | None = None,
        metrics: DispatchMetrics | None = None,
        credit: CreditAccounts | None = None,
    ) -> None:
        """`checking`: what spot checks need; None: no checks. `seed`: determines all random choices. `is_silent`:
        whether connecting to the node was tried and it is not connected. `responds`: None: nodes are not checked while
        calls are slow. `credit`: records the nodes' work.
        """
        self._directory = directory
        self._policy = policy
        self._calls = CallTracker(
            caller,
            breakers or CircuitBreakers(),
            clock,
            is_silent=is_silent,
            gone=directory.forget,
            health=None if responds is None else HealthChecks(responds, is_silent, self._announced, policy),
            metrics=metrics,
            credit=credit,
        )
        self._rng = random.Random(seed)  # noqa: S311  # spreads load, keeps no secret
        codec = directory.view.manifest.wire.codec
        self._checks = SpotChecks(self._calls, checking, codec, random.Random(seed))  # noqa: S311
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
        """How many peers are avoided now."""
        return len(self._calls.avoided())

    def banned(self) -> int:
        """How many peers are banned now for wrong answers."""
        return self._calls.breakers.banned(self._calls.now())

    def live_experts(self) -> int:
        """How many experts can be called now."""
        return self._directory.view.live_experts(self._calls.avoided())

    def refusal(self) -> str:
        """What a node said that refuses this trainer's calls for want of permission; empty if none does."""
        avoided = self._calls.avoided()
        return next((said for peer_id, said in self._calls.refusals.items() if peer_id in avoided), "")

    def _announced(self, peer_id: PeerID) -> NodeInfo | None:
        return self._directory.view.nodes.get(peer_id)

    async def close(self) -> None:
        """Ends the calls in progress. Tasks that wait for one continue as if it had failed."""
        await self._checks.close()
        await self._calls.close()

    async def find(
        self, layer: int, scores: Sequence[Floats], k: int, bias: Floats | None = None
    ) -> LiveExperts:
        """A layer's experts that can be called now, and which replica of each to call.

        On a grid that is too large to know as a whole, a search first brings in each row's best k by `scores`, one [R,
        G_d] per grid dimension, and the experts' `bias`.
        """
        if not self._directory.knows_all:
            with contextlib.suppress(UnreachableError):  # continue with what is known
                await self._directory.search(layer, scores, k, self._calls.avoided(), bias)
        live = self._directory.live(layer, self._calls.avoided())
        uids = [uid for uid in live.view.replicas if uid.layer == layer]
        hosts = self._calls.replicas(uids, live.view, self._rng, live.avoided)
        return replace(live, hosts=hosts)

    async def send(self, rows: RoutedRows, selection: Selection, live: LiveExperts) -> ForwardPass:
        """Sends each row to the experts selected for it among those in `live`, and returns when enough have answered.

        A row that gets too few answers is sent to its next best experts by `rows.scores` and `rows.bias`, unless it
        continues rows that experts hold. Never raises if experts fail.
        """
        context, longest = live.view.manifest.model.context, int(rows.segments.positions.max(initial=-1)) + 1
        assert longest <= context, f"{longest} rows in a sequence; this swarm's context is {context}"
        avoided = frozenset[PeerID]().union(*(sequence.avoided for sequence in rows.held or ()))
        if avoided:
            live = self._with_others(live, avoided)
        if rows.held is not None and rows.segments.positions[0] > 0:
            result = await go_on(rows, selection, live, self._calls, self._policy)
        else:
            run = ForwardRun(rows, live, self._directory, self._calls, self._policy, self._rng, self._checks)
            await run.until_enough(selection)
            result = run.result
            self.metrics.unanswered_rows.inc(int((~result.answered.any(axis=1)).sum()))
            if rows.held is not None:
                note_held(rows.held, selection, result)
        return result

    def _with_others(self, live: LiveExperts, avoided: frozenset[PeerID]) -> LiveExperts:
        """The same experts, with other hosts in place of avoided ones where possible."""
        uids = [uid for uid, peer_id in live.hosts.items() if peer_id in avoided]
        others = self._calls.replicas(uids, live.view, self._rng, live.avoided | avoided)
        return replace(live, hosts={**live.hosts, **others})

    async def send_back(self, forward: ForwardPass, gradients: Floats) -> tuple[Floats, Floats]:
        """Sends the `gradients` [R, K, W] of the updates to the nodes that answered. Returns the gradient of the inputs
        [R, W], and that of the experts' logits [R, K], which comes from their shares in the answers.

        Once each row has `k_min` gradients, or all that can still come, the others get the grace time of backward
        passes. A node that takes longer contributes nothing here, but still trains its experts.
        """
        deadline_s = self._policy.deadline_s(self.latencies.calls["backward"])
        began = self._calls.now()
        deadline = ends = began + deadline_s
        inputs, products = np.zeros_like(forward.rows.inputs), np.zeros_like(forward.shares)
        came, recomputed = np.zeros_like(forward.answered), np.zeros(len(inputs), dtype=np.bool_)
        pending = np.zeros_like(came)  # slots whose product may still come
        updated = set[UID]()  # experts that took a step in time
        replies: Replies = asyncio.Queue()
        waiting: dict[NodeBatch, NodeCall] = {}
        kept = set()
        for call in self._backward_calls(forward, gradients, deadline_s):
            self._calls.start(call, replies)
            waiting[call.batch] = call
            pending[call.batch.rows] |= call.slots
            if call.kept is not None:
                kept.add(call.batch)
        has_enough = False
        while waiting and (left := ends - self._calls.now()) > 0:
            for reply in await next_replies(replies, left):
                if isinstance(reply, CallEnded):
                    pending[reply.batch.rows] &= ~waiting.pop(reply.batch).slots
                elif isinstance(reply, ExpertReply) and reply.error is None and not reply.skipped_update:
                    updated.add(reply.uid)
                elif isinstance(reply, AnsweredRows) and reply.products is not None:
                    rows = reply.batch.rows[reply.places]
                    inputs[rows] += reply.tensor
                    products[rows] = np.where(reply.answered, reply.products, products[rows])
                    came[rows] |= reply.answered
                    pending[rows] &= ~reply.answered
                    recomputed[rows] |= reply.batch not in kept
            if not has_enough:
                lacks = (came.sum(axis=1) < self._policy.k_min) & pending.any(axis=1)
                if has_enough := not lacks.any():
                    now = self._calls.now()
                    ends = min(deadline, now + self._policy.backward_grace_s(now - began))
        if self._calls.now() >= deadline:
            for call in waiting.values():  # the next layer must not wait for these peers again
                self._calls.breakers.failed(call.node.peer_id, self._calls.now(), "backward")
        logits = np.zeros_like(products)
        error = rounding_error(inputs.shape[1], codec_of(self._directory.view.manifest.wire.codec))
        for sent in forward.answers:
            rows, missing_slots = sent.batch.rows, sent.counts & ~came[sent.batch.rows]
            self.metrics.late_gradients.inc(len(sent.batch.experts_in(missing_slots)))
            brought = _Products.of(forward, sent, gradients, came[rows], products[rows])
            fits = brought.fit(forward.rows.inputs[rows], ~recomputed[rows], error)
            logits[rows] += np.where(fits[:, None], brought.logit_gradients(), np.float32(0))
            if fits.all():
                updates = len(updated.intersection(sent.batch.experts_in(brought.came)))
                self._calls.credit.note(sent.node, pairs=int(brought.came.sum()), updates=updates)
            else:
                self._calls.note_wrong(sent.node.peer_id, "products that do not fit the answers")
        return inputs, logits

    def _backward_calls(self, forward: ForwardPass, gradients: Floats, deadline_s: float) -> list[NodeCall]:
        """One call for each forward call that has answers that count."""
        avoided, nodes = self._calls.avoided(), self._directory.view.nodes
        calls = []
        for sent in forward.answers:
            node = nodes.get(sent.node.peer_id)  # None: it has left since
            if node is None or node.peer_id in avoided or not sent.counts.any():
                continue
            call = NodeCall(
                node,
                "backward",
                sent.batch,
                deadline_s,
                forward.rows.inputs[sent.batch.rows],
                sent.weights,
                _of_answers(sent, gradients),
                kept=sent.progress.kept,
                counts=sent.counts,
            )
            calls.append(call if call.kept is not None else call.in_full())
        return calls


def _of_answers(sent: SentBatch, numbers: Floats) -> Floats:
    """The entries of `numbers` [R, K, W] for each row's answer, and zeros for rows whose answer does not count:
    [n, W].
    """
    counted = sent.counts.any(axis=1, keepdims=True)
    return np.where(counted, numbers[sent.batch.rows, sent.counts.argmax(axis=1)], np.float32(0))


@dataclass(frozen=True)
class _Products:
    """The dot products <G, f> that have arrived for one batch, with the gradients and answers that they belong to."""

    values: Floats  # [n, K], 0 where none has come that counts
    came: Booleans  # [n, K]
    whole: Booleans  # [n], whether none is missing
    shares: Floats  # [n, K], of the experts in the answers that count
    gradients: Floats  # [n, W], G
    answers: Floats  # [n, W], S

    @classmethod
    def of(
        cls, forward: ForwardPass, sent: SentBatch, gradients: Floats, came: Booleans, products: Floats
    ) -> Self:
        """`came`, `products` [n, K]: which products arrived, and their values. Those of slots that don't count are
        dropped.
        """
        here = sent.counts & came
        return cls(
            np.where(here, products, np.float32(0)),
            here,
            (here == sent.counts).all(axis=1),
            np.where(sent.counts, forward.shares[sent.batch.rows], np.float32(0)),
            _of_answers(sent, gradients),
            _of_answers(sent, forward.updates),
        )

    def logit_gradients(self) -> Floats:
        """The gradients of the logits of the batch's experts through their shares p in the answers: [n, K].

        S = sum of p f with p a softmax, so dL/dlogit = p (<G, f> - <G, S>) with G = dL/dS. If a product is missing, <G,
        S> is computed from the S that was answered.
        """
        of_products = (self.shares * self.values).sum(axis=1)
        mean = np.where(self.whole, of_products, (self.gradients * self.answers).sum(axis=1))
        return np.where(self.came, self.shares * (self.values - mean[:, None]), np.float32(0))

    def fit(self, inputs: Floats, exact: Booleans, error: tuple[float, float]) -> Booleans:
        """Whether each row's products match its answers: [n]. `inputs` [n, W]. `exact` [n]: whether the node used the
        updates that it had sent, and did not compute them again. `error`: see `products_fit`.
        """
        fits = are_bounded(self.values, self.gradients, inputs)
        checked = exact & self.whole
        return fits & (~checked | products_fit(self.shares, self.values, self.gradients, self.answers, error))
