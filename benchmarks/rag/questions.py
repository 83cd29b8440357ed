"""Questions with the passages that answer them: definitions and a dictionary's entries, headings and their sections."""

import random
import zlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks.memory import corpora
from dht.memory import Passage
from talkoot.memory.build import text_of
from talkoot.memory.pairs import Pair
from talkoot.memory.passages import split
from trainer_client.memory.encoder import words_of

_TEST = 10
"""One headword in this many is used for the test."""
_SAME_HEADINGS = 1
"""If a heading belongs to more sections than this, it is not used as a question."""
_FEWEST_WORDS = 2
"""The smallest number of words of a heading that is used."""


@dataclass(frozen=True)
class Question:
    """A text, the word or heading that it is about, and the positions of the passages that answer it."""

    kind: str
    text: str
    about: str
    answers: tuple[int, ...]


@dataclass(frozen=True)
class Asked:
    """Passages, and questions about them. No word and no heading is in both training and test."""

    passages: Sequence[Passage]
    learned: Sequence[Question]
    tested: Sequence[Question]

    def pairs(self) -> list[Pair]:
        """The training pairs. If several passages answer a question, the one that shares most words with it is taken.

        DPR did the same for questions of which only the answer is known (section 4.2).
        """
        words = {n: set(words_of(text_of(self.passages[n]))) for q in self.learned for n in q.answers}
        pairs = []
        for question in self.learned:
            asked = set(words_of(question.text))
            best = max(question.answers, key=lambda n: (len(asked & words[n]) / (8 + len(words[n])), -n))
            passage = self.passages[best]
            # The title of a section is that of its page. Its passages are identified by the heading, which their text
            # need not contain.
            title, answers = (passage.title, (question.about,))
            pairs.append(Pair(question.text, title, passage.text, answers))
        return pairs


def ask(rng: random.Random, share: int, tested: int) -> Asked:
    """Makes questions from one in `share` of the titles and pages of the installed works. `tested`: the number of test
    questions of each kind.
    """
    passages: dict[str, Passage] = {}
    drawn = partial(_drawn, share=share)
    dictionaries = [work for work in corpora.installed() if work.name in ("gcide", "foldoc")]
    for work in dictionaries:
        _add(passages, corpora.dictionary(work.name, drawn), work.name, work.license)
    by_heading = defaultdict[str, set[str]](set)
    sections = list(corpora.sections(drawn)) if corpora.is_documented() else []
    count = Counter(heading.lower() for heading, _ in sections)
    for heading, entry in sections:
        texts = _add(passages, [entry], "python", "PSF-2.0")
        if count[heading.lower()] <= _SAME_HEADINGS and len(words_of(heading)) >= _FEWEST_WORDS:
            by_heading[heading] |= set(texts)
    position = {text: at for at, text in enumerate(passages)}
    by_word = defaultdict[str, list[int]](list)
    for at, passage in enumerate(passages.values()):
        if passage.source != "python":
            by_word[passage.title.lower()].append(at)
    questions = [
        Question("definitions", definition.text, definition.word, tuple(by_word[definition.word]))
        for definition in corpora.definitions()
        if definition.word in by_word
    ]
    questions += [
        Question("headings", heading, heading, tuple(sorted(position[text] for text in texts)))
        for heading, texts in by_heading.items()
        if texts
    ]
    rng.shuffle(questions)
    return Asked(
        list(passages.values()),
        [question for question in questions if not _is_test(question)],
        [
            question
            for kind in ("definitions", "headings")
            for question in [q for q in questions if q.kind == kind and _is_test(q)][:tested]
        ],
    )


def _is_test(question: Question) -> bool:
    return _drawn(f"test {question.about}", _TEST)


def _drawn(text: str, share: int) -> bool:
    return zlib.crc32(text.lower().encode()) % share == 0


def _add(
    passages: dict[str, Passage], entries: Iterable[corpora.Entry], source: str, license: str
) -> Collection[str]:
    """Adds passages. Returns the texts of those that are new."""
    texts = []
    for entry in entries:
        for offset, text in split([entry.text]):
            if text not in passages:
                passages[text] = Passage(text, entry.title[:256], source, offset, license)
                texts.append(text)
    return texts
