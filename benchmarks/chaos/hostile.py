"""A swarm of which a fifth is hostile, beside the same swarm with no hostile peers: one run for each kind of attack.

Each run has the same nodes, with the same identities, and the same trainers with the same data in the same order. The
last trainer joins after the others; it is the hostile one where trainers attack. Hostile peers begin once training has
begun, so they never are the only ones that have an expert or a dense part.
"""

import asyncio
import contextlib
import math
import os
import pydoc_data.topics
import random
import re
import shutil
import signal
import statistics
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import psutil
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from benchmarks.chaos import attacks
from benchmarks.chaos.attacks import ATTACKS
from benchmarks.chaos.swarm import HOST, until
from benchmarks.command import write_figures
from benchmarks.scratch import scratch_folder
from dht.announcements import Replica, ReplicaState
from dht.invites import Invite
from dht.swarm import join_swarm
from dht.uid import UID
from peer.errors import StartError, UnreachableError
from peer.host import NetworkConfig
from peer.identity import Identity, PeerID
from talkoot.demo.links import free_ports
from talkoot.demo.processes import DemoProcess, DemoProcesses

Placement: TypeAlias = Literal["minority", "random"]
CALM = "calm"
MOST_LOSS = 1.05
"""The largest final loss that honest trainers may have, relative to the calm run's."""

_MANIFEST = """
name = "chaos"
preset = "none"
[model]
layers = 1
hidden = 32
heads = 2
context = 64
feed_forward = 64
local_layers = 0
[experts]
grid = {grid}
kind = "transformer"
[routing]
top_k = 2
[optimizer]
learning_rate = 1e-2
"""
"""The trainers have no attention of their own, and learn more slowly than the experts do: so the loss depends on the
experts.
"""
QUICK_KINDS = ("replicas-random", "dense-sign-flipped", "answers-30%", "gradients-flipped")
_START_LIMIT_S = 180.0
_RUN_LIMIT_S = 600.0
"""The longest time that the trainers of one run may train."""
_LOOK_EVERY_S = 1.0
_LEAVE_LIMIT_S = 15.0
_SCRAPE_LIMIT_S = 2.0
_SHOWN = 400
"""Characters shown from the end of a log line that reports a fault."""
_BEGINS_AFTER = 8
"""The attack begins after this many steps of each honest trainer."""
_BATCH_SIZE = 8
_EAGERNESS = 4
"""A hostile peer averages this many times as often as others."""
_VALIDATION_BATCHES = 8
_BANNED = re.compile(r"node (\w{20,})[: ][^\"]*: banned for a while")
"""A ban in a trainer's log."""


@dataclass(frozen=True)
class HostilePlan:
    """How large the swarm is, and its settings."""

    share: float = 0.2
    """The share of the nodes that are hostile. In runs where trainers attack, one trainer does."""
    nodes: int = 5
    hosts: int = 3
    """Replicas of each expert."""
    trainers: int = 5
    """The number of trainers, including the last, which is hostile in some runs and whose loss never counts."""
    grid: tuple[int, ...] = (5,)
    steps: int = 48
    """Steps of each trainer."""
    average_every_s: float = 1.0
    average_every: int = 4
    """Steps between two rounds of averaging a dense part."""
    check_share: float = 0.1
    placement: Placement = "minority"
    without: tuple[str, ...] = ()
    """The rules of `attacks.RULES` that honest peers leave out once the attack has begun."""

    @classmethod
    def of(
        cls, share: float, placement: Placement, quick: bool, without: tuple[str, ...] = ()
    ) -> "HostilePlan":
        """The plan for these options. With random placement it has more nodes, since otherwise no expert would ever
        have a hostile majority.
        """
        plan = cls(share, steps=24 if quick else 48, placement=placement, without=without)
        return plan if placement == "minority" else replace(plan, nodes=10, grid=(10,))

    @property
    def experts(self) -> int:
        return math.prod(self.grid)

    @property
    def room(self) -> int:
        """How many experts each node has room for: all nodes together have exactly the room that all replicas need."""
        return self.hosts * self.experts // self.nodes

    @property
    def manifest(self) -> str:
        return _MANIFEST.format(grid=list(self.grid))

    def hostile_nodes(self, seed: int) -> tuple[int, ...]:
        """The numbers of the nodes that are hostile where nodes attack. The founder never is one, since everybody has
        its invite.
        """
        count = min(max(1, round(self.share * self.nodes)), self.nodes - 1)
        return tuple(sorted(random.Random(f"hostile {seed}").sample(range(1, self.nodes), count)))

    def seed_of(self, seed: int, trainer: int) -> int:
        return 100 * seed + trainer


