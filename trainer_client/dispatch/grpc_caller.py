"""Calls to nodes over gRPC: a header and a node's rows are sent, and answers to rows arrive as soon as they are ready.

`ReplyAssembler` puts together the replies to one call and does no I/O. `SessionWarmer` opens sessions with nodes in
advance, so that a first call takes no longer than any other.
"""

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import TypeAlias

import grpc
import numpy as np
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dht.announcements import NodeInfo
from peer import PROTOCOL_VERSION
from peer.codec import (
    MAX_CHUNK_BYTES,
    Booleans,
    Floats,
    Integers,
    chunks,
    decode_scalars,
    encode_scalars,
    encoded_bytes,
)
from peer.encoding import decode, encode
from peer.errors import ExpertError, UnreachableError, WireError
from peer.formatting import counted, printable
from peer.identity import PeerID
from peer.loop import TimeSlices
from peer.rpc.calls import make_stub, retry_after_s, while_open
from peer.rpc.channels import ChannelPool
from peer.rpc.sessions import Metadata, SessionClient
from peer.wire import expert_pb2, expert_pb2_grpc
from trainer_client.dispatch.batches import AnsweredRows, CallReply, ExpertReply, Kept, NodeBatch, NodeCall
from trainer_client.dispatch.calls import DispatchMetrics

logger: logging.Logger = logging.getLogger(__name__)

_STATUS = {status.value[0]: status for status in StatusCode}


class ReplyAssembler:
    """Puts together the replies to one call, message by message. Does no I/O."""

    def __init__(self, call: NodeCall, request_id: bytes, width: int, codec: "expert_pb2.Codec") -> None:
        """`request_id`: the id of the sent call."""
        self._batch = call.batch
        self._counts = call.counts
        self._backward = call.direction == "backward"
        self._request_id = request_id
        self._width = width
        self._codec = codec
        self._waiting = set(range(len(self._batch.uids)))
        self._computed = np.zeros(len(self._batch.uids), dtype=np.bool_)
        """The experts that may be in answers."""
        self._unanswered = np.ones(len(self._batch.rows), dtype=np.bool_)
        self._due: _Due | None = None
        """Rows whose tensor has not arrived completely."""
        self._data = bytearray()
        """The part of that tensor that has arrived."""
        self._kept = False

    @property
    def complete(self) -> bool:
        """Whether every expert has replied, and everything that was announced has arrived."""
        return not self._waiting and self._due is None

    def end(self) -> None:
        """Raises WireError if a correct node would have answered more. All rows of an expert that has computed must be
        answered, even if the expert is not in every answer. In backward, a node that has kept the call leaves out rows
        that it did not answer in forward, so only rows that count are required.
        """
        if not self.complete:
            raise WireError("the stream ended before all experts had answered")
        computed = self._batch.asked & self._computed[self._batch.experts]
        if self._counts is not None:
            computed &= self._counts
        lacking = self._unanswered & computed.any(axis=1)
        if lacking.any():
            raise WireError(
                f"it did not answer {counted(int(lacking.sum()), 'row')} that experts have computed"
            )

    def take(self, reply: expert_pb2.CallReply) -> Iterator[CallReply]:
        """The replies that this message completes. Raises WireError if the message can't follow the ones before it.

        `Kept` comes before the last rows, so whoever has all rows also knows whether the node keeps them.
        """
        chunk = memoryview(reply.chunk)
        is_empty = not (reply.experts or reply.rows or chunk or reply.kept)
        if is_empty or self._kept or len(chunk) > MAX_CHUNK_BYTES:
            what = f"{len(reply.experts)} experts, {len(reply.rows)} blocks of rows and {len(chunk)} bytes"
            raise WireError(f"a message of {what} is not expected now")
        for expert in reply.experts:
            yield self._reply_of(expert)
        blocks, last = deque(reply.rows), list[AnsweredRows]()
        while self._due is not None or blocks:
            due = self._due = self._due or self._expected(blocks.popleft())
            missing = due.payload_bytes - len(self._data)
            self._data += chunk[:missing]
            chunk = chunk[missing:]
            if len(self._data) < due.payload_bytes:
                break
            tensor = decode(self._data, self._width, self._codec)
            self._due, self._data = None, bytearray()
            yield from last
            last = [AnsweredRows(self._batch, due.places, due.answered, tensor, due.products)]
        self._kept = reply.kept and not self._backward and self.complete and not blocks
        if self._kept:
            yield Kept(self._batch, self._request_id)
        yield from last
        if blocks:
            raise WireError("rows were announced before the tensor of earlier rows had arrived")
        if chunk:
            raise WireError(f"the chunk is {len(chunk)} bytes longer than the announced tensors")
        if reply.kept and not self._kept:
            raise WireError("it confirmed too early that it has kept the call")

    def _reply_of(self, expert: expert_pb2.ExpertReply) -> ExpertReply:
        if expert.index not in self._waiting:
            raise WireError(f"a reply for expert {expert.index}, which is not waited for")
        self._waiting.remove(expert.index)
        uid = self._batch.uids[expert.index]
        if expert.status:
            status = _STATUS.get(expert.status, StatusCode.UNKNOWN)
            error = ExpertError(status, printable(expert.message), max(0.0, expert.retry_after_s))
            return ExpertReply(self._batch, uid, error)
        self._computed[expert.index] = True
        return ExpertReply(
            self._batch,
            uid,
            update_count=expert.update_count,
            version=expert.version,
            skipped_update=expert.skipped_update,
            rolled_back=expert.rolled_back,
        )

    def _expected(self, rows: expert_pb2.AnsweredRows) -> "_Due":
        places = _places(rows, len(self._unanswered))
        if not self._unanswered[places].all():
            raise WireError("it answered a row twice")
        answered = _answered(rows, self._batch, places)
        experts = self._batch.experts[places][answered]
        if not self._computed[experts].all():
            raise WireError("an answer names an expert that has not reported a result")
        size = encoded_bytes(len(places), self._width, self._codec)
        if rows.payload_bytes != size:
            raise WireError(f"it sent a tensor of {rows.payload_bytes} bytes instead of {size}")
        products = None
        if self._backward:
            products = _products(rows, self._batch, places, answered, self._codec)
            if self._counts is not None:  # another node has answered the others
                answered = answered & self._counts[places]
                products = np.where(answered, products, np.float32(0))
        elif rows.products:
            raise WireError("it sent products in a forward call")
        self._unanswered[places] = False
        return _Due(places, answered, products, size)


