"""Links between homes: Talkoot and hivemind.moe on the same emulated links, in one run.

(1) A link of 100 Mbit/s and 20 ms, large batches: how much of it carries payload, and what int8 gains. (2) Samples per
second at delays from none to a second, on experts that compute. (3) The same with every tenth call failing.

    python -m benchmarks.wan [--quick] [--json FILE] [--in-flight N]

Delays are there and back, as `ping` shows them. Gate and DHT on both sides, and all their traffic over the links; each
node is behind a link of its own. Every contender runs in a process of its own, one after another.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.apart import run_apart

LINK, LINK_MBIT = "100mbit,20ms", 100.0
FULL_IN_FLIGHT = 4
"""Batches under way, in (1): a single one can't fill both directions."""
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
_BAR = 40


def run(contender: str, case: str, options: argparse.Namespace, *flags: str) -> dict[str, Any]:
    arguments = [contender, case, "--seconds", str(options.seconds), *flags]
    steps = 3 * (len(options.delays) + 1)
    limit_s = _START_AND_STOP_S + len(options.delays) * options.seconds + steps * _SLOWEST_STEP_S
    return run_apart("benchmarks.wan_contenders", arguments, limit_s)


def measure_full(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """hivemind.moe is left out of a quick run: here it needs most of the minute."""
    flags = ["--link", LINK, "--in-flight", str(FULL_IN_FLIGHT)]
    if options.quick:
        flags += ["--seconds", "2"]  # less is not even a step of each batch
    with console.status(f"{LINK}: talkoot"):
        results = run("talkoot", "full", options, *flags)
    if not options.quick:
        with console.status(f"{LINK}: hivemind"):
            results["hivemind"] = run("hivemind", "full", options, *flags)["fp32"]
    results["int8_vs_fp32"] = results["int8"]["samples_per_s"] / results["fp32"]["samples_per_s"]
    for way in ("up", "down"):
        results[f"payload_{way}_share"] = results["fp32"][f"{way}_mbit"] / LINK_MBIT
    return results


def measure_delays(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    results: dict[str, Any] = {}
    flags = [
        "--delays",
        ",".join(options.delays),
        "--failing",
        str(FAILING),
        "--in-flight",
        str(options.in_flight),
    ]
    flags += ["--nodes", "2", "--samples", "8"] if options.quick else ["--nodes", "4"]
    for contender in ("talkoot", "hivemind"):
        with console.status(f"delays and failing calls: {contender}"):
            measured = run(contender, "delay", options, *flags)
        whole, failing = measured["0_ms"], measured["failing"]
        for delay in options.delays:
            measured[f"at_{delay}_ms"] = measured[f"{delay}_ms"]["samples_per_s"] / whole["samples_per_s"]
        # a sample whose calls failed is less work: what experts were sent counts as well
        measured["at_10%_failing"] = min(failing[key] / whole[key] for key in ("samples_per_s", "up_mbit"))
        results[contender] = measured
    return results


def judged(name: str, value: float) -> str:
    if name not in TARGETS:
        return f"{value:.2f}"
    return f"{value:.2f} ({TARGETS[name]:.2f}) {'reached' if value >= TARGETS[name] else 'missed'}"


def show_full(results: dict[str, Any], console: Console) -> None:
    table = Table("", "samples/s", "up, Mbit/s", "down, Mbit/s", title=f"full link: {LINK}")
    for name in ("fp32", "int8", "hivemind"):
        if (measured := results.get(name)) is None:
            continue
        table.add_row(name, *(f"{measured[key]:.1f}" for key in ("samples_per_s", "up_mbit", "down_mbit")))
    console.print(table)
    console.print("Mbit/s: of Talkoot the tensors alone; of hivemind all that the link carried")
    for name in ("payload_up_share", "payload_down_share", "int8_vs_fp32"):
        console.print(f"{name.replace('_', ' ')} (target): {judged(name, results[name])}")


def show_delays(results: dict[str, Any], options: argparse.Namespace, console: Console) -> None:
    table = Table("", title=f"delays, {options.in_flight} batches in flight: samples/s, and of that without")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="the least of it, in short runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--seconds", type=float, default=None, help="measured seconds of each figure")
    parser.add_argument("--in-flight", type=int, default=1, help="batches under way in (2) and (3)")
    options = parser.parse_args()
    options.seconds = options.seconds or (0.5 if options.quick else 15.0)
    options.delays = QUICK_DELAYS if options.quick else DELAYS
    console = Console(width=150)
    results = {"full": measure_full(options, console), "delay": measure_delays(options, console)}
    results["in_flight"] = options.in_flight
    show_full(results["full"], console)
    show_delays(results["delay"], options, console)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
