"""A real node with two experts on a socket, and calls to it, for tests."""

import time
import zlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc
import numpy as np
import torch
from expert_fakes import Request
from stranger import new_identity

from dht.announcements import NodeInfo
from dht.manifest import ExpertSpec, Manifest, ModelSpec
from dht.uid import UID
from expert_server.experts.expert import Expert
from expert_server.serving.batching import Entry, Result, WorkItem
from expert_server.serving.runtime import Runtime
from expert_server.serving.servicer import CallLimits, ExpertServicer
from expert_server.state.servicer import StateServicer
from expert_server.state.transfer import SnapshotTaker, TransferMetrics
from peer.codec import Floats
from peer.errors import ExpertError
from peer.identity import certificate_pem
from peer.rates import RateLimit
from peer.rpc.channels import SERVER_OPTIONS
from peer.rpc.server import server_credentials
from peer.rpc.sessions import Sessions, SessionServicer
from peer.transport.endpoints import Endpoint
from peer.wire import expert_pb2_grpc, session_pb2_grpc, state_pb2_grpc

HIDDEN, ROWS = 16, 6
MANIFEST = Manifest(
    name="kept", model=ModelSpec(hidden=HIDDEN, heads=2, context=16), experts=ExpertSpec(grid=(2, 2))
)
UIDS = [UID(0, (0, 0)), UID(0, (1, 1))]
GENEROUS = 2**20


def rows(seed: int) -> Floats:
    return np.random.default_rng(seed).standard_normal((ROWS, HIDDEN), dtype=np.float32)


def request(uid: UID, gradients: Floats | None = None) -> Request:
    return Request(uid, [4, 2], [0, 1, 2, 5, 3, 4], rows(1), gradients)


class LyingRuntime(Runtime):
    """Alters the updates of about one row in `one_in` by a hundredth, whichever expert computes the row."""

    one_in = 100

    def _compute(self, experts: Sequence[Expert], batch: Sequence[Entry]) -> list[Result | ExpertError]:
        return [
            self._altered(entry.work, result) if isinstance(result, Result) else result
            for entry, result in zip(batch, super()._compute(experts, batch), strict=True)
        ]

    def _altered(self, work: WorkItem, result: Result) -> Result:
        if work.direction == "backward":
            return result
        hashes = [zlib.crc32(row.tobytes()) for row in work.rows.inputs.numpy()]
        factors = [1.01 if number % self.one_in == 0 else 1.0 for number in hashes]
        return replace(result, tensor=result.tensor * torch.tensor(factors)[:, None])


@asynccontextmanager
async def a_node(
    max_kept_bytes: int,
    manifest: Manifest = MANIFEST,
    uids: Sequence[UID] = UIDS,
    runtime_class: type[Runtime] = Runtime,
) -> AsyncIterator[tuple[NodeInfo, Runtime]]:
    identity = new_identity()
    certificate = identity.make_certificate()
    runtime = runtime_class(
        {uid: Expert(uid, manifest) for uid in uids}, max_queued_rows=999, max_batch_rows=99, threads=1
    )
    await runtime.start()
    server = grpc.aio.server(options=SERVER_OPTIONS)
    limits = CallLimits(max_call_bytes=2**20, max_call_s=30.0, max_kept_bytes=max_kept_bytes)
    sessions = Sessions("kept-swarm", identity.peer_id)
    expert_pb2_grpc.add_ExpertServiceServicer_to_server(
        ExpertServicer(runtime, manifest, "kept-swarm", limits, sessions), server
    )
    states = StateServicer(
        SnapshotTaker(runtime, "kept-swarm", lambda uid: {}), manifest, "kept-swarm", TransferMetrics(),
        lambda hint: 0, RateLimit(None), sessions,
    )  # fmt: skip
    state_pb2_grpc.add_StateServiceServicer_to_server(states, server)
    session_pb2_grpc.add_SessionServiceServicer_to_server(SessionServicer(sessions), server)
    port = server.add_secure_port("127.0.0.1:0", server_credentials(identity, certificate))
    await server.start()
    pem = certificate_pem(certificate, identity.peer_id)
    address = (f"127.0.0.1:{port}",)
    try:
        yield (
            NodeInfo(
                peer_id=identity.peer_id,
                addresses=tuple(map(Endpoint, address)),
                certificate_pem=pem,
                expires_at=time.time() + 60,
            ),
            runtime,
        )
    finally:
        await server.stop(None)
        await runtime.stop()
