"""Encoders turn texts into the vectors by which a memory's passages are found.

A memory's publisher chooses the encoder, so its file is a stranger's.

Shapes: B texts, W words, D numbers in a vector.
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from dht.memory import MAX_DIMENSIONS, Vectors
from peer.arrays import decode_arrays, encode_arrays
from peer.codec import Floats
from peer.errors import WireError
from peer.formatting import printable

STATIC = "static-words"
"""The kind of `StaticEncoder`."""
MAX_WORDS = 2**18
MAX_WORD_CHARACTERS = 40
"""Of a word in the vocabulary."""
UNSPACED = (
    "\u3005-\u3007\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
    "\u0e01-\u0e3a\u0e40-\u0e4e\u0e50-\u0e59\u0e81-\u0eff\u1000-\u1049\u1050-\u109f\u1780-\u17d3\u17e0-\u17e9"
)
"""Characters of languages without spaces between words: Chinese and Japanese; Thai, Lao, Burmese and Khmer."""
_WORD = re.compile(rf"[{UNSPACED}]+|[^\W_{UNSPACED}]+")
_IS_UNSPACED = re.compile(rf"[{UNSPACED}]")
_TEXTS_AT_ONCE = 1024
_MOST_DEVIATIONS = 4
_LARGEST = 1e6
_FORMS = {
    "vectors": (np.dtype(np.int8), 2),
    "scales": (np.dtype(np.float32), 1),
    "rarities": (np.dtype(np.float32), 1),
    "words": (np.dtype(np.uint8), 1),
}
"""Arrays in the file of a `StaticEncoder`, and how many dimensions they have. The words are text, one a line."""


class Encoder(Protocol):
    """Turns texts into vectors that are close, by inner product, where the texts are about the same."""

    dimensions: int

    def encode(self, texts: Sequence[str]) -> Vectors:
        """A vector of signed bytes for each text, [B, D]. Zeros for a text in which nothing is known."""

    def rarity(self, words: Iterable[str]) -> list[float]:
        """How rare each word of `words_of` is in the memory: its inverse document frequency, at least 0."""

    def knows(self, word: str) -> bool:
        """Whether a word of `words_of` says anything about the vector of a text."""


def load_encoder(kind: str, data: bytes | memoryview, dimensions: int) -> Encoder:
    """The encoder in a file. Raises WireError if it is malformed, of a kind that is not known, or of other vectors."""
    if kind != STATIC:
        raise WireError(
            f"a memory whose encoder is of the kind {kind!r:.40}, which this Talkoot does not know"
        )
    encoder = StaticEncoder.from_bytes(data)
    if encoder.dimensions != dimensions:
        raise WireError(f"an encoder of vectors with {encoder.dimensions} numbers; expected {dimensions}")
    return encoder


def words_of(text: str) -> list[str]:
    """The words of a text, in order: runs of letters and digits, in small letters.

    Of languages without spaces between words, each two characters in a row. No dictionary is needed, and searches find
    nearly as much (Nie, Gao, Zhang, Zhou 2000, "On the use of words and n-grams for Chinese information retrieval").
    """
    words = []
    for run in _WORD.findall(text.lower()):
        if len(run) > 2 and _IS_UNSPACED.match(run):
            words += [run[at : at + 2] for at in range(len(run) - 1)]
        else:
            words.append(run)
    return words


def to_vectors(numbers_BD: Floats) -> Vectors:
    """The directions of these vectors in signed bytes, all of nearly the same length; zeros for zeros.

    A number beyond four times the root mean square is cut off there: of a unit vector with 256 numbers hardly any is,
    and the usual number has steps of 1/32 of its size.
    """
    dimensions = numbers_BD.shape[1]
    length_B1 = np.linalg.norm(numbers_BD, axis=1, keepdims=True)
    units_BD = numbers_BD / np.where(length_B1 > 0, length_B1, np.float32(1))
    scaled_BD = units_BD * np.float32(127 / min(1, _MOST_DEVIATIONS / math.sqrt(dimensions)))
    return np.clip(np.rint(scaled_BD), -127, 127).astype(np.int8)


class StaticEncoder:
    """One vector for each word of a vocabulary. A text's vector is the direction of the sum over its words.

    Other words count as not there. So it needs no model, and a query takes some microseconds.
    """

    def __init__(
        self, words: Sequence[str], vectors_VD: Vectors, scales_V: Floats, rarities_V: Floats
    ) -> None:
        """`words`: each once, as `words_of` gives them. A word's vector is its row times its scale.

        `rarities`: as `rarity` returns them.
        """
        self.words = tuple(words)
        self.dimensions: int = vectors_VD.shape[1]
        self._vectors_VD, self._scales_V, self._rarities_V = vectors_VD, scales_V, rarities_V
        self._number = {word: number for number, word in enumerate(self.words)}
        self._rarest = float(rarities_V.max(initial=0))

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> Self:
        """Raises WireError if a vocabulary is not what `to_bytes` writes, or a number is not finite."""
        arrays = decode_arrays(data)
        forms = {name: (array.dtype, array.ndim) for name, array in arrays.items()}
        if forms != _FORMS:
            raise WireError(f"an encoder of arrays {sorted(arrays)[:8]!r:.200}; expected {sorted(_FORMS)}")
        vectors_VD, scales_V, rarities_V = arrays["vectors"], arrays["scales"], arrays["rarities"]
        count, dimensions = vectors_VD.shape
        if not 1 <= count <= MAX_WORDS or not 1 <= dimensions <= MAX_DIMENSIONS:
            raise WireError(f"an encoder of {count} words with {dimensions} numbers each")
        if scales_V.shape != (count,) or rarities_V.shape != (count,):
            raise WireError(f"an encoder whose scales or rarities are not of its {count} words")
        for numbers_V in (scales_V, rarities_V):
            if not ((numbers_V >= 0) & (numbers_V <= _LARGEST)).all():
                raise WireError(
                    "an encoder with scales or rarities that are negative, too large or no numbers"
                )
        return cls(_parse_words(arrays["words"], count), vectors_VD, scales_V, rarities_V)

    def to_bytes(self) -> bytes:
        return encode_arrays(
            {
                "vectors": self._vectors_VD,
                "scales": self._scales_V,
                "rarities": self._rarities_V,
                "words": np.frombuffer("\n".join(self.words).encode(), np.uint8),
            }
        )

    def encode(self, texts: Sequence[str]) -> Vectors:
        parts = [
            self._encode([self._numbers_of(text) for text in texts[at : at + _TEXTS_AT_ONCE]])
            for at in range(0, len(texts), _TEXTS_AT_ONCE)
        ]
        return np.concatenate(parts) if parts else np.empty((0, self.dimensions), np.int8)

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


def _parse_words(data: npt.NDArray[np.uint8], count: int) -> list[str]:
    if data.size > 4 * MAX_WORDS * MAX_WORD_CHARACTERS:
        raise WireError("an encoder with too long a list of words")
    try:
        words = data.tobytes().decode().split("\n")
    except UnicodeDecodeError as error:
        raise WireError("an encoder whose words are no text") from error
    if len(words) != count or len(set(words)) != count:
        raise WireError(f"an encoder of {count} vectors, but not as many different words")
    for word in words:
        if len(word) > MAX_WORD_CHARACTERS or words_of(word) != [word]:
            raise WireError(f"an encoder with {printable(word, 40)!r} as a word")
    return words
