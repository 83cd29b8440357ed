"""A bounded dictionary keeps the items that were set last."""

import tracemalloc
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from peer.bounded import BoundedDict, Totals, counting


@given(st.integers(1, 5), st.lists(st.tuples(st.integers(0, 9), st.integers())))
def test_the_entries_set_last_are_kept(most: int, sets: list[tuple[int, int]]) -> None:
    bounded = BoundedDict[int, int](most)
    for key, value in sets:
        bounded[key] = value
    newest = list(dict.fromkeys(key for key, _ in reversed(sets)))[:most]
    assert list(reversed(bounded)) == newest
    assert all(bounded[key] == dict(sets)[key] for key in newest)


def test_an_empty_dictionary_takes_less_than_200_bytes() -> None:
    tracemalloc.start()
    try:
        held: list[BoundedDict[int, int]] = [BoundedDict(5) for _ in range(1000)]
        assert tracemalloc.get_traced_memory()[0] < 200 * len(held)
    finally:
        tracemalloc.stop()


def test_an_entry_that_is_used_stays() -> None:
    bounded = BoundedDict[str, int](2)
    assert bounded.put("a", 1) == bounded.put("b", 2) == []
    bounded.move_to_end("a")
    assert bounded.put("c", 3) == [2]
    assert dict(bounded) == {"a": 1, "c": 3}


def test_a_bound_that_shrank_evicts_the_oldest_at_the_next_set() -> None:
    bounded = BoundedDict[int, str](4)
    for key in range(4):
        bounded.setdefault(key, str(key))
    bounded.most = 2
    assert bounded.put(9, "9") == ["0", "1", "2"]


def test_a_key_is_counted_while_inside_and_leaves_nothing_behind() -> None:
    counts = Counter[str]()
    with counting(counts, "one"), counting(counts, "other"):
        with counting(counts, "one"):
            assert counts == {"one": 2, "other": 1}
        assert counts == {"one": 1, "other": 1}
    assert not counts.keys()


@given(st.lists(st.tuples(st.sampled_from("ABCD"), st.integers(-5, 5)), max_size=60))
def test_the_owner_with_the_most_is_found(changes: list[tuple[str, int]]) -> None:
    totals, expected = Totals(), dict.fromkeys("ABCD", 0)
    for owner, amount in changes:
        amount = max(amount, -expected[owner])
        expected[owner] += amount
        totals.add(owner, amount)
        assert totals.of == {name: total for name, total in expected.items() if total}
        if totals.of:
            assert totals.of[totals.richest()] == max(expected.values())
