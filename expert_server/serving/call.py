"""One call while it is answered: its payload, the work of its experts, and the replies.

All experts of a call get their work at once, so that narrow ones are computed together. Rows are answered as they
become ready (answers.py).

Shape suffixes as in assignment.py: R = rows, P = pairs of a row and an expert, D = width.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Self, TypeAlias, TypeVar

import grpc
import numpy as np
import torch
from grpc import StatusCode
from torch import Tensor

from dht.manifest import Manifest
from dht.uid import UID
from expert_server.experts.graphs import Rows
from expert_server.serving.answers import AnswerAssembler, RowAnswers
from expert_server.serving.assignment import Assignment, products
from expert_server.serving.batching import Direction, Entry, Result, WorkItem
from expert_server.serving.forward_cache import CachedForward, CacheKey, ForwardCache, Graph
from expert_server.serving.headers import (
    MAX_EXPERTS_IN_CALL,
    CallSize,
    HeldSegments,
    ParsedHeader,
)
from expert_server.serving.runtime import Runtime
from expert_server.serving.sequence_cache import SequenceCache
from peer.codec import CHUNK_BYTES, MAX_CHUNK_BYTES, Floats, encode_scalars, encoded_bytes
from peer.encoding import decode, encode
from peer.errors import ExpertError, WireError
from peer.layers import KeyValueCache
from peer.rates import Pace, RateLimit
from peer.rpc.calls import note_failure
from peer.rpc.channels import SERVER_WINDOW_BYTES
from peer.wire import expert_pb2

OPEN_CALL_BYTES = SERVER_WINDOW_BYTES + MAX_CHUNK_BYTES
"""Memory of a call in addition to its header and what it announces: gRPC's buffer, and the chunk that was read."""
_HEADER_NUMBER_BYTES, _HEADER_EXPERT_BYTES = 16, 64
"""The most bytes of an ordinary header for each segment, row or pair, and for each expert."""
_FLUSH_AFTER = 0.8
"""After this share of a call's deadline, its rows are answered with the experts that have finished."""
_LEAST_BYTES_PER_S = 16_384
"""The slowest payload that is waited for: an eighth of an upload of 1 Mbit/s."""
_LOOP_NUMBERS = 2**18
"""Tensors of up to this size are converted on the loop: int4 takes 4 ms for them. Larger ones are converted on a
thread.
"""
_EXPERT_NUMBERS = 2**10
"""The fixed cost of an expert, however few rows it has, as a number of tensor elements."""
_AT_ONCE = 256
"""Experts whose work enters the queue in one turn of the loop."""
_MOST_DESCRIBED = 2**20
"""Once a message has this many bytes, not counting its chunk, nothing more is packed into it."""
_GRACE_S = 5.0
"""How long a payload may stall."""
_SETTLE_S = 1.0
"""How long a failed call waits for a caller that does not read."""

T = TypeVar("T")

Requests: TypeAlias = AsyncIterator[expert_pb2.CallRequest]
Context = grpc.aio.ServicerContext[expert_pb2.CallRequest, expert_pb2.CallReply]
Outcome: TypeAlias = Result | ExpertError
Reply: TypeAlias = expert_pb2.ExpertReply | tuple[expert_pb2.AnsweredRows, memoryview]
"""Either the end of an expert's part, or answers to rows with their tensor."""


def smallest_call_memory(manifest: Manifest) -> int:
    """The memory that a node needs to accept a backward call of one whole sequence."""
    rows = manifest.model.context
    pairs, experts = rows * manifest.routing.top_k, min(rows * manifest.routing.top_k, MAX_EXPERTS_IN_CALL)
    header = _HEADER_NUMBER_BYTES * (2 * rows + pairs) + _HEADER_EXPERT_BYTES * experts
    return OPEN_CALL_BYTES + header + CallSize(rows, pairs, rows, experts, manifest.width, "backward").bytes


