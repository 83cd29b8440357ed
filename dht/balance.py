"""When a full node exchanges a replica that others host often enough for one that is needed more. Pure functions."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from hivemind.p2p import PeerID

from dht.registry import Replica, ReplicaState
from dht.uid import UID
from expert_server.hosting.placement import preference, staying

BUSY_ROWS = 512
"""An expert is overloaded when at least so many rows wait at each of its hosts,"""
BUSIER = 4
"""and so many times as many as at the hosts of the expert that is given for it."""


@dataclass(frozen=True)
class Exchange:
    """What a node gives up, and what it hosts in its place."""

    gives: UID
    takes: UID


def exchange(
    replicas: Mapping[UID, Collection[Replica]], mine: Collection[UID], peer_id: PeerID, enough: int
) -> Exchange | None:
    """The exchange that helps most, by what all peers see; None when none pays.

    Only an expert with more than `enough` serving replicas is given up, and never by the `enough` hosts that prefer it
    most: so whoever else exchanges at the same moment, those keep it. It goes for an expert with fewer than `enough`
    replicas, or else for one whose hosts are all overloaded while those of this one are not. Only what some host can
    give is taken.
    """
    given = [uid for uid in mine if _can_go(replicas.get(uid, ()), uid, peer_id, enough)]
    if not given:
        return None
    gives = min(
        given, key=lambda uid: (_queue(replicas[uid]), -staying(replicas[uid]), preference(uid, peer_id))
    )
    others = [uid for uid, hosts in replicas.items() if uid not in mine and _serving(hosts)]
    thin = [uid for uid in others if staying(replicas[uid]) < enough]
    if thin:
        takes = min(thin, key=lambda uid: (staying(replicas[uid]), preference(uid, peer_id)))
        return Exchange(gives, takes)
    least = max(BUSY_ROWS, BUSIER * _queue(replicas[gives]))
    busy = [uid for uid in others if _queue(replicas[uid]) >= least]
    if not busy:
        return None
    return Exchange(gives, max(busy, key=lambda uid: (_queue(replicas[uid]), preference(uid, peer_id))))


class Resolve:
    """Lets an exchange happen only when it has been wished for long enough, and the last one is long ago."""

    def __init__(self, looks: int, pause_s: float) -> None:
        """`looks` in a row must wish to give up the same expert: longer than announcements live, so that a host
        which died is not counted on. `pause_s` lies between two exchanges at least; 0: there is none.
        """
        self._looks = looks
        self._pause_s = pause_s
        self._gives: UID | None = None
        self._seen = 0
        self._last: float | None = None

    def is_firm(self, wish: Exchange | None, now: float) -> bool:
        """Notes what one look wished for. Whether it may be done now."""
        gives = wish.gives if wish is not None else None
        self._seen = self._seen + 1 if gives == self._gives else 1
        self._gives = gives
        if gives is None or self._seen < self._looks or not self._pause_s:
            return False
        return self._last is None or now >= self._last + self._pause_s

    def done(self, now: float) -> None:
        """An exchange was made or tried."""
        self._last, self._seen = now, 0


def _can_go(hosts: Collection[Replica], uid: UID, peer_id: PeerID, enough: int) -> bool:
    own = preference(uid, peer_id)
    before = [replica for replica in _serving(hosts) if preference(uid, replica.peer_id) > own]
    return len(before) >= max(1, enough)


def _serving(hosts: Collection[Replica]) -> list[Replica]:
    return [replica for replica in hosts if replica.state is ReplicaState.SERVING]


def _queue(hosts: Collection[Replica]) -> int:
    """Rows that wait at the least loaded host."""
    return min((replica.queued_rows for replica in _serving(hosts)), default=0)
