"""The replicas that this node hosts: how it claims, restores, announces and releases them."""

import asyncio
import contextlib
import logging
import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from functools import partial
from statistics import median_low
from types import MappingProxyType
from typing import Any, TypeVar

from dht.announcements import Replica, ReplicaAnnouncement, ReplicaState
from dht.swarm import Swarm
from dht.uid import UID
from dht.upkeep import UpkeepPeriod
from expert_server.blocks import build_block
from expert_server.experts.devices import ComputeDevice, roomiest
from expert_server.experts.expert import Expert, experts_by_default
from expert_server.experts.format import Checkpoint
from expert_server.experts.plausibility import Scale
from expert_server.hosting.placement import ahead_of, answering, lost_claims, plausible_updates, state_sources
from expert_server.hosting.whole_states import WholeStates
from expert_server.serving.runtime import Runtime
from expert_server.state.checkpoints import Checkpoints
from expert_server.state.transfer import StateClient
from peer import clock
from peer.averaging import AveragingHistory, is_behind, max_plausible_updates
from peer.errors import StateError, TransferError, UnreachableError
from peer.formatting import counted
from peer.identity import PeerID
from peer.loop import cancel_all, keep_running, side_by_side
from peer.metrics import total
from peer.rates import Backoff, decayed

logger: logging.Logger = logging.getLogger(__name__)

T = TypeVar("T")

CLAIM_WAIT_S = 1.0
"""How long a claim is announced before the expert is served, so that others can see it."""
_ANNOUNCE_EVERY_S = 2.0
"""How often a node that is taking experts announces those that are ready."""
_QUEUE_S = 2.0
"""How long a node that gives up its experts waits for the work in its queue."""
_WITHDRAW_S = 2.0
"""How long a node that gives up its experts tries to withdraw its announcements."""
_FETCHES = 3
"""States that are fetched at the same time, so that a slow one does not hold up the others."""
_WITHHELD_S, _LONGEST_WITHHELD_S = 20.0, 600.0
"""If nobody gave an expert's state, how long it is not tried again, at first and at most. The time doubles with each
failure.
"""
_STALE_AFTER_S = 2 * _WITHHELD_S
"""A checkpoint far behind the announced replicas is used only after a pause of this length, so at the third try. Until
then a host that has just died may have returned, or its announcements have expired.
"""
_PROVISIONAL_S = 300.0
"""How long a replica that began without the others' state prefers one with more updates, as it did when it began: nodes
that were down or cut off are announced again within this time.
"""
_HALF_LIFE_S = 300.0
"""The half-life of recent rows."""
_NONE_SEEN: Mapping[UID, Collection[Replica]] = MappingProxyType({})
_SAVE_S = 10.0
"""The longest time that saving given-up experts may take."""


class RecentRows:
    """How many rows each expert computed lately. A row counts half after five minutes. Pure: times are arguments."""

    def __init__(self) -> None:
        self._noted: dict[UID, tuple[float, int, float]] = {}
        """For each expert, the time of its last count, its rows at that time, and its recent rows."""

    def note(self, uid: UID, rows: int, now: float) -> int:
        """`rows`: the total that the expert has computed. It starts over when the expert is taken again."""
        then, before, recent = self._noted.get(uid, (now, 0, 0.0))
        recent = decayed(recent, now - then, _HALF_LIFE_S) + (rows - before if rows >= before else rows)
        self._noted[uid] = now, rows, recent
        return round(recent)

    def keep(self, uids: Collection[UID]) -> None:
        """Forgets all other experts."""
        self._noted = {uid: noted for uid, noted in self._noted.items() if uid in uids}


