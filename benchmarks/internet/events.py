"""Events that may happen to a swarm, and their effects.

Each event happens to a swarm of its own, in which no volunteer comes or goes otherwise. So all changes are effects of
the event.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

from benchmarks.internet import training
from benchmarks.internet.nodes import SimulatedNode, SwarmPlan
from benchmarks.internet.population import draw_population
from benchmarks.internet.scenario import (
    LOOK_EVERY_S,
    START_S,
    Look,
    UpkeepMeter,
    VolunteerSwarm,
    plan_for,
    plan_to_train,
)
from benchmarks.internet.stand_ins import simulated
from benchmarks.internet.window import PlacedSwarm, Window
from benchmarks.internet.world import World, quantile

CROWD = 10_000
"""The largest number of volunteers that join in a flash crowd."""
CROWD_WITHIN_S = 600.0
USEFUL_WITHIN_S = 120.0
PARTED_SHARE = 0.4
RESTARTED_SHARE, RESTARTED_WITHIN_S, RESTART_TAKES_S = 0.2, 300.0, 20.0
DAY_S = 86_400.0
TRAINED_BY, HEAVY = 10, 100.0
"""The number of nodes for each trainer, and how many times as much as the others the heavy trainer trains."""
PROBING = 10
"""Every tenth trainer measures how long a lone step takes."""
BOOTSTRAPS = 3
"""The number of bootstrap nodes: the founder's own node and the others that invites name."""

Figures = dict[str, Any]


@dataclass(frozen=True)
class Timing:
    """How long the parts of an experiment take, in seconds."""

    settle_s: float = 600.0
    """Seconds until a new swarm is at rest."""
    aftermath_periods: float = 15.0
    """How long the swarm is watched afterwards, in announcement periods."""
    parted_s: float = 3600.0
    trained_s: float = 20.0
    trained_before_s: float = 45.0
    """How long trainers train before that is measured. Until then, they learn which replicas are quick, of up to 68 of
    each expert among 10,000 nodes.
    """
    metered_s: float = 300.0
    """How long upkeep is measured in a swarm that is trained, before that."""


FULL = Timing()
QUICK = Timing(
    settle_s=120.0,
    aftermath_periods=8.0,
    parted_s=300.0,
    trained_s=8.0,
    trained_before_s=12.0,
    metered_s=60.0,
)


@dataclass
class Stage:
    """A swarm at rest, to which something is about to happen."""

    volunteers: VolunteerSwarm
    began_at: float
    newcomers: int
    """The number of volunteers who have not joined yet: the last ones."""
    period_s: float
    """The mean announcement period at the beginning."""

    @property
    def world(self) -> World:
        return self.volunteers.world

    @property
    def there(self) -> list[SimulatedNode]:
        """The nodes that run, in the order in which they joined."""
        return [*self.volunteers.swarm.nodes.values()]

    def takings(self) -> int:
        return self.volunteers.swarm.takings

    def series(self, looks: Sequence[Look]) -> Figures:
        return {
            "period_s": self.period_s,
            "at_s": [round(look.at_s - self.began_at, 1) for look in looks],
            "served": [look.served for look in looks],
            "replicas": [look.replicas for look in looks],
            "living": [look.living for look in looks],
            "faults": len(self.volunteers.swarm.faults),
        }


def set_stage(
    world: World, nodes: int, timing: Timing, newcomers: int = 0, plan: SwarmPlan | None = None
) -> Stage:
    population = draw_population(world.rng("population"), nodes + newcomers)
    volunteers = VolunteerSwarm(world, population, plan or plan_for(nodes))
    volunteers.begin(range(nodes))
    volunteers.run(START_S + timing.settle_s)
    period_s = fmean(node.period.seconds for node in volunteers.serving())
    return Stage(volunteers, world.time(), newcomers, period_s)


