"""Arrays of numbers in a safetensors file, written in one way only and parsed strictly: a file may be a stranger's."""

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save

from peer.checkpoints import read_outline
from peer.errors import StateError, WireError

MAX_OUTLINE_BYTES = 2**16
"""Of the JSON before the arrays."""
_TYPES = {
    torch.float32: "<f4",
    torch.float16: "<f2",
    torch.int64: "<i8",
    torch.int32: "<i4",
    torch.int8: "i1",
    torch.uint8: "u1",
}


def encode_arrays(arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """The file of these arrays: always the same bytes for the same arrays."""
    data: bytes = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    return data


def decode_arrays(data: bytes | memoryview) -> dict[str, npt.NDArray[Any]]:
    """Views of the data, by name. Nothing is copied. Floats may be NaN. Raises WireError if it is malformed.

    Hand in a memory-mapped file as a memoryview.
    """
    try:
        metadata, places = read_outline(data, MAX_OUTLINE_BYTES)
    except StateError as error:
        raise WireError(f"a file of arrays: {error}") from error
    if metadata is not None:
        raise WireError("a file of arrays with metadata, which it has no use for")
    arrays = {}
    for place in places:
        shape, dtype = place.form
        if dtype not in _TYPES:
            raise WireError(f"a file of arrays with numbers of type {dtype}")
        kind = np.dtype(_TYPES[dtype])
        if place.start == place.end:
            arrays[place.name] = np.empty(shape, kind)
        else:
            flat = np.frombuffer(data, kind, prod(shape), place.start)
            arrays[place.name] = flat.reshape(shape)
    return arrays
