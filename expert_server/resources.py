"""What a node uses of its machine: how memory is divided, and how many threads and rows it uses."""

import math
import shutil
from collections.abc import Iterable
from pathlib import Path

from dht.manifest import Manifest
from expert_server.experts.expert import expert_bytes
from expert_server.serving.call import smallest_call_memory
from expert_server.settings import NodeSettings
from expert_server.state.transfer import MAX_SNAPSHOTS, largest_state_bytes
from peer.errors import SettingsError
from peer.formatting import bytes_in_words, counted
from peer.platform.processes import usable_cores

_CPU_BATCH_ROWS, _GPU_BATCH_ROWS = 128, 2048
_KEPT_SHARE = _CALLS_SHARE = _SNAPSHOT_SHARE = 1 / 8
_KEPT_SHARE_OF_FREE = 1 / 16
_CALLS_BYTES = 512 * 2**20
"""The budget for calls in progress, if `memory` is not set."""


def batch_rows_of(device_types: Iterable[str]) -> int:
    """The largest number of rows in a batch. Larger batches gain little, and have costs: a merged forward pass keeps no
    graph, and trainers that are answered together call again together, which leaves the device idle in between.
    """
    return _CPU_BATCH_ROWS if set(device_types) == {"cpu"} else _GPU_BATCH_ROWS


def threads_of(settings: NodeSettings) -> int:
    """The number of torch's threads. With more than one for each core, they would only wait for each other."""
    return min(settings.threads or usable_cores(), usable_cores())


def compute_threads_of(settings: NodeSettings, device_types: Iterable[str]) -> int:
    """The number of threads that compute experts. Only one uses a Mac's GPU: when two do at the same time, torch ends
    the process (https://github.com/pytorch/pytorch/issues/197805).
    """
    return 1 if "mps" in device_types else threads_of(settings)


def kept_bytes_of(settings: NodeSettings, free_bytes: int) -> int:
    """Memory for kept forward passes. `free_bytes`: free memory of the devices that compute."""
    if settings.max_kept_bytes is not None:
        return settings.max_kept_bytes
    return int(free_bytes * _KEPT_SHARE_OF_FREE)


def call_memory_of(settings: NodeSettings) -> int:
    """Memory for all calls in progress together, including waiting rows."""
    return _CALLS_BYTES if settings.memory is None else int(settings.memory * _CALLS_SHARE)


def snapshots_of(settings: NodeSettings, manifest: Manifest) -> int:
    """How many states are kept in memory for nodes that fetch them: an eighth of `memory`, but at least one."""
    if settings.memory is None:
        return MAX_SNAPSHOTS
    fitting = int(settings.memory * _SNAPSHOT_SHARE) // largest_state_bytes(manifest)
    return min(MAX_SNAPSHOTS, max(1, fitting))


def most_bytes(settings: NodeSettings, manifest: Manifest, capacity: int, kept_bytes: int) -> int:
    """The most memory for `capacity` experts, kept forward passes, calls in progress and snapshots together."""
    snapshots = snapshots_of(settings, manifest) * largest_state_bytes(manifest)
    return capacity * expert_bytes(manifest) + kept_bytes + call_memory_of(settings) + snapshots


def smallest_memory(manifest: Manifest) -> int:
    """The smallest `memory` that works, in bytes: one expert, its snapshot and a backward call of one sequence."""
    expert, others = expert_bytes(manifest), 1 - _KEPT_SHARE - _CALLS_SHARE
    for_snapshot = math.ceil((expert + largest_state_bytes(manifest)) / others)
    for_expert = math.ceil(expert / (others - _SNAPSHOT_SHARE))
    for_call = math.ceil(smallest_call_memory(manifest) / _CALLS_SHARE)
    return max(for_snapshot, for_expert, for_call)


def within_memory(settings: NodeSettings, manifest: Manifest) -> NodeSettings:
    """The settings, lowered to fit into `memory` if it is set.

    Kept forward passes, calls in progress, and snapshots get at most an eighth each (snapshots at least the size of
    one). The rest is for experts: two thirds of them to host, and the others to adopt. Raises SettingsError if that is
    not enough for one expert.
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
    snapshots = snapshots_of(settings, manifest) * largest_state_bytes(manifest)
    left = memory - kept - call_memory_of(settings) - snapshots
    fitting = left // expert_bytes(manifest)
    usual = min(max(1, 2 * fitting // 3), manifest.experts_total)
    experts = min(settings.experts if settings.experts is not None else usual, fitting)
    spare = settings.spare if settings.spare is not None else (experts + 1) // 2
    return settings.model_copy(
        update={
            "experts": experts,
            "spare": min(spare, fitting - experts),
            "max_kept_bytes": kept,
        }
    )


def checkpoint_bytes(settings: NodeSettings, manifest: Manifest, experts: int) -> int:
    """What the checkpoints of so many experts may take on disk. One more than is kept exists while it is written."""
    return experts * (settings.checkpoints_kept + 1) * expert_bytes(manifest)


def disk_shortage(state: Path, settings: NodeSettings, manifest: Manifest, experts: int) -> str:
    """What to do if checkpoints of so many experts may not fit on the disk of this state folder; empty if they do.
    Those that are there count as free space: new ones replace them. Blocks. Raises OSError.
    """
    needed = checkpoint_bytes(settings, manifest, experts)
    free = shutil.disk_usage(state).free
    if free >= needed:
        return ""
    there = sum(path.stat().st_size for path in (state / "checkpoints").rglob("*") if path.is_file())
    if free + there >= needed:
        return ""
    return (
        f"checkpoints of {counted(experts, 'expert')} may take {bytes_in_words(needed)}, and {bytes_in_words(free)} "
        f"are free in {state}: free some space, or host fewer"
    )


def require_room(settings: NodeSettings, manifest: Manifest, free_bytes: int) -> None:
    """Raises SettingsError if an expert doesn't fit into `free_bytes`. The swarm's founder chooses the experts'
    size.
    """
    each = expert_bytes(manifest)
    if each > free_bytes and settings.may_host_experts:
        raise SettingsError(
            f"an expert of this swarm takes {bytes_in_words(each)}, and {bytes_in_words(free_bytes)} of memory are "
            "free: pass --experts 0 --spare 0 to host none"
        )
