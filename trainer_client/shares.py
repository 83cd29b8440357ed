"""Who gets which rows: groups a layer's chosen experts into one share of rows for each. Pure functions on arrays.

Shapes: R rows (all tokens of a batch, sequence after sequence), K experts for each row, r rows of one share.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dht.beam import Selection
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
    found, starts = np.unique(experts[order], return_index=True)
    for expert, part in zip(found, np.split(order, starts[1:]), strict=False):
        share_rows = rows[part]
        _, lengths = np.unique(share_rows // sequence_length, return_counts=True)
        coordinate = tuple(int(x) for x in np.unravel_index(expert, grid))
        yield Share(UID(layer, coordinate), share_rows, slots[part], lengths, share_rows % sequence_length)


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
