"""The DHT below `Lookups`, modelled: who holds what, how long look-ups take, and who sends how many bytes for them.

An item lies at the five living servers that are nearest to its key when it is stored; those that die lose their copies.
How many rounds and calls a look-up takes, and what they weigh, is drawn from `hops.json`, which was measured on the
real code. A key's entries are one dictionary that all readers share, so nobody may change what `find` returns.
"""

import asyncio
import math
from collections.abc import Collection, Sequence
from typing import Any

from benchmarks.internet.world import Peer, World
from peer.kademlia.lookups import Item, Lookups
from peer.kademlia.routing import ID_BITS, REPLICAS, key_id_of
from peer.kademlia.search import DEFAULT_LIMITS, SearchLimits
from peer.kademlia.validation import ITEM_OVERHEAD_BYTES, Entry

_HEAD = ID_BITS - 64
CALL_BYTES = 160
"""Of a question, with frames."""
CONTACTS_BYTES = 700
"""Of an answer beside its values, for each key."""


class _Key:
    """What is stored under one key."""

    __slots__ = ("bytes", "checked", "entries", "first_expiry", "holders", "place")

    def __init__(self, place: int) -> None:
        self.place = place
        self.entries: dict[Any, Entry] = {}
        self.holders: dict[Any, tuple[Peer, ...]] = {}
        self.bytes = 0
        self.first_expiry = math.inf
        self.checked = 0


class _Search:
    """What is asked of an `IterativeSearch` that has ended."""

    __slots__ = ("rounds", "someone")

    def __init__(self, rounds: int, someone: bool) -> None:
        self.rounds = rounds
        self.someone = someone

    def nearest(self) -> list[int]:
        return [0] if self.someone else []


class ModelFound:
    """Stands for `Found`."""

    __slots__ = ("entries", "search", "someone_answered")

    def __init__(self, search: _Search, entries: dict[Any, Entry]) -> None:
        self.search = search
        self.entries = entries
        self.someone_answered = search.someone


