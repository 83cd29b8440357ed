"""`talkoot generate`: text from a trained model, as it comes."""

import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from peer.errors import DataError
from peer.formatting import counted
from talkoot.terminal import Terminal
from talkoot.signals import StopSignals
from talkoot.train.trained import TrainedModel, trained_model
from trainer_client.inference import Sampling, decoded, generate

logger = logging.getLogger(__name__)

_LONGEST_PROMPT = 2**24
"""Bytes that are read of standard input."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Characters that could steer a terminal: experts have a say in what comes out."""


def run_generate(
    terminal: Terminal,
    signals: StopSignals,
    join: str | None,
    prompt: str,
    flags: Mapping[str, Any],
    sampling_flags: Mapping[str, Any],
) -> None:
    """Raises UserError when it can't, and Stopped after a signal."""
    sampling = Sampling.load(None, **sampling_flags)
    text = _read_prompt() if prompt == "-" else prompt.encode(errors="replace").decode()
    with trained_model(terminal, signals, join, flags, lambda *_: None) as trained:
        try:
            for piece in _text(trained, text, sampling):
                sys.stdout.write(_CONTROL.sub("\ufffd", piece))
                sys.stdout.flush()
            sys.stdout.write("\n")
            sys.stdout.flush()
        except BrokenPipeError:  # who read it has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if rows := trained.client.dispatcher.stats.unanswered_rows:
            logger.warning(
                "no expert answered for %s, so the text is worse than it could be", counted(rows, "row")
            )


def _text(trained: TrainedModel, prompt: str, sampling: Sampling) -> Iterator[str]:
    tokens = trained.tokenizer.encode(prompt or "\n").tolist()
    context = trained.model.context
    if len(tokens) > context:
        logger.warning(
            "the prompt has %d tokens and the model's context %d: its beginning, %s, is left out",
            len(tokens),
            context,
            counted(len(tokens) - context, "token"),
        )
    following = generate(trained.model, tokens, sampling, trained.has_experts)
    return decoded(following, trained.tokenizer.token_bytes)


def _read_prompt() -> str:
    data = sys.stdin.buffer.read(_LONGEST_PROMPT + 1)
    if len(data) > _LONGEST_PROMPT:
        raise DataError(f"the prompt on standard input is longer than {_LONGEST_PROMPT >> 20} MiB")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"the prompt on standard input is not text in UTF-8: {error}") from error
