"""Real `talkoot` processes that strangers attack, what shows how they fare, and an honest caller of a node.

with founder(folder) as node, trainer(folder, node.invite) as train:
    ...
    assert node.alive and train.alive
    node.metric("talkoot_dht_failures_total"), node.rss_bytes, node.log_lines, node.status()
async with honest_caller(node_info, swarm_id, manifest, uids) as caller:
    await caller.call_for(3.0)
    assert caller.share >= 0.95
"""

import asyncio
import contextlib
import os
import re
import subprocess
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
from expert_fakes import Request, collect, make_call
from loop_lags import Bystander
from preloaded import Preloaded
from stranger import ALL_RIGHTS, LOCAL, new_identity

from dht.announcements import NodeInfo
from dht.invites import Invite
from dht.manifest import Manifest
from dht.uid import UID
from peer.identity import Identity
from peer.rpc.channels import ChannelPool
from peer.rpc.sessions import SessionClient
from talkoot.demo.links import free_ports
from talkoot.node.control import ControlClient, ControlStatus
from trainer_client.dispatch.batches import Direction
from trainer_client.dispatch.grpc_caller import GrpcCaller

MANIFEST_TOML = """
name = "siege"
preset = "none"
[model]
layers = 1
hidden = 16
heads = 2
context = 16
feed_forward = 16
[experts]
grid = [2, 2]
[routing]
top_k = 2
"""
_START_S = 120.0
_STOP_S = 60.0
_PATIENCE_S = 30.0
"""How long an honest call is waited for, whether or not it is still in time."""


