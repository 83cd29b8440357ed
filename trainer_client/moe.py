"""A decentralized mixture of experts as a torch layer.

Ryabinin & Gusev 2020 (arXiv 2002.04013), section 3.1: y = sum of w_k f_k(x) over the experts that answered, with
weights softmax over those experts' logits.

Shapes: B sequences, T positions, R = B * T rows, K experts for each row, D hidden size.
"""

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from peer.codec import Floats
from trainer_client.forward_pass import ForwardPass
from trainer_client.gate import Gate, mixture_weights

T = TypeVar("T")

Run = Callable[[Coroutine[Any, Any, T]], T]
"""Runs a coroutine on the loop's thread and waits for it."""


class Experts(Protocol):
    """What the layer needs of `dispatch`: all experts of a swarm, forward and backward."""

    async def forward(
        self,
        layer: int,
        inputs: Floats,
        scores: Sequence[Floats],
        k: int,
        sequence_length: int,
        keep: bool = False,
    ) -> ForwardPass: ...

    async def backward(self, forward: ForwardPass, gradients: Floats) -> Floats: ...


class RemoteMixtureOfExperts(nn.Module):
    """Sends each token to its top-k live experts, and mixes what they answer. Holds the gate alone.

    Where no expert answers, a token passes unchanged: experts carry their own residual connection.
    """

    def __init__(
        self,
        layer: int,
        hidden: int,
        grid: tuple[int, ...],
        k: int,
        experts: Experts,
        run: "Run[Any]",
        choose_by: Literal["token", "sequence"] = "token",
    ) -> None:
        """`choose_by="sequence"` sends all tokens of a sequence where their mean says: not for causal models, in which
        a token may not know of later ones.
        """
        super().__init__()
        self.layer = layer
        self.k = k
        self.choose_by = choose_by
        self.gate = Gate(hidden, grid)
        self._experts = experts
        self._run = run

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]; each of the B sequences is causal by itself."""
        x_RD = x_BTD.flatten(0, 1)
        scores = self._scores(x_BTD)
        scores_numpy = [table.detach().cpu().numpy() for table in scores]
        outputs_RKD, answered_RK, coordinates = _CallExperts.apply(  # type: ignore[no-untyped-call]  # torch's lacks types
            x_RD, self.gate.linear.weight, self, scores_numpy, x_BTD.shape[1], torch.is_grad_enabled()
        )
        logits_RK = self.gate.logits(scores, coordinates)
        weights_RK = mixture_weights(logits_RK, answered_RK)
        mixed_RD = (weights_RK.to(outputs_RKD.dtype).unsqueeze(1) @ outputs_RKD).squeeze(1)
        y_RD = torch.where(answered_RK.any(dim=1, keepdim=True), mixed_RD, x_RD)
        return y_RD.view_as(x_BTD)

    def _scores(self, x_BTD: Tensor) -> tuple[Tensor, ...]:
        """One [R, G_d] table per grid dimension."""
        if self.choose_by == "token":
            scores: tuple[Tensor, ...] = self.gate(x_BTD.flatten(0, 1))
            return scores
        return tuple(table.repeat_interleave(x_BTD.shape[1], dim=0) for table in self.gate(x_BTD.mean(dim=1)))

    def call_forward(
        self, inputs: Floats, scores: Sequence[Floats], sequence_length: int, keep: bool
    ) -> ForwardPass:
        result: ForwardPass = self._run(
            self._experts.forward(self.layer, inputs, scores, self.k, sequence_length, keep)
        )
        return result

    def call_backward(self, forward: ForwardPass, gradients: Floats) -> Floats:
        result: Floats = self._run(self._experts.backward(forward, gradients))
        return result


class _CallExperts(torch.autograd.Function):
    """The remote part of the layer as one function, so that backward too calls all servers at once."""

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        anchor: Tensor,
        mixture: RemoteMixtureOfExperts,
        scores: Sequence[Floats],
        sequence_length: int,
        keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs [R, K, D], which of them are there [R, K], and the experts' coordinates [R, K, dims].

        `anchor` is any parameter: experts are sent gradients also where x needs none, as in a model's first layer.
        """
        inputs = x_RD.detach().cpu().float().numpy()
        ctx.mixture = mixture
        ctx.forward_pass = result = mixture.call_forward(inputs, scores, sequence_length, keep)
        outputs_RKD = torch.from_numpy(result.outputs).to(x_RD)
        answered_RK = torch.from_numpy(result.answered).to(x_RD.device)
        coordinates = torch.from_numpy(result.coordinates).to(x_RD.device)
        ctx.mark_non_differentiable(answered_RK, coordinates)
        return outputs_RKD, answered_RK, coordinates

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradients_RKD = gradients[0]
        numbers = np.ascontiguousarray(gradients_RKD.detach().cpu().float().numpy())
        total_RD = ctx.mixture.call_backward(ctx.forward_pass, numbers)
        return torch.from_numpy(total_RD).to(gradients_RKD), None, None, None, None, None
