"""Which experts a text uses most, for an export that keeps only those."""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from dht.beam_search import Selection
from dht.directory import LiveExperts, prefix_tables
from dht.uid import UID
from peer.codec import Floats
from trainer_client.dispatch.batches import ForwardPass, RoutedRows
from trainer_client.moe import Experts


class WatchedExperts:
    """A swarm's experts. Counts the rows that are sent to them, and can hide some of them."""

    def __init__(self, experts: Experts) -> None:
        self.rows: Counter[UID] = Counter()
        self.kept: frozenset[UID] | None = None
        """The experts that `find` returns; None: all."""
        self._experts = experts

    async def find(
        self, layer: int, scores: Sequence[Floats], k: int, bias: Floats | None = None
    ) -> LiveExperts:
        live = await self._experts.find(layer, scores, k, bias)
        return live if self.kept is None else only(live, self.kept)

    async def send(self, rows: RoutedRows, selection: Selection, live: LiveExperts) -> ForwardPass:
        chosen = selection.coordinates[selection.valid]
        for coordinate, count in zip(*np.unique(chosen, axis=0, return_counts=True), strict=True):
            self.rows[UID(rows.layer, tuple(coordinate.tolist()))] += int(count)
        return await self._experts.send(rows, selection, live)

    async def send_back(self, forward: ForwardPass, gradients: Floats) -> tuple[Floats, Floats]:
        return await self._experts.send_back(forward, gradients)


def only(live: LiveExperts, kept: Collection[UID]) -> LiveExperts:
    """The live experts that are kept."""
    mask = np.zeros_like(live.tables[-1])
    for uid in kept:
        if uid.layer == live.layer:
            mask[uid.coordinate] = True
    return replace(live, tables=prefix_tables(live.tables[-1] & mask))


def most_used(rows: Counter[UID], live: Collection[UID], share: float, least: int) -> frozenset[UID]:
    """The most used experts: that share of each layer's live experts, but at least `least` of them. Pure."""
    by_layer: dict[int, list[UID]] = {}
    for uid in sorted(live):
        by_layer.setdefault(uid.layer, []).append(uid)
    kept = set[UID]()
    for uids in by_layer.values():
        uids.sort(key=lambda uid: -rows[uid])
        kept.update(uids[: max(least, math.ceil(share * len(uids)))])
    return frozenset(kept)
