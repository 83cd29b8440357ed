"""How evenly a router uses the live experts: the loss and the bias that balance the load, the figures that show it, and
the assignment that enforces it.

`LoadBias` balances without a gradient (Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing", arXiv 2408.15664): a
bias for each expert is added to its score when experts are chosen, but does not count in any weight. After each
optimizer step the bias falls for experts that got more rows than the mean, and rises for the others. Each load is
paired with the bias that caused it. Otherwise the bias would oscillate when several steps are in flight.

`balanced_assignment` gives each row one expert and each expert equally many rows, with the highest total score. That is
a linear assignment problem (BASE layers, Lewis et al. 2021, arXiv 2103.16716, section 3.1).

Shapes: R rows, G_d size of score table d, K experts for each row, E live experts, N undecided rows, S entries of a
bias.
"""

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dht.beam_search import Selection, score_columns
from dht.directory import PrefixTables
from peer.codec import Booleans, Floats, Integers

_MAX_ENTRIES = 4096
_LARGE_PRIME = 4093
_AVERAGED_STEPS = 10
"""Loads, and the biases that led to them, are averaged over this many optimizer steps."""
_REACH = 0.5
"""How far a bias may be from its average, in standard deviations of the logits. In one step it moves a tenth of
that.
"""
_MOST_BIAS = 8.0
"""The largest bias, in standard deviations of the logits."""

_LIMIT = np.float32(1e15)  # its square is far from overflow
_SOLVED_WHOLE = 256  # rows
_SOLVED_AT_ONCE = 512
_STEPS = 26
_LAST_TEMPERATURE = 0.001
_LEAST_EXPONENT = np.float32(-30)
"""Smaller shares than e⁻³⁰ are replaced by that: some processors compute much more slowly with subnormal numbers."""
_CLEAR = 8  # last temperatures


@dataclass(frozen=True)
class LoadSpread:
    """How unevenly rows were spread over the live experts of a layer; 0 and 1 if all got equally many."""

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
    """The spread of the rows that were sent; None if none were."""
    live = alive[-1]
    counts = np.zeros(live.shape)
    np.add.at(counts, tuple(selection.coordinates[selection.valid].T), 1)
    loads = counts[live]
    if not loads.any():
        return None
    return LoadSpread(float(loads.std() / loads.mean()), float(loads.max() / loads.mean()))


def as_scored(table: Booleans, scores: Sequence[Floats] | Sequence[Tensor]) -> Booleans:
    """A table of the grid's shape, in the shape in which a gate scores experts: flat without product keys."""
    return table.reshape([scores_RG.shape[1] for scores_RG in scores])


def balancing_loss(scores: Sequence[Tensor], selection: Selection, alive: PrefixTables) -> Tensor:
    """1 if all live experts get equally many rows and equal probability, more if some get more of both. []

    Fedus et al. 2021, Switch Transformer (arXiv 2101.03961), equation 4: E * sum of f_e P_e. Here f_e is expert e's
    share of all choices, and has no gradient. P_e is the mean of its softmax over the rows, and has a gradient. A gate
    with product keys has one softmax [R, G_d] for each grid dimension, over its live coordinates. So the loss is the
    mean over dimensions of the sum of f_i P_i / t_i, where t_i is the share of the live experts that lie under
    coordinate i: 1 / G_d if all are live.
    """
    live = as_scored(alive[-1], scores)
    chosen = score_columns(scores, selection.coordinates[selection.valid], alive[-1].shape)
    losses = []
    for d, scores_RG in enumerate(scores):
        others = tuple(axis for axis in range(live.ndim) if axis != d)
        under_G = live.sum(axis=others)
        coordinates = np.flatnonzero(under_G)
        target_G = under_G[coordinates] / max(1, int(under_G.sum()))
        chosen_G = np.bincount(chosen[d], minlength=live.shape[d])[coordinates] / max(1, len(chosen[d]))
        ratio_G = torch.from_numpy((chosen_G / target_G).astype(np.float32)).to(scores_RG.device)
        index = torch.from_numpy(coordinates).to(scores_RG.device)
        probability_G = scores_RG.index_select(1, index).softmax(dim=1).mean(dim=0)
        losses.append((ratio_G * probability_G).sum())
    return torch.stack(losses).mean()


