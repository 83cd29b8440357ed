"""The gRPC edge of a node: reads calls, refuses what is wrong before it is queued, streams answers as they come."""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import grpc
import numpy as np
import torch
from grpc import StatusCode

from dht.manifest import Manifest
from dht.uid import UID
from expert_server.batching import Direction, Work
from expert_server.computing import Result
from expert_server.edge import parse_uid
from expert_server.kept import Kept, KeptForwards
from expert_server.reading import Payload, Reader, Requests
from expert_server.runtime import Runtime
from expert_server.seen import SeenRequests
from peer import PROTOCOL_VERSION, SOFTWARE_VERSION
from peer.codec import CHUNK_BYTES, decode, encode, encoded_bytes
from peer.edge import require_same_swarm
from peer.errors import ExpertError, WireError
from peer.messages import note_failure
from peer.rates import Rate, Traffic
from peer.sessions import Sessions
from peer.wire import expert_pb2, expert_pb2_grpc, session_pb2

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[expert_pb2.CallRequest, expert_pb2.CallReply]

MAX_EXPERTS_IN_CALL = 4096
_RIGHTS = {"forward": session_pb2.RIGHT_FORWARD, "backward": session_pb2.RIGHT_BACKWARD}
_SETTLE_S = 1.0
"""Longest that a call which has failed waits for a caller who does not read."""


@dataclass(frozen=True)
class EdgeLimits:
    """What one call may ask for."""

    max_call_bytes: int
    """Payload of one call, in bytes as fp32: what it takes in memory, however it is encoded."""
    max_call_s: float
    """Longest that a call may last, whatever deadline it came with, in seconds; also how long a forward is kept."""
    max_kept_bytes: int = 0
    """Memory for forward passes that are kept until their backward call comes."""
    remembered_requests: int = 65_536
    """Backward calls whose ids are remembered, so that none is applied twice."""


@dataclass(frozen=True)
class Part:
    """One expert's part of a call, as its header describes it: valid but for the tensors."""

    uid: UID
    lengths: torch.Tensor
    """int64 [S]"""
    positions: torch.Tensor
    """int64 [R]"""
    kept: Kept | None = None
    """In backward: what the forward call left here."""

    @property
    def rows(self) -> int:
        return len(self.positions)


@dataclass(frozen=True)
class LostPart:
    """One expert's part of a backward call whose forward pass is kept no more."""

    uid: UID
    rows: int


