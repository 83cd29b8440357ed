"""The DHT node: how it starts, how it joins others, and how it serves them within bounds.

The node is hivemind's, with our handlers. hivemind accepts any Kademlia ID that a peer claims; here it is the hash of
the PeerID, whatever is claimed. hivemind bounds neither what one message asks for or brings, nor how many calls are
under way, nor what it stores. It stops storing a dictionary at its first outdated entry, and lets a value that was
stored as cached hide the rest of its key.

To join, a peer dials others, they dial back, and it compares their clocks with its own.
"""

import asyncio
import contextlib
import functools
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from peer.clock import CLOCK
from peer.errors import WireError
from peer.identity import PeerID
from peer.kademlia.hivemind import (
    DHTID,
    DHTNode,
    DHTProtocol,
    P2PContext,
    RecordValidatorBase,
    RoutingTable,
    dht_pb2,
    timed_storage,
)
from peer.kademlia.lookups import Lookups, Row, store
from peer.kademlia.search import NEIGHBOURS
from peer.kademlia.storage import BoundedStorage, StoreBounds, StoreMetrics
from peer.kademlia.validation import (
    ITEM_OVERHEAD_BYTES,
    MAX_ANSWER_BYTES,
    MAX_FIND_KEYS,
    MAX_ITEMS,
    Entries,
    Entry,
    EntryChecker,
    Subkey,
    is_peer_id,
    node_id_of,
    serves_keys,
    unpack_subkey,
)
from peer.loop import TaskSet, TimeSlices
from peer.parsing import ParseGuard
from peer.rates import RateLimit, SharedBudget, TokenBucket
from peer.transport.addresses import Multiaddress
from peer.transport.p2pd import TRANSPORT_ERRORS, Daemon

T = TypeVar("T")

_CALLS = 512
"""Calls of others under way. From half of them on, a peer may have one."""
_CALLS_OF_PEER = 64
_WORK = (2000.0, 1000.0)
"""What others may make this peer do in a second, all and each. The unit is a key looked up or an entry checked, of
0.1 ms or less.
"""
_BYTES_OF_WORK = 2048
"""An entry is stored together with all others of its key, which are unpacked for that; the unit of work for so many
packed bytes.
"""
_NEAREST_BURSTS = 1.5
"""A peer that has had its share of values hears of nearest nodes until it is ahead by so much, and then of nothing."""
_RESULT_OVERHEAD_BYTES = 8
_HANDOVER_BURST_S = 16.0
"""How much of its rate the handover may use at once after a pause."""


@dataclass(frozen=True)
class BootstrapReply:
    """What a peer answered when this peer joined by it."""

    addresses: tuple[Multiaddress, ...]
    reaches_us: bool
    """Whether it could dial back."""


async def start_dht(
    daemon: Daemon,
    validator: RecordValidatorBase | None,
    serves_dht: bool,
    bounds: StoreBounds | None = None,
    metrics: StoreMetrics | None = None,
    upload: RateLimit | None = None,
    guard: ParseGuard | None = None,
) -> DHTNode:
    """A DHT node that knows no peers yet.

    `bounds`, `metrics`: of what other peers store here. `upload`: in which the answers to them are counted. `guard`: of
    this process.
    """
    dht = await DHTNode.create(
        p2p=daemon,
        node_id=node_id_of(daemon.peer_id.to_bytes()),
        record_validator=validator,
        client_mode=not serves_dht,
        cache_locally=False,  # `dht.directory` is the cache, with rules of its own
        cache_nearest=0,
        cache_on_store=False,
        cache_refresh_before_expiry=0,
    )
    if validator is not None:
        await install_handlers(
            dht.protocol, bounds or StoreBounds(), metrics or StoreMetrics(), upload, guard
        )
    return dht


def stop_dht(dht: DHTNode) -> None:
    """Ends the background tasks of a DHT node. Its p2pd is stopped separately."""
    dht.is_alive = False
    if dht.cache_refresh_task is not None:
        dht.cache_refresh_task.cancel()


