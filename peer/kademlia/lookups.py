"""Looks up and stores many keys at once.

For every key, its nearest nodes are asked at once. The keys for one peer travel in one call. A peer that is slower than
usual is passed over until it answers.

Signed records can't be forged, only withheld, so more answers never do harm. Enough hostile peers near a key could
still hide what is stored there. So each look-up also asks a few witnesses at random places, and every peer stores what
it finds. This spreads records beyond the peers near their key. If all nodes found may be liars, look-ups ask many
witnesses, and writers store at as many random nodes.
"""

import asyncio
import contextlib
import math
import random
import statistics
from collections import Counter, deque
from collections.abc import Collection, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from peer.bounded import BoundedDict
from peer.identity import PeerID
from peer.kademlia.node import FindResult, KademliaNode, Row
from peer.kademlia.routing import BUCKET_SIZE, ID_BITS, REPLICAS, id_bytes, key_id_of
from peer.kademlia.search import (
    CROWD,
    DEFAULT_LIMITS,
    IterativeSearch,
    RttEstimator,
    SearchLimits,
    UnverifiedNodes,
    UsualReach,
)
from peer.kademlia.validation import (
    ITEM_OVERHEAD_BYTES,
    MAX_ANSWER_BYTES,
    MAX_FIND_KEYS,
    MAX_ITEMS,
    Entries,
    Entry,
    EntryChecker,
    Record,
    large_entries,
    pack,
)
from peer.loop import TaskSet, TimeSlices, side_by_side
from peer.parsing import ParseGuard
from peer.rates import pause_at_rate

T = TypeVar("T")

_NEAREST = SearchLimits(doubt=0, witnesses=0, quorum=2**31)
"""The limits for writers, which need all of the nearest nodes, whatever values these have."""
FRUGAL = SearchLimits(is_frugal=True)
"""The limits for what is read repeatedly in the background. A look-up may take one round trip longer, and costs a third
as much.
"""
_FURTHER = 16
"""How many more random nodes are asked for a key, and store its records, if all nodes found near it may be liars."""
_WIDE = 3
"""If unusually many nodes are near a record's key, the record is stored at this many times the usual number of nodes.
"""
_SAMPLE_EVERY_S, _LONGEST_SAMPLE_PAUSE_S = 300.0, 900.0
"""How often a random key is looked up, to learn how far from a key its holders usually are."""
_SAMPLE_BYTES_PER_S = 60.0
"""The average traffic of look-ups of random keys. In a swarm of 10,000 each costs 120 KB, and the distance to holders
changes only with the size of the swarm.
"""
_OUTGROWN = 1.5
"""A peer that knows this many times as many nodes as there should be replaces all samples: the swarm has grown."""
_REPLACED_BYTES_PER_S = 600.0
"""The most traffic of replacing samples."""
_NAMES_ASKED = 0.25
"""If a key was looked up before, this share of the calls ask for the names of other nodes nearby."""
_TOLD_AT_ONCE = 2
"""Nodes that are told the same thing at the same time: a slow line can't carry more."""
_CALLS, _CALLS_OF_NODE = 512, 8
"""Calls in progress in one look-up, in all and to one node, not counting late ones."""
_STORED_BYTES = MAX_ANSWER_BYTES // 4
"""Bytes in one request to store items."""
_PATIENCE_S = 1.0
"""How long a writer waits for a peer if others answer."""
_FRUGAL_S = 1.0
"""After this time, a frugal search stops asking nodes one by one, because a liar may answer slowly on purpose."""
_STORE_S = 3.0
"""After this time, nodes that are late or fail are no longer replaced."""
STORED_AGAIN = 3
"""How many times in a row a peer stores under a key at the same nodes, as long as all of them answer and it knows no
nearer ones. After that, it looks for the nearest nodes again. New nodes get the items from the earlier holders
meanwhile.
"""
_REMEMBERED_KEYS = 4096


class Item(NamedTuple):
    """Something to store."""

    key: str
    subkey: int | bytes
    value: str | bytes
    expires_at: float


