"""The gate that every call to a server passes: how many calls each caller may have in progress, how often it may call,
and how long it may keep the server waiting.

gRPC's own limit counts all calls alike, so a stranger's silent streams could take all places. Here a caller is
a peer with a session, or a connection without one. When all places are taken, a new call takes the place of a call
whose caller has more of them, or which only waits for its caller.
"""

import asyncio
import inspect
import logging
import math
import time
from collections import Counter as Multiset
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterator
from contextlib import AbstractContextManager, aclosing, contextmanager
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import grpc
from grpc import StatusCode
from prometheus_client import CollectorRegistry, Counter

from peer.bounded import BoundedDict
from peer.codec import MAX_MESSAGE_BYTES
from peer.errors import ExpertError
from peer.loop import Restarts
from peer.metrics import start_at_zero
from peer.rates import SharedBudget, TokenBuckets
from peer.rpc.calls import note_failure, or_empty, retry_metadata
from peer.rpc.connections import Connection, Connections
from peer.rpc.sessions import OPEN_TO_ALL, Sessions

logger: logging.Logger = logging.getLogger(__name__)

M = TypeVar("M")
_CALLS_WITHOUT_SESSION = 32
"""Calls in progress from callers without a session: so many that open sessions, and as many that ask for what anybody
may know. The latter may wait for seconds, and must not keep newcomers out.
"""
_OPENS_SESSIONS = "talkoot.v1.SessionService"
_OWN_PLACES = {
    "talkoot.v1.CreditService": 32,
    "talkoot.v1.DhtService": 512,
    "talkoot.v1.RelayService": 512,
}
"""Places for the calls of these services, in sessions. They don't compete with other calls for places: DHT calls are
frequent and must not hold up experts, calls for receipts wait for seconds, and relay calls last for hours.
"""
_LASTING = "talkoot.v1.RelayService"
"""The service whose calls keep their places although they mostly wait for their callers."""
_CALLS_WITHOUT_MESSAGE = 128
"""Calls whose first message has not arrived. gRPC holds up to a MiB of each, because it must not read less."""
_FIRST_MESSAGE_S, _NEXT_MESSAGE_S = 10.0, 20.0
"""How long a call waits for its caller's messages. Even a slow line needs less for a chunk."""
_UNREAD_S = 20.0
"""How long a reply may wait until the caller takes it."""
_END_S = 5.0
"""How long the end of a call may wait until the caller takes it, with the reply before it."""
_PATIENCE_S = 1.0
"""A call that waits for its caller for longer may lose its place to another.

A call without a session, and one whose first message has not arrived, may lose it to other callers at once: its message
usually comes with it, and strangers in many neighbourhoods could begin silent calls again and again.
"""
_LARGE_BYTES = {
    "talkoot.v1.DenseService": MAX_MESSAGE_BYTES,
    "talkoot.v1.ExpertService": MAX_MESSAGE_BYTES,
    "talkoot.v1.MemoryService": 512 * 2**10,
    "talkoot.v1.ProbeService": MAX_MESSAGE_BYTES,
}
_MOST_BYTES = 64 * 2**10
"""The limits for a message to these services, and to all others. A larger message counts as empty: it could have
millions of numbers, which don't count as parts, and a call holds its request as long as it lasts, some for hours.
"""
_CALLS_PER_S, _CALLS_AT_ONCE = 500.0, 1000.0
"""The rate of calls of one caller in a session."""
_NEAR_CALLS_PER_S, _NEAR_CALLS_S = 1000.0, 2.0
"""The rate of calls in sessions of all callers in one neighbourhood, who share it fairly: half of what a core answers.
And how many seconds' worth of calls may come at once.
"""
_STRANGE_CALLS_PER_S, _STRANGE_CALLS_AT_ONCE = 5.0, 40.0
"""The rate of calls on one connection without a session."""
_ABUSE_S, _REFUSED = 1.0, 5
"""How many seconds' worth of calls a caller may exceed its rate by, before it loses its connection: even refusing its
calls would cost too much. And as how many calls a refused one counts.
"""
_RETRY_S = 0.5
_LOG_EVERY_S = 600.0
"""After a failure was logged, the same one is not logged again for this long."""


