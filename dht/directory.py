"""A peer's cached view of the swarm, refreshed in the background, so that choosing experts costs no round trip.

A `Directory` keeps a `View` fresh. On a grid that is too large to know as a whole, it searches by the scores of the
rows that are to be sent. `LiveExperts` is a snapshot of a layer that a training step uses to its end.

Shapes: R rows, G_d size of grid dimension d.
"""

import asyncio
import logging
import random
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from dht.announcements import NodeInfo, Replica, ReplicaState, hosts_of
from dht.beam_search import PrefixIndex, Selection, default_beam_size, select_experts
from dht.experts import ExpertRegistry
from dht.manifest import MOST_KNOWN_EXPERTS, Manifest
from dht.regions import Prefix
from dht.registry import some_of
from dht.uid import UID
from dht.upkeep import UpkeepPeriod
from peer import clock
from peer.codec import Booleans, Floats
from peer.errors import UnreachableError
from peer.identity import PeerID
from peer.kademlia.search import DEFAULT_LIMITS

logger: logging.Logger = logging.getLogger(__name__)

PrefixTables = tuple[Booleans, ...]
"""One bool array per grid dimension, of shape grid[:d+1]: True where a prefix leads to a live expert."""

_MAX_READ = MOST_KNOWN_EXPERTS
"""The most prefixes, and the most experts, that one refresh reads."""
_SAMPLED = 64
"""On a grid that is too large to know as a whole, how many prefixes and experts a refresh reads to see whether they are
alive, besides those that are known to be.
"""
_DOUBTED = 16
"""How many experts a refresh looks for although no prefix leads to them. They are drawn at random."""
_MOST_STRETCHED = 20
"""The longest time between two refreshes, as a multiple of the wanted time."""
_SEARCH_ROUNDS = 4
"""How often a search continues after it has found experts that nobody hosts."""
_GUESSED, _MOST_GUESSED = 3, 64
"""A layer's first search guesses which experts are active. It reads this many for each one wanted, and at most this
many.
"""

NOBODY: frozenset[PeerID] = frozenset()


def prefix_tables(alive: Booleans) -> PrefixTables:
    """`alive`: which experts are alive, in the grid's shape."""
    return tuple(np.asarray(alive.any(axis=tuple(range(d + 1, alive.ndim)))) for d in range(alive.ndim))


@dataclass(frozen=True)
class View:
    """What is known of the swarm at one moment. Immutable, so any thread may read it."""

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

    def able(self, replicas: Iterable[Replica], avoided: frozenset[PeerID]) -> list[Replica]:
        """The replicas that can be called now."""
        return [
            replica
            for replica in replicas
            if replica.state is ReplicaState.SERVING
            and replica.peer_id not in avoided
            and replica.peer_id in self.nodes
        ]

    def at(self, uid: UID, peers: Mapping[PeerID, object]) -> list[Replica]:
        """The expert's replicas at these peers, in the order of the shorter of the two lists."""
        by_peer = self._by_peer.get(uid)
        if by_peer is None:
            by_peer = self._by_peer[uid] = {r.peer_id: r for r in self.replicas.get(uid, ())}
        fewer, more = (by_peer, peers) if len(by_peer) < len(peers) else (peers, by_peer)
        return [by_peer[peer_id] for peer_id in fewer if peer_id in more]

    def tables(self, layer: int, avoided: frozenset[PeerID] = NOBODY) -> PrefixTables:
        """The layer's prefix tables, over live experts that some peer outside `avoided` hosts."""
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
    """The experts of one layer that can be called at one moment. Immutable: a training step chooses, balances and
    weighs experts by the one that it started with.
    """

    layer: int
    view: View
    avoided: frozenset[PeerID]
    """Peers that are not called, and whose replicas are ignored."""
    tables: PrefixTables
    hosts: Mapping[UID, PeerID] = field(default_factory=dict)
    """Which replica of an expert is called; any replica for experts that are not in it."""


