"""The parts of a call, one for each expert, as its header describes them.

Shape suffixes: S = segments, R = rows.
"""

from dataclasses import dataclass

import numpy as np
import torch

from dht.manifest import Manifest
from dht.uid import UID
from expert_server.serving.batching import Direction
from expert_server.edge import parse_uid
from expert_server.serving.forward_cache import Kept
from peer.errors import WireError
from peer.wire import expert_pb2


@dataclass(frozen=True)
class Part:
    """One expert's part of a call, as its header describes it: valid but for the tensors."""

    uid: UID
    lengths: torch.Tensor
    """int64 [S]"""
    positions: torch.Tensor
    """int64 [R]"""
    kept: Kept | None = None
    """In backward: what the forward call left here."""

    @property
    def rows(self) -> int:
        return len(self.positions)


@dataclass(frozen=True)
class LostPart:
    """One expert's part of a backward call whose forward pass is kept no more."""

    uid: UID
    rows: int


def make_part(expert: expert_pb2.ExpertRows, manifest: Manifest) -> Part:
    """Checks one expert's segments and positions. Raises WireError."""
    uid = parse_uid(expert.uid, manifest)
    lengths = np.array(expert.segment_lengths, dtype=np.int64)
    positions = np.array(expert.positions, dtype=np.int64)
    if not len(positions):
        raise WireError(f"no rows for expert {uid}")
    if not len(lengths) or lengths.min() < 1 or lengths.sum() != len(positions):
        raise WireError(f"segments of {lengths.sum()} rows for the {len(positions)} rows of expert {uid}")
    if positions.max() >= manifest.model.context:
        raise WireError(
            f"position {positions.max()}; this swarm's context is {manifest.model.context} tokens"
        )
    starts = np.cumsum(lengths)[:-1]
    rising = np.diff(positions) > 0
    rising[starts - 1] = True  # between two segments positions may fall
    if not rising.all():
        raise WireError(f"positions of expert {uid} do not rise within a segment")
    return Part(uid, torch.from_numpy(lengths), torch.from_numpy(positions))


def tensor_rows(expert: expert_pb2.ExpertRows, direction: Direction) -> int:
    """Rows of payload, inputs and gradients together."""
    if expert.kept_request_id:
        return expert.kept_rows
    return len(expert.positions) * (2 if direction == "backward" else 1)