@dataclass(frozen=True)
class _Due:
    """Rows whose tensor was announced."""

    places: Integers
    answered: Booleans
    products: Floats | None
    payload_bytes: int


def _places(rows: expert_pb2.AnsweredRows, count: int) -> Integers:
    """The indices of these rows among the call's rows. Raises WireError."""
    if not rows.rows:
        return np.arange(count)
    if len(rows.rows) > count:
        raise WireError(f"it announced {len(rows.rows)} of {counted(count, 'row')}")
    places = np.array(rows.rows, dtype=np.int64)
    if places[-1] >= count or (np.diff(places) <= 0).any():
        raise WireError(f"the numbers of answered rows must rise, and be below {count}")
    return places


def _answered(rows: expert_pb2.AnsweredRows, batch: NodeBatch, places: Integers) -> Booleans:
    """The slots [m, K] whose experts are in the answers. Raises WireError."""
    asked = batch.asked[places]
    if not rows.masks:
        return asked
    if len(rows.masks) != len(places):
        raise WireError(f"it announced {counted(len(places), 'row')}, but {counted(len(rows.masks), 'mask')}")
    masks = np.array(rows.masks, dtype=np.uint64)[:, None]
    bits = np.uint64(1) << batch.ranks[places].astype(np.uint64)
    answered: Booleans = asked & (masks & bits != 0)
    if not masks.all() or (np.where(answered, bits, np.uint64(0)).sum(axis=1, keepdims=True) != masks).any():
        raise WireError("an answer names no expert, or one to which its row was not sent")
    return answered


