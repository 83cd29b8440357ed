"""The side of a peer that others can't reach directly: it keeps reservations at relays, and accepts calls that come
through them.

A relay may lie about who calls, and may call again and again. So the calls of one relay are limited, and count as one
neighbourhood. TLS between the two ends runs inside the circuit: a relay can end a circuit, and nothing else.
"""

import asyncio
import logging
import math
import random
import time
from collections import Counter as Multiset
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeAlias

import grpc
from prometheus_client import CollectorRegistry, Counter, Gauge

from peer.bounded import counting
from peer.errors import ExpertError, UnreachableError
from peer.identity import PeerID
from peer.loop import Restarts, TaskSet, first_of
from peer.metrics import start_at_zero
from peer.rates import Backoff, TokenBucket
from peer.relays.circuits import BEAT_S, CIRCUITS_TO_PEER, read_peer
from peer.relays.client import Call, RelayClient, breaking
from peer.rpc.channels import Contact, KnownPeer
from peer.rpc.connections import NAME_BYTES
from peer.transport.addresses import Multiaddress, RemoteEnd
from peer.transport.pipes import Exit, aborting
from peer.wire import relay_pb2

logger: logging.Logger = logging.getLogger(__name__)

Candidates: TypeAlias = Callable[[], Awaitable[Sequence[Contact]]]
"""Peers that may act as relays, the best first. May raise UnreachableError."""
WANTED = 2
"""The number of relays to keep: if one dies, the other still works."""
_ENDPOINTS_TRIED = 3
"""How many endpoints of one relay are tried."""
_LOOK_S = 5.0
"""The pause between two searches when no relay was found."""
_SILENT_S = 3 * BEAT_S
"""A relay answers each request. One that is silent for this long has gone."""
_STEADY_S = 60.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 2.0, 300.0
"""Pauses before a failed relay is tried again. They double until the relay has kept a reservation for a while."""
_REMEMBERED = 1024
_SLOW_S, ANSWERS = 1.0, 3
"""A relay is slow if each of so many answers in a row took longer than this. Then more passes through it than its line,
or the limit that its owner set, can carry.
"""
_SEARCH_S, _LONGEST_SEARCH_S = 60.0, 960.0
"""How long a relay must have been slow before another is looked for, and the longest pause between two searches. The
pause doubles with each search that finds none.
"""
_SETTLED_S = 300.0
"""How long this peer keeps its relays after it has replaced a slow one, so that others can learn of the change."""
_CIRCUITS_OF_RELAY = CIRCUITS_TO_PEER + 16
"""A relay that ends circuits to make room for others may announce these before this peer sees the end."""
_REPLIES_PER_S, _REPLIES_AT_ONCE = 10.0, 64
_ABUSE_S = 8.0
"""A relay is given up once it exceeds its rate by this many seconds' worth."""


class Answers:
    """How long a relay takes to answer. Pure: times are arguments, in seconds of a monotonic clock."""

    def __init__(self) -> None:
        self._asked = deque[float](maxlen=ANSWERS)
        self._took = deque[float](maxlen=ANSWERS)

    def ask(self, now: float) -> None:
        self._asked.append(now)

    def answer(self, now: float) -> None:
        if self._asked:  # otherwise the relay answers what nobody has asked
            self._took.append(now - self._asked.popleft())

    @property
    def fastest_s(self) -> float:
        """How long the fastest of the last answers took; 0 while there are not enough of them."""
        return min(self._took) if len(self._took) == ANSWERS else 0.0


class SlowRelays:
    """Decides when to look for a faster relay. Pure: `now` is an argument."""

    def __init__(self, jitter: Callable[[], float]) -> None:
        """`jitter`: draws the share of a pause after which a search may begin. The peers of an overloaded relay should
        not all leave it at once.
        """
        self._searches = Backoff[PeerID](_SEARCH_S, _LONGEST_SEARCH_S, _REMEMBERED, jitter)
        self._kept_until = -math.inf

    def should_replace(self, relay: PeerID, fastest_s: float, now: float) -> bool:
        """Call it now and then for each relay. `fastest_s`: how long the fastest of its last answers took."""
        if fastest_s <= _SLOW_S:
            self._searches.succeeded(relay)
            return False
        if not self._searches.pause_s(relay):
            self._searches.failed(relay, now)
        return now >= self._kept_until and not self._searches.holds_back(relay, now)

    def searched(self, relay: PeerID, has_found: bool, now: float) -> None:
        """Call it after a search for a faster relay than this one."""
        if has_found:
            self._searches.succeeded(relay)
            self._kept_until = now + _SETTLED_S
        else:
            self._searches.failed(relay, now)


