"""One call while it is answered: its header, the payload it brings, and the replies that go back.

A call has a part for each expert. Parts are computed while the payload of later ones is still arriving, and each is
answered as soon as it is ready.

Shape suffixes: S = segments, R = rows, D = width.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import TypeAlias, TypeVar

import grpc
import numpy as np
import torch
from grpc import StatusCode

from dht.manifest import Manifest, parse_uid
from dht.uid import UID
from expert_server.experts.graphs import Rows
from expert_server.serving.batching import Direction, Entry, Result, WorkItem
from expert_server.serving.forward_cache import CachedForward, CacheKey, ForwardCache
from peer.codec import CHUNK_BYTES, MAX_CHUNK_BYTES, decode, encode, encoded_bytes
from peer.errors import ExpertError, WireError
from peer.rates import Bandwidth, Pace, RateLimit
from peer.rpc.calls import note_failure, require_same_swarm
from peer.rpc.channels import SERVER_WINDOW_BYTES
from peer.wire import expert_pb2

MAX_EXPERTS_IN_CALL = 4096
OPEN_CALL_BYTES = SERVER_WINDOW_BYTES + MAX_CHUNK_BYTES
"""Memory of a call whatever its header says: what gRPC receives ahead of its reader, and the chunk that was read."""
_TENSORS_OF_ROW = 2
"""Its inputs or gradients as they came, and what is answered."""
_ROW_BYTES = 24
"""Memory of a row's position, and of a segment's length: parsed, and as int64."""
_LEAST_BYTES_PER_S = 16_384
"""The slowest payload that is waited for: an upload of 1 Mbit/s that eight calls share."""
_LOOP_NUMBERS = 2**18
"""Tensors of so many numbers are converted on the loop: int4 takes 4 ms for them. Larger ones are on another thread."""
_GRACE_S = 5.0
"""How long a payload may stall."""
_SETTLE_S = 1.0
"""How long a call that has failed waits at most for a caller that does not read."""

T = TypeVar("T")

Requests: TypeAlias = AsyncIterator[expert_pb2.CallRequest]
Context = grpc.aio.ServicerContext[expert_pb2.CallRequest, expert_pb2.CallReply]
Reply: TypeAlias = tuple[expert_pb2.ExpertReply, memoryview]
"""One part's reply, and its tensor."""
Keep: TypeAlias = Callable[[CacheKey, WorkItem, Result], bool]
"""Keeps a forward pass for its backward call. Returns whether it was kept."""


@dataclass(frozen=True)
class Part:
    """One expert's part of a call, as its header describes it: everything about its rows but the tensors."""

    index: int
    """Its place in the call."""
    uid: UID
    row_count: int
    lengths: torch.Tensor
    """int64 [S]"""
    positions: torch.Tensor
    """int64 [R]"""
    cached: CachedForward | None = None
    """In backward: the forward pass that was kept here."""
    lost: bool = False
    """In backward: the forward pass was kept here and is gone. Nothing but the row count is known of the rows."""


class HeaderParser:
    """Reads the headers of calls to one node."""

    def __init__(self, swarm_id: str, manifest: Manifest, max_call_bytes: int, cache: ForwardCache) -> None:
        """`max_call_bytes`: of the payload as float32."""
        self._swarm_id = swarm_id
        self._manifest = manifest
        self._max_call_bytes = max_call_bytes
        self._cache = cache

    def parse(self, header: expert_pb2.CallHeader, direction: Direction, caller: str) -> list[Part]:
        """The call's parts, once every number in the header is known to be right. Takes cached forward passes.

        Raises WireError or ExpertError.
        """
        require_same_swarm(self._swarm_id, header.protocol_version, header.swarm_id)
        if len(header.request_id) != 16:
            raise WireError(f"a request id of {len(header.request_id)} bytes; expected 16")
        if header.width != self._manifest.width:
            raise WireError(f"width {header.width}; this swarm's experts have {self._manifest.width}")
        if not 1 <= len(header.experts) <= MAX_EXPERTS_IN_CALL:
            raise WireError(f"{len(header.experts)} experts in one call; expected 1 to {MAX_EXPERTS_IN_CALL}")
        rows = sum(_tensor_rows(expert, direction) for expert in header.experts)
        encoded_bytes(rows, header.width, header.codec)  # refuses an unknown codec
        size = 4 * rows * header.width
        if size > self._max_call_bytes:
            raise ExpertError(
                StatusCode.RESOURCE_EXHAUSTED,
                f"a call of {size} bytes; at most {self._max_call_bytes}: send fewer rows at once",
            )
        return [
            self._parse_part(index, expert, direction, caller) for index, expert in enumerate(header.experts)
        ]

    def _parse_part(
        self, index: int, expert: expert_pb2.ExpertRows, direction: Direction, caller: str
    ) -> Part:
        if not expert.kept_request_id:
            return parse_part(index, expert, self._manifest)
        if direction == "forward" or expert.segment_lengths or expert.positions:
            raise WireError("a kept forward pass is named in backward calls, without segments and positions")
        uid = parse_uid(expert.uid, self._manifest)
        cached = self._cache.take((caller, expert.kept_request_id, expert.kept_index))
        if cached is None:
            nothing = torch.empty(0, dtype=torch.int64)
            return Part(index, uid, expert.kept_rows, nothing, nothing, lost=True)
        rows = cached.rows
        if (cached.uid, len(rows)) != (uid, expert.kept_rows):
            raise WireError(f"the kept forward pass is of {len(rows)} rows for expert {cached.uid}")
        return Part(index, uid, len(rows), rows.lengths, rows.positions, cached)


