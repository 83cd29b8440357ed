"""The simulation against reality: one scenario with real processes on this machine, and in simulated time.

    python -m benchmarks.internet.validation [--only processes|simulation] [--runs N] [--json FILE]

Throughput, adoption times and bytes should differ by less than a fifth. The processes take about eight minutes on two
cores, and 150 MB of memory for each node. The simulation runs several times with other random events; the mean, the
minimum and the maximum are shown.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table

from benchmarks.apart import end_in_order_when_stopped
from benchmarks.command import write_figures
from benchmarks.internet.validation.measured import COMPARED, MOST_APART, Figures, Measured, ratio
from benchmarks.internet.validation.real_swarm import RealSwarm
from benchmarks.internet.validation.scenario import Scenario
from benchmarks.internet.validation.simulated_swarm import simulate
from benchmarks.scratch import scratch_folder
from peer.errors import UserError
from peer.platform.loop import new_event_loop
from talkoot.signals import Stopped, run_until_stopped

MOST_BUSY = 0.7
"""The largest share of the processor that may be used in training. Above it, waiting for the processor would count as
waiting for experts.
"""


async def run_processes(scenario: Scenario, console: Console) -> Measured:
    """Runs the scenario with real processes. Raises UserError."""
    began = time.monotonic()

    def tell(news: str) -> None:
        console.print(f"{time.monotonic() - began:5.1f} s  {news}")

    with scratch_folder() as folder:
        swarm = RealSwarm(scenario, folder, tell)
        try:
            return await swarm.run()
        finally:
            await swarm.stop()


def show(processes: Figures | None, simulated: Sequence[Figures], console: Console) -> None:
    table = Table("figure", "processes", "simulation", "least", "most", "ratio", "")
    for figure in simulated[0] if processes is None else processes:
        values = [run[figure] for run in simulated]
        cells = [f"{processes[figure]:.4g}" if processes else ""]
        cells += [f"{each:.4g}" for each in (fmean(values), min(values), max(values))] if values else [""] * 3
        if processes and values:
            share = ratio(figure, processes, simulated)
            reached = "reached" if abs(share - 1) <= MOST_APART else "missed"
            cells += [f"{share:.2f}", reached if figure in COMPARED else ""]
        table.add_row(figure.replace("_", " "), *cells)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", choices=("processes", "simulation"), help="one side alone")
    parser.add_argument("--runs", type=int, default=5, help="of the simulation")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--nodes", type=int, default=Scenario.nodes)
    parser.add_argument("--trainers", type=int, default=Scenario.trainers)
    options = parser.parse_args()
    end_in_order_when_stopped()
    console = Console(width=120)
    scenario = Scenario(nodes=options.nodes, trainers=options.trainers)
    processes: dict[str, float] | None = None
    if options.only != "simulation":
        try:
            with asyncio.Runner(loop_factory=new_event_loop) as runner:
                real = runner.run(run_until_stopped(run_processes(scenario, console)))
        except Stopped as stopped:
            sys.exit(stopped.exit_status)
        except UserError as error:
            sys.exit(f"error: {error}")
        processes = real.figures()
        busy = real.training.processor
        console.print(
            f"processor in training: {busy:.0%} by these processes, {real.training.machine:.0%} in all"
            + ("" if busy <= MOST_BUSY else f"; more than {MOST_BUSY:.0%} distorts the figures")
        )
    runs = 0 if options.only == "processes" else options.runs
    simulated = [simulate(scenario, seed).figures() for seed in range(runs)]
    show(processes, simulated, console)
    values = {"scenario": scenario.values(), "processes": processes, "simulation": simulated}
    write_figures(options.json, values)


if __name__ == "__main__":
    main()
