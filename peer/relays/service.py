"""The relay's side: connects callers to peers that hold a reservation here, within the limits that its owner sets.

It sends no more than it receives, except for one small message to each end. The bytes of a circuit have connections of
their own, and it holds few of them: a slow receiver slows down its sender.
"""

import asyncio
import contextlib
import time
from collections import Counter as Multiset
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn, TypeAlias

import grpc
from grpc import StatusCode
from prometheus_client import CollectorRegistry, Counter, Gauge

from peer.bounded import Owner, counting
from peer.budget import FairBudget, interruptible
from peer.budget import Reservation as Place
from peer.errors import ExpertError
from peer.identity import PeerID
from peer.loop import first_of
from peer.metrics import start_at_zero
from peer.rates import FairLock, FairTurns, RateLimit, TokenBucket, TokenBuckets
from peer.relays.circuits import ACCEPT_S, CIRCUITS_TO_PEER, IDLE_S, read_peer
from peer.rpc.connections import Connections, Expected
from peer.rpc.sessions import Session, Sessions
from peer.transport.pipes import ByteStream, Pipe, SocketStream, copy_both_ways
from peer.wire import relay_pb2, relay_pb2_grpc, session_pb2

_RESERVATIONS, _RESERVATIONS_NEAR = 128, 16
"""Reservations in all, and in one neighbourhood."""
_CIRCUITS, _CIRCUITS_OF_CALLER, _CIRCUITS_TO_TARGET = 128, 32, CIRCUITS_TO_PEER
"""The most open circuits: in all, of one caller, and to one peer. A swarm may have only one relay, through which a
trainer calls all its nodes. A circuit holds up to half a MiB in each direction.
"""
_DIALS_PER_S, _DIALS_AT_ONCE = 4.0, 64
"""Dials by one caller."""
_TURNS_PER_S, _TURNS_AT_ONCE = 8.0, 32
"""How many turns the callers of one peer get, per second and in a burst."""
_REQUESTS_PER_S, _REQUESTS_AT_ONCE = 0.5, 8
"""How many requests a peer with a reservation may send to show that it is still there."""
_LONGEST_TURN_S = 3.0
"""The longest time for which a reply waits its turn. A peer counts a relay as slow after one second."""
_OFFERS = 64
"""The most callers that a peer has not been told of yet."""
_CHUNK_BYTES = 64 * 2**10
_LEAST_BYTES = 512
"""A smaller chunk counts as this many bytes, because even a small one costs time."""
_ADMITS_EVERY_S = 10.0
"""How often a long call is checked, in case its caller has been denied or revoked."""
_CROWDED = "this relay has no room for more: try another"
_DISPLACED = "others need this relay, too, and this has more than its share"
_RETRY_S = 10.0

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


@dataclass(eq=False)
class _Reservation:
    """A peer that can be dialled here."""

    session: Session
    end: Callable[[], None]
    """Gives up the reservation's place at once, and ends its call."""
    replies: "asyncio.Queue[relay_pb2.ReserveReply]" = field(default_factory=lambda: asyncio.Queue(_OFFERS))
    circuits: FairBudget = field(default_factory=lambda: FairBudget(_CIRCUITS_TO_TARGET))
    turns: FairTurns = field(
        default_factory=lambda: FairTurns(_TURNS_PER_S, _TURNS_AT_ONCE, most=_CIRCUITS, near=8)
    )
    """Turns of the callers of this peer."""


class _End(SocketStream):
    """One end of a circuit."""

    def __init__(self, pipe: Pipe, take: Callable[[int], Awaitable[None]]) -> None:
        """`take`: waits until so many bytes may be sent."""
        super().__init__(pipe, _CHUNK_BYTES)
        self._take = take

    async def write(self, data: bytes) -> None:
        await self._take(len(data))
        await super().write(data)


