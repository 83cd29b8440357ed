"""The gRPC edge for experts' states: others fetch them here, and ask this node to fetch."""

import logging
from collections.abc import Callable

import grpc
from grpc import StatusCode
from hivemind.p2p import PeerID

from dht.manifest import Manifest
from dht.uid import UID
from expert_server.edge import parse_uid
from expert_server.hints import Hint
from expert_server.state.transfer import Snapshot, SnapshotTaker, TransferCounts
from peer.rpc.calls import refusing, require_same_swarm
from peer.errors import ExpertError, WireError
from peer.rates import Rate
from peer.rpc.sessions import Sessions
from peer.rpc.transfer import outgoing, written
from peer.wire import session_pb2, state_pb2, state_pb2_grpc

logger = logging.getLogger(__name__)

FetchContext = grpc.aio.ServicerContext[state_pb2.FetchRequest, state_pb2.FetchReply]
AskContext = grpc.aio.ServicerContext[state_pb2.AskRequest, state_pb2.AskReply]

MAX_UIDS_IN_ASK = 256


class StateServicer(state_pb2_grpc.StateServiceServicer):  # type: ignore[misc]  # grpc's plugin writes no types
    """Gives the states of one node's experts to its swarm, and passes hints on."""

    def __init__(
        self,
        snapshots: SnapshotTaker,
        manifest: Manifest,
        swarm_id: str,
        counts: TransferCounts,
        follow: Callable[[Hint], int],
        up: Rate,
        sessions: Sessions,
        *,
        max_transfers: int,
        max_transfer_s: float,
    ) -> None:
        """`follow`: takes a hint, and says how many of its experts will be looked at, from the first on. `up`: how fast
        states may go. `sessions`: who may fetch and ask.
        """
        self._snapshots = snapshots
        self._manifest = manifest
        self._swarm_id = swarm_id
        self._counts = counts
        self._follow = follow
        self._up = up
        self._sessions = sessions
        self._max_transfers = max_transfers
        self._max_transfer_s = max_transfer_s
        self._transfers = 0

    async def Fetch(self, request: state_pb2.FetchRequest, context: FetchContext) -> None:
        async with refusing(context, self._max_transfer_s, "the state was not read in time"):
            await self._give(request, context)

    async def Ask(self, request: state_pb2.AskRequest, context: AskContext) -> state_pb2.AskReply:
        async with refusing(context):
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
                StatusCode.FAILED_PRECONDITION, "that snapshot is kept no more: begin anew without one"
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
            self._counts.bytes_sent += len(reply.chunk)
        if caller in snapshot.given:
            snapshot.given[caller].set()

    def _hint(self, request: state_pb2.AskRequest, caller: PeerID) -> Hint:
        if not 1 <= len(request.uids) <= MAX_UIDS_IN_ASK:
            raise WireError(f"{len(request.uids)} experts; expected 1 to {MAX_UIDS_IN_ASK}")
        uids = tuple(parse_uid(uid, self._manifest) for uid in request.uids)
        match request.reason:
            case state_pb2.ASK_REASON_ADOPT:
                return Hint(caller, uids)
            case state_pb2.ASK_REASON_AVERAGE:
                if len(uids) != 1 or len(request.sha256) != 32 or len(request.base_sha256) != 32:
                    raise WireError("an average is of one expert and two snapshots")
                return Hint(caller, uids, request.sha256, request.base_sha256)
            case _:
                raise WireError(f"reason {request.reason} is not known here")
