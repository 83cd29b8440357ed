"""Beam search for the k live experts with the highest scores.

Ryabinin & Gusev 2020 (arXiv 2002.04013), appendix "SelectExperts". An expert's score is the sum of one number per grid
dimension (product keys), so the search goes through prefixes rather than experts. A bias for each expert may be added:
a prefix is then ranked by its scores plus the largest bias of the live experts below it.

`PrefixIndex` holds what a peer knows of one layer's prefixes on a grid that it can't know as a whole.

Shapes: R rows, G_d size of grid dimension d, W prefixes in the beam, C candidates, k experts for each row.
"""

import math
from collections.abc import Collection, Sequence, Sized
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dht.manifest import MOST_KNOWN_EXPERTS
from peer.codec import Booleans, Floats, Integers

Coordinate = tuple[int, ...]

_LIMIT = np.float32(1e30)  # far from overflow, so that sums of clipped scores stay finite
_DEAD = np.int32(-(2**31))  # the order of a dead prefix: below that of every score
_LOW_32 = np.int64(2**32 - 1)
_CANDIDATES_AT_ONCE = 2**17  # 1 MiB of keys: a block of rows stays in the cache
_MOST_WEIGHED = MOST_KNOWN_EXPERTS  # in one layer


@dataclass(frozen=True)
class Selection:
    """The experts of each row, best first. `valid` marks the slots that contain an expert; the others are zeros."""

    coordinates: Integers  # [R, k, dims]
    scores: Floats  # [R, k]
    valid: Booleans  # [R, k]


def default_beam_size(k: int) -> int:
    """k prefixes are enough if all experts are live. If one in ten is live, 4 k prefixes find 98% of the best experts
    (top-4 on 32 × 32).
    """
    return max(16, 4 * k)