class ModelDHT:
    """All keys of all swarms."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._keys: dict[int, _Key] = {}
        self._rng = world.rng("dht")
        self.found = (_Search(1, True), _Search(3, True))
        self.nobody = _Search(0, False)

    def put(self, item: Item, key_id: int, holders: tuple[Peer, ...]) -> None:
        key = self._keys.get(key_id)
        if key is None:
            key = self._keys[key_id] = _Key(key_id >> _HEAD)
        value, subkey = item.value, item.subkey
        before = key.entries.get(subkey)
        if before is not None:
            key.bytes -= len(before.value) + ITEM_OVERHEAD_BYTES
        key.bytes += len(value) + ITEM_OVERHEAD_BYTES
        key.entries[subkey] = Entry(value, item.expires_at)  # type: ignore[arg-type]  # not packed
        key.holders[subkey] = holders
        if item.expires_at < key.first_expiry:
            key.first_expiry = item.expires_at

    def get(self, key_id: int, reader: Peer) -> tuple[dict[Any, Entry], int]:
        """What a reader finds, and its bytes."""
        key = self._keys.get(key_id)
        if key is None:
            return {}, 0
        world = self.world
        if key.first_expiry <= world.now() or key.checked != world.deaths:
            self._drop_lost(key)
            if not key.entries:
                del self._keys[key_id]
                return {}, 0
        if not world.is_parted:
            return key.entries, key.bytes
        half = reader.half
        seen = {
            subkey: entry
            for subkey, entry in key.entries.items()
            if any(peer.half == half and peer.is_alive for peer in key.holders[subkey])
        }
        return seen, sum(len(entry.value) + ITEM_OVERHEAD_BYTES for entry in seen.values())

    def _drop_lost(self, key: _Key) -> None:
        """Removes what has expired, or has no living holder. Entries of a sleeping holder may come back."""
        now, first = self.world.now(), math.inf
        gone = []
        for subkey, entry in key.entries.items():
            if entry.expires_at <= now:
                gone.append(subkey)
                continue
            for peer in key.holders[subkey]:
                if peer.is_alive:
                    break
            else:
                gone.append(subkey)
                continue
            if entry.expires_at < first:
                first = entry.expires_at
        if gone:
            entries = dict(key.entries)  # others may have the old one
            for subkey in gone:
                key.bytes -= len(entries.pop(subkey).value) + ITEM_OVERHEAD_BYTES
                del key.holders[subkey]
            key.entries = entries
        key.first_expiry, key.checked = first, self.world.deaths


class ModelLookups(Lookups):
    """One peer's `Lookups` of the modelled DHT."""

    def __init__(self, dht: ModelDHT, peer: Peer) -> None:  # the parts of a real one are not needed
        self.model = dht
        self.peer = peer
        self._known: set[int] = set()
        """Keys that were looked up before: their holders are known."""

    async def store(self, items: Sequence[Item]) -> set[tuple[str, int | bytes]]:
        peer, dht = self.peer, self.model
        world = dht.world
        if not peer.is_alive:
            await _awake(peer)
        by_key: dict[str, int] = {}
        for item in items:
            by_key[item.key] = by_key.get(item.key, 0) + len(item.value) + ITEM_OVERHEAD_BYTES
        cold = self._ask(ids := {key: key_id_of(key) for key in by_key}, "announce")
        up, down = world.accounts.up, world.accounts.down
        accepted = False
        targets: dict[str, tuple[Peer, ...]] = {}
        for key, size in by_key.items():
            holders = tuple(world.nearest(ids[key] >> _HEAD, peer.half))
            targets[key] = holders
            for holder in holders:
                if holder is not peer:
                    accepted = True
                    up["announce"][peer.number] += size
                    down["dht_served"][holder.number] += size
        await asyncio.sleep((4 if cold else 2) * peer.link.rtt_s)
        if world.is_parted and any(h.half != peer.half for some in targets.values() for h in some):
            return set()
        for item in items:
            dht.put(item, ids[item.key], targets[item.key] or (peer,))
        return {(item.key, item.subkey) for item in items} if accepted or world.living == 1 else set()

    async def find(  # type: ignore[override]  # what stands for `Found`
        self,
        keys: Collection[int],
        limits: SearchLimits = DEFAULT_LIMITS,
        besides_self: bool = False,
        patience_s: float = math.inf,
        room: int | None = None,
    ) -> dict[int, ModelFound]:
        peer, dht = self.peer, self.model
        if not peer.is_alive:
            await _awake(peer)
        world = dht.world
        cold = self._ask({key: key for key in keys}, "read")
        await asyncio.sleep((3 if cold else 1) * 2 * peer.link.rtt_s)
        someone = world.servers(peer.half) > (0 if peer.link.nat else 1) or world.living == 1
        search = dht.found[cold] if someone else dht.nobody
        found, size = {}, 0
        for key in keys:
            entries, some = dht.get(key, peer)
            found[key] = ModelFound(search, entries)
            size += some
        world.accounts.down["read"][peer.number] += limits.quorum * size if limits.quorum < 9 else 0
        return found

    def _ask(self, ids: Any, purpose: str) -> bool:
        """Counts the bytes of a look-up beside values. Whether a holder had to be searched for."""
        world, peer = self.model.world, self.peer
        known = self._known
        up, down = world.accounts.up, world.accounts.down
        fresh = 0
        for key in ids.values():
            asked = REPLICAS if key in known else 3 * REPLICAS
            if key not in known:
                known.add(key)
                fresh += 1
            question, answer = asked * CALL_BYTES, asked * CONTACTS_BYTES
            up[purpose][peer.number] += question
            down[purpose][peer.number] += answer
            for server in world.nearest(key >> _HEAD, peer.half):
                down["dht_served"][server.number] += question / REPLICAS
                up["dht_served"][server.number] += answer / REPLICAS
        return fresh > 0


async def _awake(peer: Peer) -> None:
    """Returns when a sleeping peer goes on; never, when it is dead."""
    if peer.awake is None:
        await asyncio.get_running_loop().create_future()
    else:
        await peer.awake.wait()
