"""GrpcCaller against a real TLS server that misbehaves as told. Whatever it does ends in answers or an ExpertError."""

import asyncio
import math
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import grpc
import numpy as np
import pytest
from expert_fakes import make_node, random_rows
from grpc import StatusCode

from dht.registry import NodeInfo
from dht.uid import UID
from peer import PROTOCOL_VERSION
from peer.channels import SERVER_OPTIONS, ChannelPool, server_credentials
from peer.codec import CHUNK_BYTES, MAX_CHUNK_BYTES, Floats
from peer.errors import ExpertError
from peer.identity import Identity, certificate_pem
from peer.loop import LoopThread
from peer.wire import expert_pb2
from peer.wire.expert_pb2 import CallReply, CallRequest, ExpertReply
from trainer_client.calls import Answer, Direction, GrpcCaller, Request

WIDTH = 8
BYTES = 4 * 3 * WIDTH  # of three rows
LONG = 30.0  # a deadline that no test waits for
SHORT = 0.4

Context: TypeAlias = "grpc.aio.ServicerContext[CallRequest, CallReply | bytes]"
Behaviour: TypeAlias = Callable[["Server", Context], Awaitable[None]]


@dataclass
class Server:
    """One node: what it was sent, and how it answers."""

    info: NodeInfo
    behave: Behaviour
    direction: Direction = "forward"
    header: expert_pb2.CallHeader | None = None
    payload: bytearray = field(default_factory=bytearray)
    calls: int = 0
    running: int = 0

    async def serve(self, direction: Direction, context: Context) -> None:
        self.calls, self.running = self.calls + 1, self.running + 1
        self.direction, self.header, self.payload = direction, None, bytearray()
        try:
            await self.behave(self, context)
        finally:
            self.running -= 1

    async def read(self, context: Context, messages: float = math.inf) -> None:
        """Takes in the next messages, or all."""
        while messages > 0 and isinstance(request := await context.read(), CallRequest):
            messages -= 1
            assert request.HasField("header") == (self.header is None)
            if self.header is None:
                self.header = request.header
            else:
                assert request.chunk
            assert len(request.chunk) <= CHUNK_BYTES
            self.payload += request.chunk

    async def start(self, identity: Identity) -> grpc.aio.Server:
        certificate = identity.make_certificate()
        server = grpc.aio.server(options=[*SERVER_OPTIONS, ("grpc.max_send_message_length", -1)])

        def handler(direction: Direction) -> "grpc.RpcMethodHandler[CallRequest, CallReply]":
            async def serve(_: object, context: Context) -> None:
                await self.serve(direction, context)

            return grpc.stream_stream_rpc_method_handler(
                serve,
                request_deserializer=CallRequest.FromString,
                response_serializer=lambda m: m if isinstance(m, bytes) else m.SerializeToString(),
            )

        methods = {"Forward": handler("forward"), "Backward": handler("backward")}
        generic = grpc.method_handlers_generic_handler("talkoot.v1.ExpertService", methods)
        server.add_generic_rpc_handlers((generic,))
        port = server.add_secure_port("127.0.0.1:0", server_credentials(identity, certificate))
        await server.start()
        pem = certificate_pem(certificate, identity.peer_id)
        node = make_node(identity.peer_id)
        self.info = replace(node, addresses=(f"127.0.0.1:{port}",), certificate_pem=pem)
        return server


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> list[Identity]:
    folder = tmp_path_factory.mktemp("identities")
    return [Identity.load_or_create(folder / name) for name in ("own.key", "other.key")]


@pytest.fixture(scope="module")
def running(loop: LoopThread, identities: list[Identity]) -> Iterator[Server]:
    server = Server(make_node(identities[0].peer_id), answer_all)
    grpc_server = loop.run(server.start(identities[0]))
    yield server
    loop.run(grpc_server.stop(None))


@pytest.fixture
def server(running: Server, loop: LoopThread) -> Iterator[Server]:
    """Afterwards nothing may run that did not run before."""
    running.behave = answer_all
    running.calls = 0
    tasks_before = loop.run(count_tasks())
    yield running
    loop.run(until(lambda: running.running == 0))
    loop.run(until(lambda: len(asyncio.all_tasks()) <= tasks_before))


@pytest.fixture
def pool(loop: LoopThread) -> Iterator[ChannelPool]:
    pool = ChannelPool()
    yield pool
    loop.run(pool.close())


