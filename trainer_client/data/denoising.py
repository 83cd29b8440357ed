"""Objectives that corrupt a text for an encoder-decoder to restore: T5's and BART's.

Pure functions over token ids. Drawing the spans is separate from corrupting them, so that both papers' examples are
tests.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import numpy as np

DENSITY_T5, MEAN_SPAN_T5 = 0.15, 3.0
DENSITY_BART, MEAN_SPAN_BART = 0.3, 3.0


class Span(NamedTuple):
    """Consecutive tokens."""

    begin: int
    end: int


Spans: TypeAlias = Sequence[Span]
"""In order, and without overlap."""


class Denoising(NamedTuple):
    """What the encoder reads, and what the decoder writes."""

    inputs: list[int]
    targets: list[int]


def draw_spans(
    length: int,
    rng: np.random.Generator,
    density: float = DENSITY_T5,
    mean: float = MEAN_SPAN_T5,
    most: int | None = None,
) -> list[Span]:
    """Spans for `corrupt_spans`: `density` of the tokens, in spans of `mean` tokens on average. Spans are longer if
    there would be more than `most`.

    Raffel et al. 2020 (arXiv 1910.10683), section 3.3.4. Spans are never empty and never touch. They may be anywhere;
    T5's own code always corrupts the last token. A text of fewer than two tokens has none.
    """
    if length < 2:
        return []
    corrupted = min(max(1, round(length * density)), length - 1)
    count = min(max(1, round(corrupted / mean)), corrupted, length - corrupted + 1, most or length)
    cuts = np.sort(rng.choice(corrupted - 1, count - 1, replace=False)) + 1 if count > 1 else ()
    lengths = np.diff([0, *cuts, corrupted]).tolist()
    return _placed(lengths, length - corrupted, rng)


def corrupt_spans(tokens: Sequence[int], spans: Spans, sentinels: Sequence[int]) -> Denoising:
    """Span corruption (T5): each span is replaced by a sentinel, and the targets are the sentinels, each followed by
    its span.

    One more sentinel ends the targets. Raises ValueError unless there is one for each span and one more.
    """
    if len(sentinels) <= len(spans):
        raise ValueError(
            f"{len(spans)} spans and {len(sentinels)} sentinels: one more sentinel than spans is needed"
        )
    _check(spans, len(tokens))
    inputs, targets, at = list[int](), list[int](), 0
    for (begin, end), sentinel in zip(spans, sentinels, strict=False):
        inputs += [*tokens[at:begin], sentinel]
        targets += [sentinel, *tokens[begin:end]]
        at = end
    return Denoising([*inputs, *tokens[at:]], [*targets, sentinels[len(spans)]])


def draw_infilled(length: int, rng: np.random.Generator) -> list[Span]:
    """Spans for `infill`: a share of the tokens, in spans with lengths from a Poisson distribution.

    Lewis et al. 2020 (arXiv 1910.13461), section 2.2. A span may be empty. No two spans touch.
    """
    corrupted = min(round(length * DENSITY_BART), length)
    lengths = list[int]()
    while sum(lengths) < corrupted:
        lengths.append(min(int(rng.poisson(MEAN_SPAN_BART)), corrupted - sum(lengths)))
    # at most as many as there are places; empty spans are dropped first
    lengths.sort(reverse=True)
    while len(lengths) > length - corrupted + 1:
        least = lengths.pop()
        lengths[-1] += least
    rng.shuffle(lengths)
    return _placed(lengths, length - corrupted, rng)


def infill(tokens: Sequence[int], spans: Spans, mask: int) -> list[int]:
    """Text infilling (BART): each span is replaced by one mask, however long it is. The target is the text."""
    _check(spans, len(tokens))
    inputs, at = list[int](), 0
    for begin, end in spans:
        inputs += [*tokens[at:begin], mask]
        at = end
    return [*inputs, *tokens[at:]]


def sentences_of(tokens: Sequence[int], ends: frozenset[int]) -> list[list[int]]:
    """The sentences of a text, each with the token that ends it, which the last one may lack."""
    bounds = [0, *(at + 1 for at, token in enumerate(tokens) if token in ends), len(tokens)]
    return [list(tokens[begin:end]) for begin, end in pairwise(bounds) if begin < end]


def permute_sentences(tokens: Sequence[int], ends: frozenset[int], order: Sequence[int]) -> list[int]:
    """Sentence permutation (BART). `order`: a permutation of the sentences. The target is the text.

    Raises ValueError if `order` is not one.
    """
    sentences = sentences_of(tokens, ends)
    if sorted(order) != list(range(len(sentences))):
        raise ValueError(f"an order of {len(order)} for {len(sentences)} sentences")
    return [token for number in order for token in sentences[number]]


def _placed(lengths: Sequence[int], kept: int, rng: np.random.Generator) -> list[Span]:
    """Spans of these lengths, each at a different place between the tokens that are kept."""
    places = np.sort(rng.choice(kept + 1, len(lengths), replace=False)).tolist()
    done, spans = 0, []
    for place, length in zip(places, lengths, strict=True):
        spans.append(Span(place + done, place + done + length))
        done += length
    return spans


def _check(spans: Spans, length: int) -> None:
    """Raises ValueError."""
    bounds = [0, *(bound for span in spans for bound in span), length]
    if any(begin > end for begin, end in pairwise(bounds)):
        raise ValueError(f"spans that overlap, or leave a text of {length} tokens")
