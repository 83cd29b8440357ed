"""The optimizers of experts: torch's fused kernels, without torch's optimizer classes.

The first of those that is made imports torch's compiler: two seconds of computing, for a node that compiles nothing.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from dht.manifest import OptimizerSpec

_MOMENTS = {
    "adamw": ("exp_avg", "exp_avg_sq", "step"),
    "adam": ("exp_avg", "exp_avg_sq", "step"),
    "sgd": ("momentum_buffer",),
}
_BETAS, _EPSILON = (0.9, 0.999), 1e-8


def moments_of(spec: OptimizerSpec) -> tuple[str, ...]:
    """The names of what is remembered of each parameter."""
    return _MOMENTS[spec.name] if spec.moments else ()


class Optimizer:
    """Steps parameters as torch's AdamW, Adam and SGD do, number for number. Vectors, as biases are, do not decay."""

    def __init__(self, parameters: Iterable[Tensor], spec: OptimizerSpec) -> None:
        self.learning_rate = spec.learning_rate
        """Of the next step."""
        self.moments = moments_of(spec)
        """The names of what is remembered of each parameter; torch's optimizers call it so, too."""
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        """What is remembered of each parameter that has had a gradient."""
        self._spec = spec
        groups: dict[tuple[bool, torch.dtype], list[Tensor]] = {}
        for parameter in parameters:
            groups.setdefault((parameter.dim() > 1, parameter.dtype), []).append(parameter)
        self._groups = [(spec.weight_decay if decays else 0.0, ps) for (decays, _), ps in groups.items()]

    def zero_grad(self) -> None:
        for _, parameters in self._groups:
            for parameter in parameters:
                parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Steps each parameter that has a gradient."""
        for weight_decay, parameters in self._groups:
            moved = [parameter for parameter in parameters if parameter.grad is not None]
            if not moved:
                continue
            for parameter in moved:
                if self.moments and parameter not in self.state:
                    self.state[parameter] = self._nothing(parameter)
            moments = {name: [self.state[p][name] for p in moved] for name in self.moments}
            gradients = [p.grad for p in moved if p.grad is not None]
            if self._spec.name == "sgd":
                self._step_sgd(moved, gradients, moments.get("momentum_buffer", []), weight_decay)
            else:
                self._step_adam(moved, gradients, moments, weight_decay)

    def _nothing(self, parameter: Tensor) -> dict[str, Tensor]:
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
        torch._foreach_add_(moments["step"], 1)
        step = torch._fused_adamw_ if self._spec.name == "adamw" else torch._fused_adam_
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
            lr=self.learning_rate, momentum=self._spec.sgd_momentum, weight_decay=weight_decay, dampening=0.0,
            nesterov=False, maximize=False, is_first_step=False,
        )  # fmt: skip
