"""A swarm in which nodes die, freeze and are cut off all the time, compared with a calm one of the same length.

There are eight nodes and two trainers, each a process, behind links on one machine. Every second expert has a second
replica. A schedule that follows from the seed kills nodes with SIGKILL, stops them politely, freezes and thaws them,
cuts them off and reconnects them, restarts them, and kills the founder.

    python -m benchmarks.chaos [--minutes N] [--seed S] [--json FILE] [--quick | --at-once | --only PART] [--strangers]
    python -m benchmarks.chaos --hostile 0.2 [--seed S] [--seeds N] [--jobs N] [--only KIND...] [--placement random]
        [--without RULE...] [--steps N] [--json FILE] [--quick]
    python -m benchmarks.chaos --overhead [--only RULE...] [--check-share S] [--json FILE] [--quick]

With `--strangers`, strangers of several kinds attack the chaos part meanwhile (tests/hostile/siege.py).
With `--only`, the other part is taken from the JSON file, if it is there.

With `--hostile`, nobody dies. Instead some peers lie, in one run for each kind of attack (hostile.py, attacks.py). Runs
that the JSON file already has are not repeated.

With `--overhead`, nobody dies and nobody lies. One swarm switches the rules against liars off and on in turns, which
shows what they cost (overhead.py).
"""

import argparse
import asyncio
import contextlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, get_args

import uvloop
from rich.console import Console

from benchmarks.apart import end_in_order_when_stopped
from benchmarks.chaos.accounts import losses
from benchmarks.chaos.attacks import ATTACKS, RULES
from benchmarks.chaos.hostile import QUICK_KINDS, HostilePlan, Placement, run_all
from benchmarks.chaos.hostile import show as show_attacks
from benchmarks.chaos.overhead import MOST_COST
from benchmarks.chaos.overhead import measure as measure_overhead
from benchmarks.chaos.plan import Plan
from benchmarks.chaos.report import show, verdicts
from benchmarks.chaos.schedule import DEATHS, Event, make_schedule
from benchmarks.chaos.strangers import besieging
from benchmarks.chaos.swarm import ChaosSwarm, until
from benchmarks.chaos.watching import Watcher
from benchmarks.command import command_parser, write_figures
from benchmarks.scratch import scratch_folder
from peer.platform.sockets import sweep_socket_folders

PARTS = ("calm", "chaos")
_ALL_SERVED_S = 60.0
_QUICK = Plan(
    nodes=4,
    trainers=1,
    layers=1,
    every_s=4.0,
    validate_every=20,
    checkpoint_every_s=3.0,
    announce_every_s=2.0,
)
_QUICK_S = 13.0
_SAVING_S = 3.0
"""How long saving a checkpoint and looking at it may take, beyond the checkpoint interval."""


async def run_parts(
    parts: Mapping[str, tuple[Event, ...]],
    plan: Plan,
    seconds: float,
    at_once: bool,
    console: Console,
    besieged: Mapping[str, int],
) -> dict[str, Any]:
    """Runs the parts one after another, or all at the same time. `besieged`: the parts that strangers attack, and the
    seed of the strangers for each.
    """
    if at_once:
        return dict(
            zip(
                parts,
                await asyncio.gather(
                    *(run(plan, events, seconds, console, besieged.get(p)) for p, events in parts.items())
                ),
                strict=True,
            )
        )
    results = {}
    for part, events in parts.items():
        console.log(f"{part}: {seconds:.0f} s")
        results[part] = await run(plan, events, seconds, console, besieged.get(part))
    return results


async def run(
    plan: Plan, events: tuple[Event, ...], seconds: float, console: Console, siege_seed: int | None
) -> dict[str, Any]:
    """Runs one part; the calm one has no events. `siege_seed`: the seed of the strangers that attack it. None: no
    strangers attack it.
    """
    strangers: dict[str, int] = {}
    with scratch_folder() as folder:
        swarm = ChaosSwarm(plan, folder)
        try:
            invite = await swarm.start()
            watcher = await Watcher.join(invite, swarm, folder / "watcher")
            try:
                await until(lambda: watcher.served() == plan.experts, _ALL_SERVED_S)
                await swarm.start_trainers()
                async with contextlib.AsyncExitStack() as stack:
                    if siege_seed is not None:
                        strangers = await stack.enter_async_context(besieging(invite, seconds, siege_seed))
                    results = await measure(swarm, watcher, events, seconds, console)
            finally:
                await watcher.stop()
        finally:
            await swarm.stop()
        return results | {"leaked": await swarm.leaks(), "faults": swarm.faults(), "misdeeds": strangers}


