"""Encodes tensors as bytes for the wire, and decodes them.

Shape suffixes: R = rows, D = the wire's width, N = all numbers of a tensor, C = bytes of an encoded row, G = int4's
blocks in a row, B = numbers of such a block.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from peer.codec import SCALE_BYTES, Booleans, Floats, block_of_int4, encoded_bytes
from peer.errors import WireError
from peer.wire import expert_pb2

_HALVES = {expert_pb2.CODEC_BF16: torch.bfloat16, expert_pb2.CODEC_FP16: torch.float16}
_STEP = (1 - 2**-20) / 127
"""int8's step, as a share of the row's largest magnitude. Just below 1/127, so that no decoded row overflows."""
_FUZZ = 1e-4
"""How far numbers that were decoded in float32 may be from multiples of a step, as a share of the step."""
_SCALE_SLACK = 5
"""How far a scale may be off, in multiples of the slack: bfloat16 may round the largest number of a row by that much.
"""
_MOST_SCALES = 64
"""How many scales the sender may have used for one of our own blocks. More are possible if the block is far smaller
than the slack.
"""
_LARGEST_NUMBER, _LARGEST_SCALE = 2.0**100, 2.0**101
"""The limits of int4. No sum of a block's numbers overflows, neither when it is encoded nor when it is decoded."""
_BLOCK_NUMBERS = 32_000
"""Numbers converted at once: they fit the processor's cache, and torch starts no threads for so few (its limit is
32768).
"""
_SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
"""Rows with a smaller scale are sent as zeros, because dividing by it would lose precision."""
_HALF_STEPS = 7.5
"""int4's numbers are the 16 odd multiples of half a step from -7.5 to 7.5 steps."""


def rounding_error(width: int, codec: "expert_pb2.Codec") -> tuple[float, float]:
    """The largest rounding error of a row: as a share of its norm, and an absolute distance in addition.

    For rows within the codec's range.
    """
    if codec == expert_pb2.CODEC_INT8:  # half a step of max / 127 in each number
        return width**0.5 / 254, width**0.5 * _SMALLEST_SCALE
    if codec == expert_pb2.CODEC_INT4:  # a step in each number when it is rounded at random
        return 1.01 * block_of_int4(width) ** 0.5 / _HALF_STEPS, width**0.5 * _SMALLEST_SCALE
    if codec == expert_pb2.CODEC_FP16:
        return 2**-11, width**0.5 * 2**-25
    return (2**-8, 0.0) if codec == expert_pb2.CODEC_BF16 else (0.0, 0.0)


def encode(tensor_RD: Floats, codec: "expert_pb2.Codec", seed: bytes | None = None) -> memoryview:
    """The tensor's bytes. With CODEC_FP32, a contiguous float32 tensor is not copied.

    With a `seed`, as for gradients, CODEC_INT4 rounds up or down at random, so that errors cancel out over many calls.
    Everything else is rounded to nearest.

    Finite numbers beyond a codec's range are clipped to it (fp16: ±65504), so that one outlier doesn't make a call
    fail. Numbers that are not finite stay so in every codec, and the receiver rejects them.

    Raises WireError for an unknown codec or a width that it cannot encode.
    """
    rows, width = tensor_RD.shape
    size = encoded_bytes(rows, width, codec)
    if codec == expert_pb2.CODEC_FP32:
        return np.ascontiguousarray(tensor_RD, dtype="<f4").reshape(-1).view(np.uint8).data
    data = np.empty(size, np.uint8)
    numbers_RD = torch.from_numpy(np.require(tensor_RD, np.float32, ["C", "W"]))
    if codec in _HALVES:
        _encode_half(numbers_RD.flatten(), torch.from_numpy(data.view(np.int16)).view(_HALVES[codec]))
        return data.data
    rows_RC = torch.from_numpy(data.reshape(rows, encoded_bytes(1, width, codec)))
    if codec == expert_pb2.CODEC_INT8:
        _encode_int8(numbers_RD, rows_RC)
    else:
        _encode_int4(numbers_RD, rows_RC, seed)
    return data.data


