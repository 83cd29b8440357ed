"""`talkoot demo`: a real swarm on this machine, of nodes and a trainer as processes. One node is killed half-way."""

import asyncio
import math
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dht.manifest import Manifest
from peer.errors import SettingsError, UserError
from peer.formatting import counted
from peer.platform.sockets import sweep_socket_folders
from talkoot.demo.links import Link, Proxy, Wire, free_ports
from talkoot.demo.processes import DemoProcess, DemoProcesses
from talkoot.signals import Stopped, run_until_stopped
from talkoot.terminal import StepBar, Terminal, check_writable, write_json
from trainer_client.data.sources import find_files

_HOST = "127.0.0.1"
_ANNOUNCE_EVERY_S = 2.0
"""Short, so that a dead node is noticed during the demo. Announcements live three times as long."""
_FOUNDER_ANNOUNCES_EVERY_S = 4.0
"""Longer, so that the founder does not adopt the experts of nodes that are only starting."""
_START_LIMIT_S = 90.0
_SILENCE_LIMIT_S = 60.0
"""How long the trainer may report nothing."""
_ADOPTION_LIMIT_S = 30.0
"""How long the swarm may take after training to serve all experts again."""
_CALL_DEADLINE_S = 10.0
"""The deadline of the trainer's calls, and so the longest possible stall of training."""
_NEEDED_FALL = 0.25
"""The demo has worked if the validation loss has fallen by this share."""
_OF_THE_TRAINER = (
    "steps",
    "loss_first",
    "loss_last",
    "validation_loss_first",
    "validation_loss_last",
    "tokens_per_s",
    "longest_stall_s",
)
_NEWS_SHOWN = 8
_LINE_EVERY_STEPS = 10
_CURVE_WIDTH, _CURVE_HEIGHT = 60, 6
_EIGHTHS = " ▁▂▃▄▅▆▇█"
_COLUMNS = ("peer", "process", "state", "experts", "adopted", "updates", "rows/s")


@dataclass(frozen=True)
class DemoPlan:
    """What the demo does."""

    nodes: int
    steps: int
    kill: bool
    data: Path | None
    link: Link | None
    """The link that is emulated in front of every node."""
    p2pd: bool
    """Whether nodes and the trainer start p2pd."""

    @property
    def common_options(self) -> tuple[str, ...]:
        """Options for nodes and trainers."""
        return () if self.p2pd else ("--p2pd", "off")


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured, as --json writes it. Losses are in nats per byte."""

    steps: int
    loss_first: float
    loss_last: float
    validation_loss_first: float
    validation_loss_last: float
    nodes_started: int
    nodes_killed: int
    experts_total: int
    experts_alive_end: int
    tokens_per_s: float
    longest_stall_s: float
    seconds: float


def run_demo(terminal: Terminal, plan: DemoPlan, json_file: Path | None) -> None:
    """Raises UserError if something did not work as it should, and Stopped after a signal."""
    if plan.kill and plan.nodes < 2:
        raise SettingsError("a swarm of one node can't lose that node: pass --nodes 2 or more, or --no-kill")
    if plan.data is not None:
        find_files([str(plan.data)])  # fails now rather than when the trainer starts
    if json_file is not None:
        check_writable(json_file, "--json")
    try:
        with tempfile.TemporaryDirectory(prefix="talkoot-demo-") as folder, asyncio.Runner() as runner:
            demo = _Demo(terminal, plan, Path(folder))
            result = runner.run(run_until_stopped(demo.run()))
    except Stopped:
        terminal.err.print("stopped: all processes of the demo have ended, and its files are removed")
        raise
    if json_file is not None:
        write_json(json_file, asdict(result))
    terminal.line(summary(result))
    judge(result)


def judge(result: DemoResult) -> None:
    """Raises UserError if the model learned too little, or the swarm lacks experts at the end."""
    fall = 1 - result.validation_loss_last / result.validation_loss_first
    if not fall >= _NEEDED_FALL:
        raise UserError(
            f"the validation loss fell by {fall:.0%}, less than {_NEEDED_FALL:.0%}: pass more --steps, or more --data"
        )
    if result.experts_alive_end != result.experts_total:
        raise UserError(
            f"only {result.experts_alive_end} of {result.experts_total} experts are alive at the end: "
            "is this machine busy with other work?"
        )


def summary(result: DemoResult) -> str:
    """The demo's results, in words, and what to do next."""
    said = [
        f"{counted(result.steps, 'step')} in {result.seconds:.0f} s, at {result.tokens_per_s:,.0f} tokens/s: "
        f"the validation loss went from {result.validation_loss_first:.2f} to {result.validation_loss_last:.2f}."
    ]
    if result.nodes_killed:
        said.append(
            f"{result.nodes_killed} of {counted(result.nodes_started, 'node')} was killed half-way. Training never "
            f"paused for more than {result.longest_stall_s:.1f} s,"
        )
        said.append(f"and live nodes serve {result.experts_alive_end} of {result.experts_total} experts.")
    # `make demo` runs it from an environment that is not on the PATH
    elsewhere = Path(sys.argv[0]).name == "talkoot" and not shutil.which("talkoot")
    program = sys.argv[0] if elsewhere else "talkoot"
    return "\n".join([*said, f"Next: `{program}` says how to join a swarm, and how to start one."])


