"""Encodes tensors as bytes for the wire: codecs, sizes and chunks.

Shape suffixes: R = rows, D = the model's width, N = all numbers of a tensor, C = bytes of an encoded row.
"""

from collections.abc import Iterable, Iterator
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from peer.errors import WireError
from peer.wire import expert_pb2

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]
CodecName: TypeAlias = Literal["fp32", "bf16", "fp16", "int8"]
"""The names of codecs in a manifest."""

CHUNK_BYTES = 128 * 1024
"""Eight calls that share an upload of 1 Mbit/s send one each in 9 s. Larger messages stall the loop, too, and smaller
ones have too much overhead.
"""
MAX_CHUNK_BYTES = 1024 * 1024
MAX_MESSAGE_BYTES = 3 * 1024 * 1024
"""For a header and a chunk together."""

_CODECS = {
    "fp32": expert_pb2.CODEC_FP32,
    "bf16": expert_pb2.CODEC_BF16,
    "fp16": expert_pb2.CODEC_FP16,
    "int8": expert_pb2.CODEC_INT8,
}
_BYTES_PER_NUMBER = {
    expert_pb2.CODEC_FP32: 4,
    expert_pb2.CODEC_BF16: 2,
    expert_pb2.CODEC_FP16: 2,
    expert_pb2.CODEC_INT8: 1,
}
_HALVES = {expert_pb2.CODEC_BF16: torch.bfloat16, expert_pb2.CODEC_FP16: torch.float16}
_SCALE_BYTES = 4
_STEP = (1 - 2**-20) / 127
"""int8's step, as a part of the row's largest magnitude. Just below 1/127, so that no row overflows when decoded."""
_SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
"""Rows with a smaller scale are sent as zeros, because dividing by it would lose precision."""
_BLOCK_NUMBERS = 32_000
"""Converted at once: they fit the processor's cache, and torch starts no threads for so few (its limit is 32768)."""


def codec_of(name: CodecName) -> "expert_pb2.Codec":
    """The wire's number for a codec in a manifest."""
    return _CODECS[name]


def encoded_bytes(rows: int, width: int, codec: "expert_pb2.Codec") -> int:
    """Size of an encoded [rows, width] tensor. Raises WireError for an unknown codec."""
    if codec not in _BYTES_PER_NUMBER:
        spoken = ", ".join(map(expert_pb2.Codec.Name, _BYTES_PER_NUMBER))
        raise WireError(f"codec {codec} is not spoken here; spoken: {spoken}")
    scales = _SCALE_BYTES * rows if codec == expert_pb2.CODEC_INT8 else 0
    return rows * width * _BYTES_PER_NUMBER[codec] + scales


def encode(tensor_RD: Floats, codec: "expert_pb2.Codec") -> memoryview:
    """The tensor's bytes. With CODEC_FP32, a contiguous float32 tensor is not copied.

    Finite numbers beyond a codec's range are clipped to it (fp16: ±65504), so that one outlier doesn't fail a call.
    Numbers that are not finite stay so in every codec, and the receiver rejects them.
    """
    rows, width = tensor_RD.shape
    size = encoded_bytes(rows, width, codec)
    if codec == expert_pb2.CODEC_FP32:
        return np.ascontiguousarray(tensor_RD, dtype="<f4").data.cast("B")
    data = np.empty(size, np.uint8)
    numbers_RD = torch.from_numpy(np.require(tensor_RD, np.float32, ["C", "W"]))
    if codec == expert_pb2.CODEC_INT8:
        _encode_int8(numbers_RD, torch.from_numpy(data).view(rows, _SCALE_BYTES + width))
    else:
        _encode_half(numbers_RD.flatten(), torch.from_numpy(data.view(np.int16)).view(_HALVES[codec]))
    return data.data


def decode(data: bytearray | memoryview, width: int, codec: "expert_pb2.Codec") -> Floats:
    """The [rows, width] tensor in `data`. With CODEC_FP32, it shares the memory of `data`.

    Raises WireError if a number is not finite.
    """
    encoded_bytes(0, 0, codec)
    if codec == expert_pb2.CODEC_FP32:
        tensor_RD = np.frombuffer(data, dtype="<f4").reshape(-1, width)
    elif codec == expert_pb2.CODEC_INT8:
        rows_RC = _writable(data, np.uint8).view(-1, _SCALE_BYTES + width)
        tensor_RD = np.empty((len(rows_RC), width), np.float32)
        _decode_int8(rows_RC, torch.from_numpy(tensor_RD))
    else:
        halves_N = _writable(data, np.int16).view(_HALVES[codec])
        tensor_RD = np.empty((len(halves_N) // width, width), np.float32)
        _decode_half(halves_N, torch.from_numpy(tensor_RD).flatten())
    if not np.isfinite(tensor_RD).all():
        raise WireError("the tensor has numbers that are not finite")
    return tensor_RD


def chunks(parts: Iterable[memoryview]) -> Iterator[bytes]:
    """Joins the bytes of all parts and splits them into as few chunks as messages allow."""
    pieces: list[memoryview] = []
    room = CHUNK_BYTES
    for part in parts:
        while part:
            pieces.append(part[:room])
            part = part[room:]
            room -= len(pieces[-1])
            if not room:
                yield b"".join(pieces)
                pieces, room = [], CHUNK_BYTES
    if pieces:
        yield b"".join(pieces)


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
        rows[:, :_SCALE_BYTES] = scales_R1.view(torch.uint8)
        # if a row is not finite, its scale is not either, whatever its steps are
        rows[:, _SCALE_BYTES:].view(torch.int8).copy_(steps.round_())


def _decode_int8(rows_RC: Tensor, numbers_RD: Tensor) -> None:
    width = numbers_RD.shape[1]
    for rows, block in zip(_blocks(rows_RC, width), _blocks(numbers_RD, width), strict=True):
        scales_R1 = rows[:, :_SCALE_BYTES].flatten().clone().view(torch.float32)[:, None]
        torch.mul(rows[:, _SCALE_BYTES:].view(torch.int8), scales_R1, out=block)


def _blocks(tensor: Tensor, width: int) -> Iterator[Tensor]:
    """The tensor in blocks of rows of `width` numbers."""
    step = max(1, _BLOCK_NUMBERS // width)
    return (tensor[at : at + step] for at in range(0, len(tensor), step))


def _writable(data: bytearray | memoryview, dtype: npt.DTypeLike) -> Tensor:
    """As a torch tensor, which can only share writable memory."""
    return torch.from_numpy(np.require(np.frombuffer(data, dtype), requirements="W"))
