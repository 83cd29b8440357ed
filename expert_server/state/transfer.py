"""Fetches the states of experts from other nodes, and takes the snapshots that they fetch from this one."""

import asyncio
import hashlib
import logging
import math
import time
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, TypeAlias, get_args

import grpc
from grpc import StatusCode
from prometheus_client import CollectorRegistry, Counter

from dht.announcements import NodeInfo
from dht.manifest import Manifest
from dht.uid import UID
from expert_server.experts.devices import Precision
from expert_server.experts.expert import Expert
from expert_server.experts.format import (
    Checkpoint,
    State,
    StateForm,
    block_from_bytes,
    from_bytes,
    to_bytes,
)
from expert_server.serving.runtime import Runtime
from peer import PROTOCOL_VERSION
from peer.averaging import Meeting
from peer.bounded import BoundedDict, Owner
from peer.errors import ExpertError, StateError, TransferError
from peer.identity import PeerID
from peer.loop import TaskSet
from peer.metrics import start_at_zero
from peer.parsing import ParseGuard
from peer.rates import Backoff, RateLimit, TokenBucket, TokenBuckets
from peer.rpc.calls import while_open
from peer.rpc.channels import ChannelPool
from peer.rpc.sessions import Metadata, SessionClient
from peer.rpc.transfer import SnapshotCache, SnapshotClient, SnapshotReceiver
from peer.wire import state_pb2, state_pb2_grpc

logger: logging.Logger = logging.getLogger(__name__)

MAX_TRANSFER_S = 600.0
"""The longest time for fetching a state."""
MAX_SNAPSHOTS = 8
"""How many states are kept in memory for the nodes that fetch them."""
SNAPSHOT_S = 300.0
"""How long they are kept."""
_MAX_EXPORTED = 4
"""How many experts' parameters are kept in memory for peers that export the model. If one is dropped, an interrupted
export fetches that expert from the beginning.
"""
_PEER_SHARE, _PEER_BURST_S = 0.02, 2.0
_GROUP_SHARE, _GROUP_BURST_S = 0.05, 5.0
_ALL_SHARE, _ALL_BURST_S = 0.1, 10.0
"""The shares of its time that a node spends on new snapshots for one peer, for one group of peers (`Session.group`) and
for all, and how many seconds of that may be saved up. Beyond that, peers get the newest existing snapshot, or none.
"""
_MAX_BLOCKS = 8
"""Parameters that are copied for peers at the same time."""
_ASK_S = 5.0
"""The longest time that a peer may take to answer an Ask."""
_SOON_S = 5.0
"""A fetch that fails within this time costs little."""
_WITHHELD_S, _LONGEST_WITHHELD_S = 60.0, 600.0
"""How long a peer that kept this node waiting for nothing counts as withholding, at first and at most. The time doubles
with each failure.
"""
_REMEMBERED = 4096
"""Peers whose last state is remembered."""
CHANNELS = 64
_PRECISIONS: dict[Precision, state_pb2.Precision] = {
    "fp32": state_pb2.PRECISION_FP32,
    "tf32": state_pb2.PRECISION_TF32,
    "bf16": state_pb2.PRECISION_BF16,
}


class TransferMetrics:
    """What a node counts about the states that it fetches and gives."""

    def __init__(self, metrics: CollectorRegistry | None = None) -> None:
        fetches = Counter(
            "talkoot_state_fetches",
            "Experts' states fetched from other nodes, by outcome.",
            ["outcome"],
            registry=metrics,
        )
        # "failed": it did not arrive completely; "broken": it arrived and was refused
        self.fetches: Counter = start_at_zero(fetches, "fetched", "failed", "broken")
        size = Counter(
            "talkoot_state_bytes",
            "Bytes of experts' states, to and from other nodes.",
            ["direction"],
            registry=metrics,
        )
        self.bytes: Counter = start_at_zero(size, "sent", "received")


