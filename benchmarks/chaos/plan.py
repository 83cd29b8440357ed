"""How large a chaos run's swarm is, and how its nodes and trainers are set."""

import math
from dataclasses import dataclass

_MANIFEST = """
name = "chaos"
preset = "none"
[model]
layers = {layers}
hidden = 32
heads = 2
context = 64
feed_forward = 64
[experts]
grid = [{grid[0]}, {grid[1]}]
kind = "ffn"
[routing]
top_k = 2
"""


@dataclass(frozen=True)
class Plan:
    """How large the swarm is, and its settings."""

    nodes: int = 8
    trainers: int = 2
    layers: int = 2
    grid: tuple[int, int] = (4, 4)
    replicas: float = 1.5
    """The average number of replicas of each expert that the nodes have room for: with 1.5, every second expert has
    two.
    """
    adopts: bool = True
    every_s: float = 20.0
    """Seconds between deaths."""
    announce_every_s: float = 5.0
    checkpoint_every_s: float = 15.0
    average_every_s: float = 15.0
    standby_every_s: float = 10.0
    drain_s: float = 5.0
    """The longest time that a leaving node waits for others to take over its experts."""
    call_deadline_s: float = 10.0
    validate_every: int = 50

    @property
    def experts(self) -> int:
        return self.layers * self.grid[0] * self.grid[1]

    @property
    def room(self) -> int:
        """How many experts each node has room for."""
        return math.ceil(self.replicas * self.experts / self.nodes)

    @property
    def spare(self) -> int:
        """How many more experts each node can adopt when their hosts have gone."""
        return self.room if self.adopts else 0

    @property
    def manifest(self) -> str:
        return _MANIFEST.format(layers=self.layers, grid=self.grid)
