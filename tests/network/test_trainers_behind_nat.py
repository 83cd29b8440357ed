"""Trainers in homes whose routers let nobody in average their dense parts, by relays."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from namespaces import internet
from test_nat import NOT_HERE, START_S, Village, found

pytestmark = pytest.mark.skipif(bool(NOT_HERE), reason=NOT_HERE)


@pytest.fixture
def village(tmp_path: Path) -> Iterator[Village]:
    with internet() as net, contextlib.closing(Village(net, tmp_path)) as made:
        yield made


def test_two_trainers_in_homes_average(
    village: Village, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TALKOOT_TRAIN_ANNOUNCE_EVERY_S", "1")
    invite = found(village, tmp_path, experts=4)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    trainers = [
        village.run(
            village.net.home(), "train", "--join", invite, "--data", text, "--steps", 100_000,
            "--batch-size", 2, "--threads", 1, "--average-every", 2,
        )
        for _ in range(2)
    ]  # fmt: skip

    def have_averaged() -> bool:
        return all((steps := t.events("step")) and steps[-1]["averagings"] > 0 for t in trainers)

    deadline = time.monotonic() + 2 * START_S
    while not have_averaged():
        assert all(trainer.process.poll() is None for trainer in trainers), [t.said for t in trainers]
        assert time.monotonic() < deadline, [trainer.said for trainer in trainers]
        time.sleep(0.2)
