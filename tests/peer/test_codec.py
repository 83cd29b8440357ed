"""Tensors as bytes: no more is lost than a codec permits, and no value that is not finite is accepted.

`test_codec_int4.py` tests what int4 loses.
"""

import tracemalloc
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from peer.codec import (
    CHUNK_BYTES,
    MAX_CHUNK_BYTES,
    MAX_MESSAGE_BYTES,
    Floats,
    chunks,
    decode_scalars,
    encode_scalars,
    encoded_bytes,
    scalar_bytes,
)
from peer.encoding import decode, encode
from peer.errors import WireError
from peer.wire import expert_pb2

FP32, INT8, INT4 = expert_pb2.CODEC_FP32, expert_pb2.CODEC_INT8, expert_pb2.CODEC_INT4
HALVES = [expert_pb2.CODEC_BF16, expert_pb2.CODEC_FP16]
every_codec = pytest.mark.parametrize("codec", [FP32, *HALVES, INT8, INT4], ids=expert_pb2.Codec.Name)
all_but_int4 = pytest.mark.parametrize("codec", [FP32, *HALVES, INT8], ids=expert_pb2.Codec.Name)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
shapes = st.tuples(st.integers(1, 12), st.integers(1, 24))
tensors: st.SearchStrategy[Floats] = arrays.arrays(np.float32, shapes, elements=finite)
tensors_for_int4: st.SearchStrategy[Floats] = arrays.arrays(
    np.float32, st.tuples(st.integers(1, 5), st.sampled_from([16, 48, 128])), elements=finite
)


@every_codec
def test_a_tensor_without_rows_has_no_bytes(codec: "expert_pb2.Codec") -> None:
    data = encode(np.empty((0, 32), np.float32), codec)
    assert bytes(data) == b""
    assert decode(data, 32, codec).shape == (0, 32)


@every_codec
@given(st.lists(finite))
def test_numbers_beside_tensors_are_exact_or_bfloat16s(
    codec: "expert_pb2.Codec", numbers: list[float]
) -> None:
    numbers_N = np.array(numbers, np.float32)
    data = encode_scalars(numbers_N, codec)
    found_N = decode_scalars(data, codec)
    assert len(data) == scalar_bytes(codec) * len(numbers)
    if codec == FP32:
        assert found_N.tobytes() == numbers_N.tobytes()
        return
    expected_N = torch.from_numpy(numbers_N).bfloat16().float()
    expected_N = expected_N.clamp(-torch.finfo(torch.bfloat16).max, torch.finfo(torch.bfloat16).max)
    np.testing.assert_array_equal(found_N, expected_N.numpy())
    assert encode_scalars(found_N, codec) == data
    with pytest.raises(WireError, match="are not whole numbers of 2 bytes"):
        decode_scalars(data + b"x", codec)


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


def largest_error(tensor_RD: Floats, codec: "expert_pb2.Codec") -> npt.NDArray[np.float64]:
    """[R, D]: half a unit in the last place of what the codec can represent there, or the amount that it clips."""
    size_RD: npt.NDArray[np.float64] = np.abs(tensor_RD.astype(np.float64))
    error_RD: npt.NDArray[np.float64] = np.zeros_like(size_RD)
    if codec == expert_pb2.CODEC_BF16:  # 8 bits of precision; its largest and smallest numbers are fp32's
        error_RD = np.maximum(size_RD * 2**-8, 2.0**-134)
    if codec == expert_pb2.CODEC_FP16:  # 11 bits, and numbers below 2^-14 lie 2^-24 apart
        error_RD = np.maximum(np.maximum(size_RD * 2**-11, 2.0**-25), size_RD - 65504)
    if codec == INT8:  # half a step, and what is too small for a scale is zero
        error_RD += np.maximum(size_RD.max(1, keepdims=True) / 127 * 0.500_01, 2.0**-119)
    return error_RD


@all_but_int4
@given(tensor_RD=tensors)
def test_what_is_lost_is_at_most_half_a_step_of_the_codec(
    codec: "expert_pb2.Codec", tensor_RD: Floats
) -> None:
    rows, width = tensor_RD.shape
    data = encode(tensor_RD, codec)
    assert len(data) == data.nbytes == encoded_bytes(rows, width, codec)
    decoded_RD = decode(bytearray(data), width, codec)
    assert decoded_RD.dtype == np.float32
    assert decoded_RD.shape == tensor_RD.shape
    error_RD = np.abs(decoded_RD.astype(np.float64) - tensor_RD)
    assert (error_RD <= largest_error(tensor_RD, codec)).all()


@all_but_int4
@given(tensor_RD=tensors)
def test_coding_again_what_was_decoded_loses_little_more(
    codec: "expert_pb2.Codec", tensor_RD: Floats
) -> None:
    width = tensor_RD.shape[1]
    once_RD = decode(encode(tensor_RD, codec), width, codec)
    twice_RD = decode(encode(once_RD, codec), width, codec)
    np.testing.assert_allclose(twice_RD, once_RD, rtol=1e-5 if codec == INT8 else 0, atol=2.0**-119)


@every_codec
def test_tensors_of_many_blocks_are_coded_row_by_row(codec: "expert_pb2.Codec") -> None:
    tensor_RD = np.random.default_rng(0).standard_normal((1000, 304), dtype=np.float32)
    tensor_RD *= np.logspace(-3, 3, 1000, dtype=np.float32)[:, None]
    whole_RD = decode(encode(tensor_RD, codec), 304, codec)
    for row in (0, 104, 105, 106, 500, 999):
        assert np.array_equal(decode(encode(tensor_RD[row : row + 1], codec), 304, codec)[0], whole_RD[row])


