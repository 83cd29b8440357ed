"""The history is bounded and survives a restart; a broken file is set aside with a warning."""

import asyncio
import errno
import logging
import math
import os
import sqlite3
from pathlib import Path

import pytest
from simulated_readings import NOW, large_swarm

from peer.errors import StartError
from peer.metrics import total
from talkoot.dashboard.history import EXPERT_TIERS, TIERS, History, HistoryStore, Sample
from talkoot.dashboard.picture import Picture


def opened(folder: Path, series: int = 64, expert_series: int = 64) -> History:
    return History(folder / "history.sqlite", series, expert_series)


def rows_in(folder: Path) -> int:
    connection = sqlite3.connect(folder / "history.sqlite")
    (count,) = connection.execute("select count(*) from samples").fetchone()
    connection.close()
    return int(count)


def test_what_was_added_is_read_back_after_a_restart(tmp_path: Path) -> None:
    history = opened(tmp_path)
    history.add([Sample("loss", "aino", 3.0)], NOW)
    history.add([Sample("loss", "aino", 2.0)], NOW + 60)
    history.close()
    history = opened(tmp_path)
    ((name, points),) = history.read("loss", NOW - 100, NOW + 61, 300, 8)
    history.close()
    assert name == "aino"
    assert [value for _, value in points if value is not None] == [3.0, 2.0]
    assert not (tmp_path / "history.broken").exists()


def test_figures_of_one_step_are_averaged(tmp_path: Path) -> None:
    history = opened(tmp_path)
    for second in range(5):
        history.add([Sample("loss", "a", float(second))], NOW + second)
    ((_, points),) = history.read("loss", NOW - 10, NOW + 5, 1000, 8)
    history.close()
    assert points == [(NOW, 2.0)]


def test_a_figure_larger_than_sqlite_has_integers_is_kept(tmp_path: Path) -> None:
    history = opened(tmp_path)
    history.add([Sample("updates", "a", 2**64)], NOW)
    ((_, points),) = history.read("updates", NOW - 10, NOW + 1, 300, 8)
    history.close()
    assert points == [(NOW, 2.0**64)]


def test_a_gap_is_a_point_without_a_value(tmp_path: Path) -> None:
    history = opened(tmp_path)
    history.add([Sample("loss", "a", 1.0)], NOW)
    history.add([Sample("loss", "a", 2.0)], NOW + 300)
    ((_, points),) = history.read("loss", NOW - 10, NOW + 301, 1000, 8)
    history.close()
    assert [value for _, value in points] == [1.0, None, 2.0]


@pytest.mark.parametrize(("shown_s", "apart"), [(900, 10), (86400, 300)])
def test_a_figure_that_is_unknown_for_a_moment_leaves_a_gap(
    tmp_path: Path, shown_s: float, apart: float
) -> None:
    history = opened(tmp_path)
    history.add([Sample("loss", "never known", math.nan)], NOW - 1)
    for number, loss in enumerate([2.0, 1.0, math.nan, math.nan, 6.0, 5.0]):
        history.add([Sample("loss", "a", loss), Sample("loss", "b", 3.0)], NOW + number * apart)
    history.add([Sample("loss", "a", math.nan)], NOW + 5 * apart)
    history.add([Sample("loss", "a", 7.0)], NOW + 6 * apart)
    now = NOW + 6 * apart + 1
    found = dict(history.read("loss", now - shown_s, now, 300, 8))
    history.close()
    assert [value for _, value in found["a"]] == [2.0, 1.0, None, 6.0, 5.0, None, 7.0]
    assert [value for _, value in found["b"]] == [3.0] * 6
    times = [at for at, _ in found["a"]]
    assert times == sorted(set(times))
    assert found.keys() == {"a", "b"}