def select_experts(
    scores: Sequence[Floats],
    alive: Sequence[Booleans],
    k: int,
    beam_size: int | None = None,
    bias: Floats | None = None,
) -> Selection:
    """The k live experts with the highest scores, for each row.

    `scores` has one float32 [R, G_d] per grid dimension. `alive[d]` is a bool array of shape `grid[: d + 1]`, True
    where that prefix (in the last dimension: that expert) is live. If scores are equal, the lower coordinate wins. If
    fewer than k experts are found, the last slots of the row are invalid.

    The result is exact if `beam_size` is at least the number of live prefixes in every dimension but the last, or if it
    is at least k and every expert is live. Otherwise, a wider beam is never worse on a grid of one or two dimensions;
    on more it is better on average, not in every row.

    A prefix counts as live only if an expert below it is. A prefix that is marked live although all its experts are
    dead, as when records expire at different times, takes no slot of the beam. Nothing is found below a dead prefix.

    `bias`, float32 of the grid's shape and finite, is added to the scores of experts, and is part of the returned
    scores. With a bias, up to 4,096 live experts are scored one by one, so that the result is exact. Among more
    experts, a prefix is ranked by its scores plus the largest bias of the live experts below it.

    A gate without product keys has one table of scores, float32 [R, E], for all E experts in row-major order. Then the
    result is exact, whatever the `beam_size`.

    A score beyond ±1e30 counts as ±1e30 and NaN as the lowest: a diverged gate still chooses live experts.
    """
    if len(scores) < len(alive):
        return _select_by_own_scores(scores, alive, k, bias)
    width = default_beam_size(k) if beam_size is None else beam_size
    grid = tuple(table.shape[1] for table in scores)
    assert all(table.dtype == np.float32 for table in scores), "scores are float32"
    assert min(k, width) >= 1, f"top {k} with a beam of {width}"
    prefix_shapes = [grid[: d + 1] for d in range(len(grid))]
    assert [table.shape for table in alive] == prefix_shapes, f"the prefix tables don't fit the grid {grid}"
    assert math.prod(grid) <= 2**32, f"the coordinates of {grid} need more than 32 bits"

    tables = _tables_of_live_prefixes(alive)
    finite = [_finite(table) for table in scores]
    largest: list[Floats] | None = None
    if bias is not None:
        assert bias.shape == grid, f"the bias does not fit the grid {grid}"
        if np.count_nonzero(alive[-1]) <= _MOST_WEIGHED:
            return _selection(_weighed(finite, alive, k, bias), grid)
        largest = _largest_biases(bias, tables)
    rows = len(scores[0])
    block = max(1, _CANDIDATES_AT_ONCE // (max(grid) * width))
    keys_Rk = np.full((rows, k), np.int64(_DEAD) << 32)
    for start in range(0, rows, block):
        part = slice(start, start + block)
        found = _best_keys([table[part] for table in finite], tables, k, width, largest)
        keys_Rk[part, : found.shape[1]] = found
    return _selection(keys_Rk, grid)


def score_columns(
    scores: Sequence[Sized], coordinates: Integers, grid: tuple[int, ...]
) -> tuple[Integers, ...]:
    """The columns in which a gate's score tables have the scores of the experts at `coordinates` [..., dims]."""
    columns = tuple(np.moveaxis(coordinates, -1, 0))
    return columns if len(scores) == len(grid) else (np.ravel_multi_index(columns, grid),)


def _select_by_own_scores(
    scores: Sequence[Floats], alive: Sequence[Booleans], k: int, bias: Floats | None
) -> Selection:
    """Like `select_experts`, with a score for each expert."""
    grid = alive[-1].shape
    assert len(scores) == 1, f"{len(scores)} score tables don't fit the grid {grid}"
    assert bias is None or bias.shape == grid, f"the bias does not fit the grid {grid}"
    listed = None if bias is None else bias.ravel()
    chosen = select_experts(scores, [_live(alive).ravel()], k, beam_size=1, bias=listed)
    coordinates = np.unravel_index(chosen.coordinates[..., 0], grid)
    return Selection(np.stack(coordinates, axis=-1), chosen.scores, chosen.valid)


def _live(alive: Sequence[Booleans]) -> Booleans:
    """The experts that are marked live, below prefixes that are."""
    live = alive[-1]
    for d, marked in enumerate(alive[:-1]):
        live = live & marked.reshape(*marked.shape, *[1] * (live.ndim - 1 - d))
    return live


def _tables_of_live_prefixes(alive: Sequence[Booleans]) -> list[Booleans]:
    """For each dimension, a table [prefixes before it, G_d] of the prefixes that are marked live and have a live expert
    below.
    """
    tables = [alive[-1].reshape(-1, alive[-1].shape[-1])]
    for marked in reversed(alive[:-1]):
        has_live_child = tables[0].any(axis=1).reshape(marked.shape)
        tables.insert(0, (marked & has_live_child).reshape(-1, marked.shape[-1]))
    return tables


def _finite(scores: Floats) -> Floats:
    numbers = np.where(np.isnan(scores), -_LIMIT, scores)
    return np.clip(numbers, -_LIMIT, _LIMIT) + np.float32(0)  # + 0 turns -0 into 0, so that they tie


def _largest_biases(bias: Floats, tables: Sequence[Booleans]) -> list[Floats]:
    """The largest bias of the live experts below each prefix, for each dimension, in the shapes of `tables`."""
    lowest = np.float32(-np.inf)
    largest = [np.where(tables[-1], bias.reshape(tables[-1].shape), lowest)]
    for table in reversed(tables[:-1]):
        largest.insert(0, largest[0].max(axis=1).reshape(table.shape))
    return [np.where(table, numbers, np.float32(0)) for table, numbers in zip(tables, largest, strict=True)]


def _weighed(scores: Sequence[Floats], alive: Sequence[Booleans], k: int, bias: Floats) -> Integers:
    """The keys of each row's best k experts, found by scoring all live ones: [R, k]."""
    live = _live(alive)
    coordinates, numbers_E, bias_E = np.nonzero(live), np.flatnonzero(live), bias[live]
    rows = len(scores[0])
    block = max(1, _CANDIDATES_AT_ONCE // max(1, len(numbers_E)))
    keys_Rk = np.full((rows, k), np.int64(_DEAD) << 32)
    for start in range(0, rows, block):
        part = slice(start, start + block)
        total_RE = np.zeros((len(scores[0][part]), len(numbers_E)), np.float32)
        for table, coordinate_E in zip(scores, coordinates, strict=True):
            total_RE += table[part][:, coordinate_E]
        total_RE += bias_E
        found = _best_of(
            total_RE, np.broadcast_to(numbers_E, total_RE.shape), np.ones_like(total_RE, np.bool_), k
        )
        keys_Rk[part, : found.shape[1]] = found
    return keys_Rk


def _best_keys(
    scores: Sequence[Floats],
    tables: Sequence[Booleans],
    k: int,
    width: int,
    largest: Sequence[Floats] | None,
) -> Integers:
    """The beam search: keys of the best k experts, best first. [R, at most k]"""
    rows, dims = len(scores[0]), len(scores)
    prefix_RW = np.zeros((rows, 1), np.int64)
    total_RW = np.zeros((rows, 1), np.float32)
    live_RW = np.ones((rows, 1), np.bool_)
    for d, (scores_RG, table) in enumerate(zip(scores, tables, strict=True)):
        beam = _Beam(total_RW, prefix_RW, live_RW)
        step = None
        if largest is not None:
            step = largest[d] - (largest[d - 1].reshape(-1, 1) if d else np.float32(0))
        keys_RW = _next_keys(beam, scores_RG, table, k if d == dims - 1 else width, step)
        total_RW, prefix_RW, live_RW = _read_keys(keys_RW)
    return keys_RW


class _Beam(NamedTuple):
    """The prefixes that are kept for each row: [R, W]."""

    totals: Floats
    prefixes: Integers
    live: Booleans

    def of(self, rows: Booleans) -> "_Beam":
        return _Beam(self.totals[rows], self.prefixes[rows], self.live[rows])


def _next_keys(beam: _Beam, scores_RG: Floats, table: Booleans, count: int, step: Floats | None) -> Integers:
    """The keys of the `count` best prefixes that are one coordinate longer, best first.

    `step`, in the shape of the table, is added for the new coordinate. From the second dimension on it is at most 0.

    Only each row's best coordinates are tried at first. The result is exact if it beats the best prefix with the best
    coordinate that was left out. Other rows are computed in full.
    """
    size, few = scores_RG.shape[1], 2 * count
    if beam.totals.shape[1] == 1 or size <= 2 * few:
        return _extended(beam, scores_RG, np.arange(size)[None], table, count, step)
    columns = np.argpartition(-scores_RG, few, axis=1)[:, : few + 1]
    scores_RF = np.take_along_axis(scores_RG, columns, axis=1)
    keys_RW = _extended(beam, scores_RF[:, :few], columns[:, :few], table, count, step)
    beaten_R = np.where(beam.live, beam.totals, -np.float32(np.inf)).max(axis=1) + scores_RF[:, few]
    found_RW, _, live_RW = _read_keys(keys_RW)
    unsure_R = ~(live_RW[:, -1] & (found_RW[:, -1] > beaten_R))
    if unsure_R.any():
        keys_RW[unsure_R] = _extended(
            beam.of(unsure_R), scores_RG[unsure_R], np.arange(size)[None], table, count, step
        )
    return keys_RW


def _extended(
    beam: _Beam, scores_RC: Floats, columns: Integers, table: Booleans, count: int, step: Floats | None
) -> Integers:
    """`columns`, [R, C] or [1, C]: the coordinates that are appended to prefixes. `scores_RC`: their scores."""
    total_RWC = beam.totals[:, :, None] + scores_RC[:, None, :]
    prefix_RWC = beam.prefixes[:, :, None] * table.shape[1] + columns[:, None, :]
    if step is not None:
        total_RWC = total_RWC + step.ravel()[prefix_RWC]
    live_RWC = table.ravel()[prefix_RWC] & beam.live[:, :, None]
    return _best_of(total_RWC, prefix_RWC, live_RWC, count)


def _best_of(scores: Floats, prefixes: Integers, live: Booleans, count: int) -> Integers:
    """The keys of the `count` best candidates of each row, best first. All arrays are [R, W, G]."""
    rows = len(scores)
    scores_RC, prefixes_RC, live_RC = (
        scores.reshape(rows, -1),
        prefixes.reshape(rows, -1),
        live.reshape(rows, -1),
    )
    if count >= scores_RC.shape[1]:
        return _largest(_keys(scores_RC, prefixes_RC, live_RC), count)
    # keys cost more than scores, so they are made only for candidates as good as the last one wanted, including ties
    masked_RC = np.where(live_RC, scores_RC, -np.float32(np.inf))
    least_R = np.partition(masked_RC, -count, axis=1)[:, -count]
    good = np.nonzero(live_RC & (masked_RC >= least_R[:, None]))
    found_R = np.bincount(good[0], minlength=rows)
    places = np.arange(len(good[0])) - np.repeat(found_R.cumsum() - found_R, found_R)
    keys_RC = np.full((rows, max(count, int(found_R.max(initial=0)))), np.int64(_DEAD) << 32)
    keys_RC[good[0], places] = _keys(scores_RC[good], prefixes_RC[good], live_RC[good])
    return _largest(keys_RC, count)


def _keys(scores: Floats, prefixes: Integers, live: Booleans) -> Integers:
    """Integers that sort by (live, score, lower prefix), so that the choice between equal scores is deterministic."""
    bits = scores.view(np.int32)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    return (np.where(live, order, _DEAD).astype(np.int64) << 32) + (_LOW_32 - prefixes)


def _read_keys(keys: Integers) -> tuple[Floats, Integers, Booleans]:
    """Each key's score, prefix, and whether the prefix is live. Dead prefixes are returned as zeros."""
    order = (keys >> 32).astype(np.int32)
    live = order != _DEAD
    scores = (order ^ ((order >> 31) & 0x7FFFFFFF)).view(np.float32)
    return np.where(live, scores, np.float32(0)), np.where(live, _LOW_32 - (keys & _LOW_32), 0), live


def _largest(keys_RC: Integers, count: int) -> Integers:
    """The `count` largest of each row (fewer if it has fewer), in descending order."""
    if count < keys_RC.shape[1]:
        keys_RC = np.partition(keys_RC, -count, axis=1)[:, -count:]
    return np.sort(keys_RC, axis=1)[:, ::-1]


def _selection(keys_Rk: Integers, grid: tuple[int, ...]) -> Selection:
    scores, experts, valid = _read_keys(keys_Rk)
    return Selection(np.stack(np.unravel_index(experts, grid), axis=-1), scores, valid)


class PrefixIndex:
    """Prefix tables that are filled as prefixes are read. It also knows which prefixes were read and are empty."""

    def __init__(self, grid: tuple[int, ...]) -> None:
        self.alive: list[Booleans] = [np.zeros(grid[: d + 1], dtype=bool) for d in range(len(grid))]
        """A table for each grid dimension, of shape grid[:d+1]: True where the prefix is known to be active."""
        self._known = [np.zeros(grid[:d], dtype=bool) for d in range(len(grid))]

    def knows(self, prefix: Coordinate) -> bool:
        return len(prefix) < len(self._known) and bool(self._known[len(prefix)][prefix])

    def knows_all_of(self, length: int) -> bool:
        """Whether every active prefix of this length is known."""
        return length > 0 and bool(self._known[length][self.alive[length - 1]].all())

    def note(self, prefix: Coordinate, active: Collection[int]) -> None:
        """These coordinates after the prefix are active, and no others."""
        row = self.alive[len(prefix)][prefix]
        row[:] = False
        row[list(active)] = True
        self._known[len(prefix)][prefix] = True

    def drop(self, expert: Coordinate) -> None:
        """Marks the expert as hosted by nobody, whatever its prefix says, until the prefix is read again."""
        self.alive[-1][expert] = False

    def tables(self, passed_over: Booleans | None) -> list[Booleans]:
        """`alive` without the experts in `passed_over` (a bool array of the grid's shape), and without prefixes that
        lead to no expert.
        """
        tables = [self.alive[-1] if passed_over is None else self.alive[-1] & ~passed_over]
        for active, is_known in zip(self.alive[-2::-1], self._known[:0:-1], strict=True):
            tables.insert(0, active & (~is_known | tables[0].any(axis=-1)))
        return tables

    def best(
        self,
        scores: Sequence[Floats],
        width: int,
        passed_over: Booleans | None = None,
        everything: bool = False,
    ) -> list[Coordinate]:
        """The prefixes in the beams of all rows: the `width` best active ones of each row, as in `tables`.

        `scores` has one float32 [R, G_d] for each dimension of these prefixes. `everything`: treats all prefixes as
        active.
        """
        tables = self.tables(passed_over)[: len(scores)]
        if everything:
            tables = [np.ones_like(table) for table in tables]
        chosen = select_experts(scores, tables, width, width)
        return [tuple(c) for c in np.unique(chosen.coordinates[chosen.valid], axis=0).tolist()]
