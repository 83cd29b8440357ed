"""Whether a state from another peer can be the result of training, judged by the size of its numbers. A bad state with
numbers of an ordinary size passes. So every such state is on probation until this node has trained it for a while
(`Guard.doubt`).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Self

import torch
from torch import Tensor

from dht.manifest import OptimizerSpec
from dht.uid import UID
from expert_server.experts.format import (
    ACCUMULATED_SIZES,
    BLOCK,
    accumulated_rows,
    gradient_name,
    moment_name,
)
from peer.averaging import MAX_UPDATE_COUNT
from peer.errors import StateError

_MOST_SCALE = 3.0
"""A state's numbers may be this many times as large as in known states, plus what its updates explain."""
_DIRECTED_UPDATES = 64
"""The first steps are assumed to go in one direction (this many of them), and all later ones in random directions."""
_WALK = 2.0
"""The factor for random directions: n steps then lead about √n steps away."""
_LARGEST_BUFFER = 1e6
"""The limit for tensors that are not trained, for which nothing is known."""
_LARGEST_MOVE = 16.0
"""How far moments may move a number at once, in steps. In Adam it is always below 7.3: with the decay rates β of the
two moments, the bound is (1 - β₁) / √((1 - β₂)(1 - β₁²/β₂)).
"""
_EPSILON = 1e-8
"""Adam's epsilon."""
_STEEPEST = 1e6
"""The largest ratio of a row's gradient of the parameters to that of its updates. It is large if a norm divides by a
small number.
"""


@dataclass(frozen=True)
class Scale:
    """How large the parameters of a block are, as root mean squares."""

    tensors: Mapping[str, float]
    """For each tensor of the block, by name."""
    whole: float

    @classmethod
    def of(cls, parameters: Mapping[str, Tensor]) -> Self:
        norms = {name: _norm(tensor) for name, tensor in parameters.items()}
        count = sum(tensor.numel() for tensor in parameters.values())
        means = {name: norm / sqrt(max(1, parameters[name].numel())) for name, norm in norms.items()}
        return cls(means, sqrt(sum(norm * norm for norm in norms.values()) / max(1, count)))


def require_plausible(
    uid: UID, state: Mapping[str, Tensor], update_count: int, known: Collection[Scale], spec: OptimizerSpec
) -> None:
    """Raises StateError if the state can't be the result of this many updates.

    `state`: finite, with the names, shapes and dtypes of this expert. `known`: the scales of other states of this kind
    of expert, at least of its initial parameters.
    """
    names = next(iter(known)).tensors
    parameters = {name: state[BLOCK + name] for name in names}
    found = Scale.of(parameters)
    steps = min(update_count, _DIRECTED_UPDATES) + _WALK * sqrt(update_count)
    for name, size in found.tensors.items():
        # tensors that begin as zeros grow to the scale of the others
        usual = max(max(scale.tensors[name], scale.whole) for scale in known)
        if not size <= _MOST_SCALE * usual + steps * _step(spec, parameters[name].numel()):
            raise StateError(f"{name!r} of expert {uid} is far larger than training can make it: {size:.3g}")
    least = min(scale.whole for scale in known) / _MOST_SCALE
    least *= (1 - spec.learning_rate * spec.weight_decay) ** update_count
    # if decay is part of the gradient, it can lead to zero
    if found.whole < least and (spec.name == "adamw" or not spec.weight_decay):
        raise StateError(f"the parameters of expert {uid} are far smaller than training can make them")
    for name, tensor in parameters.items():
        _check_moments(uid, name, tensor, state, spec)
    _check_accumulated(uid, names, state)
    buffers = state.keys() - {BLOCK + name for name in names}
    for name in sorted(buffer for buffer in buffers if buffer.startswith(BLOCK)):
        if state[name].is_floating_point() and state[name].abs().max() > _LARGEST_BUFFER:
            raise StateError(f"{name!r} of expert {uid} is far too large")


def _step(spec: OptimizerSpec, numbers: int) -> float:
    """About how far an optimizer step moves each of this many numbers."""
    if spec.name != "sgd":
        return spec.learning_rate
    return spec.learning_rate * spec.clip_norm / (1 - spec.sgd_momentum) / sqrt(max(1, numbers))


def _check_moments(
    uid: UID, name: str, parameter: Tensor, state: Mapping[str, Tensor], spec: OptimizerSpec
) -> None:
    """Moments are averages of gradients, which were clipped, so they have a limit."""
    most = 2 * (spec.clip_norm + spec.weight_decay * _norm(parameter))
    first, second, momentum, step = (
        state.get(moment_name(name, moment))
        for moment in ("exp_avg", "exp_avg_sq", "momentum_buffer", "step")
    )
    if step is not None and step > MAX_UPDATE_COUNT:
        raise StateError(f"{name!r} of expert {uid} has taken too many steps")
    sizes = [_norm(first)] if first is not None else []
    sizes += [sqrt(float(second.double().sum()))] if second is not None else []
    sizes += [_norm(momentum) * (1 - spec.sgd_momentum)] if momentum is not None else []
    if not all(size <= most for size in sizes):
        raise StateError(
            f"the moments of {name!r} of expert {uid} are larger than clipped gradients make them"
        )
    if (
        first is not None
        and second is not None
        and (first.abs() > _LARGEST_MOVE * (second.sqrt() + _EPSILON)).any()
    ):
        raise StateError(f"the moments of {name!r} of expert {uid} would move it far away in the next step")


def _check_accumulated(uid: UID, names: Collection[str], state: Mapping[str, Tensor]) -> None:
    """Checks that accumulated gradients are no larger than their rows explain. Otherwise they would outweigh other
    callers' gradients in the same step.
    """
    if not (rows := accumulated_rows(state)):
        return
    gradients = [state[gradient_name(name)] for name in names if gradient_name(name) in state]
    norm = sqrt(sum(_norm(gradient) ** 2 for gradient in gradients))
    if norm > _STEEPEST * rows * float(state[ACCUMULATED_SIZES].max()):
        raise StateError(
            f"the accumulated gradients of expert {uid} are far larger than {rows} rows make them"
        )


def _norm(tensor: Tensor) -> float:
    """The norm in float64, where squares of float32 can't overflow, unless the device has no float64."""
    dtype = torch.float32 if tensor.device.type == "mps" else torch.float64
    return float(torch.linalg.vector_norm(tensor.detach(), dtype=dtype))
