"""A swarm for the benchmarks: nodes are started with the command, and stopped when the block ends."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.rival_blocks import make_package
from dht.invite import Invite
from peer.processes import die_with_parent

START_LIMIT_S = 120.0


@dataclass(frozen=True)
class RunningNode:
    """A node that serves."""

    invite: Invite
    folder: Path
    """Of the benchmark's own files; removed when the node is stopped."""
    pid: int
    start_s: float
    """From the command to the experts being served and announced."""


@contextmanager
def running_node(manifest: str, experts: int) -> Iterator[RunningNode]:
    """Founds a swarm with this manifest (TOML). Its experts may be of hivemind's kinds. Raises SystemExit."""
    with running_village(manifest, 1, experts) as node:
        yield node


@contextmanager
def running_village(
    manifest: str, nodes: int, experts_each: int, options: Sequence[str] = ()
) -> Iterator[RunningNode]:
    """As `running_node`, with more nodes that join the first. Gives that one."""
    folder = Path(tempfile.mkdtemp(prefix="talkoot-benchmark-"))
    package = make_package()
    (folder / "swarm.toml").write_text(manifest)
    options = [*options, "--experts", str(experts_each)]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        began = time.monotonic()
        processes.append(_start(folder, package, 0, ["--new", str(folder / "swarm.toml"), *options]))
        invite = _invite(folder, 0, processes[0])
        start_s = time.monotonic() - began
        for number in range(1, nodes):
            processes.append(_start(folder, package, number, ["--join", str(invite), *options]))
        for number in range(1, nodes):
            _invite(folder, number, processes[number])
        yield RunningNode(invite, folder, processes[0].pid, start_s)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
        shutil.rmtree(folder)
        shutil.rmtree(package)


def _start(folder: Path, package: Path, number: int, options: Sequence[str]) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "talkoot.cli", "node", "--host", "127.0.0.1", *options]
    command += ["--state", str(folder / f"node-{number}"), "--invite-file", str(folder / f"invite-{number}")]
    with (folder / f"node-{number}.log").open("wb") as log:
        return subprocess.Popen(
            die_with_parent(command),
            env=os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), str(package)])},
            stdout=subprocess.DEVNULL,
            stderr=log,
        )


def _invite(folder: Path, number: int, node: "subprocess.Popen[bytes]") -> Invite:
    """By way of this node, which writes it once it serves."""
    file, began = folder / f"invite-{number}", time.monotonic()
    while not file.exists():
        if node.poll() is not None or time.monotonic() - began > START_LIMIT_S:
            raise SystemExit(f"a node did not start:\n{(folder / f'node-{number}.log').read_text()}")
        time.sleep(0.02)
    return Invite.parse(file.read_text())
