"""A window of training on a swarm as it is placed at one moment, call by call.

Some trainers are real: the product's gate, balance, beam search, choice of replicas and dispatcher send real rows, over
the links and processors that `benchmarks.internet.calls` models. All others repeat what these sent lately: a drawn
trainer takes a pass of a real one, finds another replica for each expert among those that the real policy would take,
and waits as the wait policy says. It carries no rows, so a thousand of them cost little.

Shapes: R rows, K slots of each row, G groups: what of a pass goes to one node.
"""

import asyncio
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.internet.calls import Calls, Machine, ModelCaller, Sent, Told, row_bytes
from benchmarks.internet.flow import Ideal, ideal_throughput
from benchmarks.internet.fluid import Integers, Numbers
from benchmarks.simulated_p2p import VirtualLoop
from dht.announcements import NodeInfo, Replica, ReplicaState
from dht.beam_search import Selection
from dht.directory import Directory, LiveExperts, View, prefix_tables
from dht.manifest import Manifest
from dht.uid import UID
from peer.codec import Floats
from peer.identity import PeerID
from peer.metrics import total
from peer.transport.endpoints import Endpoint
from trainer_client.balancing import Load, LoadBias
from trainer_client.dispatch.batches import RoutedRows, Segments
from trainer_client.dispatch.dispatcher import Dispatcher
from trainer_client.dispatch.policy import _TIMES_HOLD_S, _WEIGHT, CallTimes, WaitPolicy
from trainer_client.dispatch.replicas import _BUSIER_ROWS, _QUICK, _SLOWER, _TRIED
from trainer_client.routers import Gate, NodeLimit, Routing
from trainer_client.settings import TrainerSettings
from trainer_client.training.in_flight import MAX_IN_FLIGHT, InFlightController

Booleans = npt.NDArray[np.bool_]

_HIDDEN = 32
"""Columns of the rows in the simulation. Bytes are those of the manifest's width."""
_BYTES_IN_ROW = 4
_BALANCED_STEPS = 40
"""Steps that the balance takes before the window: trainers come with what others have learned."""
_PASSES = 32
"""Of real trainers that drawn ones repeat, the last of each layer."""
_LOOK_S = 0.05
"""How often a drawn trainer sees whether a pass is over but for a few late calls."""
_LEAST_TIME_S = 1e-3
"""That a call takes."""
_USUAL_EVERY_S = 0.5
"""How often a drawn trainer computes what nodes took lately."""
_MOST_QUEUED = np.iinfo(np.int64).max // 2
_NOTED_TIMES = 8
"""Calls of one pass whose times a drawn trainer remembers."""


@dataclass(frozen=True)
class PlacedSwarm:
    """Who hosts what at one moment."""

    manifest: Manifest
    machines: Sequence[Machine]
    hosts: Mapping[UID, Sequence[int]]
    """Of each expert, numbers of machines."""
    dead: frozenset[int] = frozenset()
    """Machines that are still announced, and do not answer any more."""

    @cached_property
    def peer_ids(self) -> list[PeerID]:
        return [PeerID(b"\x12\x20" + number.to_bytes(32, "big")) for number in range(len(self.machines))]


@dataclass(frozen=True)
class Window:
    """What is played. Times in seconds."""

    seconds: float = 20.0
    """That are measured,"""
    warm_up_s: float = 10.0
    """after so many."""
    real: int = 20
    """Trainers that send real rows, at most."""
    sequences: int = 8
    length: int = 128
    """Tokens of a sequence. A step has `sequences` of them."""
    in_flight: int | None = None
    """Steps at once; None: as many as the product's controller finds."""
    alone_s: float | None = None
    """What a lone step takes. If given, trainers have the steps in flight that the controller finds in the end for
    that, and for what their machines and lines can do: a window is shorter than its search.
    """
    dense_rows: float = 6.0
    """What the trainer's own part of a token costs, in rows of an expert: assumed, for the default model."""
    announce_every_s: float = 10.0
    """How often nodes say how many rows wait there,"""
    refresh_every_s: float = 3.0
    """and trainers read that."""
    slot_s: float = 0.01
    heavy: float = 1.0
    """The last trainer's machine and steps in flight, against those of another."""

    @property
    def start_s(self) -> float:
        """Within which trainers begin, not all at once."""
        return self.warm_up_s / 2

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.sequences * self.length


@dataclass(frozen=True)
class TrainingFigures:
    """What came of a window."""

    nodes: int
    serving: int
    trainers: int
    tokens_per_s: float
    ideal_as_placed: float
    ideal_free: float
    wanted: float
    """Tokens a second that the trainers' own machines and lines could train."""
    of_placed: float
    of_free: float
    layers: int
    row_bytes: float
    rows_per_s: float
    """That all living nodes together compute,"""
    bit_per_s: float
    """and what their lines carry, in the slower direction."""
    step_s: dict[str, float]
    call_s: dict[str, float]
    """Of drawn trainers."""
    forward_s: dict[str, float]
    """Of all trainers' passes through one layer,"""
    backward_s: dict[str, float]
    """and back."""
    answered_rows: float
    """Of the rows of real trainers, those that any expert answered,"""
    answered_slots: float
    """and of the answers of all experts that they were sent to."""
    experts_per_token: float
    """That a row of a real trainer was sent to, in one layer."""
    rows_per_token: float
    """Sent in one layer forward, with `nodes_per_token` in mind."""
    hedged: float
    failed: float
    reselected: float
    load_cv: float
    """Of the share of time that nodes computed, over those that serve,"""
    busiest: float
    """and that of the busiest."""
    busiest_expert: float
    """Rows against the mean."""
    in_flight: float
    others_tokens_per_s: float
    """Of a trainer but the last, the mean."""


