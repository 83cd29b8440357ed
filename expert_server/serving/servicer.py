"""The gRPC edge of a node: reads calls, refuses what is wrong before it is queued, streams answers as they come.

What one caller may cost a node: rows, and steps of its experts. Pure and bounded: `now` is passed in.

The generic cell rate algorithm: of each caller it is remembered when the work so far would have been done at the rate
that it is allowed. A call may come while that is no further away than the burst, however large the call is.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter

import grpc
from grpc import StatusCode

from dht.manifest import Manifest, parse_uid
from dht.uid import UID
from expert_server.serving.batching import Direction, WorkItem
from expert_server.serving.call import (
    Call,
    Context,
    Done,
    LostPart,
    Part,
    Payload,
    Reader,
    Reply,
    Requests,
    error_reply,
    make_part,
    tensor_rows,
)
from expert_server.serving.compute import Result
from expert_server.serving.forward_cache import CachedForward, ForwardCache, SeenRequests
from expert_server.serving.runtime import Runtime
from expert_server.settings import NodeSettings
from peer import PROTOCOL_VERSION, SOFTWARE_VERSION
from peer.codec import encode, encoded_bytes
from peer.errors import ExpertError, WireError
from peer.rates import Bandwidth
from peer.rpc.calls import abort_on_error, require_same_swarm
from peer.rpc.sessions import Sessions
from peer.wire import expert_pb2, expert_pb2_grpc, session_pb2

logger = logging.getLogger(__name__)

_BURST_S = 5.0
_EXPERT_BURST_S = 600.0
_REMEMBERED = 65_536


@dataclass(frozen=True)
class BudgetLimits:
    """Of each caller; None: no bound."""

    rows_per_s: float | None = None
    """Forward and backward together."""
    updates_per_s: float | None = None
    """Optimizer steps that its calls cause, of all experts together."""
    expert_updates_per_hour: float | None = None
    """Optimizer steps of one expert."""

    @classmethod
    def of(cls, settings: NodeSettings) -> "BudgetLimits":
        return cls(
            settings.caller_rows_per_s,
            settings.caller_updates_per_s,
            settings.caller_expert_updates_per_hour,
        )


@dataclass
class _Meter:
    """One rate, for as many as there are; who was not seen for longest is forgotten, and begins anew."""

    rate: float | None
    """Per second."""
    burst_s: float
    due: OrderedDict[Hashable, float] = field(default_factory=OrderedDict)

    def wait_s(self, key: Hashable, now: float) -> float:
        """How long until the next may come."""
        if self.rate is None:
            return 0.0
        return max(0.0, self.due.get(key, now) - now - self.burst_s)

    def take(self, key: Hashable, amount: float, now: float) -> None:
        if self.rate is None:
            return
        self.due[key] = max(now, self.due.get(key, now)) + amount / self.rate
        self.due.move_to_end(key)
        if len(self.due) > _REMEMBERED:
            self.due.popitem(last=False)


class Budgets:
    """All callers of one node."""

    def __init__(self, limits: BudgetLimits) -> None:
        self.refused = 0
        """Calls that were beyond their caller's budget."""
        hourly = limits.expert_updates_per_hour
        self._rows = _Meter(limits.rows_per_s, _BURST_S)
        self._updates = _Meter(limits.updates_per_s, _BURST_S)
        self._of_expert = _Meter(None if hourly is None else hourly / 3600, _EXPERT_BURST_S)
        self._bounded = limits != BudgetLimits()

    def take(self, caller: str, direction: Direction, parts: Sequence[tuple[UID, int]], now: float) -> None:
        """Counts a call with so many rows for each expert. Raises ExpertError (RESOURCE_EXHAUSTED): nothing is counted.

        An expert's steps are its parts: several that are merged into one batch take one step, which is each one's.
        """
        if not self._bounded:
            return
        steps = {(caller, uid) for uid, _ in parts} if direction == "backward" else set[tuple[str, UID]]()
        waits = {"rows": self._rows.wait_s(caller, now)}
        if steps:
            waits["optimizer steps"] = self._updates.wait_s(caller, now)
            waits["steps of one expert"] = max(self._of_expert.wait_s(step, now) for step in steps)
        what, wait_s = max(waits.items(), key=itemgetter(1))
        if wait_s:
            self.refused += 1
            raise ExpertError(
                StatusCode.RESOURCE_EXHAUSTED,
                f"your budget of {what} at this node is spent: come back in {wait_s:.1f} s",
                retry_after_s=wait_s,
            )
        self._rows.take(caller, sum(rows for _, rows in parts), now)
        for step in steps:
            self._updates.take(caller, 1, now)
            self._of_expert.take(step, 1, now)


MAX_EXPERTS_IN_CALL = 4096
_RIGHTS = {"forward": session_pb2.RIGHT_FORWARD, "backward": session_pb2.RIGHT_BACKWARD}


