"""The scenario of a small swarm, which `benchmarks.internet.validation` runs with real processes and in the simulation.

Nodes join and trainers train. Then a quarter of the nodes falls silent at once, as in a power failure, others adopt the
experts these hosted, and training continues. Experts do not compute: they sleep as long as a randomly drawn computer
would take, so that two cores can run 24 nodes.
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
"""The speeds of the slowest and of the fastest node, relative to the median node."""
_FORWARD, _BACKWARD = 1 / 3, 2 / 3
"""How the computing for a row is shared between the forward and the backward call."""


@dataclass(frozen=True)
class Scenario:
    """Everything that describes the scenario. Times are in seconds."""

    nodes: int = 24
    trainers: int = 8
    alone: int = 4
    """The number of nodes that fall silent and whose experts have no other host."""
    others: int = 2
    """The number of nodes that fall silent and whose experts do have another host."""
    grid: tuple[int, int] = (4, 4)
    room: int = 1
    """The number of experts that each node takes at the start."""
    spare: int = 1
    """The number of experts that each node can adopt in addition."""
    replicas: int = 2
    """Replicas of each expert, if there is room."""
    width: int = 128
    sequence: int = 64
    """Rows in a step. All of them go to the same experts."""
    top_k: int = 2
    rows_per_s: float = 70.0
    """Rows per second of the median node, forward and backward."""
    spread: float = 0.4
    """The standard deviation of the logarithm of the nodes' speeds."""
    jitter: float = 0.2
    """The standard deviation of the logarithm of the time that one node takes for a batch."""
    link: str = "20mbit,60ms"
    """The link of each node."""
    announce_every_s: float = 5.0
    at_rest_after_s: float = 120.0
    """How long after the nodes' start their periods no longer depend on how costly others' joining made a round."""
    quiet_s: float = 40.0
    """The length of the first period, in which only the nodes' upkeep is measured."""
    reading_s: float = 20.0
    """The length of the second period, in which trainers read who is alive, but don't train."""
    training_s: float = 45.0
    """The length of the third period, in which they train."""
    after_s: float = 30.0
    """The length of the last period, in which they train after all experts are served again."""
    adoption_limit_s: float = 300.0
    call_deadline_s: float = 10.0
    seed: int = 0

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        """The scenario from the output of `values`, after JSON."""
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
        """The number of replicas at which the nodes have no room left, or every expert has enough."""
        return min(self.nodes * self.room, self.replicas * self.manifest.experts_total)

    @property
    def node_settings(self) -> dict[str, Any]:
        """The settings of every node, apart from its addresses."""
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
        """How popular each expert is: this is added to its scores. The array has the grid's shape."""
        rng = np.random.default_rng((self.seed, 1))
        return rng.normal(0.0, 0.3, self.grid).astype(np.float32)

    def _rng(self, name: str) -> random.Random:
        return random.Random(f"{self.seed} {name}")


@dataclass(frozen=True)
class Hosting:
    """The hosts of each expert when nodes fall silent. Nodes are given by number, experts by their uid as a string."""

    experts: Mapping[str, Collection[int]]

    def victims(self, scenario: Scenario) -> list[int]:
        """The nodes that fall silent. The founder, which is node 0, is never one of them."""
        alone = {hosts[0] for hosts in map(sorted, self.experts.values()) if len(hosts) == 1} - {0}
        first = sorted(alone)[: scenario.alone]
        rest = [node for node in range(scenario.nodes) if node not in alone and node != 0]
        return sorted([*first, *rest[: scenario.others]])

    def vacant(self, dead: Collection[int]) -> int:
        """The number of experts that only dead nodes host."""
        return sum(set(hosts) <= set(dead) for hosts in self.experts.values())

    def replicas(self, nodes: Collection[int]) -> int:
        """The number of replicas that these nodes host."""
        return sum(len(set(hosts) & set(nodes)) for hosts in self.experts.values())


def service_s(rows: int, rows_per_s: float, jitter: float, rng: random.Random, backward: bool) -> float:
    """How long computing a batch takes."""
    return rows / rows_per_s * (_BACKWARD if backward else _FORWARD) * rng.lognormvariate(0.0, jitter)


def _bounded(factor: float) -> float:
    return min(max(factor, _SLOWEST), _FASTEST)
