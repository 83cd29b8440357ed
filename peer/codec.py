"""Tensors as bytes on the wire: encoding, sizes, chunks."""

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from peer.errors import WireError
from peer.wire import expert_pb2

Floats = npt.NDArray[np.float32]

CHUNK_BYTES = 512 * 1024
"""Bigger messages stall the loop, smaller ones cost more than they carry."""
MAX_CHUNK_BYTES = 1024 * 1024
MAX_MESSAGE_BYTES = 3 * 1024 * 1024
"""Of a header and a chunk together."""

_BYTES_PER_NUMBER = {expert_pb2.CODEC_FP32: 4}


def encoded_bytes(rows: int, width: int, codec: "expert_pb2.Codec") -> int:
    """Size of an encoded [rows, width] tensor. Raises WireError for a codec that this peer does not speak."""
    try:
        return rows * width * _BYTES_PER_NUMBER[codec]
    except KeyError:
        raise WireError(f"codec {codec} is not spoken here; spoken: CODEC_FP32") from None


def encode(tensor_RD: Floats, codec: "expert_pb2.Codec") -> memoryview:
    """The tensor's bytes; no copy when it is contiguous and of the codec's type."""
    encoded_bytes(0, 0, codec)
    return np.ascontiguousarray(tensor_RD, dtype="<f4").data.cast("B")


def decode(data: bytearray | memoryview, width: int, codec: "expert_pb2.Codec") -> Floats:
    """The [rows, width] tensor in `data`, sharing its memory. Raises WireError when a number is not finite."""
    encoded_bytes(0, 0, codec)
    tensor_RD = np.frombuffer(data, dtype="<f4").reshape(-1, width)
    if not np.isfinite(tensor_RD).all():
        raise WireError("the tensor has numbers that are not finite")
    return tensor_RD


def chunks(parts: Iterable[memoryview]) -> Iterator[bytes]:
    """The bytes of all parts, one after another, in as few chunks as fit into messages."""
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
