"""A peer's cached view of the swarm, refreshed in the background, so that choosing experts costs no round trip."""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from hivemind.p2p import PeerID

from dht.manifest import Manifest
from dht.registry import NodeInfo, Prefix, Registry, Replica, ReplicaState
from dht.uid import UID
from peer.errors import UnreachableError

logger = logging.getLogger(__name__)

PrefixTables = tuple[np.ndarray, ...]
"""One bool array per grid dimension, of shape grid[:d+1]: True where a prefix leads to a live expert."""

_MAX_READ = 4096
"""Most prefixes, and most experts, that one refresh reads."""

NOBODY: frozenset[PeerID] = frozenset()


@dataclass(frozen=True)
class View:
    """What is known of the swarm at one moment. Never changed, so any thread may read it."""

    manifest: Manifest
    replicas: Mapping[UID, tuple[Replica, ...]]
    nodes: Mapping[PeerID, NodeInfo]
    read_at: float
    """Unix time in seconds; 0 before the first reading."""
    _tables: dict[tuple[int, frozenset[PeerID]], PrefixTables] = field(default_factory=dict, compare=False)

    def hosts(self, uid: UID, avoided: frozenset[PeerID] = NOBODY) -> list[Replica]:
        """The replicas that can be called now."""
        return [
            replica
            for replica in self.replicas.get(uid, ())
            if replica.state is ReplicaState.SERVING
            and replica.peer_id not in avoided
            and replica.peer_id in self.nodes
        ]

    def replica(self, uid: UID, rng: random.Random, avoided: frozenset[PeerID] = NOBODY) -> Replica | None:
        """One of the expert's replicas, the less loaded of two drawn (power of two choices); None when none is live."""
        hosts = self.hosts(uid, avoided)
        if not hosts:
            return None
        return min(rng.sample(hosts, min(2, len(hosts))), key=lambda replica: replica.queued_rows)

    def tables(self, layer: int, avoided: frozenset[PeerID] = NOBODY) -> PrefixTables:
        """The layer's prefix tables, over live experts not hosted by `avoided` peers alone."""
        cached = self._tables.get((layer, avoided))
        if cached is None:
            if len(self._tables) >= 64:  # breakers open and close: keep only what is current
                self._tables.clear()
            cached = self._tables[layer, avoided] = self._make_tables(layer, avoided)
        return cached

    def live_experts(self, avoided: frozenset[PeerID] = NOBODY) -> int:
        return sum(bool(self.hosts(uid, avoided)) for uid in self.replicas)

    def _make_tables(self, layer: int, avoided: frozenset[PeerID]) -> PrefixTables:
        alive = np.zeros(self.manifest.experts.grid, dtype=bool)
        for uid in self.replicas:
            if uid.layer == layer and self.hosts(uid, avoided):
                alive[uid.coordinate] = True
        dimensions = alive.ndim
        return tuple(np.asarray(alive.any(axis=tuple(range(d + 1, dimensions)))) for d in range(dimensions))


class Directory:
    """Keeps a `View` fresh. `refresh` once, then run `keep_fresh` as a task somebody owns."""

    def __init__(
        self,
        registry: Registry,
        manifest: Manifest,
        *,
        refresh_every_s: float,
        now: Callable[[], float] = time.time,
        rng: random.Random | None = None,
    ) -> None:
        self.view = View(manifest, {}, {}, 0.0)
        self.failures = 0
        """Refreshes that failed since the last good one."""
        self._registry = registry
        self._manifest = manifest
        self._refresh_every_s = refresh_every_s
        self._now = now
        self._rng = rng or random.SystemRandom()

    async def refresh(self) -> View:
        """Reads the swarm anew: prefixes level by level, then replicas, then the nodes that host them."""
        uids = await self._active_uids()
        replicas = await self._registry.replicas(uids)
        peers = {replica.peer_id for hosts in replicas.values() for replica in hosts}
        nodes = await self._registry.nodes(peers)
        self.view = View(self._manifest, replicas, nodes, self._now())
        self.failures = 0
        return self.view

    async def keep_fresh(self) -> None:
        """Refreshes for ever. When the DHT does not answer, the last view stays."""
        while True:
            await asyncio.sleep(self._refresh_every_s)
            try:
                await self.refresh()
            except UnreachableError as error:
                self.failures += 1
                logger.warning("can't refresh the view of the swarm: %s", error)

    def _bounded(self, frontier: list[Prefix]) -> list[Prefix]:
        """The way to the experts that are known to live, then others as they are drawn.

        Anybody can say that a coordinate is active; that must not cost more than this peer can read.
        """
        if len(frontier) <= _MAX_READ:
            return frontier
        depth = len(frontier[0][1])
        alive = {(uid.layer, uid.coordinate[:depth]) for uid, hosts in self.view.replicas.items() if hosts}
        self._rng.shuffle(frontier)
        return sorted(frontier, key=lambda prefix: prefix not in alive)[:_MAX_READ]

    async def _active_uids(self) -> list[UID]:
        frontier: list[Prefix] = [(layer, ()) for layer in range(self._manifest.model.layers)]
        for size in self._manifest.experts.grid:
            found = await self._registry.prefixes(frontier, size)
            frontier = [
                (layer, (*coordinate, following))
                for (layer, coordinate), active in found.items()
                for following in sorted(active)
            ]
            frontier = self._bounded(frontier)
        return [UID(layer, coordinate) for layer, coordinate in frontier]
