"""A node of the DHT: what it knows, and the calls that it makes.

A peer's position is the hash of its PeerID, whatever ID it claims. Only peers that answered a call of this node enter
the routing table: a peer that calls and says that it serves keys is called back first. A new peer is sent the records
that it should store. Signed records are renewed only by their writers, never by nodes.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Container, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import islice
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeVar

from google.protobuf.message import DecodeError, Message

from peer import clock
from peer.bounded import BoundedDict
from peer.identity import PeerID, is_peer_id
from peer.kademlia.routing import (
    BUCKET_SIZE,
    ID_BYTES,
    REPLICAS,
    RoutingTable,
    id_bytes,
    node_id_of,
    should_hand_over,
)
from peer.kademlia.storage import BoundedStorage, StoreBounds, StoreMetrics
from peer.kademlia.validation import (
    DICTIONARY,
    ITEM_OVERHEAD_BYTES,
    MAX_ANSWER_BYTES,
    MAX_DIGESTS,
    MAX_ENTRIES,
    MAX_ITEMS,
    Entries,
    EntryChecker,
    Validator,
    digest_of,
)
from peer.loop import TaskSet, TimeSlices
from peer.rates import Backoff, RateLimit, TokenBucket
from peer.transport.addresses import Multiaddress
from peer.wire import contact_pb2, dht_pb2

T = TypeVar("T")
Reply = TypeVar("Reply", bound=Message)
Handler = Callable[[PeerID, bytes], Awaitable[bytes]]
"""Answers a peer's message."""

_CALL_OVERHEAD_BYTES = 200
"""The approximate size of frames, headers and acknowledgements for a request and its answer."""
CALL_DEADLINE_S = 3.0
"""The deadline of one call to another node."""
_CALLED_BACK, _CALLED_BACK_NEAR = 16, 4
"""Callers that are called back at the same time, in all and in one neighbourhood."""
_MOST_TOLD, _TOLD_S = 1024, 300.0
"""This peer remembers which peers it has sent its contact: at most this many, for this long. A peer that restarts
forgets the contact, and gets it again within that time.
"""
_CONTACTS = 256
"""Contacts read in one answer. Those of the nearest nodes come first."""
_PAUSES_S = (5.0, 640.0)
"""How long a peer that did not answer is not asked, at first and at most."""
_HANDOVER_BURST_S = 16.0
"""How many seconds' worth of its rate the handover may use at once after a pause."""


class Spending:
    """Counts the bytes of DHT calls that are made for one purpose."""

    def __init__(self) -> None:
        self.bytes: int = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Counts the calls that are made in this block, and by tasks that begin in it."""
        before = _spending.set(self)
        try:
            yield
        finally:
            _spending.reset(before)


_spending: ContextVar[Spending | None] = ContextVar("_spending", default=None)
"""For what the current task makes its calls."""


class Contacts(Protocol):
    """Where other peers are reached. `peer.kademlia.contacts` has them for gRPC."""

    def learn(self, message: contact_pb2.Contact, whose: Container[PeerID]) -> PeerID | None:
        """Learns a contact from another peer, if it is valid and belongs to one of these peers."""
        ...

    def note(self, address: Multiaddress) -> None:
        """Adds an address that this peer's owner gave."""
        ...

    def message(self, peer_id: PeerID) -> contact_pb2.Contact | None:
        """The contact of a peer that was reached, to be passed on."""
        ...

    def reaches(self, peer_id: PeerID) -> bool:
        """Whether enough is known to call the peer."""
        ...

    def neighbourhood_of(self, peer_id: PeerID) -> str:
        """The neighbourhood where the peer was reached, or else where it says it is; empty if the neighbourhood does
        not matter.
        """
        ...

    def origin_of(self, peer_id: PeerID) -> str:
        """The neighbourhood that the peer called from; empty if it has not called lately."""
        ...

    def known(self, keys: Iterable[int]) -> dict[int, PeerID]:
        """The first bits of the NodeIDs of peers near these keys whose contacts this peer already has."""
        ...


