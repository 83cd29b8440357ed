"""The guard: the last good state of an expert, to which it goes back when its parameters turn bad."""

import logging
from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from dht.manifest import OptimizerSpec
from expert_server.optimizer import Optimizer
from peer.formatting import counted

logger = logging.getLogger(__name__)

CHECK_EVERY_UPDATES = 8
KEEP_EVERY_UPDATES = 64  # a multiple of the above: only what was checked is kept


class Guard:
    """Watches the parameters of one block, and rolls block and optimizer back to their last good state.

    Bad means: the norm of all parameters is not finite, or more than `guard_factor` times the larger of two: the
    norm in the kept state, and the norm of what `KEEP_EVERY_UPDATES` steps of the full step size add to a block of
    zeros. The second lets a block that starts near zero grow.

    The kept state is in bfloat16: half of the memory of weights and optimizer state, and float32's range.
    """

    def __init__(self, name: str, block: nn.Module, optimizer: Optimizer, spec: OptimizerSpec) -> None:
        self.rollbacks = 0
        self._name = name
        self._parameters = list(block.parameters())
        self._optimizer = optimizer
        self._factor = spec.guard_factor
        size = sum(parameter.numel() for parameter in self._parameters)
        self._reach = KEEP_EVERY_UPDATES * spec.learning_rate * sqrt(size)
        self._updates = 0
        """Since the state was kept."""
        self._kept: list[tuple[Tensor, dict[str, Tensor]]] = []
        self._kept_norm = 0.0
        self.keep()

    def keep(self) -> None:
        """Takes the state as it is now for good. To be called when it was replaced by another, say from a disk."""
        nothing: list[tuple[Tensor | None, dict[str, Tensor]]] = [(None, {}) for _ in self._parameters]
        self._kept = [
            (
                _halved(parameter.detach(), values),
                {key: _halved(value, moments.get(key)) for key, value in self._moments_of(parameter).items()},
            )
            for parameter, (values, moments) in zip(self._parameters, self._kept or nothing, strict=True)
        ]
        self._kept_norm = self._norm()
        self._updates = 0

    @property
    def looks_next(self) -> bool:
        """Whether the next update is one after which the parameters are looked at."""
        return (self._updates + 1) % CHECK_EVERY_UPDATES == 0

    def note_update(self) -> None:
        """Checks after every few updates, and keeps the state now and then."""
        self._updates += 1
        if self._updates % CHECK_EVERY_UPDATES:
            return
        if self.check() and self._updates >= KEEP_EVERY_UPDATES:
            self.keep()

    def check(self) -> bool:
        """Whether the parameters are good. If not, they are those of the last good state when this returns."""
        norm, most = self._norm(), self._factor * max(self._kept_norm, self._reach)
        if norm <= most:  # not so for NaN
            return True
        logger.warning(
            "%s went bad, parameter norm %.3g (at most %.3g): rolled back by %s",
            self._name, norm, most, counted(self._updates, "update"),
        )  # fmt: skip
        self._roll_back()
        return False

    @torch.no_grad()
    def _roll_back(self) -> None:
        for parameter, (values, moments) in zip(self._parameters, self._kept, strict=True):
            parameter.copy_(values)
            if not moments:
                self._optimizer.state.pop(parameter, None)
            for key, value in moments.items():
                self._optimizer.state[parameter][key].copy_(value)
        self._updates = 0
        self.rollbacks += 1

    def _norm(self) -> float:
        return float(get_total_norm(self._parameters))

    def _moments_of(self, parameter: Tensor) -> dict[str, Tensor]:
        return self._optimizer.state.get(parameter, {})


def _halved(tensor: Tensor, before: Tensor | None) -> Tensor:
    """A copy in bfloat16; of a single number, such as a count of steps, an exact one.

    It takes the memory of the copy before: new memory costs the system several times as much as the copy itself.
    """
    if before is not None:
        return before.copy_(tensor)
    return tensor.to(torch.bfloat16) if tensor.numel() > 1 else tensor.clone()
