"""The gate: scores for every grid coordinate, and weights for the experts that answered.

Shapes: R rows, D model width, G_d size of grid dimension d, K chosen experts.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Gate(nn.Module):
    """A small linear map. An expert's logit is the sum of one score per grid dimension (product keys).

    It computes in float32 whatever the precision of x and of its own parameters, and under autocast too.
    """

    def __init__(
        self, hidden: int, grid: tuple[int, ...], *, scale: float | None = None, has_noise: bool = False
    ) -> None:
        """With a `scale` the weights start from a normal distribution of standard deviation sqrt(scale / hidden), cut
        off at twice that, and no bias (Switch Transformer, arXiv 2101.03961, section 2.4).
        """
        super().__init__()
        self.grid = grid
        self.linear = nn.Linear(hidden, sum(grid))
        if scale is not None:
            spread = math.sqrt(scale / hidden)
            nn.init.trunc_normal_(self.linear.weight, std=spread, a=-2 * spread, b=2 * spread)
            nn.init.zeros_(self.linear.bias)
        self.noise: nn.Linear | None = None
        if has_noise:  # starts at zero, as in Shazeer et al. 2017, appendix A
            self.noise = nn.Linear(hidden, sum(grid), bias=False)
            nn.init.zeros_(self.noise.weight)

    def forward(self, x_RD: Tensor) -> tuple[Tensor, ...]:
        """One float32 score tensor [R, G_d] per grid dimension."""
        return self._map(self.linear, x_RD)

    def spreads(self, x_RD: Tensor) -> tuple[Tensor, ...]:
        """How widely each score varies, before the softplus: as `forward`, for a gate that has noise."""
        assert self.noise is not None, "this gate has no noise"
        return self._map(self.noise, x_RD)

    def _map(self, linear: nn.Linear, x_RD: Tensor) -> tuple[Tensor, ...]:
        bias = None if linear.bias is None else linear.bias.float()
        with torch.autocast(x_RD.device.type, enabled=False):
            scores = F.linear(x_RD.float(), linear.weight.float(), bias)  # (R, sum of G_d)
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
