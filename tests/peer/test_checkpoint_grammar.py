"""A checkpoint that a stranger invented is refused, whatever it contains, before anything is built from it."""

import json
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checkpoint_samples import AN_UID, MANIFEST, SWARM, make_expert
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from expert_server.experts.format import StateForm, from_bytes, to_bytes
from peer.checkpoints import (
    MAX_OUTLINE_BYTES,
    CheckpointHeader,
    Outline,
    decode_checkpoint,
    encode_checkpoint,
)
from peer.errors import StateError
from trainer_client.averaging.dense_part import DenseForm

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([True, False]), "c": torch.zeros(0, 5)}
FORM = StateForm.of(MANIFEST)
STATE = to_bytes(make_expert(3).checkpoint(), SWARM, AN_UID, 1000.0)
DENSE_FORM = DenseForm.of(torch.nn.Linear(4, 3), SWARM)
DENSE = DENSE_FORM.to_bytes({name: torch.ones(*shape) for name, (shape, _) in DENSE_FORM.kinds.items()}, 7)


def accept(header: CheckpointHeader, outline: Outline) -> None:
    pass


def decoded(data: bytes) -> dict[str, Tensor]:
    return decode_checkpoint(data, CheckpointHeader, accept)[1]


def outline_of(data: bytes) -> dict[str, Any]:
    (size,) = struct.unpack("<Q", data[:8])
    outline: dict[str, Any] = json.loads(data[8 : 8 + size])
    return outline


def with_outline(outline: object, tensors: bytes) -> bytes:
    text = outline if isinstance(outline, bytes) else json.dumps(outline).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + tensors


GOOD = encode_checkpoint(CheckpointHeader(), TENSORS)
CONTENT = GOOD[8 + struct.unpack("<Q", GOOD[:8])[0] :]


def changed(**entries: object) -> bytes:
    return with_outline(outline_of(GOOD) | entries, CONTENT)


def entry(dtype: object = "F32", shape: object = (2, 3), offsets: object = (0, 24), **more: object) -> object:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets} | more


def test_what_was_packed_is_unpacked_and_can_be_changed() -> None:
    tensors = decoded(GOOD)
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, TENSORS[name])
        assert tensor.shape == TENSORS[name].shape
    tensors["a"] += 1
    assert torch.equal(decoded(GOOD)["a"], TENSORS["a"]), "the bytes are left alone"


A = tuple(outline_of(GOOD)["a"]["data_offsets"])
HUGE_AND_EMPTY = with_outline({"x": entry("F32", [2**63, 0], [0, 0])}, b"")
WRONG: dict[str, bytes] = {
    "nothing": b"",
    "a length alone": struct.pack("<Q", 0),
    "a length beyond the end": struct.pack("<Q", 2**63) + b"{}",
    "a huge shape of no numbers": HUGE_AND_EMPTY,
    "a shape whose product overflows": changed(a=entry("F32", [2**32, 2**32], A)),
    "a negative size": changed(a=entry("F32", [-2, -3], A)),
    "a size that is no integer": changed(a=entry("F32", [2.0, 3], A)),
    "a size that is a truth value": changed(a=entry("F32", [True, 6], A)),
    "many dimensions": changed(a=entry("F32", [1] * 200 + [6], A)),
    "an offset before the start": changed(a=entry("F32", [2, 3], [-24, 0])),
    "an offset beyond the end": changed(a=entry("F32", [2, 3], [2**40, 2**40 + 24])),
    "offsets that overlap": changed(d=entry("F32", [2, 3], A)),
    "a gap": with_outline({**outline_of(GOOD), "a": entry("U8", [8], [A[0], A[0] + 8])}, CONTENT),
    "more at the end": GOOD + bytes(8),
    "an odd type": changed(a=entry("F8_E4M3", [24], A)),
    "a type that is none": changed(a=entry(["F32"], [2, 3], A)),
    "more keys": changed(a=entry("F32", [2, 3], A, strides=[1, 1])),
    "no object": changed(a=[1, 2, 3]),
    "a name of escapes": changed(**{"\x1b[2J\n": entry("F32", [0], [A[0], A[0]])}),
    "half a character": changed(**{"\ud800": entry("F32", [0], [A[0], A[0]])}),
    "a long name": changed(**{"x" * 501: entry("F32", [0], [A[0], A[0]])}),
    "a name that comes twice": GOOD.replace(b'"c":', b'"a":'),
    "an empty tensor that comes twice": with_outline(
        json.dumps(outline_of(GOOD))[:-1].encode() + f', "c": {json.dumps(outline_of(GOOD)["c"])}}}'.encode(), CONTENT
    ),
    "not a number": with_outline(b'{"a": NaN}', b""),
    "deep": with_outline(b"[" * 100_000, b""),
    "deep in an entry": with_outline(b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}", b""),
    "a list": with_outline([], b""),
    "no metadata": with_outline({}, b""),
    "metadata of lists": changed(__metadata__={"talkoot": []}),
    "more metadata": changed(__metadata__={**outline_of(GOOD)["__metadata__"], "more": "x"}),
    "no UTF-8": with_outline(b"\xff\xfe{\x00}\x00", b""),
    "UTF-16": with_outline('{"a": 1}'.encode("utf-16"), b""),
    "a huge outline": with_outline(b"{}" + b" " * MAX_OUTLINE_BYTES, b""),
    "truth values that are numbers": encode_checkpoint(
        CheckpointHeader(), {"b": torch.tensor([2, 0], dtype=torch.uint8).view(torch.bool)}
    ),
}  # fmt: skip


