"""StateService: other nodes fetch the states of experts here, and ask this node to fetch theirs."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import grpc
from grpc import StatusCode

from dht.manifest import Manifest, parse_uid
from dht.uid import UID
from expert_server.state.transfer import MAX_TRANSFER_S, Snapshot, SnapshotTaker, TransferMetrics
from peer.bounded import BoundedDict
from peer.errors import ExpertError, WireError
from peer.identity import PeerID
from peer.rates import RateLimit
from peer.rpc.calls import abort_on_error, require_same_swarm
from peer.rpc.sessions import Sessions
from peer.rpc.transfer import outgoing, written
from peer.wire import session_pb2, state_pb2, state_pb2_grpc

logger = logging.getLogger(__name__)

MAX_TRANSFERS = 4
"""States that others fetch from a node at the same time."""
MAX_UIDS_IN_ASK = 256
_REMEMBERED = 4096
_ADOPT_EVERY_S = 1.0


@dataclass(frozen=True)
class FetchHint:
    """Peer `peer_id` asks this node to fetch these experts from it. It may lie."""

    peer_id: PeerID
    uids: tuple[UID, ...]
    sha256: bytes = b""
    """Of that peer's snapshot, if it asks for an average; empty if it asks for adoption."""
    base_sha256: bytes = b""
    """Of this node's snapshot, if it asks for an average."""

    @property
    def is_average(self) -> bool:
        return bool(self.sha256)


class HintQueue:
    """The hints that wait to be followed: at most `limit` experts, none of which may come again too soon. Pure."""

    def __init__(self, limit: int, average_every_s: float) -> None:
        self._limit = limit
        self._average_every_s = average_every_s
        self._waiting: list[FetchHint] = []
        self._taken_at = BoundedDict[tuple[UID, bool], float](_REMEMBERED)

    def put(self, hint: FetchHint, now: float) -> int:
        """Returns how many of the hint's experts were taken, from the first on."""
        taken: list[UID] = []
        every_s = self._average_every_s if hint.is_average else _ADOPT_EVERY_S
        room = self._limit - sum(len(waiting.uids) for waiting in self._waiting)
        for uid in hint.uids[: max(room, 0)]:
            key = uid, hint.is_average
            if now < self._taken_at.get(key, float("-inf")) + every_s:
                break
            self._taken_at[key] = now
            taken.append(uid)
        if taken:
            self._waiting.append(replace(hint, uids=tuple(taken)))
        return len(taken)

    def pop(self) -> FetchHint | None:
        """The oldest hint. Adoptions come first, because the peers that ask for them are leaving."""
        if not self._waiting:
            return None
        first = min(range(len(self._waiting)), key=lambda n: self._waiting[n].is_average)
        return self._waiting.pop(first)


FetchContext = grpc.aio.ServicerContext[state_pb2.FetchRequest, state_pb2.FetchReply]
AskContext = grpc.aio.ServicerContext[state_pb2.AskRequest, state_pb2.AskReply]


class StateServicer(state_pb2_grpc.StateServiceServicer):  # type: ignore[misc]  # grpc's plugin writes no types
    """Gives the states of a node's experts to other nodes, and passes their hints on."""

    def __init__(
        self,
        snapshots: SnapshotTaker,
        manifest: Manifest,
        swarm_id: str,
        metrics: TransferMetrics,
        follow: Callable[[FetchHint], int],
        up: RateLimit,
        sessions: Sessions,
        *,
        max_transfers: int = MAX_TRANSFERS,
        max_transfer_s: float = MAX_TRANSFER_S,
    ) -> None:
        """`follow`: takes a hint, and says how many of its experts will be looked at, from the first on. `up`: how fast
        states may go. `sessions`: who may fetch and ask. `max_transfers`: at the same time.
        """
        self._snapshots = snapshots
        self._manifest = manifest
        self._swarm_id = swarm_id
        self._metrics = metrics
        self._follow = follow
        self._up = up
        self._sessions = sessions
        self._max_transfers = max_transfers
        self._max_transfer_s = max_transfer_s
        self._transfers = 0

    async def Fetch(self, request: state_pb2.FetchRequest, context: FetchContext) -> None:
        async with abort_on_error(context, self._max_transfer_s, "the state was not read in time"):
            await self._give(request, context)

    async def Ask(self, request: state_pb2.AskRequest, context: AskContext) -> state_pb2.AskReply:
        async with abort_on_error(context):
            caller = self._sessions.require(context, session_pb2.RIGHT_FETCH).caller
            require_same_swarm(self._swarm_id, request.protocol_version, request.swarm_id)
            return state_pb2.AskReply(accepted=self._follow(self._hint(request, caller)))
        raise AssertionError("abort raises")

    async def _give(self, request: state_pb2.FetchRequest, context: FetchContext) -> None:
        caller = self._sessions.require(context, session_pb2.RIGHT_FETCH).caller
        require_same_swarm(self._swarm_id, request.protocol_version, request.swarm_id)
        uid = parse_uid(request.uid, self._manifest)
        if request.offset and not request.sha256:
            raise WireError("an offset belongs to a snapshot: give its checksum")
        if self._transfers >= self._max_transfers:
            raise ExpertError(
                StatusCode.RESOURCE_EXHAUSTED,
                f"{self._transfers} states are being fetched here; try again soon",
            )
        self._transfers += 1
        try:
            snapshot = await self._find(uid, request.sha256)
            await self._stream(snapshot, caller, request.offset, context)
        finally:
            self._transfers -= 1

    async def _find(self, uid: UID, sha256: bytes) -> Snapshot:
        if not sha256:
            return await self._snapshots.take(uid)
        snapshot = self._snapshots.find(uid, sha256)
        if snapshot is None:
            raise ExpertError(
                StatusCode.FAILED_PRECONDITION, "that snapshot is no longer kept: start again without one"
            )
        return snapshot

    async def _stream(self, snapshot: Snapshot, caller: PeerID, offset: int, context: FetchContext) -> None:
        header = state_pb2.StateHeader(
            update_count=snapshot.update_count,
            total_bytes=len(snapshot.data),
            sha256=snapshot.sha256,
            met_update_count=snapshot.met.get(caller, 0),
        )
        async for reply in outgoing(header, snapshot.data, offset, self._up):
            await written(context.write, reply)
            self._metrics.bytes.labels("sent").inc(len(reply.chunk))
        snapshot.note_given(caller)

    def _hint(self, request: state_pb2.AskRequest, caller: PeerID) -> FetchHint:
        if not 1 <= len(request.uids) <= MAX_UIDS_IN_ASK:
            raise WireError(f"{len(request.uids)} experts; expected 1 to {MAX_UIDS_IN_ASK}")
        uids = tuple(parse_uid(uid, self._manifest) for uid in request.uids)
        match request.reason:
            case state_pb2.ASK_REASON_ADOPT:
                return FetchHint(caller, uids)
            case state_pb2.ASK_REASON_AVERAGE:
                if len(uids) != 1 or len(request.sha256) != 32 or len(request.base_sha256) != 32:
                    raise WireError("an average is of one expert and two snapshots")
                return FetchHint(caller, uids, request.sha256, request.base_sha256)
            case _:
                raise WireError(f"reason {request.reason} is not known here")
