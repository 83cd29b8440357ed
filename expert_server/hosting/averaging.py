"""Replicas of one expert meet in pairs now and then, and both become their average."""

import asyncio
import contextlib
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from math import ceil
from operator import itemgetter
from statistics import median_low
from typing import Any, TypeAlias, TypeVar
from weakref import WeakValueDictionary

import torch
from prometheus_client import CollectorRegistry, Counter

from dht.announcements import NodeInfo, Replica, ReplicaState
from dht.experts import ExpertRegistry
from dht.swarm import Swarm
from dht.uid import UID
from expert_server.experts.expert import Expert
from expert_server.experts.format import (
    AVERAGED,
    BLOCK,
    FIRST_MOMENT,
    SECOND_MOMENT,
    STEP,
    Checkpoint,
    State,
    from_bytes,
    moving_tensors,
)
from expert_server.hosting.placement import serving_elsewhere
from expert_server.hosting.replicas import LocalReplicas
from expert_server.settings import NodeSettings
from expert_server.state.servicer import FetchHint, HintQueue
from expert_server.state.transfer import Fetched, Snapshot, SnapshotTaker, largest_state_bytes
from peer.averaging import MAX_UPDATE_COUNT, last_meeting, partner_weight
from peer.bounded import BoundedDict, Owner
from peer.clipping import at_base, believed_updates, clip, distance
from peer.errors import ExpertError, OutOfReachError, StateError, TransferError, UnreachableError
from peer.identity import PeerID
from peer.loop import Restarts, TaskSet, keep_running, side_by_side, tolerating
from peer.rpc.transfer import TransferSlots
from peer.wire import state_pb2

logger: logging.Logger = logging.getLogger(__name__)

T = TypeVar("T")

_TAKES_INITIATIVE = 0.5
"""The share of its replicated experts for which a node starts an average in each round: those with the most updates
since the replicas met. Other nodes start the rest, so each replica is averaged about once.
"""
_PAUSE = 4
"""The shortest pause after a round, as a multiple of its usual duration, because slow uplinks have other things to
send, too.
"""
_LAST_AVERAGING_S = 5.0
"""How long a node that gives up its experts may take to average them a last time."""
_MAX_HINTS = 256
"""The most pending requests of other nodes to fetch an expert."""
_AT_ONCE = 4
"""How many requests of one kind are followed at the same time, and how many averages are started at the same time."""
_LOOK_S = 1.0
"""How often a node looks whether a hint that waits may take the place of a slow state."""
_TIMED = 16
"""The latest averages whose durations tell how long one usually takes."""
_REMEMBERED = 4096
"""Other nodes' replicas that are remembered as out of reach, and those remembered as tried."""
_LONGEST_AVOIDED = 32
"""The longest time that a replica out of reach is avoided, as a multiple of `average_every_s`. The time starts at one
and doubles.
"""
_MOST_SCALE = 4.0
"""How many times as large another replica's second moments may be."""
_MOST_SHRINKING = 1.5
"""How many times smaller they may become. Smaller second moments make steps longer, and with them this node's own
moves.
"""
_MOST_RATIO = 7.3
"""The largest ratio of Adam's first moment to the root of the second (see `plausibility`)."""

Adopt: TypeAlias = Callable[[PeerID, Collection[UID]], Coroutine[Any, Any, None]]