@dataclass(eq=False, slots=True)
class Slot:
    """The place of one call in progress."""

    origin: str
    """The neighbourhood of its caller."""
    caller: Hashable
    task: "asyncio.Task[Any]"
    waits_since: float | None = None
    """Since when the call has waited for its caller; None if it does not."""
    lost: bool = False
    """Another call has taken its place."""


class Slots:
    """Places for calls. Neighbourhoods, and then callers in each, have fair shares. Pure: `now` is an argument."""

    def __init__(self, most: int, patience_s: float = _PATIENCE_S) -> None:
        self._most = most
        self._patience_s = patience_s
        self._taken: set[Slot] = set()

    def __len__(self) -> int:
        return len(self._taken)

    def take(self, slot: Slot, now: float) -> Slot | None:
        """Takes a place. Returns the call that loses its place for this one. Raises ExpertError
        (RESOURCE_EXHAUSTED).
        """
        loser = None
        if len(self._taken) >= self._most:
            loser = self._loser(slot, now)
            if loser is None:
                raise ExpertError(StatusCode.RESOURCE_EXHAUSTED, "too many calls are in progress", _RETRY_S)
            self._taken.remove(loser)
            loser.lost = True
        self._taken.add(slot)
        return loser

    def release(self, slot: Slot) -> None:
        self._taken.discard(slot)

    def _loser(self, slot: Slot, now: float) -> Slot | None:
        origins = Multiset(taken.origin for taken in self._taken)
        origin, most = origins.most_common(1)[0]
        if most <= origins[slot.origin] + 1:
            origin = slot.origin
        callers = Multiset(taken.caller for taken in self._taken if taken.origin == origin)
        if callers:
            caller, most = callers.most_common(1)[0]
            if origin != slot.origin or most > callers[slot.caller] + 1:
                group = (taken for taken in self._taken if taken.origin == origin and taken.caller == caller)
                return max(group, key=lambda taken: _waited_s(taken, now))
        with_own = max(self._patience_s, _PATIENCE_S)
        waiting = (
            taken
            for taken in self._taken
            if _waited_s(taken, now) > (with_own if taken.caller == slot.caller else self._patience_s)
            and callers[slot.caller] <= callers[taken.caller]
            and origins[slot.origin] <= origins[taken.origin]
        )
        return max(waiting, key=lambda taken: _waited_s(taken, now), default=None)


def _service(method: str) -> str:
    """The service in a method's full name, `/service/method`."""
    return method[1:].partition("/")[0]


def _waited_s(slot: Slot, now: float) -> float:
    return 0.0 if slot.waits_since is None else now - slot.waits_since


