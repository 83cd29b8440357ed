"""Which sequences each step is trained on."""

import numpy as np
import pytest
import torch
from byte_texts import byte_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from peer.errors import DataError
from trainer_client.data.corpus import VOCABULARY, Dataset, shuffled

TEXT = bytes(range(256)) * 8


def test_a_text_too_short_for_two_sequences_is_refused() -> None:
    with pytest.raises(DataError, match=r"17 bytes, .* needs 18"):
        byte_dataset(b"x" * 17, context=8)


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(0, 500))
def test_no_byte_is_both_trained_and_validated_on(context: int, more: int) -> None:
    text = torch.arange(2 * (context + 1) + more).remainder(VOCABULARY).to(torch.uint8).numpy().tobytes()
    dataset = byte_dataset(text, context)
    assert bytes(dataset.train.tolist()) + bytes(dataset.validation.tolist()) == text
    assert len(dataset.validation) == max(len(text) // 10, context + 1)
    assert dataset.batch(0, 3).shape == (3, context + 1)
    assert [batch.shape for batch in dataset.validation_batches(3, 2)] == [(3, context + 1)] * 2


def test_batches_are_runs_of_the_training_text() -> None:
    dataset = byte_dataset(TEXT, context=16)
    tokens = dataset.batch(step=3, batch_size=64)
    assert tokens.dtype == torch.int64
    for sequence in tokens.tolist():
        assert bytes(sequence) in bytes(dataset.train.tolist())


def test_a_step_always_has_the_same_batch() -> None:
    dataset, same = byte_dataset(TEXT, context=16, seed=5), byte_dataset(TEXT, context=16, seed=5)
    first = dataset.batch(7, 8)
    dataset.batch(8, 8)
    assert torch.equal(dataset.batch(7, 8), first)
    assert torch.equal(same.batch(7, 8), first)
    assert not torch.equal(dataset.batch(8, 8), first)


def test_chunks_of_aligned_epochs_come_again_in_other_sequences() -> None:
    """So the passages that were found for them need not be looked up again."""
    text = np.random.default_rng(0).integers(0, 256, 3000).astype(np.uint8)
    chunks = {text[at : at + 16].tobytes() for at in range(0, len(text), 16)}
    dataset, sequences = Dataset(text, 64, align=16), set[bytes]()
    for epoch in range(4):
        sequences |= {bytes(each) for each in dataset.batch(epoch, dataset.sequences)[:, :64].tolist()}
    assert {each[at : at + 16] for each in sequences for at in range(0, 64, 16)} <= chunks
    assert len(sequences) > dataset.sequences


def test_trainers_of_other_seeds_train_on_other_batches_and_validate_on_the_same() -> None:
    one, other = byte_dataset(TEXT, context=16, seed=1), byte_dataset(TEXT, context=16, seed=2)
    assert not torch.equal(one.batch(0, 8), other.batch(0, 8))
    for left, right in zip(one.validation_batches(8, 3), other.validation_batches(8, 3), strict=True):
        assert torch.equal(left, right)


def test_validation_spans_the_whole_held_out_text() -> None:
    dataset = byte_dataset(TEXT, context=16)
    batches = dataset.validation_batches(4, 2)
    assert batches[0][0].tolist() == dataset.validation[:17].tolist()
    assert batches[-1][-1].tolist() == dataset.validation[-17:].tolist()


@settings(deadline=None)
@given(st.integers(1, 5000), st.integers(0, 2**32 - 1))
def test_shuffling_gives_each_thing_once(count: int, seed: int) -> None:
    keys = list(np.random.SeedSequence(seed).generate_state(4, np.uint64))
    places = shuffled(np.arange(count), count, keys)
    assert sorted(places.tolist()) == list(range(count))


def test_shuffled_things_lie_as_by_chance() -> None:
    keys = list(np.random.SeedSequence(1).generate_state(4, np.uint64))
    places = shuffled(np.arange(10_000), 10_000, keys)
    steps = np.diff(places)
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.05
    assert len(np.unique(steps)) > 5_000


def test_an_epoch_shows_all_of_the_training_text_and_the_next_cuts_it_elsewhere() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    dataset = Dataset(tokens, context=16, token_bytes=[b"x"] * 1000)
    epochs = [dataset.batch(epoch, dataset.sequences) for epoch in range(3)]
    for batch in epochs:
        firsts = sorted(batch[:, 0].tolist())
        assert np.diff(firsts).tolist() == [16] * (dataset.sequences - 1), "each sequence once"
        assert set(batch.flatten().tolist()) <= set(dataset.train.tolist())
        assert len(set(batch.flatten().tolist())) >= len(dataset.train) - 2 * 16
    assert len({min(batch[:, 0].tolist()) for batch in epochs}) > 1
    assert epochs[0][:, 0].tolist() != sorted(epochs[0][:, 0].tolist())


def test_a_batch_may_span_several_epochs() -> None:
    dataset = byte_dataset(bytes(range(60)), context=16)
    assert dataset.sequences < 8
    assert dataset.batch(0, 8).shape == (8, 17)


def test_the_order_is_the_same_everywhere() -> None:
    """A checkpoint may be resumed on another machine, with other versions of the libraries."""
    dataset = Dataset(np.arange(1000, dtype=np.uint16), context=16, seed=3, token_bytes=[b"x"] * 1000)
    assert dataset.batch(2, 4)[:, 0].tolist() == [277, 741, 517, 453]


def test_bytes_per_token_are_those_of_the_predicted_tokens() -> None:
    dataset = Dataset(np.zeros(40, np.uint16), context=2, token_bytes=[b"a", b"bcd", b"long one"])
    batches = [torch.tensor([[2, 0, 1], [2, 1, 1]])]
    assert dataset.bytes_per_token(batches) == 10 / 4
    assert dataset.bytes_per_token(batches, first=2) == 6 / 2
