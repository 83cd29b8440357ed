"""For spot checks: fetches the parameters of an answer from the node that gave it."""

import asyncio
from dataclasses import dataclass
from typing import Literal, TypeAlias

import grpc
from grpc import StatusCode

from dht.announcements import NodeInfo
from dht.uid import UID
from peer import PROTOCOL_VERSION
from peer.errors import ExpertError, StateError, TransferError, UnreachableError, VersionGoneError
from peer.formatting import printable
from peer.rates import RateLimit
from peer.rpc.calls import make_stub, while_open
from peer.rpc.channels import ChannelPool
from peer.rpc.sessions import SessionClient
from peer.rpc.transfer import SnapshotReceiver, receive
from peer.wire import state_pb2, state_pb2_grpc

Precision: TypeAlias = Literal["fp32", "tf32", "bf16"]
"""How a node computes, according to the node."""

_PRECISIONS: dict[int, Precision] = {
    state_pb2.PRECISION_FP32: "fp32",
    state_pb2.PRECISION_TF32: "tf32",
    state_pb2.PRECISION_BF16: "bf16",
}


@dataclass(frozen=True, eq=False)
class FetchedBlock:
    """An expert's parameters at one version, as a node gave them."""

    data: bytes
    """A checkpoint of the block alone, not parsed yet."""
    precision: Precision


class BlockClient:
    """Asks nodes for parameters. Tries only once, because later the parameters have changed."""

    def __init__(self, channels: ChannelPool, sessions: SessionClient, swarm_id: str, max_bytes: int) -> None:
        """`sessions`: with RIGHT_FORWARD. `max_bytes`: the limit for an expert's encoded parameters."""
        self._channels = channels
        self._sessions = sessions
        self._swarm_id = swarm_id
        self._max_bytes = max_bytes
        self._down = RateLimit(None)

    async def fetch(self, node: NodeInfo, uid: UID, version: int, deadline_s: float) -> FetchedBlock:
        """Raises TransferError, or its subclass VersionGoneError, if the parameters did not arrive, and StateError if
        what arrived can't be right.
        """
        incoming = SnapshotReceiver(self._max_bytes, lambda size: None)
        try:
            async with asyncio.timeout(deadline_s):
                await self._receive(node, uid, version, deadline_s, incoming)
        except TimeoutError:
            raise TransferError(f"expert {uid} of {node.peer_id} did not arrive in time") from None
        header, data = await asyncio.to_thread(incoming.whole)
        precision = _PRECISIONS.get(header.precision)
        if precision is None:
            raise StateError(
                f"node {node.peer_id} computes in precision {header.precision}, which is not known"
            )
        return FetchedBlock(data, precision)

    async def _receive(
        self, node: NodeInfo, uid: UID, version: int, deadline_s: float, incoming: SnapshotReceiver
    ) -> None:
        request = state_pb2.FetchRequest(
            protocol_version=PROTOCOL_VERSION, swarm_id=self._swarm_id, uid=str(uid), version=version
        )
        try:
            channel = await self._channels.reach(node)
            session = await self._sessions.metadata(node.peer_id, channel, deadline_s)
            stub = make_stub(state_pb2_grpc.StateServiceStub, channel)
            with while_open():
                call = stub.Fetch(request, timeout=deadline_s, metadata=session)
                try:
                    await receive(call, incoming, self._down)
                finally:
                    call.cancel()
        except grpc.aio.AioRpcError as error:
            if error.code() is StatusCode.UNAUTHENTICATED:
                self._sessions.ended(node.peer_id, session)
            gone = error.code() is StatusCode.FAILED_PRECONDITION
            said = f"{error.code().name}: {printable(error.details() or '')}"
            raise (VersionGoneError if gone else TransferError)(said) from error
        except (ExpertError, UnreachableError) as error:
            raise TransferError(str(error)) from error
        if not incoming.is_whole:
            raise TransferError(f"expert {uid} of {node.peer_id} was cut off")
