"""A real node of two experts on a socket, and calls of it, for tests."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import numpy as np
from expert_fakes import make_request

from dht.announcements import NodeInfo
from dht.manifest import ExpertSpec, Manifest, ModelSpec
from dht.uid import UID
from expert_server.experts.expert import Expert
from expert_server.serving.runtime import Runtime
from expert_server.serving.servicer import CallLimits, ExpertServicer
from peer.codec import Floats
from peer.identity import Identity, certificate_pem
from peer.rpc.channels import SERVER_OPTIONS
from peer.rpc.server import server_credentials
from peer.rpc.sessions import Sessions, SessionServicer
from peer.transport.endpoints import Endpoint
from peer.wire import expert_pb2_grpc, session_pb2_grpc
from trainer_client.dispatch.batches import Answer, Direction, NodeCall, Request
from trainer_client.dispatch.grpc_caller import GrpcCaller

HIDDEN, ROWS = 16, 6
MANIFEST = Manifest(
    name="kept", model=ModelSpec(hidden=HIDDEN, heads=2, context=16), experts=ExpertSpec(grid=(2, 2))
)
UIDS = [UID(0, (0, 0)), UID(0, (1, 1))]
GENEROUS = 2**20


def rows(seed: int) -> Floats:
    return np.random.default_rng(seed).standard_normal((ROWS, HIDDEN), dtype=np.float32)


def request(
    uid: UID, gradients: Floats | None = None, keep: bool = False, answer: Answer | None = None
) -> Request:
    kept = None if answer is None else answer.kept
    return make_request(uid, [4, 2], [0, 1, 2, 5, 3, 4], rows(1), gradients, keep=keep, kept=kept)


@asynccontextmanager
async def a_node(
    path: Path, max_kept_bytes: int, manifest: Manifest = MANIFEST
) -> AsyncIterator[tuple[NodeInfo, Runtime]]:
    identity = Identity.load_or_create(path / "identity.key")
    certificate = identity.make_certificate()
    runtime = Runtime(
        {uid: Expert(uid, manifest) for uid in UIDS}, max_queued_rows=999, max_batch_rows=99, threads=1
    )
    await runtime.start()
    server = grpc.aio.server(options=SERVER_OPTIONS)
    limits = CallLimits(max_call_bytes=2**20, max_call_s=30.0, max_kept_bytes=max_kept_bytes)
    sessions = Sessions("kept-swarm", identity.peer_id)
    expert_pb2_grpc.add_ExpertServiceServicer_to_server(
        ExpertServicer(runtime, manifest, "kept-swarm", limits, sessions), server
    )
    session_pb2_grpc.add_SessionServiceServicer_to_server(SessionServicer(sessions), server)
    port = server.add_secure_port("127.0.0.1:0", server_credentials(identity, certificate))
    await server.start()
    pem = certificate_pem(certificate, identity.peer_id)
    address = (f"127.0.0.1:{port}",)
    try:
        yield (
            NodeInfo(
                identity.peer_id,
                tuple(map(Endpoint, address)),
                pem,
                1,
                "0",
                2,
                2,
                0,
                0,
                0.0,
                (),
                time.time() + 60,
            ),
            runtime,
        )
    finally:
        await server.stop(None)
        await runtime.stop()


async def ask(
    caller: GrpcCaller, node: NodeInfo, direction: Direction, *requests: Request
) -> dict[int, Answer]:
    """The answers, by the place of what they answer among the requests."""
    call = NodeCall(node, direction, requests, 20.0)
    batches = [request.batch for request in requests]
    return {batches.index(answer.batch): answer async for answer in caller.call(call)}
