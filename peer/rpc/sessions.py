"""Sessions, both sides: a caller proves its identity once, and its calls then only name the session.

The proof is a signed statement. It names the server, so no server can replay it to another, and contains a challenge
that the server has just made, so it works only once, whatever the two clocks say. The server remembers only challenges
that were used, and checks a limited number, so strangers can't fill its memory. TLS is pinned to the server's
certificate, so nobody else learns the session's name.
"""

import asyncio
import hmac
import secrets
import struct
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import grpc
from google.protobuf.message import DecodeError
from grpc import StatusCode
from prometheus_client import CollectorRegistry, Counter, Gauge

from peer import PROTOCOL_VERSION, clock
from peer.bounded import BoundedDict, Owner
from peer.errors import ExpertError, RecordError
from peer.formatting import printable
from peer.identity import SESSION_DOMAIN, Identity, PeerID, peer_id_of, verify
from peer.loop import cancel_all
from peer.metrics import start_at_zero
from peer.rates import FairTurns
from peer.rpc.calls import abort_on_error, make_stub, require_same_swarm, while_open
from peer.rpc.connections import origin_of
from peer.wire import admission_pb2, session_pb2, session_pb2_grpc

Right: TypeAlias = "session_pb2.Right"
OPEN_TO_ALL: frozenset[Right] = frozenset({session_pb2.RIGHT_DHT})
"""The rights that need no token: a peer must read the manifest before it can be admitted."""
Metadata: TypeAlias = tuple[tuple[str, bytes], ...]
SESSION_KEY = "talkoot-session-bin"
"""The key of the gRPC metadata with which a call names its session."""
_CHALLENGE_S = 30.0
"""How long a challenge can be used."""
_RANDOM_BYTES = 16
_MAC_BYTES = 16
_SESSION_BYTES = 16
_MAX_REQUEST_BYTES = 4096
_MAX_RIGHTS = 16
_CHECKS_PER_S = 200.0
"""The rate of signatures checked for callers that open sessions. Each takes about 0.1 ms of the loop, or 0.3 ms with
a badge.
"""
_CHECKS_AT_ONCE = 32
_RENEW_AT = 0.8
"""The share of a session's lifetime after which a new one is opened."""
_LEAST_LIFETIME_S, _MOST_LIFETIME_S = 10.0, 86400.0
"""Lifetimes below or above this count as this. Otherwise, a server could make its callers open a session for each call.
A call in a session that has ended opens another.
"""
_MAX_SESSION_BYTES = _MAX_CHALLENGE_BYTES = 64
_SERVERS = 1024
"""How many servers a caller remembers its sessions with."""


@dataclass(frozen=True, slots=True)
class Admitted:
    """How a caller was admitted."""

    serial: int = 0
    """The serial number of its grant; 0 if none is needed."""
    expires_at: float = float("inf")


class Admission(Protocol):
    """Who may do what. `dht.admission` has the rules of a swarm."""

    @property
    def badge(self) -> admission_pb2.Badge | None:
        """The badge that admits this peer elsewhere; None if it needs none, or does not have it yet."""
        ...

    def admit(self, caller: PeerID, rights: Set[Right], badge: admission_pb2.Badge | None) -> Admitted:
        """Raises ExpertError (PERMISSION_DENIED), which says what is missing."""
        ...

    def still_admits(self, caller: PeerID, serial: int) -> bool:
        """Whether an admitted caller has not been denied or revoked since."""
        ...


class AllowAll:
    """Admits every caller that proves who it is."""

    badge: admission_pb2.Badge | None = None

    def admit(self, caller: PeerID, rights: Set[Right], badge: admission_pb2.Badge | None) -> Admitted:
        return Admitted()

    def still_admits(self, caller: PeerID, serial: int) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class Session:
    """A caller that has proved its identity."""

    caller: PeerID
    name: str
    """The caller's PeerID in base58."""
    rights: frozenset[Right]
    serial: int
    ends_at: float
    """On the server's monotonic clock."""
    near: str = ""
    """The neighbourhood that it was opened from."""

    @property
    def group(self) -> str:
        """With whom the caller shares. Callers in one group may be one person under several keys: those with the same
        token, or in one neighbourhood. Never empty: a caller whose neighbourhood is not known is a group by itself.
        """
        return f"token {self.serial}" if self.serial else self.near or self.name

    @property
    def owner(self) -> Owner:
        """The caller and its group, for everything that callers share."""
        return Owner(self.group, self.name)


