"""Text from a trained model, token by token.

Shapes: V vocabulary.

How well a model knows a text: loss, perplexity, bits per byte.

Shapes: B sequences, T the model's context.
"""

import codecs
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from peer.errors import DataError, UserError
from trainer_client.data.tokenizer import Tokens
from trainer_client.model import LanguageModel
from trainer_client.settings import Sampling
from trainer_client.training.record import bits_per_byte, perplexity


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt: Sequence[int],
    sampling: Sampling,
    is_usable: Callable[[], bool] = lambda: True,
) -> Iterator[int]:
    """The tokens that follow the prompt, of which the model sees as many as its context is long.

    `is_usable` is asked after each computation whether it counts: else it is done again. Raises DataError for a prompt
    shorter than those from which the model has learned to go on.
    """
    assert prompt, "the first token follows from one before it"
    if len(prompt) < model.first_scored:
        raise DataError(
            f"the prompt has {len(prompt)} tokens, and this swarm's models go on from {model.first_scored} or more: "
            "give a longer one"
        )
    model.eval()
    tokens, generator = list(prompt[-model.context :]), make_generator(sampling.seed)
    for _ in range(sampling.max_tokens):
        logits_V = model(torch.tensor([tokens]))[0, -1]
        while not is_usable():
            logits_V = model(torch.tensor([tokens]))[0, -1]
        tokens = [*tokens, next_token(logits_V, sampling, generator)][-model.context :]
        yield tokens[-1]


def make_generator(seed: int | None) -> torch.Generator:
    """Draws the same tokens each time for the same seed, and others each time for None."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def next_token(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draws from the softmax of logits over temperature, of the top k, of these the top p (Holtzman et al. 2019).

    Raises UserError for logits that are not finite.
    """
    if not logits_V.isfinite().all():
        raise UserError("what the model expects is not finite: its checkpoint or an expert is broken")
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    values_K, ids_K = logits_V.float().sort(descending=True, stable=True)
    values_K = values_K[: sampling.top_k]
    # less the highest: a low temperature must not overflow
    chances_K = ((values_K - values_K[0]) / max(sampling.temperature, 1e-6)).softmax(dim=0)
    if sampling.top_p < 1:
        before_K = chances_K.cumsum(0) - chances_K
        chances_K = chances_K * (before_K < sampling.top_p)
    return int(ids_K[torch.multinomial(chances_K, 1, generator=generator)])


def decoded(tokens: Iterable[int], token_bytes: Sequence[bytes]) -> Iterator[str]:
    """Text as soon as its characters are whole; what is no UTF-8 becomes U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        if text := decoder.decode(token_bytes[token]):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text


@dataclass(frozen=True)
class Evaluation:
    """Of a whole text."""

    loss: float  # nats per token
    perplexity: float  # per token
    bits_per_byte: float
    tokens: int  # that were predicted: all but the first of the text
    bytes: int  # that they stand for


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    tokens: Tokens,
    token_bytes: Sequence[bytes],
    batch_size: int,
    observe: Callable[[int], bool] = lambda done: True,
) -> Evaluation:
    """Predicts each token once, from those before it in its piece of the text, which is as long as the context.

    `observe` is told how many tokens are done after each batch, and says whether the batch counts: else it is
    computed again. Raises DataError for a text of too few tokens, and UserError for a loss that is not finite.
    """
    first = model.first_scored
    if len(tokens) <= first:
        raise DataError(
            f"the text has {len(tokens)} tokens, and the first that this model predicts is number {first + 1}: "
            "give a longer one"
        )
    model.eval()
    bytes_of = np.array([len(token) for token in token_bytes])
    nats, done, size = 0.0, 0, 0
    for sequences_BT in pieces(tokens, model.context, batch_size, first):
        targets = sequences_BT[:, first:].numpy()
        loss = model.loss(sequences_BT).item()
        while not observe(done + targets.size):
            loss = model.loss(sequences_BT).item()
        nats += loss * targets.size
        done += targets.size
        size += int(bytes_of[targets].sum())
    loss = nats / done
    if not math.isfinite(loss):
        raise UserError("the loss is not finite: the model's checkpoint or an expert is broken")
    return Evaluation(loss, perplexity(loss), bits_per_byte(loss, size / done), done, size)


def pieces(tokens: Tokens, context: int, batch_size: int, shared: int = 1) -> Iterator[Tensor]:
    """int64 [B, T + 1], each sequence beginning with the last `shared` tokens of the one before; at the end a shorter
    one.
    """
    stride = context + 1 - shared
    whole = (len(tokens) - shared) // stride
    places_T = np.arange(context + 1)
    for first in range(0, whole, batch_size):
        starts_B = np.arange(first, min(first + batch_size, whole)) * stride
        yield torch.from_numpy(tokens[starts_B[:, None] + places_T].astype(np.int64))
    rest = tokens[whole * stride :]
    if len(rest) > shared:
        yield torch.from_numpy(rest[None].astype(np.int64))
