"""The gRPC edge, over real TLS: right calls get right answers, and no wrong one stops the server."""

import asyncio
import contextlib
import logging
import math
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
import torch
from grpc import StatusCode
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dht.manifest import Manifest
from dht.uid import UID
from expert_server.batching import Direction
from expert_server.expert import BackwardPart, Expert
from expert_server.runtime import Runtime
from expert_server.servicer import EdgeLimits, ExpertServicer, SeenRequests, make_part
from peer import PROTOCOL_VERSION, SOFTWARE_VERSION
from peer.channels import CLIENT_OPTIONS, SERVER_OPTIONS, server_credentials
from peer.codec import CHUNK_BYTES, MAX_CHUNK_BYTES, MAX_MESSAGE_BYTES
from peer.errors import ExpertError, WireError
from peer.identity import Identity, certificate_pem
from peer.loop import LoopThread
from peer.wire import expert_pb2, expert_pb2_grpc

HIDDEN, CONTEXT = 16, 16
SWARM = "sauna-abcdefghijkl"
MANIFEST = Manifest.model_validate(
    {
        "name": "sauna",
        "model": {"layers": 1, "hidden": HIDDEN, "heads": 2, "context": CONTEXT, "feed_forward": 32},
        "experts": {"grid": [2, 2]},
        "routing": {"top_k": 2},
    }
)
FIRST, SECOND, THIRD, ABSENT = (UID(0, c) for c in ((0, 0), (0, 1), (1, 0), (1, 1)))
LENGTHS, POSITIONS = [3, 2], [0, 4, 9, 1, 2]
ROWS = len(POSITIONS)
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
both_directions = pytest.mark.parametrize("direction", DIRECTIONS)


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return Identity.load_or_create(tmp_path_factory.mktemp("identity") / "peer.key")


@dataclass
class Outcome:
    """How a call ended, and what came before."""

    code: StatusCode
    details: str
    replies: list[expert_pb2.CallReply]
    seconds: float


@dataclass
class Edge:
    """A running server and a client of it."""

    runtime: Runtime
    address: str
    pem: bytes
    channel: grpc.aio.Channel

    @property
    def stub(self) -> Any:
        return expert_pb2_grpc.ExpertServiceStub(self.channel)  # grpc's plugin writes no types

    def updates(self) -> int:
        return sum(expert.update_count for expert in self.runtime.experts.values())


@contextlib.asynccontextmanager
async def serving(
    identity: Identity,
    max_call_s: float = 30.0,
    max_call_bytes: int = 4 * 2**20,
    max_queued_rows: int = 65536,
) -> AsyncIterator[Edge]:
    experts = {uid: Expert(uid, MANIFEST) for uid in (FIRST, SECOND, THIRD)}
    runtime = Runtime(experts, max_queued_rows=max_queued_rows, max_batch_rows=8192, threads=1)
    await runtime.start()
    certificate = identity.make_certificate()
    server = grpc.aio.server(options=SERVER_OPTIONS, maximum_concurrent_rpcs=64)
    servicer = ExpertServicer(runtime, MANIFEST, SWARM, EdgeLimits(max_call_bytes, max_call_s))
    expert_pb2_grpc.add_ExpertServiceServicer_to_server(servicer, server)
    port = server.add_secure_port("127.0.0.1:0", server_credentials(identity, certificate))
    await server.start()
    address, pem = f"127.0.0.1:{port}", certificate_pem(certificate, identity.peer_id)
    try:
        async with open_channel(address, pem) as channel:
            yield Edge(runtime, address, pem, channel)
    finally:
        await server.stop(None)
        await runtime.stop()


OPTIONS = [*CLIENT_OPTIONS, ("grpc.max_send_message_length", -1)]  # a hostile client has no limit


def open_channel(address: str, pem: bytes) -> grpc.aio.Channel:
    return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(pem), OPTIONS)


def open_blocking_channel(address: str, pem: bytes) -> grpc.Channel:
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(pem), OPTIONS)


