"""How many rows each expert computed recently, as nodes announce it."""

from hypothesis import given
from hypothesis import strategies as st

from dht.uid import UID
from expert_server.hosting.replicas import RecentRows

HERE, THERE = UID(0, (0, 0)), UID(0, (0, 1))


def test_rows_count_half_after_five_minutes() -> None:
    recent = RecentRows()
    assert recent.note(HERE, 0, 0.0) == 0
    assert recent.note(HERE, 800, 10.0) == 800
    assert recent.note(HERE, 800, 310.0) == 400
    assert recent.note(HERE, 900, 310.0) == 500
    assert recent.note(THERE, 7, 310.0) == 7


def test_an_expert_that_is_taken_again_begins_anew_and_the_others_are_forgotten() -> None:
    recent = RecentRows()
    recent.note(HERE, 100, 0.0)
    assert recent.note(HERE, 30, 0.0) == 130
    recent.keep([THERE])
    assert recent.note(HERE, 30, 0.0) == 30


@given(st.lists(st.tuples(st.integers(0, 10**9), st.floats(0, 1e5)), max_size=20))
def test_they_are_never_more_than_all_that_were_computed(steps: list[tuple[int, float]]) -> None:
    recent, rows, now = RecentRows(), 0, 0.0
    for grown, waited_s in steps:
        rows, now = rows + grown, now + waited_s
        assert 0 <= recent.note(HERE, rows, now) <= rows + 1
