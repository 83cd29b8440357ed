"""A model of the DHT below `Lookups`: who holds which items, how long look-ups take, and how many bytes each peer
sends.

An item is held by the living servers that are nearest to its key when it is stored: by five, and by others within the
distance that its writer considers usual. A server that dies loses its copies. `hops.json` says how many rounds, calls
and bytes a look-up takes; `measure_dht` measures that on the real code. All readers share one dictionary of a key's
entries, so nobody may change what `find` returns.
"""

import asyncio
import json
import math
import random
from array import array
from bisect import bisect_left, insort
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.internet.world import Peer, World
from dht.registry import Entries
from peer.kademlia.lookups import STORED_AGAIN, Item, Lookups, pause_after_sample
from peer.kademlia.routing import ID_BITS, REPLICAS, key_id_of
from peer.kademlia.search import DEFAULT_LIMITS, SearchLimits, UsualReach
from peer.kademlia.validation import ITEM_OVERHEAD_BYTES, Entry

T = TypeVar("T")

_HEAD = ID_BITS - 64
_NO_LEAF = 1 << 64
_CORE_S = 0.04
"""Seconds from the core of the network to an average peer and back."""
_FIGURES = Path(__file__).with_name("hops.json")
_DIGEST_BYTES = 8
_RECORD_OVERHEAD_BYTES = 52
"""What a signed record takes in an answer besides its value (see `pack_entries`)."""
_INDEX_BYTES, _LISTED_BYTES = 12, 46
"""What index entries take, with a coordinate and with a PeerID, besides the value that they share."""
_SHARED_OVERHEAD_BYTES = 25
"""What that value and the frame of a dictionary take besides the value's text."""
_MOST_HOLDERS = 3 * REPLICAS
_REACHES, _SERVERS = 64, 100
_SAMPLES, _SAMPLE_FOR_S = 8, 2.0
_SAMPLED_BY = 3
"""If an answer has no room for all entries, a reader asks this many holders, each of which gives a random sample."""


@dataclass(frozen=True)
class Cost:
    """The cost of one key in a look-up of several keys."""

    rounds: int
    round_trips: float
    question_bytes: float
    answer_bytes: float
    """Bytes of the answers, without values."""
    copies: float
    """How often the reader receives each value."""
    calls: float
    near_share: float
    """The share of the calls that go to the nodes nearest to the key."""

    @property
    def of_one_call(self) -> "Cost":
        """The cost of a look-up that its first answer ends."""
        question, answer = self.question_bytes / self.calls, self.answer_bytes / self.calls
        return Cost(1, 1.0, question, answer, 1.0, 1.0, self.near_share)


class HopTable:
    """The costs of look-ups by kind, by whether the same keys were looked up before, and by the sizes of the swarm and
    of the look-up.
    """

    def __init__(self) -> None:
        self._costs: dict[tuple[str, bool], dict[int, dict[int, Cost]]] = {}
        self._store_bytes: dict[int, float] = {}
        for each in json.loads(_FIGURES.read_text()):
            if each["kind"] == "store":
                self._store_bytes[each["nodes"]] = each["bytes"]
                continue
            cost = Cost(
                round(each["rounds"]),
                each["seconds_by_rtt"],
                each["question_bytes"],
                each["answer_bytes"],
                each["copies"],
                each["calls"],
                each["near_share"],
            )
            costs = {each["kind"]: cost}
            if each["kind"] == "frugal":
                costs["first"] = cost.of_one_call
            for kind, cost in costs.items():
                by_size = self._costs.setdefault((kind, each["warm"]), {})
                by_size.setdefault(each["nodes"], {})[each["keys"]] = cost

    def cost(self, kind: str, is_warm: bool, nodes: int, keys: int) -> Cost:
        """The cost at the smallest measured sizes that are not below these, or at the largest."""
        by_keys = _at(self._costs[kind, is_warm], nodes)
        return _at(by_keys, keys)

    def store_bytes(self, nodes: int) -> float:
        """Bytes of one call that stores items, without the items."""
        return _at(self._store_bytes, nodes)


