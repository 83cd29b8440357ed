"""Sessions, both sides: a caller proves once who it is, and its calls then only name the session.

The proof is a signed statement that names the server, so that no server can replay it to another. TLS is pinned to the
server's certificate, so only the two of them know the session's name.
"""

import asyncio
import secrets
import time
from collections import Counter as Multiset
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any, Protocol, TypeAlias

import grpc
from google.protobuf.message import DecodeError
from grpc import StatusCode
from prometheus_client import CollectorRegistry, Counter, Gauge

from peer import PROTOCOL_VERSION
from peer.bounded import BoundedDict
from peer.errors import ExpertError, RecordError
from peer.formatting import printable
from peer.identity import SESSION_DOMAIN, Identity, PeerID, peer_id_of, verify
from peer.metrics import start_at_zero
from peer.rpc.calls import make_stub, require_same_swarm
from peer.wire import admission_pb2, session_pb2, session_pb2_grpc

Right: TypeAlias = "session_pb2.Right"
Metadata: TypeAlias = tuple[tuple[str, bytes], ...]
SESSION_KEY = "talkoot-session-bin"
"""The key of the gRPC metadata in which a call names its session."""
CLOCK_WINDOW_S = 60.0
"""How far a statement's time may differ from the server's clock."""
NONCE_BYTES = 16
_SESSION_BYTES = 16
_MAX_REQUEST_BYTES = 4096
_MAX_RIGHTS = 16
_REMEMBERED_STATEMENTS = 16_384
_STATEMENTS_OF_CALLER = 256
"""The most of these from one caller."""
_RENEW_AT = 0.8
"""The share of a session's lifetime after which a new one is opened."""
_LONGEST_LIFETIME_S = 7 * 86400.0
_MAX_SESSION_BYTES = 64


@dataclass(frozen=True, slots=True)
class Admitted:
    """By what a caller was admitted."""

    serial: int = 0
    """Of its grant; 0 if none is needed."""
    expires_at: float = float("inf")


class Admission(Protocol):
    """Who may do what. `dht.admission` has the rules of a swarm."""

    def admit(self, caller: PeerID, rights: Set[Right], badge: admission_pb2.Badge | None) -> Admitted:
        """Raises ExpertError (PERMISSION_DENIED) that says what is missing."""
        ...

    def still_admits(self, caller: PeerID, serial: int) -> bool:
        """Whether a caller that was admitted has not been denied or revoked since."""
        ...


class AllowAll:
    """Admits every caller that proves who it is."""

    def admit(self, caller: PeerID, rights: Set[Right], badge: admission_pb2.Badge | None) -> Admitted:
        return Admitted()

    def still_admits(self, caller: PeerID, serial: int) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class Session:
    """A caller that has proved who it is."""

    caller: PeerID
    name: str
    """The caller's PeerID in base58."""
    rights: frozenset[Right]
    serial: int
    expires_at: float


class ReplayWindow:
    """Accepts each statement once. Pure and bounded: `now` is passed in.

    When it is full, it forgets the statement with the earliest time and accepts none of that time or earlier any more,
    so that none is ever accepted twice. One caller can't fill it, which would shut out the others.
    """

    def __init__(
        self,
        window_s: float = CLOCK_WINDOW_S,
        limit: int = _REMEMBERED_STATEMENTS,
        limit_of_caller: int = _STATEMENTS_OF_CALLER,
    ) -> None:
        self._window_s = window_s
        self._limit = limit
        self._limit_of_caller = limit_of_caller
        self._seen: set[tuple[bytes, bytes]] = set()
        self._by_time: list[tuple[float, bytes, bytes]] = []
        self._of_caller: Multiset[bytes] = Multiset()
        self._floor = float("-inf")

    def take(self, caller: bytes, nonce: bytes, at: float, now: float) -> None:
        """Raises ExpertError: UNAUTHENTICATED, or RESOURCE_EXHAUSTED if the caller sent too many lately."""
        if not abs(at - now) <= self._window_s:  # also refuses NaN
            raise ExpertError(
                StatusCode.UNAUTHENTICATED,
                f"the caller's clock differs by more than {self._window_s:.0f} s from this node's",
            )
        while self._by_time and self._by_time[0][0] < now - self._window_s:
            self._forget_earliest()
        if (caller, nonce) in self._seen or at <= self._floor:
            raise ExpertError(StatusCode.UNAUTHENTICATED, "this statement was seen before: sign a new one")
        if self._of_caller[caller] >= self._limit_of_caller:
            raise ExpertError(
                StatusCode.RESOURCE_EXHAUSTED,
                f"at most {self._limit_of_caller} sessions of one caller in {2 * self._window_s:.0f} s",
            )
        self._seen.add((caller, nonce))
        self._of_caller[caller] += 1
        heappush(self._by_time, (at, caller, nonce))
        if len(self._by_time) > self._limit:
            self._floor = max(self._floor, self._forget_earliest())

    def __len__(self) -> int:
        return len(self._seen)

    def _forget_earliest(self) -> float:
        at, caller, nonce = heappop(self._by_time)
        self._seen.remove((caller, nonce))
        self._of_caller[caller] -= 1
        if not self._of_caller[caller]:
            del self._of_caller[caller]
        return at


