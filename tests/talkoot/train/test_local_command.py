"""`talkoot train --local`: the same training without a swarm."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from commands import assert_one_clear_line, run, run_here

SWARM = """
name = "alone"
preset = "none"
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


def test_it_trains_all_experts_in_one_process(tmp_path: Path) -> None:
    manifest, results = tmp_path / "swarm.toml", tmp_path / "results.json"
    manifest.write_text(SWARM)
    options = ["--steps", "40", "--threads", "1", "--json", str(results), "--state", str(tmp_path / "state")]
    ended = run("train", "--local", str(manifest), *options)
    assert ended.returncode == 0, ended.stderr
    values: dict[str, Any] = json.loads(results.read_text())
    assert values["validation_loss_last"] < values["validation_loss_first"] - 0.5
    assert (values["experts_live"], values["experts_total"], values["failures"]) == (4, 4, {})
    assert values["checkpoint"] is None
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_result_file_is_written_although_the_disk_of_the_output_is_full(tmp_path: Path) -> None:
    manifest, results = tmp_path / "swarm.toml", tmp_path / "results.json"
    manifest.write_text(SWARM)
    options = ("--steps", "2", "--threads", "1", "--json", str(results), "--state", str(tmp_path / "state"))
    command = (sys.executable, "-m", "talkoot", "train", "--local", str(manifest), *options)
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (ended.returncode, "can't write the results to standard output" in ended.stderr) == (2, True)
    assert json.loads(results.read_text())["steps"] == 2


def test_one_of_join_and_local_must_be_given() -> None:
    ended = run_here("train", "--local", "swarm.toml", "--join", "talkoot2")
    assert_one_clear_line(ended, "pass either --join INVITE or --local SWARM.TOML")


def test_local_mode_saves_and_resumes_nothing() -> None:
    assert_one_clear_line(run_here("train", "--local", "swarm.toml", "--resume"), "--local saves nothing")
