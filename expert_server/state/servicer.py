"""StateService: other nodes fetch the states of experts from this node, and ask it to fetch theirs."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeAlias

import grpc
from grpc import StatusCode

from dht.manifest import Manifest, parse_uid
from dht.uid import UID
from expert_server.state.transfer import (
    MAX_TRANSFER_S,
    Block,
    Snapshot,
    SnapshotTaker,
    TransferMetrics,
    largest_state_bytes,
)
from peer.bounded import BoundedDict, Owner
from peer.budget import FairBudget, Reservation
from peer.errors import ExpertError, WireError
from peer.identity import PeerID
from peer.rates import RateLimit, TokenBuckets
from peer.rpc.calls import abort_on_error, require_same_swarm
from peer.rpc.sessions import Right, Session, Sessions
from peer.rpc.transfer import TransferSlots, send
from peer.wire import session_pb2, state_pb2, state_pb2_grpc

MAX_TRANSFERS = 8
"""States that other nodes fetch from this one at the same time."""
MAX_UIDS_IN_ASK = 256
_REMEMBERED = 4096
_ADOPT_EVERY_S = 1.0
_AHEAD = 2
"""How many times one peer may ask for an average of the same expert before it is due: a node that leaves asks once
more.
"""
_EXPERTS_PER_S = 32.0
"""The average number of experts that one peer may ask this one to fetch each second."""


@dataclass(frozen=True)
class FetchHint:
    """The peer `peer_id` asks this node to fetch these experts from it. It may lie."""

    peer_id: PeerID
    uids: tuple[UID, ...]
    sha256: bytes = b""
    """For an average, the hash of that peer's snapshot; empty for an adoption."""
    base_sha256: bytes = b""
    """For an average, the hash of this node's snapshot."""
    group: str = field(kw_only=True)
    """With whom the peer shares: see `Session.group`."""

    @property
    def is_average(self) -> bool:
        return bool(self.sha256)

    @property
    def owner(self) -> Owner:
        return Owner(self.group, self.peer_id)


_Waiting: TypeAlias = dict[tuple[UID, bool], tuple[FetchHint, Reservation]]
"""One peer's hints, by expert and kind."""


class HintQueue:
    """Hints that wait to be followed. Pure. Groups of peers take turns and share the room fairly, and so do the peers
    in each. A peer that has asked for an expert must wait before it asks again, because each average may move this
    node's replica towards that peer's (`peer.clipping`). Other peers may ask at once.
    """

    def __init__(self, limit: int, average_every_s: float) -> None:
        """`limit`: how many experts all waiting hints together may name. `average_every_s`: the time between two hints
        of a peer for the same expert.
        """
        self._room = FairBudget(limit)
        self._average_every_s = average_every_s
        self._waiting: OrderedDict[str, OrderedDict[PeerID, _Waiting]] = OrderedDict()
        """Waiting hints by group and peer; those whose turn was longest ago come first. Groups and peers without hints
        have no entry.
        """
        self._due_at = BoundedDict[tuple[PeerID, UID, bool], float](_REMEMBERED)
        self._paces = TokenBuckets[PeerID](_EXPERTS_PER_S, MAX_UIDS_IN_ASK)

    def put(self, hint: FetchHint, now: float) -> int:
        """Returns how many of the hint's experts were accepted, counted from the first."""
        every_s = self._average_every_s if hint.is_average else _ADOPT_EVERY_S
        most_early_s = _AHEAD * every_s if hint.is_average else 0.0
        if self._paces.wait_s(hint.peer_id, now):
            return 0
        self._paces.take(hint.peer_id, len(hint.uids), now)
        for taken, uid in enumerate(hint.uids):
            key = hint.peer_id, uid, hint.is_average
            due_at = max(now, self._due_at.get(key, now))
            if due_at > now + most_early_s or not self._add(hint, uid):
                return taken
            self._due_at[key] = due_at + every_s
        return len(hint.uids)

    def pop(self, is_average: bool, may_come: Callable[[Owner], bool] = lambda _: True) -> FetchHint | None:
        """The next hint of this kind, by a peer that may come. All adoptions that one peer asks for are returned as one
        hint.
        """
        for group, peers in self._waiting.items():
            for peer_id, waiting in peers.items():
                keys = [key for key in waiting if key[1] is is_average]
                if keys and may_come(Owner(group, peer_id)):
                    self._waiting.move_to_end(group)
                    peers.move_to_end(peer_id)
                    keys = keys[:1] if is_average else keys
                    hint = replace(waiting[keys[0]][0], uids=tuple(uid for uid, _ in keys))
                    for key in keys:
                        waiting[key][1].release()
                        self._drop(group, peer_id, key)
                    return hint
        return None

    def _add(self, hint: FetchHint, uid: UID) -> bool:
        key = uid, hint.is_average
        peers = self._waiting.get(hint.group, OrderedDict())
        own = peers.get(hint.peer_id, {})
        if key in own:
            own[key] = hint, own[key][1]  # for an average, the newest snapshots
            return True
        owner, drop = Owner(hint.group, hint.peer_id), partial(self._drop, hint.group, hint.peer_id, key)
        try:
            reservation = self._room.reserve(owner, 1, drop)
        except ExpertError:
            return False
        peers = self._waiting.setdefault(hint.group, OrderedDict())
        peers.setdefault(hint.peer_id, {})[key] = hint, reservation
        return True

    def _drop(self, group: str, peer_id: PeerID, key: tuple[UID, bool]) -> None:
        peers = self._waiting[group]
        del peers[peer_id][key]
        if not peers[peer_id]:
            del peers[peer_id]
        if not peers:
            del self._waiting[group]


