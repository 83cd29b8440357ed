"""An optimizer that calls torch's fused kernels without torch's optimizer classes.

Creating the first of those imports torch's compiler, which takes a second of CPU time and compiles nothing here.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import is_

import torch
from torch import Tensor

from peer.choices import OptimizerName

_MOMENTS = {
    "adamw": ("exp_avg", "exp_avg_sq", "step"),
    "adam": ("exp_avg", "exp_avg_sq", "step"),
    "sgd": ("momentum_buffer",),
}
_BETAS, _EPSILON = (0.9, 0.999), 1e-8


def moments_of(name: OptimizerName, momentum: float) -> tuple[str, ...]:
    """The names of the tensors that the optimizer keeps for each parameter. `momentum`: for sgd."""
    return () if name == "sgd" and not momentum else _MOMENTS[name]


@dataclass(frozen=True, eq=False)
class _Gathered:
    """The tensors of one group's parameters that had gradients in the last step. Looking them up for each parameter
    would take longer than the step of a narrow expert.
    """

    moved: list[Tensor]
    moments: dict[str, list[Tensor]]
    counts: Tensor | None
    """The step counts of all parameters in one tensor; `moments` contains views of it. None: steps are not counted."""


class Optimizer:
    """Steps parameters exactly as torch's AdamW, Adam and SGD do. Vectors, such as biases, have no weight decay."""

    def __init__(
        self,
        parameters: Iterable[Tensor],
        name: OptimizerName,
        learning_rate: float,
        weight_decay: float,
        momentum: float = 0.9,
    ) -> None:
        """`momentum`: for sgd."""
        self.learning_rate: float = learning_rate
        """The learning rate of the next step."""
        self.moments: tuple[str, ...] = moments_of(name, momentum)
        """The names of the tensors kept for each parameter; torch's optimizers use the same."""
        self._state: dict[Tensor, dict[str, Tensor]] = {}
        self._name = name
        self._momentum = momentum
        groups: dict[tuple[bool, torch.dtype], list[Tensor]] = {}
        for parameter in parameters:
            groups.setdefault((parameter.dim() > 1, parameter.dtype), []).append(parameter)
        self._groups = [(weight_decay if decays else 0.0, ps) for (decays, _), ps in groups.items()]
        self._gathered: dict[int, _Gathered] = {}
        """The gathered tensors of each group, by the group's number."""

    @property
    def state(self) -> Mapping[Tensor, Mapping[str, Tensor]]:
        """The tensors kept for each parameter that has had a gradient."""
        return self._state

    def replace_state(self, state: Mapping[Tensor, dict[str, Tensor]]) -> None:
        """`state`: as the property gives it."""
        self._state = dict(state)
        self._gathered.clear()

    def zero_grad(self) -> None:
        for _, parameters in self._groups:
            for parameter in parameters:
                parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Steps each parameter that has a gradient."""
        for group, (weight_decay, parameters) in enumerate(self._groups):
            moved = [parameter for parameter in parameters if parameter.grad is not None]
            if not moved:
                continue
            found = self._gathered.get(group)
            if found is None or len(found.moved) != len(moved) or not all(map(is_, found.moved, moved)):
                found = self._gathered[group] = self._gather(moved)
            if found.counts is not None:
                found.counts.add_(1)
            gradients = [p.grad for p in moved if p.grad is not None]
            if self._name == "sgd":
                self._step_sgd(moved, gradients, found.moments.get("momentum_buffer", []), weight_decay)
            else:
                self._step_adam(moved, gradients, found.moments, weight_decay)

    def _gather(self, moved: list[Tensor]) -> "_Gathered":
        for parameter in moved:
            if self.moments and parameter not in self._state:
                self._state[parameter] = self.no_moments(parameter)
        counts = None
        if "step" in self.moments:
            counts = torch.stack([self._state[parameter]["step"] for parameter in moved])
            for parameter, count in zip(moved, counts.unbind(), strict=True):
                self._state[parameter]["step"] = count
        return _Gathered(
            moved, {name: [self._state[p][name] for p in moved] for name in self.moments}, counts
        )

    def no_moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """The moments of a parameter that has not had a gradient."""
        return {
            name: torch.zeros((), device=parameter.device) if name == "step" else torch.zeros_like(parameter)
            for name in self.moments
        }

    def _step_adam(
        self,
        parameters: list[Tensor],
        gradients: list[Tensor],
        moments: dict[str, list[Tensor]],
        weight_decay: float,
    ) -> None:
        step = torch._fused_adamw_ if self._name == "adamw" else torch._fused_adam_
        step(
            parameters, gradients, moments["exp_avg"], moments["exp_avg_sq"], [], moments["step"],
            lr=self.learning_rate, beta1=_BETAS[0], beta2=_BETAS[1], weight_decay=weight_decay, eps=_EPSILON,
            amsgrad=False, maximize=False,
        )  # fmt: skip

    def _step_sgd(
        self,
        parameters: list[Tensor],
        gradients: list[Tensor],
        buffers: list[Tensor],
        weight_decay: float,
    ) -> None:
        torch._fused_sgd_(
            parameters, gradients, buffers,
            lr=self.learning_rate, momentum=self._momentum, weight_decay=weight_decay, dampening=0.0,
            nesterov=False, maximize=False, is_first_step=False,
        )  # fmt: skip
