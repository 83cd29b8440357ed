"""The numbers beside a call's tensors, with CODEC_FP32, for tests."""

from collections.abc import Iterable

import numpy as np

from peer.codec import decode_scalars, encode_scalars
from peer.wire import expert_pb2


def scalars(numbers: Iterable[float], codec: "expert_pb2.Codec" = expert_pb2.CODEC_FP32) -> bytes:
    return encode_scalars(np.array([*numbers], np.float32), codec)


def numbers_of(data: bytes) -> list[float]:
    found: list[float] = decode_scalars(data, expert_pb2.CODEC_FP32).tolist()
    return found
