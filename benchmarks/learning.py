"""Does a swarm learn what one machine learns? The same model, data order and number of tokens, in several ways.

local     all experts in one process, without a network
swarm     real nodes, each a process, and one trainer
faults    as swarm, but each call is 1 s slower, and 10% of the calls fail after dispatch
three     the same nodes as swarm, and three trainers that average their dense parts, each with a third of every batch
bf16, fp16, int8, int4   as local, with everything that would be sent rounded by that codec

    python -m benchmarks.learning [--quick] [--json FILE]
    python -m benchmarks.learning --ways local bf16 int8 int4 --steps 600

The result is the loss on held-out text after the last step, in nats per byte, measured without faults and with all
experts live. `--quick` trains a smaller model for a few steps, with 0.1 s of delay and no codecs, in
under 60 seconds.
"""

import argparse
import json
import statistics
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.apart import Child, end_in_order_when_stopped
from benchmarks.command import command_parser, write_figures
from benchmarks.faults import FaultyCaller
from benchmarks.scratch import scratch_folder
from benchmarks.village import START_LIMIT_S, running_village
from dht.invites import Invite
from dht.manifest import Manifest
from peer.codec import CodecName
from peer.metrics import total
from talkoot.train.local import LocalSwarm
from trainer_client.client import SwarmClient, TrainerTiming
from trainer_client.data.corpus import Dataset
from trainer_client.data.sources import read_text
from trainer_client.dispatch.batches import ExpertCaller
from trainer_client.model import LanguageModel
from trainer_client.settings import TrainerSettings
from trainer_client.training.loop import Training, validation_loss


@dataclass(frozen=True)
class Way:
    """How the model is trained."""

    trainers: int = 1
    swarm: bool = True
    """Whether experts are in a swarm of real nodes; otherwise all are in the trainer's process."""
    codec: CodecName = "fp32"
    target: float | None = None
    """The largest permitted ratio of its loss to that of `local`."""


WAYS = {
    "local": Way(swarm=False),
    "swarm": Way(target=1.01),
    "faults": Way(target=1.03),
    "three": Way(trainers=3, target=1.03),
    "bf16": Way(swarm=False, codec="bf16"),
    "fp16": Way(swarm=False, codec="fp16"),
    "int8": Way(swarm=False, codec="int8"),
    "int4": Way(swarm=False, codec="int4"),
}
QUICK_WAYS = ("local", "swarm", "faults", "three")
FAILING = 0.1

MANIFEST = """
name = "learning"
preset = "none"
[model]
layers = 2
hidden = {hidden}
heads = 4
context = {context}
feed_forward = {feed_forward}
[experts]
grid = [4, 4]
kind = "transformer"
[routing]
top_k = 4
[wire]
codec = "{codec}"
"""


@dataclass(frozen=True)
class Plan:
    """What is trained, and for how long."""

    steps: int = 250
    batch: int = 12
    hidden: int = 64
    context: int = 64
    nodes: int = 4
    delay_s: float = 1.0
    in_flight: int = 1
    """Steps in flight, where calls are slow."""
    average_every: int = 10
    """Steps between two rounds of averaging the dense parts, if there are several trainers."""
    validations: int = 8  # batches

    def manifest(self, codec: CodecName) -> str:
        return MANIFEST.format(
            hidden=self.hidden, context=self.context, feed_forward=2 * self.hidden, codec=codec
        )


QUICK = Plan(steps=12, hidden=32, context=32, nodes=2, delay_s=0.1, average_every=3, validations=2)


# One trainer


def text_of_python() -> bytes:
    """The default text of trainers."""
    return "".join(read_text([])).encode()


class Part(Dataset):
    """Every `trainers`-th sequence of each batch, starting with sequence `trainer`."""

    def __init__(self, text: bytes, context: int, trainer: int, trainers: int) -> None:
        super().__init__(np.frombuffer(text, dtype=np.uint8), context, seed=0)
        self._trainer, self._trainers = trainer, trainers

    def batch(self, step: int, batch_size: int) -> Tensor:
        return super().batch(step, batch_size)[self._trainer :: self._trainers]