@dataclass(frozen=True)
class Victim:
    """A `talkoot` command in a process of its own, with one torch thread."""

    process: subprocess.Popen[bytes]
    log: Path
    state: Path
    metrics_address: str = ""

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def log_lines(self) -> list[str]:
        """What it wrote to its terminal, as bytes, since it may not be text."""
        return self.log.read_text(errors="backslashreplace").split("\n")

    @property
    def rss_bytes(self) -> int:
        """The memory of the process itself, without p2pd."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def metrics(self) -> str:
        with urllib.request.urlopen(self.metrics_address, timeout=60) as response:
            text: str = response.read().decode()
            return text

    def metric(self, name: str) -> float:
        """`name`: the metric with its labels, as in the text of /metrics."""
        found = re.search(rf"^{re.escape(name)} (\S+)$", self.metrics(), re.MULTILINE)
        assert found is not None, name
        return float(found[1])

    def status(self) -> ControlStatus:
        """The status of a node, through its control socket."""
        with ControlClient(self.state) as client:
            return client.ask("status")

    def until(self, condition: Callable[[], object], awaited: str, deadline_s: float = _START_S) -> None:
        ends = time.monotonic() + deadline_s
        while not condition():
            assert self.alive, f"it ended with status {self.process.returncode}:\n{self.log.read_text()}"
            assert time.monotonic() < ends, f"waited in vain for {awaited}:\n{self.log.read_text()}"
            time.sleep(0.05)


@dataclass(frozen=True)
class NodeVictim(Victim):
    """A `talkoot node`."""

    invite: Invite = field(kw_only=True)
    """The invite with which others join through it."""


@contextlib.contextmanager
def founder(folder: Path, manifest: str = MANIFEST_TOML, **settings: object) -> Iterator[NodeVictim]:
    """A node that founds a swarm and hosts its experts. With the same folder it comes back.

    `settings`: the node's settings, without the prefix `TALKOOT_NODE_`.
    """
    toml = folder / "swarm.toml"
    toml.write_text(manifest)
    with _node(folder, "founder", ["--new", str(toml)], settings) as node:
        yield node


@contextlib.contextmanager
def member(folder: Path, invite: Invite, name: str = "member", **settings: object) -> Iterator[NodeVictim]:
    """A node that joins."""
    with _node(folder, name, ["--join", str(invite)], settings) as node:
        yield node


@contextlib.contextmanager
def trainer(folder: Path, invite: Invite, **settings: object) -> Iterator[Victim]:
    """A trainer that trains for ever. Yields it once it has taken a step."""
    (port,) = free_ports(LOCAL, 1)
    endless: dict[str, object] = {"steps": 10**7, "threads": 1, "seed": 0, "metrics_port": port}
    arguments = ["train", "--join", str(invite), "--log-format", "json"]
    with _running(folder, "trainer", arguments, "TRAIN", endless | settings) as (process, log, state):
        victim = Victim(process, log, state, f"http://{LOCAL}:{port}/metrics")
        victim.until(lambda: '"step"' in log.read_text(), "the trainer's first step")
        yield victim


@contextlib.contextmanager
def _node(
    folder: Path, name: str, origin: Sequence[str], settings: dict[str, object]
) -> Iterator[NodeVictim]:
    invite = folder / f"{name}.invite"
    invite.unlink(missing_ok=True)
    arguments = ["node", *origin, "--host", LOCAL, "--invite-file", str(invite)]
    usual: dict[str, object] = {"threads": 1, "drain_timeout_s": 0, "niceness": 0, "device": "cpu"}
    with _running(folder, name, arguments, "NODE", usual | settings) as (process, log, state):
        started = Victim(process, log, state)
        started.until(lambda: "metrics at" in log.read_text(), "the node to serve")
        metrics = re.search(r"metrics at (http://\S+)", log.read_text())
        assert metrics is not None
        parsed = Invite.parse(invite.read_text().strip())
        yield NodeVictim(process, log, state, metrics[1], invite=parsed)


@contextlib.contextmanager
def _running(
    folder: Path, name: str, arguments: Sequence[str], prefix: str, settings: dict[str, object]
) -> Iterator[tuple["subprocess.Popen[bytes]", Path, Path]]:
    """Runs a command. At the end, checks that there is no traceback in its log."""
    log, state = folder / f"{name}.log", folder / name
    environment = {f"TALKOOT_{prefix}_{key.upper()}": str(value) for key, value in settings.items()}
    with log.open("wb") as output:
        process = Preloaded(
            *("-m", "talkoot", *arguments, "--state", str(state)),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=os.environ | environment,
        )
    try:
        yield process, log, state
    finally:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
    _, fault, what = log.read_text(errors="backslashreplace").partition("Traceback")
    assert not fault, what[:5000]


@dataclass
class HonestCaller:
    """A valid client of a node, which calls its experts again and again."""

    caller: GrpcCaller
    node: NodeInfo
    uids: Sequence[UID]
    width: int
    bystander: Bystander
    limit_s: float = 5.0
    """The time limit of a call, on a core of its own."""
    calls: int = 0
    failed: int = 0
    last_error: str = ""
    longest_s: float = 0.0
    """The longest time of a successful call."""

    @property
    def share(self) -> float:
        """The share of the calls that succeeded in time."""
        return 1 - self.failed / self.calls if self.calls else 0.0

    async def call(self, direction: Direction = "forward") -> bool:
        """Makes a call. Returns whether it succeeds."""
        inputs = np.ones((4, self.width), dtype=np.float32)
        uid = self.uids[self.calls % len(self.uids)]
        request = Request(uid, [4], range(4), inputs, inputs)
        self.calls += 1
        began = time.monotonic()
        collected = await collect(self.caller, make_call(self.node, direction, [request], _PATIENCE_S))
        took_s, allowed_s = time.monotonic() - began, self.bystander.allows(self.limit_s)
        errors = [error for error in (collected.error, *collected.errors.values()) if error is not None]
        if errors or collected.answered != [uid]:
            self.failed += 1
            self.last_error = "; ".join(map(str, errors))
            return False
        if took_s > allowed_s:
            self.failed += 1
            self.last_error = f"it took {took_s:.1f} s, and beside a bystander may take {allowed_s:.1f} s"
            return False
        self.longest_s = max(self.longest_s, took_s)
        return True

    async def call_for(self, seconds: float, pause_s: float = 0.02, least: int = 1) -> None:
        """Makes calls one after another for `seconds`. On a slow machine it takes longer, until there are `least`
        calls.
        """
        ends, calls = time.monotonic() + seconds, self.calls + least
        while time.monotonic() < ends or self.calls < calls:
            await self.call()
            await asyncio.sleep(pause_s)


@contextlib.asynccontextmanager
async def honest_caller(
    node: NodeInfo,
    swarm_id: str,
    manifest: Manifest,
    uids: Sequence[UID] = (),
    identity: Identity | None = None,
) -> AsyncIterator[HonestCaller]:
    """`uids`: experts that the node hosts; by default all of the manifest's."""
    sessions = SessionClient(identity or new_identity(), swarm_id, ALL_RIGHTS)
    channels = ChannelPool()
    width = manifest.width
    caller = GrpcCaller(channels, swarm_id, width, sessions=sessions)
    try:
        with Bystander() as bystander:
            yield HonestCaller(caller, node, uids or manifest.uids(), width, bystander)
    finally:
        await sessions.close()
        await channels.close()
