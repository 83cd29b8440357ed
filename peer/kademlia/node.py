"""The DHT node: how it starts, how it joins others, and how it serves them within bounds.

The node is hivemind's, with our handlers. hivemind accepts any Kademlia ID that a peer claims; here it is the hash of
the PeerID, whatever is claimed. hivemind does not bound what one message asks for or brings. It stops storing a
dictionary at its first outdated entry, and lets a value that was stored as cached hide the rest of its key.

To join, a peer dials others, they dial back, and both compare their clocks.
"""

import asyncio
import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from peer.errors import ClockError, HiddenError, WireError
from peer.formatting import counted
from peer.identity import PeerID
from peer.kademlia.hivemind import (
    DHTID,
    DHTNode,
    DHTProtocol,
    DHTRecord,
    DictionaryDHTValue,
    MSGPackSerializer,
    P2PContext,
    RecordValidatorBase,
    RoutingTable,
    dht_pb2,
    install,
    timed_storage,
)
from peer.kademlia.lookups import Lookups
from peer.kademlia.search import NEIGHBOURS
from peer.kademlia.storage import BoundedStorage, StoreBounds, StoreMetrics
from peer.kademlia.validation import (
    CLOCK_TOLERANCE_S,
    drop_invalid_entries,
    is_peer_id,
    node_id_of,
    patch_validation,
    serves_keys,
    unpack,
)
from peer.loop import TaskSet
from peer.rates import TokenBucket
from peer.transport.p2pd import TRANSPORT_ERRORS, Daemon

_YIELD_AFTER = 64
"""Entries or keys handled before other tasks get a turn."""
_YIELD_AFTER_ANSWERS = 8
"""The same, for keys that a peer looks up."""
_HANDOVER_BURST_S = 16.0
"""How much of its rate the handover may use at once after a pause."""


@dataclass(frozen=True)
class BootstrapReply:
    """What a peer answered when this peer joined by it."""

    addresses: tuple[str, ...]
    clock_offset_s: float
    """How far its clock is ahead of ours, corrected by half the round trip."""
    reaches_us: bool
    """Whether it could dial back."""


async def start_dht(
    daemon: Daemon,
    validator: RecordValidatorBase | None,
    serves_dht: bool,
    bounds: StoreBounds | None = None,
    metrics: StoreMetrics | None = None,
) -> DHTNode:
    """A DHT node that knows no peers yet. `bounds`, `metrics`: of what other peers store here."""
    install()
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
        patch_validation(dht.protocol)
        await install_handlers(dht.protocol, bounds or StoreBounds(), metrics or StoreMetrics())
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
    daemon: Daemon, dht: DHTNode, addresses: Sequence[str], deadline_s: float
) -> list[BootstrapReply]:
    """Pings the peers at these addresses in parallel, then looks up this peer's own neighbours.

    `deadline_s` applies to each dial, each ping and the look-up. Returns the replies of those that answered.
    """
    by_peer: dict[bytes, list[str]] = {}
    for address in addresses:
        peer_id = PeerID.from_base58(address.rsplit("/p2p/", 1)[1])
        if peer_id != daemon.peer_id:
            by_peer.setdefault(peer_id.to_bytes(), []).append(address)
    answers = await asyncio.gather(
        *(_greet(daemon, dht, PeerID(peer), listed, deadline_s) for peer, listed in by_peer.items())
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
    daemon: Daemon, dht: DHTNode, peer_id: PeerID, addresses: Sequence[str], deadline_s: float
) -> BootstrapReply | None:
    try:
        await daemon.connect(peer_id, addresses, deadline_s)
    except TRANSPORT_ERRORS:
        return None
    asked_at = time.time()
    answer = await ping(dht.protocol, peer_id, deadline_s, validate=True)
    took_s = time.time() - asked_at
    if answer is None:
        return None
    dht.blacklist.register_success(peer_id)  # it may be listed from before it restarted
    offset_s = answer.dht_time - asked_at - took_s / 2
    return BootstrapReply(tuple(addresses), offset_s, answer.available)


