"""The codecs in which tensors travel: names, sizes, chunks and single numbers. `peer.encoding` encodes tensors.

It imports no torch, which takes seconds, so that programs that only look at a swarm start at once. N = all numbers.
"""

from collections.abc import Iterable, Iterator
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from peer.errors import WireError
from peer.wire import expert_pb2

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]
CodecName: TypeAlias = Literal["fp32", "bf16", "fp16", "int8", "int4"]
"""The names of codecs in a manifest."""

CHUNK_BYTES = 128 * 1024
"""Eight calls that share an upload of 1 Mbit/s each send one chunk in 9 s. Larger messages also stall the loop, and
smaller ones have too much overhead.
"""
MAX_CHUNK_BYTES = 1024 * 1024
MAX_MESSAGE_BYTES = 3 * 1024 * 1024
"""The limit for a header and a chunk together."""

_CODECS = {
    "fp32": expert_pb2.CODEC_FP32,
    "bf16": expert_pb2.CODEC_BF16,
    "fp16": expert_pb2.CODEC_FP16,
    "int8": expert_pb2.CODEC_INT8,
    "int4": expert_pb2.CODEC_INT4,
}
_BYTES_PER_NUMBER = {expert_pb2.CODEC_FP32: 4, expert_pb2.CODEC_BF16: 2, expert_pb2.CODEC_FP16: 2}
SCALE_BYTES = 4
"""The size of the scale of a row in int8."""
_LEAST_BLOCK, _LARGEST_BLOCK = 16, 64
"""The sizes of int4's blocks. Smaller blocks would spend more than one bit per number on scales; larger ones cost more
time than they save.
"""
_LARGEST_BF16 = (2 - 2**-7) * 2.0**127


def codec_of(name: CodecName) -> "expert_pb2.Codec":
    """The wire's number for a codec in a manifest."""
    return _CODECS[name]


def encoded_bytes(rows: int, width: int, codec: "expert_pb2.Codec") -> int:
    """Size of an encoded [rows, width] tensor.

    Raises WireError for an unknown codec, and for a width that the codec cannot encode.
    """
    if codec not in _CODECS.values():
        spoken = ", ".join(map(expert_pb2.Codec.Name, _CODECS.values()))
        raise WireError(f"codec {codec} is not supported here; supported: {spoken}")
    if codec == expert_pb2.CODEC_INT8:
        return rows * (SCALE_BYTES + width)
    if codec == expert_pb2.CODEC_INT4:
        return rows * (2 * width // block_of_int4(width) + width // 2)
    return rows * width * _BYTES_PER_NUMBER[codec]


def block_of_int4(width: int) -> int:
    """How many numbers of a row int4 rotates together. Raises WireError when 16 doesn't divide the width."""
    block = min(width & -width, _LARGEST_BLOCK)
    if block < _LEAST_BLOCK:
        raise WireError(f"int4 needs a width that is a multiple of {_LEAST_BLOCK}, but it is {width}")
    return block


def scalar_bytes(codec: "expert_pb2.Codec") -> int:
    """The size of an encoded weight or product, in bytes."""
    return 4 if codec == expert_pb2.CODEC_FP32 else 2


def encode_scalars(numbers_N: Floats, codec: "expert_pb2.Codec") -> bytes:
    """Encodes weights or products, which are finite: exactly with CODEC_FP32, otherwise as bfloat16."""
    if scalar_bytes(codec) == 4:
        return numbers_N.astype("<f4").tobytes()
    bits = numbers_N.astype(np.float32).clip(-_LARGEST_BF16, _LARGEST_BF16).view(np.uint32)
    return (bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype("<u2").tobytes()


def decode_scalars(data: bytes, codec: "expert_pb2.Codec") -> Floats:
    """The numbers that `encode_scalars` encoded. They may be infinite or NaN. Raises WireError if the last one is cut
    off.
    """
    size = scalar_bytes(codec)
    if len(data) % size:
        raise WireError(f"{len(data)} bytes are not whole numbers of {size} bytes")
    if size == 4:
        return np.frombuffer(data, "<f4").astype(np.float32)
    numbers_N: Floats = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    return numbers_N


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


def joined(parts: Iterable[bytes | bytearray | memoryview]) -> bytes:
    """The parts in one piece. Copying each at once would hold all other threads, for 5 ms per MB of fresh memory."""
    return b"".join(chunks(map(memoryview, parts)))  # joining only `bytes` lets other threads run
