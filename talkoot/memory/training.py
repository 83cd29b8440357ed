"""Learns a memory's word vectors from its own passages, by the inverse cloze task.

Lee, Chang & Toutanova 2019 (arXiv 1906.00300): a few consecutive words are the question, and the rest of their passage
is the answer, which must be distinguished from those of the other passages in a batch. This needs only the passages.

Shapes: N passages, V words of the vocabulary, B questions in a batch and P passages, U different words in it, D numbers
in a vector.
"""

import math
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix

from peer.codec import Floats, Integers
from peer.errors import DataError
from trainer_client.memory.encoder import MAX_WORD_CHARACTERS, StaticEncoder, words_of

DIMENSIONS = 256
_VOCABULARY = 65_536
_MOST_WORDS = 2**22
"""The most distinct words that are counted. A word that first appears after so many others is rare."""
_PASSAGES_AT_ONCE = 2**14
"""Passages whose words are counted at once."""
_BATCH = 1024
_RATE = 0.1
_WARM_UP_STEPS = 100
_SHORTEST, _LONGEST = 5, 15
"""The number of words in a question, limited to half of the passage."""
_WHOLE = 0.2
"""The share of passages from which the question's words are not removed, so that words also match themselves."""
_USABLE_WORDS = 8
"""A passage with fewer words teaches nothing."""
_SMALLEST = 1e-9
_EPOCHS, _MOST_EPOCHS = 6, 60
_FEWEST_SAMPLES, _MOST_SAMPLES = 500_000, 2_000_000
"""The fewest and the most passages to learn from, over all epochs. For a small memory, `_MOST_EPOCHS` limits the
number.
"""

Numbers = npt.NDArray[np.int32]


@dataclass(frozen=True)
class PassageWords:
    """The words of all passages."""

    vocabulary: tuple[str, ...]
    """The words that are in the most passages, most frequent first."""
    rarities_V: Floats
    """The words' inverse document frequencies."""
    numbers: Numbers
    """The words of one passage after another, by number; words outside the vocabulary are left out."""
    offsets: Integers
    """Where each passage begins in `numbers`, and where the last one ends. (N + 1,)"""


class WordCounter:
    """Collects the words of passages, 4 bytes each."""

    def __init__(self) -> None:
        self._number: dict[str, int] = {}
        self._numbers = array("i")
        self._lengths = array("i")

    def add(self, text: str) -> None:
        number, before = self._number, len(self._numbers)
        for word in words_of(text):
            found = number.get(word)
            if found is None:
                # for a few words, lower case is not idempotent
                if len(number) == _MOST_WORDS or len(word) > MAX_WORD_CHARACTERS or words_of(word) != [word]:
                    continue
                found = number[word] = len(number)
            self._numbers.append(found)
        self._lengths.append(len(self._numbers) - before)

    def finish(self) -> PassageWords:
        """Ends the count. Call it once. Raises DataError if no passage has a word."""
        if not self._number:
            raise DataError(
                "these passages contain no word: give text in a language that has spaces between words"
            )
        passages_V = np.zeros(len(self._number), np.int64)
        for _, rows, numbers in self._blocks():
            pairs = np.unique(rows * len(passages_V) + numbers)
            passages_V += np.bincount(pairs % len(passages_V), minlength=len(passages_V))
        chosen = np.argsort(-passages_V, kind="stable")[:_VOCABULARY]
        place = np.full(len(passages_V), -1, np.int32)
        place[chosen] = np.arange(len(chosen), dtype=np.int32)
        kept, lengths, all_numbers = 0, [], np.frombuffer(self._numbers, np.int32)
        for count, rows, numbers in self._blocks():
            placed = place[numbers]
            lengths.append(np.bincount(rows[placed >= 0], minlength=count))
            placed = placed[placed >= 0]
            all_numbers[kept : kept + len(placed)] = placed  # in place, because there may be 100 million
            kept += len(placed)
        words, self._number = list(self._number), {}
        return PassageWords(
            tuple(words[number] for number in chosen),
            np.log((1 + len(self._lengths)) / (1 + passages_V[chosen])).astype(np.float32),
            all_numbers[:kept],
            np.concatenate([[0], np.cumsum(np.concatenate(lengths))]),
        )

    def _blocks(self) -> Iterator[tuple[int, Integers, Numbers]]:
        """Blocks of passages: how many passages, the passage of each word, and the words' numbers."""
        begin, lengths = 0, np.frombuffer(self._lengths, np.int32)
        for first in range(0, len(lengths), _PASSAGES_AT_ONCE):
            block = lengths[first : first + _PASSAGES_AT_ONCE]
            end = begin + int(block.sum())
            rows = np.repeat(np.arange(len(block)), block)
            yield len(block), rows, np.frombuffer(self._numbers, np.int32)[begin:end]
            begin = end


