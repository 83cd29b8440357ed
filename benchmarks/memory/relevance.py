"""Whether searches find relevant passages: a definition should find another dictionary's entry for the same word.

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
"""The sources of the entries start with this."""
_CANDIDATES = 3 * K
"""How many passages searches rank by their words as well."""


@dataclass(frozen=True)
class Question:
    """A text, and which passages answer it."""

    text: str
    answers: frozenset[int]


def questions_of(
    definitions: Iterator[Definition], passages: Sequence[Passage], most: int, rng: random.Random
) -> list[Question]:
    """WordNet's definitions of words for which the dictionary has an entry. None if either is not installed."""
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
    """For each ranking, how often the best passage is an answer, and how often one of the ten best is."""
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
    """Ranks as searches do: by vectors, and the best of these also by the words that they share with the question."""
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