def play(
    swarm: PlacedSwarm, trainers: Sequence[Machine], window: Window | None = None, seed: int = 0
) -> TrainingFigures:
    """Trains on the swarm for a while. The same seed gives the same figures."""
    loop = VirtualLoop()
    try:
        asyncio.set_event_loop(loop)
        return loop.run_until_complete(_Play(swarm, trainers, window or Window(), seed).run())
    finally:
        asyncio.set_event_loop(None)
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


class Announced:
    """What trainers read: who hosts what, and how many rows waited there when it was announced."""

    def __init__(self, swarm: PlacedSwarm, calls: Calls, window: Window, rng: np.random.Generator) -> None:
        self.queued: Integers = np.zeros(len(swarm.machines), np.int64)
        self._swarm = swarm
        self._calls = calls
        self._every_s = window.announce_every_s
        self._phase = rng.random(len(swarm.machines)) * self._every_s
        self._at = 0.0
        self._view: View | None = None
        self._nodes = {peer_id: _node_of(peer_id) for peer_id in swarm.peer_ids}

    def step(self, now: float) -> None:
        """Once a second: the nodes announce whose turn has come since."""
        if now < self._at + 1.0:
            return
        due = (now - self._phase) // self._every_s > (self._at - self._phase) // self._every_s
        self.queued[due] = self._calls.queued_rows()[: len(self.queued)][due].astype(np.int64)
        self._at, self._view = now, None

    def view(self) -> View:
        if self._view is None:
            names, queued = self._swarm.peer_ids, self.queued.tolist()
            replicas = {
                uid: tuple(
                    Replica(uid, names[n], ReplicaState.SERVING, 1, queued[n], 0.0, math.inf) for n in hosts
                )
                for uid, hosts in self._swarm.hosts.items()
            }
            self._view = View(self._swarm.manifest, replicas, self._nodes, self._at)
        return self._view


def _node_of(peer_id: PeerID) -> NodeInfo:
    return NodeInfo(peer_id, (Endpoint("203.0.113.7:1"),), b"", 1, "0", 1, 1, 0, 0, 0.0, math.inf)


class ReadDirectory(Directory):
    """A trainer's view, as it was when it read last."""

    def __init__(self, announced: Announced) -> None:
        self.view = announced.view()
        self._manifest = self.view.manifest
        self._announced = announced
        self._gone: dict[PeerID, float] = {}
        self._now = asyncio.get_running_loop().time

    def read(self) -> None:
        view = self._announced.view()
        if self._gone:
            view = replace(view, nodes=self._but_the_gone(view.nodes), _tables={})
        self.view = view


class Pacing:
    """How many steps a trainer has under way, and how many it should have."""

    def __init__(self, fixed: int | None) -> None:
        self._fixed = fixed
        self._controller = InFlightController(MAX_IN_FLIGHT)
        self._begun: dict[int, tuple[float, bool]] = {}

    @property
    def wanted(self) -> int:
        return self._controller.count if self._fixed is None else self._fixed

    @property
    def lacks(self) -> int:
        return self.wanted - len(self._begun)

    def begin(self, step: int, now: float) -> None:
        alone = not self._begun
        self._begun = {other: (at, False) for other, (at, _) in self._begun.items()}
        self._begun[step] = now, alone

    def end(self, step: int, now: float) -> float:
        """How long it took."""
        at, alone = self._begun.pop(step)
        self._controller.note(now - at, now, alone)
        return now - at


@dataclass(frozen=True)
class RecordedPass:
    """What a real trainer sent in one layer: which node computes what, not the rows themselves."""

    group_of: Integers  # [R, K]; -1 where a slot has no expert
    sent: Sent  # of the groups [G], at the nodes that the real trainer took
    alone: Integers  # [G], the number of the expert in the layer, where a group has only one; else -1

    @classmethod
    def of(
        cls, selection: Selection, live: LiveExperts, numbers: Mapping[PeerID, int], grid: tuple[int, ...]
    ) -> "RecordedPass":
        table = np.full(grid, -1)
        for uid, peer_id in live.hosts.items():
            table[uid.coordinate] = numbers[peer_id]
        node_RK = table[tuple(np.moveaxis(selection.coordinates, -1, 0))]
        is_sent = selection.valid & (node_RK >= 0)
        expert_RK = np.ravel_multi_index(tuple(np.moveaxis(selection.coordinates, -1, 0)), grid)
        nodes, which = np.unique(node_RK[is_sent], return_inverse=True)
        group_of = np.full(node_RK.shape, -1)
        group_of[is_sent] = which
        count = len(nodes)
        rows = np.array([(group_of == group).any(axis=1).sum() for group in range(count)], np.int64)
        pairs = np.unique(np.stack([which, expert_RK[is_sent]]), axis=1)
        experts = np.bincount(pairs[0], minlength=count)
        first = np.zeros(count, np.int64)
        first[pairs[0]] = pairs[1]
        sent = Sent(nodes, rows, np.bincount(which, minlength=count), experts)
        return cls(group_of, sent, np.where(experts == 1, first, -1))


