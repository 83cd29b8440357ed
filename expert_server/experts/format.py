"""The state of an expert: its names, shapes and dtypes, and its encoding on disk and on the wire. Pure."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from pydantic import Field
from torch import Tensor, nn

from dht.uid import UID
from peer.checkpoints import CheckpointHeader, decode_checkpoint, encode_checkpoint
from peer.errors import StateError

State: TypeAlias = dict[str, Tensor]
"""What an expert is made of: `block.…` and `optimizer.…` tensors by name, on the CPU."""

BLOCK, OPTIMIZER = "block.", "optimizer."


def moment_name(parameter: str, moment: str) -> str:
    return f"{OPTIMIZER}{parameter}.{moment}"


def block_tensors(block: nn.Module) -> dict[str, Tensor]:
    """The block's own tensors, not copies. Other things that a block adds to its state are left out."""
    return {name: value for name, value in block.state_dict().items() if torch.is_tensor(value)}


def check_state(
    uid: UID, state: Mapping[str, Tensor], update_count: int, block: nn.Module, moments: Collection[str]
) -> list[str]:
    """Returns the names of the parameters that have moments.

    `block`: one of this kind; only the shapes and dtypes of its tensors are read. `moments`: the names of the tensors
    that the optimizer keeps for a parameter. Raises StateError when a name, shape or dtype is not this expert's or a
    number is not finite.
    """
    parameters = dict(block.named_parameters())
    stepped = [name for name in parameters if any(moment_name(name, m) in state for m in moments)]
    expected = {BLOCK + name: tensor for name, tensor in block_tensors(block).items()}
    for name in stepped:
        number = torch.zeros((), dtype=torch.float32)
        expected |= {moment_name(name, m): number if m == "step" else parameters[name] for m in moments}
    _check_form(uid, state, expected)
    check_numbers(uid, state)
    if update_count < 0 or (moments and bool(update_count) != bool(stepped)):
        raise StateError(f"{update_count} updates, and moments of {len(stepped)} parameters")
    return stepped


def check_numbers(uid: UID, state: Mapping[str, Tensor]) -> None:
    """Raises StateError when a number is not finite, or is negative where it cannot be."""
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise StateError(f"{name!r} of expert {uid} is not finite")
        if name.endswith((".exp_avg_sq", ".step")) and name.startswith(OPTIMIZER) and (tensor < 0).any():
            raise StateError(f"{name!r} of expert {uid} is negative")


def _check_form(uid: UID, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    if different := state.keys() ^ expected.keys():
        name = min(different)
        problem = "lacks" if name in expected else "has the unknown"
        raise StateError(f"the state of expert {uid} {problem} {name!r}")
    for name, like in expected.items():
        found, wanted = ((tuple(t.shape), t.dtype) for t in (state[name], like))
        if found != wanted:
            raise StateError(f"{name!r} of expert {uid} is {found}; expected {wanted}")


class Header(CheckpointHeader):
    """The header of an encoded state."""

    swarm_id: str
    uid: str
    update_count: int = Field(ge=0)
    saved_at: float = Field(ge=0, allow_inf_nan=False)
    """Unix time, in seconds."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """One expert's state after `update_count` updates."""

    state: State
    update_count: int


def to_bytes(checkpoint: Checkpoint, swarm_id: str, uid: UID, saved_at: float) -> bytes:
    """`saved_at`: Unix time in seconds."""
    header = Header(swarm_id=swarm_id, uid=str(uid), update_count=checkpoint.update_count, saved_at=saved_at)
    return encode_checkpoint(header, checkpoint.state)


def from_bytes(data: bytes, swarm_id: str, uid: UID, update_count: int) -> Checkpoint:
    """Raises StateError when the bytes are another state, or are damaged."""

    def check(header: Header) -> None:
        for name, found, expected in (
            ("swarm", header.swarm_id, swarm_id),
            ("expert", header.uid, str(uid)),
            ("update count", header.update_count, update_count),
        ):
            if found != expected:
                raise StateError(f"it is of {name} {found}, not {expected}")

    _, state = decode_checkpoint(data, Header, check)
    return Checkpoint(state, update_count)
