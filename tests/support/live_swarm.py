"""A real swarm of processes with a dashboard, for tests of the page."""

import contextlib
import json
import os
import re
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preloaded import Preloaded

from peer.platform.sockets import sweep_socket_folders

HOST = "127.0.0.1"
ANNOUNCE_EVERY_S = 60.0
"""So rarely that a busy machine is never late with one; otherwise a peer would seem to be gone."""
DOOMED_EVERY_S = 4.0
"""The announcement period of the node that a test kills: its absence is noticed after one and a half periods."""
DOOMED = "doomed"
HOSTILE_NAME = "<img src=x onerror=pwned=1>"
MANIFEST = """
name = "talkoot-test"
preset = "none"
[model]
layers = 2
hidden = 16
heads = 2
context = 32
feed_forward = 32
[experts]
grid = [4, 4]
[routing]
top_k = 2
"""
EXPERTS = 32
_START_LIMIT_S = 300.0


@dataclass
class LiveSwarm:
    """Three nodes, a trainer and a dashboard."""

    address: str
    nodes: dict[str, subprocess.Popen[bytes]]
    """The nodes by their display names."""
    dashboard: subprocess.Popen[bytes]

    def api(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.address}/api/v1/{path}", timeout=60) as response:
            return json.load(response)


class _Processes:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: list[tuple[str, subprocess.Popen[bytes]]] = []

    def start(self, name: str, *arguments: str, **settings: object) -> subprocess.Popen[bytes]:
        """`settings`: those that have no command-line flag."""
        log = (self._folder / f"{name}.log").open("wb")
        state = ("--state", str(self._folder / name))
        with log:
            process = Preloaded(
                *("-m", "talkoot", *arguments, *state),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | {k: str(v) for k, v in settings.items()},
            )
        self._running.append((name, process))
        return process

    def log(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text(errors="replace")

    def until(self, condition: Callable[[], bool], awaited: str) -> None:
        deadline = time.monotonic() + _START_LIMIT_S
        while not condition():
            for name, process in self._running:
                assert process.poll() is None, f"{name} ended:\n{self.log(name)}"
            assert time.monotonic() < deadline, f"waited in vain for {awaited}:\n{self._logs()}"
            time.sleep(0.1)

    def stop(self) -> None:
        for _, process in self._running:
            process.kill()  # and with it its p2pd
            process.wait()
        sweep_socket_folders()

    def _logs(self) -> str:
        return "\n".join(f"{name}: {self.log(name)[-1500:]}" for name, _ in self._running)


@contextlib.contextmanager
def live_swarm(folder: Path) -> Iterator[LiveSwarm]:
    """Yields when all nodes serve and the trainer trains, according to the dashboard."""
    processes = _Processes(folder)
    try:
        yield _start(processes, folder)
    finally:
        processes.stop()


def _start(processes: _Processes, folder: Path) -> LiveSwarm:
    manifest, invite_file = folder / "swarm.toml", folder / "invite"
    manifest.write_text(MANIFEST)
    names = ["founder", HOSTILE_NAME, DOOMED]
    founding = ("--new", str(manifest), "--invite-file", str(invite_file))
    nodes = {names[0]: _start_node(processes, 0, names[0], *founding)}
    processes.until(lambda: invite_file.exists() and bool(invite_file.read_text()), "the invite")
    joining = ("--join", invite_file.read_text().strip())
    for number, name in enumerate(names[1:], 1):
        nodes[name] = _start_node(processes, number, name, *joining)
    small = ("--batch-size", "4", "--validation-batches", "1", "--threads", "1", "--seed", "0")
    processes.start("trainer", "train", *joining, "--steps", "1000000", *small)
    listening = ("--host", HOST, "--port", "0")
    dashboard = processes.start(
        "dashboard", "dashboard", *joining, *listening, TALKOOT_DASHBOARD_REFRESH_S=0.5
    )
    processes.until(lambda: _address(processes) is not None, "the dashboard's address")
    address = _address(processes)
    assert address is not None
    swarm = LiveSwarm(address, nodes, dashboard)
    processes.until(lambda: _is_complete(swarm.api("swarm")), "three nodes that serve, and a trainer")
    return swarm


def _start_node(processes: _Processes, number: int, name: str, *origin: str) -> "subprocess.Popen[bytes]":
    every_s = DOOMED_EVERY_S if name == DOOMED else ANNOUNCE_EVERY_S
    return processes.start(
        f"node-{number}",
        *("node", *origin, "--host", HOST, "--device", "cpu", "--threads", "1", "--name", name),
        *("--experts", "12", "--spare", "12", "--announce-every-s", str(every_s)),
        # Otherwise the trainer would use the whole machine while the page is tested.
        *("--upload-mbit", "0.1", "--drain-timeout", "0"),
    )


def _address(processes: _Processes) -> str | None:
    found = re.search(rf"http://{re.escape(HOST)}:\d+", processes.log("dashboard"))
    return None if found is None else found[0]


def _is_complete(reading: Any) -> bool:
    return (
        reading["nodes"]["live"] == 3
        and reading["experts"]["live"] == EXPERTS
        and reading["trainers"] == 1
        and reading["tokens_per_s"] is not None
    )
