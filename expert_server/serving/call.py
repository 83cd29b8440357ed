"""One call while it is answered: its work to the runtime, and the answers to the caller as they become ready.

The parts of a call, one for each expert, as its header describes them.

Shape suffixes: S = segments, R = rows.

A call's requests, message by message, and the payload in them, tensor by tensor.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TypeAlias

import grpc
import numpy as np
import torch

from dht.manifest import Manifest, parse_uid
from dht.uid import UID
from expert_server.serving.batching import Direction, WorkItem
from expert_server.serving.compute import Result
from expert_server.serving.forward_cache import CachedForward
from expert_server.serving.runtime import Enqueued
from peer.codec import CHUNK_BYTES, MAX_CHUNK_BYTES, decode
from peer.errors import ExpertError, WireError
from peer.rates import RateLimit
from peer.rpc.calls import RequestReader, note_failure
from peer.wire import expert_pb2


@dataclass(frozen=True)
class Part:
    """One expert's part of a call, as its header describes it: valid but for the tensors."""

    uid: UID
    lengths: torch.Tensor
    """int64 [S]"""
    positions: torch.Tensor
    """int64 [R]"""
    kept: CachedForward | None = None
    """In backward: what the forward call left here."""

    @property
    def rows(self) -> int:
        return len(self.positions)


@dataclass(frozen=True)
class LostPart:
    """One expert's part of a backward call whose forward pass is kept no more."""

    uid: UID
    rows: int


def make_part(expert: expert_pb2.ExpertRows, manifest: Manifest) -> Part:
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
    rising[starts - 1] = True  # between two segments positions may fall
    if not rising.all():
        raise WireError(f"positions of expert {uid} do not rise within a segment")
    return Part(uid, torch.from_numpy(lengths), torch.from_numpy(positions))


def tensor_rows(expert: expert_pb2.ExpertRows, direction: Direction) -> int:
    """Rows of payload, inputs and gradients together."""
    if expert.kept_request_id:
        return expert.kept_rows
    return len(expert.positions) * (2 if direction == "backward" else 1)


Context = grpc.aio.ServicerContext[expert_pb2.CallRequest, expert_pb2.CallReply]

_SETTLE_S = 1.0
"""Longest that a call which has failed waits for a caller who does not read."""


@dataclass(frozen=True, slots=True)
class Done:
    """One expert's part, computed or failed."""

    index: int
    work: WorkItem
    future: "asyncio.Future[Result]"


Reply: TypeAlias = tuple[expert_pb2.ExpertReply, memoryview]
"""One expert's answer, and its tensor."""


