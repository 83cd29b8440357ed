"""The gate: scores for every grid coordinate, and weights for the experts that answered.

Shapes: R rows, D model width, G_d size of grid dimension d, K chosen experts.
"""

import torch
from torch import Tensor, nn


class Gate(nn.Module):
    """A small linear map. An expert's logit is the sum of one score per grid dimension (product keys)."""

    def __init__(self, hidden: int, grid: tuple[int, ...]) -> None:
        super().__init__()
        self.grid = grid
        self.linear = nn.Linear(hidden, sum(grid))

    def forward(self, x_RD: Tensor) -> tuple[Tensor, ...]:
        """One float32 score tensor [R, G_d] per grid dimension, whatever the precision of x."""
        with torch.autocast(x_RD.device.type, enabled=False):
            scores: Tensor = self.linear(x_RD.float())  # (R, sum of G_d)
        return torch.split(scores, list(self.grid), dim=-1)

    @staticmethod
    def logits(scores: tuple[Tensor, ...], coordinates: Tensor) -> Tensor:
        """Logits [R, K] of the experts at `coordinates`, int64 [R, K, dims]; differentiable in the scores."""
        gathered = [scores_RG.gather(1, coordinates[..., d]) for d, scores_RG in enumerate(scores)]
        return torch.stack(gathered).sum(dim=0)


def mixture_weights(logits_RK: Tensor, answered_RK: Tensor) -> Tensor:
    """Softmax over the experts that answered; the others weigh 0, and so does a row in which none did. [R, K]

    The paper, section 3.1: experts that fail are left out, and the weights of the rest sum to 1.
    """
    left_out_RK = ~answered_RK
    lowest = torch.finfo(logits_RK.dtype).min  # not -inf: a row of those has NaN for its softmax and gradient
    return logits_RK.masked_fill(left_out_RK, lowest).softmax(dim=-1).masked_fill(left_out_RK, 0)
