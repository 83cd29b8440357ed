"""`talkoot generate`: continues a prompt, or answers it, with a trained model and its swarm."""

import logging
import sys
from collections.abc import Iterator, Sequence
from functools import partial

from dht.memory import Passage
from peer.errors import DataError
from peer.formatting import counted
from peer.metrics import total
from talkoot.memory.search import citation
from talkoot.signals import StopSignals
from talkoot.terminal import Terminal, escaped
from talkoot.train.ask import answer_question
from talkoot.train.trained import TextModel, joined_run, text_model
from trainer_client.data.pairs import marked
from trainer_client.data.sources import as_text
from trainer_client.encoder_decoder import EncoderDecoder
from trainer_client.inference import decoded, generate
from trainer_client.retrieval.lookup import Neighbours
from trainer_client.settings import Sampling, TrainerSettings

logger: logging.Logger = logging.getLogger(__name__)

_LONGEST_PROMPT = 2**24
"""The most bytes to read from standard input."""


def run_generate(
    terminal: Terminal,
    signals: StopSignals,
    join: str | None,
    prompt: str,
    settings: TrainerSettings,
    sampling: Sampling,
) -> None:
    """A model that answers questions takes the prompt as a question. Raises UserError, and Stopped after a signal."""
    text = _read_prompt() if prompt == "-" else as_text(prompt)
    with joined_run(terminal, signals, join, settings) as run:
        if run.settings.answers_questions:
            answer_question(terminal, run, text)
            return
        trained = text_model(terminal, run)
        read: dict[Passage, None] = {}
        pieces = _text(terminal, trained, text, sampling, read)
        with terminal.text() as write:
            for piece in pieces:
                write(piece)
        for source in dict.fromkeys(map(citation, read)):
            terminal.err.print(escaped(f"read: {source}"))
        if rows := int(total(run.client.dispatcher.metrics.unanswered_rows)):
            logger.warning(
                "no expert answered for %s, so the text may be worse than usual", counted(rows, "row")
            )


def _text(
    terminal: Terminal, trained: TextModel, prompt: str, sampling: Sampling, read: dict[Passage, None]
) -> Iterator[str]:
    """Adds the passages that the model was given to `read`."""
    run, find = trained.run, trained.find

    def found(chunks: Sequence[Sequence[int]]) -> Sequence[Neighbours]:
        assert find is not None
        neighbours = find(chunks)
        read.update((passage, None) for each in neighbours for passage in each.passages)
        return neighbours

    token_bytes = run.tokenizer.token_bytes
    if isinstance(trained.model, EncoderDecoder):
        special = trained.model.special
        tokens = special.encode(marked(prompt or "\n", run.settings.objective), run.tokenizer)
        token_bytes = special.written(token_bytes)
    else:
        tokens = run.tokenizer.encode_prompt(prompt or "\n").tolist()
    context = trained.model.context
    if len(tokens) > context:
        logger.warning(
            "the prompt has %d tokens, but the model's context is %d: the first %s are left out",
            len(tokens),
            context,
            counted(len(tokens) - context, "token"),
        )
    usable = partial(run.client.has_experts, warns=terminal.interrupt_text)
    following = generate(trained.model, tokens, sampling, usable, None if find is None else found)
    return decoded(following, token_bytes)


def _read_prompt() -> str:
    data = sys.stdin.buffer.read(_LONGEST_PROMPT + 1)
    if len(data) > _LONGEST_PROMPT:
        raise DataError(f"the prompt on standard input is longer than {_LONGEST_PROMPT >> 20} MiB")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"the prompt on standard input is not text in UTF-8: {error}") from error
