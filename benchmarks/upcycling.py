"""Does a model that grew by `talkoot import --grid` learn more than one that continues unchanged?

A model is trained and written to a folder. Two models continue from it, on the same batches and with the same settings:
one with the grid that it had, as `talkoot import` founds it, and one with a larger grid, whose experts begin as copies.
For a token both compute the same. They are compared with a model that has the larger grid from the start, and as many
steps as the others have in all.

python -m benchmarks.upcycling [--quick] [--json FILE] [--grid N N] [--steps N] [--more N] [--seed N]

Everything runs in one process, with the real trainer and the nodes' own experts, on text that Python and torch ship.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.apart import end_in_order_when_stopped
from benchmarks.command import command_parser, write_figures
from benchmarks.recipe import overtakes
from benchmarks.recipe_texts import QUICK, Mixed, load_texts
from benchmarks.scratch import scratch_folder
from dht.manifest import Manifest
from talkoot.model.folder import FolderRouting, FolderWriter, ModelFolder
from talkoot.model.upcycling import UpcycledModel, grown_manifest
from talkoot.train.local import LocalSwarm
from trainer_client.data.tokenizer import ByteTokenizer
from trainer_client.model import LanguageModel
from trainer_client.settings import TrainerSettings
from trainer_client.training.loop import Training, validation_loss

AS_IT_WAS, GROWN, FROM_NOTHING = (
    "the grid that it had",
    "a larger grid, of copies",
    "a larger grid, from nothing",
)


@dataclass(frozen=True)
class Plan:
    """What is trained, and for how long."""

    hidden: int = 64
    context: int = 96
    batch: int = 16
    grid: tuple[int, int] = (4, 4)
    larger: tuple[int, int] = (8, 8)
    steps: int = 800
    """Steps before the model is written to a folder."""
    more: int = 1600
    """Steps after that."""
    validate_every: int = 50
    validation_batches: int = 16
    final_batches: int = 64
    """For the losses of a whole run, before it and after it."""
    seed: int = 0

    def manifest(self, grid: tuple[int, int]) -> Manifest:
        model = {"hidden": self.hidden, "context": self.context, "seed": self.seed}
        return Manifest.founded({"name": "upcycling", "model": model, "experts": {"grid": grid}})

    def settings(self, steps: int) -> TrainerSettings:
        return TrainerSettings(
            steps=steps,
            batch_size=self.batch,
            learning_rate=2e-3,
            validate_every=self.validate_every,
            validation_batches=self.validation_batches,
            seed=self.seed,
            threads=1,
        )


QUICK_PLAN = Plan(
    hidden=32, context=48, batch=8, grid=(2, 2), larger=(4, 4), steps=30, more=40, validate_every=10
)


class Contender:
    """A model in training, with all its experts."""

    def __init__(
        self,
        plan: Plan,
        manifest: Manifest,
        steps: int,
        data: Mixed,
        source: "ModelFolder | UpcycledModel | None",
    ) -> None:
        """`source`: the parameters that it starts from; None: random ones."""
        settings = plan.settings(steps)
        self.swarm = LocalSwarm(manifest, settings)
        self.model = LanguageModel(manifest, self.swarm.mixture)
        self.training = Training(self.model, data, settings)
        self._plan, self._data = plan, data
        if source is not None:
            self.model.load_state_dict(source.dense())
            for uid, expert in self.swarm.dispatcher.experts.items():
                expert.block.load_state_dict(source.expert(uid))

    def loss(self) -> float:
        """The loss on held-out text, in nats per byte."""
        batches = self._data.validation_batches(self._plan.batch, self._plan.final_batches)
        return validation_loss(self.model, batches)

    def train(self, before: int = 0) -> dict[str, float]:
        """Trains to the end. Returns losses by step; the count starts after the `before` steps that were
        done earlier.
        """
        curve = {str(before): self.loss()}
        self.training.run(lambda progress: None, threading.Event())
        history = self.training.history
        steps = (str(before + step) for step in history.validated if step)
        losses = [
            loss for step, loss in zip(history.validated, history.validation_losses, strict=True) if step
        ]
        return curve | dict(zip(steps, losses, strict=True))

    def write(self, folder: Path) -> None:
        """Writes the model to the folder, as `talkoot export` does."""
        swarm, manifest = self.swarm, self.swarm.manifest
        routing = FolderRouting.of(swarm.routing)
        with FolderWriter(folder, manifest, routing, ByteTokenizer()) as writer:
            writer.write_dense(self.model.state_dict())
            for layer in range(manifest.model.layers):
                experts = swarm.dispatcher.experts.items()
                writer.write_layer(layer, ((u, e.block.state_dict()) for u, e in experts if u.layer == layer))
            writer.finish("")


def compare(plan: Plan, data: Mixed, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Trains all contenders. Returns all losses, in nats per byte."""
    small = plan.manifest(plan.grid)
    first = Contender(plan, small, plan.steps, data, None)
    curve = first.train()
    first.write(folder)
    say(f"{plan.steps} steps with {small.experts_total} experts: {first.loss():.4f} nats per byte")
    opened = ModelFolder.open(folder)
    grown = grown_manifest(small, plan.larger)
    begun: Sequence[tuple[str, Manifest, Callable[[], ModelFolder | UpcycledModel | None], int]] = (
        (AS_IT_WAS, small, lambda: opened, plan.steps),
        (GROWN, grown, lambda: UpcycledModel(opened, grown, lambda stage: None), plan.steps),
        (FROM_NOTHING, grown, lambda: None, 0),
    )
    runs: dict[str, Any] = {}
    for name, manifest, source, before in begun:
        steps = plan.more if before else plan.steps + plan.more
        contender = Contender(plan, manifest, steps, data, source())
        found = contender.train(before)
        runs[name] = {"curve": found, "at_first": found[str(before)], "loss": contender.loss()}
        say(f"{name}: {runs[name]['loss']:.4f} nats per byte")
    opened.close()
    return {
        "before": curve,
        "runs": runs,
        "ahead_from": overtakes(runs[GROWN]["curve"], runs[AS_IT_WAS]["curve"]),
    }


