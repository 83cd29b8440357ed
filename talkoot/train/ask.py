"""`talkoot ask`: answers a question from passages of a memory, and names them."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from dht.memory import MemoryID, Passage
from peer.errors import CheckpointError, DataError, ModelError, SettingsError
from peer.formatting import counted, printable
from peer.metrics import total
from talkoot.memory.search import check_found, check_hosts, citation, hit_dict, why_nothing
from talkoot.model.opened import open_model
from talkoot.model.reading import FolderMemory
from talkoot.progress import Progress
from talkoot.signals import StopSignals
from talkoot.terminal import Terminal, to_json
from talkoot.train.session import reader_invite
from talkoot.train.trained import JoinedRun, joined_run
from trainer_client.client import SwarmClient
from trainer_client.data.sources import as_text
from trainer_client.memory.retriever import SearchResult, check_query
from trainer_client.retrieval.answering import (
    Answer,
    Answerer,
    AskedMemory,
    PassageLookup,
    RagModel,
    check_encoder,
    make_rag_model,
)
from trainer_client.settings import Marginal, TrainerSettings

_LEAST_SHARE = 0.05
"""Other answers and sources with a smaller share are not shown."""
_ANSWER_CHARACTERS = 1000


@dataclass(frozen=True)
class Answered:
    """The result of a question."""

    memory: MemoryID
    result: SearchResult
    answers: Sequence[Answer]
    """The best first; empty if nothing was found."""

    @property
    def text(self) -> str:
        """The best answer, or why nothing was found."""
        if self.answers and self.answers[0].text:
            return self.answers[0].text
        read = counted(len(self.result.hits), "passage")
        why = why_nothing(self.memory, self.result) or (
            f"memory {self.memory} does not say it in the {read} that fit best"
        )
        return f"Nothing found: {why}."

    @property
    def sources(self) -> tuple[Passage, ...]:
        """The passages behind the best answer."""
        if not self.answers or not self.answers[0].text:
            return ()
        return tuple(source.hit.passage for source in self.answers[0].sources if source.share >= _LEAST_SHARE)


class QuestionAnswerer:
    """Answers questions with a trained model from a memory of its swarm. For any thread."""

    def __init__(
        self,
        model: RagModel,
        memory: AskedMemory,
        marginal: Marginal,
        is_usable: Callable[[], bool],
        passages: int | None = None,
    ) -> None:
        """`is_usable`: as for `Decoder`. `passages`: read for a question; None: as many as the model learned with."""
        self.model = model
        self._memory, self._marginal = memory, marginal
        self._lookup = PassageLookup(memory, model.questions, passages or model.passages)
        self._answerer = Answerer(model, is_usable)

    @classmethod
    def open(cls, terminal: Terminal, run: JoinedRun, is_usable: Callable[[], bool]) -> "QuestionAnswerer":
        """Opens a run that has learned to answer. Raises UserError."""
        client, settings = run.client, run.settings
        with terminal.stages("opening the memory"):
            memory = client.memory(settings.memory)
        check_encoder(memory, run.checkpoint.header.encoder)
        model = make_rag_model(client.manifest, client.mixture, run.tokenizer, memory.dimensions, settings)
        run.checkpoint.load_into(model)
        return cls(model, memory, settings.marginal, is_usable)

    def check(self, question: str) -> None:
        """Raises DataError if the question is empty or too long."""
        _check(question)
        self.model.reader.source(question, None)

    def answer(
        self,
        question: str,
        stage: Callable[[str], None] = lambda text: None,
        between: Callable[[], None] = lambda: None,
    ) -> Answered:
        """Raises UserError. `between` is called after each step, and may raise."""
        self.check(question)
        found, (result,) = self._lookup.search([question])
        check_hosts(self._memory.id, result)
        if not result.hits:
            return Answered(self._memory.id, result, ())
        stage("answering")
        between()
        answers = self._answerer.answers(question, found, self._marginal, between=between)
        return Answered(self._memory.id, result, answers)


def _check(question: str) -> None:
    """The checks that don't need the model. Raises DataError."""
    if not question.strip():
        raise DataError('ask something, such as "how hot is a sauna?"')
    check_query([question], 1, 1)


