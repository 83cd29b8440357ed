"""A real TLS server that misbehaves as it is told, and calls to it, for tests."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import grpc
import numpy as np
import pytest
from callers import numbered_identities
from expert_fakes import Collected, Request, collect, make_call, make_node, random_rows

from dht.announcements import NodeInfo
from dht.uid import UID
from peer.codec import CHUNK_BYTES, Floats
from peer.identity import Identity, certificate_pem
from peer.loop import LoopThread
from peer.rpc.channels import SERVER_OPTIONS, ChannelPool
from peer.rpc.server import server_credentials
from peer.transport.endpoints import Endpoint
from peer.wire import expert_pb2
from peer.wire.expert_pb2 import AnsweredRows, CallReply, CallRequest, ExpertReply
from trainer_client.dispatch.batches import Direction
from trainer_client.dispatch.grpc_caller import GrpcCaller

WIDTH = 8
BYTES = 4 * 3 * WIDTH  # of three rows
LONG = 600.0  # a deadline that no test waits for
SHORT = 0.4

Context: TypeAlias = "grpc.aio.ServicerContext[CallRequest, CallReply | bytes]"
Behaviour: TypeAlias = Callable[["Server", Context], Awaitable[None]]


@dataclass
class Server:
    """One node: the messages it received, and how it answers."""

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
        """Reads the next messages, or all."""
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
        self.info = replace(node, addresses=(Endpoint.of("127.0.0.1", port),), certificate_pem=pem)
        return server


@pytest.fixture(scope="module")
def identities() -> list[Identity]:
    return numbered_identities(2)


@pytest.fixture(scope="module")
def running_server(loop: LoopThread, identities: list[Identity]) -> Iterator[Server]:
    server = Server(make_node(identities[0].peer_id), answer_all)
    grpc_server = loop.run(server.start(identities[0]))
    yield server
    loop.run(grpc_server.stop(None))


@pytest.fixture
def server(running_server: Server, loop: LoopThread) -> Iterator[Server]:
    """Checks at the end that nothing runs that did not run before."""
    server = running_server
    server.behave = answer_all
    server.calls = 0
    tasks_before = loop.run(count_tasks())
    yield server
    loop.run(until(lambda: server.running == 0))
    loop.run(until(lambda: len(asyncio.all_tasks()) <= tasks_before))


@pytest.fixture
def pool(loop: LoopThread) -> Iterator[ChannelPool]:
    pool = ChannelPool()
    yield pool
    loop.run(pool.close())


@pytest.fixture
def caller(server: Server, pool: ChannelPool) -> GrpcCaller:
    """Its channels are closed before the server checks what is left."""
    return GrpcCaller(pool, "sauna-1234", WIDTH)


async def count_tasks() -> int:
    return len(asyncio.all_tasks())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  # what is waited for are grpc's own tasks: they set no event
            await asyncio.sleep(0.01)


async def ask_in_vain(
    caller: GrpcCaller,
    node: NodeInfo,
    requests: Sequence[Request],
    *,
    deadline_s: float = LONG,
    direction: Direction = "forward",
) -> Collected:
    """Makes a call that may fail in any way."""
    return await collect(caller, make_call(node, direction, requests, deadline_s))


def requests_for(
    *experts: int, rows: int = 3, gradients: Floats | None = None, width: int = WIDTH
) -> list[Request]:
    """Requests for rows. The inputs for expert i come from seed i."""
    return [
        Request(UID(0, (i,)), [rows], range(rows), random_rows(rows, width, seed=i), gradients)
        for i in experts
    ]


def answer(expert: int, size: int = BYTES, rows: int = 3) -> CallReply:
    """The message before the tensor of an expert's rows, if each expert has `rows` rows of its own."""
    places = range(rows * expert, rows * (expert + 1))
    return CallReply(
        experts=[ExpertReply(index=expert)], rows=[AnsweredRows(rows=places, payload_bytes=size)]
    )


def both() -> CallReply:
    """The message of two experts, in one block."""
    return CallReply(
        experts=[ExpertReply(index=0), ExpertReply(index=1)], rows=[AnsweredRows(payload_bytes=2 * BYTES)]
    )


def chunk(size: int = BYTES, number: float = 1.0) -> CallReply:
    return CallReply(chunk=np.full(size // 4, number, "<f4").tobytes() + bytes(size % 4))


def sends(*messages: CallReply | bytes) -> Behaviour:
    """Reads all messages, sends these, and ends the call with OK."""

    async def behave(server: Server, context: Context) -> None:
        await server.read(context)
        for message in messages:
            await context.write(message)

    return behave


async def answer_all(server: Server, context: Context) -> None:
    """A correct node, whose experts double their rows. It answers expert by expert in reverse order; each has its own
    rows.
    """
    await server.read(context)
    header = server.header
    assert header is not None
    rows = len(header.positions)
    tensor = np.frombuffer(server.payload, "<f4").reshape(-1, header.width)
    assert len(tensor) == rows * (2 if server.direction == "backward" else 1)
    for index, expert in reversed(list(enumerate(header.experts))):
        places = expert.rows or range(rows)
        data = (2 * tensor[list(places)]).tobytes()
        about = AnsweredRows(rows=places, payload_bytes=len(data))
        if server.direction == "backward":
            about.products = bytes(4 * len(places))
        await context.write(CallReply(experts=[ExpertReply(index=index)], rows=[about]))
        for at in range(0, len(data), CHUNK_BYTES):
            await context.write(CallReply(chunk=data[at : at + CHUNK_BYTES]))


ANSWERED_0 = (answer(0), chunk())
