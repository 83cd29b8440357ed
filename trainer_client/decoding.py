"""Continues sequences token by token, many at once.

Shapes: S sequences, T tokens of a sequence, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from peer.errors import DataError
from trainer_client.model import LanguageModel


class Decoding:
    """One sequence while it is continued."""

    def __init__(self, tokens: Sequence[int], context: int, shortest: int) -> None:
        """`shortest`: the fewest tokens that the model continues."""
        self._context = context
        self._kept = max(context // 2, shortest)
        self.tokens = list(tokens)
        """Those that the model sees. When they outgrow the context, the older half of it is dropped."""

    def append(self, token: int) -> None:
        if len(self.tokens) == self._context:
            del self.tokens[: self._context + 1 - self._kept]
        self.tokens.append(token)

    def end(self) -> None:
        """Frees what is kept for the sequence. May be called twice."""


class Decoder:
    """Computes what follows each sequence as if it were alone. Belongs to one thread."""

    def __init__(self, model: LanguageModel, is_usable: Callable[[], bool] = lambda: True) -> None:
        """`is_usable` is asked after each computation whether its result counts; if not, it is repeated."""
        model.eval()
        self._model = model
        self._is_usable = is_usable

    def begin(self, prompt: Sequence[int]) -> Decoding:
        """Of a prompt that is longer than the context the model sees the last tokens.

        Raises DataError if the prompt is shorter than the model was trained to continue.
        """
        shortest = self._model.first_scored
        if len(prompt) < shortest:
            raise DataError(
                f"the prompt has {len(prompt)} tokens, and this swarm's models go on from {shortest} or more: "
                "give a longer one"
            )
        return Decoding(prompt[-self._model.context :], self._model.context, shortest)

    @torch.no_grad()
    def logits(self, sequences: Sequence[Decoding]) -> Tensor:
        """Logits of the token after each. Float32 [S, V]"""
        by_length: dict[int, list[int]] = {}
        for place, sequence in enumerate(sequences):
            by_length.setdefault(len(sequence.tokens), []).append(place)
        found: dict[int, Tensor] = {}
        for places in by_length.values():
            tokens_ST = torch.tensor([sequences[place].tokens for place in places])
            logits_SV = self._model(tokens_ST)[:, -1].float()
            while not self._is_usable():
                logits_SV = self._model(tokens_ST)[:, -1].float()
            found |= zip(places, logits_SV, strict=True)
        return torch.stack([found[place] for place in range(len(sequences))])