def hosts_of(replicas: Mapping[UID, Collection[Replica]]) -> dict[UID, frozenset[PeerID]]:
    """The hosts of each expert."""
    return {
        uid: frozenset(r.peer_id for r in hosts if r.state is ReplicaState.SERVING)
        for uid, hosts in replicas.items()
    }


def lost_experts(hosts: Mapping[UID, Collection[PeerID]], hostile: Collection[PeerID]) -> list[UID]:
    """The experts for which at least half of the hosts are hostile: no rule of the honest peers can protect these."""
    return [
        uid
        for uid, peers in hosts.items()
        if 2 * sum(peer in hostile for peer in peers) >= max(len(peers), 1)
    ]


@dataclass
class _Peer:
    """A node or a trainer, and what it has reported."""

    name: str
    hostile: bool
    metrics_port: int
    child: DemoProcess | None = None
    peer_id: str | None = None
    experts: int = 0
    """The number of experts that a node serves."""
    steps: list[float] = field(default_factory=list)
    """Seconds between the ends of steps."""
    ended_at: list[float] = field(default_factory=list)
    """When the ends of steps were reported, by the monotonic clock."""
    summary: Mapping[str, Any] | None = None
    metrics: str = ""
    """The metrics page as last read."""

    @property
    def has_ended(self) -> bool:
        return self.child is not None and self.child.exit_status is not None


