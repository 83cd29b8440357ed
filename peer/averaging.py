"""Pairwise averaging of two copies that train separately: the weights, and a history of who met whom. Pure.

Each side averages by itself. The weights follow from the steps that each took since the two last met, and nobody waits
for a third (NoLoCo, arXiv 2506.10911). Another peer only claims how many steps it took, so claims count within bounds.
"""

import random
import time
from collections.abc import Callable, Collection, Hashable
from statistics import median_high
from typing import Generic, TypeVar

from torch import Tensor

from peer.bounded import BoundedDict
from peer.identity import PeerID

MAX_UPDATE_COUNT = 10**15
"""An expert stops counting its steps here, and no peer may claim more."""

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

_PEERS_REMEMBERED = 32
"""For each copy. With more partners, each meets too seldom to be worth remembering."""
_LARGEST_SHARE = 0.5
_FASTEST_PER_S = 100
"""Steps. No expert or dense part takes as many."""
_LEAST_S = 10.0
"""Others may have trained for at least this long, even if the last meeting was a moment ago."""
_ANNOUNCED_S = 300.0
"""The longest that an announcement lags behind the copy it announces."""


class AveragingHistory(Generic[K]):
    """The update count that this peer's copy and another peer's copy had when they last met."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._met: dict[K, BoundedDict[PeerID, int]] = {}
        self._clock = clock
        self._began_at = clock()
        self._noted_at: dict[K, float] = {}

    def record(self, thing: K, peer_id: PeerID, update_count: int) -> None:
        self._noted_at[thing] = self._clock()
        self._met.setdefault(thing, BoundedDict(_PEERS_REMEMBERED))[peer_id] = update_count

    def of(self, thing: K) -> dict[PeerID, int]:
        """A copy, by peer."""
        return dict(self._met.get(thing, {}))

    def forget(self, thing: K) -> None:
        self._met.pop(thing, None)
        self._noted_at.pop(thing, None)

    def capped_claim(self, thing: K, update_count: int, claimed: int) -> int:
        """Another peer's claim, capped at what it could have reached since this peer last met anyone.

        `update_count` is this peer's own.
        """
        since_s = max(self._clock() - self._noted_at.get(thing, self._began_at), _LEAST_S)
        return min(claimed, update_count + int(_FASTEST_PER_S * since_s))


def partner_weight(update_count: int, their_update_count: int, met_update_count: int) -> float:
    """The other's weight in the average: its share of the updates since the meeting, and at most a half, whatever it
    claims. A half if neither took an update.
    """
    met = min(met_update_count, update_count, their_update_count)
    mine, theirs = update_count - met, their_update_count - met
    return min(theirs / (mine + theirs), _LARGEST_SHARE) if mine + theirs else 0.5


def freshest_first(claims: Collection[T], count: Callable[[T], int], rng: random.Random) -> list[T]:
    """Sorted by claimed update count. Claims above the median count as the median, and ties are shuffled.

    So if there are three or more, the highest claim does not always come first.
    """
    if not claims:
        return []
    median = median_high(map(count, claims))
    drawn_order = rng.sample(list(claims), len(claims))
    return sorted(drawn_order, key=lambda claim: min(count(claim), median), reverse=True)


def max_plausible_updates(counts: Collection[int]) -> int:
    """The largest update count that a copy may have if others announced `counts`; 0 if nobody did."""
    return median_high(counts) + int(_FASTEST_PER_S * _ANNOUNCED_S) if counts else 0


def interpolate(current: Tensor, base: Tensor, theirs: Tensor, share: float) -> Tensor:
    """Averages `base` with `theirs`, and adds what changed between `base` and `current`.

    In float64, so that equal copies stay equal.
    """
    return current.double() + share * (theirs.double() - base.double())