class LocalReplicas:
    """This node's replicas. It takes experts into service, and announces in the DHT what it hosts.

    It also owns what the replicas need: the runtime that computes them, their checkpoints on disk, the client that
    fetches states from other nodes, and the history of averages with other replicas.
    """

    def __init__(
        self,
        swarm: Swarm,
        runtime: Runtime,
        checkpoints: Checkpoints,
        states: StateClient,
        devices: Sequence[ComputeDevice],
        *,
        period: UpkeepPeriod,
        claim_wait_s: float = CLAIM_WAIT_S,
        now: Callable[[], float] = clock.now,
    ) -> None:
        """`period`: the period of announcements."""
        self.runtime = runtime
        self.checkpoints = checkpoints
        self.states = states
        self.history: AveragingHistory[UID] = AveragingHistory()
        self._swarm = swarm
        self._devices = devices
        self._period = period
        self._claim_wait_s = claim_wait_s
        self._now = now
        self._rng = random.SystemRandom()
        self._whole_states = WholeStates(swarm, runtime, states, self._rng)
        self._leaving = False
        self._offered: set[UID] = set()
        """Experts that others may adopt, because this node leaves."""
        self._claimed_at: dict[UID, float] = {}
        self._provisional_since: dict[UID, float] = {}
        """When experts in service began with what this node had, as no other host was seen ahead of it."""
        self._taking: set[UID] = set()
        """Experts that are being taken."""
        self._built: dict[UID, Expert] = {}
        """Experts that are built but do not serve yet."""
        self._building = asyncio.Lock()
        """Held while an expert is built. The room that is left on a device is known only after the previous one was
        built.
        """
        self._under_way: set[asyncio.Task[Any]] = set()
        """Tasks that are cancelled when this node leaves."""
        self._first_scale: Scale | None = None
        self._recent_rows = RecentRows()
        self._withheld = Backoff[UID](_WITHHELD_S, _LONGEST_WITHHELD_S)
        """Experts whose state nobody gave."""

    async def first_scale(self) -> Scale:
        """How large the initial parameters of an expert are. All experts draw them from the same distributions."""
        if self._first_scale is None:
            manifest = self._swarm.manifest
            uid = UID(0, (0,) * len(manifest.experts.grid))
            block = await self.runtime.run(partial(build_block, manifest, uid))
            self._first_scale = Scale.of(dict(block.named_parameters()))
        return self._first_scale

    @property
    def experts(self) -> Mapping[UID, Expert]:
        """The experts in service."""
        return self.runtime.experts

    @property
    def count(self) -> int:
        """Experts in service, and those that are being taken."""
        return len(self._taking.union(self.experts))

    @property
    def held(self) -> list[UID]:
        """The experts that this node claimed or served in its last announcement."""
        return list(self._claimed_at)

    @property
    def leaving(self) -> bool:
        """Whether this node is giving up its experts, or has given them up. It then takes none."""
        return self._leaving

    @property
    def claim_wait_s(self) -> float:
        """How long to wait for the claims of others, in seconds; 0 while this node knows no other peer."""
        host = self._swarm.host
        is_alone = not host.peers() and not self._swarm.peer_store.addresses()
        return 0.0 if is_alone else self._claim_wait_s

    def fitting(self) -> int:
        """How many experts this node hosts if its settings don't say."""
        return experts_by_default((device.memory_bytes for device in self._devices), self._swarm.manifest)

    def open(self) -> None:
        """Takes and serves experts from now on."""
        self._leaving = False
        self._offered.clear()
        self.runtime.refuse(False)

    def leave(self) -> None:
        """Takes no more experts or work from now on. Cancels the experts that are being taken or proven."""
        self._leaving = True
        self.runtime.refuse()
        for task in self._under_way:
            task.cancel()

    async def finish_work(self) -> None:
        """Waits a short while for the queued work, and for what `leave` cancelled."""
        await asyncio.gather(*self._under_way, return_exceptions=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_QUEUE_S):
                await self.runtime.settle()

    async def take(
        self,
        wanted: list[UID],
        usual: int | None,
        enough: int = 1,
        seen: Mapping[UID, Collection[Replica]] = _NONE_SEEN,
    ) -> list[UID]:
        """Takes those of the experts into service that fewer than `enough` others host. Returns the experts it took.

        Skips experts that it already has, or that another call is taking. `usual`: the updates of a median node's
        experts, which limit the update count of a state from another node; None if nobody serves anything. `seen`:
        replicas that were read before; an expert whose host has gone since then is not begun anew. Ends early if the
        node leaves. Raises UnreachableError.
        """
        wanted = [uid for uid in wanted if uid not in self._taking and uid not in self.experts]
        if not wanted or self._leaving:
            return []
        self._taking.update(wanted)
        try:
            return await self._unless_leaving(self._claim_and_serve(wanted, usual, enough, seen), [])
        finally:
            try:
                if not self._leaving:  # a node that leaves withdraws all of them at once
                    await self._withdraw_claims(wanted)
            finally:
                self._taking.difference_update(wanted)
                for uid in wanted:
                    self._built.pop(uid, None)

    async def _withdraw_claims(self, uids: Collection[UID]) -> None:
        """Withdraws the claims of a take that was cut off or failed, except those of experts that are served."""
        claims = [uid for uid in uids if uid in self._claimed_at and uid not in self.experts]
        if not claims:
            return
        try:
            with contextlib.suppress(UnreachableError, TimeoutError):  # they are not renewed, and expire
                async with asyncio.timeout(_WITHDRAW_S):
                    await self.withdraw(claims)
        finally:
            for uid in claims:
                self._claimed_at.pop(uid, None)

    async def _unless_leaving(self, work: Coroutine[Any, Any, T], otherwise: T) -> T:
        """The result of the work, or `otherwise` if the node leaves first."""
        task = asyncio.create_task(work)
        self._under_way.add(task)
        try:
            await asyncio.wait({task})
            return otherwise if task.cancelled() else task.result()
        finally:
            await cancel_all([task])
            self._under_way.discard(task)

    async def announce(self, uids: Collection[UID] | None = None) -> None:
        """Renews the announcements of experts in service: of `uids`, or of all."""
        now = self._now()
        self._recent_rows.keep(self.experts.keys())
        announced = [
            ReplicaAnnouncement(
                uid,
                ReplicaState.LEAVING if uid in self._offered else ReplicaState.SERVING,
                self.experts[uid].update_count,
                self._claimed_at[uid],
                self.experts[uid].updated_at,
                self._recent_rows.note(uid, self.experts[uid].rows, now),
            )
            for uid in (self.experts if uids is None else uids)
            if uid in self._claimed_at  # otherwise it has been withdrawn already
        ]
        queued_rows = self.runtime.queued_rows
        await self._swarm.experts.announce(announced, self._period.lifetime_s, queued_rows)

    async def offer(self, uids: Collection[UID]) -> None:
        """Announces from now on that these experts leave, so that others may adopt them. Raises UnreachableError."""
        self._offered.update(uids)
        await self.announce(uids)

    async def withdraw(self, uids: Collection[UID]) -> None:
        """Withdraws the announcements. If it raises UnreachableError or is cancelled, the experts are announced as
        before.
        """
        # removed first, so that no concurrent announcement follows the withdrawal
        claimed_at = {uid: self._claimed_at.pop(uid) for uid in uids if uid in self._claimed_at}
        try:
            await self._swarm.experts.withdraw(uids, self._period.lifetime_s)
        except (UnreachableError, asyncio.CancelledError):
            self._claimed_at |= claimed_at
            raise

    async def are_given(self, uid: UID, others: Sequence[Replica], enough: int) -> bool:
        """Whether `enough` of the other hosts can give a good state of an expert in service, no older than this node's
        own. Call it before the expert is given up, because anybody can announce a replica. Hosts that announce an older
        one are not asked. False if this node leaves.
        """
        return not self._leaving and await self._unless_leaving(self._are_given(uid, others, enough), False)

    async def _are_given(self, uid: UID, others: Sequence[Replica], enough: int) -> bool:
        expert, given = self.experts[uid], 0

        def check(checkpoint: Checkpoint) -> None:
            expert.require_good(checkpoint.state, checkpoint.update_count)
            if is_behind(checkpoint.update_count, expert.update_count):
                raise StateError(
                    f"it has only {checkpoint.update_count} updates, but the one here has {expert.update_count}"
                )

        count = expert.update_count
        asked = {other.peer_id for other in others if not is_behind(other.update_count, count)}
        nodes = await self._swarm.registry.nodes(asked) if len(asked) >= enough else {}
        for node in self._rng.sample([*nodes.values()], len(nodes)):
            try:
                fetched = await self.states.fetch(node, uid)
                await self.runtime.run(partial(check, fetched.checkpoint))
            except (TransferError, StateError) as error:
                logger.info("kept expert %s, as %s may not have it: %s", uid, node.peer_id, error)
                continue
            given += 1
            if given >= enough:
                return True
        return False

    def is_provisional(self, uid: UID) -> bool:
        """Whether an expert in service continues from this node's own checkpoint, or began anew when others had been
        trained, and has met no other replica in the short time since. Perhaps this node, or the other hosts, were down
        or cut off.
        """
        since = self._provisional_since.get(uid, -math.inf)
        return not self.history.of(uid) and self._now() < since + _PROVISIONAL_S

    async def take_whole(
        self, uid: UID, hosts: Sequence[Replica], fetched: Mapping[PeerID, Checkpoint] | None = None
    ) -> bool:
        """Replaces the state of an expert in service by the medoid of up to three `hosts`, if most of them claim more
        updates. For a replica that can't follow the others by averaging. Updates that the expert takes meanwhile are
        lost. `fetched`: states that hosts have sent already. Returns whether it did. Raises UnreachableError.
        """
        expert = self.experts.get(uid)
        if expert is None:
            return False
        others = state_sources(hosts, self._swarm.host.peer_id, self._rng)
        fresher = ahead_of(expert.update_count, others)
        cap = partial(self.history.capped_claim, uid, expert.update_count)
        return await self._take_whole(expert, fresher, cap, set(), fetched or {})

    def withheld(self) -> set[UID]:
        """The experts whose state nobody gave when it was last tried, a short time ago."""
        return self._withheld.held_back(self._now())

    async def release(self, uids: Collection[UID], needed: Collection[UID] = ()) -> None:
        """Withdraws some experts that others proved to have, takes them out of service, and saves them. If it raises
        UnreachableError, it keeps them. `needed`: other experts whose checkpoints may be the only ones.
        """
        await self.withdraw(uids)
        await self._remove([self.experts[uid] for uid in uids])
        await self.checkpoints.give_up(uids, needed)

    async def release_all(self) -> None:
        """Gives up all experts, even if the DHT does not answer: their announcements then expire."""
        with contextlib.suppress(UnreachableError, TimeoutError):
            async with asyncio.timeout(_WITHDRAW_S):
                await self.withdraw(self.held)
        self._claimed_at.clear()
        await self._remove(list(self.experts.values()))

    async def _remove(self, experts: Collection[Expert]) -> None:
        """Takes the experts out of service, so that nothing changes them any more, and then saves them."""
        for expert in experts:
            self.runtime.remove(expert.uid)
            self.history.forget(expert.uid)
            self._provisional_since.pop(expert.uid, None)
        await self.checkpoints.save_all_within(_SAVE_S, experts)

    async def _claim_and_serve(
        self,
        wanted: list[UID],
        usual: int | None,
        enough: int,
        seen: Mapping[UID, Collection[Replica]],
    ) -> list[UID]:
        """Claims experts, waits for the claims of others, and serves those whose claims it wins."""
        experts, me = self._swarm.experts, self._swarm.host.peer_id
        claimed_at = self._now()
        self._claimed_at |= dict.fromkeys(wanted, claimed_at)
        saved = await self.checkpoints.newest()
        claims = {
            uid: ReplicaAnnouncement(
                uid,
                ReplicaState.CLAIMED,
                saved.get(uid, 0),
                claimed_at,
                has_hosts=any(r.state is not ReplicaState.CLAIMED for r in seen.get(uid, ())),
            )
            for uid in wanted
        }
        await experts.announce(claims.values(), self._period.lifetime_s)
        await self._build_for(self.claim_wait_s, wanted)
        replicas = await experts.replicas(wanted)
        lost = lost_claims(wanted, answering(replicas, self._swarm.host.has_failed), me, saved, enough)
        await self.withdraw(lost)
        for uid in lost:
            del claims[uid]
            self._built.pop(uid, None)
        restored_before = total(self.checkpoints.restored)
        hosts = {
            uid: found if state_sources(found, me, self._rng) else (*seen.get(uid, ()),)
            for uid, found in replicas.items()
        }
        taken = await self._serve(claims, hosts, saved, usual)
        if restored := total(self.checkpoints.restored) - restored_before:
            logger.info(
                "%d of %s can continue from this node's checkpoints", restored, counted(len(taken), "expert")
            )
        return taken

    async def _build_for(self, seconds: float, wanted: Iterable[UID]) -> None:
        """Builds as many of the experts as it can in this time, and waits until it is over."""
        clock = asyncio.get_running_loop().time
        ends = clock() + seconds
        for uid in wanted:
            if clock() >= ends:
                break
            await self._build(uid)
        await asyncio.sleep(max(0.0, ends - clock()))

    async def _build(self, uid: UID) -> Expert:
        """The built expert, or a new one with its initial parameters."""
        async with self._building:
            if uid not in self._built:
                hosted = Counter(expert.device for expert in [*self.experts.values(), *self._built.values()])
                device = roomiest(self._devices, hosted)
                self._built[uid] = await self.runtime.run(partial(Expert, uid, self._swarm.manifest, device))
            return self._built[uid]

    async def _serve(
        self,
        claims: Mapping[UID, ReplicaAnnouncement],
        replicas: Mapping[UID, Sequence[Replica]],
        saved: Mapping[UID, int],
        usual: int | None,
    ) -> list[UID]:
        """Serves each expert as soon as it is ready. This may take long, so the claims are renewed meanwhile."""
        taken: list[UID] = []
        failed: list[UID] = []
        unreachable: set[PeerID] = set()
        renew = partial(self._keep_claimed, claims, taken, failed)
        renewing = asyncio.create_task(keep_running("keep experts claimed", renew))

        async def serve(uid: UID) -> None:
            expert = await self._build(uid)
            is_ready = await self._restore(expert, replicas[uid], saved.get(uid), usual, unreachable)
            del self._built[uid]
            if is_ready:
                self.runtime.add(expert)
                self._withheld.succeeded(uid)
                taken.append(uid)
            else:
                self._withheld.failed(uid, self._now())
                failed.append(uid)
                with contextlib.suppress(UnreachableError):  # the claim is not renewed, and expires
                    await self.withdraw([uid])

        try:
            await side_by_side(map(serve, claims), _FETCHES)
        finally:
            await cancel_all([renewing])
        await self.announce(taken)
        if failed:
            logger.warning(
                "could not take %s that others host, because no host sent its state",
                counted(len(failed), "expert"),
            )
        return taken

    async def _keep_claimed(
        self, claims: Mapping[UID, ReplicaAnnouncement], taken: list[UID], failed: list[UID]
    ) -> None:
        clock = asyncio.get_running_loop().time
        announced, renew_at = 0, clock() + self._period.seconds
        while True:
            await asyncio.sleep(min(_ANNOUNCE_EVERY_S, self._period.seconds))
            with contextlib.suppress(UnreachableError):  # it is announced again soon
                if clock() >= renew_at:
                    waiting = [claim for uid, claim in claims.items() if uid not in {*taken, *failed}]
                    await self._swarm.experts.announce(waiting, self._period.lifetime_s)
                    renew_at = clock() + self._period.seconds
                if ready := taken[announced:]:
                    await self.announce(ready)
                    announced += len(ready)

    async def _restore(
        self,
        expert: Expert,
        hosts: Sequence[Replica],
        saved: int | None,
        usual: int | None,
        unreachable: set[PeerID],
    ) -> bool:
        """Gives an expert that does not serve yet its state: the medoid of others' states, or the one saved here.
        `saved`: the update count of this node's newest checkpoint. It is restored first: others' states are compared
        with it, and it is restored again if the chosen one turns bad. An expert that nobody has keeps its initial
        parameters. False if others have it and none of them gave it, unless the one saved here is about as far, or
        nobody gave it for a while. Peers in `unreachable` are not asked, and those that do not answer are added.
        """
        others = state_sources(hosts, self._swarm.host.peer_id, self._rng)
        most = max_plausible_updates([replica.update_count for replica in others])
        most = min(most, max(plausible_updates(usual), saved or 0))
        restored = saved is not None and await self.checkpoints.restore(expert)
        fresher = ahead_of(expert.update_count if restored else -1, others)
        if await self._take_whole(expert, fresher, lambda claimed: min(claimed, most), unreachable, {}):
            return True
        if others and not (restored and self._may_begin_with(expert, others, most)):
            return False
        if restored:
            self.checkpoints.restored.inc()
        if restored or usual:
            self._provisional_since[expert.uid] = self._now()
        return True

    def _may_begin_with(self, expert: Expert, others: Sequence[Replica], most: int) -> bool:
        """Whether to serve the state of this node's checkpoint although others announce theirs: not at first if it is
        far behind theirs. Trainers would train it, and those updates are lost when the others return. `most`: the
        updates that are believed.
        """
        announced = min(most, median_low(replica.update_count for replica in others))
        is_stale = is_behind(expert.update_count, announced)
        return not is_stale or self._withheld.pause_s(expert.uid) >= _STALE_AFTER_S

    async def _take_whole(
        self,
        expert: Expert,
        hosts: Sequence[Replica],
        cap: Callable[[int], int],
        unreachable: set[PeerID],
        fetched: Mapping[PeerID, Checkpoint],
    ) -> bool:
        taken = await self._whole_states.take(expert, hosts, cap, unreachable, fetched)
        if taken is None:
            return False
        expert.reports.start_over()
        self.history.record(expert.uid, taken.peer_id, taken.update_count, taken.update_count)
        return True