def _products(
    rows: expert_pb2.AnsweredRows,
    batch: NodeBatch,
    places: Integers,
    answered: Booleans,
    codec: "expert_pb2.Codec",
) -> Floats:
    """[m, K], 0 where there is none. Raises WireError."""
    numbers = decode_scalars(rows.products, codec)
    if len(numbers) != np.count_nonzero(answered) or not np.isfinite(numbers).all():
        raise WireError(
            f"it sent {len(numbers)} products for {np.count_nonzero(answered)} experts, or some are not finite"
        )
    found, slots = np.nonzero(answered)
    # row by row, and within a row in the order of the header's experts
    order = np.lexsort((batch.ranks[places][answered], found))
    products = np.zeros(answered.shape, dtype=np.float32)
    products[found[order], slots[order]] = numbers
    return products


Stream: TypeAlias = "grpc.aio.StreamStreamCall[expert_pb2.CallRequest, expert_pb2.CallReply]"

_BROKE_OFF = "the call broke off"
_REPEAT_AFTER_S = 0.2
"""The pause before a backward call is repeated."""
_BUSY_S = 1.0
"""How long to avoid a node that is too busy for a call, if it does not say how long."""


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
        """`sessions`: show nodes who calls; None for nodes that don't require sessions."""
        self._channels = channels
        self._swarm_id = swarm_id
        self._width = width
        self._codec = codec
        self._sessions = sessions
        self.metrics: DispatchMetrics = metrics or DispatchMetrics()

    async def call(self, call: NodeCall) -> AsyncGenerator[CallReply, None]:
        """A call that fails before any reply is made again if its node could not keep the forward call, then in full;
        and once if it is a backward call that broke off, if there is time. It then has the same id: a node that has
        already seen it does not apply it twice.
        """
        if call.deadline_s <= 0:
            raise ExpertError(StatusCode.DEADLINE_EXCEEDED, "no time was left for the call")
        ends, request_id = time.monotonic() + call.deadline_s, secrets.token_bytes(16)
        broke_off: ExpertError | None = None
        while True:
            heard = False
            try:
                async with aclosing(self._call_once(call, request_id, ends)) as replies:
                    async for reply in replies:
                        heard = True
                        yield reply
                return
            except ExpertError as error:
                if heard:
                    raise
                failure, left_s = error, max(ends - time.monotonic(), 0.001)
            if call.kept is not None and failure.status is StatusCode.FAILED_PRECONDITION:
                call = replace(call.in_full(), deadline_s=left_s)
                request_id, broke_off = secrets.token_bytes(16), None
            elif broke_off is not None:
                # if it was applied before, only its answer is lost
                raise broke_off if failure.status is StatusCode.ALREADY_EXISTS else failure
            elif (
                call.direction == "backward"
                and failure.status is StatusCode.UNAVAILABLE
                and left_s > call.deadline_s / 2 + _REPEAT_AFTER_S
            ):
                broke_off = failure
                await asyncio.sleep(_REPEAT_AFTER_S)
                self.metrics.repeated_calls.inc()
            else:
                raise failure

    def is_silent(self, node: NodeInfo) -> bool:
        """Whether connecting to the node was tried and it is not connected: it is still connecting, or was refused."""
        return self._channels.is_silent(node)

    async def responds(self, node: NodeInfo, deadline_s: float) -> bool:
        """Whether the node answers a health check in time. Any answer will do, even a refusal."""
        ends = time.monotonic() + deadline_s
        session = None if self._sessions is None else self._sessions.known(node.peer_id)
        try:
            channel = await self._channel(node, deadline_s)
            stub = make_stub(health_pb2_grpc.HealthStub, channel)
            with while_open():
                left_s = max(ends - time.monotonic(), 0.001)
                await stub.Check(health_pb2.HealthCheckRequest(), timeout=left_s, metadata=session)
        except grpc.aio.AioRpcError as error:
            return error.code() not in (StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED)
        except ExpertError:
            return False
        return True

    async def _call_once(
        self, call: NodeCall, request_id: bytes, ends: float
    ) -> AsyncGenerator[CallReply, None]:
        node = call.node
        channel = await self._channel(node, max(ends - time.monotonic(), 0.001))
        for may_repeat in (True, False):
            session = await self._session(node, channel, ends - time.monotonic())
            left = max(ends - time.monotonic(), 0.001)
            try:
                async with aclosing(self._call_in(session, channel, call, request_id, left)) as replies:
                    async for reply in replies:
                        yield reply
                return
            except ExpertError as error:
                unknown = error.status is StatusCode.UNAUTHENTICATED
                if self._sessions is None or session is None or not (unknown or _is_hidden(error)):
                    raise
                self._sessions.ended(node.peer_id, session)
                if not (unknown and may_repeat):  # if the call may be repeated, nothing was done yet
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
                StatusCode.DEADLINE_EXCEEDED, f"{node.peer_id} could not be reached in time"
            ) from error

    async def _session(self, node: NodeInfo, channel: grpc.aio.Channel, deadline_s: float) -> Metadata | None:
        """Opens a session, which takes a round trip per node, once. Raises ExpertError."""
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
    ) -> AsyncGenerator[CallReply, None]:
        requests = self._requests(request_id, call)
        first, second = next(requests), next(requests, None)
        # a single message is sent together with what gRPC sends before and after it
        stub = make_stub(expert_pb2_grpc.ExpertServiceStub, channel, sends_one=second is None)
        method = stub.Forward if call.direction == "forward" else stub.Backward
        message = (first,) if second is None else ()
        with while_open():
            stream: Stream = method(*message, timeout=deadline_s, metadata=session)
            try:
                if second is not None:
                    for request in chain((first, second), requests):
                        await stream.write(request)
                    await stream.done_writing()
                async with aclosing(self._read(stream, request_id, call)) as replies:
                    async for reply in replies:
                        yield reply
            except grpc.aio.AioRpcError as error:
                retry_s = retry_after_s(error.trailing_metadata(), _BUSY_S)
                raise _call_error(error.code(), error.details(), retry_s) from error
            except (asyncio.InvalidStateError, grpc.aio.InternalError) as error:
                # the call ended while it was still being sent
                raise _call_error(await stream.code(), await stream.details()) from error
            except WireError as error:
                raise ExpertError(
                    StatusCode.DATA_LOSS, f"node {call.node.peer_id} answered wrongly: {error}"
                ) from error
            finally:
                stream.cancel()  # no effect on a call that has ended

    def _requests(self, request_id: bytes, call: NodeCall) -> Iterator[expert_pb2.CallRequest]:
        """The requests of a call, at least one."""
        header = expert_pb2.CallHeader(
            protocol_version=PROTOCOL_VERSION,
            swarm_id=self._swarm_id,
            request_id=request_id,
            width=self._width,
            codec=self._codec,
            keep=call.keep,
        )
        if call.kept is not None:
            header.kept_request_id, header.kept_rows = call.kept, len(call.batch.rows)
        else:
            header.segment_lengths.extend(call.batch.lengths.tolist())
            header.positions.extend(call.batch.positions.tolist())
            header.experts.extend(_expert_rows(call, self._codec))
            header.sequences.extend(call.numbers)
        tensors = [] if call.kept is not None else [encode(call.inputs, self._codec)]
        if call.gradients is not None:  # the same bytes if a call is repeated
            tensors.append(encode(call.gradients, self._codec, seed=b"request %b" % request_id))
        self.metrics.fp32_bytes.labels("sent").inc(len(tensors) * call.inputs.nbytes)
        payload = chunks(tensors)
        first = expert_pb2.CallRequest(header=header, chunk=next(payload, b""))
        for request in chain([first], (expert_pb2.CallRequest(chunk=chunk) for chunk in payload)):
            self.metrics.bytes.labels("sent").inc(len(request.chunk))
            yield request

    async def _read(
        self, stream: Stream, request_id: bytes, call: NodeCall
    ) -> AsyncGenerator[CallReply, None]:
        """Raises WireError for anything that a correct node would not send. Reads to the stream's end, because calls
        that are cancelled leak (grpc issue 43360).
        """
        assembler, slices = ReplyAssembler(call, request_id, self._width, self._codec), TimeSlices()
        while (message := await stream.read()) is not grpc.aio.EOF:
            assert isinstance(message, expert_pb2.CallReply)
            self.metrics.bytes.labels("received").inc(len(message.chunk))
            for reply in assembler.take(message):
                if isinstance(reply, AnsweredRows):
                    self.metrics.fp32_bytes.labels("received").inc(reply.tensor.nbytes)
                yield reply
                await slices.pause()  # a node may answer row by row
        # with status OK: any other was raised by read()
        assembler.end()


