"""The clock for records: it does not jump, and other peers can only choose among times that this machine's clock
showed.
"""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer.clock import MOST_AHEAD_S, SwarmClock

HOUR_S = 3600.0
NOON = 1_700_000_000.0


class Machine:
    """A machine whose clock is off by `set_by`."""

    def __init__(self) -> None:
        self.passed = 0.0
        self.set_by = 0.0
        self.clock = SwarmClock(lambda: self.right + self.set_by, lambda: 50_000.0 + self.passed)

    @property
    def right(self) -> float:
        return NOON + self.passed

    def asked(self, *errors: float) -> None:
        """Peers answer. Each one's clock is wrong by the given time."""
        for number, error in enumerate(errors):
            self.clock.note(f"peer {number}", self.right + error)


@pytest.mark.parametrize("step_s", [HOUR_S, -HOUR_S])
@pytest.mark.parametrize("peers", [0, 1, 5])
def test_a_clock_that_is_set_for_a_while_changes_nothing(step_s: float, peers: int) -> None:
    machine = Machine()
    machine.asked(*[0.1] * peers)
    for set_by in (0.0, step_s, 0.0):
        machine.set_by = set_by
        for _ in range(50):
            machine.passed += 10.0
            assert machine.clock.now() == pytest.approx(machine.right)
    assert not machine.clock.warning


def test_a_wrong_clock_that_is_set_right_is_followed_at_once_where_peers_agree() -> None:
    machine = Machine()
    machine.set_by = -HOUR_S
    machine.clock = SwarmClock(lambda: machine.right + machine.set_by, lambda: machine.passed)
    machine.asked(0.0, 0.2, -0.1)
    assert machine.clock.now() == pytest.approx(machine.right - HOUR_S)
    assert "clock is 60 min behind those of most of the 3 peers asked: set it right" in machine.clock.warning
    machine.set_by = 0.0
    assert machine.clock.now() == pytest.approx(machine.right)
    assert not machine.clock.warning


def test_a_clock_that_differs_from_the_only_peers_is_named_with_what_follows() -> None:
    machine = Machine()
    machine.asked(HOUR_S)
    assert "behind that of the peer asked: set it right" in machine.clock.warning
    assert "it may see no nodes" in machine.clock.warning


def test_a_machine_alone_follows_its_clock_after_ten_minutes() -> None:
    machine = Machine()
    machine.set_by = HOUR_S
    assert machine.clock.now() == machine.right
    machine.passed += 601.0
    assert machine.clock.now() == machine.right + HOUR_S


def test_small_corrections_are_followed() -> None:
    machine = Machine()
    for _ in range(100):
        machine.passed += 1.0
        machine.set_by += 0.5
        assert machine.clock.now() == pytest.approx(machine.right + machine.set_by)


@given(st.lists(st.floats(), max_size=80), st.lists(st.sampled_from([0.0, HOUR_S, -HOUR_S]), max_size=20))
def test_liars_never_move_the_time_to_what_this_machine_did_not_say(
    lies: list[float], steps: list[float]
) -> None:
    machine = Machine()
    machine.asked(*lies)
    said = {0.0}
    for machine.set_by in steps:
        machine.passed += 1.0
        said.add(machine.set_by)
        assert any(abs(machine.clock.now() - machine.right - step) < 1e-3 for step in said)
        assert math.isfinite(machine.clock.error_s)


@given(
    st.lists(st.floats(-2.9, 2.9), min_size=1, max_size=9),
    st.lists(st.floats(min_value=4.0, allow_nan=False) | st.floats(max_value=-4.0), max_size=9),
)
def test_it_takes_more_liars_than_honest_peers_to_cause_a_warning(
    honest: list[float], liars: list[float]
) -> None:
    machine = Machine()
    machine.asked(*honest, *liars[: len(honest)])
    assert not machine.clock.warning
    assert not machine.clock.doubt


@pytest.mark.parametrize("ahead_s", [4.0, 60.0, 9 * 60.0])
@pytest.mark.parametrize("liar", [-HOUR_S, -300.0, 300.0, HOUR_S])
def test_a_fast_clock_is_allowed_for_whatever_one_of_three_peers_says(ahead_s: float, liar: float) -> None:
    machine = Machine()
    machine.asked(-ahead_s, 0.1 - ahead_s, liar)
    assert machine.clock.ahead_s == pytest.approx(ahead_s, abs=0.11)
    assert machine.clock.now() == machine.right
    assert "notice that much later when this machine goes offline" in machine.clock.warning


@pytest.mark.parametrize("errors", [(), (60.0,), (-2.9,), (-HOUR_S,), (-60.0, 0.0), (-60.0, 0.0, 0.0, -60.0)])
def test_a_clock_that_is_not_fast_or_far_too_fast_is_not_allowed_for(errors: tuple[float, ...]) -> None:
    machine = Machine()
    machine.asked(*errors)
    assert machine.clock.ahead_s == 0


def test_a_fast_clock_is_no_longer_allowed_for_once_it_is_right() -> None:
    machine = Machine()
    machine.asked(-60.0, -60.0)
    for slewed_s in range(58):
        machine.passed += 10.0
        machine.set_by = -float(slewed_s)
        machine.clock.now()
        assert machine.clock.ahead_s == pytest.approx(60.0 - slewed_s if slewed_s < 57 else 0.0)


@given(st.lists(st.floats(), min_size=1, max_size=80))
def test_liars_make_records_expire_at_most_ten_minutes_late_and_never_early(lies: list[float]) -> None:
    machine = Machine()
    machine.asked(*lies)
    assert 0 <= machine.clock.ahead_s <= MOST_AHEAD_S
    assert machine.clock.now() == machine.right


@pytest.mark.parametrize(("error_s", "words"), [(12.4, "12 s behind"), (-7.0, "7 s ahead of")])
def test_the_warning_says_which_way_the_clock_is_off(error_s: float, words: str) -> None:
    machine = Machine()
    machine.asked(error_s)
    assert words in machine.clock.warning
    assert machine.clock.doubt == f". But first, {machine.clock.warning}"
    for lie in (math.nan, math.inf, 1e300, -2 * NOON):
        machine.asked(lie)
        assert words in machine.clock.warning