def test_old_times_are_read_from_coarser_steps(tmp_path: Path) -> None:
    history = opened(tmp_path)
    for hour in range(72):
        history.add([Sample("loss", "a", float(hour))], NOW + 3600 * hour)
    now = NOW + 3600 * 71 + 1
    ((_, points),) = history.read("loss", NOW - 1, now, 2000, 8)
    history.close()
    values = [value for _, value in points if value is not None]
    assert values == sorted(values)
    assert values[-1] == 71.0
    assert len(values) == 72
    assert [at for at, _ in points] == sorted(at for at, _ in points)


def test_no_more_points_than_asked_for(tmp_path: Path) -> None:
    history = opened(tmp_path)
    for minute in range(600):
        history.add([Sample("loss", "a", 1.0)], NOW + 60 * minute)
    ((_, points),) = history.read("loss", NOW, NOW + 36000, 50, 8)
    history.close()
    assert 10 < len(points) <= 54


def test_the_file_is_bounded_however_long_it_runs(tmp_path: Path) -> None:
    history, step = opened(tmp_path, series=4), 3600.0
    for hour in range(24 * 40):
        samples = [Sample("loss", f"trainer {(hour // 24 + n) % 30}", 1.0) for n in range(6)]
        history.add(samples, NOW + step * hour)
    history.close()
    most = 4 * sum(tier.kept_s // tier.step_s for tier in TIERS)
    assert 0 < rows_in(tmp_path) <= most


def test_a_trainer_that_reports_a_loss_and_none_in_turns_takes_little_room(tmp_path: Path) -> None:
    history = opened(tmp_path)
    for number in range(400):
        history.add([Sample("loss", "a", math.nan if number % 2 else 1.0)], NOW + 40 * number)
    breaks = history._breaks(history._series(Sample("loss", "a", 0.0)), NOW)
    history.close()
    assert 64 <= len(breaks) <= 66
    assert breaks[-1] == NOW + 40 * 399


def test_experts_do_not_push_out_the_swarms_figures(tmp_path: Path) -> None:
    history = opened(tmp_path, series=4, expert_series=10)
    history.add([Sample("loss", "a", 1.0)], NOW)
    history.add([Sample("expert_updates", f"0.0.{n}", 1.0) for n in range(100)], NOW + 1)
    history.add([], NOW + 100)
    assert len(history.read("loss", NOW - 100, NOW + 100, 300, 8)) == 1
    assert len(history.read("expert_updates", NOW - 100, NOW + 100, 300, 1000)) == 10
    history.close()
    assert rows_in(tmp_path) == len(TIERS) + 10 * len(EXPERT_TIERS)


def test_many_trainers_push_out_no_figure_of_the_swarm_that_begins_later(tmp_path: Path) -> None:
    history = opened(tmp_path, series=8)
    losses = [Sample("loss", f"trainer {number}", 2.0) for number in range(20)]
    history.add(losses, NOW)
    for second in range(0, 300, 5):
        history.add([*losses, Sample("latency_ms", "forward p50", 5.0)], NOW + second)
    history.add([], NOW + 300)
    ((_, points),) = history.read("latency_ms", NOW, NOW + 300, 300, 8)
    kept = history.read("loss", NOW, NOW + 300, 300, 20)
    history.close()
    assert (len(points), len(kept)) == (60, 7)


def test_the_newest_series_are_read(tmp_path: Path) -> None:
    history = opened(tmp_path)
    for number in range(12):
        history.add([Sample("loss", f"t{number}", 1.0)], NOW + number)
    found = history.read("loss", NOW - 100, NOW + 20, 300, 8)
    history.close()
    assert [name for name, _ in found] == [f"t{number}" for number in range(11, 3, -1)]


@pytest.mark.parametrize("restarts", [False, True])
def test_what_a_wrong_clock_put_far_ahead_is_forgotten(tmp_path: Path, restarts: bool) -> None:
    history = opened(tmp_path)
    history.add([Sample("loss", "a", 1.0)], NOW + 10 * 365 * 86400)
    if restarts:
        history.close()
        history = opened(tmp_path)
    history.add([Sample("loss", "b", 2.0)], NOW)
    assert [name for name, _ in history.read("loss", NOW - 100, NOW + 1, 300, 8)] == ["b"]
    history.close()


@pytest.mark.parametrize("content", [b"no database at all" * 100, b"SQLite format 3\x00" + b"\xff" * 4000])
def test_a_broken_file_is_set_aside_and_said_aloud(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "history.sqlite"
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        history = opened(tmp_path)
    history.add([Sample("loss", "a", 1.0)], NOW)
    assert len(history.read("loss", NOW - 1, NOW + 1, 300, 8)) == 1
    history.close()
    assert (tmp_path / "history.broken").read_bytes() == content
    assert "moved to" in caplog.text


def broken_in_use(folder: Path) -> History:
    history = opened(folder)
    history.keep("picture", "x" * 8_000_000)  # more than SQLite keeps in memory
    history.close()
    history = opened(folder)
    with (folder / "history.sqlite").open("r+b") as file:
        file.seek(40_960)
        file.write(b"\xff" * 6_000_000)
    return history


def test_a_file_that_breaks_while_it_is_used_is_set_aside(tmp_path: Path) -> None:
    history = broken_in_use(tmp_path)

    async def use() -> float:
        store = HistoryStore(history)
        assert await store.kept_picture() is None
        await store.add([Sample("loss", "after", 2.0)], NOW)
        found = await store.read("loss", NOW - 1, NOW + 1, 300, 8)
        await store.close()
        assert [name for name, _ in found] == ["after"]
        return total(store.failures)

    assert asyncio.run(use()) == 1
    assert (tmp_path / "history.broken").exists()


def test_a_history_of_another_form_is_set_aside(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "history.sqlite")
    connection.execute("pragma user_version = 99")
    connection.close()
    history = opened(tmp_path)
    history.close()
    assert (tmp_path / "history.broken").exists()


def test_a_folder_that_cannot_be_written_is_said_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartError, match="pass another --state"):
        History(tmp_path / "file" / "history.sqlite", 1, 1)


def test_the_last_picture_is_kept(tmp_path: Path) -> None:
    picture = large_swarm(50, grid=(4, 4))

    async def keep() -> Picture | None:
        store = HistoryStore(opened(tmp_path))
        assert await store.kept_picture() is None
        await store.keep_picture(picture)
        await store.close()
        store = HistoryStore(opened(tmp_path))
        try:
            return await store.kept_picture()
        finally:
            await store.close()

    assert asyncio.run(keep()) == picture


def test_a_full_disk_is_said_once_and_not_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*anything: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    async def use() -> float:
        store = HistoryStore(opened(tmp_path))
        monkeypatch.setattr(History, "add", full)
        for second in range(5):
            await store.add([Sample("loss", "a", 2.0)], NOW + second)
        await store.close()
        return total(store.failures)

    assert asyncio.run(use()) == 5
    assert caplog.text.count("the history can't be used: database or disk is full") == 1


@pytest.mark.parametrize("failing", ["os.replace", "talkoot.dashboard.history._open"])
def test_a_file_that_breaks_while_nothing_can_be_written_ends_no_dashboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failing: str
) -> None:
    def read_only(*anything: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    async def use() -> float:
        store = HistoryStore(broken_in_use(tmp_path))
        monkeypatch.setattr(failing, read_only)
        assert await store.kept_picture() is None
        await store.add([Sample("loss", "a", 2.0)], NOW)
        assert await store.read("loss", NOW - 1, NOW + 1, 300, 8) == []
        await store.close()
        return total(store.failures)

    assert asyncio.run(use()) == 3
    assert caplog.text.count("the history can't be used") == 1


@pytest.mark.parametrize(
    "kept", [None, 3, [], {}, {"form": 1}, {"form": 2}, {"form": 3}, {"form": 3, "replicas": 7}]
)
def test_a_picture_of_another_form_is_not_read(tmp_path: Path, kept: object) -> None:
    async def read() -> Picture | None:
        history = opened(tmp_path)
        history.keep("picture", kept)
        store = HistoryStore(history)
        try:
            return await store.kept_picture()
        finally:
            await store.close()

    assert asyncio.run(read()) is None
