"""Memories for the benchmarks: built from reference works in this process, and written as hosts store them."""

import hashlib
import math
import mmap
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.memory import corpora
from dht.memory import MemoryManifest, Part, Passage, ShardInfo
from expert_server.memory.shard import Shard, serialized
from talkoot.memory.build import text_of
from talkoot.memory.clustering import build_codebook, two_cells
from talkoot.memory.passages import read_passages
from talkoot.memory.shards import write_shards
from talkoot.memory.training import WordCounter, train_static_encoder
from trainer_client.memory.codebook import Codebook
from trainer_client.memory.encoder import STATIC, DualEncoder, StaticEncoder

GRID = (16, 16)


@dataclass(frozen=True)
class BuiltMemory:
    """A memory in this process, which holds every passage once."""

    passages: Sequence[Passage]
    vectors_ND: NDArray[np.int8]
    cells_NT: NDArray[np.int64]
    """The numbers of the cells that each passage is in."""
    encoder: StaticEncoder | DualEncoder
    codebook: Codebook
    grid: tuple[int, ...] = GRID

    @property
    def cell_sizes(self) -> NDArray[np.int64]:
        """The number of passages in each cell."""
        sizes: NDArray[Any] = np.bincount(self.cells_NT.ravel(), minlength=math.prod(self.grid))
        return sizes


def build_memory(folder: Path, held_out: int, most: float = math.inf) -> tuple[BuiltMemory, list[str]]:
    """Builds a memory from the installed works. Returns it, and the texts of randomly drawn passages that were left
    out.

    `folder`: where the works are written as JSON lines. `most`: roughly the largest number of characters of each work.
    """
    files = corpora.write(corpora.installed(), folder, most)
    every = list({passage.text: passage for passage in read_passages(files)}.values())
    random.Random(0).shuffle(every)
    passages = every[held_out:]
    words = WordCounter()
    for passage in passages:
        words.add(text_of(passage))
    encoder = train_static_encoder(words.finish())
    vectors_ND = encoder.encode([text_of(passage) for passage in passages])
    codebook = build_codebook(vectors_ND, GRID)
    memory = BuiltMemory(passages, vectors_ND, two_cells(codebook, vectors_ND), encoder, codebook)
    return memory, [passage.text for passage in every[:held_out]]


def open_shards(folder: Path, manifest: MemoryManifest) -> Iterator[tuple[ShardInfo, Shard]]:
    for info in manifest.shards:
        with (folder / "shards" / info.root.hex()).open("rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        yield info, Shard.parse(data, info, manifest.dimensions)


def open_codebook(folder: Path, manifest: MemoryManifest) -> Codebook:
    data = (folder / "parts" / manifest.codebook.sha256.hex()).read_bytes()
    return Codebook.from_bytes(data, manifest.grid, manifest.dimensions)


class _Computed:
    """A sequence of passages that are made when they are needed."""

    def __init__(self, passage: Callable[[int], Passage]) -> None:
        self._passage = passage

    def __getitem__(self, number: int) -> Passage:
        return self._passage(number)

    def size(self, number: int) -> int:
        return len(serialized(self._passage(number)))


def write_memory(
    folder: Path,
    like: BuiltMemory,
    vectors_ND: NDArray[np.int8],
    cells_NT: NDArray[np.int64],
    passage: Callable[[int], Passage],
) -> MemoryManifest:
    """Writes a memory with the encoder, the codebook and the grid of another. `passage`: returns the passage with a
    given number.
    """
    for name in ("parts", "shards"):
        (folder / name).mkdir(parents=True)
    parts = []
    for data in (like.encoder.to_bytes(), like.codebook.to_bytes()):
        parts.append(Part(hashlib.sha256(data).digest(), len(data)))
        (folder / "parts" / parts[-1].sha256.hex()).write_bytes(data)
    passages, numbers = _Computed(passage), np.arange(len(vectors_ND))
    shards = write_shards(folder / "shards", passages, vectors_ND, cells_NT, like.grid, numbers)
    manifest = MemoryManifest(
        name="works",
        revision=1,
        about="",
        created_at=1.0,
        encoder_kind=STATIC,
        encoder=parts[0],
        dimensions=vectors_ND.shape[1],
        codebook=parts[1],
        grid=like.grid,
        licenses=tuple(sorted({found.license for found in like.passages})),
        shards=tuple(shards),
        revoked=frozenset(),
    )
    (folder / "manifest").write_bytes(manifest.serialize())
    return manifest
