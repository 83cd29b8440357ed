"""How evenly a router uses the live experts: the loss that evens it out, and the figures that show it.

Shapes: R rows, G_d size of grid dimension d, K experts for each row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dht.beam_search import Selection
from dht.directory import PrefixTables


@dataclass(frozen=True)
class LoadSpread:
    """How unevenly rows were spread over the live experts of a layer; 0 and 1 when each got as many."""

    cv: float
    """Coefficient of variation: standard deviation over mean."""
    max_over_mean: float

    @classmethod
    def mean(cls, spreads: Sequence["LoadSpread"]) -> "LoadSpread | None":
        if not spreads:
            return None
        return cls(
            sum(spread.cv for spread in spreads) / len(spreads),
            sum(spread.max_over_mean for spread in spreads) / len(spreads),
        )


def load_spread(selection: Selection, alive: PrefixTables) -> LoadSpread | None:
    """Of the rows that were sent; None when none was."""
    live = alive[-1]
    counts = np.zeros(live.shape)
    np.add.at(counts, tuple(selection.coordinates[selection.valid].T), 1)
    loads = counts[live]
    if not loads.any():
        return None
    return LoadSpread(float(loads.std() / loads.mean()), float(loads.max() / loads.mean()))


def balancing_loss(scores: Sequence[Tensor], selection: Selection, alive: PrefixTables) -> Tensor:
    """1 when all live experts get as many rows and as much probability, more when some get more of both. []

    Fedus et al. 2021, Switch Transformer (arXiv 2101.03961), equation 4: E * sum of f_e P_e, where f_e is expert e's
    part of the choices, all k of a row, which has no gradient, and P_e the mean of its softmax, which has.

    Here a gate has one softmax [R, G_d] for each grid dimension, over its live coordinates, so the loss is the mean
    over dimensions of the sum of f_i P_i / t_i. t_i is the part of all live experts that lie under coordinate i:
    1 / G_d where all are live.
    """
    live = alive[-1]
    chosen = selection.coordinates[selection.valid]  # (choices, dims)
    losses = []
    for d, scores_RG in enumerate(scores):
        others = tuple(axis for axis in range(live.ndim) if axis != d)
        under_G = live.sum(axis=others)
        coordinates = np.flatnonzero(under_G)
        target_G = under_G[coordinates] / max(1, under_G.sum())
        chosen_G = np.bincount(chosen[:, d], minlength=live.shape[d])[coordinates] / max(1, len(chosen))
        ratio_G = torch.from_numpy((chosen_G / target_G).astype(np.float32)).to(scores_RG.device)
        index = torch.from_numpy(coordinates).to(scores_RG.device)
        probability_G = scores_RG.index_select(1, index).softmax(dim=1).mean(dim=0)
        losses.append((ratio_G * probability_G).sum())
    return torch.stack(losses).mean()
