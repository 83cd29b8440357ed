"""Looks up and stores many keys at once, over the calls of hivemind's DHT node.

hivemind's `get_many` and `store_many` ask four peers at a time, wait three seconds for each dead one, and finish all
keys together. Here, every key asks its nearest nodes at once, the keys for one peer travel in one call, and a peer that
is slower than others usually are is passed over until it answers.

Signed records can't be forged, only withheld, so more answers never do harm. Enough peers beside a key could still hide
what is stored there. So each look-up also asks a few witnesses elsewhere, and every peer stores what it finds: what one
peer has seen, others hear of.

`find` replaces hivemind's `call_find`, which makes a PeerID of every neighbour in an answer, 20 for each key, and
encodes each in base 58. That took half of a look-up's CPU time. Here they stay bytes until they are asked.
"""

import asyncio
import contextlib
import random
from collections import Counter, deque
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from peer.bounded import BoundedDict
from peer.errors import WireError
from peer.identity import PeerID
from peer.kademlia.hivemind import (
    DHTID,
    DHTNode,
    DHTProtocol,
    DHTRecord,
    MSGPackSerializer,
    dht_pb2,
)
from peer.kademlia.search import (
    DEFAULT_LIMITS,
    ContactBook,
    IterativeSearch,
    RttEstimator,
    SearchLimits,
    UnverifiedNodes,
    UsualReach,
)
from peer.kademlia.validation import (
    MAX_ANSWER_BYTES,
    MAX_FIND_KEYS,
    MAX_ITEMS,
    Entries,
    Entry,
    EntryChecker,
    is_peer_id,
    node_id_of,
    serves_keys,
    unpack_entries,
    unpack_subkey,
)
from peer.loop import TaskSet
from peer.transport.p2pd import TRANSPORT_ERRORS

T = TypeVar("T")

_NEAREST = SearchLimits(doubt=0, witnesses=0, quorum=2**31)
"""For writers, which need all of the nearest nodes whatever values those have."""
_WIDE = 3
"""A record is stored at so many times the usual number of nodes, if there is a crowd beside its key."""
_SAMPLE_EVERY_S = 30.0
"""How often a look-up of a random key shows how far from a key its holders usually are."""
_STORED_AT_ONCE = 16
"""Keys found that this peer stores before other tasks get a turn."""
_CALLS_OF_NODE = 8
"""Under way in one look-up."""
_STORED_BYTES = MAX_ANSWER_BYTES // 4
"""In one request to store items."""
_ITEM_OVERHEAD_BYTES = 64
_REMEMBERED_KEYS = 4096


@dataclass(frozen=True)
class FindResult:
    """A peer's answer for one key."""

    entries: Entries
    """Those that the validator accepts."""
    nearer: dict[int, bytes]
    """Kademlia ID → PeerID of the nodes it knows nearest to the key."""


class Item(NamedTuple):
    """Something to store."""

    key: str
    subkey: int | bytes
    value: str | bytes
    expires_at: float


class Row(NamedTuple):
    """The same, packed."""

    key: DHTID
    tag: bytes
    """The subkey; empty if the value is a dictionary of entries."""
    value: bytes
    expires_at: float


@dataclass(frozen=True)
class Found:
    """The result of a look-up."""

    search: IterativeSearch
    peers: ContactBook = field(repr=False)
    entries: Entries = field(default_factory=dict)
    """By subkey, from the answer that expires last. Some may have expired."""

    def take(self, entries: Entries) -> bool:
        """Merges an answer; False if it is empty."""
        for subkey, entry in entries.items():
            known = self.entries.get(subkey)
            if known is None or known.expires_at < entry.expires_at:
                self.entries[subkey] = entry
        return bool(entries)

    @property
    def someone_answered(self) -> bool:
        return bool(self.search.nearest())