class Challenges:
    """Makes challenges without remembering them, and accepts each once. It remembers those that were used recently."""

    def __init__(self, lifetime_s: float = _CHALLENGE_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._lifetime_s = lifetime_s
        self._clock = clock
        self._began = clock()
        self._secret = secrets.token_bytes(32)
        self._used: OrderedDict[bytes, float] = OrderedDict()
        """When each challenge was used, the earliest first."""

    def __len__(self) -> int:
        return len(self._used)

    def new(self) -> bytes:
        made = struct.pack(">d", self._clock() - self._began) + secrets.token_bytes(_RANDOM_BYTES)
        return made + self._mac(made)

    def check(self, challenge: bytes) -> None:
        """Raises ExpertError (UNAUTHENTICATED) if the challenge can't be used now."""
        made = challenge[:-_MAC_BYTES]
        if not hmac.compare_digest(challenge[-_MAC_BYTES:], self._mac(made)):
            raise ExpertError(StatusCode.UNAUTHENTICATED, "this server did not issue that challenge")
        age_s = self._clock() - self._began - struct.unpack_from(">d", made)[0]
        if age_s > self._lifetime_s:
            raise ExpertError(StatusCode.UNAUTHENTICATED, "the challenge is too old: ask for a new one")
        if challenge in self._used:
            raise ExpertError(StatusCode.UNAUTHENTICATED, "the challenge was used before: ask for a new one")

    def use(self, challenge: bytes) -> None:
        """Like `check`, and the challenge can't be used again."""
        self.check(challenge)
        now = self._clock()
        while self._used and next(iter(self._used.values())) < now - self._lifetime_s:
            self._used.popitem(last=False)
        self._used[challenge] = now

    def _mac(self, data: bytes) -> bytes:
        return hmac.digest(self._secret, data, "sha256")[:_MAC_BYTES]


class Sessions:
    """The sessions of one server. A caller has one session for each set of rights, such as one for the DHT and one for
    experts.

    If there are too many, the neighbourhood with the most sessions loses the one used longest ago. So a stranger with
    many keys displaces its own sessions.
    """

    def __init__(
        self,
        swarm_id: str,
        server: PeerID,
        admission: Admission | None = None,
        *,
        limit: int = 8192,
        lifetime_s: float = 3600.0,
        now: Callable[[], float] = clock.now,
        clock: Callable[[], float] = time.monotonic,
        metrics: CollectorRegistry | None = None,
    ) -> None:
        """`admission`: who may do what; by default everybody may do everything. `now`: the clock for admissions."""
        events = Counter(
            "talkoot_session_events",
            "Sessions opened, refused and ended early to make room; calls in none that is open.",
            ["event"],
            registry=metrics,
        )
        self.events: Counter = start_at_zero(events, "opened", "refused", "evicted", "unknown")
        Gauge("talkoot_sessions", "Callers that are known now.", registry=metrics).set_function(self.__len__)
        self.challenges: Challenges = Challenges(clock=clock)
        self._swarm_id = swarm_id
        self._server = server
        self._admission = admission or AllowAll()
        self._limit = limit
        self._lifetime_s = lifetime_s
        self._now = now
        self._clock = clock
        self._sessions: dict[bytes, Session] = {}
        self._by_purpose: dict[tuple[PeerID, frozenset[Right]], bytes] = {}
        self._near: dict[str, OrderedDict[bytes, None]] = {}
        """The sessions of each neighbourhood, the one used longest ago first."""

    def __len__(self) -> int:
        return len(self._sessions)

    def all(self) -> list[Session]:
        return list(self._sessions.values())

    def open(self, request: session_pb2.OpenRequest, near: str = "") -> session_pb2.OpenReply:
        """`near`: the neighbourhood that the caller is in. Raises ExpertError."""
        statement = self.check(request)
        with self.counting_refusals():
            caller = self._proved(request, statement)
            rights = frozenset(statement.rights)
            badge = statement.badge if statement.HasField("badge") else None
            admitted = self._admission.admit(caller, rights, badge)
            self.challenges.use(statement.challenge)
        self._end(self._by_purpose.get((caller, rights)))
        while len(self._sessions) >= self._limit:
            self._evict()
        key = secrets.token_bytes(_SESSION_BYTES)
        lifetime_s = max(0.0, min(self._lifetime_s, admitted.expires_at - self._now()))
        ends_at = self._clock() + lifetime_s
        self._sessions[key] = Session(caller, caller.to_base58(), rights, admitted.serial, ends_at, near)
        self._by_purpose[caller, rights] = key
        self._near.setdefault(near, OrderedDict())[key] = None
        self.events.labels("opened").inc()
        return session_pb2.OpenReply(session=key, lifetime_s=lifetime_s)

    def require(self, context: "grpc.aio.ServicerContext[Any, Any]", *rights: Right) -> Session:
        """The session of a call whose caller has one of the rights.

        Raises ExpertError: UNAUTHENTICATED or PERMISSION_DENIED.
        """
        return self.find(session_named(context), *rights)

    def find(self, key: bytes, *rights: Right) -> Session:
        """Like `require`, by the session's name."""
        session = self._still_open(key)
        if session is None:
            self.events.labels("unknown").inc()
            raise ExpertError(StatusCode.UNAUTHENTICATED, "the call belongs to no open session: open one")
        self._near[session.near].move_to_end(key)
        if session.rights.isdisjoint(rights):
            names = " or ".join(map(session_pb2.Right.Name, rights))
            raise ExpertError(StatusCode.PERMISSION_DENIED, f"the session was opened without {names}")
        return session

    def of_call(self, context: "grpc.aio.ServicerContext[Any, Any]") -> Session | None:
        """The session that a call names, if it is open. `require` decides whether it may be used for that call."""
        return self._still_open(session_named(context))

    def _still_open(self, key: bytes) -> Session | None:
        session = self._sessions.get(key)
        return None if session is None or session.ends_at <= self._clock() else session

    def recheck(self) -> None:
        """Ends sessions that have expired, and those of callers that have been denied or revoked."""
        now = self._clock()
        for key, session in list(self._sessions.items()):
            gone = session.ends_at <= now
            if gone or not self._admission.still_admits(session.caller, session.serial):
                self._end(key)

    def check(self, request: session_pb2.OpenRequest) -> session_pb2.OpenStatement:
        """The statement, after all checks except that of its signature, which takes longest. Raises ExpertError."""
        with self.counting_refusals():
            if request.ByteSize() > _MAX_REQUEST_BYTES:
                raise ExpertError(
                    StatusCode.INVALID_ARGUMENT,
                    f"a request to open a session has at most {_MAX_REQUEST_BYTES} bytes",
                )
            statement = session_pb2.OpenStatement()
            try:
                statement.ParseFromString(request.statement)
            except DecodeError:
                raise ExpertError(StatusCode.INVALID_ARGUMENT, "the statement can't be parsed") from None
            require_same_swarm(self._swarm_id, statement.protocol_version, statement.swarm_id)
            if not 1 <= len(statement.rights) <= _MAX_RIGHTS:
                raise ExpertError(StatusCode.INVALID_ARGUMENT, f"a statement has 1 to {_MAX_RIGHTS} rights")
            if session_pb2.RIGHT_UNSPECIFIED in statement.rights:
                raise ExpertError(StatusCode.INVALID_ARGUMENT, "the statement has a right that is not set")
            if statement.server != self._server.to_bytes():
                raise ExpertError(StatusCode.UNAUTHENTICATED, "the statement is for another server")
            self.challenges.check(statement.challenge)
            return statement

    @contextmanager
    def counting_refusals(self) -> Iterator[None]:
        try:
            yield
        except ExpertError:
            self.events.labels("refused").inc()
            raise

    def _proved(self, request: session_pb2.OpenRequest, statement: session_pb2.OpenStatement) -> PeerID:
        """The caller that signed the statement."""
        try:
            caller = peer_id_of(request.public_key)
            if statement.caller != caller.to_bytes():
                raise ExpertError(StatusCode.UNAUTHENTICATED, "the key does not belong to the named caller")
            verify(request.public_key, request.statement, request.signature, SESSION_DOMAIN)
        except RecordError as error:
            raise ExpertError(StatusCode.UNAUTHENTICATED, f"the statement proves nothing: {error}") from None
        return caller

    def _end(self, key: bytes | None) -> None:
        if key is None:
            return
        session = self._sessions.pop(key)
        del self._by_purpose[session.caller, session.rights]
        del self._near[session.near][key]
        if not self._near[session.near]:
            del self._near[session.near]

    def still_admits(self, session: Session) -> bool:
        """Whether the caller has not been denied or revoked since, for long calls."""
        return self._admission.still_admits(session.caller, session.serial)

    def _evict(self) -> None:
        most: OrderedDict[bytes, None] = max(self._near.values(), key=len)
        self._end(next(iter(most)))
        self.events.labels("evicted").inc()


class SessionServicer(session_pb2_grpc.SessionServiceServicer):
    """Opens sessions for callers that prove their identity."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._checks = FairTurns(_CHECKS_PER_S, _CHECKS_AT_ONCE)

    async def Challenge(
        self,
        request: session_pb2.ChallengeRequest,
        context: grpc.aio.ServicerContext[session_pb2.ChallengeRequest, session_pb2.ChallengeReply],
    ) -> session_pb2.ChallengeReply:
        return session_pb2.ChallengeReply(challenge=self._sessions.challenges.new())

    async def Open(
        self,
        request: session_pb2.OpenRequest,
        context: grpc.aio.ServicerContext[session_pb2.OpenRequest, session_pb2.OpenReply],
    ) -> session_pb2.OpenReply:
        async with abort_on_error(context):
            self._sessions.check(request)
            near = origin_of(context.peer())
            with self._sessions.counting_refusals():
                if not await self._checks.turn(near, context.peer()):
                    raise ExpertError(StatusCode.RESOURCE_EXHAUSTED, "too many open sessions now", 1.0)
            return self._sessions.open(request, near)
        raise AssertionError("abort raises")


class SessionClient:
    """Opens sessions with servers when they are needed, and remembers them. For one event loop.

    Call `ended` when a server no longer knows a session. The call can then be repeated, because a server checks the
    session before it does anything else.
    """

    def __init__(
        self,
        identity: Identity,
        swarm_id: str,
        rights: Sequence[Right],
        admission: Admission | None = None,
    ) -> None:
        """`admission`: provides this peer's badge."""
        self._identity = identity
        self._swarm_id = swarm_id
        self._rights = rights
        self._admission = admission or AllowAll()
        self._known = BoundedDict[PeerID, tuple[Metadata, float]](_SERVERS)
        """The metadata of calls to each server, and until when it is valid."""
        self._opening: dict[PeerID, asyncio.Task[Metadata]] = {}

    def known(self, server: PeerID) -> Metadata | None:
        """The metadata for calls to this server, if a session is open."""
        found = self._known.get(server)
        return found[0] if found is not None and time.monotonic() < found[1] else None

    async def metadata(self, server: PeerID, channel: grpc.aio.Channel, deadline_s: float) -> Metadata:
        """The metadata for calls to this server. Opens a session if there is none; callers share one attempt.

        Raises ExpertError with the server's status if the server opens none.
        """
        until = time.monotonic() + deadline_s
        while (known := self.known(server)) is None:
            opening = self._opening.get(server)
            if is_own := opening is None:
                opening = asyncio.create_task(self._open(server, channel, until - time.monotonic()))
                self._opening[server] = opening
                opening.add_done_callback(lambda task: self._note_opened(server, task))
            try:
                return await asyncio.shield(opening)
            except ExpertError as error:
                # the caller that began the attempt may have had less time than this one
                if is_own or error.status is not StatusCode.DEADLINE_EXCEEDED or time.monotonic() >= until:
                    raise
        return known

    def ended(self, server: PeerID, metadata: Metadata) -> None:
        """Forgets a session that the server no longer knows."""
        found = self._known.get(server)
        if found is not None and found[0] == metadata:
            del self._known[server]

    async def close(self) -> None:
        """Stops opening sessions."""
        await cancel_all(list(self._opening.values()))

    async def _open(self, server: PeerID, channel: grpc.aio.Channel, deadline_s: float) -> Metadata:
        stub = make_stub(session_pb2_grpc.SessionServiceStub, channel)
        try:
            until = time.monotonic() + deadline_s
            with while_open():
                given: session_pb2.ChallengeReply = await stub.Challenge(
                    session_pb2.ChallengeRequest(), timeout=deadline_s
                )
                if len(given.challenge) > _MAX_CHALLENGE_BYTES:
                    raise ExpertError(StatusCode.DATA_LOSS, "the server gave no usable challenge")
                request = self.statement(server, given.challenge)
                reply: session_pb2.OpenReply = await stub.Open(request, timeout=until - time.monotonic())
        except grpc.aio.AioRpcError as error:
            raise ExpertError(error.code(), f"no session: {printable(error.details() or '')}") from error
        if len(reply.session) > _MAX_SESSION_BYTES:
            raise ExpertError(StatusCode.DATA_LOSS, "the server gave no usable session")
        metadata = ((SESSION_KEY, reply.session),)
        # NaN counts as the least
        lifetime_s = min(max(_LEAST_LIFETIME_S, reply.lifetime_s), _MOST_LIFETIME_S)
        self._known[server] = metadata, time.monotonic() + _RENEW_AT * lifetime_s
        return metadata

    def statement(self, server: PeerID, challenge: bytes) -> session_pb2.OpenRequest:
        """Proves this peer's identity to the server that gave the challenge."""
        statement = session_pb2.OpenStatement(
            protocol_version=PROTOCOL_VERSION,
            swarm_id=self._swarm_id,
            server=server.to_bytes(),
            caller=self._identity.peer_id.to_bytes(),
            challenge=challenge,
            rights=self._rights,
            badge=self._admission.badge,
        ).SerializeToString()
        return session_pb2.OpenRequest(
            statement=statement,
            public_key=self._identity.public_key,
            signature=self._identity.sign(statement, SESSION_DOMAIN),
        )

    def _note_opened(self, server: PeerID, task: "asyncio.Task[Metadata]") -> None:
        del self._opening[server]
        if not task.cancelled():
            task.exception()  # those who wait get the error; perhaps nobody waits any more


def session_named(context: "grpc.aio.ServicerContext[Any, Any]") -> bytes:
    """The session that a call names; empty if it names none."""
    for key, value in context.invocation_metadata() or ():
        if key == SESSION_KEY and isinstance(value, bytes):
            return value
    return b""
