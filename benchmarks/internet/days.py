"""Days in the life of a swarm whose volunteers come and go: what is served, what is lost, and what upkeep costs."""

import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from benchmarks.internet.population import draw_population
from benchmarks.internet.scenario import START_S, Look, UpkeepMeter, VolunteerSwarm, plan_for
from benchmarks.internet.stand_ins import simulated

WARM_UP_S = START_S + 1080.0
"""The end of the warm-up. By then, the volunteers of the beginning host as many experts as they can."""
METER_S = 1800.0
"""How long each measurement of upkeep lasts. One follows another."""
SERIES = 500
"""The number of moments of a run whose figures are reported."""


def play(nodes: int, hours: float, seed: int) -> Iterator[dict[str, Any]]:
    """Simulates `nodes` volunteers for some hours; about four fifths of them are online at any time.

    Yields the figures of all hours so far after each measurement of upkeep, so a long run that is stopped keeps them.
    Only their `machine` depends on the machine that runs the simulation.
    """
    began = time.perf_counter()
    with simulated(seed) as world:
        volunteers = VolunteerSwarm(world, draw_population(world.rng("population"), nodes), plan_for(nodes))
        volunteers.come_and_go(hours)
        volunteers.run(WARM_UP_S)
        volunteers.updates = volunteers.updates_lost = 0.0
        takings, before = volunteers.swarm.takings, world.accounts.totals()
        looks: list[Look] = []
        meters: list[dict[str, float]] = []
        while (left_s := hours * 3600.0 - world.time()) > 0:
            meter = UpkeepMeter(world)
            looks += volunteers.run(min(left_s, METER_S))
            meters.append(meter.read())
            carried = {purpose: total - before[purpose] for purpose, total in world.accounts.totals().items()}
            figures = _figures(volunteers, looks, meters, carried, volunteers.swarm.takings - takings)
            yield figures | {"machine": _machine(world.time(), time.perf_counter() - began)}


def _figures(
    volunteers: VolunteerSwarm,
    looks: Sequence[Look],
    meters: Sequence[Mapping[str, float]],
    carried: Mapping[str, float],
    takings: int,
) -> dict[str, Any]:
    """Figures of the time since the warm-up. `carried`: bytes by purpose."""
    world, nodes = volunteers.world, len(volunteers.volunteers)
    living_s = fmean(look.living for look in looks) * (world.time() - WARM_UP_S)
    period_s = fmean(node.period.seconds for node in volunteers.serving())
    some = looks[:: 1 + len(looks) // SERIES]
    return {
        "nodes": nodes,
        "experts": volunteers.experts,
        "hours": world.time() / 3600,
        "served": fmean(look.served for look in looks),
        "least_served": min(look.served for look in looks),
        "updates_lost_share": volunteers.updates_lost / max(1.0, volunteers.updates),
        "takings_per_node_day": takings / living_s * 86_400,
        "upkeep": {
            "mean_kbit_per_s": fmean(meter["mean_kbit_per_s"] for meter in meters),
            "most_kbit_per_s": max(meter["most_kbit_per_s"] for meter in meters),
        },
        "period_s": period_s,
        "round_bytes": (carried["announce"] + carried["read"]) / living_s * period_s,
        "servers": world.servers(),
        "keys": volunteers.swarm.dht.keys,
        "transfer_kbit_per_s": 8e-3 * carried["transfer"] / living_s,
        "faults": len(volunteers.swarm.faults),
        "series": {
            "hour": [round(look.at_s / 3600, 3) for look in some],
            "served": [look.served for look in some],
            "replicas": [look.replicas for look in some],
            "living": [look.living for look in some],
        },
    }


def _machine(simulated_s: float, took_s: float) -> dict[str, float]:
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"times_real_time": simulated_s / took_s, "seconds": took_s, "memory_bytes": memory}
