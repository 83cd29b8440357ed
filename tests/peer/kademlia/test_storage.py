"""The store is bounded, and an older record replaces nothing."""

import random
from collections import Counter
from typing import Any

import pytest

from peer.kademlia import storage as storage_module
from peer.kademlia.hivemind import DHTID, timed_storage
from peer.kademlia.storage import BoundedStorage, StoreBounds, StoreMetrics, size_of
from peer.metrics import total

KEY, OTHER = DHTID.generate(source="key"), DHTID.generate(source="other")
NOW = 1_800_000_000.0


class Clock:
    now = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(timed_storage, "get_dht_time", made)
    return made


def storage(**bounds: int) -> tuple[Any, StoreMetrics]:
    counts = StoreMetrics()
    return BoundedStorage(StoreBounds(**bounds), counts, random.Random(1)), counts


def entries(stored: Any, key: DHTID) -> dict[object, bytes]:
    found = stored.get(key)
    return {} if found is None else {subkey: entry.value for subkey, entry in found.value.items()}


def test_an_older_record_stored_again_does_not_end_the_newer_one(clock: Clock) -> None:
    stored, _ = storage()
    assert stored.store_subkey(KEY, 1, b"old", NOW + 10)
    assert stored.store_subkey(KEY, 1, b"new", NOW + 30)
    assert not stored.store_subkey(KEY, 1, b"old", NOW + 10)
    clock.now = NOW + 20
    assert entries(stored, KEY) == {1: b"new"}


def test_constant_renewal_fills_no_memory(clock: Clock) -> None:
    stored, counts = storage()
    for n in range(1000):
        assert stored.store_subkey(KEY, 1, b"value", NOW + 10 + n / 1000)
    inner = stored.data[KEY].value
    assert len(stored.expiration_heap) < 100
    assert len(inner.expiration_heap) < 100
    assert total(counts.bytes) == size_of(1, b"value")
    clock.now = NOW + 10.9
    assert entries(stored, KEY) == {1: b"value"}


def test_a_full_key_evicts_random_entries_for_new_ones(clock: Clock) -> None:
    most = 20 * size_of(0, bytes(100))
    stored, counts = storage(key_bytes=most)
    for n in range(100):
        assert stored.store_subkey(KEY, n, bytes(100), NOW + 10)
        assert n in entries(stored, KEY)
        assert total(counts.bytes) <= most
    kept = set(entries(stored, KEY))
    assert len(kept) == 20
    assert total(counts.evicted) == 80
    assert kept != set(range(80, 100)), "not simply the oldest go"


def test_an_entry_costs_no_look_at_all_the_others_of_its_key(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = Counter[str]()

    def counted(subkey: object, value: bytes) -> int:
        looks["sizes"] += 1
        return size_of(subkey, value)

    monkeypatch.setattr(storage_module, "size_of", counted)
    stored, counts = storage(key_bytes=200 * size_of(0, b"value"))
    for n in range(1000):
        assert stored.store_subkey(KEY, n, b"value", NOW + 10)
    assert len(entries(stored, KEY)) == 200
    assert total(counts.evicted) == 800
    assert looks["sizes"] < 5 * 1000


def test_entries_that_expired_or_changed_since_are_counted_as_they_are(clock: Clock) -> None:
    stored, counts = storage()
    stored.store_subkey(KEY, 1, b"short", NOW + 10)
    stored.store_subkey(KEY, 2, b"long", NOW + 100)
    clock.now = NOW + 20
    assert set(entries(stored, KEY)) == {2}
    stored.store_subkey(KEY, 1, b"again", NOW + 30)
    stored.store_subkey(KEY, 2, b"longer than before", NOW + 110)
    assert total(counts.bytes) == size_of(1, b"again") + size_of(2, b"longer than before")


def test_an_entry_larger_than_a_key_is_refused(clock: Clock) -> None:
    stored, counts = storage(key_bytes=1000)
    assert not stored.store_subkey(KEY, 1, bytes(1000), NOW + 10)
    assert total(counts.bytes) == 0


def test_many_keys_stay_within_the_bound_and_the_newest_is_there(clock: Clock) -> None:
    stored, counts = storage(total_bytes=100_000)
    for n in range(500):
        key = DHTID(n)
        assert stored.store_subkey(key, b"peer", bytes(1000), NOW + 10)
        assert entries(stored, key)
        assert total(counts.bytes) <= 100_000
    assert total(counts.keys) == len(stored.data) > 50
    assert total(counts.evicted) == 500 - total(counts.keys)


def test_expired_and_removed_entries_no_longer_count(clock: Clock) -> None:
    stored, counts = storage()
    stored.store_subkey(KEY, 1, b"short", NOW + 10)
    stored.store_subkey(OTHER, 1, b"long", NOW + 20)
    clock.now = NOW + 15
    assert stored.get(KEY) is None
    assert (total(counts.keys), total(counts.bytes)) == (1, size_of(1, b"long"))
    stored.clear()
    assert (total(counts.keys), total(counts.bytes)) == (0, 0)
