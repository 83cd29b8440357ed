"""Fetching experts' states from other nodes, and the snapshots that others fetch from here."""

import asyncio
import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import grpc
import torch
from grpc import StatusCode
from hivemind.p2p import PeerID

from dht.manifest import Manifest
from dht.registry import NodeInfo
from dht.uid import UID
from expert_server.blocks import weightless_block
from expert_server.expert import Expert
from expert_server.runtime import Runtime
from expert_server.state_format import Checkpoint, from_bytes, to_bytes
from peer import PROTOCOL_VERSION
from peer.channels import ChannelPool
from peer.codec import MAX_CHUNK_BYTES
from peer.errors import ExpertError, StateError, TransferError
from peer.rates import Rate
from peer.wire import state_pb2, state_pb2_grpc

logger = logging.getLogger(__name__)

_ATTEMPTS = 5
"""How often a fetch is begun or resumed."""
_BUSY_ATTEMPTS = 20
"""How often it is tried at a node that others keep busy."""
_BACKOFF_S = 0.2
"""Before the second attempt; it doubles with each, up to eight times."""
_STALL_S = 30.0
"""Longest that the next chunk may take."""
_ASK_S = 5.0
"""Longest that a peer may take to answer an Ask."""
_MAX_UPDATE_COUNT = 10**15
_CHANNELS = 64


@dataclass
class TransferCounts:
    """Counts since the start."""

    fetched: int = 0
    failed: int = 0
    """Fetches that ended without the whole state."""
    broken: int = 0
    """States that came and were refused."""
    bytes_sent: int = 0
    bytes_received: int = 0


@dataclass(frozen=True, eq=False)
class Snapshot:
    """One expert's state at one moment, as others fetch it."""

    uid: UID
    update_count: int
    generation: object
    """Of the expert at that moment."""
    met: Mapping[PeerID, int]
    """The meetings at that moment."""
    data: bytes
    sha256: bytes
    expires_at: float


class Snapshots:
    """A bounded memory of snapshots. Pure: `now` is passed in."""

    def __init__(self, limit: int, lifetime_s: float) -> None:
        self.lifetime_s = lifetime_s
        self._limit = limit
        self._kept: OrderedDict[tuple[UID, bytes], Snapshot] = OrderedDict()  # oldest first

    def put(self, snapshot: Snapshot, now: float) -> None:
        self._drop_expired(now)
        self._kept[snapshot.uid, snapshot.sha256] = snapshot
        while len(self._kept) > self._limit:
            self._kept.popitem(last=False)

    def find(self, uid: UID, sha256: bytes, now: float) -> Snapshot | None:
        self._drop_expired(now)
        return self._kept.get((uid, sha256))

    def current(self, expert: Expert, met: Mapping[PeerID, int], now: float) -> Snapshot | None:
        """One of the expert as it is now."""
        self._drop_expired(now)
        state = expert.uid, expert.update_count, expert.generation, met
        for kept in self._kept.values():
            if (kept.uid, kept.update_count, kept.generation, kept.met) == state:
                return kept
        return None

    def __len__(self) -> int:
        return len(self._kept)

    def _drop_expired(self, now: float) -> None:
        for key in [key for key, snapshot in self._kept.items() if snapshot.expires_at <= now]:
            del self._kept[key]


