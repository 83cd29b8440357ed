"""Calls to nodes over gRPC: a header and the rows of a node's experts go out, and each expert's answer comes in as soon
as it is ready.

`ReplyAssembler` puts the answers of one call together and does no I/O. `SessionWarmer` opens sessions with nodes before
a trainer calls them, so that a first call costs no more than any other.
"""

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TypeAlias

import grpc
from grpc import StatusCode

from dht.announcements import NodeInfo
from dht.directory import Directory
from peer import PROTOCOL_VERSION
from peer.codec import MAX_CHUNK_BYTES, chunks, decode, encode, encoded_bytes
from peer.errors import ExpertError, UnreachableError, WireError
from peer.formatting import printable
from peer.identity import PeerID
from peer.rpc.calls import make_stub, retry_after_s
from peer.rpc.channels import ChannelPool
from peer.rpc.sessions import Metadata, SessionClient
from peer.wire import expert_pb2, expert_pb2_grpc
from trainer_client.dispatch.batches import Answer, KeptForward, NodeCall, Request
from trainer_client.dispatch.calls import DispatchMetrics

logger = logging.getLogger(__name__)

_STATUS = {status.value[0]: status for status in StatusCode}


class ReplyAssembler:
    """Puts the answers to one call together, message by message. Does no I/O."""

    def __init__(self, call: NodeCall, request_id: bytes, width: int, codec: "expert_pb2.Codec") -> None:
        """`request_id`: under which the call was sent."""
        self._call = call
        self._request_id = request_id
        self._width = width
        self._codec = codec
        self._waiting = set(range(len(call.requests)))
        self._due: deque[expert_pb2.ExpertReply] = deque()
        """Answers whose tensors have not come in whole."""
        self._data = bytearray()
        """Of the first that is due."""
        self._missing = 0
        """Bytes that all answers still lack."""

    @property
    def complete(self) -> bool:
        """Whether every expert has answered."""
        return not (self._waiting or self._due)

    def take(self, reply: expert_pb2.CallReply) -> Iterator[Answer]:
        """The answers that are whole with this message. Raises WireError when it is not what must come next."""
        chunk = memoryview(reply.chunk)
        if not (reply.experts or chunk) or len(chunk) > MAX_CHUNK_BYTES:
            raise WireError(f"a message of {len(reply.experts)} answers and {len(chunk)} bytes")
        for expert in reply.experts:
            self._expect(expert)
        if len(chunk) > self._missing:
            raise WireError(f"{len(chunk) - self._missing} bytes more than the answers' tensors have")
        self._missing -= len(chunk)
        while self._due:
            expert = self._due[0]
            missing = expert.payload_bytes - len(self._data)
            self._data += chunk[:missing]
            chunk = chunk[missing:]
            if len(self._data) < expert.payload_bytes:
                return
            self._due.popleft()
            yield self._answer(expert, self._data)
            self._data = bytearray()

    def _expect(self, expert: expert_pb2.ExpertReply) -> None:
        if expert.index not in self._waiting:
            raise WireError(f"an answer for part {expert.index}, which is not waited for")
        size = 0
        if not expert.status:
            rows = len(self._call.requests[expert.index].inputs)
            size = encoded_bytes(rows, self._width, self._codec)
        if expert.payload_bytes != size:
            raise WireError(f"a tensor of {expert.payload_bytes} bytes; expected {size}")
        self._waiting.remove(expert.index)
        self._due.append(expert)
        self._missing += size

    def _answer(self, expert: expert_pb2.ExpertReply, data: bytearray) -> Answer:
        batch, peer_id = self._call.requests[expert.index].batch, self._call.node.peer_id
        if expert.status:
            status = _STATUS.get(expert.status, StatusCode.UNKNOWN)
            error = ExpertError(status, printable(expert.message), max(0.0, expert.retry_after_s))
            return Answer(batch, peer_id, None, error)
        return Answer(
            batch,
            peer_id,
            decode(data, self._width, self._codec),
            update_count=expert.update_count,
            kept=KeptForward(self._request_id, expert.index) if expert.kept else None,
            skipped_update=expert.skipped_update,
            rolled_back=expert.rolled_back,
        )