def check_bootstrap(replies: Collection[BootstrapReply], serves_dht: bool) -> None:
    """Raises ClockError if this clock differs from most others, HiddenError if nobody can reach this peer."""
    offsets = (reply.clock_offset_s for reply in replies)
    by_size = sorted((math.inf if math.isnan(offset) else offset for offset in offsets), key=abs)
    offset_s = by_size[(len(by_size) - 1) // 2]
    if abs(offset_s) > CLOCK_TOLERANCE_S:
        side = "behind" if offset_s > 0 else "ahead of"
        raise ClockError(
            f"this machine's clock is {abs(offset_s):.0f} s {side} those of most of the "
            f"{counted(len(by_size), 'peer')} asked: set it right, at most {CLOCK_TOLERANCE_S:.0f} s are tolerated"
        )
    if serves_dht and not any(reply.reaches_us for reply in replies):
        raise HiddenError(
            f"none of the {counted(len(replies), 'peer')} asked can reach this one: open its DHT port to the others, "
            "or pass the address by which they reach this machine as --host"
        )


class BoundedDHTHandlers:
    """Replaces a DHT node's handlers. A bad request gets an empty answer, because an error would fill the log."""

    def __init__(self, protocol: DHTProtocol, bounds: StoreBounds, metrics: StoreMetrics) -> None:
        self._protocol = protocol
        self._bounds = bounds
        self._metrics = metrics
        self._validator = protocol.record_validator
        self._tasks = TaskSet()
        self._handover = TokenBucket(1.0, _HANDOVER_BURST_S, 0.0)
        """In seconds at the rate `handed_bytes_per_s`."""
        protocol.storage = BoundedStorage(bounds, metrics)
        protocol.update_routing_table = self.update_routing_table
        protocol.rpc_ping, protocol.rpc_store, protocol.rpc_find = (
            self.rpc_ping,
            self.rpc_store,
            self.rpc_find,
        )

    async def rpc_ping(self, request: dht_pb2.PingRequest, context: P2PContext) -> dht_pb2.PingResponse:
        """Tells the time and, if asked, whether this peer can dial back."""
        protocol = self._protocol
        response = dht_pb2.PingResponse(peer=protocol.node_info, dht_time=timed_storage.get_dht_time())
        if request.validate and serves_keys(request.peer):
            # whoever answers enters the routing table, and nobody else
            answer = await ping(protocol, context.remote_id, protocol.wait_timeout)
            response.available = answer is not None
        else:
            await self._meet_sender(request.peer, context)
        return response

    async def rpc_store(self, request: dht_pb2.StoreRequest, context: P2PContext) -> dht_pb2.StoreResponse:
        """Tells for each entry whether it was stored."""
        items = list(
            zip(request.keys, request.subkeys, request.values, request.expiration_time, strict=False)
        )
        response = dht_pb2.StoreResponse(store_ok=[False] * len(request.keys), peer=self._protocol.node_info)
        if request.ByteSize() > self._bounds.message_bytes or len(items) != len(request.keys):
            self._metrics.refused.inc()
            return response
        await self._meet_sender(request.peer, context)
        cached = list(request.in_cache) or [False] * len(items)
        for number, (item, is_cached) in enumerate(zip(items, cached, strict=False)):
            # Talkoot peers never store in caches, which would only be more to keep
            response.store_ok[number] = not is_cached and await self._store(*item)
            if number % _YIELD_AFTER == _YIELD_AFTER - 1:
                await asyncio.sleep(0)
        return response

    async def rpc_find(self, request: dht_pb2.FindRequest, context: P2PContext) -> dht_pb2.FindResponse:
        """For each key, what is stored here and the nearest nodes that this peer knows."""
        response, protocol = dht_pb2.FindResponse(peer=self._protocol.node_info), self._protocol
        if len(request.keys) > self._bounds.find_keys:
            self._metrics.refused.inc()
            return response
        await self._meet_sender(request.peer, context)
        sender = protocol.routing_table.get(peer_id=context.remote_id)
        room = self._bounds.answer_bytes
        for number, key in enumerate(request.keys):
            if number % _YIELD_AFTER_ANSWERS == _YIELD_AFTER_ANSWERS - 1:
                await asyncio.sleep(0)
            if len(key) != DHTID.HASH_NBYTES:
                return dht_pb2.FindResponse(peer=protocol.node_info)
            result, key_id = response.results.add(type=dht_pb2.NOT_FOUND), DHTID.from_bytes(key)
            stored = protocol.storage.get(key_id)
            if stored is not None and room > 0:
                value = MSGPackSerializer.dumps(stored.value)
                room -= len(value)
                if room >= 0:
                    result.type, result.value = dht_pb2.FOUND_DICTIONARY, value
                    result.expiration_time = stored.expiration_time
            for node, peer in protocol.routing_table.get_nearest_neighbors(
                key_id, k=protocol.bucket_size, exclude=sender
            ):
                result.nearest_node_ids.append(node.to_bytes())
                result.nearest_peer_ids.append(peer.to_bytes())
        return response

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
                self._tasks.spawn(self._hand_over(place, peer_id), "hand records to a new DHT peer")
        if (oldest := table.add_or_update_node(place, peer_id)) is not None:
            self._tasks.spawn(ping(protocol, oldest[1], protocol.wait_timeout), "ping a DHT peer")

    async def _meet_sender(self, sender: dht_pb2.NodeInfo, context: P2PContext) -> None:
        if serves_keys(sender):
            await self.update_routing_table(None, context.remote_id)

    async def _store(self, key: bytes, tag: bytes, value: bytes, expires_at: float) -> bool:
        """Whether any entry was new. `tag`: the subkey, or a mark that the value is a dictionary."""
        if len(key) != DHTID.HASH_NBYTES:
            return False
        key_id, storage = DHTID.from_bytes(key), self._protocol.storage
        if tag == self._protocol.IS_REGULAR_VALUE:
            return False  # Talkoot stores no plain values
        if tag != self._protocol.IS_DICTIONARY:
            if not self._validator.validate(DHTRecord(key, tag, value, expires_at)):
                return False
            return bool(storage.store_subkey(key_id, unpack(tag), value, expires_at))
        try:
            entries = unpack(value)
        except WireError:
            return False
        if not isinstance(entries, DictionaryDHTValue):
            return False
        drop_invalid_entries(self._validator, key, entries)
        await asyncio.sleep(0)  # checking the signatures took a while
        stored = [storage.store_subkey(key_id, subkey, *entry) for subkey, entry in entries.items()]
        return any(stored)

    def _may_hand_over(self) -> bool:
        """Takes from the allowance, if there is any. A newcomer that gets nothing hears the next announcements."""
        now = asyncio.get_running_loop().time()
        if self._handover.take(0.0, now):
            self._metrics.not_handed_over.inc()
            return False
        self._handover.take(self._protocol.storage.bytes / self._bounds.handed_bytes_per_s, now)
        return True

    async def _hand_over(self, node_id: DHTID, peer_id: PeerID) -> None:
        """Stores at the new node the keys that it is near enough to hold, if this peer is their nearest holder."""
        protocol, size = self._protocol, 0
        part: list[tuple[DHTID, DictionaryDHTValue, float]] = []
        for number, (key, item) in enumerate(list(protocol.storage.items())):
            if number % _YIELD_AFTER == _YIELD_AFTER - 1:
                await asyncio.sleep(0)
            nearest = protocol.routing_table.get_nearest_neighbors(
                key, protocol.num_replicas, exclude=node_id
            )
            distances = [key.xor_distance(node) for node, _ in nearest]
            if distances and not (
                key.xor_distance(node_id) < distances[-1]
                and key.xor_distance(protocol.node_id) < distances[0]
            ):
                continue
            taken = protocol.storage.size(key)
            if part and size + taken > self._bounds.message_bytes // 2:
                await protocol.call_store(peer_id, *zip(*part, strict=True))
                part, size = [], 0
            part.append((key, item.value, item.expiration_time))
            size += taken
        if part:
            await protocol.call_store(peer_id, *zip(*part, strict=True))


def _make_room(table: RoutingTable, place: DHTID) -> None:
    """Drops the oldest spare node of the bucket if it has many. hivemind keeps all that ever came."""
    bucket = table.buckets[table.get_bucket_index(place)]
    if len(bucket.replacement_nodes) >= bucket.size:
        del table[next(iter(bucket.replacement_nodes))]


async def install_handlers(protocol: DHTProtocol, bounds: StoreBounds, metrics: StoreMetrics) -> None:
    """Bounds what other peers may store and look up at this DHT node, which must have a validator and be new."""
    BoundedDHTHandlers(protocol, bounds, metrics)
    if not protocol.client_mode:
        await protocol.remove_p2p_handlers(protocol.p2p)
        await protocol.add_p2p_handlers(protocol.p2p)
