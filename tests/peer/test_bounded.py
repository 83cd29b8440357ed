"""A bounded dictionary keeps the items that were set last."""

from hypothesis import given
from hypothesis import strategies as st

from peer.bounded import BoundedDict


@given(st.integers(1, 5), st.lists(st.tuples(st.integers(0, 9), st.integers())))
def test_the_entries_set_last_are_kept(most: int, sets: list[tuple[int, int]]) -> None:
    bounded = BoundedDict[int, int](most)
    for key, value in sets:
        bounded[key] = value
    newest = list(dict.fromkeys(key for key, _ in reversed(sets)))[:most]
    assert list(reversed(bounded)) == newest
    assert all(bounded[key] == dict(sets)[key] for key in newest)


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
