"""Where in the DHT a node announces the experts that it hosts.

For a node that hosts 256 experts, one signed record per expert would cost more than everything else it does. So a
record covers a region: all experts below a prefix of the grid that its node hosts. In a small swarm the region is a
layer, and a peer that reads one key knows all hosts of that layer. Regions split as they fill up, as shards of nodes
do: when about 50 others announce at a layer, or 25 at a longer prefix, further hosts announce at prefixes that are one
coordinate longer. Index entries at the short prefix say so, and hosts that see them move too. So no key outgrows what
one peer can read. A node with several experts in a row of the grid stays at the row after it has split, because one
record costs less than several. Readers read both. In a large swarm, nobody announces at a layer's own key, and readers
begin with the rows.
"""

import math
import random
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import or_

from dht.announcements import Replica, ReplicaState
from dht.records import INDEX_PIECE, MAX_REPLICAS_OF_RECORD
from dht.uid import UID
from peer.bounded import BoundedDict

Prefix = tuple[int, tuple[int, ...]]
"""A layer, and the first coordinates of some of its experts."""

CROWDED_BYTES = 12 * 1024
"""If the announcements at a layer's own key have this size, further hosts use longer prefixes. That is about 50 hosts
of a few experts each.
"""
ROW_CROWDED_BYTES = 6 * 1024
"""The same for longer prefixes. Below them, each expert costs its host a record, but most of what a node reads in large
swarms are rows of the grid, and the index entries of a row that has split take a twentieth of its records.
"""
STAYS_AT_ROW = 4
"""A node with this many experts in a row of the grid announces them at the row, even if it has split."""
_SPLIT_FOR_S = 600.0
"""How long a peer remembers, roughly, that a prefix has split and nobody announces there. Until then, it skips the
prefix when it looks for one expert.
"""
_READ_AGAIN_S = 3600.0
"""If hosts announce at longer prefixes, a prefix that has split is read again only after this time. By then, others may
announce there.
"""
LEFT_BY_HOSTS, LEFT_BY_READERS = 250, 1000
"""How many DHT nodes there are for each layer when hosts no longer announce at a layer's own key, even if it has not
split, and when readers no longer begin there. Two peers' estimates may differ by a factor of three.
"""
_ESTIMATED_FOR_S = 60.0
_WRITE_FOR_S = 300.0
"""How long a writer relies on what it has read of a region: whether it had split, and how many announce there.
"""
_JUST_READ_S = 2.0
_EMPTY_READS = 2
"""After this many empty reads in a row, a prefix counts as one where nobody announces."""
_RENEWED_BY = 8
"""How many hosts renew a shared index entry in each period, on average; while it lives, if it leads to many regions."""
_KEEPERS = 8
"""How many of the DHT nodes that there are for each prefix always renew the index entry that leads there, if they host
experts below it.
"""
_SHARED_LIVES, _SHARED_LIVES_ABOVE = 4, 16
"""How long an index entry lives whose hosts take turns to renew it, in lifetimes of an announcement, which are longer
than a period each. An entry that leads to hosts of a single expert or region lives for four. An entry further up leads
to many regions, and lives longer: otherwise, a quarter of all hosts would renew the few entries of a layer in each
period.
"""
_REMEMBERED, _REMEMBERED_JUST_READ = 65536, 256
_CHECKED = 2
"""How many of the oldest entries are checked after each read, which adds at most one."""