def known_peers(dht: DHTNode) -> frozenset[PeerID]:
    """The peers in the routing table."""
    return frozenset(dht.protocol.routing_table.peer_id_to_uid)


async def bootstrap(
    daemon: Daemon, dht: DHTNode, addresses: Sequence[Multiaddress], deadline_s: float
) -> list[BootstrapReply]:
    """Pings the peers at these addresses in parallel, then looks up this peer's own neighbours.

    `deadline_s` applies to each dial, each ping and the look-up. Returns the replies of those that answered.
    """
    by_peer: dict[PeerID, list[Multiaddress]] = {}
    for address in addresses:
        if address.peer_id != daemon.peer_id:
            by_peer.setdefault(address.peer_id, []).append(address)
    answers = await asyncio.gather(
        *(_greet(daemon, dht, peer, listed, deadline_s) for peer, listed in by_peer.items())
    )
    replies = [answer for answer in answers if answer is not None]
    if replies:
        # not cancelled at the deadline: what it finds later still fills the routing table
        look = asyncio.create_task(meet_neighbours(dht))
        await asyncio.wait([look], timeout=deadline_s)
    return replies


async def meet_neighbours(dht: DHTNode) -> None:
    """Looks this peer's own ID up: whoever answers on the way enters its routing table."""
    await Lookups(lambda: dht).find([dht.node_id], NEIGHBOURS)


async def ping(
    protocol: DHTProtocol, peer_id: PeerID, deadline_s: float, validate: bool = False
) -> dht_pb2.PingResponse | None:
    """The answer of a peer that serves DHT keys; it enters the routing table, and leaves it if it does not answer.

    `validate`: asks it to dial back.
    """
    node_id = node_id_of(peer_id.to_bytes())
    request = dht_pb2.PingRequest(peer=protocol.node_info, validate=validate)
    try:
        answer = await protocol.get_stub(peer_id).rpc_ping(request, timeout=deadline_s)
    except TRANSPORT_ERRORS:
        answer = None
    responded = answer is not None and serves_keys(answer.peer)
    await protocol.update_routing_table(node_id, peer_id, responded=responded)
    return answer if responded else None


async def _greet(
    daemon: Daemon, dht: DHTNode, peer_id: PeerID, addresses: Sequence[Multiaddress], deadline_s: float
) -> BootstrapReply | None:
    try:
        await daemon.connect(peer_id, addresses, deadline_s)
    except TRANSPORT_ERRORS:
        return None
    asked_at = time.monotonic()
    answer = await ping(dht.protocol, peer_id, deadline_s, validate=True)
    if answer is None:
        return None
    CLOCK.note(peer_id.to_base58(), answer.dht_time + (time.monotonic() - asked_at) / 2)
    dht.blacklist.register_success(peer_id)  # it may be listed from before it restarted
    return BootstrapReply(tuple(addresses), answer.available)


def _or_empty(
    answer: Callable[[], T],
) -> Callable[[Callable[..., Awaitable[T]]], Callable[..., Awaitable[T]]]:
    """For a handler: if it fails unexpectedly, the answer is empty. That is counted, and logged once for each peer."""

    def guarded(handle: Callable[..., Awaitable[T]]) -> Callable[..., Awaitable[T]]:
        @functools.wraps(handle)
        async def handler(self: "BoundedDHTHandlers", request: Any, context: P2PContext) -> T:
            try:
                with self.guard.guarding("dht", context.remote_id, WireError):
                    return await handle(self, request, context)
            except WireError:
                return answer()

        return handler

    return guarded


