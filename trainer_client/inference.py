"""A trained model at work: text continued token by token, and how well it predicts a given text.

Shapes: B sequences, T the model's context, K candidate tokens, V vocabulary.
"""

import codecs
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from peer.errors import DataError, UserError
from peer.formatting import counted
from trainer_client.data.tokenizer import Tokens
from trainer_client.decoding import make_decoder, require_finite
from trainer_client.encoder_decoder import EncoderDecoder
from trainer_client.model import LanguageModel
from trainer_client.retrieval.lookup import Find
from trainer_client.settings import Sampling
from trainer_client.training.record import bits_per_byte, perplexity

_FIRST_SORTED = 64
"""How many of the likeliest tokens are sorted at first, to find those in the top p. If they are not enough, eight times
as many are sorted.
"""


def generate(
    model: LanguageModel | EncoderDecoder,
    prompt: Sequence[int],
    sampling: Sampling,
    is_usable: Callable[[], bool] = lambda: True,
    find: Find | None = None,
) -> Iterator[int]:
    """Yields the tokens that follow the prompt, or that a decoder writes for it, up to the end token.

    `is_usable`, `find`: as for `Decoder`. Raises DataError if the prompt is shorter than what the model was trained to
    continue.
    """
    decoder, generator = make_decoder(model, is_usable, find), make_generator(sampling.seed)
    sequence = decoder.begin(prompt)
    try:
        for _ in range(sampling.max_tokens):
            if sequence.is_full:
                break
            token = next_token(decoder.logits([sequence])[0], sampling, generator)
            if token == decoder.end:
                break
            sequence.append(token)
            yield token
    finally:
        sequence.end()


def make_generator(seed: int | None) -> torch.Generator:
    """A random generator with this seed; None: a random seed."""
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
    require_finite(logits_V)
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    ids_K, chances_K = choices(logits_V, sampling)
    ends_K = chances_K.cumsum(0)
    # one random number, however many tokens there are, so that equal seeds continue with equal text
    drawn = ends_K[-1] * torch.rand((), dtype=torch.float64, generator=generator)
    return int(ids_K[torch.searchsorted(ends_K, drawn, right=True).clamp_(max=len(ids_K) - 1)])


def choices(logits_V: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The tokens to draw from, and how likely each is, up to a common factor. Sorts no more tokens than necessary."""
    # the largest is subtracted, so that a low temperature does not overflow
    scaled_V = (logits_V.double() - logits_V.max()) / max(sampling.temperature, 1e-6)
    size, count = len(logits_V), sampling.top_k or _FIRST_SORTED
    if sampling.top_k is None and sampling.top_p == 1:
        return torch.arange(size), scaled_V.softmax(dim=0)
    ids_K = _largest(logits_V, count)
    if sampling.top_k is not None:
        chances_K = scaled_V[ids_K].softmax(dim=0)
    else:
        chances_V = scaled_V.softmax(dim=0)
        while (chances_K := chances_V[ids_K]).sum() < sampling.top_p and count < size:
            count *= 8
            ids_K = _largest(logits_V, count)
    are_before = chances_K.cumsum(0) < sampling.top_p
    kept = int(are_before.sum()) + 1
    return ids_K[:kept], chances_K[:kept]


def _largest(logits_V: Tensor, count: int) -> Tensor:
    """The ids of the `count` largest, in descending order; equal ones are ordered by id."""
    least = logits_V.topk(min(count, len(logits_V))).values[-1]
    ids_K = (logits_V >= least).nonzero().squeeze(1)
    return ids_K[logits_V[ids_K].argsort(descending=True, stable=True)[:count]]


def decoded(tokens: Iterable[int], token_bytes: Sequence[bytes]) -> Iterator[str]:
    """Yields text as soon as its characters are complete. Bytes that are not UTF-8 become U+FFFD."""
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


def evaluate(
    model: LanguageModel,
    tokens: Tokens,
    token_bytes: Sequence[bytes],
    batch_size: int,
    observe: Callable[[int], bool] = lambda done: True,
) -> Evaluation:
    """The scores of the whole text: see `evaluations`."""
    return deque(evaluations(model, tokens, token_bytes, batch_size, observe), maxlen=1).pop()


@torch.no_grad()
def evaluations(
    model: LanguageModel,
    tokens: Tokens,
    token_bytes: Sequence[bytes],
    batch_size: int,
    observe: Callable[[int], bool] = lambda done: True,
    neighbours: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[Evaluation]:
    """Predicts each token once, from the earlier ones in its piece of the text. A piece is as long as the context.
    Yields the scores of all tokens so far after each batch.

    `observe` is called after each batch with the number of tokens done, and returns whether the batch is valid; if not,
    it is computed again. `neighbours`: returns a batch's neighbours, for a model that reads a memory. Raises DataError
    if the text is too short, and UserError if the loss is not finite.
    """
    first = model.first_scored
    check_length(tokens, first)
    model.eval()
    bytes_of = np.array([len(token) for token in token_bytes])
    nats, done, size = 0.0, 0, 0
    for sequences_BT in pieces(tokens, model.context, batch_size, first):
        targets = sequences_BT[:, first:].numpy()
        given = () if neighbours is None else (neighbours(sequences_BT),)
        loss = model.loss(sequences_BT, *given).item()
        while not observe(done + targets.size):
            loss = model.loss(sequences_BT, *given).item()
        nats += loss * targets.size
        done += targets.size
        size += int(bytes_of[targets].sum())
        if not math.isfinite(nats):
            raise UserError("the loss is not finite: the model's checkpoint or an expert is broken")
        yield _evaluation(nats, done, size)


def check_length(tokens: Tokens, first: int, name: str = "the text") -> None:
    """Raises DataError if the text has no token to predict. `first`: the first predicted token of a piece, from 0."""
    if len(tokens) <= first:
        raise DataError(
            f"{name} has {counted(len(tokens), 'token')}, but the first one that this model predicts is number "
            f"{first + 1}: give a longer text"
        )


def combined(evaluations: Sequence[Evaluation]) -> Evaluation:
    """The scores of all texts together. Every token has the same weight, whichever text it is in."""
    nats = math.fsum(each.loss * each.tokens for each in evaluations)
    return _evaluation(
        nats, sum(each.tokens for each in evaluations), sum(each.bytes for each in evaluations)
    )


def _evaluation(nats: float, tokens: int, size: int) -> Evaluation:
    """`nats`: the sum over the predicted tokens, which stand for `size` bytes."""
    loss = nats / tokens
    return Evaluation(loss, perplexity(loss), bits_per_byte(loss, size / tokens), tokens, size)


def pieces(tokens: Tokens, context: int, batch_size: int, shared: int = 1) -> Iterator[Tensor]:
    """Sequences of tokens: int64 [B, T + 1]. Each begins with the last `shared` tokens of the previous one; the last is
    shorter.
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
