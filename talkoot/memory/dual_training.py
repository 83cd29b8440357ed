"""Learns two encoders from questions and the passages that answer them: dense passage retrieval (DPR).

Karpukhin et al. 2020 (arXiv 2004.04906), sections 3.2 and 5.2: the encoders learn to distinguish a question's passage
from those of the other questions in its batch, and from one passage for each question that BM25 ranks high but that is
not an answer. In the paper the encoders are two BERTs; here each has a vector for each word, which needs no GPU to
train and takes microseconds for a query.

Both start from the word vectors learned from the passages themselves (`training`). Every second step continues that
task, because training on the pairs alone overfits.

Shapes: V words of the vocabulary, D numbers in a vector, N passages, Q questions, K passages found for each, W weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from peer.codec import Floats, Integers
from talkoot.memory.training import (
    Descent,
    Numbers,
    PassageWords,
    Texts,
    batches,
    cloze,
    encoder_of,
    ranges_of,
)
from trainer_client.memory.encoder import WORD_WEIGHT, DualEncoder, words_of
from trainer_client.memory.retriever import shared_words

K = 20
"""An answer counts as found if it is among this many passages."""
WEIGHTS = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0)
CANDIDATES = 3
"""How many passages are also ranked by their words, as in searches; a multiple of `K`."""
_EPOCHS, _FEWEST_STEPS = 4, 60
_BATCH, _CLOZE_BATCH = 256, 512
_TEMPERATURE = 0.1
_RATE = 0.02
_WARM_UP = 0.05
"""The share of the steps in which the step size grows."""


@dataclass(frozen=True)
class NumberedTexts:
    """The words of texts, by number, without words that are not in the vocabulary."""

    numbers: Numbers
    offsets: Integers
    """Where each text begins in `numbers`, and where the last one ends."""

    @classmethod
    def of(cls, texts: Sequence[str], number: dict[str, int]) -> Self:
        """`number`: the number of each word."""
        words = [[number[word] for word in words_of(text) if word in number] for text in texts]
        ends = np.cumsum([0, *map(len, words)])
        return cls(np.array([word for some in words for word in some], np.int32), ends)

    def some(self, rows: Integers) -> Texts:
        lengths = self.offsets[rows + 1] - self.offsets[rows]
        return Texts(self.numbers[ranges_of(self.offsets[rows], lengths)], lengths)


@dataclass(frozen=True)
class TrainingPairs:
    """Questions, a passage that answers each, and one that does not."""

    questions: NumberedTexts
    answers: NumberedTexts
    negatives: NumberedTexts


def train_dual_encoder(
    words: PassageWords,
    vectors_VD: Floats,
    pairs: TrainingPairs,
    seed: int = 0,
    watch: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> DualEncoder:
    """Two encoders of `words` that start with these vectors. Deterministic for the same pairs and seed.

    `watch` is called with the step, the number of steps, and the step's loss in nats.
    """
    rng = np.random.default_rng(seed)
    count = len(vectors_VD)
    both_VD = np.concatenate([vectors_VD, vectors_VD])  # of passages, then of questions
    descent = Descent(both_VD, _TEMPERATURE)
    usable = np.flatnonzero((np.diff(pairs.questions.offsets) > 0) & (np.diff(pairs.answers.offsets) > 0))
    size = min(_BATCH, len(usable))
    if not size:
        return DualEncoder(encoder_of(words, vectors_VD), encoder_of(words, vectors_VD), WORD_WEIGHT)
    steps = max(_EPOCHS * len(usable) // size, _FEWEST_STEPS)
    passages = np.flatnonzero(np.diff(words.offsets) > 0)
    clozes = batches(passages, min(_CLOZE_BATCH, len(passages)), rng)
    for step, batch in zip(range(steps), batches(usable, size, rng), strict=False):
        rate = _RATE * (1 - step / steps) * min(1, (step + 1) / max(1, _WARM_UP * steps))
        questions, answers, negatives = (
            part.some(batch) for part in (pairs.questions, pairs.answers, pairs.negatives)
        )
        loss = descent.step(_numbered_from(count, questions), _joined(answers, negatives), rate)
        questions, answers = cloze(words, next(clozes), rng)
        descent.step(_numbered_from(count, questions), answers, rate)
        watch(step + 1, steps, loss)
    return DualEncoder(encoder_of(words, both_VD[count:]), encoder_of(words, both_VD[:count]), WORD_WEIGHT)


def _numbered_from(first: int, texts: Texts) -> Texts:
    return Texts(texts.numbers + np.int32(first), texts.lengths)


def _joined(some: Texts, more: Texts) -> Texts:
    return Texts(np.concatenate([some.numbers, more.numbers]), np.concatenate([some.lengths, more.lengths]))


@dataclass(frozen=True)
class Validation:
    """How many questions find a passage that answers them among the first `K`."""

    questions: int
    passages: int
    by_vectors: float
    by_words_too: float
    word_weight: float
    """The weight of words that finds the most."""


def tune(
    encoder: DualEncoder, questions: Sequence[str], passages: Sequence[str], answers: Sequence[Integers]
) -> Validation:
    """Ranks the passages for each question as searches do, with several weights for shared words.

    `answers`: for each question, the positions of the passages that answer it.
    """
    queries_QD = encoder.encode_questions(questions).astype(np.float32)
    stored_DN = encoder.encode(passages).astype(np.float32).T
    count = min(CANDIDATES * K, len(passages))
    firsts_WQ = np.zeros((len(WEIGHTS), len(questions)))
    for row, (text, query_D, right) in enumerate(zip(questions, queries_QD, answers, strict=True)):
        scores_N = query_D @ stored_DN
        found_K = np.argsort(-scores_N, kind="stable")[:count]
        similarity_K = scores_N[found_K] / max(1.0, float(query_D @ query_D))
        shares_K = np.array(shared_words(text, [passages[n] for n in found_K], encoder.rarity))
        for weight, ranks_Q in zip(WEIGHTS, firsts_WQ, strict=True):
            order_K = found_K[np.argsort(-(similarity_K + weight * shares_K), kind="stable")]
            ranks_Q[row] = np.append(np.flatnonzero(np.isin(order_K, right)), count)[0]
    recalls_W = (firsts_WQ < K).mean(axis=1)
    # of equally good weights, the one that ranks answers higher
    best = max(range(len(WEIGHTS)), key=lambda at: (recalls_W[at], (1 / (1 + firsts_WQ[at])).mean()))
    return Validation(
        len(questions), len(passages), float(recalls_W[0]), float(recalls_W[best]), WEIGHTS[best]
    )
