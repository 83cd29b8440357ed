"""How long calls to nodes took: the last ones for quantiles, all of them for a histogram, and a mean of each node."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from hivemind.p2p import PeerID

from peer.distribution import SECONDS, Distribution

_RECENT = 512
"""Calls of each direction that quantiles are taken from."""
_NODES = 4096
"""Nodes whose mean is kept, those that answered last."""
_WEIGHT = 0.25
"""Of a new call in its node's mean."""


@dataclass(frozen=True)
class Quantiles:
    """In seconds."""

    p50_s: float
    p99_s: float


class Durations:
    """Of one direction."""

    def __init__(self) -> None:
        self.all = Distribution(SECONDS)
        self._recent: deque[float] = deque(maxlen=_RECENT)

    def note(self, seconds: float) -> None:
        self.all.note(seconds)
        self._recent.append(seconds)

    def quantiles(self) -> Quantiles | None:
        """Of the last calls; None before the first."""
        ordered = sorted(self._recent)
        return Quantiles(_nearest(ordered, 0.5), _nearest(ordered, 0.99)) if ordered else None


class Latencies:
    """Of one trainer's calls that went well. Bounded, however many calls and nodes there are."""

    def __init__(self) -> None:
        self.forward = Durations()
        self.backward = Durations()
        self.nodes: dict[PeerID, float] = {}
        """Seconds until each node's first answer to a call, a moving mean; the node that answered last at the end."""

    def note(self, direction: str, seconds: float) -> None:
        """One call that a node answered in full."""
        (self.forward if direction == "forward" else self.backward).note(seconds)

    def note_node(self, peer_id: PeerID, seconds: float) -> None:
        """A node's first answer to a call."""
        mean = self.nodes.pop(peer_id, seconds)
        self.nodes[peer_id] = mean + _WEIGHT * (seconds - mean)
        if len(self.nodes) > _NODES:
            del self.nodes[next(iter(self.nodes))]


def _nearest(ordered: Sequence[float], share: float) -> float:
    """The nearest-rank quantile: at least `share` of all are no larger."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
