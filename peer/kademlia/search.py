"""Kademlia's iterative look-up of one key, as a state machine: no I/O, no clock.

Maymounkov & Mazières 2002, section 2.3, with two differences. All of the nearest nodes are asked at the same time,
because a round trip is dear and a question is cheap. And a value found does not end the search until a majority of
its holders gave theirs: a dictionary is written by many peers, and a single holder could leave out what it likes.

What a peer knows of others beside its routing table: whom it heard of, and how long they take to answer.
"""

import bisect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from peer.identity import PeerID
from peer.kademlia.hivemind import DHTID
from peer.kademlia.validation import owns_node_id


@dataclass(frozen=True)
class SearchLimits:
    """How many nodes a look-up asks."""

    front: int = 7
    """Nearest live nodes that must all have answered, if the key has no value."""
    first: int = 4
    """Nodes asked until the first answer, when those known are far from the key."""
    holders: int = 5
    """Nearest nodes at which writers store. Values of others may be old: nodes hand them to those that they meet."""
    quorum: int = 3
    """Holders whose values are enough: the majority."""
    most: int = 96
    """Nodes asked in all: a liar could name nearer ones for ever."""
    tries: int = 3
    """How often a node is asked as long as nobody has answered: one who knows few nodes may lose all questions."""


DEFAULT_BREADTH = SearchLimits()


class IterativeSearch:
    """A look-up of one key. Nodes are named by their Kademlia IDs, as integers."""

    def __init__(self, key: int, known: Iterable[int], breadth: SearchLimits = DEFAULT_BREADTH) -> None:
        self.key = key
        self.found_after: int | None = None
        """Rounds of questions, one after another, until the first value; None while there is none."""
        self.rounds = 0
        """The longest chain of questions so far: each asked a node that the answer before it named."""
        self._holding: set[int] = set()
        """Nodes that answered with a value."""
        self._breadth = breadth
        self._nearest: list[tuple[int, int]] = []
        """(distance, node) of the known ones that have not failed, the nearest first."""
        self._depth: dict[int, int] = {}
        """Which round asks a node: 1 for those known at the start. Also of those that failed."""
        self._asked: set[int] = set()
        self._answered: set[int] = set()
        self._failed: set[int] = set()
        """Since the questions were asked anew."""
        self._tries = 1
        self._own: int | None = None
        self._learn(known, 1)

    @property
    def satisfied(self) -> bool:
        """Whether enough holders gave their values."""
        holders = sum(node in self._holding for _, node in self._nearest[: self._breadth.holders])
        return holders >= self._breadth.quorum

    @property
    def is_thin(self) -> bool:
        """Whether fewer nodes have answered than should: with those that are late it may yet be satisfied."""
        return not self.satisfied and len(self._answered) < self._breadth.front

    @property
    def finished(self) -> bool:
        """Whether it is satisfied, or all of the nearest nodes have answered."""
        if self.satisfied or len(self._asked) >= self._breadth.most:
            return True
        return all(node in self._answered for _, node in self._front()) and not self.is_stranded

    @property
    def is_stranded(self) -> bool:
        """Whether all questions are lost, and may be asked again: then nothing is known of the key."""
        if self._tries >= self._breadth.tries or not self._failed:
            return False
        return all(node == self._own for _, node in self._nearest)

    @property
    def asks_again(self) -> bool:
        """Whether it asks nodes that did not answer before."""
        return self._tries > 1

    def ask(self) -> list[int]:
        """The nodes to ask now, nearest first. Each is named once."""
        if self.is_stranded:
            self._try_again()
        if self.finished:
            return []
        front = self._front()
        if not self._answered:
            front = front[: self._breadth.first]
        wanted = [node for _, node in front if node not in self._asked]
        if self._holding:
            wanted = wanted[: self._wanting()]
        self._asked.update(wanted)
        return wanted

    def _wanting(self) -> int:
        """How many more to ask, so that one more of the holders is asked than has to give its value.

        All of the front when the holders have answered, and too few had it: it may lie beside where it should.
        """
        holders = [node for _, node in self._nearest[: self._breadth.holders]]
        if all(node in self._answered for node in holders):
            return self._breadth.front
        hopeful = sum(node in self._holding or self._is_waited_for(node) for node in holders)
        return max(0, self._breadth.quorum + 1 - hopeful)

    def _is_waited_for(self, node: int) -> bool:
        return node in self._asked and node not in self._answered

    def learn(self, nodes: Iterable[int]) -> None:
        """Others know these nodes; the next round may ask them."""
        self._learn(nodes, self.rounds + 1)

    def holds(self, node: int, has_value: bool) -> None:
        """This peer is itself a node of the DHT, and needs no question."""
        self._own = node
        self._learn([node], 0)
        self._asked.add(node)
        self.answered(node, [], has_value)

    def answered(self, node: int, nearer: Iterable[int], has_value: bool) -> None:
        """A node answered, perhaps late; it named these others."""
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
        """The node did not answer, or not in time: the next nearest takes its place."""
        entry = (node ^ self.key, node)
        place = bisect.bisect_left(self._nearest, entry)
        if node not in self._answered and self._nearest[place : place + 1] == [entry]:
            del self._nearest[place]
            self._failed.add(node)

    def nearest(self) -> list[int]:
        """The nodes that have answered, the nearest first."""
        return [node for _, node in self._nearest if node in self._answered]

    def _try_again(self) -> None:
        self._tries += 1
        again, self._failed = self._failed, set()
        self._asked -= again
        for node in again:
            self._depth[node] += 1
            self._restore(node)

    def _front(self) -> list[tuple[int, int]]:
        return self._nearest[: self._breadth.front]

    def _learn(self, nodes: Iterable[int], depth: int) -> None:
        for node in nodes:
            if node not in self._depth:
                self._depth[node] = depth
                bisect.insort(self._nearest, (node ^ self.key, node))

    def _restore(self, node: int) -> None:
        """A node that was given up has answered after all."""
        entry = (node ^ self.key, node)
        place = bisect.bisect_left(self._nearest, entry)
        if self._nearest[place : place + 1] != [entry]:
            self._nearest.insert(place, entry)