@dataclass
class Runner:
    """Runs a scenario against a server of its own."""

    loop: LoopThread
    identity: Identity

    def __call__(self, scenario: Callable[[Edge], Coroutine[Any, Any, None]], **limits: Any) -> None:
        async def with_server() -> None:
            async with serving(self.identity, **limits) as edge:
                await scenario(edge)

        self.loop.run(with_server(), 60)


@pytest.fixture
def run(loop: LoopThread, identity: Identity, caplog: pytest.LogCaptureFixture) -> Iterator[Runner]:
    """Fails the test when the server logs an error: a wrong call is not one."""
    yield Runner(loop, identity)
    errors = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert errors == []


@dataclass
class Call:
    """A right call, to be spoilt."""

    direction: Direction = "forward"
    uids: Sequence[UID] = (FIRST,)
    lengths: Sequence[int] = tuple(LENGTHS)
    positions: Sequence[int] = tuple(POSITIONS)
    seed: int = 0
    header: expert_pb2.CallHeader = field(init=False)
    tensors: list[Tensor] = field(init=False)
    """Inputs, and in backward gradients, expert by expert."""

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        count = len(self.uids) * (2 if self.direction == "backward" else 1)
        self.tensors = [torch.randn(len(self.positions), HIDDEN, generator=generator) for _ in range(count)]
        rows = [
            expert_pb2.ExpertRows(uid=str(uid), segment_lengths=self.lengths, positions=self.positions)
            for uid in self.uids
        ]
        self.header = expert_pb2.CallHeader(
            protocol_version=PROTOCOL_VERSION,
            swarm_id=SWARM,
            request_id=random.Random(self.seed).randbytes(16),
            width=HIDDEN,
            codec=expert_pb2.CODEC_FP32,
            experts=rows,
        )

    @property
    def payload(self) -> bytes:
        return b"".join(tensor.numpy().tobytes() for tensor in self.tensors)

    @property
    def requests(self) -> list[expert_pb2.CallRequest]:
        return [expert_pb2.CallRequest(header=self.header), *chunked(self.payload)]

    def expected(self, expert: Expert, index: int = 0) -> Tensor:
        lengths, positions = torch.tensor(self.lengths), torch.tensor(self.positions)
        if self.direction == "forward":
            return expert.forward(self.tensors[index], lengths, positions)
        inputs, gradients = self.tensors[2 * index : 2 * index + 2]
        return expert.backward([BackwardPart(inputs, gradients, lengths, positions)])[0]


def chunked(data: bytes, size: int = CHUNK_BYTES) -> list[expert_pb2.CallRequest]:
    return [expert_pb2.CallRequest(chunk=data[n : n + size]) for n in range(0, len(data), size)]


async def exchange(
    edge: Edge,
    direction: Direction,
    requests: Sequence[expert_pb2.CallRequest],
    *,
    ends: bool = True,
    timeout_s: float | None = 20.0,
) -> Outcome:
    """Sends the requests, and reads until the server ends the call.

    With grpc's blocking client: its asyncio client reports INTERNAL when the server ends a call while it still sends.
    """
    return await asyncio.to_thread(exchange_now, edge, direction, requests, ends, timeout_s)


def exchange_now(
    edge: Edge,
    direction: Direction,
    requests: Sequence[expert_pb2.CallRequest],
    ends: bool,
    timeout_s: float | None,
) -> Outcome:
    begin = time.monotonic()
    over = threading.Event()

    def sent() -> Iterator[expert_pb2.CallRequest]:
        yield from requests
        if not ends:
            over.wait()

    replies = []
    with open_blocking_channel(edge.address, edge.pem) as channel:
        stub = expert_pb2_grpc.ExpertServiceStub(channel)
        stream = (stub.Forward if direction == "forward" else stub.Backward)(sent(), timeout=timeout_s)
        try:
            for reply in stream:
                replies.append(reply)
        except grpc.RpcError:
            pass  # its code and details are looked at below
        finally:
            over.set()
        return Outcome(stream.code(), stream.details(), replies, time.monotonic() - begin)


async def make(edge: Edge, call: Call, **options: Any) -> Outcome:
    return await exchange(edge, call.direction, call.requests, **options)


