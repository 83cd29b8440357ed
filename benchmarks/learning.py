"""Does a swarm learn what one machine learns? The same model, data order and number of tokens, four ways.

local     all experts in one process, without a network
swarm     real nodes, each a process, and one trainer
faults    the same, each call 1 s slower, and 10% of the calls failing after dispatch
three     the same nodes and three trainers, each with a third of every batch

    python -m benchmarks.learning [--quick] [--json FILE]

What counts is the loss on held-out text after the last step, in nats per byte, measured with the faults off and all
experts live. `--quick` trains a smaller model for a few steps, with 0.1 s of delay, in under 60 seconds.
"""

import argparse
import json
import math
import os
import pydoc_data.topics
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.faults import FaultyCaller
from benchmarks.village import START_LIMIT_S, running_village
from dht.invite import Invite
from dht.manifest import Manifest
from peer.processes import die_with_parent
from talkoot.local import LocalSwarm
from trainer_client.calls import ExpertCaller
from trainer_client.client import SwarmClient
from trainer_client.model import LanguageModel
from trainer_client.settings import TrainerSettings

TRAINERS = {"local": 1, "swarm": 1, "faults": 1, "three": 3}
TARGETS = {"swarm": 1.01, "faults": 1.03, "three": 1.03}
FAILING = 0.1

MANIFEST = """
name = "learning"
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
"""


@dataclass(frozen=True)
class Plan:
    """What is trained, and how long."""

    steps: int = 250
    batch: int = 12
    hidden: int = 64
    context: int = 64
    nodes: int = 4
    delay_s: float = 1.0
    validations: int = 8  # batches

    @property
    def manifest(self) -> str:
        return MANIFEST.format(hidden=self.hidden, context=self.context, feed_forward=2 * self.hidden)


QUICK = Plan(steps=12, hidden=32, context=32, nodes=2, delay_s=0.1, validations=2)


# Data


def load_text() -> Tensor:
    """Python's own help: 465 KB of English. uint8"""
    return torch.tensor(list("\n".join(pydoc_data.topics.topics.values()).encode()), dtype=torch.uint8)


def batch(text: Tensor, plan: Plan, step: int) -> Tensor:
    """The tokens of a step, from the first nine tenths. [B, T + 1]"""
    last = len(text) * 9 // 10 - plan.context - 1
    starts = np.random.default_rng([0, step]).integers(0, last, size=plan.batch)
    return _sequences(text, starts, plan.context)


def validation(text: Tensor, plan: Plan) -> list[Tensor]:
    """Evenly spread over the last tenth. [B, T + 1] each"""
    starts = np.linspace(len(text) * 9 // 10, len(text) - plan.context - 1, plan.batch * plan.validations)
    return [
        _sequences(text, part, plan.context) for part in np.split(starts.astype(np.int64), plan.validations)
    ]


def _sequences(text: Tensor, starts: NDArray[np.int64], context: int) -> Tensor:
    return text[torch.from_numpy(starts)[:, None] + torch.arange(context + 1)].long()


# One trainer


def train(model: LanguageModel, plan: Plan, trainer: int, trainers: int) -> None:
    """AdamW with warm-up and cosine, on every `trainers`-th sequence of each batch from `trainer` on."""
    text = load_text()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)
    for step in range(plan.steps):
        rate = min(1.0, (step + 1) / 20) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / plan.steps)))
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * rate
        loss = model.loss(batch(text, plan, step)[trainer::trainers])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def validation_loss(model: LanguageModel, plan: Plan) -> float:
    model.eval()
    loss = statistics.fmean(model.loss(tokens).item() for tokens in validation(load_text(), plan))
    model.train()
    return loss


def run_trainer(plan: Plan, way: str, invite: str | None, state: Path, trainer: int) -> None:
    """One trainer as a process: says "ready" and "trained", each time waits for a line, and prints what came out."""
    torch.set_num_threads(1)
    # patient, so that a busy machine is not taken for a fault
    settings = TrainerSettings(call_deadline_s=60.0, least_deadline_s=60.0, grace_s=60.0, seed=0)
    faults: list[FaultyCaller] = []

    def through(caller: ExpertCaller) -> ExpertCaller:
        if way != "faults":
            return caller
        faults.append(FaultyCaller(caller, plan.delay_s, FAILING, seed=0))
        return faults[0]

    with ExitStack() as stack:
        source: SwarmClient | LocalSwarm
        if invite is None:
            manifest = state / "swarm.toml"
            manifest.write_text(plan.manifest)
            source = LocalSwarm(Manifest.from_toml(manifest), settings)
        else:
            source = stack.enter_context(SwarmClient(Invite.parse(invite), settings, state, through=through))
        source.wait_for_experts(START_LIMIT_S, lambda text: None)
        model = LanguageModel(source.manifest, source.mixture)
        _say_and_wait("ready")
        began = time.monotonic()
        train(model, plan, trainer, TRAINERS[way])
        seconds = time.monotonic() - began
        _say_and_wait("trained")
        stats = source.dispatcher.stats
        results: dict[str, Any] = {"seconds": seconds}
        results["dispatch"] = vars(stats) | {"failures": dict(stats.failures)}
        for caller in faults:
            results["validation_loss_with_faults"] = validation_loss(model, plan)
            results["calls_made_to_fail"] = caller.failed
            caller.on = False
        source.wait_for_experts(START_LIMIT_S, lambda text: None)  # until breakers have closed again
        print(json.dumps(results | {"validation_loss": validation_loss(model, plan)}), flush=True)