class Transport(Protocol):
    """How messages reach other peers. A method is "ping", "store" or "find"."""

    @property
    def peer_id(self) -> PeerID:
        """This peer's own."""
        ...

    @property
    def contacts(self) -> Contacts: ...

    def own_contact(self) -> contact_pb2.Contact | None:
        """Where others reach this peer; None if they can't."""
        ...

    async def call(self, peer_id: PeerID, method: str, request: bytes, deadline_s: float) -> bytes | None:
        """The peer's reply; None if there is none in time."""
        ...

    async def serve(self, method: str, handler: Handler) -> None:
        """Answers other peers' calls from now on. The PeerID that the handler gets is proven."""
        ...


class Row(NamedTuple):
    """A packed entry to store."""

    key: int
    subkey: bytes
    """`DICTIONARY` if the value is a dictionary of entries."""
    value: bytes
    expires_at: float


class _CallBack(NamedTuple):
    """A call back to a peer that has called."""

    near: str
    """The neighbourhood that the peer called from."""
    keys: Sequence[int]
    """The keys that were stored here before the peer called."""


@dataclass(frozen=True)
class FindResult:
    """A peer's answer for one key."""

    entries: Entries
    """The accepted entries, without those that this peer already has."""
    nearer: dict[int, PeerID]
    """The nodes nearest to the key that the peer knows, by ID."""
    has_value: bool = False
    """Whether the peer has any entries, even if this peer has them all."""
    count: int = 0
    """If only some entries were wanted: how many the peer says it has, not counting index entries."""


