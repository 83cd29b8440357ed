"""Copies on this node's disk of experts that one other node hosts alone: should it die, they live on from here."""

import asyncio
import logging

from dht.swarm import Swarm
from dht.vacancies import lone
from expert_server.checkpoints import Checkpoints
from expert_server.hosting import Hosting
from expert_server.settings import NodeSettings
from expert_server.transfer import StateClient
from peer.errors import StateError, TransferError, UnreachableError

logger = logging.getLogger(__name__)


class Standby:
    """Keeps the copies fresh. Run it. They are checkpoints like others: who has one is first to take an orphan."""

    def __init__(
        self,
        settings: NodeSettings,
        swarm: Swarm,
        hosting: Hosting,
        checkpoints: Checkpoints,
        client: StateClient,
    ) -> None:
        self.copied = 0
        """Copies made since the start, newer ones of the same experts too."""
        self._settings = settings
        self._swarm = swarm
        self._hosting = hosting
        self._checkpoints = checkpoints
        self._client = client

    async def run(self) -> None:
        """For ever; ends at once when it shall keep none."""
        while self._settings.standby_every_s:
            await asyncio.sleep(self._settings.standby_every_s)
            try:
                await self.copy()
            except UnreachableError as error:
                logger.info("%s", error)

    async def copy(self) -> None:
        """Fetches what is newer than the copies here. Raises UnreachableError.

        At most so many experts are fetched each time, and copied in all, as the settings say: of a large grid each look
        sees others.

        Nothing while this node pauses or leaves.
        """
        if self._hosting.is_leaving:
            return
        wanted = lone(self._hosting.seen, self._swarm.host.peer_id)
        saved = await self._checkpoints.newest()
        held = {*self._hosting.taker.announced}  # some since the last look
        stale = [r for uid, r in wanted.items() if uid not in held and r.update_count > saved.get(uid, 0)]
        stale.sort(key=lambda replica: replica.update_count - saved.get(replica.uid, 0), reverse=True)
        room = self._settings.max_standbys - len(saved.keys() - held)
        new = [replica for replica in stale if replica.uid not in saved][: max(room, 0)]
        some = [r for r in stale if r.uid in saved or r in new][: self._settings.max_standbys]
        nodes = await self._swarm.registry.nodes({replica.peer_id for replica in some}) if some else {}
        for replica in some:
            if self._hosting.is_leaving:
                return
            if replica.peer_id in nodes:
                try:
                    fetched = await self._client.fetch(nodes[replica.peer_id], replica.uid)
                    await self._checkpoints.keep(replica.uid, fetched.checkpoint)
                    self.copied += 1
                except (TransferError, StateError, OSError) as error:
                    logger.info("no copy of expert %s: %s", replica.uid, error)