_LEAST_PATIENCE_S, _MOST_PATIENCE_S = 0.3, 3.0
_HEARSAY_SHIFT = 8 * DHTID.HASH_NBYTES - 8
_HEARSAY_BUCKET = 16
"""Nodes remembered for each first byte of their IDs, those that were named last."""


class ContactBook:
    """Kademlia ID → PeerID of the nodes that some look-ups heard of. A PeerID is made when it is needed."""

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
        """Of several that are named for one place, the first counts, unless it is another's own."""
        for node, peer in peers.items():
            known = self._heard.get(node)
            if known is None and node not in self._made:
                self._heard[node] = peer
            elif known not in (None, peer) and owns_node_id(node, peer):
                self._heard[node] = peer
                self._made.pop(node, None)


class RttEstimator:
    """How long a call takes, by the calls before: the estimate by which TCP sends again (RFC 6298)."""

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
    def patience_s(self) -> float:
        """After so long an answer is late."""
        if self._mean_s is None:
            return 1.0
        return min(max(self._mean_s + 4 * self._deviation_s, _LEAST_PATIENCE_S), _MOST_PATIENCE_S)


class UnverifiedNodes:
    """Nodes that others named lately. Not asked yet, so not for the routing table, but good places to start from."""

    def __init__(self) -> None:
        self._buckets: dict[int, dict[int, bytes]] = {}

    def note(self, peers: Mapping[int, bytes]) -> None:
        for node, peer in peers.items():
            bucket = self._buckets.setdefault(node >> _HEARSAY_SHIFT, {})
            known = bucket.pop(node, peer)
            bucket[node] = peer if known == peer or owns_node_id(node, peer) else known
            if len(bucket) > _HEARSAY_BUCKET:
                del bucket[next(iter(bucket))]

    def forget(self, node: int) -> None:
        self._buckets.get(node >> _HEARSAY_SHIFT, {}).pop(node, None)

    def near(self, key: int) -> Mapping[int, bytes]:
        """Those that share the first byte with the key."""
        return self._buckets.get(key >> _HEARSAY_SHIFT, {})
