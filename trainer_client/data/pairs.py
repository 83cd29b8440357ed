"""What an encoder-decoder learns from a text: an objective makes pairs of what it reads and what it writes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
from torch import Tensor

from trainer_client.data.corpus import Dataset
from trainer_client.data.denoising import (
    Denoising,
    corrupt_spans,
    draw_infilled,
    draw_spans,
    infill,
    permute_sentences,
    sentences_of,
)
from trainer_client.data.special_tokens import SENTINELS, SpecialTokens, has_marks
from trainer_client.data.tokenizer import Tokens
from trainer_client.settings import Objective

_SHORTER = 2
"""A sequence of the text is this many tokens shorter than the model's context: one for the end token, and one that a
`Dataset` adds.
"""
_MARKS: Mapping[str, str] = {
    "span-corruption": "<extra_id_0>",
    "infilling": "<mask>",
    "permutation": "<mask>",
}
_ENDS_OF_SENTENCES = (b".", b"!", b"?", b"\n")


class Pairs(NamedTuple):
    """A batch: what the encoder reads, and what the decoder should write, including the end token."""

    sources: Sequence[Sequence[int]]
    targets: Sequence[Sequence[int]]


def marked(prompt: str, objective: str) -> str:
    """A prompt in the form that a model trained with this objective reads: with a mark where it should write.

    The mark is added at the end, unless the prompt already has marks.
    """
    mark = _MARKS.get(objective)
    return prompt if mark is None or has_marks(prompt) else prompt + mark


@dataclass(frozen=True)
class _Vocabulary:
    special: SpecialTokens
    ends: frozenset[int]
    """Tokens that end a sentence."""


_Rule: TypeAlias = Callable[[list[int], np.random.Generator, _Vocabulary], Denoising]


def _continued(tokens: list[int], rng: np.random.Generator, known: _Vocabulary) -> Denoising:
    """Predicts the second half of a text from its first half (T5's "prefix language modeling")."""
    half = len(tokens) // 2
    return Denoising(tokens[:half], tokens[half:])


def _corrupted(tokens: list[int], rng: np.random.Generator, known: _Vocabulary) -> Denoising:
    spans = draw_spans(len(tokens), rng, most=SENTINELS - 1)
    return corrupt_spans(tokens, spans, known.special.sentinels)


def _infilled(tokens: list[int], rng: np.random.Generator, known: _Vocabulary) -> Denoising:
    return Denoising(infill(tokens, draw_infilled(len(tokens), rng), known.special.mask), tokens)


def _permuted(tokens: list[int], rng: np.random.Generator, known: _Vocabulary) -> Denoising:
    """Permutes sentences, and infills, as BART was trained (section 5.1)."""
    order = rng.permutation(len(sentences_of(tokens, known.ends))).tolist()
    permuted = permute_sentences(tokens, known.ends, order)
    return Denoising(_infilled(permuted, rng, known).inputs, tokens)


RULES: Mapping[Objective, _Rule] = {
    "causal": _continued,
    "span-corruption": _corrupted,
    "infilling": _infilled,
    "permutation": _permuted,
}


class PairDataset:
    """Pairs made from the sequences of a `Dataset`. As in a `Dataset`, a batch depends only on the step."""

    def __init__(
        self,
        tokens: Tokens,
        context: int,
        objective: Objective,
        token_bytes: Sequence[bytes],
        seed: int = 0,
        validation_share: float = 0.1,
    ) -> None:
        """`context`: of an encoder-decoder. `objective`: a key of `RULES`. Raises DataError if the text is too
        short.
        """
        special = SpecialTokens(len(token_bytes))
        ends = frozenset(
            number for number, each in enumerate(token_bytes) if each.endswith(_ENDS_OF_SENTENCES)
        )
        self._texts = Dataset(tokens, context - _SHORTER, seed, validation_share, token_bytes)
        self.context, self.sequences = self._texts.context, self._texts.sequences
        self._longest = context
        self._rule, self._known = RULES[objective], _Vocabulary(special, ends)
        self._bytes_of = list(map(len, token_bytes))
        self._seed = seed

    def batch(self, step: int, batch_size: int) -> Pairs:
        """The pairs of a step, always the same."""
        return self._pairs(self._texts.batch(step, batch_size), np.random.default_rng((self._seed, step)))

    def validation_batches(self, batch_size: int, count: int) -> list[Pairs]:
        """`count` batches, spread evenly over the validation text: the same for every seed."""
        batches = self._texts.validation_batches(batch_size, count)
        return [self._pairs(each, np.random.default_rng(number)) for number, each in enumerate(batches)]

    def bytes_per_token(self, batches: Sequence[Pairs], first: int = 0) -> float:
        """The mean over the targets' tokens from `first` on. Tokens that are not text count with zero bytes."""
        tokens = [token for pairs in batches for target in pairs.targets for token in target[first:]]
        text = [self._bytes_of[token] for token in tokens if token < len(self._bytes_of)]
        return sum(text) / len(tokens)

    def _pairs(self, texts_BT: Tensor, rng: np.random.Generator) -> Pairs:
        made = [self._rule(text, rng, self._known) for text in texts_BT.tolist()]
        # there may be more masks than tokens of text
        sources = [each.inputs[: self._longest] for each in made]
        return Pairs(sources, [[*each.targets, self._known.special.end] for each in made])
