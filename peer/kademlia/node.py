"""The DHT node: how it starts, how it joins others, and how it serves them within bounds.

The node is hivemind's, with our handlers. hivemind accepts any Kademlia ID that a peer claims, and does not bound what
one message asks for or brings. It stops storing a dictionary at its first outdated entry, and lets a value that was
stored as cached hide the rest of its key.

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
    dht_pb2,
    install,
)
from peer.kademlia.storage import BoundedStorage, StoreBounds, StoreMetrics
from peer.kademlia.validation import (
    CLOCK_TOLERANCE_S,
    drop_invalid_entries,
    owns_node_id,
    patch_validation,
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
    node_id: DHTID
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
        # derived from the PeerID, or a restarted peer would be in the routing tables of others twice
        node_id=DHTID.generate(source=daemon.peer_id.to_bytes()),
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
        *(_ping(daemon, dht, PeerID(peer), listed, deadline_s) for peer, listed in by_peer.items())
    )
    replies = [answer for answer in answers if answer is not None]
    if replies:
        # not cancelled at the deadline: what it finds later still fills the routing table
        look = asyncio.create_task(dht.find_nearest_nodes([dht.node_id]))
        await asyncio.wait([look], timeout=deadline_s)
    return replies


async def _ping(
    daemon: Daemon, dht: DHTNode, peer_id: PeerID, addresses: Sequence[str], deadline_s: float
) -> BootstrapReply | None:
    protocol = dht.protocol
    try:
        await daemon.connect(peer_id, addresses, deadline_s)
        asked_at = time.time()
        request = dht_pb2.PingRequest(peer=protocol.node_info, validate=True)
        answer = await protocol.get_stub(peer_id).rpc_ping(request, timeout=deadline_s)
        took_s = time.time() - asked_at
    except TRANSPORT_ERRORS:
        return None
    if len(answer.peer.node_id) != DHTID.HASH_NBYTES:
        return None  # it serves no DHT keys
    node_id = DHTID.from_bytes(answer.peer.node_id)
    dht.blacklist.register_success(peer_id)  # it may be listed from before it restarted
    await protocol.update_routing_table(node_id, peer_id)
    offset_s = answer.dht_time - asked_at - took_s / 2
    return BootstrapReply(tuple(addresses), node_id, offset_s, answer.available)


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
        self._meet, self._ping = protocol.update_routing_table, protocol.rpc_ping
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
        if len(request.peer.node_id) != DHTID.HASH_NBYTES:  # a client has none
            request = dht_pb2.PingRequest()
        return await self._ping(request, context)

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
        """Records the one node ID that a peer has now, and hands a new peer what it should store."""
        table = self._protocol.routing_table
        if not responded:
            await self._meet(node_id, peer_id, responded=False)
            return
        known = table.get(peer_id=peer_id)
        if node_id is None or node_id == self._protocol.node_id:
            return
        if table.get(node_id=node_id, default=peer_id) != peer_id:
            if not owns_node_id(node_id, peer_id.to_bytes()):
                return  # nobody may take another's node ID
            del table[node_id]
        if known is None and self._may_hand_over():
            self._tasks.spawn(self._hand_over(node_id, peer_id), "hand records to a new DHT peer")
        elif known not in (None, node_id):
            del table[known]
        if (oldest := table.add_or_update_node(node_id, peer_id)) is not None:
            self._tasks.spawn(self._protocol.call_ping(oldest[1]), "ping a DHT peer")

    async def _meet_sender(self, sender: dht_pb2.NodeInfo, context: P2PContext) -> None:
        if len(sender.node_id) == DHTID.HASH_NBYTES:  # a client has none
            await self.update_routing_table(DHTID.from_bytes(sender.node_id), context.remote_id)

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


async def install_handlers(protocol: DHTProtocol, bounds: StoreBounds, metrics: StoreMetrics) -> None:
    """Bounds what other peers may store and look up at this DHT node, which must have a validator and be new."""
    BoundedDHTHandlers(protocol, bounds, metrics)
    if not protocol.client_mode:
        await protocol.remove_p2p_handlers(protocol.p2p)
        await protocol.add_p2p_handlers(protocol.p2p)
