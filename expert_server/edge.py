"""What every call to a node must get right: the protocol version, the swarm, and the experts that it names."""

from grpc import StatusCode

from dht.manifest import Manifest
from dht.uid import UID
from peer import PROTOCOL_VERSION
from peer.errors import ExpertError, WireError


def require_same_swarm(own_swarm_id: str, protocol_version: int, swarm_id: str) -> None:
    """Raises ExpertError (FAILED_PRECONDITION) when the caller speaks another version or means another swarm."""
    if protocol_version != PROTOCOL_VERSION:
        raise ExpertError(
            StatusCode.FAILED_PRECONDITION,
            f"this node speaks protocol version {PROTOCOL_VERSION}, the caller {protocol_version}",
        )
    if swarm_id != own_swarm_id:
        raise ExpertError(
            StatusCode.FAILED_PRECONDITION,
            f"this node belongs to swarm {own_swarm_id}, the call is for {swarm_id[:64]!r}",
        )


def parse_uid(text: str, manifest: Manifest) -> UID:
    """Raises WireError when it is no UID, or one off the swarm's grid."""
    uid = UID.parse(text)
    if not manifest.holds(uid):
        raise WireError(
            f"{uid} is not on this swarm's grid of {manifest.model.layers} × {manifest.experts.grid}"
        )
    return uid