@dataclass(frozen=True, eq=False)
class Snapshot:
    """An expert's state at one moment, for other nodes to fetch."""

    uid: UID
    update_count: int
    accumulated_rows: int
    """Rows whose gradients had not led to a step at that moment."""
    generation: object
    """The expert's generation at that moment."""
    met: Mapping[PeerID, Meeting]
    """Its last averages with other peers' replicas, at that moment."""
    data: bytes
    sha256: bytes
    expires_at: float
    _given: dict[PeerID, asyncio.Event] = field(default_factory=dict)
    """An event for each peer that is waited for."""

    @property
    def key(self) -> UID:
        return self.uid

    def given_to(self, peer_id: PeerID) -> asyncio.Event:
        """An event that is set when that peer has fetched the whole snapshot. Call this before the peer is asked to
        fetch.
        """
        return self._given.setdefault(peer_id, asyncio.Event())

    def note_given(self, peer_id: PeerID) -> None:
        if (given := self._given.get(peer_id)) is not None:
            given.set()

    def header(self, caller: PeerID) -> state_pb2.StateHeader:
        return state_pb2.StateHeader(
            update_count=self.update_count,
            total_bytes=len(self.data),
            sha256=self.sha256,
            met_update_count=self.met[caller].mine if caller in self.met else 0,
        )


@dataclass(frozen=True, eq=False)
class Block:
    """An expert's parameters at one version, encoded for a peer that checks their answers, or keeps them."""

    key: UID
    version: int
    data: bytes
    sha256: bytes
    update_count: int
    precision: Precision
    """The precision of the device that computes with them."""
    expires_at: float

    def header(self, caller: PeerID) -> state_pb2.StateHeader:
        return state_pb2.StateHeader(
            update_count=self.update_count,
            total_bytes=len(self.data),
            sha256=self.sha256,
            precision=_PRECISIONS[self.precision],
        )


Purpose: TypeAlias = Literal["state", "check", "export"]
"""The purpose of a copy of an expert."""


