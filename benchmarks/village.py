"""A swarm of one node for the benchmarks: started with the command, stopped when the block ends."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.rival_blocks import make_package
from dht.invite import Invite
from peer.processes import die_with_parent

START_LIMIT_S = 60.0


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
    folder = Path(tempfile.mkdtemp(prefix="talkoot-benchmark-"))
    package = make_package()
    (folder / "swarm.toml").write_text(manifest)
    command = [sys.executable, "-m", "talkoot.cli", "node", "--new", str(folder / "swarm.toml")]
    command += ["--host", "127.0.0.1", "--experts", str(experts), "--state", str(folder / "node")]
    began = time.monotonic()
    node = subprocess.Popen(
        die_with_parent([*command, "--invite-file", str(folder / "invite")]),
        env=os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), str(package)])},
        stdout=subprocess.DEVNULL,
        stderr=(folder / "node.log").open("wb"),
    )
    try:
        while not (folder / "invite").exists():
            if node.poll() is not None or time.monotonic() - began > START_LIMIT_S:
                raise SystemExit(f"the node did not start:\n{(folder / 'node.log').read_text()}")
            time.sleep(0.02)
        invite = Invite.parse((folder / "invite").read_text())
        yield RunningNode(invite, folder, node.pid, time.monotonic() - began)
    finally:
        node.terminate()
        node.wait()
        shutil.rmtree(folder)
        shutil.rmtree(package)