def show(plan: Plan, results: Mapping[str, Any], console: Console) -> None:
    grids = " to ".join("×".join(map(str, grid)) for grid in (plan.grid, plan.larger))
    table = Table(
        title=f"{grids} experts after {plan.steps} of {plan.steps + plan.more} steps, nats per byte"
    )
    for column in ("goes on with", "at first", "at the end", "of what goes on as it was"):
        table.add_column(column, justify="left" if column == "goes on with" else "right")
    base = results["runs"][AS_IT_WAS]["loss"]
    for name, run in results["runs"].items():
        table.add_row(name, f"{run['at_first']:.4f}", f"{run['loss']:.4f}", f"{run['loss'] / base:.4f}")
    console.print(table)
    ahead = results["ahead_from"]
    console.print(
        "the larger grid is not ahead at the end"
        if ahead is None
        else f"the larger grid is ahead from step {ahead} on: {ahead - plan.steps} after it grew"
    )


def main() -> None:
    parser = command_parser(__doc__, "small models and a few steps")
    parser.add_argument("--grid", type=int, nargs=2, metavar="N", help="of the larger one")
    parser.add_argument("--steps", type=int, help=f"before the model grows, by default {Plan.steps}")
    parser.add_argument("--more", type=int, help=f"after it, by default {Plan.more}")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    end_in_order_when_stopped()
    given = {"larger": options.grid and tuple(options.grid), "steps": options.steps, "more": options.more}
    plan = replace(
        QUICK_PLAN if options.quick else Plan(),
        seed=options.seed,
        **{name: value for name, value in given.items() if value is not None},
    )
    torch.set_num_threads(1)
    console = Console(width=120)
    data = Mixed(load_texts(QUICK), plan.context, plan.seed)
    with scratch_folder() as folder:
        results = compare(plan, data, folder / "model", console.print)
    show(plan, results, console)
    write_figures(options.json, results)


if __name__ == "__main__":
    main()
