"""How two replicas of an expert become one state again. Pure functions, and a bounded memory of meetings.

Two replicas that meet average, each by itself, with weights by the updates that each took since they last met; nobody
waits for a third (NoLoCo, arXiv 2506.10911).
"""

from collections import OrderedDict

import torch
from hivemind.p2p import PeerID
from torch import Tensor

from dht.uid import UID
from expert_server.expert import State

_PEERS_REMEMBERED = 32
"""Of each expert: more replicas than that meet too seldom to remember."""


class Meetings:
    """The update count that two replicas had when they last met: this node's, and that of another peer."""

    def __init__(self) -> None:
        self._met: dict[UID, OrderedDict[PeerID, int]] = {}

    def note(self, uid: UID, peer_id: PeerID, update_count: int) -> None:
        peers = self._met.setdefault(uid, OrderedDict())
        peers[peer_id] = update_count
        peers.move_to_end(peer_id)
        if len(peers) > _PEERS_REMEMBERED:
            peers.popitem(last=False)

    def of(self, uid: UID) -> dict[PeerID, int]:
        """A copy, by peer."""
        return dict(self._met.get(uid, {}))

    def forget(self, uid: UID) -> None:
        self._met.pop(uid, None)


def their_share(update_count: int, their_update_count: int, met_update_count: int) -> float:
    """What part of the average the other replica is: as many of the updates since the meeting as are its own.

    Both sides come to shares that add up to 1. A half when neither took an update.
    """
    met = min(met_update_count, update_count, their_update_count)
    mine, theirs = update_count - met, their_update_count - met
    return theirs / (mine + theirs) if mine + theirs else 0.5


def averaged(current: State, base: State, theirs: State, share: float) -> State:
    """The state `current` after `base`, from which it came, was averaged with `theirs`.

    So updates that were taken since `base` are kept. A moment that one side lacks counts as zeros there.
    """
    names = current.keys() | theirs.keys()
    return {
        name: _averaged(name, current.get(name), base.get(name), theirs.get(name), share)
        for name in sorted(names)
    }


def _averaged(
    name: str, current: Tensor | None, base: Tensor | None, theirs: Tensor | None, share: float
) -> Tensor:
    like = current if current is not None else theirs
    assert like is not None, "one of the two states has it"
    now, then, other = (torch.zeros_like(like) if t is None else t for t in (current, base, theirs))
    if not like.is_floating_point():
        return torch.maximum(now, other)
    if name.endswith(".step"):  # of the optimizer: a count, for the correction of its bias
        return now + (torch.maximum(then, other) - then)
    # twice as precise, so that equal states stay equal
    result = now.double() + share * (other.double() - then.double())
    if name.endswith(".exp_avg_sq"):
        result.clamp_(min=0)
    return result.to(like.dtype)
