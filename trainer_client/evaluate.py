"""How well a model knows a text: loss, perplexity, bits per byte.

Shapes: B sequences, T the model's context.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from peer.errors import DataError, UserError
from trainer_client.model import LanguageModel
from trainer_client.training.record import bits_per_byte, perplexity
from trainer_client.data.tokenizer import Tokens


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
