"""A network of many peers in one process: Talkoot's DHT nodes with calls in memory, and a clock that jumps.

The nodes with their routing tables and stores, and all of `dht/`, are real. The transport, the clock and the keys are
simulated: signatures of 10,000 peers would take too long to verify, so here a peer signs with a hash, of
the same size.
"""

import asyncio
import hashlib
import math
import random
import selectors
from collections import Counter, deque
from collections.abc import Callable, Collection, Container, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import Context
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count, islice
from typing import ParamSpec, TypeVar, TypeVarTuple, cast
from unittest.mock import patch

from peer.bounded import BoundedDict
from peer.errors import RecordError
from peer.identity import CERTIFICATE_BYTES, PUBLIC_KEY_BYTES, SIGNATURE_BYTES, PeerID
from peer.kademlia.contacts import KNOWN_OF_KEY, MOST_KNOWN, PlaceIndex
from peer.kademlia.node import Handler
from peer.transport.addresses import Multiaddress
from peer.wire import contact_pb2, dht_pb2

EPOCH = 1_800_000_000.0
"""Unix time at which a simulation begins."""
CALL_OVERHEAD_BYTES = 100
"""The approximate size of frames, headers and acknowledgements for each message."""
_CERTIFICATE = bytes(CERTIFICATE_BYTES)
_CONTACT_BYTES = 205
_NAME_BYTES = 34
_DER_KEY_BYTES = 91
_MOST_CONTACTS = 2048
_CLOCK_RESOLUTION_S = 1e-9
"""Timers that are due within this time of each other run in the same step."""
P = ParamSpec("P")
T = TypeVar("T")
Ts = TypeVarTuple("Ts")
_SLEEP = asyncio.sleep