class CallGate(grpc.aio.ServerInterceptor):
    """Admits the calls of a server.

    Every method becomes one that reads and writes streams, which is the same on the wire. So nothing is read before the
    gate admits a call, and all waiting happens in one place.
    """

    def __init__(
        self,
        sessions: Sessions,
        connections: Connections,
        most_calls: int,
        metrics: CollectorRegistry | None,
        restarts: Restarts | None,
    ) -> None:
        """`most_calls`: in sessions, at the same time, without those of the DHT and of relays.

        `restarts`: counts handlers that fail unexpectedly.
        """
        refused = Counter(
            "talkoot_calls_refused",
            "Calls that were not answered: no place was left, others lost theirs, their caller came too often, kept "
            "the server waiting, or met a fault of the program.",
            ["reason"],
            registry=metrics,
        )
        self.refused: Counter = start_at_zero(refused, "crowded", "displaced", "hasty", "slow", "failed")
        self._sessions = sessions
        self._connections = connections
        self._restarts = restarts
        self._slots = Slots(most_calls)
        self._own_slots = {
            service: Slots(most, math.inf if service == _LASTING else _PATIENCE_S)
            for service, most in _OWN_PLACES.items()
        }
        self._opening_slots, self._strange_slots = (Slots(_CALLS_WITHOUT_SESSION, 0.0) for _ in range(2))
        self._beginning = Slots(_CALLS_WITHOUT_MESSAGE, 0.0)
        self._rates = TokenBuckets[Hashable](_CALLS_PER_S, _CALLS_AT_ONCE)
        self._strange_rates = TokenBuckets[Hashable](_STRANGE_CALLS_PER_S, _STRANGE_CALLS_AT_ONCE)
        self._near_rates = BoundedDict[str, SharedBudget[Hashable]](4096)
        """The rates of neighbourhoods."""
        self._faults = BoundedDict[tuple[str, str], float](256)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details) or _UNKNOWN
        answer = _streaming(handler)

        async def serve(requests: AsyncIterator[Any], context: "grpc.aio.ServicerContext[Any, Any]") -> None:
            await self._serve(handler_call_details.method, answer, requests, context)

        parse = handler.request_deserializer
        most_bytes = _LARGE_BYTES.get(_service(handler_call_details.method), _MOST_BYTES)
        return grpc.stream_stream_rpc_method_handler(
            serve, None if parse is None else or_empty(parse, most_bytes), handler.response_serializer
        )

    async def _serve(
        self,
        method: str,
        answer: "_Answer",
        requests: AsyncIterator[Any],
        context: "grpc.aio.ServicerContext[Any, Any]",
    ) -> None:
        connection = self._connections.find(context.peer())
        session = self._sessions.of_call(context)
        if connection is None:
            return  # its caller has left, and perhaps left many such calls
        task = asyncio.current_task()
        assert task is not None
        try:
            if session is None:
                slot = Slot(connection.origin, connection.peer, task)
                opens = _service(method) == _OPENS_SESSIONS
                slots = self._opening_slots if opens else self._strange_slots
                rates = self._strange_rates
            else:
                self._connections.prove(connection, session.caller)
                slot = Slot(connection.origin, session.caller, task)
                # anybody may open a session that needs no token
                others = self._strange_slots if session.rights <= OPEN_TO_ALL else self._slots
                slots, rates = self._own_slots.get(_service(method), others), self._rates
            self._admit(connection, slot, slots, rates)
        except ExpertError as error:
            await self._end(_Context(context, connection, None), _EndedError.by(error))
        connection.calls += 1
        call = _Context(context, connection, slot)
        try:
            end = await self._answer(method, answer, requests, call, slot)
        finally:
            connection.calls -= 1
            slots.release(slot)
            if call.is_writing:
                asyncio.get_running_loop().call_later(_END_S, self._close_if_unread, call)
        if end is not None:
            await self._end(call, end)

    async def _answer(
        self, method: str, answer: "_Answer", requests: AsyncIterator[Any], call: "_Context", slot: Slot
    ) -> "_EndedError | None":
        """Returns how the call ends; None if it succeeded."""
        try:
            await answer(Requests(requests, slot, self._begin(slot)), call)
        except _EndedError as end:
            return end
        except grpc.aio.BaseError:  # the caller has left
            raise
        except ExpertError as error:
            if error.status is StatusCode.DEADLINE_EXCEEDED:
                self.refused.labels("slow").inc()
            return _EndedError.by(error)
        except asyncio.CancelledError:
            if not slot.lost or slot.task.cancelling() > 1:
                raise
            slot.task.uncancel()
            return _EndedError(StatusCode.RESOURCE_EXHAUSTED, _DISPLACED, retry_metadata(_RETRY_S))
        except NotImplementedError:
            return _EndedError(StatusCode.UNIMPLEMENTED, "this peer does not serve this method")
        except Exception as error:  # noqa: BLE001  # gRPC would log each one, as often as a stranger likes
            self._note_fault(method, error)
            return _EndedError(StatusCode.INTERNAL, "this peer failed to answer")
        return None

    async def _end(self, call: "_Context", end: "_EndedError") -> None:
        """Ends a call whose place is already free. A caller that does not take the status loses its connection.

        gRPC accepts no status before the last reply is sent, and keeps both as long as the connection lasts.
        """
        watch = asyncio.get_running_loop().call_later(
            _END_S, self._connections.punish, call.connection, "unread"
        )
        try:
            await call.end(end)
        finally:
            watch.cancel()

    def _close_if_unread(self, call: "_Context") -> None:
        if call.is_writing:
            self._connections.punish(call.connection, "unread")

    def _admit(self, connection: Connection, slot: Slot, slots: Slots, rates: TokenBuckets[Hashable]) -> None:
        """Raises ExpertError (RESOURCE_EXHAUSTED)."""
        now = time.monotonic()
        wait_s = rates.wait_s(slot.caller, now)
        if not wait_s and rates is self._rates and not self._has_share(slot, now):
            wait_s = _RETRY_S
        rates.take(slot.caller, _REFUSED if wait_s else 1, now)
        if wait_s:
            self.refused.labels("hasty").inc()
            if wait_s > _ABUSE_S:
                self._connections.punish(connection)
            raise ExpertError(
                StatusCode.RESOURCE_EXHAUSTED, "you call too often: try again a little later", wait_s
            )
        self._take(slots, slot)

    def _has_share(self, slot: Slot, now: float) -> bool:
        """Whether the rate of its neighbourhood leaves one for this call. If so, the call takes it."""
        near = self._near_rates.get(slot.origin)
        near = near or SharedBudget(_NEAR_CALLS_PER_S, _CALLS_PER_S, _NEAR_CALLS_S)
        self._near_rates[slot.origin] = near
        if not near.allows(slot.caller, now):
            return False
        near.take(slot.caller, 1, now)
        return True

    def _take(self, slots: Slots, slot: Slot) -> None:
        """Raises ExpertError (RESOURCE_EXHAUSTED)."""
        try:
            loser = slots.take(slot, time.monotonic())
        except ExpertError:
            self.refused.labels("crowded").inc()
            raise
        if loser is not None:
            self.refused.labels("displaced").inc()
            loser.task.cancel()

    @contextmanager
    def _begin(self, slot: Slot) -> Iterator[None]:
        """Wraps the wait for the call's first message. Raises ExpertError (RESOURCE_EXHAUSTED)."""
        self._take(self._beginning, slot)
        try:
            yield
        finally:
            self._beginning.release(slot)

    def _note_fault(self, method: str, error: Exception) -> None:
        """Logs each kind of failure only now and then: a stranger who triggers one must not fill the log."""
        self.refused.labels("failed").inc()
        if self._restarts is not None:
            self._restarts.note("answer a call")
        kind, now = (method, type(error).__name__), time.monotonic()
        if now - self._faults.get(kind, float("-inf")) > _LOG_EVERY_S:
            self._faults[kind] = now
            logger.error("could not answer a call of %s", method, exc_info=error)


