"""The swarm on paper: formulas for upkeep, hot keys, replication, adoption and throughput.

docs/scale.md explains them, and the report prints their values beside what the simulation measures. Times are in
seconds, sizes in bytes. Everything is a mean of a swarm in balance unless its docstring says otherwise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

DAY_S = 86_400.0


# Upkeep


def stretched_period(
    round_bytes: float, budget_bit_per_s: float, shortest_s: float, longest_s: float
) -> float:
    """The period in which a round of the node's own calls stays within the budget, if one between these bounds does."""
    return min(max(8 * round_bytes / budget_bit_per_s, shortest_s), longest_s)


def upkeep_bit_per_s(round_bytes: float, period_s: float) -> float:
    """On a node's line, both ways, with what others ask of it: on average as much as it asks of them."""
    return 2 * 8 * round_bytes / period_s


# Replication


def failure_rate(daily_share: float) -> float:
    """Deaths per node and second, where this share of the nodes dies within a day."""
    return -math.log1p(-daily_share) / DAY_S


def chain_probabilities(deaths: Sequence[float], repairs: Sequence[float]) -> list[float]:
    """How long a birth-death chain is in each state, as shares of the time.

    `deaths[i]`: the rate from state i + 1 down to i. `repairs[i]`: the rate from i up to i + 1.
    """
    weights = [1.0]
    for down, up in zip(deaths, repairs, strict=True):
        weights.append(weights[-1] * up / down)
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def vacant_share(replicas: int, death_rate: float, repair_s: float, adopt_s: float) -> float:
    """Share of the time in which nobody serves an expert, or of the experts that nobody serves at one moment.

    The state of the chain is how many of the `replicas` live. Each dies at `death_rate`. One at a time is replaced
    within `repair_s`, as long as another can give its state, and within `adopt_s` where none is left.
    """
    return _living_replicas(replicas, death_rate, repair_s, adopt_s)[0]


def losses_per_day(replicas: int, death_rate: float, repair_s: float, adopt_s: float) -> float:
    """How often in a day an expert loses its last replica."""
    return _living_replicas(replicas, death_rate, repair_s, adopt_s)[1] * death_rate * DAY_S


def _living_replicas(replicas: int, death_rate: float, repair_s: float, adopt_s: float) -> list[float]:
    """The chain of `vacant_share`: how long none, one, two of them live, as shares of the time."""
    deaths = [death_rate * (alive + 1) for alive in range(replicas)]
    repairs = [1 / adopt_s] + [1 / repair_s] * (replicas - 1)
    return chain_probabilities(deaths, repairs)


def replicas_needed(vacant: float, death_rate: float, repair_s: float, adopt_s: float, most: int = 64) -> int:
    """The fewest replicas with which no larger share of the experts is `vacant` at any moment. Raises ValueError."""
    for replicas in range(1, most + 1):
        if vacant_share(replicas, death_rate, repair_s, adopt_s) <= vacant:
            return replicas
    raise ValueError(f"not even {most} replicas leave only {vacant:.2g} of the experts vacant")


def all_die(nodes: int, dying: int, replicas: int) -> float:
    """Chance that all hosts of an expert are among the nodes that die at the same moment."""
    if replicas > dying:
        return 0.0
    return math.prod((dying - i) / (nodes - i) for i in range(replicas))


def updates_lost(death_rate: float, average_every_s: float) -> float:
    """Share of all updates that die with a replica, because it had taken them since it last averaged with another.

    Every replica takes as many. A replica that dies is on average half of `average_every_s` past its last average.
    """
    return death_rate * average_every_s / 2


# Adoption


@dataclass(frozen=True)
class AdoptionTime:
    """The time from the death of an expert's only host until another serves it."""

    mean_s: float
    longest_s: float


def adoption_time(
    period_s: float, lifetimes: float, sights: int, again_s: float, take_s: float, lookers: int
) -> AdoptionTime:
    """A dead host's record expires `lifetimes` periods after its last renewal, which was up to one period ago. A node
    with room then finds the expert vacant when it looks, once a period, and looks again every `again_s`. When it has
    seen that `sights` times it adopts the expert, which takes `take_s`.

    `lookers`: nodes with room that look, at times of their own. The earliest of them adopts it.
    """
    first_sight = 1 / (lookers + 1)
    later = (sights - 1) * again_s + take_s
    mean_s = (lifetimes - 0.5 + first_sight) * period_s + later
    return AdoptionTime(mean_s, (lifetimes + 1) * period_s + later)


# Hot keys


def most_loaded(nodes: int, keys: float, holders: int) -> float:
    """Load of the peer that holds the most, against the mean, where `keys` keys of the same load lie at random.

    A peer is among the `holders` nearest of every key within a stretch of the key space that reaches to its fifth
    neighbour or so on each side: the sum of 2 · `holders` gaps between neighbours, each of which is exponentially
    distributed, so that the stretch has a gamma distribution. It holds a Poisson-distributed number of keys. The result
    is the load that, on average, one of all `nodes` exceeds.
    """
    mean = keys * holders / nodes
    shape = 2 * holders
    low, high = 0.0, mean + 1.0
    while _beyond(high, mean, shape) * nodes > 1:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _beyond(middle, mean, shape) * nodes > 1 else (low, middle)
    return high / mean


def _beyond(count: float, mean: float, shape: int) -> float:
    """Chance that a gamma-Poisson mixture, which is a negative binomial distribution, is at least `count`."""
    from scipy.stats import nbinom

    chance: float = nbinom.sf(count - 1, shape, shape / (shape + mean))
    return chance


# Throughput


@dataclass(frozen=True)
class Token:
    """What training on one token sends to experts."""

    layers: int
    top_k: float
    """Experts that compute its row, in each layer,"""
    nodes: float
    """and nodes that it is sent to."""
    row_bytes: float

    @property
    def rows(self) -> float:
        """Computed forward and backward."""
        return self.layers * self.top_k

    @property
    def bytes(self) -> float:
        """Bytes that a trainer sends, and as many that it receives: activations, and gradients."""
        return 2 * self.layers * self.nodes * self.row_bytes


def most_tokens_per_s(token: Token, rows_per_s: float, bit_per_s: float) -> float:
    """The throughput of nodes that compute this many rows a second, forward and backward, over lines that carry this
    much in the slower direction. No placement of experts is better.
    """
    return min(rows_per_s / token.rows, bit_per_s / 8 / token.bytes)
