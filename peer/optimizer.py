"""An optimizer that calls torch's fused kernels without torch's optimizer classes.

Creating the first of those imports torch's compiler, which takes a second of CPU time and compiles nothing here.
"""

from collections.abc import Iterable
from operator import is_
from typing import Literal, TypeAlias

import torch
from torch import Tensor

OptimizerName: TypeAlias = Literal["adamw", "adam", "sgd"]

_MOMENTS = {
    "adamw": ("exp_avg", "exp_avg_sq", "step"),
    "adam": ("exp_avg", "exp_avg_sq", "step"),
    "sgd": ("momentum_buffer",),
}
_BETAS, _EPSILON = (0.9, 0.999), 1e-8


def moments_of(name: OptimizerName, momentum: float) -> tuple[str, ...]:
    """The names of the tensors that the optimizer keeps for each parameter. `momentum`: for sgd."""
    return () if name == "sgd" and not momentum else _MOMENTS[name]


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
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        """The tensors kept for each parameter that has had a gradient."""
        self._name = name
        self._momentum = momentum
        groups: dict[tuple[bool, torch.dtype], list[Tensor]] = {}
        for parameter in parameters:
            groups.setdefault((parameter.dim() > 1, parameter.dtype), []).append(parameter)
        self._groups = [(weight_decay if decays else 0.0, ps) for (decays, _), ps in groups.items()]
        self._counts: dict[int, tuple[Tensor, list[Tensor]]] = {}
        """By group number: one tensor with the number of steps of each parameter, and the elements of that tensor.

        Incrementing each of them alone would take as long as the step of a narrow expert.
        """

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
            for parameter in moved:
                if self.moments and parameter not in self.state:
                    self.state[parameter] = self.no_moments(parameter)
            if "step" in self.moments:
                self._count_step(group, moved)
            moments = {name: [self.state[p][name] for p in moved] for name in self.moments}
            gradients = [p.grad for p in moved if p.grad is not None]
            if self._name == "sgd":
                self._step_sgd(moved, gradients, moments.get("momentum_buffer", []), weight_decay)
            else:
                self._step_adam(moved, gradients, moments, weight_decay)

    def _count_step(self, group: int, moved: list[Tensor]) -> None:
        counts = [self.state[parameter]["step"] for parameter in moved]
        together, numbers = self._counts.get(group, (None, []))
        if together is None or len(counts) != len(numbers) or not all(map(is_, counts, numbers)):
            # other parameters have gradients than last time, or the state was replaced
            together = torch.stack(counts)
            self._counts[group] = together, list(together.unbind())
            for parameter, number in zip(moved, self._counts[group][1], strict=True):
                self.state[parameter]["step"] = number
        together += 1

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