def tenth_dies(world: World, nodes: int, timing: Timing) -> Figures:
    """A tenth of all nodes dies at the same moment."""
    stage = set_stage(world, nodes, timing)
    volunteers, there = stage.volunteers, stage.there
    before = stage.takings()
    dead = world.rng("event").sample(there, round(0.1 * len(there)))
    lost = volunteers.crash(dead)
    vacant = volunteers.experts - len(volunteers.served())
    looks = volunteers.run(timing.aftermath_periods * stage.period_s, look_every_s=1.0)
    takings = stage.takings() - before
    return stage.series(looks[::10]) | {
        "died": len(dead),
        "experts": volunteers.experts,
        "replicas_lost": lost,
        "vacant": vacant,
        "served_again_periods": _since(looks, stage.began_at, lambda look: look.served == 1, stage.period_s),
        "takings": takings,
        "takings_per_lost": takings / max(1, lost),
    }


def flash_crowd(world: World, nodes: int, timing: Timing) -> Figures:
    """As many nodes join within ten minutes as are there already, up to 10,000."""
    stage = set_stage(world, nodes, timing, newcomers=min(nodes, CROWD))
    volunteers = stage.volunteers
    known = {id(node) for node in stage.there}
    volunteers.begin(range(nodes, nodes + stage.newcomers), CROWD_WITHIN_S)
    looks = volunteers.run(CROWD_WITHIN_S + USEFUL_WITHIN_S)
    joined = [node for node in stage.there if id(node) not in known]
    waited = [node.useful_since - node.started_at for node in joined if node.useful_since is not None]
    useful = sum(wait <= USEFUL_WITHIN_S for wait in waited)
    return stage.series(looks) | {
        "joined": len(joined),
        "useful_within": useful / max(1, len(joined)),
        "useful_after_s_median": quantile(waited, 0.5),
        "useful_after_s_p90": quantile(waited, 0.9),
        "least_served": min(look.served for look in looks),
    }


def partition(world: World, nodes: int, timing: Timing) -> Figures:
    """Two fifths of the nodes are cut off from the others for an hour."""
    stage = set_stage(world, nodes, timing)
    volunteers = stage.volunteers
    before = stage.takings()
    world.partition(PARTED_SHARE)
    parted = volunteers.run(timing.parted_s, look_every_s=6 * LOOK_EVERY_S)
    halves = {half: _served_in(volunteers, half) for half in (0, 1)}
    during = stage.takings() - before
    world.heal()
    healed = volunteers.run(timing.aftermath_periods * stage.period_s)
    return stage.series([*parted, *healed]) | {
        "served_in_larger": halves[0],
        "served_in_smaller": halves[1],
        "takings_while_parted": during,
        "takings_after": stage.takings() - before - during,
        "least_served_after": min(look.served for look in healed),
    }


