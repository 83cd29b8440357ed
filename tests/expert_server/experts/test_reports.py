"""From what trainers report, a host sees that it is called too seldom; no minority of trainers makes it believe so."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expert_server.experts.reports import UpdateReports

counts = st.integers(1, 10**6)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def report(reports: UpdateReports, name: str, here: int, elsewhere: int, group: str = "") -> None:
    """The reports of a trainer that gets so many updates here, and as many elsewhere between its calls."""
    for call in range(here + 1):
        reports.note(name, group or name, call + call * elsewhere // max(1, here))


@pytest.mark.parametrize(
    ("here", "elsewhere", "others", "is_left_behind"),
    [
        (50, 50, 1, False),
        (25, 99, 1, False),
        (25, 101, 1, True),
        (1, 31, 1, False),
        (1, 32, 1, True),
        (25, 250, 3, False),
        (25, 301, 3, True),
    ],
)
def test_a_host_with_less_than_a_quarter_of_the_others_updates_is_left_behind(
    here: int, elsewhere: int, others: int, is_left_behind: bool
) -> None:
    reports = UpdateReports()
    assert not reports.is_left_behind(others)
    report(reports, "a trainer", here, elsewhere)
    assert reports.is_left_behind(others) is is_left_behind


@given(
    st.lists(st.tuples(st.integers(4, 30), st.integers(1, 3)), min_size=1, max_size=5),
    st.lists(counts, max_size=5),
    st.booleans(),
    st.integers(1, 4),
)
def test_as_many_hostile_trainers_as_honest_ones_make_no_host_believe_that_it_is_left_behind(
    honest: list[tuple[int, int]], lies: list[int], are_one: bool, others: int
) -> None:
    reports = UpdateReports()
    for number, (here, times) in enumerate(honest):
        report(reports, f"honest {number}", here, here * times * others)
    for number, lie in enumerate(lies if are_one else lies[: len(honest)]):
        report(reports, f"hostile {number}", 1, lie, "a household" if are_one else "")
    assert not reports.is_left_behind(others)


def test_a_host_that_its_own_trainers_call_is_not_left_behind_because_others_seldom_do() -> None:
    reports = UpdateReports()
    report(reports, "near", 100, 100)
    for number in range(3):
        report(reports, f"far {number}", 2, 98)
    assert not reports.is_left_behind()


def test_what_was_reported_before_an_average_counts_half_and_before_a_whole_state_nothing() -> None:
    reports = UpdateReports()
    report(reports, "a trainer", 4, 100)
    reports.note_averaged()
    assert reports.is_left_behind(), "50 updates"
    reports.note_averaged()
    assert not reports.is_left_behind(), "25 updates"
    report(reports, "another", 4, 100)
    assert reports.is_left_behind()
    reports.start_over()
    assert not reports.is_left_behind()


def test_a_trainer_that_restarts_or_comes_anew_has_reported_nothing() -> None:
    reports = UpdateReports()
    reports.note("a trainer", "a line", 1000)
    assert not reports.is_left_behind(), "it may have trained with a replica that has long gone"
    report(reports, "a trainer", 20, 20)
    assert not reports.is_left_behind()
    report(reports, "a trainer", 1, 200)
    assert reports.is_left_behind()


def test_trainers_that_left_do_not_outvote_those_that_train() -> None:
    clock = Clock()
    reports = UpdateReports(clock)
    for number in range(3):
        report(reports, f"left {number}", 20, 20)
    clock.now = 300.0
    report(reports, "stays", 1, 100)
    assert not reports.is_left_behind()
    clock.now = 601.0
    assert reports.is_left_behind()


def test_many_keys_displace_each_other_and_no_honest_trainer() -> None:
    reports = UpdateReports()
    report(reports, "honest", 20, 20)
    for number in range(1000):
        report(reports, f"hostile {number}", 1, 100, "a household")
        reports.note("hostile 0", "a household", number)
    assert len(reports._trainers) == 256
    assert "honest" in reports._trainers
    assert reports._trainers["hostile 0"].here == 1001, "those that reported longest ago are forgotten"
    assert not reports.is_left_behind()