class CallTensors:
    """The tensors of one call, and what is computed from them: the experts' rows and the answers. Pure."""

    def __init__(
        self,
        header: expert_pb2.CallHeader,
        assignment: Assignment,
        inputs: Tensor,
        gradients: Tensor | None,
        cached: CachedForward | None = None,
    ) -> None:
        """`gradients` [R, D]: in backward, those of the answers. `cached`: the forward call that was kept."""
        self.assignment = assignment
        self.inputs = inputs
        self._header = header
        self._gradients = gradients
        self._graphs = {} if cached is None else cached.graphs
        expected = None if cached is None else cached.answered
        self.answers: AnswerAssembler = AnswerAssembler(
            assignment, header.width, weighs=gradients is None, expected=expected
        )
        self._expected = np.ones(len(assignment.rows), np.bool_) if expected is None else expected
        self._updates: Tensor | None = None
        """[P, D]; in backward."""
        self._computes_updates = gradients is not None and cached is None
        if gradients is not None:
            self._updates = torch.empty_like(self.answers.tensor) if cached is None else cached.updates
        self._blocks = 0
        """Blocks of answers so far."""

    def rows_of(self, expert: int) -> int:
        return len(self.assignment.rows[self.assignment.pairs_of(expert)])

    def rows_of_experts(self) -> list[Rows | None]:
        """The rows that each expert computes; None if the expert is in no answer of the forward call."""
        assignment, found = self.assignment, list[Rows | None]()
        inputs_RD = self.inputs.numpy()
        gradients_RD = None if self._gradients is None else self._gradients.numpy()
        shares_P = None if gradients_RD is None else self._shares()
        for expert, lengths in enumerate(assignment.segments()):
            pairs = assignment.pairs_of(expert)
            if not self._expected[pairs].any():
                found.append(None)
                continue
            rows = assignment.rows[pairs]
            gradients = None
            if gradients_RD is not None and shares_P is not None:
                gradients = torch.from_numpy(gradients_RD[rows] * shares_P[pairs, None])
            # copied, because what an expert keeps must not keep the whole call's storage
            inputs = torch.from_numpy(inputs_RD[rows])
            positions = torch.from_numpy(assignment.positions[rows])
            found.append(Rows(inputs, lengths, positions, gradients, self._graphs.pop(expert, None)))
        return found

    def replies(self, outcomes: Sequence[tuple[int, Outcome]], flush: bool) -> list[Reply]:
        """The replies that are due once these experts have finished. `flush`: see answers.py."""
        numbers: list[tuple[int, Tensor | None]] = []
        for expert, outcome in outcomes:
            if isinstance(outcome, ExpertError):
                numbers.append((expert, None))
                continue
            numbers.append((expert, outcome.tensor))
            if self._computes_updates:
                assert self._updates is not None, "they are computed in backward"
                assert outcome.updates is not None, "no graph was kept"
                self._updates[self.assignment.pairs_of(expert)] = outcome.updates
        answers = [*self.answers.take(numbers), *(self.answers.flush() if flush else ())]
        return [_expert_reply(*each) for each in outcomes] + [self._encoded(each) for each in answers]

    def _shares(self) -> Floats:
        """[P]: each expert's share in the gradient of the answer; 0 if it was not in the answer."""
        shares_P = np.zeros(len(self.assignment.rows), np.float32)
        every_row = np.arange(len(self.assignment))
        pairs_Q, _, counts_R = self.assignment.of_rows(every_row, self._expected)
        if len(pairs_Q):
            shares_P[pairs_Q] = self.assignment.shares(pairs_Q, counts_R[counts_R > 0])
        return shares_P

    def _encoded(self, answers: RowAnswers) -> tuple[expert_pb2.AnsweredRows, memoryview]:
        is_gradient = self._gradients is not None
        seed = b"answer %b %d" % (self._header.request_id, self._blocks) if is_gradient else None
        self._blocks += 1
        data = encode(answers.tensor.numpy(), self._header.codec, seed)
        its_products = b""
        if self._gradients is not None and self._updates is not None:
            rows, pairs = self.assignment.rows[answers.pairs], answers.pairs
            numbers_Q = products(self._gradients.numpy(), rows, self._updates.numpy(), pairs)
            its_products = encode_scalars(numbers_Q, self._header.codec)
        return answers.message(self.assignment, len(data), its_products), data