def _at(table: Mapping[int, T], size: int) -> T:
    sizes = sorted(table)
    return table[sizes[min(bisect_left(sizes, size), len(sizes) - 1)]]


class StoredRecord(bytes):
    """A signed record in the model of the DHT. Readers share what the first of them has parsed."""

    parsed: Any = None


class _Key:
    """The items stored under one key, and the servers that answer for it."""

    __slots__ = (
        "answer",
        "before",
        "bytes",
        "checked",
        "deaths",
        "drawn_at",
        "entries",
        "first_expiry",
        "first_leaf",
        "holders",
        "last_leaf",
        "near",
        "near_at",
        "near_changes",
        "near_leaves",
        "nearest",
        "owed_down",
        "owed_up",
        "place",
        "samples",
        "seen",
        "seen_at",
        "shared",
    )

    def __init__(self, place: int) -> None:
        self.place = place
        self.entries: dict[Any, Entry] = {}
        self.holders: dict[Any, tuple[Peer, ...]] = {}
        self.bytes = 0
        self.shared = 0
        """How many of the entries share their value: index entries."""
        self.first_expiry = math.inf
        self.checked = -1
        """The count of the world's deaths when it was last checked which entries have living holders."""
        self.first_leaf, self.last_leaf = _NO_LEAF, -1
        """The range of leaves in which the holders are."""
        self.deaths = 0
        """The count of deaths there at that time."""
        self.near: tuple[Peer, ...] = ()
        """The living servers nearest to the key."""
        self.nearest: tuple[Peer, ...] = ()
        """The same, and as many others as may hold its items, in the order of their distance."""
        self.near_at = (-1, 0)
        """The count of the world's changes, and the half of the network, for which both hold."""
        self.near_leaves = slice(0)
        """The leaves on which they depend."""
        self.near_changes = (-1, 0)
        """The count of changes in these leaves, and the half of the network, for which they hold."""
        self.drawn_at = -1
        self.samples: dict[int, list[Answer]] = {}
        """Those that readers in each half of the network share at the moment."""
        self.answer: Answer | None = None
        self.before: Answer | None = None
        """The latest earlier answer for which a region is known."""
        self.seen: dict[int, Answer] = {}
        """What readers in each half of a partitioned network find."""
        self.seen_at = -1
        """The count of the world's changes at which they found it."""
        self.owed_up = self.owed_down = 0.0
        """Bytes that the nearest servers sent and received for this key and that are not in the accounts yet."""


class _Search:
    """The parts of an `IterativeSearch` that are used after it has ended."""

    __slots__ = ("rounds", "someone")

    def __init__(self, rounds: int, someone: bool) -> None:
        self.rounds = rounds
        self.someone = someone


class Answer(Entries):
    """A copy of a key's entries, in the form that `Registry.get` returns. Readers that find the same entries share one
    object, so nobody may change it.
    """

    def __init__(self, entries: Mapping[Any, Any], size: int, unread: int = 0) -> None:
        """`size`: bytes of the entries. `unread`: how many entries were left out."""
        super().__init__(entries)  # an `Entry` is a pair of a value and its expiry
        self.size = size
        self.unread = unread
        self.region: Any = None
        """What a reader has computed from the entries, kept for other readers."""
        self.before: Answer | None = None
        """The latest earlier answer for which `region` is known, until it is known here."""
        self.with_pieces: tuple[Sequence[Answer], Any] = (), None
        """What a reader has computed from these entries and from those of further keys."""

    def with_own(self, subkey: bytes, whole: "Answer") -> "Answer":
        """Adds the reader's own entry if it was left out: a peer holds its own entries itself."""
        if subkey in self or subkey not in whole:
            return self
        return Answer({**self, subkey: whole[subkey]}, self.size, self.unread - 1)


class ModelFound:
    """Stands for `Found`."""

    __slots__ = ("answer", "search", "someone_answered")

    def __init__(self, search: _Search, answer: Answer) -> None:
        self.search = search
        self.answer = answer
        self.someone_answered = search.someone

    @property
    def entries(self) -> Answer:
        return self.answer

    @property
    def unread(self) -> int:
        return self.answer.unread


