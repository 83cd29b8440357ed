"""Discovery: what finding the top-4 live experts costs, from a hundred nodes to a million.

    python -m benchmarks.discovery [--quick] [--nodes 100,1000,10000] [--rtt-ms 100] [--json FILE] [--plot FILE]

There are three parts. Simulated swarms run the real registry, directory, beam search and DHT nodes in one process, in
virtual time (`benchmarks.simulated_p2p`, `benchmarks.simulated_swarm`). A call costs one round trip, and opening a
connection costs nothing. For 10⁵ and 10⁶ nodes the same search walks over randomly drawn routing tables
(`benchmarks.kademlia_walk`). Finally, Talkoot and hivemind.moe choose among real peers (`benchmarks.discovery_real`);
`--quick` and `--no-real` leave that out.

Hops are the rounds of questions, each asked at the same time, until the look-up has the value.
"""

import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import discovery_real, kademlia_walk
from benchmarks.command import command_parser, write_figures
from benchmarks.discovery_simulated import BRIEF, Effort, measure
from benchmarks.simulated_p2p import Link

PAPER_MS = {100: 317, 1000: 528, 10000: 764}
"""Ryabinin & Gusev 2020: choosing the top 4 in their simulated DHT."""
WALKED = (100_000, 1_000_000)
_WALKS = 300
_REAL_NODES = 16


def hop_limit(nodes: int) -> float:
    return math.log2(nodes) / 3 + 1.5


def compare(nodes: int) -> dict[str, Any]:
    """Both sides with the same number of real peers."""
    sides = {side: discovery_real.run_pair(side, nodes) for side in ("talkoot", "hivemind")}
    medians = {
        side: {kind: statistics.median(times) for kind, times in result.items()}
        for side, result in sides.items()
    }
    ours, theirs = medians["talkoot"], medians["hivemind"]
    ratios = {
        "cold_times_faster": theirs["cold_ms"] / ours["cold_ms"],
        "warm_times_faster": theirs["warm_ms"] / ours["warm_ms"],
    }
    return {"nodes": nodes, **medians, **ratios}


