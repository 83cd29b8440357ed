"""Spot checks: now and then another replica is asked the same, and its answer compared with the first.

Replicas of an expert have the same parameters when they start and after they have averaged, and drift apart while each
takes steps of its own. So only answers of equal update counts are compared, and only a gross difference counts. Of two
that differ nobody can say which is wrong: a third is asked, and who differs from both others that agree is the odd one.
"""

import asyncio
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dht.directory import View
from peer.codec import Floats
from peer.identity import PeerID
from trainer_client.dispatch.batches import Answer, ExpertBatch, Request
from trainer_client.dispatch.calls import CallTracker, NodeCall, Outcome, Outcomes, next_outcomes

logger = logging.getLogger(__name__)

TOLERANCE = 0.75
"""Of the difference between two answers, against what the larger of them adds to its input. Honest replicas that had
taken 25, 100 and 200 updates apart and never averaged differed by up to 0.45, 0.58 and 0.56.
"""

_MOST_AT_ONCE = 4
_LEAST_ADDED = 1e-6


def difference(inputs: Floats, one: Floats, other: Floats) -> float:
    """How far two answers [R, D] are apart: 0 when they are equal, 1 when one gives its inputs back, 2 at most.

    Experts carry their own residual connection, so what they add to their input is compared.
    """
    largest = max(float(np.linalg.norm(one - inputs)), float(np.linalg.norm(other - inputs)))
    return float(np.linalg.norm(one - other)) / max(largest, _LEAST_ADDED)


def outlier(inputs: Floats, answers: Sequence[Floats]) -> int | None:
    """Which of three answers differs from both others, which agree; None when that is no one."""
    a, b, c = answers
    agree = [difference(inputs, *pair) <= TOLERANCE for pair in ((b, c), (a, c), (a, b))]
    return agree.index(True) if sum(agree) == 1 else None


@dataclass(frozen=True)
class _Opinion:
    peer_id: PeerID
    tensor: Floats
    update_count: int


class SpotChecks:
    """Those of one trainer. Its methods belong to the loop's thread."""

    def __init__(self, outgoing: CallTracker, part: float, rng: random.Random) -> None:
        """`part`: of the answers of experts that have another replica."""
        self._outgoing = outgoing
        self._part = part
        self._rng = rng
        self._tasks: set[asyncio.Task[None]] = set()

    def is_due(self) -> bool:
        """Whether the answer that has just come is one to check."""
        return self._rng.random() < self._part and len(self._tasks) < _MOST_AT_ONCE

    def begin(self, view: View, outcome: Outcome, request: Request, deadline_s: float) -> None:
        """Checks an answer, if another node can be asked. Costs whoever waits for the answer nothing."""
        if outcome.answer is None:
            return
        hosts = view.hosts(outcome.share.uid, self._outgoing.avoided() | {outcome.peer_id})
        first = _opinion(outcome.peer_id, outcome.answer)
        if not hosts or first is None:
            return
        peers = [replica.peer_id for replica in self._rng.sample(hosts, min(2, len(hosts)))]
        calls = [(view, outcome.share, request, peer_id, deadline_s) for peer_id in peers]
        task = asyncio.create_task(self._check(first, request.inputs, calls))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _check(
        self,
        first: _Opinion,
        inputs: Floats,
        calls: Sequence[tuple[View, ExpertBatch, Request, PeerID, float]],
    ) -> None:
        stats = self._outgoing.stats
        opinions = [first]
        for number, call in enumerate(calls):
            opinion = await self._ask(*call)
            if opinion is None or opinion.update_count != first.update_count:
                return
            opinions.append(opinion)
            if number:
                continue
            stats.spot_checks += 1
            if (apart := difference(inputs, first.tensor, opinion.tensor)) <= TOLERANCE:
                return
            stats.differing_answers += 1
            logger.warning(
                "two replicas of expert %s differ by %.2f: those of nodes %s and %s",
                call[1].uid, apart, first.peer_id, opinion.peer_id,
            )  # fmt: skip
        if len(opinions) == 3:
            self._judge(inputs, opinions)

    def _judge(self, inputs: Floats, opinions: Sequence[_Opinion]) -> None:
        odd = outlier(inputs, [opinion.tensor for opinion in opinions])
        if odd is not None:
            self._outgoing.stats.odd_answers += 1
            self._outgoing.breakers.distrust(opinions[odd].peer_id, self._outgoing.now())
            logger.warning("node %s answers otherwise than two others: left alone", opinions[odd].peer_id)

    async def _ask(
        self, view: View, share: ExpertBatch, request: Request, peer_id: PeerID, deadline_s: float
    ) -> _Opinion | None:
        outcomes: Outcomes = asyncio.Queue()
        self._outgoing.start(
            NodeCall(view.nodes[peer_id], "forward", [share], [request], deadline_s, outcomes)
        )
        for outcome in await next_outcomes(outcomes, 2 * deadline_s):
            if outcome.answer is not None:
                return _opinion(peer_id, outcome.answer)
        return None


def _opinion(peer_id: PeerID, answer: Answer) -> _Opinion | None:
    if answer.tensor is None:
        return None
    return _Opinion(peer_id, answer.tensor, answer.update_count)
