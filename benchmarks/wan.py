"""Links between homes: Talkoot and hivemind.moe on the same emulated links, in one run.

(1) A link of 100 Mbit/s and 20 ms, large batches: how much of it carries payload, and what int8 and int4 gain. (2)
Samples per second at delays from none to a second, on experts that compute. (3) The same with every tenth call failing.

    python -m benchmarks.wan [--quick] [--json FILE] [--plot FILE] [--in-flight N|auto]

Delays are round trips, as `ping` shows them. Both sides have a gate and a DHT, and all their traffic goes over the
links; each node is behind a link of its own. In (2) and (3) Talkoot keeps as many batches in flight as its trainer's
`--in-flight auto` does; hivemind.moe has nothing like it, and keeps one. Every contender runs in a process of its own,
and only one measures at a time.
"""

import argparse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.apart import end_in_order_when_stopped, run_apart
from benchmarks.command import command_parser, write_figures
from benchmarks.scratch import scratch_folder

LINK, LINK_MBIT = "100mbit,20ms", 100.0
FULL_IN_FLIGHT = 4
"""Batches in flight in (1): a single batch cannot fill both directions."""
DELAYS = ("0", "50", "200", "1000")
QUICK_DELAYS = ("0", "200")
FAILING = 0.1
TARGETS = {
    "payload_up_share": 0.90,
    "payload_down_share": 0.90,
    "int8_vs_fp32": 3.5,
    "at_200_ms": 0.95,
    "at_1000_ms": 0.80,
    "at_10%_failing": 0.85,
}
_START_AND_STOP_S = 150.0
_SLOWEST_STEP_S = 10.0
_WARM_STEPS = 9
_BAR = 40


def run(contender: str, case: str, options: argparse.Namespace, *flags: str) -> dict[str, Any]:
    arguments = [contender, case, "--seconds", str(options.seconds), *flags]
    figures = len(options.delays) + 1
    limit_s = _START_AND_STOP_S + figures * (options.seconds + _WARM_STEPS * _SLOWEST_STEP_S)
    return run_apart("benchmarks.wan_contenders", arguments, limit_s)


def contenders(options: argparse.Namespace) -> dict[str, tuple[str, str, list[str]]]:
    """The contender, case and flags of each measurement, by name. hivemind.moe on a full link takes most of a minute,
    so it is not part of a quick run.
    """
    full = ["--link", LINK, "--in-flight", str(FULL_IN_FLIGHT)]
    delay = ["--delays", ",".join(options.delays), "--failing", str(FAILING)]
    delay += ["--nodes", "2", "--samples", "8"] if options.quick else ["--nodes", "4"]
    found = {
        "full": ("talkoot", "full", [*full, *(("--seconds", "2") if options.quick else ())]),
        "full_hivemind": ("hivemind", "full", full),
        "talkoot": ("talkoot", "delay", [*delay, "--in-flight", str(options.in_flight)]),
        "hivemind": ("hivemind", "delay", [*delay, "--in-flight", "1"]),
    }
    if options.quick:
        del found["full_hivemind"]
    return found


def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Runs all contenders. In a quick run, all start at the same time and take turns."""
    found = contenders(options)
    if not options.quick:
        results = {}
        for name, (contender, case, flags) in found.items():
            with console.status(name):
                results[name] = run(contender, case, options, *flags)
        return results
    with (
        console.status("all"),
        scratch_folder() as turns,
        ThreadPoolExecutor(len(found)) as threads,
    ):
        runs = {
            name: threads.submit(
                run, contender, case, options, *flags, "--turns", str(turns), "--contenders", str(len(found))
            )
            for name, (contender, case, flags) in found.items()
        }
        return {name: each.result() for name, each in runs.items()}


def add_shares(measured: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The results of both cases, together with the ratios that the targets are about."""
    full = measured["full"]
    if "full_hivemind" in measured:
        full["hivemind"] = measured["full_hivemind"]["fp32"]
    for codec in ("int8", "int4"):
        full[f"{codec}_vs_fp32"] = full[codec]["samples_per_s"] / full["fp32"]["samples_per_s"]
    for way in ("up", "down"):
        full[f"payload_{way}_share"] = full["fp32"][f"{way}_mbit"] / LINK_MBIT
    delay = {name: measured[name] for name in ("talkoot", "hivemind")}
    for figures in delay.values():
        whole, failing = figures["0_ms"], figures["failing"]
        for ms in options.delays:
            figures[f"at_{ms}_ms"] = figures[f"{ms}_ms"]["samples_per_s"] / whole["samples_per_s"]
        # A sample whose calls failed is less work, so the experts that were called are counted as well.
        figures["at_10%_failing"] = min(failing[key] / whole[key] for key in ("samples_per_s", "up_mbit"))
    return {"full": full, "delay": delay, "in_flight": options.in_flight}