@pytest.fixture
def caller(server: Server, pool: ChannelPool) -> GrpcCaller:
    """Its channels are closed before the server looks at what is left."""
    return GrpcCaller(pool, "sauna-1234", WIDTH)


async def count_tasks() -> int:
    return len(asyncio.all_tasks())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  # what is waited for are grpc's own tasks: they set no event
            await asyncio.sleep(0.01)


@dataclass
class Collected:
    answers: list[Answer] = field(default_factory=list)
    error: ExpertError | None = None
    seconds: float = 0.0

    @property
    def status(self) -> StatusCode | None:
        return self.error.status if self.error is not None else None


async def collect(
    caller: GrpcCaller,
    node: NodeInfo,
    requests: Sequence[Request],
    *,
    deadline_s: float = LONG,
    direction: Direction = "forward",
) -> Collected:
    collected, began = Collected(), time.monotonic()
    try:
        async for answer in caller.call(node, direction, requests, deadline_s):
            collected.answers.append(answer)
    except ExpertError as error:
        collected.error = error
    collected.seconds = time.monotonic() - began
    return collected


def requests_for(
    *experts: int, rows: int = 3, gradients: Floats | None = None, width: int = WIDTH
) -> list[Request]:
    """Expert i's inputs come from seed i."""
    return [
        Request(UID(0, (i,)), [rows], list(range(rows)), random_rows(rows, width, seed=i), gradients)
        for i in experts
    ]


def reply(index: int, size: int = BYTES) -> CallReply:
    return CallReply(experts=[ExpertReply(index=index, payload_bytes=size)])


def both() -> CallReply:
    return CallReply(experts=[*reply(0).experts, *reply(1).experts])