def _expert_reply(expert: int, outcome: Outcome) -> expert_pb2.ExpertReply:
    if isinstance(outcome, ExpertError):
        status: int = outcome.status.value[0]
        return expert_pb2.ExpertReply(
            index=expert, status=status, message=str(outcome), retry_after_s=outcome.retry_after_s
        )
    return expert_pb2.ExpertReply(
        index=expert,
        update_count=outcome.update_count,
        skipped_update=outcome.skipped_update,
        rolled_back=outcome.rolled_back,
        version=outcome.version,
    )


@dataclass(frozen=True, slots=True)
class CallTimes:
    """When each stage ends, in monotonic seconds."""

    flush_at: float
    """From then on, rows are answered with the experts that have finished."""
    deadline: float
    """After that, nobody waits any more."""
    kept_until: float

    @classmethod
    def of(cls, now: float, longest_s: float, kept_s: float) -> Self:
        return cls(now + _FLUSH_AFTER * longest_s, now + longest_s, now + kept_s)


class Call:
    """One call while it is answered."""

    def __init__(
        self,
        header: expert_pb2.CallHeader,
        parsed: ParsedHeader,
        direction: Direction,
        requests: "RequestStream",
        replies: "ReplyStream",
        caller: str,
        group: str,
    ) -> None:
        """`group`: see `Session.group`."""
        self.header = header
        self.parsed = parsed
        self._direction = direction
        self._requests = requests
        self._replies = replies
        self._caller = caller
        self._group = group
        self._computing: dict[int, Entry] = {}
        """The work that is waiting or being computed, by the expert's index in the call."""
        self._done: list[tuple[int, Outcome]] = []
        """Experts that have computed or failed, and whose answers have not been sent."""
        self._is_done = asyncio.Event()
        """Set when there are finished experts, or when it is time to flush."""
        self._flush_is_due = False

    @property
    def pairs(self) -> int:
        """The number of pairs of a row and an expert. If the forward call is no longer kept, the number of rows."""
        assignment = self.parsed.assignment
        return self.parsed.rows if assignment is None else len(assignment.rows)

    @property
    def uids(self) -> Sequence[UID]:
        return () if self.parsed.assignment is None else self.parsed.assignment.uids

    async def answer(
        self,
        tensors: CallTensors,
        runtime: Runtime,
        cache: ForwardCache,
        sequences: SequenceCache,
        times: CallTimes,
    ) -> None:
        """Has the payload computed, and writes the replies. `tensors`: what `receive` returned."""
        uids = tensors.assignment.uids
        parts = await self._converted(tensors.rows_of_experts, len(tensors.assignment.rows), len(uids))
        with self._keeping(tensors, cache, sequences, times.kept_until) as kept:
            timer = asyncio.get_running_loop().call_later(times.flush_at - time.monotonic(), self._flush)
            writing = asyncio.create_task(self._write_replies(tensors, kept), name="write replies")
            try:
                for expert, (uid, rows) in enumerate(zip(uids, parts, strict=True)):
                    self._begin(expert, uid, rows, runtime, times.deadline, kept)
                    if expert % _AT_ONCE == _AT_ONCE - 1:
                        await asyncio.sleep(0)
                del parts, rows  # with their graphs
                await self._requests.expect_end()
                await writing
            finally:
                timer.cancel()
                for entry in list(self._computing.values()):
                    entry.cancel()  # nobody waits any more for what is not computed yet
                writing.cancel()
                await asyncio.gather(writing, return_exceptions=True)
                await self._replies.settle()

    async def receive(self) -> CallTensors:
        """Reads the payload.

        Raises ExpertError (FAILED_PRECONDITION) if the forward call is no longer kept, WireError if the payload has the
        wrong length or a number that is not finite, and TimeoutError if it stalls.
        """
        size = encoded_bytes(self.parsed.rows, self.header.width, self.header.codec)
        assignment, cached = self.parsed.assignment, self.parsed.cached
        if assignment is None:
            # a status might not reach a caller that is still sending
            await self._requests.skip(size)
            await self._requests.expect_end()
            raise ExpertError(
                StatusCode.FAILED_PRECONDITION, "the forward call is no longer kept: send its inputs"
            )
        if cached is not None:
            inputs = cached.inputs
        else:
            inputs = await self._decoded(await self._requests.read(size))
        gradients = None
        if self._direction == "backward":
            gradients = await self._decoded(await self._requests.read(size))
        return CallTensors(self.header, assignment, inputs, gradients, cached)

    @contextmanager
    def _keeping(
        self, tensors: CallTensors, cache: ForwardCache, sequences: SequenceCache, until: float
    ) -> Iterator["_Keeping | _Holding | None"]:
        """Keeps the call for its backward call, or its rows for the next call, if the caller wants that and there is
        room.
        """
        if self.parsed.held:
            yield _Holding(sequences, self._caller, self._group, self.uids, self.parsed.held)
            return
        if not self.header.keep or self._direction == "backward":
            yield None
            return
        answers, key = tensors.answers, (self._caller, self.header.request_id)
        forward = CachedForward(tensors.assignment, tensors.inputs, answers.tensor, answers.sent, until)
        if not cache.put(key, self._group, forward, time.monotonic()):
            yield None
            return
        try:
            yield _Keeping(cache, key, forward)
        finally:
            if not forward.is_complete:
                cache.discard(key, forward)

    def _begin(
        self,
        expert: int,
        uid: UID,
        rows: Rows | None,
        runtime: Runtime,
        deadline: float,
        kept: "_Keeping | _Holding | None",
    ) -> None:
        try:
            if rows is None:
                message = f"expert {uid} is in no answer of the forward call"
                raise ExpertError(StatusCode.FAILED_PRECONDITION, message)
            if isinstance(kept, _Holding):
                rows = replace(rows, caches=kept.take(expert))
            keep = isinstance(kept, _Keeping)
            work = WorkItem(uid, self._direction, rows, deadline, self._caller, self._group, keep)
            entry = self._computing[expert] = runtime.enqueue(work)
            entry.future.add_done_callback(lambda _: self._end(expert, entry, runtime, kept))
        except ExpertError as error:  # affects only this expert
            self._note(expert, error)

    def _end(self, expert: int, entry: Entry, runtime: Runtime, kept: "_Keeping | _Holding | None") -> None:
        self._computing.pop(expert, None)
        if entry.future.cancelled():
            return
        if (error := entry.future.exception()) is not None:
            assert isinstance(error, ExpertError), "the runtime raises no other"
            self._note(expert, error)
            return
        result = entry.future.result()
        if isinstance(kept, _Holding):
            kept.put(expert, time.monotonic())
        elif kept is not None and result.graph is not None and entry.work.uid in runtime.experts:
            kept.add(expert, result.graph)
        # from here, only the cache has the graph: this call may wait long for a caller that does not read
        self._note(expert, result if result.graph is None else replace(result, graph=None))

    def _note(self, expert: int, outcome: Outcome) -> None:
        self._done.append((expert, outcome))
        self._is_done.set()

    def _flush(self) -> None:
        self._flush_is_due = True
        self._is_done.set()

    async def _write_replies(self, tensors: CallTensors, kept: "_Keeping | _Holding | None") -> None:
        """Writes replies as they become ready. Rows that become ready together share a message."""
        assignment = tensors.assignment
        unfinished = len(assignment.uids)
        while unfinished:
            await self._is_done.wait()
            self._is_done.clear()
            if self.parsed.held and len(self._done) < unfinished and not self._flush_is_due:
                continue  # without all experts, the caller can't use the answers to continued texts
            done, self._done = self._done, []
            flush, self._flush_is_due = self._flush_is_due, False
            unfinished -= len(done)
            pairs = len(assignment.rows) if flush else sum(tensors.rows_of(expert) for expert, _ in done)
            replies = await self._converted(partial(tensors.replies, done, flush), pairs, len(done))
            if flush:
                self._give_up_unneeded(tensors)
            is_kept = not unfinished and kept is not None and kept.complete()
            await self._replies.write(replies, is_kept)

    def _give_up_unneeded(self, tensors: CallTensors) -> None:
        """Cancels the work of experts whose rows have all been answered without them."""
        for expert, entry in list(self._computing.items()):
            if not tensors.answers.is_needed(expert):
                del self._computing[expert]
                entry.cancel()
                message = f"expert {entry.work.uid} was late: its rows are answered without it"
                self._note(expert, ExpertError(StatusCode.DEADLINE_EXCEEDED, message))

    async def _decoded(self, data: bytearray) -> Tensor:
        convert = partial(decode, data, self.header.width, self.header.codec)
        return torch.from_numpy(await self._converted(convert, self.parsed.rows))

    async def _converted(self, convert: Callable[[], T], rows: int, experts: int = 0) -> T:
        is_large = rows * self.header.width + experts * _EXPERT_NUMBERS > _LOOP_NUMBERS
        return await asyncio.to_thread(convert) if is_large else convert()


