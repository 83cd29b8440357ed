"""Who may call this node: keeps what it knows of that up to date, and lets nobody in on what no longer holds."""

import logging
import time
from collections.abc import Callable
from pathlib import Path

from dht.ledger import Ledger
from dht.swarm import Swarm
from peer.errors import RecordError, StartError
from peer.rpc.sessions import Sessions

logger = logging.getLogger(__name__)


class Doorkeeper:
    """One node's. `look` once in every announcement period."""

    def __init__(
        self, swarm: Swarm, state: Path, max_sessions: int, now: Callable[[], float] = time.time
    ) -> None:
        """`state`: the node's folder, where the founder's has the list of the invites it made."""
        self.sessions = Sessions(
            swarm.keys.swarm_id, swarm.host.peer_id, swarm.admission, limit=max_sessions, now=now
        )
        self._swarm = swarm
        self._ledger = Ledger(state) if swarm.host.peer_id == swarm.keys.author else None
        self._now = now
        self._own_problem = ""

    async def look(self) -> None:
        """Reads the denylist and what is revoked, and ends the sessions of those it names.

        The founder's node publishes what its owner has revoked. Raises UnreachableError.
        """
        try:
            if self._ledger is not None:
                await self._swarm.revocations.publish(self._ledger.revoked(self._now()))
        except StartError as error:
            logger.warning("%s; until then nothing more is revoked", error)
        try:
            await self._swarm.refresh_admission()
        finally:
            self.sessions.recheck()
        self._look_at_own()

    def _look_at_own(self) -> None:
        """A node whose own token ends serves nobody any more; its owner should know why."""
        badge = self._swarm.registry.badge
        if badge is None:
            return
        try:
            self._swarm.admission.check_own(badge, self._swarm.host.peer_id)
        except RecordError as error:
            if str(error) != self._own_problem:
                logger.error("others ignore this node: %s; ask the swarm's founder for another invite", error)
            self._own_problem = str(error)
