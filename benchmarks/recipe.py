"""Which mixture beats a dense Transformer that computes as much for each token, on text of several domains?

    python -m benchmarks.recipe [--quick] [--json FILE] [--plot DIR] [--state DIR] [--only NAME ...] [--seed N]

Everything runs in one process, with the real trainer and the nodes' own experts. There are five domains: the Bible,
Shakespeare, Python's documentation, the source of its library, and C++. All models are trained on the same batches,
with an equal part from each domain except one, which is held out. The loss on that domain shows how a model does out of
domain: whether a mixture is ahead there too, and at every size, is the question of Artetxe et al. 2021, arXiv
2112.10684. The benchmark may be stopped at any time, and continues from what is in --state. `--quick` trains small
models on what Python ships, in under 60 seconds; it only shows that the benchmark works.
"""

import json
import signal
import statistics
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.command import command_parser
from benchmarks.recipe_configurations import ALL, CONFIGURATIONS, QUICK_SIZE, Configuration, Size
from benchmarks.recipe_runs import Run, shared_information
from benchmarks.recipe_texts import BYTE_KINDS, FULL, HELD_OUT, QUICK, Mixed, load_texts
from benchmarks.scratch import scratch_folder

QUICK_NAMES = ("dense-2", "ffn top-1", "transformer top-1")


def compare(
    configurations: Sequence[Configuration],
    size: Size,
    data: Mixed,
    state: Path,
    stop: threading.Event,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Trains configurations until `stop` is set. Returns the results of all that are finished, including those of
    earlier runs.

    For one that was interrupted, the results have its curve so far.
    """
    results: dict[str, Any] = {"size": asdict(size), "domains": list(data.domains), "kinds": BYTE_KINDS}
    results |= {"held_out": list(data.held_out), "runs": {}, "unfinished": {}}
    for configuration in configurations:
        name = configuration.cache_name(size, data.sha256)
        done, file = state / f"{name}.json", state / f"{name}.safetensors"
        if not done.exists() and not stop.is_set():
            run = Run.begin(configuration, size, data)
            if run.train(file, stop):
                _write(done, {"name": configuration.name} | run.results(data))
            else:
                results["unfinished"][configuration.name] = run.curve()
            last = run.training.history.validation_losses[-1]
            say(
                f"{configuration.name}: {run.training.step} steps, {last:.4f} nats/byte, {run.cpu_s:.0f} s CPU"
            )
        if done.exists():
            results["runs"][configuration.name] = json.loads(done.read_text())
    return results


def overtakes(mixture: dict[str, float], dense: dict[str, float]) -> int | None:
    """The first step from which the mixture's curve stays below the dense model's. None if it is not below at
    the end.
    """
    steps = [step for step in map(int, mixture) if step and str(step) in dense]
    below = [mixture[str(step)] < dense[str(step)] for step in steps]
    if not below or not below[-1]:
        return None
    last_above = max((i for i, is_below in enumerate(below) if not is_below), default=-1)
    return steps[last_above + 1]


def show(results: dict[str, Any], configurations: Sequence[Configuration], console: Console) -> None:
    domains, held_out = (", ".join(results[part]) for part in ("domains", "held_out"))
    table = Table(title=f"nats per byte, on held-out text of {domains}; out of domain: {held_out}")
    columns = (
        "",
        "steps",
        "in domain",
        "of its rival's",
        "ahead from step",
        "out of domain",
        "of its rival's",
    )
    for column in (*columns, "MFLOP/token", "parameters", "CPU s", "load cv", "knows domain"):
        table.add_column(column, justify="right")
    runs = results["runs"]
    for configuration in configurations:
        if (run := runs.get(configuration.name)) is None:
            continue
        rival = runs.get(configuration.rival)
        if rival is not None and rival["steps"] != run["steps"]:
            rival = None
        ahead = None if rival is None else overtakes(run["curve"], rival["curve"])
        table.add_row(
            configuration.name,
            str(run["steps"]),
            f"{run['validation_loss']:.4f}",
            "" if rival is None else f"{run['validation_loss'] / rival['validation_loss']:.4f}",
            "" if rival is None else str(ahead or "never"),
            f"{out_of_domain(run):.4f}",
            "" if rival is None else f"{out_of_domain(run) / out_of_domain(rival):.4f}",
            f"{sum(run['flops_per_token'].values()) / 1e6:.3f}",
            f"{run['parameters'] / 1e6:.2f} M",
            f"{run['cpu_s']:.0f}",
            "" if run["load_cv"] is None else f"{run['load_cv']:.2f}",
            "" if not run["chosen"]
            else " ".join(f"{shared_information(layer):.2f}" for layer in run["chosen"]["domains"]),
        )  # fmt: skip
    console.print(table)


def out_of_domain(run: Mapping[str, Any]) -> float:
    """The loss of a finished run on the domain that it was not trained on, in nats per byte."""
    return statistics.fmean(run["out_of_domain"].values())


def _write(path: Path, values: dict[str, Any]) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(values, indent=1) + "\n")
    temporary.replace(path)


def main() -> None:
    parser = command_parser(__doc__, "two small models, a few steps")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw curves and heat maps there")
    parser.add_argument("--state", type=Path, metavar="DIR", help="what is done, from which it goes on")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[c.name for c in ALL])
    parser.add_argument("--steps", type=int, help=f"of the longest runs, by default {Size.steps}")
    parser.add_argument("--seed", type=int, default=0, help="of first parameters and the order of batches")
    parser.add_argument(
        "--hold-out", metavar="DOMAIN", choices=list(FULL | QUICK), default=HELD_OUT,
        help=f"the domain to train no model on: {', '.join(FULL)}; by default {HELD_OUT}",
    )  # fmt: skip
    options = parser.parse_args()
    domains = QUICK if options.quick else FULL
    if options.hold_out not in domains:
        parser.error(f"the domains are {', '.join(domains)}")
    console = Console(width=150)
    size = replace(QUICK_SIZE if options.quick else Size(), seed=options.seed)
    if options.steps is not None:
        size = replace(size, steps=options.steps)
    names = options.only or (QUICK_NAMES if options.quick else [c.name for c in ALL])
    configurations = [c for c in ALL if c.name in names]
    torch.set_num_threads(1)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stop.set())
    data = Mixed(load_texts(domains), size.context, options.seed, options.hold_out)
    with ExitStack() as stack:
        state = options.state or stack.enter_context(scratch_folder())
        state.mkdir(parents=True, exist_ok=True)
        results = compare(configurations, size, data, state, stop, console.print)
    show(results, configurations, console)
    if options.json:
        _write(options.json, results)
    if options.plot:
        from benchmarks.recipe_plots import draw

        rivals = {c.name: c.rival for c in CONFIGURATIONS if c.rival is not None}
        console.print(", ".join(map(str, draw(results, rivals, options.plot))))


if __name__ == "__main__":
    main()
