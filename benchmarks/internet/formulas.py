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
    """The announcement period with which a round of the node's own calls stays within the budget, within
    these bounds.
    """
    return min(max(8 * round_bytes / budget_bit_per_s, shortest_s), longest_s)


def upkeep_bit_per_s(round_bytes: float, period_s: float) -> float:
    """Traffic of upkeep on a node's line, both ways. It includes what others ask of the node: on average as much as the
    node asks of them.
    """
    return 2 * 8 * round_bytes / period_s


# Replication


def failure_rate(daily_share: float) -> float:
    """Deaths per node and second, if `daily_share` of the nodes die within a day."""
    return -math.log1p(-daily_share) / DAY_S


def chain_probabilities(deaths: Sequence[float], repairs: Sequence[float]) -> list[float]:
    """The share of the time that a birth-death chain spends in each state.

    `deaths[i]`: the rate from state i + 1 down to i. `repairs[i]`: the rate from i up to i + 1.
    """
    weights = [1.0]
    for down, up in zip(deaths, repairs, strict=True):
        weights.append(weights[-1] * up / down)
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def vacant_share(replicas: int, death_rate: float, repair_s: float, adopt_s: float) -> float:
    """The share of the time in which nobody serves an expert, which is also the share of the experts that nobody
    serves.

    The state of the chain is how many of the `replicas` live. Each dies at `death_rate`. One at a time is replaced:
    within `repair_s` as long as another replica can give its state, and within `adopt_s` if none is left.
    """
    return _living_replicas(replicas, death_rate, repair_s, adopt_s)[0]


def losses_per_day(replicas: int, death_rate: float, repair_s: float, adopt_s: float) -> float:
    """How many times a day an expert loses its last replica."""
    return _living_replicas(replicas, death_rate, repair_s, adopt_s)[1] * death_rate * DAY_S


def _living_replicas(replicas: int, death_rate: float, repair_s: float, adopt_s: float) -> list[float]:
    """The chain of `vacant_share`: the shares of the time in which no replica lives, one does, two do, and so on."""
    deaths = [death_rate * (alive + 1) for alive in range(replicas)]
    repairs = [1 / adopt_s] + [1 / repair_s] * (replicas - 1)
    return chain_probabilities(deaths, repairs)


def replicas_needed(vacant: float, death_rate: float, repair_s: float, adopt_s: float, most: int = 64) -> int:
    """The fewest replicas for which at most a share `vacant` of the experts has no host. Raises ValueError if `most`
    are too few.
    """
    for replicas in range(1, most + 1):
        if vacant_share(replicas, death_rate, repair_s, adopt_s) <= vacant:
            return replicas
    raise ValueError(f"not even {most} replicas leave only {vacant:.2g} of the experts vacant")


def all_die(nodes: int, dying: int, replicas: int) -> float:
    """The chance that all hosts of an expert are among the nodes that die at the same moment."""
    if replicas > dying:
        return 0.0
    return math.prod((dying - i) / (nodes - i) for i in range(replicas))


def updates_lost(death_rate: float, average_every_s: float) -> float:
    """The share of all updates that is lost with replicas which took them after their last averaging.

    Every replica takes equally many updates. When a replica dies, on average half of `average_every_s` has passed since
    its last averaging.
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
    with room then finds that the expert has no host when it looks, once a period, and looks again every `again_s`. When
    it has found that `sights` times it adopts the expert, which takes `take_s`.

    `lookers`: the number of nodes with room. Each looks at its own times, and the earliest adopts the expert.
    """
    first_sight = 1 / (lookers + 1)
    later = (sights - 1) * again_s + take_s
    mean_s = (lifetimes - 0.5 + first_sight) * period_s + later
    return AdoptionTime(mean_s, (lifetimes + 1) * period_s + later)


# Hot keys


def most_loaded(nodes: int, keys: float, holders: int) -> float:
    """The load of the peer that holds the most keys, relative to the mean, if `keys` equally loaded keys lie at random.

    A peer is among the `holders` nearest peers of every key within a stretch of the key space that reaches to about its
    fifth neighbour on each side. That is the sum of 2 · `holders` gaps between neighbours, each of which is
    exponentially distributed, so the stretch has a gamma distribution. The number of keys in it is Poisson-distributed.
    The result is the load that, on average, one of all `nodes` exceeds.
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
    """The chance that a gamma-Poisson mixture, which is a negative binomial distribution, is at least `count`."""
    from scipy.stats import nbinom

    chance: float = nbinom.sf(count - 1, shape, shape / (shape + mean))
    return chance


# Throughput


@dataclass(frozen=True)
class Token:
    """What training on one token costs the swarm."""

    layers: int
    top_k: float
    """The number of experts that compute a token's row in each layer."""
    nodes: float
    """The number of nodes that a token's row is sent to in each layer."""
    row_bytes: float

    @property
    def rows(self) -> float:
        """Rows that experts compute for one token, forward and backward."""
        return self.layers * self.top_k

    @property
    def bytes(self) -> float:
        """Bytes of activations and gradients that a trainer sends for one token; it receives as many."""
        return 2 * self.layers * self.nodes * self.row_bytes


def most_tokens_per_s(token: Token, rows_per_s: float, bit_per_s: float) -> float:
    """The largest throughput of nodes that compute `rows_per_s` rows a second, forward and backward, over lines that
    carry `bit_per_s` in the slower direction. No placement of experts can exceed it.
    """
    return min(rows_per_s / token.rows, bit_per_s / 8 / token.bytes)