def decode(data: bytearray | memoryview, width: int, codec: "expert_pb2.Codec") -> Floats:
    """The [rows, width] tensor in `data`. With CODEC_FP32, it shares the memory of `data`.

    Raises WireError if `data` does not consist of whole rows, if a number is not finite, or if an int4 scale is out of
    bounds.
    """
    row_bytes = encoded_bytes(1, width, codec)
    rows, rest = divmod(len(data), row_bytes)
    if rest:
        raise WireError(f"{len(data)} bytes are not whole rows of {row_bytes} bytes")
    if codec == expert_pb2.CODEC_FP32:
        tensor_RD = np.frombuffer(data, dtype="<f4").reshape(rows, width)
    else:
        tensor_RD = np.empty((rows, width), np.float32)
        numbers_RD, bytes_N = torch.from_numpy(tensor_RD), _writable(data)
        if codec in _HALVES:
            _decode_half(bytes_N.view(_HALVES[codec]), numbers_RD.flatten())
        elif codec == expert_pb2.CODEC_INT8:
            _decode_int8(bytes_N.view(rows, row_bytes), numbers_RD)
        else:
            _decode_int4(bytes_N.view(rows, row_bytes), numbers_RD)
    if not np.isfinite(tensor_RD).all():
        raise WireError("the tensor has numbers that are not finite")
    return tensor_RD


def unexplained(received_RD: Floats, own_RD: Floats, slack_R: Floats, codec: "expert_pb2.Codec") -> Booleans:
    """Marks the decoded numbers that the codec can't have rounded from numbers within `slack` of our own: [R, D]. So
    even a coarse codec hides little: of the two numbers that it may round to, only one is right, unless our own number
    is almost in the middle between them. With int4, the numbers after its rotation are compared. The number that sets a
    block's scale may be several times the slack away; that does not make the block's other numbers wrong.
    """
    slack_R1 = slack_R.astype(np.float32)[:, None]
    of_scale_R1 = _SCALE_SLACK * slack_R1
    if codec == expert_pb2.CODEC_FP32:
        return _outside(received_RD, own_RD - slack_R1, own_RD + slack_R1)
    if codec in _HALVES:
        least_RD, most_RD = (
            decode(encode(own_RD + change, codec), own_RD.shape[1], codec) for change in (-slack_R1, slack_R1)
        )
        return _outside(received_RD, least_RD, most_RD)
    if codec == expert_pb2.CODEC_INT8:
        largest_R1, received_R1 = (np.abs(each).max(axis=1, keepdims=True) for each in (own_RD, received_RD))
        # the largest number is 127 steps in magnitude
        scales_R1: Floats = np.clip(
            received_R1 / 127, (largest_R1 - of_scale_R1).clip(0) * _STEP, (largest_R1 + of_scale_R1) * _STEP
        )
        return _off_grid(received_RD, own_RD, scales_R1, slack_R1)
    size = block_of_int4(own_RD.shape[1])
    received_RGB, own_RGB = (_rotated(torch.from_numpy(each), size).numpy() for each in (received_RD, own_RD))
    slack_R11, of_scale_R11 = slack_R1[:, :, None], of_scale_R1[:, :, None]
    largest_RG1 = np.abs(own_RGB).max(axis=2, keepdims=True)
    usual, least, most = (
        _scales_of_int4((largest_RG1 + change * of_scale_R11).clip(0)) for change in (0, -1, 1)
    )
    off = np.ones_like(own_RGB, dtype=np.bool_)
    # the sender's scale is one of these; nearly always they are all the same
    others = range(min(int((most - least).max(initial=0)) + 1, _MOST_SCALES))
    for halves_RG1 in (usual, *(np.minimum(least + step, most) for step in others)):
        scales_RG1: Floats = (halves_RG1 << 16).view(np.float32)
        off_RGB = _off_grid(received_RGB, own_RGB, scales_RG1, slack_R11, 0.5)
        is_better_RG1 = off_RGB.sum(axis=2, keepdims=True) < off.sum(axis=2, keepdims=True)
        off = np.where(is_better_RG1, off_RGB, off)
    return off.reshape(own_RD.shape)


