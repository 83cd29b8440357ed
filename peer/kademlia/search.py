"""Kademlia's iterative search for one key, as a state machine without I/O or clock.

Maymounkov & Mazières 2002, section 2.3, with two differences. All of the nearest nodes are asked at the same time,
because a round trip is expensive and a request is cheap. And a value does not end the search until a majority of its
holders has given theirs: many peers write to one dictionary, and a single holder could leave out what it likes.

Also what a peer knows of others beside its routing table: nodes that others named, and how long calls take.
"""

import bisect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from peer.identity import PeerID
from peer.kademlia.hivemind import DHTID

_MIN_TIMEOUT_S, _MAX_TIMEOUT_S = 0.3, 3.0
_BUCKET_SHIFT = 8 * DHTID.HASH_NBYTES - 8
_BUCKET_NODES = 16
"""Nodes remembered for each first byte of their IDs: the ones named most recently."""


@dataclass(frozen=True)
class SearchLimits:
    """How many nodes a search asks."""

    front: int = 7
    """Nearest live nodes that must all answer before a key counts as having no value."""
    first: int = 4
    """Nodes asked before the first answer, when the known ones may be far from the key."""
    holders: int = 5
    """Nearest nodes, at which writers store. Values elsewhere may be old: nodes hand them to new peers."""
    quorum: int = 3
    """Holders whose values are enough: a majority."""
    most: int = 96
    """Nodes asked in total: a liar could name nearer ones forever."""
    tries: int = 3
    """How often a node is asked while nobody has answered: if few nodes are known, all requests may be lost."""


DEFAULT_LIMITS = SearchLimits()
NEIGHBOURS = SearchLimits(front=20, quorum=2**31)
"""For a peer that joins and looks itself up: as many as fill a bucket of its routing table."""


class IterativeSearch:
    """A search for one key. Nodes are named by their Kademlia IDs, as integers."""

    def __init__(self, key: int, known: Iterable[int], limits: SearchLimits = DEFAULT_LIMITS) -> None:
        self.key = key
        self.found_after: int | None = None
        """Rounds of requests until the first value; None while there is none."""
        self.rounds = 0
        """The longest chain of requests so far, in which each asks a node that the previous answer named."""
        self._holding: set[int] = set()
        """Nodes that returned a value."""
        self._limits = limits
        self._nearest: list[tuple[int, int]] = []
        """(distance, node) of the known nodes that have not failed, nearest first."""
        self._depth: dict[int, int] = {}
        """The round that asks each node, 1 for those known at the start. Failed ones are included."""
        self._asked: set[int] = set()
        self._answered: set[int] = set()
        self._failed: set[int] = set()
        """In the current try."""
        self._tries = 1
        self._own: int | None = None
        self._learn(known, 1)

    @property
    def satisfied(self) -> bool:
        """Whether enough holders have given their values."""
        holders = sum(node in self._holding for _, node in self._nearest[: self._limits.holders])
        return holders >= self._limits.quorum

    @property
    def is_thin(self) -> bool:
        """Whether too few nodes have answered, so that late answers are worth waiting for."""
        return not self.satisfied and len(self._answered) < self._limits.front

    @property
    def finished(self) -> bool:
        """Whether it is satisfied, or all of the nearest nodes have answered."""
        if self.satisfied or len(self._asked) >= self._limits.most:
            return True
        return all(node in self._answered for _, node in self._front()) and not self.is_stranded

    @property
    def is_stranded(self) -> bool:
        """Whether all requests were lost and another try is allowed."""
        if self._tries >= self._limits.tries or not self._failed:
            return False
        return all(node == self._own for _, node in self._nearest)

    @property
    def asks_again(self) -> bool:
        """Whether it is asking nodes again that did not answer."""
        return self._tries > 1

    def ask(self) -> list[int]:
        """The nodes to ask now, nearest first. Each is returned once per try."""
        if self.is_stranded:
            self._try_again()
        if self.finished:
            return []
        front = self._front()
        if not self._answered:
            front = front[: self._limits.first]
        wanted = [node for _, node in front if node not in self._asked]
        if self._holding:
            wanted = wanted[: self._wanting()]
        self._asked.update(wanted)
        return wanted

    def _wanting(self) -> int:
        """How many more nodes to ask: one more holder than the quorum needs.

        If all holders have answered and too few had the value, the whole front: it may be stored beside its place.
        """
        holders = [node for _, node in self._nearest[: self._limits.holders]]
        if all(node in self._answered for node in holders):
            return self._limits.front
        hopeful = sum(node in self._holding or self._is_pending(node) for node in holders)
        return max(0, self._limits.quorum + 1 - hopeful)

    def _is_pending(self, node: int) -> bool:
        return node in self._asked and node not in self._answered

    def learn(self, nodes: Iterable[int]) -> None:
        """Adds nodes that others know; the next round may ask them."""
        self._learn(nodes, self.rounds + 1)

    def holds(self, node: int, has_value: bool) -> None:
        """Adds this peer's own node, which needs no request."""
        self._own = node
        self._learn([node], 0)
        self._asked.add(node)
        self.answered(node, [], has_value)

    def answered(self, node: int, nearer: Iterable[int], has_value: bool) -> None:
        """A node answered, perhaps late, and named these others."""
        depth = self._depth[node]
        self._restore(node)
        self._answered.add(node)
        self.rounds = max(self.rounds, depth)
        if has_value:
            self._holding.add(node)
            if self.found_after is None:
                self.found_after = depth
        self._learn(nearer, depth + 1)

    def failed(self, node: int) -> None:
        """The node did not answer in time: the next nearest takes its place."""
        entry = (node ^ self.key, node)
        place = bisect.bisect_left(self._nearest, entry)
        if node not in self._answered and self._nearest[place : place + 1] == [entry]:
            del self._nearest[place]
            self._failed.add(node)

    def nearest(self) -> list[int]:
        """The nodes that have answered, nearest first."""
        return [node for _, node in self._nearest if node in self._answered]

    def _try_again(self) -> None:
        self._tries += 1
        again, self._failed = self._failed, set()
        self._asked -= again
        for node in again:
            self._depth[node] += 1
            self._restore(node)

    def _front(self) -> list[tuple[int, int]]:
        return self._nearest[: self._limits.front]

    def _learn(self, nodes: Iterable[int], depth: int) -> None:
        for node in nodes:
            if node not in self._depth:
                self._depth[node] = depth
                bisect.insort(self._nearest, (node ^ self.key, node))

    def _restore(self, node: int) -> None:
        """Puts a failed node back: it has answered after all, or is asked again."""
        entry = (node ^ self.key, node)
        place = bisect.bisect_left(self._nearest, entry)
        if self._nearest[place : place + 1] != [entry]:
            self._nearest.insert(place, entry)


