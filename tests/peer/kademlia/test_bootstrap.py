"""What a peer learns when it joins: whether its clock is right, and whether others can reach it."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer.errors import StartError
from peer.kademlia.node import BootstrapReply, check_bootstrap
from peer.kademlia.validation import CLOCK_TOLERANCE_S

right = st.floats(-CLOCK_TOLERANCE_S, CLOCK_TOLERANCE_S)
wrong = st.just(math.nan) | st.floats(CLOCK_TOLERANCE_S + 0.1) | st.floats(max_value=-CLOCK_TOLERANCE_S - 0.1)


def said(offset_s: float, reaches_us: bool = True) -> BootstrapReply:
    return BootstrapReply((), offset_s, reaches_us)


@given(st.lists(right, min_size=1, max_size=9), st.lists(wrong, max_size=9))
def test_a_minority_with_wrong_clocks_keeps_nobody_out(good: list[float], bad: list[float]) -> None:
    check_bootstrap([said(offset) for offset in (bad[: len(good)] + good)], serves_dht=True)


@given(st.lists(right, max_size=9), st.lists(wrong, min_size=1, max_size=9))
def test_a_clock_that_most_find_wrong_is_an_error(good: list[float], bad: list[float]) -> None:
    with pytest.raises(StartError, match="set it right"):
        check_bootstrap([said(offset) for offset in (good[: len(bad) - 1] + bad)], serves_dht=True)


@pytest.mark.parametrize(
    ("offset_s", "words"), [(12.4, "12 s behind"), (-7.0, "7 s ahead of"), (math.nan, "clock is")]
)
def test_the_error_says_which_way_the_clock_is_off(offset_s: float, words: str) -> None:
    with pytest.raises(StartError, match=words):
        check_bootstrap([said(offset_s)], serves_dht=False)


def test_a_peer_that_nobody_reaches_is_told_so_unless_it_serves_nothing() -> None:
    unreached = [said(0.1, reaches_us=False), said(0.2, reaches_us=False)]
    with pytest.raises(StartError, match="none of the 2 peers asked can reach this one"):
        check_bootstrap(unreached, serves_dht=True)
    check_bootstrap(unreached, serves_dht=False)
    check_bootstrap([*unreached, said(0.0)], serves_dht=True)
