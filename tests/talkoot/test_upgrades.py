"""The present code and the recorded release in one swarm: with the same protocol version they train together.

With different protocol versions they do not. While no release of this protocol version is recorded, the present code
packed under another version takes its place.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from commands import assert_one_clear_line, wait_until
from training_swarm import HOST, TEXT, Founder, founded, talkoot

from peer import PROTOCOL_VERSION, SOFTWARE_VERSION
from peer.loop import LoopThread
from peer.metrics import total
from trainer_client.client import SwarmClient, TrainerTiming

LIMIT_S = 180.0
pytestmark = [
    pytest.mark.timeout(3 * LIMIT_S),
]
LIVELY: dict[str, Any] = {"replicas": 2, "average_every_s": 0.5, "announce_every_s": 3}
"""With these settings a node soon replicates what another hosts, and averages with it."""
NEW: dict[str, Any] = {"experts": 4, "spare": 0}
OLD: dict[str, Any] = {"experts": 6}
"""So each node is the only host of some of the 8 experts, and both host some."""

STEPS = 16
FAST = ("--learning-rate", 1e-2, "--threads", 1, "--call-deadline-s", LIMIT_S)
"""So the loss falls by far more than it differs between batches."""
PATIENT = TrainerTiming(least_deadline_s=LIMIT_S)
"""A busy machine may stand still for longer than the usual shortest deadline of 3 s."""


@pytest.fixture(scope="module")
def release(release_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The release's packages, which come first on the path of a new interpreter."""
    folder = tmp_path_factory.mktemp("release")
    with zipfile.ZipFile(release_wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture
def founder(loop: LoopThread, tmp_path: Path) -> Iterator[Founder]:
    """A founder that runs the present code."""
    with founded(loop, tmp_path, **LIVELY, **NEW) as found:
        yield found


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers in this process are patient."""
    defaults = SwarmClient.__init__.__kwdefaults__ or {}
    monkeypatch.setattr(SwarmClient.__init__, "__kwdefaults__", {**defaults, "timing": PATIENT})


def command(*arguments: object) -> list[str]:
    start = "import sys; from talkoot.cli import main; sys.argv[0] = 'talkoot'; main()"
    if arguments[0] == "train":
        patient = f"trainer_client.client.SwarmClient.__init__.__kwdefaults__['timing'] = {PATIENT}"
        start = f"import trainer_client.client; from trainer_client.client import TrainerTiming; {patient}; {start}"
    return [sys.executable, "-W", "ignore", "-c", start, *map(str, arguments)]


def run_of(release: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        cwd=release,
        env=os.environ | {"PYTHONPATH": str(release)},
    )


class OldNode:
    """A node that runs the release, in a process of its own."""

    def __init__(self, log: Path) -> None:
        self._log = log

    def metric(self, name: str) -> float:
        address = re.search(r"metrics at (http://\S+)", self._log.read_text())
        if address is None:
            return 0.0
        with urllib.request.urlopen(address[1], timeout=60) as response:
            found = re.search(rf"^{name} (\S+)$", response.read().decode(), re.MULTILINE)
        assert found is not None, name
        return float(found[1])


@contextmanager
def joined(release: Path, invite: str, folder: Path) -> Iterator[OldNode]:
    log = folder / "log"
    settings = {f"TALKOOT_NODE_{name.upper()}": str(value) for name, value in (LIVELY | OLD).items()}
    join = ("node", "--join", invite, "--host", HOST, "--state", folder / "old", "--threads", 1)
    with log.open("wb") as output:
        node = subprocess.Popen(
            command(*join),
            stdout=output,
            stderr=output,
            cwd=release,
            env=os.environ | settings | {"PYTHONPATH": str(release)},
        )
    try:
        yield OldNode(log)
    finally:
        node.terminate()
        assert node.wait(LIMIT_S) in (0, 130, 143), log.read_text()
    assert "Traceback" not in log.read_text(), log.read_text()


def train(founder: Founder, folder: Path, who: str) -> list[object]:
    text = folder / "text.txt"
    text.write_text(TEXT)
    files = ["--data", text, "--state", folder / f"{who}-trainer", "--json", folder / f"{who}.json"]
    return ["train", "--join", founder.invite, "--steps", STEPS, *FAST, *files]


def assert_trained(summary: Path) -> None:
    values = json.loads(summary.read_text())
    assert values["steps"] == STEPS
    assert values["experts_live"] == 8
    assert values["failures"] == {}
    assert values["loss_last"] < values["loss_first"]


def test_versions_really_differ(release: Path, release_wheel: Path) -> None:
    version = release_wheel.name.split("-")[1]
    told = run_of(release, "--version").stdout
    assert told == f"talkoot {version}, protocol version {PROTOCOL_VERSION}\n", (
        "keep a new release: CONTRIBUTING.md"
    )
    assert version != SOFTWARE_VERSION


def test_nodes_and_trainers_of_both_releases_train_together(
    release: Path, founder: Founder, tmp_path: Path
) -> None:
    with joined(release, founder.invite, tmp_path) as old:
        wait_until(
            lambda: (
                old.metric('talkoot_state_fetches_total{outcome="fetched"}') >= 2
                and old.metric("talkoot_experts") == 6
            ),
            "replicas that the old node fetches of the new one's experts",
        )
        ended = talkoot(*train(founder, tmp_path, "new"))
        assert ended.status == 0, ended.err
        assert_trained(tmp_path / "new.json")
        mine = founder.node.status().updates
        assert mine > 0
        assert old.metric("talkoot_updates_total") > 0
        by_old = run_of(release, *train(founder, tmp_path, "old"))
        assert by_old.returncode == 0, by_old.stderr
        assert_trained(tmp_path / "old.json")
        assert founder.node.status().updates > mine
        wait_until(
            lambda: (
                total(founder.node.averaging.averagings) > 0 and old.metric("talkoot_averagings_total") > 0
            ),
            "replicas of both that average",
        )


def test_release_of_another_protocol_version_is_refused_with_both_named(
    release: Path, founder: Founder, tmp_path: Path
) -> None:
    other = shutil.copytree(release, tmp_path / "other")
    versions = other / "peer" / "__init__.py"
    said, later = "PROTOCOL_VERSION: Final = ", PROTOCOL_VERSION + 1
    versions.write_text(versions.read_text().replace(f"{said}{PROTOCOL_VERSION}", f"{said}{later}"))
    refused = run_of(other, "node", "--join", founder.invite, "--host", HOST, "--state", tmp_path / "state")
    assert_one_clear_line(
        refused,
        f"speaks protocol version {PROTOCOL_VERSION}, the caller {later}",
        "update Talkoot",
    )
