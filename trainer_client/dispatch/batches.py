"""Who gets which rows: groups a layer's chosen experts into one share of rows for each. Pure functions on arrays.

Shapes: R rows (all tokens of a batch, sequence after sequence), K experts for each row, r rows of one share.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from dht.beam_search import Selection
from dht.uid import UID

Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]


@dataclass(frozen=True)
class Share:
    """The rows that go to one expert, in order of sequence and position, and the slot each came from."""

    uid: UID
    rows: Integers  # [r], indices into the batch's rows
    slots: Integers  # [r], which of the row's K choices this expert is
    lengths: Integers  # [segments], rows of each sequence
    positions: Integers  # [r], in their sequences


def make_shares(
    layer: int, coordinates: Integers, wanted: Booleans, grid: tuple[int, ...], sequence_length: int
) -> Iterator[Share]:
    """One share for each expert that `wanted` [R, K] slots name in `coordinates` [R, K, dims]."""
    rows, slots = np.nonzero(wanted)  # in order of rows
    experts = np.ravel_multi_index(tuple(coordinates[rows, slots].T), grid)
    order = np.argsort(experts, kind="stable")  # by expert, and within it still in order of rows
    rows, slots, experts = rows[order], slots[order], experts[order]
    sequences, positions = np.divmod(rows, sequence_length)
    is_first = _changes(experts)
    begins = np.flatnonzero(is_first | _changes(sequences))  # of segments
    lengths = np.diff(begins, append=len(rows))
    starts = np.flatnonzero(is_first)  # of shares
    places = np.stack(np.unravel_index(experts[starts], grid), axis=-1).tolist()
    share_bounds = pairwise([*starts, len(rows)])
    segment_bounds = pairwise([*np.searchsorted(begins, starts), len(begins)])
    for place, (start, end), (first, last) in zip(places, share_bounds, segment_bounds, strict=True):
        part = slice(start, end)
        yield Share(UID(layer, tuple(place)), rows[part], slots[part], lengths[first:last], positions[part])


def _changes(numbers: Integers) -> Booleans:
    """Where one differs from the one before, the first included."""
    changes = np.ones(len(numbers), dtype=bool)
    np.not_equal(numbers[1:], numbers[:-1], out=changes[1:])
    return changes


def sure_first(sure: Selection, others: Selection, wary: Booleans) -> Selection:
    """For the `wary` rows [n] the `sure` experts come before the `others`; each expert once."""
    same = (others.coordinates[:, :, None, :] == sure.coordinates[:, None, :, :]).all(
        axis=-1
    )  # (n, others, sure)
    preferred = sure.valid & wary[:, None]
    left = others.valid & ~(same & preferred[:, None, :]).any(axis=-1)
    return Selection(
        np.concatenate([sure.coordinates, others.coordinates], axis=1),
        np.concatenate([sure.scores, others.scores], axis=1),
        np.concatenate([preferred, left], axis=1),
    )


def refill(coordinates: Integers, taken: Booleans, fresh: Selection) -> tuple[Integers, Booleans]:
    """Puts each row's best fresh experts into its free slots, none that the row has already.

    `coordinates` [n, K, dims] and `taken` [n, K] are the rows' slots; `fresh` has more experts for the same rows, best
    first. Returns the new coordinates, and which slots were filled [n, K].
    """
    free = ~taken
    same = (fresh.coordinates[:, :, None, :] == coordinates[:, None, :, :]).all(axis=-1)  # (n, fresh, K)
    usable = fresh.valid & ~(same & taken[:, None, :]).any(axis=-1)  # (n, fresh)
    # the j-th free slot of a row takes the row's j-th usable fresh expert
    slot_rank = np.where(free, free.cumsum(axis=1) - 1, -1)  # (n, K)
    fresh_rank = np.where(usable, usable.cumsum(axis=1) - 1, -2)  # (n, fresh)
    match = slot_rank[:, :, None] == fresh_rank[:, None, :]  # (n, K, fresh)
    filled = match.any(axis=-1)
    source = match.argmax(axis=-1)  # (n, K)
    chosen = np.take_along_axis(fresh.coordinates, source[:, :, None], axis=1)
    return np.where(filled[:, :, None], chosen, coordinates), filled