Stream: TypeAlias = "grpc.aio.StreamStreamCall[expert_pb2.CallRequest, expert_pb2.CallReply]"

_BROKE_OFF = "the call broke off"
_REPEAT_AFTER_S = 0.2
"""Before a backward call is made once more."""
_BUSY_S = 1.0
"""How long a node is left alone that refused a whole call as too much and gave no time."""


class GrpcCaller:
    """Calls nodes over pinned TLS channels."""

    def __init__(
        self,
        channels: ChannelPool,
        swarm_id: str,
        width: int,
        codec: "expert_pb2.Codec" = expert_pb2.CODEC_FP32,
        sessions: SessionClient | None = None,
        metrics: DispatchMetrics | None = None,
    ) -> None:
        """`sessions`: what shows nodes who calls; None for nodes that ask nobody."""
        self._channels = channels
        self._swarm_id = swarm_id
        self._width = width
        self._codec = codec
        self._sessions = sessions
        self.metrics = metrics or DispatchMetrics()

    async def call(self, call: NodeCall) -> AsyncIterator[Answer]:
        if call.deadline_s <= 0:
            raise ExpertError(StatusCode.DEADLINE_EXCEEDED, "no time was left for the call")
        ends = time.monotonic() + call.deadline_s
        kept = {request.batch: request for request in call.requests if request.kept}
        lost = []  # the node had to give up what it kept
        async with aclosing(self._call_or_repeat(call)) as answers:
            async for answer in answers:
                if answer.batch in kept and _is_lost(answer):
                    lost.append(replace(kept[answer.batch], kept=None))
                else:
                    yield answer
        if lost:
            left = max(ends - time.monotonic(), 0.001)
            async with aclosing(
                self._call_or_repeat(replace(call, requests=lost, deadline_s=left))
            ) as answers:
                async for answer in answers:
                    yield answer

    def is_silent(self, node: NodeInfo) -> bool:
        """Whether a connection to the node was tried and does not stand: it is being made, or was refused."""
        return self._channels.is_silent(node)

    async def _call_or_repeat(self, call: NodeCall) -> AsyncGenerator[Answer, None]:
        """A backward call that breaks off before any answer came is made once more, while there is time, with the same
        id: a node that has seen it applies nothing twice.
        """
        request_id, ends, answered = secrets.token_bytes(16), time.monotonic() + call.deadline_s, False
        try:
            async with aclosing(self._call_once(call, request_id, ends)) as answers:
                async for answer in answers:
                    answered = True
                    yield answer
            return
        except ExpertError as error:
            broke_off = error.status is StatusCode.UNAVAILABLE and not answered
            in_time = ends - time.monotonic() > call.deadline_s / 2 + _REPEAT_AFTER_S
            if call.direction == "forward" or not broke_off or not in_time:
                raise
            first = error
        await asyncio.sleep(_REPEAT_AFTER_S)
        self.metrics.repeated_calls.inc()
        try:
            async with aclosing(self._call_once(call, request_id, ends)) as answers:
                async for answer in answers:
                    yield answer
        except ExpertError as error:
            # where it was applied before, only its answer is lost
            raise (first if error.status is StatusCode.ALREADY_EXISTS else error) from error

    async def _call_once(
        self, call: NodeCall, request_id: bytes, ends: float
    ) -> AsyncGenerator[Answer, None]:
        node = call.node
        channel = await self._channel(node, max(ends - time.monotonic(), 0.001))
        for may_repeat in (True, False):
            session = await self._session(node, channel, ends - time.monotonic())
            left = max(ends - time.monotonic(), 0.001)
            try:
                async with aclosing(self._call_in(session, channel, call, request_id, left)) as answers:
                    async for answer in answers:
                        yield answer
                return
            except ExpertError as error:
                unknown = error.status is StatusCode.UNAUTHENTICATED
                if self._sessions is None or session is None or not (unknown or _is_hidden(error)):
                    raise
                self._sessions.ended(node.peer_id, session)
                if not (unknown and may_repeat):  # if it may, nothing was done yet
                    raise

    async def _channel(self, node: NodeInfo, deadline_s: float) -> grpc.aio.Channel:
        """Raises ExpertError."""
        try:
            async with asyncio.timeout(deadline_s):
                return await self._channels.reach(node)
        except UnreachableError as error:
            raise ExpertError(StatusCode.UNAVAILABLE, str(error)) from error
        except TimeoutError as error:
            raise ExpertError(
                StatusCode.DEADLINE_EXCEEDED, f"no way led to {node.peer_id} in time"
            ) from error

    async def _session(self, node: NodeInfo, channel: grpc.aio.Channel, deadline_s: float) -> Metadata | None:
        """Costs a round trip with each node once. Raises ExpertError."""
        if self._sessions is None:
            return None
        known = self._sessions.known(node.peer_id)
        return known or await self._sessions.metadata(node.peer_id, channel, deadline_s)

    async def _call_in(
        self,
        session: Metadata | None,
        channel: grpc.aio.Channel,
        call: NodeCall,
        request_id: bytes,
        deadline_s: float,
    ) -> AsyncGenerator[Answer, None]:
        stub = make_stub(expert_pb2_grpc.ExpertServiceStub, channel)
        method = stub.Forward if call.direction == "forward" else stub.Backward
        stream: Stream = method(timeout=deadline_s, metadata=session)
        try:
            await self._send(stream, request_id, call.requests)
            async with aclosing(self._answers(stream, request_id, call)) as answers:
                async for answer in answers:
                    yield answer
        except grpc.aio.AioRpcError as error:
            retry_s = retry_after_s(error.trailing_metadata(), _BUSY_S)
            raise _call_error(error.code(), error.details(), retry_s) from error
        except (asyncio.InvalidStateError, grpc.aio.InternalError) as error:
            # the call ended while we were still sending
            raise _call_error(await stream.code(), await stream.details()) from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # not we are cancelled, but the call: the pool closed its channel to make room for others
            raise ExpertError(StatusCode.UNAVAILABLE, "the channel was closed during the call") from error
        except WireError as error:
            raise ExpertError(
                StatusCode.DATA_LOSS, f"node {call.node.peer_id} answered wrongly: {error}"
            ) from error
        finally:
            stream.cancel()  # no effect on a call that has ended

    async def _send(self, stream: Stream, request_id: bytes, requests: Sequence[Request]) -> None:
        header = expert_pb2.CallHeader(
            protocol_version=PROTOCOL_VERSION,
            swarm_id=self._swarm_id,
            request_id=request_id,
            width=self._width,
            codec=self._codec,
            experts=map(_expert_rows, requests),
            keep=any(request.keep for request in requests),
        )
        payload = chunks(_encoded(requests, self._codec, request_id))
        first = next(payload, b"")
        await stream.write(expert_pb2.CallRequest(header=header, chunk=first))
        self.metrics.bytes.labels("sent").inc(len(first))
        for chunk in payload:
            await stream.write(expert_pb2.CallRequest(chunk=chunk))
            self.metrics.bytes.labels("sent").inc(len(chunk))
        self.metrics.fp32_bytes.labels("sent").inc(sum(map(_fp32_bytes, requests)))
        await stream.done_writing()

    async def _answers(
        self, stream: Stream, request_id: bytes, call: NodeCall
    ) -> AsyncGenerator[Answer, None]:
        """Raises WireError for whatever a correct node would not send. Reads to the stream's end: calls that are
        cancelled leak (grpc issue 43360).
        """
        replies = ReplyAssembler(call, request_id, self._width, self._codec)
        while not replies.complete:
            reply = await stream.read()
            if not isinstance(reply, expert_pb2.CallReply):
                # the end, with status OK: any other was raised by read()
                raise WireError("the stream ended before all experts had answered")
            self.metrics.bytes.labels("received").inc(len(reply.chunk))
            for answer in replies.take(reply):
                if answer.tensor is not None:
                    self.metrics.fp32_bytes.labels("received").inc(answer.tensor.nbytes)
                yield answer
        if await stream.read() is not grpc.aio.EOF:
            raise WireError("more than all experts' answers")