def train_static_encoder(
    words: PassageWords,
    dimensions: int = DIMENSIONS,
    seed: int = 0,
    watch: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> StaticEncoder:
    """Vectors for all words of the vocabulary, in bytes. See `train_word_vectors`."""
    return encoder_of(words, train_word_vectors(words, dimensions, seed, watch))


def train_word_vectors(
    words: PassageWords,
    dimensions: int = DIMENSIONS,
    seed: int = 0,
    watch: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> Floats:
    """Vectors for all words of the vocabulary, (V, D). Deterministic for the same words and seed.

    `watch` is called with the step, the number of steps, and the step's loss in nats.
    """
    rng = np.random.default_rng(seed)
    vectors_VD = _random_vectors(words.rarities_V, dimensions, rng)
    lengths_N = np.diff(words.offsets)
    usable = np.flatnonzero(lengths_N >= _USABLE_WORDS)
    if len(usable) > 1:
        descent = Descent(vectors_VD, _temperature(len(usable)))
        size = min(_BATCH, len(usable))
        samples = min(max(_EPOCHS * len(usable), _FEWEST_SAMPLES), _MOST_SAMPLES, _MOST_EPOCHS * len(usable))
        steps = samples // size
        warm_up = min(_WARM_UP_STEPS, max(1, steps // 10))
        for step, batch in zip(range(steps), batches(usable, size, rng), strict=False):
            rate = _RATE * (1 - step / steps) * min(1, (step + 1) / warm_up)
            loss = descent.step(*cloze(words, batch, rng), rate)
            watch(step + 1, steps, loss)
    return vectors_VD


def encoder_of(words: PassageWords, vectors_VD: Floats) -> StaticEncoder:
    """An encoder with these vectors, in bytes."""
    largest_V = np.abs(vectors_VD).max(axis=1)
    scales_V = (np.maximum(largest_V, _SMALLEST) / 127).astype(np.float32)
    rounded_VD = np.rint(vectors_VD / scales_V[:, None]).astype(np.int8)
    return StaticEncoder(words.vocabulary, rounded_VD, scales_V, words.rarities_V)


def _temperature(passages: int) -> float:
    """The temperature of the softmax. A low one is best for large memories, but overfits small ones."""
    return min(0.15, max(0.05, 0.15 - 0.05 * math.log10(passages / 10_000)))


def _random_vectors(rarities_V: Floats, dimensions: int, rng: np.random.Generator) -> Floats:
    """Random vectors whose lengths are their words' rarities. A text's vector is then a random projection of its
    tf-idf.
    """
    vectors_VD = rng.standard_normal((len(rarities_V), dimensions), np.float32) / np.float32(dimensions**0.5)
    mean = rarities_V.mean()
    vectors_VD *= (rarities_V / mean if mean > 0 else np.ones_like(rarities_V))[:, None]
    return vectors_VD


def batches(usable: Integers, size: int, rng: np.random.Generator) -> Iterator[Integers]:
    """Endless batches. Each passage comes once before any comes again; a last incomplete batch is left out."""
    while True:
        order = rng.permutation(usable)
        for begin in range(0, len(order) - size + 1, size):
            yield order[begin : begin + size]


@dataclass(frozen=True)
class Texts:
    """The words of some texts, one text after another."""

    numbers: Numbers
    lengths: Integers


def cloze(words: PassageWords, batch: Integers, rng: np.random.Generator) -> tuple[Texts, Texts]:
    """B questions, and the passages that answer them."""
    starts_B = words.offsets[batch]
    lengths_B = words.offsets[batch + 1] - starts_B
    question_B = np.minimum(lengths_B // 2, rng.integers(_SHORTEST, _LONGEST + 1, len(batch)))
    begin_B = (rng.random(len(batch)) * (lengths_B - question_B + 1)).astype(np.int64)
    whole_B = rng.random(len(batch)) < _WHOLE
    places = ranges_of(starts_B, lengths_B)
    row = np.repeat(np.arange(len(batch)), lengths_B)
    inside = places - (starts_B + begin_B)[row]
    kept = whole_B[row] | (inside < 0) | (inside >= question_B[row])
    questions = Texts(words.numbers[ranges_of(starts_B + begin_B, question_B)], question_B)
    return questions, Texts(words.numbers[places[kept]], np.bincount(row[kept], minlength=len(batch)))


def ranges_of(starts: Integers, lengths: Integers) -> Integers:
    """The integers of ranges, one range after another."""
    return np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())


class Descent:
    """Gradient descent by Adagrad with one rate for each word, so that rare words learn as much as frequent ones.

    It uses numpy alone: with torch's embedding bags a step takes ten times as long.
    """

    def __init__(self, vectors_VD: Floats, temperature: float) -> None:
        """`vectors_VD`: changed in place."""
        self._vectors_VD, self._temperature = vectors_VD, temperature
        self._squares_V = np.zeros(len(vectors_VD), np.float32)

    def step(self, questions: Texts, passages: Texts, rate: float) -> float:
        """Changes the vectors. Returns the loss before the step.

        The loss is the cross-entropy of choosing the passage for each question, and the question for each passage. The
        first passages answer the questions, in order; any others answer none.
        """
        numbers_U, places = np.unique(
            np.concatenate([questions.numbers, passages.numbers]), return_inverse=True
        )
        vectors_UD = self._vectors_VD[numbers_U]
        count = len(questions.numbers)
        bags_q = _bags(places[:count], questions.lengths, len(numbers_U))
        bags_p = _bags(places[count:], passages.lengths, len(numbers_U))
        (q_BD, q_B1), (p_PD, p_P1) = _directions(bags_q @ vectors_UD), _directions(bags_p @ vectors_UD)

        size = len(q_BD)
        scores_BP = q_BD @ p_PD.T
        scores_BP -= 1  # they are cosines: nothing overflows, and one exponential serves both softmaxes
        scores_BP *= np.float32(1 / self._temperature)
        right = float(scores_BP.diagonal().mean())
        np.exp(scores_BP, out=scores_BP)
        rows_B1, columns_1B = scores_BP.sum(1, keepdims=True), scores_BP[:, :size].sum(0, keepdims=True)
        loss = float(np.log(rows_B1).mean() + np.log(columns_1B).mean()) / 2 - right

        scores_BP[:, :size] *= 1 / rows_B1 + 1 / columns_1B
        scores_BP[:, size:] *= 1 / rows_B1
        scores_BP[np.diag_indices(size)] -= 2
        scores_BP *= np.float32(1 / (2 * size * self._temperature))
        toward_q_BD: Floats = np.matmul(scores_BP, p_PD)
        toward_p_PD: Floats = np.matmul(scores_BP.T, q_BD)
        gradient_UD: Floats = bags_q.T @ _through_direction(toward_q_BD, q_BD, q_B1)
        gradient_UD += bags_p.T @ _through_direction(toward_p_PD, p_PD, p_P1)

        self._squares_V[numbers_U] += np.einsum("ud,ud->u", gradient_UD, gradient_UD)
        root_U = np.sqrt(self._squares_V[numbers_U] / vectors_UD.shape[1])
        gradient_UD *= (np.float32(rate) / (root_U + _SMALLEST))[:, None]
        self._vectors_VD[numbers_U] = vectors_UD - gradient_UD
        return loss


def _bags(places: Integers, lengths: Integers, words: int) -> csr_matrix:
    """A matrix whose rows sum the vectors of each text's words."""
    ends = np.concatenate([[0], np.cumsum(lengths)])
    return csr_matrix((np.ones(len(places), np.float32), places, ends), (len(lengths), words))


def _directions(sums_BD: Floats) -> tuple[Floats, Floats]:
    """Unit vectors, and the original lengths."""
    length_B1: Floats = np.linalg.norm(sums_BD, axis=1, keepdims=True).clip(_SMALLEST)
    return sums_BD / length_B1, length_B1


def _through_direction(gradient_BD: Floats, unit_BD: Floats, length_B1: Floats) -> Floats:
    """The gradient of vectors, given that of their directions."""
    along_B1 = np.einsum("bd,bd->b", gradient_BD, unit_BD)[:, None]
    across_BD: Floats = (gradient_BD - unit_BD * along_B1) / length_B1
    return across_BD
