"""Wrong headers, over real TLS and without a network: each is refused with a message that says what is wrong."""

from collections.abc import Callable, Sequence
from math import inf, nan
from typing import Any

import pytest
from grpc import StatusCode
from hypothesis import given, settings
from hypothesis import strategies as st
from scalars import scalars
from tls_expert_server import (
    ABSENT,
    CONTEXT,
    DIRECTIONS,
    FIRST,
    HIDDEN,
    LENGTHS,
    MANIFEST,
    POSITIONS,
    ROWS,
    SECOND,
    SWARM,
    Call,
    Edge,
    Runner,
    check_it_goes_on,
    exchange,
    make,
    refused,
    run,
)

from expert_server.serving.batching import Direction
from expert_server.serving.forward_cache import ForwardCache
from expert_server.serving.headers import MAX_EXPERTS_IN_CALL, HeaderParser
from peer import PROTOCOL_VERSION
from peer.codec import MAX_MESSAGE_BYTES, decode_scalars
from peer.errors import ExpertError, WireError
from peer.metrics import total
from peer.wire import expert_pb2

__all__ = ["run"]


def set_header(**values: Any) -> Callable[[Call], None]:
    return lambda call: call.header.MergeFrom(expert_pb2.CallHeader(**values))


def set_uid(uid: str) -> Callable[[Call], None]:
    return lambda call: setattr(call.header.experts[0], "uid", uid)


def set_rows(lengths: Sequence[int], positions: Sequence[int] = POSITIONS) -> Callable[[Call], None]:
    def change(call: Call) -> None:
        call.header.segment_lengths[:] = lengths
        call.header.positions[:] = positions

    return change


def set_experts(*rows: Sequence[int], weights: Sequence[float] = ()) -> Callable[[Call], None]:
    """Sets the rows of the first experts, and the weights of the first."""

    def change(call: Call) -> None:
        del call.header.experts[:]
        for uid, own in zip(MANIFEST.uids(), rows, strict=False):
            call.header.experts.add(uid=str(uid), rows=own)
        call.header.experts[0].weights = scalars(weights)

    return change


def set_weights(data: bytes) -> Callable[[Call], None]:
    return lambda call: setattr(call.header.experts[0], "weights", data)


def clear(name: str) -> Callable[[Call], None]:
    return lambda call: call.header.ClearField(name)


def add_experts(count: int) -> Callable[[Call], None]:
    return lambda call: call.header.experts.extend([call.header.experts[0]] * count)