class Sessions:
    """The sessions of one server, one per caller. The least recently used ends when there are too many."""

    def __init__(
        self,
        swarm_id: str,
        server: PeerID,
        admission: Admission | None = None,
        *,
        limit: int = 4096,
        lifetime_s: float = 3600.0,
        now: Callable[[], float] = time.time,
        metrics: CollectorRegistry | None = None,
    ) -> None:
        """`admission`: who may do what; by default everybody may do everything."""
        events = Counter(
            "talkoot_session_events",
            "Sessions opened, refused and ended early to make room; calls in none that is open.",
            ["event"],
            registry=metrics,
        )
        self.events = start_at_zero(events, "opened", "refused", "evicted", "unknown")
        Gauge("talkoot_sessions", "Callers that are known now.", registry=metrics).set_function(self.__len__)
        self._swarm_id = swarm_id
        self._server = server
        self._admission = admission or AllowAll()
        self._lifetime_s = lifetime_s
        self._now = now
        self._window = ReplayWindow()
        self._sessions = BoundedDict[bytes, Session](limit)  # used longest ago first
        self._by_caller: dict[PeerID, bytes] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def all(self) -> list[Session]:
        return list(self._sessions.values())

    def open(self, request: session_pb2.OpenRequest) -> session_pb2.OpenReply:
        """Raises ExpertError."""
        try:
            statement, caller = self._proved(request)
            rights = frozenset(statement.rights)
            badge = statement.badge if statement.HasField("badge") else None
            admitted = self._admission.admit(caller, rights, badge)
            self._window.take(statement.caller, statement.nonce, statement.time, self._now())
        except ExpertError:
            self.events.labels("refused").inc()
            raise
        self._end(caller)
        key, now = secrets.token_bytes(_SESSION_BYTES), self._now()
        expires_at = min(now + self._lifetime_s, admitted.expires_at)
        session = Session(caller, caller.to_base58(), rights, admitted.serial, expires_at)
        self._by_caller[caller] = key
        for evicted in self._sessions.put(key, session):
            self.events.labels("evicted").inc()
            del self._by_caller[evicted.caller]
        self.events.labels("opened").inc()
        return session_pb2.OpenReply(session=key, lifetime_s=max(0.0, expires_at - now))

    def require(self, context: "grpc.aio.ServicerContext[Any, Any]", right: Right) -> Session:
        """The session of a caller that has the right. Raises ExpertError: UNAUTHENTICATED or PERMISSION_DENIED."""
        return self.find(session_named(context), right)

    def find(self, key: bytes, right: Right) -> Session:
        """Like `require`, by the session's name."""
        session = self._sessions.get(key)
        if session is None or session.expires_at <= self._now():
            self.events.labels("unknown").inc()
            raise ExpertError(
                StatusCode.UNAUTHENTICATED, "the call is in no session that is open here: open one"
            )
        self._sessions.move_to_end(key)
        if right not in session.rights:
            name = session_pb2.Right.Name(right)
            raise ExpertError(StatusCode.PERMISSION_DENIED, f"the session was opened without {name}")
        return session

    def recheck(self) -> None:
        """Ends the sessions of callers that have been denied or revoked, and those that have expired."""
        now = self._now()
        for session in self.all():
            gone = session.expires_at <= now
            if gone or not self._admission.still_admits(session.caller, session.serial):
                self._end(session.caller)

    def _end(self, caller: PeerID) -> None:
        key = self._by_caller.pop(caller, None)
        if key is not None:
            del self._sessions[key]

    def _proved(self, request: session_pb2.OpenRequest) -> tuple[session_pb2.OpenStatement, PeerID]:
        """The statement and its caller, after checking that it is the caller's and for this server."""
        if request.ByteSize() > _MAX_REQUEST_BYTES:
            raise ExpertError(
                StatusCode.INVALID_ARGUMENT, f"at most {_MAX_REQUEST_BYTES} bytes open a session"
            )
        statement = session_pb2.OpenStatement()
        try:
            statement.ParseFromString(request.statement)
        except DecodeError:
            raise ExpertError(StatusCode.INVALID_ARGUMENT, "the statement can't be parsed") from None
        require_same_swarm(self._swarm_id, statement.protocol_version, statement.swarm_id)
        if len(statement.nonce) != NONCE_BYTES or not 1 <= len(statement.rights) <= _MAX_RIGHTS:
            raise ExpertError(
                StatusCode.INVALID_ARGUMENT,
                f"a statement has a nonce of {NONCE_BYTES} bytes and 1 to {_MAX_RIGHTS} rights",
            )
        if statement.server != self._server.to_bytes():
            raise ExpertError(StatusCode.UNAUTHENTICATED, "the statement is for another server")
        caller = peer_id_of(request.public_key)
        if statement.caller != caller.to_bytes():
            raise ExpertError(StatusCode.UNAUTHENTICATED, "the key is not that of the caller named")
        try:
            verify(request.public_key, request.statement, request.signature, SESSION_DOMAIN)
        except RecordError:
            raise ExpertError(StatusCode.UNAUTHENTICATED, "the statement's signature is wrong") from None
        return statement, caller


