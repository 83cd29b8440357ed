"""Once a week a node's owner is told what the node did, and what others signed for."""

from dataclasses import replace
from pathlib import Path

import pytest
from test_node_view import STATUS

from dht.receipts import SignedWork, Work
from talkoot.node.week import WEEK_S, WeeklySummary

LATER = replace(
    STATUS,
    contributed_hours=STATUS.contributed_hours + 100.5,
    contributed_rows=STATUS.contributed_rows + 1_000_000,
    signed=SignedWork(Work(pairs=STATUS.signed.work.pairs + 900_000), 6),
)


class Clock:
    now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


def test_a_week_is_told_once_and_over_restarts(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "state" / "week.json"
    assert WeeklySummary(path, clock).look(STATUS) == ""
    clock.now += WEEK_S - 1
    assert WeeklySummary(path, clock).look(LATER) == ""
    clock.now += 1
    week = WeeklySummary(path, clock)
    assert week.look(LATER) == (
        "in the last week: 100 h 30 min served, computed 1,000,000 rows, trainers signed for 900,000 rows; "
        "in all runs computed 8,000,000 rows, 34,567 updates, 112 h 48 min served; "
        "of that, 6 callers have signed for 7,800,000 rows so far"
    )
    assert week.look(LATER) == ""
    clock.now += WEEK_S
    assert "0 min served, computed 0 rows, trainers signed for 0 rows;" in WeeklySummary(path, clock).look(
        LATER
    )


def test_what_was_lost_is_not_counted_as_less_than_nothing(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "week.json"
    WeeklySummary(path, clock).look(LATER)
    clock.now += WEEK_S
    assert "0 min served, computed 0 rows, trainers signed for 0 rows;" in WeeklySummary(path, clock).look(
        STATUS
    )


def test_a_clock_that_was_set_back_begins_a_week(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "week.json"
    week = WeeklySummary(path, clock)
    week.look(STATUS)
    clock.now -= 100 * WEEK_S
    assert week.look(STATUS) == ""
    clock.now += WEEK_S
    assert week.look(LATER).startswith("in the last week: 100 h 30 min served")


@pytest.mark.parametrize("broken", [b"", b"{", b'{"began_at": 1e999}', b'{"began_at": -1, "hours": 0}'])
def test_a_broken_file_begins_a_week(tmp_path: Path, broken: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "week.json"
    path.write_bytes(broken)
    assert WeeklySummary(path, Clock()).look(STATUS) == ""
    assert "a new week begins" in caplog.text


def test_a_disk_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("a file in the folder's place")
    clock = Clock()
    week = WeeklySummary(tmp_path / "file" / "week.json", clock)
    assert week.look(STATUS) == ""
    assert "could not write" in caplog.text
    clock.now += WEEK_S
    assert week.look(LATER).startswith("in the last week: 100 h 30 min served")