def experts_in_words(before: Mapping[str, Any] | None, state: Mapping[str, Any]) -> str:
    """What a node does with its experts, if its state shows more of them than the one before; otherwise empty."""
    if before is None:
        return f"serves {counted(state['experts'], 'expert')}"
    if state["adopted"] > before["adopted"]:
        return f"adopts {counted(state['adopted'] - before['adopted'], 'expert')}"
    if state["experts"] > before["experts"]:
        return f"now serves {counted(state['experts'], 'expert')}"
    return ""


class _Demo:
    """One run of the demo."""

    def __init__(self, terminal: Terminal, plan: DemoPlan, folder: Path) -> None:
        self._plan = plan
        self._folder = folder
        self._display = DemoDisplay(terminal, plan.steps)
        self._processes = DemoProcesses(folder, self._on_event)
        self._nodes: list[DemoProcess] = []
        self._proxies: list[Proxy] = []
        self._invites: dict[DemoProcess, Mapping[str, Any]] = {}
        self._states: dict[DemoProcess, Mapping[str, Any]] = {}
        self._step = 0
        self._summary: Mapping[str, Any] | None = None
        self._reading: Mapping[str, Any] | None = None
        self._experts_total = Manifest.founded({"name": "demo"}).experts_total

    async def run(self) -> DemoResult:
        began = time.monotonic()
        try:
            with self._display.shown():
                await self._start_swarm()
                summary = await self._train()
                alive = await self._count_alive()
                killed = sum(node.killed for node in self._nodes)  # stopping may kill slow ones too
        finally:
            await self._processes.stop()
            for proxy in self._proxies:
                await proxy.close()
            sweep_socket_folders()  # those of the killed node
        return DemoResult(
            **{name: summary[name] for name in _OF_THE_TRAINER},
            nodes_started=len(self._nodes),
            nodes_killed=killed,
            experts_total=self._experts_total,
            experts_alive_end=alive,
            seconds=time.monotonic() - began,
        )

    async def _start_swarm(self) -> None:
        manifest = self._folder / "swarm.toml"
        manifest.write_text('name = "demo"\n')  # everything else has its default
        founder = await self._start_node(_FOUNDER_ANNOUNCES_EVERY_S, "--new", str(manifest))
        await self._processes.until(lambda: founder in self._invites, _START_LIMIT_S, "the founder's invite")
        invite = self._invites[founder]["invite"]
        for _ in range(1, self._plan.nodes):
            await self._start_node(_ANNOUNCE_EVERY_S, "--join", invite)
        await self._start_trainer(invite)
        await self._processes.until(
            lambda: len(self._states) == self._plan.nodes and self._step > 0, _START_LIMIT_S, "the first step"
        )

    async def _train(self) -> Mapping[str, Any]:
        """Waits for the trainer's summary, and kills a node when half of the steps are done."""
        if self._plan.kill:
            await self._until_step(math.ceil(self._plan.steps / 2))
            self._kill(self._nodes[-1])
        await self._until_step(self._plan.steps)
        await self._processes.until(
            lambda: self._summary is not None, _SILENCE_LIMIT_S, "the trainer's summary"
        )
        assert self._summary is not None
        self._display.tell("the trainer has finished")
        return self._summary

    async def _until_step(self, awaited: int) -> None:
        while self._step < awaited:
            await self._processes.until(
                self._step_is_beyond(self._step), _SILENCE_LIMIT_S, "the trainer's next step"
            )

    def _step_is_beyond(self, step: int) -> Callable[[], bool]:
        return lambda: self._step > step

    async def _count_alive(self) -> int:
        """The number of experts that live nodes serve, as a new peer finds them in the DHT."""
        deadline = time.monotonic() + _ADOPTION_LIMIT_S
        survivor = next(node for node in self._nodes if not node.killed)
        while True:
            await self._processes.until(
                lambda: self._hosted() >= self._experts_total or time.monotonic() > deadline,
                _SILENCE_LIMIT_S,
                "the nodes' states",
            )
            self._reading = None
            await self._start("status", "status", "--json", "--join", self._invites[survivor]["invite"])
            await self._processes.until(
                lambda: self._reading is not None, _START_LIMIT_S, "the swarm's status"
            )
            assert self._reading is not None
            alive = self._alive(self._reading)
            self._display.tell(f"{alive} of {self._experts_total} experts are served by live nodes")
            if alive == self._experts_total or time.monotonic() > deadline:
                return alive

    def _hosted(self) -> int:
        """The number of experts that live nodes say they serve, replicas included."""
        return sum(state["experts"] for node, state in self._states.items() if not node.killed)

    def _alive(self, reading: Mapping[str, Any]) -> int:
        dead = {self._invites[node]["peer_id"] for node in self._nodes if node.killed}
        return sum(
            any(r["state"] == "serving" and r["peer_id"] not in dead for r in expert["replicas"])
            for expert in reading["experts"]["list"]
        )

    async def _start_node(self, announce_every_s: float, *origin: str) -> DemoProcess:
        name = f"node {len(self._nodes) + 1}"
        experts = str(math.ceil(self._experts_total / self._plan.nodes))
        node = await self._start(
            name,
            *("node", *origin, "--host", _HOST, "--device", "cpu", "--threads", "1"),
            *await self._behind_link(name),
            *("--log-format", "json"),
            *("--state", str(self._folder / name.replace(" ", "-"))),
            *("--experts", experts, "--spare", experts),  # room for all experts of the killed node
            *("--announce-every-s", str(announce_every_s), "--niceness", "0"),  # somebody is watching
            *("--drain-timeout", "0"),  # all leave together, so nobody can take over
            *self._plan.common_options,
        )
        self._nodes.append(node)
        self._display.show_node_state(name, node.pid, "starting")
        return node

    async def _behind_link(self, name: str) -> Sequence[str]:
        """Puts a link in front of a node that is about to start. Returns the options with which the node
        announces it.
        """
        if self._plan.link is None:
            return ()
        wire, (port,) = Wire(self._plan.link, seed=len(self._nodes)), free_ports(_HOST, 1)
        proxy = await Proxy.start(wire, (_HOST, port), _HOST)
        self._proxies.append(proxy)
        config = self._folder / f"{name}.toml"
        config.write_text(f"announce_port = {proxy.port}\n")
        return "--config", str(config), "--port", str(port)

    async def _start_trainer(self, invite: str) -> None:
        data = () if self._plan.data is None else ("--data", str(self._plan.data))
        await self._start(
            "trainer",
            *("train", "--join", invite, "--steps", str(self._plan.steps), *data),
            *("--threads", "1", "--log-format", "json", "--state", str(self._folder / "trainer")),
            *("--call-deadline-s", str(_CALL_DEADLINE_S), "--seed", "0"),
            *self._plan.common_options,
        )

    async def _start(self, name: str, *arguments: str) -> DemoProcess:
        process = await self._processes.start(name, arguments)
        self._display.tell(f"{name} starts, process {process.pid}")
        return process

    def _kill(self, node: DemoProcess) -> None:
        node.kill()
        self._display.show_node_state(node.name, node.pid, "killed")
        self._display.mark(f"{node.name} killed")
        # not how many experts it hosted, because others may host some of them, too
        self._display.tell(f"{node.name} is killed with SIGKILL at step {self._step}")

    def _on_event(self, process: DemoProcess, event: Mapping[str, Any]) -> None:
        kind = event.get("event")
        if kind == "invite":
            self._invites[process] = event
        elif kind == "state" and not process.killed:
            self._on_state(process, event)
        elif kind == "step":
            self._step = event["step"]
            self._display.show_step(event)
        elif kind == "summary":
            self._summary = event
        elif kind == "status":
            self._reading = event

    def _on_state(self, node: DemoProcess, state: Mapping[str, Any]) -> None:
        if news := experts_in_words(self._states.get(node), state):
            self._display.tell(f"{node.name} {news}")
        self._states[node] = state
        self._display.show_node(node.name, node.pid, state)