class HostileSwarm:
    """The processes of one run. Call `stop` when done."""

    def __init__(self, plan: HostilePlan, seed: int, attack: str | None, folder: Path, keys: Path) -> None:
        """`attack`: what hostile peers do; None: there are none. `keys`: the folder with the peers' identities, one
        file for each name.
        """
        self._plan = plan
        self._seed = seed
        self._attack = attack
        self._folder = folder
        self._keys = keys
        role = None if attack is None else ATTACKS[attack]
        bad = plan.hostile_nodes(seed) if role == "node" else ()
        names = [(f"node-{n}", n in bad) for n in range(plan.nodes)]
        names += [
            (f"trainer-{n}", role == "trainer" and n == plan.trainers - 1) for n in range(plan.trainers)
        ]
        ports = free_ports(HOST, len(names))
        peers = [_Peer(name, hostile, port) for (name, hostile), port in zip(names, ports, strict=True)]
        self.nodes, self.trainers = peers[: plan.nodes], peers[plan.nodes :]
        self._invite: str | None = None
        self._children = DemoProcesses(folder, self._hear)
        self.begins = folder / "attack"
        self._pids: dict[int, float] = {}
        self._may_begin = False
        self.began_at = 0
        """The number of steps that each judged trainer had taken when the attack began."""

    @property
    def judged(self) -> list[_Peer]:
        """The trainers that are honest in every run."""
        return self.trainers[:-1]

    async def start_nodes(self) -> dict[UID, frozenset[PeerID]]:
        """Starts the nodes. Returns the hosts of each expert, once every expert has all its replicas."""
        (self._folder / "swarm.toml").write_text(self._plan.manifest)
        await self._start_node(self.nodes[0], "--new", str(self._folder / "swarm.toml"))
        await self._children.until(lambda: self._invite is not None, _START_LIMIT_S, "the founder's invite")
        for node in self.nodes:
            if node.child is None:
                await self._start_node(node, "--join", str(self._invite))
            # One after another, so that each takes the experts that still lack replicas.
            await self._children.until(
                lambda node=node: node.experts == self._plan.room,  # type: ignore[misc]  # the default is of mypy's
                _START_LIMIT_S,
                f"the experts of {node.name}",
            )
        return await self._placed()

    def lost(self, hosts: Mapping[UID, frozenset[PeerID]]) -> list[UID]:
        """The experts for which hostile nodes are at least half of the hosts."""
        hostile = {p.peer_id for p in self.nodes if p.hostile}
        return lost_experts(hosts, {p for peers in hosts.values() for p in peers if p.to_base58() in hostile})

    @property
    def pids(self) -> list[int]:
        """The process ids of all peers that were started. Raises StartError if one has ended."""
        children = [p.child for p in [*self.nodes, *self.trainers] if p.child is not None]
        for child in children:
            if child.exit_status is not None:
                raise child.failure()
        return [child.pid for child in children]

    def spent_s(self) -> list[float]:
        """Processor seconds that all peers spent in each of `attacks.RULES`, if they leave any out."""
        spent_s = np.zeros(len(attacks.RULES))
        for file in self._folder.glob(f"{attacks.SPENT}-*"):
            spent_s += np.fromfile(file)
        return list(map(float, spent_s))

    async def start_trainers(self) -> None:
        """Starts the trainers. The last one joins when the others have begun to train."""
        text = "\n".join(pydoc_data.topics.topics.values())
        (self._folder / "text.txt").write_text(text)
        await asyncio.gather(*(self._start_trainer(t, number) for number, t in enumerate(self.judged)))
        await self._children.until(
            lambda: all(t.steps for t in self.judged), _START_LIMIT_S, "the trainers' first steps"
        )
        await self._start_trainer(self.trainers[-1], len(self.trainers) - 1)

    async def train(self) -> None:
        """Lets the trainers train and hostile peers attack, and returns when the judged trainers have ended."""
        self._may_begin = True
        await self.start_trainers()
        ends = time.monotonic() + _RUN_LIMIT_S
        while not all(t.has_ended for t in self.judged) and time.monotonic() < ends:
            await asyncio.sleep(_LOOK_EVERY_S)
            await asyncio.to_thread(self._scrape)

    def result(self, hosts: Mapping[UID, frozenset[PeerID]]) -> dict[str, Any]:
        """The results of the run."""
        honest = [p for p in [*self.nodes, *self.trainers] if not p.hostile]
        rates = [1 / statistics.fmean(t.steps[1:]) for t in self.judged if len(t.steps) > 1]
        banned = self._banned()
        return {
            "losses": [_final_loss(t.summary) for t in self.judged],
            "first_losses": [(t.summary or {}).get("validation_loss_first") for t in self.judged],
            "steps_per_s": sum(rates),
            "attack_began_at": self.began_at,
            "deeds": self.begins.stat().st_size if self.begins.exists() else 0,
            "experts_lost": len(self.lost(hosts)) / len(hosts),
            "hosts": sorted(len(peers) for peers in hosts.values()),
            "hostile_banned": sorted(p.name for p in self.nodes if p.hostile and p.peer_id in banned),
            "honest_banned": sorted(p.name for p in self.nodes if not p.hostile and p.peer_id in banned),
            "counts": counts(scraped(p.metrics) for p in honest),
            "summaries": [t.summary for t in self.judged],
        }

    async def stop(self) -> list[str]:
        """Ends all peers. Returns what went wrong: peers that failed, tracebacks, and processes that still run."""
        peers = [*self.trainers, *self.nodes]
        children = [p.child for p in peers if p.child is not None]
        for child in children:
            if child.exit_status is None:
                with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                    self._pids[child.pid] = psutil.Process(child.pid).create_time()
                    os.kill(child.pid, signal.SIGTERM)
        await until(lambda: all(c.exit_status is not None for c in children), _LEAVE_LIMIT_S)
        await self._children.stop()
        faults = [
            f"{log.name}: {fault}"
            for log in sorted(self._folder.glob("*.log"))
            for fault in tracebacks(log.read_text(errors="replace").splitlines())
        ]
        return faults + [f"process {pid} is left" for pid, began in self._pids.items() if _lives(pid, began)]

    async def _placed(self) -> dict[UID, frozenset[PeerID]]:
        """Waits until all replicas are placed, and returns the hosts of each expert. Raises TimeoutError when experts
        lack replicas for too long.
        """
        assert self._invite is not None
        folder = self._folder / "observer"
        swarm = await join_swarm(
            Identity.load_or_create(folder / "identity.key"),
            Invite.parse(self._invite),
            NetworkConfig(HOST, serves_dht=False),
            state=folder,
        )
        try:
            async with asyncio.timeout(_START_LIMIT_S):
                while True:
                    with contextlib.suppress(UnreachableError):
                        hosts = hosts_of(await swarm.experts.replicas(swarm.manifest.uids()))
                        if all(len(peers) >= self._plan.hosts for peers in hosts.values()):
                            return hosts
                    await asyncio.sleep(_LOOK_EVERY_S)
        finally:
            await swarm.stop()

    async def _start_node(self, node: _Peer, *origin: str) -> None:
        plan, config = self._plan, self._folder / f"{node.name}.toml"
        every_s = plan.average_every_s / (_EAGERNESS if node.hostile else 1)
        config.write_text(
            f'device = "cpu"\nthreads = 1\nniceness = 0\np2pd = "off"\nmetrics_port = {node.metrics_port}\n'
            f"experts = {plan.room}\nspare = 0\nreplicas = {plan.hosts}\naverage_every_s = {every_s}\n"
            "checkpoint_every_s = 0\nstandby_every_s = 0\nannounce_every_s = 3\ndrain_timeout_s = 0\n"
        )
        arguments = ("node", *origin, "--host", HOST, "--config", str(config), "--log-format", "json")
        await self._start(node, arguments)

    async def _start_trainer(self, trainer: _Peer, number: int) -> None:
        plan, config = self._plan, self._folder / f"{trainer.name}.toml"
        average_every = plan.average_every
        if (
            trainer.hostile
        ):  # the dense part of one that flips gradients is bad too, and is not to be measured
            average_every = 0 if self._attack == "gradients-flipped" else average_every // _EAGERNESS
        config.write_text(
            f'threads = 1\np2pd = "off"\nmetrics_port = {trainer.metrics_port}\naverage_host = "{HOST}"\n'
            f"seed = {plan.seed_of(self._seed, number)}\nsteps = {plan.steps}\nbatch_size = {_BATCH_SIZE}\n"
            f"learning_rate = 5e-3\nwarmup_steps = 5\n"
            f"validation_batches = {_VALIDATION_BATCHES}\nvalidate_every = 0\ncheckpoint_every = 0\n"
            "announce_every_s = 2\n"
            f"average_every = {average_every}\ncheck_share = {plan.check_share}\n"
        )
        arguments = ("train", "--join", str(self._invite), "--data", str(self._folder / "text.txt"))
        await self._start(trainer, (*arguments, "--config", str(config), "--log-format", "json"))

    async def _start(self, peer: _Peer, arguments: Sequence[str]) -> None:
        state = self._folder / peer.name
        state.mkdir(mode=0o700)
        Identity.load_or_create(self._keys / peer.name)
        shutil.copy2(self._keys / peer.name, state / "identity.key")
        program: Sequence[str] = ("-m", "talkoot")
        if patched := self._attack if peer.hostile else ",".join(self._plan.without):
            program = (attacks.__file__, patched, str(self._seed), str(self.begins))
        peer.child = await self._children.start(peer.name, (*arguments, "--state", str(state)), program)

    def _hear(self, child: DemoProcess, event: Mapping[str, Any]) -> None:
        peer = next(p for p in [*self.nodes, *self.trainers] if p.name == child.name)
        match event.get("event"):
            case "invite":
                peer.peer_id = event["peer_id"]
                self._invite = self._invite or event["invite"]
            case "state":
                peer.experts = event["experts"]
            case "step":
                peer.steps.append(event["step_s"])
                peer.ended_at.append(time.monotonic())
                self._begin_or_end()
            case "summary":
                peer.summary = event

    def _begin_or_end(self) -> None:
        """The attack. Called after each step, since on a busy machine it takes long to look at all peers."""
        if not self._may_begin:
            return
        done = [len(trainer.steps) for trainer in self.judged]
        if not self.began_at and min(done) >= _BEGINS_AFTER:
            self.began_at = min(done)
            self.begins.touch()
        if max(done) >= self._plan.steps:
            # beside the last of them it would no longer be a minority
            attacks.Start(self.begins).end()

    def _scrape(self) -> None:
        for peer in [*self.nodes, *self.trainers]:
            if peer.child is not None and not peer.has_ended:
                with contextlib.suppress(OSError, ValueError):
                    peer.metrics = _read(f"http://{HOST}:{peer.metrics_port}/metrics")

    def _banned(self) -> set[str]:
        """The PeerIDs of the nodes that the judged trainers banned."""
        found = set()
        for trainer in self.judged:
            log = self._folder / f"{trainer.name}.log"
            text = log.read_text(errors="replace") if log.exists() else ""
            found |= set(_BANNED.findall(text))
        return found