@dataclass(frozen=True)
class Load:
    """The rows that experts got, by the entries of a `LoadBias`."""

    rows: Floats  # [S]
    live: Floats  # [S], live experts
    bias: Floats  # [S], by which they were chosen
    spread: float
    """The standard deviation of the logits of a row's live experts, averaged over rows."""

    def __add__(self, other: "Load") -> "Load":
        rows, others = float(self.rows.sum()), float(other.rows.sum())
        spread = (rows * self.spread + others * other.spread) / max(1.0, rows + others)
        return Load(self.rows + other.rows, np.maximum(self.live, other.live), other.bias, spread)


class LoadSum:
    """The load of a step's forward passes, on whatever threads they run."""

    def __init__(self) -> None:
        self._load: Load | None = None
        self._lock = threading.Lock()

    def add(self, load: Load) -> None:
        with self._lock:
            self._load = load if self._load is None else self._load + load

    def take(self) -> Load | None:
        """The sum since the last call; None if nothing was added."""
        with self._lock:
            load, self._load = self._load, None
            return load


class LoadBias(nn.Module):
    """A bias that is added to the score of each expert of a layer when experts are chosen, so that all get equally many
    rows.

    Its state is three buffers of up to 4,096 entries, saved and averaged with the dense part. If a layer has more
    experts, several share an entry.
    """

    def __init__(self, grid: tuple[int, ...]) -> None:
        super().__init__()
        count = math.prod(grid)
        size = count if count <= _MAX_ENTRIES else _LARGE_PRIME
        self._grid = grid  # the entry of an expert is its number in the order of the grid, modulo their count
        self.bias: Tensor
        self.average_bias: Tensor
        self.average_load: Tensor
        self.register_buffer("bias", torch.zeros(size))
        self.register_buffer("average_bias", torch.zeros(size))
        self.register_buffer("average_load", torch.ones(size))  # relative to the mean

    def table(self) -> Floats:
        """The present bias of each expert: float32, of the grid's shape."""
        return np.resize(self.bias.float().cpu().numpy(), self._grid)

    def measure(self, scores: Sequence[Tensor], selection: Selection, alive: PrefixTables) -> Load:
        """The load in a forward pass."""
        size = len(self.bias)
        chosen = np.ravel_multi_index(tuple(selection.coordinates[selection.valid].T), self._grid)
        rows_S = np.bincount(chosen % size, minlength=size)
        live_S = np.bincount(np.flatnonzero(alive[-1]) % size, minlength=size)
        live, variance = as_scored(alive[-1], scores), 0.0
        for d, scores_RG in enumerate(scores):
            others = tuple(axis for axis in range(live.ndim) if axis != d)
            under_G = torch.from_numpy(live.any(axis=others)).to(scores_RG.device)
            variance += float(scores_RG.detach()[:, under_G].var(dim=1, correction=0).mean())
        bias_S = self.bias.float().cpu().numpy().copy()
        return Load(rows_S.astype(np.float32), live_S.astype(np.float32), bias_S, math.sqrt(variance))

    @torch.no_grad()
    def correct(self, load: Load) -> None:
        """Moves each live entry below the average bias of the last steps by the logarithm of its average load, limited
        to `_REACH` times the logits' spread.

        Entries of experts that are not live stay as they are. Nothing changes if no expert got a row, or if the scores
        are not finite.
        """
        live_S, unit = load.live > 0, load.spread
        if not load.rows.any() or not 0 < unit < math.inf:
            return
        count_S = load.live[live_S]
        even_S = count_S * (load.rows.sum() / count_S.sum())
        live = torch.from_numpy(np.flatnonzero(live_S)).to(self.bias.device)
        loads, biases = (
            buffer[live].lerp(torch.from_numpy(new).to(buffer), 1 / _AVERAGED_STEPS)
            for buffer, new in (
                (self.average_load, load.rows[live_S] / even_S),
                (self.average_bias, load.bias[live_S]),
            )
        )
        most = _MOST_BIAS * unit
        # another trainer may have given them
        loads, biases = loads.clamp(0, len(live)), biases.clamp(-most, most)
        bias = biases - _REACH * unit * loads.clamp(1 / math.e, math.e).log()
        weights = torch.from_numpy(count_S / count_S.sum()).to(bias)
        bias = (bias - bias @ weights).clamp(-most, most)
        for buffer, values in ((self.average_load, loads), (self.average_bias, biases), (self.bias, bias)):
            buffer[live] = values


