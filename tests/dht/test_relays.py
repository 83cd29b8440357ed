"""How long a node keeps relays through which nobody reaches it."""

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dht.relays import RelayBackoff


def changes(
    patience: RelayBackoff, until: int, is_let_in: Callable[[int], bool] = lambda now: False
) -> list[int]:
    """The seconds at which other relays are chosen, if the node looks every second."""
    found = []
    for now in range(until):
        if is_let_in(now):
            patience.reset()
        elif patience.is_due(now):
            found.append(now)
    return found


def test_the_patience_doubles_up_to_a_bound() -> None:
    found = changes(RelayBackoff(), 3000)
    assert found == [30, 90, 210, 450, 930, 1410, 1890, 2370, 2850]


def test_once_somebody_comes_in_the_patience_begins_anew() -> None:
    assert changes(RelayBackoff(), 300, lambda now: now == 200) == [30, 90, 231, 291]


def test_relays_that_let_others_in_now_and_then_are_kept() -> None:
    assert changes(RelayBackoff(), 5000, lambda now: now % 30 == 0) == []


@pytest.mark.parametrize("every_s", [0.5, 7.0, 120.0])
def test_how_often_one_looks_changes_little(every_s: float) -> None:
    patience = RelayBackoff()
    looks = [at * every_s for at in range(int(10_000 / every_s))]
    found = [now for now in looks if patience.is_due(now)]
    for (before, now), borne_s in zip(pairwise(found), (60, 120, 240, 480, 480), strict=False):
        assert borne_s <= now - before < borne_s + every_s


@given(st.lists(st.tuples(st.floats(0, 1000), st.booleans()), max_size=50))
def test_two_changes_never_lie_nearer_than_the_first_patience(looks: list[tuple[float, bool]]) -> None:
    patience, now, changed_at = RelayBackoff(), 0.0, float("-inf")
    for pause_s, is_let_in in looks:
        now += pause_s
        if is_let_in:
            patience.reset()
        elif patience.is_due(now):
            assert now - changed_at >= 30
            changed_at = now
