"""A peer's cached view of the swarm, refreshed in the background, so that choosing experts costs no round trip.

A `Directory` keeps a `View` fresh and, on a grid too large to know whole, searches it by the scores of the rows that
are to be sent. `LiveExperts` is one moment of a layer, by which a training step goes to its end.

Shapes: R rows, G_d size of grid dimension d.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from dht.announcements import NodeInfo, Replica, ReplicaState
from dht.beam_search import PrefixIndex, Selection, default_beam_size, select_experts
from dht.manifest import Manifest
from dht.regions import Prefix
from dht.registry import Registry
from dht.uid import UID
from dht.upkeep import UpkeepPeriod
from peer import clock
from peer.codec import Booleans, Floats
from peer.errors import UnreachableError
from peer.identity import PeerID
from peer.kademlia.search import DEFAULT_LIMITS

logger: logging.Logger = logging.getLogger(__name__)

T = TypeVar("T")

PrefixTables = tuple[Booleans, ...]
"""One bool array per grid dimension, of shape grid[:d+1]: True where a prefix leads to a live expert."""

_MAX_READ = 4096
"""Most prefixes, and most experts, that one refresh reads."""
_SAMPLED = 64
"""On a grid with more experts than that: prefixes and experts that a refresh reads to see whether they live."""
_DOUBTED = 16
"""Experts to which no prefix leads that a refresh looks for all the same, drawn at random."""
_MOST_STRETCHED = 20
"""How many times the wanted time between two refreshes the longest one is."""
_SEARCH_ROUNDS = 4
"""How often a search goes on after it has met experts that nobody hosts."""
_GUESSED, _MOST_GUESSED = 3, 64
"""Experts for each one wanted, and in all, that a layer's first search reads before it knows which are active."""

NOBODY: frozenset[PeerID] = frozenset()


def prefix_tables(alive: Booleans) -> PrefixTables:
    """`alive`: which experts are, of the grid's shape."""
    return tuple(np.asarray(alive.any(axis=tuple(range(d + 1, alive.ndim)))) for d in range(alive.ndim))


@dataclass(frozen=True)
class View:
    """What is known of the swarm at one moment. Never changed, so any thread may read it."""

    manifest: Manifest
    replicas: Mapping[UID, tuple[Replica, ...]]
    nodes: Mapping[PeerID, NodeInfo]
    read_at: float
    """Unix time in seconds; 0 before the first reading."""
    _tables: dict[tuple[int, frozenset[PeerID]], PrefixTables] = field(default_factory=dict, compare=False)
    _by_peer: dict[UID, dict[PeerID, Replica]] = field(default_factory=dict, compare=False)

    def hosts(self, uid: UID, avoided: frozenset[PeerID] = NOBODY) -> list[Replica]:
        """The expert's replicas that can be called now."""
        return self.able(self.replicas.get(uid, ()), avoided)

    def able(self, replicas: Iterable[Replica], avoided: frozenset[PeerID] = NOBODY) -> list[Replica]:
        """The replicas that can be called now."""
        return [
            replica
            for replica in replicas
            if replica.state is ReplicaState.SERVING
            and replica.peer_id not in avoided
            and replica.peer_id in self.nodes
        ]

    def at(self, uid: UID, peers: Mapping[PeerID, object]) -> list[Replica]:
        """The expert's replicas at these peers, in the order of whichever are fewer."""
        by_peer = self._by_peer.get(uid)
        if by_peer is None:
            by_peer = self._by_peer[uid] = {r.peer_id: r for r in self.replicas.get(uid, ())}
        fewer, more = (by_peer, peers) if len(by_peer) < len(peers) else (peers, by_peer)
        return [by_peer[peer_id] for peer_id in fewer if peer_id in more]

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
        return prefix_tables(alive)


@dataclass(frozen=True)
class LiveExperts:
    """The experts of one layer that can be called at one moment. Never changed: a training step chooses, balances and
    weighs by the one that it began with.
    """

    layer: int
    view: View
    avoided: frozenset[PeerID]
    """Peers that are not called, and whose replicas don't count."""
    tables: PrefixTables
    hosts: Mapping[UID, PeerID] = field(default_factory=dict)
    """Which replica of each expert is called; where it says nothing, any."""


