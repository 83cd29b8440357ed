"""Tensors as bytes: nothing is lost, and nothing that is not finite comes in."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from peer.codec import (
    CHUNK_BYTES,
    MAX_CHUNK_BYTES,
    MAX_MESSAGE_BYTES,
    Floats,
    chunks,
    decode,
    encode,
    encoded_bytes,
)
from peer.errors import WireError
from peer.wire import expert_pb2

FP32 = expert_pb2.CODEC_FP32
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
shapes = st.tuples(st.integers(1, 12), st.integers(1, 24))
tensors: st.SearchStrategy[Floats] = arrays.arrays(np.float32, shapes, elements=finite)


@given(tensors)
def test_decoding_gives_back_what_was_encoded_bit_by_bit(tensor_RD: Floats) -> None:
    data = bytearray(encode(tensor_RD, FP32))
    rows, width = tensor_RD.shape
    assert len(data) == encoded_bytes(rows, width, FP32) == 4 * rows * width
    decoded_RD = decode(data, width, FP32)
    assert decoded_RD.dtype == np.float32
    assert decoded_RD.shape == tensor_RD.shape
    assert decoded_RD.tobytes() == tensor_RD.tobytes()


@given(tensors)
def test_tensors_that_are_not_contiguous_are_encoded_in_row_order(tensor_RD: Floats) -> None:
    turned_DR = tensor_RD.T
    assert np.array_equal(decode(encode(turned_DR, FP32), turned_DR.shape[1], FP32), turned_DR)
    doubled = tensor_RD.astype(np.float64)
    assert bytes(encode(doubled, FP32)) == bytes(encode(tensor_RD, FP32))  # type: ignore[arg-type]  # on purpose


def test_numbers_are_little_endian_binary32_row_by_row() -> None:
    tensor_RD = np.array([[1.0, -2.0], [0.5, 0.0]], dtype=np.float32)
    assert bytes(encode(tensor_RD, FP32)).hex() == "0000803f000000c00000003f00000000"


def test_neither_way_copies() -> None:
    tensor_RD = np.ones((3, 4), dtype=np.float32)
    data = encode(tensor_RD, FP32)
    decoded_RD = decode(data, 4, FP32)
    tensor_RD[1, 2] = 7.0
    assert decoded_RD[1, 2] == 7.0


@given(tensors, st.sampled_from([np.nan, np.inf, -np.inf]), st.integers(0, 10**6))
def test_one_number_that_is_not_finite_is_refused(tensor_RD: Floats, bad: float, position: int) -> None:
    tensor_RD.flat[position % tensor_RD.size] = bad
    with pytest.raises(WireError, match="not finite"):
        decode(bytearray(encode(tensor_RD, FP32)), tensor_RD.shape[1], FP32)


@pytest.mark.parametrize("number", [0, 2, 77, -1])
def test_a_codec_that_is_not_spoken_is_named(number: int) -> None:
    codec = expert_pb2.CallHeader().codec if number == 0 else number
    for use in (
        lambda: encoded_bytes(1, 1, codec),  # type: ignore[arg-type]  # as it comes from the wire
        lambda: encode(np.zeros((1, 1), np.float32), codec),  # type: ignore[arg-type]  # as above
        lambda: decode(bytearray(4), 1, codec),  # type: ignore[arg-type]  # as above
    ):
        with pytest.raises(WireError, match=f"codec {number} is not spoken here; spoken: CODEC_FP32"):
            use()


SIZES = st.one_of(st.integers(0, 3), st.integers(-2, 2).map(lambda n: 3 * CHUNK_BYTES + n))


@settings(max_examples=30)
@given(st.lists(SIZES, max_size=4))
def test_chunks_are_all_the_bytes_in_order_and_none_but_the_last_has_room(sizes: list[int]) -> None:
    parts = [np.arange(size, dtype=np.uint32).astype(np.uint8).tobytes() for size in sizes]
    found = list(chunks(map(memoryview, parts)))
    assert b"".join(found) == b"".join(parts)
    assert all(len(chunk) == CHUNK_BYTES for chunk in found[:-1])
    assert all(1 <= len(chunk) <= CHUNK_BYTES for chunk in found)


def test_a_chunk_fits_a_message() -> None:
    assert CHUNK_BYTES <= MAX_CHUNK_BYTES
    largest = expert_pb2.CallRequest(chunk=bytes(MAX_CHUNK_BYTES))
    assert largest.ByteSize() <= MAX_MESSAGE_BYTES