def _expert_rows(call: NodeCall, codec: "expert_pb2.Codec") -> Iterator[expert_pb2.ExpertRows]:
    count, segments = len(call.batch.rows), call.batch.segment_of_row
    for number, (uid, places, slots) in enumerate(call.batch.parts()):
        weights = call.weights[places, slots]
        held = None if call.held is None else call.held[np.unique(segments[places]), number]
        yield expert_pb2.ExpertRows(
            uid=str(uid),
            rows=None if len(places) == count else places.tolist(),
            weights=None if (weights == 1).all() else encode_scalars(weights, codec),
            held=None if held is None or not held.any() else held.tolist(),
            updates=call.updates[number] if call.updates else 0,
        )


def _is_hidden(error: ExpertError) -> bool:
    """Whether the node's own status is unknown. It may have been that the session has ended."""
    return str(error).startswith(_BROKE_OFF)


def _call_error(status: StatusCode, details: str | None, retry_s: float = _BUSY_S) -> ExpertError:
    """The error of a call that failed as a whole."""
    said = printable(details or "")
    if status is StatusCode.OK:
        return ExpertError(StatusCode.DATA_LOSS, "the node ended the call before it had all rows")
    if status is StatusCode.CANCELLED:
        return ExpertError(StatusCode.UNAVAILABLE, "the channel was closed during the call")
    if status is StatusCode.INTERNAL:
        # what grpc.aio reports for every status that arrives while it writes a message
        return ExpertError(StatusCode.UNAVAILABLE, f"{_BROKE_OFF}: {said}")
    busy = status is StatusCode.RESOURCE_EXHAUSTED
    return ExpertError(status, said, retry_s if busy else 0.0)