def make_training(
    model: LanguageModel,
    plan: Plan,
    data: Part,
    in_flight: int = 1,
    make_copy: Callable[[], LanguageModel] | None = None,
) -> Training:
    """The trainer's own loop."""
    settings = TrainerSettings(
        steps=plan.steps, batch_size=plan.batch, in_flight=in_flight, validation_batches=1, threads=1
    )
    return Training(model, data, settings, make_copy)


def loss_of(model: LanguageModel, plan: Plan, data: Part) -> float:
    """The loss on held-out text."""
    return validation_loss(model, data.validation_batches(plan.batch, plan.validations))


def run_trainer(plan: Plan, way: str, state: Path, trainer: int) -> None:
    """Runs one trainer as a process. It reads the invite (an empty line without a swarm), prints a line when it is
    ready and another when it has trained, waits for a line after each, and prints its results.
    """
    torch.set_num_threads(1)
    invite = sys.stdin.readline().strip()
    # Timeouts are long, so that a busy machine is not mistaken for a fault.
    patience = {"call_deadline_s": 60.0, "grace_s": 60.0}
    averaging = {"average_every": plan.average_every, "average_host": "127.0.0.1"}
    settings = TrainerSettings.model_validate(patience | averaging | {"seed": 0})
    faults: list[FaultyCaller] = []

    def through(caller: ExpertCaller) -> ExpertCaller:
        if way != "faults":
            return caller
        faults.append(FaultyCaller(caller, plan.delay_s, FAILING, seed=0))
        return faults[0]

    with ExitStack() as stack:
        source: SwarmClient | LocalSwarm
        if not invite:
            manifest = state / "swarm.toml"
            manifest.write_text(plan.manifest(WAYS[way].codec))
            source = LocalSwarm(Manifest.from_toml(manifest), settings)
        else:
            timing = TrainerTiming(least_deadline_s=60.0)
            source = stack.enter_context(
                SwarmClient(Invite.parse(invite), settings, state, through=through, timing=timing)
            )
        source.wait_for_experts(START_LIMIT_S, lambda text: None)
        make_model = partial(LanguageModel, source.manifest, source.mixture)
        model, data = make_model(), Part(text_of_python(), plan.context, trainer, WAYS[way].trainers)
        training = make_training(model, plan, data, plan.in_flight if way == "faults" else 1, make_model)
        merges = None
        if isinstance(source, SwarmClient) and WAYS[way].trainers > 1:
            merges = source.average(training.part)
        _say_and_wait()  # It is ready.
        summary = training.run(lambda progress: None, threading.Event())
        _say_and_wait()  # It has trained.
        results: dict[str, Any] = {"seconds": summary.seconds, "staleness": summary.staleness}
        results["averagings"] = 0 if merges is None else int(total(merges.metrics.ends, end="averaged"))
        results["dispatch"] = source.dispatcher.metrics.values()
        for caller in faults:
            results["validation_loss_with_faults"] = loss_of(model, plan, data)
            results["calls_made_to_fail"] = caller.failed
            caller.on = False
        source.wait_for_experts(START_LIMIT_S, lambda text: None)  # until breakers have closed again
        print(json.dumps(results | {"validation_loss": loss_of(model, plan, data)}), flush=True)


def _say_and_wait() -> None:
    print("{}", flush=True)
    sys.stdin.readline()


# All ways


def run_way(way: str, plan: Plan) -> dict[str, Any]:
    """Runs one way. Its losses are means over its trainers. Raises SystemExit if a trainer fails."""
    with ExitStack() as stack:
        folder = stack.enter_context(scratch_folder())
        # Started first, so that they do their imports while the nodes start.
        trainers = [_start(stack, way, plan, folder, number) for number in range(WAYS[way].trainers)]
        invite = ""
        if WAYS[way].swarm:
            options = ["--threads", "1", "--niceness", "0", "--spare", "0", "--drain-timeout", "0"]
            manifest, experts = plan.manifest(WAYS[way].codec), 32 // plan.nodes
            village = stack.enter_context(running_village(manifest, plan.nodes, experts, options))
            invite = str(village.invite)
        for trainer in trainers:
            trainer.tell(invite)
        for _ in ("ready", "trained"):
            for trainer in trainers:
                trainer.hear()
            for trainer in trainers:
                trainer.tell()
        results = [trainer.hear() for trainer in trainers]
        for trainer in trainers:
            trainer.close()  # Before the nodes stop, since it would complain about that.
    return {
        "validation_loss": statistics.fmean(result["validation_loss"] for result in results),
        "seconds": max(result["seconds"] for result in results),
        "trainers": results,
    }


