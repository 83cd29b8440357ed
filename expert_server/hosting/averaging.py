"""Replicas of one expert meet in pairs, now and then, and both become their average."""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Collection, Coroutine, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias
from weakref import WeakValueDictionary

import torch
from prometheus_client import CollectorRegistry, Counter
from torch import Tensor

from dht.announcements import NodeInfo, Replica, ReplicaState
from dht.swarm import Swarm
from dht.uid import UID
from expert_server.experts.expert import Expert
from expert_server.experts.format import ACCUMULATED, AVERAGED, Checkpoint, State, from_bytes
from expert_server.hosting.placement import serving_elsewhere
from expert_server.hosting.replicas import LocalReplicas
from expert_server.settings import NodeSettings
from expert_server.state.servicer import FetchHint, HintQueue
from expert_server.state.transfer import Fetched, Snapshot, SnapshotTaker
from peer.averaging import MAX_UPDATE_COUNT, interpolate, partner_weight
from peer.errors import ExpertError, StateError, TransferError, UnreachableError
from peer.identity import PeerID
from peer.loop import Restarts, keep_running, side_by_side, tolerating
from peer.wire import state_pb2

logger = logging.getLogger(__name__)

_TAKES_INITIATIVE = 0.5
"""Share of its replicated experts that a node averages by its own initiative: others' make it about one each."""
_LAST_AVERAGING_S = 5.0
"""Longest that a node which gives its experts up averages them a last time."""
_MAX_HINTS = 256
"""Experts that others may ask this node to fetch, at one time."""
_AT_ONCE = 4
"""Hints of one kind that are followed at the same time, and averages that are begun."""

Adopt: TypeAlias = Callable[[PeerID, Collection[UID]], Coroutine[Any, Any, None]]


