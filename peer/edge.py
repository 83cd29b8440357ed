"""What every call between two peers must get right: the protocol version and the swarm. And when to come back."""

import math
from collections.abc import Iterable

from grpc import StatusCode

from peer import PROTOCOL_VERSION
from peer.errors import ExpertError

_RETRY_KEY = "talkoot-retry-after-s"
_LONGEST_RETRY_S = 3600.0


def retry_metadata(retry_after_s: float) -> tuple[tuple[str, str], ...]:
    """What a refused call's trailing metadata says of when it is worth coming back; nothing when that is not known."""
    return ((_RETRY_KEY, f"{retry_after_s:.3f}"),) if retry_after_s else ()


def retry_after_s(metadata: Iterable[tuple[str, str | bytes]] | None, otherwise: float) -> float:
    """As the other side said, within reason; `otherwise` when it said nothing sensible."""
    for key, value in metadata or ():
        if key == _RETRY_KEY:
            try:
                seconds = float(value)
            except ValueError:
                break
            return min(seconds, _LONGEST_RETRY_S) if math.isfinite(seconds) and seconds > 0 else otherwise
    return otherwise


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
