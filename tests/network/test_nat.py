"""A swarm over real NAT: nodes in homes whose routers let nobody in, in network namespaces of the kernel."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from namespaces import Internet, Machine, internet, why_not

START_S = 60.0
STEPS = 4
MANIFEST = """
name = "homes"
[model]
layers = 1
hidden = 32
heads = 2
context = 32
feed_forward = 64
[experts]
grid = [4]
kind = "ffn"
[routing]
top_k = 4
"""
"""Four experts, and each token goes to all of them: no step is whole without both homes."""

NOT_HERE = why_not()
pytestmark = pytest.mark.skipif(bool(NOT_HERE), reason=NOT_HERE)


@dataclass(frozen=True)
class Program:
    """A command that runs on a machine, and what it writes."""

    process: subprocess.Popen[bytes]
    folder: Path

    def events(self, kind: str) -> list[dict[str, Any]]:
        lines = (self.folder / "out").read_text().splitlines()
        events = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
        return [event for event in events if event["event"] == kind]

    @property
    def said(self) -> str:
        return (self.folder / "err").read_text()

    def wait_for(self, what: str, is_so: Callable[[], object]) -> None:
        deadline = time.monotonic() + START_S
        while not is_so():
            assert self.process.poll() is None, f"ended before {what}:\n{self.said}"
            assert time.monotonic() < deadline, f"waited in vain for {what}:\n{self.said}"
            time.sleep(0.1)

    def wait_until_reached(self, way: str) -> None:
        self.wait_for(way, lambda: any(e["reached"].startswith(way) for e in self.events("state")))

    def wait_until_updated(self) -> None:
        self.wait_for("updates", lambda: self.events("state")[-1]["updates"] > 0)


class Village:
    """Programs on machines; all are ended with it."""

    def __init__(self, net: Internet, folder: Path) -> None:
        self.net = net
        self._folder = folder
        self._programs: list[Program] = []

    def run(self, machine: Machine, command: str, *arguments: object) -> Program:
        folder = self._folder / str(len(self._programs))
        folder.mkdir()
        words = [sys.executable, "-m", "talkoot.cli", command, "--log-format", "json", *map(str, arguments)]
        with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
            process = subprocess.Popen(
                machine.command([*words, "--state", str(folder / "state")]), stdout=out, stderr=err
            )
        program = Program(process, folder)
        self._programs.append(program)
        return program

    def node(self, machine: Machine, *arguments: object) -> Program:
        return self.run(
            machine, "node", "--host", machine.address, "--threads", 1, "--announce-every-s", 1, *arguments
        )

    def close(self) -> None:
        for program in self._programs:
            program.process.send_signal(signal.SIGKILL)
            program.process.wait()


@pytest.fixture
def village(tmp_path: Path) -> Iterator[Village]:
    with internet() as net, contextlib.closing(Village(net, tmp_path)) as made:
        yield made


def found(village: Village, tmp_path: Path, experts: int = 0) -> str:
    """Founds the swarm on a public node; gives its invite."""
    manifest = tmp_path / "swarm.toml"
    manifest.write_text(MANIFEST)
    founder = village.node(village.net.public(), "--new", manifest, "--experts", experts, "--spare", 0)
    founder.wait_for("an invite", lambda: founder.events("invite"))
    return str(founder.events("invite")[0]["invite"])


def train(village: Village, machine: Machine, invite: str, text: Path) -> Sequence[dict[str, Any]]:
    """The steps that a trainer on this machine takes."""
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    trainer = village.run(
        machine, "train", "--join", invite, "--data", text, "--steps", STEPS, "--batch-size", 2, "--threads", 1
    )  # fmt: skip
    assert trainer.process.wait(START_S) == 0, trainer.said
    return trainer.events("step")


def test_two_homes_and_a_public_peer_train_together(village: Village, tmp_path: Path) -> None:
    invite = found(village, tmp_path)
    homes = [
        village.node(village.net.home(), "--join", invite, "--experts", 2, "--spare", 0) for _ in range(2)
    ]
    for home in homes:
        home.wait_until_reached("relayed")
        assert "forward both TCP ports" in home.events("state")[-1]["reach_advice"]
    steps = train(village, village.net.home(), invite, tmp_path / "text.txt")
    assert len(steps) == STEPS
    for home in homes:
        home.wait_until_updated()