def _start(stack: ExitStack, way: str, plan: Plan, folder: Path, number: int) -> Child:
    state = folder / f"trainer-{number}"
    state.mkdir()
    arguments = [
        "--way",
        way,
        "--plan",
        json.dumps(asdict(plan)),
        "--trainer",
        str(number),
        "--state",
        str(state),
    ]
    trainer = Child("benchmarks.learning", arguments)
    stack.callback(trainer.close)
    return trainer


def compare(
    plan: Plan,
    ways: Sequence[str],
    console: Console,
    keep: Callable[[dict[str, Any]], None],
    known: dict[str, Any],
) -> dict[str, Any]:
    """Runs all ways and returns all figures. After each way, `keep` gets the figures so far. Ways of the same plan in
    `known` are not run again.
    """
    results: dict[str, Any] = {"plan": asdict(plan), "tokens": plan.steps * plan.batch * plan.context}
    if known.get("plan") == results["plan"]:
        results = known
    for way in (way for way in ways if way not in results):
        with console.status(f"{way}: {plan.steps} steps"):
            results[way] = run_way(way, plan)
        if "local" in results and way != "local":
            results[f"{way}_vs_local"] = results[way]["validation_loss"] / results["local"]["validation_loss"]
        keep(results)
    return results


def show(results: dict[str, Any], console: Console) -> None:
    plan = results["plan"]
    table = Table(
        title=f"{results['tokens']:,} tokens; faults: {plan['delay_s']} s delay, {FAILING:.0%} failing"
    )
    for column in ("", "validation loss", "ratio to local", "target", "seconds"):
        table.add_column(column, justify="right")
    for name, way in WAYS.items():
        if name not in results:
            continue
        ratio = results.get(f"{name}_vs_local")
        table.add_row(
            name,
            f"{results[name]['validation_loss']:.4f}",
            "" if ratio is None else f"{ratio:.4f}",
            "" if ratio is None or way.target is None
            else f"at most {way.target:.2f}: {'reached' if ratio <= way.target else 'missed'}",
            f"{results[name]['seconds']:.0f}",
        )  # fmt: skip
    console.print(table)


def main() -> None:
    parser = command_parser(__doc__, "a smaller model, a few steps, less delay")
    parser.add_argument("--resume", action="store_true", help="take over the ways that the file has already")
    parser.add_argument("--steps", type=int, help=f"training steps of each way, by default {Plan.steps}")
    parser.add_argument("--delay", type=float, metavar="S", help="seconds that each faulty call takes longer")
    parser.add_argument("--in-flight", type=int, metavar="N", help="steps under way at once, with faults")
    parser.add_argument("--nodes", type=int, choices=(1, 2, 4, 8), help="that share the 32 experts")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), help="only these")
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--plan", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--state", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--trainer", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    end_in_order_when_stopped()
    if options.resume and not options.json:
        parser.error("--resume takes the ways from --json FILE")
    if options.way:
        run_trainer(Plan(**options.plan), options.way, options.state, options.trainer)
        return
    plan = QUICK if options.quick else Plan()
    asked = {"steps": options.steps, "delay_s": options.delay, "nodes": options.nodes}
    asked |= {"in_flight": options.in_flight}
    plan = replace(plan, **{name: value for name, value in asked.items() if value is not None})

    console = Console(width=110)
    known = json.loads(options.json.read_text()) if options.resume and options.json.exists() else {}
    ways = options.ways or (QUICK_WAYS if options.quick else list(WAYS))
    show(compare(plan, ways, console, partial(write_figures, options.json), known), console)


if __name__ == "__main__":
    main()
