"""The state of an expert: its names, shapes and dtypes, and its encoding on disk and on the wire. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Self, TypeAlias

import torch
from pydantic import Field
from torch import Tensor, nn

from dht.manifest import Manifest
from dht.uid import UID
from expert_server.blocks import weightless_block
from peer.checkpoints import (
    CheckpointHeader,
    Form,
    Outline,
    decode_checkpoint,
    encode_checkpoint,
    extremes,
    form_of,
    is_finite,
    nbytes_of,
)
from peer.errors import StateError
from peer.formatting import printable
from peer.optimizer import moments_of

State: TypeAlias = dict[str, Tensor]
"""The state of an expert: `block.…`, `optimizer.…` and `accumulated.…` tensors by name, on the CPU."""

BLOCK, OPTIMIZER = "block.", "optimizer."
ACCUMULATED = "accumulated."
"""Prefix of accumulated gradients, which have not led to a step yet. There is one tensor for each parameter, and the
two below.
"""
ACCUMULATED_ROWS, ACCUMULATED_SIZES = ACCUMULATED + "rows", ACCUMULATED + "sizes"
"""The number of rows whose gradients have accumulated, int64 [], and the gradients' sizes, float64 [2]
(`AccumulatedGradients.sizes`).
"""
FIRST_MOMENT, SECOND_MOMENT, STEP = ".exp_avg", ".exp_avg_sq", ".step"
"""The suffixes of the names of Adam's moments."""
AVERAGED = "averaged"
"""The source of a state that is the average of this node's own state and another's."""
OWN_SOURCES = ("", AVERAGED)
"""The sources of states that this node has computed, at least in part. All other sources are peers."""
_ABOUT_ACCUMULATED: Outline = {
    ACCUMULATED_ROWS: ((), torch.int64),
    ACCUMULATED_SIZES: ((2,), torch.float64),
}
_NAME_BYTES = 1024
"""An upper bound for what a tensor's name, shape and place take in an encoded state."""


def moment_name(parameter: str, moment: str) -> str:
    return f"{OPTIMIZER}{parameter}.{moment}"


def gradient_name(parameter: str) -> str:
    return f"{ACCUMULATED}gradient.{parameter}"


def moving_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that an average changes: parameters, float buffers and moments, but no counts or accumulated
    gradients.
    """
    return {
        name: tensor
        for name, tensor in state.items()
        if tensor.is_floating_point() and not name.endswith(STEP) and not name.startswith(ACCUMULATED)
    }


def block_tensors(block: nn.Module) -> dict[str, Tensor]:
    """The block's own tensors, not copies. Other objects that a block adds to its state are left out."""
    return {name: value for name, value in block.state_dict().items() if torch.is_tensor(value)}


@dataclass(frozen=True)
class StateForm:
    """What the manifest requires of an expert's state."""

    block: Outline
    """All tensors of the block, by their names in the state."""
    parameters: Outline
    """The trained tensors, by their names in the block."""
    moments: tuple[str, ...]
    """The names of the tensors that the optimizer keeps for a parameter."""
    rows_per_update: int
    """Accumulated gradients have fewer rows than this."""

    @classmethod
    @lru_cache(maxsize=16)  # takes as long as building an expert, and each one needs it
    def of(cls, manifest: Manifest) -> Self:
        """Allocates nothing."""
        block = weightless_block(manifest)
        return cls(
            {BLOCK + name: form_of(tensor) for name, tensor in block_tensors(block).items()},
            {name: form_of(parameter) for name, parameter in block.named_parameters()},
            moments_of(manifest.optimizer.name, manifest.optimizer.sgd_momentum),
            manifest.optimizer.rows_per_update,
        )

    def check(self, uid: UID, outline: Outline, update_count: int) -> list[str]:
        """Returns the names of the parameters that have moments.

        Raises StateError if a name, shape or dtype is not the expert's, or the moments do not fit the update count.
        """
        stepped = [
            name for name in self.parameters if any(moment_name(name, m) in outline for m in self.moments)
        ]
        expected = dict(self.block)
        for name in stepped:
            expected |= {moment_name(name, m): self._moment(name, m) for m in self.moments}
        if self._accumulates and any(name.startswith(ACCUMULATED) for name in outline):
            reached = [name for name in self.parameters if gradient_name(name) in outline]
            expected |= {gradient_name(name): self.parameters[name] for name in reached}
            expected |= _ABOUT_ACCUMULATED
            if self.parameters and not reached:  # a step of them would count, and leave no moments
                raise StateError(f"the state of expert {uid} lacks the accumulated gradients")
        _check_outline(uid, outline, expected)
        if update_count < 0 or (self.moments and bool(update_count) != bool(stepped)):
            raise StateError(f"{update_count} updates don't fit moments of {len(stepped)} parameters")
        return stepped

    @property
    def max_outline_bytes(self) -> int:
        """The limit for an encoded state's names and header."""
        per_parameter = len(self.moments) + self._accumulates
        return _NAME_BYTES * (len(self.block) + len(self.parameters) * per_parameter + 6)

    @property
    def max_bytes(self) -> int:
        """The limit for an encoded state."""
        moments = (self._moment(name, m) for name in self.parameters for m in self.moments)
        forms: list[Form] = [*self.block.values(), *moments, *_ABOUT_ACCUMULATED.values()]
        if self._accumulates:
            forms += self.parameters.values()
        return nbytes_of(forms) + self.max_outline_bytes

    @property
    def max_block_bytes(self) -> int:
        """The limit for the encoded block alone."""
        return nbytes_of(self.block.values()) + self.max_outline_bytes

    @property
    def _accumulates(self) -> bool:
        return self.rows_per_update > 1

    def _moment(self, parameter: str, moment: str) -> Form:
        return ((), torch.float32) if moment == "step" else self.parameters[parameter]


