"""The experiment of Learning@home: a small language model with 256 Transformer layers as experts, top-4, in a swarm.

dense     a dense Transformer that computes as much for each token, in this process
calm      the mixture: its experts are in node processes, and every call travels by gRPC and TLS
delayed   as calm, but each call takes 1 s longer, and 10% of the calls fail

    python -m benchmarks.paper [--quick] [--steps N] [--in-flight N] [--json FILE] [--plot FILE]

It follows Ryabinin & Gusev 2020, section 4.3, where 256 experts are spread over the layers of a language model, each is
a Transformer layer, and calls take a second and fail as often. All three are trained on the same batches: an equal part
each of Python's help, the source of its library and C++ headers. The loss is that on held-out text, in nats per byte.
Times are wall-clock times and include validations. The curve of `delayed` is measured during training, with delays and
failures; the final loss of all three is measured without. `--quick` trains 64 smaller experts for 20 steps with less
delay, in under 60 seconds. Ctrl-C ends it at once; the JSON file then has what was finished before.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.apart import end_in_order_when_stopped
from benchmarks.command import command_parser, write_figures
from benchmarks.faults import FaultyCaller
from benchmarks.recipe_configurations import Configuration, Size
from benchmarks.recipe_texts import QUICK as TEXTS
from benchmarks.recipe_texts import Mixed, load_texts
from benchmarks.village import START_LIMIT_S, running_village
from dht.manifest import Manifest
from expert_server.blocks import weightless_block
from trainer_client.client import SwarmClient, TrainerTiming
from trainer_client.dispatch.batches import ExpertCaller
from trainer_client.model import LanguageModel
from trainer_client.training.loop import Training, validation_loss
from trainer_client.training.record import Progress, Summary

WAYS = ("dense", "calm", "delayed")
LAYERS, TOP_K = 2, 4
FAILING = 0.1
MOST_LOST = 1.03
"""The largest loss of `delayed`, relative to that of `calm`."""
_POINTS = 15
"""The number of points of a curve, with --steps."""
_FINAL = 8
"""The final loss is measured on this many times as many batches as a point of the curve."""
_LINE_EVERY_S = 10.0
"""The pause between two lines of progress when the output is not a terminal."""
_PATIENCE = {"call_deadline_s": 60.0, "grace_s": 60.0}
"""Deadlines that are so long that a busy machine is not mistaken for a fault."""


FULL_SIZE = Size(
    hidden=64, context=64, batch=8, grid=(8, 16), steps=1500, validate_every=100, validation_batches=4
)
QUICK_SIZE = Size(
    hidden=16, heads=2, context=32, batch=4, grid=(4, 8), steps=20, validate_every=10, validation_batches=1
)


@dataclass(frozen=True)
class Plan:
    """What is trained, and for how long."""

    nodes: int = 4
    delay_s: float = 1.0
    in_flight: int = 1
    """Steps in flight in `delayed`. Each step waits 4 s: forward and backward, in two layers."""
    size: Size = FULL_SIZE

    @property
    def mixture(self) -> Configuration:
        settings = {"router": "product-key", **_PATIENCE}
        return Configuration("mixture", LAYERS, 2.0, "transformer", TOP_K, settings=settings)

    @property
    def dense(self) -> Configuration:
        """The dense model. It has as many layers as compute for each token in the mixture.

        The size of its feed-forward blocks makes the FLOPs equal.
        """
        one, two = (Configuration("dense", LAYERS * (1 + TOP_K), float(size)) for size in (1, 2))
        share = (self.flops(self.mixture) - self.flops(one)) / (self.flops(two) - self.flops(one))
        return replace(one, feed_forward=1 + share)

    def flops(self, configuration: Configuration) -> float:
        """FLOPs of a forward pass for each token."""
        return sum(configuration.flops(self.size).values())


QUICK = Plan(nodes=2, delay_s=0.1, size=QUICK_SIZE)

Observe = Callable[[Progress], None]


class Run:
    """One training run and its measurements."""

    def __init__(
        self,
        plan: Plan,
        configuration: Configuration,
        data: Mixed,
        make_model: Callable[[], LanguageModel],
        in_flight: int = 1,
    ) -> None:
        settings = configuration.trainer_settings(plan.size).model_copy(update={"in_flight": in_flight})
        self.model = make_model()
        self.curve: list[tuple[int, float, float]] = []
        """Points of the curve: the step, the seconds since the start, and the held-out loss at that step."""
        self._plan, self._configuration, self._data = plan, configuration, data
        self._training = Training(self.model, data, settings, make_model)

    def train(self, observe: Observe) -> Summary:
        began = time.monotonic()

        def note(progress: Progress) -> None:
            if progress.validation_loss is not None:
                self.curve.append((progress.step, time.monotonic() - began, progress.validation_loss))
            observe(progress)

        summary = self._training.run(note, threading.Event())
        self.curve.insert(0, (0, 0.0, summary.validation_loss_first))
        return summary

    def results(self, summary: Summary) -> dict[str, Any]:
        size = self._plan.size
        return {
            "validation_loss": validation_loss(
                self.model, self._data.validation_batches(size.batch, _FINAL * size.validation_batches)
            ),
            "curve": self.curve,
            "flops_per_token": self._plan.flops(self._configuration),
            "summary": asdict(summary),
        }


def run_dense(plan: Plan, data: Mixed, observe: Observe) -> dict[str, Any]:
    make_model = partial(LanguageModel, plan.dense.manifest(plan.size), lambda layer: nn.Identity())
    run = Run(plan, plan.dense, data, make_model)
    return run.results(run.train(observe)) | {"parameters": parameters_of(run.model)}


def run_mixture(plan: Plan, data: Mixed, observe: Observe, *, delayed: bool) -> dict[str, Any]:
    """Trains the mixture on a swarm of its own. Raises SystemExit if a node does not start."""
    manifest = plan.mixture.manifest(plan.size)
    faults: list[FaultyCaller] = []

    def through(caller: ExpertCaller) -> ExpertCaller:
        faults.append(FaultyCaller(caller, plan.delay_s, FAILING, seed=0))
        faults[0].on = delayed
        return faults[0]

    options = ["--threads", "1", "--niceness", "0", "--spare", "0", "--drain-timeout", "0"]
    with ExitStack() as stack:
        each = -(-manifest.experts_total // plan.nodes)
        village = stack.enter_context(running_village(to_toml(manifest), plan.nodes, each, options))
        settings = plan.mixture.trainer_settings(plan.size)
        timing = TrainerTiming(least_deadline_s=60.0)
        state = village.folder / "trainer"
        swarm = stack.enter_context(
            SwarmClient(village.invite, settings, state, through=through, timing=timing)
        )
        swarm.wait_for_experts(START_LIMIT_S, lambda text: None)
        make_model = partial(LanguageModel, swarm.manifest, swarm.mixture)
        run = Run(plan, plan.mixture, data, make_model, plan.in_flight if delayed else 1)
        summary = run.train(observe)
        faults[0].on = False
        swarm.wait_for_experts(START_LIMIT_S, lambda text: None)  # until breakers have closed again
        experts = manifest.experts_total * parameters_of(weightless_block(manifest))
        return run.results(summary) | {
            "parameters": parameters_of(run.model) + experts,
            "calls_made_to_fail": faults[0].failed,
            "dispatch": swarm.dispatcher.metrics.values(),
        }


def parameters_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def to_toml(manifest: Manifest) -> str:
    """A founder's manifest file, without a preset. JSON and TOML write numbers, strings and lists in the same way."""
    values = json.loads(manifest.to_json()) | {"preset": "none"}
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items() if key not in tables]
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    return "\n".join(lines)


