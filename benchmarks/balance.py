"""How evenly do trainers use the experts of a layer? Small models on text that Python ships, in one process.

    python -m benchmarks.balance [--quick] [--router NAME] [--balance KIND] [--trainers N ...] [--json FILE]

It uses the real trainer and the nodes' own experts. With several trainers, each has its own batches and its own dense
part, which it averages with another's every 20 steps; they share the experts. The figures describe how many rows each
expert got from all trainers in the last third of the steps, in the worst layer.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, get_args

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.command import command_parser, write_figures
from benchmarks.recipe_texts import QUICK, Mixed, load_texts
from dht.beam_search import Selection
from dht.directory import LiveExperts
from dht.manifest import Manifest
from peer.codec import Integers
from talkoot.train.local import LocalExperts, run_at_once
from trainer_client.averaging.dense_part import PeerDensePart
from trainer_client.dispatch.batches import ForwardPass, RoutedRows
from trainer_client.model import LanguageModel
from trainer_client.moe import RemoteMixtureOfExperts
from trainer_client.routers import Routing
from trainer_client.settings import Balance, RouterName, TrainerSettings
from trainer_client.training.loop import Training
from trainer_client.training.record import Progress

MOST_OVER_MEAN, MOST_CV, LEAST_OVER_MEAN = 2.0, 0.4, 0.1
_AVERAGE_EVERY = 20
_LONGEST_STEP_S = 600.0


@dataclass(frozen=True)
class Plan:
    """What is trained. In each step, a trainer has `batch` times `context` tokens."""

    grid: tuple[int, int] = (16, 16)
    layers: int = 2
    hidden: int = 64
    feed_forward: int = 64
    context: int = 128
    batch: int = 16
    steps: int = 300
    router: RouterName = "product-key"
    balance: Balance | None = None

    def manifest(self) -> Manifest:
        model = {
            "layers": self.layers,
            "hidden": self.hidden,
            "heads": 4,
            "context": self.context,
            "feed_forward": self.feed_forward,
        }
        experts = {"grid": self.grid, "kind": "ffn"}
        return Manifest.model_validate({"name": "balance", "model": model, "experts": experts})

    def settings(self, trainer: int) -> TrainerSettings:
        return TrainerSettings(
            steps=self.steps,
            batch_size=self.batch,
            validation_batches=4,
            router=self.router,
            balance=self.balance,
            seed=trainer,
            threads=1,
        )


QUICK_PLAN = Plan(grid=(4, 4), hidden=32, feed_forward=32, context=64, batch=8, steps=90)


class CountingExperts(LocalExperts):
    """Counts the training rows that each expert gets."""

    def __init__(self, manifest: Manifest) -> None:
        super().__init__(manifest)
        self.rows: Integers = np.zeros((manifest.model.layers, *manifest.experts.grid), np.int64)
        """[layers, *grid]"""
        # Trainers are threads, and `np.add.at` releases the interpreter's lock.
        self._counting = threading.Lock()

    async def send(self, rows: RoutedRows, selection: Selection, live: LiveExperts) -> ForwardPass:
        if rows.keep:
            with self._counting:
                np.add.at(self.rows[rows.layer], tuple(selection.coordinates[selection.valid].T), 1)
        return await super().send(rows, selection, live)


@dataclass(frozen=True)
class Evenness:
    """How evenly the rows of one layer are spread over its experts."""

    max_over_mean: float
    cv: float
    min_over_mean: float

    @classmethod
    def of(cls, rows: Integers) -> "Evenness":
        mean = float(rows.mean())
        return cls(float(rows.max()) / mean, float(rows.std()) / mean, float(rows.min()) / mean)


def train(plan: Plan, texts: dict[str, bytes], trainers: int) -> dict[str, Any]:
    """The worst figures of all layers, and each trainer's last loss on held-out text in nats per byte."""
    manifest = plan.manifest()
    experts, runs = CountingExperts(manifest), []
    for number in range(trainers):
        settings = plan.settings(number)
        routing = Routing.of(settings, manifest, number)
        make_mixture = partial(
            RemoteMixtureOfExperts, manifest=manifest, experts=experts, run=run_at_once, routing=routing
        )
        model = LanguageModel(manifest, make_mixture)
        runs.append(Training(model, Mixed(texts, plan.context, number), settings))

    def between_steps() -> None:
        step = runs[0].step
        if step == plan.steps - plan.steps // 3:
            experts.rows[:] = 0
        if step % _AVERAGE_EVERY == 0:
            parts = [run.part.read() for run in runs]
            for number, run in enumerate(runs):
                other = parts[(number + 1) % trainers]
                moves = run.part.moves_to(parts[number])
                theirs = PeerDensePart(other.tensors, other.age, 0.0, moves)
                run.part.merge("", parts[number], theirs, 0.5)

    together = threading.Barrier(trainers, between_steps, timeout=_LONGEST_STEP_S)

    def observe(progress: Progress) -> None:
        together.wait()

    with ThreadPoolExecutor(trainers) as threads:
        summaries = list(threads.map(lambda run: run.run(observe, threading.Event()), runs))
    layers = [Evenness.of(rows) for rows in experts.rows]
    return {
        "max_over_mean": max(layer.max_over_mean for layer in layers),
        "cv": max(layer.cv for layer in layers),
        "min_over_mean": min(layer.min_over_mean for layer in layers),
        "rows": int(experts.rows[0].sum()),
        "layers": [asdict(layer) for layer in layers],
        "validation_loss": [summary.validation_loss_last for summary in summaries],
        "seconds": max(summary.seconds for summary in summaries),
    }


def show(plan: Plan, results: dict[int, dict[str, Any]], console: Console) -> None:
    experts, tokens = plan.grid[0] * plan.grid[1], plan.batch * plan.context
    table = Table(
        title=f"{experts} experts, {plan.router}, the last third of {plan.steps} steps of {tokens} tokens"
    )
    for column in ("trainers", "busiest / mean", "CV", "least / mean", "nats/byte"):
        table.add_column(column, justify="right")
    table.add_row("wanted", f"≤ {MOST_OVER_MEAN}", f"≤ {MOST_CV}", f"≥ {LEAST_OVER_MEAN}", "")
    for trainers, found in results.items():
        figures = [f"{found[name]:.2f}" for name in ("max_over_mean", "cv", "min_over_mean")]
        table.add_row(str(trainers), *figures, " ".join(f"{loss:.3f}" for loss in found["validation_loss"]))
    console.print(table)


def main() -> None:
    parser = command_parser(__doc__, "16 experts, 90 short steps")
    parser.add_argument("--router", choices=get_args(RouterName), default=Plan.router)
    parser.add_argument("--balance", choices=get_args(Balance), help="by default the router's")
    parser.add_argument("--trainers", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--steps", type=int, help=f"by default {Plan.steps}")
    options = parser.parse_args()
    plan = QUICK_PLAN if options.quick else Plan()
    plan = replace(plan, router=options.router, balance=options.balance, steps=options.steps or plan.steps)
    texts, console, results = load_texts(QUICK), Console(width=110), {}
    for trainers in options.trainers:
        with console.status(f"{trainers} trainers: {plan.steps} steps"):
            results[trainers] = train(plan, texts, trainers)
    show(plan, results, console)
    write_figures(options.json, {"plan": asdict(plan), "trainers": results})


if __name__ == "__main__":
    main()