def parse_part(index: int, expert: expert_pb2.ExpertRows, manifest: Manifest) -> Part:
    """Checks one expert's segments and positions. Raises WireError."""
    uid = parse_uid(expert.uid, manifest)
    lengths = np.array(expert.segment_lengths, dtype=np.int64)
    positions = np.array(expert.positions, dtype=np.int64)
    if not len(positions):
        raise WireError(f"no rows for expert {uid}")
    if not len(lengths) or lengths.min() < 1 or lengths.sum() != len(positions):
        raise WireError(f"segments of {lengths.sum()} rows for the {len(positions)} rows of expert {uid}")
    if positions.max() >= manifest.model.context:
        raise WireError(
            f"position {positions.max()}; this swarm's context is {manifest.model.context} tokens"
        )
    starts = np.cumsum(lengths)[:-1]
    rising = np.diff(positions) > 0
    rising[starts - 1] = True  # from one segment to the next, positions may fall
    if not rising.all():
        raise WireError(f"positions of expert {uid} do not rise within a segment")
    return Part(index, uid, len(positions), torch.from_numpy(lengths), torch.from_numpy(positions))


def call_bytes(header: expert_pb2.CallHeader, direction: Direction) -> int:
    """Memory that a call needs for its header, its payload and its answers."""
    rows = sum(_tensor_rows(expert, direction) for expert in header.experts)
    described = sum(len(expert.positions) + len(expert.segment_lengths) for expert in header.experts)
    return _TENSORS_OF_ROW * 4 * rows * header.width + _ROW_BYTES * described


def smallest_call_memory(manifest: Manifest) -> int:
    """What a node must have, to take a backward call of one whole sequence."""
    return OPEN_CALL_BYTES + manifest.model.context * (
        2 * _TENSORS_OF_ROW * 4 * manifest.width + 2 * _ROW_BYTES
    )


def _tensor_rows(expert: expert_pb2.ExpertRows, direction: Direction) -> int:
    """Rows in the payload, of inputs and gradients together."""
    if expert.kept_request_id:
        return expert.kept_rows
    return len(expert.positions) * (2 if direction == "backward" else 1)


