"""A swarm of simulated peers, in which every expert of a one-layer grid is announced.

A small swarm starts like a real one: peers join one after another, and announce through the registry. For 10,000 peers
that would take hours of computing, so a large swarm is put in place. Its routing tables are filled through their own
code with a seeded sample of up to 20 peers at each distance (Kademlia's buckets, and no more than a peer knows that has
just joined). The announcements are put where the registry would have stored them, at the five nodes nearest to each
key.
"""

import asyncio
import math
import random
from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.simulated_p2p import (
    Link,
    Network,
    SimulatedContacts,
    SimulatedIdentity,
    SimulatedTransport,
    VirtualLoop,
)
from dht.announcements import ReplicaAnnouncement, ReplicaState
from dht.experts import ExpertRegistry
from dht.manifest import Manifest
from dht.records import RecordValidator, SwarmKeys
from dht.registry import Registry
from dht.uid import UID
from peer import PROTOCOL_VERSION, SOFTWARE_VERSION
from peer.identity import PeerID
from peer.kademlia.bootstrap import meet_neighbours
from peer.kademlia.lookups import Found, Item, Lookups
from peer.kademlia.node import KademliaNode
from peer.kademlia.routing import BUCKET_SIZE, ID_BITS, REPLICAS, key_id_of
from peer.kademlia.search import DEFAULT_LIMITS, IterativeSearch, SearchLimits
from peer.kademlia.server import DHTServer
from peer.kademlia.validation import Entry, pack
from peer.wire import records_pb2

LIFETIME_S = 600.0
"""The lifetime of announcements, so long that nobody has to renew them during a measurement."""
JOIN_REALLY = 200
"""The largest number of peers that join and announce as real ones do."""
_JOIN_TOGETHER = 20


@dataclass
class SimulatedPeer:
    """A peer with the parts that a node or a trainer uses."""

    identity: SimulatedIdentity
    transport: SimulatedTransport
    dht: KademliaNode
    server: DHTServer
    experts: ExpertRegistry

    @property
    def registry(self) -> Registry:
        return self.experts.registry

    @property
    def peer_id(self) -> PeerID:
        return self.identity.peer_id

    @property
    def lookups(self) -> Lookups:
        return self.registry.lookups


class SimulatedSwarm:
    """Peers that host all experts of the grid. Created by `start`."""

    def __init__(
        self, loop: VirtualLoop, manifest: Manifest, link: Link, seed: int, with_contacts: bool = False
    ) -> None:
        self._with_contacts = with_contacts
        self.rng = random.Random(seed)
        self.network = Network(link, seed)
        self.manifest = manifest
        self.peers: list[SimulatedPeer] = []
        self.hosts: dict[UID, SimulatedPeer] = {}
        self.keys = SwarmKeys(manifest.name, SimulatedIdentity(0).peer_id)
        self._loop = loop
        self._made = 0

    @classmethod
    async def start(
        cls,
        loop: VirtualLoop,
        nodes: int,
        experts: int,
        link: Link,
        seed: int,
        in_place: bool | None = None,
        with_contacts: bool = False,
    ) -> "SimulatedSwarm":
        """`in_place`: put the swarm in place, instead of letting peers join and announce; None: if it is large.

        `with_contacts`: peers learn addresses of others only from contacts, as in real networks.
        """
        manifest = Manifest.model_validate(
            {"name": "simulated", "model": {"layers": 1}, "experts": {"grid": grid_of(experts)}}
        )
        swarm = cls(loop, manifest, link, seed, with_contacts)
        for _ in range(nodes):
            swarm.peers.append(await swarm.make_peer())
        for n, uid in enumerate(manifest.uids()):
            swarm.hosts[uid] = swarm.peers[n % nodes]
        if nodes > JOIN_REALLY if in_place is None else in_place:
            swarm.fill_tables(swarm.peers, swarm.peers)
        else:
            await swarm._join_all()
        await swarm.announce_all(LIFETIME_S, in_place)
        return swarm

    async def make_peer(self, serves_dht: bool = True) -> SimulatedPeer:
        """Creates a peer that knows no others."""
        self._made += 1
        identity: Any = SimulatedIdentity(self._made)
        contacts = SimulatedContacts(self.network) if self._with_contacts else None
        transport = SimulatedTransport(self.network, identity.peer_id, contacts)
        now, rng = self._loop.unix_time, random.Random(self._made)
        dht = KademliaNode(transport, RecordValidator(now), serves_dht=serves_dht, now=now, rng=rng)
        server = DHTServer(dht)
        if serves_dht:
            await server.start()
        registry = Registry(dht, self.keys, identity, now=now, rng=rng)
        return SimulatedPeer(identity, transport, dht, server, ExpertRegistry(registry, self.manifest))

    async def join(self, peer: SimulatedPeer, by: Sequence[SimulatedPeer] = ()) -> None:
        """Lets a peer join through one of these peers, or any, and look for its neighbours, as
        `peer.kademlia.bootstrap` does.
        """
        bootstrap = self.rng.choice(by or self.peers)
        while await peer.dht.ping(bootstrap.peer_id) is None:
            pass  # lost: whoever starts a peer tries again
        await meet_neighbours(peer.dht)

    def fill_tables(self, peers: Collection[SimulatedPeer], known: Sequence[SimulatedPeer]) -> None:
        """Lets these peers know up to 20 others at each distance: one half of all, one quarter, one eighth."""
        ids = {p.dht.node_id: p.peer_id for p in known}
        places = sorted(ids)
        for peer in peers:
            for node in known_to(peer.dht.node_id, places, self.rng):
                peer.dht.table.add(node, ids[node], self.network.neighbourhoods.get(ids[node], ""))
                if isinstance(peer.transport.contacts, SimulatedContacts):
                    peer.transport.contacts.add(ids[node])

    async def announce_all(self, lifetime_s: float, in_place: bool | None = None) -> None:
        """Each living peer announces what it hosts, and its node record. `in_place`: without any calls; None: if the
        swarm is large.
        """
        hosted: dict[int, list[UID]] = {}
        for uid, host in self.hosts.items():
            hosted.setdefault(id(host), []).append(uid)
        if in_place is None:
            in_place = len(self.peers) > JOIN_REALLY
        placing = Placing([peer.dht for peer in self.peers]) if in_place else None
        for peer in self.peers:
            lookups = peer.registry.lookups
            peer.registry.lookups = placing or lookups
            await self.announce(peer, hosted.get(id(peer), ()), lifetime_s)
            peer.registry.lookups = lookups

    async def announce(self, peer: SimulatedPeer, hosted: Sequence[UID], lifetime_s: float) -> None:
        now = self._loop.unix_time()
        announced = [ReplicaAnnouncement(uid, ReplicaState.SERVING, 1, now) for uid in hosted]
        await peer.experts.announce(announced, lifetime_s)
        await peer.registry.publish_node(_node_record(peer, len(hosted)), lifetime_s)

    def kill(self, share: float) -> list[SimulatedPeer]:
        """Ends a `share` of the peers without notice."""
        dead = self.rng.sample(self.peers, round(share * len(self.peers)))
        self.network.kill([peer.peer_id for peer in dead])
        gone = {id(peer) for peer in dead}
        self.peers = [peer for peer in self.peers if id(peer) not in gone]
        self.hosts = {uid: host for uid, host in self.hosts.items() if id(host) not in gone}
        return dead

    async def _join_all(self) -> None:
        for first in range(1, len(self.peers), _JOIN_TOGETHER):
            known = self.peers[:first]
            await asyncio.gather(
                *(self.join(peer, known) for peer in self.peers[first : first + _JOIN_TOGETHER])
            )


