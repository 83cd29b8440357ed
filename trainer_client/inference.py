"""Text from a trained model, token by token.

Shapes: V vocabulary.
"""

import codecs
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from peer.errors import DataError, UserError
from peer.settings import RoleSettings
from trainer_client.model import LanguageModel


class Sampling(RoleSettings):
    """How the next token is drawn from what the model expects."""

    env_prefix: ClassVar[str] = "TALKOOT_GENERATE_"

    temperature: float = Field(
        default=0.8, ge=0, le=100, allow_inf_nan=False, description="0 takes the likeliest token always"
    )
    top_k: int | None = Field(default=None, ge=1, description="only the k likeliest tokens; unset: all")
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="only the likeliest tokens that make up this probability"
    )
    seed: int | None = Field(default=None, ge=0, lt=2**63, description="unset: other text each time")
    max_tokens: int = Field(default=200, ge=1, le=10**7, description="tokens to generate")

    def generator(self) -> torch.Generator:
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


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
    tokens, generator = list(prompt[-model.context :]), sampling.generator()
    for _ in range(sampling.max_tokens):
        logits_V = model(torch.tensor([tokens]))[0, -1]
        while not is_usable():
            logits_V = model(torch.tensor([tokens]))[0, -1]
        tokens = [*tokens, next_token(logits_V, sampling, generator)][-model.context :]
        yield tokens[-1]


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
