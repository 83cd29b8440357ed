"""int4: blocks rotated by a Hadamard matrix, a bfloat16 scale for each, two numbers a byte."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from peer.codec import Floats, block_of_int4, encoded_bytes
from peer.encoding import decode, encode
from peer.errors import WireError
from peer.wire import expert_pb2

INT4 = expert_pb2.CODEC_INT4
Doubles = npt.NDArray[np.float64]
LARGEST = 2.0**100
widths = st.sampled_from([16, 32, 48, 64, 96, 128, 320])
shapes = st.tuples(st.integers(1, 9), widths)


def tensors(largest: float) -> st.SearchStrategy[Floats]:
    """Tensors with numbers of all sizes up to `largest`."""
    numbers = st.floats(-largest, largest, width=32)
    return arrays.arrays(np.float32, shapes, elements=numbers)


def rotated(tensor_RD: Floats) -> Doubles:
    """[R, G, B], by the definition: entry i, j of the matrix is negative if i and j have an odd number of
    common bits.
    """
    rows, width = tensor_RD.shape
    size = block_of_int4(width)
    signs = np.array([[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)])
    turned: Doubles = tensor_RD.astype(np.float64).reshape(rows, -1, size) @ signs / np.sqrt(size)
    return turned


def sent(tensor_RD: Floats, seed: bytes | None = None) -> Floats:
    return decode(encode(tensor_RD, INT4, seed), tensor_RD.shape[1], INT4)


@pytest.mark.parametrize(("width", "block"), [(16, 16), (48, 16), (96, 32), (64, 64), (128, 64), (1024, 64)])
def test_a_block_is_the_largest_power_of_two_up_to_64_that_divides_the_width(width: int, block: int) -> None:
    assert block_of_int4(width) == block
    assert encoded_bytes(3, width, INT4) == 3 * (width // 2 + 2 * width // block)


@pytest.mark.parametrize("width", [1, 8, 24, 1000])
def test_other_widths_are_refused(width: int) -> None:
    for use in (
        lambda: encoded_bytes(1, width, INT4),
        lambda: encode(np.zeros((1, width), np.float32), INT4),
        lambda: decode(bytearray(width), width, INT4),
    ):
        with pytest.raises(WireError, match=f"a width that is a multiple of 16, but it is {width}"):
            use()


@given(tensors(LARGEST), st.none() | st.binary(max_size=20))
def test_a_rotated_number_is_off_by_at_most_half_a_step_or_a_whole_one_at_random(
    tensor_RD: Floats, seed: bytes | None
) -> None:
    exact_RGB, found_RGB = rotated(tensor_RD), rotated(sent(tensor_RD, seed))
    largest_RG1 = np.abs(exact_RGB).max(2, keepdims=True)
    # A step is the largest magnitude / 7.5, rounded up to the 8 bits of bfloat16.
    step_RG1 = largest_RG1 / 7.5 * (1 + 2**-7)
    most_RG1 = step_RG1 * (0.5001 if seed is None else 1.0001)
    assert (np.abs(found_RGB - exact_RGB) <= np.maximum(most_RG1, 2.0**-120)).all()


@given(tensors(1e3), st.binary(max_size=20))
def test_the_same_seed_makes_the_same_bytes(tensor_RD: Floats, seed: bytes) -> None:
    assert bytes(encode(tensor_RD, INT4, seed)) == bytes(encode(tensor_RD.copy(), INT4, seed))


@settings(max_examples=15)
@given(st.integers(0, 2**32), st.sampled_from([16, 96, 128]), st.floats(1e-20, 1e20))
def test_the_mean_of_random_roundings_is_exact(rng_seed: int, width: int, size: float) -> None:
    rng = np.random.default_rng(rng_seed)
    row_D = rng.standard_normal(width).astype(np.float32) * np.float32(size)
    times = 4000
    errors_RGB = rotated(sent(np.tile(row_D, (times, 1)), b"%d" % rng_seed)) - rotated(row_D[None])
    step = np.abs(rotated(row_D[None])).max(2, keepdims=True) / 7.5
    # The standard deviation of one number's error is at most half a step, and a 512th is lost to the eight-bit noise.
    assert (np.abs(errors_RGB.mean(0)) <= step * (6 * 0.5 / np.sqrt(times) + 1 / 512)).all()
    rounded_RGB = rotated(sent(row_D[None])) - rotated(row_D[None])
    assert np.abs(errors_RGB.mean(0)).mean() < np.abs(rounded_RGB).mean() / 5


def test_seeds_and_rows_round_independently() -> None:
    tensor_RD = np.random.default_rng(0).standard_normal((1, 64), dtype=np.float32).repeat(300, 0)
    errors = [sent(tensor_RD, seed) - tensor_RD for seed in (b"one", b"two")]
    errors.append(np.roll(errors[0], 1, axis=0))
    correlations = np.corrcoef(np.stack(errors).reshape(3, -1)) - np.eye(3)
    assert np.abs(correlations).max() < 0.05


@given(shapes, st.none() | st.just(b"seed"))
def test_zeros_stay_zeros(shape: tuple[int, int], seed: bytes | None) -> None:
    assert not sent(np.zeros(shape, np.float32), seed).any()
    assert not sent(np.full(shape, 1e-39, np.float32), seed).any()


@given(tensors(float(np.finfo(np.float32).max)), st.none() | st.just(b"seed"))
def test_outliers_are_clipped_and_never_overflow(tensor_RD: Floats, seed: bytes | None) -> None:
    found_RGB = rotated(sent(tensor_RD, seed))
    assert np.isfinite(found_RGB).all()
    exact_RGB = rotated(tensor_RD.clip(-LARGEST, LARGEST))
    fits = np.abs(rotated(tensor_RD)).max((1, 2)) < LARGEST
    assert (np.abs(found_RGB[~fits]) <= 1.01 * 8 * LARGEST).all()
    most_RG1 = np.abs(exact_RGB[fits]).max(2, keepdims=True) / 7.5 * 1.01
    assert (np.abs(found_RGB[fits] - exact_RGB[fits]) <= np.maximum(most_RG1, 2.0**-120)).all()


def test_an_outlier_costs_others_less_than_without_the_rotation() -> None:
    tensor_RD = np.random.default_rng(0).standard_normal((200, 128), dtype=np.float32)
    tensor_RD[:, 5] = 100.0
    others = np.arange(128) != 5
    error = np.sqrt(np.mean((sent(tensor_RD) - tensor_RD)[:, others] ** 2))
    step = 100 / 7.5
    assert error < 0.15 * step, "without it all others would be lost: they are less than a tenth of a step"


@pytest.mark.parametrize("seed", [None, b"seed"])
def test_what_is_lost_of_normal_numbers(seed: bytes | None) -> None:
    tensor_RD = np.random.default_rng(0).standard_normal((1000, 128), dtype=np.float32)
    lost = np.linalg.norm(sent(tensor_RD, seed) - tensor_RD) / np.linalg.norm(tensor_RD)
    assert lost == pytest.approx(0.1 if seed is None else 0.1 * np.sqrt(2), rel=0.05)


def test_bytes_are_as_the_protocol_says() -> None:
    rotated_D = np.zeros(16)
    rotated_D[[0, 3, 8]] = 7.5, -7.5, 2.5
    row_D = rotated(rotated_D[None].astype(np.float32)).ravel()  # the matrix is its own inverse
    data = bytes(encode(row_D[None].astype(np.float32), INT4))
    assert data[:2].hex() == "803f", "1.0, little-endian"
    codes = np.frombuffer(data[2:], np.uint8)
    # Zeros become half a step, up or down.
    assert (codes[0] & 15, codes[3] & 15, codes[0] >> 4) == (15, 0, 10)
    assert set(np.delete(codes & 15, [0, 3])) | set(np.delete(codes >> 4, 0)) <= {7, 8}
    step = np.frombuffer(bytes([0, 0x40]) + bytes(8), np.uint8)  # a scale of 2
    assert np.allclose(
        decode(bytearray(step), 16, INT4)[0], rotated(np.full((1, 16), -15.0, np.float32)).ravel()
    )


@pytest.mark.parametrize(
    ("scale", "fault"),
    [
        (0x7F80, "not finite"),
        (0xFF80, "not finite"),
        (0x7FC0, "not finite"),
        (0xFFFF, "not finite"),
        (0xBF80, "scales that are not between 0 and"),
        (0x7F7F, "scales that are not between 0 and"),
        (0x7201, "scales that are not between 0 and"),
    ],
)
def test_a_scale_that_no_encoder_writes_is_refused(scale: int, fault: str) -> None:
    data = bytearray(encode(np.ones((3, 128), np.float32), INT4))
    data[70:72] = scale.to_bytes(2, "little")  # of the second row's second block
    with pytest.raises(WireError, match=fault):
        decode(data, 128, INT4)


@pytest.mark.parametrize("payload", [0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001])
def test_every_nan_is_refused(payload: int) -> None:
    tensor_RD = np.ones((2, 32), np.float32)
    tensor_RD.view(np.uint32)[1, 7] = payload
    with pytest.raises(WireError, match="not finite"):
        sent(tensor_RD)
