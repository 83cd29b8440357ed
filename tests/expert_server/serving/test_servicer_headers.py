"""Wrong headers, over real TLS and without a network: each is refused, saying what is wrong."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from grpc import StatusCode
from hypothesis import given, settings
from hypothesis import strategies as st
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
    both_directions,
    check_it_goes_on,
    exchange,
    make,
    refused,
    running,
)

from expert_server.serving.batching import Direction
from expert_server.serving.call import HeaderParser, parse_part
from expert_server.serving.forward_cache import ForwardCache
from peer import PROTOCOL_VERSION
from peer.codec import MAX_MESSAGE_BYTES
from peer.errors import ExpertError, WireError
from peer.identity import Identity
from peer.loop import LoopThread
from peer.metrics import total
from peer.wire import expert_pb2


@pytest.fixture
def run(loop: LoopThread, identity: Identity, caplog: pytest.LogCaptureFixture) -> Iterator[Runner]:
    with running(loop, identity, caplog) as runner:
        yield runner


def rows_of(call: Call) -> expert_pb2.ExpertRows:
    return call.header.experts[0]


def set_header(**values: Any) -> Callable[[Call], None]:
    return lambda call: call.header.MergeFrom(expert_pb2.CallHeader(**values))


def set_uid(uid: str) -> Callable[[Call], None]:
    return lambda call: setattr(rows_of(call), "uid", uid)


def set_rows(lengths: Sequence[int], positions: Sequence[int] = POSITIONS) -> Callable[[Call], None]:
    def change(call: Call) -> None:
        rows_of(call).segment_lengths[:] = lengths
        rows_of(call).positions[:] = positions

    return change


def clear(name: str) -> Callable[[Call], None]:
    return lambda call: call.header.ClearField(name)


def add_experts(count: int) -> Callable[[Call], None]:
    return lambda call: call.header.experts.extend([rows_of(call)] * count)


WRONG_HEADERS: dict[str, tuple[Callable[[Call], None], tuple[str, ...]]] = {
    "wider": (set_header(width=HIDDEN + 1), ("width 17", "experts have 16")),
    "huge width": (set_header(width=2**32 - 1), ("width 4294967295", "experts have 16")),
    "no width": (clear("width"), ("width 0", "experts have 16")),
    "no rows": (set_rows([], []), ("no rows for expert 0.0.0",)),
    "no experts": (clear("experts"), ("0 experts in one call; expected 1 to 4096",)),
    "too many experts": (add_experts(4096), ("4097 experts in one call; expected 1 to 4096",)),
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
    "too few rows in segments": (set_rows([3, 1]), ("segments of 4 rows for the 5 rows",)),
    "too many rows in segments": (set_rows([3, 3]), ("segments of 6 rows for the 5 rows",)),
    "a claim of 1 GB in segments": (set_rows([2**24]), ("segments of 16777216 rows for the 5 rows",)),
    "sums that overflow 32 bits": (set_rows([2**32 - 1, ROWS + 1]), ("rows for the 5 rows",)),
    "no segments": (set_rows([]), ("segments of 0",)),
    "an empty segment": (set_rows([3, 0, 2]), ("segments of 5 rows",)),
    "falling positions": (set_rows(LENGTHS, [0, 4, 3, 1, 2]), ("do not rise within a segment",)),
    "equal positions": (set_rows(LENGTHS, [0, 4, 4, 1, 2]), ("do not rise within a segment",)),
    "falling in the last segment": (set_rows(LENGTHS, [0, 4, 9, 2, 1]), ("do not rise",)),
    "a position beyond the context": (set_rows(LENGTHS, [0, 4, 9, 1, 16]), ("position 16", "16 tokens")),
    "a huge position": (set_rows(LENGTHS, [0, 4, 9, 1, 2**32 - 1]), ("position 4294967295", "16 tokens")),
    "no request id": (clear("request_id"), ("a request id of 0 bytes; expected 16",)),
    "a short request id": (set_header(request_id=b"x" * 15), ("a request id of 15 bytes; expected 16",)),
    "a long request id": (set_header(request_id=b"x" * 17), ("a request id of 17 bytes; expected 16",)),
    "no codec": (clear("codec"), ("codec 0 is not spoken here; spoken: CODEC_FP32, CODEC_BF16",)),
    "an unknown codec": (set_header(codec=77), ("codec 77 is not spoken here; spoken: CODEC_FP32, ",)),
}


@both_directions
@pytest.mark.parametrize("name", WRONG_HEADERS)
def test_a_wrong_header_is_refused_saying_what_is_wrong(run: Runner, name: str, direction: Direction) -> None:
    spoil, said = WRONG_HEADERS[name]
    call = Call(direction)
    spoil(call)

    async def scenario(edge: Edge) -> None:
        refused(await make(edge, call), StatusCode.INVALID_ARGUMENT, *said)
        assert edge.updates() == total(edge.runtime.metrics.rows) == 0
        await check_it_goes_on(edge)

    run(scenario)


@both_directions
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
    run: Runner, direction: Direction, name: str, value: object, said: tuple[str, ...]
) -> None:
    call = Call(direction)
    setattr(call.header, name, value)

    async def scenario(edge: Edge) -> None:
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
        refused(outcome, StatusCode.RESOURCE_EXHAUSTED, "a call of 1048640 bytes; at most 1048576")
        await check_it_goes_on(edge)

    run(scenario, max_call_bytes=2**20)


def test_a_header_of_the_largest_size_claims_no_memory(run: Runner) -> None:
    rows = MAX_MESSAGE_BYTES - 1000
    call = Call(lengths=[1], positions=[0])
    rows_of(call).segment_lengths[:] = [rows]
    rows_of(call).positions.extend([0] * (rows - 1))

    async def scenario(edge: Edge) -> None:
        outcome = await exchange(edge, "backward", [expert_pb2.CallRequest(header=call.header)], ends=False)
        refused(outcome, StatusCode.RESOURCE_EXHAUSTED, f"a call of {2 * rows * HIDDEN * 4} bytes")
        await check_it_goes_on(edge)

    run(scenario)


# Hostile headers, without a network


uid_texts = st.one_of(
    st.text(max_size=20),
    st.lists(st.integers(0, 3).map(str), min_size=1, max_size=5).map(".".join),
    st.sampled_from([str(FIRST), str(SECOND), str(ABSENT)]),
)
small = st.lists(st.one_of(st.integers(0, 20), st.integers(0, 2**32 - 1)), max_size=12)
steps = st.lists(st.integers(1, 3), min_size=1, max_size=5)


def packed(uid: str, segments: list[list[int]]) -> expert_pb2.ExpertRows:
    """Rows whose positions rise by the given steps; right unless one passes the context."""
    positions = [sum(rises[: n + 1]) for rises in segments for n in range(len(rises))]
    return expert_pb2.ExpertRows(uid=uid, segment_lengths=map(len, segments), positions=positions)


expert_rows = st.one_of(
    st.builds(
        lambda uid, lengths, positions: expert_pb2.ExpertRows(
            uid=uid, segment_lengths=lengths, positions=positions
        ),
        uid_texts,
        small,
        small,
    ),
    st.builds(packed, uid_texts, st.lists(steps, min_size=1, max_size=4)),
)


def is_right(rows: expert_pb2.ExpertRows) -> bool:
    """By the words of proto/expert.proto, row by row."""
    if rows.uid not in {str(uid) for uid in MANIFEST.uids()}:
        return False
    positions = list(rows.positions)
    for length in rows.segment_lengths:
        if not 1 <= length <= len(positions):
            return False
        segment, positions = positions[:length], positions[length:]
        if segment != sorted(set(segment)) or segment[-1] >= CONTEXT:
            return False
    return len(rows.positions) > 0 and positions == []


@settings(max_examples=500)
@given(expert_rows)
def test_a_part_is_made_of_right_rows_only(rows: expert_pb2.ExpertRows) -> None:
    if is_right(rows):
        part = parse_part(0, rows, MANIFEST)
        assert str(part.uid) == rows.uid
        assert part.lengths.tolist() == rows.segment_lengths
        assert part.positions.tolist() == rows.positions
        assert part.row_count == len(rows.positions)
    else:
        with pytest.raises(WireError):
            parse_part(0, rows, MANIFEST)


headers = st.builds(
    lambda request_id, width, codec, experts: expert_pb2.CallHeader(
        protocol_version=PROTOCOL_VERSION,
        swarm_id=SWARM,
        request_id=request_id,
        width=width,
        codec=codec,
        experts=experts,
    ),
    st.sampled_from([b"", bytes(15), bytes(16)]),
    st.sampled_from([HIDDEN, HIDDEN, 0, 2**32 - 1]),
    st.sampled_from([1, 2, 3, 4, 5, 0, 99]),
    st.lists(expert_rows, max_size=3),
)


@settings(max_examples=500)
@given(headers, st.sampled_from(DIRECTIONS))
def test_a_header_is_right_or_refused_with_an_error_of_the_edge(
    header: expert_pb2.CallHeader, direction: Direction
) -> None:
    parser = HeaderParser(SWARM, MANIFEST, max_call_bytes=800, cache=ForwardCache(0))
    size = 4 * HIDDEN * sum(len(rows.positions) for rows in header.experts) * (1 + (direction == "backward"))
    right = (
        (len(header.request_id), header.width) == (16, HIDDEN)
        and header.codec in (1, 2, 3, 4, 5)
        and 0 < size <= 800
        and all(map(is_right, header.experts))
    )
    if right:
        parts = parser.parse(header, direction, "QmA")
        assert [str(part.uid) for part in parts] == [rows.uid for rows in header.experts]
    else:
        with pytest.raises((WireError, ExpertError)):
            parser.parse(header, direction, "QmA")