def tracebacks(lines: Sequence[str]) -> list[str]:
    """The end of each line of a log that has a traceback in it, and of the exception below if the traceback is bare."""
    found = []
    for number, line in enumerate(lines):
        if "Traceback" in line:
            raised = next((below for below in lines[number + 1 :] if below[:1].strip()), "")
            found.append(line[-_SHOWN:] + (f" {raised[-_SHOWN:]}" if not line.startswith("{") else ""))
    return found


def scraped(text: str) -> dict[tuple[str, str], float]:
    """Reads a /metrics page: the value of each counter and gauge, by its name and the value of its label (empty if it
    has none).
    """
    return {
        (sample.name, ",".join(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        if family.type in ("counter", "gauge")
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def counts(pages: Iterable[Mapping[tuple[str, str], float]]) -> dict[str, int]:
    """Sums what the honest peers counted: averages that were made, averages that were refused, and spot checks by
    outcome.
    """
    total = Counter[tuple[str, str]]()
    for page in pages:
        total.update(page)
    averaged = [("talkoot_averagings_total", ""), ("talkoot_trainer_averagings_total", "averaged")]
    refused = [
        ("talkoot_averagings_refused_total", ""),
        ("talkoot_state_fetches_total", "broken"),
        ("talkoot_trainer_averagings_total", "refused"),
    ]
    checks = {
        outcome: [("talkoot_trainer_spot_checks_total", outcome)]
        for outcome in ("passed", "failed", "moved_on", "not_given")
    }
    return {
        name: round(sum(total[key] for key in keys))
        for name, keys in {"averaged": averaged, "refused": refused, **checks}.items()
    }


def _final_loss(summary: Mapping[str, Any] | None) -> float | None:
    """The final loss in a trainer's summary. None if the trainer failed or diverged."""
    loss = None if summary is None else summary["validation_loss_last"]
    return loss if loss is not None and math.isfinite(loss) else None


def _read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=_SCRAPE_LIMIT_S) as reply:  # noqa: S310  # our own, on loopback
        text: str = reply.read().decode()
    return text


def _lives(pid: int, began: float) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return process.create_time() == began and process.status() != psutil.STATUS_ZOMBIE
    return False


async def run(plan: HostilePlan, seed: int, attack: str | None, keys: Path) -> dict[str, Any]:
    """Does one run. Raises SystemExit if hostile nodes are at least half of some expert's hosts although the plan
    excludes that.
    """
    began = time.monotonic()
    with scratch_folder() as folder:
        swarm = HostileSwarm(plan, seed, attack, folder, keys)
        try:
            hosts = await swarm.start_nodes()
            if plan.placement == "minority" and (lost := swarm.lost(hosts)):
                sys.exit(
                    f"half of the hosts of {len(lost)} experts are hostile: a smaller share would be a minority"
                )
            await swarm.train()
            result = swarm.result(hosts)
        finally:
            faults = await swarm.stop()
    return result | {"faults": faults, "seconds": time.monotonic() - began}


async def run_all(
    plan: HostilePlan,
    seeds: Iterable[int],
    kinds: Sequence[str],
    jobs: int,
    console: Console,
    results: dict[str, Any],
    file: Path | None,
) -> None:
    """Does the runs that `results` lacks, `jobs` at a time: for each seed, the calm swarm and each kind of attack.

    Writes the file after each run.
    """
    runs, places = results.setdefault("runs", {}), asyncio.Semaphore(jobs)
    if (task := asyncio.current_task()) is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)  # as on Ctrl-C

    async def add(seed: int, kind: str, keys: Path) -> None:
        async with places:
            attack = None if kind == CALM else kind
            try:
                result = await run(plan, seed, attack, keys)
            except StartError as error:  # on a busy machine peers may find each other too late
                console.log(f"seed {seed}, {kind}, once more: {error}", markup=False)
                result = await run(plan, seed, attack, keys)
        runs.setdefault(str(seed), {})[kind] = result
        console.log(f"seed {seed}, {kind}: loss {mean_loss(result['losses']):.3f}, {result['seconds']:.0f} s")
        await asyncio.to_thread(write_figures, file, results)

    with scratch_folder() as keys:
        async with asyncio.TaskGroup() as group:
            for seed, kind in ((seed, kind) for seed in seeds for kind in (CALM, *kinds)):
                if kind not in runs.get(str(seed), {}):
                    group.create_task(add(seed, kind, keys))


def rows(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The results of each kind of attack over all seeds, compared with the calm runs of the same seeds."""
    found: dict[str, dict[str, Any]] = {}
    for kind in (CALM, *ATTACKS):
        pairs = [(s[kind], s[CALM]) for s in runs.values() if kind in s and CALM in s]
        if not pairs:
            continue
        losses = [mean_loss(run["losses"]) / mean_loss(calm["losses"]) for run, calm in pairs]
        ratio = statistics.fmean(losses)
        found[kind] = {
            "seeds": len(pairs),
            "loss": statistics.fmean(mean_loss(run["losses"]) for run, _ in pairs),
            "of_calm": ratio,
            "error": statistics.stdev(losses) / math.sqrt(len(losses))
            if len(losses) > 1 and math.isfinite(ratio)
            else math.nan,
            "speed": statistics.fmean(run["steps_per_s"] / calm["steps_per_s"] for run, calm in pairs),
            "experts_lost": statistics.fmean(run["experts_lost"] for run, _ in pairs),
            "hostile_banned": sum(len(run["hostile_banned"]) for run, _ in pairs),
            "honest_banned": sum(len(run["honest_banned"]) for run, _ in pairs),
            "counts": dict(sum((Counter(run["counts"]) for run, _ in pairs), Counter[str]())),
            "faults": sum(len(run["faults"]) for run, _ in pairs),
            "deeds": sum(run["deeds"] for run, _ in pairs),
            "reached": ratio <= MOST_LOSS,
        }
    return found


def mean_loss(losses: Collection[float | None]) -> float:
    """The mean of the losses. Infinite if any trainer has none, because it failed."""
    return statistics.fmean(math.inf if loss is None else loss for loss in losses)


def show(results: Mapping[str, Any], console: Console) -> None:
    plan = results["plan"]
    table = Table(
        "attack (seeds)", "lies", "loss", "of calm", f"≤ {MOST_LOSS}", "steps/s of calm", "banned: hostile, honest",
        "averages, refused", "experts lost",
        title=f"{plan['share']:.0%} hostile, placement: {plan['placement']}"
        + "".join(f", without {rule}" for rule in plan["without"]),
    )  # fmt: skip
    for kind, row in rows(results["runs"]).items():
        count = row["counts"]
        table.add_row(
            f"{kind} ({row['seeds']})",
            str(row["deeds"]),
            f"{row['loss']:.3f}",
            f"{row['of_calm']:.3f}" + (f" ± {row['error']:.3f}" if math.isfinite(row["error"]) else ""),
            "" if kind == CALM else "reached" if row["reached"] else "missed",
            f"{row['speed']:.2f}",
            f"{row['hostile_banned']}, {row['honest_banned']}",
            f"{count.get('averaged', 0)}, {count.get('refused', 0)}",
            f"{row['experts_lost']:.0%}",
        )
    console.print(table)
    for seed, of_seed in results["runs"].items():
        for kind, each in of_seed.items():
            for line in each["faults"]:
                console.print(f"seed {seed}, {kind}: {line}", style="red", markup=False)