def compare(
    plan: Plan,
    ways: Sequence[str],
    console: Console,
    keep: Callable[[dict[str, Any]], None],
    known: Mapping[str, Any],
) -> dict[str, Any]:
    """Runs all ways and returns all figures. After each way, `keep` gets the figures so far. Ways of the same plan in
    `known` are not run again.
    """
    results: dict[str, Any] = {"plan": asdict(plan)}
    results = json.loads(json.dumps(results))  # Tuples become lists, as when read from a file.
    if known.get("plan") == results["plan"]:
        results |= known
    data = Mixed(load_texts(TEXTS), plan.size.context)
    for way in (way for way in ways if way not in results):
        with shown(console, way) as observe:
            if way == "dense":
                results[way] = run_dense(plan, data, observe)
            else:
                results[way] = run_mixture(plan, data, observe, delayed=way == "delayed")
        keep(results)
    return results


@contextmanager
def shown(console: Console, way: str) -> Iterator[Observe]:
    """Shows the progress of training: on a terminal in a line that is redrawn, otherwise in a new line every 10 s."""
    last = time.monotonic()
    with console.status(f"{way}: starting") as status:

        def observe(progress: Progress) -> None:
            nonlocal last
            text = (
                f"{way}: step {progress.step} of {progress.steps}, {progress.tokens_per_s:.0f} tokens/s, loss "
                f"{progress.loss:.3f}, {progress.left_s / 60:.1f} min left"
            )
            status.update(text)
            if not console.is_terminal and time.monotonic() - last >= _LINE_EVERY_S:
                console.print(text)
                last = time.monotonic()

        yield observe


