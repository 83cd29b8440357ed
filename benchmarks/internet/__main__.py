"""Simulates a swarm at internet scale in virtual time: `python -m benchmarks.internet`."""

import argparse
import resource
import time

from benchmarks.internet.nodes import InternetSwarm, SwarmPlan, simulated
from benchmarks.internet.world import UPKEEP, HomeLine
from benchmarks.simulated_swarm import grid_of
from dht.manifest import Manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=100)
    parser.add_argument("--experts", type=int, default=0, help="in the swarm; 0: half as many as nodes")
    parser.add_argument("--hours", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    experts = options.experts or max(4, options.nodes // 2)
    manifest = Manifest.model_validate(
        {"name": "simulated", "model": {"layers": 1}, "experts": {"grid": grid_of(experts)}}
    )
    with simulated(options.seed) as world:
        swarm = InternetSwarm(world, SwarmPlan(manifest))
        rng = world.rng("start")
        for _ in range(options.nodes):
            world.loop.call_later(rng.uniform(0, 60), swarm.join, HomeLine(nat=rng.random() < 0.6), 1)
        ends, minute = 3600 * options.hours, 60.0
        while world.time() < ends:
            began, since = time.perf_counter(), world.time()
            before = world.accounts.totals()
            world.run(min(minute, ends - since))
            took = time.perf_counter() - began
            passed = world.time() - since
            after = world.accounts.totals()
            upkeep = 8 * sum(after[p] - before[p] for p in UPKEEP) / passed / max(1, world.living) / 1000
            print(
                f"{world.time():8.0f} s: {world.living} live, {swarm.share_served():.4f} served, "
                f"upkeep {upkeep:.1f} kbit/s, {swarm.takings} takings, {passed / took:.1f} times real time, "
                f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB, {len(swarm.faults)} faults"
            )


if __name__ == "__main__":
    main()
