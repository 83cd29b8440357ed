"""Copies on this node's disk of experts that only one other node hosts. If that node dies, they are restored
from here.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from prometheus_client import CollectorRegistry, Counter

from dht.announcements import NodeInfo, Replica
from dht.swarm import Swarm
from dht.uid import UID
from expert_server.experts.format import OWN_SOURCES, Checkpoint, StateForm, check_state
from expert_server.experts.plausibility import Scale, require_plausible
from expert_server.hosting.placement import (
    answering,
    plausible_updates,
    serving_elsewhere,
    single_hosted,
    usual_updates,
)
from expert_server.hosting.replicas import LocalReplicas
from expert_server.settings import NodeSettings
from peer.errors import StateError, TransferError, UnreachableError
from peer.identity import PeerID
from peer.loop import side_by_side

logger: logging.Logger = logging.getLogger(__name__)

MAX_STANDBYS = 32
"""The most copies in all, and the most that are made in one round. If there are as many, each new one replaces the copy
of an expert that has several hosts by now.
"""
_HOSTS_AT_ONCE = 3
"""Hosts from which copies are fetched at the same time, one from each, so that a slow host does not hold up others."""
_MOVED = 1.01
"""A copy is renewed when its host's update count has grown by this factor."""
_OLD_ROUNDS = 6
"""A copy is also renewed after this many rounds."""


