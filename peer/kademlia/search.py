"""Kademlia's iterative search for one key, as a state machine without I/O or clock.

Maymounkov & Mazières 2002, section 2.3, with two differences. All of the nearest nodes are asked at the same time,
because a round trip is expensive and a request is cheap. And a value does not end the search: a majority of its holders
must have given theirs, because a single holder could leave entries out.

Keys are cheap, so anybody can make peers that are nearer to a DHT key than all others. Five rules keep them from hiding
what is stored there.

- Paths: S/Kademlia (Baumgart & Mies 2007) searches along several paths that share no node, so that a liar spoils only
  one of them. Here, the nodes that one answer names form a path. A node is asked once, on one path, and a path ends
  after three failures. So a liar that names nodes which don't exist causes three useless questions.
- Reach: other keys show within which distance holders usually are (Sridhar et al., NDSS 2024). All nodes within that
  distance are asked, even if many others are nearer. If unusually many nodes are near the key, the distance is
  increased, and writers store at more than the nearest nodes.
- Neighbourhoods: of the nodes at one IP address, only the nearest counts, unless there are too few. Addresses cost more
  than keys.
- Witnesses: a few nodes at random places are asked, too; many, if all others may be liars.
- Doubt: if the nearest nodes have no value, as many more are asked, and those that did not answer are asked again.

This module also remembers nodes that others named, and how long calls take.
"""

import bisect
import math
import random
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice

from peer.identity import PeerID
from peer.kademlia.routing import BUCKET_SIZE, ID_BITS, REPLICAS

_MIN_TIMEOUT_S, _MAX_TIMEOUT_S = 0.3, 3.0
_BUCKET_SHIFT = ID_BITS - 8
_BUCKET_NODES = 16
"""Nodes remembered for each first byte of their IDs: the ones named most recently."""
_SAMPLES, _FEWEST_SAMPLES = 16, 8
_EVERYWHERE: int = 2**ID_BITS
_WIDER = 4
_ASTRAY = 2
"""If no node is found within this many times the usual reach, those found may be liars that name only each other."""
_FIRST = 4
"""Nodes asked before the first answer, when the known ones may be far from the key."""
CROWD = 64
"""The most nodes within reach that are asked."""
_PATH = 6
"""Nodes of one path that are asked at the same time."""
_FAILURE = 2
"""How much of a path's width a failure uses up. A call in progress uses 1."""
_MOST = 128
"""The most nodes asked in total. Otherwise a liar could name nearer ones for ever."""
_SPARED = 32
"""How many of these are reserved for the front. Otherwise a peer that has just joined, and overestimates the reach,
would use them all up on the way to the key.
"""
_TRIES = 3
"""How often a node is asked while nobody has answered. If few nodes are known, all requests may get lost."""


@dataclass(frozen=True)
class SearchLimits:
    """How many nodes a search asks, and for what."""

    front: int = 7
    """The nearest live nodes: all of them must answer before the key counts as empty."""
    doubt: int = 7
    """If the front has no value, this many further nodes must answer before the key counts as empty."""
    quorum: int = 3
    """How many of the nearest `REPLICAS` nodes must give their values: a majority. Values elsewhere may be old, because
    nodes hand them to new peers.
    """
    witnesses: int = 2
    """Nodes at random places that are asked as well."""
    contacts: int | None = 8
    """How many contacts of the nearest nodes an answer brings for a key; None: those of all nodes it names. They take
    more bytes than the rest of an answer.
    """
    is_frugal: bool = False
    """Asks one node after the other until one gives its values, and then asks the others only for what is missing.
    Continues as usual when one fails, when a few had no values, or after a second.
    """


DEFAULT_LIMITS = SearchLimits()
NEIGHBOURS = SearchLimits(front=BUCKET_SIZE, doubt=0, witnesses=0, quorum=2**31, contacts=None)
"""The limits for a peer that joins and looks itself up. It needs enough nodes to fill a bucket of its routing table."""


