"""Encoders turn texts into the vectors by which a memory's passages are found.

A memory's publisher chooses the encoder, so its file is a stranger's.

Shapes: B texts, W words, D numbers in a vector.
"""

import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, Protocol, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from dht.memory import MAX_DIMENSIONS, Vectors
from peer.arrays import decode_arrays, encode_arrays
from peer.codec import Floats
from peer.errors import WireError
from peer.formatting import printable

STATIC, DUAL = "static-words", "dual-words"
"""The kinds of `StaticEncoder` and `DualEncoder`."""
MAX_WORDS = 2**18
MAX_WORD_CHARACTERS = 40
"""The longest word in the vocabulary."""
UNSPACED = (
    "\u3005-\u3007\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
    "\u0e01-\u0e3a\u0e40-\u0e4e\u0e50-\u0e59\u0e81-\u0eff\u1000-\u1049\u1050-\u109f\u1780-\u17d3\u17e0-\u17e9"
)
"""Characters of languages without spaces between words: Chinese and Japanese; Thai, Lao, Burmese and Khmer."""
_MARKS = range(0x300, 0x1F000)
"""All of Unicode's combining marks are here, but for some selectors of a character's variant."""
_IS_UNSPACED = re.compile(rf"[{UNSPACED}]")
_TEXTS_AT_ONCE = 1024
_MOST_DEVIATIONS = 4
_LARGEST = 1e6
WORD_WEIGHT, MAX_WORD_WEIGHT = 0.25, 4.0
"""See `Encoder.word_weight`. The first is used if the weight was not tuned."""
_Arrays: TypeAlias = Mapping[str, npt.NDArray[Any]]
_Forms: TypeAlias = dict[str, tuple[np.dtype[Any], int]]
_BYTES, _FLOATS = np.dtype(np.uint8), np.dtype(np.float32)
_VECTORS: _Forms = {"vectors": (np.dtype(np.int8), 2), "scales": (_FLOATS, 1)}
_VOCABULARY: _Forms = {"rarities": (_FLOATS, 1), "words": (_BYTES, 1)}
_FORMS: _Forms = _VECTORS | _VOCABULARY
"""The arrays in the file of a `StaticEncoder`, with their numbers of dimensions. The words are text, one per line."""
_DUAL_FORMS: _Forms = {
    **_VOCABULARY,
    **{f"{side}.{name}": form for side in ("question", "passage") for name, form in _VECTORS.items()},
    "word_weight": (_FLOATS, 1),
}
"""The arrays in the file of a `DualEncoder`, with their numbers of dimensions."""


class Encoder(Protocol):
    """Turns texts into vectors whose inner product is large if the texts are about the same subject."""

    dimensions: int
    word_weight: float
    """The weight of the words that a passage shares with a question, relative to that of the vectors.
    """

    def encode(self, texts: Sequence[str]) -> Vectors:
        """A vector of signed bytes for each passage, [B, D]. Zeros for a text without any known word."""

    def encode_questions(self, texts: Sequence[str]) -> Vectors:
        """Encodes questions. Passages are ranked by the inner products of their vectors with these."""

    def rarity(self, words: Iterable[str]) -> list[float]:
        """How rare each word of `words_of` is in the memory: its inverse document frequency, at least 0."""

    def knows(self, word: str) -> bool:
        """Whether a word of `words_of` has any influence on a text's vector."""


def load_encoder(kind: str, data: bytes | memoryview, dimensions: int) -> Encoder:
    """The encoder in a file. Raises WireError if it is malformed, of an unknown kind, or for vectors of another
    size.
    """
    kinds: dict[str, type[StaticEncoder] | type[DualEncoder]] = {STATIC: StaticEncoder, DUAL: DualEncoder}
    if kind not in kinds:
        raise WireError(
            f"its encoder is of the kind {kind!r:.40}, which this version of Talkoot does not know: update it"
        )
    encoder = kinds[kind].from_bytes(data)
    if encoder.dimensions != dimensions:
        raise WireError(f"the encoder's vectors have {encoder.dimensions} numbers instead of {dimensions}")
    return encoder