class ReplicaAveraging:
    """Averages one node's replicas with those of others, and follows others' requests to fetch states. Run it."""

    def __init__(
        self,
        settings: NodeSettings,
        swarm: Swarm,
        replicas: LocalReplicas,
        snapshots: SnapshotTaker,
        adopt: Adopt,
        seen: Callable[[], Mapping[UID, Collection[Replica]]],
        clock: Callable[[], float] = time.monotonic,
        metrics: CollectorRegistry | None = None,
        restarts: Restarts | None = None,
    ) -> None:
        """`adopt`: takes over experts from a peer that leaves. `seen`: returns the replicas that this node has read
        recently. `restarts`: counts unexpected failures.
        """
        self.averagings: Counter = Counter(
            "talkoot_averagings", "Replicas averaged with another node's.", registry=metrics
        )
        self.refused: Counter = Counter(
            "talkoot_averagings_refused", "Replicas of others that were out of reach.", registry=metrics
        )
        self._restarts = restarts
        self._every_s = settings.average_every_s
        self._swarm = swarm
        self._replicas = replicas
        self._snapshots = snapshots
        self._adopt = adopt
        self._seen = seen
        self._rng = random.Random(swarm.host.peer_id.to_bytes())  # noqa: S311  # whom to average with is no secret
        self._clock = clock
        self._hints = HintQueue(_MAX_HINTS, self._every_s)
        self._hinted = {kind: asyncio.Event() for kind in (False, True)}
        """Events that are set when an average (True) or an adoption (False) was asked for."""
        self._runs = False
        self._refused = BoundedDict[tuple[UID, PeerID], tuple[int, float]](_REMEMBERED)
        """How many times in a row another node's replica was out of reach, and until when it is avoided."""
        self._tried = BoundedDict[tuple[UID, PeerID], int](_REMEMBERED)
        """The update count of this node's own replica when it last tried to meet another one."""
        self._took_s = deque[float](maxlen=_TIMED)
        """How long the latest averages took. Those that failed are left out."""
        self._averaging = WeakValueDictionary[UID, asyncio.Lock]()
        """Experts that are being averaged. Each is averaged with one replica at a time."""
        self._own_fetches, self._hinted_fetches = TransferSlots(_AT_ONCE), TransferSlots(_AT_ONCE)
        """Slots for the states that this node fetches for averages which it starts, and for those of others."""
        # a node that leaves may have asked nobody else
        self._adoptions = TransferSlots(_AT_ONCE, can_resume=False)
        self._state_bytes = largest_state_bytes(swarm.manifest)

    def accept_hint(self, hint: FetchHint) -> int:
        """Queues a request. Returns how many of its experts are accepted, counted from the first; 0 unless `run` is
        running.
        """
        wanted = self._every_s > 0 if hint.is_average else not self._replicas.leaving
        if not self._runs or not wanted:
            return 0
        if hint.is_average and self._replicas.states.is_withholding(hint.peer_id):
            return 0  # otherwise that peer would wait in vain for this node to fetch its state
        accepted = self._hints.put(hint, self._clock())
        self._hinted[hint.is_average].set()
        return accepted

    async def run(self) -> None:
        """Averages until cancelled."""
        self._runs = True
        try:
            async with asyncio.TaskGroup() as group:
                # more than have slots to fetch: others average, or look whose turn it is
                for step in 2 * _AT_ONCE * [self._follow_adoptions, self._follow_averages]:
                    group.create_task(keep_running("follow others' hints", step, self._restarts))
                if self._every_s:
                    average = self._average_now_and_then
                    group.create_task(keep_running("average now and then", average, self._restarts))
        finally:
            self._runs = False

    async def average_some(self) -> float:
        """Averages about half of the experts that other nodes serve too. Returns how many seconds that usually takes: a
        partner that freezes or is cut off may hold up this round, but says nothing about this node's line. Raises
        UnreachableError.
        """
        me = self._swarm.host.peer_id
        replicas = await replicas_to_meet(self._swarm.experts, self._replicas.experts, self._seen(), me)
        is_withholding = self._replicas.states.is_withholding
        replicas = {
            uid: [r for r in found if not is_withholding(r.peer_id)] for uid, found in replicas.items()
        }
        partners = choose_partners(replicas, me, self._unshared, self._rng)
        for replica in partners:
            count = self._replicas.experts[replica.uid].update_count
            self._tried[replica.uid, replica.peer_id] = count
        nodes = await self._swarm.registry.nodes({replica.peer_id for replica in partners})

        async def meet(replica: Replica) -> None:
            began, owner = self._clock(), Owner.alone(replica.peer_id)
            slot = self._own_fetches.taken(owner, self._state_bytes)
            await self.meet(replica.uid, nodes[replica.peer_id], slot)
            self._took_s.append(self._clock() - began)

        able = [replica for replica in partners if replica.peer_id in nodes]
        await side_by_side((self._attempt(meet(replica)) for replica in able), _AT_ONCE)
        return median_low(self._took_s) * ceil(len(able) / _AT_ONCE) if self._took_s else 0.0

    def _unshared(self, replica: Replica) -> int | None:
        """The updates of this node's own replica since it last met that one, or tried to: otherwise those that can't be
        reached would always come first. None if the replica is not worth meeting.
        """
        uid, peer_id = replica.uid, replica.peer_id
        expert = self._replicas.experts.get(uid)
        if expert is None or not self._is_worth_meeting(replica):
            return None
        met = self._replicas.history.of(uid).get(peer_id)
        counts = (met.mine if met else 0, self._tried.get((uid, peer_id), 0))
        # a higher count belongs to a state that this node no longer has
        return expert.update_count - max((c for c in counts if c <= expert.update_count), default=0)

    async def average_last(self, others: Mapping[UID, Sequence[Replica]], silent: set[PeerID]) -> None:
        """Averages experts a last time before they are given up, so that none of this node's updates is lost. Takes a
        few seconds at most.

        `others`: the replicas of each expert that serve elsewhere. `silent`: nodes are added when they are asked, and
        removed when they answer. Returns when those nodes have fetched what they need. Until then, this node must
        announce these experts as serving.
        """
        if self._every_s and others:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LAST_AVERAGING_S):
                    await self._attempt(self._average_last(others, silent))

    async def _average_last(self, others: Mapping[UID, Sequence[Replica]], silent: set[PeerID]) -> None:
        partners: dict[PeerID, list[Replica]] = {}
        for replica in map(self._rng.choice, others.values()):
            partners.setdefault(replica.peer_id, []).append(replica)
        await self._replicas.runtime.run(partial(self._end_accumulation, others.keys()))
        silent.update(partners)
        nodes = await self._swarm.registry.nodes(partners)
        places = asyncio.Semaphore(_AT_ONCE)

        async def meet(replica: Replica) -> None:
            async with places:
                node = nodes[replica.peer_id]
                await self._attempt(self._average_last_with(replica.uid, node, silent))

        async def meet_all(replicas: Sequence[Replica]) -> None:
            first, *more = sorted(replicas, key=self._is_worth_meeting, reverse=True)
            await meet(first)  # a partner that does not answer takes up one place only
            await side_by_side(
                (meet(replica) for replica in more if self._is_worth_meeting(replica)), _AT_ONCE
            )

        await side_by_side((meet_all(partners[peer_id]) for peer_id in nodes), len(nodes))

    def _end_accumulation(self, uids: Set[UID]) -> None:
        """Takes a step for accumulated gradients, so that they become part of the average. The other replica ignores
        them.
        """
        for uid in uids & self._replicas.experts.keys():
            self._replicas.experts[uid].end_accumulation()
            self._replicas.experts[uid].settle()

    async def _average_last_with(self, uid: UID, node: NodeInfo, silent: set[PeerID]) -> None:
        try:
            given = await self.meet(uid, node)
        except (StateError, TransferError) as error:
            if isinstance(error, StateError) or error.answered:
                silent.discard(node.peer_id)
            raise
        silent.discard(node.peer_id)
        if given is not None:
            await given.wait()

    async def meet(
        self, uid: UID, node: NodeInfo, slot: AbstractContextManager[None] | None = None
    ) -> asyncio.Event | None:
        """Averages this node's replica with another node's, and asks that node to do the same. `slot`: held while the
        other replica is fetched.

        Returns an event that is set when the other node has fetched what it needs for that, or None if it refuses, or
        if the two have met in the meantime. Raises TransferError, StateError or ExpertError if the replica could not be
        averaged; it is then unchanged. If the other replica is only too far away for this one, the other node is still
        asked: this replica may be near enough for it.
        """
        base = await self._snapshots.take(uid)
        with slot or contextlib.nullcontext():
            fetched = await self._replicas.states.fetch(node, uid)
        async with self._lock_of(uid):  # not while it fetches: a slow state must not hold up other averages
            met = self._replicas.history.of(uid)
            if met.get(node.peer_id) != base.met.get(node.peer_id):
                return None
            if met != base.met:  # it was averaged with another
                base = await self._snapshots.take(uid)
            await self._average(base, fetched, node.peer_id)
        given = base.given_to(node.peer_id)
        accepted = await self._replicas.states.ask(
            node, state_pb2.ASK_REASON_AVERAGE, [uid], base.sha256, base_sha256=fetched.sha256
        )
        return given if accepted else None

    async def _follow_adoption(self, hint: FetchHint) -> None:
        with self._adoptions.taken(hint.owner, self._state_bytes):
            await self._adopt(hint.peer_id, hint.uids)

    async def _follow_average(self, hint: FetchHint) -> None:
        """The other node's part of `meet`, with the same two snapshots. Does nothing if this replica was averaged in
        between, because it no longer follows from the base.
        """
        with self._hinted_fetches.taken(hint.owner, self._state_bytes):
            found = await self._fetch_hinted(hint)
        if found is None:
            return
        base, fetched = found
        lock = self._lock_of(base.uid)
        if self._follows_from(base) and not lock.locked():  # whoever holds it is about to change the state
            async with lock:
                await self._average(base, fetched, hint.peer_id)

    async def _fetch_hinted(self, hint: FetchHint) -> tuple[Snapshot, Fetched] | None:
        """The two snapshots. None unless that peer serves the expert according to the DHT, and gave something when it
        last kept this node waiting.
        """
        (uid,) = hint.uids
        base = self._snapshots.find(uid, hint.base_sha256)
        if base is None or not self._follows_from(base) or self._is_refused(uid, hint.peer_id):
            return None
        if self._replicas.states.is_withholding(hint.peer_id):
            return None
        replicas = await self._swarm.experts.replicas([uid])
        nodes = await self._swarm.registry.nodes([hint.peer_id])
        hosts = {r.peer_id for r in replicas[uid] if r.state is ReplicaState.SERVING}
        if hint.peer_id not in hosts or hint.peer_id not in nodes or not self._follows_from(base):
            return None
        return base, await self._replicas.states.fetch(nodes[hint.peer_id], uid, hint.sha256)

    def _follows_from(self, base: Snapshot) -> bool:
        """Whether nothing but updates has changed the expert since that snapshot."""
        expert = self._replicas.experts.get(base.uid)
        return expert is not None and expert.generation == base.generation

    async def _average(self, base: Snapshot, fetched: Fetched, peer_id: PeerID) -> None:
        history, claimed = self._replicas.history, fetched.checkpoint.update_count
        believed = history.capped_claim(base.uid, base.update_count, claimed)
        theirs = replace(fetched.checkpoint, update_count=believed)
        met = last_meeting(base.met.get(peer_id), fetched.met_update_count)
        share = partner_weight(base.update_count, believed, met)
        if await self._catch_up(base.uid, fetched.checkpoint, peer_id, believed):
            return
        expert = self._replicas.experts.get(base.uid)
        if expert is None:
            return  # given up in the meantime
        average = partial(average_into, expert, base, theirs, self._swarm.keys.swarm_id, share)
        try:
            belief = await self._replicas.runtime.run(average)
        except OutOfReachError as error:
            logger.debug("%s", error)  # this node's owner can do nothing about it
            self.refused.inc()
            await self._note_out_of_reach(expert, peer_id, believed, error.is_untrained)
            return
        self._refused.pop((base.uid, peer_id), None)
        expert.reports.note_averaged()
        mine = believed_updates(base.update_count, believed, share, belief)
        history.record(base.uid, peer_id, mine, believed)
        self.averagings.inc()
        logger.debug("averaged %s with %s: %.2f of it, %.2f believed", base.uid, peer_id, share, belief)

    async def _catch_up(self, uid: UID, theirs: Checkpoint, peer_id: PeerID, believed: int) -> bool:
        """Takes over a whole state, as a newcomer does, if trainers left this replica behind, or if it began without
        the others' state a short time ago. Its few own updates could not lead it after the others. The other side's
        average includes them. Returns whether it did.
        """
        if not self._lags(uid):
            return False
        others = await self._others(uid, peer_id, believed)
        if not self._lags(uid, len(others)) or not await self._replicas.take_whole(
            uid, others, {peer_id: theirs}
        ):
            return False
        logger.info("expert %s was behind, and continues from the state of another node", uid)
        return True

    def _lags(self, uid: UID, others: int = 1) -> bool:
        expert = self._replicas.experts.get(uid)
        return expert is not None and (
            expert.reports.is_left_behind(others) or self._replicas.is_provisional(uid)
        )

    async def _others(self, uid: UID, peer_id: PeerID, believed: int) -> list[Replica]:
        """Other nodes' replicas that serve. `believed`: the part of that peer's update count that is believed."""
        hosts = await self._swarm.experts.replicas([uid])
        return [
            replace(r, update_count=believed) if r.peer_id == peer_id else r
            for r in serving_elsewhere(hosts[uid], self._swarm.host.peer_id)
        ]

    async def _note_out_of_reach(
        self, expert: Expert, peer_id: PeerID, believed: int, is_untrained: bool
    ) -> None:
        """Avoids the replica for a while. `believed`: the part of its update count that is believed. If this node's own
        replica has taken no updates of its own, or is far slower than all others, it can't follow them by averaging. In
        both cases, it takes over the state of a majority.
        """
        uid = expert.uid
        times = self._refused.get((uid, peer_id), (0, 0.0))[0]
        wait_s = self._every_s * min(2**times, _LONGEST_AVOIDED)
        self._refused[uid, peer_id] = min(times + 1, 16), self._clock() + wait_s
        others = await self._others(uid, peer_id, believed)
        refused = [(uid, r.peer_id) for r in others if (uid, r.peer_id) in self._refused]
        if is_untrained or is_astray(len(refused), len(others)):
            for key in refused:
                del self._refused[key]
            await self._replicas.take_whole(uid, others)

    def _is_refused(self, uid: UID, peer_id: PeerID) -> bool:
        return self._clock() < self._refused.get((uid, peer_id), (0, 0.0))[1] and not self._lags(uid)

    def _is_worth_meeting(self, replica: Replica) -> bool:
        """Whether to average with the replica. Not if neither side took an update since the last average, or if it was
        unreachable recently.
        """
        if self._is_refused(replica.uid, replica.peer_id):
            return False
        met = self._replicas.history.of(replica.uid).get(replica.peer_id)
        expert = self._replicas.experts.get(replica.uid)
        if expert is None or met is None:
            return expert is not None
        # after the average, the other may have had a few more updates than this node knows
        return expert.update_count != met.mine or replica.update_count > max(met.mine, met.theirs)

    async def _average_now_and_then(self) -> None:
        took_s = 0.0
        async with contextlib.aclosing(TaskSet(self._restarts)) as rounds:
            while True:
                await asyncio.sleep(pause_after(self._every_s, took_s, self._rng))
                work = rounds.spawn(self._attempt(self.average_some()), "average with other nodes")
                # a round that waits for slow states goes on beside the next one, which may take their slots
                await asyncio.wait([work], timeout=self._every_s)
                if work.done():
                    took_s = work.result() or 0.0

    def _lock_of(self, uid: UID) -> asyncio.Lock:
        return self._averaging.setdefault(uid, asyncio.Lock())

    async def _follow_adoptions(self) -> None:
        while True:
            hint = await self._next_hint(False, self._adoptions)
            await self._attempt(self._follow_adoption(hint))

    async def _follow_averages(self) -> None:
        while True:
            hint = await self._next_hint(True, self._hinted_fetches)
            await self._attempt(self._follow_average(hint))

    async def _next_hint(self, is_average: bool, slots: TransferSlots) -> FetchHint:
        """The next hint of this kind, by a peer that gets one of these slots."""
        while (hint := self._hints.pop(is_average, slots.has_room_for)) is None:
            self._hinted[is_average].clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await self._hinted[is_average].wait()
        return hint

    async def _attempt(self, work: Coroutine[Any, Any, T]) -> T | None:
        """Returns the result, or None if the work failed."""
        try:
            with tolerating("average or adopt", self._restarts):
                return await work
        except (UnreachableError, TransferError, StateError, ExpertError) as error:
            # often only that the other one is busy, or has gone on meanwhile: `talkoot_state_fetches` counts it
            logger.debug("%s", error)
        return None


