"""How two that train the same become one state again, whenever they meet: the weights, and who met whom. Pure.

Each side averages by itself, with weights by the steps that each took since they last met; nobody waits for a third
(NoLoCo, arXiv 2506.10911). How many steps another took is its own word, so it counts within bounds only.
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
"""An expert that has taken so many steps counts no further, and nobody may say that it has."""

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

_PEERS_REMEMBERED = 32
"""Of each thing: more partners than that meet too seldom to remember."""
_LARGEST_SHARE = 0.5
_FASTEST_PER_S = 100
"""Steps: more than an expert or a dense part takes."""
_LEAST_S = 10.0
"""So long others may have trained, however short ago the last meeting was."""
_ANNOUNCED_S = 300.0
"""Longest that an announcement is behind what it announces."""


class AveragingHistory(Generic[K]):
    """The update count that two states of one thing had when they last met: this peer's, and that of another."""

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
        """What another's claim counts as: no more than anybody could have taken beyond `update_count`, which is this
        peer's, since this peer last met any other.
        """
        since_s = max(self._clock() - self._noted_at.get(thing, self._began_at), _LEAST_S)
        return min(claimed, update_count + int(_FASTEST_PER_S * since_s))


def partner_weight(update_count: int, their_update_count: int, met_update_count: int) -> float:
    """What part of the average the other is: as many of the updates since the meeting as are its own, but
    never more than a half, whatever it says. A half when neither took an update.
    """
    met = min(met_update_count, update_count, their_update_count)
    mine, theirs = update_count - met, their_update_count - met
    return min(theirs / (mine + theirs), _LARGEST_SHARE) if mine + theirs else 0.5


def freshest_first(claims: Collection[T], count: Callable[[T], int], rng: random.Random) -> list[T]:
    """By the update counts that they claim; those above the median count as much as it, and their order is drawn.

    So of three or more none comes first for claiming most.
    """
    if not claims:
        return []
    median = median_high(map(count, claims))
    drawn_order = rng.sample(list(claims), len(claims))
    return sorted(drawn_order, key=lambda claim: min(count(claim), median), reverse=True)


def max_plausible_updates(counts: Collection[int]) -> int:
    """The largest update count that a state may bring when others announced `counts`; 0 when nobody did."""
    return median_high(counts) + int(_FASTEST_PER_S * _ANNOUNCED_S) if counts else 0


def interpolate(current: Tensor, base: Tensor, theirs: Tensor, share: float) -> Tensor:
    """`current` after `base`, from which it came, was averaged with `theirs`: what changed since `base` is kept.

    In float64, so that equal states stay equal.
    """
    return current.double() + share * (theirs.double() - base.double())