def check_state(uid: UID, state: Mapping[str, Tensor], update_count: int, form: StateForm) -> list[str]:
    """Returns the names of the parameters that have moments.

    Raises StateError as `StateForm.check` does, and if a number is not finite or is impossible.
    """
    stepped = form.check(uid, {name: form_of(tensor) for name, tensor in state.items()}, update_count)
    check_numbers(uid, state)
    if ACCUMULATED_ROWS in state:
        _check_accumulated(uid, accumulated_rows(state), state[ACCUMULATED_SIZES].tolist(), form)
    return stepped


def _check_accumulated(uid: UID, rows: int, sizes: list[float], form: StateForm) -> None:
    if not 0 < rows < form.rows_per_update:
        raise StateError(
            f"the gradients of {rows} rows are accumulated in expert {uid}; at most {form.rows_per_update - 1}"
        )
    least, most = sizes
    if least > most or bool(least) != bool(most):
        raise StateError(f"the accumulated gradients of expert {uid} can't have sizes of {least} to {most}")


def accumulated_rows(state: Mapping[str, Tensor]) -> int:
    """Rows whose gradients have not led to a step yet."""
    return int(state[ACCUMULATED_ROWS]) if ACCUMULATED_ROWS in state else 0


def check_numbers(uid: UID, state: Mapping[str, Tensor]) -> None:
    """Raises StateError if a number is not finite, or is negative where it can't be."""
    for name, tensor in state.items():
        if not is_finite(tensor):
            raise StateError(f"{name!r} of expert {uid} is not finite")
        moment = name.startswith(OPTIMIZER) and name.endswith((SECOND_MOMENT, STEP))
        if (moment or name == ACCUMULATED_SIZES) and extremes(tensor)[0] < 0:
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
    """The peer that gave the state, or `AVERAGED`, while it is on probation; empty if it is this node's own."""

    @property
    def accumulated_rows(self) -> int:
        """Rows whose gradients have not led to a step yet."""
        return accumulated_rows(self.state)


def to_bytes(checkpoint: Checkpoint, swarm_id: str, uid: UID, saved_at: float) -> bytes:
    """`saved_at`: Unix time in seconds."""
    header = Header(swarm_id=swarm_id, uid=str(uid), update_count=checkpoint.update_count, saved_at=saved_at)
    return encode_checkpoint(header, checkpoint.state)


def block_from_bytes(data: bytes, swarm_id: str, uid: UID, form: StateForm) -> State:
    """The block's tensors, by their names in the state. Raises StateError if one is missing or not finite."""

    def check(header: Header, outline: Outline) -> None:
        _check_owner(header, swarm_id, uid)
        _check_outline(uid, outline, form.block)

    _, state = decode_checkpoint(data, Header, check, form.max_outline_bytes)
    check_numbers(uid, state)
    return state


def _check_owner(header: Header, swarm_id: str, uid: UID) -> None:
    for name, found, expected in (("swarm", header.swarm_id, swarm_id), ("expert", header.uid, str(uid))):
        if found != expected:
            raise StateError(f"its {name} is {printable(found)}, not {expected}")


def from_bytes(data: bytes, swarm_id: str, uid: UID, update_count: int, form: StateForm) -> Checkpoint:
    """Raises StateError if the data is damaged, or is not this expert's state in this form. Does not check the
    numbers.
    """

    def check(header: Header, outline: Outline) -> None:
        _check_owner(header, swarm_id, uid)
        if header.update_count != update_count:
            raise StateError(f"its update count is {header.update_count}, not {update_count}")
        form.check(uid, outline, update_count)

    _, state = decode_checkpoint(data, Header, check, form.max_outline_bytes)
    return Checkpoint(state, update_count)