def answers(outcome: Outcome, rows: int = ROWS) -> dict[int, tuple[expert_pb2.ExpertReply, Tensor | None]]:
    """Index → reply and tensor, once the stream is known to have the right form."""
    found: dict[int, tuple[expert_pb2.ExpertReply, Tensor | None]] = {}
    payload = memoryview(b"".join(reply.chunk for reply in outcome.replies))
    assert all(len(reply.chunk) <= MAX_CHUNK_BYTES for reply in outcome.replies)
    for expert in (expert for reply in outcome.replies for expert in reply.experts):
        assert expert.index not in found
        data, payload = bytearray(payload[: expert.payload_bytes]), payload[expert.payload_bytes :]
        assert len(data) == expert.payload_bytes
        tensor = torch.frombuffer(data, dtype=torch.float32).view(rows, HIDDEN) if data else None
        found[expert.index] = expert, tensor
    assert not payload
    return found


async def check_it_goes_on(edge: Edge) -> None:
    call = Call(uids=[THIRD], seed=99)
    outcome = await make(edge, call)
    assert outcome.code is StatusCode.OK, outcome.details
    (answer,) = answers(outcome).values()
    torch.testing.assert_close(answer[1], call.expected(Expert(THIRD, MANIFEST)))


async def wait_until(condition: Callable[[], bool], deadline_s: float = 10.0) -> None:
    async with asyncio.timeout(deadline_s):
        while True:
            if condition():
                return
            await asyncio.sleep(0.01)


def refused(outcome: Outcome, code: StatusCode, *said: str) -> None:
    assert outcome.code is code, outcome
    assert outcome.replies == []
    assert all(text in outcome.details for text in said), outcome.details
    assert len(outcome.details) < 500


# Right calls


@both_directions
def test_a_right_call_gets_the_experts_answer(run: Runner, direction: Direction) -> None:
    call = Call(direction)

    async def scenario(edge: Edge) -> None:
        outcome = await make(edge, call)
        assert outcome.code is StatusCode.OK, outcome.details
        alone = Expert(FIRST, MANIFEST)
        (reply, tensor), *rest = answers(outcome).values()
        assert rest == []
        torch.testing.assert_close(tensor, call.expected(alone))
        assert reply.update_count == alone.update_count == edge.updates() == (direction == "backward")
        assert reply.status == 0

    run(scenario)


@both_directions
def test_every_expert_of_a_call_gets_its_own_rows(run: Runner, direction: Direction) -> None:
    call = Call(direction, uids=[SECOND, ABSENT, FIRST, THIRD])

    async def scenario(edge: Edge) -> None:
        outcome = await make(edge, call)
        assert outcome.code is StatusCode.OK, outcome.details
        found = answers(outcome)
        assert set(found) == {0, 1, 2, 3}
        for index in (0, 2, 3):
            torch.testing.assert_close(
                found[index][1], call.expected(Expert(call.uids[index], MANIFEST), index)
            )

    run(scenario)


@both_directions
def test_an_expert_with_two_parts_answers_both(run: Runner, direction: Direction) -> None:
    call = Call(direction, uids=[FIRST, SECOND, FIRST])

    async def scenario(edge: Edge) -> None:
        outcome = await make(edge, call)
        assert outcome.code is StatusCode.OK, outcome.details
        found = answers(outcome)
        assert set(found) == {0, 1, 2}
        # backward, the second part may come after the step of the first
        for index in (0, 1, 2) if direction == "forward" else (0, 1):
            expected = call.expected(Expert(call.uids[index], MANIFEST), index)
            torch.testing.assert_close(found[index][1], expected)
        assert found[2][1] is not None

    run(scenario)


@both_directions
def test_an_unknown_expert_is_said_in_its_reply_and_the_others_answer(
    run: Runner, direction: Direction
) -> None:
    call = Call(direction, uids=[ABSENT, FIRST])

    async def scenario(edge: Edge) -> None:
        outcome = await make(edge, call)
        assert outcome.code is StatusCode.OK
        (reply, nothing), (_, tensor) = (answers(outcome)[index] for index in (0, 1))
        assert reply.status == StatusCode.NOT_FOUND.value[0]
        assert reply.message == "expert 0.1.1 is not hosted here"
        assert nothing is None
        assert tensor is not None

    run(scenario)