class _Holders(NamedTuple):
    """The nodes at which a key's items were stored."""

    nodes: Mapping[int, PeerID]
    times: int
    """How many more times they are used without looking for nearer ones."""


@dataclass(frozen=True)
class Found:
    """The result of a look-up."""

    search: IterativeSearch
    peers: Mapping[int, PeerID] = field(repr=False)
    """The PeerIDs of the nodes in the search."""
    entries: Entries = field(default_factory=dict)
    """Entries by subkey, from the answer that expires last. Some may have expired."""
    outdated: Entries = field(default_factory=dict)
    """What some of the entries have replaced."""
    counts: dict[int, int] = field(default_factory=dict)
    """How many entries each node says it has. Only for nodes that returned some of them."""

    def take(self, entries: Entries) -> bool:
        """Merges an answer; False if it is empty."""
        for subkey, entry in entries.items():
            known = self.entries.get(subkey)
            if known is None or known.expires_at < entry.expires_at:
                self.entries[subkey] = entry
                if known is not None:
                    self.outdated[subkey] = known
        return bool(entries)

    @property
    def unread(self) -> int:
        """About how many entries were not returned, not counting index entries: the median of what holders say. At
        least a quorum of holders must have said so, so that a single one can't make up a number.
        """
        told = [self.counts[node] for node in self.search.nearest()[:REPLICAS] if node in self.counts]
        if len(told) < DEFAULT_LIMITS.quorum:
            return 0
        return max(0, statistics.median_low(told) - large_entries(self.entries))

    @property
    def someone_answered(self) -> bool:
        return bool(self.search.nearest())


