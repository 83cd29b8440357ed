"""A host of memories and its callers, on real sockets with TLS."""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from callers import InSession, a_caller, numbered_identity
from memory_folders import SampleMemory
from stranger import new_identity

from dht.announcements import NodeInfo
from dht.memory import MemoryID
from expert_server.memory.servicer import MemoryMetrics, MemoryServicer
from expert_server.memory.store import MemoryStore
from peer import PROTOCOL_VERSION
from peer.identity import Identity, certificate_pem
from peer.loop import LoopThread
from peer.rates import RateLimit
from peer.rpc.channels import SERVER_OPTIONS, ChannelPool
from peer.rpc.parts import PartClient
from peer.rpc.server import server_credentials
from peer.rpc.sessions import Sessions, SessionServicer
from peer.transport.endpoints import Endpoint
from peer.wire import memory_pb2, memory_pb2_grpc, session_pb2, session_pb2_grpc

SWARM = "sauna-QmFounder"
MEMORY_RIGHTS = (session_pb2.RIGHT_MEMORY,)


@dataclass
class Library:
    """Hosts of memories, each at its own address, and their callers."""

    stack: contextlib.AsyncExitStack
    folder: Path
    servers: dict[Identity, int] = field(default_factory=dict)
    certificates: dict[Identity, bytes] = field(default_factory=dict)

    async def host(self, number: int, *memories: SampleMemory, threads: int = 2) -> MemoryServicer:
        """Starts a host that serves all shards of the memories."""
        identity = numbered_identity(number)
        stores = {
            str(self.memory_id(memory)): memory.write(self.folder / f"{number}" / memory.manifest.name)
            for memory in memories
        }
        return await self.serve(identity, stores, threads)

    async def serve(
        self, identity: Identity, stores: dict[str, MemoryStore], threads: int = 2
    ) -> MemoryServicer:
        sessions = Sessions(SWARM, identity.peer_id)
        servicer = MemoryServicer(stores, SWARM, sessions, RateLimit(None), MemoryMetrics(), threads)
        self.stack.push_async_callback(servicer.close)
        await self.serve_any(identity, sessions, servicer)
        return servicer

    async def serve_any(self, identity: Identity, sessions: Sessions, servicer: Any) -> None:
        server = grpc.aio.server(options=SERVER_OPTIONS)
        session_pb2_grpc.add_SessionServiceServicer_to_server(SessionServicer(sessions), server)
        memory_pb2_grpc.add_MemoryServiceServicer_to_server(servicer, server)
        self.certificates[identity] = identity.make_certificate()
        credentials = server_credentials(identity, self.certificates[identity])
        self.servers[identity] = server.add_secure_port("127.0.0.1:0", credentials)
        await server.start()
        self.stack.push_async_callback(server.stop, None)

    def memory_id(self, memory: SampleMemory) -> MemoryID:
        """The id of a memory. All memories have one publisher."""
        return MemoryID.of(memory.manifest.name, numbered_identity(0).peer_id)

    def node(self, number: int) -> NodeInfo:
        identity = numbered_identity(number)
        pem = certificate_pem(self.certificates[identity], identity.peer_id)
        address = Endpoint(f"127.0.0.1:{self.servers[identity]}")
        return NodeInfo(peer_id=identity.peer_id, addresses=(address,), certificate_pem=pem, expires_at=1e12)

    def client(self, identity: Identity | None = None) -> PartClient:
        client = PartClient(SWARM, a_caller(SWARM, identity, MEMORY_RIGHTS), ChannelPool(16), RateLimit(None))
        self.stack.push_async_callback(client.close)
        return client

    async def stub(self, number: int, identity: Identity | None = None) -> InSession:
        """`identity`: the caller's; by default a stranger's."""
        service = self.client(identity or new_identity()).service(2**24)
        return InSession(*await service.stub(self.node(number)))


def in_library(
    loop: LoopThread, folder: Path, scenario: Callable[[Library], Coroutine[Any, Any, None]]
) -> None:
    async def run() -> None:
        async with contextlib.AsyncExitStack() as stack:
            await scenario(Library(stack, folder))

    loop.run(run(), 120)


async def until(is_so: Callable[[], bool], within_s: float = 60.0) -> None:
    async with asyncio.timeout(within_s):
        while not is_so():  # noqa: ASYNC110  # nothing says when
            await asyncio.sleep(0.005)


def search_request(
    memory: MemoryID, k: int, vectors: bytes, *roots: bytes, **more: Any
) -> memory_pb2.SearchRequest:
    return memory_pb2.SearchRequest(
        protocol_version=PROTOCOL_VERSION,
        swarm_id=SWARM,
        memory=str(memory),
        k=k,
        vectors=vectors,
        shards=[memory_pb2.ShardQueries(root=root) for root in roots],
        **more,
    )


def read_request(memory: MemoryID, *wanted: tuple[bytes, list[int]]) -> memory_pb2.ReadRequest:
    return memory_pb2.ReadRequest(
        protocol_version=PROTOCOL_VERSION,
        swarm_id=SWARM,
        memory=str(memory),
        shards=[memory_pb2.ShardPositions(root=root, positions=some) for root, some in wanted],
    )