@dataclass(frozen=True, slots=True)
class _Keeping:
    """Keeps a forward call that is being computed."""

    cache: ForwardCache
    key: CacheKey
    forward: CachedForward

    def add(self, expert: int, graph: Graph) -> None:
        self.cache.add_graph(self.key, self.forward, expert, graph)

    def complete(self) -> bool:
        """Called when everything is answered. Returns whether the call is kept."""
        return bool(self.forward.answered.any()) and self.cache.complete(self.key, self.forward)


class _Holding:
    """Keeps the rows of a call's experts for the next call."""

    def __init__(
        self,
        cache: SequenceCache,
        caller: str,
        group: str,
        uids: Sequence[UID],
        held: Sequence[HeldSegments],
    ) -> None:
        self._cache = cache
        self._caller = caller
        self._group = group
        self._uids = uids
        self._held = held
        self._rows: dict[int, list[KeyValueCache]] = {}
        """For each expert, the sequences' cached rows, while they are computed."""
        self._kept = 0
        """How many experts' rows are kept."""

    def take(self, expert: int) -> list[KeyValueCache]:
        """The earlier rows of an expert's segments. Raises ExpertError (FAILED_PRECONDITION) if any are missing."""
        held = self._held[expert]
        rows = self._cache.take(self._caller, self._uids[expert], held.numbers, held.counts)
        self._rows[expert] = rows
        return rows

    def put(self, expert: int, now: float) -> None:
        """Call it once they are computed."""
        numbers, rows = self._held[expert].numbers, self._rows.pop(expert)
        self._kept += self._cache.put(self._caller, self._group, self._uids[expert], numbers, rows, now)

    def complete(self) -> bool:
        """Called when everything is answered. Returns whether the rows of all experts are kept."""
        return self._kept == len(self._uids)


