"""Samples per second of one mixture layer: Talkoot, hivemind.moe, and an upper bound, side by side in one run.

A step is forward, backward and an optimizer step of every called expert; top-4, hidden 256, gate and DHT on both sides,
fp32 on the wire, loopback (Talkoot's with TLS). The bound is the same compute in one process, with fused Adam, without
network.

ffn, transformer  16 experts on a 4 × 4 grid, each sample routed as a whole. The expert modules are hivemind's own on
                  all sides. The bound computes the forward pass again before each backward pass.
narrow            64 Transformer layers of width 64 on an 8 × 8 grid, behind a norm and projections, each token routed
                  by itself. hivemind.moe routes samples as a whole. The bound keeps its graphs, and is the fastest of
                  three (`moe_narrow.py`).

    python -m benchmarks.moe [--quick] [--json FILE]

Every contender runs in a process of its own, and they take turns, so that other work on the machine affects all alike.

The first rows are measured with one batch at a time, and the targets are for these. The rows "2 in flight" are measured
with two batches at a time for each contender: Talkoot and hivemind.moe from two threads, the bound with one core for
each batch or with all cores for one, whichever is faster.
"""

import argparse
import json
import statistics
from collections.abc import Collection, Mapping
from contextlib import ExitStack, suppress
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.apart import Standby, end_in_order_when_stopped
from benchmarks.command import command_parser, write_figures
from benchmarks.moe_contenders import CONTENDERS, IN_FLIGHT, SHAPES, stand_by

TARGETS = {
    "ffn_vs_hivemind": 15.0,
    "transformer_vs_hivemind": 2.3,
    "ffn_vs_bound": 0.80,
    "transformer_vs_bound": 0.95,
    "narrow_vs_bound": 0.70,
}
_LIMIT_S = 90.0
"""The longest time that a contender may take to start, or for one measurement."""

Results = dict[str, dict[str, Any] | float]


def compare(rounds: int, seconds: float, in_flight_cases: Collection[str], console: Console) -> Results:
    """Returns the figures of each contender by case, and their ratios."""
    results: Results = {}
    with ExitStack() as stack:
        standing = {}
        for name in CONTENDERS:
            standing[name] = Standby("benchmarks.moe", ["--contender", name], _LIMIT_S)
            stack.callback(standing[name].close)
        with console.status("starting all contenders"):
            for each in standing.values():
                with suppress(TimeoutError):
                    each.wait_until_started()
        for case in SHAPES:
            for in_flight in (False, True)[: 1 + (case in in_flight_cases)]:
                key = f"{case}_{IN_FLIGHT}_in_flight" if in_flight else case
                figures = _take_turns(standing, rounds, seconds, case, in_flight, console)
                if in_flight:  # The better of the bound's two ways.
                    figures["bound"] = max(figures["bound"], results[f"{case}_bound"], key=_rate)
                results |= {f"{key}_{name}": figure for name, figure in figures.items()}
                for rival in ("hivemind", "bound"):
                    results[f"{key}_vs_{rival}"] = _rate(figures["talkoot"]) / _rate(figures[rival])
    return results


def _take_turns(
    standing: Mapping[str, Standby], rounds: int, seconds: float, case: str, in_flight: bool, console: Console
) -> dict[str, Any]:
    """The median of each contender's rounds."""
    question = json.dumps({"case": case, "seconds": seconds, "in_flight": in_flight})
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in standing}
    for number in range(rounds):
        for name, contender in standing.items():
            with console.status(f"{case}, round {number + 1} of {rounds}: {name}"):
                runs[name].append(contender.ask(question))
    return {
        name: measured[-1] | {"samples_per_s": statistics.median(map(_rate, measured))}
        for name, measured in runs.items()
    }


def _rate(figure: Any) -> float:
    rate: float = figure["samples_per_s"]
    return rate


def show(results: Results, console: Console) -> None:
    table = Table(title="one mixture layer, forward + backward + optimizer step: samples/s")
    for column in ("", *CONTENDERS, "× hivemind (target)", "of the bound (target)"):
        table.add_column(column, justify="right")
    for case in SHAPES:
        for key in (case, f"{case}_{IN_FLIGHT}_in_flight"):
            if f"{key}_vs_bound" not in results:
                continue
            table.add_row(
                key.replace("_", " "),
                *(f"{_rate(results[f'{key}_{name}']):.1f}" for name in CONTENDERS),
                *(_judged(results, f"{key}_vs_{rival}") for rival in ("hivemind", "bound")),
            )
    console.print(table)


def _judged(results: Results, key: str) -> str:
    value, target = results[key], TARGETS.get(key)
    assert isinstance(value, float)
    if target is None:
        return f"{value:.2f}"
    return f"{value:.2f} ({target:.2f}) {'reached' if value >= target else 'missed'}"


def main() -> None:
    parser = command_parser(__doc__, "one short round, under 90 seconds")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=None, help="measured seconds of each run")
    options = parser.parse_args()
    if options.contender:
        stand_by(options.contender)
        return
    end_in_order_when_stopped()
    console = Console(width=150)
    if options.quick:
        results = compare(1, options.seconds or 1.0, ["ffn"], console)
    else:
        results = compare(3, options.seconds or 8.0, list(SHAPES), console)
    show(results, console)
    write_figures(options.json, results)


if __name__ == "__main__":
    main()