class KademliaNode:
    """One node. It knows no peers at first. It serves others only through `peer.kademlia.server`."""

    def __init__(
        self,
        transport: Transport,
        validator: Validator | None = None,
        *,
        serves_dht: bool = True,
        bounds: StoreBounds | None = None,
        metrics: StoreMetrics | None = None,
        upload: RateLimit | None = None,
        now: Callable[[], float] = clock.now,
        rng: random.Random | None = None,
    ) -> None:
        """`validator`: None to accept anything that fits. `bounds`, `metrics`: for what others store here.

        `serves_dht`: whether others may look up and store keys here. It may change at any time. `upload`: counts the
        bytes that are handed over. `now`: Unix time in seconds.
        """
        self.transport = transport
        self.peer_id: PeerID = transport.peer_id
        self.node_id: int = node_id_of(self.peer_id.to_bytes())
        self.validator = validator
        self.serves_dht = serves_dht
        self.now = now
        self.bounds: StoreBounds = bounds or StoreBounds()
        self.metrics: StoreMetrics = metrics or StoreMetrics()
        self.upload: RateLimit = upload or RateLimit(None)
        self.table: RoutingTable = RoutingTable(self.node_id)
        self.storage: BoundedStorage = BoundedStorage(self.bounds, self.metrics, now, rng)
        self.backoff: Backoff[PeerID] = Backoff(*_PAUSES_S)
        """Peers that did not answer."""
        self.spent_bytes: int = 0
        """Bytes of this peer's calls to others: requests, answers, and a rough overhead for each."""
        self.spent_apart_bytes: int = 0
        """Those of them that a `Spending` has counted."""
        self._told: BoundedDict[PeerID, tuple[bytes, float]] = BoundedDict(_MOST_TOLD)
        """For each peer that was sent this one's contact: the contact's signature, and until when it is not sent again.
        """
        self._tasks = TaskSet()
        self._called_back: dict[PeerID, _CallBack] = {}
        """Peers that are being called back."""
        self._handover = TokenBucket(1.0, _HANDOVER_BURST_S, 0.0)
        """The budget for handing records over, in seconds at the rate `handed_bytes_per_s`."""

    async def close(self) -> None:
        """Ends all background tasks. A second call does nothing."""
        await self._tasks.aclose()

    def spawn(self, coroutine: Coroutine[Any, Any, T], name: str) -> "asyncio.Task[T]":
        """Starts a background task, which ends when the node is closed. `name`: what it does."""
        return self._tasks.spawn(coroutine, name)

    @property
    def info(self) -> dht_pb2.NodeInfo:
        """What this peer says about itself."""
        return dht_pb2.NodeInfo(node_id=id_bytes(self.node_id) if self.serves_dht else b"")

    def introduction(self, with_contact: bool = True) -> dht_pb2.NodeInfo:
        """What this peer says about itself, with its contact if others can reach it."""
        info, contact = self.info, self.transport.own_contact() if with_contact else None
        if contact is not None:
            info.contact.CopyFrom(contact)
        return info

    async def ping(
        self, peer_id: PeerID, deadline_s: float = CALL_DEADLINE_S, *, dials_back: bool = False
    ) -> dht_pb2.PingResponse | None:
        """Calls a peer that serves keys. If it answers, it enters the routing table; otherwise it leaves it.

        `dials_back`: asks the peer to dial back. Its clock is compared with this machine's.
        """
        answer = await self._ping(peer_id, deadline_s, dials_back)
        if answer is None or not serves_keys(answer.peer):
            return None
        if answer.dht_time and self.now is clock.now:  # not in a simulation
            # one voice for each neighbourhood: strangers may have many keys
            whose = self.transport.contacts.neighbourhood_of(peer_id) or peer_id.to_base58()
            # the peer read its clock last: the connection, the session and its dial back took longer than the way here
            clock.CLOCK.note(whose, answer.dht_time)
        return answer

    async def reaches(self, peer_id: PeerID) -> bool:
        """Whether the peer answers, whether it is a node of the DHT or a client."""
        return await self._ping(peer_id) is not None

    async def _ping(
        self, peer_id: PeerID, deadline_s: float = CALL_DEADLINE_S, dials_back: bool = False
    ) -> dht_pb2.PingResponse | None:
        introduction = self.introduction(self.serves_dht or dials_back)
        request = dht_pb2.PingRequest(peer=introduction, validate=dials_back)
        answer = await self._call(peer_id, "ping", request, dht_pb2.PingResponse, deadline_s)
        if answer is None:
            self.lose(peer_id)
            return None
        self._note_answer(peer_id, answer.peer, request.peer)
        return answer

    async def find(
        self,
        peer_id: PeerID,
        keys: Sequence[int],
        checker: EntryChecker,
        have: Mapping[int, Entries] = MappingProxyType({}),
        room: int | None = None,
        contacts: int | None = None,
        outdated: Mapping[int, Entries] = MappingProxyType({}),
    ) -> dict[int, FindResult] | None:
        """The answers for all keys, or for the first ones if the message is full.

        None if the peer gives no proper answer. `checker`: takes turns with other answers. `have`: what this peer
        already has under each key. `room`: bytes of entries wanted for each key; None for all. `contacts`: how many
        contacts are wanted for each key; None for as many as there is room for. `outdated`: older versions of what this
        peer has, which are not wanted either.
        """
        known = {} if contacts == 0 else self.transport.contacts.known(keys)
        places = [peer.to_bytes() for peer in known.values()]
        digests = (
            digest_of(key, *entry)
            for unwanted in (have, outdated)
            for key in keys
            for entry in unwanted.get(key, {}).items()
        )
        request = dht_pb2.FindRequest(
            keys=map(id_bytes, keys),
            peer=self._introduction_to(peer_id),
            known=known,
            have=() if room == 0 else islice(digests, MAX_DIGESTS),
            room=room,
            contacts=contacts,
        )
        response = await self._call(peer_id, "find", request, dht_pb2.FindResponse)
        if response is None or not 0 < len(response.results) <= len(keys):
            self.lose(peer_id)
            return None
        self._note_answer(peer_id, response.peer, request.peer)
        nodes = await self._learn_named(response, places)
        answers = {}
        for key, result in zip(keys, response.results, strict=False):
            is_dictionary = result.type == dht_pb2.RESULT_TYPE_DICTIONARY
            entries = checker.unpack(peer_id, result.value) if is_dictionary else {}
            if entries:
                entries = await checker.accepted(self.validator, peer_id, key, entries)
            nearer = dict(nodes[name] for name in _named(result, places) if name in nodes)
            has_value = bool(entries) or (is_dictionary and bool(have.get(key)))
            answers[key] = FindResult(entries, nearer, has_value, min(result.entries, MAX_ENTRIES))
        return answers

    async def store(self, peer_id: PeerID, rows: Sequence[Row]) -> Sequence[bool] | None:
        """Asks the peer to store the rows. Returns for each whether it did; None if the peer does not answer."""
        request = dht_pb2.StoreRequest(
            keys=[id_bytes(row.key) for row in rows],
            subkeys=[row.subkey for row in rows],
            values=[row.value for row in rows],
            expiration_time=[row.expires_at for row in rows],
            in_cache=[False] * len(rows),
            peer=self._introduction_to(peer_id),
        )
        response = await self._call(peer_id, "store", request, dht_pb2.StoreResponse)
        if response is None:
            self.lose(peer_id)
            return None
        self._note_answer(peer_id, response.peer, request.peer)
        return response.store_ok[: len(rows)]

    def consider(self, peer_id: PeerID) -> None:
        """Calls back a peer that has called and says that it serves keys, if there is room for it.

        A few peers are called back at a time. A known peer is not called again.
        """
        node = node_id_of(peer_id.to_bytes())
        if node in self.table:
            self.meet(peer_id)
            return
        contacts = self.transport.contacts
        near = contacts.origin_of(peer_id)
        if (
            peer_id in self._called_back
            or len(self._called_back) >= _CALLED_BACK
            or (near and sum(call.near == near for call in self._called_back.values()) >= _CALLED_BACK_NEAR)
            or not contacts.reaches(peer_id)
            or not self.table.has_room(node, near)
            or self.backoff.holds_back(peer_id, asyncio.get_running_loop().time())
        ):
            return
        self._called_back[peer_id] = _CallBack(near, self.storage.keys())
        self.spawn(self._call_back(peer_id), "call a DHT peer back")

    async def _call_back(self, peer_id: PeerID) -> None:
        try:
            if await self.ping(peer_id) is None:
                self.backoff.failed(peer_id, asyncio.get_running_loop().time())
            else:
                self.backoff.succeeded(peer_id)
        finally:
            del self._called_back[peer_id]

    def meet(self, peer_id: PeerID) -> None:
        """Enters a peer that was reached into the routing table. If it is new, sends it the records that it should
        store.
        """
        name = peer_id.to_bytes()
        node = node_id_of(name)
        if node == self.node_id or not is_peer_id(name):
            return
        if node not in self.table and self._may_hand_over():
            # the keys from before its call: it need not be told what it has just stored here
            called = self._called_back.get(peer_id)
            keys = self.storage.keys() if called is None else called.keys
            self.spawn(self._hand_over(node, peer_id, keys), "hand records to a new DHT peer")
        near = self.transport.contacts.neighbourhood_of(peer_id)
        if (oldest := self.table.add(node, peer_id, near)) is not None:
            self.spawn(self.ping(oldest), "ping a DHT peer")

    def lose(self, peer_id: PeerID) -> None:
        """Removes a peer that did not answer."""
        self.table.remove(node_id_of(peer_id.to_bytes()))

    def _introduction_to(self, peer_id: PeerID) -> dht_pb2.NodeInfo:
        """What this peer says about itself, with its contact unless the other got it recently."""
        contact = self.transport.own_contact() if self.serves_dht else None
        if contact is None:
            return self.info
        told, until = self._told.get(peer_id, (b"", 0.0))
        return self.introduction(told != contact.signature or asyncio.get_running_loop().time() > until)

    def _note_answer(self, peer_id: PeerID, said: dht_pb2.NodeInfo, told: dht_pb2.NodeInfo) -> None:
        if told.HasField("contact"):
            self._told[peer_id] = told.contact.signature, asyncio.get_running_loop().time() + _TOLD_S
        if said.HasField("contact"):
            self.transport.contacts.learn(said.contact, (peer_id,))
        if serves_keys(said):
            self.meet(peer_id)
        else:
            self.lose(peer_id)

    async def _learn_named(
        self, response: dht_pb2.FindResponse, known: Sequence[bytes]
    ) -> dict[bytes, tuple[int, PeerID]]:
        """The nodes that the answer names and that can be called. Learns their contacts, and no others.

        An answer names the same few nodes for most of its keys, so each is looked at once.
        """
        contacts = self.transport.contacts
        named = {name for result in response.results for name in _named(result, known)}
        peers = {name: PeerID(name) for name in named if is_peer_id(name)}
        whose, slices = set(peers.values()), TimeSlices()
        for contact in response.contacts[: min(_CONTACTS, len(whose))]:
            await slices.pause()
            contacts.learn(contact, whose)
        return {name: (node_id_of(name), peer) for name, peer in peers.items() if contacts.reaches(peer)}

    async def _call(
        self,
        peer_id: PeerID,
        method: str,
        request: Message,
        reply: type[Reply],
        deadline_s: float = CALL_DEADLINE_S,
    ) -> Reply | None:
        """None if no valid reply comes in time."""
        question = request.SerializeToString()
        data = await self.transport.call(peer_id, method, question, deadline_s)
        spent_bytes = len(question) + len(data or b"") + _CALL_OVERHEAD_BYTES
        self.spent_bytes += spent_bytes
        if (spending := _spending.get()) is not None:
            spending.bytes += spent_bytes
            self.spent_apart_bytes += spent_bytes
        try:
            return None if data is None else reply.FromString(data)
        except DecodeError:
            return None

    def _may_hand_over(self) -> bool:
        """Spends from the budget for handing over, if any is left. A new peer that gets nothing will get the next
        announcements.
        """
        now = asyncio.get_running_loop().time()
        if self._handover.take(0.0, now):
            self.metrics.not_handed_over.inc()
            return False
        self._handover.take(self.storage.bytes / self.bounds.handed_bytes_per_s, now)
        return True

    async def _hand_over(self, newcomer: int, peer_id: PeerID, keys: Sequence[int]) -> None:
        """Stores at a new peer the keys that it should now hold, if this peer is their nearest holder."""
        part: list[Row] = []
        size, slices = 0, TimeSlices()
        for key in keys:
            await slices.pause()
            others = [node for node, _ in self.table.nearest(key, REPLICAS, exclude=newcomer)]
            if not should_hand_over(key, newcomer, self.node_id, others):
                continue
            if not (packed := self.storage.packed(key)):
                continue
            taken = len(packed) + ITEM_OVERHEAD_BYTES
            if part and (size + taken > MAX_ANSWER_BYTES or len(part) == MAX_ITEMS):
                if await self.store(peer_id, part) is None:
                    return  # it has gone
                part, size = [], 0
            self.upload.spend(taken)
            part.append(Row(key, DICTIONARY, packed, self.storage.expires_at(key)))
            size += taken
        if part:
            await self.store(peer_id, part)


def _named(result: dht_pb2.FindResult, known: Sequence[bytes]) -> list[bytes]:
    """The PeerIDs that an answer names for a key. `known`: the peers that it names by the first bits of their
    NodeIDs.
    """
    places = result.nearest_known[:BUCKET_SIZE]
    names = [*result.nearest_peer_ids[:BUCKET_SIZE], *(known[n] for n in places if n < len(known))]
    return names[:BUCKET_SIZE]


def serves_keys(peer: dht_pb2.NodeInfo) -> bool:
    """Whether a peer says that it is a node of the DHT, not just a client."""
    return len(peer.node_id) == ID_BYTES
