"""A server of experts over real TLS, valid calls that tests corrupt, and the results, for tests."""

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
from scalars import numbers_of, scalars
from torch import Tensor

from dht.manifest import Manifest
from dht.uid import UID
from expert_server.experts.expert import Expert
from expert_server.experts.graphs import Rows
from expert_server.probe import ProbeServicer
from expert_server.serving.batching import Direction
from expert_server.serving.forward_cache import ForwardCache
from expert_server.serving.runtime import Runtime
from expert_server.serving.sequence_cache import SequenceCache
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
from peer.wire import expert_pb2, expert_pb2_grpc, probe_pb2_grpc, session_pb2, state_pb2_grpc

HIDDEN, CONTEXT = 16, 16
SWARM = "sauna-abcdefghijkl"
MANIFEST = Manifest.model_validate(
    {
        "name": "sauna",
        "model": {"layers": 1, "hidden": HIDDEN, "heads": 2, "context": CONTEXT, "feed_forward": 32},
        "experts": {"grid": [2, 2]},
        "routing": {"top_k": 3},
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
    """How a call ended, and what it returned before that."""

    code: StatusCode
    details: str
    replies: list[expert_pb2.CallReply]
    seconds: float


@dataclass
class Edge:
    """A running server and a client of it."""

    runtime: Runtime
    memory: MemoryBudget
    cache: ForwardCache
    sequences: SequenceCache
    address: str
    pem: bytes
    channel: grpc.aio.Channel
    identity: Identity
    sessions: Sessions
    session: Metadata
    """The session that the client's calls carry."""

    @property
    def stub(self) -> Any:
        return self.stub_on(self.channel)

    def stub_on(self, channel: Any) -> Any:
        return InSession(expert_pb2_grpc.ExpertServiceStub(channel), self.session)

    def as_another(self, number: int = _ANOTHER, near: str = "") -> "Edge":
        """The same server with a client that is another peer, in the neighbourhood `near`."""
        caller = numbered_identity(number)
        return replace(self, session=opened(self.sessions, self.identity, SWARM, caller, near))

    @property
    def caller(self) -> str:
        """The name by which the server knows the client."""
        return self.sessions.find(self.session[0][1], session_pb2.RIGHT_FORWARD).name

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
    max_kept_bytes: int = 0,
    threads: int = 1,
) -> AsyncIterator[Edge]:
    experts = {uid: Expert(uid, MANIFEST) for uid in (FIRST, SECOND, THIRD)}
    runtime = Runtime(
        experts, max_queued_rows=max_queued_rows, max_batch_rows=max_batch_rows, threads=threads
    )
    await runtime.start()
    certificate = identity.make_certificate()
    sessions = Sessions(SWARM, identity.peer_id)
    server = RpcServer(sessions, 64)
    limits = CallLimits(
        max_call_bytes,
        max_call_s,
        max_kept_bytes,
        budget=budget or BudgetLimits(),
        max_memory_bytes=max_memory_bytes,
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
            yield Edge(
                runtime,
                servicer.memory,
                servicer.forward_cache,
                servicer.sequences,
                address,
                pem,
                channel,
                identity,
                sessions,
                session,
            )
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


@pytest.fixture
def run(loop: LoopThread, identity: Identity, caplog: pytest.LogCaptureFixture) -> Iterator[Runner]:
    """Fails the test if the server logs an error: a wrong call is not a reason for one."""
    yield Runner(loop, identity)
    errors = [record.getMessage() for record in caplog.get_records("call") if record.levelno >= logging.ERROR]
    assert errors == []


@dataclass
class Call:
    """A valid call that tests corrupt. Each expert has all rows, or those in `rows_of` with the weights in
    `weights_of`.
    """

    direction: Direction = "forward"
    uids: Sequence[UID] = (FIRST,)
    lengths: Sequence[int] = tuple(LENGTHS)
    positions: Sequence[int] = tuple(POSITIONS)
    seed: int = 0
    rows_of: Sequence[Sequence[int]] = ()
    weights_of: Sequence[Sequence[float]] = ()
    inputs: Tensor | None = None
    """Inputs of a call whose forward call was kept; they are not sent."""
    header: expert_pb2.CallHeader = field(init=False)
    tensors: list[Tensor] = field(init=False)
    """The tensors that are sent: inputs and, in a backward call, gradients."""

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        count = 2 if self.direction == "backward" else 1
        self.tensors = [torch.randn(len(self.positions), HIDDEN, generator=generator) for _ in range(count)]
        nothing: Sequence[Sequence[float]] = [()] * len(self.uids)
        experts = [
            expert_pb2.ExpertRows(uid=str(uid), rows=rows, weights=scalars(weights))
            for uid, rows, weights in zip(
                self.uids, self.rows_of or [()] * len(self.uids), self.weights_of or nothing, strict=True
            )
        ]
        self.header = expert_pb2.CallHeader(
            protocol_version=PROTOCOL_VERSION,
            swarm_id=SWARM,
            request_id=random.Random(self.seed).randbytes(16),
            width=HIDDEN,
            codec=expert_pb2.CODEC_FP32,
            segment_lengths=self.lengths,
            positions=self.positions,
            experts=experts,
        )

    @property
    def payload(self) -> bytes:
        return b"".join(tensor.numpy().tobytes() for tensor in self.tensors)

    @property
    def requests(self) -> list[expert_pb2.CallRequest]:
        return [expert_pb2.CallRequest(header=self.header), *chunked(self.payload)]

    def holding(self, *numbers: int, held: Sequence[Sequence[int]] = ()) -> "Call":
        """The same call for sequences with these numbers. `held`: how many of their rows each expert already has."""
        self.header.sequences[:] = numbers
        for expert, counts in zip(self.header.experts, held, strict=False):
            expert.held[:] = counts
        return self

    def keeping(self) -> "Call":
        """The same call, which asks the node to keep it."""
        self.header.keep = True
        return self

    def kept(self, seed: int = 1) -> "Call":
        """The backward call for this call, which the node has kept."""
        backward = Call(
            "backward",
            self.uids,
            self.lengths,
            self.positions,
            seed,
            self.rows_of,
            self.weights_of,
            self.tensors[0],
        )
        del backward.tensors[0]
        for name in ("segment_lengths", "positions", "experts"):
            backward.header.ClearField(name)
        backward.header.kept_request_id = self.header.request_id
        backward.header.kept_rows = len(self.positions)
        return backward

    def rows(self, index: int) -> list[int]:
        """The rows for one of its experts."""
        rows = self.rows_of[index] if self.rows_of else ()
        return list(rows) or list(range(len(self.positions)))

    def weights(self, index: int) -> list[float]:
        weights = self.weights_of[index] if self.weights_of else ()
        return list(weights) or [1.0] * len(self.rows(index))

    def segments(self, index: int) -> tuple[Tensor, Tensor]:
        """The lengths and positions of an expert's segments, computed row by row."""
        ends = [sum(self.lengths[: n + 1]) for n in range(len(self.lengths))]
        owners = [next(n for n, end in enumerate(ends) if row < end) for row in self.rows(index)]
        lengths = [owners.count(n) for n in sorted(set(owners))]
        return torch.tensor(lengths), torch.tensor([self.positions[row] for row in self.rows(index)])

    def expected(self, *experts: Expert | None) -> Tensor:
        """The expected answers [R, D] if the server has these experts. None stands for one that fails.

        Computed row by row, by the formulas of proto/expert.proto.
        """
        return dense_answer(self, list(experts))[0]


def dense_answer(
    call: Call, experts: Sequence[Expert | None], failing_in_backward: Sequence[int] = ()
) -> tuple[Tensor, dict[int, list[float]]]:
    """The answers to rows [R, D] and, in backward, the products of each row. Rows without an answer are NaN."""
    backward = call.direction == "backward"
    inputs = call.tensors[0] if call.inputs is None else call.inputs
    pairs: dict[int, list[tuple[int, int, float]]] = {row: [] for row in range(len(call.positions))}
    updates: dict[int, Tensor] = {}
    for index, expert in enumerate(experts):
        if expert is None:
            continue
        updates[index] = expert.forward(Rows(inputs[call.rows(index)], *call.segments(index)))
        for place, (row, weight) in enumerate(zip(call.rows(index), call.weights(index), strict=True)):
            pairs[row].append((index, place, weight))
    answer = torch.full((len(call.positions), HIDDEN), torch.nan)
    if not backward:
        for row, own in pairs.items():
            if own:
                parts = [weight * updates[index][place].double() for index, place, weight in own]
                answer[row] = (sum(parts, torch.zeros(1)) / sum(weight for *_, weight in own)).float()
        return answer, {}
    gradients, products = call.tensors[-1], dict[int, list[float]]()
    of_experts = {index: torch.zeros(len(call.rows(index)), HIDDEN) for index in updates}
    for row, own in pairs.items():
        for index, place, weight in own:
            of_experts[index][place] = gradients[row] * (weight / sum(other for *_, other in own))
    for index, gradient in of_experts.items():
        expert = experts[index]
        if index in failing_in_backward or expert is None:
            continue
        rows = Rows(inputs[call.rows(index)], *call.segments(index), gradient)
        (of_inputs,), _ = expert.backward([rows])
        for place, row in enumerate(call.rows(index)):
            answer[row] = answer[row].nan_to_num() + of_inputs[place]
            products.setdefault(row, []).append(float(gradients[row] @ updates[index][place]))
    return answer, products


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

    It uses grpc's blocking client: the asyncio client reports INTERNAL if the server ends a call while the client still
    sends. If it is cancelled, so is the call.
    """
    calls: list[Any] = []
    try:
        return await asyncio.to_thread(exchange_now, edge, direction, requests, ends, timeout_s, calls)
    except asyncio.CancelledError:
        for call in calls:
            call.cancel()
        raise


def exchange_now(
    edge: Edge,
    direction: Direction,
    requests: Sequence[expert_pb2.CallRequest],
    ends: bool,
    timeout_s: float | None,
    calls: list[Any],
) -> Outcome:
    """`calls`: gets the call once it has begun."""
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
        calls.append(stream)
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


@dataclass
class Answers:
    """The answers to a call, after the form of the stream has been checked."""

    experts: dict[int, expert_pb2.ExpertReply]
    """The experts' replies, by the expert's index in the call."""
    rows: dict[int, Tensor]
    """[D]"""
    masks: dict[int, int]
    products: dict[int, list[float]]
    is_kept: bool

    @property
    def tensor(self) -> Tensor:
        """The answers [R, D] for all rows up to the last one answered."""
        return torch.stack([self.rows[row] for row in range(len(self.rows))])

    @property
    def failed(self) -> dict[int, StatusCode]:
        status = {code.value[0]: code for code in StatusCode}
        return {index: status[reply.status] for index, reply in self.experts.items() if reply.status}


def answers(call: Call, outcome: Outcome) -> Answers:
    assert outcome.code is StatusCode.OK, outcome.details
    found = Answers({}, {}, {}, {}, False)
    experts_of = [
        [i for i in range(len(call.uids)) if row in call.rows(i)] for row in range(len(call.positions))
    ]
    payload = memoryview(b"".join(reply.chunk for reply in outcome.replies))
    for reply in outcome.replies:
        assert len(reply.chunk) <= MAX_CHUNK_BYTES
        assert not found.is_kept, "it is said in the last message"
        found.is_kept = reply.kept
        for expert in reply.experts:
            assert expert.index not in found.experts
            found.experts[expert.index] = expert
        for block in reply.rows:
            rows = list(block.rows) or list(range(len(call.positions)))
            masks = list(block.masks) or [2 ** len(experts_of[row]) - 1 for row in rows]
            assert rows == sorted(set(rows))
            data, payload = bytearray(payload[: block.payload_bytes]), payload[block.payload_bytes :]
            tensor, products = (
                torch.frombuffer(data, dtype=torch.float32).view(len(rows), HIDDEN),
                numbers_of(block.products),
            )
            for row, mask, numbers in zip(rows, masks, tensor, strict=True):
                assert row not in found.rows
                assert 0 < mask < 2 ** len(experts_of[row])
                own = [index for bit, index in enumerate(experts_of[row]) if mask >> bit & 1]
                assert all(index in found.experts and not found.experts[index].status for index in own)
                found.rows[row], found.masks[row] = numbers, mask
                if call.direction == "backward":
                    found.products[row], products = products[: len(own)], products[len(own) :]
            assert not products
    assert not payload
    assert set(found.experts) == set(range(len(call.uids)))
    return found


async def check_it_goes_on(edge: Edge) -> None:
    call = Call(uids=[THIRD], seed=99)
    torch.testing.assert_close(
        answers(call, await make(edge, call)).tensor, call.expected(Expert(THIRD, MANIFEST))
    )


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
