"""Text and batches."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peer.errors import DataError
from trainer_client.data import VOCABULARY, ByteDataset, load_text

TEXT = bytes(range(256)) * 8


def test_the_default_text_comes_with_python() -> None:
    text = load_text(None)
    assert len(text) > 200_000
    assert b"import" in text


def test_a_file_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "any.bin"
    path.write_bytes(b"\xff\x00 sauna\r\n")
    assert load_text(path) == b"\xff\x00 sauna\r\n"


def test_a_folder_gives_all_text_below_it_in_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "sub" / "c.txt").write_text("three")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "notes.md").write_text("not read")
    assert load_text(tmp_path) == b"one\ntwo\nthree"


def test_what_is_missing_or_empty_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file or folder .*absent"):
        load_text(tmp_path / "absent")
    with pytest.raises(DataError, match=r"no \.txt file in"):
        load_text(tmp_path)
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match=r"a\.txt is empty"):
        load_text(tmp_path / "a.txt")
    with pytest.raises(DataError, match="is empty"):
        load_text(tmp_path)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux")
def test_what_cannot_be_read_is_named() -> None:
    # unreadable even to root
    with pytest.raises(DataError, match=r"can't read /proc/self/mem: "):
        load_text(Path("/proc/self/mem"))


def test_a_text_too_short_for_two_sequences_is_refused() -> None:
    with pytest.raises(DataError, match="17 bytes and needs 18"):
        ByteDataset(b"x" * 17, context=8)


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(0, 500))
def test_no_byte_is_both_trained_and_validated_on(context: int, more: int) -> None:
    text = torch.arange(2 * (context + 1) + more).remainder(VOCABULARY).to(torch.uint8).numpy().tobytes()
    dataset = ByteDataset(text, context)
    assert bytes(dataset.train.tolist()) + bytes(dataset.validation.tolist()) == text
    assert len(dataset.validation) == max(len(text) // 10, context + 1)
    assert dataset.batch(0, 3).shape == (3, context + 1)
    assert [batch.shape for batch in dataset.validation_batches(3, 2)] == [(3, context + 1)] * 2


def test_batches_are_runs_of_the_training_text() -> None:
    dataset = ByteDataset(TEXT, context=16)
    tokens = dataset.batch(step=3, batch_size=64)
    assert tokens.dtype == torch.int64
    for sequence in tokens.tolist():
        assert bytes(sequence) in bytes(dataset.train.tolist())


def test_a_step_always_has_the_same_batch() -> None:
    dataset, same = ByteDataset(TEXT, context=16, seed=5), ByteDataset(TEXT, context=16, seed=5)
    first = dataset.batch(7, 8)
    dataset.batch(8, 8)
    assert torch.equal(dataset.batch(7, 8), first)
    assert torch.equal(same.batch(7, 8), first)
    assert not torch.equal(dataset.batch(8, 8), first)


def test_trainers_of_other_seeds_train_on_other_batches_and_validate_on_the_same() -> None:
    one, other = ByteDataset(TEXT, context=16, seed=1), ByteDataset(TEXT, context=16, seed=2)
    assert not torch.equal(one.batch(0, 8), other.batch(0, 8))
    for left, right in zip(one.validation_batches(8, 3), other.validation_batches(8, 3), strict=True):
        assert torch.equal(left, right)


def test_validation_spans_the_whole_held_out_text() -> None:
    dataset = ByteDataset(TEXT, context=16)
    batches = dataset.validation_batches(4, 2)
    assert batches[0][0].tolist() == dataset.validation[:17].tolist()
    assert batches[-1][-1].tolist() == dataset.validation[-17:].tolist()
