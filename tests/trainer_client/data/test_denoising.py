"""What encoder-decoders learn to restore: the examples in T5's and BART's papers and in the lecture, and any texts."""

from itertools import pairwise
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from restored_spans import restore_spans

from trainer_client.data.denoising import (
    DENSITY_BART,
    DENSITY_T5,
    Span,
    corrupt_spans,
    draw_infilled,
    draw_spans,
    infill,
    permute_sentences,
    sentences_of,
)

SENTINELS = tuple(range(1000, 1200))
MASK, STOP = 999, 0
TEXTS = st.lists(st.integers(0, 20), max_size=150)
SEEDS = st.integers(0, 2**32 - 1)


def numbered(text: str) -> list[int]:
    """The numbers of the words, from 1; a full stop is `STOP`, and a letter in angle brackets is a sentinel."""
    special = {".": STOP, "_": MASK, "<X>": SENTINELS[0], "<Y>": SENTINELS[1], "<Z>": SENTINELS[2]}
    return [
        special.get(word, sum(256**n * byte for n, byte in enumerate(word.encode()))) for word in text.split()
    ]


def test_the_example_of_t5_and_of_the_lecture() -> None:
    tokens = numbered("Thank you for inviting me to your party last week .")
    inputs, targets = corrupt_spans(tokens, [Span(2, 4), Span(8, 9)], SENTINELS)
    assert inputs == numbered("Thank you <X> me to your party <Y> week .")
    assert targets == numbered("<X> for inviting <Y> last <Z>")
    # The lecture leaves out the sentinels.
    bare = [[token for token in side if token not in SENTINELS] for side in (inputs, targets)]
    assert bare == [numbered("Thank you me to your party week ."), numbered("for inviting last")]


def test_the_examples_of_bart() -> None:
    """Figure 2 of the paper."""
    tokens = numbered("A B C . D E .")
    assert infill(tokens, [Span(1, 3), Span(5, 5)], MASK) == numbered("A _ . D _ E .")
    assert permute_sentences(tokens, frozenset({STOP}), [1, 0]) == numbered("D E . A B C .")


@given(TEXTS, SEEDS)
def test_what_span_corruption_took_away_is_in_the_targets(tokens: list[int], seed: int) -> None:
    spans = draw_spans(len(tokens), np.random.default_rng(seed))
    inputs, targets = corrupt_spans(tokens, spans, SENTINELS)
    assert restore_spans(inputs, targets, SENTINELS) == tokens
    assert [token for token in inputs if token in SENTINELS] == list(SENTINELS[: len(spans)])
    assert [token for token in targets if token in SENTINELS] == list(SENTINELS[: len(spans) + 1])
    assert len(inputs) + len(targets) == len(tokens) + 2 * len(spans) + 1


@given(st.integers(2, 600), SEEDS, st.floats(0.01, 0.99), st.floats(1, 10))
def test_spans_are_as_many_and_as_long_as_t5_wants(
    length: int, seed: int, density: float, mean: float
) -> None:
    spans = draw_spans(length, np.random.default_rng(seed), density, mean)
    corrupted = sum(end - begin for begin, end in spans)
    assert corrupted == min(max(1, round(length * density)), length - 1)
    assert len(spans) == min(max(1, round(corrupted / mean)), corrupted, length - corrupted + 1)
    assert all(begin < end for begin, end in spans)
    assert all(one.end < other.begin for one, other in pairwise(spans))


def test_a_text_of_512_tokens_has_t5s_spans() -> None:
    spans = draw_spans(512, np.random.default_rng(0))
    assert (len(spans), sum(end - begin for begin, end in spans)) == (26, round(DENSITY_T5 * 512))


def test_spans_lie_anywhere() -> None:
    rng = np.random.default_rng(0)
    counts = np.zeros(20)
    for _ in range(2000):
        for begin, end in draw_spans(20, rng):
            counts[begin:end] += 1
    assert counts.min() > 0


@given(TEXTS, SEEDS)
def test_infilling_keeps_the_rest_and_no_two_masks_touch(tokens: list[int], seed: int) -> None:
    spans = draw_infilled(len(tokens), np.random.default_rng(seed))
    inputs = infill(tokens, spans, MASK)
    assert sum(end - begin for begin, end in spans) == round(DENSITY_BART * len(tokens))
    assert inputs.count(MASK) == len(spans)
    removed = {at for begin, end in spans for at in range(begin, end)}
    assert [token for token in inputs if token != MASK] == [
        token for at, token in enumerate(tokens) if at not in removed
    ]
    assert (MASK, MASK) not in pairwise(inputs)


def test_the_lengths_of_infilled_spans_are_poissons() -> None:
    rng = np.random.default_rng(0)
    lengths = [end - begin for _ in range(300) for begin, end in draw_infilled(400, rng)]
    assert np.mean(lengths) == pytest.approx(3, rel=0.05)
    assert lengths.count(0) / len(lengths) == pytest.approx(np.exp(-3), rel=0.25)


@given(TEXTS, st.randoms())
def test_sentences_are_permuted_as_a_whole(tokens: list[int], rng: Random) -> None:
    ends = frozenset({STOP, 7})
    sentences = sentences_of(tokens, ends)
    assert [token for sentence in sentences for token in sentence] == tokens
    assert all(set(sentence[:-1]).isdisjoint(ends) for sentence in sentences)
    order = list(range(len(sentences)))
    rng.shuffle(order)
    permuted = permute_sentences(tokens, ends, order)
    assert permuted == [token for number in order for token in sentences[number]]
    assert permute_sentences(tokens, ends, range(len(sentences))) == tokens


def test_what_can_not_be_is_refused() -> None:
    with pytest.raises(ValueError, match="one more sentinel"):
        corrupt_spans([1, 2, 3], [Span(0, 1)], SENTINELS[:1])
    for spans in ([Span(0, 2), Span(1, 3)], [Span(2, 1)], [Span(0, 4)], [Span(-1, 1)]):
        with pytest.raises(ValueError, match="overlap"):
            infill([1, 2, 3], spans, MASK)
    for order in ([0], [0, 0], [1, 2], [0, 1, 2]):
        with pytest.raises(ValueError, match="an order"):
            permute_sentences([1, STOP, 2], frozenset({STOP}), order)
