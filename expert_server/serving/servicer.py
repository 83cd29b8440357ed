"""ExpertService: the service that trainers call. Checks who calls and what a call may cost, then answers it."""

import asyncio
import time
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass, field
from math import inf
from operator import itemgetter

import grpc
from grpc import StatusCode
from prometheus_client import CollectorRegistry, Counter

from dht.manifest import Manifest
from dht.receipts import Work
from dht.uid import UID
from expert_server.serving.batching import Direction
from expert_server.serving.call import (
    OPEN_CALL_BYTES,
    Call,
    CallTimes,
    Context,
    ReplyStream,
    Requests,
    RequestStream,
)
from expert_server.serving.forward_cache import ForwardCache, SeenRequests
from expert_server.serving.headers import HeaderParser
from expert_server.serving.runtime import Runtime
from expert_server.serving.sequence_cache import SequenceCache
from expert_server.settings import NodeSettings
from peer import PROTOCOL_VERSION, SOFTWARE_VERSION
from peer.bounded import BoundedDict
from peer.budget import MemoryBudget
from peer.errors import ExpertError
from peer.identity import PeerID
from peer.rates import Bandwidth, TokenBuckets
from peer.rpc.calls import abort_on_error, require_same_swarm
from peer.rpc.sessions import Session, Sessions
from peer.wire import expert_pb2, expert_pb2_grpc, session_pb2

MAX_CALL_S = 60.0
_RIGHTS = {"forward": session_pb2.RIGHT_FORWARD, "backward": session_pb2.RIGHT_BACKWARD}
_BURST_S = 5.0
_IDLE_LOOK_S = 10.0
_EXPERT_BURST_S = 600.0
_REMEMBERED_REQUESTS = 65_536
"""How many request ids of backward calls are remembered."""
_MOST_TRAINERS = 4096
"""The most trainers that are counted."""


@dataclass(frozen=True)
class BudgetLimits:
    """What each caller may use. None means no limit."""

    rows_per_s: float | None = None
    """Rows over all experts, forward and backward together."""
    updates_per_s: float | None = None
    """Optimizer steps over all experts."""
    expert_updates_per_hour: float | None = None
    """Optimizer steps of one expert."""

    @classmethod
    def of(cls, settings: NodeSettings) -> "BudgetLimits":
        return cls(
            settings.caller_rows_per_s,
            settings.caller_updates_per_s,
            settings.caller_expert_updates_per_hour,
        )


class Budgets:
    """What the callers of one node may cost it: rows, and steps of its experts. Pure and bounded. Callers in one group
    count as one, because keys are free.

    A call is accepted while its caller is within its rate and one burst, however large the call is.
    """

    def __init__(self, limits: BudgetLimits, metrics: CollectorRegistry | None = None) -> None:
        self.refused: Counter = Counter(
            "talkoot_calls_over_budget",
            "Calls refused because their caller's budget was spent.",
            registry=metrics,
        )
        hourly = limits.expert_updates_per_hour
        self._rows = _buckets(limits.rows_per_s, _BURST_S)
        self._updates = _buckets(limits.updates_per_s, _BURST_S)
        self._of_expert = _buckets(None if hourly is None else hourly / 3600, _EXPERT_BURST_S)
        self._bounded = limits != BudgetLimits()

    def take(self, group: str, direction: Direction, rows: int, uids: Collection[UID], now: float) -> None:
        """Counts a call: its rows over all of its experts.

        Each expert in a backward call counts as one step, even if its rows are merged with others into one step. Raises
        ExpertError (RESOURCE_EXHAUSTED), and then counts nothing.
        """
        if not self._bounded:
            return
        steps = {(group, uid) for uid in uids} if direction == "backward" else set[tuple[str, UID]]()
        waits = {"rows": self._rows.wait_s(group, now)}
        if steps:
            waits["optimizer steps"] = self._updates.wait_s(group, now)
            waits["steps of one expert"] = max(self._of_expert.wait_s(step, now) for step in steps)
        what, wait_s = max(waits.items(), key=itemgetter(1))
        if wait_s:
            self.refused.inc()
            raise ExpertError(
                StatusCode.RESOURCE_EXHAUSTED,
                f"your budget of {what} at this node is spent: try again in {wait_s:.1f} s",
                retry_after_s=wait_s,
            )
        self._rows.take(group, rows, now)
        for step in steps:
            self._updates.take(group, 1, now)
            self._of_expert.take(step, 1, now)


def _buckets(rate: float | None, burst_s: float) -> TokenBuckets[Hashable]:
    return TokenBuckets(rate, 0.0 if rate is None else rate * burst_s)


@dataclass(frozen=True)
class CallLimits:
    """The limits of calls to a node."""

    max_call_bytes: int = 64 * 2**20
    """The payload of one call as float32, which is what it takes in memory, however it is encoded."""
    max_call_s: float = MAX_CALL_S
    """The longest duration of a call, whatever its own deadline. Kept forward calls expire after twice that."""
    max_kept_bytes: int = 0
    """Memory for cached forward passes. Sequences get what these leave."""
    budget: BudgetLimits = field(default_factory=BudgetLimits)
    max_memory_bytes: int = 512 * 2**20
    """Memory for all calls in progress together, each from its header to its last answer."""


