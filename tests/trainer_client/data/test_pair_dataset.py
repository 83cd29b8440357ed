"""What encoder-decoders read and write, made from a text; and the tokens that represent no text."""

from collections import Counter

import numpy as np
import pytest
from byte_texts import byte_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from restored_spans import restore_spans

from peer.errors import DataError
from trainer_client.data.denoising import Span, corrupt_spans
from trainer_client.data.pairs import RULES, PairDataset
from trainer_client.data.special_tokens import SENTINELS, SpecialTokens
from trainer_client.data.tokenizer import ByteTokenizer
from trainer_client.settings import Objective

BYTES = ByteTokenizer().token_bytes
SPECIAL = SpecialTokens(256)
TEXT = np.frombuffer(b"In the sauna one must behave as in church. Who says so? Everybody! " * 60, np.uint8)
objectives = st.sampled_from(list(RULES))
every_objective = pytest.mark.parametrize("objective", list(RULES))


def make(objective: Objective, context: int = 64, seed: int = 0) -> PairDataset:
    return PairDataset(TEXT, context, objective, BYTES, seed)


def test_the_special_tokens_are_other_numbers_than_the_tokenizers() -> None:
    numbers = [SPECIAL.end, SPECIAL.mask, *SPECIAL.sentinels]
    assert sorted(numbers) == list(range(256, SPECIAL.vocabulary))
    written = SPECIAL.written(BYTES)
    assert written[:256] == BYTES
    assert len(written) == SPECIAL.vocabulary
    assert (written[SPECIAL.end], written[SPECIAL.mask]) == (b"", b"<mask>")
    assert written[SPECIAL.sentinels[7]] == b"<extra_id_7>"


def test_a_prompt_is_written_with_marks_as_in_the_example_of_t5_and_of_the_lecture() -> None:
    text = "Thank you for inviting me to your party last week."
    tokens = list(text.encode())
    spans = [Span(*(text.index(word) + each for each in (0, len(word)))) for word in ("for inviting", "last")]
    inputs, targets = corrupt_spans(tokens, spans, SPECIAL.sentinels)
    prompt = "Thank you <extra_id_0> me to your party <extra_id_1> week."
    assert SPECIAL.encode(prompt, ByteTokenizer()) == inputs
    written = SPECIAL.written(BYTES)
    said = b"".join(written[token] for token in [*targets, SPECIAL.end])
    assert said == b"<extra_id_0>for inviting<extra_id_1>last<extra_id_2>"
    assert SPECIAL.encode("A <mask>.", ByteTokenizer()) == [*b"A ", SPECIAL.mask, *b"."]


@given(st.text())
def test_a_text_without_marks_is_encoded_as_any_other(text: str) -> None:
    text = text.replace("<", "").encode(errors="replace").decode()
    assert SPECIAL.encode(text, ByteTokenizer()) == list(text.encode())


@pytest.mark.parametrize(
    "text", ["<extra_id_100>", "<extra_id_>", "<extra_id_-1>", "<MASK>", "<mask", "<pad>"]
)
def test_what_only_looks_like_a_mark_is_text(text: str) -> None:
    assert SPECIAL.encode(text, ByteTokenizer()) == list(text.encode())


def test_marks_in_a_text_to_learn_from_are_text() -> None:
    marked = np.frombuffer(b"<mask> and <extra_id_0>. " * 40, np.uint8)
    (pairs,) = PairDataset(marked, 32, "causal", BYTES).validation_batches(2, 1)
    assert all(token < 256 for source in pairs.sources for token in source)


@settings(deadline=None)
@given(objectives, st.integers(16, 100), st.integers(0, 2**32), st.integers(0, 10**6))
def test_pairs_fit_into_the_context_and_give_the_text_back(
    objective: Objective, context: int, seed: int, step: int
) -> None:
    data = make(objective, context, seed)
    pairs = data.batch(step, 3)
    assert len(pairs.sources) == len(pairs.targets) == 3
    for source, target in zip(pairs.sources, pairs.targets, strict=True):
        assert 1 <= len(source) <= context
        assert 1 <= len(target) <= context
        assert target[-1] == SPECIAL.end
        assert SPECIAL.end not in source
        written = target[:-1]
        if objective == "causal":
            whole = [*source, *written]
        elif objective == "span-corruption":
            whole = restore_spans(source, written, SPECIAL.sentinels)
        else:
            whole = list(written)
            assert Counter(token for token in source if token != SPECIAL.mask) <= Counter(whole)
        assert len(whole) == context - 1
        assert bytes(whole) in TEXT.tobytes()


def test_sentences_are_permuted_and_infilled() -> None:
    """BART (section 5.1): all sentences in another order, and three tenths of the tokens masked."""
    pairs = make("permutation", 200).batch(0, 20)
    kept = [len(source) - source.count(SPECIAL.mask) for source in map(list, pairs.sources)]
    assert np.mean(kept) == pytest.approx(0.7 * 199, rel=0.05)
    firsts = [source[0] == target[0] for source, target in zip(pairs.sources, pairs.targets, strict=True)]
    assert sum(firsts) < 20
    unpermuted = make("infilling", 200).batch(0, 20)
    assert pairs.targets == unpermuted.targets
    assert pairs.sources != unpermuted.sources


@every_objective
def test_a_batch_follows_from_seed_and_step(objective: Objective) -> None:
    one, other = make(objective), make(objective)
    assert one.batch(3, 4) == other.batch(3, 4)
    assert one.batch(3, 4) != one.batch(4, 4)
    assert one.batch(3, 4) != make(objective, seed=1).batch(3, 4)
    assert one.validation_batches(4, 2) == make(objective, seed=1).validation_batches(4, 2)


def test_a_long_text_has_no_more_spans_than_there_are_sentinels() -> None:
    text = np.tile(TEXT, 20)
    pairs = PairDataset(text, 4096, "span-corruption", BYTES).batch(0, 2)
    for source, target in zip(pairs.sources, pairs.targets, strict=True):
        assert sum(token in SPECIAL.sentinels for token in source) == SENTINELS - 1
        assert len(restore_spans(source, target[:-1], SPECIAL.sentinels)) == 4095


def test_bytes_are_counted_of_the_tokens_that_are_text() -> None:
    data = make("span-corruption")
    (pairs,) = data.validation_batches(4, 1)
    text = sum(token < 256 for target in pairs.targets for token in target)
    total = sum(map(len, pairs.targets))
    assert data.bytes_per_token([pairs]) == text / total < 1
    assert make("causal").bytes_per_token(make("causal").validation_batches(4, 1)) == 32 / 33


def test_a_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(DataError, match="give a longer text"):
        PairDataset(TEXT[:20], 64, "causal", BYTES)


def test_as_many_sequences_as_texts() -> None:
    assert make("causal").sequences == byte_dataset(TEXT.tobytes(), 62).sequences