class DemoDisplay:
    """A live view of all processes on a terminal, otherwise a line for each event."""

    def __init__(self, terminal: Terminal, steps: int) -> None:
        self._terminal = terminal
        self._steps = steps
        self._began = time.monotonic()
        self._nodes: dict[str, tuple[str, ...]] = {}
        self._news: deque[str] = deque(maxlen=_NEWS_SHOWN)
        self._curve = LossCurve(steps)
        self._bar = StepBar(auto_refresh=False)
        self._task = self._bar.add_task("the trainer has not started", total=steps)

    @contextmanager
    def shown(self) -> Iterator[None]:
        if not self._terminal.live:
            yield
            return
        with Live(console=self._terminal.err, get_renderable=self._picture, refresh_per_second=4):
            yield

    def tell(self, news: str) -> None:
        """Shows an event."""
        line = f"{time.monotonic() - self._began:5.1f} s  {news}"
        self._news.append(line)
        if not self._terminal.live:
            self._terminal.err.print(line)

    def show_node(self, name: str, pid: int, status: Mapping[str, Any]) -> None:
        self._nodes[name] = (
            name,
            str(pid),
            str(status["state"]),
            str(status["experts"]),
            str(status["adopted"]),
            str(status["updates"]),
            f"{status['rows_per_s']:.0f}",
        )

    def show_node_state(self, name: str, pid: int, state: str) -> None:
        """Shows a node's state, without other figures."""
        self._nodes[name] = (name, str(pid), state, "", "", "", "")

    def mark(self, text: str) -> None:
        """Writes an event below the loss curve, at the present step."""
        self._curve.mark(text)

    def show_step(self, event: Mapping[str, Any]) -> None:
        self._curve.add(event["step"], event["loss"])
        loss = "skipped" if event["loss"] is None else f"loss {event['loss']:.3f}"
        failures = ", ".join(
            f"{counted(count, 'call')} {cause}" for cause, count in sorted(event["failures"].items())
        )
        words = (
            f"{loss}, {event['tokens_per_s']:.0f} tokens/s, "
            f"{event['experts_live']} of {counted(event['experts_total'], 'expert')} live, "
            f"{failures or 'no failed calls'}"
        )
        self._bar.update(self._task, completed=event["step"], description=words)
        step = event["step"]
        if not self._terminal.live and (step % _LINE_EVERY_STEPS == 0 or step in {1, self._steps}):
            self.tell(f"step {step} of {self._steps}: {words}")

    def _picture(self) -> Group:
        table = Table(*_COLUMNS, title="a swarm on this machine", title_justify="left", box=SIMPLE_HEAD)
        for row in list(self._nodes.values()):
            table.add_row(*row)
        news = Text("\n".join(self._news))
        return Group(table, self._curve.picture(), Text(), self._bar.get_renderable(), Text(), news)