class _EndedError(grpc.aio.AbortError):
    """Ends a call with a status."""

    def __init__(
        self, status: StatusCode, details: str, trailing_metadata: tuple[tuple[str, str], ...] = ()
    ) -> None:
        super().__init__(details)
        self.status = status
        self.details = details
        self.trailing_metadata = trailing_metadata

    @classmethod
    def by(cls, error: ExpertError) -> Self:
        return cls(error.status, str(error), retry_metadata(error.retry_after_s))


_Answer = Callable[["Requests", "_Context"], Awaitable[None]]
_DISPLACED = "others call too, and this call gave its place to one of theirs"
_END = object()


class Requests:
    """The messages of one call. A read always ends with the call and is never cancelled: gRPC does not free the message
    of a read that nobody awaits (grpc issue 43360).
    """

    def __init__(
        self, stream: AsyncIterator[Any], slot: Slot, beginning: AbstractContextManager[None]
    ) -> None:
        """`beginning`: wraps the wait for the first message."""
        self._stream = stream
        self._slot = slot
        self._beginning: AbstractContextManager[None] | None = beginning

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        if (beginning := self._beginning) is not None:
            self._beginning = None
            with beginning:
                message = await self._read(_FIRST_MESSAGE_S)
        else:
            message = await self._read(_NEXT_MESSAGE_S)
        if message is _END:
            raise StopAsyncIteration
        return message

    async def _read(self, limit_s: float) -> Any:
        return await _in_time(_next(self._stream), self._slot, limit_s, _SILENT)


