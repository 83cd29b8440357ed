"""The outcomes of a step, and the guard that returns an expert to its last good state if its parameters turn bad."""

import logging
from collections.abc import Mapping
from enum import Flag, auto
from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from dht.manifest import OptimizerSpec
from peer.formatting import counted
from peer.optimizer import Optimizer

logger: logging.Logger = logging.getLogger(__name__)

CHECK_EVERY_UPDATES = 8
KEEP_EVERY_UPDATES = 64
"""A multiple of the constant above, so that only a state that was checked is kept."""
PROBATION_UPDATES = 100
"""After this many good updates, a state that another peer gave counts as good."""


class StepOutcome(Flag):
    """The outcome of a backward pass's optimizer step: taken, skipped or withheld, and possibly a rollback."""

    NONE = 0
    """There was no step: a forward pass."""
    TAKEN = auto()
    SKIPPED = auto()
    """The gradient of a parameter was not finite."""
    ROLLED_BACK = auto()
    """The parameters had turned bad, and the expert returned to its last good state."""
    WITHHELD = auto()
    """Its callers were held back (`Callers`)."""


class Guard:
    """Watches the parameters of one block, and rolls block and optimizer back to their last good state.

    The parameters are bad if their norm is not finite, or is more than `guard_factor` times the larger of two norms:
    that of the kept state (or of one on probation), and that of `KEEP_EVERY_UPDATES` steps of the full step size from a
    block of zeros. The second norm lets a block that starts near zero grow.

    A state that another peer gave is on probation: if it turns bad, the state before it is restored. It replaces that
    state after `PROBATION_UPDATES` good updates. An average begins another probation, but at most replicas the next
    average comes before that ends. So updates before an average count too when the next one is about to begin.

    The kept state is in bfloat16, which takes half the memory and has the range of float32.
    """

    def __init__(self, name: str, block: nn.Module, optimizer: Optimizer, spec: OptimizerSpec) -> None:
        self.rollbacks: int = 0
        """How often the state was rolled back."""
        self._name = name
        self._parameters = list(block.parameters())
        self._optimizer = optimizer
        self._factor = spec.guard_factor
        size = sum(parameter.numel() for parameter in self._parameters)
        self._reach = KEEP_EVERY_UPDATES * spec.learning_rate * sqrt(size)
        self._updates = 0
        """Updates since the state was kept or replaced."""
        self._updates_with_averages = 0
        """Updates since the state was kept, or replaced by anything but an average."""
        self._keep_after = KEEP_EVERY_UPDATES
        self._kept: list[tuple[Tensor, dict[str, Tensor]]] = []
        self._usual_norm = 0.0
        self.keep()

    @property
    def is_on_probation(self) -> bool:
        """Whether another peer gave the present state, and it has not proved good yet."""
        return self._keep_after == PROBATION_UPDATES

    @property
    def may_keep(self) -> bool:
        """Whether the present state may be kept before another one takes its place: if it is this node's own, or has
        taken as many updates as a probation lasts, and some since the last average. Otherwise, who averages twice in a
        row could have the first average kept at once.
        """
        is_proven = self._updates_with_averages >= PROBATION_UPDATES and self._updates >= CHECK_EVERY_UPDATES
        return is_proven or not self.is_on_probation

    def keep(self) -> None:
        """Keeps the present state as good. Call it after this node's own state was imported."""
        nothing: list[tuple[Tensor | None, Mapping[str, Tensor]]] = [(None, {}) for _ in self._parameters]
        self._kept = [
            (
                _halved(parameter.detach(), values),
                {key: _halved(value, moments.get(key)) for key, value in self._moments_of(parameter).items()},
            )
            for parameter, (values, moments) in zip(self._parameters, self._kept or nothing, strict=True)
        ]
        self._usual_norm = self._norm()
        self._updates, self._keep_after = 0, KEEP_EVERY_UPDATES
        self._updates_with_averages = 0

    def doubt(self, *, is_average: bool) -> None:
        """Puts the present state on probation. Call it after another peer's state, or an average with it, was
        imported.
        """
        self._usual_norm = max(self._usual_norm, self._norm())
        self._updates, self._keep_after = 0, PROBATION_UPDATES
        if not is_average:
            self._updates_with_averages = 0

    @property
    def checks_next(self) -> bool:
        """Whether the parameters are checked after the next update."""
        return (self._updates + 1) % CHECK_EVERY_UPDATES == 0

    def note_update(self) -> bool:
        """Checks the parameters every `CHECK_EVERY_UPDATES`. Keeps the state every `KEEP_EVERY_UPDATES`, or after its
        probation.

        Returns False if it rolled back.
        """
        self._updates += 1
        self._updates_with_averages += 1
        if self._updates % CHECK_EVERY_UPDATES:
            return True
        is_good = self.check()
        if is_good and self._updates >= self._keep_after:
            self.keep()
        return is_good

    def check(self) -> bool:
        """Whether the parameters are good. If they are not, rolls back."""
        norm, most = self._norm(), self._factor * max(self._usual_norm, self._reach)
        if norm <= most:  # false for NaN
            return True
        logger.warning(
            "%s went bad (its parameter norm is %.3g, at most %.3g is allowed): rolled back by %s",
            self._name, norm, most, counted(self._updates, "update"),
        )  # fmt: skip
        self._roll_back()
        return False

    @torch.no_grad()
    def _roll_back(self) -> None:
        state: dict[Tensor, dict[str, Tensor]] = {}
        for parameter, (values, moments) in zip(self._parameters, self._kept, strict=True):
            parameter.copy_(values)
            if moments:
                state[parameter] = self._optimizer.no_moments(parameter)
                for key, value in moments.items():
                    state[parameter][key].copy_(value)
        self._optimizer.replace_state(state)
        self._usual_norm = self._norm()
        self._updates, self._keep_after = 0, KEEP_EVERY_UPDATES
        self._updates_with_averages = 0
        self.rollbacks += 1

    def _norm(self) -> float:
        return float(get_total_norm(self._parameters))

    def _moments_of(self, parameter: Tensor) -> Mapping[str, Tensor]:
        return self._optimizer.state.get(parameter, {})


def _halved(tensor: Tensor, before: Tensor | None) -> Tensor:
    """A copy in bfloat16. A single number, such as a count of steps, is copied exactly.

    Reuses the memory of the previous copy: allocating memory costs several times as much as copying.
    """
    if before is not None:
        return before.copy_(tensor)
    return tensor.to(torch.bfloat16) if tensor.numel() > 1 else tensor.clone()