ALL = range(ROWS)
WRONG_HEADERS: dict[str, tuple[Callable[[Call], None], tuple[str, ...]]] = {
    "wider": (set_header(width=HIDDEN + 1), ("width 17", "experts have 16")),
    "huge width": (set_header(width=2**32 - 1), ("width 4294967295", "experts have 16")),
    "no width": (clear("width"), ("width 0", "experts have 16")),
    "no rows": (set_rows([], []), ("a call must have rows",)),
    "no experts": (clear("experts"), ("the call names 0 experts: name 1 to 4096",)),
    "too many experts": (add_experts(4096), ("the call names 4097 experts: name 1 to 4096",)),
    "off the grid": (set_uid("0.2.0"), ("0.2.0 is not on this swarm's grid",)),
    "no such layer": (set_uid("1.0.0"), ("1.0.0 is not on this swarm's grid",)),
    "too few coordinates": (set_uid("0.0"), ("0.0 is not on this swarm's grid",)),
    "too many coordinates": (set_uid("0.0.0.0"), ("not on this swarm's grid",)),
    "no uid": (set_uid(""), ("not an expert UID", "expected layer.i.j")),
    "a word": (set_uid("expert"), ("not an expert UID: 'expert'",)),
    "a leading zero": (set_uid("0.00.1"), ("not an expert UID",)),
    "negative": (set_uid("0.-1.0"), ("not an expert UID",)),
    "a newline": (set_uid("0.0.0\n"), ("not an expert UID",)),
    "other digits": (set_uid("0.0.\N{ARABIC-INDIC DIGIT ONE}"), ("not an expert UID",)),
    "a long uid": (set_uid("0." * 50_000), ("not an expert UID",)),
    "too few rows in segments": (set_rows([3, 1]), ("the segments have 4 rows, but the call has 5",)),
    "too many rows in segments": (set_rows([3, 3]), ("the segments have 6 rows, but the call has 5",)),
    "a claim of 1 GB in segments": (
        set_rows([2**24]),
        ("the segments have 16777216 rows, but the call has 5",),
    ),
    "sums that overflow 32 bits": (set_rows([2**32 - 1, ROWS + 1]), ("rows, but the call has 5",)),
    "no segments": (set_rows([]), ("the segments have 0 rows",)),
    "an empty segment": (set_rows([3, 0, 2]), ("the segments have 5 rows",)),
    "falling positions": (set_rows(LENGTHS, [0, 4, 3, 1, 2]), ("positions must rise within a segment",)),
    "equal positions": (set_rows(LENGTHS, [0, 4, 4, 1, 2]), ("positions must rise within a segment",)),
    "falling in the last segment": (set_rows(LENGTHS, [0, 4, 9, 2, 1]), ("must rise",)),
    "a position beyond the context": (set_rows(LENGTHS, [0, 4, 9, 1, 16]), ("position 16", "16 tokens")),
    "a huge position": (set_rows(LENGTHS, [0, 4, 9, 1, 2**32 - 1]), ("position 4294967295", "16 tokens")),
    "a row in no expert": (set_experts([0, 1], [1, 2, 4]), ("row 3 is for no expert",)),
    "fewer pairs than rows": (set_experts([0, 1], [2]), ("3 rows of experts for the 5 rows", "1 to 3")),
    "a row in too many experts": (
        set_experts([0, 1], ALL, [1, 2], [1, 3]),
        ("row 1 is for 4 experts, more than 3",),
    ),
    "rows in too many experts": (
        set_experts(ALL, ALL, ALL, [0]),
        ("16 rows of experts for the 5 rows", "1 to 3"),
    ),
    "an expert twice": (add_experts(1), ("an expert is named twice",)),
    "falling rows": (set_experts([0, 2, 1, 3, 4]), ("rows of an expert must rise",)),
    "equal rows": (set_experts([0, 1, 1, 2, 3, 4]), ("rows of an expert must rise",)),
    "falling rows of the last": (set_experts(ALL, [4, 3]), ("rows of an expert must rise",)),
    "a row beyond the call": (
        set_experts([0, 1, 2, 3, 5]),
        ("an expert gets row 5, but the call has 5 rows",),
    ),
    "a huge row": (set_experts(ALL, [2**32 - 1]), ("an expert gets row 4294967295",)),
    "too few weights": (set_experts(ALL, weights=[1.0] * 4), ("expert 0.0.0 has 5 rows, but 4 weights",)),
    "half a weight": (set_weights(bytes(4 * ROWS - 2)), ("18 bytes are not whole numbers of 4 bytes",)),
    "too many weights": (set_experts(ALL, weights=[1.0] * 6), ("expert 0.0.0 has 5 rows, but 6 weights",)),
    **{
        f"a weight of {weight}": (
            set_experts(ALL, weights=[1.0, weight, 1.0, 1.0, 1.0]),
            ("a weight must be finite and above 0",),
        )
        for weight in (0.0, -0.0, -1.0, nan, inf, -inf)
    },
    "no request id": (clear("request_id"), ("the request id has 0 bytes instead of 16",)),
    "a short request id": (set_header(request_id=b"x" * 15), ("the request id has 15 bytes instead of 16",)),
    "a long request id": (set_header(request_id=b"x" * 17), ("the request id has 17 bytes instead of 16",)),
    "no codec": (clear("codec"), ("codec 0 is not supported here; supported: CODEC_FP32, CODEC_BF16",)),
    "an unknown codec": (set_header(codec=77), ("codec 77 is not supported here; supported: CODEC_FP32, ",)),
}


@pytest.mark.parametrize("name", WRONG_HEADERS)
def test_a_wrong_header_is_refused_saying_what_is_wrong(run: Runner, name: str) -> None:
    spoil, said = WRONG_HEADERS[name]

    async def scenario(edge: Edge) -> None:
        for direction in DIRECTIONS:
            call = Call(direction)
            spoil(call)
            refused(await make(edge, call), StatusCode.INVALID_ARGUMENT, *said)
            assert edge.updates() == total(edge.runtime.metrics.rows) == 0
        await check_it_goes_on(edge)

    run(scenario)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("swarm_id", "other", (SWARM, "other")),
        ("swarm_id", "\n" * 10_000, (SWARM,)),
        ("swarm_id", "", (SWARM,)),
        ("protocol_version", 7, (f"protocol version {PROTOCOL_VERSION}", "the caller 7")),
        ("protocol_version", 0, (f"protocol version {PROTOCOL_VERSION}", "the caller 0")),
    ],
)
def test_another_swarm_or_version_is_refused_naming_both(
    run: Runner, name: str, value: object, said: tuple[str, ...]
) -> None:
    async def scenario(edge: Edge) -> None:
        for direction in DIRECTIONS:
            call = Call(direction)
            setattr(call.header, name, value)
            refused(await make(edge, call), StatusCode.FAILED_PRECONDITION, *said)
        await check_it_goes_on(edge)

    run(scenario)


