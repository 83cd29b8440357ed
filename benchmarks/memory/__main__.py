"""Memories: what searches find, what hosts need and how fast they answer, and how searches cope with hosts that lie.

    python -m benchmarks.memory [--quick] [--only PART...] [--json FILE] [--plot DIR]

The memory is built from two dictionaries, Python's documentation and the Bible, as far as they are installed.

recall      searching a few of 256 cells, against searching all of them
relevance   WordNet's definitions as questions, against BM25
large       a million passages: disk, memory, and whether they are found
throughput  one host over gRPC, against FAISS in one process
killed      half of the hosts of a memory killed, in a swarm of node processes
lying       searches in which a quarter of the hosts lies
hops        the first search and later ones in simulated swarms
hosting     what hosts spend on announcing and looking in simulated swarms, and how soon shards have two replicas

Parts that are not run are taken from the JSON file, if it is there. `--quick` takes a few thousand passages and kills
no node; it is too short for figures worth quoting.
"""

import json
import logging
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.apart import end_in_order_when_stopped
from benchmarks.command import command_parser, write_figures
from benchmarks.memory import corpora, hops, hosting, killed, large, lying, recall, relevance, throughput
from benchmarks.memory.built import BuiltMemory, build_memory, write_memory
from benchmarks.memory.goals import verdicts
from benchmarks.memory.plots import draw
from benchmarks.scratch import scratch_folder
from benchmarks.verdicts import table_of
from talkoot.memory.clustering import build_codebook, grid_for, two_cells

_QUICK_KINDS = ("forged text", "omits the best", "stalls")


@dataclass(frozen=True)
class Extent:
    """How much is measured."""

    characters: float
    """The largest number of characters taken from each work."""
    held_out: int
    questions: int
    large: int
    served: int
    seconds: float
    """How long one measurement of throughput takes."""
    searches: int
    """The number of searches for each kind of liar."""
    liars: Sequence[str]
    killed: int
    """Passages in the memory of which a host is killed; 0: that part is left out."""
    nodes: Sequence[int]
    """The sizes of the simulated swarms."""
    searchers: int
    """The number of peers that make their first search in each of the swarms: the time depends on the query."""
    hosting: Sequence[hosting.SwarmSize]


FULL = Extent(
    math.inf, 1000, 2000, 1_000_000, 100_000, 4.0, 1000, tuple(lying.KINDS), 4_000, (100, 1000, 10_000), 20,
    [hosting.SwarmSize(*size) for size in ((30, 5, 64, 8), (60, 8, 512, 3), (120, 40, 1024, 1))],
)  # fmt: skip
QUICK = Extent(
    8e5, 200, 200, 20_000, 5_000, 0.5, 100, _QUICK_KINDS, 0, (50,), 6, [hosting.SwarmSize(20, 4, 32, 1)]
)