def _off_grid(received: Floats, own: Floats, scales: Floats, slack: Floats, offset: float = 0.0) -> Booleans:
    """Whether the received numbers are not those multiples of the scales, plus `offset`, that are nearest to some
    number within the slack.
    """
    steps = np.where(scales < _SMALLEST_SCALE, np.inf, scales)
    scales = np.where(scales < _SMALLEST_SCALE, 0, scales)
    fuzz = _FUZZ * scales + _SMALLEST_SCALE
    least = (np.rint((own - slack) / steps - offset) + offset) * scales - fuzz
    most = (np.rint((own + slack) / steps - offset) + offset) * scales + fuzz
    return _outside(received, least, most)


def _outside(numbers: Floats, least: Floats, most: Floats) -> Booleans:
    outside: Booleans = (numbers < least) | (numbers > most)
    return outside


def _encode_half(numbers_N: Tensor, halves_N: Tensor) -> None:
    largest = torch.finfo(halves_N.dtype).max
    for block, halves in zip(_blocks(numbers_N, 1), _blocks(halves_N, 1), strict=True):
        if (block.abs() > largest).any():
            block = torch.where(block.isfinite(), block.clamp(-largest, largest), block)
        halves.copy_(block)


def _decode_half(halves_N: Tensor, numbers_N: Tensor) -> None:
    for halves, block in zip(_blocks(halves_N, 1), _blocks(numbers_N, 1), strict=True):
        block.copy_(halves)


def _encode_int8(numbers_RD: Tensor, rows_RC: Tensor) -> None:
    width = numbers_RD.shape[1]
    for block, rows in zip(_blocks(numbers_RD, width), _blocks(rows_RC, width), strict=True):
        scales_R1 = block.abs().amax(1, keepdim=True) * _STEP
        scales_R1.masked_fill_(scales_R1 < _SMALLEST_SCALE, 0.0)
        steps = block / scales_R1.masked_fill(scales_R1 == 0, torch.inf)
        rows[:, :SCALE_BYTES] = scales_R1.view(torch.uint8)
        # if a row is not finite, neither is its scale, whatever its steps are
        rows[:, SCALE_BYTES:].view(torch.int8).copy_(steps.round_())


def _decode_int8(rows_RC: Tensor, numbers_RD: Tensor) -> None:
    width = numbers_RD.shape[1]
    for rows, block in zip(_blocks(rows_RC, width), _blocks(numbers_RD, width), strict=True):
        scales_R1 = rows[:, :SCALE_BYTES].flatten().clone().view(torch.float32)[:, None]
        torch.mul(rows[:, SCALE_BYTES:].view(torch.int8), scales_R1, out=block)