def run_ask(
    terminal: Terminal,
    signals: StopSignals,
    join: str | None,
    question: str,
    settings: TrainerSettings,
    folder: Path | None,
) -> None:
    """`folder`: a model's; None: a run's model, with the swarm's experts. Raises UserError if it fails, and Stopped
    after a signal.
    """
    question = as_text(question)
    _check(question)
    if folder is not None:
        with _answerer_of_folder(terminal, signals, join, settings, folder) as answerer:
            _answer(terminal, answerer, question, lambda: 0)
        return

    def require_questions(tokenizer: object, settings: TrainerSettings, folder: object) -> None:
        if not settings.answers_questions:
            raise SettingsError(
                "this run's model has not learned to answer questions: train one with `talkoot train --objective "
                "rag-sequence --memory NAME --data QUESTIONS.jsonl`, or give its --checkpoint"
            )

    try:
        with joined_run(terminal, signals, join, settings, require_questions) as run:
            answer_question(terminal, run, question)
    except CheckpointError as error:
        raise CheckpointError(f"{error}. Without a model, `talkoot search` finds passages") from error


def answer_question(terminal: Terminal, run: JoinedRun, question: str) -> None:
    """Shows the answer and its sources. Raises UserError."""
    metrics = run.client.dispatcher.metrics
    answerer = QuestionAnswerer.open(terminal, run, run.client.has_experts)
    _answer(terminal, answerer, question, lambda: int(total(metrics.unanswered_rows)))


@contextmanager
def _answerer_of_folder(
    terminal: Terminal, signals: StopSignals, join: str | None, settings: TrainerSettings, path: Path
) -> Iterator[QuestionAnswerer]:
    """A model in this process, with a memory of the swarm. Raises UserError."""
    with terminal.stages(f"reading {path}"):
        opened = open_model(path)
    learned = opened.memory
    if learned is None or opened.answering is None:
        raise ModelError(
            f"the model in {path} has not learned to answer questions: use `talkoot serve --model {path}`"
        )
    invite = reader_invite(join, settings)
    settings = settings.resumed(learned.settings.model_dump(include=set(FolderMemory.model_fields)))
    with tempfile.TemporaryDirectory(prefix="talkoot-model-") as name:
        with terminal.stages("making ready") as stage:
            client = SwarmClient(invite, settings, Path(name) / "state", stage=stage, reads_only=True)
        try:
            with terminal.stages("opening the memory"):
                memory = client.memory(settings.memory)
            check_encoder(memory, learned.encoder)
            passages = settings.passages_read
            yield QuestionAnswerer(opened.answering, memory, settings.marginal, lambda: True, passages)
        finally:
            signals.ignore()
            client.close()


def _answer(
    terminal: Terminal, answerer: QuestionAnswerer, question: str, unanswered_rows: Callable[[], int]
) -> None:
    steps = count(1)
    with terminal.stages("looking for passages") as stage:
        progress = Progress(stage, terminal.live)
        answered = answerer.answer(
            question,
            lambda text: progress.show(text, ""),
            lambda: progress.show("answering", f"{counted(next(steps), 'step')} so far"),
        )
    check_found(answered.memory, answered.result)
    unanswered = unanswered_rows()
    if terminal.json:
        terminal.line(to_json(_to_dict(question, answered, unanswered)))
    else:
        for line in _lines(answered, unanswered):
            terminal.line(line)


def _to_dict(question: str, answered: Answered, unanswered: int) -> Mapping[str, Any]:
    best, *others = map(_answer_dict, answered.answers)
    return {
        "question": question,
        "memory": str(answered.memory),
        **best,
        "other_answers": others,
        "missing_cells": [list(cell) for cell in answered.result.missing],
        "unanswered_rows": unanswered,
    }


def _answer_dict(answer: Answer) -> Mapping[str, Any]:
    """An answer as JSON; null if the passages don't say it."""
    return {
        "answer": answer.text or None,
        "probability": answer.probability,
        "sources": [hit_dict(source.hit) | {"share": source.share} for source in answer.sources],
    }


def _lines(answered: Answered, unanswered: int) -> Iterator[str]:
    best, *others = answered.answers
    text = printable(answered.text, _ANSWER_CHARACTERS)
    yield f"{text} ({best.probability:.0%})" if best.text else text
    yield from _sources(best)
    for other in others:
        if other.text and other.probability >= _LEAST_SHARE:
            yield f"or: {printable(other.text, _ANSWER_CHARACTERS)} ({other.probability:.0%})"
            yield from _sources(other)
    if answered.result.missing:
        cells = counted(len(answered.result.missing), "cell")
        yield f"Nobody answered for {cells} near the question: there may be better passages."
    if unanswered:
        rows = counted(unanswered, "row")
        yield f"No expert answered for {rows}, so the answer may be worse than it could be."


def _sources(answer: Answer) -> Iterator[str]:
    """The passages behind an answer, the one with the largest share first."""
    for source in answer.sources:
        if source.share >= _LEAST_SHARE:
            yield f"   {source.share:.0%} from {citation(source.hit.passage)}"