_MOST = 64
"""Nodes that get a session in advance. With others it is opened at the first call."""
_AT_ONCE = 8
_DEADLINE_S = 10.0
_LOOK_EVERY_S = 1.0
_TRY_AGAIN_S = 60.0


class SessionWarmer:
    """Opens sessions in advance. `run` it as a task of the loop that owns the sessions."""

    def __init__(
        self,
        sessions: SessionClient,
        channels: ChannelPool,
        nodes: Callable[[], Iterable[NodeInfo]],
    ) -> None:
        """`nodes`: returns the nodes that may be called."""
        self._sessions = sessions
        self._channels = channels
        self._known = nodes
        self._tried_at: dict[PeerID, float] = {}

    async def run(self) -> None:
        """Keeps sessions open until cancelled, and renews them before they expire."""
        while True:
            async with asyncio.TaskGroup() as group:
                for node in self.due():
                    group.create_task(self._introduce(node))
            await asyncio.sleep(_LOOK_EVERY_S)

    def due(self) -> list[NodeInfo]:
        """The nodes that need a session now."""
        nodes = list(islice(self._known(), _MOST))
        self._tried_at = {n.peer_id: t for n in nodes if (t := self._tried_at.get(n.peer_id)) is not None}
        now = time.monotonic()
        return [
            node
            for node in nodes
            if self._sessions.known(node.peer_id) is None
            and self._tried_at.get(node.peer_id, -_TRY_AGAIN_S) <= now - _TRY_AGAIN_S
        ][:_AT_ONCE]

    async def _introduce(self, node: NodeInfo) -> None:
        self._tried_at[node.peer_id] = time.monotonic()
        try:
            async with asyncio.timeout(_DEADLINE_S):
                channel = await self._channels.reach(node)
                await self._sessions.metadata(node.peer_id, channel, _DEADLINE_S)
        except (ExpertError, UnreachableError, TimeoutError) as error:
            logger.debug("node %s opens no session: %s", node.peer_id, error)