def verdicts(results: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """For each target: its text, the measured figure, and whether it was reached."""
    found: list[tuple[str, str, bool]] = []

    def judge(target: str, figure: float, unit: str, reached: bool) -> None:
        found.append((target, f"{figure:.2f} {unit}".strip(), reached))

    for result in (*results["simulated"], *results["walked"]):
        nodes, hops = result["nodes"], result["hops_mean"]
        judge(f"hops at {nodes:,} nodes ≤ {hop_limit(nodes):.2f}", hops, "", hops <= hop_limit(nodes))
    for result in results["simulated"]:
        nodes, warm = result["nodes"], result["cold_64"]["warm_cpu_ms"]
        judge(f"warm top-4 of 64 rows at {nodes:,} nodes < 5 ms", warm, "ms", warm < 5)
        recall = result["recall"]["30"]
        judge(f"recall at {nodes:,} nodes, 30% dead and expired = 1", recall, "", recall == 1.0)
        for kind, rows in (
            ("all_refused", "4 answers, dead refuse"),
            ("all_silent", "4 answers, dead silent"),
            ("enough_silent", "2 answers, dead silent"),
        ):
            part = result["replaced_30"][kind]
            judge(f"rows with {rows}, {nodes:,} nodes, 30% just dead = 1", part, "", part == 1.0)
        if nodes == 10_000:
            cold = result["cold_1"]["chosen_ms_mean"]
            judge("cold top-4 at 10,000 nodes < 500 ms", cold, "ms", cold < 500)
        if nodes == 1_000:
            crawl, largest = result["crawl"], result["crawl"]["largest_value_bytes"] / 1000
            judge("crawl of 1,000 nodes < 10 s", crawl["seconds"], "s", crawl["seconds"] < 10)
            judge("largest value of the crawl < 32 KB", largest, "KB", largest < 32)
    if "real" in results:
        cold, warm = results["real"]["cold_times_faster"], results["real"]["warm_times_faster"]
        judge("× hivemind.moe, cold ≥ 5", cold, "×", cold >= 5)
        judge("× hivemind.moe, warm ≥ 20", warm, "×", warm >= 20)
    return found


def show(results: Mapping[str, Any], console: Console) -> None:
    console.print(_sizes(results))
    if "real" in results:
        real = results["real"]
        table = Table(title=f"{real['nodes']} real peers, 64 rows, top-4 of 256 experts, ms (median)")
        for column in ("", "cold", "warm"):
            table.add_column(column, justify="right")
        for side in ("talkoot", "hivemind"):
            table.add_row(side, f"{real[side]['cold_ms']:.1f}", f"{real[side]['warm_ms']:.2f}")
        console.print(table)
    table = Table(title="targets")
    for column in ("target", "figure", ""):
        table.add_column(column)
    for target, figure, reached in verdicts(results):
        table.add_row(target, figure, "reached" if reached else "missed")
    console.print(table)


def _sizes(results: Mapping[str, Any]) -> Table:
    sizes = [*results["simulated"], *results["walked"]]
    table = Table(title=f"look-ups and choices, {results['rtt_ms']:.0f} ms round trips")
    table.add_column("nodes")
    for size in sizes:
        table.add_column(f"{size['nodes']:,}", justify="right")
    rows: Sequence[tuple[str, Callable[[Mapping[str, Any]], str]]] = (
        ("hops, mean (max)", lambda r: f"{r['hops_mean']:.2f} ({r['hops_max']})"),
        ("calls for a look-up", lambda r: f"{r['calls_mean']:.1f}"),
        ("a look-up, ms (max)", lambda r: f"{r['lookup_ms_mean']:.0f} ({r['lookup_ms_max']:.0f})"),
        ("paper's top-4 choice, ms", lambda r: f"{PAPER_MS[r['nodes']]}"),
        ("cold top-4 of 1 row, ms (max)", lambda r: _cold(r["cold_1"], "chosen")),
        ("… with addresses", lambda r: _cold(r["cold_1"], "callable")),
        ("… calls", lambda r: f"{r['cold_1']['calls_mean']:.0f}"),
        ("cold top-4 of 64 rows, ms (max)", lambda r: _cold(r["cold_64"], "chosen")),
        ("… with addresses", lambda r: _cold(r["cold_64"], "callable")),
        ("… calls", lambda r: f"{r['cold_64']['calls_mean']:.0f}"),
        ("warm top-4 of 64 rows, CPU ms", lambda r: f"{r['cold_64']['warm_cpu_ms']:.2f}"),
        ("recall, none dead", lambda r: f"{r['recall']['0']:.4f}"),
        ("recall, 10% dead and expired", lambda r: f"{r['recall']['10']:.4f}"),
        ("recall, 30% dead and expired", lambda r: f"{r['recall']['30']:.4f}"),
        ("dead among choices, 30% just dead", lambda r: f"{r['replaced_30']['dead_choices']:.3f}"),
        ("rows with 4 answers, dead refuse", lambda r: f"{r['replaced_30']['all_refused']:.3f}"),
        ("rows with 4 answers, dead silent", lambda r: f"{r['replaced_30']['all_silent']:.3f}"),
        ("rows with 2 answers, dead silent", lambda r: f"{r['replaced_30']['enough_silent']:.3f}"),
        ("a look-up, 30% just dead, ms", lambda r: f"{r['lookups_30_dead']['lookup_ms_mean']:.0f}"),
        ("upkeep, kbit/s (a round each … s)", lambda r: _upkeep(r["upkeep"])),
        ("… of a node with all 256 experts", lambda r: _upkeep(r["upkeep_of_all"])),
        ("crawl, s", lambda r: f"{r['crawl']['seconds']:.2f}"),
    )
    for name, text in rows:
        table.add_row(name, *(_or_blank(text, size) for size in sizes))
    return table


def _upkeep(figures: Mapping[str, float]) -> str:
    return f"{figures['kbit_per_s']:.0f} ({figures['period_s']:.0f})"


def _cold(choices: Mapping[str, float], what: str) -> str:
    return f"{choices[f'{what}_ms_mean']:.0f} ({choices[f'{what}_ms_max']:.0f})"


def _or_blank(text: Callable[[Mapping[str, Any]], str], size: Mapping[str, Any]) -> str:
    try:
        return text(size)
    except KeyError:  # not measured at this size
        return ""


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Plots hops and times against the number of nodes. Needs matplotlib, from the extra `plot`."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    sizes = [*results["simulated"], *results["walked"]]
    nodes = [size["nodes"] for size in sizes]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    left.plot(nodes, [size["hops_mean"] for size in sizes], "o-", label="mean")
    left.plot(nodes, [size["hops_max"] for size in sizes], ".:", label="most")
    left.plot(nodes, [hop_limit(n) for n in nodes], "--", color="gray", label="log₂(N) / 3 + 1.5")
    left.set(xscale="log", xlabel="nodes", ylabel="hops of a look-up", ylim=0)
    simulated = results["simulated"]
    for key, label in (("chosen", "cold top-4"), ("callable", "… with addresses")):
        times = [size["cold_1"][f"{key}_ms_mean"] for size in simulated]
        right.plot([size["nodes"] for size in simulated], times, "o-", label=label)
    right.plot(list(PAPER_MS), list(PAPER_MS.values()), "--", color="gray", label="the paper's")
    right.set(xscale="log", xlabel="nodes", ylabel=f"ms, at {results['rtt_ms']:.0f} ms round trips", ylim=0)
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = command_parser(__doc__, "100 and 1,000 nodes, under 60 seconds")
    parser.add_argument("--nodes", default=None, help="sizes to simulate, separated by commas")
    parser.add_argument("--rtt-ms", type=float, default=100.0, help="round trip between any two peers")
    parser.add_argument("--loss", type=float, default=0.002, help="part of the calls that get no answer")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-real", action="store_true", help="without the comparison on real peers")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw hops and times there, as PNG")
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # peers that die say so, by the hundred
    console = Console(width=130)
    link = Link(options.rtt_ms / 1000, loss=options.loss)
    sizes = [
        int(n) for n in (options.nodes or ("100,1000" if options.quick else "100,1000,10000")).split(",")
    ]
    walks = _WALKS // 3 if options.quick else _WALKS
    effort = BRIEF if options.quick else Effort()
    results: dict[str, Any] = {"rtt_ms": options.rtt_ms, "simulated": [], "walked": []}
    for nodes in sizes:
        with console.status(f"simulating {nodes:,} nodes"):
            results["simulated"].append(measure(nodes, link, options.seed, effort))
    for nodes in WALKED:
        with console.status(f"walking among {nodes:,} nodes"):
            results["walked"].append(kademlia_walk.measure(nodes, walks, options.seed))
    if not options.quick and not options.no_real:
        with console.status(f"choosing on {_REAL_NODES} real peers"):
            results["real"] = compare(_REAL_NODES)
    show(results, console)
    write_figures(options.json, results)
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