@dataclass(frozen=True)
class CallLimits:
    """What one call may ask for."""

    max_call_bytes: int
    """Payload of one call, in bytes as fp32: what it takes in memory, however it is encoded."""
    max_call_s: float
    """Longest that a call may last, whatever deadline it came with, in seconds; also how long a forward is kept."""
    max_kept_bytes: int = 0
    """Memory for forward passes that are kept until their backward call comes."""
    remembered_requests: int = 65_536
    """Backward calls whose ids are remembered, so that none is applied twice."""
    budget: BudgetLimits = field(default_factory=BudgetLimits)


class ExpertServicer(expert_pb2_grpc.ExpertServiceServicer):  # type: ignore[misc]  # grpc's plugin writes no types
    """Serves the experts of one runtime to one swarm."""

    def __init__(
        self,
        runtime: Runtime,
        manifest: Manifest,
        swarm_id: str,
        limits: CallLimits,
        sessions: Sessions,
        traffic: Bandwidth | None = None,
    ) -> None:
        self.calls = 0
        """Forward and backward, since the start."""
        self.kept = ForwardCache(limits.max_kept_bytes)
        self.budgets = Budgets(limits.budget)
        self._runtime = runtime
        self._manifest = manifest
        self._swarm_id = swarm_id
        self._limits = limits
        self._sessions = sessions
        self._seen = SeenRequests(limits.remembered_requests)
        self._traffic = traffic or Bandwidth()

    async def Forward(self, requests: Requests, context: Context) -> None:
        await self._serve("forward", requests, context)

    async def Backward(self, requests: Requests, context: Context) -> None:
        await self._serve("backward", requests, context)

    async def Info(
        self,
        request: expert_pb2.InfoRequest,
        context: grpc.aio.ServicerContext[expert_pb2.InfoRequest, expert_pb2.InfoReply],
    ) -> expert_pb2.InfoReply:
        async with abort_on_error(context):
            require_same_swarm(self._swarm_id, request.protocol_version, request.swarm_id)
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
        async with abort_on_error(context, seconds, f"the call lasted longer than {seconds:.1f} s"):
            caller = self._sessions.require(context, _RIGHTS[direction]).name
            await self._answer_call(direction, requests, context, caller, time.monotonic() + seconds)

    async def _answer_call(
        self, direction: Direction, requests: Requests, context: Context, caller: str, deadline: float
    ) -> None:
        reader = Reader(requests, self._traffic.down)
        header, chunk = await reader.header()
        require_same_swarm(self._swarm_id, header.protocol_version, header.swarm_id)
        parts = self._check_parts(header, direction, caller)
        self.budgets.take(caller, direction, [(part.uid, part.rows) for part in parts], time.monotonic())
        if direction == "backward" and not self._seen.is_new(caller, header.request_id):
            raise ExpertError(StatusCode.ALREADY_EXISTS, "this request id was seen before: not applied again")

        call = Call(direction, header, deadline, context, caller, self._traffic.up)
        payload = Payload(reader, chunk)
        writing = asyncio.create_task(self._write_answers(call, len(parts)))
        try:
            for index, part in enumerate(parts):
                size = encoded_bytes(part.rows, header.width, header.codec)
                inputs = None if isinstance(part, LostPart) or part.kept else await payload.read(size)
                gradients = await payload.read(size) if direction == "backward" else None
                if isinstance(part, LostPart):
                    call.refuse(index, _lost(part))
                else:
                    self._begin(call, index, call.work(part, inputs, gradients))
            await payload.expect_end()
            await writing
        finally:
            call.cancel()
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)
            await call.settle()

    def _begin(self, call: Call, index: int, work: WorkItem) -> None:
        try:
            call.begin(index, work, self._runtime.enqueue(work))
        except ExpertError as error:
            call.refuse(index, error)

    async def _write_answers(self, call: Call, count: int) -> None:
        """Writes each expert's reply and tensor, as they come. Those that come together go in one message."""
        while count:
            for answer in await call.come():
                call.put(*self._answer(call, answer) if isinstance(answer, Done) else answer)
                count -= 1
            await call.write_ready()

    def _answer(self, call: Call, done: Done) -> Reply:
        try:
            result = done.future.result()
        except ExpertError as error:
            return error_reply(done.index, error)
        data = encode(result.tensor.numpy(), call.header.codec)
        kept = done.work.keep and self._keep(call, done.index, done.work, result)
        reply = expert_pb2.ExpertReply(
            index=done.index,
            update_count=result.update_count,
            payload_bytes=len(data),
            kept=kept,
            skipped_update=result.skipped_update,
            rolled_back=result.rolled_back,
        )
        return reply, data

    def _keep(self, call: Call, index: int, work: WorkItem, result: Result) -> bool:
        if work.uid not in self._runtime.experts:  # given up meanwhile
            return False
        now = time.monotonic()
        kept = CachedForward(
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
        rows = sum(tensor_rows(expert, direction) for expert in header.experts)
        encoded_bytes(rows, header.width, header.codec)  # refuses a codec that is not spoken
        size = 4 * rows * header.width
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


def _lost(part: LostPart) -> ExpertError:
    message = f"the forward pass of expert {part.uid} is kept no more: send its inputs"
    return ExpertError(StatusCode.FAILED_PRECONDITION, message)