async def measure(
    swarm: ChaosSwarm, watcher: Watcher, events: tuple[Event, ...], seconds: float, console: Console
) -> dict[str, Any]:
    plan = swarm.plan
    began = time.monotonic()
    watcher.begin()
    before = {name: len(steps.ended_at) for name, steps in swarm.trainers.items()}
    for event in events:
        await asyncio.sleep(began + event.at_s - time.monotonic())
        console.log(f"{event.at_s:5.1f} s: {event.deed} {', '.join(map(str, event.nodes))}")
        if event.deed in DEATHS:
            for number in (n for n in event.nodes if swarm.nodes[n].is_well):
                await watcher.note_death(swarm.nodes[number], event.deed)
        await swarm.do(event)
    await asyncio.sleep(began + seconds - time.monotonic())
    ended = time.monotonic()
    await swarm.stop_trainers()
    all_there = await until(
        lambda: watcher.served() == plan.experts and all(node.serves for node in swarm.nodes), _ALL_SERVED_S
    )
    await watcher.look()
    await swarm.evaluate()
    trained = {name: steps.since(before[name]) for name, steps in swarm.trainers.items()}
    cost = losses(
        watcher.deaths,
        watcher.observations,
        checkpoint_every_s=plan.checkpoint_every_s + _SAVING_S,
        rescue_s=4 * plan.every_s,
    )
    return {
        "seconds": seconds,
        "steps": sum(len(t.intervals_s) for t in trained.values()),
        "longest_stall_s": max(t.longest_stall_s(ended) for t in trained.values()),
        "final_loss": swarm.final_losses,
        "validation_losses": {n: t.validation_losses for n, t in trained.items()},
        "events": [asdict(event) for event in events],
        "deaths": len(watcher.deaths),
        "losses": [
            asdict(loss)
            | {
                "updates": loss.updates,
                "is_lost": loss.is_lost,
                "is_beyond_interval": loss.is_beyond_interval,
            }
            for loss in cost
        ],
        "experts_served_at_the_end": watcher.served(),
        "experts": plan.experts,
        "all_there": all_there,
        "probes": watcher.probes,
        "wrong_answers": watcher.wrong,
        "differing_replicas": watcher.differing,
        "failures": {n: t.failures for n, t in trained.items()},
        "summaries": {n: t.summary for n, t in trained.items()},
    }