def _say_and_wait(word: str) -> None:
    print(word, flush=True)
    sys.stdin.readline()


# Four ways


def run_way(way: str, plan: Plan) -> dict[str, Any]:
    """The results of one way, its losses the mean over its trainers. Raises SystemExit when a trainer fails."""
    with ExitStack() as stack:
        invite = None
        if way == "local":
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="talkoot-benchmark-")))
        else:
            options = ["--threads", "1", "--niceness", "0", "--spare", "0", "--drain-timeout", "0"]
            village = stack.enter_context(
                running_village(plan.manifest, plan.nodes, 32 // plan.nodes, options)
            )
            folder, invite = village.folder, str(village.invite)
        trainers = [_start(stack, way, plan, invite, folder, number) for number in range(TRAINERS[way])]
        for word in ("ready\n", "trained\n"):
            for trainer in trainers:
                if (said := _pipe(trainer.stdout).readline()) != word:
                    raise SystemExit(f"a trainer of {way!r} failed: {said}")
            for trainer in trainers:
                _pipe(trainer.stdin).write("\n")
                _pipe(trainer.stdin).flush()
        results = [json.loads(_pipe(trainer.stdout).readline()) for trainer in trainers]
    return {
        "validation_loss": statistics.fmean(result["validation_loss"] for result in results),
        "seconds": max(result["seconds"] for result in results),
        "trainers": results,
    }


def _start(
    stack: ExitStack, way: str, plan: Plan, invite: str | None, folder: Path, number: int
) -> "subprocess.Popen[str]":
    state = folder / f"trainer-{number}"
    state.mkdir()
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.learning", "--way", way]
    command += ["--plan", json.dumps(asdict(plan)), "--trainer", str(number), "--state", str(state)]
    if invite is not None:
        command += ["--invite", invite]
    process = subprocess.Popen(
        die_with_parent(command),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"HIVEMIND_LOGLEVEL": "ERROR"},
    )
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


def compare(
    plan: Plan, ways: Sequence[str], console: Console, keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """All figures; `keep` gets those so far after each way."""
    results: dict[str, Any] = {"plan": asdict(plan), "tokens": plan.steps * plan.batch * plan.context}
    for way in ways:
        with console.status(f"{way}: {plan.steps} steps"):
            results[way] = run_way(way, plan)
        if "local" in results and way in TARGETS:
            results[f"{way}_vs_local"] = results[way]["validation_loss"] / results["local"]["validation_loss"]
        keep(results)
    return results


def show(results: dict[str, Any], console: Console) -> None:
    plan = results["plan"]
    table = Table(title=f"{results['tokens']:,} tokens, {plan['delay_s']} s delay, {FAILING:.0%} failing")
    for column in ("", "validation loss", "of local", "target", "seconds"):
        table.add_column(column, justify="right")
    for way in (way for way in TRAINERS if way in results):
        ratio, target = results.get(f"{way}_vs_local"), TARGETS.get(way)
        table.add_row(
            way,
            f"{results[way]['validation_loss']:.4f}",
            "" if ratio is None else f"{ratio:.4f}",
            "" if ratio is None or target is None
            else f"at most {target:.2f}: {'reached' if ratio <= target else 'missed'}",
            f"{results[way]['seconds']:.0f}",
        )  # fmt: skip
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a smaller model, a few steps, less delay")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--steps", type=int, help=f"training steps of each way, by default {Plan.steps}")
    parser.add_argument("--delay", type=float, metavar="S", help="seconds that each faulty call takes longer")
    parser.add_argument("--nodes", type=int, choices=(1, 2, 4, 8), help="that share the 32 experts")
    parser.add_argument("--ways", nargs="+", choices=TRAINERS, default=list(TRAINERS), help="only these")
    parser.add_argument("--way", choices=TRAINERS, help=argparse.SUPPRESS)
    parser.add_argument("--plan", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--invite", help=argparse.SUPPRESS)
    parser.add_argument("--state", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--trainer", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        run_trainer(Plan(**options.plan), options.way, options.invite, options.state, options.trainer)
        return
    plan = QUICK if options.quick else Plan()
    asked = {"steps": options.steps, "delay_s": options.delay, "nodes": options.nodes}
    plan = replace(plan, **{name: value for name, value in asked.items() if value is not None})

    def keep(results: dict[str, Any]) -> None:
        if options.json:
            options.json.write_text(json.dumps(results, indent=2) + "\n")

    console = Console(width=110)
    show(compare(plan, options.ways, console, keep), console)


if __name__ == "__main__":
    main()
