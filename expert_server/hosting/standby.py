"""Copies on this node's disk of experts that one other node hosts alone: should it die, they live on from here."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace

from dht.registry import NodeInfo, Replica
from dht.swarm import Swarm
from dht.uid import UID
from expert_server.blocks import weightless_block
from expert_server.experts.format import Checkpoint, check_state
from expert_server.experts.optimizer import moments_of
from expert_server.hosting.manager import HostingManager
from expert_server.hosting.placement import single_hosted
from expert_server.settings import NodeSettings
from expert_server.state.checkpoints import Checkpoints
from expert_server.state.transfer import StateClient
from peer.errors import StateError, TransferError, UnreachableError

logger = logging.getLogger(__name__)

_MOVED = 1.01
"""A copy is renewed when its host has taken so many times its updates,"""
_OLD_ROUNDS = 6
"""or when it is so many rounds old."""


class StandbyCopies:
    """Keeps the copies fresh. Run it. They are checkpoints like others: who has one is first to take an orphan."""

    def __init__(
        self,
        settings: NodeSettings,
        swarm: Swarm,
        hosting: HostingManager,
        checkpoints: Checkpoints,
        client: StateClient,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.copied = 0
        """Copies made since the start, newer ones of the same experts too."""
        self._settings = settings
        self._swarm = swarm
        self._hosting = hosting
        self._checkpoints = checkpoints
        self._client = client
        self._clock = clock
        self._copied_at: dict[UID, float] = {}

    async def run(self) -> None:
        """For ever; ends at once when it shall keep none."""
        while self._settings.standby_every_s:
            await asyncio.sleep(self._settings.standby_every_s)
            try:
                await self.copy()
            except UnreachableError as error:
                logger.info("%s", error)

    async def copy(self) -> None:
        """Fetches what is clearly newer than the copies here; only a state of its expert takes their place.

        Raises UnreachableError.

        At most so many experts are fetched each time, and copied in all, as the settings say: of a large grid each look
        sees others.

        Nothing while this node pauses or leaves.
        """
        if self._hosting.is_leaving:
            return
        wanted = single_hosted(self._hosting.seen, self._swarm.host.peer_id)
        saved = await self._checkpoints.newest()
        held = {*self._hosting.taker.announced}  # some since the last look
        plausible = self._hosting.plausible_updates
        most = {uid: max(plausible, saved.get(uid, 0)) for uid in wanted}
        stale = [
            r
            for uid, r in wanted.items()
            if uid not in held and self._is_stale(r, saved.get(uid, 0), most[uid])
        ]
        self._copied_at = {uid: at for uid, at in self._copied_at.items() if uid in wanted}
        stale.sort(key=lambda r: min(r.update_count, most[r.uid]) - saved.get(r.uid, 0), reverse=True)
        room = self._settings.max_standbys - len(saved.keys() - held)
        new = [replica for replica in stale if replica.uid not in saved][: max(room, 0)]
        some = [r for r in stale if r.uid in saved or r in new][: self._settings.max_standbys]
        nodes = await self._swarm.registry.nodes({replica.peer_id for replica in some}) if some else {}
        for replica in some:
            if self._hosting.is_leaving:
                return
            if replica.peer_id in nodes:
                try:
                    await self._fetch(nodes[replica.peer_id], replica.uid, most[replica.uid])
                    self.copied += 1
                    self._copied_at[replica.uid] = self._clock()
                except (TransferError, StateError, OSError) as error:
                    logger.info("no copy of expert %s: %s", replica.uid, error)

    async def _fetch(self, node: NodeInfo, uid: UID, most: int) -> None:
        """Counts `most` updates at most. Raises TransferError, StateError or OSError."""
        checkpoint = (await self._client.fetch(node, uid)).checkpoint
        await asyncio.to_thread(self._check, uid, checkpoint)
        believed = min(checkpoint.update_count, most)
        await self._checkpoints.keep(uid, replace(checkpoint, update_count=believed))

    def _is_stale(self, replica: Replica, saved: int, most: int) -> bool:
        """Whether what its host has is worth a transfer: a whole state travels for few updates as for many, of which
        `most` are believed.
        """
        old_at = (
            self._copied_at.get(replica.uid, float("-inf")) + _OLD_ROUNDS * self._settings.standby_every_s
        )
        is_old = self._clock() >= old_at
        return replica.update_count > saved and (is_old or min(replica.update_count, most) >= _MOVED * saved)

    def _check(self, uid: UID, checkpoint: Checkpoint) -> None:
        """Raises StateError."""
        manifest = self._swarm.manifest
        block, moments = weightless_block(manifest), moments_of(manifest.optimizer)
        check_state(uid, checkpoint.state, checkpoint.update_count, block, moments)
