"""Which experts are kept when an export leaves others out."""

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from training_swarm import MANIFEST

from dht.directory import NOBODY, LiveExperts, PrefixTables, View
from dht.uid import UID
from talkoot.model.usage import most_used, only

UIDS = MANIFEST.uids()


@given(
    st.dictionaries(st.sampled_from(UIDS), st.integers(0, 9)),
    st.sets(st.sampled_from(UIDS)),
    st.floats(0, 1),
    st.integers(1, 3),
)
def test_of_each_layer_the_share_with_the_most_rows_is_kept(
    rows: dict[UID, int], live: set[UID], share: float, least: int
) -> None:
    kept = most_used(Counter(rows), live, share, least)
    assert kept <= live
    for layer in range(2):
        there = {uid for uid in live if uid.layer == layer}
        here = kept & there
        assert len(here) == min(len(there), max(least, math.ceil(share * len(there))))
        assert max((rows.get(uid, 0) for uid in there - here), default=0) <= min(
            (rows.get(uid, 0) for uid in here), default=math.inf
        )


@dataclass(frozen=True)
class Case:
    live: frozenset[tuple[int, ...]]
    kept: frozenset[tuple[int, ...]]


CELLS = st.frozensets(st.tuples(st.integers(0, 1), st.integers(0, 1)))


@given(st.builds(Case, CELLS, CELLS))
def test_what_is_not_kept_is_not_found(case: Case) -> None:
    tables = tables_of(case.live)
    live = LiveExperts(1, View(MANIFEST, {}, {}, 0.0), NOBODY, tables)
    kept = {UID(1, coordinate) for coordinate in case.kept} | {UID(0, (0, 0))}
    found = only(live, kept).tables
    for table, expected in zip(found, tables_of(case.live & case.kept), strict=True):
        assert (table == expected).all()


def tables_of(alive: frozenset[tuple[int, ...]]) -> PrefixTables:
    whole = np.zeros((2, 2), dtype=bool)
    for coordinate in alive:
        whole[coordinate] = True
    return np.asarray(whole.any(axis=1)), whole
