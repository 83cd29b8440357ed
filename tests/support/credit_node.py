"""A node's server that only takes receipts, on a real socket, and trainers that give them."""

import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from callers import InSession, a_caller, numbered_identity

from dht.announcements import NodeInfo
from dht.receipts import Work
from dht.records import SwarmKeys
from expert_server.credit import CreditServicer, ReceiptBook
from peer.identity import Identity, certificate_pem
from peer.rates import RateLimit
from peer.rpc.calls import make_stub
from peer.rpc.channels import SERVER_OPTIONS, ChannelPool
from peer.rpc.server import server_credentials
from peer.rpc.sessions import Right, SessionClient, Sessions, SessionServicer
from peer.transport.endpoints import Endpoint
from peer.wire import credit_pb2_grpc, session_pb2, session_pb2_grpc

NODE = numbered_identity(2)
KEYS = SwarmKeys("sauna", numbered_identity(0).peer_id)
SWARM = KEYS.swarm_id
FORWARD = (session_pb2.RIGHT_FORWARD,)
SERVED = Work(pairs=10_000, queries=100)
"""The work that a test may say was done for a trainer."""


@dataclass
class CreditNode:
    info: NodeInfo
    book: ReceiptBook
    servicer: CreditServicer | None
    channels: ChannelPool

    def sessions(self, trainer: Identity, rights: Sequence[Right] = FORWARD) -> SessionClient:
        return a_caller(SWARM, trainer, rights)

    async def stub(self, trainer: Identity | None = None, rights: Sequence[Right] = FORWARD) -> Any:
        """A stub for a caller in a session; without a trainer, for a stranger without a session."""
        channel = await self.channels.reach(self.info)
        stub = make_stub(credit_pb2_grpc.CreditServiceStub, channel)
        if trainer is None:
            return stub
        session = await self.sessions(trainer, rights).metadata(NODE.peer_id, channel, 60.0)
        return InSession(stub, session)


@asynccontextmanager
async def credit_node(*, knows_receipts: bool = True) -> AsyncIterator[CreditNode]:
    """`knows_receipts`: False for a release that does not know receipts."""
    sessions, book = Sessions(SWARM, NODE.peer_id), ReceiptBook(SWARM, NODE.peer_id)
    server = grpc.aio.server(options=SERVER_OPTIONS)
    session_pb2_grpc.add_SessionServiceServicer_to_server(SessionServicer(sessions), server)
    certificate = NODE.make_certificate()
    port = server.add_secure_port("127.0.0.1:0", server_credentials(NODE, certificate))
    info = NodeInfo(
        peer_id=NODE.peer_id,
        addresses=(Endpoint(f"127.0.0.1:{port}"),),
        certificate_pem=certificate_pem(certificate, NODE.peer_id),
        expires_at=1e12,
    )
    node = CreditNode(info, book, None, ChannelPool(16))
    if knows_receipts:
        node.servicer = CreditServicer(book, sessions, RateLimit(None))
        credit_pb2_grpc.add_CreditServiceServicer_to_server(node.servicer, server)
    await server.start()
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(server.stop, None)
        stack.push_async_callback(node.channels.close)
        yield node