class ExpertServicer(expert_pb2_grpc.ExpertServiceServicer):
    """Serves the experts of one runtime to one swarm."""

    def __init__(
        self,
        runtime: Runtime,
        manifest: Manifest,
        swarm_id: str,
        limits: CallLimits,
        sessions: Sessions,
        traffic: Bandwidth | None = None,
        metrics: CollectorRegistry | None = None,
        note_served: Callable[[PeerID, Work], None] = lambda caller, work: None,
    ) -> None:
        """`note_served` is called for each answered call, with its caller and the work done."""
        self.calls: Counter = Counter(
            "talkoot_calls", "Forward and backward calls that came.", registry=metrics
        )
        self.forward_cache: ForwardCache = ForwardCache(
            limits.max_kept_bytes, lambda: self.sequences.keep_to_room()
        )
        self.sequences: SequenceCache = SequenceCache(
            lambda: limits.max_kept_bytes - self.forward_cache.bytes
        )
        """The cache of continued sequences, which uses the memory that kept calls don't need."""
        self._looks_for_idle = False
        self.budgets: Budgets = Budgets(limits.budget, metrics)
        self.memory: MemoryBudget = MemoryBudget(limits.max_memory_bytes, metrics)
        self._runtime = runtime
        self._parser = HeaderParser(swarm_id, manifest, limits.max_call_bytes, self.forward_cache)
        self._swarm_id = swarm_id
        self._limits = limits
        self._sessions = sessions
        self._seen = SeenRequests(_REMEMBERED_REQUESTS)
        self._traffic = traffic or Bandwidth()
        self._note_served = note_served
        self._trainers = BoundedDict[str, float](_MOST_TRAINERS)
        """When each trainer last sent gradients."""

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
        """Answers one call."""
        self.calls.inc()
        remaining_s = context.time_remaining()
        longest_s = (
            self._limits.max_call_s if remaining_s is None else min(self._limits.max_call_s, remaining_s)
        )
        times = CallTimes.of(time.monotonic(), longest_s, 2 * self._limits.max_call_s)
        async with abort_on_error(context, longest_s, f"the call lasted longer than {longest_s:.1f} s"):
            session = self._sessions.require(context, _RIGHTS[direction])
            caller = session.name
            with self.memory.holding(session.owner, OPEN_CALL_BYTES) as memory:
                stream = RequestStream(requests, self._traffic.down)
                replies = ReplyStream(context, self._traffic.up)
                header = await stream.header(memory.grow)
                parsed = self._parser.parse(header, direction, caller, memory.grow)
                call = Call(header, parsed, direction, stream, replies, caller, session.group)
                try:
                    self._admit(direction, call, session)
                    tensors = await call.receive()
                finally:
                    if parsed.cached is not None:
                        self.forward_cache.take((caller, header.kept_request_id), parsed.cached)
                self._note_received(direction, call, session)
                try:
                    await call.answer(tensors, self._runtime, self.forward_cache, self.sequences, times)
                finally:
                    self._look_for_idle()

    def trainers(self, within_s: float = inf) -> int:
        """How many trainers have sent gradients in the last seconds."""
        since = time.monotonic() - within_s
        return sum(at >= since for at in self._trainers.values())

    def _look_for_idle(self) -> None:
        """Drops idle sequences and expired calls once in a while, as long as there are any."""
        if (self.sequences or self.forward_cache) and not self._looks_for_idle:
            self._looks_for_idle = True
            asyncio.get_running_loop().call_later(_IDLE_LOOK_S, self._drop_idle)

    def _drop_idle(self) -> None:
        self._looks_for_idle = False
        callers, now = {session.name for session in self._sessions.all()}, time.monotonic()
        self.sequences.drop_idle(now, callers)
        self.forward_cache.drop_expired(now)
        self._look_for_idle()

    def _admit(self, direction: Direction, call: Call, session: Session) -> None:
        """Raises ExpertError if the caller's budget is spent, or if this backward call was seen before."""
        self.budgets.take(session.group, direction, call.pairs, call.uids, time.monotonic())
        if direction == "backward" and not self._seen.is_new(session.name, call.header.request_id):
            raise ExpertError(
                StatusCode.ALREADY_EXISTS, "this request id was seen before, so the call is not applied again"
            )

    def _note_received(self, direction: Direction, call: Call, session: Session) -> None:
        """Counts a call whose payload has arrived. A caller that only sends headers must not vote on which replica was
        left behind, or sign receipts. A call that is broken off later counts, because slow replicas are left behind by
        such calls.
        """
        self._note_served(session.caller, Work(pairs=call.pairs))
        if direction == "backward":
            self._trainers[session.name] = time.monotonic()
        # how many updates of each expert the trainer has had made so far, by whichever node
        if call.header.keep and session_pb2.RIGHT_BACKWARD in session.rights:
            for uid, expert in zip(call.uids, call.header.experts, strict=True):
                if uid in self._runtime.experts:
                    self._runtime.experts[uid].reports.note(session.name, session.group, expert.updates)
