"""Rows of sequences that are kept for the next call: the limit holds, and no caller gets or loses another's rows."""

import time

import pytest
import torch
from grpc import StatusCode
from hypothesis import given
from hypothesis import strategies as st

from dht.uid import UID
from expert_server.serving.sequence_cache import ENTRY_BYTES, IDLE_S, SequenceCache
from peer.errors import ExpertError
from peer.layers import KeyValueCache

FIRST, SECOND = UID(0, (0, 0)), UID(0, (0, 1))
ENTRY = 16 * 2 * 4 * 4 + ENTRY_BYTES
"""Bytes of 16 rows of `rows`."""


def rows(count: int = 16) -> KeyValueCache:
    cache = KeyValueCache()
    cache.extend(torch.zeros(count, 2, 1, 4))
    return cache


def put(cache: SequenceCache, number: int, caller: str = "A", uid: UID = FIRST, now: float = 0.0) -> bool:
    return cache.put(caller, caller, uid, [number], [rows()], now)


def sizes(cache: SequenceCache) -> dict[str, int]:
    """The bytes of each caller."""
    return {name: sum(entry.bytes for entry in entries.values()) for name, entries in cache._callers.items()}


def has(cache: SequenceCache, number: int, caller: str = "A", uid: UID = FIRST, count: int = 16) -> bool:
    """Whether the cache has the sequence. Also takes it out."""
    try:
        (taken,) = cache.take(caller, uid, [number], [count])
    except ExpertError:
        return False
    assert taken.length == count
    return True


def test_rows_are_taken_once_by_their_caller_for_their_expert_in_their_number() -> None:
    cache = SequenceCache(lambda: 10 * ENTRY)
    assert put(cache, 7)
    assert not has(cache, 7, caller="B")
    assert not has(cache, 7, uid=SECOND)
    assert not has(cache, 8)
    assert not has(cache, 7, count=2)
    assert has(cache, 7)
    assert not has(cache, 7)
    assert len(cache) == cache.bytes == 0


def test_many_keys_of_one_line_lose_their_own_sequences() -> None:
    cache = SequenceCache(lambda: 64 * ENTRY)
    for number in range(16):
        assert put(cache, number, caller="honest")
    for number in range(4):
        for key in range(64):
            cache.put(f"key {key}", "one line", FIRST, [number], [rows()], 0.0)
    assert cache.bytes == 64 * ENTRY
    assert all(has(cache, number, caller="honest") for number in range(16))
    assert cache.bytes == 48 * ENTRY
    cache.drop_idle(0.0, callers=())
    assert len(cache) == cache.bytes == 0


def test_where_one_sequence_is_missing_the_others_stay() -> None:
    cache = SequenceCache(lambda: 10 * ENTRY)
    put(cache, 1)
    with pytest.raises(ExpertError, match=r"expert 0\.0\.0 does not have those 16 rows") as refused:
        cache.take("A", FIRST, [1, 2], [16, 16])
    assert refused.value.status is StatusCode.FAILED_PRECONDITION
    assert has(cache, 1)


def test_a_sequence_that_starts_anew_forgets_what_was_there() -> None:
    cache = SequenceCache(lambda: 10 * ENTRY)
    put(cache, 1)
    (taken,) = cache.take("A", FIRST, [1], [0])
    assert taken.length == len(cache) == 0


def test_the_richest_loses_what_it_has_not_used_for_the_longest_time() -> None:
    cache = SequenceCache(lambda: 4 * ENTRY)
    put(cache, 1, "poor")
    assert all(put(cache, number) for number in range(3))
    assert has(cache, 0)
    assert put(cache, 0)
    assert put(cache, 9)
    assert [has(cache, number) for number in (0, 1, 2, 9)] == [True, False, True, True]
    assert has(cache, 1, "poor")


def test_what_finds_no_room_is_not_kept_and_others_make_room_when_it_gets_less() -> None:
    room = [ENTRY - 1]
    cache = SequenceCache(lambda: room[0])
    assert not put(cache, 1)
    room[0] = 2 * ENTRY
    assert put(cache, 1)
    assert put(cache, 2)
    room[0] = ENTRY
    cache.keep_to_room()
    assert (has(cache, 1), has(cache, 2)) == (False, True)
    assert not cache.put("A", "A", FIRST, [3, 4], [rows(), rows()], 0.0)


def test_what_is_idle_is_dropped_and_so_is_what_is_of_callers_that_have_left() -> None:
    cache = SequenceCache(lambda: 10 * ENTRY)
    put(cache, 1, "A", now=0.0)
    put(cache, 2, "A", now=1.0)
    put(cache, 3, "B", now=1.0)
    cache.drop_idle(IDLE_S + 0.5, callers={"A", "B"})
    assert len(cache) == 2
    cache.drop_idle(IDLE_S + 0.5, callers={"A"})
    assert not has(cache, 3, "B")
    assert has(cache, 2)


@given(
    st.lists(
        st.tuples(st.sampled_from("ABC"), st.integers(0, 5), st.integers(1, 40), st.booleans()), max_size=40
    ),
    st.integers(0, 8),
)
def test_it_keeps_to_its_room_and_takes_nothing_from_those_within_their_share(
    events: list[tuple[str, int, int, bool]], entries: int
) -> None:
    room = entries * ENTRY
    cache = SequenceCache(lambda: room)
    for caller, number, count, takes in events:
        before = {name: size for name, size in sizes(cache).items() if name != caller}
        if takes:
            has(cache, number, caller, count=count)
        else:
            cache.put(caller, caller, FIRST, [number], [rows(count)], 0.0)
        assert cache.bytes == sum(sizes(cache).values()) <= room
        owners = len({*before, caller})
        for name, size in before.items():
            if size <= room // owners - 4 * ENTRY:
                assert sizes(cache)[name] == size


def test_a_flood_takes_as_long_however_many_keep_something() -> None:
    """The event loop is blocked meanwhile. Looking at all entries and callers each time took minutes."""
    others, entries = 4096, 2**13
    cache = SequenceCache(lambda: (others + entries) * ENTRY_BYTES)
    for number in range(others):
        cache.put(str(number), str(number), FIRST, [1], [KeyValueCache()], 0.0)
    began = time.thread_time()
    cache.put("flood", "flood", FIRST, range(entries), [KeyValueCache() for _ in range(entries)], 0.0)
    for number in range(entries):
        cache.put("flood", "flood", SECOND, [number], [KeyValueCache()], 0.0)
    assert time.thread_time() - began < 5
    assert len(cache) == others + entries
