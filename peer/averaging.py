"""Pairwise averaging of two copies that train separately: the weights, and a history of the meetings. Pure.

Each side computes its own average. The weights follow from the steps that each side took since the two last met, and
nobody waits for a third peer (NoLoCo, arXiv 2506.10911). Nothing proves how many steps another peer took, so there are
limits to what its claim can do.
"""

import random
import time
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass
from statistics import median_high
from typing import Generic, TypeVar

from peer.bounded import BoundedDict
from peer.identity import PeerID

MAX_UPDATE_COUNT = 10**15
"""An expert stops counting its steps here, and no peer may claim more."""

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

_PEERS_REMEMBERED = 32
"""Partners remembered for each copy. If there are more, each of them is met too rarely to be worth remembering."""
_LARGEST_SHARE = 0.5
_BEHIND = 0.9
"""A copy with less than this share of another's updates has been restarted: copies that average differ by less."""
_FASTEST_PER_S = 100
"""No expert or dense part takes this many steps per second."""
_LEAST_S = 10.0
"""Even if the last meeting was a moment ago, a claim may cover this many seconds of training."""
_ANNOUNCED_S = 300.0
"""An announcement is at most this much older than the copy that it announces."""


@dataclass(frozen=True)
class Meeting:
    """The update counts of two copies right after they met."""

    mine: int
    theirs: int


def last_meeting(remembered: Meeting | None, reported: int) -> Meeting:
    """The last meeting, from what this peer remembers of it and what the other peer reports.

    `reported`: the update count that the other reports for its copy after their last meeting; 0 if it remembers none.
    It may be higher than the count that this peer saw when it fetched the copy.
    """
    if remembered is None:
        return Meeting(reported, reported)
    return Meeting(remembered.mine, max(remembered.theirs, reported))


class AveragingHistory(Generic[K]):
    """For each copy of this peer, its last meeting with each other peer's copy."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._met: dict[K, BoundedDict[PeerID, Meeting]] = {}
        self._clock = clock
        self._began_at = clock()
        self._noted_at: dict[K, float] = {}

    def record(self, thing: K, peer_id: PeerID, mine: int, theirs: int) -> None:
        """The update counts are those after the meeting, as far as this peer knows them."""
        self._noted_at[thing] = self._clock()
        self._met.setdefault(thing, BoundedDict(_PEERS_REMEMBERED))[peer_id] = Meeting(mine, theirs)

    def of(self, thing: K) -> dict[PeerID, Meeting]:
        """The last meetings of a copy, by peer."""
        return dict(self._met.get(thing, {}))

    def forget(self, thing: K) -> None:
        self._met.pop(thing, None)
        self._noted_at.pop(thing, None)

    def capped_claim(self, thing: K, update_count: int, claimed: int) -> int:
        """Another peer's claim, capped at what it could have reached since this peer last averaged with anybody.
        `update_count` is this peer's own.
        """
        since_s = max(self._clock() - self._noted_at.get(thing, self._began_at), _LEAST_S)
        return min(claimed, update_count + int(_FASTEST_PER_S * since_s))


def partner_weight(update_count: int, their_update_count: int, met: Meeting) -> float:
    """The other's weight in the average: its share of the updates since the meeting, but at most a half, whatever it
    claims.

    It is a half if neither took an update. A copy that went back to an older state counts as if it had taken none.
    """
    mine, theirs = max(0, update_count - met.mine), max(0, their_update_count - met.theirs)
    return min(theirs / (mine + theirs), _LARGEST_SHARE) if mine + theirs else 0.5


def is_behind(update_count: int, other: int) -> bool:
    """Whether a copy has far fewer updates than another."""
    return update_count < _BEHIND * other


def drawn_stale_last(claims: Collection[T], count: Callable[[T], int], rng: random.Random) -> list[T]:
    """The copies in random order, except that those far behind the median update count come last."""
    if not claims:
        return []
    median = median_high(map(count, claims))
    drawn_order = rng.sample(list(claims), len(claims))
    return sorted(drawn_order, key=lambda claim: is_behind(count(claim), median))


def max_plausible_updates(counts: Collection[int]) -> int:
    """The largest update count that a copy may have if others announced `counts`; 0 if nobody did."""
    return median_high(counts) + int(_FASTEST_PER_S * _ANNOUNCED_S) if counts else 0
