"""How two replicas of an expert become one state again. Pure."""

import torch
from torch import Tensor

from expert_server.experts.expert import State
from peer.averaging import drawn


def averaged(current: State, base: State, theirs: State, share: float) -> State:
    """The state `current` after `base`, from which it came, was averaged with `theirs`.

    So updates that were taken since `base` are kept. A moment that one side lacks counts as zeros there.
    """
    names = current.keys() | theirs.keys()
    return {
        name: _averaged(name, current.get(name), base.get(name), theirs.get(name), share)
        for name in sorted(names)
    }


def _averaged(
    name: str, current: Tensor | None, base: Tensor | None, theirs: Tensor | None, share: float
) -> Tensor:
    like = current if current is not None else theirs
    assert like is not None, "one of the two states has it"
    now, then, other = (torch.zeros_like(like) if t is None else t for t in (current, base, theirs))
    if not like.is_floating_point():
        return torch.maximum(now, other)
    if name.endswith(".step"):  # of the optimizer: a count, for the correction of its bias
        return now + (torch.maximum(then, other) - then)
    result = drawn(now, then, other, share)
    if name.endswith(".exp_avg_sq"):
        result.clamp_(min=0)
    return result.to(like.dtype)