def pause_after(every_s: float, took_s: float, rng: random.Random) -> float:
    """The pause until the next round of averages, given how long one usually takes."""
    return max(every_s, _PAUSE * took_s) * rng.uniform(0.5, 1.5)


def is_astray(out_of_reach: int, others: int) -> bool:
    """Whether it is this node's own replica that went astray: if most of the others, and more than one, are too far
    away from it.
    """
    return out_of_reach > max(1, others / 2)


async def replicas_to_meet(
    experts: ExpertRegistry, uids: Collection[UID], seen: Mapping[UID, Collection[Replica]], me: PeerID
) -> dict[UID, Collection[Replica]]:
    """The replicas of these experts that this node saw recently. Reading them again for each average would cost a fifth
    of a node's upkeep, so only experts that nobody else served are read again.
    """
    known = {uid: seen[uid] for uid in uids if serving_elsewhere(seen.get(uid, ()), me)}
    unknown = [uid for uid in uids if uid not in known]
    return {**known, **await experts.replicas(unknown)} if unknown else known


def choose_partners(
    replicas: Mapping[UID, Collection[Replica]],
    me: PeerID,
    unshared: Callable[[Replica], int | None],
    rng: random.Random,
) -> list[Replica]:
    """Chooses about half of the experts that other nodes serve too, and for each of them one of its other replicas:
    those that lack the most updates. `unshared`: how many of this node's updates another replica lacks; None if the two
    need not meet.
    """
    found = [serving_elsewhere(hosts, me) for _, hosts in sorted(replicas.items())]
    drawn = [rng.choice(others) for others in found if others]
    rng.shuffle(drawn)  # random among equals
    lacking = [(updates, replica) for replica in drawn if (updates := unshared(replica)) is not None]
    most = int(_TAKES_INITIATIVE * len(drawn) + rng.random())
    return [replica for _, replica in sorted(lacking, key=itemgetter(0), reverse=True)][:most]