def founder_gone(world: World, nodes: int, timing: Timing) -> Figures:
    """The founder's node and all bootstrap nodes end for good. The others stay, and newcomers join through nodes they
    know.
    """
    newcomers = max(1, nodes // 20)
    stage = set_stage(world, nodes, timing, newcomers)
    volunteers, there = stage.volunteers, stage.there
    before = stage.takings()
    lost = volunteers.crash(there[:BOOTSTRAPS])
    looks = volunteers.run(timing.aftermath_periods * stage.period_s)
    known = {id(node) for node in there}
    volunteers.begin(range(nodes, nodes + newcomers), USEFUL_WITHIN_S)
    looks += volunteers.run(2 * USEFUL_WITHIN_S)
    joined = [node for node in stage.there if id(node) not in known]
    return stage.series(looks) | {
        "replicas_lost": lost,
        "least_served": min(look.served for look in looks),
        "served_at_the_end": looks[-1].served,
        "takings": stage.takings() - before,
        "joined": len(joined),
        "useful": sum(node.useful_since is not None for node in joined) / max(1, len(joined)),
    }


def bad_release(world: World, nodes: int, timing: Timing) -> Figures:
    """A fifth of the nodes dies within five minutes. Each then restarts from the checkpoints on its disk."""
    stage = set_stage(world, nodes, timing)
    volunteers, rng = stage.volunteers, world.rng("event")
    before, lost_before = stage.takings(), volunteers.updates_lost
    there = volunteers.look().replicas * volunteers.experts
    updates_of_a_day = DAY_S * there * volunteers.swarm.plan.updates_per_s
    numbers = rng.sample(range(nodes), round(RESTARTED_SHARE * nodes))
    replicas = 0

    def restart(number: int) -> None:
        nonlocal replicas
        node = volunteers.nodes[number]
        assert node is not None
        replicas += volunteers.crash([node])
        world.loop.call_later(RESTART_TAKES_S, volunteers.join, number)

    for number in numbers:
        world.loop.call_later(rng.uniform(0.0, RESTARTED_WITHIN_S), restart, number)
    looks = volunteers.run(RESTARTED_WITHIN_S + timing.aftermath_periods * stage.period_s)
    takings = stage.takings() - before
    return stage.series(looks) | {
        "restarted": len(numbers),
        "replicas_lost": replicas,
        "least_served": min(look.served for look in looks),
        "served_at_the_end": looks[-1].served,
        "takings": takings,
        "takings_per_lost": takings / max(1, replicas),
        "updates_lost_of_a_day": (volunteers.updates_lost - lost_before) / updates_of_a_day,
    }


EVENTS: dict[str, Callable[[World, int, Timing], Figures]] = {
    "tenth_dies": tenth_dies,
    "flash_crowd": flash_crowd,
    "partition": partition,
    "founder_gone": founder_gone,
    "bad_release": bad_release,
}


def play(name: str, nodes: int, seed: int, timing: Timing = FULL) -> Figures:
    """Simulates one event, in a world of its own."""
    with simulated(seed) as world:
        return EVENTS[name](world, nodes, timing)


def train(nodes: int, seed: int, timing: Timing = FULL) -> Figures:
    """Measures a swarm at rest that has many replicas of each expert: its upkeep, training with a trainer for every ten
    nodes, and how one that trains 100 times as much affects the others.
    """
    with simulated(seed) as world:
        volunteers = set_stage(world, nodes, timing, plan=plan_to_train(nodes)).volunteers
        meter = UpkeepMeter(world)
        volunteers.run(timing.metered_s)
        upkeep = meter.read()
        numbers = {id(node): number for number, node in enumerate(volunteers.nodes)}
        hosts = {uid: [numbers[id(node)] for node in some] for uid, some in volunteers.swarm.hosts().items()}
        placed = PlacedSwarm(volunteers.swarm.plan.manifest, volunteers.volunteers, hosts)
        trainers = draw_population(world.rng("trainers"), max(3, nodes // TRAINED_BY))
    window = Window(timing.trained_s, timing.trained_before_s)
    # How many steps in flight a trainer needs depends on how long a lone step takes while all others train. The
    # controller finds it out in minutes. Here, a play with fewer steps in flight measures it.
    alone = training.play(placed, trainers[: window.real], replace(window, in_flight=1), seed)
    probed = replace(window, overhead_s=alone.overhead_s, probing=PROBING)
    window = replace(window, overhead_s=training.play(placed, trainers, probed, seed).overhead_s)
    figures = training.play(placed, trainers, window, seed)
    last = trainers[-1]
    trainers[-1] = replace(
        last, up_bps=HEAVY * last.up_bps, down_bps=HEAVY * last.down_bps, rows_per_s=HEAVY * last.rows_per_s
    )
    heavy = training.play(placed, trainers, replace(window, heavy=HEAVY), seed)
    replicas = [len(some) for some in hosts.values()]
    return asdict(figures) | {
        "experts": volunteers.experts,
        "upkeep": upkeep,
        "replicas": {"fewest": min(replicas), "most": max(replicas), "p10": quantile(replicas, 0.1)},
        "others_with_heavy": heavy.others_tokens_per_s / max(1e-9, figures.others_tokens_per_s),
    }


def _since(
    looks: Sequence[Look], began_at: float, is_so: Callable[[Look], bool], period_s: float
) -> float | None:
    """Periods until the condition began to hold for the rest of the time; None if it does not hold at the end."""
    unlike = [look.at_s for look in looks if not is_so(look)]
    if unlike and unlike[-1] == looks[-1].at_s:
        return None
    return (unlike[-1] - began_at) / period_s if unlike else 0.0


def _served_in(volunteers: VolunteerSwarm, half: int) -> float:
    found = {uid for node in volunteers.serving() if node.peer.half == half for uid in node.runtime.experts}
    return len(found) / volunteers.experts