def balanced_assignment(scores_RE: Floats) -> Integers:
    """The expert of each row [R]. Each gets R / E rows; if E does not divide R, those most in demand get one more.

    Up to 256 rows, scipy's solver decides all of them. With more rows, experts get prices, and each row takes the
    expert that is best for it after prices are subtracted. The solver decides only rows whose best two experts are
    about equally good, 512 at a time. The total is the highest, or close to it if there are more than 512 such rows.

    A score beyond ±1e15 counts as ±1e15 and NaN as the lowest.
    """
    scores_RE = np.clip(np.where(np.isnan(scores_RE), -_LIMIT, scores_RE), -_LIMIT, _LIMIT)
    rows = len(scores_RE)
    capacity_E = _capacities(scores_RE)
    if rows <= _SOLVED_WHOLE:
        return _solve(scores_RE, _slots(capacity_E))
    prices_E, temperature = _prices(scores_RE, capacity_E)
    value_RE = scores_RE - prices_E
    chosen_R: Integers = value_RE.argmax(axis=1)
    unclear_R = _margins(value_RE) < _CLEAR * temperature
    while (left_E := capacity_E - np.bincount(chosen_R[~unclear_R], minlength=len(capacity_E))).min() < 0:
        unclear_R |= (left_E < 0)[chosen_R]
    undecided_N, slots_N = np.flatnonzero(unclear_R), _slots(left_E)
    parts = -(-len(undecided_N) // _SOLVED_AT_ONCE)
    for part in range(parts):
        some, slots = undecided_N[part::parts], slots_N[part::parts]
        chosen_R[some] = _solve(value_RE[some], slots)
    return chosen_R


def _margins(value_RE: Floats) -> Floats:
    """By how much each row's best expert is better than its second best: [R]."""
    if value_RE.shape[1] == 1:
        return np.full(len(value_RE), _LIMIT)
    best_two_R2 = np.partition(value_RE, -2, axis=1)[:, -2:]
    margins_R: Floats = best_two_R2[:, 1] - best_two_R2[:, 0]
    return margins_R


def _capacities(scores_RE: Floats) -> Integers:
    """How many rows each expert gets: [E], R in all."""
    rows, experts = scores_RE.shape
    capacity_E = np.full(experts, rows // experts)
    demand_E = _shares(scores_RE, np.float32(1)).sum(axis=0)
    capacity_E[np.argsort(-demand_E, kind="stable")[: rows % experts]] += 1
    return capacity_E


def _slots(capacity_E: Integers) -> Integers:
    """Each expert, repeated as often as it may get rows."""
    return np.repeat(np.arange(len(capacity_E)), capacity_E)


def _solve(scores_NE: Floats, slots_N: Integers) -> Integers:
    """The best assignment of rows to equally many slots: each row's expert [N]."""
    # only one router needs it, and importing it would make every trainer's start 0.4 s longer
    from scipy.optimize import linear_sum_assignment

    _, taken_N = linear_sum_assignment(scores_NE[:, slots_N], maximize=True)
    experts_N: Integers = slots_N[taken_N]
    return experts_N


def _prices(scores_RE: Floats, capacity_E: Integers) -> tuple[Floats, float]:
    """Prices [E] at which each expert is the best choice of about as many rows as it may get, and the last temperature.
    This solves the dual of the assignment by Newton steps, with a softmax in place of the maximum that gets sharper and
    sharper.
    """
    prices_E = scores_RE.mean(axis=0)
    scale = float((scores_RE - prices_E).std()) or 1.0
    diagonal = np.arange(len(capacity_E))
    for temperature in scale * np.geomspace(1.0, _LAST_TEMPERATURE, _STEPS):
        shares_RE = _shares(scores_RE - prices_E, np.float32(temperature))
        wanted_E = shares_RE.sum(axis=0)
        # numpy's threads, one for each core, would wait for busy cores
        torch_RE = torch.from_numpy(shares_RE)
        hessian_EE = np.diag(wanted_E).astype(np.float64) - (torch_RE.T @ torch_RE).numpy()
        hessian_EE[diagonal, diagonal] += (
            1e-3 * len(scores_RE) / len(capacity_E)
        )  # prices are free up to a constant
        step_E = np.linalg.solve(hessian_EE, wanted_E - capacity_E)
        prices_E = prices_E + (temperature * np.clip(step_E, -3, 3)).astype(np.float32)
    return prices_E, float(temperature)


def _shares(scores_RE: Floats, temperature: np.float32) -> Floats:
    """Softmax over the experts [R, E]."""
    shares_RE = scores_RE / temperature
    shares_RE -= shares_RE.max(axis=1, keepdims=True)
    np.maximum(shares_RE, _LEAST_EXPONENT, out=shares_RE)
    np.exp(shares_RE, out=shares_RE)
    shares_RE /= shares_RE.sum(axis=1, keepdims=True)
    return shares_RE