class ModelDHT:
    """The model of the DHT: all keys of all swarms."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.nobody = _Search(0, False)
        self._table = HopTable()
        self._keys: dict[int, _Key] = {}
        self.rng = world.rng("dht")
        self.reaches = _usual_reaches(self.rng)
        """How many servers are usually within the reach that a peer measures; one value for each of some peers."""
        self._searches = [_Search(rounds, True) for rounds in range(32)]
        self._costs: dict[tuple[str, bool, int, int], Cost] = {}
        world.accounts.settlers.append(self.settle)

    @property
    def keys(self) -> int:
        """The number of keys under which something is stored."""
        return len(self._keys)

    def cost(self, kind: str, is_warm: bool, keys: int) -> Cost:
        """The cost of one key in a look-up of this many keys, at the swarm's present size."""
        servers = self.world.servers()
        known = kind, is_warm, servers.bit_length(), keys.bit_length()
        cost = self._costs.get(known)
        if cost is None:
            cost = self._costs[known] = self._table.cost(kind, is_warm, servers, keys)
        return cost

    def search(self, cost: Cost) -> _Search:
        return self._searches[min(cost.rounds, 31)]

    def store_bytes(self) -> float:
        return self._table.store_bytes(self.world.servers())

    def key(self, key_id: int) -> _Key:
        key = self._keys.get(key_id)
        if key is None:
            key = self._keys[key_id] = _Key(key_id >> _HEAD)
        return key

    def near(self, key: _Key, half: int) -> tuple[Peer, ...]:
        """The living servers nearest to the key."""
        world = self.world
        state = world.changes, half
        if key.near_at != state:
            if key.near_changes != (world.changes_in(key.near_leaves, half), half):
                self._settle(key)
                nearest, key.near_leaves = world.nearest(key.place, half, _MOST_HOLDERS)
                key.nearest, key.near = tuple(nearest), tuple(nearest[:REPLICAS])
                key.near_changes = world.changes_in(key.near_leaves, half), half
            key.near_at = state
        return key.near

    def holders(self, key: _Key, writer: Peer, within: float) -> tuple[Peer, ...]:
        """The servers at which a peer stores. `within`: how many are usually within the reach that it measured."""
        near, world = self.near(key, writer.half), self.world
        reach = within / max(1, world.servers(writer.half)) * 2 ** (ID_BITS - _HEAD)
        count, nearest = len(near), key.nearest
        while count < len(nearest) and nearest[count].place ^ key.place <= reach:
            count += 1
        return near if count == len(near) else nearest[:count]

    def charge(self, keys: Iterable[_Key], count: int, cost: Cost, peer: Peer, purpose: str) -> None:
        """Counts the bytes of a look-up of `count` keys, without the values."""
        world = self.world
        accounts, half = world.accounts, peer.half
        accounts.up[purpose][peer.number] += count * cost.question_bytes
        accounts.down[purpose][peer.number] += count * cost.answer_bytes
        questions, answers = cost.near_share * cost.question_bytes, cost.near_share * cost.answer_bytes
        for key in keys:
            if key.near_at != (world.changes, half):
                self.near(key, half)
            key.owed_down += questions
            key.owed_up += answers
        # The rest of the calls go to servers on the way to the key: on average, to any server.
        other = world.random_server(self.rng, half)
        if other is not None:
            accounts.down["dht_served"][other.number] += count * (cost.question_bytes - questions)
            accounts.up["dht_served"][other.number] += count * (cost.answer_bytes - answers)

    def put(self, item: Item, key: _Key, holders: tuple[Peer, ...]) -> None:
        value, subkey = item.value, item.subkey
        before = key.entries.get(subkey)
        if before is None:
            key.bytes += _size_of(subkey, value)
            if isinstance(value, str):
                key.bytes += 0 if key.shared else _shared_size(value)
                key.shared += 1
        else:
            key.bytes += len(value) - len(before.value)
        stored = StoredRecord(value) if type(value) is bytes else value
        key.entries[subkey] = Entry(stored, item.expires_at)  # type: ignore[arg-type]  # not packed
        key.seen_at = -1
        if key.answer is not None:
            key.before = key.answer.before if key.answer.region is None else key.answer
            key.answer = None
        if key.holders.get(subkey) != holders:
            key.holders[subkey] = holders
            for peer in holders:
                if peer.leaf < key.first_leaf:
                    key.first_leaf = peer.leaf
                if peer.leaf > key.last_leaf:
                    key.last_leaf = peer.leaf
        if item.expires_at < key.first_expiry or len(key.entries) == 1:
            key.first_expiry = item.expires_at

    def get(self, key: _Key, reader: Peer) -> Answer:
        """The entries of a key that a reader finds."""
        world = self.world
        if key.first_expiry <= world.now() or (key.checked != world.deaths and self._lost_holders(key)):
            self._drop_lost(key)
        if not world.is_parted:
            if key.answer is None:
                key.answer = Answer(key.entries, key.bytes)
                key.answer.before, key.before = key.before, None
            return key.answer
        if key.seen_at != world.changes:
            key.seen, key.seen_at = {}, world.changes
        half = reader.half
        if half not in key.seen:
            seen = {
                subkey: entry
                for subkey, entry in key.entries.items()
                if any(peer.half == half and peer.is_alive for peer in key.holders[subkey])
            }
            key.seen[half] = Answer(seen, _size(seen))
        return key.seen[half]

    def sample(self, key: _Key, answer: Answer, room: int, half: int) -> Answer:
        """What holders answer if a key has more entries than there is room for: all index entries, and a random sample
        of others.

        Readers in the same few seconds share a few samples.
        """
        drawn_at = int(self.world.time() / _SAMPLE_FOR_S)
        if key.drawn_at != drawn_at:
            key.drawn_at, key.samples = drawn_at, {}
        samples = key.samples.setdefault(half, [])
        if len(samples) < _SAMPLES:
            share = min(1.0, _SAMPLED_BY * room / answer.size)
            drawn: dict[Any, Any] = {
                subkey: entry
                for subkey, entry in answer.items()
                if type(subkey) is int or self.rng.random() < share
            }
            samples.append(Answer(drawn, _size(drawn), len(answer) - len(drawn)))
            return samples[-1]
        return samples[int(self.rng.random() * _SAMPLES)]

    def settle(self) -> None:
        """Brings the accounts up to date, and forgets keys that are empty."""
        for key_id, key in list(self._keys.items()):
            self._settle(key)
            if key.first_expiry <= self.world.now():
                self._drop_lost(key)
            if not key.entries:
                del self._keys[key_id]

    def _settle(self, key: _Key) -> None:
        if key.near and (key.owed_up or key.owed_down):
            up, down = self.world.accounts.up["dht_served"], self.world.accounts.down["dht_served"]
            for peer in key.near:
                up[peer.number] += key.owed_up / len(key.near)
                down[peer.number] += key.owed_down / len(key.near)
        key.owed_up = key.owed_down = 0.0

    def _lost_holders(self, key: _Key) -> bool:
        """Whether any holders may have died since this was last checked."""
        key.checked = self.world.deaths
        return self.world.deaths_in(slice(key.first_leaf, key.last_leaf + 1)) != key.deaths

    def _drop_lost(self, key: _Key) -> None:
        """Removes entries that have expired or have no living holder."""
        now, first = self.world.now(), math.inf
        gone, leaves = [], set[int]()
        for subkey, entry in key.entries.items():
            holders = key.holders[subkey]
            if entry.expires_at > now:
                for peer in holders:
                    if peer.is_alive:
                        break
                else:
                    gone.append(subkey)
                    continue
                if entry.expires_at < first:
                    first = entry.expires_at
                leaves.update([peer.leaf for peer in holders])
            else:
                gone.append(subkey)
        if gone:
            key.seen_at = -1
            for subkey in gone:
                value = key.entries.pop(subkey).value
                key.bytes -= _size_of(subkey, value)
                if isinstance(value, str):
                    key.shared -= 1
                    key.bytes -= 0 if key.shared else _shared_size(value)
                del key.holders[subkey]
            key.answer = None
        key.first_expiry, key.checked = first, self.world.deaths
        key.first_leaf, key.last_leaf = min(leaves, default=_NO_LEAF), max(leaves, default=-1)
        key.deaths = self.world.deaths_in(slice(key.first_leaf, key.last_leaf + 1))


