"""`talkoot train --local`: the same training without a swarm."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SWARM = """
name = "alone"
[model]
layers = 1
hidden = 16
heads = 2
context = 16
feed_forward = 32
[experts]
grid = [2, 2]
[routing]
top_k = 2
"""


def train(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "talkoot.cli", "train", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | environment,
    )


def test_it_trains_all_experts_in_one_process(tmp_path: Path) -> None:
    manifest, results = tmp_path / "swarm.toml", tmp_path / "results.json"
    manifest.write_text(SWARM)
    ended = train(
        "--local",
        str(manifest),
        "--steps",
        "40",
        "--threads",
        "1",
        "--json",
        str(results),
        HOME=str(tmp_path),
    )
    assert ended.returncode == 0, ended.stderr
    values: dict[str, Any] = json.loads(results.read_text())
    assert values["validation_loss_last"] < values["validation_loss_first"] - 0.5
    assert (values["experts_live"], values["experts_total"], values["failures"]) == (4, 4, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "swarm.toml"]


def test_one_of_join_and_local_must_be_given() -> None:
    ended = train("--local", "swarm.toml", "--join", "talkoot1")
    assert ended.returncode == 2
    assert "error: pass --join INVITE" in ended.stderr
    assert "or --local SWARM.TOML, not both" in ended.stderr