class Call:
    """One call while it is answered. As a context manager, it writes replies as they become ready.

    `read` and `begin` each part in order, then `finish`.
    """

    def __init__(
        self,
        header: expert_pb2.CallHeader,
        parts: list[Part],
        direction: Direction,
        requests: "RequestStream",
        replies: "ReplyStream",
        caller: str,
        keep: Keep,
    ) -> None:
        self.header = header
        self.parts = parts
        self._direction = direction
        self._requests = requests
        self._replies = replies
        self._caller = caller
        self._keep = keep
        self._computing: dict[int, Entry] = {}
        """By the index of their parts."""
        self._done: list[tuple[Part, Entry | ExpertError]] = []
        """Parts that were computed or refused, and have no reply yet."""
        self._is_done = asyncio.Event()
        self._writing: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls,
        direction: Direction,
        requests: Requests,
        context: Context,
        caller: str,
        parser: HeaderParser,
        traffic: Bandwidth,
        keep: Keep,
    ) -> "Call":
        """Reads the header. Raises WireError or ExpertError when it is wrong, and TimeoutError if it does not come."""
        stream = RequestStream(requests, traffic.down)
        header = await stream.header()
        parts = parser.parse(header, direction, caller)
        return cls(header, parts, direction, stream, ReplyStream(context, traffic.up), caller, keep)

    @property
    def bytes(self) -> int:
        """Memory that it needs beside what every call does."""
        return call_bytes(self.header, self._direction)

    async def __aenter__(self) -> None:
        self._writing = asyncio.create_task(self._write_replies(), name="write replies")

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._writing is not None, "the call was entered"
        for entry in list(self._computing.values()):
            entry.cancel()  # nobody waits any more for what is not computed yet
        self._writing.cancel()
        await asyncio.gather(self._writing, return_exceptions=True)
        await self._replies.settle()

    async def read(self, part: Part) -> Rows:
        """Reads the rows of the next part.

        Raises ExpertError (FAILED_PRECONDITION) when the forward pass is kept no more, WireError when the payload is
        too short or a number in it is not finite, and TimeoutError when it stalls.
        """
        size = encoded_bytes(part.row_count, self.header.width, self.header.codec)
        sends_inputs = part.cached is None and not part.lost
        inputs = await self._requests.read(size) if sends_inputs else None
        gradients = await self._requests.read(size) if self._direction == "backward" else None
        if part.lost:
            message = f"the forward pass of expert {part.uid} is kept no more: send its inputs"
            raise ExpertError(StatusCode.FAILED_PRECONDITION, message)
        if part.cached is not None:
            rows = part.cached.rows
        else:
            assert inputs is not None, "inputs that are not cached come in the payload"
            rows = Rows(await self._decoded(inputs, part), part.lengths, part.positions)
        return rows if gradients is None else replace(rows, gradients=await self._decoded(gradients, part))

    def begin(self, part: Part, entry: Entry) -> None:
        """Answers a part when its work is done."""
        self._computing[part.index] = entry
        entry.future.add_done_callback(lambda _: self._end(part, entry))

    def refuse(self, part: Part, error: ExpertError) -> None:
        """Answers a part with an error."""
        self._note(part, error)

    async def finish(self) -> None:
        """Waits until every part is answered. Raises WireError when the payload is longer than the header says."""
        assert self._writing is not None, "the call was entered"
        await self._requests.expect_end()
        await self._writing

    def _end(self, part: Part, entry: Entry) -> None:
        self._computing.pop(part.index, None)
        if not entry.future.cancelled():
            entry.future.exception()  # retrieved even if the call ends before it is answered
            self._note(part, entry)

    def _note(self, part: Part, outcome: Entry | ExpertError) -> None:
        self._done.append((part, outcome))
        self._is_done.set()

    async def _write_replies(self) -> None:
        """Parts that are ready together share a message."""
        unanswered = len(self.parts)
        while unanswered:
            await self._is_done.wait()
            self._is_done.clear()
            done, self._done = self._done, []
            unanswered -= len(done)
            await self._replies.write([await self._reply(part, outcome) for part, outcome in done])

    async def _reply(self, part: Part, outcome: Entry | ExpertError) -> Reply:
        if isinstance(outcome, ExpertError):
            return _error_reply(part, outcome)
        try:
            result = outcome.future.result()
        except ExpertError as error:
            return _error_reply(part, error)
        seed = b"answer %b %d" % (self.header.request_id, part.index)
        is_gradient = self._direction == "backward"
        convert = partial(encode, result.tensor.numpy(), self.header.codec, seed if is_gradient else None)
        data = await self._converted(convert, part)
        key = (self._caller, self.header.request_id, part.index)
        reply = expert_pb2.ExpertReply(
            index=part.index,
            update_count=result.update_count,
            payload_bytes=len(data),
            kept=outcome.work.keep and self._keep(key, outcome.work, result),
            skipped_update=result.skipped_update,
            rolled_back=result.rolled_back,
        )
        return reply, data

    async def _decoded(self, data: bytearray, part: Part) -> torch.Tensor:
        convert = partial(decode, data, self.header.width, self.header.codec)
        return torch.from_numpy(await self._converted(convert, part))

    async def _converted(self, convert: Callable[[], T], part: Part) -> T:
        is_large = part.row_count * self.header.width > _LOOP_NUMBERS
        return await asyncio.to_thread(convert) if is_large else convert()


