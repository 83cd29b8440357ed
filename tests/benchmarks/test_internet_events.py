"""Each event in a small swarm; that everything follows from the seed; and what the report concludes from the
figures.
"""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.internet import days
from benchmarks.internet.__main__ import main
from benchmarks.internet.events import EVENTS, QUICK, Figures, play
from benchmarks.internet.plots import draw
from benchmarks.internet.report import verdicts

NODES, SEED = 12, 1


@pytest.fixture(scope="module")
def happened() -> dict[str, Figures]:
    return {name: play(name, NODES, SEED, QUICK) for name in EVENTS}


@pytest.mark.slow
def test_two_runs_of_a_seed_give_the_same_figures(happened: dict[str, Figures]) -> None:
    again = play("tenth_dies", NODES, SEED, QUICK)
    assert json.dumps(again) == json.dumps(happened["tenth_dies"])
    assert json.dumps(again) != json.dumps(play("tenth_dies", NODES, SEED + 1, QUICK))


def test_the_command_fixes_the_order_of_sets_and_refuses_too_short_days(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def start_again(program: str, arguments: list[str], environment: dict[str, str]) -> None:
        assert (program, arguments, environment["PYTHONHASHSEED"]) == (sys.executable, sys.orig_argv, "0")
        raise SystemExit("started again")

    monkeypatch.setattr("os.execve", start_again)
    monkeypatch.setattr("sys.argv", ["internet"])
    with pytest.raises(SystemExit, match="started again"):
        main()
    monkeypatch.setattr("sys.argv", ["internet", "--hours", "0.1"])
    with pytest.raises(SystemExit):
        main()
    assert "--hours: more than" in capsys.readouterr().err


def test_no_event_makes_the_products_code_fail(happened: dict[str, Figures]) -> None:
    assert {name: figures["faults"] for name, figures in happened.items()} == dict.fromkeys(EVENTS, 0)


def test_after_a_tenth_died_all_experts_are_served_within_five_periods(happened: dict[str, Figures]) -> None:
    figures = happened["tenth_dies"]
    assert figures["died"] == 1
    assert figures["replicas_lost"] > 0
    assert figures["served_again_periods"] <= 5
    assert figures["takings_per_lost"] <= 1.2


def test_a_crowd_soon_serves(happened: dict[str, Figures]) -> None:
    figures = happened["flash_crowd"]
    assert figures["joined"] == NODES
    assert figures["useful_within"] >= 0.75
    assert figures["least_served"] == 1


def test_both_sides_of_a_partition_serve_all_experts(happened: dict[str, Figures]) -> None:
    figures = happened["partition"]
    assert figures["served_in_larger"] == figures["least_served_after"] == 1
    assert figures["served_in_smaller"] > 0.8


def test_a_swarm_goes_on_and_grows_without_its_founder(happened: dict[str, Figures]) -> None:
    figures = happened["founder_gone"]
    assert figures["replicas_lost"] > 0
    assert figures["served_at_the_end"] == 1
    assert figures["joined"] > 0
    assert figures["useful"] == 1


def test_a_release_that_fails_costs_few_updates(happened: dict[str, Figures]) -> None:
    figures = happened["bad_release"]
    assert figures["restarted"] == 2
    assert figures["served_at_the_end"] == 1
    assert figures["updates_lost_of_a_day"] < 0.01


@pytest.mark.slow
def test_an_hour_in_a_small_swarm(happened: dict[str, Figures], tmp_path: Path) -> None:
    earlier, figures = days.play(12, 1.0, SEED)
    assert (earlier["hours"], figures["hours"]) == pytest.approx((5 / 6, 1.0))
    shared = len(earlier["series"]["hour"])
    assert earlier["series"]["served"] == figures["series"]["served"][:shared]
    assert figures["faults"] == 0
    assert figures["served"] > 0.95
    assert 0 <= figures["updates_lost_share"] < 0.05
    assert figures["upkeep"]["mean_kbit_per_s"] > 0
    assert len(figures["series"]["hour"]) == len(figures["series"]["served"]) > 50
    results = json.loads(json.dumps({"days": {"12": figures}, "events": {str(NODES): happened}}))
    judged = [verdict for verdict in verdicts(results) if verdict.is_reached is not None]
    assert len(judged) >= 7
    assert all(path.stat().st_size > 0 for path in draw(results, tmp_path))