class _Sleep:
    """What a sleeping task awaits: a future to the task, and to the loop a handle that wakes the task.

    With asyncio's classes, that would be three objects, and two more steps for each sleep.
    """

    __slots__ = (
        "_asyncio_future_blocking",
        "_callback",
        "_context",
        "_is_cancelled",
        "_loop",
        "is_over",
        "result",
    )

    def __init__(self, loop: "VirtualLoop") -> None:
        self._loop = loop
        self._is_cancelled = self.is_over = False
        self._asyncio_future_blocking = False
        self.result = loop.result_of_ended

    def __await__(self) -> "Generator[_Sleep, None, None]":
        """Returns itself: a generator would take as much memory once more."""
        self._asyncio_future_blocking = True  # so asyncio knows that it was awaited
        return cast("Generator[_Sleep, None, None]", self)

    def __next__(self) -> "_Sleep":
        if self.is_over:
            raise StopIteration
        return self

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def add_done_callback(self, callback: "Callable[[_Sleep], object]", *, context: Context) -> None:
        """The task calls this once, after it has begun to wait."""
        self._callback, self._context = callback, context

    def cancel(self, msg: object = None) -> bool:
        if self.is_over or self._is_cancelled:
            return False
        self._is_cancelled = True
        self.result = self._loop.result_of_cancelled
        self._loop.call_soon(self._callback, self, context=self._context)
        del self._callback  # it refers to the task
        return True

    def cancelled(self) -> bool:
        return self._is_cancelled

    def _run(self) -> None:
        callback = self._callback
        del self._callback  # a traceback may keep this frame
        self._context.run(callback, self)
        del callback


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop in simulated time: when it would sleep, the clock jumps to the end of that sleep. What it runs must
    use no sockets and no threads.

    Its heap compares numbers rather than timers, its steps poll nothing, and a sleep needs no timer. So a simulation
    spends less time here than in the loop that this class is derived from.
    """

    _ready: deque[asyncio.Handle | _Sleep]
    """Callbacks that are due, in the order in which `call_soon` adds them."""
    _stopping: bool

    def __init__(self) -> None:
        super().__init__(selectors.SelectSelector())
        self._now = 0.0
        self._timers: list[tuple[float, int, asyncio.TimerHandle | _Sleep]] = []
        """A heap: when each timer or sleep is due, a number that rises, and the timer or sleep."""
        self._numbers = count()
        ended, cancelled = self.create_future(), self.create_future()
        ended.set_result(None)
        cancelled.cancel()
        self.result_of_ended: Callable[[], None] = ended.result
        """What a task calls when its sleep has ended. Not written in Python: a traceback would keep the frame."""
        self.result_of_cancelled: Callable[[], None] = cancelled.result

    def time(self) -> float:
        return self._now

    def unix_time(self) -> float:
        return EPOCH + self._now

    async def sleep(self, seconds: float, result: T | None = None) -> T | None:
        """Stands for `asyncio.sleep`."""
        if seconds <= 0:
            return await _SLEEP(0, result)
        sleep = _Sleep(self)
        heappush(self._timers, (self._now + seconds, next(self._numbers), sleep))
        await sleep
        return result

    def call_at(
        self,
        when: float,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        heappush(self._timers, (when, next(self._numbers), timer))
        return timer

    def call_soon(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """asyncio calls this. A cancelled timer stays in the heap until it would have been due."""

    def _run_once(self) -> None:
        """One step of the loop, which asyncio repeats until it is stopped."""
        ready, timers = self._ready, self._timers
        while timers and timers[0][2].cancelled():
            heappop(timers)
        if not ready and not self._stopping:
            if not timers:
                raise RuntimeError("everything in the simulation waits, and nothing will happen any more")
            self._now = max(self._now, timers[0][0])
        ends = self._now + _CLOCK_RESOLUTION_S
        while timers and timers[0][0] < ends:
            due = heappop(timers)[2]
            if isinstance(due, _Sleep):
                due.is_over = True
            ready.append(due)
            del due  # a traceback may keep this frame
        for _ in range(len(ready)):
            handle = ready.popleft()
            if not handle.cancelled():
                handle._run()
            del handle  # a traceback may keep this frame


@dataclass(frozen=True)
class Link:
    """The properties of the network between any two peers."""

    rtt_s: float = 0.1
    jitter: float = 0.1
    """The largest share of the round trip by which a call may be faster or slower, evenly distributed."""
    loss: float = 0.0
    """The share of the calls that get no answer."""


@dataclass
class Traffic:
    """Counts of what was sent."""

    calls: int = 0
    sent: int = 0
    """Bytes of requests and answers together."""
    largest: int = 0
    """Bytes of the largest value in any answer."""
    by_method: Counter[str] = field(default_factory=Counter)
    """Calls, by method."""


class Network:
    """All reachable peers. A dead peer does not respond at all. That is the hardest case, since callers must wait."""

    def __init__(self, link: Link, seed: int) -> None:
        self.link = link
        self.rng = random.Random(seed)
        self.traffic = Traffic()
        self.peers: dict[bytes, SimulatedTransport] = {}
        self.neighbourhoods: dict[PeerID, str] = {}
        """The neighbourhoods of peers, for tests in which they matter."""

    def kill(self, peer_ids: Collection[PeerID]) -> None:
        for peer_id in peer_ids:
            del self.peers[peer_id.to_bytes()]

    async def call(self, sender: PeerID, receiver: PeerID, method: str, request: bytes) -> bytes:
        """Makes a call. Without an answer it lasts until the caller gives up."""
        self._count(request)
        self.traffic.calls += 1
        self.traffic.by_method[method] += 1
        link = self.link
        one_way_s = link.rtt_s / 2 * (1 + link.jitter * self.rng.uniform(-1, 1))
        is_lost = self.rng.random() < link.loss
        await asyncio.sleep(one_way_s)
        peer = self.peers.get(receiver.to_bytes())
        if is_lost or peer is None:
            await asyncio.get_running_loop().create_future()
        assert peer is not None
        answer = await peer.handlers[method](sender, request)
        self._count(answer)
        if method == "find":
            for result in dht_pb2.FindResponse.FromString(answer).results:
                self.traffic.largest = max(self.traffic.largest, len(result.value))
        await asyncio.sleep(one_way_s)
        return answer

    def _count(self, message: bytes) -> None:
        self.traffic.sent += len(message) + CALL_OVERHEAD_BYTES


class NoContacts:
    """The contacts of peers that are reached by their PeerIDs alone."""

    def learn(self, message: contact_pb2.Contact, whose: Container[PeerID]) -> PeerID | None:
        return None

    def note(self, address: Multiaddress) -> None: ...

    def message(self, peer_id: PeerID) -> contact_pb2.Contact | None:
        return None

    def reaches(self, peer_id: PeerID) -> bool:
        return True

    def neighbourhood_of(self, peer_id: PeerID) -> str:
        return ""

    def origin_of(self, peer_id: PeerID) -> str:
        return ""

    def known(self, keys: Iterable[int]) -> dict[int, PeerID]:
        return {}


class SimulatedContacts:
    """Contacts as large as real ones, of which only the PeerID is used. They do not expire."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._known = BoundedDict[PeerID, None](_MOST_CONTACTS)
        self._places = PlaceIndex()

    def add(self, peer_id: PeerID) -> None:
        if peer_id not in self._known:
            self._places.add(peer_id)
            if len(self._known) == _MOST_CONTACTS:
                self._places.remove(next(iter(self._known)))
        self._known[peer_id] = None

    def learn(self, message: contact_pb2.Contact, whose: Container[PeerID]) -> PeerID | None:
        peer_id = PeerID(message.statement[:_NAME_BYTES])
        if peer_id not in whose:
            return None
        self.add(peer_id)
        return peer_id

    def note(self, address: Multiaddress) -> None:
        self.add(address.peer_id)

    def message(self, peer_id: PeerID) -> contact_pb2.Contact | None:
        return contact_of(peer_id) if peer_id in self._known else None

    def reaches(self, peer_id: PeerID) -> bool:
        return peer_id in self._known

    def neighbourhood_of(self, peer_id: PeerID) -> str:
        return self._network.neighbourhoods.get(peer_id, "")

    def origin_of(self, peer_id: PeerID) -> str:
        return self.neighbourhood_of(peer_id)

    def known(self, keys: Iterable[int]) -> dict[int, PeerID]:
        found: dict[int, PeerID] = {}
        for key in keys:
            found.update(self._places.nearest(key, KNOWN_OF_KEY))
        return dict(islice(found.items(), MOST_KNOWN))