def average_into(expert: Expert, base: Snapshot, theirs: Checkpoint, swarm_id: str, share: float) -> float:
    """Averages the expert's state at `base` with `theirs`, and then adds the updates that it has had since. The result
    is no further from `base` than the expert's own moves allow.

    `share`: the weight of `theirs`. Returns the share of the way to `theirs` that was accepted, 0 to 1. Raises
    StateError, and changes nothing, if anything but updates has changed the expert since `base`, or if a state is not
    this expert's, not finite or not plausible; OutOfReachError if it is too far away.
    """
    if expert.generation != base.generation:
        raise StateError(f"expert {expert.uid} was replaced or rolled back while it was averaged")
    expert.require_good(theirs.state, theirs.update_count)
    before = from_bytes(base.data, swarm_id, base.uid, base.update_count, expert.form).state
    moves = expert.own_moves
    present = moves.present(moving_tensors(before))
    block = {name: tensor for name, tensor in moving_tensors(before).items() if name.startswith(BLOCK)}
    away, reach = distance(block, theirs.state), moves.reach(present, block)
    if away > reach:
        # a state from this node's own checkpoint was trained here, though not since the node started
        is_untrained = moves.are_none(present) and bool(expert.source or not expert.update_count)
        if not present:
            moves.start(moving_tensors(before))  # after a rollback, moves are measured from here
        message = (
            f"expert {expert.uid} was not averaged: another node's copy differs from this node's by {away:.3g}, more "
            f"than the {reach:.3g} that this node's own updates explain"
        )
        raise OutOfReachError(message, is_untrained=is_untrained)
    current, radii = expert.export_state(), moves.radii(present)
    state, belief = averaged(current, before, theirs.state, radii, share, theirs.update_count)
    updates = believed_updates(base.update_count, theirs.update_count, share, belief)
    updates += expert.update_count - base.update_count
    expert.import_state(state, min(updates, MAX_UPDATE_COUNT), AVERAGED)
    moves.note(present)
    moves.start(at_base(moving_tensors(state), current, before))
    return belief