class RelayServicer(relay_pb2_grpc.RelayServiceServicer):
    """Relays for peers that have a session here."""

    def __init__(
        self,
        sessions: Sessions,
        connections: Connections,
        relay_mbit: float,
        upload: RateLimit | None = None,
        metrics: CollectorRegistry | None = None,
    ) -> None:
        """`connections`: where circuits arrive. `relay_mbit`: for all circuits together, in Mbit/s; 0: it does not
        relay. `upload`: of the whole peer.
        """
        Gauge(
            "talkoot_relay_reservations", "Peers that others reach through this one.", registry=metrics
        ).set_function(lambda: len(self._reservations))
        Gauge("talkoot_relay_circuits", "Connections relayed now.", registry=metrics).set_function(
            lambda: self._circuits.used
        )
        self.bytes: Counter = Counter("talkoot_relay_bytes", "Relayed, both ways.", registry=metrics)
        refused = Counter(
            "talkoot_relay_refused",
            "Reservations and circuits that this relay refused or ended: it relays for nobody, there were too many, "
            "the peer is not here, did not accept, or spoke nonsense.",
            ["reason"],
            registry=metrics,
        )
        self.refused: Counter = start_at_zero(
            refused, "off", "crowded", "displaced", "hasty", "absent", "unaccepted", "malformed"
        )
        self._sessions = sessions
        self._connections = connections
        self._upload = upload or RateLimit(None)
        self._rate = RateLimit(relay_mbit * 1e6 / 8) if relay_mbit > 0 else None
        self._turn = FairLock()  # all circuits together compete with other uploads as one
        self._reservations: dict[PeerID, _Reservation] = {}
        self._places = FairBudget(_RESERVATIONS)
        self._circuits = FairBudget(_CIRCUITS)
        self._of_callers: Multiset[PeerID] = Multiset()
        """The number of circuits of each caller."""
        self._dials = TokenBuckets[PeerID](_DIALS_PER_S, _DIALS_AT_ONCE)

    def add_to(self, server: grpc.aio.Server) -> None:
        relay_pb2_grpc.add_RelayServiceServicer_to_server(self, server)

    async def Reserve(self, requests: AsyncIterator[relay_pb2.ReserveRequest], context: Context) -> None:
        await anext(requests, None)
        session = self._require(context)
        with interruptible(_DISPLACED) as interrupt, self._reserving(session, interrupt) as reservation:
            await self._wait_turn(session)
            await context.write(relay_pb2.ReserveReply())
            await first_of(
                self._read_requests(requests, session, reservation), _write_all(reservation.replies, context)
            )

    async def Dial(self, request: relay_pb2.DialRequest, context: Context) -> None:
        session = self._require(context)
        with self._counting_malformed():
            target = read_peer(request.peer_id)
        reservation = self._reservations.get(target)
        if reservation is None:  # a caller that false records led here may still dial others
            self._refuse("absent", StatusCode.NOT_FOUND, "this peer has no reservation here")
        now = time.monotonic()
        wait_s = self._dials.wait_s(session.caller, now)
        self._dials.take(session.caller, 1, now)
        if wait_s:
            self._refuse("hasty", StatusCode.RESOURCE_EXHAUSTED, "you dial too often", wait_s)
        with (
            interruptible(_DISPLACED) as interrupt,
            self._opening(session, reservation, interrupt),
            self._connections.expecting(target) as theirs,
            self._connections.expecting(session.caller) as ours,
        ):
            offer = self._offer(theirs, session, reservation)
            there = await self._in_time(offer, "that peer does not accept the circuit")
            await context.write(relay_pb2.DialReply(circuit=ours.name))
            here = await self._in_time(ours.arrived, "you have not opened your end of the circuit")
            ends = self._end(here, session.owner), self._end(there, session.owner)
            await self._carry(*ends, (session, reservation.session))

    def _require(self, context: Context) -> Session:
        """Call it after the first message was read: while a caller is still silent, gRPC does not tell it why its call
        ended.
        """
        session = self._sessions.require(context, session_pb2.RIGHT_RELAY)
        if self._rate is None:
            self._refuse("off", StatusCode.PERMISSION_DENIED, "this peer relays for nobody")
        return session

    @contextmanager
    def _reserving(self, session: Session, interrupt: Callable[[], None]) -> Iterator[_Reservation]:
        """A new reservation ends the peer's previous one, whose connection may have broken."""
        if (earlier := self._reservations.pop(session.caller, None)) is not None:
            earlier.end()
        if self._places.held(Owner.alone(session.near)) >= _RESERVATIONS_NEAR:
            self._refuse("crowded", StatusCode.RESOURCE_EXHAUSTED, _CROWDED, _RETRY_S)
        with self._holding([self._places], session.near, interrupt) as end:
            reservation = self._reservations[session.caller] = _Reservation(session, end)
            try:
                yield reservation
            finally:
                if self._reservations.get(session.caller) is reservation:
                    del self._reservations[session.caller]

    @contextmanager
    def _opening(
        self, session: Session, reservation: _Reservation, interrupt: Callable[[], None]
    ) -> Iterator[None]:
        """Holds a place among all circuits, and among those to that peer."""
        if self._of_callers[session.caller] >= _CIRCUITS_OF_CALLER:
            self._refuse("crowded", StatusCode.RESOURCE_EXHAUSTED, _CROWDED, _RETRY_S)
        places = self._holding([self._circuits, reservation.circuits], session.near, interrupt)
        with places, counting(self._of_callers, session.caller):
            yield

    @contextmanager
    def _holding(
        self, budgets: Sequence[FairBudget], near: str, interrupt: Callable[[], None]
    ) -> Iterator[Callable[[], None]]:
        """Holds one place in each budget. If others need one of them, all are given up at once.

        Yields a function that gives them up, and ends the call.
        """
        places: list[Place] = []
        owner = Owner.alone(near)

        def give_up() -> None:
            for place in places:
                place.release()

        def end() -> None:
            give_up()
            interrupt()

        def revoke() -> None:
            self.refused.labels("displaced").inc()
            end()

        try:
            try:
                for budget in budgets:  # if one has no place, nobody loses one in another
                    budget.require_room(owner, 1)
                for budget in budgets:
                    places.append(budget.reserve(owner, 1, revoke))
            except ExpertError:
                self._refuse("crowded", StatusCode.RESOURCE_EXHAUSTED, _CROWDED, _RETRY_S)
            yield end
        finally:
            give_up()

    async def _read_requests(
        self,
        requests: AsyncIterator[relay_pb2.ReserveRequest],
        session: Session,
        reservation: _Reservation,
    ) -> None:
        """Answers each request, so that the peer knows that its relay is still there."""
        bucket = TokenBucket(_REQUESTS_PER_S, _REQUESTS_AT_ONCE, time.monotonic())
        async for _ in requests:
            is_hasty = bucket.take(1, time.monotonic()) > 0
            self._require_admitted(session)
            if not is_hasty:
                await self._wait_turn(session)
            if is_hasty or reservation.replies.full():
                self._refuse("hasty", StatusCode.RESOURCE_EXHAUSTED, "you say too often that you are there")
            reservation.replies.put_nowait(relay_pb2.ReserveReply())

    async def _offer(self, theirs: Expected, session: Session, reservation: _Reservation) -> Pipe:
        """Tells the peer who calls, and waits until it accepts. If this relay is busy, the caller's other dials win."""
        is_admitted = await reservation.turns.turn(session.near, session.name)
        if is_admitted:
            await self._wait_turn(session)
        if not is_admitted or reservation.replies.full():
            self._refuse(
                "hasty", StatusCode.RESOURCE_EXHAUSTED, "too many callers are dialling that peer", 1.0
            )
        reservation.replies.put_nowait(
            relay_pb2.ReserveReply(circuit=theirs.name, caller=session.caller.to_bytes())
        )
        return await theirs.arrived

    async def _in_time(self, end: Awaitable[Pipe], late: str) -> Pipe:
        try:
            async with asyncio.timeout(ACCEPT_S):
                return await end
        except TimeoutError:
            self._refuse("unaccepted", StatusCode.UNAVAILABLE, late)

    def _end(self, pipe: Pipe, owner: Owner) -> ByteStream:
        """An end of a circuit that this caller has dialled."""
        return _End(pipe, partial(self._take, owner))

    async def _carry(self, here: ByteStream, there: ByteStream, sessions: Sequence[Session]) -> None:
        """Copies until either end closes, or the peer of one of these sessions is no longer admitted."""
        with contextlib.suppress(OSError):
            await first_of(
                copy_both_ways(here, there, IDLE_S, self.bytes.inc), self._watch_admission(sessions)
            )

    async def _watch_admission(self, sessions: Sequence[Session]) -> None:
        while True:
            await asyncio.sleep(_ADMITS_EVERY_S)
            for session in sessions:
                self._require_admitted(session)

    async def _take(self, owner: Owner, size: int) -> None:
        """Waits until so many bytes may be sent in a circuit that this caller has dialled. Many circuits of one group
        get no more than its share.
        """
        assert self._rate is not None
        async with self._turn.held_by(owner):
            await self._rate.take(max(size, _LEAST_BYTES))
            await self._upload.take(size)

    async def _wait_turn(self, session: Session) -> None:
        """Waits as long as a piece of a circuit would, so that this peer learns how busy the relay is. No longer than
        is needed for that: if it is the only relay, slow is better than none.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LONGEST_TURN_S):
                await self._take(session.owner, _LEAST_BYTES)

    def _require_admitted(self, session: Session) -> None:
        if not self._sessions.still_admits(session):
            raise ExpertError(StatusCode.PERMISSION_DENIED, "you are no longer admitted")

    def _refuse(self, reason: str, status: StatusCode, message: str, retry_s: float = 0.0) -> NoReturn:
        self.refused.labels(reason).inc()
        raise ExpertError(status, message, retry_s)

    @contextmanager
    def _counting_malformed(self) -> Iterator[None]:
        try:
            yield
        except ExpertError:
            self.refused.labels("malformed").inc()
            raise


async def _write_all(replies: "asyncio.Queue[relay_pb2.ReserveReply]", context: Context) -> None:
    while True:
        await context.write(await replies.get())