def contact_of(peer_id: PeerID) -> contact_pb2.Contact:
    """A contact as large as a real one with a single address."""
    statement = peer_id.to_bytes().ljust(_CONTACT_BYTES - SIGNATURE_BYTES, b"\0")
    return contact_pb2.Contact(statement=statement, signature=bytes(SIGNATURE_BYTES))


class SimulatedTransport:
    """One peer's access to the network, in which a PeerID is enough to reach a peer."""

    def __init__(self, network: Network, peer_id: PeerID, contacts: SimulatedContacts | None = None) -> None:
        """`contacts`: None if this peer has none."""
        self.peer_id = peer_id
        self.contacts = NoContacts() if contacts is None else contacts
        self._own = None if contacts is None else contact_of(peer_id)
        self.handlers: dict[str, Handler] = {}
        self._network = network
        network.peers[peer_id.to_bytes()] = self

    async def call(self, peer_id: PeerID, method: str, request: bytes, deadline_s: float) -> bytes | None:
        try:
            async with asyncio.timeout(deadline_s):
                return await self._network.call(self.peer_id, peer_id, method, request)
        except TimeoutError:
            return None

    def own_contact(self) -> contact_pb2.Contact | None:
        return self._own

    async def serve(self, method: str, handler: Handler) -> None:
        self.handlers[method] = handler


class SimulatedIdentity:
    """Stands for `peer.identity.Identity`. Any peer could sign for any other, but no peer here does."""

    __slots__ = ("_number", "peer_id")

    def __init__(self, number: int) -> None:
        self._number = number
        self.peer_id = _peer_id_of(self.public_key)

    @property
    def public_key(self) -> bytes:
        """Made anew each time, because a simulation has many peers."""
        return self._number.to_bytes(PUBLIC_KEY_BYTES, "big")

    def sign(self, data: bytes) -> bytes:
        return _signature(self.public_key, data)

    def make_certificate(self) -> bytes:
        """A certificate of the right size, which all peers share."""
        return _CERTIFICATE


@contextmanager
def simulated_world() -> Iterator[VirtualLoop]:
    """An event loop in simulated time; until the block ends, all DHT code uses its clock."""
    loop = VirtualLoop()
    stand_ins: Mapping[str, object] = {
        "asyncio.sleep": loop.sleep,
        "asyncio.to_thread": _at_once,
        "peer.loop._SLICE_S": math.inf,  # how long work really takes must not change the order of tasks
        "dht.records.peer_id_of": _peer_id_of,
        "dht.records.verify": _verify,
        "dht.announcements.certificate_pem": lambda certificate, peer_id: _CERTIFICATE,
    }
    with ExitStack() as stack:
        for target, stand_in in stand_ins.items():
            stack.enter_context(patch(target, stand_in))
        try:
            yield loop
        finally:
            for task in asyncio.all_tasks(loop):
                task.cancel()
            loop.run_until_complete(asyncio.sleep(0))
            loop.close()


async def _at_once(work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Simulated time does not pass while a thread works."""
    return work(*args, **kwargs)


def _peer_id_of(public_key: bytes) -> PeerID:
    der = public_key.rjust(_DER_KEY_BYTES, b"\0")
    return PeerID(b"\x12\x20" + hashlib.sha256(der).digest())


def _signature(public_key: bytes, data: bytes) -> bytes:
    return hashlib.sha256(public_key + data).digest() * (SIGNATURE_BYTES // 32)


def _verify(public_key: bytes, data: bytes, signature: bytes) -> None:
    if signature != _signature(public_key, data):
        raise RecordError("the signature is wrong")
