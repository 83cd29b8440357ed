"""A swarm of thousands of volunteers on home lines, simulated with the real code.

    python -m benchmarks.internet [--nodes N,N] [--only PART...] [--hours H] [--quick] [--json FILE] [--plot DIR]

days    volunteers come and go as in published measurements: what is served and lost, and what upkeep costs
events  a tenth dies, a flash crowd, a partition, founder and bootstraps gone, a fifth restarts: each in its own swarm
train   a swarm at rest with at most 256 experts, so with many replicas: its upkeep; then, with a trainer for every ten
        nodes, throughput against the most that is possible; also with one that trains 100 times as much as the others

Placement, claims, announcements, membership and averaging partners are the product's own code, in virtual time. Links,
computing and the DHT below look-ups are modelled ([Scale](docs/scale.md)). All figures depend only on the seed, except
those of the machine. Parts that are not run are taken from the JSON file, if it is there. The file is written after
each simulated half hour and each event.
"""

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.apart import end_in_order_when_stopped
from benchmarks.command import command_parser, write_figures
from benchmarks.internet import days, events
from benchmarks.internet.on_paper import table_of_comparisons
from benchmarks.internet.plots import draw
from benchmarks.internet.report import verdicts
from benchmarks.verdicts import table_of

_HOURS = 48.0
_HOURS_OF_LARGE, _LARGE = 4.0, 100_000
_MOST_FOR_EVENTS = 10_000
_QUICK_NODES, _QUICK_HOURS = (24,), 0.5
# hashes of text, which differ from run to run, change the order in which peers in sets are read
_ENVIRONMENT = {"PYTHONHASHSEED": "0"}


def play_days(nodes: int, hours: float | None, seed: int, quick: bool) -> Iterator[dict[str, Any]]:
    usual = _QUICK_HOURS if quick else _HOURS_OF_LARGE if nodes >= _LARGE else _HOURS
    return days.play(nodes, hours or usual, seed)


def play_events(nodes: int, hours: float | None, seed: int, quick: bool) -> Iterator[dict[str, Any]]:
    if nodes <= _MOST_FOR_EVENTS:
        played = {}
        for name in events.EVENTS:
            played[name] = events.play(name, nodes, seed, events.QUICK if quick else events.FULL)
            yield played


def play_training(nodes: int, hours: float | None, seed: int, quick: bool) -> Iterator[dict[str, Any]]:
    if nodes <= _MOST_FOR_EVENTS:
        yield events.train(nodes, seed, events.QUICK if quick else events.FULL)


PARTS: dict[str, Callable[[int, float | None, int, bool], Iterator[dict[str, Any]]]] = {
    "days": play_days,
    "events": play_events,
    "train": play_training,
}
"""The parts of a run. Each yields its figures, or those so far and then better ones."""


def main() -> None:
    parser = command_parser(__doc__, "a small swarm, under 90 seconds")
    parser.add_argument("--nodes", metavar="N,N", help="sizes; 1000,10000,100000, or 24 with --quick")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--hours", type=float, help="of days; 48, from 100,000 nodes on 4")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw curves there, as PNG")
    options = parser.parse_args()
    if options.hours is not None and options.hours * 3600 <= days.WARM_UP_S:
        parser.error(f"--hours: more than {days.WARM_UP_S / 3600:.2g}, after which days begin to be measured")
    if sys.flags.hash_randomization:
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **_ENVIRONMENT})  # noqa: S606 the same command
    end_in_order_when_stopped()
    logging.disable(logging.WARNING)  # Nodes that fail would log thousands of warnings.
    console = Console(width=130)
    usual = _QUICK_NODES if options.quick else (1_000, 10_000, 100_000)
    sizes = [int(each) for each in options.nodes.split(",")] if options.nodes else usual
    results: dict[str, Any] = {}
    if options.json and options.json.exists():
        results = json.loads(options.json.read_text())
    for nodes in sizes:
        for part, play in PARTS.items():
            if not options.only or part in options.only:
                with console.status(f"{part} of {nodes:,}") as status:
                    for figures in play(nodes, options.hours, options.seed, options.quick):
                        results.setdefault(part, {})[str(nodes)] = figures
                        write_figures(options.json, results)
                        status.update(_progress(part, nodes, figures))
    console.print(table_of("a swarm of volunteers", verdicts(results)))
    console.print(table_of_comparisons(results))
    if options.plot:
        for path in draw(results, options.plot):
            console.print(f"wrote {path}")


def _progress(part: str, nodes: int, figures: dict[str, Any]) -> str:
    if "machine" not in figures:
        return f"{part} of {nodes:,}"
    speed = figures["machine"]["times_real_time"]
    return f"{part} of {nodes:,}: {figures['hours']:.1f} h so far, {speed:.1f} times real time"


if __name__ == "__main__":
    main()