def judged(name: str, value: float) -> str:
    if name not in TARGETS:
        return f"{value:.2f}"
    return f"{value:.2f} ({TARGETS[name]:.2f}) {'reached' if value >= TARGETS[name] else 'missed'}"


def show_full(results: dict[str, Any], console: Console) -> None:
    table = Table("", "samples/s", "up, Mbit/s", "down, Mbit/s", title=f"full link: {LINK}")
    for name in ("fp32", "int8", "int4", "hivemind"):
        if (measured := results.get(name)) is None:
            continue
        table.add_row(name, *(f"{measured[key]:.1f}" for key in ("samples_per_s", "up_mbit", "down_mbit")))
    console.print(table)
    console.print("Mbit/s: of Talkoot the tensors alone; of hivemind all that the link carried")
    for name in ("payload_up_share", "payload_down_share", "int8_vs_fp32", "int4_vs_fp32"):
        console.print(f"{name.replace('_', ' ')} (target): {judged(name, results[name])}")


def show_delays(results: dict[str, Any], options: argparse.Namespace, console: Console) -> None:
    table = Table("", title=f"delays, {options.in_flight} in flight: samples/s, and of that without")
    for column in ("talkoot", "of 0 ms (target)", "hivemind", "of 0 ms", ""):
        table.add_column(column)
    rows = [(f"{delay} ms", f"{delay}_ms", f"at_{delay}_ms") for delay in options.delays]
    rows.append(("10% failing", "failing", "at_10%_failing"))
    most = max(results[c][key]["samples_per_s"] for c in results for _, key, _ in rows)
    for label, key, share in rows:
        ours, theirs = (results[c][key]["samples_per_s"] for c in ("talkoot", "hivemind"))
        bars = "\n".join("█" * round(_BAR * pace / most) or "▏" for pace in (ours, theirs))
        shares = judged(share, results["talkoot"][share]), f"{results['hivemind'][share]:.2f}"
        table.add_row(label, f"{ours:.1f}", shares[0], f"{theirs:.1f}", shares[1], bars)
    console.print(table)
    console.print(
        "upper bar: talkoot; lower bar: hivemind. With calls failing: the lower of samples and payload"
    )


def plot(results: dict[str, Any], delays: Sequence[str], path: Path) -> None:
    """Writes a PNG with the samples per second of both against the delay."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, label in (("talkoot", "Talkoot, in flight: auto"), ("hivemind", "hivemind.moe")):
        measured = results["delay"][name]
        axes.plot(
            [*map(int, delays)], [measured[f"{ms}_ms"]["samples_per_s"] for ms in delays], "o-", label=label
        )
    axes.set(xlabel="delay there and back, ms", ylabel="samples/s", ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, format="png")


def main() -> None:
    parser = command_parser(__doc__, "the least of it, in short runs")
    parser.add_argument("--seconds", type=float, default=None, help="measured seconds of each figure")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a PNG of the delays there")
    parser.add_argument(
        "--in-flight", default="auto", metavar="N|auto", help="Talkoot's batches under way in (2) and (3)"
    )
    options = parser.parse_args()
    options.seconds = options.seconds or (0.5 if options.quick else 25.0)
    options.delays = QUICK_DELAYS if options.quick else DELAYS
    end_in_order_when_stopped()
    console = Console(width=150)
    results = add_shares(measure(options, console), options)
    show_full(results["full"], console)
    show_delays(results["delay"], options, console)
    write_figures(options.json, results)
    if options.plot:
        plot(results, options.delays, options.plot)


if __name__ == "__main__":
    main()