class ExpertServicer(expert_pb2_grpc.ExpertServiceServicer):  # type: ignore[misc]  # grpc's plugin writes no types
    """Serves the experts of one runtime to one swarm."""

    def __init__(
        self,
        runtime: Runtime,
        manifest: Manifest,
        swarm_id: str,
        limits: EdgeLimits,
        sessions: Sessions,
        traffic: Traffic | None = None,
    ) -> None:
        self.calls = 0
        """Forward and backward, since the start."""
        self.kept = KeptForwards(limits.max_kept_bytes)
        self._runtime = runtime
        self._manifest = manifest
        self._swarm_id = swarm_id
        self._limits = limits
        self._sessions = sessions
        self._seen = SeenRequests(limits.remembered_requests)
        self._traffic = traffic or Traffic()

    async def Forward(self, requests: Requests, context: Context) -> None:
        with _ending_with_the_call():
            await self._serve("forward", requests, context)

    async def Backward(self, requests: Requests, context: Context) -> None:
        with _ending_with_the_call():
            await self._serve("backward", requests, context)

    async def Info(
        self,
        request: expert_pb2.InfoRequest,
        context: grpc.aio.ServicerContext[expert_pb2.InfoRequest, expert_pb2.InfoReply],
    ) -> expert_pb2.InfoReply:
        try:
            require_same_swarm(self._swarm_id, request.protocol_version, request.swarm_id)
        except ExpertError as error:
            await context.abort(error.status, str(error))
        return expert_pb2.InfoReply(
            protocol_version=PROTOCOL_VERSION,
            software_version=SOFTWARE_VERSION,
            experts=[
                expert_pb2.HostedExpert(uid=str(uid), update_count=expert.update_count)
                for uid, expert in self._runtime.experts.items()
            ],
        )

    async def _serve(self, direction: Direction, requests: Requests, context: Context) -> None:
        self.calls += 1
        remaining = context.time_remaining()
        seconds = min(
            self._limits.max_call_s, remaining if remaining is not None else self._limits.max_call_s
        )
        try:
            caller = self._sessions.require(context, _RIGHTS[direction]).name
            async with asyncio.timeout(seconds):
                await self._answer_call(direction, requests, context, caller, time.monotonic() + seconds)
        except WireError as error:
            await context.abort(StatusCode.INVALID_ARGUMENT, str(error))
        except ExpertError as error:
            await context.abort(error.status, str(error))
        except TimeoutError:
            await context.abort(StatusCode.DEADLINE_EXCEEDED, f"the call lasted longer than {seconds:.1f} s")

    async def _answer_call(
        self, direction: Direction, requests: Requests, context: Context, caller: str, deadline: float
    ) -> None:
        reader = Reader(requests, self._traffic.down)
        header, chunk = await reader.header()
        require_same_swarm(self._swarm_id, header.protocol_version, header.swarm_id)
        parts = self._check_parts(header, direction, caller)
        if direction == "backward" and not self._seen.is_new(caller, header.request_id):
            raise ExpertError(StatusCode.ALREADY_EXISTS, "this request id was seen before: not applied again")

        call = _Call(direction, header, deadline, context, caller, self._traffic.up)
        payload = Payload(reader, chunk)
        answers: list[asyncio.Task[None]] = []
        try:
            for index, part in enumerate(parts):
                size = encoded_bytes(part.rows, header.width, header.codec)
                inputs = None if isinstance(part, LostPart) or part.kept else await payload.read(size)
                gradients = await payload.read(size) if direction == "backward" else None
                if isinstance(part, LostPart):
                    answers.append(asyncio.create_task(self._refuse_lost(call, index, part)))
                else:
                    work = call.work(part, inputs, gradients)
                    answers.append(asyncio.create_task(self._answer(call, index, work)))
            await payload.expect_end()
            for answer in answers:
                await answer
        finally:
            for answer in answers:
                answer.cancel()
            await asyncio.gather(*answers, return_exceptions=True)
            await call.settle()

    async def _answer(self, call: "_Call", index: int, work: Work) -> None:
        """Computes one expert's part, and writes its reply and payload without others in between."""
        try:
            result = await self._runtime.submit(work)
        except ExpertError as error:
            await call.write_error(index, error)
            return
        data = encode(result.tensor.numpy(), call.header.codec)
        kept = work.keep and self._keep(call, index, work, result)
        await call.write(
            expert_pb2.ExpertReply(
                index=index,
                update_count=result.update_count,
                payload_bytes=len(data),
                kept=kept,
                skipped_update=result.skipped_update,
                rolled_back=result.rolled_back,
            ),
            data,
        )

    async def _refuse_lost(self, call: "_Call", index: int, part: LostPart) -> None:
        message = f"the forward pass of expert {part.uid} is kept no more: send its inputs"
        await call.write_error(index, ExpertError(StatusCode.FAILED_PRECONDITION, message))

    def _keep(self, call: "_Call", index: int, work: Work, result: Result) -> bool:
        if work.uid not in self._runtime.experts:  # given up meanwhile
            return False
        now = time.monotonic()
        kept = Kept(
            work.uid, work.inputs, work.lengths, work.positions, result.graph, now + self._limits.max_call_s
        )
        return self.kept.put((call.caller, call.header.request_id, index), kept, now)

    def _check_parts(
        self, header: expert_pb2.CallHeader, direction: Direction, caller: str
    ) -> list[Part | LostPart]:
        """The header's experts, once every number in them is known to be right. Raises WireError."""
        if len(header.request_id) != 16:
            raise WireError(f"a request id of {len(header.request_id)} bytes; expected 16")
        if header.width != self._manifest.model.hidden:
            raise WireError(
                f"width {header.width}; this swarm's hidden size is {self._manifest.model.hidden}"
            )
        if not 1 <= len(header.experts) <= MAX_EXPERTS_IN_CALL:
            raise WireError(f"{len(header.experts)} experts in one call; expected 1 to {MAX_EXPERTS_IN_CALL}")
        tensor_rows = sum(_tensor_rows(expert, direction) for expert in header.experts)
        encoded_bytes(tensor_rows, header.width, header.codec)  # refuses a codec that is not spoken
        size = 4 * tensor_rows * header.width
        if size > self._limits.max_call_bytes:
            raise ExpertError(
                StatusCode.RESOURCE_EXHAUSTED,
                f"a call of {size} bytes; at most {self._limits.max_call_bytes}: send fewer rows at once",
            )
        return [self._find_part(expert, direction, caller) for expert in header.experts]

    def _find_part(self, expert: expert_pb2.ExpertRows, direction: Direction, caller: str) -> Part | LostPart:
        if not expert.kept_request_id:
            return make_part(expert, self._manifest)
        if direction == "forward" or expert.segment_lengths or expert.positions:
            raise WireError("a kept forward pass is named in backward calls, without segments and positions")
        uid = parse_uid(expert.uid, self._manifest)
        kept = self.kept.take((caller, expert.kept_request_id, expert.kept_index))
        if kept is None:
            return LostPart(uid, expert.kept_rows)
        if (kept.uid, len(kept.positions)) != (uid, expert.kept_rows):
            raise WireError(f"the kept forward pass is of {len(kept.positions)} rows for expert {kept.uid}")
        return Part(uid, kept.lengths, kept.positions, kept)


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


