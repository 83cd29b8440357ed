"""The targets for a swarm at internet scale, and whether the simulation reached them."""

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.verdicts import Verdict

MOST_UPKEEP_KBIT, MOST_LOADED_KBIT, MOST_LOADED_TIMES = 20, 200, 20
LEAST_SERVED, MOST_LOST = 0.9999, 0.01
MOST_PERIODS, MOST_TAKINGS = 5, 1.2
LEAST_USEFUL = 0.9
LEAST_OF_PLACED, LEAST_OF_FREE = 0.7, 0.5
LEAST_TIMES_REAL, MOST_MEMORY_GIB = 20, 8
JUDGED_NODES, LARGEST_NODES = 10_000, 100_000
"""The size at which throughput and speed are judged, and the size at which memory is."""


def verdicts(results: Mapping[str, Any]) -> Iterator[Verdict]:
    """Verdicts on all sizes and parts in the results. `results`: for each part, figures by the number of nodes."""
    for nodes, figures in results.get("days", {}).items():
        yield from _days(int(nodes), figures)
    for nodes, events in results.get("events", {}).items():
        for name, figures in events.items():
            yield from _EVENTS[name](f"{int(nodes):,} nodes", figures)
    for nodes, figures in results.get("train", {}).items():
        yield from _training(int(nodes), figures)


def _days(nodes: int, found: Mapping[str, Any]) -> Iterator[Verdict]:
    of = f"{nodes:,} volunteers, {found['hours']:g} h"
    machine = found["machine"]
    yield from _upkeep(of, found["upkeep"])
    yield Verdict(
        "… share of experts served: at any moment, at the worst one",
        f"{LEAST_SERVED}",
        f"{found['served']:.5f}, {found['least_served']:.4f}",
        found["served"] >= LEAST_SERVED,
    )
    yield _at_most("… share of updates lost", MOST_LOST, found["updates_lost_share"], "{:.4f}")
    yield Verdict("… experts that a node takes in a day", "", f"{found['takings_per_node_day']:.1f}")
    yield Verdict("… states sent, kbit/s a node", "", f"{found['transfer_kbit_per_s']:,.0f}")
    times, gib = machine["times_real_time"], machine["memory_bytes"] / 2**30
    yield Verdict(
        "… simulated time per real time",
        f"{LEAST_TIMES_REAL}" if nodes == JUDGED_NODES else "",
        f"{times:.1f}",
        times >= LEAST_TIMES_REAL if nodes == JUDGED_NODES else None,
    )
    yield Verdict(
        "… memory, GiB",
        f"{MOST_MEMORY_GIB}" if nodes == LARGEST_NODES else "",
        f"{gib:.1f}",
        gib <= MOST_MEMORY_GIB if nodes == LARGEST_NODES else None,
    )


def _upkeep(of: str, upkeep: Mapping[str, float]) -> Iterator[Verdict]:
    mean, most = upkeep["mean_kbit_per_s"], upkeep["most_kbit_per_s"]
    yield _at_most(f"{of}: upkeep of a node, kbit/s both ways", MOST_UPKEEP_KBIT, mean)
    yield Verdict(
        "… of the most loaded, kbit/s; times the mean",
        f"{MOST_LOADED_KBIT}; {MOST_LOADED_TIMES}",
        f"{most:.0f}; {most / mean:.1f}",
        most <= MOST_LOADED_KBIT and most <= MOST_LOADED_TIMES * mean,
    )


def _tenth_dies(of: str, found: Mapping[str, Any]) -> Iterator[Verdict]:
    periods = found["served_again_periods"]
    yield Verdict(
        f"a tenth of {of} dies, {found['vacant']} experts with it: periods until all are served",
        f"{MOST_PERIODS}",
        "never" if periods is None else f"{periods:.1f}",
        periods is not None and periods <= MOST_PERIODS,
    )
    yield _at_most("… experts taken for each lost replica", MOST_TAKINGS, found["takings_per_lost"], "{:.2f}")


def _flash_crowd(of: str, found: Mapping[str, Any]) -> Iterator[Verdict]:
    yield Verdict(
        f"{found['joined']:,} join {of} in ten minutes: serve within 2 minutes; half and 90% of them after",
        f"{LEAST_USEFUL}",
        f"{found['useful_within']:.3f}; {found['useful_after_s_median']:.0f} s, "
        f"{found['useful_after_s_p90']:.0f} s",
        found["useful_within"] >= LEAST_USEFUL,
    )


def _partition(of: str, found: Mapping[str, Any]) -> Iterator[Verdict]:
    yield Verdict(
        f"40% of {of} cut off: experts served in either part at the end; at worst after it healed",
        "",
        f"{found['served_in_larger']:.4f}, {found['served_in_smaller']:.4f}; "
        f"{found['least_served_after']:.4f}",
    )
    yield Verdict(
        "… experts taken meanwhile, and afterwards",
        "",
        f"{found['takings_while_parted']:,}, {found['takings_after']:,}",
    )


def _founder_gone(of: str, found: Mapping[str, Any]) -> Iterator[Verdict]:
    yield Verdict(
        f"the founder and the bootstraps of {of} gone: experts served at the end; newcomers that serve",
        "",
        f"{found['served_at_the_end']:.4f}; {found['useful']:.3f} of {found['joined']:,}",
    )


def _bad_release(of: str, found: Mapping[str, Any]) -> Iterator[Verdict]:
    yield Verdict(
        f"a fifth of {of} dies and restarts in five minutes: experts served at worst; updates lost, of a day's",
        "",
        f"{found['least_served']:.4f}; {found['updates_lost_of_a_day']:.5f}",
    )
    yield Verdict("… experts taken for each lost replica", "", f"{found['takings_per_lost']:.2f}")


def _training(nodes: int, found: Mapping[str, Any]) -> Iterator[Verdict]:
    is_judged, replicas = nodes == JUDGED_NODES, found["replicas"]
    yield from _upkeep(f"{nodes:,} nodes, {found['experts']} experts", found["upkeep"])
    yield Verdict(
        "… replicas of an expert: fewest, of nine tenths at least, most",
        "",
        f"{replicas['fewest']}, {replicas['p10']:.0f}, {replicas['most']}",
    )
    placed, free = found["of_placed"], found["of_free"]
    yield Verdict(
        f"{found['trainers']:,} trainers with {nodes:,} nodes: tokens/s",
        "",
        f"{found['tokens_per_s']:,.0f}",
    )
    yield Verdict(
        "… of the most that the replicas as placed could do, and placed freely",
        f"{LEAST_OF_PLACED}, {LEAST_OF_FREE}" if is_judged else "",
        f"{placed:.2f}, {free:.2f}",
        (placed >= LEAST_OF_PLACED and free >= LEAST_OF_FREE) if is_judged else None,
    )
    yield Verdict(
        "… what a trainer gets beside one with 100 times the load, of before",
        "",
        f"{found['others_with_heavy']:.2f}",
    )


def _at_most(what: str, most: float, value: float, form: str = "{:.1f}") -> Verdict:
    return Verdict(what, f"{most:g}", form.format(value), value <= most)


_EVENTS = {
    "tenth_dies": _tenth_dies,
    "flash_crowd": _flash_crowd,
    "partition": _partition,
    "founder_gone": _founder_gone,
    "bad_release": _bad_release,
}
