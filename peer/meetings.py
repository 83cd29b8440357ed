"""How two that train the same become one state again, whenever they meet: the weights, and who met whom. Pure.

Each side averages by itself, with weights by the steps that each took since they last met; nobody waits for a third
(NoLoCo, arXiv 2506.10911).
"""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

from hivemind.p2p import PeerID
from torch import Tensor

K = TypeVar("K", bound=Hashable)

_PEERS_REMEMBERED = 32
"""Of each thing: more partners than that meet too seldom to remember."""


class Meetings(Generic[K]):
    """The update count that two states of one thing had when they last met: this peer's, and that of another."""

    def __init__(self) -> None:
        self._met: dict[K, OrderedDict[PeerID, int]] = {}

    def note(self, thing: K, peer_id: PeerID, update_count: int) -> None:
        peers = self._met.setdefault(thing, OrderedDict())
        peers[peer_id] = update_count
        peers.move_to_end(peer_id)
        if len(peers) > _PEERS_REMEMBERED:
            peers.popitem(last=False)

    def of(self, thing: K) -> dict[PeerID, int]:
        """A copy, by peer."""
        return dict(self._met.get(thing, {}))

    def forget(self, thing: K) -> None:
        self._met.pop(thing, None)


def their_share(update_count: int, their_update_count: int, met_update_count: int) -> float:
    """What part of the average the other is: as many of the updates since the meeting as are its own.

    Both sides come to shares that add up to 1. A half when neither took an update.
    """
    met = min(met_update_count, update_count, their_update_count)
    mine, theirs = update_count - met, their_update_count - met
    return theirs / (mine + theirs) if mine + theirs else 0.5


def drawn(current: Tensor, base: Tensor, theirs: Tensor, share: float) -> Tensor:
    """`current` after `base`, from which it came, was averaged with `theirs`: what changed since `base` is kept.

    In float64, so that equal states stay equal.
    """
    return current.double() + share * (theirs.double() - base.double())
