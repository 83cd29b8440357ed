"""Files of tensors across releases: a release that adds a key and one that does not know it can read each other's
files.
"""

import math

import pytest
import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from peer.checkpoints import (
    CheckpointHeader,
    Outline,
    decode_checkpoint,
    encode_checkpoint,
    extremes,
    is_finite,
)
from peer.errors import StateError

TENSORS = {"a": torch.arange(6.0).view(2, 3)}


class Header(CheckpointHeader):
    uid: str


class LaterHeader(Header):
    saved_by: str = ""
    score: float = 0.0


def accept(header: CheckpointHeader, outline: Outline) -> None:
    pass


def assert_is_whole(tensors: dict[str, Tensor]) -> None:
    assert tensors.keys() == TENSORS.keys()
    assert torch.equal(tensors["a"], TENSORS["a"])


def test_a_later_release_reads_what_an_earlier_one_wrote() -> None:
    header, tensors = decode_checkpoint(encode_checkpoint(Header(uid="0.1"), TENSORS), LaterHeader, accept)
    assert (header.uid, header.saved_by) == ("0.1", "")
    assert_is_whole(tensors)


def test_an_earlier_release_reads_what_a_later_one_wrote() -> None:
    written = encode_checkpoint(LaterHeader(uid="0.1", saved_by="0.2.0", score=1e-17), TENSORS)
    header, tensors = decode_checkpoint(written, Header, accept)
    assert header.uid == "0.1"
    assert_is_whole(tensors)


@pytest.mark.parametrize("kind", [Header, LaterHeader])
def test_no_key_can_be_changed_unseen(kind: type[Header]) -> None:
    written = encode_checkpoint(LaterHeader(uid="0.1", saved_by="0.2.0"), TENSORS)
    for key, changed in ((b"0.1", b"0.2"), (b"0.2.0", b"0.3.0"), (b"saved_by", b"saved_at")):
        with pytest.raises(StateError, match="checksum does not match"):
            decode_checkpoint(written.replace(key, changed), kind, accept)


@pytest.mark.parametrize(
    "odd", ['"\\ud800"', "[" * 900 + "]" * 900, "9" * 5000], ids=["half", "deep", "long"]
)
def test_a_header_that_nobody_can_have_written_is_refused(odd: str) -> None:
    """JSON accepts values that cannot be written again, and a peer that fetches such a state must not fail."""
    text = f'{{"format_version": 1, "sha256": "", "uid": "0.1", "odd": {odd}}}'
    with pytest.raises(StateError):
        decode_checkpoint(to_safetensors(TENSORS, {"talkoot": text}), Header, accept)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_is_found_wherever_it_is(dtype: torch.dtype, number: float) -> None:
    numbers = torch.linspace(-1, 1, 40).to(dtype)
    assert is_finite(numbers)
    for place in range(len(numbers)):
        broken = numbers.clone()
        broken[place] = number
        assert not is_finite(broken)


def test_extremes_are_the_lowest_and_the_highest_number() -> None:
    assert extremes(torch.tensor([[0.5, -2.0], [3.0, 0.0]])) == (-2.0, 3.0)
    assert extremes(torch.tensor([7])) == (7.0, 7.0)
    assert extremes(torch.ones(0, 5)) == (0.0, 0.0)