class RequestStream:
    """Reads the messages of one call: its header, then exact numbers of payload bytes.

    It never holds more than was asked for and one chunk, and gives up a caller that stalls or is too slow.
    """

    def __init__(self, requests: Requests, downloads: RateLimit) -> None:
        self._messages = requests
        self._downloads = downloads
        self._pace = Pace(_LEAST_BYTES_PER_S, _GRACE_S, "the payload")
        self._chunk = memoryview(b"")

    async def header(self, reserve: Callable[[int], object]) -> expert_pb2.CallHeader:
        """The first message. It may already contain payload bytes. Reserves memory for the rest of it, which may be
        fields that nobody knows, and is held as long as the call lasts. Raises WireError if it is no header, and
        ExpertError if there is no room.
        """
        request = await self._next(CHUNK_BYTES)
        if request is None or not request.HasField("header"):
            raise WireError("a call must begin with its header")
        self._chunk = memoryview(_checked(request.chunk, least=0))
        reserve(request.ByteSize() - len(self._chunk))
        return request.header

    async def read(self, size: int) -> bytearray:
        """The next `size` bytes. Raises WireError if the stream ends before that."""
        data = bytearray()
        while len(data) < size:
            if not self._chunk:
                self._chunk = memoryview(await self._next_chunk(size - len(data)))
            missing = size - len(data)
            data += self._chunk[:missing]
            self._chunk = self._chunk[missing:]
        return data

    async def skip(self, size: int) -> None:
        """Skips the next `size` bytes. Raises as `read` does."""
        while size:
            if not self._chunk:
                self._chunk = memoryview(await self._next_chunk(size))
            skipped = min(size, len(self._chunk))
            self._chunk = self._chunk[skipped:]
            size -= skipped

    async def expect_end(self) -> None:
        """Raises WireError if there is more than the header announced."""
        if self._chunk or await self._next(0) is not None:
            raise WireError("the payload is longer than the header says")

    async def _next_chunk(self, missing: int) -> bytes:
        request = await self._next(min(missing, CHUNK_BYTES))
        if request is None:
            raise WireError(f"the payload is {missing} bytes shorter than the header says")
        return _checked(b"" if request.HasField("header") else request.chunk, least=1)

    async def _next(self, expected: int) -> expert_pb2.CallRequest | None:
        """The next message; None at the end. `expected`: how many bytes of payload it may have."""
        try:
            request = await self._pace.wait(anext(self._messages, None), expected, _payload_bytes)
        except ExpertError:  # the server itself never waits for ever
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
        self._unsent: deque[Reply | memoryview] = deque()
        """Tensors that have not been sent. The first may be the rest of one."""
        self._sending: asyncio.Future[None] | None = None

    async def write(self, replies: Sequence[Reply], is_kept: bool) -> None:
        """`is_kept`: these are the last replies, and the node keeps the call."""
        self._unsent.extend(replies)
        while self._unsent:
            message = self._next_message()
            message.kept = is_kept and not self._unsent
            await self._uploads.take(len(message.chunk))
            self._sending = asyncio.ensure_future(self._context.write(message))
            self._sending.add_done_callback(note_failure)
            await asyncio.shield(self._sending)

    async def settle(self) -> None:
        """Waits until a message is sent whose writer was cancelled. Until then, gRPC accepts no status."""
        if self._sending is not None:
            await asyncio.wait([self._sending], timeout=_SETTLE_S)

    def _next_message(self) -> expert_pb2.CallReply:
        message = expert_pb2.CallReply()
        pieces: list[memoryview] = []
        room, described = CHUNK_BYTES, 0
        while room and self._unsent and described < _MOST_DESCRIBED:
            reply = self._unsent.popleft()
            if isinstance(reply, expert_pb2.ExpertReply):
                message.experts.append(reply)
                described += reply.ByteSize()
                continue
            if isinstance(reply, memoryview):
                data = reply
            else:
                rows, data = reply
                message.rows.append(rows)
                described += rows.ByteSize()
            pieces.append(data[:room])
            if len(data) > room:
                self._unsent.appendleft(data[room:])
            room -= len(pieces[-1])
        message.chunk = b"".join(pieces)
        return message
