"""What calls about experts must get right: the experts that they name."""

from dht.manifest import Manifest
from dht.uid import UID
from peer.errors import WireError


def parse_uid(text: str, manifest: Manifest) -> UID:
    """Raises WireError when it is no UID, or one off the swarm's grid."""
    uid = UID.parse(text)
    if not manifest.holds(uid):
        raise WireError(
            f"{uid} is not on this swarm's grid of {manifest.model.layers} × {manifest.experts.grid}"
        )
    return uid
