"""Does reading a memory help a language model (RETRO), and is it real knowledge or copying?

    python -m benchmarks.retro [--quick] [--only PART...] [--json FILE] [--plot DIR] [--keep DIR] [--minutes M]

learning   models that read, against deeper ones of equal FLOPs and against random neighbours, by overlap, and more
hosted     training throughput at round trips of 80 ms, with retrieval and without; and training while hosts fail

With `--keep DIR` and `--json FILE`, a run continues where the last one ended, and `--minutes` ends it in time.
`--quick` trains one tiny model of each kind for a few steps, which says nothing about retrieval.
"""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.status import Status

from benchmarks.apart import end_in_order_when_stopped
from benchmarks.command import command_parser, write_figures
from benchmarks.memory import corpora
from benchmarks.retro import hosted
from benchmarks.retro.goals import verdicts
from benchmarks.retro.plots import draw
from benchmarks.retro.runs import QUICK, WAYS, Size, World, test, train
from benchmarks.retro.store import Store
from benchmarks.retro.translations import read_translations
from benchmarks.scratch import scratch_folder
from benchmarks.verdicts import table_of
from peer.errors import DataError

_SEEDS = 3


@dataclass(frozen=True)
class Files:
    """Where results are written, and the files from which a run continues."""

    results: Path | None
    folder: Path

    def write(self, results: dict[str, Any]) -> None:
        write_figures(self.results, results)


def learning(
    size: Size,
    seeds: int,
    results: dict[str, Any],
    files: Files,
    ends: float,
    console: Console,
) -> None:
    """Trains the models, adds their figures to the results, and writes the results after each model."""
    runs: dict[str, Any] = results.setdefault("learning", {})
    wanted = [(seed, way) for seed in range(seeds) for way in WAYS]
    missing = [(seed, way) for seed, way in wanted if f"{way} {seed}" not in runs]
    if not missing:
        return
    with console.status("texts") as status:
        world = _world(size, files)
        results["texts"] = dict(world.about)
        for seed, way in missing:
            name = f"{way} {seed}"
            file = files.folder / f"{name.replace(' ', '-')}.safetensors"
            done = train(
                world, way, seed, file, lambda: time.monotonic() > ends, partial(_show, console, status, name)
            )
            if done is None:
                return
            model, figures = done
            runs[name] = figures | {"bits_per_byte": test(world, model)}
            files.write(results)


def _world(size: Size, files: Files) -> World:
    kept = files.folder / "world.safetensors"
    if kept.exists():
        return World.load(kept, size)
    works = read_translations(size.characters)
    world = World.make(Store(files.folder, works, size.context, size.vocabulary, size.spec), size)
    world.save(kept)
    return world


def _hosted(results: dict[str, Any], files: Files, folder: Path, console: Console, *, quick: bool) -> None:
    console.print("hosted: building a memory")
    memory = hosted.HostedMemory(folder / "hosted", 1e5 if quick else 5e5)
    results["pace"] = hosted.pace(memory, 8 if quick else 36, 1 if quick else 3, console.print)
    files.write(results)
    results["faults"] = hosted.faults(memory, 12 if quick else 120, console.print)


def _show(console: Console, status: Status, what: str, step: int, loss: float) -> None:
    status.update(f"{what}: step {step}, loss {loss:.3f}")
    if not console.is_terminal and step % 100 == 0:
        console.print(f"{what}: step {step}, loss {loss:.3f}")


def main() -> None:
    parser = command_parser(__doc__, "tiny models, under 90 seconds")
    parser.add_argument("--only", nargs="+", choices=("learning", "hosted"), help="parts to measure")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw curves there, as SVG")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep there what is done, to go on from")
    parser.add_argument("--seeds", type=int, default=_SEEDS, help="models of each kind")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="train no longer than that")
    options = parser.parse_args()
    end_in_order_when_stopped()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    console = Console(width=130)
    for command in corpora.remedies():
        console.print(f"Left out for want of: {command}")
    results: dict[str, Any] = {}
    if options.json and options.json.exists() and not options.quick:
        results = json.loads(options.json.read_text())
    size, seeds = (QUICK, 1) if options.quick else (Size(), options.seeds)
    ends = time.monotonic() + 60 * options.minutes
    with scratch_folder() as temporary:
        files = Files(options.json, options.keep or temporary)
        files.folder.mkdir(parents=True, exist_ok=True)
        measure: dict[str, Callable[[], None]] = {
            "learning": lambda: learning(size, seeds, results, files, ends, console),
            "hosted": lambda: _hosted(results, files, temporary, console, quick=options.quick),
        }
        for part, run in measure.items():
            if options.only and part not in options.only:
                continue
            try:
                run()
            except DataError as error:
                console.print(f"Left out: {error}")
            files.write(results)
    console.print(table_of("models that read a memory", verdicts(results, is_quick=options.quick)))
    if options.plot:
        for path in draw(results, options.plot):
            console.print(f"wrote {path}")


if __name__ == "__main__":
    main()
