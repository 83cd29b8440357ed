"""A trained model at work: text continued token by token, and how well it predicts a given text.

Shapes: B sequences, T the model's context, K candidate tokens, V vocabulary.
"""

import codecs
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from peer.errors import DataError, UserError
from peer.formatting import counted
from trainer_client.data.tokenizer import Tokens
from trainer_client.decoding import Decoder
from trainer_client.model import LanguageModel
from trainer_client.settings import Sampling
from trainer_client.training.record import bits_per_byte, perplexity


def generate(
    model: LanguageModel,
    prompt: Sequence[int],
    sampling: Sampling,
    is_usable: Callable[[], bool] = lambda: True,
) -> Iterator[int]:
    """Yields the tokens that follow the prompt.

    `is_usable`: as for `Decoder`. Raises DataError if the prompt is shorter than the model was trained to continue.
    """
    decoder, generator = Decoder(model, is_usable), make_generator(sampling.seed)
    sequence = decoder.begin(prompt)
    try:
        for _ in range(sampling.max_tokens):
            token = next_token(decoder.logits([sequence])[0], sampling, generator)
            sequence.append(token)
            yield token
    finally:
        sequence.end()


def make_generator(seed: int | None) -> torch.Generator:
    """Draws the same tokens each time for the same seed, and different ones each time for None."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def next_token(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draws from the softmax of logits / temperature, cut to the top k and then to the top p (Holtzman et al. 2019).

    Raises UserError if a logit is not finite.
    """
    if not logits_V.isfinite().all():
        raise UserError("the model's prediction is not finite: its checkpoint or an expert is broken")
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    values_K, ids_K = logits_V.float().sort(descending=True, stable=True)
    values_K = values_K[: sampling.top_k]
    # minus the largest, so that a low temperature does not overflow
    chances_K = ((values_K - values_K[0]) / max(sampling.temperature, 1e-6)).softmax(dim=0)
    if sampling.top_p < 1:
        before_K = chances_K.cumsum(0) - chances_K
        # the first in any case: as float32 a tiny top p is 0
        chances_K = chances_K * ((before_K < sampling.top_p) | (before_K == 0))
    return int(ids_K[torch.multinomial(chances_K, 1, generator=generator)])


def decoded(tokens: Iterable[int], token_bytes: Sequence[bytes]) -> Iterator[str]:
    """Text, as soon as its characters are complete. Bytes that are not UTF-8 become U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        if text := decoder.decode(token_bytes[token]):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text."""

    loss: float  # nats per token
    perplexity: float  # per token
    bits_per_byte: float
    tokens: int  # predicted: all but the first of the text
    bytes: int  # that these tokens stand for


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    tokens: Tokens,
    token_bytes: Sequence[bytes],
    batch_size: int,
    observe: Callable[[int], bool] = lambda done: True,
) -> Evaluation:
    """Predicts each token once, from those before it in its piece of the text. A piece is as long as the context.

    `observe` is told after each batch how many tokens are done, and returns whether the batch counts; if not, it is
    computed again. Raises DataError if the text is too short, and UserError if the loss is not finite.
    """
    first = model.first_scored
    check_length(tokens, first)
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
    if not math.isfinite(nats):
        raise UserError("the loss is not finite: the model's checkpoint or an expert is broken")
    return _evaluation(nats, done, size)


def check_length(tokens: Tokens, first: int, name: str = "the text") -> None:
    """Raises DataError if a model whose first predicted token is number `first`, from 0, predicts none of these."""
    if len(tokens) <= first:
        raise DataError(
            f"{name} has {counted(len(tokens), 'token')}, and the first that this model predicts is number "
            f"{first + 1}: give a longer one"
        )


def combined(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Of all the texts together: every token counts alike, whichever text it is in."""
    nats = math.fsum(each.loss * each.tokens for each in evaluations)
    return _evaluation(
        nats, sum(each.tokens for each in evaluations), sum(each.bytes for each in evaluations)
    )


def _evaluation(nats: float, tokens: int, size: int) -> Evaluation:
    """`nats`: the sum over the predicted tokens, which stand for `size` bytes."""
    loss = nats / tokens
    return Evaluation(loss, perplexity(loss), bits_per_byte(loss, size / tokens), tokens, size)


def pieces(tokens: Tokens, context: int, batch_size: int, shared: int = 1) -> Iterator[Tensor]:
    """int64 [B, T + 1]. Each sequence begins with the last `shared` tokens of the one before; the last is shorter."""
    stride = context + 1 - shared
    whole = (len(tokens) - shared) // stride
    places_T = np.arange(context + 1)
    for first in range(0, whole, batch_size):
        starts_B = np.arange(first, min(first + batch_size, whole)) * stride
        yield torch.from_numpy(tokens[starts_B[:, None] + places_T].astype(np.int64))
    rest = tokens[whole * stride :]
    if len(rest) > shared:
        yield torch.from_numpy(rest[None].astype(np.int64))
