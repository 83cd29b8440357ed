"""What a node does now, and what it shows of itself."""

from dataclasses import dataclass
from enum import Enum


class NodeState(Enum):
    """What a node does now."""

    JOINING = "joining"
    SERVING = "serving"
    PAUSED = "paused"
    UNREACHABLE = "can't reach the DHT"
    DRAINING = "draining"
    STOPPING = "stopping"


@dataclass(frozen=True)
class NodeStatus:
    """What a node shows at a glance."""

    state: NodeState
    experts: int
    capacity: int
    """Experts it would host at most, those it would adopt included."""
    adopted: int
    updates: int
    rows: int
    queued_rows: int
    peers: int
    """DHT peers known."""
    why: str
    """Why it is paused, such as `paused until 22:00`; or, though it serves, what else it would be; else empty."""
    calls: int
    uploaded_bytes: int
    """Payload of answers; `downloaded_bytes`: of calls."""
    downloaded_bytes: int
    upload_mbit: float | None
    """The limit, if there is one."""
    download_mbit: float | None
    memory_bytes: int
    """Of experts, kept forward passes and waiting rows, about."""
    memory_limit_bytes: int
    """What they may take at most."""
    busy_s: float
    """Computed for so long, since the start."""
    threads: int
    contributed_rows: int
    """Over all runs, as are the following."""
    contributed_updates: int
    contributed_hours: float
    replicated: int
    """Of the experts, those that other nodes serve too."""
    handed_over: int
    """Experts that others took over when this node left."""
    reached: str = ""
    """How others reach it, in words, such as `direct` or `relayed by 3 relays`."""
    reach_advice: str = ""
    """What would let them connect directly; empty when they do."""