class ContactBook:
    """Kademlia ID → PeerID of the nodes in a look-up. A PeerID is made when it is needed, because that is slow."""

    def __init__(self) -> None:
        self._heard: dict[int, bytes] = {}
        self._made: dict[int, PeerID] = {}

    def __getitem__(self, node: int) -> PeerID:
        if node not in self._made:
            self._made[node] = PeerID(self._heard[node])
        return self._made[node]

    def know(self, peers: Mapping[int, PeerID]) -> None:
        for node, peer in peers.items():
            self._made.setdefault(node, peer)

    def hear(self, peers: Mapping[int, bytes]) -> None:
        self._heard.update(peers)


class RttEstimator:
    """Round-trip time estimated from earlier calls, as TCP does for its retransmission timeout (RFC 6298)."""

    def __init__(self) -> None:
        self._mean_s: float | None = None
        self._deviation_s = 0.0

    def note(self, took_s: float) -> None:
        if self._mean_s is None:
            self._mean_s, self._deviation_s = took_s, took_s / 2
        else:
            self._deviation_s += (abs(took_s - self._mean_s) - self._deviation_s) / 4
            self._mean_s += (took_s - self._mean_s) / 8

    @property
    def timeout_s(self) -> float:
        """An answer that takes longer is late."""
        if self._mean_s is None:
            return 1.0
        return min(max(self._mean_s + 4 * self._deviation_s, _MIN_TIMEOUT_S), _MAX_TIMEOUT_S)


class UnverifiedNodes:
    """Nodes that others named recently. They have not answered, so they aren't in the routing table, but a search may
    start from them."""

    def __init__(self) -> None:
        self._buckets: dict[int, dict[int, bytes]] = {}

    def note(self, peers: Mapping[int, bytes]) -> None:
        for node, peer in peers.items():
            bucket = self._buckets.setdefault(node >> _BUCKET_SHIFT, {})
            bucket.pop(node, None)
            bucket[node] = peer
            if len(bucket) > _BUCKET_NODES:
                del bucket[next(iter(bucket))]

    def forget(self, node: int) -> None:
        self._buckets.get(node >> _BUCKET_SHIFT, {}).pop(node, None)

    def near(self, key: int) -> Mapping[int, bytes]:
        """Those whose first byte is the key's."""
        return self._buckets.get(key >> _BUCKET_SHIFT, {})