class Reservations:
    """Keeps this peer reachable through relays. For one event loop; close it when done."""

    def __init__(
        self,
        client: RelayClient,
        metrics: CollectorRegistry | None = None,
        restarts: Restarts | None = None,
    ) -> None:
        Gauge(
            "talkoot_relays", "Relays through which others reach this peer now.", registry=metrics
        ).set_function(lambda: len(self._held))
        offers = Counter(
            "talkoot_relay_offers", "Callers whom relays named to this peer.", ["outcome"], registry=metrics
        )
        self.offers: Counter = start_at_zero(offers, "accepted", "refused")
        self.refusal: str = ""
        """Why the last relay that was asked refused; empty if it did not, or if none was asked."""
        self._client = client
        self._exit: Exit | None = None
        self._held: dict[PeerID, Multiaddress] = {}
        """The addresses of reservations, by relay."""
        self._busy: dict[PeerID, Contact] = {}
        """Relays that are being tried or hold a reservation."""
        jitter = partial(random.SystemRandom().uniform, 0.5, 1.0)
        self._pauses = Backoff[PeerID](_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _REMEMBERED, jitter)
        """Relays that have failed."""
        self._slow = SlowRelays(jitter)
        self._searching = asyncio.Lock()
        """Held during a search for a faster relay, so that this peer never leaves all its relays at once."""
        self._circuits: Multiset[PeerID] = Multiset()
        """Open circuits by relay."""
        self._keeping = TaskSet(restarts)
        self._accepting = TaskSet(restarts)

    @property
    def addresses(self) -> tuple[Multiaddress, ...]:
        """The addresses by which others reach this peer now."""
        return tuple(self._held.values())

    def set_exit(self, open_exit: Exit) -> None:
        """From now on, connects callers to this exit. Until then, none is accepted."""
        self._exit = open_exit

    def keep(self, candidates: Candidates) -> None:
        """Keeps reservations from now on, if it does not already."""
        if not self._keeping:
            for number in range(WANTED):
                self._keeping.supervise(f"keep reservation {number + 1}", lambda: self._keep(candidates))

    async def drop(self) -> None:
        """Gives up the reservations. Open circuits stay open."""
        await self._keeping.aclose()

    async def close(self) -> None:
        """Ends everything. Closing twice is harmless."""
        await self._keeping.aclose()
        await self._accepting.aclose()

    async def _keep(self, candidates: Candidates) -> None:
        faster: Contact | None = None
        while True:
            is_free = faster is not None and faster.peer_id not in self._busy
            contact, faster = faster if is_free else await self._find(candidates), None
            if contact is None:
                await asyncio.sleep(_LOOK_S)
                continue
            began = time.monotonic()
            try:
                with self._using(contact):
                    faster = await self._hold(contact, candidates)
            except UnreachableError as error:
                self.refusal = str(error)
                logger.debug("no reservation: %s", error)
            except OSError as error:
                self.refusal = f"relay {contact.peer_id} has gone: {error or 'it is silent'}"
                logger.debug("a reservation ended: %s", self.refusal)
            if time.monotonic() - began > _STEADY_S:
                self._pauses.succeeded(contact.peer_id)
            self._pauses.failed(contact.peer_id, time.monotonic())

    async def _find(self, candidates: Candidates) -> Contact | None:
        try:
            return self._choose(await candidates())
        except UnreachableError as error:
            logger.debug("no relays were found: %s", error)
            return None

    @contextmanager
    def _using(self, contact: Contact) -> Iterator[None]:
        self._busy[contact.peer_id] = contact
        try:
            yield
        finally:
            del self._busy[contact.peer_id]

    def _choose(self, contacts: Sequence[Contact]) -> Contact | None:
        """The best candidate, if possible on a machine where this peer has no other relay."""
        now = time.monotonic()
        machines = {address.ip for contact in self._busy.values() for address in contact.addresses}
        free = [
            contact
            for contact in contacts
            if contact.peer_id not in self._busy
            and contact.peer_id != self._client.peer_id
            and contact.addresses
            and not self._pauses.holds_back(contact.peer_id, now)
        ]
        return min(free, key=lambda c: any(address.ip in machines for address in c.addresses), default=None)

    async def _hold(self, contact: Contact, candidates: Candidates) -> Contact | None:
        """Holds a reservation until it ends. Returns another relay if that answers faster. Raises UnreachableError or
        OSError.
        """
        relay, call = await self._reserve(contact)
        answers = Answers()
        try:
            self._held[relay.peer_id] = Multiaddress.of(
                relay.addresses[0], self._client.peer_id, relay.peer_id
            )
            self.refusal = ""
            return await first_of(
                _say_there(call, answers),
                self._read_replies(relay, call, answers),
                self._find_faster(relay.peer_id, answers, candidates),
            )
        finally:
            call.cancel()
            self._held.pop(relay.peer_id, None)

    async def _find_faster(self, relay: PeerID, answers: Answers, candidates: Candidates) -> Contact:
        """Waits until this relay has been slow for a while and another answers faster. Returns that one."""
        while True:
            await asyncio.sleep(BEAT_S)
            async with self._searching:
                if not self._slow.should_replace(relay, answers.fastest_s, time.monotonic()):
                    continue
                faster = await self._find(candidates)
                if faster is not None and not await self._reserves_within(answers.fastest_s, faster):
                    faster = None
                self._slow.searched(relay, faster is not None, time.monotonic())
            if faster is not None:
                logger.info("relay %s is slow: changing to %s", relay, faster.peer_id)
                return faster

    async def _reserves_within(self, seconds: float, contact: Contact) -> bool:
        """Whether a reservation there takes no longer, although that needs several answers."""
        try:
            with self._using(contact):
                async with asyncio.timeout(seconds):
                    _, call = await self._reserve(contact)
                call.cancel()
                return True
        except (UnreachableError, TimeoutError) as error:
            logger.debug("relay %s is not faster: %s", contact.peer_id, error)
            self._pauses.failed(contact.peer_id, time.monotonic())
            return False

    async def _reserve(self, contact: Contact) -> tuple[KnownPeer, Call]:
        """Makes a reservation at the first of the relay's endpoints that answers. Raises UnreachableError."""
        failure = UnreachableError("it has no address")
        for endpoint in contact.addresses[:_ENDPOINTS_TRIED]:
            relay = KnownPeer(contact.peer_id, (endpoint,), contact.certificate_pem)
            try:
                return relay, await self._client.reserve(relay)
            except UnreachableError as error:
                failure = error
        raise failure

    async def _read_replies(self, relay: KnownPeer, call: Call, answers: Answers) -> None:
        """Reads the relay's replies until they end. Raises OSError if the relay is silent, or brings too many calls."""
        bucket = TokenBucket(_REPLIES_PER_S, _REPLIES_AT_ONCE, time.monotonic())
        while True:
            async with asyncio.timeout(_SILENT_S):
                with breaking():
                    reply = await call.read()
            if reply is grpc.aio.EOF:
                return
            wait_s = bucket.take(1, time.monotonic())
            if wait_s > _ABUSE_S:
                raise ConnectionError("it announces too many callers")
            if not reply.circuit:
                answers.answer(time.monotonic())
                continue
            if wait_s or self._exit is None or self._circuits[relay.peer_id] >= _CIRCUITS_OF_RELAY:
                self.offers.labels("refused").inc()
                continue
            try:
                caller = read_peer(reply.caller)
            except ExpertError as error:
                raise ConnectionError(f"it names something that is not a caller: {error}") from error
            if len(reply.circuit) != NAME_BYTES:
                raise ConnectionError("it names something that is not a circuit")
            accepting = self._accept(relay, reply.circuit, caller, self._exit)
            self._accepting.spawn(accepting, "accept a caller of a relay")

    async def _accept(self, relay: KnownPeer, circuit: bytes, caller: PeerID, open_exit: Exit) -> None:
        try:
            with counting(self._circuits, relay.peer_id):
                pipe = await self._client.connect(relay, circuit)
                with aborting(pipe):
                    here = await open_exit(caller, RemoteEnd.through(relay.peer_id).neighbourhood)
                    self.offers.labels("accepted").inc()
                    await self._client.carry(here, pipe)
        except (UnreachableError, OSError) as error:
            logger.debug("a circuit of relay %s ended: %s", relay.peer_id, error)


async def _say_there(call: Call, answers: Answers) -> None:
    while True:
        await asyncio.sleep(BEAT_S)
        answers.ask(time.monotonic())
        with breaking():
            await call.write(relay_pb2.ReserveRequest())
