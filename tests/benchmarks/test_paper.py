"""`benchmarks.paper`: what it compares is equal where it should be, and its short run works on real nodes."""

import json
import os
import signal
import subprocess
import sys
import tomllib
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from training_swarm import signals_restored

from benchmarks.paper import QUICK, WAYS, Plan, main, plot, show, to_toml
from dht.manifest import Manifest


@pytest.mark.parametrize(("plan", "experts"), [(Plan(), 256), (QUICK, 64)])
def test_transformer_layers_compete_with_a_dense_model_of_equal_compute(plan: Plan, experts: int) -> None:
    manifest = plan.mixture.manifest(plan.size)
    assert manifest.experts_total == experts
    assert (manifest.experts.kind, manifest.routing.top_k) == ("transformer", 4)
    assert manifest.experts_total % plan.nodes == 0
    assert plan.nodes > 1
    assert plan.flops(plan.dense) == pytest.approx(plan.flops(plan.mixture), rel=0.01)
    assert plan.mixture.manifest(plan.size).optimizer.decay_updates == plan.size.steps


def test_the_full_run_takes_as_many_steps_and_as_bad_a_network_as_it_should() -> None:
    plan = Plan()
    assert plan.size.steps >= 1500
    assert plan.delay_s == 1.0
    assert QUICK.size.steps == 20


def test_a_founder_reads_the_manifest_as_it_is(tmp_path: Path) -> None:
    manifest = Plan().mixture.manifest(Plan().size)
    (tmp_path / "swarm.toml").write_text(to_toml(manifest))
    assert Manifest.from_toml(tmp_path / "swarm.toml") == manifest
    assert tomllib.loads(to_toml(manifest))["experts"]["grid"] == [8, 16]


@pytest.mark.slow
def test_the_quick_run_trains_on_real_nodes_that_are_slow_and_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, picture = tmp_path / "found.json", tmp_path / "found.svg"
    kept = ["--quick", "--json", str(file), "--plot", str(picture)]
    with signals_restored():
        main([*kept, "--in-flight", "3", "--ways", "dense", "delayed"])
        main([*kept, "--in-flight", "3", "--resume", "--ways", "delayed"])  # has nothing left to do
    results = json.loads(file.read_text())
    delayed, dense = results["delayed"], results["dense"]
    assert delayed["summary"]["steps"] == dense["summary"]["steps"] == 20
    assert 0 < delayed["calls_made_to_fail"] < 0.3 * delayed["dispatch"]["calls"]
    assert delayed["dispatch"]["unanswered_rows"] == 0
    assert delayed["parameters"] > 5 * dense["parameters"]
    for run in (delayed, dense):
        steps, seconds, losses = zip(*run["curve"], strict=True)
        assert steps == (0, 10, 20)
        assert list(seconds) == sorted(seconds)
        assert losses[-1] < losses[0]
        assert run["validation_loss"] < losses[0]
    shown = capsys.readouterr().out
    assert f"{delayed['validation_loss']:.4f}" in shown
    assert xml.etree.ElementTree.parse(picture).getroot().tag.endswith("svg")


def test_the_table_says_whether_delays_cost_too_much(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(loss: float) -> dict[str, Any]:
        summary = {"tokens_per_s": 500.0, "staleness": 1.0, "seconds": 60.0}
        swarm = {"calls_made_to_fail": 10, "dispatch": {"calls": 100}}
        curve = [(0, 0.0, 5.0), (10, 60.0, loss)]
        counts = {"parameters": 1_000_000, "flops_per_token": 1e6, "curve": curve}
        return {"validation_loss": loss, "summary": summary} | counts | swarm

    plan = {"size": {"steps": 10, "batch": 4, "context": 8}, "delay_s": 1.0, "in_flight": 6}
    results = {"plan": plan, "dense": run(2.0), "calm": run(1.9), "delayed": run(2.09)}
    show(results, Console(width=130))
    shown = capsys.readouterr().out
    assert "0.9500" in shown
    assert "1.0450" in shown
    assert "delayed: 1.1000 of calm's loss, at most 1.03: missed" in shown
    files = [tmp_path / "first.svg", tmp_path / "second.svg"]
    for file in files:
        plot(results, file)
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
def test_stopping_ends_it_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    file = tmp_path / "found.json"
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.paper", "--quick", "--json", str(file)]
    environment = os.environ | {"TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [*command, "--ways", *WAYS],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        # on a fast computer, calm ends before it says anything
        assert any("calm: step" in line or "delayed: step" in line for line in process.stdout)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(10) == 130
    assert "dense" in json.loads(file.read_text())
    assert [path.name for path in folder.iterdir() if not path.name.startswith("torchinductor")] == []
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
