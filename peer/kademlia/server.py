"""How a node of the DHT serves other peers, within bounds. There are bounds for a message, for the calls in progress,
and for the work and the bytes of answers that each peer and all peers together may cause. Look-ups and stores take
turns, in short slices, so that they never block the event loop.
"""

import asyncio
import contextlib
import functools
import math
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Container, Iterable, Iterator, Sequence
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from peer.bounded import counting
from peer.errors import WireError
from peer.identity import PeerID
from peer.kademlia.contacts import MOST_KNOWN
from peer.kademlia.node import CALL_DEADLINE_S, KademliaNode, serves_keys
from peer.kademlia.routing import BUCKET_SIZE, ID_BYTES, first_bits, id_bytes, id_of_bytes, node_id_of
from peer.kademlia.validation import (
    DICTIONARY,
    MAX_ANSWER_BYTES,
    MAX_DIGESTS,
    MAX_FIND_KEYS,
    MAX_ITEMS,
    Entries,
    Entry,
    EntryChecker,
    Subkey,
    digest_of,
    large_entries,
    pack_entries,
    some_of,
    unpack_entries,
    unpack_subkey,
)
from peer.loop import TimeSlices
from peer.parsing import ParseGuard
from peer.rates import FairTurns, SharedBudget
from peer.wire import dht_pb2

Request = TypeVar("Request", bound=Message)

_CALLS = 512
"""The most calls of others in progress. Above half of that, each peer may have only one."""
_CALLS_OF_PEER = 64
_WORK = (2000.0, 1000.0)
"""Units of work per second that others may cause, all together and each. A unit is a key looked up or an index entry
checked, and takes 0.1 ms or less.
"""
_WORK_OF_RECORD = 3
"""A signed record, whose badge has two more signatures to check."""
_BYTES_OF_WORK, _ENTRIES_OF_WORK = 2048, 32
"""Packed bytes, or entries if these are more, that count as one unit of work. (To store an entry, all others of its key
are unpacked.)
"""
_UNPACKED_BYTES_OF_WORK = 320
"""The same of what somebody wants to store: it may consist of tens of thousands of empty lists, which take 30 ms."""
_NEAREST_BURSTS = 1.5
"""A peer that has used up its share gets no values, only the nearest nodes. If it is this many bursts ahead, it gets
nothing.
"""
_RESULT_OVERHEAD_BYTES = 8
_WORK_OF_CONTACT = 2
_DIALS_BACK = (8.0, 32.0)
"""How many peers are dialled back at their request, per second and in a burst. Neighbourhoods take turns."""
_DIAL_BACK_S = CALL_DEADLINE_S - 1.0
"""The longest time for dialling back. It is short, so that a peer whose firewall drops the dial still gets its answer
in time.
"""
_DIALS_WAITING, _DIALS_WAITING_NEAR = 128, 32
_NAMED_FIRST = 8
"""How many of the nearest nodes come with their contacts. Other contacts are added if the message has room."""