def _encoded(
    requests: Sequence[Request], codec: "expert_pb2.Codec", request_id: bytes
) -> Iterator[memoryview]:
    """In the order of the payload. The same bytes when a call is repeated."""
    for index, request in enumerate(requests):
        if not request.kept:
            yield encode(request.inputs, codec)
        if request.gradients is not None:
            yield encode(request.gradients, codec, seed=b"request %b %d" % (request_id, index))


def _fp32_bytes(request: Request) -> int:
    inputs = 0 if request.kept else request.inputs.nbytes
    return inputs + (0 if request.gradients is None else request.gradients.nbytes)


def _expert_rows(request: Request) -> expert_pb2.ExpertRows:
    batch = request.batch
    if request.kept is not None:
        return expert_pb2.ExpertRows(
            uid=str(batch.uid),
            kept_request_id=request.kept.request_id,
            kept_index=request.kept.index,
            kept_rows=len(batch.positions),
        )
    return expert_pb2.ExpertRows(
        uid=str(batch.uid), segment_lengths=batch.lengths.tolist(), positions=batch.positions.tolist()
    )


def _is_lost(answer: Answer) -> bool:
    return answer.error is not None and answer.error.status is StatusCode.FAILED_PRECONDITION


def _is_hidden(error: ExpertError) -> bool:
    """Whether the node's own status is not known: it may have been that the session has ended."""
    return str(error).startswith(_BROKE_OFF)


