"""How long calls to nodes took: the last ones for quantiles, all of them for a histogram, and a mean of each node."""

import math
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from hivemind.p2p import PeerID

BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds of the histogram, beside infinity."""
_RECENT = 512
"""Calls of each direction that quantiles are taken from."""
_NODES = 64
"""Nodes whose mean is kept, those that answered last."""
_WEIGHT = 0.1
"""Of a new call in its node's mean."""


@dataclass(frozen=True)
class Quantiles:
    """In seconds."""

    p50_s: float
    p99_s: float


class Durations:
    """Of one direction."""

    def __init__(self) -> None:
        self.total_s = 0.0
        self.count = 0
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._buckets = [0] * (len(BUCKETS_S) + 1)

    def note(self, seconds: float) -> None:
        self.total_s += seconds
        self.count += 1
        self._recent.append(seconds)
        self._buckets[sum(seconds > bound for bound in BUCKETS_S)] += 1

    def quantiles(self) -> Quantiles | None:
        """Of the last calls; None before the first."""
        ordered = sorted(self._recent)
        return Quantiles(_nearest(ordered, 0.5), _nearest(ordered, 0.99)) if ordered else None

    def buckets(self) -> list[tuple[str, int]]:
        """As Prometheus has them: upper bound → calls that took no longer."""
        bounds = [*map(str, BUCKETS_S), "+Inf"]
        return [(bound, sum(self._buckets[: i + 1])) for i, bound in enumerate(bounds)]


class Latencies:
    """Of one trainer's calls that went well. Bounded, however many calls and nodes there are."""

    def __init__(self) -> None:
        self.forward = Durations()
        self.backward = Durations()
        self._nodes: OrderedDict[PeerID, float] = OrderedDict()

    def note(self, direction: str, peer_id: PeerID, seconds: float) -> None:
        """One call that a node answered in full."""
        (self.forward if direction == "forward" else self.backward).note(seconds)
        mean = self._nodes.pop(peer_id, seconds)
        self._nodes[peer_id] = mean + _WEIGHT * (seconds - mean)
        if len(self._nodes) > _NODES:
            self._nodes.popitem(last=False)

    def nodes(self) -> dict[PeerID, float]:
        """Mean seconds of a call to each node."""
        return dict(self._nodes)


def _nearest(ordered: Sequence[float], share: float) -> float:
    """The nearest-rank quantile: at least `share` of all are no larger."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