class Recorded:
    """The last passes of real trainers, and the replicas that drawn ones may take instead of theirs."""

    def __init__(self, swarm: PlacedSwarm, calls: Calls) -> None:
        layers, grid = swarm.manifest.model.layers, swarm.manifest.experts.grid
        self.passes = [deque[RecordedPass](maxlen=_PASSES) for _ in range(layers)]
        self.hosts: list[Integers] = []
        """Of each layer's experts, those that answer rightly; -1 fills the rest. [E, replicas]"""
        experts = swarm.manifest.experts.count
        for layer in range(layers):
            hosts = [
                [n for n in swarm.hosts.get(UID(layer, tuple(map(int, place))), ()) if not calls.hostile[n]]
                for place in zip(*np.unravel_index(np.arange(experts), grid), strict=True)
            ]
            table = np.full((experts, max(1, *map(len, hosts))), -1)
            for expert, some in enumerate(hosts):
                table[expert, : len(some)] = some
            self.hosts.append(table)


class KnownTimes:
    """How long nodes took lately, as each drawn trainer knows, and the replicas that it therefore calls: the policy of
    `trainer_client.dispatch.replicas`, for all experts of a pass at once.
    """

    def __init__(self, trainers: int, nodes: int, announced: Announced, rng: np.random.Generator) -> None:
        self._seconds = np.zeros((trainers, nodes), np.float32)
        """Moving means,"""
        self._at = np.full((trainers, nodes), -math.inf, np.float32)
        """and when each node answered last."""
        self._usual = np.zeros(trainers)
        """What nodes took lately, by each trainer's last look,"""
        self._usual_at = np.full(trainers, -math.inf)
        """and when that was."""
        self._announced = announced
        self._rng = rng

    def note(self, trainer: int, nodes: Integers, seconds: Numbers, now: float) -> None:
        seconds_N, at_N = self._seconds[trainer], self._at[trainer]
        before = seconds_N[nodes]
        is_known = at_N[nodes] > now - _TIMES_HOLD_S
        seconds_N[nodes] = np.where(is_known, before + _WEIGHT * (seconds - before), seconds)
        at_N[nodes] = now

    def choose(self, trainer: int, hosts: Integers, now: float) -> Integers:
        """One of the `hosts` [G, replicas] of each expert; -1 where there is none."""
        rng, is_host = self._rng, hosts >= 0
        known = is_host & (self._at[trainer][hosts] > now - _TIMES_HOLD_S)
        seconds = np.where(known, self._seconds[trainer][hosts], np.inf)
        usual_s = self._usual_s(trainer, now)
        quick = known & (seconds <= _SLOWER * np.maximum(seconds.min(axis=1), usual_s)[:, None])
        others = is_host & ~known
        few = quick.sum(axis=1) < _QUICK
        tried = ~few & others.any(axis=1) & (rng.random(len(hosts)) < _TRIED)
        fit = np.where(few[:, None], quick | others, np.where(tried[:, None], others, quick))
        queued = np.where(fit, self._announced.queued[hosts], _MOST_QUEUED)
        fit &= queued <= queued.min(axis=1, keepdims=True) + _BUSIER_ROWS
        place = np.where(fit, queued + rng.random(hosts.shape), np.inf).argmin(axis=1)
        return np.where(fit.any(axis=1), np.take_along_axis(hosts, place[:, None], axis=1)[:, 0], -1)

    def _usual_s(self, trainer: int, now: float) -> float:
        if now >= self._usual_at[trainer] + _USUAL_EVERY_S:
            lately = self._seconds[trainer][self._at[trainer] > now - _TIMES_HOLD_S]
            self._usual[trainer] = np.median(lately) if len(lately) else 0.0
            self._usual_at[trainer] = now
        return float(self._usual[trainer])


class Counts:
    """What happens while the window is measured."""

    def __init__(self, trainers: int) -> None:
        self.is_on = False
        self.tokens = np.zeros(trainers)
        self.step_s: list[float] = []
        self.call_s: list[float] = []
        self.pass_s: dict[bool, list[float]] = {True: [], False: []}
        """Of one layer, forward and backward."""
        self.rows = self.answered_rows = self.answered_slots = 0
        self.sent_rows = self.sent_slots = 0

    def note_pass(self, forward: bool, seconds: float) -> None:
        if self.is_on:
            self.pass_s[forward].append(seconds)


