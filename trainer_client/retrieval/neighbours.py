"""Chooses which of the passages found for the chunks of a text are given to the model.

While the model learns, a passage must not reveal what it should predict. Passages of the text's own document are
left out, and so are those that share too many runs of eight words with the next chunk.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from dht.memory import Passage
from trainer_client.memory.encoder import words_of

Document: TypeAlias = tuple[str, str]
"""A document, named by the title and source that all its passages have."""
Words: TypeAlias = Callable[[str], Sequence[str]]
"""`words_of`, or a function that caches its results."""

_RUN = 8
"""The length of a run, in words."""
_OWN = 0.5
"""A passage with this share of a chunk is from the chunk's own document, or from a copy of it."""


@dataclass(frozen=True)
class Chunk:
    """A stretch of text for which neighbours are looked up, and what follows it."""

    text: str
    target: str = ""
    """What the model should predict while it reads the neighbours; empty while it writes."""


class Runs:
    """All runs of eight words of a chunk, without its first and last word, which may be cut. A shorter one is a single
    run.
    """

    def __init__(self, text: str) -> None:
        words = words_of(text)
        words = words[1:-1] or words
        self._length = min(_RUN, len(words))
        self._runs = _runs(words, self._length)

    def overlap(self, text: str, words: Words = words_of) -> float:
        """The share of the runs that another text also contains."""
        if not self._runs:
            return 0.0
        return len(self._runs & _runs(words(text), self._length)) / len(self._runs)


def document_of(passage: Passage) -> Document:
    return passage.title, passage.source


def own_documents(
    chunks: Sequence[Chunk], candidates: Sequence[Sequence[Passage]], words: Words = words_of
) -> set[Document]:
    """The documents of the candidates that a text comes from. A passage that contains the text of a chunk, or most of
    it, identifies the document. So the names of the trainer's and the publisher's files don't matter.
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
    """The first `count` candidates that are not from a document in `own`, and contain at most `most_overlap` of the
    target's runs.
    """
    runs, found = Runs(chunk.target), list[Passage]()
    for passage in candidates:
        if len(found) == count:
            break
        if document_of(passage) not in own and runs.overlap(passage.text, words) <= most_overlap:
            found.append(passage)
    return found


def chunks_of(tokens: Sequence[int], size: int, decode: Callable[[Sequence[int]], str]) -> list[Chunk]:
    """The whole chunks of a sequence, each with what follows it: the tokens that are predicted while it is read."""
    texts = [decode(tokens[at : at + size]) for at in range(0, len(tokens), size)]
    return [
        Chunk(texts[number], texts[number + 1] if number + 1 < len(texts) else "")
        for number in range(len(tokens) // size)
    ]


def _runs(words: Sequence[str], length: int) -> set[tuple[str, ...]]:
    if not length:
        return set()
    return {tuple(words[at : at + length]) for at in range(len(words) - length + 1)}
