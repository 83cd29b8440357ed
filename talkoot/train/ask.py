"""`talkoot ask`: answers a question from passages of a memory, and says which."""

from collections.abc import Mapping, Sequence
from typing import Any

from dht.memory import MAX_LABEL_CHARACTERS, MAX_LICENSE_CHARACTERS
from peer.errors import DataError, SettingsError
from peer.formatting import counted, printable
from peer.metrics import total
from talkoot.memory.search import check_found, hit_dict
from talkoot.signals import StopSignals
from talkoot.terminal import Terminal, to_json
from talkoot.train.trained import joined_run
from trainer_client.data.sources import as_text
from trainer_client.memory.memories import Memory
from trainer_client.memory.retriever import SearchResult, check_query
from trainer_client.retrieval.answering import (
    Answer,
    Answerer,
    PassageLookup,
    check_encoder,
    make_rag_model,
)
from trainer_client.settings import TrainerSettings

_LEAST_SHARE = 0.05
"""Of other answers and of sources that are shown."""
_ANSWER_CHARACTERS = 1000


def run_ask(
    terminal: Terminal, signals: StopSignals, join: str | None, question: str, settings: TrainerSettings
) -> None:
    """Raises UserError when it can't, and Stopped after a signal."""
    if not question.strip():
        raise DataError('ask something, such as: talkoot ask --join INVITE "how hot is a sauna?"')
    question = as_text(question)
    check_query([question], 1, 1)

    def require_questions(tokenizer: object, settings: TrainerSettings, folder: object) -> None:
        if not settings.answers_questions:
            raise SettingsError(
                "this run's model has learned to answer no questions: train one with `talkoot train --objective "
                "rag-sequence --memory NAME --data QUESTIONS.jsonl`, or give its --checkpoint"
            )

    with joined_run(terminal, signals, join, settings, require_questions) as run:
        client, settings = run.client, run.settings
        with terminal.stages("opening the memory"):
            memory = client.memory(settings.memory)
        check_encoder(memory, run.checkpoint.header.encoder)
        model = make_rag_model(client.manifest, client.mixture, run.tokenizer, memory.dimensions, settings)
        run.checkpoint.load_into(model)
        with terminal.stages("looking for passages") as stage:
            found, (result,) = PassageLookup(memory, model.questions, settings.memory_passages).search(
                [question]
            )
            check_found(memory.id, result)
            stage("answering")
            answers = Answerer(model, client.has_experts).answers(question, found, settings.marginal)
        unanswered = int(total(client.dispatcher.metrics.unanswered_rows))
    if terminal.json:
        terminal.line(to_json(_to_dict(question, memory, result, answers, unanswered)))
    else:
        _show(terminal, memory, result, answers, unanswered)


def _to_dict(
    question: str, memory: Memory, result: SearchResult, answers: Sequence[Answer], unanswered: int
) -> Mapping[str, Any]:
    best, *others = map(_answer_dict, answers)
    return {
        "question": question,
        "memory": str(memory.id),
        **best,
        "other_answers": others,
        "missing_cells": [list(cell) for cell in result.missing],
        "unanswered_rows": unanswered,
    }


def _answer_dict(answer: Answer) -> Mapping[str, Any]:
    """With null as the answer where the passages don't say it."""
    return {
        "answer": answer.text or None,
        "probability": answer.probability,
        "sources": [hit_dict(source.hit) | {"share": source.share} for source in answer.sources],
    }


def _show(
    terminal: Terminal, memory: Memory, result: SearchResult, answers: Sequence[Answer], unanswered: int
) -> None:
    best, *others = answers
    if best.text:
        terminal.line(f"{_text(best)} ({best.probability:.0%})")
    else:
        read = counted(len(result.hits), "passage")
        terminal.line(f"Nothing found: the {read} of memory {memory.id} that fit best don't say it.")
    for line in _sources(best):
        terminal.line(f"   {line}")
    for other in others:
        if other.text and other.probability >= _LEAST_SHARE:
            terminal.line(f"or: {_text(other)} ({other.probability:.0%})")
            for line in _sources(other):
                terminal.line(f"   {line}")
    if result.missing:
        cells = counted(len(result.missing), "cell")
        terminal.line(f"Nobody answered for {cells} near the question: there may be better passages.")
    if unanswered:
        rows = counted(unanswered, "row")
        terminal.line(f"No expert answered for {rows}, so the answer may be worse than it could be.")


def _text(answer: Answer) -> str:
    return printable(answer.text, _ANSWER_CHARACTERS)


def _sources(answer: Answer) -> list[str]:
    """The passages behind an answer, the one that had the largest part in it first."""
    return [
        f"{source.share:.0%} from {printable(passage.title, MAX_LABEL_CHARACTERS) or '(no title)'} "
        f"({printable(passage.source, MAX_LABEL_CHARACTERS)}, "
        f"{printable(passage.license, MAX_LICENSE_CHARACTERS) or 'licence not given'})"
        for source in answer.sources
        if source.share >= _LEAST_SHARE
        for passage in [source.hit.passage]
    ]
