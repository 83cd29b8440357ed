"""The processes of a chaos run: nodes and trainers, which are started with the `talkoot` command, and what is done to
them.
"""

import asyncio
import contextlib
import os
import pydoc_data.topics
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from benchmarks.chaos.links import PairLinks
from benchmarks.chaos.plan import Plan
from benchmarks.chaos.schedule import FOUNDER, Deed, Event
from dht.invites import Invite
from peer.loop import TaskSet
from peer.transport.addresses import Multiaddress
from talkoot.demo.links import Link
from talkoot.demo.processes import DemoProcess, DemoProcesses

HOST = "127.0.0.1"
_START_LIMIT_S = 300.0
_START_AT_ONCE = 3
"""How many nodes start at the same time. With more on two cores, the bootstrap node answers the last one too late."""
_LEAVE_LIMIT_S = 40.0
_STOPPED_AT_START = 128 + signal.SIGTERM
"""Exit status of a node that was told to stop before it served anything."""
_STOPPED_TRAINER = 128 + signal.SIGINT
_EVALUATES = "evaluates-"
_HELD_OUT = 16384
"""Characters at the end of the text that no trainer is trained on."""
_GONE_WITHIN_S = 5.0
"""The longest time that the children of a dead node may still run."""


@dataclass
class Node:
    """One node of the swarm, through all its restarts."""

    name: str
    folder: Path
    ports: tuple[int, int]
    """The port that it listens on, and the port that others dial."""
    child: DemoProcess | None = None
    lives: int = 0
    peer_id: str | None = None
    serves: bool = False
    """Whether it serves its experts since its last start."""
    is_frozen: bool = False
    is_cut: bool = False

    @property
    def is_well(self) -> bool:
        """Whether it can answer a call."""
        return (
            self.child is not None and self.child.exit_status is None and not (self.is_frozen or self.is_cut)
        )


@dataclass
class Steps:
    """What one trainer has reported about its steps."""

    ended_at: list[float] = field(default_factory=list)
    intervals_s: list[float] = field(default_factory=list)
    """Seconds between the ends of steps, without validation."""
    validation_losses: list[tuple[int, float]] = field(default_factory=list)
    failures: dict[str, int] = field(default_factory=dict)
    """The number of its failed calls, by cause."""
    experts_live: int = 0
    """The number of live experts that the trainer sees."""
    summary: Mapping[str, Any] | None = None

    def hear(self, event: Mapping[str, Any], now: float) -> None:
        """Takes note of a JSON line that the trainer printed."""
        if event["event"] == "summary":
            self.summary = event
        elif event["event"] == "step":
            self.ended_at.append(now)
            self.intervals_s.append(event["step_s"])
            self.failures, self.experts_live = event["failures"], event["experts_live"]
            if event["validation_loss"] is not None:
                self.validation_losses.append((event["step"], event["validation_loss"]))

    def since(self, steps: int) -> "Steps":
        """A copy without the first `steps` steps."""
        return replace(self, ended_at=self.ended_at[steps:], intervals_s=self.intervals_s[steps:])

    def longest_stall_s(self, now: float) -> float:
        """The longest time between the ends of two steps, or since the last one."""
        return max([*self.intervals_s, now - self.ended_at[-1] if self.ended_at else now], default=0.0)