def test_a_full_queue_is_said_in_the_reply_with_a_time_to_come_back(run: Runner) -> None:
    async def scenario(edge: Edge) -> None:
        outcome = await make(edge, Call())
        ((reply, nothing),) = answers(outcome).values()
        assert reply.status == StatusCode.RESOURCE_EXHAUSTED.value[0]
        assert reply.retry_after_s > 0
        assert nothing is None

    run(scenario, max_queued_rows=ROWS - 1)


@pytest.mark.parametrize("beside", [False, True], ids=["after the header", "beside the header"])
@pytest.mark.parametrize("size", [1, 7, 64, 10**6])
def test_it_does_not_matter_how_the_payload_is_cut(run: Runner, size: int, beside: bool) -> None:
    call = Call("backward", uids=[FIRST, SECOND])

    async def scenario(edge: Edge) -> None:
        first, *others = chunked(call.payload, size)
        requests = [with_payload(call, first.chunk), *others] if beside else [header_of(call), first, *others]
        outcome = await exchange(edge, "backward", requests)
        assert outcome.code is StatusCode.OK, outcome.details
        for index, (_, tensor) in answers(outcome).items():
            torch.testing.assert_close(tensor, call.expected(Expert(call.uids[index], MANIFEST), index))

    run(scenario)


def test_a_large_answer_comes_in_chunks(run: Runner) -> None:
    segments = 2 * CHUNK_BYTES // (4 * HIDDEN * CONTEXT)
    call = Call(lengths=[CONTEXT] * segments, positions=list(range(CONTEXT)) * segments)

    async def scenario(edge: Edge) -> None:
        outcome = await make(edge, call)
        assert outcome.code is StatusCode.OK, outcome.details
        assert [len(reply.chunk) for reply in outcome.replies] == [CHUNK_BYTES] * 2
        ((_, tensor),) = answers(outcome, segments * CONTEXT).values()
        torch.testing.assert_close(tensor, call.expected(Expert(FIRST, MANIFEST)))

    run(scenario)


def test_many_callers_at_once_get_their_own_answers(run: Runner) -> None:
    calls = [Call(uids=[(FIRST, SECOND, THIRD)[n % 3]], seed=n) for n in range(24)]

    async def scenario(edge: Edge) -> None:
        outcomes = await asyncio.gather(*(make(edge, call) for call in calls))
        for call, outcome in zip(calls, outcomes, strict=True):
            ((_, tensor),) = answers(outcome).values()
            torch.testing.assert_close(tensor, call.expected(Expert(call.uids[0], MANIFEST)))

    run(scenario)


def test_info_says_what_is_hosted(run: Runner) -> None:
    async def scenario(edge: Edge) -> None:
        await make(edge, Call("backward"))
        request = expert_pb2.InfoRequest(protocol_version=PROTOCOL_VERSION, swarm_id=SWARM)
        reply = await edge.stub.Info(request)
        assert (reply.protocol_version, reply.software_version) == (PROTOCOL_VERSION, SOFTWARE_VERSION)
        hosted = {expert.uid: expert.update_count for expert in reply.experts}
        assert hosted == {"0.0.0": 1, "0.0.1": 0, "0.1.0": 0}
        for wrong in (
            expert_pb2.InfoRequest(protocol_version=PROTOCOL_VERSION, swarm_id="other"),
            expert_pb2.InfoRequest(protocol_version=7, swarm_id=SWARM),
            expert_pb2.InfoRequest(),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await edge.stub.Info(wrong)
            assert caught.value.code() is StatusCode.FAILED_PRECONDITION

    run(scenario)


# Wrong headers


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
    "wider": (set_header(width=HIDDEN + 1), ("width 17", "hidden size is 16")),
    "huge width": (set_header(width=2**32 - 1), ("width 4294967295", "hidden size is 16")),
    "no width": (clear("width"), ("width 0", "hidden size is 16")),
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
    "no codec": (clear("codec"), ("codec 0 is not spoken here; spoken: CODEC_FP32",)),
    "an unknown codec": (set_header(codec=77), ("codec 77 is not spoken here; spoken: CODEC_FP32",)),
}


