"""Whether what is found answers the question: a definition is to find the entry of another dictionary for its word.

Passages are ranked by the inner product of vectors, by BM25, and by both. All rankings are over the whole memory.
"""

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.memory.built import BuiltMemory
from benchmarks.memory.corpora import Definition
from benchmarks.memory.recall import K, best, exact_scores
from benchmarks.simulated_p2p import SimulatedIdentity
from dht.memory import MemoryID, Passage
from talkoot.memory.build import text_of
from trainer_client.memory.retriever import Hit, ranked_by_words

_ANSWERS = "gcide.jsonl:"
"""How the sources of the entries begin."""
_CANDIDATES = 3 * K
"""Passages that searches also rank by their words."""


@dataclass(frozen=True)
class Question:
    """A text, and which passages answer it."""

    text: str
    answers: frozenset[int]


def questions_of(
    definitions: Iterator[Definition], passages: Sequence[Passage], most: int, rng: random.Random
) -> list[Question]:
    """Definitions of words that the dictionary has an entry for; none if either is not installed."""
    entries = defaultdict(set)
    for position, passage in enumerate(passages):
        if passage.source.startswith(_ANSWERS):
            entries[passage.title.lower()].add(position)
    asked = [
        Question(definition.text, frozenset(entries[definition.word]))
        for definition in definitions
        if definition.word in entries
    ]
    return rng.sample(asked, min(most, len(asked)))


def measure(memory: BuiltMemory, questions: Sequence[Question]) -> dict[str, Any]:
    """How often the best passage, and one of the ten best, is an answer, by way of ranking."""
    texts = [question.text for question in questions]
    by_vectors = inner_product(memory, texts, _CANDIDATES)
    rankings = {"inner_product": by_vectors, "fusion": fusion(memory, texts, by_vectors)}
    if find_spec("bm25s") is not None:
        rankings["bm25"] = bm25(memory, texts)
    found = {name: _hits(ranking, questions) for name, ranking in rankings.items()}
    return {"questions": len(questions), **found}


Ranking = Sequence[NDArray[np.int64]]
"""Positions of passages for each text, best first."""


def inner_product(memory: BuiltMemory, texts: Sequence[str], count: int) -> Ranking:
    vectors_QD = memory.encoder.encode(texts)
    return [best(scores_N, count) for scores_N in exact_scores(vectors_QD, memory.vectors_ND)]


def fusion(memory: BuiltMemory, texts: Sequence[str], by_vectors: Ranking) -> Ranking:
    """Ranks as searches do: the nearest passages, also by the words that they share with the question."""
    host = SimulatedIdentity(0).peer_id
    name = MemoryID.of("works", host)
    queries_QD = memory.encoder.encode(texts).astype(np.float32)
    rankings = []
    for text, query_D, found in zip(texts, queries_QD, by_vectors, strict=True):
        scores = memory.vectors_ND[found].astype(np.float32) @ query_D / max(1.0, float(query_D @ query_D))
        hits = [
            Hit(
                memory.passages[position],
                float(score),
                float(score),
                name,
                position.tobytes(),
                host,
                memory.vectors_ND[position],
            )
            for position, score in zip(found, scores, strict=True)
        ]
        ranked = ranked_by_words(text, hits, memory.encoder.rarity)
        rankings.append(np.array([np.frombuffer(hit.leaf, np.int64)[0] for hit in ranked]))
    return rankings


def bm25(memory: BuiltMemory, texts: Sequence[str]) -> Ranking:
    """Ranks like the package `bm25s`, without English stop words."""
    import bm25s

    def words(some: Sequence[str]) -> Any:
        return bm25s.tokenize(list(some), stopwords="en", show_progress=False)

    index = bm25s.BM25()
    index.index(words([text_of(passage) for passage in memory.passages]), show_progress=False)
    found, _ = index.retrieve(words(texts), k=K, show_progress=False)
    return list(np.asarray(found, np.int64))


def _hits(ranking: Ranking, questions: Sequence[Question]) -> dict[str, float]:
    hits = [
        [position in question.answers for position in found.tolist()]
        for found, question in zip(ranking, questions, strict=True)
    ]
    return {f"hit_at_{most}": sum(any(some[:most]) for some in hits) / max(1, len(hits)) for most in (1, K)}
