"""The store of a DHT node: its share of the swarm's records, within bounds.

All entries of a key are kept as they travel, packed in one piece, which takes a third of the memory of objects.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge

from peer import clock
from peer.kademlia.validation import (
    MAX_ENTRIES,
    MAX_KEY_BYTES,
    Entries,
    Subkey,
    entry_bytes,
    pack_entries,
    packed_bytes,
    unpack_entries,
)

_KEY_BYTES = 256
"""Measured memory of a key besides its packed entries: the objects, and its places in a dictionary and a list."""
_FRAGMENTATION = 1.3
"""Measured memory per packed byte: pieces of different sizes, evicted at random, leave gaps."""
_LOOKED_AT = 8
"""How many random keys are checked whenever something is stored. Expired ones are dropped, so at most about an eighth
of all keys are expired.
"""


@dataclass(frozen=True)
class StoreBounds:
    """What other peers may store and look up at this one. Sizes in bytes."""

    total_bytes: int = 64 * 2**20
    key_bytes: int = MAX_KEY_BYTES
    """All entries of one key, packed."""
    answer_bytes_per_s: float = 2 * 2**20
    """Rate of all answers."""
    answer_bytes_per_s_of_peer: float = 512 * 2**10
    """Rate of answers to one peer. A peer that joins may get several seconds' worth at once."""
    handed_bytes_per_s: float = 256 * 2**10
    """Rate of handing entries to new peers. Each new peer counts as the whole store, because all of it is searched.
    """

    def answer_rates(self, upload_limit: float | None) -> tuple[float, float]:
        """The rates of answers to all peers and to each: together at most a quarter of the upload limit."""
        most = math.inf if upload_limit is None else upload_limit / 4
        return min(self.answer_bytes_per_s, most), min(self.answer_bytes_per_s_of_peer, most)


class StoreMetrics:
    """Metrics of what other peers store here."""

    def __init__(self, metrics: CollectorRegistry | None = None) -> None:
        self.bytes: Gauge = Gauge(
            "talkoot_dht_stored_bytes", "Memory of what others store here in the DHT.", registry=metrics
        )
        self.keys: Gauge = Gauge(
            "talkoot_dht_stored_keys", "Keys of what others store here.", registry=metrics
        )
        self.evicted: Counter = Counter(
            "talkoot_dht_evicted_entries", "Entries that went as there was no more room.", registry=metrics
        )
        self.refused: Counter = Counter(
            "talkoot_dht_messages_refused",
            "Messages that asked for or brought more than is allowed.",
            registry=metrics,
        )
        self.withheld: Counter = Counter(
            "talkoot_dht_values_withheld",
            "Values that were left out of answers, since the peer that asked had had its share.",
            registry=metrics,
        )
        self.not_handed_over: Counter = Counter(
            "talkoot_dht_not_handed_over",
            "Newcomers to the DHT that were handed nothing of what is stored here, since too many came before.",
            registry=metrics,
        )


class _Stored(NamedTuple):
    """All entries of one key."""

    packed: bytes
    entries: int
    first_expiry: float
    last_expiry: float