class DHTServer:
    """Answers other peers' calls. A bad request gets an empty answer, and so does one beyond a bound."""

    def __init__(self, node: KademliaNode, guard: ParseGuard | None = None) -> None:
        """`guard`: the process's."""
        self.guard: ParseGuard = guard or ParseGuard()
        self._node = node
        self._metrics = node.metrics
        self._checker = EntryChecker(self.guard)
        self._work = SharedBudget[PeerID](*_WORK)
        self._answers = SharedBudget[PeerID](*node.bounds.answer_rates(node.upload.limit))
        self._dials = FairTurns(*_DIALS_BACK, most=_DIALS_WAITING, near=_DIALS_WAITING_NEAR, same=1)
        self._rng = random.SystemRandom()
        self._under_way = Counter[PeerID]()
        self._turn, self._storing = asyncio.Lock(), asyncio.Lock()

    async def start(self) -> None:
        """Answers from now on."""
        serve = self._node.transport.serve
        await serve("ping", functools.partial(self._handle, dht_pb2.PingRequest, self.ping))
        await serve("store", functools.partial(self._handle, dht_pb2.StoreRequest, self.store))
        await serve("find", functools.partial(self._handle, dht_pb2.FindRequest, self.find))

    async def _handle(
        self,
        request_type: type[Request],
        answer: Callable[[PeerID, Request], Awaitable[Message]],
        sender: PeerID,
        data: bytes,
    ) -> bytes:
        """An unexpected failure is counted, and logged once for each peer."""
        try:
            request = request_type.FromString(data)
        except DecodeError:
            self._metrics.refused.inc()
            return b""
        try:
            with self.guard.guarding("dht", sender, WireError):
                return (await answer(sender, request)).SerializeToString()
        except WireError:
            return b""

    async def ping(self, sender: PeerID, request: dht_pb2.PingRequest) -> dht_pb2.PingResponse:
        """Tells the time and, if asked, whether this peer can dial the sender."""
        node = self._node
        with self._admit(sender, 1) as is_admitted:
            if not is_admitted:
                return dht_pb2.PingResponse()
            now = asyncio.get_running_loop().time()
            own = node.introduction(with_contact=self._answers.allows(sender, now))
            response = dht_pb2.PingResponse(peer=own, dht_time=node.now())
            self._spend(sender, response.ByteSize(), now)
            if request.validate:
                self._learn(sender, request.peer)
                response.available = await self._dials_back(sender)
                response.dht_time = node.now()  # read again, because dialling back takes time
            else:
                self._meet(sender, request.peer)
            return response

    async def _dials_back(self, sender: PeerID) -> bool:
        """Whether the sender could be dialled. Not tried if too many peers ask for it."""
        near = self._node.transport.contacts.origin_of(sender)
        try:
            async with asyncio.timeout(_DIAL_BACK_S):
                if not await self._dials.turn(near, sender.to_base58()):
                    self._metrics.refused.inc()
                    return False
                return await self._node.reaches(sender)
        except TimeoutError:
            return False

    async def store(self, sender: PeerID, request: dht_pb2.StoreRequest) -> dht_pb2.StoreResponse:
        """Answers for each entry whether it was stored."""
        count = len(request.keys)
        columns = (request.subkeys, request.values, request.expiration_time)
        if any(len(column) != count for column in columns) or count > MAX_ITEMS:
            self._metrics.refused.inc()
            return dht_pb2.StoreResponse()
        response = dht_pb2.StoreResponse(store_ok=[False] * count, peer=self._node.info)
        with self._admit(sender, count) as is_admitted:
            if is_admitted and self._node.serves_dht:
                self._meet(sender, request.peer)
                await self._store_all(request, response, sender)
            return response

    async def find(self, sender: PeerID, request: dht_pb2.FindRequest) -> dht_pb2.FindResponse:
        """For each key, what is stored here and the nearest nodes that this peer knows.

        When a message is full, the remaining keys get no result, and the sender asks again. A peer that has had more
        than its share gets only nearest nodes, and then nothing.
        """
        node, keys = self._node, request.keys
        response = dht_pb2.FindResponse(peer=node.info)
        if len(keys) > MAX_FIND_KEYS or any(len(key) != ID_BYTES for key in keys):
            self._metrics.refused.inc()
            return response
        with self._admit(sender, len(keys)) as is_admitted:
            now = asyncio.get_running_loop().time()
            if not is_admitted or not node.serves_dht:
                return response
            if not self._answers.allows(sender, now, _NEAREST_BURSTS):
                self._metrics.refused.inc()
                return response
            self._meet(sender, request.peer)
            async with self._turn:
                await self._answer([id_of_bytes(key) for key in keys], request, response, sender)
        return response

    def _meet(self, sender: PeerID, said: dht_pb2.NodeInfo) -> None:
        self._learn(sender, said)
        if serves_keys(said):
            self._node.consider(sender)

    def _learn(self, sender: PeerID, said: dht_pb2.NodeInfo) -> None:
        if said.HasField("contact"):
            self._work.take(sender, _WORK_OF_CONTACT, asyncio.get_running_loop().time())
            self._node.transport.contacts.learn(said.contact, (sender,))

    @contextlib.contextmanager
    def _admit(self, sender: PeerID, work: int) -> Iterator[bool]:
        """Whether this call is handled. It is not if the sender has too many calls in progress, or has caused too much
        work.
        """
        now, busy = asyncio.get_running_loop().time(), self._under_way.total()
        most = _CALLS_OF_PEER if busy < _CALLS / 2 else 1
        if busy >= _CALLS or self._under_way[sender] >= most or not self._work.allows(sender, now):
            self._metrics.refused.inc()
            yield False
            return
        self._work.take(sender, work, now)
        with counting(self._under_way, sender):
            yield True

    async def _answer(
        self,
        keys: Sequence[int],
        request: dht_pb2.FindRequest,
        response: dht_pb2.FindResponse,
        sender: PeerID,
    ) -> None:
        node, now = self._node, asyncio.get_running_loop().time()
        asking = node_id_of(sender.to_bytes())
        is_within_share = self._answers.allows(sender, now)
        known = {place: number for number, place in enumerate(request.known[:MOST_KNOWN])}
        contacts = _NamedContacts(node, known)
        have = frozenset(request.have[:MAX_DIGESTS])
        room_of_key = request.room if request.HasField("room") else None
        is_content = request.HasField("contacts") and not request.contacts
        if contacts.is_new(node.node_id) and not is_content:
            response.peer.CopyFrom(node.introduction())
        room = MAX_ANSWER_BYTES - response.ByteSize()
        further: list[Sequence[tuple[int, PeerID]]] = []
        slices = TimeSlices()
        for number, key in enumerate(keys):
            await slices.pause()
            nearest = node.table.nearest(key, BUCKET_SIZE, exclude=asking)
            wanted = nearest[: request.contacts] if request.HasField("contacts") else nearest
            places = [known.get(first_bits(other)) for other, _ in nearest]
            result = dht_pb2.FindResult(
                nearest_node_ids=() if known or is_content else [id_bytes(other) for other, _ in nearest],
                nearest_peer_ids=[
                    peer_id.to_bytes()
                    for (_, peer_id), place in zip(wanted, places, strict=False)
                    if place is None
                ],
                nearest_known=[place for place in places if place is not None],
            )
            if room_of_key != 0 and (packed := node.storage.packed(key)):
                if is_within_share:
                    if have or room_of_key is not None:
                        entries = self._unpacked(packed, sender, now)
                        result.entries = 0 if room_of_key is None else large_entries(entries)
                        packed = self._wanted_of(key, entries, have, room_of_key)
                    result.type, result.value = dht_pb2.RESULT_TYPE_DICTIONARY, packed
                    result.expiration_time = node.storage.expires_at(key)
                else:
                    self._metrics.withheld.inc()
            room -= result.ByteSize() + _RESULT_OVERHEAD_BYTES
            if room < 0 and number:
                break
            response.results.append(result)
            room = contacts.add(wanted[:_NAMED_FIRST], response, room)
            further.append(wanted[_NAMED_FIRST:])
        for others in further:
            await slices.pause()
            room = contacts.add(others, response, room)
        self._spend(sender, response.ByteSize(), now)

    def _unpacked(self, packed: bytes, sender: PeerID, now: float) -> Entries:
        """Counts as the sender's work."""
        entries = unpack_entries(packed)
        self._work.take(sender, _work_of(len(packed), len(entries)), now)
        return entries

    def _wanted_of(self, key: int, entries: Entries, have: Container[int], room: int | None) -> bytes:
        """What is stored under a key, or the wanted part of it, without what the sender already has."""
        new = {
            subkey: entry for subkey, entry in entries.items() if digest_of(key, subkey, entry) not in have
        }
        return pack_entries(new if room is None else some_of(new, room, self._rng))

    def _spend(self, sender: PeerID, size: int, now: float) -> None:
        """Counts an answer of this size."""
        self._answers.take(sender, size, now)
        self._node.upload.spend(size)

    async def _store_all(
        self, request: dht_pb2.StoreRequest, response: dht_pb2.StoreResponse, sender: PeerID
    ) -> None:
        """Stores the entries of each key together."""
        node, loop = self._node, asyncio.get_running_loop()
        cached = list(request.in_cache) or [False] * len(request.keys)
        brought: dict[int, Entries] = {}
        places: dict[int, list[tuple[int, Collection[Subkey]]]] = {}
        rows = zip(
            request.keys, request.subkeys, request.values, request.expiration_time, cached, strict=False
        )
        slices = TimeSlices()
        for number, (name, subkey, value, expires_at, is_cached) in enumerate(rows):
            await slices.pause()
            if len(name) != ID_BYTES or is_cached:
                continue  # Talkoot peers never store in caches; keeping cached entries would only cost memory
            try:
                entries = self._entries(sender, subkey, value, expires_at)
            except WireError:
                continue
            work = len(entries) + large_entries(entries) * (_WORK_OF_RECORD - 1)
            if subkey == DICTIONARY:
                work = max(work, len(value) // _UNPACKED_BYTES_OF_WORK)
            # one was counted when the call was admitted
            self._work.take(sender, max(0, work - 1), loop.time())
            key = id_of_bytes(name)
            places.setdefault(key, []).append((number, entries.keys()))
            brought.setdefault(key, {}).update(entries)
        async with self._storing:
            for key, entries in brought.items():
                await slices.pause()
                accepted = await self._checker.accepted(node.validator, sender, key, entries)
                if accepted:
                    self._work.take(sender, _work_of(*node.storage.size_of(key)), loop.time())
                stored = node.storage.put(key, accepted)
                for place, subkeys in places[key]:
                    response.store_ok[place] = not stored.isdisjoint(subkeys)

    def _entries(self, sender: PeerID, subkey: bytes, value: bytes, expires_at: float) -> Entries:
        """Raises WireError."""
        if subkey == DICTIONARY:
            return self._checker.unpack(sender, value)
        if not math.isfinite(expires_at):
            raise WireError("an entry must expire")
        return {unpack_subkey(subkey): Entry(value, expires_at)}


def _work_of(size: int, entries: int) -> float:
    """Units of work to unpack and pack what is stored under a key."""
    return max(size / _BYTES_OF_WORK, entries / _ENTRIES_OF_WORK)


class _NamedContacts:
    """The contacts that go into one answer, each once, as long as there is room."""

    def __init__(self, node: KademliaNode, known: Iterable[int]) -> None:
        """`known`: the first bits of the NodeIDs that the caller knows."""
        self._contacts = node.transport.contacts
        self._told = set(known)

    def is_new(self, node: int) -> bool:
        """Whether the caller has not been told of this node yet."""
        return first_bits(node) not in self._told

    def add(self, nodes: Iterable[tuple[int, PeerID]], response: dht_pb2.FindResponse, room: int) -> int:
        """Returns the room that is left, in bytes."""
        for node, peer_id in nodes:
            contact = self._contacts.message(peer_id) if self.is_new(node) else None
            if contact is None:
                continue
            taken = contact.ByteSize() + _RESULT_OVERHEAD_BYTES
            if taken > room:
                break
            response.contacts.append(contact)
            self._told.add(first_bits(node))
            room -= taken
        return room