def show(results: Mapping[str, Any], console: Console) -> None:
    plan = results["plan"]
    found = {way: results[way] for way in WAYS if way in results}
    table = Table(
        title=f"{plan['size']['steps']:,} steps; delayed: {plan['delay_s']} s, {FAILING:.0%} failing, "
        f"in flight: {plan['in_flight']}"
    )
    columns = ("", "nats/byte", "of dense", "of calm", "parameters", "MFLOP/token", "tokens/s")
    for column in (*columns, "staleness", "calls", "made to fail", "seconds"):
        table.add_column(column, justify="right")
    for way, run in found.items():
        dispatch, summary = run.get("dispatch", {}), run["summary"]
        table.add_row(
            way,
            f"{run['validation_loss']:.4f}",
            *(ratio(found, way, rival) for rival in ("dense", "calm")),
            f"{run['parameters'] / 1e6:.2f} M",
            f"{run['flops_per_token'] / 1e6:.3f}",
            f"{summary['tokens_per_s']:.0f}",
            f"{summary['staleness']:.1f}",
            f"{dispatch['calls']:,}" if dispatch else "",
            f"{run['calls_made_to_fail']:,}" if dispatch else "",
            f"{summary['seconds']:.0f}",
        )
    console.print(table)
    if {"calm", "delayed"} <= found.keys():
        lost = found["delayed"]["validation_loss"] / found["calm"]["validation_loss"]
        reached = "reached" if lost <= MOST_LOST else "missed"
        console.print(f"delayed: {lost:.4f} of calm's loss, at most {MOST_LOST}: {reached}")


def ratio(found: Mapping[str, Any], way: str, rival: str) -> str:
    if rival not in found or WAYS.index(way) <= WAYS.index(rival):
        return ""
    return f"{found[way]['validation_loss'] / found[rival]['validation_loss']:.4f}"


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Writes an SVG with the held-out loss by step and by time."""
    import matplotlib
    from matplotlib.figure import Figure

    size = results["plan"]["size"]
    figure = Figure(figsize=(10, 4), layout="constrained")
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    for way in (way for way in WAYS if way in results):
        steps, seconds, losses = zip(*results[way]["curve"], strict=True)
        style = "--" if way == "dense" else "-"
        label = f"{way}: {results[way]['validation_loss']:.3f} at the end"
        by_step.plot(steps[1:], losses[1:], style, marker=".", label=label)
        by_time.plot([s / 60 for s in seconds[1:]], losses[1:], style, marker=".")
    by_step.set(xlabel="step", ylabel="held-out loss, nats per byte")
    by_time.set(xlabel="minutes, trainer and nodes on one machine")
    by_step.legend(title=f"{size['steps']:,} steps of {size['batch'] * size['context']} tokens")
    for axes in (by_step, by_time):
        axes.grid(alpha=0.3)
    with matplotlib.rc_context({"svg.hashsalt": "paper"}):  # the same bytes from the same figures
        figure.savefig(path, format="svg", metadata={"Date": None})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_parser(__doc__, "64 smaller experts, 20 steps, less delay")
    parser.add_argument("--resume", action="store_true", help="take over the ways that the file has already")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves there, as SVG")
    parser.add_argument("--steps", type=int, metavar="N", help=f"of each way, by default {Plan.size.steps}")
    parser.add_argument(
        "--in-flight", type=int, metavar="N", help="steps under way at once, where calls are slow"
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="only these")
    options = parser.parse_args(arguments)
    if options.resume and not options.json:
        parser.error("--resume takes the ways from --json FILE")
    plan = QUICK if options.quick else Plan()
    if options.steps is not None:
        every = max(1, options.steps // _POINTS)
        plan = replace(plan, size=replace(plan.size, steps=options.steps, validate_every=every))

    if options.in_flight is not None:
        plan = replace(plan, in_flight=options.in_flight)

    end_in_order_when_stopped()
    os.environ.setdefault("HIVEMIND_LOGLEVEL", "ERROR")
    torch.set_num_threads(1)
    console = Console(width=130)
    known = json.loads(options.json.read_text()) if options.resume and options.json.exists() else {}
    results = compare(plan, options.ways, console, partial(write_figures, options.json), known)
    show(results, console)
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