class LossCurve:
    """The losses of all steps so far in a few lines of block characters, from zero up."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._losses: dict[int, float] = {}
        self._last = 0
        self._marks: list[tuple[int, str]] = []

    def add(self, step: int, loss: float | None) -> None:
        """`loss`: None for a step that was skipped."""
        self._last = step
        if loss is not None and math.isfinite(loss):
            self._losses[step] = loss

    def mark(self, text: str) -> None:
        """Writes an event below the curve, at the present step."""
        self._marks.append((self._last, text))

    def picture(self) -> Text:
        """Empty before the first loss."""
        if not self._losses:
            return Text()
        columns: list[list[float]] = [[] for _ in range(_CURVE_WIDTH)]
        for step, loss in self._losses.items():
            columns[self._column(step)].append(loss)
        top = max(self._losses.values())
        heights = [
            round(math.fsum(losses) / len(losses) / top * _CURVE_HEIGHT * 8) if losses else 0
            for losses in columns
        ]
        lines = [
            "".join(_EIGHTHS[min(8, max(0, height - 8 * row))] for height in heights)
            for row in reversed(range(_CURVE_HEIGHT))
        ]
        labels = [f"{top:.2f}" if top < 99 else f"{top:.0e}", *[""] * (_CURVE_HEIGHT - 2), "loss"]
        picture = Text("\n").join(
            Text.assemble(f"{label:>5} ", (line, "cyan")) for label, line in zip(labels, lines, strict=True)
        )
        for step, text in self._marks:
            picture.append(f"\n{'':6}{'':{self._column(step)}}▲ {text}", "red")
        return picture

    def _column(self, step: int) -> int:
        return min(_CURVE_WIDTH - 1, (step - 1) * _CURVE_WIDTH // self._steps)