def _tensor_rows(expert: expert_pb2.ExpertRows, direction: Direction) -> int:
    """Rows of payload, inputs and gradients together."""
    if expert.kept_request_id:
        return expert.kept_rows
    return len(expert.positions) * (2 if direction == "backward" else 1)


class _Call:
    """One call while it is answered: what its header says, and one reply at a time."""

    def __init__(
        self,
        direction: Direction,
        header: expert_pb2.CallHeader,
        deadline: float,
        context: Context,
        caller: str,
        uploads: Rate,
    ) -> None:
        self.header = header
        self.caller = caller
        self._direction = direction
        self._deadline = deadline
        self._context = context
        self._uploads = uploads
        self._ready: deque[tuple[expert_pb2.ExpertReply | None, memoryview]] = deque()
        """What is to be written: answers with their tensors, and first maybe the rest of a tensor."""
        self._writing = asyncio.Lock()
        self._sending: asyncio.Future[None] | None = None

    def work(self, part: Part, inputs: bytearray | None, gradients: bytearray | None) -> Work:
        """Raises WireError when a number is not finite."""
        if inputs is not None:
            inputs_RD = self._tensor(inputs)
        else:
            assert part.kept is not None, "inputs come in the payload or were kept"
            inputs_RD = part.kept.inputs
        return Work(
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

    async def write(self, reply: expert_pb2.ExpertReply, data: memoryview) -> None:
        """Returns when it is written. Answers that become ready meanwhile go together in the next message."""
        self._ready.append((reply, data))
        async with self._writing:
            while self._ready:
                message = self._next_message()
                await self._uploads.take(len(message.chunk))
                await self._send(message)

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

    async def write_error(self, index: int, error: ExpertError) -> None:
        status: int = error.status.value[0]
        reply = expert_pb2.ExpertReply(
            index=index, status=status, message=str(error), retry_after_s=error.retry_after_s
        )
        await self.write(reply, memoryview(b""))

    def _tensor(self, data: bytearray) -> torch.Tensor:
        return torch.from_numpy(decode(data, self.header.width, self.header.codec))


@contextlib.contextmanager
def _ending_with_the_call() -> Iterator[None]:
    """A caller who has gone while it was answered or refused is no error of ours: as if gRPC had cancelled us."""
    try:
        yield
    except grpc.aio.InternalError as error:
        raise asyncio.CancelledError from error