class Lookups:
    """A peer's access to the keys of the DHT."""

    def __init__(
        self,
        dht: KademliaNode,
        *,
        rng: random.Random | None = None,
        guard: ParseGuard | None = None,
    ) -> None:
        """`guard`: the process's."""
        self.dht = dht
        self.round_trips: RttEstimator = RttEstimator()
        self.store_trips: RttEstimator = RttEstimator()
        self.checker: EntryChecker = EntryChecker(guard)
        self.reach: UsualReach = UsualReach()
        self.rng: random.Random = rng or random.SystemRandom()
        self._sample_at = self._replace_at = 0.0
        self._tasks = TaskSet()
        self.unverified: UnverifiedNodes = UnverifiedNodes()
        self._near: BoundedDict[int, dict[int, PeerID]] = BoundedDict(_REMEMBERED_KEYS)
        """The nodes that answered in the last look-up of each key. The key looked up most recently comes last."""
        self._holders: BoundedDict[int, _Holders] = BoundedDict(_REMEMBERED_KEYS)
        """For each key under which this peer has stored."""

    async def find(
        self,
        keys: Collection[int],
        limits: SearchLimits = DEFAULT_LIMITS,
        besides_self: bool = False,
        patience_s: float = math.inf,
        room: int | None = None,
        sought: bytes | None = None,
    ) -> dict[int, Found]:
        """Looks up all keys, and stores what is found. `besides_self`: leaves out what this peer itself stores.

        `patience_s`: how long a search with few answers waits for late ones, once it has any. `room`: bytes of entries
        that each peer returns for a key, drawn at random, besides index entries; None: all. `sought`: a search ends
        with the first entry of this subkey.
        """
        now = asyncio.get_running_loop().time()
        is_outgrown = now >= self._replace_at and len(self.dht.table) > _OUTGROWN * self.estimated_nodes
        if limits.witnesses and (is_outgrown or now >= self._sample_at):
            self._sample_at = self._replace_at = now + _SAMPLE_EVERY_S
            self.spawn(self.sample(afresh=is_outgrown))
        run = _Run(self, keys, limits, besides_self, patience_s, room, sought)
        await run.until_finished()
        slices = TimeSlices()
        for key, found in run.found.items():
            if sought is None:  # otherwise, only a few of the nearest nodes may have answered
                self._remember(key, found)
            if found.entries:
                self.dht.storage.put(key, found.entries)
            await slices.pause()
        return run.found

    async def sample(self, afresh: bool = False) -> None:
        """Looks up random keys, to learn the usual reach. Nobody can have prepared for these keys. This also finds
        nodes everywhere. `afresh`: replaces all earlier samples.
        """
        spent, reach = self.dht.spent_bytes, UsualReach() if afresh else self.reach
        keys = [self._random_key() for _ in range(max(1, reach.missing))]
        run = _Run(self, keys, _NEAREST, besides_self=False, room=0)
        await run.until_finished()
        for key, found in run.found.items():
            # other nodes have answered too, on the way there, and they are not all of the nearest
            reach.note(key, found.search.nearest()[: DEFAULT_LIMITS.front])
        self.reach = reach
        cost, now = self.dht.spent_bytes - spent, asyncio.get_running_loop().time()
        self._sample_at = now + pause_after_sample(cost, self.dht.node_id)
        self._replace_at = now + cost / _REPLACED_BYTES_PER_S

    def usual_reach(self) -> int:
        """The distance from a key within which its holders usually are."""
        own = self.dht.node_id
        neighbours = self.dht.table.nearest(own, BUCKET_SIZE)
        return self.reach.distance(own, [node for node, _ in neighbours])

    @property
    def estimated_nodes(self) -> float:
        """The estimated number of nodes in the DHT; at least as many as hold a key."""
        return REPLICAS * float(2**ID_BITS) / max(1, self.usual_reach())

    def witnesses(self, number: int) -> dict[int, PeerID]:
        """The known nodes nearest to random places. Nodes that crowd near one key are rarely drawn."""
        return dict(node for _ in range(number) for node in self.dht.table.nearest(self._random_key(), 1))

    def _random_key(self) -> int:
        return self.rng.getrandbits(ID_BITS)

    def near(self, key: int) -> Mapping[int, PeerID]:
        """Nodes near the key from the last look-up. The next look-up starts there, and usually needs one round."""
        return self._near.get(key, {})

    def _remember(self, key: int, found: Found) -> None:
        nearest = found.search.nearest()[: DEFAULT_LIMITS.front]
        self._near[key] = {node: found.peers[node] for node in nearest}

    async def store(self, items: Sequence[Item]) -> set[tuple[str, int | bytes]]:
        """Stores each item at the live nodes nearest to its key. Returns key and subkey of the items that any node
        accepted.

        This peer stores them first, as a witness. The nodes at which it stored under the same key before usually get
        them again, without a look-up. If more nodes than usual are within reach, the nearest ones may be
        liars, so some of the others, drawn at random, get the items as well. If all nodes found may be liars, so do
        random nodes anywhere. If a node is late, the next one gets its items too.
        """
        by_key: dict[int, list[Item]] = {}
        for item in items:
            by_key.setdefault(key_id_of(item.key), []).append(item)
        kept = await _store_here(self.dht, by_key)
        reach = self.usual_reach()
        known = {key: holders for key in by_key if (holders := self._known_holders(key, reach))}
        places = {key: (holders.nodes, len(holders.nodes)) for key, holders in known.items()}
        again = _Writing(self, by_key, places, kept)
        await again.until_finished(awaits_late=False)
        finished = again.finished
        left = by_key.keys() - finished
        found = await self.find(left, _NEAREST, patience_s=_PATIENCE_S, room=0) if left else {}
        anew = _Writing(self, by_key, {key: self._places(found[key]) for key in left}, kept)
        await anew.until_finished()
        for key in finished:
            self._holders[key] = known[key]
        for key, nodes in anew.sent.items():
            # if all nodes found may be liars, other random ones get the items next time
            if nodes and not found[key].search.may_be_misled:
                self._holders[key] = _Holders(nodes, STORED_AGAIN)
            else:
                self._holders.pop(key, None)
        return again.accepted | anew.accepted

    async def ask_one(self, key: int) -> bool:
        """Asks a known node, drawn at random, for what it has under a key and this peer lacks, and stores that here.
        Returns whether it answered.

        For what most nodes have: then it costs no node more than others, however many ask.
        """
        return await self._ask_one_of(list(self.witnesses(1).values()), key)

    async def ask_holder(self, key: int) -> bool:
        """The same, for one of the key's holders, as far as this peer's last look-up found them.

        For what many peers read again and again: it takes a single call. A holder may hide something, so look the key
        up now and then, too.
        """
        # those of different neighbourhoods come first
        holders = list(self.near(key).values())[: DEFAULT_LIMITS.quorum]
        return await self._ask_one_of([peer for peer in holders if peer != self.dht.peer_id], key)

    async def _ask_one_of(self, peers: Sequence[PeerID], key: int) -> bool:
        if not peers:
            return False
        have = {key: self.dht.storage.get(key)}
        answers = await self.dht.find(self.rng.choice(peers), [key], self.checker, have, contacts=0)
        if answers is None:
            return False
        self.dht.storage.put(key, answers[key].entries)
        return True

    async def tell(self, item: Item, nodes: int) -> None:
        """Stores an item at some known nodes, drawn at random, wherever its key is."""
        row = _row(key_id_of(item.key), item)

        async def tell_one(peer: PeerID) -> None:
            await self.dht.store(peer, [row])

        await side_by_side(map(tell_one, self.witnesses(nodes).values()), _TOLD_AT_ONCE)

    def _known_holders(self, key: int, reach: int) -> _Holders | None:
        """The nodes at which to store the key's items once more: the nearest, and all within the usual reach, which may
        have been estimated better since. None if nearer ones have to be looked for.
        """
        holders = self._holders.get(key)
        if holders is None or not holders.times:
            return None
        nodes = sorted(holders.nodes, key=key.__xor__)
        # if there are fewer than there should be, any other node is near enough
        farthest = nodes[REPLICAS - 1] ^ key if len(nodes) >= REPLICAS else 1 << ID_BITS
        if any(
            node ^ key < farthest and node not in nodes for node, _ in self.dht.table.nearest(key, REPLICAS)
        ):
            return None
        within = {n: holders.nodes[n] for rank, n in enumerate(nodes) if rank < REPLICAS or n ^ key <= reach}
        return _Holders(within, holders.times - 1)

    def _places(self, found: Found) -> tuple[Mapping[int, PeerID], int]:
        """The nodes that may store what belongs to a key, best first, and how many of them should."""
        holders, others = found.search.places(REPLICAS, _WIDE * REPLICAS, self.rng)
        nodes = {node: found.peers[node] for node in holders}
        if found.search.may_be_misled:
            nodes |= self.witnesses(_FURTHER)
        return nodes | {node: found.peers[node] for node in others}, max(len(nodes), REPLICAS)

    def spawn(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Starts a call that may outlive its look-up. It ends at its own deadline: a late answer still counts."""
        return self._tasks.spawn(coroutine, "call a DHT peer")


def pause_after_sample(cost: float, node: int) -> float:
    """Seconds until the next sample. `cost`: bytes of the calls for this one. `node`: this peer's ID. The pause depends
    on it, so that peers which joined together don't stay in step.
    """
    pause_s = pause_at_rate(cost, _SAMPLE_BYTES_PER_S, _SAMPLE_EVERY_S, _LONGEST_SAMPLE_PAUSE_S)
    return pause_s * (0.5 + node / (1 << ID_BITS))


def _parts(keys: Sequence[int], by_key: Mapping[int, Sequence[Item]]) -> Iterator[Sequence[int]]:
    """Splits the keys in order, for one request each; a key's items stay together."""
    part: list[int] = []
    size = count = 0
    for key in keys:
        taken = sum(ITEM_OVERHEAD_BYTES + len(item.value) for item in by_key[key])
        if part and (size + taken > _STORED_BYTES or count + len(by_key[key]) > MAX_ITEMS):
            yield part
            part, size, count = [], 0, 0
        part.append(key)
        size += taken
        count += len(by_key[key])
    yield part


def _row(key: int, item: Item) -> Row:
    return Row(key, pack(item.subkey), pack(item.value), float(item.expires_at))


async def _store_here(
    dht: KademliaNode, by_key: Mapping[int, Sequence[Item]]
) -> set[tuple[str, int | bytes]]:
    """Returns key and subkey of the items that this peer accepts."""
    kept, slices = set(), TimeSlices()
    rows = ((item, _row(key, item)) for key, some in by_key.items() for item in some)
    for item, row in rows:
        await slices.pause()
        record, entry = Record(id_bytes(row.key), *row[1:]), Entry(row.value, row.expires_at)
        is_valid = dht.validator is None or dht.validator.validate(record)
        if is_valid and dht.storage.put(row.key, {item.subkey: entry}):
            kept.add(_name(item))
    return kept


class _Writing:
    """Items on their way to the nodes that hold them."""

    def __init__(
        self,
        lookups: Lookups,
        by_key: Mapping[int, list[Item]],
        places: Mapping[int, tuple[Mapping[int, PeerID], int]],
        kept: Collection[tuple[str, int | bytes]],
    ) -> None:
        """`places`: the keys to store, each with the nodes to ask, best first, and how many of them should have the
        items. `kept`: the items that this peer has stored itself.
        """
        self.accepted: set[tuple[str, int | bytes]] = set()
        self.sent: dict[int, dict[int, PeerID]] = {key: {} for key in places}
        """For each key, the nodes that were asked and have not failed or been late."""
        self._lookups = lookups
        self._dht = lookups.dht
        self._by_key = by_key
        self._kept = kept
        self._clock = asyncio.get_running_loop().time
        self._ends_at = self._clock() + _STORE_S
        self._candidates = {key: deque(nodes.items()) for key, (nodes, _) in places.items()}
        self._missing = {key: count for key, (_, count) in places.items()}
        """For each key, how many more nodes should get it."""
        self._answered: set[int] = set()
        self._in_time: dict[asyncio.Task[bool], tuple[float, int, Sequence[int]]] = {}
        """Calls that are not late yet: for each, when it will be late, its node and its keys."""
        self._late: dict[asyncio.Task[bool], Sequence[int]] = {}

    @property
    def finished(self) -> set[int]:
        """The keys that enough nodes have got in time."""
        return {key for key, missing in self._missing.items() if not missing}

    async def until_finished(self, awaits_late: bool = True) -> None:
        """Sends until every key has enough holders or no nodes are left. Late calls continue in the background.

        `awaits_late`: whether they are awaited if no node has answered for a key and no other is left.
        """
        self._send()
        while self._in_time or (awaits_late and self._needs_late()):
            late_at = min((at for at, *_ in self._in_time.values()), default=None)
            await asyncio.wait(
                [*self._in_time, *self._late],
                timeout=None if late_at is None else max(0.0, late_at - self._clock()),
                return_when=asyncio.FIRST_COMPLETED,
            )
            self._settle()
            self._send()

    def _needs_late(self) -> bool:
        return any(key not in self._answered for keys in self._late.values() for key in keys)

    def _settle(self) -> None:
        now = self._clock()
        for call, (late_at, node, keys) in list(self._in_time.items()):
            if not call.done() and now < late_at:
                continue
            del self._in_time[call]
            if not call.done():
                self._late[call] = keys
            if call.done() and call.result():
                self._answered.update(keys)
            else:
                for key in keys:
                    self._missing[key] += 1
                    self.sent[key].pop(node, None)
        for call, keys in list(self._late.items()):
            if call.done():
                del self._late[call]
                if call.result():
                    self._answered.update(keys)

    def _send(self) -> None:
        by_node: dict[int, list[int]] = {}
        peers: dict[int, PeerID] = {}
        now = self._clock()
        for key, candidates in self._candidates.items():
            while self._missing[key] and candidates and now < self._ends_at:
                node, peers[node] = candidates.popleft()
                self._missing[key] -= 1
                by_node.setdefault(node, []).append(key)
                self.sent[key][node] = peers[node]
        # slow peers can't raise this by much
        late_at = now + min(self._lookups.store_trips.timeout_s, _PATIENCE_S)
        for node, its_keys in by_node.items():
            for part in _parts(its_keys, self._by_key):
                call = self._lookups.spawn(self._store_at(peers[node], part))
                self._in_time[call] = late_at, node, part

    async def _store_at(self, peer: PeerID, keys: Sequence[int]) -> bool:
        """Stores at the peer. Returns whether it answered, even if it accepted nothing."""
        items = [(key, item) for key in keys for item in self._by_key[key]]
        if peer == self._dht.peer_id:
            self.accepted.update(_name(item) for _, item in items if _name(item) in self._kept)
            return True
        began = self._clock()
        stored = await self._dht.store(peer, [_row(key, item) for key, item in items])
        if not stored:
            return False
        self._lookups.store_trips.note(self._clock() - began)
        # the peer's answer may be too short
        self.accepted.update(_name(item) for (_, item), ok in zip(items, stored, strict=False) if ok)
        return True


def _name(item: Item) -> tuple[str, int | bytes]:
    return item.key, item.subkey


@dataclass(eq=False)
class _Call:
    node: int
    keys: Sequence[int]
    late_at: float
    is_answered: bool = False
    is_late: bool = False


class _Run:
    """A running look-up of several keys."""

    def __init__(
        self,
        lookups: Lookups,
        keys: Collection[int],
        limits: SearchLimits,
        besides_self: bool,
        patience_s: float = math.inf,
        room: int | None = None,
        sought: bytes | None = None,
    ) -> None:
        self._lookups = lookups
        self._dht = lookups.dht
        self._room = room
        self._sought = sought
        self._clock = asyncio.get_running_loop().time
        self._patient_until = self._clock() + patience_s
        self._is_patient = True
        self._frugal_until = self._clock() + _FRUGAL_S if limits.is_frugal else math.inf
        self._peers: dict[int, PeerID] = {}
        self._queue: dict[int, list[int]] = {}
        """The keys that each node will be asked for."""
        self._waiting: deque[_Call] = deque()
        """Calls, oldest first. An answered call is removed when it reaches the front."""
        self._active = 0
        self._calls: Counter[int] = Counter()
        """Calls in progress to each node, not counting late ones."""
        self._overdue: Counter[int] = Counter()
        """Late calls for each key. A search with too few answers waits for them."""
        self._answers: asyncio.Queue[tuple[_Call, Mapping[int, FindResult] | None]] = asyncio.Queue()
        self._answering: set[int] = set()
        """Nodes that have answered for any key."""
        self.found: dict[int, Found] = {}
        reach, witnesses = lookups.usual_reach(), lookups.witnesses(limits.witnesses)
        self._peers.update(witnesses)
        self._contacts = limits.contacts
        self._reach = reach
        self._drawn = frozenset(witnesses)
        """All witnesses."""
        self._witnesses = dict.fromkeys(keys, witnesses) if witnesses else {}
        """For each key, the witnesses that have not been asked yet."""
        self._leading: set[int] = set(keys) if limits.is_frugal else set()
        """The keys whose searches still ask one node after the other. Witnesses are asked when there are none left, so
        that all keys travel in one call, and no witness returns what is found by then.
        """
        for key in keys:
            known = self._nearest_known(key, BUCKET_SIZE)
            search = IterativeSearch(key, known, limits, reach, self._neighbourhood_of)
            if search.is_crowded:
                search.know(self._nearest_known(key, CROWD))
            self.found[key] = Found(search, self._peers)
            if not besides_self:
                self._ask_self(key)
        self._unfinished = set(self.found)
        if not limits.is_frugal:
            self._ask_witnesses()

    def _nearest_known(self, key: int, most: int) -> Collection[int]:
        """The nearest nodes in the routing table, and those that answered when the key was looked up last."""
        known = {**dict(self._dht.table.nearest(key, most)), **self._lookups.near(key)}
        self._peers.update(known)
        return known

    def _neighbourhood_of(self, node: int) -> str:
        peer_id = self._peers.get(node)
        return "" if peer_id is None else self._dht.transport.contacts.neighbourhood_of(peer_id)

    async def until_finished(self) -> None:
        self._advance(self.found)
        await self._until_answered()
        if self._drawn:
            self._ask_further()
            await self._until_answered()

    async def _until_answered(self) -> None:
        while self._unfinished:
            self._send()
            for call, answers in await self._next_answers():
                self._settle(call, answers)

    def _ask_self(self, key: int) -> None:
        found = self.found[key]
        has_value = found.take(self._dht.storage.get(key))
        if self._dht.serves_dht:
            self._peers.update({self._dht.node_id: self._dht.peer_id})
            found.search.holds(self._dht.node_id, has_value)

    def _ask_witnesses(self, awaits_all: bool = False) -> Collection[int]:
        """Returns the keys for which they are asked. `awaits_all`: see `IterativeSearch.ask_witness`."""
        witnesses, self._witnesses = self._witnesses, {}
        for key, nodes in witnesses.items():
            for node in nodes:
                if self.found[key].search.ask_witness(node, awaits_all):
                    self._queue.setdefault(node, []).append(key)
        return witnesses.keys()

    def _ask_further(self) -> None:
        """Asks more witnesses, each for all keys for which only liars may have been asked."""
        keys = [key for key, found in self.found.items() if found.search.may_be_misled]
        further = self._lookups.witnesses(_FURTHER) if keys else {}
        self._peers.update(further)
        self._witnesses = dict.fromkeys(keys, further)
        self._unfinished.update(keys)
        self._ask_witnesses(awaits_all=True)
        self._advance(keys)

    def _advance(self, keys: Collection[int]) -> None:
        """Queues the next requests of these searches."""
        for key in keys:
            search = self.found[key].search
            if self._sought in self.found[key].entries:
                self._unfinished.discard(key)
                self._leading.discard(key)
                continue
            heard = {
                node: peer
                for node, peer in self._lookups.unverified.near(key).items()
                if self._dht.transport.contacts.reaches(peer)
            }
            self._peers.update(heard)
            search.hear(heard)
            if search.is_stranded:
                search.know(self._answering)
            while wanted := search.ask():
                for node in wanted:
                    if not search.asks_again and self._dht.backoff.holds_back(
                        self._peers[node], self._clock()
                    ):
                        search.pass_over(node)
                    else:
                        self._queue.setdefault(node, []).append(key)
            if not search.waits_for_first:
                self._leading.discard(key)
        if not self._leading:
            keys = {*keys, *self._ask_witnesses()}
        self._unfinished -= {key for key in keys if self._is_finished(key)}

    def _is_finished(self, key: int) -> bool:
        is_complete = key not in self._witnesses and self.found[key].search.finished
        return is_complete and not self._waits_for_late(key)

    def _waits_for_late(self, key: int) -> bool:
        search = self.found[key].search
        if not search.is_thin or self._overdue[key] <= 0:
            return False
        return self._is_patient or not search.nearest()

    def _send(self) -> None:
        for node in list(self._queue):
            while node in self._queue and self._may_call(node):
                keys = []
                for key in self._queue.pop(node):
                    if key in self._unfinished:
                        keys.append(key)
                    else:
                        self.found[key].search.not_asked(node)
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
        return self._active < _CALLS and self._calls[node] < _CALLS_OF_NODE

    async def _ask(self, call: _Call) -> None:
        """Calls a node. In any case it puts an answer into the queue, because the look-up waits for one."""
        answers = None
        try:
            answers = await self._answers_of(call)
        finally:
            self._answers.put_nowait((call, answers))

    def _wants_contacts(self, call: _Call) -> bool:
        """Whether the call asks for contacts, which take most of a call's bytes. For keys that were looked up before,
        only some calls do, to find nodes that have joined since. Witnesses far from all keys are not asked for
        contacts, because they would name nodes that are far, too.
        """
        if call.node in self._drawn and all(call.node ^ key > self._reach for key in call.keys):
            return False
        is_cold = self._contacts is None or not all(map(self._lookups.near, call.keys))
        return is_cold or self._lookups.rng.random() < _NAMES_ASKED

    async def _answers_of(self, call: _Call) -> Mapping[int, FindResult] | None:
        peer, began = self._peers[call.node], self._clock()
        have = {key: self.found[key].entries for key in call.keys}
        # witnesses store what they read a while ago, and would return entries that have been renewed since
        outdated = {key: self.found[key].outdated for key in call.keys if call.node in self._drawn}
        contacts = self._contacts if self._wants_contacts(call) else 0
        answers = await self._dht.find(
            peer, call.keys, self._lookups.checker, have, self._room, contacts, outdated
        )
        if answers is not None:
            self._dht.backoff.succeeded(peer)
            self._lookups.round_trips.note(self._clock() - began)
        else:
            self._dht.backoff.failed(peer, self._clock())
        return answers

    async def _next_answers(self) -> list[tuple[_Call, Mapping[int, FindResult] | None]]:
        """The answers since the last call: at least one, unless calls become late first."""
        came: list[tuple[_Call, Mapping[int, FindResult] | None]] = []
        while not came and not (self._give_up_late() or self._lose_patience() or self._hurry()):
            late_at = self._waiting[0].late_at if self._waiting else math.inf
            wakes_at = min(late_at, self._patient_until, self._frugal_until)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(wakes_at if wakes_at < math.inf else None):
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
                # keys that waited for a silent node need not wait again
                held_back = self._queue.pop(call.node, []) if is_silent else []
                self._ended(call)
                self._overdue.update(call.keys)
                self._fail(call.node, [*call.keys, *held_back])
        return gave_up

    def _lose_patience(self) -> bool:
        """Finishes the searches that only wait for late answers, when it is time; returns whether it is."""
        if self._clock() < self._patient_until:
            return False
        self._patient_until, self._is_patient = math.inf, False
        self._advance(list(self._unfinished))
        return True

    def _hurry(self) -> bool:
        """Ends the frugal part of the searches when it is time; returns whether it is."""
        if self._clock() < self._frugal_until:
            return False
        self._frugal_until = math.inf
        for key in self._unfinished:
            self.found[key].search.hurry()
        self._advance(list(self._unfinished))
        return True

    def _ended(self, call: _Call) -> None:
        self._active -= 1
        self._calls[call.node] -= 1

    def _fail(self, node: int, keys: Sequence[int]) -> None:
        self._lookups.unverified.forget(node)
        for key in keys:
            self.found[key].search.failed(node)
        self._advance(keys)

    def _settle(self, call: _Call, answers: Mapping[int, FindResult] | None) -> None:
        call.is_answered = True
        if call.is_late:
            self._overdue.subtract(call.keys)
        else:
            self._ended(call)
        if answers is None:
            self._fail(call.node, call.keys)
            return
        self._answering.add(call.node)
        named: dict[int, PeerID] = {}
        for key, answer in answers.items():
            found = self.found[key]
            answer.nearer.pop(self._dht.node_id, None)
            named.update(answer.nearer)
            self._peers.update(answer.nearer)
            found.take(answer.entries)
            if answer.count:
                found.counts[call.node] = answer.count
            found.search.answered(call.node, answer.nearer, answer.has_value)
        if not call.is_late and len(answers) < len(call.keys):
            self._queue.setdefault(call.node, []).extend(call.keys[len(answers) :])
        self._lookups.unverified.note(named)
        self._advance(call.keys)  # also those for which the answer had no room: they may have waited for it
