"""One small swarm's life, which `benchmarks.internet.validation` plays with real processes and in the simulation.

Nodes join, trainers train, a fourth of the nodes falls silent at once, as when the power fails, others adopt what
these hosted, and training goes on. Experts do not compute: they sleep as long as a drawn computer would take, so that
two cores carry 24 nodes.
"""

import random
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import numpy as np

from dht.manifest import Manifest
from peer.codec import Floats
from talkoot.demo.links import Link

_SLOWEST, _FASTEST = 1 / 3, 3.0
"""The slowest and the fastest node against the middling one."""
_FORWARD, _BACKWARD = 1 / 3, 2 / 3
"""Shares of the computing for a row."""


@dataclass(frozen=True)
class Scenario:
    """All that both sides need to know. Times in seconds."""

    nodes: int = 24
    trainers: int = 8
    alone: int = 4
    """Nodes that fall silent and whose experts nobody else hosts,"""
    others: int = 2
    """and others that do."""
    grid: tuple[int, int] = (4, 4)
    room: int = 1
    """Experts that each node takes,"""
    spare: int = 1
    """and those that it adopts beyond."""
    replicas: int = 2
    """Replicas of each expert, as long as there is room."""
    width: int = 128
    sequence: int = 64
    """Rows in a step. All of them go to the same experts."""
    top_k: int = 2
    rows_per_s: float = 70.0
    """Rows per second of the middling node, forward and backward."""
    spread: float = 0.4
    """The standard deviation of the logarithm of the nodes' speeds."""
    jitter: float = 0.2
    """The standard deviation of the logarithm of how long one batch takes at one node."""
    link: str = "20mbit,60ms"
    """The link of each node."""
    announce_every_s: float = 5.0
    quiet_s: float = 40.0
    """How long nothing but the nodes' upkeep is measured,"""
    reading_s: float = 20.0
    """then with trainers that read who is alive, but don't train,"""
    training_s: float = 45.0
    """then training,"""
    after_s: float = 30.0
    """and training once all experts are served again."""
    adoption_limit_s: float = 300.0
    call_deadline_s: float = 10.0
    seed: int = 0

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        """The scenario from what `values` gave, read as JSON."""
        return cls(**{f.name: values[f.name] for f in fields(cls)} | {"grid": tuple(values["grid"])})

    def values(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def manifest_toml(self) -> str:
        return f"""
name = "validation"
preset = "none"
[model]
layers = 1
hidden = {self.width}
heads = 1
context = {self.sequence}
feed_forward = 8
[experts]
grid = [{self.grid[0]}, {self.grid[1]}]
kind = "drawn-times"
[routing]
top_k = {self.top_k}
"""

    @property
    def manifest(self) -> Manifest:
        return Manifest.founded(tomllib.loads(self.manifest_toml))

    @property
    def emulated_link(self) -> Link:
        return Link.parse(self.link)

    @property
    def wanted_replicas(self) -> int:
        """Replicas in all, when no room is left or nothing wants more."""
        return min(self.nodes * self.room, self.replicas * self.manifest.experts_total)

    @property
    def node_settings(self) -> dict[str, Any]:
        """Settings of every node, besides where it listens."""
        return {
            "spare": self.spare,
            "replicas": self.replicas,
            "announce_every_s": self.announce_every_s,
            "average_every_s": 0.0,
            "standby_every_s": 0.0,
            "checkpoint_every_s": 0.0,
            "drain_timeout_s": 0.0,
        }

    def speeds(self) -> list[float]:
        """Rows per second of each node, forward and backward."""
        rng = self._rng("speeds")
        return [self.rows_per_s * _bounded(rng.lognormvariate(0.0, self.spread)) for _ in range(self.nodes)]

    def bias(self) -> Floats:
        """How popular each expert is: added to its scores. Of the grid's shape."""
        rng = np.random.default_rng((self.seed, 1))
        return rng.normal(0.0, 0.3, self.grid).astype(np.float32)

    def _rng(self, name: str) -> random.Random:
        return random.Random(f"{self.seed} {name}")


@dataclass(frozen=True)
class Hosting:
    """Who hosts what when nodes fall silent. Nodes by number, experts in words."""

    experts: Mapping[str, Collection[int]]

    def victims(self, scenario: Scenario, founder: int = 0) -> list[int]:
        """Never the founder."""
        alone = {hosts[0] for hosts in map(sorted, self.experts.values()) if len(hosts) == 1} - {founder}
        first = sorted(alone)[: scenario.alone]
        rest = [node for node in range(scenario.nodes) if node not in alone and node != founder]
        return sorted([*first, *rest[: scenario.others]])

    def vacant(self, dead: Collection[int]) -> int:
        """Experts that nobody else hosts."""
        return sum(set(hosts) <= set(dead) for hosts in self.experts.values())

    def replicas(self, nodes: Collection[int]) -> int:
        """Replicas that these nodes host."""
        return sum(len(set(hosts) & set(nodes)) for hosts in self.experts.values())


def service_s(rows: int, rows_per_s: float, jitter: float, rng: random.Random, backward: bool) -> float:
    """How long one batch takes."""
    return rows / rows_per_s * (_BACKWARD if backward else _FORWARD) * rng.lognormvariate(0.0, jitter)


def _bounded(factor: float) -> float:
    return min(max(factor, _SLOWEST), _FASTEST)
