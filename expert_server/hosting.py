"""The experts that a node hosts: it claims those that need a host, announces them, and adopts orphans."""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

from dht.manifest import Manifest
from dht.registry import Announced, Replica, ReplicaState
from dht.swarm import Swarm
from dht.uid import UID
from dht.vacancies import choose, lost_claims, vacant
from expert_server.checkpoints import Checkpoints
from expert_server.devices import ComputeDevice, roomiest
from expert_server.expert import Expert, expert_bytes
from expert_server.runtime import Runtime
from expert_server.settings import NodeSettings
from peer.errors import UnreachableError

logger = logging.getLogger(__name__)

_FREE_MEMORY_SHARE = 0.25
_CLAIM_ROUNDS = 5
_WITHDRAW_S = 2.0
"""Longest that a node which gives its experts up tries to withdraw its announcements."""
_QUEUE_S = 2.0
"""Longest that it lets work that waits be computed."""


class Hosting:
    """Which experts one node hosts, and what the swarm knows of it."""

    def __init__(
        self,
        settings: NodeSettings,
        swarm: Swarm,
        runtime: Runtime,
        checkpoints: Checkpoints,
        devices: Sequence[ComputeDevice],
        now: Callable[[], float] = time.time,
    ) -> None:
        self.adopted = 0
        """Experts taken over because nobody hosted them."""
        self._settings = settings
        self._swarm = swarm
        self._runtime = runtime
        self._checkpoints = checkpoints
        self._devices = devices
        self._now = now
        self._room = _room(settings, swarm.manifest, devices)
        self._spare = settings.spare if settings.spare is not None else (self._room + 1) // 2
        self._claimed_at: dict[UID, float] = {}
        self._was_vacant: set[UID] = set()
        self._had_host: set[UID] = set()

    @property
    def capacity(self) -> int:
        """Experts it would host at most, those it would adopt included."""
        return self._room + self._spare

    async def take_first(self) -> None:
        """Fills the room with experts that nobody hosts."""
        for _ in range(_CLAIM_ROUNDS):  # what was lost to other claims is tried elsewhere
            if not await self._take_vacant(self._room - len(self._runtime.experts)):
                break

    async def announce(self) -> None:
        """Renews what this node says of its replicas, and the manifest."""
        announced = [
            Announced(uid, ReplicaState.SERVING, expert.update_count, self._claimed_at[uid])
            for uid, expert in self._runtime.experts.items()
        ]
        queued_rows = self._runtime.stats.queued_rows
        await self._swarm.registry.announce(announced, self._settings.lifetime_s, queued_rows)
        await self._swarm.keep_manifest()

    async def withdraw(self) -> None:
        """Says that this node hosts nothing more."""
        await self._swarm.registry.withdraw(self._claimed_at, self._settings.lifetime_s)
        self._claimed_at.clear()

    async def release(self, timeout_s: float) -> int:
        """Gives up all experts: withdraws, lets work end for a moment, and saves them for at most `timeout_s`.

        A DHT that does not answer does not keep it. Says how many experts other nodes took over.
        """
        with contextlib.suppress(UnreachableError, TimeoutError):
            async with asyncio.timeout(_WITHDRAW_S):
                await self.withdraw()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_QUEUE_S):
                while self._runtime.stats.queued_rows:  # noqa: ASYNC110  # the queue tells nobody that it is empty
                    await asyncio.sleep(0.02)
        experts = list(self._runtime.experts.values())
        for expert in experts:  # before they are saved: nothing steps them afterwards
            self._runtime.remove(expert.uid)
        self._claimed_at.clear()
        self._was_vacant.clear()
        await self._checkpoints.save_all_within(timeout_s, experts)
        return 0

    async def adopt(self) -> None:
        """Takes experts that had no host at the last look either; before that they may be just changing hands.

        The spare room is for those that had a host once: a founder alone leaves the others to those who join.
        """
        replicas = await self._swarm.registry.replicas(self._swarm.manifest.uids())
        me, mine = self._swarm.host.peer_id, self._runtime.experts
        if any(me not in {r.peer_id for r in replicas[uid]} for uid in mine):
            raise UnreachableError("the DHT does not give back this node's own announcements")
        now_vacant = set(self._vacant(replicas))
        self._had_host |= set(replicas) - now_vacant
        lasting = now_vacant & self._was_vacant
        self._was_vacant = now_vacant
        saved = await self._checkpoints.newest()
        orphans = lasting & (self._had_host | saved.keys())
        room = self._room - len(mine)
        wanted = choose(orphans, room + self._spare, me, saved)
        wanted += choose(lasting - orphans, room - len(wanted), me, saved)
        taken = await self._claim(wanted)
        self.adopted += len(taken)
        if taken:
            logger.info("adopted %d experts that nobody hosted", len(taken))

    async def _take_vacant(self, room: int) -> list[UID]:
        replicas = await self._swarm.registry.replicas(self._swarm.manifest.uids())
        me, saved = self._swarm.host.peer_id, await self._checkpoints.newest()
        return await self._claim(choose(self._vacant(replicas), room, me, saved))

    def _vacant(self, replicas: Mapping[UID, Collection[Replica]]) -> list[UID]:
        """What nobody else hosts: what this node hosted before it was killed may still be announced."""
        me, mine = self._swarm.host.peer_id, self._runtime.experts
        return [uid for uid in vacant(replicas, besides=me) if uid not in mine]

    async def _claim(self, wanted: list[UID]) -> list[UID]:
        """Claims experts, waits for the claims of others, and serves those that it keeps."""
        if not wanted:
            return []
        registry, me = self._swarm.registry, self._swarm.host.peer_id
        lifetime_s, claimed_at = self._settings.lifetime_s, self._now()
        self._claimed_at |= dict.fromkeys(wanted, claimed_at)
        saved = await self._checkpoints.newest()
        claims = [Announced(uid, ReplicaState.CLAIMED, saved.get(uid, 0), claimed_at) for uid in wanted]
        await registry.announce(claims, lifetime_s)
        await asyncio.sleep(self._settings.claim_wait_s)
        lost = lost_claims(wanted, await registry.replicas(wanted), me, saved)
        for uid in lost:
            del self._claimed_at[uid]
        await registry.withdraw(lost, lifetime_s)
        kept = [uid for uid in wanted if uid not in lost]
        restored_before = self._checkpoints.counts.restored
        experts = []
        for uid in kept:
            experts.append(await self._take(uid))
            if self._now() > claimed_at + lifetime_s / 3:  # building takes long: the claims must not expire
                claimed_at = self._now()
                await registry.announce([claim for claim in claims if claim.uid in kept], lifetime_s)
        if restored := self._checkpoints.counts.restored - restored_before:
            logger.info("%d of %d experts go on from this node's checkpoints", restored, len(experts))
        await registry.announce(
            [Announced(e.uid, ReplicaState.SERVING, e.update_count, claimed_at) for e in experts], lifetime_s
        )
        return kept

    async def _take(self, uid: UID) -> Expert:
        """Serves an expert from its newest checkpoint here, else from its first parameters."""
        hosted = Counter(expert.device for expert in self._runtime.experts.values())
        device = roomiest(self._devices, hosted)
        expert = await self._runtime.run(partial(Expert, uid, self._swarm.manifest, device))
        await self._checkpoints.restore(expert)
        self._runtime.add(expert)
        return expert


def _room(settings: NodeSettings, manifest: Manifest, devices: Sequence[ComputeDevice]) -> int:
    """Experts to host: as asked, else as many as fit in a quarter of the free memory of each device."""
    if settings.experts is not None:
        return settings.experts
    size = expert_bytes(manifest)
    fitting = sum(int(_FREE_MEMORY_SHARE * device.memory_bytes / size) for device in devices)
    return min(max(1, fitting), manifest.experts_total)