class _Play:
    """One window."""

    def __init__(self, swarm: PlacedSwarm, trainers: Sequence[Machine], window: Window, seed: int) -> None:
        self.swarm, self.window, self.seed = swarm, window, seed
        manifest, nodes = swarm.manifest, len(swarm.machines)
        machines = [*swarm.machines, *trainers]
        if window.heavy > 1:
            machines[-1] = _Times(machines[-1], window.heavy)
        rng = np.random.default_rng((seed, 0))
        self.calls = Calls(machines, nodes, row_bytes(manifest), rng, slot_s=window.slot_s)
        for number in swarm.dead:
            self.calls.kill(number, long_ago=True)
        self.announced = Announced(swarm, self.calls, window, rng)
        self.recorded = Recorded(swarm, self.calls)
        self.numbers = {peer_id: number for number, peer_id in enumerate(swarm.peer_ids)}
        self.settings = TrainerSettings().in_swarm(manifest)
        self.policy = WaitPolicy(self.settings.call_deadline_s, self.settings.grace_s, self.settings.k_min)
        self.routing = Routing.of(self.settings, manifest, seed)
        self.counts = Counts(len(trainers))
        self.machines, self.nodes = machines, nodes
        count = min(window.real, len(trainers))
        self.mixtures = self._mixtures()
        self.real_numbers = range(count)
        self.drawn_numbers = range(count, len(trainers))
        self.rows = np.zeros((manifest.model.layers, manifest.experts.count))
        """Of real trainers, that each expert got."""

    def _mixtures(self) -> "list[Mixture]":
        layers = range(self.swarm.manifest.model.layers)
        return [Mixture.balanced(self.swarm.manifest, self.routing, layer, self.seed) for layer in layers]

    async def run(self) -> TrainingFigures:
        window, loop = self.window, asyncio.get_running_loop()
        real = [RealTrainer(self, number) for number in self.real_numbers]
        drawn = DrawnTrainers(self, self.drawn_numbers)
        tasks = [asyncio.create_task(trainer.run()) for trainer in real]
        ends = window.warm_up_s + window.seconds
        slot, computed, before = 0, self.calls.computed, dict[str, float]()
        while self.calls.now < ends - 1e-9:
            slot += 1
            await asyncio.sleep(max(0.0, slot * window.slot_s - loop.time()))
            told = self.calls.step()
            now = self.calls.now
            self.announced.step(now)
            drawn.step(now, told)
            if not self.counts.is_on and now >= window.warm_up_s:
                self.counts.is_on = True
                computed = self.calls.computed.copy()
                before = _totals(real)
            for task in tasks:
                if task.done():
                    task.result()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for trainer in real:
            await trainer.dispatcher.close()
        after = _totals(real)
        more = {name: after[name] - before.get(name, 0) for name in after}
        in_flight = [trainer.pacing.wanted for trainer in real] + [p.wanted for p in drawn.pacing.values()]
        return self._figures(self.calls.computed - computed, more, float(np.mean(in_flight)))

    def _figures(self, computed: Numbers, more: Mapping[str, float], in_flight: float) -> TrainingFigures:
        swarm, window, counts = self.swarm, self.window, self.counts
        serving = sorted({n for hosts in swarm.hosts.values() for n in hosts} - swarm.dead)
        living = [m for number, m in enumerate(swarm.machines) if number not in swarm.dead]
        busy = computed[serving] / self.calls.rates[serving] / window.seconds
        ideal = self._ideal()
        throughput = float(counts.tokens.sum()) / window.seconds
        real_calls = max(1.0, more["calls"])
        popular = self.rows / np.maximum(self.rows.mean(axis=1, keepdims=True), 1e-9)
        return TrainingFigures(
            nodes=self.nodes,
            serving=len(serving),
            trainers=len(counts.tokens),
            tokens_per_s=throughput,
            ideal_as_placed=ideal.as_placed,
            ideal_free=ideal.free,
            wanted=self._wanted(),
            of_placed=throughput / ideal.as_placed if ideal.as_placed else 0.0,
            of_free=throughput / ideal.free if ideal.free else 0.0,
            layers=swarm.manifest.model.layers,
            row_bytes=self.calls.row_bytes,
            rows_per_s=sum(machine.rows_per_s for machine in living),
            bit_per_s=sum(min(machine.up_bps, machine.down_bps) for machine in living),
            step_s=_quantiles(counts.step_s),
            call_s=_quantiles(counts.call_s),
            forward_s=_quantiles(counts.pass_s[True]),
            backward_s=_quantiles(counts.pass_s[False]),
            answered_rows=counts.answered_rows / max(1, counts.rows),
            answered_slots=counts.answered_slots / max(1, counts.sent_slots),
            experts_per_token=counts.sent_slots / max(1, counts.rows),
            rows_per_token=self._rows_per_token(),
            hedged=more["hedged_calls"] / real_calls,
            failed=more["failures"] / real_calls,
            reselected=more["reselected_rows"] / max(1, counts.rows),
            load_cv=float(busy.std() / busy.mean()) if busy.any() else 0.0,
            busiest=float(busy.max(initial=0.0)),
            busiest_expert=float(popular.max()),
            in_flight=in_flight,
            others_tokens_per_s=float(counts.tokens[:-1].mean()) / window.seconds
            if len(counts.tokens) > 1
            else 0.0,
        )

    def in_flight(self, number: int) -> int | None:
        """Of this trainer; None where the product's controller says so."""
        window, heavy = self.window, 1.0
        if window.heavy > 1 and number == len(self.counts.tokens) - 1:
            heavy = window.heavy
        if window.in_flight is not None:
            return round(heavy * window.in_flight)
        if window.alone_s is None:
            return None
        nodes = self.routing.nodes_per_token or self.routing.k
        carried = 2 * self.swarm.manifest.model.layers * nodes * self.calls.row_bytes
        limit = self._limit(self.machines[self.nodes + number], carried) / heavy
        serving = float(
            self.calls.rates[list({n for hosts in self.swarm.hosts.values() for n in hosts})].sum()
        )
        share = serving / self.routing.k / self.swarm.manifest.model.layers / len(self.counts.tokens)
        busy = min(limit, share) / window.tokens * window.alone_s
        return round(heavy * min(MAX_IN_FLIGHT, max(2, round(busy + 2 * math.sqrt(busy)))))

    def _limit(self, machine: Machine, carried: float) -> float:
        """Tokens a second of a trainer alone, by its machine and its line. `carried`: bytes of each both ways."""
        line = min(machine.up_bps, machine.down_bps) / 8 / carried
        return min(machine.rows_per_s / self.window.dense_rows, line)

    def _rows_per_token(self) -> float:
        return self.counts.sent_rows / max(1, self.counts.rows)

    def _bytes_per_token(self) -> float:
        """That a trainer sends, and receives."""
        layers = self.swarm.manifest.model.layers
        return 2 * layers * self._rows_per_token() * self.calls.row_bytes

    def _wanted(self) -> float:
        carried = self._bytes_per_token()
        return sum(self._limit(machine, carried) for machine in self.machines[self.nodes :])

    def _ideal(self) -> Ideal:
        """By what the real trainers' tokens asked of experts, and of links."""
        swarm, manifest = self.swarm, self.swarm.manifest
        slots = self.counts.sent_slots / max(1, self.counts.rows)
        demand = (self.rows / np.maximum(self.rows.sum(axis=1, keepdims=True), 1e-9)).ravel() * slots
        # bytes of a slot: rows are shared by experts of one node
        carried = 2 * self._rows_per_token() / max(slots, 1e-9) * self.calls.row_bytes
        capacity = np.array(
            [
                0.0
                if number in swarm.dead
                else min(m.rows_per_s, m.up_bps / 8 / carried, m.down_bps / 8 / carried)
                for number, m in enumerate(self.machines[: self.nodes])
            ]
        )
        uids = [
            UID(layer, tuple(map(int, place)))
            for layer in range(manifest.model.layers)
            for place in np.ndindex(*manifest.experts.grid)
        ]
        return ideal_throughput(demand, [swarm.hosts.get(uid, ()) for uid in uids], capacity, self._wanted())


