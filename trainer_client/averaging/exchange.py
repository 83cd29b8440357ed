"""One trainer's side of a meeting, whoever began it: its dense part as it goes out, and what becomes of the other's.

The gRPC edge of a trainer: others exchange dense parts with it, or take one to begin with.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass

import grpc
from grpc import StatusCode

from peer.averaging import AveragingHistory, partner_weight
from peer.errors import ExpertError, StateError, WireError
from peer.identity import PeerID
from peer.rates import RateLimit
from peer.rpc.calls import RequestReader, abort_on_error, require_same_swarm
from peer.rpc.sessions import Sessions
from peer.rpc.transfer import SnapshotCache, SnapshotReceiver, in_time, outgoing, written
from peer.wire import dense_pb2, dense_pb2_grpc, session_pb2, state_pb2
from trainer_client.averaging.dense_part import (
    MAX_AGE,
    DenseForm,
    DenseMerge,
    DensePart,
    SharedParameters,
    Tensors,
    require_near,
)
from trainer_client.dispatch.policy import CircuitBreakers

logger = logging.getLogger(__name__)

_KEPT = 2
_KEPT_S = 300.0
"""How long a snapshot is kept for those who were cut off."""
_LEFT_ALONE_S, _LONGEST_LEFT_ALONE_S = 10.0, 900.0


@dataclass
class AveragingCounts:
    """Counts since the start."""

    averaged: int = 0
    refused: int = 0
    """Dense parts of others that were broken, or too far from one's own."""
    failed: int = 0
    """Exchanges that this trainer began and that broke off, or to which nobody answered."""
    given: int = 0
    """Times that others took the dense part to begin with."""
    bytes_sent: int = 0
    bytes_received: int = 0


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The dense part as it goes to others."""

    key: bytes
    """The fingerprint of its form."""
    part: DensePart
    met: Mapping[PeerID, int]
    """Whom this trainer had met at that moment, and how old both were then."""
    data: bytes
    sha256: bytes
    expires_at: float

    def header(self, peer_id: PeerID | None = None) -> state_pb2.StateHeader:
        """For the peer that gets it."""
        return state_pb2.StateHeader(
            update_count=self.part.age,
            total_bytes=len(self.data),
            sha256=self.sha256,
            met_update_count=0 if peer_id is None else self.met.get(peer_id, 0),
        )


@dataclass(frozen=True, eq=False)
class PeerDensePart:
    """Another trainer's dense part, looked through."""

    tensors: Tensors
    age: int
    difference: float


