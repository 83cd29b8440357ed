"""A memory of a million passages: the disk space and memory that its shards need, and whether passages are found.

Its vectors are those of a real memory with noise, and its texts are joined from halves of real ones.

    python -m benchmarks.memory.large FOLDER QUERIES

This searches all shards in the folder, in a process that does nothing else.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from benchmarks.apart import run_apart
from benchmarks.memory.built import BuiltMemory, open_codebook, write_memory
from benchmarks.memory.recall import K, best, exact_scores
from dht.memory import Passage, Place
from dht.uid import number_of
from expert_server.memory.search import search_together
from expert_server.memory.shard import Shard
from expert_server.memory.store import MemoryStore
from talkoot.memory.clustering import two_cells
from trainer_client.memory.encoder import to_vectors

ASKED = 8
_NOISE = 0.5
"""The size of the noise, as a share of a vector's length."""
_ROWS_AT_ONCE = 65_536
_HOST_LIMIT_S = 600.0


def measure(memory: BuiltMemory, passages: int, queries: int, folder: Path) -> dict[str, Any]:
    """Builds the memory and measures it. `folder`: where it is written; it must not exist yet."""
    rng = np.random.default_rng(0)
    began = time.monotonic()
    sources_NH = rng.integers(len(memory.passages), size=(passages, 2))
    vectors_ND = _noisy(memory.vectors_ND, sources_NH[:, 0], rng)
    cells_NT = two_cells(memory.codebook, vectors_ND)
    halves = [_halves(passage.text) for passage in memory.passages]
    text_bytes = 0

    def passage(number: int) -> Passage:
        first, second = sources_NH[number]
        like = memory.passages[first]
        return Passage(halves[first][0] + halves[second][1], like.title, like.source, number, like.license)

    for first, second in sources_NH:
        text_bytes += len((halves[first][0] + halves[second][1]).encode())
    manifest = write_memory(folder, memory, vectors_ND, cells_NT, passage)
    built_s = time.monotonic() - began
    asked_QD = _noisy(memory.vectors_ND, rng.integers(len(memory.passages), size=queries), rng)
    np.save(folder / "queries.npy", asked_QD)
    found = run_apart("benchmarks.memory.large", [str(folder), str(folder / "queries.npy")], _HOST_LIMIT_S)
    recalls = []
    for scores, exact in zip(found.pop("scores"), best_scores(asked_QD, vectors_ND), strict=True):
        recalls.append(sum(score >= exact[-1] for score in scores) / len(exact))
    disk = sum(info.size for info in manifest.shards)
    plain = text_bytes + vectors_ND.nbytes
    return found | {
        "passages": passages,
        "built_in_s": built_s,
        "shards": len(manifest.shards),
        "text_and_vectors_bytes": plain,
        "disk_bytes": disk,
        "disk_vs_plain": disk / plain,
        "memory_vs_plain": found["memory_bytes"] / plain,
        "recall": float(np.mean(recalls)),
    }


def best_scores(queries_QD: NDArray[np.int8], vectors_ND: NDArray[np.int8]) -> list[list[float]]:
    """The ten best scores of each query among all passages, best first."""
    scores: list[list[float]] = [[] for _ in queries_QD]
    for begin in range(0, len(vectors_ND), _ROWS_AT_ONCE):
        parts = exact_scores(queries_QD, vectors_ND[begin : begin + _ROWS_AT_ONCE])
        for some, part in zip(scores, parts, strict=True):
            some += part[best(part, K)].tolist()
    return [sorted(some, reverse=True)[:K] for some in scores]


def host(folder: Path, queries: Path) -> dict[str, Any]:
    """Opens all shards and searches the best cells of each query."""
    asked_QD = np.load(queries)
    before, began = _resident_bytes(), time.monotonic()
    store = MemoryStore.open(folder)
    shards: dict[int, list[Shard]] = {}
    for info in store.manifest.shards:
        store.load(info.root)
        shards.setdefault(number_of(info.cell, store.manifest.grid), []).append(store.shards[info.root])
    codebook = open_codebook(folder, store.manifest)
    opened_s, began = time.monotonic() - began, time.monotonic()
    scores = []
    for query_D in asked_QD:
        some: dict[Place, int] = {}
        for cell in codebook.assign(query_D[None], ASKED)[0]:
            for shard in shards.get(int(cell), []):
                _, (positions,), (found,) = search_together([shard], query_D[None], K)
                some |= {
                    shard.text_at(int(at)): int(score) for at, score in zip(positions, found, strict=True)
                }
        scores.append(sorted(some.values(), reverse=True)[:K])
    return {
        "scores": scores,
        "opened_in_s": opened_s,
        "query_ms": 1000 * (time.monotonic() - began) / len(asked_QD),
        "memory_bytes": _resident_bytes() - before,
    }


def _resident_bytes() -> int:
    return psutil.Process().memory_info().rss


def _noisy(
    vectors_ND: NDArray[np.int8], sources: NDArray[np.int64], rng: np.random.Generator
) -> NDArray[np.int8]:
    """For each source, a vector near it."""
    parts = []
    for begin in range(0, len(sources), _ROWS_AT_ONCE):
        near_BD = vectors_ND[sources[begin : begin + _ROWS_AT_ONCE]].astype(np.float32)
        noise_BD = rng.standard_normal(near_BD.shape, np.float32)
        length_B1 = np.linalg.norm(near_BD, axis=1, keepdims=True)
        parts.append(to_vectors(near_BD + noise_BD * length_B1 * (_NOISE / near_BD.shape[1] ** 0.5)))
    return np.concatenate(parts)


def _halves(text: str) -> tuple[str, str]:
    middle = text.find(" ", len(text) // 2)
    return text[:middle], text[middle:]


if __name__ == "__main__":
    print(json.dumps(host(Path(sys.argv[1]), Path(sys.argv[2]))))
