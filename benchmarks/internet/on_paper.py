"""What the formulas predict for a simulated swarm, compared with what the simulation measured."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from benchmarks.internet.formulas import (
    Token,
    adoption_time,
    all_die,
    failure_rate,
    losses_per_day,
    most_loaded,
    most_tokens_per_s,
    replicas_needed,
    stretched_period,
    updates_lost,
    upkeep_bit_per_s,
    vacant_share,
)
from benchmarks.internet.report import LEAST_SERVED
from dht.upkeep import MOST_STRETCHED, ROUND_BYTES, lifetime_s
from expert_server.hosting.manager import _LOOKS, _LOOKS_WITHOUT, LOOKS_PER_PERIOD
from expert_server.settings import NodeSettings
from peer.kademlia.routing import REPLICAS

DIE_IN_A_DAY = 0.2
"""The share of volunteers that disappear in a day (`benchmarks.internet.population`)."""
REPAIRED_WITHIN_S = 600.0
"""Assumed: the time until an expert that has lost a replica has another. A node with room must come first."""
_LOOKERS = 8
"""Assumed: the number of nodes with room that look at an expert without a host."""


@dataclass(frozen=True)
class Comparison:
    """One figure, by the formulas and by the simulation."""

    what: str
    on_paper: str
    simulated: str


def comparisons(results: Mapping[str, Any]) -> Iterator[Comparison]:
    """Comparisons for all sizes in the results. `results`: as for `report.verdicts`."""
    for nodes, found in results.get("days", {}).items():
        yield from _days(int(nodes), found)
    for nodes, events in results.get("events", {}).items():
        if "tenth_dies" in events:
            yield from _tenth_dies(int(nodes), events["tenth_dies"])
    for nodes, found in results.get("train", {}).items():
        yield _training(int(nodes), found)


def table_of_comparisons(results: Mapping[str, Any]) -> Table:
    table = Table("what", "on paper", "simulated", title="formulas (docs/scale.md) beside the simulation")
    for each in comparisons(results):
        table.add_row(each.what, each.on_paper, each.simulated)
    return table


def _days(nodes: int, found: Mapping[str, Any]) -> Iterator[Comparison]:
    settings, rate = NodeSettings(), failure_rate(DIE_IN_A_DAY)
    adopted = adoption_time(*_adoption(found["period_s"], _LOOKS))
    vacant = vacant_share(settings.replicas, rate, REPAIRED_WITHIN_S, adopted.mean_s)
    what = f"{nodes:,} volunteers: share of experts that nobody serves"
    yield Comparison(what, f"{vacant:.1e}", f"{1 - found['served']:.1e}")
    lost = updates_lost(rate, settings.average_every_s)
    yield Comparison("… share of updates lost", f"{lost:.1e}", f"{found['updates_lost_share']:.1e}")
    needed = replicas_needed(1 - LEAST_SERVED, rate, REPAIRED_WITHIN_S, adopted.mean_s)
    alone = losses_per_day(settings.replicas, rate, REPAIRED_WITHIN_S, adopted.mean_s)
    yield Comparison(
        f"… replicas needed for {LEAST_SERVED:.2%}; of a million experts, those that lose {settings.replicas} in a day",
        f"{needed}; {1e6 * alone:.0f}",
        "",
    )
    wanted_s, spent = settings.announce_every_s, found["round_bytes"]
    period_s = stretched_period(spent, 8 * ROUND_BYTES / wanted_s, wanted_s, MOST_STRETCHED * wanted_s)
    mean = upkeep_bit_per_s(spent, period_s) / 1e3
    upkeep = found["upkeep"]
    yield Comparison(
        f"… period of announcements at {spent:,.0f} bytes a round, s",
        f"{period_s:.0f}",
        f"{found['period_s']:.0f}",
    )
    yield Comparison(
        "… upkeep of a node, kbit/s both ways; of the most loaded",
        f"{mean:.1f}; {mean * most_loaded(found['servers'], found['keys'], REPLICAS):.0f}",
        f"{upkeep['mean_kbit_per_s']:.1f}; {upkeep['most_kbit_per_s']:.0f}",
    )


def _tenth_dies(nodes: int, found: Mapping[str, Any]) -> Iterator[Comparison]:
    experts, died = found["experts"], found["died"]
    replicas = found["replicas_lost"] * nodes / died / experts  # Lost replicas of each expert.
    fewer, part = math.floor(replicas), replicas % 1
    vacant = experts * ((1 - part) * all_die(nodes, died, fewer) + part * all_die(nodes, died, fewer + 1))
    what = f"a tenth of {nodes:,} nodes dies: experts without a host, at {replicas:.1f} replicas"
    yield Comparison(what, f"{vacant:.1f}", f"{found['vacant']}")
    if found["vacant"]:
        period_s = found["period_s"]
        saved, lost = (adoption_time(*_adoption(period_s, sights)) for sights in (_LOOKS, _LOOKS_WITHOUT))
        periods = found["served_again_periods"]
        yield Comparison(
            "… periods until all are served, with a checkpoint somewhere and without: the mean, the longest",
            ", ".join(f"{t.mean_s / period_s:.1f} to {t.longest_s / period_s:.1f}" for t in (saved, lost)),
            "never" if periods is None else f"{periods:.1f}",
        )


def _training(nodes: int, found: Mapping[str, Any]) -> Comparison:
    layers, slots = found["layers"], found["experts_per_token"]
    token = Token(layers, slots, found["rows_per_token"], found["row_bytes"])
    most = most_tokens_per_s(token, found["rows_per_s"], found["bit_per_s"])
    return Comparison(
        f"{found['trainers']:,} trainers with {nodes:,} nodes: the most tokens/s, placed freely",
        f"{most:,.0f}",
        f"{found['ideal_free']:,.0f}",
    )


def _adoption(period_s: float, sights: int) -> tuple[float, float, int, float, float, int]:
    """Arguments of `adoption_time`. Building a small expert takes practically no time."""
    again_s = period_s / LOOKS_PER_PERIOD
    return period_s, lifetime_s(period_s) / period_s, sights, again_s, 0.0, _LOOKERS