class Directory:
    """Keeps a `View` fresh. `refresh` once, then run `keep_fresh` as a task somebody owns."""

    def __init__(
        self,
        registry: Registry,
        manifest: Manifest,
        *,
        refresh_every_s: float,
        now: Callable[[], float] = clock.now,
        rng: random.Random | None = None,
    ) -> None:
        self.view = View(manifest, {}, {}, 0.0)
        self.failures = 0
        """Refreshes that failed since the last good one."""
        self.registry = registry
        self._manifest = manifest
        self._refresh_every_s = refresh_every_s
        self._now = now
        self._rng = rng or random.SystemRandom()
        self._indices: dict[int, PrefixIndex] = {}
        self._hurried: set[UID] = set()
        """Experts of which other hosts may announce further down than those in the view. A refresh reads them all."""
        self._gone: dict[PeerID, float] = {}
        """Peers that were found dead, and when the node record that they had then expires."""

    @property
    def knows_all(self) -> bool:
        """Whether the view has all experts. Of a larger swarm it has those that were searched for."""
        return self.view.manifest.experts_total <= _MAX_READ

    async def refresh(self) -> View:
        """Reads the swarm again: the regions level by level, then the nodes that host replicas there.

        What lived is read again even if no prefix leads there: whoever hides a prefix hides no known expert. And some
        others, as hosts renew the prefixes seldom where a crowd seems to do it.
        """
        living = {uid for uid, hosts in self.view.replicas.items() if hosts}
        self._hurried.clear()
        if self.knows_all:
            replicas = await self.registry.replicas(self._manifest.uids(), only_active=True)
            missing = [uid for uid, hosts in replicas.items() if not hosts]
            hidden = [uid for uid in missing if uid in living]
            doubted = self._drawn([uid for uid in missing if uid not in living], _DOUBTED)
            replicas |= await self.registry.replicas(doubted, just_read=True)
            replicas = {uid: hosts for uid, hosts in replicas.items() if hosts}
            replicas |= await self.registry.replicas(hidden)
        else:
            uids = list(dict.fromkeys((*living, *await self._active_uids())))[:_MAX_READ]
            replicas = await self.registry.replicas(uids)
        peers = {replica.peer_id for hosts in replicas.values() for replica in hosts}
        nodes = await self.registry.nodes(peers)
        self.view = View(self._manifest, replicas, self._but_the_gone(nodes), self._now())
        self.failures = 0
        return self.view

    def forget(self, peer_id: PeerID) -> None:
        """Notes that the peer was found dead: its replicas don't count until it publishes a new node record."""
        node = self.view.nodes.get(peer_id)
        if node is not None:
            self._gone[peer_id] = node.expires_at
            nodes = self._but_the_gone(self.view.nodes)
            self.view = View(self._manifest, self.view.replicas, nodes, self.view.read_at)

    async def keep_fresh(self) -> None:
        """Refreshes for ever, less often if that costs much. When the DHT does not answer, the last view stays, and
        that is said once.
        """
        period = UpkeepPeriod(
            self._refresh_every_s, lambda: self.registry.spent_bytes, self._rng, _MOST_STRETCHED
        )
        while True:
            await asyncio.sleep(period.drawn_s())
            period.note_round()
            try:
                await self.refresh()
            except UnreachableError as error:
                self.failures += 1
                if self.failures == 1:
                    logger.warning("can't refresh the view of the swarm: %s", error)

    def live(self, layer: int, avoided: frozenset[PeerID] = NOBODY) -> LiveExperts:
        """The layer's experts by the view, without those that only `avoided` peers host."""
        return LiveExperts(layer, self.view, avoided, self.view.tables(layer, avoided))

    async def search(
        self,
        layer: int,
        scores: Sequence[Floats],
        k: int,
        avoided: frozenset[PeerID] = NOBODY,
        bias: Floats | None = None,
    ) -> View:
        """Brings the top-k experts of each row into the view, on a grid too large to know whole. Passes over experts
        that only `avoided` peers host.

        `scores` has one float32 [R, G_d] per grid dimension; `bias`, of the grid's shape, is added to those of experts.
        Reads the prefixes that a beam search by the scores alone comes by, then the experts that are best with the
        bias: nothing, when all of that is known. The first time, if it is for few rows, it begins to read at the same
        time those experts that would be best if all were active: most of the right ones are among them, and a round of
        questions is saved. Rows that met experts which can't be called go on, each time twice as far. Raises
        UnreachableError.
        """
        index, room, width = self._index(layer), _MAX_READ, default_beam_size(k)
        if avoided:
            await self._read_hidden(avoided)
        if not index.knows(()):
            guessed = index.best(scores, _GUESSED * k, everything=True)
            self.registry.read_ahead(
                UID(layer, c) for c in (guessed if len(guessed) <= _MOST_GUESSED else ())
            )
        for round_number in range(_SEARCH_ROUNDS):
            passed_over = self._only_at(avoided, layer)
            await self._read_way(layer, index, scores, width, passed_over)
            chosen = select_experts(scores, index.tables(passed_over), k << round_number, bias=bias)
            unknown = self._experts_at(layer, chosen, self._lacking(layer, chosen, avoided))
            read = self._drawn([uid for uid in unknown if uid not in self.view.replicas], room)
            await self._read_experts(read)
            room -= len(read)
            lacking = self._lacking(layer, chosen, avoided)
            for uid in self._experts_at(layer, chosen, lacking):
                if uid in self.view.replicas and not self.view.hosts(uid):
                    index.drop(uid.coordinate)
            if not lacking.any() or not room:
                break
            scores = [table[lacking.any(axis=1)] for table in scores]
        return self.view

    def _drawn(self, some: list[T], most: int) -> list[T]:
        """All of them, or a random sample of this size: anybody can say that a coordinate is active."""
        return some if len(some) <= most else self._rng.sample(some, most)

    def _only_at(self, avoided: frozenset[PeerID], layer: int) -> Booleans | None:
        """The experts that nobody but these peers is known to host, as a table of the grid."""
        if not avoided:
            return None
        return self.view.tables(layer)[-1] & ~self.view.tables(layer, avoided)[-1]

    def _lacking(self, layer: int, chosen: Selection, avoided: frozenset[PeerID]) -> Booleans:
        """Which of the chosen experts nobody hosts by the view, but for the `avoided` peers. [R, k]"""
        live = self.view.tables(layer, avoided)[-1]
        lacking: Booleans = chosen.valid & ~live[tuple(np.moveaxis(chosen.coordinates, -1, 0))]
        return lacking

    def _experts_at(self, layer: int, chosen: Selection, slots: Booleans) -> list[UID]:
        """The experts in these slots [R, k], each once."""
        grid = self._manifest.experts.grid
        numbers = np.unique(np.ravel_multi_index(tuple(chosen.coordinates[slots].T), grid))
        coordinates = zip(*(c.tolist() for c in np.unravel_index(numbers, grid)), strict=True)
        return [UID(layer, coordinate) for coordinate in coordinates]

    async def _read_way(
        self,
        layer: int,
        index: PrefixIndex,
        scores: Sequence[Floats],
        width: int,
        passed_over: Booleans | None,
    ) -> None:
        """Level by level the prefixes that are not known yet; the first two levels together, to save a round trip."""
        ahead = [] if index.knows(()) else index.best(scores[:1], width, everything=True)
        for depth in range(len(scores)):
            if index.knows_all_of(depth):
                continue
            wanted = [(), *ahead] if depth == 0 else index.best(scores[:depth], width, passed_over)
            prefixes = self._drawn([(layer, c) for c in wanted if not index.knows(c)], _MAX_READ)
            by_size: dict[int, list[Prefix]] = {}
            for prefix in prefixes:
                by_size.setdefault(self._size_after(prefix), []).append(prefix)
            for found in await asyncio.gather(
                *(
                    self.registry.prefixes(some, size, limits=DEFAULT_LIMITS, at_once=True)
                    for size, some in by_size.items()
                )
            ):
                for (_, coordinate), active in found.items():
                    index.note(coordinate, active)

    async def _read_experts(self, uids: Collection[UID]) -> None:
        """Adds them to the view, also those that nobody hosts. Of too many, those go first, then the oldest."""
        if not uids:
            return
        is_hurried = len(uids) <= _MOST_GUESSED
        await self._add(await self.registry.replicas(uids, limits=DEFAULT_LIMITS, at_once=is_hurried))
        if is_hurried:
            self._hurried.update(uids)
            await self._read_hidden()

    async def _read_hidden(self, avoided: frozenset[PeerID] = NOBODY) -> None:
        """Reads further down, where others may announce an expert whose hosts so far can't be called or are avoided."""
        hosted = [uid for uid in self._hurried if self.view.replicas.get(uid)]
        hidden = [uid for uid in hosted if not self.view.hosts(uid, avoided)]
        if hidden:
            self._hurried.difference_update(hidden)
            await self._add(await self.registry.replicas(hidden, limits=DEFAULT_LIMITS))

    async def _add(self, replicas: Mapping[UID, tuple[Replica, ...]]) -> None:
        peers = {replica.peer_id for hosts in replicas.values() for replica in hosts}
        unknown = peers - self.view.nodes.keys()
        nodes = dict(self.view.nodes) | await self.registry.nodes(unknown, limits=DEFAULT_LIMITS)
        known = {**self.view.replicas, **replicas}
        for uid in sorted(known, key=lambda uid: bool(known[uid]))[: max(0, len(known) - _MAX_READ)]:
            del known[uid]
        self.view = View(self._manifest, known, self._but_the_gone(nodes), self._now())

    def _but_the_gone(self, nodes: Mapping[PeerID, NodeInfo]) -> dict[PeerID, NodeInfo]:
        now = self._now()
        self._gone = {peer_id: until for peer_id, until in self._gone.items() if until > now}
        return {
            peer_id: node for peer_id, node in nodes.items() if node.expires_at > self._gone.get(peer_id, 0)
        }

    def _index(self, layer: int) -> PrefixIndex:
        return self._indices.setdefault(layer, PrefixIndex(self._manifest.experts.grid))

    def _size_after(self, prefix: Prefix) -> int:
        return self._manifest.experts.grid[len(prefix[1])]

    def _bounded(self, frontier: list[Prefix]) -> list[Prefix]:
        """The way to the experts that are known to live, then others as they are drawn.

        Anybody can say that a coordinate is active; that must not cost more than this peer can read.
        """
        if self.knows_all and len(frontier) <= _MAX_READ:
            return frontier
        depth = len(frontier[0][1]) if frontier else 0
        wanted = {(uid.layer, uid.coordinate[:depth]) for uid, hosts in self.view.replicas.items() if hosts}
        wanted |= {p for p in frontier if p[0] in self._indices and self._indices[p[0]].knows(p[1])}
        self._rng.shuffle(frontier)
        frontier.sort(key=lambda prefix: prefix not in wanted)
        most = _MAX_READ if self.knows_all else min(_MAX_READ, len(wanted) + _SAMPLED)
        return frontier[:most]

    async def _active_uids(self) -> list[UID]:
        frontier: list[Prefix] = [(layer, ()) for layer in range(self._manifest.model.layers)]
        for size in self._manifest.experts.grid:
            found = await self.registry.prefixes(frontier, size)
            if not self.knows_all:
                for (layer, coordinate), active in found.items():
                    self._index(layer).note(coordinate, active)
            frontier = [
                (layer, (*coordinate, following))
                for (layer, coordinate), active in found.items()
                for following in sorted(active)
            ]
            frontier = self._bounded(frontier)
        return [UID(layer, coordinate) for layer, coordinate in frontier]
