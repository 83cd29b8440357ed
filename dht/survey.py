"""Which experts need somebody, as one node sees it: all of a small grid, and of a large one as much as it can read.

Reading every expert of a large grid in each announcement period costs more than hosting some. A prefix says at once
which coordinates after it are active: so the prefixes are read first, and then only the experts of this node, the
vacant ones, and some of the others.
"""

import random
from collections.abc import Collection, Iterator
from itertools import islice

import numpy as np
from hivemind.p2p import PeerID

from dht.manifest import Manifest
from dht.registry import Prefix, Registry, Replica
from dht.uid import UID
from expert_server.hosting.placement import preference

READ_WHOLE = 1024
"""Grids with so many experts are read whole."""
MOST_PREFIXES = 1024
"""Of a grid with more rows than that some are read, others after a while."""
_ROWS_FOR = 6
"""Looks at the same rows of such a grid: what is vacant must be so twice before it is adopted."""
MOST_VACANT = 512
SAMPLED = 256
"""Active experts that are read to see which have few replicas: other nodes see others."""


class Survey:
    """What one node reads of its swarm in each announcement period."""

    def __init__(
        self, registry: Registry, manifest: Manifest, peer_id: PeerID, rng: random.Random | None = None
    ) -> None:
        self._registry = registry
        self._manifest = manifest
        self._peer_id = peer_id
        self._rng = rng or random.SystemRandom()
        self._had_host = np.zeros((manifest.model.layers, *manifest.experts.grid), dtype=bool)
        self._looks = 0

    async def read(self, mine: Collection[UID]) -> dict[UID, tuple[Replica, ...]]:
        """The replicas of this node's experts and of others that matter. Raises UnreachableError."""
        if self._manifest.experts_total <= READ_WHOLE:
            return self._noted(await self._registry.replicas(self._manifest.uids()))
        rows = self._rows()
        active = await self._registry.prefixes(rows, self._manifest.experts.grid[-1])
        vacant = self._preferred(self._vacant(rows, active))
        others = [UID(layer, (*row, last)) for (layer, row), some in active.items() for last in some]
        sample = self._rng.sample(others, min(SAMPLED, len(others)))
        return self._noted(await self._registry.replicas({*mine, *vacant, *sample}))

    def had_host(self, uid: UID) -> bool:
        """Whether anybody was seen to host the expert or to claim it."""
        return bool(self._had_host[uid.layer, *uid.coordinate])

    def _noted(self, replicas: dict[UID, tuple[Replica, ...]]) -> dict[UID, tuple[Replica, ...]]:
        for uid, hosts in replicas.items():
            if hosts and self._manifest.holds(uid):
                self._had_host[uid.layer, *uid.coordinate] = True
        return replicas

    def _rows(self) -> list[Prefix]:
        """All prefixes that lack the last coordinate, or as many of them as are read now."""
        shape = (self._manifest.model.layers, *self._manifest.experts.grid[:-1])
        count = int(np.prod(shape))
        numbers = np.arange(count)
        if count > MOST_PREFIXES:
            # the same for some looks, and other nodes look at others
            turn = random.Random(f"{self._peer_id} {self._looks // _ROWS_FOR}")  # noqa: S311  # no secret
            numbers = np.random.default_rng(turn.getrandbits(64)).permutation(count)
            # first rows where somebody was: who died there may have left no prefix
            was_used = self._had_host.any(axis=-1).ravel()[numbers]
            used = numbers[was_used][: MOST_PREFIXES // 2]
            numbers = np.concatenate([used, np.setdiff1d(numbers, used, assume_unique=True)])[:MOST_PREFIXES]
        self._looks += 1
        return [
            (int(layer), tuple(map(int, row)))
            for layer, *row in zip(*np.unravel_index(numbers, shape), strict=True)
        ]

    def _vacant(self, rows: Collection[Prefix], active: dict[Prefix, frozenset[int]]) -> Iterator[UID]:
        """Those that had a host first."""
        for layer, row in rows:
            self._had_host[layer][row][list(active[layer, row])] = True
        for had_host in (True, False):
            for layer, row in rows:
                for last in np.flatnonzero(self._had_host[layer, *row] == had_host).tolist():
                    if last not in active[layer, row]:
                        yield UID(layer, (*row, last))

    def _preferred(self, vacant: Iterator[UID]) -> list[UID]:
        """Those that had a host first, then by this peer's preference, which is the same in each look."""
        ranked = sorted(
            islice(vacant, 64 * MOST_VACANT),
            key=lambda uid: (self.had_host(uid), preference(uid, self._peer_id)),
            reverse=True,
        )
        return ranked[:MOST_VACANT]
