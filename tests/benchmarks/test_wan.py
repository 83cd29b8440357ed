"""The link benchmark: what it computes from its figures, and that only one contender measures at a time."""

import threading
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.wan import add_shares, plot
from benchmarks.wan_pace import MeasuringTurns, auto_pace_of


def figures(pace: float, mbit: float = 50.0) -> dict[str, Any]:
    return {"samples_per_s": pace, "up_mbit": mbit, "down_mbit": mbit}


def test_shares_are_of_no_delay_and_of_the_link(tmp_path: Path) -> None:
    delays = {"0_ms": figures(20.0), "200_ms": figures(19.0), "failing": figures(18.0, 40.0)}
    measured = {
        "full": {"fp32": figures(3.0, 95.0), "int8": figures(12.0), "int4": figures(21.0)},
        "talkoot": dict(delays),
        "hivemind": dict(delays),
    }
    options = Namespace(delays=("0", "200"), in_flight="auto")
    results = add_shares(measured, options)
    assert results["full"]["payload_up_share"] == pytest.approx(0.95)
    assert results["full"]["int8_vs_fp32"] == pytest.approx(4.0)
    assert results["full"]["int4_vs_fp32"] == pytest.approx(7.0)
    assert results["delay"]["talkoot"]["at_200_ms"] == pytest.approx(0.95)
    assert results["delay"]["talkoot"]["at_10%_failing"] == pytest.approx(
        0.8
    )  # of the payload, not of the samples
    plot(results, options.delays, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_contenders_wait_for_each_other_and_then_measure_one_at_a_time(tmp_path: Path) -> None:
    at_it = threading.Semaphore(1)
    measured = []

    def contend(name: str) -> None:
        with MeasuringTurns(tmp_path, 3, 30.0).turn(name):
            assert at_it.acquire(blocking=False)
            assert len(list(tmp_path.glob("*.ready"))) == 3
            measured.append(name)
            at_it.release()

    threads = [threading.Thread(target=contend, args=(name,)) for name in ("a", "b", "c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(measured) == ["a", "b", "c"]


def test_who_is_alone_waits_for_nobody() -> None:
    with MeasuringTurns(None, 3, 30.0).turn("a"):
        pass


def test_an_automatic_pace_counts_steps_on_copies_while_several_are_under_way() -> None:
    models: list[nn.Linear] = []

    def make() -> nn.Linear:
        models.append(nn.Linear(2, 2))
        return models[-1]

    def step(model: nn.Module) -> None:
        torch.autograd.backward(model(torch.ones(1, 2)).sum())

    pace = auto_pace_of(make, step, samples=4, seconds=0.1, limit=3, carried=lambda: (0, 0))
    assert pace["samples_per_s"] > 0
    assert 1 <= pace["in_flight"] <= 3
    assert 2 <= len(models) <= 4
    assert torch.equal(models[0].weight, models[-1].weight)
