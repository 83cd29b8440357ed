"""The store of a DHT node: its share of the swarm's records, within bounds.

hivemind's store is unbounded. It also drops an entry too early after it rejected an older one, because it records the
expiry of what it rejects.
"""

import heapq
import random
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge

from peer.kademlia.hivemind import DHTID, DHTLocalStorage, DictionaryDHTValue, timed_storage

_ENTRY_BYTES = 128
"""Overhead of an entry, beside its subkey and value."""
_NUMBER_BYTES = 9
"""Size of a subkey that is a coordinate."""
_KEPT_WHEN_FULL = 7 / 8
"""Eviction frees room for several entries at once, because it costs a look at all keys."""


@dataclass(frozen=True)
class StoreBounds:
    """What other peers may store and look up at this one. Sizes in bytes."""

    total_bytes: int = 64 * 2**20
    key_bytes: int = 96 * 2**10
    """All entries of one key. They must fit into one answer."""
    find_keys: int = 256
    """Keys in one look-up request."""
    message_bytes: int = 2**20
    """One request to store entries."""
    answer_bytes: int = 3 * 2**20
    """All values in one answer; further keys get none. p2pd accepts 4 MiB."""
    handed_bytes_per_s: float = 256 * 2**10
    """Rate of handing entries to new peers. Each one counts for the whole store, which is searched for it."""


class StoreMetrics:
    """Metrics of what other peers store here. They outlive the stores, each of which ends with its p2pd."""

    def __init__(self, metrics: CollectorRegistry | None = None) -> None:
        self.bytes = Gauge(
            "talkoot_dht_stored_bytes", "Memory of what others store here in the DHT.", registry=metrics
        )
        self.keys = Gauge("talkoot_dht_stored_keys", "Keys of what others store here.", registry=metrics)
        self.evicted = Counter(
            "talkoot_dht_evicted_entries", "Entries that went as there was no more room.", registry=metrics
        )
        self.refused = Counter(
            "talkoot_dht_messages_refused",
            "Messages that asked for or brought more than is allowed.",
            registry=metrics,
        )
        self.not_handed_over = Counter(
            "talkoot_dht_not_handed_over",
            "Newcomers to the DHT that were handed nothing of what is stored here, since too many came before.",
            registry=metrics,
        )


class BoundedStorage(DHTLocalStorage):  # type: ignore[misc]  # hivemind has no types
    """When it is full, it evicts entries at random, so that no writer can choose which."""

    def __init__(self, bounds: StoreBounds, metrics: StoreMetrics, rng: random.Random | None = None) -> None:
        super().__init__()
        self.bytes = 0
        """The size of all entries."""
        self._bounds = bounds
        self._metrics = metrics
        self._rng = rng or random.SystemRandom()
        self._sizes: dict[DHTID, int] = {}
        self._numbers: dict[DHTID, int] = {}
        """Entries of each key when it was last counted. Some may have expired since."""
        metrics.bytes.set(0)
        metrics.keys.set(0)

    def store_subkey(self, key: DHTID, subkey: Any, value: bytes, expiration_time: float) -> bool:
        """False if it is not newer than the stored entry, or larger than a whole key may be."""
        size = size_of(subkey, value)
        if size > self._bounds.key_bytes:
            return False
        held = self.get(key)
        known = held.value.get(subkey) if held and isinstance(held.value, DictionaryDHTValue) else None
        if known is not None and known.expiration_time >= expiration_time:
            return False
        if not super().store_subkey(key, subkey, value, expiration_time):
            return False
        entries = self.data[key].value
        total = self.size(key) + size - (size_of(subkey, known.value) if known else 0)
        if len(entries.data) != self._numbers.get(key, 0) + (known is None):
            total = sum(size_of(name, entry.value) for name, entry in entries.items())
        self._note_size(key, self._make_room_in(entries, subkey, total), len(entries.data))
        _forget_old_times(entries)
        _forget_old_times(self)
        if self.bytes > self._bounds.total_bytes:
            self._make_room_beside(key)
        return True

    def size(self, key: DHTID) -> int:
        """The size of a key's entries, in bytes."""
        return self._sizes.get(key, 0)

    def __delitem__(self, key: DHTID) -> None:
        super().__delitem__(key)
        self._note_size(key, 0)

    def clear(self) -> None:
        super().clear()
        for key in list(self._sizes):
            self._note_size(key, 0)

    def _remove_outdated(self) -> None:
        times, now = self.expiration_heap, timed_storage.get_dht_time()
        while times and times[0].expiration_time < now:
            passed = heapq.heappop(times)
            if self.key_to_heap.get(passed.key) is passed:
                del self[passed.key]

    def _make_room_in(self, entries: DictionaryDHTValue, newest: object, total: int) -> int:
        """`total`: the size of its entries. Returns the size of those that stay."""
        if total <= self._bounds.key_bytes:
            return total
        others = [subkey for subkey in entries.data if subkey != newest]
        while total > self._bounds.key_bytes:
            drawn = self._rng.randrange(len(others))
            others[drawn], others[-1] = others[-1], others[drawn]
            gone = others.pop()
            total -= size_of(gone, entries.data[gone].value)
            del entries[gone]
            self._metrics.evicted.inc()
        return total

    def _make_room_beside(self, newest: DHTID) -> None:
        others = [key for key in self._sizes if key != newest]
        self._rng.shuffle(others)
        while others and self.bytes > _KEPT_WHEN_FULL * self._bounds.total_bytes:
            key = others.pop()
            self._metrics.evicted.inc(len(self.data[key].value))
            del self[key]

    def _note_size(self, key: DHTID, size: int, number: int = 0) -> None:
        self.bytes += size - self._sizes.pop(key, 0)
        self._numbers.pop(key, None)
        if size:
            self._sizes[key], self._numbers[key] = size, number
        self._metrics.bytes.set(self.bytes)
        self._metrics.keys.set(len(self._sizes))


def size_of(subkey: object, value: bytes) -> int:
    """The size of an entry, in bytes."""
    name = len(subkey) if isinstance(subkey, bytes) else _NUMBER_BYTES
    return _ENTRY_BYTES + name + len(value)


def _forget_old_times(storage: Any) -> None:
    """hivemind keeps the expiry of each renewal until it passes, so that constant renewal would fill the memory."""
    if len(storage.expiration_heap) > 2 * len(storage.key_to_heap) + 64:
        storage.expiration_heap[:] = storage.key_to_heap.values()
        heapq.heapify(storage.expiration_heap)