class ReplicaAveraging:
    """Averages one node's replicas with those of others, and follows what others ask it to fetch. Run it."""

    def __init__(
        self,
        settings: NodeSettings,
        swarm: Swarm,
        replicas: LocalReplicas,
        snapshots: SnapshotTaker,
        adopt: Adopt,
        clock: Callable[[], float] = time.monotonic,
        metrics: CollectorRegistry | None = None,
        restarts: Restarts | None = None,
    ) -> None:
        """`adopt`: takes experts over from a peer that leaves. `restarts`: counts what fails unexpectedly."""
        self.averagings = Counter(
            "talkoot_averagings", "Replicas averaged with another node's.", registry=metrics
        )
        self._restarts = restarts
        self._every_s = settings.average_every_s
        self._swarm = swarm
        self._replicas = replicas
        self._snapshots = snapshots
        self._adopt = adopt
        self._rng = random.Random(swarm.host.peer_id.to_bytes())  # noqa: S311  # whom to average with is no secret
        self._clock = clock
        self._hints = HintQueue(_MAX_HINTS, self._every_s / 10)
        self._hinted = {kind: asyncio.Event() for kind in (False, True)}
        """Whether averages were asked for, and adoptions."""
        self._runs = False
        self._last_averaging: asyncio.Task[None] | None = None
        self._meeting = WeakValueDictionary[UID, asyncio.Lock]()
        """One meeting of an expert at a time: a base that was handed out must stay one."""

    def accept_hint(self, hint: FetchHint) -> int:
        """Queues a hint, and returns how many of its experts it accepts, from the first on: none unless `run` runs."""
        wanted = self._every_s > 0 if hint.is_average else not self._replicas.leaving
        if not self._runs or not wanted:
            return 0
        accepted = self._hints.put(hint, self._clock())
        self._hinted[hint.is_average].set()
        return accepted

    async def run(self) -> None:
        """For ever."""
        self._runs = True
        try:
            async with asyncio.TaskGroup() as group:
                average = self._average_now_and_then
                for kind in _AT_ONCE * [*self._hinted]:
                    follow = partial(self._follow_hints, kind)
                    group.create_task(keep_running("follow others' hints", follow, self._restarts))
                if self._every_s:
                    group.create_task(keep_running("average now and then", average, self._restarts))
        finally:
            self._runs = False

    async def average_some(self) -> None:
        """Averages about half of the experts that others serve too. Raises UnreachableError."""
        replicas = await self._swarm.registry.replicas(self._replicas.experts)
        partners = choose_partners(replicas, self._swarm.host.peer_id, self._rng)
        nodes = await self._swarm.registry.nodes({replica.peer_id for replica in partners})
        meetings = (
            self._attempt(self.meet(replica.uid, nodes[replica.peer_id]))
            for replica in partners
            if replica.peer_id in nodes and not self._is_idle(replica)
        )
        await side_by_side(meetings, _AT_ONCE)

    async def average_before_leaving(self, limit_s: float) -> None:
        """Averages the experts a last time before they are given up, so that none of this node's updates is lost.

        Returns when the others have fetched what they need. Until then this node must be announced as serving.
        """
        if not self._every_s:
            return
        self._last_averaging = asyncio.create_task(
            self._attempt(self._average_last()), name="average before leaving"
        )
        await asyncio.wait({self._last_averaging}, timeout=min(_LAST_AVERAGING_S, limit_s))
        self._last_averaging.cancel()
        (problem,) = await asyncio.gather(self._last_averaging, return_exceptions=True)
        if isinstance(problem, Exception):
            raise problem

    def hurry(self) -> None:
        if self._last_averaging is not None:
            self._last_averaging.cancel()

    async def _average_last(self) -> None:
        replicas = await self._swarm.registry.replicas(self._replicas.experts)
        me = self._swarm.host.peer_id
        partners = [self._rng.choice(o) for hosts in replicas.values() if (o := serving_elsewhere(hosts, me))]
        await self._replicas.runtime.run(partial(self._end_accumulation, {r.uid for r in partners}))
        nodes = await self._swarm.registry.nodes({replica.peer_id for replica in partners})
        meetings = (
            self._attempt(self._average_last_with(replica.uid, nodes[replica.peer_id]))
            for replica in partners
            if replica.peer_id in nodes and not self._is_idle(replica)
        )
        await side_by_side(meetings, _AT_ONCE)

    def _end_accumulation(self, uids: set[UID]) -> None:
        """So that what is accumulated is part of the average: the other replica takes over no gradients."""
        for uid in uids & self._replicas.experts.keys():
            self._replicas.experts[uid].end_accumulation()
            self._replicas.experts[uid].settle()

    async def _average_last_with(self, uid: UID, node: NodeInfo) -> None:
        given = await self.meet(uid, node)
        if given is not None:
            await given.wait()

    async def meet(self, uid: UID, node: NodeInfo) -> asyncio.Event | None:
        """Averages this node's replica with another node's, and asks that node to do the same.

        Returns an event that is set when the other node has fetched what it needs for that, or None if it won't. Raises
        TransferError, StateError or ExpertError if the replica could not be averaged; it is then as it was.
        """
        async with self._lock_of(uid):
            base = await self._snapshots.take(uid)
            fetched = await self._replicas.states.fetch(node, uid)
            await self._average(base, fetched, node.peer_id)
        given = base.given_to(node.peer_id)
        accepted = await self._replicas.states.ask(
            node, state_pb2.ASK_REASON_AVERAGE, [uid], base.sha256, base_sha256=fetched.sha256
        )
        return given if accepted else None

    async def _answer(self, hint: FetchHint, node: NodeInfo) -> None:
        """The other half of `meet`, with the two snapshots of the first half.

        Does nothing if this replica was averaged since: the base is then no longer what it came from.
        """
        (uid,) = hint.uids
        async with self._lock_of(uid):
            base = self._snapshots.find(uid, hint.base_sha256)
            expert = self._replicas.experts.get(uid)
            if base is None or expert is None or base.generation != expert.generation:
                return
            fetched = await self._replicas.states.fetch(node, uid, hint.sha256)
            await self._average(base, fetched, node.peer_id)

    async def _average(self, base: Snapshot, fetched: Fetched, peer_id: PeerID) -> None:
        claimed = fetched.checkpoint.update_count
        believed = self._replicas.history.capped_claim(base.uid, base.update_count, claimed)
        theirs = replace(fetched.checkpoint, update_count=believed)
        met = max(base.met.get(peer_id, 0), fetched.met_update_count)
        share = partner_weight(base.update_count, believed, met)
        expert = self._replicas.experts.get(base.uid)
        if expert is None:
            return  # given up meanwhile
        await self._replicas.runtime.run(
            partial(average_into, expert, base, theirs, self._swarm.keys.swarm_id, share)
        )
        self._replicas.history.record(base.uid, peer_id, max(base.update_count, believed))
        self._replicas.checkpoints.note_replaced(base.uid)
        self.averagings.inc()
        logger.debug("averaged %s with %s, whose share was %.2f", base.uid, peer_id, share)

    def _is_idle(self, replica: Replica) -> bool:
        """Whether neither replica took an update since the two were averaged."""
        met = self._replicas.history.of(replica.uid).get(replica.peer_id)
        expert = self._replicas.experts.get(replica.uid)
        return expert is None or met == replica.update_count == expert.update_count

    async def _average_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(self._every_s * self._rng.uniform(0.5, 1.5))
            await self._attempt(self.average_some())

    def _lock_of(self, uid: UID) -> asyncio.Lock:
        return self._meeting.setdefault(uid, asyncio.Lock())

    async def _follow_hints(self, is_average: bool) -> None:
        while True:
            hint = self._hints.pop(is_average)
            if hint is None:
                self._hinted[is_average].clear()
                await self._hinted[is_average].wait()
            elif hint.is_average:
                await self._attempt(self._follow_average(hint))
            else:
                await self._attempt(self._adopt(hint.peer_id, hint.uids))

    async def _follow_average(self, hint: FetchHint) -> None:
        """Answers only a peer that serves the expert, as the DHT says."""
        replicas = await self._swarm.registry.replicas(hint.uids)
        hosts = {r.peer_id for found in replicas.values() for r in found if r.state is ReplicaState.SERVING}
        if hint.peer_id in hosts and set(hint.uids) <= self._replicas.experts.keys():
            nodes = await self._swarm.registry.nodes([hint.peer_id])
            if hint.peer_id in nodes:
                await self._answer(hint, nodes[hint.peer_id])

    async def _attempt(self, work: Coroutine[Any, Any, Any]) -> None:
        try:
            with tolerating("average or adopt", self._restarts):
                await work
        except (UnreachableError, TransferError, StateError, ExpertError) as error:
            logger.info("%s", error)


