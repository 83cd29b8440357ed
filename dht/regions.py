"""Where in the DHT a node announces the experts that it hosts.

One signed record per expert would cost a node that hosts 256 more than all else that it does. So a record is for a
region: all experts below a prefix of the grid that its node hosts. In a small swarm the region is a layer, and whoever
reads one key knows all its hosts. Regions split as they fill up, as shards of nodes do: when about 30 others announce
at a prefix, further hosts announce one coordinate further down. Index entries at the prefix say so, and whoever sees
them moves down too. So no key outgrows what one can read, and in a large swarm nobody has to read the first ones.

A node with several experts in a row stays at the row when that has split, as one record is less than several. Readers
take both.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from dht.announcements import Replica, ReplicaState
from dht.records import INDEX_PIECE, MAX_REPLICAS_OF_RECORD
from dht.uid import UID
from peer.bounded import BoundedDict

Prefix = tuple[int, tuple[int, ...]]
"""A layer, and the first coordinates of some of its experts."""

CROWDED_BYTES = 24 * 1024
"""Bytes announced at a prefix before others announce further down: about 30 hosts of a few experts each."""
STAYS_AT_ROW = 4
"""Experts of one node in a row that has split, for which it announces at the row."""
_SPLIT_FOR_S = 600.0
"""How long it is remembered, about, that a prefix has split and nobody announces there. Meanwhile, whoever wants one
expert does not read it."""
_WRITE_FOR_S = 300.0
"""How long a writer goes by what it has read of a region that had not split. As others write there, it may be crowded.
"""
_JUST_READ_S = 2.0
_EMPTY_READS = 2
"""Empty reads in a row after which nobody announces at a prefix."""
_RENEWED_BY = 8
"""Hosts that renew an index entry in each period, on average. It lives for three."""
_REMEMBERED, _REMEMBERED_JUST_READ = 65536, 256


@dataclass(frozen=True)
class Region:
    """What was read under a prefix."""

    replicas: Mapping[UID, Sequence[Replica]]
    """Replicas that their hosts announce there, including withdrawn ones."""
    active: frozenset[int]
    """Next coordinates below which others announce, by those pieces of the index that were read."""
    hosts: int
    """Nodes that announce there."""
    size: int
    """Bytes of what they announce."""
    unread: int = 0
    """About how many further nodes announce there, of which this peer was told nothing else."""

    def serves(self, uid: Prefix) -> bool:
        """Whether somebody who announces there serves the expert."""
        return any(r.state is ReplicaState.SERVING for r in self.replicas.get(UID(*uid), ()))

    def leads_to(self, coordinate: int, only_active: bool) -> bool:
        """Whether hosts may announce below this next coordinate: the index says so, or `only_active` is False, and it
        says so of others: somebody may hide entries.
        """
        if only_active:
            return coordinate in self.active
        return any(other // INDEX_PIECE == coordinate // INDEX_PIECE for other in self.active)


@dataclass(frozen=True)
class _Seen:
    """What was read under a prefix, and in one piece of its index."""

    hosts: int
    is_crowded: bool
    active: int
    """Coordinates."""
    read_at: float
    split_until: float
    """Whoever hides the index in one look does not undo this."""
    empty_reads: int
    """Reads in a row that found nobody announcing there. One may be a lie."""

    @property
    def is_empty(self) -> bool:
        return self.empty_reads >= _EMPTY_READS


def prefix_of(uid: Prefix, depth: int) -> Prefix:
    return uid[0], uid[1][:depth]


def pieces_of(size: int) -> range:
    """The pieces of the index for a grid dimension of this size."""
    return range(math.ceil(size / INDEX_PIECE))


class RegionMap:
    """What a peer has learnt of the regions, and where it announces by that. No I/O."""

    def __init__(self, now: Callable[[], float], rng: random.Random) -> None:
        self._now = now
        self._rng = rng
        self._seen = BoundedDict[tuple[Prefix, int], _Seen](_REMEMBERED)
        self._just_read = BoundedDict[Prefix, tuple[float, frozenset[int], Region]](_REMEMBERED_JUST_READ)

    def note(self, prefix: Prefix, pieces: Collection[int], region: Region) -> None:
        """What this peer has just read, with these pieces of the index."""
        now = self._now()
        while self._just_read and next(iter(self._just_read.values()))[0] <= now - _JUST_READ_S:
            self._just_read.popitem(last=False)  # it may be large
        self._just_read[prefix] = now, frozenset(pieces), region
        active = Counter(coordinate // INDEX_PIECE for coordinate in region.active)
        for piece in pieces:
            before = self._seen.get((prefix, piece))
            split_until = 0.0 if before is None else before.split_until
            if active[piece]:
                # drawn, so that peers don't read it again together
                split_until = now + _SPLIT_FOR_S * self._rng.uniform(0.5, 1.5)
            empty_reads = 0 if region.replicas else 1 + (0 if before is None else before.empty_reads)
            self._seen[prefix, piece] = _Seen(
                region.hosts + region.unread,
                region.size > CROWDED_BYTES,
                active[piece],
                now,
                split_until,
                empty_reads,
            )

    def recent(self, prefix: Prefix, pieces: Collection[int]) -> Region | None:
        """What was read a moment ago, with these pieces or more."""
        read_at, read, region = self._just_read.get(prefix, (0.0, frozenset[int](), None))
        return region if read_at > self._now() - _JUST_READ_S and read.issuperset(pieces) else None

    def has_split(self, layer: int, size: int) -> bool:
        """Whether hosts of a layer are known to announce below it. `size`: of the first grid dimension."""
        pieces = (self._seen.get(((layer, ()), piece)) for piece in pieces_of(size))
        return any(seen is not None and seen.split_until > self._now() for seen in pieces)

    def depths(self, below: Prefix) -> list[int]:
        """The depths, in coordinates, at which hosts of an expert, or of experts below a prefix, may announce: those
        down to the first that has not split, as far as is known, without those where nobody announces.
        """
        found = []
        for depth in range(len(below[1])):
            seen = self._seen_above(below, depth)
            has_split = seen is not None and seen.split_until > self._now()
            if seen is None or not (has_split and seen.is_empty):
                found.append(depth)
            if not has_split:
                return found
        return [*found, len(below[1])]

    def unread(self, uids: Collection[UID], hosted: Collection[UID]) -> list[UID]:
        """Those of the experts whose region is unknown to a node that hosts them and `hosted`."""
        own = _counts_below({*uids, *hosted})
        return [uid for uid in uids if not self._home(uid, own)[1]]

    def homes(self, uids: Collection[UID]) -> dict[UID, Prefix]:
        """The region in which a node that hosts these experts announces each of them."""
        own = _counts_below(uids)
        return {uid: self._home(uid, own)[0] for uid in uids}

    def _home(self, uid: UID, own: Mapping[Prefix, int]) -> tuple[Prefix, bool]:
        """And whether that is known. `own`: how many experts the node hosts below each prefix."""
        row = len(uid.coordinate) - 1
        for depth in range(row + 1):
            prefix = prefix_of(uid, depth)
            if own[prefix] > MAX_REPLICAS_OF_RECORD:
                continue
            if depth == row and own[prefix] >= STAYS_AT_ROW:
                return prefix, True
            seen = self._seen_above(uid, depth)
            if seen is None:
                return prefix, False
            if not (seen.split_until > self._now() or seen.is_crowded):
                return prefix, seen.read_at > self._now() - _WRITE_FOR_S
        return uid, True

    def renews_index(self, home: Prefix, depth: int) -> bool:
        """Whether a node that announces in a region renews now the index entry that leads there from the first `depth`
        coordinates. Of many hosts below an entry a few do, a new random choice each time: otherwise all would write to
        few keys.
        """
        hosts = 1
        for below in range(len(home[1]), depth, -1):
            seen = self._seen_above((home[0], (*home[1], 0)), below)
            if seen is not None:
                hosts *= max(1, seen.hosts if below == len(home[1]) else seen.active)
        return self._rng.random() * hosts < _RENEWED_BY

    def _seen_above(self, below: Prefix, depth: int) -> _Seen | None:
        """What was seen under a longer prefix's first `depth` coordinates, with the piece that has the next one."""
        return self._seen.get((prefix_of(below, depth), below[1][depth] // INDEX_PIECE))


def _counts_below(uids: Collection[UID]) -> Mapping[Prefix, int]:
    return Counter(prefix_of(uid, depth) for uid in uids for depth in range(len(uid.coordinate)))