class Placing(Lookups):
    """Stores items at the five nodes nearest to the key, without any calls."""

    def __init__(self, nodes: Sequence[KademliaNode]) -> None:
        super().__init__(nodes[0])
        self._nodes = nodes
        self._heads = np.array([node.node_id >> (ID_BITS - 64) for node in nodes], dtype=np.uint64)
        self._nearest: dict[int, list[KademliaNode]] = {}

    async def store(self, items: Sequence[Item]) -> set[tuple[str, int | bytes]]:
        for item in items:
            key = key_id_of(item.key)
            value = pack(item.value)
            for node in self._nearest_to(key):
                node.storage.put(key, {item.subkey: Entry(value, item.expires_at)})
        return {(item.key, item.subkey) for item in items}

    async def find(
        self,
        keys: Collection[int],
        limits: SearchLimits = DEFAULT_LIMITS,
        besides_self: bool = False,
        patience_s: float = math.inf,
        room: int | None = None,
        sought: bytes | None = None,
    ) -> dict[int, Found]:
        """Returns what the nearest node stores."""
        found = {}
        for key in keys:
            nearest = self._nearest_to(key)[0]
            found[key] = Found(IterativeSearch(key, []), {})
            has_value = found[key].take(nearest.storage.get(key))
            found[key].search.holds(nearest.node_id, has_value)
        return found

    def _nearest_to(self, key: int) -> list[KademliaNode]:
        if key not in self._nearest:
            distances = self._heads ^ np.uint64(key >> (ID_BITS - 64))
            most = min(REPLICAS, len(self._nodes))
            self._nearest[key] = [self._nodes[n] for n in np.argpartition(distances, most - 1)[:most]]
        return self._nearest[key]


def known_to(own: int, nodes: Sequence[int], rng: random.Random) -> Iterator[int]:
    """The nodes that one node knows: up to 20 at each distance. `nodes`: all nodes, sorted."""
    for bits in range(ID_BITS):
        first, last = _span(nodes, *_other_half(own, bits))
        some = range(first, last)
        yield from (nodes[n] for n in rng.sample(some, min(BUCKET_SIZE, len(some))))
        first, last = _span(nodes, *_own_half(own, bits))
        if last - first <= 1:
            break


def grid_of(experts: int) -> tuple[int, int]:
    """The most nearly square grid with exactly this many experts."""
    side = next(n for n in range(int(experts**0.5), 0, -1) if experts % n == 0)
    return side, experts // side


def _other_half(node: int, bits: int) -> tuple[int, int]:
    """The range of the IDs that share exactly the first `bits` bits with the node."""
    return _own_half(node ^ 1 << (ID_BITS - 1 - bits), bits)


def _own_half(node: int, bits: int) -> tuple[int, int]:
    """The range of the IDs that share at least `bits` + 1 bits with the node."""
    size = 1 << (ID_BITS - 1 - bits)
    low = node & ~(size - 1)
    return low, low + size


def _span(numbers: Sequence[int], low: int, high: int) -> tuple[int, int]:
    """The range of places in the sorted numbers whose values are from `low` to below `high`."""
    return bisect_left(numbers, low), bisect_left(numbers, high)


def _node_record(peer: SimulatedPeer, experts: int) -> records_pb2.NodeRecord:
    return records_pb2.NodeRecord(
        addresses=["203.0.113.7:50051"],
        certificate=peer.identity.make_certificate(),
        protocol_version=PROTOCOL_VERSION,
        software_version=SOFTWARE_VERSION,
        expert_count=experts,
        expert_capacity=experts + 1,
    )
