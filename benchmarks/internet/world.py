"""What all parts of a simulation share: clock, random numbers, living peers and their links, partitions, and byte
counts.

`benchmarks.internet.stand_ins.simulated` creates a world.
"""

import asyncio
import random
from array import array
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from benchmarks.internet.large_pages import use_large_pages
from benchmarks.simulated_p2p import SimulatedIdentity, VirtualLoop
from expert_server.state.transfer import MAX_TRANSFER_S
from peer.identity import PeerID
from peer.kademlia.routing import ID_BITS, REPLICAS, id_of_bytes
from peer.rpc.transfer import GRACE_S

PURPOSES = ("announce", "read", "dht_served", "transfer", "relayed")
"""The purposes for which bytes are counted. The first three are upkeep."""
UPKEEP = PURPOSES[:3]
_PLACE_BITS = 64
_FEW, _GROWN = 400, 1.2
"""From this many peers on, and again each time their number has grown by this factor, memory moves to large pages."""
_LEAF_BITS = 10
"""Positions with the same first bits are a leaf. For each leaf, the world counts what happens there, so that others
know what has not changed.
"""


class Link(Protocol):
    """How a volunteer's machine is connected to the core of the network, which is never the bottleneck."""

    @property
    def up_bps(self) -> float: ...
    @property
    def down_bps(self) -> float: ...
    @property
    def rtt_s(self) -> float:
        """Seconds to the core and back."""
        ...

    @property
    def nat(self) -> bool:
        """Whether its router admits no connections, so that others come through relays."""
        ...


@dataclass(frozen=True)
class HomeLine:
    """A link with typical figures."""

    up_bps: float = 20e6
    down_bps: float = 100e6
    rtt_s: float = 0.04
    nat: bool = False


class Peer:
    """A peer as long as its machine keeps its memory: a node that restarts is a new peer with the same identity."""

    __slots__ = (
        "awake",
        "down_free",
        "half",
        "identity",
        "is_alive",
        "leaf",
        "link",
        "number",
        "peer_id",
        "place",
        "up_free",
    )

    def __init__(self, number: int, identity: SimulatedIdentity, link: Link) -> None:
        self.number = number
        self.identity = identity
        self.peer_id: PeerID = identity.peer_id
        self.link = link
        self.place = id_of_bytes(self.peer_id.to_bytes()[-20:]) >> (ID_BITS - _PLACE_BITS)
        """The position in the DHT: the first bits of the peer's ID."""
        self.leaf = self.place >> (_PLACE_BITS - _LEAF_BITS)
        self.is_alive = False
        self.half = 0
        """The half of the network that the peer is in, if the network is partitioned."""
        self.up_free = self.down_free = 0.0
        """When the transfers under way on its link will have ended, up and down."""
        self.awake: asyncio.Event | None = None
        """An event that wakes the peer; None: it is not asleep."""

    def busy_s(self, now: float) -> float:
        """How long what is under way still occupies the link, in the direction where that takes longer."""
        return max(0.0, self.up_free - now, self.down_free - now)

    def occupy(self, way: str, seconds: float, now: float) -> float:
        """Occupies the link in direction `way`, "up" or "down", for `seconds` after what is under way. Returns when
        that ends.
        """
        if way == "up":
            self.up_free = max(now, self.up_free) + seconds
            return self.up_free
        self.down_free = max(now, self.down_free) + seconds
        return self.down_free


class Accounts:
    """Bytes that each peer sent and received, by purpose."""

    def __init__(self) -> None:
        self.up = {purpose: array("d") for purpose in PURPOSES}
        self.down = {purpose: array("d") for purpose in PURPOSES}
        self.settlers: list[Callable[[], None]] = []
        """Called before the accounts are read, since some parts count in bulk."""

    def open(self) -> None:
        """Adds a peer."""
        for columns in (self.up, self.down):
            for column in columns.values():
                column.append(0.0)

    def totals(self) -> dict[str, float]:
        """Bytes sent and received by all peers, by purpose. Each byte counts at both ends."""
        self._settle()
        return {p: sum(self.up[p]) + sum(self.down[p]) for p in PURPOSES}

    def upkeep(self) -> list[float]:
        """The bytes of each peer's upkeep, sent and received."""
        self._settle()
        columns = [side[p] for side in (self.up, self.down) for p in UPKEEP]
        return [sum(values) for values in zip(*columns, strict=True)]

    def _settle(self) -> None:
        for settle in self.settlers:
            settle()