@pytest.mark.parametrize(
    "codec", [expert_pb2.CODEC_FP32, expert_pb2.CODEC_BF16, expert_pb2.CODEC_INT8, expert_pb2.CODEC_INT4]
)
def test_a_call_of_too_many_bytes_is_refused_before_they_are_sent_by_what_they_become_in_memory(
    run: Runner, codec: "expert_pb2.Codec"
) -> None:
    rows = 2**20 // (4 * HIDDEN) + 1
    call = Call(lengths=[1] * rows, positions=[0] * rows)
    call.header.codec = codec

    async def scenario(edge: Edge) -> None:
        header = [expert_pb2.CallRequest(header=call.header)]
        outcome = await exchange(edge, "forward", header, ends=False)
        refused(outcome, StatusCode.RESOURCE_EXHAUSTED, "the call has 1048640 bytes, more than 1048576")
        await check_it_goes_on(edge)

    run(scenario, max_call_bytes=2**20)


def test_a_header_of_the_largest_size_claims_no_memory(run: Runner) -> None:
    rows = MAX_MESSAGE_BYTES - 1000
    call = Call(lengths=[1], positions=[0])
    call.header.segment_lengths[:] = [rows]
    call.header.positions.extend([0] * (rows - 1))

    async def scenario(edge: Edge) -> None:
        outcome = await exchange(edge, "backward", [expert_pb2.CallRequest(header=call.header)], ends=False)
        refused(outcome, StatusCode.RESOURCE_EXHAUSTED, f"the call has {2 * rows * HIDDEN * 4} bytes")
        await check_it_goes_on(edge)

    run(scenario)


def test_all_rows_of_4096_experts_are_refused_before_an_array_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    call = Call()
    del call.header.experts[:]
    call.header.experts.extend([expert_pb2.ExpertRows(uid="0.0.0")] * MAX_EXPERTS_IN_CALL)
    parser = HeaderParser(SWARM, MANIFEST, max_call_bytes=2**20, cache=ForwardCache(0))
    monkeypatch.setattr("expert_server.serving.headers.parse_assignment", None)
    with pytest.raises(WireError, match="20480 rows of experts for the 5 rows of the call"):
        parser.parse(call.header, "forward", "QmA", lambda size: None)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_memory_is_reserved_before_an_array_is_made(
    monkeypatch: pytest.MonkeyPatch, direction: Direction
) -> None:
    call = Call(direction, uids=[FIRST, SECOND])
    parser = HeaderParser(SWARM, MANIFEST, max_call_bytes=2**20, cache=ForwardCache(0))

    def reserve(size: int) -> None:
        assert size >= 4 * HIDDEN * (2 * ROWS + 4 * ROWS)
        raise ExpertError(StatusCode.RESOURCE_EXHAUSTED, "no room")

    monkeypatch.setattr("expert_server.serving.headers.parse_assignment", None)
    with pytest.raises(ExpertError, match="no room"):
        parser.parse(call.header, direction, "QmA", reserve)


# Hostile headers, without a network


uid_texts = st.one_of(
    st.text(max_size=20),
    st.lists(st.integers(0, 3).map(str), min_size=1, max_size=5).map(".".join),
    st.sampled_from([str(FIRST), str(SECOND), str(ABSENT)]),
)
small = st.lists(st.one_of(st.integers(0, 20), st.integers(0, 2**32 - 1)), max_size=12)
steps = st.lists(st.integers(1, 3), min_size=1, max_size=5)
floats = st.one_of(st.floats(0.25, 4.0, width=32), st.floats(width=32))


def packed(segments: list[list[int]]) -> dict[str, list[int]]:
    """Rows whose positions rise by the given steps. They are valid unless one exceeds the context."""
    positions = [sum(rises[: n + 1]) for rises in segments for n in range(len(rises))]
    return {"segment_lengths": list(map(len, segments)), "positions": positions}