@pytest.mark.parametrize("data", WRONG.values(), ids=WRONG)
def test_what_the_grammar_does_not_have_is_refused(data: bytes) -> None:
    with pytest.raises(StateError):
        decoded(data)


def test_nothing_is_made_of_what_is_not_expected() -> None:
    """Shapes and types are compared before any tensor is made, and before the checksum is computed."""
    size = 2**24
    data = to_state_with("U8", [size], bytes(size))
    tracemalloc.start()
    try:
        with pytest.raises(StateError, match=r"has the unknown 'block.more'"):
            from_bytes(data, SWARM, AN_UID, 3, FORM)
        assert tracemalloc.get_traced_memory()[1] < size / 4
    finally:
        tracemalloc.stop()


def to_state_with(dtype: str, shape: list[int], content: bytes) -> bytes:
    outline = outline_of(STATE)
    tensors = STATE[8 + struct.unpack("<Q", STATE[:8])[0] :]
    place = [len(tensors), len(tensors) + len(content)]
    return with_outline(outline | {"block.more": entry(dtype, shape, place)}, tensors + content)


def test_an_outline_larger_than_the_expert_needs_is_not_parsed() -> None:
    many = {f"x{n}": entry("F32", [0], [0, 0]) for n in range(5000)}
    with pytest.raises(StateError, match="its outline has"):
        from_bytes(with_outline(outline_of(STATE) | many, b""), SWARM, AN_UID, 3, FORM)


# Structure-aware mutation: valid JSON and frames with wrong values

ODD: st.SearchStrategy[Any] = st.sampled_from([
    0, -1, 1, 2, 7, 2**31, 2**53, 2**63, 2**64, 10**30, 10**400, True, None, 0.5, 1e308, "", "F64", "I8",
    "\x1b[2J", "\ud800", [], {}, [[]], [2**63, 0], [0, 2**63], [0, 0], {"a": []},
])  # fmt: skip


def paths_in(value: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of every value inside."""
    found = [before]
    if isinstance(value, dict):
        found += [path for key in value for path in paths_in(value[key], (*before, key))]
    if isinstance(value, list):
        found += [path for n, item in enumerate(value) for path in paths_in(item, (*before, n))]
    return found


def put(value: Any, path: tuple[Any, ...], odd: Any) -> Any:
    if not path:
        return odd
    copy = value.copy()
    copy[path[0]] = put(value[path[0]], path[1:], odd)
    return copy


@st.composite
def mutants(draw: st.DrawFn, data: bytes) -> bytes:
    outline = outline_of(data)
    tensors = data[8 + struct.unpack("<Q", data[:8])[0] :]
    for _ in range(draw(st.integers(1, 3))):
        outline = put(outline, draw(st.sampled_from(paths_in(outline))), draw(ODD))
    if draw(st.booleans()):
        header = json.loads(outline_of(data)["__metadata__"]["talkoot"])
        header = put(header, draw(st.sampled_from(paths_in(header))), draw(ODD))
        outline = outline_of(data) | {"__metadata__": {"talkoot": json.dumps(header)}}
    text = bytearray(json.dumps(outline).encode())
    if draw(st.booleans()):
        text[draw(st.integers(0, len(text) - 1))] = draw(st.integers(0, 255))
    cut = draw(st.one_of(st.just(len(tensors)), st.integers(0, len(tensors))))
    return with_outline(bytes(text), tensors[:cut])


def refuses(read: Callable[[], object]) -> None:
    try:
        read()
    except StateError as error:
        said = str(error)
    else:
        return
    assert said.isprintable()
    assert len(said) < 1000


EXAMPLES = pytest.mark.parametrize("examples", [200, pytest.param(10_000, marks=pytest.mark.slow)])


def check_all(strategy: st.SearchStrategy[bytes], examples: int, read: Callable[[bytes], object]) -> None:
    @settings(deadline=None, max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(strategy)
    @example(HUGE_AND_EMPTY)
    def check(data: bytes) -> None:
        refuses(lambda: read(data))

    check()


@EXAMPLES
def test_a_changed_state_raises_nothing_but_its_own_error(examples: int) -> None:
    check_all(mutants(STATE), examples, lambda data: from_bytes(data, SWARM, AN_UID, 3, FORM))


@EXAMPLES
def test_a_changed_dense_part_raises_nothing_but_its_own_error(examples: int) -> None:
    check_all(mutants(DENSE), examples, lambda data: DENSE_FORM.from_bytes(data, 7))


@EXAMPLES
def test_bytes_raise_nothing_but_the_parsers_error(examples: int) -> None:
    check_all(st.binary(max_size=200), examples, decoded)
    check_all(st.binary(max_size=200), examples, lambda data: decoded(with_outline(data, b"")))
