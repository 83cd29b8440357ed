"""What a node has contributed is counted across its runs, and a broken file does not stop it."""

import asyncio
import contextlib
import itertools
import logging
from pathlib import Path

import pytest

from expert_server.status import Contribution, ContributionAccount
from peer.loop import LoopThread


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_it_is_counted_on_over_runs(loop: LoopThread, tmp_path: Path) -> None:
    path, clock = tmp_path / "state" / "contribution.json", Clock()
    for run in (1, 2, 3):
        account = ContributionAccount(path, clock)
        account.note(serves=True)
        clock.now += 3600
        account.note(serves=True)
        clock.now += 1800
        account.note(serves=False)
        clock.now += 999  # paused
        account.note(serves=True)
        total = account.total(rows=10, updates=3)
        assert total == Contribution(rows=10 * run, updates=3 * run, served_s=5400 * run)
        loop.run(account.save(total), 120)
    assert [p.name for p in path.parent.iterdir()] == ["contribution.json"]


def test_a_node_that_was_killed_has_computed_at_least_what_callers_signed_for(tmp_path: Path) -> None:
    account = ContributionAccount(tmp_path / "contribution.json")
    assert account.total(rows=10, updates=3, signed_rows=25) == Contribution(rows=25, updates=3)
    assert account.total(rows=30, updates=3, signed_rows=25).rows == 30


@pytest.mark.parametrize(
    "broken", [b"", b"{", b'{"rows": -1}', b'{"hours": 2}', b"\xff" * 10, b'{"rows": 1}' + b" " * 5000 + b"x"]
)
def test_a_broken_file_counts_as_nothing(
    tmp_path: Path, broken: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "contribution.json"
    path.write_bytes(broken)
    total = ContributionAccount(path).total(rows=1, updates=1)
    if broken.endswith(b"x"):  # what lies beyond the bound is not read
        assert total.rows == 2
    else:
        assert total == Contribution(rows=1, updates=1)
        assert "counted from 0 again" in caplog.text


def test_a_disk_that_cannot_be_written_is_a_warning(
    loop: LoopThread, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "file" / "contribution.json"
    path.parent.write_text("a file in the folder's place")
    account = ContributionAccount(path)
    loop.run(account.save(account.total(1, 1)), 120)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * len(caplog.records)
    assert "could not write" in caplog.text


def test_it_is_saved_again_and_again(loop: LoopThread, tmp_path: Path) -> None:
    path, saved = tmp_path / "contribution.json", asyncio.Event()
    account, rows = ContributionAccount(path), itertools.count(1)

    def total() -> Contribution:
        counted = account.total(next(rows), 0)
        if counted.rows == 3:  # then two were written
            saved.set()
        return counted

    async def scenario() -> None:
        saving = asyncio.create_task(account.save_every(0.001, total))
        async with asyncio.timeout(60):
            await saved.wait()
        saving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await saving

    loop.run(scenario(), 120)
    assert Contribution.model_validate_json(path.read_bytes()).rows >= 2