_SILENT = "the call's next message did not arrive in time"
_UNREAD = "the call's replies were not read in time"


class _Context:
    """The context of one call. It knows the caller's own address, its writes have a deadline, and the gate ends it."""

    def __init__(
        self,
        context: "grpc.aio.ServicerContext[Any, Any]",
        connection: Connection,
        slot: Slot | None,
    ) -> None:
        """`slot`: None for a call that got no place and only ends."""
        self.connection = connection
        self._context = context
        self._slot = slot
        self._writing: asyncio.Future[None] | None = None

    @property
    def is_writing(self) -> bool:
        """Whether gRPC still holds a reply that the caller has not taken."""
        return self._writing is not None and not self._writing.done()

    def peer(self) -> str:
        return self.connection.peer

    async def write(self, message: Any) -> None:
        assert self._slot is not None
        self._writing = asyncio.ensure_future(self._context.write(message))
        await _in_time(self._writing, self._slot, _UNREAD_S, _UNREAD)

    async def abort(
        self, code: StatusCode, details: str = "", trailing_metadata: tuple[tuple[str, str], ...] = ()
    ) -> None:
        raise _EndedError(code, details, trailing_metadata)

    async def end(self, end: _EndedError) -> None:
        """Waits until the caller has taken the last reply and the status."""
        if self._writing is not None:
            await asyncio.wait([self._writing])
        await self._context.abort(end.status, end.details, end.trailing_metadata)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


async def _next(stream: AsyncIterator[Any]) -> Any:
    return await anext(stream, _END)


async def _in_time(transfer: Awaitable[M], slot: Slot, limit_s: float, late: str) -> M:
    """Waits until a message is read or written, without ever cancelling that. Raises ExpertError
    (DEADLINE_EXCEEDED).
    """
    moving = asyncio.ensure_future(transfer)
    moving.add_done_callback(note_failure)
    slot.waits_since = time.monotonic()
    try:
        done, _ = await asyncio.wait([moving], timeout=limit_s)
    finally:
        slot.waits_since = None
    if not done:
        raise ExpertError(StatusCode.DEADLINE_EXCEEDED, late)
    return moving.result()


def _streaming(handler: Any) -> _Answer:
    """Turns a method's handler into one that reads and writes streams."""
    behaviour = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream

    async def answer(requests: Requests, context: _Context) -> None:
        request: Any = requests
        if not handler.request_streaming:
            request = await anext(requests, None)
            if request is None:
                raise ExpertError(StatusCode.INVALID_ARGUMENT, "the call has no message")
            # gRPC would keep more messages for as long as the call lasts
            if handler.response_streaming and await anext(requests, None) is not None:
                raise ExpertError(StatusCode.INVALID_ARGUMENT, "the call has more than one message")
        answering = behaviour(request, context)
        if inspect.isasyncgen(answering):
            async with aclosing(answering):
                async for reply in answering:
                    await context.write(reply)
            return
        reply = await answering
        if not handler.response_streaming:
            await context.write(reply)

    return answer


async def _say_unknown(requests: Any, context: Any) -> None:
    raise NotImplementedError


_UNKNOWN: Any = grpc.stream_stream_rpc_method_handler(_say_unknown)