class Directory:
    """Keeps a `View` fresh. Call `refresh` once, then run `keep_fresh` as a task that somebody owns."""

    def __init__(
        self,
        experts: ExpertRegistry,
        manifest: Manifest,
        *,
        refresh_every_s: float,
        now: Callable[[], float] = clock.now,
        rng: random.Random | None = None,
    ) -> None:
        self.view = View(manifest, {}, {}, 0.0)
        self.failures = 0
        """Refreshes that have failed since the last success."""
        self.experts = experts
        self._manifest = manifest
        self._refresh_every_s = refresh_every_s
        self._now = now
        self._rng = rng or random.SystemRandom()
        self._indices = defaultdict[int, PrefixIndex](lambda: PrefixIndex(manifest.experts.grid))
        self._hurried: set[UID] = set()
        """Experts that may have more hosts than the view shows, because some are announced under longer prefixes. A
        refresh reads them all.
        """
        self._gone: dict[PeerID, float] = {}
        """Peers that were found dead, and when the node record that they had expires."""

    @property
    def knows_all(self) -> bool:
        """Whether the view covers all experts. In a larger swarm, it only covers those that were searched for."""
        return self.view.manifest.experts_total <= _MAX_READ

    async def refresh(self) -> View:
        """Reads the swarm again: the regions level by level, then the nodes that host replicas there.

        Experts that were alive are read again even if no prefix leads to them, so that nobody can hide a known expert
        by hiding a prefix. A few others are read too, because hosts rarely renew a prefix if many hosts seem to share
        it.
        """
        before = self.view.replicas
        living = {uid for uid, hosts in before.items() if hosts}
        self._hurried.clear()
        if self.knows_all:
            replicas = await self.experts.replicas(self._manifest.uids(), only_active=True)
            missing = [uid for uid, hosts in replicas.items() if not hosts]
            hidden = [uid for uid in missing if uid in living]
            doubted = some_of([uid for uid in missing if uid not in living], _DOUBTED, self._rng)
            replicas |= await self.experts.replicas(doubted, just_read=True)
            replicas = {uid: hosts for uid, hosts in replicas.items() if hosts}
            replicas |= await self.experts.replicas(hidden)
        else:
            uids = list(dict.fromkeys((*living, *await self._active_uids())))[:_MAX_READ]
            replicas = await self.experts.replicas(uids)
        nodes = await self.experts.registry.nodes(hosts_of(replicas))
        # searches may have found more meanwhile
        found = {
            uid: hosts
            for uid, hosts in self.view.replicas.items()
            if uid not in before and uid not in replicas
        }
        nodes = {p: self.view.nodes[p] for p in hosts_of(found) & self.view.nodes.keys()} | nodes
        self.view = View(self._manifest, {**replicas, **found}, self._but_the_gone(nodes), self._now())
        self.failures = 0
        return self.view

    def forget(self, peer_id: PeerID) -> None:
        """Records that the peer was found dead: its replicas don't count until it publishes a new node record."""
        node = self.view.nodes.get(peer_id)
        if node is not None:
            self._gone[peer_id] = node.expires_at
            nodes = self._but_the_gone(self.view.nodes)
            self.view = View(self._manifest, self.view.replicas, nodes, self.view.read_at)

    async def keep_fresh(self) -> None:
        """Refreshes for ever, less often if that costs much. If the DHT does not answer, the last view stays, which is
        logged once.
        """
        period = UpkeepPeriod(
            self._refresh_every_s, lambda: self.experts.registry.spent_bytes, self._rng, _MOST_STRETCHED
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
        """The layer's experts in the view, without those that only `avoided` peers host."""
        return LiveExperts(layer, self.view, avoided, self.view.tables(layer, avoided))

    async def search(
        self,
        layer: int,
        scores: Sequence[Floats],
        k: int,
        avoided: frozenset[PeerID] = NOBODY,
        bias: Floats | None = None,
    ) -> View:
        """Brings the top-k experts of each row into the view, on a grid that is too large to know as a whole. Skips
        experts that only `avoided` peers host.

        `scores` has one float32 [R, G_d] per grid dimension; `bias`, of the grid's shape, is added to the scores of
        experts. The search reads the prefixes on the way of a beam search by the scores alone, then the experts that
        are best with the bias. If all of that is known, it reads nothing. The first search for few rows also reads, in
        parallel, the experts that would be best if all were active: most of the right ones are among them, which saves
        a round trip. If a row found experts that can't be called, its search continues, each time twice as far. Raises
        UnreachableError.
        """
        grid = self._manifest.experts.grid
        assert len(scores) == len(grid), f"{len(scores)} score tables don't fit the grid {grid}"
        index, room, width = self._indices[layer], _MAX_READ, default_beam_size(k)
        if avoided:
            await self._read_hidden(avoided)
        if not index.knows(()):
            guessed = index.best(scores, _GUESSED * k, everything=True)
            self.experts.read_ahead(UID(layer, c) for c in (guessed if len(guessed) <= _MOST_GUESSED else ()))
        for round_number in range(_SEARCH_ROUNDS):
            passed_over = self._only_at(avoided, layer)
            await self._read_way(layer, index, scores, width, passed_over)
            chosen = select_experts(scores, index.tables(passed_over), k << round_number, bias=bias)
            unknown = self._experts_at(layer, chosen, self._lacking(layer, chosen, avoided))
            read = some_of([uid for uid in unknown if uid not in self.view.replicas], room, self._rng)
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

    def _only_at(self, avoided: frozenset[PeerID], layer: int) -> Booleans | None:
        """The experts that only these peers are known to host, as a table of the grid."""
        if not avoided:
            return None
        return self.view.tables(layer)[-1] & ~self.view.tables(layer, avoided)[-1]

    def _lacking(self, layer: int, chosen: Selection, avoided: frozenset[PeerID]) -> Booleans:
        """Which of the chosen experts have no host in the view, apart from the `avoided` peers: [R, k]."""
        live = self.view.tables(layer, avoided)[-1]
        lacking: Booleans = chosen.valid & ~live[tuple(np.moveaxis(chosen.coordinates, -1, 0))]
        return lacking

    def _experts_at(self, layer: int, chosen: Selection, slots: Booleans) -> list[UID]:
        """The experts in these slots [R, k], without duplicates."""
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
        """Reads the unknown prefixes level by level; the first two levels together, to save a round trip."""
        ahead = [] if index.knows(()) else index.best(scores[:1], width, everything=True)
        for depth in range(len(scores)):
            if index.knows_all_of(depth):
                continue
            wanted = [(), *ahead] if depth == 0 else index.best(scores[:depth], width, passed_over)
            # anybody can announce that a coordinate is active
            prefixes = some_of([(layer, c) for c in wanted if not index.knows(c)], _MAX_READ, self._rng)
            by_size: dict[int, list[Prefix]] = {}
            for prefix in prefixes:
                by_size.setdefault(self._manifest.experts.grid[len(prefix[1])], []).append(prefix)
            for found in await asyncio.gather(
                *(
                    self.experts.prefixes(some, size, limits=DEFAULT_LIMITS, at_once=True)
                    for size, some in by_size.items()
                )
            ):
                for (_, coordinate), active in found.items():
                    index.note(coordinate, active)

    async def _read_experts(self, uids: Collection[UID]) -> None:
        """Adds the experts to the view. If there are too many, it drops those that nobody hosts, then the oldest."""
        if not uids:
            return
        is_hurried = len(uids) <= _MOST_GUESSED
        await self._add(await self.experts.replicas(uids, limits=DEFAULT_LIMITS, at_once=is_hurried))
        if is_hurried:
            self._hurried.update(uids)
            await self._read_hidden()

    async def _read_hidden(self, avoided: frozenset[PeerID] = NOBODY) -> None:
        """Reads longer prefixes for experts whose known hosts can't be called or are avoided: other hosts may announce
        them there.
        """
        hosted = [uid for uid in self._hurried if self.view.replicas.get(uid)]
        hidden = [uid for uid in hosted if not self.view.hosts(uid, avoided)]
        if hidden:
            self._hurried.difference_update(hidden)
            await self._add(await self.experts.replicas(hidden, limits=DEFAULT_LIMITS))

    async def _add(self, replicas: Mapping[UID, tuple[Replica, ...]]) -> None:
        hosts, before = hosts_of(replicas), self.view.nodes
        new = await self.experts.registry.nodes(hosts - before.keys(), limits=DEFAULT_LIMITS)
        # a refresh or another search may have changed the view meanwhile
        nodes = {p: before[p] for p in hosts & before.keys()} | dict(self.view.nodes) | new
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

    def _bounded(self, frontier: list[Prefix], depth: int) -> list[Prefix]:
        """The prefixes to read, at most as many as the limit: those of experts known to live, then others at random.

        Anybody can announce that a coordinate is active; that must not cost more than this peer can read.
        """
        wanted = {(uid.layer, uid.coordinate[:depth]) for uid, hosts in self.view.replicas.items() if hosts}
        wanted |= {(layer, c) for layer, c in frontier if self._indices[layer].knows(c)}
        self._rng.shuffle(frontier)
        frontier.sort(key=lambda prefix: prefix not in wanted)
        return frontier[: min(_MAX_READ, len(wanted) + _SAMPLED)]

    async def _active_uids(self) -> list[UID]:
        """The active experts of a grid that is too large to know as a whole, as far as a refresh follows them."""
        frontier: list[Prefix] = [(layer, ()) for layer in range(self._manifest.model.layers)]
        for depth, size in enumerate(self._manifest.experts.grid, 1):
            found = await self.experts.prefixes(frontier, size)
            for (layer, coordinate), active in found.items():
                self._indices[layer].note(coordinate, active)
            frontier = [
                (layer, (*coordinate, following))
                for (layer, coordinate), active in found.items()
                for following in sorted(active)
            ]
            frontier = self._bounded(frontier, depth)
        return [UID(layer, coordinate) for layer, coordinate in frontier]
