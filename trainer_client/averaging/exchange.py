"""One exchange of dense parts with another trainer: what both sides do, and the service that others call.

`DenseExchange` holds what this trainer needs for exchanges, whichever side begins them. `DenseServicer` is the gRPC
service: through it, other trainers exchange dense parts, or fetch this trainer's to start from.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, replace

import grpc
from grpc import StatusCode
from prometheus_client import CollectorRegistry, Counter

from peer.averaging import AveragingHistory, Meeting, last_meeting, partner_weight
from peer.bounded import BoundedDict
from peer.budget import interruptible
from peer.clipping import believed_updates
from peer.errors import ExpertError, OutOfReachError, StateError, WireError
from peer.identity import PeerID
from peer.loop import TaskSet, cancel_all
from peer.metrics import start_at_zero
from peer.parsing import ParseGuard
from peer.rates import RateLimit, RecentUse
from peer.rpc.calls import abort_on_error, require_same_swarm
from peer.rpc.sessions import Session, Sessions
from peer.rpc.transfer import SnapshotCache, SnapshotReceiver, TransferPace, TransferSlots, fair_time_s, send
from peer.wire import dense_pb2, dense_pb2_grpc, session_pb2, state_pb2
from trainer_client.averaging.dense_part import (
    MAX_AGE,
    DenseForm,
    DenseMerge,
    DensePart,
    PeerDensePart,
    SharedParameters,
    require_near,
)
from trainer_client.dispatch.policy import CircuitBreakers

logger: logging.Logger = logging.getLogger(__name__)

_MAX_SNAPSHOTS = 2
_SNAPSHOT_LIFETIME_S = 300.0
"""How long a snapshot is kept, so that an interrupted download can resume."""
_FRESH = 10.0
"""For how long a newcomer gets a kept snapshot rather than a new one, as a multiple of the time that it took to make.
Otherwise strangers could keep a trainer busy with copies.
"""
_BACKOFF_S, _LONGEST_BACKOFF_S = 10.0, 900.0
_MAX_TAKERS = 4
_CALLERS = 1024
"""How many callers' last exchanges are remembered."""
_WASTE_HALF_S = 300.0
"""Time that an exchange spent in vain counts half after this long."""
OWN = ""
"""The group of the exchanges that this trainer begins."""
CUT_OFF = (
    "another exchange took the place of this one, which was slow, or followed others that came to nothing"
)

Requests = AsyncIterator[dense_pb2.ExchangeRequest]
ExchangeContext = grpc.aio.ServicerContext[dense_pb2.ExchangeRequest, state_pb2.FetchReply]
TakeContext = grpc.aio.ServicerContext[dense_pb2.TakeRequest, state_pb2.FetchReply]