@dataclass(frozen=True)
class _Times:
    """A machine that is so many machines."""

    machine: Machine
    times: float

    @property
    def up_bps(self) -> float:
        return self.machine.up_bps * self.times

    @property
    def down_bps(self) -> float:
        return self.machine.down_bps * self.times

    @property
    def rtt_s(self) -> float:
        return self.machine.rtt_s

    @property
    def nat(self) -> bool:
        return self.machine.nat

    @property
    def rows_per_s(self) -> float:
        return self.machine.rows_per_s * self.times

    @property
    def is_hostile(self) -> bool:
        return False


def _totals(real: "Sequence[RealTrainer]") -> dict[str, float]:
    names = ("calls", "hedged_calls", "reselected_rows", "failures")
    return {name: sum(total(getattr(t.dispatcher.metrics, name)) for t in real) for name in names}


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    if not len(values):
        return {}
    return {f"p{round(100 * q)}": float(np.quantile(values, q)) for q in (0.5, 0.9, 0.99)}


# Real trainers


class Texts:
    """Rows of text: each is the embedding of a byte and of those before it."""

    def __init__(self, seed: int) -> None:
        text = "\n".join(topics[name] for name in sorted(topics)).encode()
        self._bytes = np.frombuffer(text, np.uint8)
        rng = np.random.default_rng(seed)
        embedding = rng.standard_normal((256, _HIDDEN))
        turns = rng.standard_normal((_BYTES_IN_ROW, _HIDDEN, _HIDDEN)) / (_BYTES_IN_ROW * _HIDDEN) ** 0.5
        self._tables: Floats = (embedding @ turns).astype(np.float32)  # [bytes in a row, 256, D]

    def rows(self, sequences: int, length: int, rng: np.random.Generator) -> Floats:
        """[R, D]"""
        starts = rng.integers(0, len(self._bytes) - length - _BYTES_IN_ROW, sequences)
        places = (starts[:, None] + np.arange(length)).ravel()
        rows: Floats = self._tables[0][self._bytes[places]]
        for number in range(1, _BYTES_IN_ROW):
            rows += self._tables[number][self._bytes[places + number]]
        return rows


class Mixture:
    """What a trainer has of one layer: the gate, and the balance of its experts' load."""

    def __init__(self, gate: Gate, routing: Routing, manifest: Manifest, bias: LoadBias | None) -> None:
        self.gate = gate
        self.routing = routing
        self.manifest = manifest
        self.balance = LoadBias(manifest.experts.grid) if routing.has_bias else None
        if self.balance is not None and bias is not None:
            self.balance.load_state_dict(bias.state_dict())

    @classmethod
    def balanced(cls, manifest: Manifest, routing: Routing, layer: int, seed: int) -> "Mixture":
        """With the bias that it takes on when all experts are there."""
        torch.manual_seed(seed * 1000 + layer)
        gate = Gate(_HIDDEN, manifest.experts.grid, has_noise=routing.router.has_noise)
        mixture, texts = cls(gate, routing, manifest, None), Texts(seed)
        alive, rng = prefix_tables(np.ones(manifest.experts.grid, bool)), np.random.default_rng((seed, layer))
        for _ in range(_BALANCED_STEPS if mixture.balance is not None else 0):
            scores = mixture.scores(texts.rows(8, 128, rng))
            selection = routing.router.choose(scores, alive, routing.k, rng, mixture.bias())
            mixture.correct(mixture.measure(scores, selection, alive))
        return mixture

    def copy(self) -> "Mixture":
        return Mixture(self.gate, self.routing, self.manifest, self.balance)

    def scores(self, rows: Floats) -> list[Floats]:
        with torch.no_grad():
            found: list[Floats] = [table.numpy() for table in self.gate(torch.from_numpy(rows))]
            return found

    def bias(self) -> Floats | None:
        return None if self.balance is None else self.balance.table()

    def measure(self, scores: Sequence[Floats], selection: Selection, alive: Any) -> Load | None:
        if self.balance is None or not selection.valid.any():
            return None
        return self.balance.measure([torch.from_numpy(table) for table in scores], selection, alive)

    def correct(self, load: Load | None) -> None:
        if self.balance is not None and load is not None:
            self.balance.correct(load)