class _Path:
    """The nodes that one answer named. At most `width` of them are asked at the same time."""

    __slots__ = ("used", "width")

    def __init__(self, width: float) -> None:
        self.width = width
        self.used = 0

    @property
    def is_open(self) -> bool:
        return self.used < self.width


class IterativeSearch:
    """A search for one key. Nodes are named by their Kademlia IDs, as integers."""

    def __init__(
        self,
        key: int,
        known: Iterable[int],
        limits: SearchLimits = DEFAULT_LIMITS,
        reach: int = 0,
        near_of: Callable[[int], str] = lambda node: "",
    ) -> None:
        """`known`: nodes that answered this peer before. `reach`: the distance within which all nodes are asked.

        `near_of`: returns a node's neighbourhood; empty: the node counts for itself.
        """
        self.key = key
        self.found_after: int | None = None
        """Rounds of requests until the first value; None while there is none."""
        self.rounds: int = 0
        """The longest chain of requests so far. In a chain, each request asks a node that the previous answer named."""
        self._holding: set[int] = set()
        """Nodes that returned a value."""
        self._limits = limits
        self._usual_reach = reach
        self._near_of = near_of
        self._near: dict[int, str] = {}
        """The neighbourhoods of nodes, as their contacts claim; once a node has answered, its real one."""
        self._nearest: list[tuple[int, int]] = []
        """(distance, node) of the known nodes that have not failed, nearest first."""
        self._depth: dict[int, int] = {}
        """The round in which each node is asked, 1 for those known at the start. Includes failed nodes."""
        self._paths: dict[int, tuple[_Path, ...]] = {}
        """The paths on which each node may be asked."""
        self._charges: dict[int, tuple[_Path, int]] = {}
        """The path on which each node was asked, and how much of the path's width that uses. An answer frees it again.
        """
        self._asked: set[int] = set()
        self._answered: set[int] = set()
        self._awaited: set[int] = set()
        """The witnesses whose answers the search waits for."""
        self._awaits_all = False
        self._failed: set[int] = set()
        """Nodes that failed in the current try."""
        self._tries = 1
        self._is_leading = limits.is_frugal
        self._own: int | None = None
        self._current_front: list[int] | None = None
        """The result of `_front`. None: the search has learned something new, asked or charged since, which all events
        make it do.
        """
        self._known = _Path(math.inf)
        self._hearsay = _Path(_PATH)
        self._learn(known, 1, self._known)

    @property
    def satisfied(self) -> bool:
        """Whether enough holders have given their values, and all nodes within reach have answered."""
        if len(self._holding) < self._limits.quorum:
            return False
        holders = sum(node in self._holding for node in self._holders())
        return holders >= self._limits.quorum and self._all_answered(self._within_reach())

    @property
    def is_thin(self) -> bool:
        """Whether too few nodes have answered, so that late answers are worth waiting for."""
        return not self.satisfied and len(self._answered) < self._limits.front

    @property
    def finished(self) -> bool:
        """Whether it is satisfied, or all of the nearest nodes and a witness have answered."""
        return not self._awaited and self._asks_no_more

    @property
    def waits_for_first(self) -> bool:
        """Whether it asks only one node, and that one has not answered."""
        return self._is_leading and any(map(self._is_pending, self._asked))

    @property
    def _asks_no_more(self) -> bool:
        if self.satisfied or len(self._asked) >= _MOST:
            return True
        return not self.is_stranded and not self._is_doubtful and self._all_answered(self._front())

    @property
    def is_stranded(self) -> bool:
        """Whether all requests were lost and another try is allowed."""
        if self._tries >= _TRIES or not self._failed:
            return False
        return all(node == self._own for node, _ in self._usable())

    @property
    def _is_doubtful(self) -> bool:
        """Whether to ask silent nodes once more, because the others have no value."""
        if self._holding or self._tries > 1 or not self._failed or not self._limits.doubt:
            return False
        return self._all_answered(self._front())

    def _all_answered(self, nodes: Iterable[int]) -> bool:
        return self._answered.issuperset(nodes)

    @property
    def asks_again(self) -> bool:
        """Whether it is asking silent nodes again."""
        return self._tries > 1

    def ask(self) -> list[int]:
        """The nodes to ask now, nearest first. Each is returned once per try."""
        if self.is_stranded or self._is_doubtful:
            self._try_again()
        if self._asks_no_more or self.waits_for_first:
            return []
        front = self._front()
        if not self._answered:
            front = front[:_FIRST]
        wanted = [node for node in front if node not in self._asked]
        if self._holding:
            within = set(self._within_reach())
            wanting = self._wanting()
            wanted = [node for n, node in enumerate(wanted) if n < wanting or node in within]
        if self._is_leading:
            return [node for node in [next(filter(self._send_to, wanted), None)] if node is not None]
        return [node for node in wanted if self._send_to(node)]

    def _wanting(self) -> int:
        """How many more nodes to ask: one holder more than the quorum needs. If all holders have answered and too few
        had the value, the whole front is asked, because the value may be stored at nodes that are a little further
        away.
        """
        holders = list(self._holders())
        if self._all_answered(holders):
            return self._limits.front
        hopeful = sum(node in self._holding or self._is_pending(node) for node in holders)
        return max(0, self._limits.quorum + 1 - hopeful)

    def _is_pending(self, node: int) -> bool:
        return node in self._asked and node not in self._answered

    def ask_witness(self, node: int, awaits_all: bool = False) -> bool:
        """Adds a witness: a node that is asked however far it is from the key. The search does not end before one
        witness has answered. `awaits_all`: before all have answered or failed. Returns False if the node was already
        asked.
        """
        self._awaits_all = awaits_all
        self._learn([node], 1, self._known)
        if node in self._asked or not self._send_to(node):
            return False
        self._awaited.add(node)
        return True

    def know(self, nodes: Iterable[int]) -> None:
        """Adds nodes that have answered this peer. The next round may ask them."""
        self._learn(nodes, self.rounds + 1, self._known)

    def hear(self, nodes: Iterable[int]) -> None:
        """Adds nodes that were named in other searches. They form one path."""
        self._learn(nodes, self.rounds + 1, self._hearsay)

    def holds(self, node: int, has_value: bool) -> None:
        """Adds this peer itself, which has the value and needs no request."""
        self._own = node
        self._learn([node], 0, self._known)
        self._asked.add(node)
        self.answered(node, [], has_value)

    def answered(self, node: int, nearer: Iterable[int], has_value: bool) -> None:
        """Records that the node answered, perhaps late, and named the `nearer` nodes."""
        depth = self._depth[node]
        self._restore(node)
        self._charge(node, 0)
        self._answered.add(node)
        self._near[node] = self._near_of(node)
        if node in self._awaited and not self._awaits_all:
            self._awaited.clear()
        self._awaited.discard(node)
        self.rounds = max(self.rounds, depth)
        if node != self._own and (has_value or len(self._answered) > _FIRST):
            self._is_leading = False
        if has_value:
            self._holding.add(node)
            if self.found_after is None:
                self.found_after = depth
        self._learn(nearer, depth + 1, _Path(_PATH))

    def hurry(self) -> None:
        """Ends the frugal part of the search, because it has taken long enough."""
        self._is_leading = False

    def failed(self, node: int) -> None:
        """Records that the node did not answer in time. The next nearest is asked instead."""
        self._is_leading = False
        if self._remove(node):
            self._charge(node, _FAILURE)

    def pass_over(self, node: int) -> None:
        """Leaves the node out, because it has failed in another search. Its path loses nothing."""
        self._is_leading = False
        if self._remove(node):
            self._charge(node, 0)

    def not_asked(self, node: int) -> None:
        """Records that a node was not asked after all, because the search had ended. It may continue later."""
        if node not in self._answered:
            self._asked.discard(node)
            self._awaited.discard(node)
            self._charge(node, 0)

    def nearest(self) -> list[int]:
        """The nodes that have answered: the nearest of each neighbourhood, nearest first, and then the others."""
        return [node for node, _ in self._live()]

    def places(self, usual: int, most: int, rng: random.Random) -> tuple[list[int], list[int]]:
        """The nodes to store at, and the other live nodes, which replace those that fail.

        If more nodes than usual are within reach, up to `most` of them are drawn at random, because the nearest may be
        liars.
        """
        spread = list(self._live())
        nearest = [node for node, _ in spread]
        reach = self._reach
        within = [node for node, is_first in spread[usual:] if is_first and node ^ self.key <= reach]
        drawn = rng.sample(within, min(len(within), most - usual))
        taken = nearest[:usual] + drawn
        return taken, [node for node in nearest if node not in taken]

    def _remove(self, node: int) -> bool:
        self._awaited.discard(node)
        entry = (node ^ self.key, node)
        place = bisect.bisect_left(self._nearest, entry)
        if node in self._answered or self._nearest[place : place + 1] != [entry]:
            return False
        del self._nearest[place]
        self._failed.add(node)
        return True

    def _try_again(self) -> None:
        self._tries += 1
        again, self._failed = self._failed, set()
        self._asked -= again
        for node in again:
            self._charge(node, 0)
            self._depth[node] += 1
            self._restore(node)

    def _live(self) -> Iterator[tuple[int, bool]]:
        """The nodes that have answered, in the order of `_spread`."""
        return self._spread(node for _, node in self._nearest if node in self._answered)

    def _usable(self) -> Iterator[tuple[int, bool]]:
        """The nodes that were asked or may be asked, in the order of `_spread`."""
        return self._spread(node for _, node in self._nearest if node in self._asked or self._may_ask(node))

    def _may_ask(self, node: int) -> bool:
        return any(path.used < path.width for path in self._paths[node])

    def _spread(self, nodes: Iterable[int]) -> Iterator[tuple[int, bool]]:
        """These nodes, and whether each is the first of its neighbourhood.

        The first ones of all neighbourhoods come first, in the order given, and then the others.
        """
        places: set[str] = set()
        further: list[tuple[int, bool]] = []
        for node in nodes:
            near = self._near[node]
            if near in places:
                further.append((node, False))
            else:
                yield node, True
                if near:
                    places.add(near)
        yield from further

    def _holders(self) -> Iterator[int]:
        """The nodes at which writers store, as far as is known."""
        return (node for node, _ in islice(self._spread(node for _, node in self._nearest), REPLICAS))

    @property
    def is_crowded(self) -> bool:
        """Whether more than twice the expected number of nodes are within the usual reach."""
        crowd = 2 * REPLICAS
        return len(self._nearest) > crowd and self._nearest[crowd][0] <= self._usual_reach

    @property
    def may_be_misled(self) -> bool:
        """Whether all nodes that were asked may be liars: more nodes are within reach than are asked, or none is near
        the key.
        """
        nearest = next((node ^ self.key for node, _ in self._live()), 0)
        return len(self._front()) >= CROWD or nearest > _ASTRAY * self._usual_reach

    @property
    def _reach(self) -> int:
        """The distance within which all nodes are asked. It is larger if unusually many nodes are near, because few of
        these may be honest.
        """
        return self._usual_reach * (_WIDER if self.is_crowded else 1)

    def _front(self) -> list[int]:
        """The nearest nodes, which must answer. Don't change the list."""
        if self._current_front is None:
            self._current_front = self._find_front()
        return self._current_front

    def _find_front(self) -> list[int]:
        front: list[int] = []
        reach = self._reach
        usable = self._usable()
        is_sparing = len(self._asked) >= _MOST - _SPARED
        for node, is_first in usable:
            if len(front) >= self._limits.front:
                if not is_first or node ^ self.key > reach or len(front) >= CROWD:
                    break
                if is_sparing and node not in self._asked:
                    continue
            front.append(node)
        else:
            return front
        if not self._holding and self._all_answered(front):
            further = chain([node], (node for node, _ in usable))
            front += islice(further, self._limits.doubt)
        return front

    def _within_reach(self) -> Iterator[int]:
        reach = self._reach
        for node, is_first in islice(self._usable(), CROWD):
            if not is_first or node ^ self.key > reach:
                break
            yield node

    def _learn(self, nodes: Iterable[int], depth: int, path: _Path) -> None:
        for node in nodes:
            paths = self._paths.get(node)
            if paths is None:
                self._near[node] = self._near_of(node)
                self._paths[node] = (path,)
                self._depth[node] = depth
                bisect.insort(self._nearest, (node ^ self.key, node))
            elif node not in self._asked and path not in paths:
                self._paths[node] = (*paths, path)
            else:
                continue
            self._current_front = None

    def _send_to(self, node: int) -> bool:
        """Asks the node on one of its paths. False if none has room."""
        path = next((path for path in self._paths[node] if path.is_open), None)
        if path is None:
            return False
        self._current_front = None
        path.used += 1
        self._charges[node] = path, 1
        self._asked.add(node)
        return True

    def _charge(self, node: int, charge: int) -> None:
        """Sets how much of its path's width the node uses."""
        self._current_front = None
        if node in self._charges:
            path, charged = self._charges[node]
            path.used += charge - charged
            self._charges[node] = path, charge

    def _restore(self, node: int) -> None:
        """Puts a failed node back: it has answered after all, or is asked again."""
        entry = (node ^ self.key, node)
        place = bisect.bisect_left(self._nearest, entry)
        if self._nearest[place : place + 1] != [entry]:
            self._nearest.insert(place, entry)