class BoundedDHTHandlers:
    """Replaces a DHT node's handlers. A bad request gets an empty answer, because an error would fill the log.

    One call at a time looks something up or stores it, in short slices, so that the loop is never held.
    """

    def __init__(
        self,
        protocol: DHTProtocol,
        bounds: StoreBounds,
        metrics: StoreMetrics,
        upload: RateLimit | None = None,
        guard: ParseGuard | None = None,
    ) -> None:
        """`upload`: in which answers are counted. `guard`: of this process."""
        self.guard = guard or ParseGuard()
        self._protocol = protocol
        self._bounds = bounds
        self._metrics = metrics
        self._upload = upload or RateLimit(None)
        self._checker = EntryChecker(self.guard)
        self._tasks = TaskSet()
        self._handover = TokenBucket(1.0, _HANDOVER_BURST_S, 0.0)
        """In seconds at the rate `handed_bytes_per_s`."""
        self._work = SharedBudget[PeerID](*_WORK)
        self._answers = SharedBudget[PeerID](*bounds.answer_rates(self._upload.limit))
        self._under_way = Counter[PeerID]()
        self._turn, self._storing = asyncio.Lock(), asyncio.Lock()
        protocol.storage = BoundedStorage(bounds, metrics)
        protocol.update_routing_table = self.update_routing_table
        protocol.rpc_ping, protocol.rpc_store, protocol.rpc_find = (
            self.rpc_ping,
            self.rpc_store,
            self.rpc_find,
        )

    @_or_empty(dht_pb2.PingResponse)
    async def rpc_ping(self, request: dht_pb2.PingRequest, context: P2PContext) -> dht_pb2.PingResponse:
        """Tells the time and, if asked, whether this peer can dial back."""
        protocol = self._protocol
        with self._admit(context.remote_id, 1) as is_admitted:
            if not is_admitted:
                return dht_pb2.PingResponse()
            response = dht_pb2.PingResponse(peer=protocol.node_info, dht_time=timed_storage.get_dht_time())
            if request.validate and serves_keys(request.peer):
                # whoever answers enters the routing table, and nobody else
                answer = await ping(protocol, context.remote_id, protocol.wait_timeout)
                response.available = answer is not None
            else:
                await self._meet_sender(request.peer, context)
            return response

    @_or_empty(dht_pb2.StoreResponse)
    async def rpc_store(self, request: dht_pb2.StoreRequest, context: P2PContext) -> dht_pb2.StoreResponse:
        """Tells for each entry whether it was stored."""
        response = dht_pb2.StoreResponse(store_ok=[False] * len(request.keys), peer=self._protocol.node_info)
        is_aligned = len(request.keys) == len(request.subkeys) == len(request.values) and len(
            request.keys
        ) == len(request.expiration_time)
        if not is_aligned or len(request.keys) > MAX_ITEMS:
            self._metrics.refused.inc()
            return dht_pb2.StoreResponse()
        with self._admit(context.remote_id, len(request.keys)) as is_admitted:
            if not is_admitted:
                return response
            await self._meet_sender(request.peer, context)
            await self._store_all(request, response, context.remote_id)
        return response

    @_or_empty(dht_pb2.FindResponse)
    async def rpc_find(self, request: dht_pb2.FindRequest, context: P2PContext) -> dht_pb2.FindResponse:
        """For each key, what is stored here and the nearest nodes that this peer knows.

        When a message is full, the rest of the keys have no result, and are asked again. A peer that has had more
        than its share hears of the nearest nodes only, and then of nothing.
        """
        response, keys = dht_pb2.FindResponse(peer=self._protocol.node_info), request.keys
        if len(keys) > MAX_FIND_KEYS or any(len(key) != DHTID.HASH_NBYTES for key in keys):
            self._metrics.refused.inc()
            return response
        with self._admit(context.remote_id, len(keys)) as is_admitted:
            now = asyncio.get_running_loop().time()
            if not is_admitted:
                return response
            if not self._answers.allows(context.remote_id, now, _NEAREST_BURSTS):
                self._metrics.refused.inc()
                return response
            await self._meet_sender(request.peer, context)
            async with self._turn:
                await self._answer(keys, response, context.remote_id)
        return response

    @contextlib.contextmanager
    def _admit(self, sender: PeerID, work: int) -> Iterator[bool]:
        """Whether this call is handled now. Otherwise the sender has too much under way, or had too much done."""
        now, busy = asyncio.get_running_loop().time(), self._under_way.total()
        most = _CALLS_OF_PEER if busy < _CALLS / 2 else 1
        if busy >= _CALLS or self._under_way[sender] >= most or not self._work.allows(sender, now):
            self._metrics.refused.inc()
            yield False
            return
        self._work.take(sender, work, now)
        self._under_way[sender] += 1
        try:
            yield True
        finally:
            self._under_way[sender] -= 1
            if not self._under_way[sender]:
                del self._under_way[sender]

    async def _answer(self, keys: Sequence[bytes], response: dht_pb2.FindResponse, sender: PeerID) -> None:
        protocol, now = self._protocol, asyncio.get_running_loop().time()
        own_node = protocol.routing_table.get(peer_id=sender)
        room, is_within_share = MAX_ANSWER_BYTES, self._answers.allows(sender, now)
        slices = TimeSlices()
        for number, key in enumerate(keys):
            await slices.pause()
            key_id = DHTID.from_bytes(key)
            result = dht_pb2.FindResult(type=dht_pb2.NOT_FOUND)
            for node, peer in protocol.routing_table.get_nearest_neighbors(
                key_id, k=protocol.bucket_size, exclude=own_node
            ):
                result.nearest_node_ids.append(node.to_bytes())
                result.nearest_peer_ids.append(peer.to_bytes())
            if packed := protocol.storage.packed(key_id):
                if is_within_share:
                    result.type, result.value = dht_pb2.FOUND_DICTIONARY, packed
                else:
                    self._metrics.withheld.inc()
            room -= result.ByteSize() + _RESULT_OVERHEAD_BYTES
            if room < 0 and number:
                break
            response.results.append(result)
        size = response.ByteSize()
        self._answers.take(sender, size, now)
        self._upload.spend(size)

    async def _store_all(
        self, request: dht_pb2.StoreRequest, response: dht_pb2.StoreResponse, sender: PeerID
    ) -> None:
        """The entries of one key are stored together."""
        cached = list(request.in_cache) or [False] * len(request.keys)
        brought: dict[DHTID, Entries] = {}
        places: dict[DHTID, list[tuple[int, Collection[Subkey]]]] = {}
        rows = zip(
            request.keys, request.subkeys, request.values, request.expiration_time, cached, strict=False
        )
        slices = TimeSlices()
        for number, (key, tag, value, expires_at, is_cached) in enumerate(rows):
            await slices.pause()
            if len(key) != DHTID.HASH_NBYTES or is_cached:
                continue  # Talkoot peers never store in caches, which would only be more to keep
            try:
                entries = self._entries(sender, tag, value, expires_at)
            except WireError:
                continue
            self._work.take(sender, len(entries), asyncio.get_running_loop().time())
            key_id = DHTID.from_bytes(key)
            places.setdefault(key_id, []).append((number, entries.keys()))
            brought.setdefault(key_id, {}).update(entries)
        storage = self._protocol.storage
        async with self._storing:
            for key_id, entries in brought.items():
                await slices.pause()
                accepted = await self._checker.accepted(
                    self._protocol.record_validator, sender, key_id, entries
                )
                if accepted:
                    work = storage.bytes_of(key_id) / _BYTES_OF_WORK
                    self._work.take(sender, work, asyncio.get_running_loop().time())
                stored = storage.put(key_id, accepted)
                for place, subkeys in places[key_id]:
                    response.store_ok[place] = not stored.isdisjoint(subkeys)

    def _entries(self, sender: PeerID, tag: bytes, value: bytes, expires_at: float) -> Entries:
        """`tag`: the subkey, or a mark that the value is a dictionary. Raises WireError."""
        if tag == self._protocol.IS_DICTIONARY:
            return self._checker.unpack(sender, value)
        if not math.isfinite(expires_at):
            raise WireError("an entry that never expires")
        return {unpack_subkey(tag): Entry(value, expires_at)}

    async def update_routing_table(
        self, node_id: DHTID | None, peer_id: PeerID, responded: bool = True
    ) -> None:
        """Enters a peer that answered or asked, and hands a new one what it should store; removes a silent one.

        `node_id`, which hivemind's own calls take from what the peer claims, is not read.
        """
        protocol, name = self._protocol, peer_id.to_bytes()
        table, place = protocol.routing_table, node_id_of(name)
        if not responded:
            if place in table:
                del table[place]
            return
        if place == protocol.node_id or not is_peer_id(name):
            return
        if place not in table:
            _make_room(table, place)
            if self._may_hand_over():
                keys = protocol.storage.keys()  # now: it need not hear what it brings itself
                self._tasks.spawn(self._hand_over(place, peer_id, keys), "hand records to a new DHT peer")
        if (oldest := table.add_or_update_node(place, peer_id)) is not None:
            self._tasks.spawn(ping(protocol, oldest[1], protocol.wait_timeout), "ping a DHT peer")

    async def _meet_sender(self, sender: dht_pb2.NodeInfo, context: P2PContext) -> None:
        if serves_keys(sender):
            await self.update_routing_table(None, context.remote_id)

    def _may_hand_over(self) -> bool:
        """Takes from the allowance, if there is any. A newcomer that gets nothing hears the next announcements."""
        now = asyncio.get_running_loop().time()
        if self._handover.take(0.0, now):
            self._metrics.not_handed_over.inc()
            return False
        self._handover.take(self._protocol.storage.bytes / self._bounds.handed_bytes_per_s, now)
        return True

    async def _hand_over(self, node_id: DHTID, peer_id: PeerID, keys: Sequence[bytes]) -> None:
        """Stores at the new node the keys that it is near enough to hold, if this peer is their nearest holder."""
        protocol, room = self._protocol, MAX_ANSWER_BYTES
        part: list[Row] = []
        slices = TimeSlices()
        for name in keys:
            await slices.pause()
            key = DHTID.from_bytes(name)
            nearest = protocol.routing_table.get_nearest_neighbors(
                key, protocol.num_replicas, exclude=node_id
            )
            distances = [key.xor_distance(node) for node, _ in nearest]
            if distances and not (
                key.xor_distance(node_id) < distances[-1]
                and key.xor_distance(protocol.node_id) < distances[0]
            ):
                continue
            packed = protocol.storage.packed(key)
            size = len(packed) + ITEM_OVERHEAD_BYTES
            if part and (size > room or len(part) == MAX_ITEMS):
                await store(protocol, peer_id, part)
                part, room = [], MAX_ANSWER_BYTES
            if packed:
                self._upload.spend(size)
                part.append(Row(key, protocol.IS_DICTIONARY, packed, 0.0))
                room -= size
        if part:
            await store(protocol, peer_id, part)


def _make_room(table: RoutingTable, place: DHTID) -> None:
    """Drops the oldest spare node of the bucket if it has many. hivemind keeps all that ever came."""
    bucket = table.buckets[table.get_bucket_index(place)]
    if len(bucket.replacement_nodes) >= bucket.size:
        del table[next(iter(bucket.replacement_nodes))]


async def install_handlers(
    protocol: DHTProtocol,
    bounds: StoreBounds,
    metrics: StoreMetrics,
    upload: RateLimit | None = None,
    guard: ParseGuard | None = None,
) -> None:
    """Bounds what other peers may store and look up at this DHT node, which must have a validator and be new."""
    BoundedDHTHandlers(protocol, bounds, metrics, upload, guard)
    if not protocol.client_mode:
        await protocol.remove_p2p_handlers(protocol.p2p)
        await protocol.add_p2p_handlers(protocol.p2p)
