"""Questions and the passages that answer them, from which encoders learn."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dht.memory import MAX_LABEL_CHARACTERS, MAX_TEXT_CHARACTERS
from peer.errors import DataError
from peer.formatting import printable
from trainer_client.data.questions import parse_answers, read_rows
from trainer_client.memory.encoder import words_of
from trainer_client.memory.retriever import MOST_CHARACTERS

MOST_PAIRS = 1_000_000
_CANDIDATES = 10
"""Of this many passages that BM25 finds for a question, the first that does not answer it is a negative."""
_AT_ONCE = 1024
_VALIDATED = 20
"""One title in this many is kept for validation."""


@dataclass(frozen=True)
class Pair:
    """A question, and a passage that answers it."""

    question: str
    title: str
    text: str
    answers: tuple[str, ...] = ()
    """Words or phrases. A passage with any of them may answer the question, too."""

    @property
    def passage(self) -> str:
        """The passage's text for the encoder, as for a memory's passages."""
        return f"{self.title}\n{self.text}"

    @property
    def subject(self) -> str:
        """What all passages that may answer the question have in common: the title, or the text if there is none. In
        lower case.
        """
        return (self.title or self.text).lower()


def read_pairs(file: Path) -> list[Pair]:
    """The pairs in a file of JSON lines. Raises DataError, which names the line of anything that is not a pair."""
    pairs = list[Pair]()
    for place, row in read_rows(file):
        if len(pairs) == MOST_PAIRS:
            raise DataError(f"{file} has more than {MOST_PAIRS:,} pairs: leave some out")
        pairs.append(_parse(row, place))
    if not pairs:
        raise DataError(f"{file} has no pairs: give JSON lines with the fields question, title and text")
    return pairs


def split_by_title(pairs: Sequence[Pair]) -> tuple[list[Pair], list[Pair]]:
    """The pairs to learn from, and those for validation. No title has pairs in both, and no text without a title."""
    sides: tuple[list[Pair], list[Pair]] = ([], [])
    for pair in pairs:
        sides[zlib.crc32(pair.subject.encode()) % _VALIDATED == 0].append(pair)
    return sides


def hard_negatives(
    pairs: Sequence[Pair],
    titles: Sequence[str],
    texts: Sequence[str],
    watch: Callable[[int], None] = lambda done: None,
) -> list[str | None]:
    """For each pair, the best passage by BM25 that does not answer; None if there is none.

    A passage with the answer's title or text, or with a phrase of one of the answers, counts as one that may answer.
    `titles` and `texts`: of the passages; the texts include their titles. `watch` is called with the number of pairs
    done. Needs bm25s.
    """
    import bm25s
    from bm25s.stopwords import STOPWORDS_EN

    frequent = frozenset(STOPWORDS_EN)

    def tokens(text: str) -> list[str]:
        return [word for word in words_of(text) if word not in frequent]

    indexed = [tokens(text) for text in texts]
    if not any(indexed):  # which bm25s can't index
        return [None] * len(pairs)
    index = bm25s.BM25()
    index.index(indexed, show_progress=False)
    searched = [_spaced(text) for text in texts]
    lowered = [title.lower() for title in titles]
    negatives: list[str | None] = []
    for at in range(0, len(pairs), _AT_ONCE):
        some = pairs[at : at + _AT_ONCE]
        found, scores = index.retrieve(
            [tokens(pair.question) for pair in some], k=min(_CANDIDATES, len(texts)), show_progress=False
        )
        for pair, numbers, weights in zip(some, np.asarray(found), np.asarray(scores), strict=True):
            wrong = (
                number
                for number, weight in zip(numbers.tolist(), weights.tolist(), strict=True)
                if weight > 0
                and lowered[number] != pair.title.lower()
                and not any(_spaced(each) in searched[number] for each in (pair.text, *pair.answers))
            )
            number = next(wrong, None)
            negatives.append(None if number is None else texts[number])
        watch(len(negatives))
    return negatives


def _spaced(text: str) -> str:
    """The words of a text, each between spaces, so that one text can be searched for in another."""
    return f" {' '.join(words_of(text))} "


def _parse(row: dict[str, Any], place: str) -> Pair:
    """Raises DataError."""
    bounds = {"question": MOST_CHARACTERS, "title": MAX_LABEL_CHARACTERS, "text": MAX_TEXT_CHARACTERS}
    for field, most in bounds.items():
        value = row.get(field, "" if field == "title" else None)
        if not isinstance(value, str) or len(value) > most or (field != "title" and not words_of(value)):
            raise DataError(f"{place}: the field {field!r} must be text of at most {most} characters")
    answers = parse_answers(row, place)
    if not all(map(words_of, answers)):
        raise DataError(f"{place}: the field 'answers' has a phrase without a word")
    # as a memory has it: equal titles show which passages may answer
    title = printable(row.get("title", ""), MAX_LABEL_CHARACTERS)
    return Pair(row["question"], title, row["text"], answers)