@dataclass(frozen=True)
class Region:
    """The result of reading a prefix."""

    replicas: Mapping[UID, Sequence[Replica]]
    """The replicas announced there, including withdrawn ones."""
    active: frozenset[int]
    """Next coordinates below which others announce, according to the pieces of the index that were read."""
    hosts: int
    """How many nodes announce there."""
    size: int
    """The size of their announcements, in bytes."""
    unread: int = 0
    """About how many more nodes announce there than were read."""

    @cached_property
    def split_pieces(self) -> int:
        """The pieces of the index that contain active coordinates, as bits."""
        return bits_of({coordinate // INDEX_PIECE for coordinate in self.active})

    def serves(self, uid: Prefix) -> bool:
        """Whether a node that announces there serves the expert."""
        return any(r.state is ReplicaState.SERVING for r in self.replicas.get(UID(*uid), ()))

    def leads_to(self, coordinate: int, only_active: bool) -> bool:
        """Whether hosts may announce below this next coordinate, because the index marks it as active. Unless
        `only_active`, it is enough that any coordinate in the same piece of the index is marked, because somebody may
        hide entries.
        """
        if only_active:
            return coordinate in self.active
        return any(other // INDEX_PIECE == coordinate // INDEX_PIECE for other in self.active)


@dataclass(slots=True)
class _Seen:
    """What was seen under a prefix. A set of pieces of its index is an int, in which bit n stands for piece n."""

    hosts: int
    is_crowded: bool
    empty_reads: int
    """Consecutive reads that found nobody announcing there. A single one may be a lie."""
    announced: int
    announced_before: int
    """The next coordinates of experts that are announced there, as bits, in this read and in the one before."""
    active: int
    """The number of active coordinates."""
    read_at: float
    pieces: int
    """The pieces that were read lately."""
    known_since: float
    """When the earliest of these was read."""
    split_until: "array[float]"
    """Until when each piece counts as one that leads further down; 0: it does not. The array ends with the last piece
    that does. A later look may not show the index, because somebody hides it.
    """

    @property
    def is_empty(self) -> bool:
        return self.empty_reads >= _EMPTY_READS

    def says_nothing_of(self, coordinate: int, now: float) -> bool:
        """Whether nobody announces experts below this next coordinate there, as two reads in a row found lately."""
        is_fresh = self.read_at > now - _WRITE_FOR_S
        return self.is_empty or (is_fresh and not (self.announced | self.announced_before) >> coordinate & 1)

    def leads_below(self, coordinate: int, now: float) -> bool:
        """Whether hosts are known to announce below this or other next coordinates in the same piece."""
        piece = coordinate // INDEX_PIECE
        return piece < len(self.split_until) and self.split_until[piece] > now

    def is_known(self, coordinate: int, now: float) -> bool:
        """Whether a writer may rely on it for this next coordinate."""
        return self.known_since > now - _WRITE_FOR_S and bool(self.pieces >> coordinate // INDEX_PIECE & 1)


def bits_of(numbers: Iterable[int]) -> int:
    """The set of these numbers, as bits."""
    return reduce(or_, map((1).__lshift__, numbers), 0)


def numbers_in(bits: int) -> Iterator[int]:
    """The numbers in a set of bits, in ascending order."""
    while bits:
        lowest = bits & -bits
        yield lowest.bit_length() - 1
        bits ^= lowest


def prefix_of(uid: Prefix, depth: int) -> Prefix:
    return uid[0], uid[1][:depth]


def pieces_of(size: int) -> range:
    """The pieces of the index for a grid dimension of this size."""
    return range(math.ceil(size / INDEX_PIECE))


class RegionMap:
    """What a peer has learnt of the regions, and where it should announce accordingly. No I/O."""

    def __init__(
        self,
        now: Callable[[], float],
        rng: random.Random,
        grid: Sequence[int] = (),
        nodes: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """`grid`: the experts' grid in each layer. `nodes`: estimates how many DHT nodes there are for each layer."""
        self._now = now
        self._rng = rng
        self._grid = grid
        self._nodes = nodes
        self._estimate: tuple[float, float] = 0.0, -math.inf
        """The last estimate, and when it was made."""
        self._seen: BoundedDict[tuple[int, ...], _Seen] = BoundedDict(_REMEMBERED)
        """By the numbers of the prefix: a nested key would be larger than what it leads to."""
        self._hosts: BoundedDict[Prefix, tuple[float, int]] = BoundedDict(_REMEMBERED)
        """When the region of a single expert was read, and how many nodes announce there, as long as this counts. A
        node reads some such regions in each period, and most of them never again.
        """
        self._just_read: BoundedDict[Prefix, tuple[float, frozenset[int], Region]] = BoundedDict(
            _REMEMBERED_JUST_READ
        )
        self._may_be_left: BoundedDict[Prefix, tuple[int, float]] = BoundedDict(_REMEMBERED)
        """How many more times this peer may leave an index entry to others before the one that it wrote last expires;
        at first, a random number of times. And a number from 0 to 1, drawn once: if it is small, the peer is a keeper
        of the entry.
        """

    def note(self, prefix: Prefix, pieces: Collection[int], region: Region) -> None:
        """Records what this peer has just read, with these pieces of the index."""
        now = self._now()
        while self._just_read and not _is_moment_ago(next(iter(self._just_read.values()))[0], now):
            self._just_read.popitem(last=False)  # a region may be large
        self._just_read[prefix] = now, frozenset(pieces), region
        if region.hosts or region.active:
            self._renew_splits_above(prefix, now)
        if not pieces:  # an expert has no index
            while self._hosts and next(iter(self._hosts.values()))[0] <= now - _WRITE_FOR_S:
                self._hosts.popitem(last=False)
            self._hosts[prefix] = now, region.hosts + region.unread
            return
        key, depth = (prefix[0], *prefix[1]), len(prefix[1])
        before = self._seen.get(key)
        read = 1 | bits_of(pieces)  # the first piece is read with the prefix itself
        seen = self._seen[key] = _Seen(
            hosts=region.hosts + region.unread,
            is_crowded=region.size > (ROW_CROWDED_BYTES if prefix[1] else CROWDED_BYTES),
            empty_reads=int(not region.replicas),
            announced=self._announced_in(region, depth),
            announced_before=-1 if before is None else before.announced,
            active=len(region.active),
            read_at=now,
            pieces=read,
            known_since=now,
            split_until=self._split_until(region, now, before),
        )
        if before is not None:
            is_again = before.read_at >= now - _JUST_READ_S  # two reads at one moment may be the same lie
            if is_again:
                seen.announced |= before.announced
                seen.announced_before = before.announced_before
            if not region.replicas:
                seen.empty_reads = before.empty_reads + (not is_again)
            if before.pieces & ~read and before.known_since > now - _WRITE_FOR_S:
                seen.pieces, seen.known_since = read | before.pieces, before.known_since
        self._forget_some(now)

    def _announced_in(self, region: Region, depth: int) -> int:
        """The next coordinates of the replicas in a region, as bits; all of them if some of its hosts were not read.
        Anybody may announce experts outside the grid, with coordinates of any size.
        """
        if region.unread or depth >= len(self._grid):
            return -1
        announced = {c for uid in region.replicas for c in uid.coordinate[depth : depth + 1]}
        return bits_of(c for c in announced if c < self._grid[depth])

    def _split_until(self, region: Region, now: float, before: _Seen | None) -> "array[float]":
        split = array("d") if before is None else before.split_until
        if not region.active:
            return split
        missing = region.split_pieces.bit_length() - len(split)
        split, until = split + array("d", [0.0]) * missing, self._drawn_split_until(now)
        for piece in numbers_in(region.split_pieces):
            split[piece] = until
        return split

    def _forget_some(self, now: float) -> None:
        """Forgets the oldest entries if they are of no use: they change neither where this peer announces nor where it
        looks, except that it may read an empty prefix once more.
        """
        for _ in range(_CHECKED):
            key, seen = next(iter(self._seen.items()))
            if (
                seen.read_at <= now - _WRITE_FOR_S
                and not seen.is_crowded
                and all(until <= now for until in seen.split_until)
            ):
                del self._seen[key]
            else:
                self._seen.move_to_end(key)  # others may be behind it

    def _renew_splits_above(self, prefix: Prefix, now: float) -> None:
        """A host at a longer prefix shows that the shorter ones are still split, so nobody has to read these."""
        layer, coordinate = prefix
        for depth, following in enumerate(coordinate):
            key = layer, *coordinate[:depth]
            seen = self._seen.get(key)
            if seen is not None and seen.leads_below(following, now) and seen.read_at > now - _READ_AGAIN_S:
                seen.split_until[following // INDEX_PIECE] = self._drawn_split_until(now)

    def _drawn_split_until(self, now: float) -> float:
        """Random, so that peers don't all read it again at the same time."""
        return now + _SPLIT_FOR_S * self._rng.uniform(0.5, 1.5)

    def recent(self, prefix: Prefix, pieces: Collection[int]) -> Region | None:
        """The region as it was read a moment ago, if at least these pieces of its index were read; else None."""
        read_at, read, region = self._just_read.get(prefix, (0.0, frozenset[int](), None))
        return region if _is_moment_ago(read_at, self._now()) and read.issuperset(pieces) else None

    def forget_recent(self) -> None:
        """Forgets the regions that were read a moment ago, which may be large. What was learnt from them stays."""
        self._just_read.clear()

    def has_split(self, layer: int) -> bool:
        """Whether hosts announce below the layer itself, as far as is known."""
        seen, now = self._seen.get((layer,)), self._now()
        return self._nodes_of_layer() >= LEFT_BY_READERS or (
            seen is not None and any(until > now for until in seen.split_until)
        )

    def _nodes_of_layer(self) -> float:
        """About how many DHT nodes there are for each layer."""
        nodes, estimated_at = self._estimate
        if (now := self._now()) >= estimated_at + _ESTIMATED_FOR_S:
            nodes = self._nodes()
            self._estimate = nodes, now
        return nodes

    def _passes_over_layers(self, least: int) -> bool:
        """Whether there are so many DHT nodes for each layer. A grid of one dimension has no rows below the layer."""
        return len(self._grid) > 1 and self._nodes_of_layer() >= least

    def leads_below(self, prefix: Prefix, coordinate: int) -> bool:
        """Whether hosts are known to announce below this next coordinate or others in the same piece."""
        seen = self._seen.get((prefix[0], *prefix[1]))
        return seen is not None and seen.leads_below(coordinate, self._now())

    def depths(self, below: Prefix) -> list[int]:
        """The depths (numbers of coordinates) at which hosts of an expert, or of experts below a prefix, may announce.
        These are all depths down to the first prefix that is not known to have split, without those where nobody
        announces them. In a large swarm, depth 0 is passed over: if nothing is found below it, it must be read.
        """
        (layer, coordinate), found, now = below, [], self._now()
        for depth, following in enumerate(coordinate):
            seen = self._seen.get((layer, *coordinate[:depth]))
            has_split = seen is not None and seen.leads_below(following, now)
            if not (has_split or depth) and self._passes_over_layers(LEFT_BY_READERS):
                continue
            if seen is None or not (has_split and seen.says_nothing_of(following, now)):
                found.append(depth)
            if not has_split:
                return found
        return [*found, len(coordinate)]

    def unread(self, uids: Collection[UID], hosted: Collection[UID]) -> list[UID]:
        """Those experts for which `homes` can't tell the region yet. `hosted`: all experts of the node."""
        own = _counts_below({*uids, *hosted})
        return [uid for uid in uids if not self._home(uid, own)[1]]

    def homes(self, uids: Collection[UID]) -> dict[UID, Prefix]:
        """The region in which a node that hosts these experts announces each of them."""
        own = _counts_below(uids)
        return {uid: self._home(uid, own)[0] for uid in uids}

    def _home(self, uid: UID, own: Mapping[Prefix, int]) -> tuple[Prefix, bool]:
        """The region in which to announce an expert, and whether enough was read to be sure. `own`: how many experts
        the node hosts below each prefix.
        """
        row, now = len(uid.coordinate) - 1, self._now()
        for depth in range(self._passes_over_layers(LEFT_BY_HOSTS), row + 1):
            prefix = prefix_of(uid, depth)
            if own[prefix] > MAX_REPLICAS_OF_RECORD:
                continue
            if depth == row and own[prefix] >= STAYS_AT_ROW:
                return prefix, True
            seen, following = self._seen.get((uid.layer, *prefix[1])), uid.coordinate[depth]
            if seen is None:
                return prefix, False
            if not (seen.leads_below(following, now) or seen.is_crowded):
                return prefix, seen.is_known(following, now)
        return uid, True

    def index_lives(self, home: Prefix, depth: int) -> int:
        """For how long a node that announces in a region should now renew the index entry that leads there from the
        first `depth` coordinates, in lifetimes of its announcement; 0: it leaves that to others.

        If an entry leads to few hosts, each renews it whenever it announces, and the entry lives no longer than the
        announcements: while it lives, readers do not see that the hosts have died. If it leads to many, a few of them
        renew it, chosen at random each time, because otherwise all would write to few keys. Since hosts may be made up,
        its keepers leave it to nobody for longer than it lives: all hosts in a small swarm, and a share of them in a
        large one, which depends on the size of the DHT; and those that announce at a row, if they are few. Hosts in the
        node's own region count only for a while after it has read them.
        """
        entry = prefix_of(home, depth + 1)
        hosts, (layer, coordinate) = 1, home
        for below in range(len(coordinate) - 1, depth, -1):
            above = self._seen.get((layer, *coordinate[:below]))
            hosts *= 1 if above is None else max(1, above.active)
        is_above = depth < len(coordinate) - 1
        are_few = False
        read_at, others = self._hosts.get(home, (0.0, 0))
        if (seen := self._seen.get((layer, *coordinate))) is not None:
            are_few = not is_above and seen.hosts <= _RENEWED_BY
            # each active coordinate leads to a host at least, as if this node announced there
            read_at, others = seen.read_at, seen.hosts + seen.active
            is_above |= seen.active > 0
        if read_at > self._now() - _WRITE_FOR_S:
            hosts *= max(1, others)
        lives = _SHARED_LIVES_ABOVE if is_above else _SHARED_LIVES
        # drawn at random, so that those which joined together don't renew it together
        left, drawn = self._may_be_left.get(entry) or (self._rng.randrange(lives), self._rng.random())
        if hosts <= _RENEWED_BY:
            self._may_be_left[entry] = 0, drawn
            return 1
        is_drawn = drawn * self._nodes_of_layer() < _KEEPERS * math.prod(self._grid[: depth + 1])
        # anybody can mark coordinates below a row, so those that announce at the row don't rely on them if they are few
        is_due = (is_drawn or are_few) and left == 0
        renews = is_due or self._rng.random() * hosts < (_RENEWED_BY / lives if is_above else _RENEWED_BY)
        self._may_be_left[entry] = lives - 1 if renews else max(0, left - 1), drawn
        return lives if renews else 0

    def not_written(self, homes: Iterable[Prefix]) -> None:
        """Records that the DHT did not take the index entries that lead to these regions: the keepers among them are
        due again.
        """
        for home in homes:
            for depth in range(len(home[1])):
                entry = prefix_of(home, depth + 1)
                if known := self._may_be_left.get(entry):
                    self._may_be_left[entry] = 0, known[1]


def _is_moment_ago(read_at: float, now: float) -> bool:
    """Not if it was later than now, before the clock was set back: it would be a moment ago for hours."""
    return 0 <= now - read_at < _JUST_READ_S


def _counts_below(uids: Collection[UID]) -> Mapping[Prefix, int]:
    return Counter(
        [(uid.layer, uid.coordinate[:depth]) for uid in uids for depth in range(len(uid.coordinate))]
    )
