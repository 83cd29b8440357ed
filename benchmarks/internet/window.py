"""A window of training: the swarm's placement, the settings of the window, and what all its trainers share.

Real trainers record which node computes what in each pass, and drawn trainers repeat that (`Recorded`).

Shapes: R rows, K slots of each row, G groups (the part of a pass that goes to one node).
"""

import asyncio
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from benchmarks.internet.calls import Calls, Machine, Sent, row_bytes
from benchmarks.internet.fluid import Integers
from dht.announcements import NodeInfo, Replica, ReplicaState
from dht.beam_search import Selection
from dht.directory import Directory, LiveExperts, View
from dht.manifest import Manifest
from dht.uid import UID
from peer.identity import PeerID
from peer.transport.endpoints import Endpoint
from trainer_client.dispatch.policy import WaitPolicy
from trainer_client.routers import Routing
from trainer_client.settings import TrainerSettings
from trainer_client.training.in_flight import MAX_IN_FLIGHT, InFlightController

_PASSES = 32
"""How many passes of real trainers are kept for drawn ones to repeat: the latest of each layer."""


@dataclass(frozen=True)
class PlacedSwarm:
    """The hosts of all experts at one moment."""

    manifest: Manifest
    machines: Sequence[Machine]
    hosts: Mapping[UID, Sequence[int]]
    """The machines that host each expert, by number."""

    @cached_property
    def peer_ids(self) -> list[PeerID]:
        return [PeerID(b"\x12\x20" + number.to_bytes(32, "big")) for number in range(len(self.machines))]


@dataclass(frozen=True)
class Window:
    """The settings of the window. Times are in seconds."""

    seconds: float = 20.0
    """How long the window is measured."""
    warm_up_s: float = 10.0
    """How long trainers train before the window begins."""
    real: int = 20
    """The largest number of trainers that send real rows."""
    sequences: int = 8
    length: int = 128
    """Tokens of a sequence. A step has `sequences` sequences."""
    in_flight: int | None = None
    """Steps in flight; None: as many as the product's controller chooses."""
    overhead_s: float | None = None
    """How long a trainer's only step in flight takes, less `own_s`. If given, trainers have as many steps in flight as
    the controller would settle on for that time and for their machines and lines: a window is too short for the
    controller's search.
    """
    probing: int | None = None
    """One trainer in this many has one step in flight, as while the controller measures how long a lone step takes."""
    dense_rows: float = 6.0
    """What the trainer's own part of the model costs for each token, in rows of an expert: assumed, for the default
    model.
    """
    announce_every_s: float = 10.0
    """How often nodes announce how many rows wait at them."""
    refresh_every_s: float = 3.0
    """How often trainers read the announcements."""
    slot_s: float = 0.01
    heavy: float = 1.0
    """How many times as many steps in flight as another trainer the last one has."""

    @property
    def start_s(self) -> float:
        """The time within which trainers begin. They don't begin all at once."""
        return self.warm_up_s / 2

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.sequences * self.length


class Announced:
    """What trainers read: the hosts of each expert, and how many rows waited at each when it last announced that."""

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
        """Once a second, renews the figures of the nodes whose announcement was due since."""
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
    return NodeInfo(peer_id=peer_id, addresses=(Endpoint("203.0.113.7:1"),), expires_at=math.inf)


class ReadDirectory(Directory):
    """A trainer's view of the swarm, as of its last reading."""

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
        """Notes the end of a step. Returns how long the step took."""
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
    """The latest passes of real trainers, and the replicas that drawn trainers may call instead."""

    def __init__(self, swarm: PlacedSwarm, calls: Calls) -> None:
        layers, grid = swarm.manifest.model.layers, swarm.manifest.experts.grid
        self.passes = [deque[RecordedPass](maxlen=_PASSES) for _ in range(layers)]
        self.hosts: list[Integers] = []
        """For each layer, the hosts of each expert that answer correctly [E, replicas]; -1 fills the rest."""
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


class Counts:
    """Counts of what happens while the window is measured."""

    def __init__(self, trainers: int) -> None:
        self.is_on = False
        self.tokens = np.zeros(trainers)
        self.step_s: list[list[float]] = [[] for _ in range(trainers)]
        self.rows = self.answered_rows = self.answered_slots = 0
        self.sent_rows = self.sent_slots = 0


class SharedWindow:
    """What all trainers of a window share."""

    def __init__(self, swarm: PlacedSwarm, trainers: Sequence[Machine], window: Window, seed: int) -> None:
        self.swarm, self.window, self.seed = swarm, window, seed
        manifest, nodes = swarm.manifest, len(swarm.machines)
        machines = [*swarm.machines, *trainers]
        rng = np.random.default_rng((seed, 0))
        self.calls = Calls(machines, nodes, row_bytes(manifest), rng, slot_s=window.slot_s)
        self.announced = Announced(swarm, self.calls, window, rng)
        self.recorded = Recorded(swarm, self.calls)
        self.numbers = {peer_id: number for number, peer_id in enumerate(swarm.peer_ids)}
        self.settings = TrainerSettings().in_swarm(manifest)
        self.policy = WaitPolicy(self.settings.call_deadline_s, self.settings.grace_s, self.settings.k_min)
        self.routing = Routing.of(self.settings, manifest, seed)
        self.counts = Counts(len(trainers))
        self.machines, self.nodes = machines, nodes
        self.rows = np.zeros((manifest.model.layers, manifest.experts.count))
        """Rows of real trainers that each expert answered."""

    def in_flight(self, number: int) -> int | None:
        """How many steps a trainer has in flight; None if the product's controller decides."""
        window = self.window
        heavy = window.heavy if number == len(self.counts.tokens) - 1 else 1.0
        if window.probing is not None and number % window.probing == 0:
            return 1
        if window.in_flight is not None:
            return round(heavy * window.in_flight)
        if window.overhead_s is None:
            return None
        nodes = self.routing.nodes_per_token or self.routing.k
        carried = 2 * self.swarm.manifest.model.layers * nodes * self.calls.row_bytes
        machine = self.machines[self.nodes + number]
        limit = self.limit(machine, carried) / heavy
        alone_s = window.overhead_s + self.own_s(machine, carried)
        busy = min(limit, self._share) / window.tokens * alone_s
        return round(heavy * min(MAX_IN_FLIGHT, max(2, round(busy + 2 * math.sqrt(busy)))))

    @cached_property
    def _share(self) -> float:
        """Each trainer's even share of the tokens per second that all hosts can compute."""
        hosts = {number for some in self.swarm.hosts.values() for number in some}
        rows_per_s = float(self.calls.rates[list(hosts)].sum())
        return rows_per_s / self.routing.k / self.swarm.manifest.model.layers / len(self.counts.tokens)

    def limit(self, machine: Machine, carried: float) -> float:
        """Tokens a second that a trainer's own machine and line allow. `carried`: bytes of each token in each
        direction.
        """
        line = min(machine.up_bps, machine.down_bps) / 8 / carried
        return min(machine.rows_per_s / self.window.dense_rows, line)

    def own_s(self, machine: Machine, carried: float) -> float:
        """How long a step takes on a trainer's own machine and line if nothing else takes time."""
        line_s = carried * 8 / machine.up_bps + carried * 8 / machine.down_bps
        return self.window.tokens * (line_s + self.window.dense_rows / machine.rows_per_s)
