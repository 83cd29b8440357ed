"""Which of the passages that were found for the chunks of a text are given to the model.

While it learns, a passage must not give away what it is to predict. The text's own document is left out, and so is what
shares too many runs of eight words with the chunk that comes next.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from dht.memory import Passage
from trainer_client.memory.encoder import words_of

Document: TypeAlias = tuple[str, str]
"""A title and a source, which all passages of a document share."""
Words: TypeAlias = Callable[[str], Sequence[str]]
"""`words_of`, or what remembers its results."""

_RUN = 8
"""Words."""
_OWN = 0.5
"""A passage that has this share of a chunk is of the chunk's own document, or a copy of it."""


@dataclass(frozen=True)
class Chunk:
    """A stretch of text that neighbours are looked up for, and what comes after it."""

    text: str
    target: str = ""
    """What the model is to predict while it reads the neighbours; empty while it writes."""


class Runs:
    """All runs of eight words of a text. One that has fewer words is one run."""

    def __init__(self, text: str) -> None:
        words = words_of(text)
        self._length = min(_RUN, len(words))
        self._runs = _runs(words, self._length)

    def overlap(self, text: str, words: Words = words_of) -> float:
        """The share of the runs that are in another text, too."""
        if not self._runs:
            return 0.0
        return len(self._runs & _runs(words(text), self._length)) / len(self._runs)


def document_of(passage: Passage) -> Document:
    return passage.title, passage.source


def own_documents(
    chunks: Sequence[Chunk], candidates: Sequence[Sequence[Passage]], words: Words = words_of
) -> set[Document]:
    """The documents that a text is from, as far as candidates for its chunks are of them.

    A passage that has the text of a chunk, or most of it, tells which. So it does not matter how the trainer's files
    and the publisher's are called.
    """
    found = set()
    for chunk, some in zip(chunks, candidates, strict=True):
        runs = Runs(chunk.text)
        found |= {document_of(passage) for passage in some if runs.overlap(passage.text, words) > _OWN}
    return found


def chosen(
    chunk: Chunk,
    candidates: Sequence[Passage],
    count: int,
    own: Collection[Document],
    most_overlap: float,
    words: Words = words_of,
) -> list[Passage]:
    """The first `count` candidates that are of no document of `own`, and give away no more than that of the target."""
    runs, found = Runs(chunk.target), list[Passage]()
    for passage in candidates:
        if len(found) == count:
            break
        if document_of(passage) not in own and runs.overlap(passage.text, words) <= most_overlap:
            found.append(passage)
    return found


def chunks_of(tokens: Sequence[int], size: int, decode: Callable[[Sequence[int]], str]) -> list[Chunk]:
    """The whole chunks of a sequence, each with what comes after it: the tokens that are predicted while it is read."""
    texts = [decode(tokens[at : at + size]) for at in range(0, len(tokens), size)]
    return [
        Chunk(texts[number], texts[number + 1] if number + 1 < len(texts) else "")
        for number in range(len(tokens) // size)
    ]


def _runs(words: Sequence[str], length: int) -> set[tuple[str, ...]]:
    if not length:
        return set()
    return {tuple(words[at : at + length]) for at in range(len(words) - length + 1)}