class AveragingMetrics:
    """What one trainer counts about its exchanges with others, over all models."""

    def __init__(self, metrics: CollectorRegistry | None = None) -> None:
        ends = Counter(
            "talkoot_trainer_averagings",
            "Exchanges with other trainers, by their end, and times that others took the dense part to begin with.",
            ["end"],
            registry=metrics,
        )
        # refused: broken, or too far from this trainer's; failed: begun here, and interrupted or not answered
        self.ends: Counter = start_at_zero(ends, "averaged", "refused", "failed", "given")
        moved = Counter(
            "talkoot_trainer_dense_bytes",
            "Bytes of dense parts sent to and received from other trainers.",
            ["direction"],
            registry=metrics,
        )
        self.bytes: Counter = start_at_zero(moved, "sent", "received")


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The dense part at one moment, encoded for others."""

    key: bytes
    """The fingerprint of its form."""
    part: DensePart
    met: Mapping[PeerID, Meeting]
    """For each trainer with which this one had averaged before, the ages of both after that."""
    data: bytes
    sha256: bytes
    fresh_until: float
    expires_at: float

    def header(self, peer_id: PeerID | None = None) -> state_pb2.StateHeader:
        """The header for the peer that receives the dense part. None: for a trainer that starts from it."""
        return state_pb2.StateHeader(
            update_count=self.part.age,
            total_bytes=len(self.data),
            sha256=self.sha256,
            met_update_count=self.met[peer_id].mine if peer_id is not None and peer_id in self.met else 0,
        )


@dataclass(eq=False)
class Holder:
    """The exchange in progress."""

    group: str
    """The group of the caller (see `Session.group`), or `OWN`."""
    began_at: float
    interrupt: Callable[[], None] | None
    """Breaks it off. None: it only waits for the end of a step."""
    is_cut_off: bool = False
    is_blameless: bool = False
    """Whether it was cut off before it was slow, only because earlier exchanges of its group were in vain."""


class ExchangePlace:
    """The place of the one exchange that may be in progress. Pure: `now` is an argument.

    An exchange makes way for another if its group's exchanges have lately wasted more time than those of the other's
    group. So strangers who hold the place with ever new keys, and never get to an average, keep nobody else from it for
    long. A slow exchange also makes way if the other's group has wasted as little. One that is cut off before
    it is slow has wasted nothing: otherwise, once an honest trainer's exchange has failed, a stranger could cut off all
    that follow.
    """

    def __init__(self, size: int) -> None:
        """`size`: bytes that an exchange sends, and receives."""
        self._fair_s = fair_time_s(size)
        self.holder: Holder | None = None
        self._wasted = RecentUse[str](_WASTE_HALF_S, _CALLERS)

    def wasted_s(self, group: str, now: float) -> int:
        """Seconds of exchanges that came to nothing lately."""
        return round(self._wasted.of(group, now))

    def is_free_for(self, group: str, now: float) -> bool:
        """Whether `take` succeeds."""
        holder = self.holder
        if holder is None or holder.interrupt is None:
            return holder is None
        more = self.wasted_s(holder.group, now) - self.wasted_s(group, now)
        return more > 0 or (more == 0 and self._is_slow(holder, now))

    def take(self, group: str, interrupt: Callable[[], None], now: float) -> Holder:
        """Raises ExpertError (RESOURCE_EXHAUSTED) while there is another exchange that need not make way."""
        if not self.is_free_for(group, now):
            raise ExpertError(
                StatusCode.RESOURCE_EXHAUSTED, "this trainer is averaging with another one: try again soon"
            )
        if self.holder is not None and self.holder.interrupt is not None:
            self.holder.is_cut_off = True
            self.holder.is_blameless = not self._is_slow(self.holder, now)
            self.holder.interrupt()
        self.holder = Holder(group, now, interrupt)
        return self.holder

    def leave(self, holder: Holder, now: float, *, in_vain: bool) -> None:
        if in_vain and not holder.is_blameless:
            self._wasted.add(holder.group, max(1.0, now - holder.began_at), now)
        if self.holder is holder:
            self.holder = None

    def _is_slow(self, holder: Holder, now: float) -> bool:
        return now > holder.began_at + self._fair_s


class DenseExchange:
    """What a trainer needs for its exchanges, one at a time. Call its methods on the loop's thread."""

    def __init__(
        self,
        form: DenseForm,
        part: SharedParameters,
        metrics: AveragingMetrics | None = None,
        guard: ParseGuard | None = None,
    ) -> None:
        """`guard`: for parsing dense parts."""
        self.form = form
        self.part = part
        self.metrics: AveragingMetrics = metrics or AveragingMetrics()
        self.breakers: CircuitBreakers = CircuitBreakers(_BACKOFF_S, _LONGEST_BACKOFF_S)
        """Trainers with which calls failed: they are not called, but may call."""
        self.refused: CircuitBreakers = CircuitBreakers(_BACKOFF_S, _LONGEST_BACKOFF_S)
        """Trainers whose dense parts could not be used, or that kept this one waiting: they may not call either."""
        self.ended_at_step: int = 0
        """This trainer's step count at the end of the last exchange that it began, or that changed its dense part."""
        self.place: ExchangePlace = ExchangePlace(form.max_bytes)
        self._broke_off = False
        """Whether the last exchange that another trainer began broke off."""
        self._fresh_until = 0.0
        """Until when the last snapshot is fresh."""
        self._guard = guard or ParseGuard()
        self._history: AveragingHistory[bytes] = AveragingHistory()
        self._snapshots: SnapshotCache[Snapshot] = SnapshotCache(_MAX_SNAPSHOTS, _SNAPSHOT_LIFETIME_S)
        self._copying = TaskSet()
        self._snapshot: asyncio.Task[Snapshot] | None = None
        """Makes a snapshot now; None: none is being made."""
        self._kept: asyncio.Task[Snapshot] | None = None
        """Makes a snapshot for newcomers now; None: none is being made."""

    async def close(self) -> None:
        """Gives up snapshots that are being made."""
        await self._copying.aclose()

    def end(self, holder: Holder) -> None:
        """Ends an exchange that this trainer began, or that changed its dense part."""
        self.place.leave(holder, time.monotonic(), in_vain=False)
        self._broke_off = False
        self.ended_at_step = self.part.steps

    def break_off(self, holder: Holder) -> None:
        """Ends an exchange that another trainer began and that failed. This trainer's own next exchange is not
        postponed: otherwise strangers who begin one exchange after another, each with a new key, would keep it from
        all. But callers of that group have to wait for a moment, because each exchange costs a copy of the dense part.
        """
        self.place.leave(holder, time.monotonic(), in_vain=True)
        self._broke_off = True

    def is_resting(self, group: str) -> bool:
        """Whether callers of that group have to wait, because an exchange of theirs, and the last one, broke off a
        moment ago.
        """
        now = time.monotonic()
        is_fresh = self._snapshot is not None or now < self._fresh_until
        return self._broke_off and is_fresh and self.place.wasted_s(group, now) > 0

    async def snapshot(self) -> Snapshot:
        """A snapshot of the present dense part. One is made at a time, even if those who asked for others have left."""
        while self._snapshot is not None:
            await asyncio.wait({self._snapshot})
        self._snapshot = self._copying.spawn(self._make_snapshot(), "copy the dense part")
        return await asyncio.shield(self._snapshot)

    async def cached_snapshot(self, sha256: bytes) -> Snapshot:
        """The snapshot with that checksum. If `sha256` is empty, a recent one, which is then kept for a while.

        Raises ExpertError (FAILED_PRECONDITION) if there is no snapshot with that checksum any more.
        """
        if sha256:
            found = self._snapshots.find(self.form.fingerprint, sha256, time.monotonic())
            if found is None:
                raise ExpertError(
                    StatusCode.FAILED_PRECONDITION, "that snapshot has expired: begin again without one"
                )
            return found
        now, met = time.monotonic(), self._history.of(self.form.fingerprint)
        for cached in self._snapshots.all(now):
            if now < cached.fresh_until or (cached.part.age == self.part.age and cached.met == met):
                return cached
        if self._kept is None:
            self._kept = self._copying.spawn(self._keep_snapshot(), "copy the dense part for newcomers")
        return await asyncio.shield(self._kept)

    async def check(self, mine: DensePart, incoming: SnapshotReceiver, peer_id: PeerID) -> PeerDensePart:
        """Raises StateError if the received dense part must not be averaged with."""
        return await asyncio.to_thread(self._open, mine, incoming, peer_id)

    def refuse(self, peer_id: PeerID, error: StateError) -> None:
        """Refuses any exchange with that trainer for a while, longer each time."""
        self.metrics.ends.labels("refused").inc()
        self.refused.failed(peer_id, time.monotonic())
        logger.warning("ignoring the dense part of trainer %s: %s", peer_id, error)

    def avoided(self) -> frozenset[PeerID]:
        """Trainers that are not called now."""
        now = time.monotonic()
        return self.breakers.open_at(now) | self.refused.open_at(now)

    async def merge(
        self, base: Snapshot, theirs: PeerDensePart, met_update_count: int, peer_id: PeerID
    ) -> DenseMerge:
        """Merges at the end of the next step, and waits for that."""
        met = last_meeting(base.met.get(peer_id), met_update_count)
        age = self._history.capped_claim(self.form.fingerprint, base.part.age, theirs.age)
        share = partner_weight(base.part.age, age, met)
        done = self.part.merge(peer_id.to_base58(), base.part, replace(theirs, age=age), share)
        merge = await asyncio.wrap_future(done)
        after = believed_updates(base.part.age, age, share, merge.belief)
        self._history.record(self.form.fingerprint, peer_id, after, age)
        self.breakers.succeeded(peer_id)
        self.refused.succeeded(peer_id)
        self.metrics.ends.labels("averaged").inc()
        return merge

    def receiver(self) -> SnapshotReceiver:
        return SnapshotReceiver(self.form.max_bytes, self.metrics.bytes.labels("received").inc)

    async def _keep_snapshot(self) -> Snapshot:
        try:
            snapshot = await self.snapshot()
        finally:
            self._kept = None
        self._snapshots.put(snapshot, time.monotonic())
        return snapshot

    async def _make_snapshot(self) -> Snapshot:
        began, met = time.monotonic(), self._history.of(self.form.fingerprint)
        try:
            part, data, sha256 = await asyncio.to_thread(self._pack)
        finally:
            self._snapshot = None
        now = time.monotonic()
        self._fresh_until = now + _FRESH * (now - began)
        expires_at = now + _SNAPSHOT_LIFETIME_S
        return Snapshot(self.form.fingerprint, part, met, data, sha256, self._fresh_until, expires_at)

    def _pack(self) -> tuple[DensePart, bytes, bytes]:
        part = self.part.read()
        data = self.form.to_bytes(part.tensors, part.age)
        return part, data, hashlib.sha256(data).digest()

    def _open(self, mine: DensePart, incoming: SnapshotReceiver, peer_id: PeerID) -> PeerDensePart:
        header, data = incoming.whole()
        with self._guard.guarding("dense", peer_id, StateError):
            tensors = self.form.from_bytes(data, header.update_count)
            difference = require_near(self.form.trained(mine.tensors), self.form.trained(tensors))
        moves = self.part.moves_to(mine)
        self.part.require_in_reach(mine, tensors, moves)
        return PeerDensePart(tensors, min(header.update_count, MAX_AGE), difference, moves)


