"""Files of arrays: what was written can be read, and files invented by a stranger are refused."""

import struct
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from peer.arrays import decode_arrays, encode_arrays
from peer.errors import WireError

ARRAYS: dict[str, npt.NDArray[Any]] = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.zeros((0, 5), np.int8),
}
GOOD = encode_arrays(ARRAYS)
TYPES = st.sampled_from([np.float32, np.float16, np.int64, np.int32, np.int8, np.uint8])
SOME = st.dictionaries(
    st.text("abcxyz.", min_size=1, max_size=5),
    TYPES.flatmap(lambda kind: arrays_of.arrays(kind, arrays_of.array_shapes(min_side=0, max_side=5))),
    max_size=4,
)


def with_outline(text: bytes, content: bytes = b"") -> bytes:
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + content


@given(SOME)
def test_arrays_are_read_as_they_were_written(arrays: dict[str, npt.NDArray[Any]]) -> None:
    data = encode_arrays(arrays)
    assert data == encode_arrays(dict(reversed(arrays.items())))
    found = decode_arrays(memoryview(data))
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()


def test_nothing_is_copied() -> None:
    assert not decode_arrays(GOOD)["a"].flags.owndata


@pytest.mark.parametrize(
    "data",
    [
        b"",
        GOOD[:-1],
        GOOD + b"\0",
        with_outline(b'{"a":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}}', bytes(8)),
        with_outline(b'{"__metadata__":{"x":"y"}}'),
        with_outline(b'{"a":{"dtype":"U8","shape":[9],"data_offsets":[0,8]}}', bytes(8)),
        with_outline(b"{}" + b" " * 2**16),
        struct.pack("<Q", 2**63) + b"{}",
    ],
)
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        decode_arrays(data)


@given(st.data())
def test_a_changed_file_gives_arrays_or_is_refused(data: st.DataObject) -> None:
    changed = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = decode_arrays(bytes(changed))
    except WireError:
        return
    assert sum(array.nbytes for array in found.values()) <= len(GOOD)