def _error_reply(part: Part, error: ExpertError) -> Reply:
    status: int = error.status.value[0]
    reply = expert_pb2.ExpertReply(
        index=part.index, status=status, message=str(error), retry_after_s=error.retry_after_s
    )
    return reply, memoryview(b"")


class RequestStream:
    """Reads the messages of one call: its header, then exact numbers of payload bytes.

    It never holds more than was asked for and one chunk, and gives up a caller that stalls or trickles.
    """

    def __init__(self, requests: Requests, downloads: RateLimit) -> None:
        self._messages = requests
        self._downloads = downloads
        self._pace = Pace(_LEAST_BYTES_PER_S, _GRACE_S, "the payload")
        self._chunk = memoryview(b"")

    async def header(self) -> expert_pb2.CallHeader:
        """The first message. It may bring the first payload bytes, too."""
        request = await self._next(CHUNK_BYTES)
        if request is None or not request.HasField("header"):
            raise WireError("a call must begin with its header")
        self._chunk = memoryview(_checked(request.chunk, least=0))
        return request.header

    async def read(self, size: int) -> bytearray:
        """The next `size` bytes. Raises WireError when the stream ends before."""
        data = bytearray()
        while len(data) < size:
            if not self._chunk:
                self._chunk = memoryview(await self._next_chunk(size - len(data)))
            missing = size - len(data)
            data += self._chunk[:missing]
            self._chunk = self._chunk[missing:]
        return data

    async def expect_end(self) -> None:
        """Raises WireError when there is more than the header said."""
        if self._chunk or await self._next(0) is not None:
            raise WireError("the payload is longer than the header says")

    async def _next_chunk(self, missing: int) -> bytes:
        request = await self._next(min(missing, CHUNK_BYTES))
        if request is None:
            raise WireError(f"the payload ended {missing} bytes before what the header says")
        return _checked(b"" if request.HasField("header") else request.chunk, least=1)

    async def _next(self, expected: int) -> expert_pb2.CallRequest | None:
        """None at the end. `expected`: how many bytes of payload the message may bring."""
        try:
            request = await self._pace.wait(anext(self._messages, None), expected, _payload_bytes)
        except ExpertError:  # the server itself waits for no message for ever
            raise TimeoutError(self._pace.late) from None
        if request is not None:
            # gRPC reads on only after this wait, so the sender slows down
            await self._downloads.take(len(request.chunk))
        return request


def _payload_bytes(request: expert_pb2.CallRequest | None) -> int:
    return 0 if request is None else len(request.chunk)


def _checked(chunk: bytes, least: int) -> bytes:
    if not least <= len(chunk) <= MAX_CHUNK_BYTES:
        raise WireError(f"after the header come chunks of 1 to {MAX_CHUNK_BYTES} bytes")
    return chunk


class ReplyStream:
    """Writes replies and their tensors, packed into messages of at most CHUNK_BYTES of payload."""

    def __init__(self, context: Context, uploads: RateLimit) -> None:
        self._context = context
        self._uploads = uploads
        self._unsent: deque[tuple[expert_pb2.ExpertReply | None, memoryview]] = deque()
        """Replies with their tensors; the first may be the rest of a tensor, without its reply."""
        self._sending: asyncio.Future[None] | None = None

    async def write(self, replies: list[Reply]) -> None:
        self._unsent.extend(replies)
        while self._unsent:
            message = self._next_message()
            await self._uploads.take(len(message.chunk))
            self._sending = asyncio.ensure_future(self._context.write(message))
            self._sending.add_done_callback(note_failure)
            await asyncio.shield(self._sending)

    async def settle(self) -> None:
        """Waits for a message still under way when its writer was cancelled: until then gRPC takes no status."""
        if self._sending is not None:
            await asyncio.wait([self._sending], timeout=_SETTLE_S)

    def _next_message(self) -> expert_pb2.CallReply:
        experts: list[expert_pb2.ExpertReply] = []
        pieces: list[memoryview] = []
        room = CHUNK_BYTES
        while room and self._unsent:
            reply, data = self._unsent.popleft()
            if reply is not None:
                experts.append(reply)
            pieces.append(data[:room])
            if len(data) > room:
                self._unsent.appendleft((None, data[room:]))
            room -= len(pieces[-1])
        return expert_pb2.CallReply(experts=experts, chunk=b"".join(pieces))
