"""One scenario with real processes on this machine: throughput, adoption times and bytes.

    python -m benchmarks.internet.validation [--json FILE] [--nodes N] [--trainers N]

It takes about six minutes on two cores, and as much memory as so many nodes: 150 MB each.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path

import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks.internet.validation.measured import Measured
from benchmarks.internet.validation.real_swarm import RealSwarm
from benchmarks.internet.validation.scenario import Scenario
from peer.errors import UserError
from talkoot.signals import Stopped, run_until_stopped

MOST_BUSY = 0.7
"""Of the processor, in training. Beyond it waiting for the processor counts as waiting for experts."""


async def run_real(scenario: Scenario, console: Console) -> Measured:
    """Raises UserError."""
    began = time.monotonic()

    def tell(news: str) -> None:
        console.print(f"{time.monotonic() - began:5.1f} s  {news}")

    with tempfile.TemporaryDirectory(prefix="talkoot-validation-") as folder:
        swarm = RealSwarm(scenario, Path(folder), tell)
        try:
            return await swarm.run()
        finally:
            await swarm.stop()


def show(real: Measured, console: Console) -> None:
    table = Table("figure", "processes", title="a swarm on this machine")
    for name, value in real.figures().items():
        table.add_row(name.replace("_", " "), f"{value:.3g}")
    console.print(table)
    busy = real.training.processor
    console.print(
        f"processor in training: {busy:.0%} by these processes, {real.training.machine:.0%} in all"
        + ("" if busy <= MOST_BUSY else f"; more than {MOST_BUSY:.0%}: the figures are not to be trusted")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--nodes", type=int, default=Scenario.nodes)
    parser.add_argument("--trainers", type=int, default=Scenario.trainers)
    options = parser.parse_args()
    console = Console(width=120)
    scenario = Scenario(nodes=options.nodes, trainers=options.trainers)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            real = runner.run(run_until_stopped(run_real(scenario, console)))
    except Stopped as stopped:
        sys.exit(stopped.exit_status)
    except UserError as error:
        sys.exit(f"error: {error}")
    show(real, console)
    if options.json:
        values = {"scenario": scenario.values(), "processes": real.figures()}
        options.json.write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    main()
