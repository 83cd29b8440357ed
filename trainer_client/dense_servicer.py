"""The gRPC edge of a trainer: others exchange dense parts with it, or take one to begin with."""

import asyncio
from collections.abc import AsyncIterator

import grpc
from grpc import StatusCode
from hivemind.p2p import PeerID

from peer.rpc.calls import refusing, require_same_swarm
from peer.errors import ExpertError, StateError, WireError
from peer.messages import Messages
from peer.rates import Rate
from peer.rpc.sessions import Sessions
from peer.rpc.transfer import Incoming, in_time, outgoing, written
from peer.wire import dense_pb2, dense_pb2_grpc, session_pb2, state_pb2
from trainer_client.averaging.exchange import Meeting, Snapshot, Theirs

Requests = AsyncIterator[dense_pb2.ExchangeRequest]
ExchangeContext = grpc.aio.ServicerContext[dense_pb2.ExchangeRequest, state_pb2.FetchReply]
TakeContext = grpc.aio.ServicerContext[dense_pb2.TakeRequest, state_pb2.FetchReply]

_MAX_TAKERS = 2


class DenseServicer(dense_pb2_grpc.DenseServiceServicer):  # type: ignore[misc]  # grpc's plugin writes no types
    """Gives one trainer's dense part to trainers of its swarm that train the same."""

    def __init__(self, meeting: Meeting, me: PeerID, sessions: Sessions, deadline_s: float) -> None:
        """`sessions`: who may call. `deadline_s`: longest that a call may take."""
        self._meeting = meeting
        self._me = me
        self._sessions = sessions
        self._deadline_s = deadline_s
        self._takers = 0
        self._merging: set[asyncio.Task[None]] = set()

    async def Exchange(self, requests: Requests, context: ExchangeContext) -> None:
        async with refusing(context, self._deadline_s, "the dense parts did not come over in time"):
            await self._exchange(Messages(requests), context)

    async def Take(self, request: dense_pb2.TakeRequest, context: TakeContext) -> None:
        async with refusing(context, self._deadline_s, "the dense part was not read in time"):
            await self._give(request, context)

    async def close(self) -> None:
        """What waits for the end of a step waits no more."""
        for task in self._merging:
            task.cancel()
        await asyncio.gather(*self._merging, return_exceptions=True)

    async def _exchange(
        self, messages: Messages[dense_pb2.ExchangeRequest], context: ExchangeContext
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
        incoming: Incoming,
        caller: PeerID,
        messages: Messages[dense_pb2.ExchangeRequest],
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

    async def _merge(self, mine: Snapshot, theirs: Theirs, met: int, caller: PeerID) -> None:
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
        async for reply in outgoing(snapshot.header(to), snapshot.data, offset, Rate(None)):
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
