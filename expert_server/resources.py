"""How a node divides the memory that its owner allows. Pure."""

import math

from dht.manifest import Manifest
from expert_server.experts.expert import expert_bytes
from expert_server.settings import NodeSettings, bytes_in_words
from expert_server.state.transfer import largest_state_bytes
from peer.errors import SettingsError

_KEPT_SHARE = _QUEUE_SHARE = _SNAPSHOT_SHARE = 1 / 8
_KEPT_SHARE_OF_FREE = 1 / 16


def row_bytes(manifest: Manifest) -> int:
    """Most that a row which waits takes: its inputs and gradients in float32, its position."""
    return 2 * 4 * manifest.model.hidden + 8


def kept_bytes_of(settings: NodeSettings, free_bytes: int) -> int:
    """For kept forward passes. `free_bytes`: of the devices that compute."""
    return (
        int(free_bytes * _KEPT_SHARE_OF_FREE) if settings.max_kept_bytes is None else settings.max_kept_bytes
    )


def most_bytes(settings: NodeSettings, manifest: Manifest, capacity: int, kept_bytes: int) -> int:
    """What `capacity` experts, kept forward passes, waiting rows and snapshots take together, at most."""
    queue = settings.max_queued_rows * row_bytes(manifest)
    snapshots = settings.max_snapshots * largest_state_bytes(manifest)
    return capacity * expert_bytes(manifest) + kept_bytes + queue + snapshots


def smallest_memory(manifest: Manifest) -> int:
    """In bytes: room for one expert and its snapshot, and for one sequence that waits."""
    expert, others = expert_bytes(manifest), 1 - _KEPT_SHARE - _QUEUE_SHARE
    for_snapshot = math.ceil((expert + largest_state_bytes(manifest)) / others)
    for_expert = math.ceil(expert / (others - _SNAPSHOT_SHARE))
    for_queue = math.ceil(manifest.model.context * row_bytes(manifest) / _QUEUE_SHARE)
    return max(for_snapshot, for_expert, for_queue)


def within_memory(settings: NodeSettings, manifest: Manifest) -> NodeSettings:
    """The settings with numbers that keep to `memory`, if it is set.

    An eighth at most is for forward passes that are kept, one for rows that wait, one for snapshots (or one snapshot),
    the rest for experts: two thirds of those to host, the others to adopt. Raises SettingsError when that is not
    enough for one expert.
    """
    memory = settings.memory
    if memory is None:
        return settings
    if memory < (smallest := smallest_memory(manifest)):
        raise SettingsError(
            f"memory: {bytes_in_words(memory)} is too little for one expert of this swarm: "
            f"the smallest that works is {smallest} bytes ({bytes_in_words(smallest)})"
        )
    kept = int(memory * _KEPT_SHARE)
    if settings.max_kept_bytes is not None:
        kept = min(kept, settings.max_kept_bytes)
    queued_rows = min(settings.max_queued_rows, int(memory * _QUEUE_SHARE) // row_bytes(manifest))
    snapshot = largest_state_bytes(manifest)
    snapshots = min(settings.max_snapshots, max(1, int(memory * _SNAPSHOT_SHARE) // snapshot))
    left = memory - kept - queued_rows * row_bytes(manifest) - snapshots * snapshot
    fitting = left // expert_bytes(manifest)
    usual = min(max(1, 2 * fitting // 3), manifest.experts_total)
    experts = min(settings.experts if settings.experts is not None else usual, fitting)
    spare = settings.spare if settings.spare is not None else (experts + 1) // 2
    return settings.model_copy(
        update={
            "experts": experts,
            "spare": min(spare, fitting - experts),
            "max_kept_bytes": kept,
            "max_queued_rows": queued_rows,
            "max_snapshots": snapshots,
        }
    )