class SnapshotTaker:
    """Takes snapshots of the experts of one runtime: tensors on its compute thread, the rest on another."""

    def __init__(
        self,
        runtime: Runtime,
        snapshots: Snapshots,
        swarm_id: str,
        met: Callable[[UID], Mapping[PeerID, int]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runtime = runtime
        self._snapshots = snapshots
        self._swarm_id = swarm_id
        self._met = met
        self._clock = clock
        self._taking = asyncio.Lock()

    async def take(self, uid: UID) -> Snapshot:
        """Of the expert as it is now. Raises ExpertError (NOT_FOUND), and StateError when a number is not finite."""
        async with self._taking:
            expert = self._runtime.experts.get(uid)
            if expert is None:
                raise ExpertError(StatusCode.NOT_FOUND, f"expert {uid} is not hosted here")
            met = self._met(uid)
            snapshot = self._snapshots.current(expert, met, self._clock())
            if snapshot is None:
                checkpoint, generation = await self._runtime.run(partial(_export, expert))
                data, sha256 = await asyncio.to_thread(_seal, checkpoint, self._swarm_id, uid)
                expires_at = self._clock() + self._snapshots.lifetime_s
                snapshot = Snapshot(uid, checkpoint.update_count, generation, met, data, sha256, expires_at)
                self._snapshots.put(snapshot, self._clock())
            return snapshot

    def find(self, uid: UID, sha256: bytes) -> Snapshot | None:
        """One that was taken before, while it is kept."""
        return self._snapshots.find(uid, sha256, self._clock())


def _export(expert: Expert) -> tuple[Checkpoint, object]:
    return Checkpoint(expert.export_state(), expert.update_count), expert.generation


def _seal(checkpoint: Checkpoint, swarm_id: str, uid: UID) -> tuple[bytes, bytes]:
    data = to_bytes(checkpoint, swarm_id, uid, time.time())
    return data, hashlib.sha256(data).digest()


@dataclass(frozen=True, eq=False)
class Fetched:
    """What another node gave."""

    checkpoint: Checkpoint
    sha256: bytes
    met_update_count: int
    """Of the last meeting with this peer, as the other remembers it."""


@dataclass
class _Download:
    """What of a snapshot has come so far."""

    header: state_pb2.StateHeader | None = None
    data: bytearray = field(default_factory=bytearray)

    @property
    def is_whole(self) -> bool:
        return self.header is not None and len(self.data) == self.header.total_bytes


class StateClient:
    """Fetches states from the nodes of one swarm, whose certificates it pins. Close it when done."""

    def __init__(
        self, swarm_id: str, manifest: Manifest, peer_id: PeerID, down: Rate, max_transfer_s: float
    ) -> None:
        """`down`: how fast states may come. `max_transfer_s`: longest that one may take, all attempts together."""
        self.counts = TransferCounts()
        self._down = down
        self._swarm_id = swarm_id
        self._peer_id = peer_id
        self._max_transfer_s = max_transfer_s
        self._max_bytes = largest_state_bytes(manifest)
        self._channels = ChannelPool(_CHANNELS)

    async def close(self) -> None:
        await self._channels.close()

    async def fetch(self, node: NodeInfo, uid: UID, sha256: bytes = b"") -> Fetched:
        """The expert's state at that node: now, or at the snapshot with this checksum.

        Raises TransferError when it did not come, and StateError when what came is not that expert's whole state.
        Names, shapes and numbers are for the expert to check.
        """
        try:
            async with asyncio.timeout(self._max_transfer_s):
                header, data = await self._download(node, uid, sha256)
                fetched = await asyncio.to_thread(self._open, header, data, uid)
        except TimeoutError:
            self.counts.failed += 1
            raise TransferError(
                f"expert {uid} did not come from {node.peer_id} within {self._max_transfer_s:.0f} s"
            ) from None
        except TransferError:
            self.counts.failed += 1
            raise
        except StateError:
            self.counts.broken += 1
            raise
        self.counts.fetched += 1
        return fetched

    async def ask(
        self,
        node: NodeInfo,
        reason: "state_pb2.AskReason",
        uids: Collection[UID],
        sha256: bytes = b"",
        base_sha256: bytes = b"",
    ) -> int:
        """How many of the experts the node will look at, from the first on; 0 when it does not answer."""
        request = state_pb2.AskRequest(
            protocol_version=PROTOCOL_VERSION,
            swarm_id=self._swarm_id,
            peer_id=self._peer_id.to_bytes(),
            reason=reason,
            uids=map(str, uids),
            sha256=sha256,
            base_sha256=base_sha256,
        )
        try:
            stub = await self._stub(node)
            reply = await stub.Ask(request, timeout=_ASK_S)
        except (grpc.aio.AioRpcError, TransferError) as error:
            logger.debug("%s was asked in vain: %s", node.peer_id, error)
            return 0
        return min(int(reply.accepted), len(uids))

    async def _stub(self, node: NodeInfo) -> Any:
        if not node.addresses:
            raise TransferError(f"{node.peer_id} has no address")
        channel = await self._channels.get(node.addresses[0], node.certificate_pem)
        return state_pb2_grpc.StateServiceStub(channel)

    async def _download(self, node: NodeInfo, uid: UID, sha256: bytes) -> tuple[state_pb2.StateHeader, bytes]:
        """Begins, and goes on where it was cut off, while the other keeps the snapshot."""
        stub, download = await self._stub(node), _Download()
        attempts = busy = 0
        while True:
            try:
                await self._receive(stub, uid, sha256, download)
                reason = "the stream ended early"
            except grpc.aio.AioRpcError as error:
                reason = f"{error.code().name}: {error.details()}"
                busy += error.code() is StatusCode.RESOURCE_EXHAUSTED
                if error.code() is StatusCode.FAILED_PRECONDITION and download.header and not sha256:
                    download = _Download()  # the snapshot is gone, as after a restart: begin anew
                elif error.code() not in _PASSING:
                    raise TransferError(
                        f"{node.peer_id} did not give expert {uid}: {reason}", True
                    ) from error
            if download.header is not None and download.is_whole:
                return download.header, bytes(download.data)
            attempts += 1
            if attempts - busy >= _ATTEMPTS or busy >= _BUSY_ATTEMPTS:
                raise TransferError(
                    f"expert {uid} did not come from {node.peer_id}: {reason}", answered=busy > 0
                )
            await asyncio.sleep(_BACKOFF_S * 2 ** min(attempts - 1, 3))

    async def _receive(self, stub: Any, uid: UID, sha256: bytes, download: _Download) -> None:
        begun = download.header
        request = state_pb2.FetchRequest(
            protocol_version=PROTOCOL_VERSION,
            swarm_id=self._swarm_id,
            uid=str(uid),
            peer_id=self._peer_id.to_bytes(),
            sha256=begun.sha256 if begun is not None else sha256,
            offset=len(download.data),
        )
        call = stub.Fetch(request, timeout=self._max_transfer_s)
        try:
            download.header = self._checked(await _next(call), begun, sha256)
            while (reply := await _next(call)) is not grpc.aio.EOF:
                self._take_chunk(reply, download)
                await self._down.take(len(reply.chunk))
        except TimeoutError:
            raise TransferError(f"expert {uid} stalled on its way for {_STALL_S:.0f} s") from None
        finally:
            call.cancel()

    def _checked(
        self, reply: Any, begun: state_pb2.StateHeader | None, sha256: bytes
    ) -> state_pb2.StateHeader:
        if reply is grpc.aio.EOF:
            raise StateError("a state must begin with its header")
        header: state_pb2.StateHeader = reply.header
        if reply.WhichOneof("part") != "header" or len(header.sha256) != 32:
            raise StateError("a state must begin with its header")
        if header.total_bytes > self._max_bytes:
            raise StateError(
                f"a state of {header.total_bytes} bytes; an expert of this swarm has at most {self._max_bytes}"
            )
        if header.update_count > _MAX_UPDATE_COUNT:
            raise StateError(f"a state after {header.update_count} updates; nobody takes so many")
        if (begun is not None and header != begun) or (sha256 and header.sha256 != sha256):
            raise StateError("it is another snapshot than was asked for")
        return header

    def _take_chunk(self, reply: state_pb2.FetchReply, download: _Download) -> None:
        chunk = reply.chunk
        assert download.header is not None, "the header came first"
        if reply.WhichOneof("part") != "chunk" or not 1 <= len(chunk) <= MAX_CHUNK_BYTES:
            raise StateError(f"after the header come chunks of 1 to {MAX_CHUNK_BYTES} bytes")
        if len(download.data) + len(chunk) > download.header.total_bytes:
            raise StateError("the state is longer than its header says")
        download.data += chunk
        self.counts.bytes_received += len(chunk)

    def _open(self, header: state_pb2.StateHeader, data: bytes, uid: UID) -> Fetched:
        if hashlib.sha256(data).digest() != header.sha256:
            raise StateError("its checksum does not match: it was changed on its way")
        checkpoint = from_bytes(data, self._swarm_id, uid, header.update_count)
        return Fetched(checkpoint, header.sha256, header.met_update_count)


async def _next(call: Any) -> Any:
    """The next message, or EOF. Raises AioRpcError, and TimeoutError."""
    async with asyncio.timeout(_STALL_S):
        return await call.read()


_PASSING = {
    StatusCode.UNAVAILABLE,
    StatusCode.RESOURCE_EXHAUSTED,
    StatusCode.DEADLINE_EXCEEDED,
    StatusCode.CANCELLED,
    StatusCode.INTERNAL,
    StatusCode.UNKNOWN,
}
"""Of a fetch that is worth another attempt."""


def largest_state_bytes(manifest: Manifest) -> int:
    """What the state of one expert may have on the wire, names and header included. Allocates nothing."""
    block = weightless_block(manifest)
    tensors = [tensor for tensor in block.state_dict().values() if torch.is_tensor(tensor)]
    numbers = sum(tensor.nbytes for tensor in tensors) * (1 + manifest.optimizer.moments)
    return numbers + 1024 * (len(tensors) * (2 + manifest.optimizer.moments) + 4)