class RealTrainer:
    """The product's dispatcher under steps that compute nothing but the gate."""

    def __init__(self, play: _Play, number: int) -> None:
        self._play = play
        self._number = number
        self._peer = play.nodes + number
        self._rng = np.random.default_rng((play.seed, 2, number))
        self._texts = Texts(play.seed)
        self._mixtures = [mixture.copy() for mixture in play.mixtures]
        self._directory = ReadDirectory(play.announced)
        self.pacing = Pacing(play.in_flight(number))
        loop = asyncio.get_running_loop()
        caller = ModelCaller(play.calls, self._peer, play.numbers)
        self.dispatcher = Dispatcher(
            self._directory, caller, play.policy, seed=number, clock=loop.time, is_silent=caller.is_silent
        )

    async def run(self) -> None:
        """Trains until it is cancelled."""
        steps = 0
        if self._number:
            await asyncio.sleep(self._play.window.start_s * self._rng.random())
        running: set[asyncio.Task[None]] = set()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep_reading())
            while True:
                while self.pacing.lacks > 0:
                    steps += 1
                    self.pacing.begin(steps, asyncio.get_running_loop().time())
                    running.add(group.create_task(self._step(steps)))
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()

    async def _keep_reading(self) -> None:
        every_s = self._play.window.refresh_every_s
        await asyncio.sleep(self._rng.random() * every_s)
        while True:
            self._directory.read()
            await asyncio.sleep(every_s)

    async def _step(self, number: int) -> None:
        play, window = self._play, self._play.window
        loop = asyncio.get_running_loop()
        part = window.dense_rows * window.tokens / 3 / len(self._mixtures)
        passes = []
        for layer, mixture in enumerate(self._mixtures):
            await self._compute(part)
            inputs = self._texts.rows(window.sequences, window.length, self._rng)
            scores, bias, routing = mixture.scores(inputs), mixture.bias(), play.routing
            live = await self.dispatcher.find(layer, scores, routing.k, bias)
            most = routing.nodes_per_token
            limit = None if most is None else NodeLimit.of(live, most)
            selection = routing.router.choose(scores, live.tables, routing.k, self._rng, bias, limit)
            load = mixture.measure(scores, selection, live.tables)
            segments = Segments.whole(window.sequences, window.length)
            rows = RoutedRows(layer, inputs, scores, routing.k, segments, True, bias)
            recorded = self._record(layer, selection, live)
            began = loop.time()
            result = await self.dispatcher.send(rows, selection, live)
            play.counts.note_pass(True, loop.time() - began)
            self._count(result.answered, recorded)
            passes.append((result, load))
        for layer in reversed(range(len(passes))):
            await self._compute(2 * part)
            result, load = passes[layer]
            gradients = self._rng.standard_normal(result.updates.shape, dtype=np.float32)
            began = loop.time()
            await self.dispatcher.send_back(result, gradients)
            play.counts.note_pass(False, loop.time() - began)
            self._mixtures[layer].correct(load)
        took_s = self.pacing.end(number, loop.time())
        if play.counts.is_on:
            play.counts.tokens[self._number] += window.tokens
            play.counts.step_s.append(took_s)

    async def _compute(self, work: float) -> None:
        calls = self._play.calls
        await calls.answer(calls.compute(self._peer, work, asyncio.get_running_loop().time(), -1))

    def _record(self, layer: int, selection: Selection, live: LiveExperts) -> RecordedPass:
        play = self._play
        recorded = RecordedPass.of(selection, live, play.numbers, play.swarm.manifest.experts.grid)
        play.recorded.passes[layer].append(recorded)
        numbers = np.ravel_multi_index(
            tuple(selection.coordinates[selection.valid].T), play.swarm.manifest.experts.grid
        )
        play.rows[layer] += np.bincount(numbers, minlength=play.rows.shape[1])
        return recorded

    def _count(self, answered: Booleans, recorded: RecordedPass) -> None:
        counts = self._play.counts
        if counts.is_on:
            counts.sent_rows += int(recorded.sent.rows.sum())
            counts.sent_slots += int(recorded.sent.slots.sum())
            counts.rows += len(answered)
            counts.answered_rows += int(answered.any(axis=1).sum())
            counts.answered_slots += int(answered.sum())


# Drawn trainers


class _Pass:
    """One that is under way. Each group may be called twice: places from G on are those of second calls."""

    __slots__ = (
        "answered", "began", "called_at", "ends", "enough_at", "forward", "is_over", "last_at", "left", "nodes",
        "recorded", "sent_to", "step", "times",
    )  # fmt: skip

    def __init__(
        self, step: "_Step", recorded: RecordedPass, nodes: Integers, forward: bool, began: float, ends: float
    ) -> None:
        self.step = step
        self.recorded = recorded
        self.sent_to = nodes.copy()
        """Of each group the node that answered it, or was asked last."""
        self.nodes = np.concatenate([nodes, np.full(len(nodes), -1)])
        """Of all calls,"""
        self.called_at = np.full(2 * len(nodes), began)
        """and when each was made."""
        self.forward = forward
        self.began = began
        self.ends = ends
        self.answered = nodes < 0
        self.left = int((nodes >= 0).sum())
        self.last_at = began
        self.enough_at: float | None = None
        self.is_over = False
        """Nobody waits any more. What still comes says how slow a node is."""
        self.times: list[Numbers] = []

    @property
    def groups(self) -> int:
        return len(self.answered)