class SessionServicer(session_pb2_grpc.SessionServiceServicer):  # type: ignore[misc]  # grpc's plugin writes no types
    """Opens sessions for callers that prove who they are."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    async def Open(
        self,
        request: session_pb2.OpenRequest,
        context: grpc.aio.ServicerContext[session_pb2.OpenRequest, session_pb2.OpenReply],
    ) -> session_pb2.OpenReply:
        try:
            return self._sessions.open(request)
        except ExpertError as error:
            await context.abort(error.status, str(error))
        raise AssertionError("abort raises")


class SessionClient:
    """Opens sessions with servers when they are needed, and remembers them. For one event loop.

    Call `ended` when a server no longer knows a session. The call can then be repeated, because a server checks the
    session before it does anything.
    """

    def __init__(
        self,
        identity: Identity,
        swarm_id: str,
        rights: Sequence[Right],
        badge: admission_pb2.Badge | None = None,
        *,
        limit: int = 1024,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`limit`: sessions remembered, the newest ones. `now` dates statements, `clock` measures lifetimes."""
        self.opened = 0
        self._identity = identity
        self._swarm_id = swarm_id
        self._rights = rights
        self._badge = badge
        self._now = now
        self._clock = clock
        self._known = BoundedDict[PeerID, tuple[Metadata, float]](limit)
        """The metadata of calls to each server, and until when it is good."""
        self._opening: dict[PeerID, asyncio.Task[Metadata]] = {}

    def known(self, server: PeerID) -> Metadata | None:
        """The metadata for calls to this server, if a session is open."""
        found = self._known.get(server)
        return found[0] if found is not None and self._clock() < found[1] else None

    async def metadata(self, server: PeerID, channel: grpc.aio.Channel, deadline_s: float) -> Metadata:
        """The metadata for calls to this server. Opens a session if there is none; all callers wait for the same one.

        Raises ExpertError with the server's status if it opens none.
        """
        if (known := self.known(server)) is not None:
            return known
        opening = self._opening.get(server)
        if opening is None:
            opening = self._opening[server] = asyncio.create_task(self._open(server, channel, deadline_s))
            opening.add_done_callback(lambda task: self._note_opened(server, task))
        return await asyncio.shield(opening)

    def ended(self, server: PeerID, metadata: Metadata) -> None:
        """Forgets a session that the server no longer knows."""
        found = self._known.get(server)
        if found is not None and found[0] == metadata:
            del self._known[server]

    async def close(self) -> None:
        """Stops opening sessions."""
        opening = list(self._opening.values())
        for task in opening:
            task.cancel()
        await asyncio.gather(*opening, return_exceptions=True)

    async def _open(self, server: PeerID, channel: grpc.aio.Channel, deadline_s: float) -> Metadata:
        stub = make_stub(session_pb2_grpc.SessionServiceStub, channel)
        try:
            reply: session_pb2.OpenReply = await stub.Open(self.statement(server), timeout=deadline_s)
        except grpc.aio.AioRpcError as error:
            raise ExpertError(error.code(), f"no session: {printable(error.details() or '')}") from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise ExpertError(StatusCode.UNAVAILABLE, "the channel was closed meanwhile") from error
        if len(reply.session) > _MAX_SESSION_BYTES:
            raise ExpertError(StatusCode.DATA_LOSS, "the server gave no usable session")
        metadata = ((SESSION_KEY, reply.session),)
        lifetime_s = min(max(reply.lifetime_s, 0.0), _LONGEST_LIFETIME_S)
        self._known[server] = metadata, self._clock() + _RENEW_AT * lifetime_s
        self.opened += 1
        return metadata

    def statement(self, server: PeerID) -> session_pb2.OpenRequest:
        """Proves to this server who calls now."""
        statement = session_pb2.OpenStatement(
            protocol_version=PROTOCOL_VERSION,
            swarm_id=self._swarm_id,
            server=server.to_bytes(),
            caller=self._identity.peer_id.to_bytes(),
            time=self._now(),
            nonce=secrets.token_bytes(NONCE_BYTES),
            rights=self._rights,
            badge=self._badge,
        ).SerializeToString()
        return session_pb2.OpenRequest(
            statement=statement,
            public_key=self._identity.public_key,
            signature=self._identity.sign(statement, SESSION_DOMAIN),
        )

    def _note_opened(self, server: PeerID, task: "asyncio.Task[Metadata]") -> None:
        del self._opening[server]
        if not task.cancelled():
            task.exception()  # told to whoever waits; nobody may any more


def session_named(context: "grpc.aio.ServicerContext[Any, Any]") -> bytes:
    """The session that a call names; empty if it names none."""
    for key, value in context.invocation_metadata() or ():
        if key == SESSION_KEY and isinstance(value, bytes):
            return value
    return b""
