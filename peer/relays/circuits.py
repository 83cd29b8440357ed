"""What both ends of a circuit and its relay share."""

from grpc import StatusCode

from peer.errors import ExpertError
from peer.identity import PeerID, is_peer_id

CIRCUITS_TO_PEER = 32
"""The most open circuits from one relay to one peer."""
BEAT_S = 6.0
"""A peer tells its relay this often that it is still there. The gate ends calls that are silent for 20 s."""
ACCEPT_S = 10.0
"""How long a relay waits for each end of a circuit."""
IDLE_S = 600.0
"""A circuit that is idle for this long is closed. gRPC opens another when it needs one."""


def read_peer(data: bytes) -> PeerID:
    """A PeerID that a stranger wrote. Raises ExpertError (INVALID_ARGUMENT)."""
    if not is_peer_id(data):
        raise ExpertError(StatusCode.INVALID_ARGUMENT, "this is not a PeerID")
    return PeerID(data)