class World:
    """Peers on one clock."""

    def __init__(self, seed: int, loop: VirtualLoop) -> None:
        self.seed = seed
        self.loop = loop
        self.time: Callable[[], float] = loop.time
        """Returns the seconds since the start."""
        self.now: Callable[[], float] = loop.unix_time
        """Returns the Unix time."""
        self.accounts = Accounts()
        self.peers: list[Peer] = []
        """All peers that ever were, by number."""
        self.by_id: dict[PeerID, Peer] = {}
        """The latest living peer of each identity."""
        self.living = 0
        self.changes = 0
        """How often the set of living peers, or who reaches whom, has changed."""
        self.deaths = 0
        self._changes_of_leaf = [array("L", [0]) * (1 << _LEAF_BITS) for _ in range(2)]
        """For each half, how often the living servers of each leaf have changed."""
        self._deaths_of_leaf = array("L", [0]) * (1 << _LEAF_BITS)
        self.is_parted = False
        self._places: tuple[list[int], list[int]] = ([], [])
        """For each half, the sorted positions of the living peers that serve the DHT."""
        self._at_place: dict[int, Peer] = {}
        self._rngs: dict[str, random.Random] = {}
        self._crowd = _FEW
        """With this many peers, memory moves to large pages."""

    def run(self, seconds: float) -> None:
        """Lets time pass."""
        self.loop.run_until_complete(asyncio.sleep(seconds))

    def rng(self, name: str) -> random.Random:
        """The random numbers for one subject: they do not depend on what other subjects draw."""
        if name not in self._rngs:
            self._rngs[name] = random.Random(f"{self.seed} {name}")
        return self._rngs[name]

    def add(self, link: Link, identity: SimulatedIdentity | None = None) -> Peer:
        """Adds a living peer. `identity`: that of an earlier peer, if the new one takes its place."""
        number = len(self.peers)
        peer = Peer(number, identity or SimulatedIdentity(number + 1), link)
        self.peers.append(peer)
        if number == self._crowd:
            use_large_pages()
            self._crowd = int(_GROWN * number)
        self.accounts.open()
        self.by_id[peer.peer_id] = peer
        self.revive(peer)
        return peer

    def kill(self, peer: Peer) -> None:
        """The peer never answers again."""
        if not peer.is_alive:
            return
        peer.is_alive = False
        self.living -= 1
        self.changes += 1
        self.deaths += 1
        self._deaths_of_leaf[peer.leaf] += 1
        self._leave_dht(peer)

    def revive(self, peer: Peer) -> None:
        peer.is_alive = True
        self.living += 1
        self.changes += 1
        if not peer.link.nat:
            self._enter_dht(peer)
            self._at_place[peer.place] = peer

    def partition(self, share: float) -> None:
        """Cuts a `share` of the living peers off from all others."""
        rng = self.rng("partition")
        living = [peer for peer in self.peers if peer.is_alive]
        for peer in rng.sample(living, round(share * len(living))):
            self._move(peer, 1)
        self.is_parted = True
        self.changes += 1

    def heal(self) -> None:
        for peer in self.peers:
            self._move(peer, 0)
        self.is_parted = False
        self.changes += 1

    def reachable(self, a: Peer, b: Peer) -> bool:
        """Whether b answers a."""
        return b.is_alive and a.half == b.half

    def nearest(self, place: int, half: int, most: int = REPLICAS) -> tuple[list[Peer], slice]:
        """The living DHT servers in this half that are nearest to a position, and the leaves on which they depend."""
        places = self._places[half]
        bits = max(0, (len(places) // (2 * most)).bit_length())
        while True:
            size = 1 << (_PLACE_BITS - bits)
            low = place & -size
            first, last = bisect_left(places, low), bisect_left(places, low + size)
            if last - first >= most or not bits:
                break
            bits -= 1
        some = sorted(places[first:last], key=place.__xor__)[:most]
        shift = _PLACE_BITS - _LEAF_BITS
        leaves = slice(low >> shift, ((low + size - 1) >> shift) + 1)
        return [self._at_place[each] for each in some], leaves

    def changes_in(self, leaves: slice, half: int) -> int:
        """How often the living servers of these leaves have changed."""
        return sum(self._changes_of_leaf[half][leaves])

    def deaths_in(self, leaves: slice) -> int:
        return sum(self._deaths_of_leaf[leaves])

    def servers(self, half: int = 0) -> int:
        """The number of living peers that serve the DHT."""
        return len(self._places[half])

    def random_server(self, rng: random.Random, half: int = 0) -> Peer | None:
        places = self._places[half]
        return self._at_place[places[int(rng.random() * len(places))]] if places else None

    def random_servers(self, rng: random.Random, half: int, count: int) -> list[Peer]:
        """Some servers, perhaps some of them several times."""
        places = self._places[half]
        return [self._at_place[place] for place in rng.choices(places, k=count)] if places else []

    def rtt_s(self, a: Peer, b: Peer) -> float:
        return a.link.rtt_s + b.link.rtt_s

    async def transfer(self, sender: Peer, receiver: Peer, size: float, relays: Sequence[Peer] = ()) -> bool:
        """Sends `size` bytes over both links, each of which does one transfer after another. Returns whether they
        arrived. If a peer dies, that is noticed after a while, and no transfer takes longer than real ones may.

        `relays`: peers whose links carry the bytes too, both ways.
        """
        now = self.time()
        ways = [
            ("up", sender),
            ("down", receiver),
            *((way, relay) for relay in relays for way in ("up", "down")),
        ]
        takes = [8 * size / (peer.link.up_bps if way == "up" else peer.link.down_bps) for way, peer in ways]
        # Each link continues with other transfers while this one waits for the other link.
        ends = [peer.occupy(way, took_s, now) for (way, peer), took_s in zip(ways, takes, strict=True)]
        delay_s = self.rtt_s(sender, receiver) / 2 + sum(relay.link.rtt_s for relay in relays)
        arrives_at = max(ends) + delay_s
        has_arrived = False
        try:
            while (left_s := min(arrives_at, now + MAX_TRANSFER_S) - self.time()) > 0:
                await asyncio.sleep(min(left_s, GRACE_S))
                if not all(peer.is_alive and peer.half == sender.half for _, peer in ways):
                    return False
            has_arrived = self.time() >= arrives_at
        finally:
            if not has_arrived:
                ended_at = self.time()
                for (way, peer), took_s, end in zip(ways, takes, ends, strict=True):
                    peer.occupy(way, -min(took_s, max(0.0, end - ended_at)), ended_at)
        if not has_arrived:
            return False
        self.accounts.up["transfer"][sender.number] += size
        self.accounts.down["transfer"][receiver.number] += size
        for relay in relays:
            self.accounts.up["relayed"][relay.number] += size
            self.accounts.down["relayed"][relay.number] += size
        return True

    def _enter_dht(self, peer: Peer) -> None:
        insort(self._places[peer.half], peer.place)
        self._changes_of_leaf[peer.half][peer.leaf] += 1

    def _leave_dht(self, peer: Peer) -> None:
        places = self._places[peer.half]
        index = bisect_left(places, peer.place)
        if index < len(places) and places[index] == peer.place:
            del places[index]
            self._changes_of_leaf[peer.half][peer.leaf] += 1

    def _move(self, peer: Peer, half: int) -> None:
        if peer.half == half:
            return
        serves = peer.is_alive and not peer.link.nat
        if serves:
            self._leave_dht(peer)
        peer.half = half
        if serves:
            self._enter_dht(peer)


def quantile(values: Iterable[float], q: float) -> float:
    """The quantile of the values; 0 if there are none."""
    ordered: Sequence[float] = sorted(values)
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)] if ordered else 0.0