class BoundedStorage:
    """The entries of all keys. When it is full, it evicts keys at random, so that no writer can choose which."""

    def __init__(
        self,
        bounds: StoreBounds,
        metrics: StoreMetrics,
        now: Callable[[], float] = clock.now,
        rng: random.Random | None = None,
    ) -> None:
        """`now`: Unix time in seconds."""
        self.bytes: int = 0
        """The memory of all entries, in bytes."""
        self._bounds = bounds
        self._metrics = metrics
        self._now = now
        self._rng = rng or random.SystemRandom()
        self._stored: dict[int, _Stored] = {}
        self._order: list[int] = []
        """The keys of `_stored`, as a list to draw from."""
        self._report()

    def put(self, key: int, entries: Entries) -> set[Subkey]:
        """Stores the entries that are newer than the stored ones. Returns the subkeys of those that it holds now.

        They include entries that it already held: a writer whose call was repeated, or that has handed them on by way
        of another peer, must not read that they were refused.
        """
        now = self._earliest()
        held = self._live(key, now)
        new = {
            subkey: entry
            for subkey, entry in entries.items()
            if entry.expires_at > now
            and (subkey not in held or held[subkey].expires_at < entry.expires_at)
            and packed_bytes({subkey: entry}) <= self._bounds.key_bytes
        }
        if new:
            self._set(key, self._fitting({**held, **new}, next(iter(new))))
            self._drop_expired(now)
            self._make_room_beside(key)
            self._report()
        return new.keys() | {subkey for subkey, entry in entries.items() if held.get(subkey) == entry}

    def get(self, key: int) -> Entries:
        """The entries that have not expired."""
        return self._live(key, self._earliest())

    def _earliest(self) -> float:
        return clock.earliest(self._now())

    def _live(self, key: int, now: float) -> Entries:
        stored = self._stored.get(key)
        if stored is None or stored.last_expiry <= now:
            return {}
        entries = unpack_entries(stored.packed)
        if stored.first_expiry > now:
            return entries
        return {subkey: entry for subkey, entry in entries.items() if entry.expires_at > now}

    def packed(self, key: int) -> bytes:
        """The entries that have not expired, packed by `pack_entries`. Empty if there are none."""
        now, stored = self._earliest(), self._stored.get(key)
        if stored is None or stored.last_expiry <= now:
            return b""
        if stored.first_expiry <= now:
            self._set(key, self._live(key, now))
            self._report()
        return self._stored[key].packed

    def expires_at(self, key: int) -> float:
        """When the last of the key's entries expires; 0 if there are none."""
        stored = self._stored.get(key)
        return 0.0 if stored is None else stored.last_expiry

    def size_of(self, key: int) -> tuple[int, int]:
        """The packed bytes and the number of all entries under the key, including expired ones."""
        stored = self._stored.get(key)
        return (0, 0) if stored is None else (len(stored.packed), stored.entries)

    def keys(self) -> list[int]:
        """The keys in the store. Some may have expired."""
        return list(self._order)

    def _set(self, key: int, entries: Entries) -> None:
        """The entries must not be empty."""
        expiries = [entry.expires_at for entry in entries.values()]
        before = self._stored.get(key)
        if before is None:
            self._order.append(key)
        self._stored[key] = _Stored(pack_entries(entries), len(entries), min(expiries), max(expiries))
        self.bytes += memory_of(self._stored[key].packed) - (
            0 if before is None else memory_of(before.packed)
        )

    def _fitting(self, entries: Entries, newest: Subkey) -> Entries:
        """The entries that fit under one key. Evicts entries other than `newest` at random, large ones more often.

        So a few writers of large entries displace each other, not the many writers of small ones.
        """
        size = packed_bytes(entries)
        others = {subkey: entry_bytes(subkey, entry) for subkey, entry in entries.items() if subkey != newest}
        while size > self._bounds.key_bytes or len(entries) > MAX_ENTRIES:
            (gone,) = self._rng.choices(list(others), list(others.values()))
            size -= others.pop(gone)
            del entries[gone]
            self._metrics.evicted.inc()
        return entries

    def _drop_expired(self, now: float) -> None:
        for _ in range(_LOOKED_AT):  # what was just stored stays, so the list is never empty
            drawn = self._rng.randrange(len(self._order))
            if self._stored[self._order[drawn]].last_expiry <= now:
                self._remove(drawn)

    def _make_room_beside(self, newest: int) -> None:
        while self.bytes > self._bounds.total_bytes and len(self._order) > 1:
            drawn = self._rng.randrange(len(self._order))
            if self._order[drawn] != newest:
                self._metrics.evicted.inc(len(unpack_entries(self._stored[self._order[drawn]].packed)))
                self._remove(drawn)

    def _remove(self, place: int) -> None:
        self._order[place], self._order[-1] = self._order[-1], self._order[place]
        self.bytes -= memory_of(self._stored.pop(self._order.pop()).packed)

    def _report(self) -> None:
        self._metrics.bytes.set(self.bytes)
        self._metrics.keys.set(len(self._order))


def memory_of(packed: bytes) -> int:
    """The memory that a key takes with its packed entries, in bytes."""
    return _KEY_BYTES + int(_FRAGMENTATION * len(packed))