def chunk(size: int = BYTES, number: float = 1.0) -> CallReply:
    return CallReply(chunk=np.full(size // 4, number, "<f4").tobytes() + bytes(size % 4))


def sends(*messages: CallReply | bytes) -> Behaviour:
    """Reads all, sends these, and ends the call with OK."""

    async def behave(server: Server, context: Context) -> None:
        await server.read(context)
        for message in messages:
            await context.write(message)

    return behave


async def answer_all(server: Server, context: Context) -> None:
    """A correct node, whose experts double. Answers in reverse order."""
    await server.read(context)
    assert server.header is not None
    tensors, start = [], 0
    for expert in server.header.experts:
        size = 4 * len(expert.positions) * server.header.width
        tensors.append(np.frombuffer(server.payload[start : start + size], "<f4"))
        start += size * (2 if server.direction == "backward" else 1)
    assert start == len(server.payload)
    for index, tensor in reversed(list(enumerate(tensors))):
        data = (2 * tensor).tobytes()
        await context.write(reply(index, len(data)))
        for at in range(0, len(data), CHUNK_BYTES):
            await context.write(CallReply(chunk=data[at : at + CHUNK_BYTES]))


# What is sent, and right answers


def test_every_expert_is_answered_with_its_own_tensor(
    loop: LoopThread, server: Server, caller: GrpcCaller
) -> None:
    requests = requests_for(4, 7, 9)
    collected = loop.run(collect(caller, server.info, requests))
    assert collected.error is None
    assert [answer.index for answer in collected.answers] == [2, 1, 0]
    for answer in collected.answers:
        assert answer.error is None
        assert answer.tensor is not None
        np.testing.assert_array_equal(answer.tensor, 2 * requests[answer.index].inputs)
    assert caller.bytes_sent == caller.bytes_received == 3 * BYTES


def test_the_header_says_what_follows_and_each_call_has_an_id_of_its_own(
    loop: LoopThread, server: Server, caller: GrpcCaller
) -> None:
    ids = set()
    requests = [
        Request(UID(2, (1, 3)), [1, 2], [5, 0, 7], random_rows(3), random_rows(3, seed=1)),
        Request(UID(2, (0, 0)), [1], [3], random_rows(1, seed=2), random_rows(1, seed=3)),
    ]
    for _ in range(3):
        collected = loop.run(collect(caller, server.info, requests, direction="backward"))
        assert len(collected.answers) == 2
        header = server.header
        assert header is not None
        ids.add(header.request_id)
        assert len(header.request_id) == 16
        assert (header.protocol_version, header.swarm_id) == (PROTOCOL_VERSION, "sauna-1234")
        assert (header.width, header.codec) == (WIDTH, expert_pb2.CODEC_FP32)
        assert [(e.uid, list(e.segment_lengths), list(e.positions)) for e in header.experts] == [
            ("2.1.3", [1, 2], [5, 0, 7]),
            ("2.0.0", [1], [3]),
        ]
        tensors = [t for request in requests for t in (request.inputs, request.gradients) if t is not None]
        assert bytes(server.payload) == b"".join(tensor.tobytes() for tensor in tensors)
    assert len(ids) == 3


def test_tensors_of_many_chunks_go_both_ways(loop: LoopThread, server: Server, pool: ChannelPool) -> None:
    requests = requests_for(0, 1, rows=2000, width=512)  # 4 MB each
    collected = loop.run(collect(GrpcCaller(pool, "s", 512), server.info, requests))
    assert collected.error is None
    for answer in collected.answers:
        assert answer.tensor is not None
        np.testing.assert_array_equal(answer.tensor, 2 * requests[answer.index].inputs)


def test_a_call_that_went_well_is_not_cancelled_at_the_server(
    loop: LoopThread, server: Server, caller: GrpcCaller
) -> None:
    """Cancelled calls leak (grpc issue 43360), so that no call is cut off behind its last answer."""
    ended: list[str] = []

    async def behave(server: Server, context: Context) -> None:
        try:
            await answer_all(server, context)
            for _ in range(50):  # a cancellation would come meanwhile
                await asyncio.sleep(0.001)
            ended.append("well")
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    server.behave = behave
    assert loop.run(collect(caller, server.info, requests_for(0))).error is None
    assert ended == ["well"]


# Who is at the other end


def test_node_with_another_certificate_than_the_pinned_is_unavailable_and_sent_nothing(
    loop: LoopThread, server: Server, caller: GrpcCaller, identities: list[Identity]
) -> None:
    other = identities[1]
    pem = certificate_pem(other.make_certificate(), other.peer_id)
    node = replace(server.info, certificate_pem=pem)
    collected = loop.run(collect(caller, node, requests_for(0)))
    assert collected.status is StatusCode.UNAVAILABLE
    assert not collected.answers
    assert server.calls == 0
    assert caller.bytes_sent == 0
    assert collected.seconds < LONG / 3


def test_right_and_wrong_certificate_for_one_address_do_not_share_a_channel(
    loop: LoopThread, server: Server, caller: GrpcCaller, identities: list[Identity]
) -> None:
    pem = certificate_pem(identities[1].make_certificate(), identities[1].peer_id)
    wrong = replace(server.info, certificate_pem=pem)
    statuses = [loop.run(collect(caller, node, requests_for(0))).status for node in (server.info, wrong) * 2]
    assert statuses == [None, StatusCode.UNAVAILABLE] * 2


def test_nobody_listening_is_unavailable(loop: LoopThread, server: Server, caller: GrpcCaller) -> None:
    with socket.socket() as taken:  # bound and not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        node = replace(server.info, addresses=(f"127.0.0.1:{taken.getsockname()[1]}",))
        collected = loop.run(collect(caller, node, requests_for(0)))
    assert collected.status is StatusCode.UNAVAILABLE
    assert collected.seconds < LONG / 3


@pytest.mark.parametrize(
    "address", ["", ":", "nonsense", "127.0.0.1:99999", "ä\0ö:1", "unix:/nowhere", "ipv4:1"]
)
def test_address_that_is_none_is_an_error_of_the_call(
    loop: LoopThread, server: Server, caller: GrpcCaller, address: str
) -> None:
    node = replace(server.info, addresses=(address,))
    collected = loop.run(collect(caller, node, requests_for(0), deadline_s=2.0))
    assert collected.error is not None
    assert collected.seconds < LONG / 3


def test_node_without_address_is_unavailable(loop: LoopThread, server: Server, caller: GrpcCaller) -> None:
    collected = loop.run(collect(caller, replace(server.info, addresses=()), requests_for(0)))
    assert collected.status is StatusCode.UNAVAILABLE


# Wrong answers

ANSWERED_0 = (reply(0), chunk())
WRONG = {
    "an unknown index": ((reply(2), chunk()), []),
    "a huge index": ((reply(2**32 - 1), chunk()), []),
    "the same index twice": ((*ANSWERED_0, *ANSWERED_0), [0]),
    "the last index twice": ((*ANSWERED_0, reply(1), chunk(), reply(1), chunk()), [0, 1]),
    "more bytes announced than the tensor has": ((*ANSWERED_0, reply(1, BYTES + 4), chunk(BYTES + 4)), [0]),
    "fewer bytes announced than the tensor has": ((*ANSWERED_0, reply(1, BYTES - 4), chunk(BYTES - 4)), [0]),
    "a size beyond all memory": ((reply(0, 2**63), chunk()), []),
    "no bytes announced": ((reply(0, 0),), []),
    "a chunk longer than announced": ((*ANSWERED_0, reply(1), chunk(BYTES + 4)), [0]),
    "chunks longer than announced": ((*ANSWERED_0, reply(1), chunk(BYTES - 4), chunk(8)), [0]),
    "one chunk too many at the end": ((*ANSWERED_0, reply(1), chunk(), chunk(4)), [0, 1]),
    "an empty chunk": ((*ANSWERED_0, reply(1), CallReply(chunk=b""), chunk()), [0]),
    "no room for the second of two tensors": ((reply(0), reply(1), chunk(), chunk(BYTES + 4)), [0]),
    "both tensors short": ((both(), chunk(), chunk(BYTES - 4)), [0]),
    "a repeated index in one message": (
        (CallReply(experts=[*reply(0).experts] * 2, chunk=bytes(2 * BYTES)),),
        [],
    ),
    "a message of too many bytes": (
        (CallReply(experts=both().experts, chunk=bytes(MAX_CHUNK_BYTES + 1)),),
        [],
    ),
    "a chunk before any answer": ((chunk(), reply(0), chunk()), []),
    "an empty message": ((CallReply(),), []),
    "bytes that are no message": ((*ANSWERED_0, b"\xff\xff\xff"), [0]),
    "NaN": ((*ANSWERED_0, reply(1), chunk(number=math.nan)), [0]),
    "infinity": ((*ANSWERED_0, reply(1), chunk(number=math.inf)), [0]),
    "an early end between answers": (ANSWERED_0, [0]),
    "an early end within a payload": ((*ANSWERED_0, reply(1), chunk(BYTES - 4)), [0]),
    "nothing at all": ((), []),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_answer_is_data_loss_and_earlier_answers_count(
    loop: LoopThread, server: Server, caller: GrpcCaller, case: str
) -> None:
    messages, answered = WRONG[case]
    server.behave = sends(*messages)
    collected = loop.run(collect(caller, server.info, requests_for(0, 1)))
    assert collected.status is StatusCode.DATA_LOSS
    assert [answer.index for answer in collected.answers] == answered
    assert collected.seconds < LONG / 3


def test_message_over_the_limit_is_refused_unread(
    loop: LoopThread, server: Server, caller: GrpcCaller
) -> None:
    server.behave = sends(reply(0), bytes(4 * 2**20))
    collected = loop.run(collect(caller, server.info, requests_for(0)))
    assert collected.status is StatusCode.RESOURCE_EXHAUSTED
    assert not collected.answers


def test_wrong_answer_cuts_the_call_off_at_the_server(
    loop: LoopThread, server: Server, caller: GrpcCaller
) -> None:
    async def behave(server: Server, context: Context) -> None:
        await sends(reply(99))(server, context)
        await asyncio.sleep(LONG)

    server.behave = behave
    collected = loop.run(collect(caller, server.info, requests_for(0)))
    assert collected.status is StatusCode.DATA_LOSS
    loop.run(until(lambda: server.running == 0))


# Errors, of an expert and of the whole call


def refusal(index: int, status: int, message: str = "", retry_after_s: float = 0.0) -> CallReply:
    return CallReply(
        experts=[ExpertReply(index=index, status=status, message=message, retry_after_s=retry_after_s)]
    )


def test_error_of_one_expert_leaves_the_others(loop: LoopThread, server: Server, caller: GrpcCaller) -> None:
    status: int = StatusCode.RESOURCE_EXHAUSTED.value[0]
    server.behave = sends(refusal(1, status, "queue full", 2.5), reply(0), chunk())
    collected = loop.run(collect(caller, server.info, requests_for(0, 1)))
    assert collected.error is None
    refused, answered = collected.answers
    assert (refused.index, refused.tensor) == (1, None)
    assert refused.error is not None
    assert (refused.error.status, str(refused.error)) == (StatusCode.RESOURCE_EXHAUSTED, "queue full")
    assert refused.error.retry_after_s == 2.5
    assert answered.index == 0
    assert answered.tensor is not None


def test_all_experts_refusing_is_no_error_of_the_call(
    loop: LoopThread, server: Server, caller: GrpcCaller
) -> None:
    server.behave = sends(refusal(0, 5), refusal(1, 13))
    collected = loop.run(collect(caller, server.info, requests_for(0, 1)))
    assert collected.error is None
    statuses = [answer.error.status for answer in collected.answers if answer.error]
    assert statuses == [StatusCode.NOT_FOUND, StatusCode.INTERNAL]


@pytest.mark.parametrize(
    ("retry_after_s", "expected"), [(math.nan, 0.0), (-5.0, 0.0), (math.inf, math.inf), (1.5, 1.5)]
)
def test_retry_hint_is_never_negative_or_nan_and_unknown_statuses_are_unknown(
    loop: LoopThread, server: Server, caller: GrpcCaller, retry_after_s: float, expected: float
) -> None:
    server.behave = sends(refusal(0, 4711, "x" * 100_000, retry_after_s))
    collected = loop.run(collect(caller, server.info, requests_for(0)))
    (answer,) = collected.answers
    assert answer.error is not None
    assert answer.error.status is StatusCode.UNKNOWN
    assert answer.error.retry_after_s == expected
    assert len(str(answer.error)) <= 500


STATUSES = [StatusCode.FAILED_PRECONDITION, StatusCode.INVALID_ARGUMENT, StatusCode.UNAUTHENTICATED]


@pytest.mark.parametrize("status", STATUSES)
def test_refusal_of_the_whole_call_has_the_nodes_status_and_message(
    loop: LoopThread, server: Server, caller: GrpcCaller, status: StatusCode
) -> None:
    async def behave(server: Server, context: Context) -> None:
        await sends(*ANSWERED_0)(server, context)
        await context.abort(status, "not with me")

    server.behave = behave
    collected = loop.run(collect(caller, server.info, requests_for(0, 1)))
    assert collected.status is status
    assert str(collected.error) == "not with me"
    assert [answer.index for answer in collected.answers] == [0]


def test_busy_node_that_refuses_the_whole_call_is_left_alone_for_a_while(
    loop: LoopThread, server: Server, caller: GrpcCaller
) -> None:
    async def behave(server: Server, context: Context) -> None:
        await server.read(context)
        await context.abort(StatusCode.RESOURCE_EXHAUSTED, "too many calls")

    server.behave = behave
    collected = loop.run(collect(caller, server.info, requests_for(0)))
    assert collected.error is not None
    assert collected.error.status is StatusCode.RESOURCE_EXHAUSTED
    assert collected.error.retry_after_s == 1.0


def test_node_that_breaks_down_is_no_error_of_ours(
    loop: LoopThread, server: Server, caller: GrpcCaller
) -> None:
    async def behave(server: Server, context: Context) -> None:
        await server.read(context)
        await context.abort(StatusCode.INTERNAL, "bug")

    server.behave = behave
    assert loop.run(collect(caller, server.info, requests_for(0))).status is StatusCode.UNAVAILABLE


@pytest.mark.parametrize("ends_with", [StatusCode.FAILED_PRECONDITION, StatusCode.OK])
@pytest.mark.parametrize("messages_read", [0, 1, 3])
def test_call_that_ends_while_we_still_send_is_an_error_at_once(
    loop: LoopThread, server: Server, pool: ChannelPool, messages_read: int, ends_with: StatusCode
) -> None:
    """grpc.aio then raises one of several errors, and mostly hides the node's status: hence the repetitions."""

    async def behave(server: Server, context: Context) -> None:
        await server.read(context, messages_read)
        if ends_with is not StatusCode.OK:
            await context.abort(ends_with, "no more")

    server.behave = behave
    caller = GrpcCaller(pool, "s", 512)
    requests = requests_for(0, 1, rows=2000, width=512)

    async def scenario() -> list[Collected]:
        return [await collect(caller, server.info, requests) for _ in range(20)]

    plain = StatusCode.DATA_LOSS if ends_with is StatusCode.OK else ends_with
    for collected in loop.run(scenario()):
        assert collected.status in (plain, StatusCode.UNAVAILABLE)
        assert collected.seconds < LONG / 3
    assert server.calls == 20


# Silence and interruption


async def says_nothing(server: Server, context: Context) -> None:
    await server.read(context)
    await asyncio.sleep(LONG)


async def stops_after_one_answer(server: Server, context: Context) -> None:
    await sends(*ANSWERED_0)(server, context)
    await asyncio.sleep(LONG)


async def trickles(server: Server, context: Context) -> None:
    await sends(reply(0))(server, context)
    while True:
        await context.write(CallReply(chunk=b"\0"))
        await asyncio.sleep(SHORT / 4)


async def reads_nothing(server: Server, context: Context) -> None:
    await asyncio.sleep(LONG)


async def does_not_end(server: Server, context: Context) -> None:
    await answer_all(server, context)
    await asyncio.sleep(LONG)


@pytest.mark.parametrize(
    ("behave", "answered"),
    [
        (says_nothing, []),
        (stops_after_one_answer, [0]),
        (trickles, []),
        (reads_nothing, []),
        (does_not_end, [1, 0]),
    ],
)
def test_silence_ends_at_the_deadline(
    loop: LoopThread, server: Server, caller: GrpcCaller, behave: Behaviour, answered: list[int]
) -> None:
    server.behave = behave
    collected = loop.run(collect(caller, server.info, requests_for(0, 1), deadline_s=SHORT))
    assert collected.status is StatusCode.DEADLINE_EXCEEDED
    assert [answer.index for answer in collected.answers] == answered
    assert SHORT * 0.9 <= collected.seconds < LONG / 3


def test_node_that_takes_no_payload_ends_at_the_deadline(
    loop: LoopThread, server: Server, pool: ChannelPool
) -> None:
    server.behave = reads_nothing
    requests = requests_for(0, rows=8000, width=512)  # 16 MB, more than the transport takes in by itself
    caller = GrpcCaller(pool, "s", 512)
    collected = loop.run(collect(caller, server.info, requests, deadline_s=SHORT))
    assert collected.status in (StatusCode.DEADLINE_EXCEEDED, StatusCode.UNAVAILABLE)
    assert collected.seconds < LONG / 3
    assert caller.bytes_sent < requests[0].inputs.nbytes


def test_no_time_left_is_deadline_exceeded(loop: LoopThread, server: Server, caller: GrpcCaller) -> None:
    collected = loop.run(collect(caller, server.info, requests_for(0), deadline_s=-1.0))
    assert collected.status is StatusCode.DEADLINE_EXCEEDED
    assert not collected.answers


@pytest.mark.parametrize("behave", [says_nothing, reads_nothing])
def test_channel_that_the_pool_closes_ends_its_calls_with_unavailable(
    loop: LoopThread, server: Server, behave: Behaviour
) -> None:
    server.behave = behave
    pool = ChannelPool(limit=1)
    rows = 8000 if behave is reads_nothing else 3
    caller = GrpcCaller(pool, "s", 512)

    async def scenario() -> Collected:
        call = asyncio.create_task(collect(caller, server.info, requests_for(0, rows=rows, width=512)))
        await until(lambda: server.running == 1)
        await pool.get("127.0.0.1:1", server.info.certificate_pem)  # takes the only place
        return await call

    collected = loop.run(scenario())
    assert collected.status is StatusCode.UNAVAILABLE
    assert collected.seconds < LONG / 3
    loop.run(pool.close())


@pytest.mark.parametrize("behave", [says_nothing, stops_after_one_answer, reads_nothing])
def test_cancelling_the_caller_is_felt_as_such_and_ends_the_call_at_the_server(
    loop: LoopThread, server: Server, caller: GrpcCaller, behave: Behaviour
) -> None:
    server.behave = behave

    async def scenario() -> bool:
        call = asyncio.create_task(collect(caller, server.info, requests_for(0, 1)))
        await until(lambda: server.running == 1)
        call.cancel()
        await asyncio.wait([call])
        await until(lambda: server.running == 0)
        return call.cancelled()

    assert loop.run(scenario())


def test_consumer_that_stops_early_ends_the_call_at_the_server(
    loop: LoopThread, server: Server, caller: GrpcCaller
) -> None:
    server.behave = stops_after_one_answer

    async def scenario() -> None:
        answers = caller.call(server.info, "forward", requests_for(0, 1), LONG)
        assert (await anext(answers)).index == 0
        await answers.aclose()  # type: ignore[attr-defined]  # it is a generator, though promised is an iterator
        await until(lambda: server.running == 0)

    loop.run(scenario())
