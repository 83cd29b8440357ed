"""The form of an expert's state on disk and on the wire. Pure."""

from dataclasses import dataclass

from pydantic import Field

from dht.uid import UID
from expert_server.experts.expert import State
from peer.errors import StateError
from peer.checkpoints import SealedHeader, seal, unseal


class Header(SealedHeader):
    """What a state says of itself."""

    swarm_id: str
    uid: str
    update_count: int = Field(ge=0)
    saved_at: float = Field(ge=0, allow_inf_nan=False)
    """Unix time, in seconds."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """One expert's state, as it was after `update_count` updates."""

    state: State
    update_count: int


def to_bytes(checkpoint: Checkpoint, swarm_id: str, uid: UID, saved_at: float) -> bytes:
    """`saved_at`: Unix time in seconds."""
    header = Header(swarm_id=swarm_id, uid=str(uid), update_count=checkpoint.update_count, saved_at=saved_at)
    return seal(header, checkpoint.state)


def from_bytes(data: bytes, swarm_id: str, uid: UID, update_count: int) -> Checkpoint:
    """Raises StateError when the bytes are not that state, or not as they were written."""

    def check(header: Header) -> None:
        for name, found, expected in (
            ("swarm", header.swarm_id, swarm_id),
            ("expert", header.uid, str(uid)),
            ("update count", header.update_count, update_count),
        ):
            if found != expected:
                raise StateError(f"it is of {name} {found}, not {expected}")

    _, state = unseal(data, Header, check)
    return Checkpoint(state, update_count)