class DenseExchange:
    """What a trainer has for its meetings, of which one is at a time. For the loop's thread."""

    def __init__(
        self, form: DenseForm, part: SharedParameters, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.form = form
        self.part = part
        self.counts = AveragingCounts()
        self.breakers = CircuitBreakers(_LEFT_ALONE_S, _LONGEST_LEFT_ALONE_S)
        self.clock = clock
        self.ended_at_step = 0
        """Steps of this trainer when its last meeting ended, whoever began it."""
        self.is_on = False
        self._meetings: AveragingHistory[bytes] = AveragingHistory(clock)
        self._snapshots: SnapshotCache[Snapshot] = SnapshotCache(_KEPT, _KEPT_S)

    def begin(self) -> None:
        """Raises ExpertError (RESOURCE_EXHAUSTED) while another meeting is on."""
        if self.is_on:
            raise ExpertError(
                StatusCode.RESOURCE_EXHAUSTED, "this trainer averages with another; try again soon"
            )
        self.is_on = True

    def end(self) -> None:
        self.is_on = False
        self.ended_at_step = self.part.steps

    async def snapshot(self) -> Snapshot:
        """Of the dense part as it is now."""
        met = self._meetings.of(self.form.fingerprint)
        part, data, sha256 = await asyncio.to_thread(self._pack)
        expires_at = self.clock() + _KEPT_S
        return Snapshot(self.form.fingerprint, part, met, data, sha256, expires_at)

    async def kept_snapshot(self, sha256: bytes) -> Snapshot:
        """One that was begun before, or one of now when `sha256` is empty; it is kept for whoever is cut off.

        Raises ExpertError (FAILED_PRECONDITION) when it is kept no more.
        """
        if sha256:
            found = self._snapshots.find(self.form.fingerprint, sha256, self.clock())
            if found is None:
                raise ExpertError(
                    StatusCode.FAILED_PRECONDITION, "that snapshot is kept no more: begin anew without one"
                )
            return found
        for kept in self._snapshots.all(self.clock()):
            if kept.part.age == self.part.age and kept.met == self._meetings.of(self.form.fingerprint):
                return kept
        snapshot = await self.snapshot()
        self._snapshots.put(snapshot, self.clock())
        return snapshot

    async def look_through(self, mine: DensePart, incoming: SnapshotReceiver) -> PeerDensePart:
        """Raises StateError when what came is not to be averaged with."""
        return await asyncio.to_thread(self._open, mine, incoming)

    def refuse(self, peer_id: PeerID, error: StateError) -> None:
        """That trainer is left alone for a while, each time longer."""
        self.counts.refused += 1
        self.leave_alone(peer_id)
        logger.warning("passing over the dense part of trainer %s: %s", peer_id, error)

    def leave_alone(self, peer_id: PeerID) -> None:
        """For a while, each time longer."""
        self.breakers.failed(peer_id, self.clock())

    async def merge(
        self, base: Snapshot, theirs: PeerDensePart, met_update_count: int, peer_id: PeerID
    ) -> DenseMerge:
        """Waits for the end of the next step."""
        met = max(base.met.get(peer_id, 0), met_update_count)
        their_age = self._meetings.capped_claim(self.form.fingerprint, base.part.age, theirs.age)
        share = partner_weight(base.part.age, their_age, met)
        done = self.part.merge(
            peer_id.to_base58(), base.part, theirs.tensors, their_age, share, theirs.difference
        )
        merge = await asyncio.wrap_future(done)
        self._meetings.record(self.form.fingerprint, peer_id, max(base.part.age, their_age))
        self.breakers.succeeded(peer_id)
        self.counts.averaged += 1
        return merge

    def incoming(self) -> SnapshotReceiver:
        return SnapshotReceiver(self.form.max_bytes, self.count_received)

    def count_received(self, size: int) -> None:
        self.counts.bytes_received += size

    def _pack(self) -> tuple[DensePart, bytes, bytes]:
        part = self.part.read()
        data = self.form.to_bytes(part.tensors, part.age)
        return part, data, hashlib.sha256(data).digest()

    def _open(self, mine: DensePart, incoming: SnapshotReceiver) -> PeerDensePart:
        header, data = incoming.whole()
        tensors = self.form.from_bytes(data, header.update_count)
        difference = require_near(mine.tensors, tensors)
        return PeerDensePart(tensors, min(header.update_count, MAX_AGE), difference)


Requests = AsyncIterator[dense_pb2.ExchangeRequest]
ExchangeContext = grpc.aio.ServicerContext[dense_pb2.ExchangeRequest, state_pb2.FetchReply]
TakeContext = grpc.aio.ServicerContext[dense_pb2.TakeRequest, state_pb2.FetchReply]

_MAX_TAKERS = 2


class DenseServicer(dense_pb2_grpc.DenseServiceServicer):  # type: ignore[misc]  # grpc's plugin writes no types
    """Gives one trainer's dense part to trainers of its swarm that train the same."""

    def __init__(self, meeting: DenseExchange, me: PeerID, sessions: Sessions, deadline_s: float) -> None:
        """`sessions`: who may call. `deadline_s`: longest that a call may take."""
        self._meeting = meeting
        self._me = me
        self._sessions = sessions
        self._deadline_s = deadline_s
        self._takers = 0
        self._merging: set[asyncio.Task[None]] = set()

    async def Exchange(self, requests: Requests, context: ExchangeContext) -> None:
        async with abort_on_error(context, self._deadline_s, "the dense parts did not come over in time"):
            await self._exchange(RequestReader(requests), context)

    async def Take(self, request: dense_pb2.TakeRequest, context: TakeContext) -> None:
        async with abort_on_error(context, self._deadline_s, "the dense part was not read in time"):
            await self._give(request, context)

    async def close(self) -> None:
        """What waits for the end of a step waits no more."""
        for task in self._merging:
            task.cancel()
        await asyncio.gather(*self._merging, return_exceptions=True)

    async def _exchange(
        self, messages: RequestReader[dense_pb2.ExchangeRequest], context: ExchangeContext
    ) -> None:
        caller = self._sessions.require(context, session_pb2.RIGHT_AVERAGE).caller
        request = await messages.next()
        if request is None or request.WhichOneof("part") != "offer":
            raise WireError("an exchange begins with an offer")
        offer = request.offer
        self._check(caller, offer)
        meeting, merging = self._meeting, False
        meeting.begin()
        try:
            incoming = meeting.incoming()
            incoming.begin(offer.header)
            mine = await meeting.snapshot()
            await self._swap(mine, incoming, caller, messages, context)
            theirs = await meeting.look_through(mine.part, incoming)
            task = asyncio.create_task(self._merge(mine, theirs, offer.header.met_update_count, caller))
            self._merging.add(task)
            task.add_done_callback(self._merging.discard)
            merging = True
        except StateError as error:
            meeting.refuse(caller, error)
            raise WireError(str(error)) from error
        except (TimeoutError, asyncio.CancelledError):
            meeting.leave_alone(caller)  # others could have met this trainer meanwhile
            raise
        finally:
            if not merging:
                meeting.end()

    async def _swap(
        self,
        mine: Snapshot,
        incoming: SnapshotReceiver,
        caller: PeerID,
        messages: RequestReader[dense_pb2.ExchangeRequest],
        context: ExchangeContext,
    ) -> None:
        """Both directions at once. Raises StateError when what comes is not what was offered."""
        sending = asyncio.create_task(self._send(mine, caller, 0, context))
        try:
            while (request := await in_time(messages.next())) is not None:
                incoming.take(b"" if request.WhichOneof("part") == "offer" else request.chunk)
            await sending
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    async def _merge(self, mine: Snapshot, theirs: PeerDensePart, met: int, caller: PeerID) -> None:
        try:
            await self._meeting.merge(mine, theirs, met, caller)
        finally:
            self._meeting.end()

    async def _give(self, request: dense_pb2.TakeRequest, context: TakeContext) -> None:
        self._sessions.require(context, session_pb2.RIGHT_AVERAGE)
        require_same_swarm(self._meeting.form.swarm_id, request.protocol_version, request.swarm_id)
        self._require_same_form(request.fingerprint)
        if request.offset and not request.sha256:
            raise WireError("an offset belongs to a snapshot: give its checksum")
        if self._takers >= _MAX_TAKERS:
            raise ExpertError(
                StatusCode.RESOURCE_EXHAUSTED, "others take this trainer's dense part; try again soon"
            )
        self._takers += 1
        try:
            snapshot = await self._meeting.kept_snapshot(request.sha256)
            await self._send(snapshot, None, request.offset, context)
        finally:
            self._takers -= 1
        self._meeting.counts.given += 1

    async def _send(
        self, snapshot: Snapshot, to: PeerID | None, offset: int, context: ExchangeContext | TakeContext
    ) -> None:
        async for reply in outgoing(snapshot.header(to), snapshot.data, offset, RateLimit(None)):
            await written(context.write, reply)
            self._meeting.counts.bytes_sent += len(reply.chunk)

    def _check(self, caller: PeerID, offer: dense_pb2.DenseOffer) -> None:
        """Raises ExpertError."""
        meeting = self._meeting
        require_same_swarm(meeting.form.swarm_id, offer.protocol_version, offer.swarm_id)
        self._require_same_form(offer.fingerprint)
        if caller == self._me:
            raise ExpertError(StatusCode.FAILED_PRECONDITION, "that is this trainer itself")
        if caller in meeting.breakers.open_at(meeting.clock()):
            raise ExpertError(
                StatusCode.PERMISSION_DENIED, "what this trainer offered was of no use: come back later"
            )

    def _require_same_form(self, fingerprint: bytes) -> None:
        if fingerprint != self._meeting.form.fingerprint:
            raise ExpertError(
                StatusCode.FAILED_PRECONDITION,
                "this trainer trains another dense part: other shapes, tokens or router",
            )
