"""What the validation measures of a scenario, both with real processes and in the simulation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from benchmarks.internet.validation.steady_trainers import Step

Figures = Mapping[str, float]

MOST_APART = 0.2
"""How far the ratio of simulation to reality may differ from 1."""
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
"""The figures on which simulation and reality must agree."""


@dataclass(frozen=True)
class Stretch:
    """A period in which no node came or went."""

    seconds: float
    peers: int
    """The number of nodes that live."""
    carried_bytes: float
    """Bytes that were carried in all; each counts once."""
    steps: Sequence[Step]
    """The steps that ended in it."""
    processor: float = 0.0
    """The share of the machine's processor that the run's own processes used."""
    machine: float = 0.0
    """The share of the machine's processor that all processes used."""

    @property
    def rows_per_s(self) -> float:
        return sum(step.rows for step in self.steps) / self.seconds

    @property
    def kbit_per_s(self) -> float:
        """The traffic of each node in both directions: each byte that one sends, another receives."""
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
    """What followed when many nodes died."""

    lost: int
    """The number of replicas that died."""
    vacant: int
    """The number of experts that had no other host."""
    taken: int
    """The number of replicas that other nodes started in their place."""
    times_s: Sequence[float]
    """Seconds from the deaths until each expert without a host was served again, in ascending order."""

    @property
    def all_served_s(self) -> float:
        return self.times_s[-1] if len(self.times_s) == self.vacant else float("inf")

    @property
    def mean_s(self) -> float:
        return fmean(self.times_s) if self.times_s else float("inf")


@dataclass(frozen=True)
class Measured:
    """The measurements of a whole run."""

    quiet: Stretch
    reading: Stretch
    """The period in which trainers only read, and do not train."""
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
