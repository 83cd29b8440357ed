"""Which decoded numbers may be roundings of one's own numbers by a codec."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peer.codec import CodecName, Floats, codec_of
from peer.encoding import decode, encode, unexplained

CODECS: list[CodecName] = ["fp32", "bf16", "fp16", "int8", "int4"]
WIDTH = 64


def arrived(tensor: Floats, codec: CodecName) -> Floats:
    return decode(encode(tensor, codec_of(codec)), tensor.shape[1], codec_of(codec))


def a_tensor(seed: int, size: float, rows: int = 8, width: int = WIDTH) -> Floats:
    rng = np.random.default_rng(seed)
    tensor = rng.standard_normal((rows, width)) * size * np.exp(rng.normal(0, 1, (rows, 1)))
    return tensor.astype(np.float32)


def sizes(tensor: Floats) -> Floats:
    result: Floats = np.sqrt((tensor.astype(np.float64) ** 2).mean(axis=1)).astype(np.float32)
    return result


@pytest.mark.parametrize("codec", CODECS)
@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    size=st.sampled_from([1e-20, 1e-3, 1.0, 1e4]),
    slack=st.sampled_from([1e-5, 1e-4, 1e-2]),
    width=st.sampled_from([16, 48, 64, 256]),
)
def test_what_was_encoded_from_numbers_within_the_slack_is_explained(
    codec: CodecName, seed: int, size: float, slack: float, width: int
) -> None:
    own = a_tensor(seed, size, width=width)
    noise = np.random.default_rng(seed + 1).uniform(-0.9, 0.9, own.shape) * slack * sizes(own)[:, None]
    if codec == "int4":  # whose numbers are those after the rotation
        noise *= np.minimum(1, slack * sizes(own) / np.linalg.norm(noise, axis=1))[:, None]
    received = arrived((own + noise).astype(np.float32), codec)
    assert not unexplained(received, own, slack * sizes(own), codec_of(codec)).any()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("lie", ["larger", "noise"])
def test_most_rows_that_are_off_by_a_hundredth_are_not_explained(codec: CodecName, lie: str) -> None:
    own = a_tensor(1, 1.0, rows=2000)
    noise = np.random.default_rng(2).standard_normal(own.shape) * sizes(own)[:, None]
    lied = own * 1.01 if lie == "larger" else own + 0.01 * noise
    off = unexplained(arrived(lied.astype(np.float32), codec), own, 2e-4 * sizes(own), codec_of(codec))
    assert off.any(axis=1).mean() > (0.7 if codec == "int4" else 0.99)


@pytest.mark.parametrize("codec", ["bf16", "fp16", "int8", "int4"])
def test_a_sender_that_always_rounds_up_is_not_explained(codec: CodecName) -> None:
    """It is noticed although every number is within a step of the right one."""
    own = a_tensor(3, 1.0, rows=100)
    step = {"bf16": 2**-8, "fp16": 2**-11, "int8": 1 / 127 / 2, "int4": 1 / 15}[codec]
    nudged = own * (1 + step) if codec in ("bf16", "fp16") else own + step * np.abs(own).max(axis=1)[:, None]
    off = unexplained(arrived(nudged.astype(np.float32), codec), own, 2e-4 * sizes(own), codec_of(codec))
    assert off.any(axis=1).all()


@pytest.mark.parametrize("codec", CODECS)
def test_zeros_are_explained_by_zeros_alone(codec: CodecName) -> None:
    zeros, own = np.zeros((4, WIDTH), np.float32), a_tensor(4, 1.0, rows=4)
    assert not unexplained(arrived(zeros, codec), zeros, sizes(zeros), codec_of(codec)).any()
    for received, mine in ((zeros, own), (arrived(own, codec), zeros)):
        assert unexplained(received, mine, 1e-4 * sizes(mine), codec_of(codec)).any(axis=1).all()
