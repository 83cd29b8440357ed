"""The state of an expert: its names, shapes and dtypes, and its encoding on disk and on the wire. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Self, TypeAlias

import torch
from pydantic import Field
from torch import Tensor, nn

from dht.manifest import Manifest
from dht.uid import UID
from expert_server.blocks import weightless_block
from expert_server.experts.optimizer import moments_of
from peer.checkpoints import CheckpointHeader, Form, Outline, decode_checkpoint, encode_checkpoint, form_of
from peer.errors import StateError
from peer.formatting import printable

State: TypeAlias = dict[str, Tensor]
"""What an expert is made of: `block.…` and `optimizer.…` tensors by name, on the CPU."""

BLOCK, OPTIMIZER = "block.", "optimizer."
AVERAGED = "averaged"
"""The source of a state that is the average of this node's own and of another's."""
_NAME_BYTES = 1024
"""More than a tensor's name, shape and place take in an encoded state."""


def moment_name(parameter: str, moment: str) -> str:
    return f"{OPTIMIZER}{parameter}.{moment}"


def block_tensors(block: nn.Module) -> dict[str, Tensor]:
    """The block's own tensors, not copies. Other things that a block adds to its state are left out."""
    return {name: value for name, value in block.state_dict().items() if torch.is_tensor(value)}


@dataclass(frozen=True)
class StateForm:
    """What the manifest demands of an expert's state."""

    block: Outline
    """All tensors of the block, under their names in the state."""
    parameters: Outline
    """Those that are trained, under their names in the block."""
    moments: tuple[str, ...]
    """The names of the tensors that the optimizer keeps for a parameter."""

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        """Allocates nothing."""
        block = weightless_block(manifest)
        return cls(
            {BLOCK + name: form_of(tensor) for name, tensor in block_tensors(block).items()},
            {name: form_of(parameter) for name, parameter in block.named_parameters()},
            moments_of(manifest.optimizer),
        )

    def check(self, uid: UID, outline: Outline, update_count: int) -> list[str]:
        """Returns the names of the parameters that have moments.

        Raises StateError when a name, shape or dtype is not the expert's, or the moments do not fit the update count.
        """
        stepped = [
            name for name in self.parameters if any(moment_name(name, m) in outline for m in self.moments)
        ]
        expected = dict(self.block)
        for name in stepped:
            expected |= {moment_name(name, m): self._moment(name, m) for m in self.moments}
        _check_outline(uid, outline, expected)
        if update_count < 0 or (self.moments and bool(update_count) != bool(stepped)):
            raise StateError(f"{update_count} updates, and moments of {len(stepped)} parameters")
        return stepped

    @property
    def max_outline_bytes(self) -> int:
        """Of an encoded state's names and header."""
        return _NAME_BYTES * (len(self.block) + len(self.parameters) * len(self.moments) + 4)

    @property
    def max_bytes(self) -> int:
        """Of an encoded state."""
        moments = (self._moment(name, m) for name in self.parameters for m in self.moments)
        numbers = sum(prod(shape) * dtype.itemsize for shape, dtype in (*self.block.values(), *moments))
        return numbers + self.max_outline_bytes

    def _moment(self, parameter: str, moment: str) -> Form:
        return ((), torch.float32) if moment == "step" else self.parameters[parameter]


def check_state(uid: UID, state: Mapping[str, Tensor], update_count: int, form: StateForm) -> list[str]:
    """Returns the names of the parameters that have moments.

    Raises StateError as `StateForm.check` does, and when a number is not finite.
    """
    stepped = form.check(uid, {name: form_of(tensor) for name, tensor in state.items()}, update_count)
    check_numbers(uid, state)
    return stepped


def check_numbers(uid: UID, state: Mapping[str, Tensor]) -> None:
    """Raises StateError when a number is not finite, or is negative where it cannot be."""
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise StateError(f"{name!r} of expert {uid} is not finite")
        if name.endswith((".exp_avg_sq", ".step")) and name.startswith(OPTIMIZER) and (tensor < 0).any():
            raise StateError(f"{name!r} of expert {uid} is negative")


def _check_outline(uid: UID, outline: Outline, expected: Outline) -> None:
    if different := outline.keys() ^ expected.keys():
        name = min(different)
        problem = "lacks" if name in expected else "has the unknown"
        raise StateError(f"the state of expert {uid} {problem} {printable(name)!r}")
    for name, wanted in expected.items():
        if outline[name] != wanted:
            raise StateError(f"{name!r} of expert {uid} is {outline[name]}; expected {wanted}")


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
    source: str = ""
    """The peer that gave it, or `AVERAGED`, as long as it is on probation; empty if it is this node's own."""


def to_bytes(checkpoint: Checkpoint, swarm_id: str, uid: UID, saved_at: float) -> bytes:
    """`saved_at`: Unix time in seconds."""
    header = Header(swarm_id=swarm_id, uid=str(uid), update_count=checkpoint.update_count, saved_at=saved_at)
    return encode_checkpoint(header, checkpoint.state)


def from_bytes(data: bytes, swarm_id: str, uid: UID, update_count: int, form: StateForm) -> Checkpoint:
    """Raises StateError when the bytes are not this expert's state in this form, or are damaged.

    Only the numbers are left to check.
    """

    def check(header: Header, outline: Outline) -> None:
        for name, found, expected in (
            ("swarm", header.swarm_id, swarm_id),
            ("expert", header.uid, str(uid)),
            ("update count", header.update_count, update_count),
        ):
            if found != expected:
                raise StateError(f"it is of {name} {printable(str(found))}, not {expected}")
        form.check(uid, outline, update_count)

    _, state = decode_checkpoint(data, Header, check, form.max_outline_bytes)
    return Checkpoint(state, update_count)
