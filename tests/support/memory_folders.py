"""Small memories for tests: their passages, vectors, shards and folders."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dht.memory import MemoryManifest, Part, Passage, Place, ShardInfo, Vectors
from dht.uid import coordinate_of
from expert_server.memory.shard import PrimaryShard, SecondaryShard
from expert_server.memory.store import MemoryStore
from peer.merkle import MerkleTree

DIMENSIONS = 8
WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "some", "other", "thing")


def some_passages(count: int, seed: int = 0, dimensions: int = DIMENSIONS) -> tuple[list[Passage], Vectors]:
    rng = np.random.default_rng(seed)
    vectors = rng.integers(-127, 128, (count, dimensions), np.int8)
    texts = [" ".join(rng.choice(WORDS, 20)) for _ in range(count)]
    return [
        Passage(f"{seed}.{i} {text}", f"title {i}", "a.txt", i, "CC0-1.0") for i, text in enumerate(texts)
    ], vectors


def passages_in(store: MemoryStore, root: bytes) -> list[Passage | None]:
    """The passages of a primary shard; None for revoked ones."""
    shard = store.shards[root]
    assert isinstance(shard, PrimaryShard)
    return list(shard.passages())


def shard_info(
    data: bytes, passages: Sequence[Passage], vectors: Vectors, cell: tuple[int, ...] = (0,)
) -> ShardInfo:
    leaves = [passage.leaf(vector.tobytes()) for passage, vector in zip(passages, vectors, strict=True)]
    return ShardInfo(cell, MerkleTree(leaves).root, len(leaves), len(data))


@dataclass(frozen=True)
class SampleMemory:
    """A memory with a primary shard for each cell, and optionally a secondary one."""

    manifest: MemoryManifest
    files: dict[bytes, bytes]
    """The file of each shard, by root."""
    passages: dict[bytes, tuple[list[Passage], Vectors]]
    encoder: bytes
    codebook: bytes

    @classmethod
    def make(
        cls,
        name: str = "python-docs",
        grid: tuple[int, ...] = (2, 2),
        each: int = 20,
        seed: int = 0,
        licenses: tuple[str, ...] = ("CC0-1.0",),
        *,
        is_twofold: bool = False,
    ) -> "SampleMemory":
        """`each`: passages in a cell. `is_twofold`: whether the next cell has them too, in a secondary shard."""
        encoder, codebook = b"encoder %d" % seed, json.dumps(grid).encode()
        files, passages, shards = {}, {}, []
        for number in range(int(np.prod(grid))):
            texts, vectors = some_passages(each, 1000 * seed + number)
            data = PrimaryShard.build(texts, vectors)
            shards.append(shard_info(data, texts, vectors, coordinate_of(number, grid)))
            files[shards[-1].root], passages[shards[-1].root] = data, (texts, vectors)
        for number, first in enumerate(list(shards) if is_twofold else ()):
            texts, vectors = passages[first.root]
            data = SecondaryShard.build([Place(first.root, n) for n in range(each)], vectors)
            root, cell = SecondaryShard.root_of(data), coordinate_of((number + 1) % len(passages), grid)
            shards.append(ShardInfo(cell, root, each, len(data), True))
            files[root] = data
        parts = [Part(hashlib.sha256(data).digest(), len(data)) for data in (encoder, codebook)]
        manifest = MemoryManifest(
            name,
            1,
            "",
            1.0,
            "static",
            parts[0],
            DIMENSIONS,
            parts[1],
            grid,
            licenses,
            tuple(shards),
            frozenset(),
        )
        return cls(manifest, files, passages, encoder, codebook)

    @property
    def roots(self) -> list[bytes]:
        return [shard.root for shard in self.manifest.shards]

    def leaf(self, root: bytes, position: int) -> bytes:
        passages, vectors = self.passages[root]
        return passages[position].leaf(vectors[position].tobytes())

    def revoking(self, *places: tuple[bytes, int]) -> "SampleMemory":
        """The next revision, without the passages at these positions."""
        manifest = replace(
            self.manifest,
            revision=self.manifest.revision + 1,
            revoked=self.manifest.revoked | {Place(*place) for place in places},
        )
        return replace(self, manifest=manifest)

    def write(self, folder: Path, wanted: Callable[[bytes], bool] = lambda root: True) -> MemoryStore:
        """Writes a folder as `talkoot memory build` makes it, with the wanted shards, which are then served."""
        store = MemoryStore.create(folder, self.manifest.serialize())
        store.save_part(self.manifest.encoder, self.encoder)
        store.save_part(self.manifest.codebook, self.codebook)
        for root, data in self.files.items():
            if wanted(root):
                store.save(root, data)
        return store
