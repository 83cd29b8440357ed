"""How a node takes experts: it claims them, builds those whose claims it keeps, and announces what it serves."""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial

from hivemind.p2p import PeerID

from dht.registry import Announced, Replica, ReplicaState
from dht.swarm import Swarm
from dht.uid import UID
from expert_server.hosting.placement import lost_claims
from expert_server.state.checkpoints import Checkpoints
from expert_server.experts.devices import ComputeDevice, roomiest
from expert_server.experts.expert import Expert
from expert_server.restoring import Restorer
from expert_server.serving.runtime import Runtime
from expert_server.settings import NodeSettings
from peer.errors import UnreachableError
from peer.formatting import counted

logger = logging.getLogger(__name__)

_RENEW_EVERY_S = 2.0
"""While experts are taken: how often it is announced which of them are ready."""


class Taker:
    """Takes experts into service, and says in the DHT which ones this node claims and serves."""

    def __init__(
        self,
        settings: NodeSettings,
        swarm: Swarm,
        runtime: Runtime,
        checkpoints: Checkpoints,
        devices: Sequence[ComputeDevice],
        restorer: Restorer,
        now: Callable[[], float],
    ) -> None:
        self.leaving = False
        """Whether this node gives its experts up: then it takes none, and announces that they leave."""
        self._settings = settings
        self._swarm = swarm
        self._runtime = runtime
        self._checkpoints = checkpoints
        self._devices = devices
        self._restorer = restorer
        self._now = now
        self._claimed_at: dict[UID, float] = {}
        self._taking: asyncio.Task[list[UID]] | None = None

    @property
    def announced(self) -> list[UID]:
        """The experts that it claims or serves, by what it said last."""
        return list(self._claimed_at)

    @property
    def claim_wait_s(self) -> float:
        """How long to wait for claims of others, in seconds. Who knows no peer has nobody to wait for."""
        host = self._swarm.host
        is_alone = host.alive and not host.peers() and not self._swarm.acquaintances.addresses()
        return 0.0 if is_alone else self._settings.claim_wait_s

    async def announce(self, uids: Collection[UID]) -> None:
        """Renews what it says of experts that it serves."""
        state = ReplicaState.LEAVING if self.leaving else ReplicaState.SERVING
        experts = self._runtime.experts
        announced = [
            Announced(uid, state, experts[uid].update_count, self._claimed_at[uid])
            for uid in uids
            if uid in self._claimed_at  # else it was withdrawn already
        ]
        queued_rows = self._runtime.stats.queued_rows
        await self._swarm.registry.announce(announced, self._settings.lifetime_s, queued_rows)

    async def withdraw(self, uids: Collection[UID]) -> None:
        for uid in uids:
            self._claimed_at.pop(uid, None)
        await self._swarm.registry.withdraw(uids, self._settings.lifetime_s)

    def forget(self) -> None:
        """What it announced: it is withdrawn, or the DHT does not answer and it expires."""
        self._claimed_at.clear()

    async def take(self, wanted: list[UID], enough: int = 1) -> list[UID]:
        """Gives the experts that were taken, of which `enough` others have none. Ends early when the node leaves."""
        if not wanted or self.leaving:
            return []
        self._taking = asyncio.create_task(self._claim_and_take(wanted, enough), name="take")
        try:
            await asyncio.wait({self._taking})
            return [] if self._taking.cancelled() else self._taking.result()
        finally:
            self._taking.cancel()
            await asyncio.gather(self._taking, return_exceptions=True)
            self._taking = None

    def leave(self) -> None:
        """Takes no more."""
        self.leaving = True
        if self._taking is not None:
            self._taking.cancel()

    async def _claim_and_take(self, wanted: list[UID], enough: int) -> list[UID]:
        """Claims experts, waits for the claims of others, and serves those that it keeps."""
        registry, me = self._swarm.registry, self._swarm.host.peer_id
        lifetime_s, claimed_at = self._settings.lifetime_s, self._now()
        self._claimed_at |= dict.fromkeys(wanted, claimed_at)
        saved = await self._checkpoints.newest()
        claims = {uid: Announced(uid, ReplicaState.CLAIMED, saved.get(uid, 0), claimed_at) for uid in wanted}
        await registry.announce(claims.values(), lifetime_s)
        built = await self._build_for(self.claim_wait_s, wanted)
        replicas = await registry.replicas(wanted)
        lost = lost_claims(wanted, replicas, me, saved, enough)
        await self.withdraw(lost)
        for uid in lost:
            del claims[uid]
            built.pop(uid, None)
        restored_before = self._checkpoints.counts.restored
        taken = await self._serve(claims, built, replicas, saved)
        if restored := self._checkpoints.counts.restored - restored_before:
            logger.info(
                "%d of %s can go on from this node's checkpoints", restored, counted(len(taken), "expert")
            )
        return taken

    async def _build_for(self, seconds: float, wanted: Iterable[UID]) -> dict[UID, Expert]:
        """Waits so long, and builds as many of the experts as it can meanwhile."""
        clock = asyncio.get_running_loop().time
        ends = clock() + seconds
        built: dict[UID, Expert] = {}
        for uid in wanted:
            if clock() >= ends:
                break
            built[uid] = await self._build(uid, built.values())
        await asyncio.sleep(max(0.0, ends - clock()))
        return built

    async def _build(self, uid: UID, others: Iterable[Expert]) -> Expert:
        """With its first parameters. `others`: experts that are built, and do not serve yet."""
        hosted = Counter(expert.device for expert in [*self._runtime.experts.values(), *others])
        device = roomiest(self._devices, hosted)
        return await self._runtime.run(partial(Expert, uid, self._swarm.manifest, device))

    async def _serve(
        self,
        claims: Mapping[UID, Announced],
        built: dict[UID, Expert],
        replicas: Mapping[UID, tuple[Replica, ...]],
        saved: Mapping[UID, int],
    ) -> list[UID]:
        """Serves the experts one by one. Building and fetching take long: meanwhile the claims must not expire."""
        taken: list[UID] = []
        failed: list[UID] = []
        unreachable: set[PeerID] = set()
        renewing = asyncio.create_task(self._keep_claimed(claims, taken, failed), name="keep claimed")
        try:
            for uid in claims:
                expert = built.pop(uid, None) or await self._build(uid, built.values())
                if await self._restorer.restore(expert, replicas[uid], saved.get(uid), unreachable):
                    self._runtime.add(expert)
                    taken.append(uid)
                else:
                    failed.append(uid)
        finally:
            renewing.cancel()
            await asyncio.gather(renewing, return_exceptions=True)
        await self.withdraw(failed)
        await self.announce(taken)
        if failed:
            logger.warning(
                "could not take %s that others host: they gave no state", counted(len(failed), "expert")
            )
        return taken

    async def _keep_claimed(
        self, claims: Mapping[UID, Announced], taken: list[UID], failed: list[UID]
    ) -> None:
        announced = 0
        while True:
            await asyncio.sleep(min(_RENEW_EVERY_S, self._settings.lifetime_s / 3))
            waiting = [claim for uid, claim in claims.items() if uid not in taken and uid not in failed]
            with contextlib.suppress(UnreachableError):  # the next time comes soon
                await self._swarm.registry.announce(waiting, self._settings.lifetime_s)
                await self.announce(taken[announced:])
                announced = len(taken)
