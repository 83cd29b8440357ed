"""Finds nodes that no longer respond, such as a laptop that went to sleep or lost its network.

While a call is slow, its node must answer health checks. A check is less work than any call, and a node answers it
while it computes. So a slow node is waited for, and one that does not respond is given up early. It is not called again
until it responds.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeAlias

from grpc import StatusCode

from dht.announcements import NodeInfo
from peer.errors import ExpertError
from peer.identity import PeerID
from peer.loop import TaskSet
from trainer_client.dispatch.policy import CallTimes, WaitPolicy

Responds: TypeAlias = Callable[[NodeInfo, float], Awaitable[bool]]
"""Whether a node answers a health check within so many seconds. Never raises."""

_LEAST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 10.0
"""Pauses between the checks of a node that did not respond."""
_LONGEST_S = 120.0
"""After this time, a node that has not responded is forgotten, and called again if it is still announced."""
_MOST = 256
"""For how many nodes the trainer waits at the same time until they respond again."""


class HealthChecks:
    """The health checks of one trainer. For the loop's thread."""

    def __init__(
        self,
        responds: Responds,
        is_silent: Callable[[NodeInfo], bool],
        announced: Callable[[PeerID], NodeInfo | None],
        policy: WaitPolicy,
    ) -> None:
        """`is_silent`: whether connecting to the node was tried and it is not connected. Such a node is not checked:
        connecting takes several round trips. `announced`: the node's latest record; None if it is no longer announced.
        """
        self._responds = responds
        self._is_silent = is_silent
        self._announced = announced
        self._policy = policy
        self._checks: dict[PeerID, asyncio.Task[bool]] = {}
        """The check of each node that is being checked. Calls to one node share it."""
        self._unresponsive: set[PeerID] = set()
        self._tasks = TaskSet()

    @property
    def unresponsive(self) -> frozenset[PeerID]:
        """The nodes that did not respond when they were asked last."""
        return frozenset(self._unresponsive)

    async def close(self) -> None:
        await self._tasks.aclose()

    @contextlib.asynccontextmanager
    async def during(
        self, node: NodeInfo, call_times: CallTimes, usual_s: float | None
    ) -> AsyncIterator[None]:
        """Raises ExpertError (DEADLINE_EXCEEDED) inside the block, which makes a call to the node, once the node does
        not respond.

        `call_times`: how long such calls took lately. While that is not known, no node is checked. `usual_s`: how long
        calls to this node usually take; None if that is not known.
        """
        pause_s = self._policy.hedge_after_s(call_times)
        deadline_s = self._policy.check_deadline_s(call_times, usual_s)
        if deadline_s is None:
            yield
            return
        limit = asyncio.timeout(None)
        try:
            async with limit:
                watching = self._watch(node, pause_s, deadline_s, limit)
                watch = self._tasks.spawn(watching, "watch a call's node")
                try:
                    yield
                finally:
                    watch.cancel()
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise ExpertError(StatusCode.DEADLINE_EXCEEDED, "the node does not respond") from error

    async def _watch(self, node: NodeInfo, pause_s: float, deadline_s: float, limit: asyncio.Timeout) -> None:
        responds = True
        while responds:
            await asyncio.sleep(pause_s)
            responds = self._is_silent(node) or await self._check(node, deadline_s)
            pause_s = deadline_s
        limit.reschedule(asyncio.get_running_loop().time())

    async def _check(self, node: NodeInfo, deadline_s: float) -> bool:
        check = self._checks.get(node.peer_id)
        if check is None:
            check = self._tasks.spawn(self._ask(node, deadline_s), "check a node's health")
            self._checks[node.peer_id] = check
            check.add_done_callback(lambda _: self._checks.pop(node.peer_id))
        return await asyncio.shield(check)  # other calls may still wait for it

    async def _ask(self, node: NodeInfo, deadline_s: float) -> bool:
        is_well = await self._responds(node, deadline_s)
        if not is_well and node.peer_id not in self._unresponsive and len(self._unresponsive) < _MOST:
            self._unresponsive.add(node.peer_id)
            self._tasks.spawn(self._await_return(node.peer_id, deadline_s), "wait until a node responds")
        return is_well

    async def _await_return(self, peer_id: PeerID, deadline_s: float) -> None:
        """Asks the node, less often the longer it is silent, until it responds or is no longer announced."""
        clock = asyncio.get_running_loop().time
        began = clock()
        try:
            while (silent_s := clock() - began) < _LONGEST_S:
                await asyncio.sleep(min(max(_LEAST_PAUSE_S, silent_s / 2), _LONGEST_PAUSE_S))
                node = self._announced(peer_id)
                if node is None or await self._responds(node, deadline_s):
                    return
        finally:
            self._unresponsive.discard(peer_id)