def averaged(
    current: State, base: State, theirs: State, radii: Mapping[str, float], share: float, most_steps: int
) -> tuple[State, float]:
    """Moves `base` by `share` of the way to `theirs`, within `radii`, and adds what changed from `base` to `current`.

    Returns the state, and the share of the way between the parameters that was accepted. Moments that one side lacks
    count as zeros. `most_steps`: the most steps that the other's optimizer can have counted. Whole numbers stay as they
    are, and so do the accumulated gradients of `current`. Those of `theirs` are left to the other replica, which takes
    a step with them, so that each gradient counts once.
    """
    moving = moving_tensors(current)
    before, other = _like(current, base), _like(current, theirs)
    for name in moving:
        if name.endswith(SECOND_MOMENT):
            other[name] = other[name].clamp(before[name] / _MOST_SHRINKING, before[name] * _MOST_SCALE)
    block = clip({n: t for n, t in moving.items() if n.startswith(BLOCK)}, before, other, radii, share)
    moments = clip({n: t for n, t in moving.items() if not n.startswith(BLOCK)}, before, other, radii, share)
    state = current | block.tensors | moments.tensors
    for name, tensor in current.items():
        if name.endswith(SECOND_MOMENT):
            state[name] = state[name].clamp(tensor / _MOST_SHRINKING, tensor * _MOST_SCALE)
            first = name.removesuffix(SECOND_MOMENT) + FIRST_MOMENT
            most = torch.maximum(_MOST_RATIO * state[name].sqrt(), current[first].abs())
            state[first] = state[first].clamp(-most, most)
        elif name.endswith(STEP):
            believed = believed_updates(
                int(before[name]), min(int(other[name]), most_steps), share, block.belief
            )
            state[name] = tensor + (believed - int(before[name]))
    return state, block.belief


def _like(current: State, other: State) -> State:
    return {name: other.get(name, torch.zeros_like(tensor)) for name, tensor in current.items()}