def choose_partners(
    replicas: Mapping[UID, Collection[Replica]], me: PeerID, rng: random.Random
) -> list[Replica]:
    """One of the other replicas for each of about half of the experts that others serve too."""
    found = [serving_elsewhere(hosts, me) for _, hosts in sorted(replicas.items())]
    return [rng.choice(others) for others in found if others and rng.random() < _TAKES_INITIATIVE]


def average_into(expert: Expert, base: Snapshot, theirs: Checkpoint, swarm_id: str, share: float) -> None:
    """Gives the expert the average of its state at `base` and `theirs`, and keeps its updates since `base`.

    `share`: the weight of `theirs`. Raises StateError, and changes nothing, if anything but updates changed the expert
    since `base`, or if a state is not this expert's, not finite or not plausible.
    """
    if expert.generation != base.generation:
        raise StateError(f"expert {expert.uid} was replaced or rolled back while it was averaged")
    expert.check_state(theirs.state, theirs.update_count)
    expert.require_plausible(theirs.state, theirs.update_count)
    before = from_bytes(base.data, swarm_id, base.uid, base.update_count, expert.form)
    state = averaged(expert.export_state(), before.state, theirs.state, share)
    since = expert.update_count - base.update_count
    updates = max(base.update_count, theirs.update_count) + since
    expert.import_state(state, min(updates, MAX_UPDATE_COUNT), AVERAGED)


def averaged(current: State, base: State, theirs: State, share: float) -> State:
    """The average of `base` and `theirs`, plus what changed from `base` to `current`.

    A moment of the optimizer that one side lacks counts as zeros. Gradients that `current` has accumulated stay as they
    are, and those of `theirs` are left to the other replica, which takes a step with them: each counts once.
    """
    names = current.keys() | theirs.keys()
    state = {
        name: _averaged(name, current.get(name), base.get(name), theirs.get(name), share)
        for name in sorted(names)
        if not name.startswith(ACCUMULATED)
    }
    return state | {name: tensor for name, tensor in current.items() if name.startswith(ACCUMULATED)}


def _averaged(
    name: str, current: Tensor | None, base: Tensor | None, theirs: Tensor | None, share: float
) -> Tensor:
    like = current if current is not None else theirs
    assert like is not None, "one of the two states has it"
    now, then, other = (torch.zeros_like(like) if t is None else t for t in (current, base, theirs))
    if not like.is_floating_point():
        return torch.maximum(now, other)
    if name.endswith(".step"):  # the optimizer counts steps to correct its bias
        return now + (torch.maximum(then, other) - then)
    result = interpolate(now, then, other, share)
    if name.endswith(".exp_avg_sq"):
        result.clamp_(min=0)
    return result.to(like.dtype)
