"""Whether searching a few cells finds what searching all of them would.

There are two kinds of queries: passages that are neither in the memory nor known to its encoder and codebook, and ten
consecutive words of such passages.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.memory.built import BuiltMemory
from peer.merkle import HASH_BYTES
from peer.wire import memory_pb2

K = 10
ASKED = (1, 2, 4, 8, 16, 32)
"""The numbers of cells that a query is looked up in."""
QUESTION_WORDS = 10
_ROWS_AT_ONCE = 128


def measure_recall(memory: BuiltMemory, queries: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The share of the ten best passages that is in the cells asked, for each kind of query and each number of
    cells.
    """
    loads_C = memory.cell_sizes
    found: dict[str, Any] = {
        "passages": len(memory.passages),
        "cells": len(loads_C),
        "largest_vs_mean": float(loads_C.max() / loads_C.mean()),
        "loads": np.sort(loads_C)[::-1].tolist(),
    }
    for kind, texts in queries.items():
        vectors_QD = memory.encoder.encode(texts)
        ranks_QC = ranks_of_cells(memory.codebook.scores(vectors_QD))
        recalls_QA = np.array(
            [
                _recalls(scores_N, ranks_QC[row][memory.cells_NT].min(axis=1))
                for row, scores_N in enumerate(exact_scores(vectors_QD, memory.vectors_ND))
            ]
        )
        found[kind] = {
            "queries": len(texts),
            "recall": _by_asked(recalls_QA.mean(axis=0)),
            "searched": _by_asked([(loads_C * (ranks_QC < asked)).sum(1).mean() for asked in ASKED]),
        }
    return found


def ranks_of_cells(scores_QC: NDArray[np.float32]) -> NDArray[np.int64]:
    """For each cell, how many cells have a better score."""
    order_QC = np.argsort(-scores_QC, axis=1, kind="stable")
    ranks_QC = np.empty_like(order_QC)
    np.put_along_axis(ranks_QC, order_QC, np.arange(scores_QC.shape[1])[None], axis=1)
    return ranks_QC


def exact_scores(queries_QD: NDArray[np.int8], vectors_ND: NDArray[np.int8]) -> Iterator[NDArray[np.float32]]:
    """The scores of all passages, query by query. They are whole numbers below 2²⁴, so float32 is exact."""
    stored_DN = vectors_ND.astype(np.float32).T
    for begin in range(0, len(queries_QD), _ROWS_AT_ONCE):
        yield from queries_QD[begin : begin + _ROWS_AT_ONCE].astype(np.float32) @ stored_DN


def best(scores_N: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """The positions of the k best scores, best first. Among equal scores, the first comes first."""
    k = min(k, len(scores_N))
    some = np.flatnonzero(scores_N >= np.partition(scores_N, -k)[-k])
    return some[np.argsort(-scores_N[some], kind="stable")][:k]


def wire_bytes(memory: BuiltMemory, asked: int) -> float:
    """The bytes of a query and its answer if one host has all the cells asked, and the ten best passages are fetched
    from it.

    Proofs have the size of those in shards of 1,000 passages. Each cell is taken to be one shard.
    """
    shards = [memory_pb2.ShardQueries(root=bytes(HASH_BYTES)) for _ in range(asked)]
    dimensions = memory.vectors_ND.shape[1]
    search = memory_pb2.SearchRequest(vectors=bytes(dimensions), k=K, shards=shards, memory="a" * 32)
    best_found = memory_pb2.Found(
        shards=[asked] * K, positions=[1000] * K, scores=[10**6] * K, texts=[1] * K, text_positions=[1000] * K
    )
    # Half of the passages are found in secondary shards, each from another cell.
    answer = memory_pb2.SearchReply(found=[best_found], text_roots=[bytes(HASH_BYTES)] * (K // 2))
    some = random.Random(0).sample(memory.passages, K)
    read = memory_pb2.ReadReply(
        passages=[
            memory_pb2.ProvenPassage(
                passage=passage.message(), vector=bytes(dimensions), path=bytes(10 * HASH_BYTES)
            )
            for passage in some
        ]
    )
    wanted = memory_pb2.ReadRequest(
        shards=[memory_pb2.ShardPositions(root=bytes(HASH_BYTES), positions=[1000])] * K
    )
    return float(sum(message.ByteSize() for message in (search, answer, wanted, read)))


def span(text: str, rng: random.Random) -> str:
    """Some consecutive words of a text, from a random place."""
    all_words = text.split()
    begin = rng.randrange(max(1, len(all_words) - QUESTION_WORDS + 1))
    return " ".join(all_words[begin : begin + QUESTION_WORDS])


def _recalls(scores_N: NDArray[np.float32], ranks_N: NDArray[np.int64]) -> list[float]:
    """The recall for each number of cells. `ranks_N`: the rank of each passage's best cell. A passage whose score
    equals that of the tenth counts as a hit.
    """
    k = min(K, len(scores_N))
    wanted = ranks_N[scores_N >= np.partition(scores_N, -k)[-k]]
    return [min(k, int((wanted < asked).sum())) / k for asked in ASKED]


def _by_asked(figures: Sequence[Any] | NDArray[Any]) -> dict[str, float]:
    return {str(asked): float(figure) for asked, figure in zip(ASKED, figures, strict=True)}