class Lookups:
    """A peer's access to the keys of the DHT."""

    def __init__(
        self, dht: Callable[[], DHTNode], *, parallel_calls: int = 512, rng: random.Random | None = None
    ) -> None:
        """`dht` returns the current DHT node. `parallel_calls`: the limit in one look-up, without late calls."""
        self._dht = dht
        self.parallel_calls = parallel_calls
        self.round_trips = RttEstimator()
        self.checker = EntryChecker()
        self.reach = UsualReach()
        self._rng = rng or random.SystemRandom()
        self._sample_at = 0.0
        self._tasks = TaskSet()
        self.unverified = UnverifiedNodes()
        self._near = BoundedDict[DHTID, dict[int, PeerID]](_REMEMBERED_KEYS)
        """Who answered in the last look-up of each key; the key looked up most recently comes last."""

    async def find(
        self, keys: Collection[DHTID], limits: SearchLimits = DEFAULT_LIMITS, besides_self: bool = False
    ) -> dict[DHTID, Found]:
        """Looks up all keys, and stores what is found. `besides_self`: leaves out what this peer itself stores."""
        dht, now = self._dht(), asyncio.get_running_loop().time()
        if limits.witnesses and now >= self._sample_at:
            self._sample_at = now + _SAMPLE_EVERY_S
            self.spawn(self.sample(dht))
        run = _Run(self, dht, keys, limits, besides_self)
        await run.until_finished()
        for number, (key, found) in enumerate(run.found.items()):
            self._remember(key, found)
            if found.entries:
                dht.protocol.storage.put(key, found.entries)
            if number % _STORED_AT_ONCE == _STORED_AT_ONCE - 1:
                await asyncio.sleep(0)
        return run.found

    async def sample(self, dht: DHTNode) -> None:
        """Looks up random keys, because nobody can have made peers to surround them. So it also gets to know nodes
        everywhere.
        """
        keys = [self._random_key() for _ in range(max(1, self.reach.missing))]
        run = _Run(self, dht, keys, _NEAREST, besides_self=False)
        await run.until_finished()
        for key, found in run.found.items():
            # others on the way there have answered, too, and they are not all that is near
            self.reach.note(key, found.search.nearest()[: DEFAULT_LIMITS.front])

    def usual_reach(self, dht: DHTNode) -> int:
        """The distance from a key within which its holders usually are."""
        table = dht.protocol.routing_table
        neighbours = table.get_nearest_neighbors(dht.node_id, dht.protocol.bucket_size)
        return self.reach.distance(dht.node_id, [node for node, _ in neighbours])

    def witnesses(self, dht: DHTNode, number: int) -> dict[int, PeerID]:
        """Known nodes nearest to random places. Those that crowd at one place are rarely drawn."""
        table = dht.protocol.routing_table
        return dict(
            node for _ in range(number) for node in table.get_nearest_neighbors(self._random_key(), 1)
        )

    def _random_key(self) -> DHTID:
        return DHTID(self._rng.getrandbits(8 * DHTID.HASH_NBYTES))

    def near(self, key: DHTID) -> Mapping[int, PeerID]:
        """Nodes near the key from the last look-up. The next one starts there, and mostly needs one round."""
        return self._near.get(key, {})

    def _remember(self, key: DHTID, found: Found) -> None:
        nearest = found.search.nearest()[: DEFAULT_LIMITS.front]
        self._near[key] = {node: found.peers[node] for node in nearest}

    async def store(self, items: Sequence[Item]) -> set[tuple[str, int | bytes]]:
        """Stores each item at the live nodes nearest to its key; returns key and subkey of those that any accepted.

        This peer stores it too, as a witness. If more nodes are within reach than should be, some of them get it as
        well, drawn at random: those that crowd beside the key may be liars.
        """
        dht = self._dht()
        by_key: dict[DHTID, list[Item]] = {}
        for item in items:
            by_key.setdefault(DHTID.generate(source=item.key), []).append(item)
        found = await self.find(list(by_key), _NEAREST)
        candidates: dict[DHTID, deque[int]] = {}
        missing: dict[DHTID, int] = {}
        for key in by_key:
            holders, others = found[key].search.places(dht.num_replicas, _WIDE * dht.num_replicas, self._rng)
            candidates[key], missing[key] = deque([*holders, *others]), max(len(holders), dht.num_replicas)
        accepted: set[tuple[str, int | bytes]] = set()
        while any(missing[key] and candidates[key] for key in by_key):
            by_node: dict[int, list[DHTID]] = {}
            peers: dict[int, PeerID] = {}
            for key in by_key:
                for _ in range(min(missing[key], len(candidates[key]))):
                    node = candidates[key].popleft()
                    by_node.setdefault(node, []).append(key)
                    peers[node] = found[key].peers[node]
            stores = [
                self.spawn(self._store_at(dht, peers[node], part, by_key, accepted))
                for node, its_keys in by_node.items()
                for part in _parts(its_keys, by_key)
            ]
            await asyncio.wait(stores)
            for store in stores:
                for key in store.result():
                    missing[key] -= 1
        for item in items:
            _store_here(dht, _row(DHTID.generate(source=item.key), item))
        return accepted

    async def _store_at(
        self,
        dht: DHTNode,
        peer: PeerID,
        keys: Sequence[DHTID],
        by_key: Mapping[DHTID, Sequence[Item]],
        accepted: set[tuple[str, int | bytes]],
    ) -> Sequence[DHTID]:
        """Returns the keys if the peer answered, whether it accepted them or not, else none."""
        items = [(key, item) for key in keys for item in by_key[key]]
        rows = [_row(key, item) for key, item in items]
        if peer == dht.peer_id:
            stored: Sequence[bool] | None = [_store_here(dht, row) for row in rows]
        else:
            stored = await store(dht.protocol, peer, rows)
        if not stored:
            return []
        accepted.update(
            (item.key, item.subkey) for (_, item), ok in zip(items, stored, strict=False) if ok
        )  # a peer may answer with too few
        return keys

    def spawn(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Starts a call that may outlive its look-up. It ends at hivemind's own deadline.

        It is not cancelled, because hivemind leaves the connection of a cancelled call open.
        """
        return self._tasks.spawn(coroutine, "call a DHT peer")


def _parts(keys: Sequence[DHTID], by_key: Mapping[DHTID, Sequence[Item]]) -> Iterator[Sequence[DHTID]]:
    """Splits the keys in order, for one request each; a key's items stay together."""
    part: list[DHTID] = []
    size = count = 0
    for key in keys:
        taken = sum(_ITEM_OVERHEAD_BYTES + len(item.value) for item in by_key[key])
        if part and (size + taken > _STORED_BYTES or count + len(by_key[key]) > MAX_ITEMS):
            yield part
            part, size, count = [], 0, 0
        part.append(key)
        size += taken
        count += len(by_key[key])
    yield part


def _row(key: DHTID, item: Item) -> Row:
    pack = MSGPackSerializer.dumps
    return Row(key, pack(item.subkey), pack(item.value), float(item.expires_at))


def _store_here(dht: DHTNode, row: Row) -> bool:
    validator = dht.protocol.record_validator
    if validator is not None and not validator.validate(DHTRecord(row.key.to_bytes(), *row[1:])):
        return False
    entry = Entry(row.value, row.expires_at)
    return bool(dht.protocol.storage.put(row.key, {unpack_subkey(row.tag): entry}))


@dataclass(eq=False)
class _Call:
    node: int
    keys: Sequence[DHTID]
    late_at: float
    is_answered: bool = False
    is_late: bool = False


class _Run:
    """A running look-up of several keys."""

    def __init__(
        self,
        lookups: Lookups,
        dht: DHTNode,
        keys: Collection[DHTID],
        limits: SearchLimits,
        besides_self: bool,
    ) -> None:
        self._lookups = lookups
        self._dht = dht
        self._clock = asyncio.get_running_loop().time
        self._peers = ContactBook()
        self._queue: dict[int, list[DHTID]] = {}
        """The keys that each node will be asked for."""
        self._waiting: deque[_Call] = deque()
        """Calls, oldest first. Answered ones are removed when they come to the front."""
        self._active = 0
        self._calls: Counter[int] = Counter()
        """Calls under way to each node, without late ones."""
        self._overdue: Counter[DHTID] = Counter()
        """Late calls for each key. A search with too few answers waits for them after all."""
        self._answers: asyncio.Queue[tuple[_Call, Mapping[DHTID, FindResult] | None]] = asyncio.Queue()
        self._answering: set[int] = set()
        """Nodes that have answered for any key."""
        self.found: dict[DHTID, Found] = {}
        reach, witnesses = lookups.usual_reach(dht), lookups.witnesses(dht, limits.witnesses)
        self._peers.know(witnesses)
        for key in keys:
            search = IterativeSearch(key, self._nearest_known(key, dht.protocol.bucket_size), limits, reach)
            if search.is_crowded:
                search.know(self._nearest_known(key, limits.crowd))
            self.found[key] = Found(search, self._peers)
            if not besides_self:
                self._ask_self(key)
            for node in witnesses:
                if search.ask_witness(node):
                    self._queue.setdefault(node, []).append(key)
        self._unfinished = set(self.found)

    def _nearest_known(self, key: DHTID, most: int) -> Collection[int]:
        """Those in the routing table, and those that answered when the key was looked up last."""
        table = self._dht.protocol.routing_table.get_nearest_neighbors(key, most, exclude=self._dht.node_id)
        known = {**dict(table), **self._lookups.near(key)}
        self._peers.know(known)
        return known

    async def until_finished(self) -> None:
        self._advance(self.found)
        while self._unfinished:
            self._send()
            for call, answers in await self._next_answers():
                self._settle(call, answers)

    def _ask_self(self, key: DHTID) -> None:
        found, protocol = self.found[key], self._dht.protocol
        has_value = found.take(protocol.storage.get(key))
        if not protocol.client_mode:
            self._peers.know({self._dht.node_id: self._dht.peer_id})
            found.search.holds(self._dht.node_id, has_value)

    def _advance(self, keys: Iterable[DHTID]) -> None:
        """Queues the next requests of these searches."""
        for key in keys:
            search = self.found[key].search
            heard = self._lookups.unverified.near(key)
            self._peers.hear(heard)
            search.hear(heard)
            if search.is_stranded:
                search.know(self._answering)
            while wanted := search.ask():
                for node in wanted:
                    if self._peers[node] in self._dht.blacklist and not search.asks_again:
                        search.pass_over(node)
                    else:
                        self._queue.setdefault(node, []).append(key)
            if search.finished and not (search.is_thin and self._overdue[key] > 0):
                self._unfinished.discard(key)

    def _send(self) -> None:
        for node in list(self._queue):
            while node in self._queue and self._may_call(node):
                keys = [key for key in self._queue.pop(node) if key in self._unfinished]
                if len(keys) > MAX_FIND_KEYS:
                    self._queue[node] = keys[MAX_FIND_KEYS:]
                if keys:
                    late_at = self._clock() + self._lookups.round_trips.timeout_s
                    call = _Call(node, keys[:MAX_FIND_KEYS], late_at)
                    self._waiting.append(call)
                    self._active += 1
                    self._calls[node] += 1
                    self._lookups.spawn(self._ask(call))

    def _may_call(self, node: int) -> bool:
        return self._active < self._lookups.parallel_calls and self._calls[node] < _CALLS_OF_NODE

    async def _ask(self, call: _Call) -> None:
        """Always puts an answer, because the look-up waits for it."""
        answers = None
        try:
            answers = await self._answers_of(call)
        finally:
            self._answers.put_nowait((call, answers))

    async def _answers_of(self, call: _Call) -> Mapping[DHTID, FindResult] | None:
        peer, began = self._peers[call.node], self._clock()
        answers = await find(self._dht.protocol, peer, call.keys, self._lookups.checker)
        if answers is not None:
            self._dht.blacklist.register_success(peer)
            self._lookups.round_trips.note(self._clock() - began)
        else:
            self._dht.blacklist.register_failure(peer)
        return answers

    async def _next_answers(self) -> list[tuple[_Call, Mapping[DHTID, FindResult] | None]]:
        """The answers since the last time: at least one, unless calls become late first."""
        came: list[tuple[_Call, Mapping[DHTID, FindResult] | None]] = []
        while not came and not self._give_up_late():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(self._waiting[0].late_at if self._waiting else None):
                    came.append(await self._answers.get())
        while not self._answers.empty():
            came.append(self._answers.get_nowait())
        return came

    def _give_up_late(self) -> bool:
        """Fails the calls that are late; returns whether there were any."""
        gave_up = False
        while self._waiting and (self._waiting[0].is_answered or self._waiting[0].late_at <= self._clock()):
            call = self._waiting.popleft()
            if not call.is_answered:
                call.is_late = gave_up = True
                is_silent = call.node not in self._answering and self._calls[call.node] == _CALLS_OF_NODE
                # the keys that waited for a node from which nothing comes need not wait once more
                held_back = self._queue.pop(call.node, []) if is_silent else []
                self._ended(call)
                self._overdue.update(call.keys)
                self._fail(call.node, [*call.keys, *held_back])
        return gave_up

    def _ended(self, call: _Call) -> None:
        self._active -= 1
        self._calls[call.node] -= 1

    def _fail(self, node: int, keys: Sequence[DHTID]) -> None:
        self._lookups.unverified.forget(node)
        for key in keys:
            self.found[key].search.failed(node)
        self._advance(keys)

    def _settle(self, call: _Call, answers: Mapping[DHTID, FindResult] | None) -> None:
        call.is_answered = True
        if call.is_late:
            self._overdue.subtract(call.keys)
        else:
            self._ended(call)
        if answers is None:
            self._fail(call.node, call.keys)
            return
        self._answering.add(call.node)
        named: dict[int, bytes] = {}
        for key, answer in answers.items():
            found = self.found[key]
            answer.nearer.pop(self._dht.node_id, None)
            named.update(answer.nearer)
            found.search.answered(call.node, answer.nearer, found.take(answer.entries))
        if not call.is_late and len(answers) < len(call.keys):
            self._queue.setdefault(call.node, []).extend(call.keys[len(answers) :])
        self._peers.hear(named)
        self._lookups.unverified.note(named)
        self._advance(answers)


async def find(
    protocol: DHTProtocol, peer: PeerID, keys: Sequence[DHTID], checker: EntryChecker
) -> dict[DHTID, FindResult] | None:
    """The answers for the first keys, or for all: a message has an end.

    None if the peer gives no proper answer within hivemind's `wait_timeout`. `checker`: takes turns with other answers.
    """
    request = dht_pb2.FindRequest(keys=[key.to_bytes() for key in keys], peer=protocol.node_info)
    try:
        response = await protocol.get_stub(peer).rpc_find(request, timeout=protocol.wait_timeout)
    except TRANSPORT_ERRORS:
        response = None
    node = node_id_of(peer.to_bytes())
    if response is None or not 0 < len(response.results) <= len(keys):
        await protocol.update_routing_table(node, peer, responded=False)
        return None
    if serves_keys(response.peer):
        await protocol.update_routing_table(node, peer)
    answers = {}
    for key, result in zip(keys, response.results, strict=False):
        entries = _entries(result)
        if entries and protocol.record_validator is not None:
            entries = await checker.accepted(protocol.record_validator, key, entries)
        named = result.nearest_peer_ids[: protocol.bucket_size]
        nearer: dict[int, bytes] = {node_id_of(peer): peer for peer in named if is_peer_id(peer)}
        answers[key] = FindResult(entries, nearer)
    return answers


async def store(protocol: DHTProtocol, peer: PeerID, rows: Sequence[Row]) -> Sequence[bool] | None:
    """Tells for each row whether it was stored; None if the peer does not answer in time."""
    request = dht_pb2.StoreRequest(
        keys=[row.key.to_bytes() for row in rows],
        subkeys=[row.tag for row in rows],
        values=[row.value for row in rows],
        expiration_time=[row.expires_at for row in rows],
        in_cache=[False] * len(rows),
        peer=protocol.node_info,
    )
    node = node_id_of(peer.to_bytes())
    try:
        response = await protocol.get_stub(peer).rpc_store(request, timeout=protocol.wait_timeout)
    except TRANSPORT_ERRORS:
        await protocol.update_routing_table(node, peer, responded=False)
        return None
    if serves_keys(response.peer):
        await protocol.update_routing_table(node, peer)
    stored: Sequence[bool] = response.store_ok[: len(rows)]
    return stored


def _entries(result: dht_pb2.FindResult) -> Entries:
    if result.type != dht_pb2.FOUND_DICTIONARY:
        return {}  # Talkoot stores no plain values
    try:
        return unpack_entries(result.value)
    except WireError:
        return {}
