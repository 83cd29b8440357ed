"""What nodes say of their replicas."""

from dataclasses import dataclass
from enum import Enum

from hivemind.p2p import PeerID

from dht.uid import UID
from peer.errors import RecordError
from peer.wire import records_pb2


class ReplicaState(Enum):
    """How far a replica has got."""

    CLAIMED = records_pb2.REPLICA_STATE_CLAIMED
    SERVING = records_pb2.REPLICA_STATE_SERVING
    WITHDRAWN = records_pb2.REPLICA_STATE_WITHDRAWN
    LEAVING = records_pb2.REPLICA_STATE_LEAVING


@dataclass(frozen=True)
class Replica:
    """One node's copy of an expert, as the node announced it."""

    uid: UID
    peer_id: PeerID
    state: ReplicaState
    update_count: int
    queued_rows: int
    claimed_at: float
    expires_at: float


@dataclass(frozen=True)
class Announced:
    """What a node says of one of its replicas."""

    uid: UID
    state: ReplicaState
    update_count: int = 0
    claimed_at: float = 0.0

    def message(self, queued_rows: int) -> records_pb2.Announcement:
        """`queued_rows`: that wait at the node, for all its experts."""
        return records_pb2.Announcement(
            state=self.state.value,
            update_count=self.update_count,
            queued_rows=queued_rows,
            claimed_at=self.claimed_at,
        )


def read_replica(payload: records_pb2.RecordPayload, uid: UID, peer_id: PeerID) -> Replica:
    """What a node's checked announcement says. Raises RecordError for a state that is not known."""
    announcement = payload.announcement
    try:
        state = ReplicaState(announcement.state)
    except ValueError as error:
        raise RecordError(f"a replica in state {announcement.state}") from error
    return Replica(
        uid,
        peer_id,
        state,
        announcement.update_count,
        announcement.queued_rows,
        announcement.claimed_at,
        payload.expires_at,
    )