class StandbyCopies:
    """Keeps the copies fresh. Run it. They are ordinary checkpoints, so a node that has one adopts the expert first."""

    def __init__(
        self,
        settings: NodeSettings,
        swarm: Swarm,
        replicas: LocalReplicas,
        seen: Callable[[], Mapping[UID, tuple[Replica, ...]]],
        limit: int = MAX_STANDBYS,
        clock: Callable[[], float] = time.monotonic,
        metrics: CollectorRegistry | None = None,
    ) -> None:
        """`seen`: returns the replicas of the swarm that this node saw last."""
        self.copied: Counter = Counter(
            "talkoot_standby_copies",
            "Copies made of experts that one other node hosts alone.",
            registry=metrics,
        )
        self._every_s = settings.standby_every_s
        self._swarm = swarm
        self._replicas = replicas
        self._seen = seen
        self._limit = limit
        self._clock = clock
        self._copied_at: dict[UID, float] = {}
        self._keeping = asyncio.Lock()
        """Held while room for a copy is made and the copy is saved."""

    async def run(self) -> None:
        """Copies until cancelled. Returns at once if the settings want no copies."""
        while self._every_s:
            await asyncio.sleep(self._every_s)
            try:
                await self.copy()
            except UnreachableError as error:
                logger.info("%s", error)

    async def copy(self) -> None:
        """Fetches states that are clearly newer than this node's own checkpoints and earlier copies. A copy is replaced
        only by a valid and plausible state from the same host. Does nothing while this node pauses or leaves. Raises
        UnreachableError.
        """
        if self._replicas.leaving:
            return
        seen, host = self._seen(), self._swarm.host
        # hosts that have died neither serve experts nor keep copies
        living = answering(seen, host.has_failed)
        wanted = single_hosted(living, host.peer_id, self._swarm.manifest.experts_total)
        self._copied_at = {uid: at for uid, at in self._copied_at.items() if uid in wanted}
        if not wanted:
            return
        found = await self._replicas.checkpoints.newest_by_source()
        saved = dict.fromkeys(found, 0)
        for uid in saved.keys() & wanted.keys():
            sources = (*OWN_SOURCES, wanted[uid].peer_id.to_base58())
            saved[uid] = max(found[uid].get(source, 0) for source in sources)
        plausible = plausible_updates(usual_updates(seen))
        most = {uid: max(plausible, saved.get(uid, 0)) for uid in wanted}
        room = self._limit - len(found.keys() - {*self._replicas.held}) + len(self._needless(found))
        some = self._stalest(wanted, saved, most, room)
        of_host: dict[PeerID, list[Replica]] = {}
        for replica in some:
            of_host.setdefault(replica.peer_id, []).append(replica)
        nodes = await self._swarm.registry.nodes(of_host) if some else {}
        until = self._clock() + self._every_s
        copies = (
            self._copy_from(nodes[each], of_host[each], most, until) for each in of_host if each in nodes
        )
        await side_by_side(copies, _HOSTS_AT_ONCE)

    def _stalest(
        self, wanted: Mapping[UID, Replica], saved: Mapping[UID, int], most: Mapping[UID, int], room: int
    ) -> list[Replica]:
        """The replicas to copy in this round, those that are ahead by the most updates first. At most `room` are of
        experts that this node has not saved.
        """
        held = {*self._replicas.held}  # some may be new since the last look
        stale = [
            r
            for uid, r in wanted.items()
            if uid not in held
            and not self._replicas.states.is_withholding(r.peer_id)
            and self._is_stale(r, saved.get(uid, 0), most[uid])
        ]
        stale.sort(key=lambda r: min(r.update_count, most[r.uid]) - saved.get(r.uid, 0), reverse=True)
        new = [replica.uid for replica in stale if replica.uid not in saved][: max(room, 0)]
        return [r for r in stale if r.uid in saved or r.uid in new][: self._limit]

    async def _copy_from(
        self, node: NodeInfo, replicas: Iterable[Replica], most: Mapping[UID, int], until: float
    ) -> None:
        """Copies these states of one host. `until`: when it is too late to begin with another: a slow host must not
        delay the next round.
        """
        for replica in replicas:
            if (
                self._clock() > until
                or self._replicas.leaving
                or self._replicas.states.is_withholding(node.peer_id)
            ):
                return
            await self._copy(node, replica.uid, most[replica.uid])

    async def _copy(self, node: NodeInfo, uid: UID, most: int) -> None:
        """Copies one state. At most `most` updates are believed."""
        try:
            checkpoint = await self._fetch(node, uid, most)
            if not await self._keep(uid, checkpoint):
                return
            self.copied.inc()
            self._copied_at[uid] = self._clock()
        except (TransferError, StateError, OSError) as error:
            # a busy host is normal: the next round tries again
            level = logging.DEBUG if isinstance(error, TransferError) and error.answered else logging.INFO
            logger.log(level, "could not copy expert %s: %s", uid, error)

    async def _keep(self, uid: UID, checkpoint: Checkpoint) -> bool:
        """Saves a copy that has arrived. If there are as many as may be, it takes the place of one that is not needed:
        now, because hosts may have died since the transfer began. Returns False if all are needed. Raises StateError or
        OSError.
        """
        checkpoints = self._replicas.checkpoints
        async with self._keeping:
            found = await checkpoints.newest_by_source()
            if uid not in found and len(found.keys() - {*self._replicas.held}) >= self._limit:
                needless = self._needless(found)
                if not needless:
                    return False
                await checkpoints.drop(needless[-1])
            await checkpoints.keep(uid, checkpoint)
        return True

    def _needless(self, saved: Mapping[UID, Mapping[str, int]]) -> list[UID]:
        """The experts of which this node only has copies, that it does not host, and that two or more living others
        serve. Those with the most hosts come last.
        """
        host = self._swarm.host
        living = answering(self._seen(), host.has_failed)
        hosts = {
            uid: len(serving_elsewhere(living.get(uid, ()), host.peer_id))
            for uid in saved.keys() - {*self._replicas.held}
            if saved[uid].keys().isdisjoint(OWN_SOURCES)
        }
        return sorted((uid for uid, count in hosts.items() if count > 1), key=hosts.__getitem__)

    async def _fetch(self, node: NodeInfo, uid: UID, most: int) -> Checkpoint:
        """At most `most` updates are believed. Raises TransferError, StateError or OSError."""
        checkpoint = (await self._replicas.states.fetch(node, uid)).checkpoint
        believed = min(checkpoint.update_count, most)
        await asyncio.to_thread(self._check, uid, checkpoint, believed, await self._replicas.first_scale())
        return replace(checkpoint, update_count=believed, source=node.peer_id.to_base58())

    def _is_stale(self, replica: Replica, saved: int, most: int) -> bool:
        """Whether the host's state is worth a transfer, which always sends the whole state. At most
        `most` updates are believed.
        """
        old_at = self._copied_at.get(replica.uid, float("-inf")) + _OLD_ROUNDS * self._every_s
        is_old = self._clock() >= old_at
        return replica.update_count > saved and (is_old or min(replica.update_count, most) >= _MOVED * saved)

    def _check(self, uid: UID, checkpoint: Checkpoint, believed: int, first: Scale) -> None:
        """Raises StateError."""
        manifest = self._swarm.manifest
        check_state(uid, checkpoint.state, checkpoint.update_count, StateForm.of(manifest))
        require_plausible(uid, checkpoint.state, believed, [first], manifest.optimizer)
