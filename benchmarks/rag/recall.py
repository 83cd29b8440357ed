"""How many questions find a passage that answers them among the first twenty, for each way of ranking.

The words and headings of the test do not occur in training. All rankings are over all passages.

Shapes: N passages, Q questions, D numbers in a vector, W weights.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.memory.recall import best, exact_scores
from benchmarks.rag.questions import Asked, Question
from talkoot.memory.build import text_of
from talkoot.memory.dual_training import CANDIDATES, K
from talkoot.memory.pairs import split_by_title
from talkoot.memory.train_encoder import PassageSample, learn
from trainer_client.memory.encoder import Encoder
from trainer_client.memory.retriever import shared_words

CUTS = (1, 5, K)
_UNITED = 200
"""The number of passages of each ranking that are fused."""
_WEIGHTS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Weights of the cosine of vectors, in standard deviations of the scores, against BM25."""
_TUNED_WITH = 1000

Ranking = Sequence[NDArray[np.int64]]
"""Positions of passages for each question, best first."""


def measure(asked: Asked) -> dict[str, Any]:
    began = time.process_time()
    pairs = asked.pairs()
    sample = PassageSample(0)
    for passage in asked.passages:
        sample.add(passage)
    learned = learn(sample, pairs)
    trained_s = time.process_time() - began
    texts = [text_of(passage) for passage in asked.passages]
    _, validated = split_by_title(pairs)
    kept = {(pair.question, pair.answers) for pair in validated}
    tuned_with = [q for q in asked.learned if (q.text, (q.about,)) in kept][:_TUNED_WITH]
    questions = [*tuned_with, *asked.tested]
    vectors = nearest(learned.word_vectors, texts, questions)
    dense = nearest(learned.encoder, texts, questions)
    sparse = bm25(texts, questions)
    tuning, testing = slice(0, len(tuned_with)), slice(len(tuned_with), None)
    weight = max(
        _WEIGHTS,
        key=lambda each: recall(fused(sparse[tuning], dense[tuning], each), tuned_with),
    )
    rankings = {
        "bm25": [found for found, _ in sparse[testing]],
        "word_vectors": [found for found, _ in vectors[testing]],
        "dpr": [found for found, _ in dense[testing]],
        "fused": fused(sparse[testing], dense[testing], weight),
        "as_searched": as_searched(learned.encoder, texts, asked.tested, dense[testing]),
    }
    kinds = {"all": list(asked.tested)} | {
        kind: [question for question in asked.tested if question.kind == kind]
        for kind in dict.fromkeys(question.kind for question in asked.tested)
    }
    of = {question: at for at, question in enumerate(asked.tested)}
    return {
        "passages": len(texts),
        "pairs": learned.pairs,
        "negatives": learned.negatives,
        "trained_cpu_s": trained_s,
        "questions": {kind: len(some) for kind, some in kinds.items()},
        "weight": weight,
        "word_weight": learned.encoder.word_weight,
        "recall": {
            name: {
                kind: {str(cut): recall([ranking[of[q]] for q in some], some, cut) for cut in CUTS}
                for kind, some in kinds.items()
            }
            for name, ranking in rankings.items()
        },
    }


Scored = list[tuple[NDArray[np.int64], NDArray[np.float32]]]
"""Positions of the best passages and their scores, for each question."""


def nearest(encoder: Encoder, texts: Sequence[str], questions: Sequence[Question]) -> Scored:
    queries_QD = encoder.encode_questions([question.text for question in questions])
    stored_ND = encoder.encode(texts)
    scored = []
    for scores_N in exact_scores(queries_QD, stored_ND):
        found = best(scores_N, _UNITED)
        scored.append((found, scores_N[found]))
    return scored


def bm25(texts: Sequence[str], questions: Sequence[Question]) -> Scored:
    """Ranks like the package `bm25s`, without English stop words."""
    import bm25s

    def words(some: Sequence[str]) -> Any:
        return bm25s.tokenize(list(some), stopwords="en", show_progress=False)

    index = bm25s.BM25()
    index.index(words(texts), show_progress=False)
    found, scores = index.retrieve(
        words([question.text for question in questions]), k=min(_UNITED, len(texts)), show_progress=False
    )
    return list(zip(np.asarray(found, np.int64), np.asarray(scores, np.float32), strict=True))


def fused(sparse: Scored, dense: Scored, weight: float) -> Ranking:
    """Ranks the best of both rankings by the sum of their scores (DPR, section 5). A passage that one ranking lacks
    gets the lowest score of that ranking.
    """
    rankings = []
    for (words, words_scores), (near, near_scores) in zip(sparse, dense, strict=True):
        both = np.union1d(words, near)
        total = _aligned(both, words, words_scores) + weight * _aligned(both, near, near_scores)
        rankings.append(both[np.argsort(-total, kind="stable")])
    return rankings


def _aligned(
    wanted: NDArray[np.int64], found: NDArray[np.int64], scores: NDArray[np.float32]
) -> NDArray[np.float32]:
    """The scores of the wanted passages, in standard deviations from the mean of those that were found."""
    scale = max(float(scores.std()), 1e-6)
    order = np.argsort(found)
    at = order[np.minimum(np.searchsorted(found[order], wanted), len(found) - 1)]
    aligned = np.where(found[at] == wanted, scores[at], scores.min())
    result: NDArray[np.float32] = (aligned - scores.mean()) / scale
    return result


def as_searched(
    encoder: Encoder, texts: Sequence[str], questions: Sequence[Question], dense: Scored
) -> Ranking:
    """Ranks as a swarm does: takes three times as many of the nearest passages, and ranks them also by their words."""
    rankings = []
    queries_QD = encoder.encode_questions([question.text for question in questions]).astype(np.float32)
    for question, query_D, (found, scores) in zip(questions, queries_QD, dense, strict=True):
        some = found[: CANDIDATES * K]
        shares = np.array(shared_words(question.text, [texts[n] for n in some], encoder.rarity))
        total = scores[: len(some)] / max(1.0, float(query_D @ query_D)) + encoder.word_weight * shares
        rankings.append(some[np.argsort(-total, kind="stable")])
    return rankings


def recall(ranking: Ranking, questions: Sequence[Question], cut: int = K) -> float:
    hits = [
        bool(np.isin(found[:cut], question.answers).any())
        for found, question in zip(ranking, questions, strict=True)
    ]
    return sum(hits) / max(1, len(hits))
