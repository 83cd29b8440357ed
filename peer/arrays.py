"""Arrays of numbers in a safetensors file. Encoding is deterministic, and decoding is strict, because a stranger may
have written the file.
"""

from collections.abc import Mapping
from math import prod
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save

from peer.checkpoints import read_outline
from peer.errors import StateError, WireError
from peer.files import PlainFile

MAX_OUTLINE_BYTES = 2**16
"""The limit for the JSON before the arrays."""
_TYPES = {
    torch.float32: "<f4",
    torch.float16: "<f2",
    torch.int64: "<i8",
    torch.int32: "<i4",
    torch.int8: "i1",
    torch.uint8: "u1",
}


def encode_arrays(arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """Encodes the arrays as a file. The same arrays always give the same bytes."""
    data: bytes = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    return data


def decode_arrays(data: bytes | memoryview) -> dict[str, npt.NDArray[Any]]:
    """Views of the data, by name. Nothing is copied. Floats may be NaN. Raises WireError if the data is malformed.

    Pass a memory-mapped file as a memoryview.
    """
    return {name: array for name, (array, _) in _decoded(data).items()}


class Rows(Protocol):
    """An array whose rows can be read a few at a time."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> npt.NDArray[Any]: ...


class FileArray:
    """An array in a file. Only the rows that are asked for are read. For any thread.

    Raises OSError if the disk fails. With a memory-mapped file, that would end the process.
    """

    def __init__(self, file: PlainFile, like: npt.NDArray[Any], start: int) -> None:
        """`like`: an array of the same shape and dtype. `start`: the array's offset in the file, in bytes."""
        self._file = file
        self._count, self._shape, self._dtype = len(like), like.shape[1:], like.dtype
        self._row_bytes = prod(self._shape) * like.dtype.itemsize
        self._start = start

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, rows: slice, /) -> npt.NDArray[Any]:
        """Raises OSError, also if another file has taken this one's place."""
        begin, end, step = rows.indices(self._count)
        assert step == 1, "only what lies together is read"
        count = max(0, end - begin)
        data = np.empty(count * self._row_bytes, np.uint8)
        self._file.read_into(data.data, self._start + begin * self._row_bytes)
        return data.view(self._dtype).reshape(count, *self._shape)


def arrays_in(file: PlainFile, data: bytes) -> dict[str, FileArray]:
    """The arrays of a file with this content. Raises WireError if the content is malformed."""
    return {name: FileArray(file, array, start) for name, (array, start) in _decoded(data).items()}


def _decoded(data: bytes | memoryview) -> dict[str, tuple[npt.NDArray[Any], int]]:
    """The arrays and their offsets in the data, in bytes. Raises WireError."""
    try:
        metadata, places = read_outline(data, MAX_OUTLINE_BYTES)
    except StateError as error:
        raise WireError(f"the file of arrays can't be read: {error}") from error
    if metadata is not None:
        raise WireError("a file of arrays must not have metadata")
    arrays: dict[str, tuple[npt.NDArray[Any], int]] = {}
    for place in places:
        shape, dtype = place.form
        if dtype not in _TYPES:
            raise WireError(f"the file of arrays has numbers of the unknown type {dtype}")
        kind = np.dtype(_TYPES[dtype])
        if place.start == place.end:
            arrays[place.name] = np.empty(shape, kind), place.start
        else:
            flat = np.frombuffer(data, kind, prod(shape), place.start)
            arrays[place.name] = flat.reshape(shape), place.start
    return arrays