def _usual_reaches(rng: random.Random) -> list[float]:
    """How many servers are on average within the reach that each of some peers measures among others of random IDs."""
    found = []
    for _ in range(_REACHES):
        usual, servers = UsualReach(), [rng.getrandbits(ID_BITS) for _ in range(_SERVERS)]
        while usual.missing:
            key = rng.getrandbits(ID_BITS)
            usual.note(key, sorted(servers, key=key.__xor__)[: DEFAULT_LIMITS.front])
        found.append(usual.distance(0, ()) * _SERVERS / 2**ID_BITS)
    return found


def _size_of(subkey: object, value: str | bytes) -> int:
    """Bytes of an entry in an answer, without a value that others share."""
    if isinstance(value, str):
        return _INDEX_BYTES if type(subkey) is int else _LISTED_BYTES
    return len(value) + _RECORD_OVERHEAD_BYTES


def _size(entries: Mapping[Any, Entry]) -> int:
    shared: Any = next((value for value, _ in entries.values() if isinstance(value, str)), None)
    size = sum(_size_of(subkey, entry.value) for subkey, entry in entries.items())
    return size if shared is None else size + _shared_size(shared)


def _shared_size(value: str) -> int:
    return len(value) + _SHARED_OVERHEAD_BYTES


class ModelLookups(Lookups):
    """Stands for the `Lookups` of one peer, over the modelled DHT."""

    spent_apart_bytes = 0

    def __init__(self, dht: ModelDHT, peer: Peer) -> None:  # without the parent's parts
        self._model = dht
        self._peer = peer
        self._looked_up = array("Q")
        """The places of the keys that this peer has looked up, in ascending order. A set would take ten times as much
        memory.
        """
        self._stored: dict[int, int] = {}
        """For each key under which this peer has stored, how many more times it does so without a look-up."""
        self._sample_at = 0.0
        self._within = dht.rng.choice(dht.reaches)

    @property
    def estimated_nodes(self) -> float:
        return self._model.world.servers()

    @property
    def spent_bytes(self) -> int:
        """Bytes of this peer's own look-ups and stores so far."""
        accounts, number = self._model.world.accounts, self._peer.number
        sides = accounts.up, accounts.down
        return int(sum(side[purpose][number] for side in sides for purpose in ("announce", "read")))

    async def store(self, items: Sequence[Item]) -> set[tuple[str, int | bytes]]:
        peer, model = self._peer, self._model
        if not peer.is_alive:
            await _awake(peer)
        world = model.world
        keys = {item.key: key_id_of(item.key) for item in items}
        if sought := [key_id for key_id in set(keys.values()) if self._looks_for_nearest(key_id)]:
            await self._reach(sought, "nearest", "announce")
        up, down = world.accounts.up["announce"], world.accounts.down["dht_served"]
        called: set[int] = set()
        sent = 0
        for item in items:
            key = model.key(keys[item.key])
            holders = model.holders(key, peer, self._within)
            others = [holder.number for holder in holders if holder is not peer]
            size = len(others) * (len(item.value) + ITEM_OVERHEAD_BYTES)
            sent += size
            key.owed_down += size
            model.put(item, key, holders or (peer,))
            called.update(others)
        up[peer.number] += sent
        overhead = model.store_bytes()
        for number in called:
            down[number] += overhead
        up[peer.number] += len(called) * overhead
        return set() if not called and world.living > 1 else {(item.key, item.subkey) for item in items}

    def _looks_for_nearest(self, key_id: int) -> bool:
        times = self._stored.get(key_id, 0)
        self._stored[key_id] = times - 1 if times else STORED_AGAIN
        return not times

    async def find(  # type: ignore[override]  # what stands for `Found`
        self,
        keys: Collection[int],
        limits: SearchLimits = DEFAULT_LIMITS,
        besides_self: bool = False,
        patience_s: float = math.inf,
        room: int | None = None,
        sought: bytes | None = None,
    ) -> dict[int, ModelFound]:
        peer, model = self._peer, self._model
        if not peer.is_alive:
            await _awake(peer)
        kind = "first" if sought is not None else "frugal" if limits.is_frugal else "find"
        cost = await self._reach(keys, kind, "read")
        world = model.world
        someone = world.servers(peer.half) > (not peer.link.nat) or world.living == 1
        search = model.search(cost) if someone else model.nobody
        found, size, count, copies = {}, 0, 0, cost.copies
        for key_id in keys:
            key = model.key(key_id)
            answer = model.get(key, peer)
            if answer.size:
                if room is not None and answer.size > room:
                    answer = model.sample(key, answer, room, peer.half).with_own(
                        peer.peer_id.to_bytes(), answer
                    )
                size += answer.size
                count += len(answer)
                key.owed_up += copies * answer.size
            found[key_id] = ModelFound(search, answer)
        if count:
            # Holders that are asked later are told the digests of what the reader has already.
            digests = _DIGEST_BYTES * count * max(0.0, cost.calls - 1)
            accounts = world.accounts
            accounts.down["read"][peer.number] += copies * size
            accounts.up["read"][peer.number] += digests
            if (other := world.random_server(model.rng, peer.half)) is not None:
                accounts.down["dht_served"][other.number] += digests
        if world.time() >= self._sample_at:
            cost = model.cost("nearest", False, 1)
            spent = cost.question_bytes + cost.answer_bytes
            self._sample_at = world.time() + pause_after_sample(spent, peer.place << _HEAD)
            model.charge((), 1, cost, peer, "read")
        return found

    async def _reach(self, key_ids: Collection[int], kind: str, purpose: str) -> Cost:
        """Waits as long as a look-up takes, and counts its bytes. Returns the cost of a key that this peer has not
        looked up before, if there is one among them.
        """
        model, peer = self._model, self._peer
        places = self._looked_up
        fresh: list[_Key] = []
        known: list[_Key] = []
        for key in map(model.key, key_ids):
            number = bisect_left(places, key.place)
            is_known = number < len(places) and places[number] == key.place
            (known if is_known else fresh).append(key)
        cost = model.cost(kind, not fresh, len(key_ids))
        if known:
            of_known = model.cost(kind, True, len(key_ids)) if fresh else cost
            model.charge(known, len(known), of_known, peer, purpose)
        if fresh:
            model.charge(fresh, len(fresh), cost, peer, purpose)
            for key in fresh:
                insort(places, key.place)
        takes_s, owed = cost.round_trips * (peer.link.rtt_s + _CORE_S), _OWED.get()
        if owed is None:
            await asyncio.sleep(takes_s)
        else:
            owed.seconds += takes_s
        return cost


class Owed:
    """The time that a task's look-ups have taken, and that the task will wait all at once.

    A task wakes up for each wait, and in a large swarm, its node's memory is no longer in the processor's caches by
    then. So the rounds of a node at rest make all their look-ups at one moment, and the next pause is longer.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        _OWED.set(self)

    def sleep(self, seconds: float = 0.0) -> Coroutine[Any, Any, None]:
        """Waits that long, and what is owed. Await it at once."""
        seconds, self.seconds = seconds + self.seconds, 0.0
        return asyncio.sleep(seconds)


_OWED: ContextVar[Owed | None] = ContextVar("owed", default=None)
"""What the current task owes; None: its look-ups take their time at once."""


async def without_owing(work: Callable[[], Awaitable[T]]) -> T:
    """Waits what the current task owes, and then does work whose look-ups take their time at once."""
    owed = _OWED.get()
    if owed is not None:
        await owed.sleep()
    _OWED.set(None)
    try:
        return await work()
    finally:
        _OWED.set(owed)


async def _awake(peer: Peer) -> None:
    """Waits until a sleeping peer wakes up. Never returns if the peer is dead."""
    if peer.awake is None:
        await asyncio.get_running_loop().create_future()
    else:
        await peer.awake.wait()