FetchContext = grpc.aio.ServicerContext[state_pb2.FetchRequest, state_pb2.FetchReply]
AskContext = grpc.aio.ServicerContext[state_pb2.AskRequest, state_pb2.AskReply]


class StateServicer(state_pb2_grpc.StateServiceServicer):
    """Sends the states of a node's experts to other nodes, and passes on their hints."""

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
        """`follow`: takes a hint, and returns how many of its experts are accepted, counted from the first. `up`:
        limits the upload of states. `sessions`: who may fetch and ask. `max_transfers`: at the same time.
        """
        self._snapshots = snapshots
        self._manifest = manifest
        self._swarm_id = swarm_id
        self._metrics = metrics
        self._follow = follow
        self._up = up
        self._sessions = sessions
        self._slots = TransferSlots(max_transfers)
        self._state_bytes = largest_state_bytes(manifest)
        self._max_transfer_s = max_transfer_s

    async def Fetch(self, request: state_pb2.FetchRequest, context: FetchContext) -> None:
        async with abort_on_error(context, self._max_transfer_s, "the state was not read in time"):
            await self._give(request, context)

    async def Ask(self, request: state_pb2.AskRequest, context: AskContext) -> state_pb2.AskReply:
        async with abort_on_error(context):
            session = self._sessions.require(context, session_pb2.RIGHT_FETCH)
            require_same_swarm(self._swarm_id, request.protocol_version, request.swarm_id)
            return state_pb2.AskReply(accepted=self._follow(self._hint(request, session)))
        raise AssertionError("abort raises")

    async def _give(self, request: state_pb2.FetchRequest, context: FetchContext) -> None:
        session = self._sessions.require(context, _right_for(request))
        caller = session.caller
        require_same_swarm(self._swarm_id, request.protocol_version, request.swarm_id)
        uid = parse_uid(request.uid, self._manifest)
        if request.offset and not request.sha256:
            raise WireError("an offset needs the checksum of its snapshot")
        if request.version and (request.sha256 or request.parameters):
            raise WireError(
                "a version can't be asked for together with a checksum or `parameters`: leave those out"
            )
        with self._slots.taken(session.owner, self._state_bytes):
            given = await self._wanted(request, uid, session.owner)
            count = self._metrics.bytes.labels("sent").inc
            await send(context, given.header(caller), given.data, request.offset, self._up, count)
            if isinstance(given, Snapshot):
                given.note_given(caller)

    async def _wanted(self, request: state_pb2.FetchRequest, uid: UID, owner: Owner) -> Snapshot | Block:
        """Raises ExpertError."""
        snapshots, sha256 = self._snapshots, request.sha256
        if request.version:
            return await snapshots.block_for(owner, uid, request.version)
        if not sha256 and request.parameters:
            return await snapshots.parameters_for(owner, uid)
        if not sha256:
            return await snapshots.take_for(owner, uid)
        kept: Snapshot | Block | None = (
            snapshots.find_parameters(uid, sha256) if request.parameters else snapshots.find(uid, sha256)
        )
        if kept is None:
            raise ExpertError(
                StatusCode.FAILED_PRECONDITION, "that snapshot is no longer kept: start again without one"
            )
        return kept

    def _hint(self, request: state_pb2.AskRequest, session: Session) -> FetchHint:
        caller, group = session.caller, session.group
        if not 1 <= len(request.uids) <= MAX_UIDS_IN_ASK:
            raise WireError(f"{len(request.uids)} experts; expected 1 to {MAX_UIDS_IN_ASK}")
        uids = tuple(parse_uid(uid, self._manifest) for uid in request.uids)
        match request.reason:
            case state_pb2.ASK_REASON_ADOPT:
                return FetchHint(caller, uids, group=group)
            case state_pb2.ASK_REASON_AVERAGE:
                if len(uids) != 1 or len(request.sha256) != 32 or len(request.base_sha256) != 32:
                    raise WireError("an average is of one expert and two snapshots")
                return FetchHint(caller, uids, request.sha256, request.base_sha256, group=group)
            case _:
                raise WireError(f"reason {request.reason} is not known here")


def _right_for(request: state_pb2.FetchRequest) -> Right:
    """A peer that may call an expert may fetch its parameters, and nothing more."""
    if request.version:
        return session_pb2.RIGHT_FORWARD
    return session_pb2.RIGHT_EXPORT if request.parameters else session_pb2.RIGHT_FETCH
