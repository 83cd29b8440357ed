"""Questions and their answers, from which a model learns to answer from a memory.

They are JSON lines with the fields `question` and `answers`, the same format from which memories' encoders learn.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peer.errors import DataError
from trainer_client.data.corpus import drawn_places
from trainer_client.data.sources import as_text, read_json_lines, unreadable

MOST_QUESTIONS = 1_000_000
MOST_QUESTION = 10_000
"""The longest question, in characters."""
_MOST_LINE = 2**17
"""The longest line of a file, in bytes."""
_MOST_ANSWERS, _MOST_ANSWER = 64, 256


@dataclass(frozen=True)
class Question:
    """A question and its right answers."""

    text: str
    answers: tuple[str, ...] = ()
    """The first one is learned. Empty if the memory does not contain the answer."""

    @property
    def answer(self) -> str:
        return self.answers[0] if self.answers else ""


def read_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects in a file of JSON lines, each with its place. Raises DataError, which names a line with anything
    else.
    """
    try:
        for _, place, row in read_json_lines(file, _MOST_LINE):
            yield place, row
    except OSError as error:
        raise unreadable(file, error) from error


def parse_answers(row: dict[str, Any], place: str) -> tuple[str, ...]:
    """The field `answers`; empty if there is no such field. Raises DataError."""
    answers = row.get("answers", [])
    if (
        not isinstance(answers, list)
        or len(answers) > _MOST_ANSWERS
        or not all(isinstance(each, str) and each.strip() and len(each) <= _MOST_ANSWER for each in answers)
    ):
        raise DataError(
            f"{place}: the field 'answers' must be a list of at most {_MOST_ANSWERS} phrases of up to {_MOST_ANSWER} "
            "characters"
        )
    return tuple(map(as_text, answers))


def read_questions(files: Sequence[Path]) -> list[Question]:
    """All questions in these files. Raises DataError, which names the place of anything that is not a question."""
    questions: list[Question] = []
    for file in files:
        if file.suffix.lower() != ".jsonl":
            raise DataError(f"{file}: questions are .jsonl files, with the fields question and answers")
        for place, row in read_rows(file):
            if len(questions) == MOST_QUESTIONS:
                raise DataError(f"more than {MOST_QUESTIONS:,} questions in all: leave some out")
            text = row.get("question")
            if not isinstance(text, str) or not text.strip() or len(text) > MOST_QUESTION:
                raise DataError(
                    f"{place}: the field 'question' must be text of at most {MOST_QUESTION} characters"
                )
            if "answers" not in row:
                raise DataError(
                    f"{place}: no field 'answers': give a list, which is empty if the memory has no answer"
                )
            questions.append(Question(text, parse_answers(row, place)))
    if not questions:
        raise DataError(
            "no questions to learn from: pass --data FILE.jsonl with the fields question and answers"
        )
    return questions


def digest_of(questions: Sequence[Question]) -> str:
    """Equal for equal questions in the same order."""
    rows = [[question.text, *question.answers] for question in questions]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:32]


class QuestionBatches:
    """Batches of questions. In an epoch each question comes once, and each epoch has its own order. The last questions
    are for validation.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        seed: int,
        validation_share: float,
        tokens_of: Callable[[Question], Sequence[int]],
        token_bytes: Sequence[bytes],
    ) -> None:
        """`tokens_of`: the tokens of a question's answer. Raises DataError if there are fewer than two questions."""
        if len(questions) < 2:
            raise DataError(
                "there is one question to learn from: give at least two, of which one is for validation"
            )
        held_out = min(max(1, int(len(questions) * validation_share)), len(questions) - 1)
        self.train, self.validation = questions[:-held_out], questions[-held_out:]
        self.sequences: int = len(self.train)
        """Questions in an epoch."""
        self._seed = seed
        self._tokens_of, self._token_bytes = tokens_of, token_bytes
        lengths = [len(tokens_of(question)) for question in self.validation]
        self.context: int = max(1, round(sum(lengths) / len(lengths)))
        """The mean number of tokens that are learned from a question: those of the answer."""

    def batch(self, step: int, batch_size: int) -> list[Question]:
        """The questions of a step, always the same."""
        places_B, _ = drawn_places(step, batch_size, self.sequences, self._seed)
        return [self.train[place] for place in places_B.tolist()]

    def validation_batches(self, batch_size: int, count: int) -> list[list[Question]]:
        """At most `count` batches, spread evenly over the questions for validation, without repeating any. Their sizes
        differ by at most one, because all batches count alike.
        """
        wanted = min(batch_size * count, len(self.validation))
        places = np.linspace(0, len(self.validation) - 1, wanted).astype(int)
        parts = np.array_split(places, -(-wanted // batch_size))
        return [[self.validation[place] for place in part.tolist()] for part in parts]

    def bytes_per_token(self, batches: Sequence[Sequence[Question]], first: int = 1) -> float:
        """The mean over the answers' tokens. An encoder-decoder's end token counts as zero bytes."""
        tokens = [token for batch in batches for question in batch for token in self._tokens_of(question)]
        text = [len(self._token_bytes[token]) for token in tokens if token < len(self._token_bytes)]
        return sum(text) / max(1, len(tokens))