@both_directions
@pytest.mark.parametrize("name", WRONG_HEADERS)
def test_a_wrong_header_is_refused_saying_what_is_wrong(run: Runner, name: str, direction: Direction) -> None:
    spoil, said = WRONG_HEADERS[name]
    call = Call(direction)
    spoil(call)

    async def scenario(edge: Edge) -> None:
        refused(await make(edge, call), StatusCode.INVALID_ARGUMENT, *said)
        assert edge.updates() == edge.runtime.stats.rows == 0
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


def test_a_call_of_too_many_bytes_is_refused_before_they_are_sent(run: Runner) -> None:
    rows = 2**20 // (4 * HIDDEN) + 1
    call = Call(lengths=[1] * rows, positions=[0] * rows)

    async def scenario(edge: Edge) -> None:
        header = [expert_pb2.CallRequest(header=call.header)]
        outcome = await exchange(edge, "forward", header, ends=False)
        refused(outcome, StatusCode.RESOURCE_EXHAUSTED, "a call of 1048640 bytes; at most 1048576")
        assert outcome.seconds < 10
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


# Wrong payloads


def header_of(call: Call) -> expert_pb2.CallRequest:
    return expert_pb2.CallRequest(header=call.header)


def with_payload(call: Call, data: bytes) -> expert_pb2.CallRequest:
    return expert_pb2.CallRequest(header=call.header, chunk=data)


def piece(data: bytes) -> expert_pb2.CallRequest:
    return expert_pb2.CallRequest(chunk=data)


TOO_LONG = "the payload is longer than the header says"
NOT_A_CHUNK = "after the header come chunks of 1 to 1048576 bytes"
NO_HEADER = "a call must begin with its header"

WRONG_STREAMS: dict[str, tuple[Callable[[Call], list[expert_pb2.CallRequest]], str]] = {
    "no message at all": (lambda call: [], NO_HEADER),
    "an empty message": (lambda call: [expert_pb2.CallRequest()], NO_HEADER),
    "a chunk before the header": (lambda call: [piece(call.payload), header_of(call)], NO_HEADER),
    "a header with a part of the payload, then too much": (
        lambda call: [with_payload(call, call.payload[:8]), piece(call.payload)],
        "longer than the header says",
    ),
    "an oversized chunk beside the header": (
        lambda call: [with_payload(call, bytes(MAX_CHUNK_BYTES + 1))],
        NOT_A_CHUNK,
    ),
    "a second header": (lambda call: [header_of(call), header_of(call)], NOT_A_CHUNK),
    "an empty chunk": (lambda call: [header_of(call), piece(b""), piece(call.payload)], NOT_A_CHUNK),
    "a message with nothing in it": (lambda call: [header_of(call), expert_pb2.CallRequest()], NOT_A_CHUNK),
    "an oversized chunk": (lambda call: [header_of(call), piece(bytes(MAX_CHUNK_BYTES + 1))], NOT_A_CHUNK),
    "no payload": (lambda call: [header_of(call)], "the payload ended 320 bytes before"),
    "a byte too few": (lambda call: [header_of(call), piece(call.payload[:-1])], "ended 1 bytes before"),
}


@both_directions
@pytest.mark.parametrize("name", WRONG_STREAMS)
def test_a_wrong_stream_is_refused_saying_what_is_wrong(run: Runner, name: str, direction: Direction) -> None:
    spoil, said = WRONG_STREAMS[name]

    async def scenario(edge: Edge) -> None:
        outcome = await exchange(edge, direction, spoil(Call(direction)))
        refused(outcome, StatusCode.INVALID_ARGUMENT, said)
        assert edge.updates() == edge.runtime.stats.rows == 0
        await check_it_goes_on(edge)

    run(scenario)