def main() -> None:
    parser = command_parser(__doc__, "4 nodes, for seconds, both parts at once")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long each part is measured")
    parser.add_argument(
        "--seed", type=int, default=0, help="the seed of the schedule; with --hostile, the first"
    )
    parser.add_argument(
        "--at-once",
        action="store_true",
        help="run both parts at the same time, for a machine that does other work too",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="PART",
        help="run only this part, calm or chaos; with --hostile, these attacks; with --overhead, these rules",
    )
    parser.add_argument("--strangers", action="store_true", help="strangers attack the chaos part")
    parser.add_argument(
        "--hostile", type=float, metavar="SHARE", help="let this share of the nodes lie, and none die"
    )
    parser.add_argument(
        "--overhead", action="store_true", help="measure what the rules against liars cost if nobody lies"
    )
    parser.add_argument(
        "--check-share",
        type=float,
        default=0.01,
        help="with --overhead: the share of answers that trainers check",
    )
    parser.add_argument("--seeds", type=int, default=1, help="with --hostile: how many seeds to run")
    parser.add_argument("--jobs", type=int, default=2, help="with --hostile: runs at the same time")
    parser.add_argument(
        "--placement",
        choices=get_args(Placement),
        default="minority",
        help="with --hostile: liars are a minority of each expert's hosts, or placed at random in a larger swarm",
    )
    parser.add_argument(
        "--without",
        nargs="+",
        default=[],
        metavar="RULE",
        help="with --hostile: rules that honest peers leave out",
    )
    parser.add_argument("--steps", type=int, help="with --hostile: steps of each trainer")
    options = parser.parse_args()
    end_in_order_when_stopped()
    console = Console(width=120)
    if options.hostile is not None:
        lie(parser, options, console)
        return
    if options.overhead:
        weigh(parser, options, console)
        return
    if options.only and (len(options.only) != 1 or options.only[0] not in PARTS):
        parser.error(f"--only: one of {', '.join(PARTS)}")
    plan, seconds = (_QUICK, _QUICK_S) if options.quick else (Plan(), 60 * options.minutes)
    os.environ.setdefault("HIVEMIND_LOGLEVEL", "ERROR")
    results: dict[str, Any] = {"plan": asdict(plan), "seed": options.seed}
    if options.only and options.json and options.json.exists():
        results |= json.loads(options.json.read_text())
    parts = options.only or PARTS
    events = {"calm": (), "chaos": make_schedule(options.seed, seconds, plan.nodes, plan.every_s)}
    results |= uvloop.run(
        run_parts(
            {part: events[part] for part in parts},
            plan,
            seconds,
            options.quick or options.at_once,
            console,
            {"chaos": options.seed} if options.strangers else {},
        )
    )
    sweep_socket_folders()
    if all(part in results for part in PARTS):
        results["verdicts"] = verdicts(results)
    show(results, console)
    write_figures(options.json, results)


def lie(parser: argparse.ArgumentParser, options: argparse.Namespace, console: Console) -> None:
    """Does the runs with peers that lie."""
    kinds = options.only or (QUICK_KINDS if options.quick else list(ATTACKS))
    if unknown := [kind for kind in kinds if kind not in ATTACKS]:
        parser.error(f"--only: {unknown[0]} is none of {', '.join(ATTACKS)}")
    if not 0 < options.hostile < 1:
        parser.error("--hostile: a share of the nodes, between 0 and 1")
    if unknown := [rule for rule in options.without if rule not in RULES]:
        parser.error(f"--without: {unknown[0]} is none of {', '.join(RULES)}")
    plan = HostilePlan.of(options.hostile, options.placement, options.quick, tuple(options.without))
    if options.steps:
        plan = replace(plan, steps=options.steps)
    results: dict[str, Any] = {"plan": json.loads(json.dumps(asdict(plan))), "runs": {}}
    if options.json and options.json.exists():
        saved = json.loads(options.json.read_text())
        results["runs"] = saved["runs"] if saved.get("plan") == results["plan"] else {}
    seeds = range(options.seed, options.seed + options.seeds)
    uvloop.run(run_all(plan, seeds, kinds, options.jobs, console, results, options.json))
    show_attacks(results, console)


def weigh(parser: argparse.ArgumentParser, options: argparse.Namespace, console: Console) -> None:
    """Does the run that switches the rules off and on."""
    without = options.only or RULES
    if unknown := [rule for rule in without if rule not in RULES]:
        parser.error(f"--only: {unknown[0]} is none of {', '.join(RULES)}")
    # peers average as often as they do by default
    plan = HostilePlan(
        average_every_s=60.0, average_every=20, check_share=options.check_share, without=tuple(without)
    )
    pairs = 5 if options.quick else 80
    found = uvloop.run(measure_overhead(plan, pairs, console))
    costs = ", ".join(f"{rule} {_percent(*found['costs'][rule])}" for rule in without)
    verdict = "reached" if found["reached"] else "missed"
    console.print(f"processor time of the rules' own code: {costs}")
    console.print(f"together {_percent(*found['cost'])} (at most {MOST_COST:.0%}) {verdict}")
    by_clock, by_cpu = (
        f"{value:.3f} ± {error:.3f}" for value, error in (found["speed"], found["speed_by_cpu"])
    )
    console.print(f"speed with them, of that without: {by_clock}, by processor time {by_cpu}")
    for line in found["faults"]:
        console.print(line, style="red", markup=False)
    write_figures(options.json, found)


def _percent(share: float, error: float) -> str:
    return f"{share:.2%} ± {error:.2%}"


if __name__ == "__main__":
    main()
