"""A server of experts over real TLS, right calls to be spoilt, and what came of them, for tests."""

import asyncio
import contextlib
import logging
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import pytest
import torch
from callers import InSession, numbered_identity, opened
from grpc import StatusCode
from torch import Tensor

from dht.manifest import Manifest
from dht.uid import UID
from expert_server.experts.expert import Expert
from expert_server.experts.graphs import Rows
from expert_server.probe import ProbeServicer
from expert_server.serving.batching import Direction
from expert_server.serving.runtime import Runtime
from expert_server.serving.servicer import BudgetLimits, CallLimits, ExpertServicer
from expert_server.state.servicer import StateServicer
from expert_server.state.transfer import SnapshotTaker, TransferMetrics
from peer import PROTOCOL_VERSION
from peer.budget import MemoryBudget
from peer.codec import CHUNK_BYTES, MAX_CHUNK_BYTES
from peer.identity import Identity, certificate_pem
from peer.loop import LoopThread
from peer.rates import Bandwidth, RateLimit
from peer.rpc.channels import CLIENT_OPTIONS
from peer.rpc.server import RpcServer, server_credentials
from peer.rpc.sessions import Metadata, Sessions
from peer.wire import expert_pb2, expert_pb2_grpc, probe_pb2_grpc, state_pb2_grpc

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
_ANOTHER = 101
both_directions = pytest.mark.parametrize("direction", DIRECTIONS)


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
    memory: MemoryBudget
    address: str
    pem: bytes
    channel: grpc.aio.Channel
    identity: Identity
    sessions: Sessions
    session: Metadata
    """What calls of the client carry."""

    @property
    def stub(self) -> Any:
        return self.stub_on(self.channel)

    def stub_on(self, channel: Any) -> Any:
        return InSession(expert_pb2_grpc.ExpertServiceStub(channel), self.session)

    def as_another(self) -> "Edge":
        """The same server, called by another peer."""
        return replace(self, session=opened(self.sessions, self.identity, SWARM, numbered_identity(_ANOTHER)))

    def updates(self) -> int:
        return sum(expert.update_count for expert in self.runtime.experts.values())


@contextlib.asynccontextmanager
async def serving(
    identity: Identity,
    max_call_s: float = 30.0,
    max_call_bytes: int = 4 * 2**20,
    max_queued_rows: int = 65536,
    max_batch_rows: int = 8192,
    budget: BudgetLimits | None = None,
    max_memory_bytes: int = 2**30,
) -> AsyncIterator[Edge]:
    experts = {uid: Expert(uid, MANIFEST) for uid in (FIRST, SECOND, THIRD)}
    runtime = Runtime(experts, max_queued_rows=max_queued_rows, max_batch_rows=max_batch_rows, threads=1)
    await runtime.start()
    certificate = identity.make_certificate()
    sessions = Sessions(SWARM, identity.peer_id)
    server = RpcServer(sessions, 64)
    limits = CallLimits(
        max_call_bytes, max_call_s, budget=budget or BudgetLimits(), max_memory_bytes=max_memory_bytes
    )
    servicer = ExpertServicer(runtime, MANIFEST, SWARM, limits, sessions)
    expert_pb2_grpc.add_ExpertServiceServicer_to_server(servicer, server.services)
    states = StateServicer(
        SnapshotTaker(runtime, SWARM, lambda uid: {}), MANIFEST, SWARM, TransferMetrics(),
        lambda hint: len(hint.uids), RateLimit(None), sessions, max_transfers=4, max_transfer_s=max_call_s,
    )  # fmt: skip
    state_pb2_grpc.add_StateServiceServicer_to_server(states, server.services)
    probe_pb2_grpc.add_ProbeServiceServicer_to_server(ProbeServicer(SWARM, Bandwidth()), server.services)
    port = await server.start(server_credentials(identity, certificate), "127.0.0.1", 0)
    address, pem = f"127.0.0.1:{port}", certificate_pem(certificate, identity.peer_id)
    try:
        async with open_channel(address, pem) as channel:
            session = opened(sessions, identity, SWARM)
            yield Edge(runtime, servicer.memory, address, pem, channel, identity, sessions, session)
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

        self.loop.run(with_server(), 240)


@contextlib.contextmanager
def running(loop: LoopThread, identity: Identity, caplog: pytest.LogCaptureFixture) -> Iterator[Runner]:
    """Fails the test when the server logs an error: a wrong call is not one."""
    yield Runner(loop, identity)
    errors = [record.getMessage() for record in caplog.get_records("call") if record.levelno >= logging.ERROR]
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
            return expert.forward(Rows(self.tensors[index], lengths, positions))
        inputs, gradients = self.tensors[2 * index : 2 * index + 2]
        (gradient,), _ = expert.backward([Rows(inputs, lengths, positions, gradients)])
        return gradient


def chunked(data: bytes, size: int = CHUNK_BYTES) -> list[expert_pb2.CallRequest]:
    return [expert_pb2.CallRequest(chunk=data[n : n + size]) for n in range(0, len(data), size)]


async def exchange(
    edge: Edge,
    direction: Direction,
    requests: Sequence[expert_pb2.CallRequest],
    *,
    ends: bool = True,
    timeout_s: float | None = 60.0,
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
        stub = edge.stub_on(channel)
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


async def wait_until(condition: Callable[[], bool], deadline_s: float = 60.0) -> None:
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


def header_of(call: Call) -> expert_pb2.CallRequest:
    return expert_pb2.CallRequest(header=call.header)


def with_payload(call: Call, data: bytes) -> expert_pb2.CallRequest:
    return expert_pb2.CallRequest(header=call.header, chunk=data)


def piece(data: bytes) -> expert_pb2.CallRequest:
    return expert_pb2.CallRequest(chunk=data)