def words_of(text: str) -> list[str]:
    """The words of a text, in order: runs of letters and digits, in lower case. A letter keeps its combining marks, and
    has the same code points however it was encoded (NFC).

    In languages without spaces between words, each pair of adjacent characters is a word. This needs no dictionary, and
    finds nearly as much (Nie, Gao, Zhang, Zhou 2000, "On the use of words and n-grams for Chinese information
    retrieval").
    """
    words = []
    for run in _word_pattern().findall(unicodedata.normalize("NFC", text.lower())):
        if len(run) > 2 and _IS_UNSPACED.match(run):
            words += [run[at : at + 2] for at in range(len(run) - 1)]
        else:
            words.append(run)
    return words


@cache
def _word_pattern() -> re.Pattern[str]:
    r"""Finds runs in lower-case text. `\w` has no combining marks, such as the vowel signs of Hindi."""
    every = map(chr, _MARKS)
    marks = "".join(c for c in every if unicodedata.category(c)[0] == "M" and not _IS_UNSPACED.match(c))
    letters, earlier = rf"[^\W_{UNSPACED}]", f"[\0-{chr(_MARKS.start - 1)}]"
    # after most words comes an earlier character, which is told from a mark more quickly than a mark is found
    return re.compile(rf"[{UNSPACED}]+|{letters}++(?:(?!{earlier})[{marks}]++{letters}*+)*+")


def to_vectors(numbers_BD: Floats) -> Vectors:
    """The directions of these vectors in signed bytes, all of nearly the same length; zeros for zeros. Numbers beyond
    four times the root mean square are clipped; there are hardly any.
    """
    dimensions = numbers_BD.shape[1]
    length_B1 = np.linalg.norm(numbers_BD, axis=1, keepdims=True)
    units_BD = numbers_BD / np.where(length_B1 > 0, length_B1, np.float32(1))
    scaled_BD = units_BD * np.float32(127 / min(1, _MOST_DEVIATIONS / math.sqrt(dimensions)))
    return np.clip(np.rint(scaled_BD), -127, 127).astype(np.int8)