@both_directions
@pytest.mark.parametrize("more", [b"x", bytes(1000), b""])
def test_a_payload_longer_than_the_header_says_is_refused(
    run: Runner, direction: Direction, more: bytes
) -> None:
    call = Call(direction)

    async def scenario(edge: Edge) -> None:
        for requests in ([header_of(call), piece(call.payload + more)], [*call.requests, piece(more)]):
            call.header.request_id = bytes([len(requests)]) * 16
            requests[0] = header_of(call)
            if more or len(requests) == 3:
                outcome = await exchange(edge, direction, requests)
                assert outcome.code is StatusCode.INVALID_ARGUMENT
                assert outcome.details == TOO_LONG
        await check_it_goes_on(edge)

    run(scenario)


def test_a_message_over_the_limit_is_refused_by_grpc(run: Runner) -> None:
    call = Call()

    async def scenario(edge: Edge) -> None:
        outcome = await exchange(edge, "forward", [header_of(call), piece(bytes(2 * MAX_MESSAGE_BYTES))])
        refused(outcome, StatusCode.RESOURCE_EXHAUSTED)
        await check_it_goes_on(edge)

    run(scenario)


def test_a_claim_of_megabytes_with_a_kilobyte_behind_it_is_refused(run: Runner) -> None:
    segments = 4 * 2**20 // (4 * HIDDEN * CONTEXT)
    call = Call(lengths=[CONTEXT] * segments, positions=list(range(CONTEXT)) * segments)

    async def scenario(edge: Edge) -> None:
        outcome = await exchange(edge, "forward", [header_of(call), piece(bytes(1024))])
        refused(outcome, StatusCode.INVALID_ARGUMENT, f"the payload ended {4 * 2**20 - 1024} bytes before")
        await check_it_goes_on(edge)

    run(scenario)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("direction", "which"), [("forward", 0), ("backward", 0), ("backward", 1)])
def test_numbers_that_are_not_finite_are_refused(
    run: Runner, direction: Direction, which: int, bad: float
) -> None:
    call = Call(direction)
    call.tensors[which][2, 3] = bad

    async def scenario(edge: Edge) -> None:
        refused(await make(edge, call), StatusCode.INVALID_ARGUMENT, "numbers that are not finite")
        assert edge.updates() == edge.runtime.stats.rows == 0
        await check_it_goes_on(edge)

    run(scenario)


def test_finite_numbers_too_large_for_the_expert_spoil_nothing(run: Runner) -> None:
    call = Call("backward")
    call.tensors[1].fill_(3e38)

    async def scenario(edge: Edge) -> None:
        outcome = await make(edge, call)
        assert outcome.code is StatusCode.OK, outcome.details
        for _, tensor in answers(outcome).values():
            assert tensor is None or tensor.isfinite().all()
        expert = edge.runtime.experts[FIRST]
        assert all(parameter.isfinite().all() for parameter in expert.block.parameters())
        await check_it_goes_on(edge)

    run(scenario)


# Slow and repeated calls


SLOW: dict[str, Callable[[Call], list[expert_pb2.CallRequest]]] = {
    "nothing": lambda call: [],
    "only a header": lambda call: call.requests[:1],
    "half the payload": lambda call: [header_of(call), piece(call.payload[:100])],
}


@pytest.mark.parametrize("name", SLOW)
def test_a_caller_that_stops_sending_is_let_go_after_the_longest_call(run: Runner, name: str) -> None:
    async def scenario(edge: Edge) -> None:
        outcome = await exchange(edge, "forward", SLOW[name](Call()), ends=False, timeout_s=None)
        refused(outcome, StatusCode.DEADLINE_EXCEEDED, "the call lasted longer than 0.3 s")
        assert 0.3 <= outcome.seconds < 5

    run(scenario, max_call_s=0.3)


@pytest.mark.parametrize("name", SLOW)
def test_a_caller_that_stops_sending_is_let_go_at_its_deadline(run: Runner, name: str) -> None:
    async def scenario(edge: Edge) -> None:
        tasks = len(asyncio.all_tasks())
        outcome = await exchange(edge, "forward", SLOW[name](Call()), ends=False, timeout_s=0.3)
        assert outcome.code is StatusCode.DEADLINE_EXCEEDED
        await wait_until(lambda: len(asyncio.all_tasks()) <= tasks)
        await check_it_goes_on(edge)

    run(scenario)