class ChaosSwarm:
    """Nodes behind links, and trainers. Call `stop` when done."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan = plan
        self.nodes: list[Node] = []
        self.trainers: dict[str, Steps] = {}
        self.links = PairLinks(Link(None, 0.002), self._processes)
        self.invite: Invite | None = None
        self._folder = folder
        self.final_losses: dict[str, float] = {}
        """The loss of each trainer's model on text that it was not trained on."""
        self._children = DemoProcesses(folder, self._hear)
        self._trainers: list[DemoProcess] = []
        self._all: list[DemoProcess] = []
        self._killed: set[DemoProcess] = set()
        self._pids: dict[int, float] = {}
        """Every process that was ever started, with its start time."""
        self._sockets: set[Path] = set()
        self._restarting = TaskSet()

    async def start(self) -> Invite:
        """Starts the nodes. Returns the founder's invite."""
        plan = self.plan
        for number in range(plan.nodes):
            name = f"node-{number}"
            self.nodes.append(Node(name, self._folder / name, await self.links.before(name)))
        (self._folder / "swarm.toml").write_text(plan.manifest)
        await self._start_node(self.nodes[FOUNDER], "--new", str(self._folder / "swarm.toml"))
        await self._children.until(lambda: self.invite is not None, _START_LIMIT_S, "the founder's invite")
        assert self.invite is not None
        joining = self.nodes[1:]
        for some in (joining[at : at + _START_AT_ONCE] for at in range(0, len(joining), _START_AT_ONCE)):
            for node in some:
                await self._start_node(node, "--join", str(self.invite))
            names = ", ".join(node.name for node in some)
            await self._children.until(partial(_all_serve, some), _START_LIMIT_S, names)
        return self.invite

    async def start_trainers(self) -> None:
        """Starts the trainers, and returns when all have done their first steps."""
        plan = self.plan
        text = "\n".join(pydoc_data.topics.topics.values())
        (self._folder / "trained.txt").write_text(text[:-_HELD_OUT])
        (self._folder / "held-out.txt").write_text(text[-_HELD_OUT:])
        for number in range(plan.trainers):
            name = f"trainer-{number}"
            self.trainers[name] = Steps()
            trainer = await self._children.start(
                name,
                (
                    *("train", "--join", str(self.invite), "--log-format", "json", "--threads", "1"),
                    *("--steps", str(10**7), "--seed", str(number), "--state", str(self._folder / name)),
                    *("--batch-size", "8", "--call-deadline-s", str(plan.call_deadline_s)),
                    *("--validate-every", str(plan.validate_every), "--checkpoint-every", "0"),
                    *("--data", str(self._folder / "trained.txt"), "--checkpoint", str(self._saved(name))),
                ),
            )
            self._trainers.append(trainer)
            self._all.append(trainer)
        await self._children.until(
            lambda: all(len(t.intervals_s) > 3 for t in self.trainers.values()), _START_LIMIT_S, "first steps"
        )

    async def do(self, event: Event) -> None:
        nodes = [self.nodes[number] for number in event.nodes]
        match event.deed:
            case Deed.KILL | Deed.STOP:
                for node in nodes:
                    self._end(node, politely=event.deed is Deed.STOP)
            case Deed.RESTART:
                for node in nodes:
                    self._restarting.spawn(self._restart(node), f"restart {node.name}")
            case Deed.FREEZE | Deed.THAW:
                for node in nodes:
                    node.is_frozen = event.deed is Deed.FREEZE
                    _signal_all(node, signal.SIGSTOP if node.is_frozen else signal.SIGCONT)
            case Deed.CUT | Deed.MEND:
                names = [node.name for node in nodes]
                (self.links.cut if event.deed is Deed.CUT else self.links.mend)(names)
                for node in nodes:
                    node.is_cut = event.deed is Deed.CUT

    async def stop_trainers(self) -> None:
        """Stops the trainers, and returns when they have reported their results."""
        for child in self._trainers:
            if child.exit_status is None:
                self._note(child)
                os.kill(child.pid, signal.SIGINT)
        await until(lambda: all(child.exit_status is not None for child in self._trainers), _START_LIMIT_S)

    async def evaluate(self) -> None:
        """Measures each trainer's model on held-out text. The trainers have stopped by then, so that nothing is trained
        meanwhile.
        """
        for name in self.trainers:
            child = await self._children.start(
                f"{_EVALUATES}{name}",
                (
                    *("evaluate", str(self._folder / "held-out.txt"), "--join", self._way_in(None), "--json"),
                    *("--checkpoint", str(self._saved(name)), "--threads", "1"),
                    *("--state", str(self._folder / f"{_EVALUATES}{name}")),
                ),
            )
            self._all.append(child)
            await until(lambda child=child: child.exit_status is not None, _START_LIMIT_S)  # type: ignore[misc]

    def _saved(self, trainer: str) -> Path:
        return self._folder / f"{trainer}-saved"

    async def stop(self) -> None:
        """Ends all processes. It is harmless to call it twice."""
        await self._restarting.aclose()
        await asyncio.gather(*(trainer.stop() for trainer in self._trainers))
        for node in self.nodes:
            self._end(node, politely=True)
        await until(lambda: not any(self._processes()), _LEAVE_LIMIT_S)
        await self._children.stop()
        await self.links.close()

    def faults(self) -> list[str]:
        """Call it after `stop`. Returns the programs that ended unexpectedly, and the tracebacks in the logs."""
        found = [
            str(child.failure())
            for child in self._all
            if child not in self._killed and child.exit_status not in (0, _STOPPED_AT_START, _STOPPED_TRAINER)
        ]
        for log in sorted(self._folder.glob("*.log")):
            lines = log.read_text(errors="replace").splitlines()
            found += [f"{log.name}: {line[:200]}" for line in lines if "Traceback" in line]
        return found

    async def leaks(self) -> dict[str, int]:
        """What is left after `stop`: the number of our processes that still run, and of sockets that p2pd processes
        left on the disk.
        """
        await until(lambda: not self._living(), _GONE_WITHIN_S)
        return {"processes": len(self._living()), "sockets": sum(path.exists() for path in self._sockets)}

    def checkpoints(self, node: Node) -> dict[str, int]:
        """The update count of each expert's newest checkpoint on the node's disk, read from the file names. Averages
        and copies of other nodes' experts count, too.
        """
        counts: dict[str, int] = {}
        folder = node.folder / "checkpoints"
        for file in folder.glob("*/*/**/*.safetensors"):
            _, uid, *_ = file.relative_to(folder).parts
            counts[uid] = max(counts.get(uid, 0), int(file.stem))
        return counts

    def _end(self, node: Node, *, politely: bool) -> None:
        """Ends a node, unless it is down already."""
        child = node.child
        if child is None or child.exit_status is not None:
            return
        self._note(child)
        node.serves = False
        if politely:
            os.kill(child.pid, signal.SIGTERM)
        else:
            self._killed.add(child)
            child.kill()

    async def _restart(self, node: Node) -> None:
        """Starts a node again once it has ended. If it does not end in time, it is killed first."""
        child = node.child
        assert child is not None
        await until(lambda: child.exit_status is not None, _LEAVE_LIMIT_S)
        await child.stop()
        await self._start_node(node, "--join", self._way_in(node))

    def _way_in(self, newcomer: Node | None) -> str:
        """An invite with the addresses of nodes that are up, as an owner would get by asking others for one
        that works.
        """
        assert self.invite is not None
        addresses = []
        for node in self.nodes:
            if node.is_well and node is not newcomer and node.peer_id:
                addresses.append(Multiaddress(f"/ip4/{HOST}/tcp/{node.ports[1]}/p2p/{node.peer_id}"))
        return str(Invite(self.invite.keys, tuple(addresses[:3]) or self.invite.bootstrap))

    async def _start_node(self, node: Node, *origin: str) -> None:
        plan = self.plan
        node.lives += 1
        node.serves = False
        port, announced = node.ports
        config = self._folder / f"{node.name}.toml"
        config.write_text(
            f"announce_port = {announced}\n"
            f"checkpoint_every_s = {plan.checkpoint_every_s}\naverage_every_s = {plan.average_every_s}\n"
            f"standby_every_s = {plan.standby_every_s}\n"
        )
        node.child = await self._children.start(
            f"{node.name}-life-{node.lives}",
            (
                *("node", *origin, "--host", HOST, "--device", "cpu", "--threads", "1", "--niceness", "0"),
                *("--config", str(config), "--port", str(port)),
                *("--experts", str(plan.room), "--spare", str(plan.spare), "--state", str(node.folder)),
                *("--announce-every-s", str(plan.announce_every_s), "--log-format", "json"),
                *("--drain-timeout", str(plan.drain_s)),
            ),
        )
        self._all.append(node.child)

    def _hear(self, child: DemoProcess, event: Mapping[str, Any]) -> None:
        if child.name in self.trainers:
            self.trainers[child.name].hear(event, time.monotonic())
        elif child.name.startswith(_EVALUATES):
            self.final_losses[child.name.removeprefix(_EVALUATES)] = event["loss"]
        elif event.get("event") == "invite":
            for node in self.nodes:
                if node.child is child:
                    node.peer_id = event["peer_id"]
                    node.serves = True
            self.invite = self.invite or Invite.parse(event["invite"])

    def _processes(self) -> Iterator[tuple[str, int]]:
        for name, child in [(n.name, n.child) for n in self.nodes] + [(c.name, c) for c in self._trainers]:
            if child is not None and child.exit_status is None:
                yield name, child.pid

    def _note(self, child: DemoProcess) -> None:
        """Notes the processes and sockets that a child has, before it dies."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(child.pid)
            for each in (process, *process.children(recursive=True)):
                self._pids[each.pid] = each.create_time()
                self._sockets |= set(_sockets(each.cmdline()))

    def _living(self) -> list[int]:
        """Our processes that have not ended. A process that has reused one of our process ids does not count."""
        found = []
        for pid, began in self._pids.items():
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                if process.create_time() == began and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(pid)
        return found


def _all_serve(nodes: Sequence[Node]) -> bool:
    return all(node.serves for node in nodes)


async def until(condition: Callable[[], bool], limit_s: float) -> bool:
    """Waits until the condition holds, by polling it. Returns False when the time is up."""
    ends = time.monotonic() + limit_s
    while not (met := condition()) and time.monotonic() < ends:  # noqa: ASYNC110  # no event to wait for
        await asyncio.sleep(0.1)
    return met


def _signal_all(node: Node, number: signal.Signals) -> None:
    """Sends a signal to the node and its p2pd: a laptop that is closed stops both."""
    assert node.child is not None
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(node.child.pid)
        for each in (process, *process.children(recursive=True)):
            each.send_signal(number)


def _sockets(command: Sequence[str]) -> Iterator[Path]:
    """The sockets that a p2pd listens on, according to its arguments."""
    for argument in command:
        if argument.startswith("-listen=/unix/"):
            yield Path(argument.removeprefix("-listen=/unix"))
