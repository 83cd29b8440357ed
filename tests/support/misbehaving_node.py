"""A real TLS server that misbehaves as told, and calls of it, for tests."""

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import grpc
import numpy as np
from expert_fakes import make_node, make_request, random_rows
from grpc import StatusCode

from dht.announcements import NodeInfo
from dht.uid import UID
from peer.codec import CHUNK_BYTES, Floats
from peer.errors import ExpertError
from peer.identity import Identity, certificate_pem
from peer.loop import LoopThread
from peer.rpc.channels import SERVER_OPTIONS, ChannelPool
from peer.rpc.server import server_credentials
from peer.transport.endpoints import Endpoint
from peer.wire import expert_pb2
from peer.wire.expert_pb2 import CallReply, CallRequest, ExpertReply
from trainer_client.dispatch.batches import Answer, Direction, NodeCall, Request
from trainer_client.dispatch.grpc_caller import GrpcCaller

WIDTH = 8
BYTES = 4 * 3 * WIDTH  # of three rows
LONG = 600.0  # a deadline that no test waits for
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
        self.info = replace(node, addresses=(Endpoint.of("127.0.0.1", port),), certificate_pem=pem)
        return server


@contextlib.contextmanager
def running_server(loop: LoopThread, identity: Identity) -> Iterator[Server]:
    server = Server(make_node(identity.peer_id), answer_all)
    grpc_server = loop.run(server.start(identity))
    yield server
    loop.run(grpc_server.stop(None))


@contextlib.contextmanager
def left_as_it_was(loop: LoopThread, server: Server) -> Iterator[Server]:
    """Afterwards nothing may run that did not run before."""
    server.behave = answer_all
    server.calls = 0
    tasks_before = loop.run(count_tasks())
    yield server
    loop.run(until(lambda: server.running == 0))
    loop.run(until(lambda: len(asyncio.all_tasks()) <= tasks_before))


@contextlib.contextmanager
def open_pool(loop: LoopThread) -> Iterator[ChannelPool]:
    pool = ChannelPool()
    yield pool
    loop.run(pool.close())


async def count_tasks() -> int:
    return len(asyncio.all_tasks())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  # what is waited for are grpc's own tasks: they set no event
            await asyncio.sleep(0.01)


@dataclass
class Collected:
    """What came of a call."""

    requests: Sequence[Request]
    answers: list[Answer] = field(default_factory=list)
    error: ExpertError | None = None
    seconds: float = 0.0

    @property
    def answered(self) -> list[int]:
        """Which of the requests were answered, in the order of the answers."""
        batches = [request.batch for request in self.requests]
        return [batches.index(answer.batch) for answer in self.answers]

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
    collected, began = Collected(requests), time.monotonic()
    try:
        async for answer in caller.call(NodeCall(node, direction, requests, deadline_s)):
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
        make_request(UID(0, (i,)), [rows], range(rows), random_rows(rows, width, seed=i), gradients)
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


ANSWERED_0 = (reply(0), chunk())
