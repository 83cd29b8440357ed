"""Spot checks: now and then another replica is asked the same, and its answer compared with the first.

Replicas of an expert have the same parameters when they start and after they have averaged, and drift apart while each
takes steps of its own. So only answers of equal update counts are compared, and only a gross difference counts. Of two
that differ nobody can say which is wrong: a third is asked, and who differs from both others that agree is the odd one.
"""

import asyncio
import logging
import random
from collections.abc import Sequence

import numpy as np

from dht.directory import View
from peer.codec import Floats
from peer.loop import TaskSet
from trainer_client.dispatch.batches import Answer, NodeCall, Request
from trainer_client.dispatch.calls import Answers, CallTracker, next_answers

logger = logging.getLogger(__name__)

TOLERANCE = 0.75
"""Of the difference between two answers, against the larger of them. Honest replicas that had taken 25, 100 and 200
updates apart and never averaged differed by up to 0.45, 0.58 and 0.56.
"""

_MOST_AT_ONCE = 4
_LEAST = 1e-6


def difference(one: Floats, other: Floats) -> float:
    """How far two answers [R, W] are apart: 0 when they are equal, 1 when one is zero, 2 at most."""
    largest = max(float(np.linalg.norm(one)), float(np.linalg.norm(other)))
    return float(np.linalg.norm(one - other)) / max(largest, _LEAST)


def outlier(answers: Sequence[Floats]) -> int | None:
    """Which of three answers differs from both others, which agree; None when that is no one."""
    a, b, c = answers
    agree = [difference(*pair) <= TOLERANCE for pair in ((b, c), (a, c), (a, b))]
    return agree.index(True) if sum(agree) == 1 else None


class SpotChecks:
    """Those of one trainer. Its methods belong to the loop's thread."""

    def __init__(self, calls: CallTracker, part: float, rng: random.Random) -> None:
        """`part`: of the answers of experts that have another replica."""
        self._calls = calls
        self._part = part
        self._rng = rng
        self._tasks = TaskSet()

    def is_due(self) -> bool:
        """Whether the answer that has just come is one to check."""
        return self._rng.random() < self._part and len(self._tasks) < _MOST_AT_ONCE

    def begin(self, view: View, answer: Answer, request: Request, deadline_s: float) -> None:
        """Checks the answer to a request, if another node can be asked. Costs whoever waits for the answer nothing."""
        hosts = view.hosts(answer.batch.uid, self._calls.avoided() | {answer.peer_id})
        if not hosts or answer.tensor is None:
            return
        replicas = self._rng.sample(hosts, min(2, len(hosts)))
        calls = [
            NodeCall(view.nodes[replica.peer_id], "forward", [request], deadline_s) for replica in replicas
        ]
        self._tasks.spawn(self._check(answer, calls), "check an answer at another replica")

    async def close(self) -> None:
        await self._tasks.aclose()

    async def _check(self, first: Answer, calls: Sequence[NodeCall]) -> None:
        metrics = self._calls.metrics
        second = await self._ask(calls[0])
        if not _are_comparable(first, second):
            return
        metrics.spot_checks.inc()
        apart = difference(_tensor(first), _tensor(second))
        if apart <= TOLERANCE:
            return
        metrics.differing_answers.inc()
        logger.warning(
            "two replicas of expert %s differ by %.2f: those of nodes %s and %s",
            first.batch.uid, apart, first.peer_id, second.peer_id,
        )  # fmt: skip
        if len(calls) < 2:
            return
        third = await self._ask(calls[1])
        if _are_comparable(first, third):
            self._judge([first, second, third])

    async def _ask(self, call: NodeCall) -> Answer:
        answers: Answers = asyncio.Queue()
        self._calls.start(call, answers)
        found = await next_answers(answers, 2 * call.deadline_s)
        return found[0] if found else Answer(call.requests[0].batch, call.node.peer_id, None)

    def _judge(self, answers: Sequence[Answer]) -> None:
        odd = outlier([_tensor(answer) for answer in answers])
        if odd is not None:
            self._calls.metrics.outvoted_answers.inc()
            self._calls.breakers.distrust(answers[odd].peer_id, self._calls.now())
            logger.warning("node %s answers otherwise than two others: left alone", answers[odd].peer_id)


def _are_comparable(one: Answer, other: Answer) -> bool:
    return other.tensor is not None and one.update_count == other.update_count


def _tensor(answer: Answer) -> Floats:
    assert answer.tensor is not None
    return answer.tensor
