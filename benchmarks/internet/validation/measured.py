"""What either side of the validation measures of a scenario."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from benchmarks.internet.validation.steady_trainers import Step

Figures = Mapping[str, float]

MOST_APART = 0.2
"""How far the ratio of both sides may differ from 1."""
COMPARED = frozenset(
    {
        "rows_per_s",
        "rows_per_s_after",
        "upkeep_kbit_per_s",
        "call_bytes_per_row",
        "adopted_mean_s",
        "adopted_all_s",
    }
)
"""Figures that both sides must agree on."""


@dataclass(frozen=True)
class Stretch:
    """Some seconds in which nothing changed."""

    seconds: float
    peers: int
    """Nodes that live."""
    carried_bytes: float
    """Carried bytes in all, each counted once."""
    steps: Sequence[Step]
    """Steps that ended."""
    processor: float = 0.0
    """Share of the machine that the run's own processes used,"""
    machine: float = 0.0
    """and all processes."""

    @property
    def rows_per_s(self) -> float:
        return sum(step.rows for step in self.steps) / self.seconds

    @property
    def kbit_per_s(self) -> float:
        """The traffic of each node, there and back: what one sends, another receives."""
        return 2 * self.carried_bytes * 8e-3 / self.seconds / self.peers

    @property
    def forward_s(self) -> float:
        return fmean(step.forward_s for step in self.steps)

    @property
    def backward_s(self) -> float:
        return fmean(step.backward_s for step in self.steps)

    @property
    def answered(self) -> float:
        return fmean(step.answered for step in self.steps)


@dataclass(frozen=True)
class Adoption:
    """What followed the death of many nodes."""

    lost: int
    """Replicas that died."""
    vacant: int
    """Experts that had no other host."""
    taken: int
    """Replicas that others took in their place."""
    times_s: Sequence[float]
    """Seconds from the deaths until each vacant expert was served, rising."""

    @property
    def all_served_s(self) -> float:
        return self.times_s[-1] if len(self.times_s) == self.vacant else float("inf")

    @property
    def mean_s(self) -> float:
        return fmean(self.times_s) if self.times_s else float("inf")


@dataclass(frozen=True)
class Measured:
    """A whole run."""

    quiet: Stretch
    reading: Stretch
    """The stretch with trainers that do not train."""
    training: Stretch
    adoption: Adoption
    after: Stretch

    def figures(self) -> dict[str, float]:
        """The figures that are compared."""
        upkeep = self.quiet.carried_bytes / self.quiet.seconds
        all_upkeep = self.reading.carried_bytes / self.reading.seconds
        calls = self.training.carried_bytes - all_upkeep * self.training.seconds
        rows = sum(step.rows for step in self.training.steps)
        return {
            "rows_per_s": self.training.rows_per_s,
            "rows_per_s_after": self.after.rows_per_s,
            "forward_s": self.training.forward_s,
            "backward_s": self.training.backward_s,
            "answered": self.training.answered,
            "upkeep_kbit_per_s": self.quiet.kbit_per_s,
            "trainers_reading_kbit_per_s": (all_upkeep - upkeep) * 8e-3,
            "call_bytes_per_row": calls / rows,
            "vacant_experts": self.adoption.vacant,
            "adopted_mean_s": self.adoption.mean_s,
            "adopted_all_s": self.adoption.all_served_s,
            "takings_per_lost": self.adoption.taken / self.adoption.lost,
        }


def ratio(figure: str, processes: Figures, simulated: Sequence[Figures]) -> float:
    """The ratio of the simulation to the processes."""
    return fmean(run[figure] for run in simulated) / processes[figure]