class StaticEncoder:
    """One vector for each word of a vocabulary. A text's vector is the direction of the sum over its words; unknown
    words are ignored. So a query takes some microseconds.
    """

    word_weight = WORD_WEIGHT

    def __init__(
        self, words: Sequence[str], vectors_VD: Vectors, scales_V: Floats, rarities_V: Floats
    ) -> None:
        """`words`: without duplicates, as `words_of` returns them. A word's vector is its row times its scale.

        `rarities_V`: as `rarity` returns them.
        """
        self.words: tuple[str, ...] = tuple(words)
        self.dimensions: int = vectors_VD.shape[1]
        self._vectors_VD, self._scales_V, self._rarities_V = vectors_VD, scales_V, rarities_V
        self._number = {word: number for number, word in enumerate(self.words)}
        self._rarest = float(rarities_V.max(initial=0))

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> Self:
        """Raises WireError if a vocabulary is not what `to_bytes` writes, or a number is not finite."""
        arrays = _decode(data, _FORMS)
        words, rarities_V = _parse_vocabulary(arrays, len(arrays["vectors"]))
        return cls(words, *_parse_vectors(arrays, "", len(words)), rarities_V)

    def to_bytes(self) -> bytes:
        return encode_arrays({**self.vectors, **self.vocabulary})

    @property
    def vectors(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays with the words' vectors."""
        return {"vectors": self._vectors_VD, "scales": self._scales_V}

    @property
    def vocabulary(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays with the words, and how rare they are."""
        words = np.frombuffer("\n".join(self.words).encode(), np.uint8)
        return {"rarities": self._rarities_V, "words": words}

    def encode(self, texts: Sequence[str]) -> Vectors:
        parts = [
            self._encode([self._numbers_of(text) for text in texts[at : at + _TEXTS_AT_ONCE]])
            for at in range(0, len(texts), _TEXTS_AT_ONCE)
        ]
        return np.concatenate(parts) if parts else np.empty((0, self.dimensions), np.int8)

    def encode_questions(self, texts: Sequence[str]) -> Vectors:
        return self.encode(texts)

    def rarity(self, words: Iterable[str]) -> list[float]:
        known = self._number
        return [
            self._rarest if (number := known.get(word)) is None else float(self._rarities_V[number])
            for word in words
        ]

    def knows(self, word: str) -> bool:
        return word in self._number

    def _numbers_of(self, text: str) -> list[int]:
        known = self._number
        return [known[word] for word in words_of(text) if word in known]

    def _encode(self, numbers: Sequence[Sequence[int]]) -> Vectors:
        sums_BD = np.zeros((len(numbers), self.dimensions), np.float32)
        for row_D, words in zip(sums_BD, numbers, strict=True):
            if words:
                words_W = np.array(words)
                np.matmul(self._scales_V[words_W], self._vectors_VD[words_W].astype(np.float32), out=row_D)
        return to_vectors(sums_BD)


class DualEncoder:
    """Two encoders with one vocabulary, trained together: one for questions, and one for passages (DPR).

    Karpukhin et al. 2020, "Dense passage retrieval for open-domain question answering". A word has two vectors, because
    it does not mean the same in a question as in the passage that answers it.
    """

    def __init__(self, questions: StaticEncoder, passages: StaticEncoder, word_weight: float) -> None:
        """`questions` and `passages` must have the same words."""
        self.questions, self.passages, self.word_weight = questions, passages, word_weight
        self.dimensions: int = passages.dimensions
        self.encode, self.encode_questions = passages.encode, questions.encode
        self.rarity, self.knows = passages.rarity, passages.knows

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> Self:
        """Raises WireError if it is not what `to_bytes` writes, or a number is not finite."""
        arrays = _decode(data, _DUAL_FORMS)
        words, rarities_V = _parse_vocabulary(arrays, len(arrays["passage.vectors"]))
        questions, passages = (
            StaticEncoder(words, *_parse_vectors(arrays, f"{side}.", len(words)), rarities_V)
            for side in ("question", "passage")
        )
        weight = arrays["word_weight"]
        if weight.shape != (1,) or not 0 <= float(weight[0]) <= MAX_WORD_WEIGHT:
            raise WireError("the encoder's weight of words is not a number from 0 to 4")
        if questions.dimensions != passages.dimensions:
            raise WireError("the vectors of the question encoder do not match those of the passage encoder")
        return cls(questions, passages, float(weight[0]))

    def to_bytes(self) -> bytes:
        sides = {"question": self.questions, "passage": self.passages}
        vectors = {
            f"{side}.{name}": array for side, of in sides.items() for name, array in of.vectors.items()
        }
        weight = np.array([self.word_weight], np.float32)
        return encode_arrays({**vectors, **self.passages.vocabulary, "word_weight": weight})


def _decode(data: bytes | memoryview, expected: _Forms) -> _Arrays:
    arrays = decode_arrays(data)
    forms = {name: (array.dtype, array.ndim) for name, array in arrays.items()}
    if forms != expected:
        raise WireError(
            f"the encoder has the arrays {sorted(arrays)[:8]!r:.200} instead of {sorted(expected)}"
        )
    return arrays


def _parse_vectors(arrays: _Arrays, prefix: str, words: int) -> tuple[Vectors, Floats]:
    """The vectors of all words, and their scales."""
    vectors_VD, scales_V = arrays[f"{prefix}vectors"], arrays[f"{prefix}scales"]
    count, dimensions = vectors_VD.shape
    if count != words or not 1 <= dimensions <= MAX_DIMENSIONS:
        raise WireError(f"the encoder can't have {count} words with {dimensions} numbers each")
    _check_numbers(scales_V, words)
    return vectors_VD, scales_V


def _parse_vocabulary(arrays: _Arrays, count: int) -> tuple[list[str], Floats]:
    """Reads the words, and how rare they are."""
    if not 1 <= count <= MAX_WORDS:
        raise WireError(f"the encoder can't have {count} words")
    _check_numbers(arrays["rarities"], count)
    return _parse_words(arrays["words"], count), arrays["rarities"]


def _check_numbers(numbers_V: Floats, words: int) -> None:
    if numbers_V.shape != (words,):
        raise WireError(f"the encoder's scales or rarities do not fit its {words} words")
    if not ((numbers_V >= 0) & (numbers_V <= _LARGEST)).all():
        raise WireError("the encoder has scales or rarities that are negative, too large, or not numbers")


def _parse_words(data: npt.NDArray[np.uint8], count: int) -> list[str]:
    if data.size > 4 * MAX_WORDS * MAX_WORD_CHARACTERS:
        raise WireError("the encoder's list of words is too long")
    try:
        words = data.tobytes().decode().split("\n")
    except UnicodeDecodeError as error:
        raise WireError("the encoder's words are not text") from error
    if len(words) != count or len(set(words)) != count:
        raise WireError(f"the encoder has {count} vectors, but not as many different words")
    for word in words:
        if len(word) > MAX_WORD_CHARACTERS or words_of(word) != [word]:
            raise WireError(f"the encoder can't have the word {printable(word, 40)!r}")
    return words