class _Step:
    """One step of a drawn trainer: which part comes next."""

    __slots__ = ("number", "passes", "stage", "trainer")

    def __init__(self, trainer: int, number: int) -> None:
        self.trainer = trainer
        self.number = number
        self.stage = 0
        self.passes: list[_Pass] = []


class DrawnTrainers:
    """All of them. What they wait for has an owner number."""

    def __init__(self, play: _Play, numbers: Sequence[int]) -> None:
        self._play = play
        self.pacing = {number: Pacing(play.in_flight(number)) for number in numbers}
        self._layers = play.swarm.manifest.model.layers
        self._times = {number: {True: CallTimes(), False: CallTimes()} for number in numbers}
        self._calls_made = dict.fromkeys(numbers, 0)
        self._hedged = dict.fromkeys(numbers, 0)
        self._owners: dict[int, _Pass | _Step] = {}
        self._next = 0
        self._steps = 0
        self._looks: dict[int, list[int]] = {}
        """Passes to look at, by slot."""
        self._started = False
        self._rng = np.random.default_rng((play.seed, 3))
        self._first = numbers[0] if len(numbers) else 0
        self._known = KnownTimes(
            len(numbers), play.nodes, play.announced, np.random.default_rng((play.seed, 1))
        )

    def step(self, now: float, told: Sequence[Told]) -> None:
        if not self._started:
            if not all(self._play.recorded.passes):
                return
            self._started = True
            spread = self._play.window.start_s * self._rng.random(len(self.pacing))
            for number, offset in zip(self.pacing, spread.tolist(), strict=True):
                self._begin_step(number, now + offset)
        for some in told:
            self._take(some)
        for owner in self._looks.pop(round(now / self._play.window.slot_s), ()):
            found = self._owners.get(owner)
            if isinstance(found, _Pass):
                self._look(owner, found, now)

    def _own(self, thing: "_Pass | _Step") -> int:
        self._next += 1
        self._owners[self._next] = thing
        return self._next

    def _begin_step(self, trainer: int, at: float) -> None:
        self._steps += 1
        self.pacing[trainer].begin(self._steps, at)
        self._go_on(_Step(trainer, self._steps), at)

    def _go_on(self, step: _Step, at: float) -> None:
        """Stages: computing and a forward pass for each layer, then the same backward, from the last."""
        play, window = self._play, self._play.window
        layers, stage = self._layers, step.stage
        if stage == 4 * layers:
            self._end_step(step, at)
            return
        step.stage += 1
        forward, is_pass = stage < 2 * layers, stage % 2
        if not is_pass:
            part = window.dense_rows * window.tokens / 3 / layers
            play.calls.compute(play.nodes + step.trainer, part * (1 if forward else 2), at, self._own(step))
        elif forward:
            recorded, nodes = self._draw(step.trainer, stage // 2, at)
            self._send(step, recorded, nodes, True, at)
        else:
            first = step.passes[2 * layers - 1 - stage // 2]
            nodes = np.where(first.answered, first.sent_to, -1)
            self._send(step, first.recorded, nodes, False, at)

    def _draw(self, trainer: int, layer: int, at: float) -> tuple[RecordedPass, Integers]:
        """A pass, and the nodes [G] that its groups go to."""
        passes = self._play.recorded.passes[layer]
        drawn = passes[int(self._rng.integers(len(passes)))]
        return drawn, np.where(
            drawn.alone >= 0, self._replicas(trainer, layer, drawn.alone, at), drawn.sent.nodes
        )

    def _replicas(
        self, trainer: int, layer: int, experts: Integers, at: float, besides: Integers | None = None
    ) -> Integers:
        """One of each; -1 of none. `besides`: nodes that are not asked again, one for each."""
        hosts = self._play.recorded.hosts[layer][experts]
        if besides is not None:
            hosts = np.where(hosts == besides[:, None], -1, hosts)
        return self._known.choose(trainer - self._first, hosts, at)

    def _end_step(self, step: _Step, at: float) -> None:
        play, pacing = self._play, self.pacing[step.trainer]
        took_s = pacing.end(step.number, at)
        if play.counts.is_on:
            play.counts.tokens[step.trainer] += play.window.tokens
            play.counts.step_s.append(took_s)
        while pacing.lacks > 0:
            self._begin_step(step.trainer, at)

    def _send(self, step: _Step, recorded: RecordedPass, nodes: Integers, forward: bool, at: float) -> None:
        play, times = self._play, self._times[step.trainer][forward]
        deadline_s = play.policy.deadline_s(times)
        making = _Pass(step, recorded, nodes, forward, at, at + deadline_s)
        if forward:
            step.passes.append(making)
        if not making.left:
            self._go_on(step, at)
            return
        owner = self._own(making)
        groups = np.flatnonzero(nodes >= 0)
        self._call(owner, making, groups, nodes[groups], at)
        self._look_at(owner, at + (play.policy.hedge_after_s(times) if forward else deadline_s))
        if forward:
            self._look_at(owner, at + deadline_s / 2)
            self._look_at(owner, making.ends)

    def _call(self, owner: int, making: _Pass, places: Integers, nodes: Integers, at: float) -> None:
        sent, play, groups = making.recorded.sent, self._play, places % making.groups
        making.nodes[places], making.called_at[places] = nodes, at
        some = Sent(nodes, sent.rows[groups], sent.slots[groups], sent.experts[groups])
        trainer = making.step.trainer
        self._calls_made[trainer] += len(groups)
        play.calls.begin(play.nodes + trainer, some, making.forward, at, making.ends, owner, places)

    def _look_at(self, owner: int, at: float) -> None:
        slot = math.ceil(at / self._play.window.slot_s)
        self._looks.setdefault(
            max(slot, round(self._play.calls.now / self._play.window.slot_s) + 1), []
        ).append(owner)

    def _take(self, told: Told) -> None:
        order = np.argsort(told.owners, kind="stable")
        owners, places, at, well = (
            told.owners[order],
            told.places[order],
            told.at[order],
            ~told.refused[order],
        )
        bounds = [*np.flatnonzero(np.diff(owners, prepend=-1)).tolist(), len(owners)]
        for first, last in pairwise(bounds):
            owner = int(owners[first])
            found = self._owners.get(owner)
            if isinstance(found, _Step):
                del self._owners[owner]
                self._go_on(found, float(at[first]))
            elif found is not None:
                taken = well[first:last]
                self._answer(owner, found, places[first:last][taken], at[first:last][taken])

    def _answer(self, owner: int, found: _Pass, places: Integers, at: Numbers) -> None:
        nodes = found.nodes[places]
        if len(places):
            took_s = np.maximum(at - found.called_at[places], _LEAST_TIME_S)
            self._known.note(found.step.trainer - self._first, nodes, took_s, float(at.max()))
            found.nodes[places] = -1
        if found.is_over:
            self._forget_if_answered(owner, found)
            return
        fresh = ~found.answered[places % found.groups]
        groups, at = (places % found.groups)[fresh], at[fresh]
        if not len(groups):
            return
        found.sent_to[groups] = nodes[fresh]
        found.answered[groups] = True
        found.left = int((~found.answered).sum())
        found.last_at = max(found.last_at, float(at.max()))
        found.times.append(at - found.began)
        if not found.left:
            self._end(owner, found, found.last_at)
        elif found.enough_at is None and found.left <= max(2, len(found.answered) // 8):
            self._see_if_enough(owner, found)

    def _forget_if_answered(self, owner: int, found: _Pass) -> None:
        if (found.nodes < 0).all():
            del self._owners[owner]

    def _see_if_enough(self, owner: int, found: _Pass) -> None:
        """Whether every row has as many answers as the wait policy wants."""
        recorded = found.recorded
        asked = (found.sent_to >= 0)[recorded.group_of] & (recorded.group_of >= 0)
        got = (found.answered[recorded.group_of] & asked).sum(axis=1)
        if (got >= np.minimum(self._play.policy.k_min, asked.sum(axis=1))).all():
            found.enough_at = found.last_at
            self._look_at(owner, found.last_at + self._play.policy.grace_s)

    def _look(self, owner: int, found: _Pass, now: float) -> None:
        play, policy = self._play, self._play.policy
        slot_s = play.window.slot_s
        if found.is_over:
            if now >= found.ends - slot_s:
                late = found.nodes >= 0
                trainer, took_s = found.step.trainer - self._first, now - found.called_at[late]
                self._known.note(trainer, found.nodes[late], took_s, now)
                del self._owners[owner]
        elif found.enough_at is not None and now >= found.enough_at + policy.grace_s - slot_s:
            self._end(owner, found, found.enough_at + policy.grace_s)
        elif now >= found.ends - slot_s:
            self._end(owner, found, found.ends)
        elif found.forward and found.enough_at is None:
            self._hedge(owner, found, now)

    def _hedge(self, owner: int, found: _Pass, now: float) -> None:
        """Asks another replica of each expert that is late: some at first, all after half of the time."""
        trainer = found.step.trainer
        alone = found.recorded.alone
        late = np.flatnonzero(~found.answered & (alone >= 0))
        if now < found.began + (found.ends - found.began) / 2:
            room = int(self._play.policy.most_hedged * self._calls_made[trainer]) - self._hedged[trainer]
            late = late[: max(0, room)]
            self._hedged[trainer] += len(late)
        layer = found.step.passes.index(found)
        others = self._replicas(trainer, layer, alone[late], now, found.sent_to[late])
        late, others = late[others >= 0], others[others >= 0]
        if len(late):
            found.sent_to[late] = others
            self._call(owner, found, late + found.groups, others, now)

    def _end(self, owner: int, found: _Pass, at: float) -> None:
        found.is_over = True
        self._forget_if_answered(owner, found)
        trainer, counts = found.step.trainer, self._play.counts
        times, all_s = self._times[trainer][found.forward], np.concatenate([*found.times, np.zeros(0)])
        some_s = self._rng.choice(all_s, min(_NOTED_TIMES, len(all_s)), replace=False).tolist()
        for seconds in some_s:
            times.add(seconds)
        if found.left:
            times.add_unfinished(at - found.began)
        if counts.is_on:
            counts.call_s.extend(some_s)
        counts.note_pass(found.forward, at - found.began)
        self._go_on(found.step, at)
