"""A node and a peer that fetches states from it, on real sockets."""

import contextlib
import hashlib
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from callers import InSession, a_caller
from checkpoint_samples import AN_UID, MANIFEST

from dht.announcements import NodeInfo
from dht.uid import UID
from expert_server.experts.expert import Expert
from expert_server.experts.format import to_bytes
from expert_server.serving.runtime import Runtime
from expert_server.state.servicer import FetchHint, StateServicer
from expert_server.state.transfer import SnapshotTaker, StateClient
from peer.averaging import AveragingHistory
from peer.identity import Identity, certificate_pem
from peer.loop import LoopThread
from peer.rates import RateLimit
from peer.rpc.channels import SERVER_OPTIONS
from peer.rpc.server import server_credentials
from peer.rpc.sessions import Sessions, SessionServicer
from peer.transport.endpoints import Endpoint
from peer.wire import session_pb2_grpc, state_pb2, state_pb2_grpc

SWARM = "sauna-QmFounder"
CHUNK = 1000

Replies = AsyncIterator[state_pb2.FetchReply]


@dataclass
class Street:
    """Servers come and go at one address, and a client fetches from there."""

    identity: Identity
    stack: contextlib.AsyncExitStack
    certificate: bytes
    client: StateClient
    down: RateLimit
    sessions: Sessions
    port: int = 0
    hints: list[FetchHint] = field(default_factory=list)

    async def serve(self, servicer: Any) -> grpc.aio.Server:
        server = grpc.aio.server(options=SERVER_OPTIONS)
        session_pb2_grpc.add_SessionServiceServicer_to_server(SessionServicer(self.sessions), server)
        state_pb2_grpc.add_StateServiceServicer_to_server(servicer, server)
        credentials = server_credentials(self.identity, self.certificate)
        self.port = server.add_secure_port(f"127.0.0.1:{self.port}", credentials)
        await server.start()
        self.stack.push_async_callback(server.stop, None)
        return server

    async def host(
        self,
        *experts: Expert,
        max_transfers: int = 4,
        limit: int = 4,
        up: RateLimit | None = None,
        **met: int,
    ) -> Runtime:
        """Starts a server of these experts, as a node has it."""
        runtime = Runtime(
            {expert.uid: expert for expert in experts}, max_queued_rows=9, max_batch_rows=9, threads=1
        )
        await runtime.start()
        self.stack.push_async_callback(runtime.stop)
        meetings: AveragingHistory[UID] = AveragingHistory()
        for update_count in met.values():
            meetings.record(AN_UID, self.identity.peer_id, update_count, 0)
        taker = SnapshotTaker(runtime, SWARM, meetings.of, limit)
        servicer = StateServicer(
            taker, MANIFEST, SWARM, self.client.metrics, self.follow, up or RateLimit(None), self.sessions,
            max_transfers=max_transfers, max_transfer_s=30,
        )  # fmt: skip
        await self.serve(servicer)
        return runtime

    async def stub(self) -> InSession:
        return InSession(*await self.client._service.stub(self.node))

    def follow(self, hint: FetchHint) -> int:
        self.hints.append(hint)
        return 1

    @property
    def node(self) -> NodeInfo:
        pem = certificate_pem(self.certificate, self.identity.peer_id)
        address = f"127.0.0.1:{self.port}"
        return NodeInfo(
            peer_id=self.identity.peer_id,
            addresses=(Endpoint(address),),
            certificate_pem=pem,
            expires_at=1e12,
        )


Scenario = Callable[[Street], Coroutine[Any, Any, None]]


def playing(
    loop: LoopThread, identity: Identity, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Scenario], None]:
    """Runs a scenario on a street of its own, with small chunks and short waits."""
    monkeypatch.setattr("peer.rpc.transfer.CHUNK_BYTES", CHUNK)
    monkeypatch.setattr("peer.rpc.transfer._BACKOFF_S", 0.01)

    def run(scenario: Scenario) -> None:
        async def with_street() -> None:
            async with contextlib.AsyncExitStack() as stack:
                down = RateLimit(None)
                client = StateClient(SWARM, MANIFEST, a_caller(SWARM, identity), down, max_transfer_s=20)
                stack.push_async_callback(client.close)
                sessions = Sessions(SWARM, identity.peer_id)
                await scenario(Street(identity, stack, identity.make_certificate(), client, down, sessions))

        loop.run(with_street(), 120)

    return run


def packed(expert: Expert, swarm: str = SWARM) -> bytes:
    return to_bytes(expert.checkpoint(), swarm, expert.uid, 1000.0)


def header_of(data: bytes, **changes: Any) -> state_pb2.FetchReply:
    header = state_pb2.StateHeader(
        update_count=3, total_bytes=len(data), sha256=hashlib.sha256(data).digest()
    )
    for name, value in changes.items():
        setattr(header, name, value)
    return state_pb2.FetchReply(header=header)


async def read_all(call: Any) -> int:
    return len([reply async for reply in call])