segments = st.one_of(
    st.fixed_dictionaries({"segment_lengths": small, "positions": small}),
    st.lists(steps, min_size=1, max_size=4).map(packed),
)
expert_rows = st.tuples(
    uid_texts,
    st.one_of(st.just([]), st.sets(st.integers(0, 8)).map(sorted), small),
    st.one_of(st.just([]), st.just([0.5] * 20), st.lists(floats, max_size=9)),
)


def made(
    codec: "expert_pb2.Codec", experts: Sequence[tuple[str, Sequence[int], Sequence[float]]]
) -> list[expert_pb2.ExpertRows]:
    return [
        expert_pb2.ExpertRows(
            uid=uid, rows=rows, weights=scalars(weights[: len(rows)] if rows else (), codec)
        )
        for uid, rows, weights in experts
    ]


def weights_of(expert: expert_pb2.ExpertRows, codec: "expert_pb2.Codec") -> list[float]:
    found: list[float] = decode_scalars(expert.weights, codec).tolist()
    return found


def is_right(header: expert_pb2.CallHeader) -> bool:
    """Whether the header is valid by the rules in proto/expert.proto, checked row by row."""
    positions, rows = list(header.positions), len(header.positions)
    for length in header.segment_lengths:
        if not 1 <= length <= len(positions):
            return False
        segment, positions = positions[:length], positions[length:]
        if segment != sorted(set(segment)) or segment[-1] >= CONTEXT:
            return False
    names = [expert.uid for expert in header.experts]
    if not rows or positions or len(set(names)) < len(names):
        return False
    if not set(names) <= {str(uid) for uid in MANIFEST.uids()}:
        return False
    experts_of_row = [0] * rows
    for expert in header.experts:
        own, weights = list(expert.rows) or list(range(rows)), weights_of(expert, header.codec)
        if own != sorted(set(own)) or own[-1] >= rows or len(weights) not in (0, len(own)):
            return False
        if not all(0 < weight < inf for weight in weights):
            return False
        for row in own:
            experts_of_row[row] += 1
    return all(1 <= count <= MANIFEST.routing.top_k for count in experts_of_row)


headers = st.builds(
    lambda request_id, width, codec, segments, experts: expert_pb2.CallHeader(
        protocol_version=PROTOCOL_VERSION,
        swarm_id=SWARM,
        request_id=request_id,
        width=width,
        codec=codec,
        experts=made(codec, experts),
        **segments,
    ),
    st.sampled_from([bytes(16), bytes(16), bytes(16), b"", bytes(15)]),
    st.sampled_from([HIDDEN, HIDDEN, HIDDEN, 0, 2**32 - 1]),
    st.sampled_from([1, 2, 3, 4, 5, 0, 99]),
    segments,
    st.lists(expert_rows, max_size=3),
)


@settings(max_examples=100)
@given(headers, st.sampled_from(DIRECTIONS))
def test_a_header_is_right_or_refused_with_an_error_of_the_edge(
    header: expert_pb2.CallHeader, direction: Direction
) -> None:
    parser = HeaderParser(SWARM, MANIFEST, max_call_bytes=800, cache=ForwardCache(0))
    size = 4 * HIDDEN * len(header.positions) * (1 + (direction == "backward"))
    right = (
        (len(header.request_id), header.width) == (16, HIDDEN)
        and header.codec in (1, 2, 3, 4, 5)
        and 0 < size <= 800
        and is_right(header)
    )
    if not right:
        with pytest.raises((WireError, ExpertError)):
            parser.parse(header, direction, "QmA", lambda size: None)
        return
    parsed = parser.parse(header, direction, "QmA", lambda size: None)
    assignment = parsed.assignment
    assert assignment is not None
    assert parsed.rows == len(assignment) == len(header.positions)
    assert [str(uid) for uid in assignment.uids] == [expert.uid for expert in header.experts]
    assert assignment.lengths.tolist() == header.segment_lengths
    assert assignment.positions.tolist() == header.positions
    for index, expert in enumerate(header.experts):
        pairs = assignment.pairs_of(index)
        assert assignment.rows[pairs].tolist() == (list(expert.rows) or list(range(parsed.rows)))
        assert assignment.weights[pairs].tolist() == (
            weights_of(expert, header.codec) or [1.0] * len(assignment.rows[pairs])
        )
