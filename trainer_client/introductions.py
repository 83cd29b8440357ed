"""Introduces a trainer to nodes before it calls them: a first call then costs no more than any other."""

import asyncio
import logging
from collections.abc import Callable

from hivemind.p2p import PeerID

from dht.directory import Directory
from dht.registry import NodeInfo
from peer.rpc.channels import ChannelPool
from peer.errors import ExpertError, UnreachableError
from peer.own_sessions import OwnSessions

logger = logging.getLogger(__name__)

_MOST = 64
"""Nodes that are known in advance; others are when they are first called."""
_AT_ONCE = 8
_DEADLINE_S = 10.0
_LOOK_EVERY_S = 1.0
_TRY_AGAIN_S = 60.0


class Introductions:
    """`run` it as a task of the loop that owns the sessions."""

    def __init__(
        self, sessions: OwnSessions, channels: ChannelPool, directory: Directory, clock: Callable[[], float]
    ) -> None:
        self._sessions = sessions
        self._channels = channels
        self._directory = directory
        self._clock = clock
        self._tried_at: dict[PeerID, float] = {}

    async def run(self) -> None:
        """For ever. Sessions that come to their end are renewed in time, too."""
        while True:
            async with asyncio.TaskGroup() as group:
                for node in self.due():
                    group.create_task(self._introduce(node))
            await asyncio.sleep(_LOOK_EVERY_S)

    def due(self) -> list[NodeInfo]:
        """The nodes to be introduced to now."""
        nodes = list(self._directory.view.nodes.values())[:_MOST]
        self._tried_at = {n.peer_id: t for n in nodes if (t := self._tried_at.get(n.peer_id)) is not None}
        now = self._clock()
        return [
            node
            for node in nodes
            if self._sessions.known(node.peer_id) is None
            and self._tried_at.get(node.peer_id, -_TRY_AGAIN_S) <= now - _TRY_AGAIN_S
        ][:_AT_ONCE]

    async def _introduce(self, node: NodeInfo) -> None:
        self._tried_at[node.peer_id] = self._clock()
        try:
            async with asyncio.timeout(_DEADLINE_S):
                channel = await self._channels.reach(node)
                await self._sessions.metadata(node.peer_id, channel, _DEADLINE_S)
        except (ExpertError, UnreachableError, TimeoutError) as error:
            logger.debug("node %s opens no session: %s", node.peer_id, error)