class Parts:
    """The parts of the benchmark. They share one memory, which is built when it is first needed."""

    def __init__(self, extent: Extent, folder: Path) -> None:
        self._extent = extent
        self._folder = folder

    @cached_property
    def _built(self) -> tuple[BuiltMemory, list[str]]:
        return build_memory(self._folder / "works", self._extent.held_out, self._extent.characters)

    @cached_property
    def _written(self) -> Path:
        memory, _ = self._built
        folder = self._folder / "memory"
        write_memory(folder, memory, memory.vectors_ND, memory.cells_NT, lambda n: memory.passages[n])
        return folder

    def recall(self) -> dict[str, Any]:
        began = time.monotonic()
        memory, held_out = self._built
        rng = random.Random(0)
        queries = {"texts": held_out, "questions": [recall.span(text, rng) for text in held_out]}
        bytes_of = {str(asked): recall.wire_bytes(memory, asked) for asked in recall.ASKED}
        built_s = time.monotonic() - began
        return recall.measure_recall(memory, queries) | {"wire_bytes": bytes_of, "built_in_s": built_s}

    def relevance(self) -> dict[str, Any]:
        memory, _ = self._built
        asked = relevance.questions_of(
            corpora.definitions(), memory.passages, self._extent.questions, random.Random(0)
        )
        return relevance.measure(memory, asked) if asked else {}

    def large(self) -> dict[str, Any]:
        memory, _ = self._built
        return large.measure(memory, self._extent.large, 200, self._folder / "large")

    def throughput(self) -> dict[str, Any]:
        memory, _ = self._built
        texts = self._questions(10 * throughput.BATCH)
        extent = self._extent
        return throughput.measure(memory, extent.served, texts, extent.seconds, self._folder / "served")

    def killed(self) -> dict[str, Any]:
        memory, _ = self._built
        most = self._extent.killed
        if not most:
            return {}
        folder = self._folder / "killed"
        vectors_ND, grid = memory.vectors_ND[:most], grid_for(most)
        codebook = build_codebook(vectors_ND, grid)
        cells_NT = two_cells(codebook, vectors_ND)
        small = BuiltMemory(memory.passages[:most], vectors_ND, cells_NT, memory.encoder, codebook, grid)
        write_memory(folder, small, vectors_ND, cells_NT, lambda n: small.passages[n])
        return killed.measure(folder, self._questions(50))

    def hops(self) -> dict[str, Any]:
        memory, _ = self._built
        texts, extent = self._questions(60), self._extent
        # as in a host, which has one thread for each call; two would count the time they wait for each other
        torch.set_num_threads(1)
        try:
            return hops.measure(memory, self._written, texts, extent.nodes, extent.searchers)
        finally:
            torch.set_num_threads(throughput.IN_FLIGHT)

    def hosting(self) -> dict[str, Any]:
        return hosting.measure(self._extent.hosting)

    def lying(self) -> dict[str, Any]:
        memory, _ = self._built
        texts = self._questions(self._extent.searches)
        return lying.measure(memory, self._written, texts, self._extent.liars)

    def _questions(self, count: int) -> list[str]:
        """Questions made of ten consecutive words from the memory's passages."""
        memory, _ = self._built
        rng = random.Random(1)
        return [recall.span(rng.choice(memory.passages).text, rng) for _ in range(count)]


PARTS: dict[str, Callable[[Parts], dict[str, Any]]] = {
    "recall": Parts.recall,
    "relevance": Parts.relevance,
    "large": Parts.large,
    "throughput": Parts.throughput,
    "killed": Parts.killed,
    "lying": Parts.lying,
    "hops": Parts.hops,
    "hosting": Parts.hosting,
}


def missing() -> list[str]:
    """Commands that install the missing packages that the benchmark uses."""
    packages = [
        name for module, name in (("faiss", "faiss-cpu"), ("bm25s", "bm25s")) if find_spec(module) is None
    ]
    return corpora.remedies() + ([f"pip install {' '.join(packages)}"] if packages else [])


def show(results: Mapping[str, Any], console: Console) -> None:
    console.print(table_of("memories", verdicts(results)))


def main() -> None:
    parser = command_parser(__doc__, "a small memory, under a minute")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw curves there, as SVG")
    options = parser.parse_args()
    end_in_order_when_stopped()
    logging.disable(logging.WARNING)  # A warning is logged for each liar.
    torch.set_num_threads(throughput.IN_FLIGHT)
    console = Console(width=130)
    for command in missing():
        console.print(f"Left out for want of: {command}")
    results: dict[str, Any] = {}
    if options.json and options.json.exists() and options.only:
        results = json.loads(options.json.read_text())
    with scratch_folder() as folder:
        parts = Parts(QUICK if options.quick else FULL, folder)
        for name, measure in PARTS.items():
            if not options.only or name in options.only:
                with console.status(name):
                    results[name] = measure(parts)
                write_figures(options.json, results)
    show(results, console)
    if options.plot:
        for path in draw(results, options.plot):
            console.print(f"wrote {path}")


if __name__ == "__main__":
    main()