def test_a_caller_that_never_closes_its_side_gets_its_answer_before_it_is_let_go(run: Runner) -> None:
    call = Call()

    async def scenario(edge: Edge) -> None:
        outcome = await make(edge, call, ends=False)
        assert outcome.code is StatusCode.DEADLINE_EXCEEDED
        ((_, tensor),) = answers(outcome).values()
        torch.testing.assert_close(tensor, call.expected(Expert(FIRST, MANIFEST)))

    run(scenario, max_call_s=1.0)


def test_a_repeated_backward_call_is_applied_once(run: Runner) -> None:
    call = Call("backward", uids=[FIRST, SECOND])

    async def scenario(edge: Edge) -> None:
        assert (await make(edge, call)).code is StatusCode.OK
        before = [p.clone() for p in edge.runtime.experts[FIRST].block.parameters()]
        refused(await make(edge, call), StatusCode.ALREADY_EXISTS, "this request id was seen before")
        assert edge.updates() == 2
        assert all(map(torch.equal, before, edge.runtime.experts[FIRST].block.parameters()))
        call.header.request_id = b"another".ljust(16)
        assert (await make(edge, call)).code is StatusCode.OK
        assert edge.updates() == 4

    run(scenario)


def test_of_two_equal_backward_calls_at_once_one_is_applied(run: Runner) -> None:
    call = Call("backward")

    async def scenario(edge: Edge) -> None:
        outcomes = await asyncio.gather(*(make(edge, call) for _ in range(4)))
        codes = sorted(outcome.code.name for outcome in outcomes)
        assert codes == ["ALREADY_EXISTS"] * 3 + ["OK"]
        assert edge.updates() == 1

    run(scenario)


def test_a_repeated_forward_call_is_answered_again(run: Runner) -> None:
    async def scenario(edge: Edge) -> None:
        for _ in range(2):
            assert (await make(edge, Call())).code is StatusCode.OK

    run(scenario)


@given(st.lists(st.integers(0, 9), max_size=40), st.integers(1, 5))
def test_the_memory_of_requests_is_bounded_and_forgets_the_oldest(ids: list[int], limit: int) -> None:
    seen, remembered = SeenRequests(limit), list[int]()
    for number in ids:
        assert seen.is_new(bytes([number])) is (number not in remembered)
        if number not in remembered:
            remembered = [*remembered, number][-limit:]


@pytest.mark.parametrize("way", ["cancelled", "disconnected"])
def test_a_call_that_is_given_up_leaves_nothing_queued(run: Runner, way: str) -> None:
    release = threading.Event()

    async def scenario(edge: Edge) -> None:
        await check_it_goes_on(edge)
        tasks, rows = len(asyncio.all_tasks()), edge.runtime.stats.rows
        blocked = asyncio.create_task(edge.runtime.run(release.wait))
        try:
            async with open_channel(edge.address, edge.pem) as channel:
                stub: Any = expert_pb2_grpc.ExpertServiceStub(channel)
                stream = stub.Backward(timeout=30)
                for request in Call("backward", [FIRST, SECOND, THIRD]).requests:
                    await stream.write(request)
                # the first may be on its way to the compute thread, the others wait
                await wait_until(lambda: edge.runtime.stats.queued_rows >= 2 * ROWS)
                if way == "cancelled":
                    assert stream.cancel()
                    await wait_until(lambda: edge.runtime.stats.queued_rows == 0)
            await wait_until(lambda: edge.runtime.stats.queued_rows == 0)
        finally:
            release.set()
        await blocked
        await wait_until(lambda: len(asyncio.all_tasks()) <= tasks)
        assert edge.runtime.stats.rows - rows <= ROWS
        assert edge.updates() <= 1
        await make(edge, Call(seed=5))

    run(scenario)


# Whatever else may come to the port