@every_codec
def test_tensors_that_may_not_be_written_or_are_not_contiguous_are_coded_too(
    codec: "expert_pb2.Codec",
) -> None:
    turned_DR = np.random.default_rng(0).standard_normal((16, 7), dtype=np.float32).T
    turned_DR.flags.writeable = False
    data = bytes(encode(turned_DR, codec))
    assert data == bytes(encode(turned_DR.copy(), codec))
    assert np.array_equal(decode(memoryview(data), 16, codec), decode(bytearray(data), 16, codec))


def test_halves_and_bytes_are_as_the_protocol_says() -> None:
    tensor_RD = np.array([[127.0, -2.0], [0.0, 0.0]], dtype=np.float32)
    assert bytes(encode(tensor_RD, expert_pb2.CODEC_BF16)).hex() == "fe4200c000000000"
    assert bytes(encode(tensor_RD, expert_pb2.CODEC_FP16)).hex() == "f05700c000000000"
    data = bytes(encode(tensor_RD, INT8))
    assert [data[4:6].hex(), data[6:].hex()] == ["7ffe", "000000000000"]
    assert np.frombuffer(data[:4], "<f4")[0] == pytest.approx(1.0, rel=2e-6)


def test_a_row_too_small_for_a_scale_is_zero() -> None:
    tensor_RD = np.array([[1e-43, -7e-44], [1e-36, 2e-38], [1.0, 0.0]], dtype=np.float32)
    decoded_RD = decode(encode(tensor_RD, INT8), 2, INT8)
    assert decoded_RD.tolist() == [[0, 0], [0, 0], [pytest.approx(1.0), 0]]


def test_what_a_half_cannot_say_is_clipped() -> None:
    tensor_RD = np.array([[1e5, -1e30, 1.0, 65519.0]], dtype=np.float32)
    clipped = decode(encode(tensor_RD, expert_pb2.CODEC_FP16), 4, expert_pb2.CODEC_FP16)
    assert clipped.tolist() == [[65504, -65504, 1, 65504]]
    largest = np.full((1, 1), np.finfo(np.float32).max)
    assert decode(encode(largest, expert_pb2.CODEC_BF16), 1, expert_pb2.CODEC_BF16)[0, 0] > 3.38e38


@every_codec
def test_beside_its_result_coding_takes_no_memory_that_grows_with_the_tensor(
    codec: "expert_pb2.Codec",
) -> None:
    rows, width = 4096, 256
    tensor_RD = np.ones((rows, width), np.float32)

    def most_bytes(work: Callable[[], object]) -> int:
        tracemalloc.start()
        work()
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    size = encoded_bytes(rows, width, codec)
    working = 4 * 128_000 if codec == INT4 else 10_000  # of one block; torch's is not counted
    assert most_bytes(lambda: encode(tensor_RD, codec)) < (0 if codec == FP32 else size) + working
    data = bytearray(encode(tensor_RD, codec))
    finite = rows * width  # a byte for each number, while they are looked at
    expected = finite + (0 if codec == FP32 else tensor_RD.nbytes)
    assert most_bytes(lambda: decode(data, width, codec)) < expected + working


@every_codec
@given(data=st.data(), bad=st.sampled_from([np.nan, np.inf, -np.inf]), position=st.integers(0, 10**6))
def test_one_number_that_is_not_finite_is_refused(
    codec: "expert_pb2.Codec", data: st.DataObject, bad: float, position: int
) -> None:
    tensor_RD = data.draw(tensors_for_int4 if codec == INT4 else tensors)
    tensor_RD.flat[position % tensor_RD.size] = bad
    with pytest.raises(WireError, match="not finite"):
        decode(bytearray(encode(tensor_RD, codec)), tensor_RD.shape[1], codec)


@every_codec
@given(data=st.data(), rows=st.integers(1, 6), width=st.integers(1, 12))
def test_any_bytes_become_finite_numbers_or_are_refused(
    codec: "expert_pb2.Codec", data: st.DataObject, rows: int, width: int
) -> None:
    width = 16 * width if codec == INT4 else width
    size = encoded_bytes(rows, width, codec)
    blob = bytearray(data.draw(st.binary(min_size=size, max_size=size)))
    try:
        decoded_RD = decode(blob, width, codec)
    except WireError:
        return
    assert decoded_RD.dtype == np.float32
    assert decoded_RD.shape == (rows, width)
    assert np.isfinite(decoded_RD).all()


@every_codec
@given(rows=st.integers(1, 3), off=st.integers(-20, 20).filter(bool))
def test_bytes_that_are_not_whole_rows_are_refused(codec: "expert_pb2.Codec", rows: int, off: int) -> None:
    size = encoded_bytes(rows, 48, codec) + off
    with pytest.raises(WireError, match=f"{size} bytes are not whole rows of {encoded_bytes(1, 48, codec)}"):
        decode(bytearray(size), 48, codec)


@pytest.mark.parametrize("number", [0, 6, 77, -1])
def test_a_codec_that_is_not_spoken_is_named(number: int) -> None:
    codec = expert_pb2.CallHeader().codec if number == 0 else number
    for use in (
        lambda: encoded_bytes(1, 1, codec),  # type: ignore[arg-type]  # as it comes from the wire
        lambda: encode(np.zeros((1, 1), np.float32), codec),  # type: ignore[arg-type]  # as above
        lambda: decode(bytearray(4), 1, codec),  # type: ignore[arg-type]  # as above
    ):
        with pytest.raises(
            WireError, match=f"codec {number} is not supported here; supported: CODEC_FP32, CODEC_BF16"
        ):
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