def _encode_int4(numbers_RD: Tensor, rows_RC: Tensor, seed: bytes | None) -> None:
    width = numbers_RD.shape[1]
    rng = None if seed is None else np.random.Generator(np.random.SFC64(int.from_bytes(seed)))
    half, size = width // 2, block_of_int4(width)
    for block, rows in zip(_blocks(numbers_RD, width), _blocks(rows_RC, width), strict=True):
        steps_RGB = _rotated(block, size)
        scales_RG = steps_RGB.abs().amax(2).numpy() / _HALF_STEPS
        if not scales_RG.max() <= _LARGEST_SCALE:
            clipped = torch.where(block.isfinite(), block.clamp(-_LARGEST_NUMBER, _LARGEST_NUMBER), block)
            steps_RGB = _rotated(clipped, size)
            scales_RG = steps_RGB.abs().amax(2).numpy() / _HALF_STEPS
            scales_RG[~np.isfinite(scales_RG)] = np.inf
        scales_RG[scales_RG < _SMALLEST_SCALE] = 0
        halves_RG = _halves_above(scales_RG)
        rows.numpy()[:, :-half] = halves_RG.astype("<u2").view(np.uint8)
        scales_RG = (halves_RG << 16).view(np.float32)
        scales_RG[scales_RG == 0] = np.inf
        steps_RGB *= torch.from_numpy(1 / scales_RG[:, :, None])
        middle = _HALF_STEPS + 0.5  # half a step more, because conversion truncates
        if rng is not None:
            noise = rng.integers(2**64, size=block.numel() // 8, dtype=np.uint64).view(np.int8)
            steps_RGB += torch.from_numpy(noise).view(steps_RGB.shape) * 2**-8
            middle += 2**-9
        codes_RD = steps_RGB.add_(middle).clamp_(0, 15).to(torch.int8).view(torch.uint8).view(block.shape)
        torch.add(codes_RD[:, :half], codes_RD[:, half:], alpha=16, out=rows[:, -half:])


def _halves_above(scales: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Scales as bfloat16, rounded up so that no number is clipped. `scales`: float32; the halves: uint32."""
    return scales.view(np.uint32) + 0xFFFF >> 16


def _scales_of_int4(largest: Floats) -> npt.NDArray[Any]:
    """The scales of blocks with these largest numbers, as bfloat16; 0 below `_SMALLEST_SCALE`."""
    scales = (largest / _HALF_STEPS).astype(np.float32)
    scales[scales < _SMALLEST_SCALE] = 0
    return _halves_above(scales)


def _decode_int4(rows_RC: Tensor, numbers_RD: Tensor) -> None:
    width = numbers_RD.shape[1]
    half, size = width // 2, block_of_int4(width)
    scales_RG1 = rows_RC[:, :-half].contiguous().view(torch.bfloat16).float()[:, :, None]
    if not scales_RG1.isfinite().all():
        raise WireError("the tensor has numbers that are not finite")
    if not ((scales_RG1 >= 0) & (scales_RG1 <= _LARGEST_SCALE)).all():
        raise WireError(f"the tensor has scales that are not between 0 and {_LARGEST_SCALE:.4g}")
    parts = (_blocks(part, width) for part in (rows_RC[:, -half:], scales_RG1, numbers_RD))
    for codes, scales, block in zip(*parts, strict=True):
        steps_RD = torch.empty_like(block)
        torch.bitwise_and(codes, 15, out=steps_RD[:, :half])
        torch.bitwise_right_shift(codes, 4, out=steps_RD[:, half:])
        steps_RD.view(len(block), -1, size).sub_(_HALF_STEPS).mul_(scales)
        block.copy_(_rotated(steps_RD, size).view(block.shape))


def _rotated(numbers_RD: Tensor, size: int) -> Tensor:
    """Multiplies each block of each row by the Hadamard matrix, which is its own inverse: [R, G, B].

    This spreads an outlier over its block, so that the other numbers keep their precision (QuaRot, arXiv 2404.00456).
    numpy multiplies eight blocks at a time: the result for a block does not depend on the others, and no threads are
    started from the loop's thread, as torch.mm would.
    """
    blocks = numbers_RD.numpy().reshape(-1, size)
    eights = np.zeros((-(-len(blocks) // 8), 8, size), np.float32)
    eights.reshape(-1, size)[: len(blocks)] = blocks
    with np.errstate(over="ignore", invalid="ignore"):  # the result shows the encoder what does not fit
        rotated = np.matmul(eights, _hadamard(size)).reshape(-1, size)
    return torch.from_numpy(rotated[: len(blocks)]).view(len(numbers_RD), -1, size)


@cache
def _hadamard(size: int) -> Floats:
    """[size, size], orthonormal, by Sylvester's construction."""
    signs = np.ones((1, 1), np.float32)
    while len(signs) < size:
        signs = np.block([[signs, signs], [signs, -signs]])
    return signs / np.float32(size**0.5)


def _blocks(tensor: Tensor, width: int) -> Iterator[Tensor]:
    """The tensor in blocks of whole rows of `width` numbers."""
    step = max(1, _BLOCK_NUMBERS // width)
    return (tensor[at : at + step] for at in range(0, len(tensor), step))


def _writable(data: bytearray | memoryview) -> Tensor:
    """The array as a torch tensor. torch can share only writable memory."""
    return torch.from_numpy(np.require(np.frombuffer(data, np.uint8), requirements="W"))