class UsualReach:
    """How far from a key its holders usually are: the median over keys that nobody could know in advance."""

    def __init__(self) -> None:
        self._samples: deque[int] = deque(maxlen=_SAMPLES)

    @property
    def missing(self) -> int:
        """How many samples are still needed for a reliable median."""
        return max(0, _FEWEST_SAMPLES - len(self._samples))

    def note(self, key: int, nearest: Sequence[int]) -> None:
        """Adds a sample: the live nodes nearest to a random key, as a search found them, nearest first."""
        if nearest:
            self._samples.append(self._estimate(key, nearest))

    def distance(self, own: int, neighbours: Sequence[int]) -> int:
        """The usual distance within which the holders of a key are: the median of the samples. While there are too few,
        it is estimated from this peer's own neighbours.
        """
        if not self.missing:
            return statistics.median_low(self._samples)
        return self._estimate(own, neighbours)

    def _estimate(self, place: int, nearest: Sequence[int]) -> int:
        """The distance within which there are, on average, as many nodes as hold a key, estimated from this peer's
        neighbours. It counts the cells that nodes occupy (linear counting, Whang et al. 1990), so many nodes in few
        cells count little.
        """
        count = len(nearest)
        if count < REPLICAS:
            return _EVERYWHERE
        width = max(node ^ place for node in nearest) + 1
        empty = count - len({(node ^ place) * count // width for node in nearest})
        number = count * math.log(count / (empty + 0.5))
        return min(_EVERYWHERE, int(width * REPLICAS / number))


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
        self._buckets: dict[int, dict[int, PeerID]] = {}

    def note(self, peers: Mapping[int, PeerID]) -> None:
        for node, peer in peers.items():
            bucket = self._buckets.setdefault(node >> _BUCKET_SHIFT, {})
            bucket.pop(node, None)
            bucket[node] = peer
            if len(bucket) > _BUCKET_NODES:
                del bucket[next(iter(bucket))]

    def forget(self, node: int) -> None:
        self._buckets.get(node >> _BUCKET_SHIFT, {}).pop(node, None)

    def near(self, key: int) -> Mapping[int, PeerID]:
        """The nodes whose first byte is the key's."""
        return self._buckets.get(key >> _BUCKET_SHIFT, {})