def _call_error(status: StatusCode, details: str | None, retry_s: float = _BUSY_S) -> ExpertError:
    """Why a call failed as a whole."""
    said = printable(details or "")
    if status is StatusCode.OK:
        return ExpertError(StatusCode.DATA_LOSS, "the node ended the call before it had all rows")
    if status is StatusCode.CANCELLED:
        return ExpertError(StatusCode.UNAVAILABLE, "the channel was closed during the call")
    if status is StatusCode.INTERNAL:
        # what grpc.aio makes of every status that comes while it writes a message
        return ExpertError(StatusCode.UNAVAILABLE, f"{_BROKE_OFF}: {said}")
    busy = status is StatusCode.RESOURCE_EXHAUSTED
    return ExpertError(status, said, retry_s if busy else 0.0)


_MOST = 64
"""Nodes that are known in advance; others are when they are first called."""
_AT_ONCE = 8
_DEADLINE_S = 10.0
_LOOK_EVERY_S = 1.0
_TRY_AGAIN_S = 60.0


class SessionWarmer:
    """`run` it as a task of the loop that owns the sessions."""

    def __init__(
        self, sessions: SessionClient, channels: ChannelPool, directory: Directory, clock: Callable[[], float]
    ) -> None:
        self._sessions = sessions
        self._channels = channels
        self._directory = directory
        self._clock = clock
        self._tried_at: dict[PeerID, float] = {}

    async def run(self) -> None:
        """For ever. Sessions that come to their end are renewed in time, too."""
        while True:
            async with asyncio.TaskGroup() as group:
                for node in self.due():
                    group.create_task(self._introduce(node))
            await asyncio.sleep(_LOOK_EVERY_S)

    def due(self) -> list[NodeInfo]:
        """The nodes to be introduced to now."""
        nodes = list(self._directory.view.nodes.values())[:_MOST]
        self._tried_at = {n.peer_id: t for n in nodes if (t := self._tried_at.get(n.peer_id)) is not None}
        now = self._clock()
        return [
            node
            for node in nodes
            if self._sessions.known(node.peer_id) is None
            and self._tried_at.get(node.peer_id, -_TRY_AGAIN_S) <= now - _TRY_AGAIN_S
        ][:_AT_ONCE]

    async def _introduce(self, node: NodeInfo) -> None:
        self._tried_at[node.peer_id] = self._clock()
        try:
            async with asyncio.timeout(_DEADLINE_S):
                channel = await self._channels.reach(node)
                await self._sessions.metadata(node.peer_id, channel, _DEADLINE_S)
        except (ExpertError, UnreachableError, TimeoutError) as error:
            logger.debug("node %s opens no session: %s", node.peer_id, error)