class DenseServicer(dense_pb2_grpc.DenseServiceServicer):
    """Exchanges one trainer's dense part with other trainers of the same swarm and model."""

    def __init__(
        self, exchange: DenseExchange, me: PeerID, sessions: Sessions, deadline_s: float, least_steps: int
    ) -> None:
        """`sessions`: with the trainers that may call. `deadline_s`: the longest time of a call. `least_steps`: this
        trainer's steps between two exchanges with the same caller, because each may move its dense part
        (`peer.clipping`).
        """
        self._exchange = exchange
        self._me = me
        self._sessions = sessions
        self._deadline_s = deadline_s
        self._least_steps = least_steps
        self._next_at_step = BoundedDict[PeerID, int](_CALLERS)
        self._takers = TransferSlots(_MAX_TAKERS)
        self._merging = TaskSet()

    async def Exchange(self, requests: Requests, context: ExchangeContext) -> None:
        async with abort_on_error(context, self._deadline_s, "the dense parts were not exchanged in time"):
            await self._answer(requests, context)

    async def Take(self, request: dense_pb2.TakeRequest, context: TakeContext) -> None:
        async with abort_on_error(context, self._deadline_s, "the dense part was not read in time"):
            await self._give(request, context)

    async def close(self) -> None:
        """Gives up merges that still wait for the end of a step."""
        await self._merging.aclose()

    async def _answer(self, requests: Requests, context: ExchangeContext) -> None:
        session = self._sessions.require(context, session_pb2.RIGHT_AVERAGE)
        request = await anext(requests, None)
        if request is None or request.WhichOneof("part") != "offer":
            raise WireError("an exchange begins with an offer")
        self._check(session, request.offer)
        with interruptible(CUT_OFF) as interrupt:
            holder = self._exchange.place.take(session.group, interrupt, time.monotonic())
            await self._exchange_with(session.caller, holder, request.offer, requests, context)

    async def _exchange_with(
        self,
        caller: PeerID,
        holder: Holder,
        offer: dense_pb2.DenseOffer,
        requests: Requests,
        context: ExchangeContext,
    ) -> None:
        exchange = self._exchange
        try:
            incoming = exchange.receiver()
            incoming.begin(offer.header)
            mine = await exchange.snapshot()
            await self._swap(mine, incoming, caller, requests, context)
            theirs = await exchange.check(mine.part, incoming, caller)
            holder.interrupt = None
            merge = self._merge(holder, mine, theirs, offer.header.met_update_count, caller)
            self._merging.spawn(merge, "merge a dense part")
        except OutOfReachError as error:
            exchange.refuse(caller, error)  # this trainer may still be within the caller's reach
        except StateError as error:
            exchange.refuse(caller, error)
            raise WireError(str(error)) from error
        except (TimeoutError, asyncio.CancelledError):
            if not holder.is_blameless:  # meanwhile this trainer could have averaged with others
                exchange.refused.failed(caller, time.monotonic())
            raise
        finally:
            if holder.interrupt is not None:
                exchange.break_off(holder)

    async def _swap(
        self,
        mine: Snapshot,
        incoming: SnapshotReceiver,
        caller: PeerID,
        requests: Requests,
        context: ExchangeContext,
    ) -> None:
        """Sends and receives at the same time. Raises StateError if what arrives is not what was offered."""
        sending = asyncio.create_task(self._send(mine, caller, 0, context))
        try:
            pace = TransferPace()
            while (request := await pace.read(anext(requests, None), _size_of)) is not None:
                incoming.take(b"" if request.WhichOneof("part") == "offer" else request.chunk)
            await sending
        finally:
            await cancel_all([sending])

    async def _merge(
        self, holder: Holder, mine: Snapshot, theirs: PeerDensePart, met: int, caller: PeerID
    ) -> None:
        try:
            await self._exchange.merge(mine, theirs, met, caller)
            self._next_at_step[caller] = self._exchange.part.steps + self._least_steps
        finally:
            self._exchange.end(holder)

    async def _give(self, request: dense_pb2.TakeRequest, context: TakeContext) -> None:
        session = self._sessions.require(context, session_pb2.RIGHT_AVERAGE, session_pb2.RIGHT_EXPORT)
        require_same_swarm(self._exchange.form.swarm_id, request.protocol_version, request.swarm_id)
        self._require_same_form(request.fingerprint)
        if request.offset and not request.sha256:
            raise WireError("an offset needs the checksum of its snapshot")
        with self._takers.taken(session.owner, self._exchange.form.max_bytes):
            snapshot = await self._exchange.cached_snapshot(request.sha256)
            await self._send(snapshot, None, request.offset, context)
        self._exchange.metrics.ends.labels("given").inc()

    async def _send(
        self, snapshot: Snapshot, to: PeerID | None, offset: int, context: ExchangeContext | TakeContext
    ) -> None:
        count = self._exchange.metrics.bytes.labels("sent").inc
        await send(context, snapshot.header(to), snapshot.data, offset, RateLimit(None), count)

    def _check(self, session: Session, offer: dense_pb2.DenseOffer) -> None:
        """Raises ExpertError."""
        exchange, caller = self._exchange, session.caller
        require_same_swarm(exchange.form.swarm_id, offer.protocol_version, offer.swarm_id)
        self._require_same_form(offer.fingerprint)
        if caller == self._me:
            raise ExpertError(StatusCode.FAILED_PRECONDITION, "this trainer can't average with itself")
        if caller in exchange.refused.open_at(time.monotonic()):
            raise ExpertError(
                StatusCode.PERMISSION_DENIED, "your dense part could not be used: try again later"
            )
        if exchange.is_resting(session.group):
            raise ExpertError(
                StatusCode.RESOURCE_EXHAUSTED, "another exchange has just broken off: try again soon"
            )
        if exchange.part.steps < self._next_at_step.get(caller, 0):
            raise ExpertError(
                StatusCode.RESOURCE_EXHAUSTED, "the two trainers have averaged recently: try again later"
            )

    def _require_same_form(self, fingerprint: bytes) -> None:
        if fingerprint != self._exchange.form.fingerprint:
            raise ExpertError(
                StatusCode.FAILED_PRECONDITION,
                "this trainer trains another dense part: other shapes, tokens or router",
            )


def _size_of(request: dense_pb2.ExchangeRequest | None) -> int:
    return 0 if request is None else len(request.chunk)
