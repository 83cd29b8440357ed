"""A swarm on emulated arm64 processors: it takes minutes on two cores, after downloads of 300 MB."""

import json
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from arm64 import EmulatedMachine
from commands import HOST, wait_until

DEADLINE_S = 1200.0
MANIFEST = """\
name = "emulated"

[model]
layers = 1
hidden = 32
heads = 2
context = 32

[experts]
grid = [2, 4]
"""


@pytest.fixture(scope="module")
def machine() -> Iterator[EmulatedMachine]:
    with tempfile.TemporaryDirectory() as folder:
        yield EmulatedMachine.set_up(Path(folder))


class Swarm:
    """Processes on the emulated machine. Those that still run at the end are killed."""

    def __init__(self, machine: EmulatedMachine, folder: Path) -> None:
        self.machine = machine
        self.folder = folder
        self._processes = ExitStack()

    def __enter__(self) -> "Swarm":
        return self

    def __exit__(self, *_: object) -> None:
        self._processes.close()

    def start(self, name: str, *arguments: str) -> "subprocess.Popen[bytes]":
        output = self._processes.enter_context((self.folder / f"{name}.log").open("wb"))
        command = self.machine.talkoot(*arguments, "--state", str(self.folder / name), "--threads", "1")
        process = subprocess.Popen(command, env=self.machine.variables, stdout=output, stderr=output)
        self._processes.callback(process.wait)
        self._processes.callback(process.kill)
        return process

    def node(self, name: str, *arguments: str) -> "subprocess.Popen[bytes]":
        return self.start(name, "node", *arguments, "--host", HOST, "--experts", "3")

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()[-2000:]


@pytest.mark.slow
@pytest.mark.timeout(4 * DEADLINE_S)
def test_three_nodes_and_a_trainer_on_arm64(machine: EmulatedMachine, tmp_path: Path) -> None:
    (tmp_path / "swarm.toml").write_text(MANIFEST)
    invite, results = tmp_path / "invite", tmp_path / "results.json"
    with Swarm(machine, tmp_path) as swarm:
        founder = swarm.node("founder", "--new", str(tmp_path / "swarm.toml"), "--invite-file", str(invite))
        wait_until(lambda: invite.exists() or founder.poll() is not None, "the founder", DEADLINE_S)
        assert invite.exists(), swarm.log("founder")
        nodes = [founder, *(swarm.node(name, "--join", f"@{invite}") for name in ("second", "third"))]
        training = ("--steps", "10", "--batch-size", "2", "--json", str(results))
        trainer = swarm.start("trainer", "train", "--join", f"@{invite}", *training)
        wait_until(lambda: trainer.poll() is not None, "ten steps", DEADLINE_S)
        assert trainer.returncode == 0, swarm.log("trainer")
        for node in nodes:
            node.send_signal(signal.SIGTERM)
        wait_until(lambda: all(node.poll() is not None for node in nodes), "the nodes' end", DEADLINE_S)
        assert [node.returncode for node in nodes] == [0, 0, 0], swarm.log("founder")
    summary = json.loads(results.read_text())
    assert (summary["steps"], summary["experts_live"], summary["skipped_steps"]) == (10, 8, 0)
    assert summary["validation_loss_last"] < summary["validation_loss_first"]
    machine_name = subprocess.check_output(
        machine.python("-c", "import platform; print(platform.machine())"), text=True
    )
    assert machine_name == "aarch64\n"