GARBAGE = {
    "nothing": b"",
    "random": random.Random(0).randbytes(5000),
    "zeros": bytes(5000),
    "http": b"POST / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "http/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(100),
    "half a TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_on_the_port_does_not_stop_the_server(run: Runner, name: str) -> None:
    async def scenario(edge: Edge) -> None:
        host, port = edge.address.split(":")
        writers = [(await asyncio.open_connection(host, int(port)))[1] for _ in range(8)]
        for writer in writers:
            writer.write(GARBAGE[name])
        await check_it_goes_on(edge)
        for writer in writers:
            writer.close()
        await check_it_goes_on(edge)

    run(scenario)


def test_grpc_without_tls_gets_nothing(run: Runner) -> None:
    async def scenario(edge: Edge) -> None:
        async with grpc.aio.insecure_channel(edge.address) as channel:
            stub: Any = expert_pb2_grpc.ExpertServiceStub(channel)
            request = expert_pb2.InfoRequest(protocol_version=PROTOCOL_VERSION, swarm_id=SWARM)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Info(request, timeout=5)
        assert caught.value.code() is StatusCode.UNAVAILABLE
        assert edge.runtime.stats.rows == 0
        await check_it_goes_on(edge)

    run(scenario)


def test_a_caller_that_pins_another_certificate_does_not_call(run: Runner, identity: Identity) -> None:
    async def scenario(edge: Edge) -> None:
        # of the same key even: certificates are pinned whole
        other = certificate_pem(identity.make_certificate(), identity.peer_id)
        outcome = await make(Edge(edge.runtime, edge.address, other, edge.channel), Call(), timeout_s=5)
        assert outcome.code is StatusCode.UNAVAILABLE
        assert edge.runtime.stats.rows == 0
        await check_it_goes_on(edge)

    run(scenario)


def test_messages_that_are_no_protobuf_are_refused(
    loop: LoopThread, identity: Identity, caplog: pytest.LogCaptureFixture
) -> None:
    rng = random.Random(1)

    async def scenario() -> None:
        async with serving(identity) as edge:
            for name in ("Forward", "Backward"):
                method: Any = edge.channel.stream_stream(f"/talkoot.v1.ExpertService/{name}")
                for size in (1, 10, 1000):
                    stream = method(timeout=10)
                    await stream.write(b"\xff" + rng.randbytes(size))
                    await stream.done_writing()
                    assert await stream.code() is not StatusCode.OK
            await check_it_goes_on(edge)

    loop.run(scenario(), 60)
    caplog.clear()  # grpc logs each with a traceback


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
        part = make_part(rows, MANIFEST)
        assert str(part.uid) == rows.uid
        assert part.lengths.tolist() == rows.segment_lengths
        assert part.positions.tolist() == rows.positions
        assert part.rows == len(rows.positions)
    else:
        with pytest.raises(WireError):
            make_part(rows, MANIFEST)


headers = st.builds(
    lambda request_id, width, codec, experts: expert_pb2.CallHeader(
        request_id=request_id, width=width, codec=codec, experts=experts
    ),
    st.sampled_from([b"", bytes(15), bytes(16)]),
    st.sampled_from([HIDDEN, HIDDEN, 0, 2**32 - 1]),
    st.sampled_from([1, 1, 0, 99]),
    st.lists(expert_rows, max_size=3),
)


@settings(max_examples=500)
@given(headers, st.sampled_from(DIRECTIONS))
def test_a_header_is_right_or_refused_with_an_error_of_the_edge(
    header: expert_pb2.CallHeader, direction: Direction
) -> None:
    runtime = Runtime({}, max_queued_rows=1, max_batch_rows=1, threads=1)
    servicer = ExpertServicer(runtime, MANIFEST, SWARM, EdgeLimits(max_call_bytes=800, max_call_s=1))
    size = 4 * HIDDEN * sum(len(rows.positions) for rows in header.experts) * (1 + (direction == "backward"))
    right = (
        (len(header.request_id), header.width, header.codec) == (16, HIDDEN, expert_pb2.CODEC_FP32)
        and 0 < size <= 800
        and all(map(is_right, header.experts))
    )
    if right:
        parts = servicer._check_parts(header, direction)
        assert [str(part.uid) for part in parts] == [rows.uid for rows in header.experts]
    else:
        with pytest.raises((WireError, ExpertError)):
            servicer._check_parts(header, direction)
