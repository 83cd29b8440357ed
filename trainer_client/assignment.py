"""Balanced assignment: one expert for each row, as many rows for each expert, the highest total of scores.

Lewis et al. 2021, BASE layers (arXiv 2103.16716), section 3.1: a linear assignment problem.

Shapes: R rows, E experts, N rows that a price doesn't decide.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment

from peer.codec import Floats
from trainer_client.dispatch.batches import Integers

_LIMIT = np.float32(1e15)  # its square is far from overflow
_SOLVED_WHOLE = 256  # rows
_SOLVED_AT_ONCE = 512
_STEPS = 26
_LAST_TEMPERATURE = 0.001
_CLEAR = 8  # last temperatures


def balanced_assignment(scores_RE: Floats) -> Integers:
    """The expert of each row [R]. Each gets R / E rows; where E does not divide R, those most in demand one more.

    scipy's solver decides all of up to 256 rows. Of more it decides those whose best two experts are about as good at
    the experts' prices, 512 at a time; the others take their best. The total is the highest, or close to it where
    more than 512 rows are undecided.

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
    """How much better each row's best expert is than its second [R]."""
    if value_RE.shape[1] == 1:
        return np.full(len(value_RE), _LIMIT)
    best_two_R2 = np.partition(value_RE, -2, axis=1)[:, -2:]
    margins_R: Floats = best_two_R2[:, 1] - best_two_R2[:, 0]
    return margins_R


def _capacities(scores_RE: Floats) -> Integers:
    """How many rows each expert gets [E], R in all."""
    rows, experts = scores_RE.shape
    capacity_E = np.full(experts, rows // experts)
    demand_E = _shares(scores_RE, np.float32(1)).sum(axis=0)
    capacity_E[np.argsort(-demand_E, kind="stable")[: rows % experts]] += 1
    return capacity_E


def _slots(capacity_E: Integers) -> Integers:
    """Each expert as many times as it may have rows."""
    return np.repeat(np.arange(len(capacity_E)), capacity_E)


def _solve(scores_NE: Floats, slots_N: Integers) -> Integers:
    """The best use of as many slots as there are rows: each row's expert [N]."""
    _, taken_N = linear_sum_assignment(scores_NE[:, slots_N], maximize=True)
    experts_N: Integers = slots_N[taken_N]
    return experts_N


def _prices(scores_RE: Floats, capacity_E: Integers) -> tuple[Floats, float]:
    """Prices [E] at which each expert is the best of about as many rows as it may have, and the last temperature.

    The dual of the assignment, with a softmax in place of the maximum: Newton steps, the softmax ever sharper.
    """
    prices_E = scores_RE.mean(axis=0)
    scale = float((scores_RE - prices_E).std()) or 1.0
    diagonal = np.arange(len(capacity_E))
    for temperature in scale * np.geomspace(1.0, _LAST_TEMPERATURE, _STEPS):
        shares_RE = _shares(scores_RE - prices_E, np.float32(temperature))
        wanted_E = shares_RE.sum(axis=0)
        hessian_EE = (np.diag(wanted_E) - shares_RE.T @ shares_RE).astype(np.float64)
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
    np.exp(shares_RE, out=shares_RE)
    shares_RE /= shares_RE.sum(axis=1, keepdims=True)
    return shares_RE