class Call:
    """One call while it is answered: what its header says, what is computed for it, and what is to be written."""

    def __init__(
        self,
        direction: Direction,
        header: expert_pb2.CallHeader,
        deadline: float,
        context: Context,
        caller: str,
        uploads: RateLimit,
    ) -> None:
        self.header = header
        self.caller = caller
        self._direction = direction
        self._deadline = deadline
        self._context = context
        self._uploads = uploads
        self._computing: dict[int, Enqueued] = {}
        """By the index of their parts."""
        self._came: list[Done | Reply] = []
        self._has_come = asyncio.Event()
        self._ready: deque[tuple[expert_pb2.ExpertReply | None, memoryview]] = deque()
        """What is to be written: answers with their tensors, and first maybe the rest of a tensor."""
        self._sending: asyncio.Future[None] | None = None

    def begin(self, index: int, work: WorkItem, enqueued: Enqueued) -> None:
        self._computing[index] = enqueued
        enqueued.future.add_done_callback(lambda future: self._end(Done(index, work, future)))

    def refuse(self, index: int, error: ExpertError) -> None:
        self._note(error_reply(index, error))

    def cancel(self) -> None:
        """Nobody waits any more for what is not computed yet."""
        for enqueued in self._computing.values():
            enqueued.cancel()

    async def come(self) -> list[Done | Reply]:
        """Waits for the next answers."""
        await self._has_come.wait()
        self._has_come.clear()
        came, self._came = self._came, []
        return came

    def put(self, reply: expert_pb2.ExpertReply, data: memoryview) -> None:
        """Takes an answer to be written."""
        self._ready.append((reply, data))

    async def write_ready(self) -> None:
        while self._ready:
            message = self._next_message()
            await self._uploads.take(len(message.chunk))
            await self._send(message)

    def _end(self, done: Done) -> None:
        self._computing.pop(done.index, None)
        if not done.future.cancelled():
            done.future.exception()  # seen, also when the call ends before it is answered
            self._note(done)

    def _note(self, answer: Done | Reply) -> None:
        self._came.append(answer)
        self._has_come.set()

    def work(self, part: Part, inputs: bytearray | None, gradients: bytearray | None) -> WorkItem:
        """Raises WireError when a number is not finite."""
        if inputs is not None:
            inputs_RD = self._tensor(inputs)
        else:
            assert part.kept is not None, "inputs come in the payload or were kept"
            inputs_RD = part.kept.inputs
        return WorkItem(
            uid=part.uid,
            direction=self._direction,
            inputs=inputs_RD,
            gradients=None if gradients is None else self._tensor(gradients),
            lengths=part.lengths,
            positions=part.positions,
            deadline=self._deadline,
            caller=self.caller,
            keep=self.header.keep and self._direction == "forward",
            graph=part.kept.graph if part.kept else None,
        )

    def _next_message(self) -> expert_pb2.CallReply:
        experts: list[expert_pb2.ExpertReply] = []
        pieces: list[memoryview] = []
        room = CHUNK_BYTES
        while room and self._ready:
            reply, data = self._ready.popleft()
            if reply is not None:
                experts.append(reply)
            pieces.append(data[:room])
            if len(data) > room:
                self._ready.appendleft((None, data[room:]))
            room -= len(pieces[-1])
        return expert_pb2.CallReply(experts=experts, chunk=b"".join(pieces))

    async def settle(self) -> None:
        """Waits for the message that was on its way when its answer was cancelled: before, gRPC takes no status."""
        if self._sending is not None:
            await asyncio.wait([self._sending], timeout=_SETTLE_S)

    async def _send(self, message: expert_pb2.CallReply) -> None:
        self._sending = asyncio.ensure_future(self._context.write(message))
        self._sending.add_done_callback(note_failure)
        await asyncio.shield(self._sending)

    def _tensor(self, data: bytearray) -> torch.Tensor:
        return torch.from_numpy(decode(data, self.header.width, self.header.codec))


def error_reply(index: int, error: ExpertError) -> Reply:
    status: int = error.status.value[0]
    reply = expert_pb2.ExpertReply(
        index=index, status=status, message=str(error), retry_after_s=error.retry_after_s
    )
    return reply, memoryview(b"")


Requests = AsyncIterator[expert_pb2.CallRequest]


class Reader:
    """Reads the messages of one call."""

    def __init__(self, requests: Requests, downloads: RateLimit) -> None:
        self._messages = RequestReader(requests)
        self._downloads = downloads

    async def header(self) -> tuple[expert_pb2.CallHeader, bytes]:
        """The header, and the payload's first bytes."""
        request = await self.next()
        if request is None or not request.HasField("header"):
            raise WireError("a call must begin with its header")
        return request.header, _checked(request.chunk, least=0)

    async def next(self) -> expert_pb2.CallRequest | None:
        """None at the end."""
        request = await self._messages.next()
        if request is not None:
            await self._downloads.take(len(request.chunk))  # gRPC reads on only then: the sender slows down
        return request


def _checked(chunk: bytes, least: int) -> bytes:
    if not least <= len(chunk) <= MAX_CHUNK_BYTES:
        raise WireError(f"after the header come chunks of 1 to {MAX_CHUNK_BYTES} bytes")
    return chunk


class Payload:
    """Reads exact numbers of bytes from a stream of chunks. Never holds more than was asked for and one chunk."""

    def __init__(self, reader: Reader, first: bytes) -> None:
        self._reader = reader
        self._chunk = memoryview(first)

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
        if self._chunk or await self._reader.next() is not None:
            raise WireError("the payload is longer than the header says")

    async def _next_chunk(self, missing: int) -> bytes:
        request = await self._reader.next()
        if request is None:
            raise WireError(f"the payload ended {missing} bytes before what the header says")
        return _checked(b"" if request.HasField("header") else request.chunk, least=1)
