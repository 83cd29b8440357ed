"""How a node takes experts: it claims them, builds those whose claims it keeps, and announces what it serves.

Where the state of an expert comes from that a node takes: its own disk, or a live replica elsewhere.
"""

import asyncio
import contextlib
import logging
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial

from dht.registry import Replica, ReplicaAnnouncement, ReplicaState
from dht.swarm import Swarm
from dht.uid import UID
from expert_server.experts.devices import ComputeDevice, roomiest
from expert_server.experts.expert import Expert
from expert_server.hosting.placement import lost_claims, state_sources
from expert_server.serving.runtime import Runtime
from expert_server.settings import NodeSettings
from expert_server.state.checkpoints import Checkpoints
from expert_server.state.transfer import StateClient
from peer.averaging import AveragingHistory, max_plausible_updates
from peer.errors import StateError, TransferError, UnreachableError
from peer.formatting import counted
from peer.identity import PeerID

logger = logging.getLogger(__name__)


class Restorer:
    """Brings experts that do not serve yet to the freshest state there is."""

    def __init__(
        self,
        swarm: Swarm,
        runtime: Runtime,
        checkpoints: Checkpoints,
        client: StateClient,
        meetings: AveragingHistory[UID],
        plausible: Callable[[], int],
    ) -> None:
        """`plausible`: gives the most updates that a state of others is believed to have taken."""
        self._swarm = swarm
        self._runtime = runtime
        self._checkpoints = checkpoints
        self._client = client
        self._meetings = meetings
        self._plausible = plausible
        self._rng = random.SystemRandom()

    async def restore(
        self, expert: Expert, hosts: Sequence[Replica], saved: int | None, unreachable: set[PeerID]
    ) -> bool:
        """From the freshest of others' replicas and this node's checkpoint of `saved` updates; else from the next.

        An expert that nobody has keeps its first parameters. False when others have it and none of them gave it.
        Peers that are `unreachable` are left out, and those that do not answer become so.
        """
        others = state_sources(hosts, self._swarm.host.peer_id, self._rng)
        most = max_plausible_updates([replica.update_count for replica in others])
        most = min(most, max(self._plausible(), saved or 0))
        fresher = [replica for replica in others if saved is None or replica.update_count > saved]
        if await self._fetch_first(expert, fresher, most, unreachable):
            return True
        restored = saved is not None and await self._checkpoints.restore(expert)
        if restored and expert.update_count == saved:
            return True
        staler = [
            r for r in others if r not in fresher and (not restored or r.update_count > expert.update_count)
        ]
        return await self._fetch_first(expert, staler, most, unreachable) or restored or not others

    async def _fetch_first(
        self, expert: Expert, replicas: Sequence[Replica], most: int, unreachable: set[PeerID]
    ) -> bool:
        """Fetches from the first that gives a good state, which counts `most` updates at most."""
        peers = {replica.peer_id for replica in replicas} - unreachable
        nodes = await self._swarm.registry.nodes(peers) if peers else {}
        for replica in replicas:
            if replica.peer_id not in nodes:
                continue
            try:
                fetched = await self._client.fetch(nodes[replica.peer_id], expert.uid)
                checkpoint = fetched.checkpoint
                update_count = min(checkpoint.update_count, most)
                await self._runtime.run(partial(expert.import_state, checkpoint.state, update_count))
            except TransferError as error:
                logger.warning("%s", error)
                if not error.answered:
                    unreachable.add(replica.peer_id)
                continue
            except StateError as error:
                logger.warning("refused the state of %s by %s: %s", expert.uid, replica.peer_id, error)
                continue
            self._meetings.record(expert.uid, replica.peer_id, update_count)
            return True
        return False


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
        is_alone = host.alive and not host.peers() and not self._swarm.peer_store.addresses()
        return 0.0 if is_alone else self._settings.claim_wait_s

    async def announce(self, uids: Collection[UID]) -> None:
        """Renews what it says of experts that it serves."""
        state = ReplicaState.LEAVING if self.leaving else ReplicaState.SERVING
        experts = self._runtime.experts
        announced = [
            ReplicaAnnouncement(uid, state, experts[uid].update_count, self._claimed_at[uid])
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
        claims = {
            uid: ReplicaAnnouncement(uid, ReplicaState.CLAIMED, saved.get(uid, 0), claimed_at)
            for uid in wanted
        }
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
        claims: Mapping[UID, ReplicaAnnouncement],
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
        self, claims: Mapping[UID, ReplicaAnnouncement], taken: list[UID], failed: list[UID]
    ) -> None:
        announced = 0
        while True:
            await asyncio.sleep(min(_RENEW_EVERY_S, self._settings.lifetime_s / 3))
            waiting = [claim for uid, claim in claims.items() if uid not in taken and uid not in failed]
            with contextlib.suppress(UnreachableError):  # the next time comes soon
                await self._swarm.registry.announce(waiting, self._settings.lifetime_s)
                await self.announce(taken[announced:])
                announced = len(taken)