class SnapshotTaker:
    """Takes snapshots of the experts of one runtime: tensors on its compute thread, the rest on another."""

    def __init__(
        self,
        runtime: Runtime,
        swarm_id: str,
        met: Callable[[UID], Mapping[PeerID, Meeting]],
        limit: int = MAX_SNAPSHOTS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runtime = runtime
        self._snapshots: SnapshotCache[Snapshot] = SnapshotCache(limit, SNAPSHOT_S)
        self._swarm_id = swarm_id
        self._met = met
        self._clock = clock
        self._taking = asyncio.Lock()
        self._tasks = TaskSet()
        self._of_peer = TokenBuckets[Owner](_PEER_SHARE, _PEER_BURST_S)
        self._of_group = TokenBuckets[tuple[Hashable, Purpose]](_GROUP_SHARE, _GROUP_BURST_S)
        self._blocks = TaskSet()
        self._exported: SnapshotCache[Block] = SnapshotCache(_MAX_EXPORTED, SNAPSHOT_S)
        self._keeps_exported = limit >= MAX_SNAPSHOTS
        purposes = get_args(Purpose)
        self._of_all = {purpose: TokenBucket(_ALL_SHARE, _ALL_BURST_S, clock()) for purpose in purposes}
        """Separate budgets for each purpose, so that peers that check answers can't keep nodes from fetching states.
        """

    async def take(self, uid: UID) -> Snapshot:
        """A snapshot of the expert as it is now. Raises ExpertError (NOT_FOUND), or StateError if it is not finite."""
        return await self._take(uid, None)

    async def take_for(self, owner: Owner, uid: UID) -> Snapshot:
        """A snapshot for a peer that asked. If it asks for new ones too often, it gets the newest existing one.

        Raises ExpertError (RESOURCE_EXHAUSTED) if there is none. A node that is giving up its experts makes as many as
        it is asked for, because none of its updates may be lost.
        """
        return await self._take(uid, None if self._runtime.is_refusing else owner)

    async def block_for(self, owner: Owner, uid: UID, version: int | None) -> Block:
        """The expert's parameters at this version, or at the present one if it is None, for a peer that asked. They are
        not kept.

        Raises ExpertError: FAILED_PRECONDITION if they have changed since, RESOURCE_EXHAUSTED if too many were asked
        for lately, and NOT_FOUND.
        """
        # calls whose peer breaks off continue, and count until they end
        if len(self._blocks) >= _MAX_BLOCKS:
            raise ExpertError(
                StatusCode.RESOURCE_EXHAUSTED,
                "the node is copying other experts' parameters: try again later",
            )
        made = self._blocks.spawn(self._make_block(uid, owner, version), f"take the parameters of {uid}")
        return await asyncio.shield(made)

    async def parameters_for(self, owner: Owner, uid: UID) -> Block:
        """The expert's present parameters, for a peer that keeps them. Raises ExpertError as `block_for`."""
        expert = self._expert(uid)
        for kept in self._exported.all(self._clock()):
            if (kept.key, kept.version) == (uid, expert.version):
                return kept
        block = await self.block_for(owner, uid, None)
        if self._keeps_exported:
            self._exported.put(block, self._clock())
        return block

    async def _make_block(self, uid: UID, owner: Owner, version: int | None) -> Block:
        expert = self._expert(uid)
        purpose: Purpose = "export" if version is None else "check"
        self._require_pace(owner, self._clock(), purpose)

        def copied() -> tuple[int, State | None, int, float]:
            began = self._clock()
            wanted = expert.version if version is None else version
            return wanted, expert.export_block(wanted), expert.update_count, self._clock() - began

        # without the time that the node's other work takes before it
        copied_version, state, count, spent_s = await self._runtime.run(copied)
        if state is None:
            self._count_time(owner, spent_s, purpose)
            raise ExpertError(StatusCode.FAILED_PRECONDITION, "the parameters have changed since")
        began = self._clock()
        data, sha256 = await asyncio.to_thread(_encode, Checkpoint(state, count), self._swarm_id, uid)
        self._count_time(owner, spent_s + self._clock() - began, purpose)
        expires_at = self._clock() + self._exported.lifetime_s
        return Block(uid, copied_version, data, sha256, count, expert.device.precision, expires_at)

    def _expert(self, uid: UID) -> Expert:
        """Raises ExpertError (NOT_FOUND)."""
        expert = self._runtime.experts.get(uid)
        if expert is None:
            raise ExpertError(StatusCode.NOT_FOUND, f"expert {uid} is not hosted here")
        return expert

    async def _take(self, uid: UID, owner: Owner | None) -> Snapshot:
        # shielded, so that the work is not thrown away if a peer breaks off
        return await asyncio.shield(self._tasks.spawn(self._make(uid, owner), f"take a snapshot of {uid}"))

    async def _make(self, uid: UID, owner: Owner | None) -> Snapshot:
        async with self._taking:
            expert = self._expert(uid)
            met = self._met(uid)
            snapshot = self._current(expert, met)
            if snapshot is None and owner is not None:
                snapshot = self._instead(uid, owner)
            if snapshot is None:
                began = self._clock()
                checkpoint, generation = await self._runtime.run(
                    lambda: (expert.checkpoint(), expert.generation)
                )
                met = self._met(uid)  # an average may have changed the expert before it was copied
                data, sha256 = await asyncio.to_thread(_encode, checkpoint, self._swarm_id, uid)
                now = self._clock()
                expires_at = now + self._snapshots.lifetime_s
                snapshot = Snapshot(
                    uid, checkpoint.update_count, checkpoint.accumulated_rows, generation,
                    met, data, sha256, expires_at,
                )  # fmt: skip
                self._snapshots.put(snapshot, now)
                if owner is not None:
                    self._count_time(owner, self._clock() - began, "state")
            return snapshot

    def _instead(self, uid: UID, owner: Owner) -> Snapshot | None:
        """The existing snapshot that a peer gets in place of a new one; None if a new one may be made. Raises
        ExpertError.
        """
        now = self._clock()
        newest = [kept for kept in self._snapshots.all(now) if kept.uid == uid][-1:]
        if newest and self._wait_s(owner, now, "state"):
            return newest[0]
        self._require_pace(owner, now, "state")
        return None

    def _wait_s(self, owner: Owner, now: float, purpose: Purpose) -> float:
        of_group = self._of_group.wait_s((owner.group, purpose), now)
        return max(self._of_peer.wait_s(owner, now), of_group, self._of_all[purpose].take(0.0, now))

    def _require_pace(self, owner: Owner, now: float, purpose: Purpose) -> None:
        """Raises ExpertError (RESOURCE_EXHAUSTED)."""
        if wait_s := self._wait_s(owner, now, purpose):
            message = f"too many new snapshots were asked for lately: come back in {wait_s:.1f} s"
            raise ExpertError(StatusCode.RESOURCE_EXHAUSTED, message, retry_after_s=wait_s)

    def _count_time(self, owner: Owner, spent_s: float, purpose: Purpose) -> None:
        now = self._clock()
        self._of_peer.take(owner, spent_s, now)
        self._of_group.take((owner.group, purpose), spent_s, now)
        self._of_all[purpose].take(spent_s, now)

    @property
    def kept_bytes(self) -> int:
        """Memory of the kept snapshots. For any thread."""
        kept: list[Snapshot | Block] = [*self._snapshots.in_memory, *self._exported.in_memory]
        return sum(len(each.data) for each in kept)

    def find(self, uid: UID, sha256: bytes) -> Snapshot | None:
        """The kept snapshot with this checksum."""
        return self._snapshots.find(uid, sha256, self._clock())

    def find_parameters(self, uid: UID, sha256: bytes) -> Block | None:
        """The kept parameters with this checksum."""
        return self._exported.find(uid, sha256, self._clock())

    def _current(self, expert: Expert, met: Mapping[PeerID, Meeting]) -> Snapshot | None:
        """The kept snapshot of the expert's present state, if there is one."""
        state = expert.uid, expert.update_count, expert.accumulated_rows, expert.generation, met
        for kept in self._snapshots.all(self._clock()):
            if (kept.uid, kept.update_count, kept.accumulated_rows, kept.generation, kept.met) == state:
                return kept
        return None


def _encode(checkpoint: Checkpoint, swarm_id: str, uid: UID) -> tuple[bytes, bytes]:
    """The data, and its SHA-256."""
    data = to_bytes(checkpoint, swarm_id, uid, time.time())
    return data, hashlib.sha256(data).digest()


@dataclass(frozen=True, eq=False)
class Fetched:
    """A state that another node gave."""

    checkpoint: Checkpoint
    sha256: bytes
    met_update_count: int
    """The update count of the other replica after it last met this peer's; 0 if it remembers no meeting."""


class Withholding:
    """Peers that kept this node waiting for a state lately, and gave no valid one. Pure: `now` is an argument."""

    def __init__(self) -> None:
        self._pauses = Backoff[PeerID](_WITHHELD_S, _LONGEST_WITHHELD_S)
        self._gave_at = BoundedDict[PeerID, float](_REMEMBERED)
        """When a peer last gave a state."""

    def gave(self, peer_id: PeerID, now: float) -> None:
        self._gave_at[peer_id] = now
        self._pauses.succeeded(peer_id)

    def failed(self, peer_id: PeerID, began: float, now: float) -> None:
        """Records a fetch that began at that time and failed. It does not count if the peer gave another state
        meanwhile.
        """
        if now - began >= _SOON_S and self._gave_at.get(peer_id, -math.inf) < began:
            self._pauses.failed(peer_id, now)

    def includes(self, peer_id: PeerID, now: float) -> bool:
        return self._pauses.holds_back(peer_id, now)


class StateClient:
    """Fetches states from the nodes of a swarm, and pins their certificates. Close it when done."""

    def __init__(
        self,
        swarm_id: str,
        manifest: Manifest,
        sessions: SessionClient,
        down: RateLimit,
        channels: ChannelPool | None = None,
        max_transfer_s: float = MAX_TRANSFER_S,
        metrics: CollectorRegistry | None = None,
        guard: ParseGuard | None = None,
    ) -> None:
        """`sessions`: show other nodes who fetches. `down`: limits the download of states. `channels`: to other nodes,
        used only here. `max_transfer_s`: the longest time for one state, over all attempts. `guard`: for parsing
        states.
        """
        self.metrics: TransferMetrics = TransferMetrics(metrics)
        self._down = down
        self._swarm_id = swarm_id
        self._form = StateForm.of(manifest)
        self._guard = guard or ParseGuard()
        self._withholding = Withholding()
        self._service = SnapshotClient(
            state_pb2_grpc.StateServiceStub,
            channels or ChannelPool(CHANNELS),
            sessions,
            partial(SnapshotReceiver, self._form.max_bytes, self.metrics.bytes.labels("received").inc),
            open_s=_ASK_S,
            limit_s=max_transfer_s,
        )

    async def close(self) -> None:
        await self._service.close()

    def is_withholding(self, peer_id: PeerID) -> bool:
        """Whether the peer kept this node waiting for a state lately, and gave none. If so, ask others first."""
        return self._withholding.includes(peer_id, time.monotonic())

    async def fetch(
        self, node: NodeInfo, uid: UID, sha256: bytes = b"", *, parameters: bool = False
    ) -> Fetched:
        """The expert's state at that node: now, or in the snapshot with this checksum. `parameters`: without the
        optimizer's state.

        Raises TransferError if it did not arrive, and StateError if it is not that expert's whole state. The expert
        itself has to check names, shapes and numbers.
        """
        request = state_pb2.FetchRequest(
            protocol_version=PROTOCOL_VERSION,
            swarm_id=self._swarm_id,
            uid=str(uid),
            sha256=sha256,
            parameters=parameters,
        )
        what, began, outcome = f"expert {uid} of {node.peer_id}", time.monotonic(), "failed"
        try:
            incoming = await self._service.download(node, "Fetch", request, what, self._down)
            fetched = await asyncio.to_thread(self._open, incoming, uid, node.peer_id, parameters)
            outcome = "fetched"
        except StateError:
            outcome = "broken"
            raise
        finally:  # also if it is broken off, because others wait
            self.metrics.fetches.labels(outcome).inc()
            if outcome == "fetched":
                self._withholding.gave(node.peer_id, time.monotonic())
            else:
                self._withholding.failed(node.peer_id, began, time.monotonic())
        return fetched

    async def ask(
        self,
        node: NodeInfo,
        reason: "state_pb2.AskReason",
        uids: Collection[UID],
        sha256: bytes = b"",
        base_sha256: bytes = b"",
    ) -> int:
        """Asks a node to fetch states. Returns how many it accepts, counted from the first; 0 if it does not answer."""
        request = state_pb2.AskRequest(
            protocol_version=PROTOCOL_VERSION,
            swarm_id=self._swarm_id,
            reason=reason,
            uids=map(str, uids),
            sha256=sha256,
            base_sha256=base_sha256,
        )
        session: Metadata = ()
        try:
            stub, session = await self._service.stub(node)
            with while_open():
                reply = await stub.Ask(request, timeout=_ASK_S, metadata=session)
        except (grpc.aio.AioRpcError, TransferError, ExpertError) as error:
            # the session may be the cause: open another next time
            self._service.sessions.ended(node.peer_id, session)
            logger.debug("%s did not answer a request to fetch states: %s", node.peer_id, error)
            return 0
        return min(int(reply.accepted), len(uids))

    def _open(self, incoming: SnapshotReceiver, uid: UID, peer_id: PeerID, parameters: bool) -> Fetched:
        header, data = incoming.whole()
        count = header.update_count
        with self._guard.guarding("state", peer_id, StateError):
            if parameters:
                checkpoint = Checkpoint(block_from_bytes(data, self._swarm_id, uid, self._form), count)
            else:
                checkpoint = from_bytes(data, self._swarm_id, uid, count, self._form)
        return Fetched(checkpoint, header.sha256, header.met_update_count)


def largest_state_bytes(manifest: Manifest) -> int:
    """The largest size of an expert's state on the wire, with names and header. Allocates nothing."""
    return StateForm.of(manifest).max_bytes
