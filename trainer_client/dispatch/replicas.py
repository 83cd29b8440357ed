"""Which replica of each expert a trainer calls. A row travels once to each node, so fewer nodes mean less traffic."""

import random
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from math import ceil
from statistics import median_low
from types import MappingProxyType

from dht.announcements import Replica
from dht.directory import NOBODY, View
from dht.uid import UID
from peer.identity import PeerID

_MOST_CARRIED = 1.5
"""A peer gets experts up to this many times the mean of the peers that host any."""
_MOST_PREFERRED = 2.0
"""If other replicas are slower or busier, a peer gets experts up to this many times the mean. This also limits a
stranger that announces every expert and answers at once.
"""
_SLOWER = 2.0
"""A peer is skipped if it takes this many times as long as the fastest peer of its expert, and also as the median of
all recently called peers.
"""
_QUICK, _AS_QUICK, _TRIED = 3, 1.25, 1 / 16
"""Once three replicas of an expert are known that take at most 1.25 times as long as the fastest one, or as usual, only
such ones are called. Replicas that were not called recently then get only a sixteenth of its calls.
"""
_MANY, _COMPARED_OF_MANY = 16, 8
"""If an expert has more than 16 replicas, only 8 random ones are compared, and those that were called recently. If none
of them can be called, all replicas are compared.
"""
_BUSIER_ROWS = 1024
"""A peer is skipped if it has this many more rows queued than the least busy one."""
NOT_ASKED: Mapping[UID, Collection[PeerID]] = MappingProxyType({})


def choose_replicas(
    uids: Iterable[UID],
    view: View,
    rng: random.Random,
    avoided: frozenset[PeerID] = NOBODY,
    times_s: Mapping[PeerID, float] = MappingProxyType({}),
    asked: Mapping[UID, Collection[PeerID]] = NOT_ASKED,
    failed: Mapping[UID, Collection[PeerID]] = NOT_ASKED,
) -> dict[UID, PeerID]:
    """One replica of each expert that has a live one. `times_s`: how long recent calls to these peers took. `asked`:
    for each expert, peers that are not asked again. `failed`: for each expert, peers that are only asked if it has no
    others.

    Of an expert with many replicas, only some random ones are considered, so that the work does not grow with the
    swarm.

    An expert with one replica goes there. Each other expert goes to the first of its hosts in an order of all peers,
    which is drawn anew each time. A peer that is much slower or busier than another replica is skipped, and so is one
    that has 1.5 times its even share. If only slower or busier peers have less, the others get up to twice their share
    before those are asked.

    With one order for all experts, rows go to few peers. Each replica still gets its part of the calls: one that is
    seldom trained falls behind the others, until they are too far apart to be averaged.
    """
    hosts = {
        uid: _hosts(view, uid, avoided.union(asked.get(uid, ())), failed.get(uid, ()), rng, times_s)
        for uid in uids
    }
    usual_s = median_low(times_s.values()) if times_s else 0.0
    peers = list(dict.fromkeys(replica.peer_id for some in hosts.values() for replica in some))
    place = {peer_id: number for number, peer_id in enumerate(rng.sample(peers, len(peers)))}
    share = len(hosts) / max(1, len(peers))
    most, most_preferred = ceil(_MOST_CARRIED * share), ceil(_MOST_PREFERRED * share)
    carried: Counter[PeerID] = Counter()
    chosen: dict[UID, PeerID] = {}
    several = []
    for uid, some in hosts.items():
        if len(some) == 1:
            chosen[uid] = some[0].peer_id
            carried[some[0].peer_id] += 1
        elif some:
            several.append(uid)
    # a peer that already carries so many experts alone gets one more: its other replicas must be trained, too
    limits = {peer_id: max(most, alone + 1) for peer_id, alone in carried.items()}
    rng.shuffle(several)
    for uid in several:
        fit = _fit(hosts[uid], times_s, usual_s, rng)
        free = (
            [replica for replica in fit if carried[replica.peer_id] < limits.get(replica.peer_id, most)]
            or [replica for replica in fit if carried[replica.peer_id] < most_preferred]
            or [replica for replica in hosts[uid] if carried[replica.peer_id] < most]
            or fit
        )
        best = min(free, key=lambda replica: place[replica.peer_id])
        chosen[uid] = best.peer_id
        carried[best.peer_id] += 1
    return {uid: chosen[uid] for uid in hosts if uid in chosen}


def has_quicker_host(
    uid: UID, peer_id: PeerID, view: View, avoided: frozenset[PeerID], times_s: Mapping[PeerID, float]
) -> bool:
    """Whether the expert has another host, so much quicker that `choose_replicas` skips this peer."""
    known = [times_s[host.peer_id] for host in view.hosts(uid, avoided) if host.peer_id in times_s]
    if peer_id not in times_s or not known:
        return False
    return times_s[peer_id] > _SLOWER * max(min(known), median_low(times_s.values()))


def _hosts(
    view: View,
    uid: UID,
    avoided: frozenset[PeerID],
    failed: Collection[PeerID],
    rng: random.Random,
    times_s: Mapping[PeerID, float],
) -> list[Replica]:
    """The replicas to compare. `failed`: peers that are only asked if there are no others."""
    replicas = view.replicas.get(uid, ())
    for outside in (avoided.union(failed), avoided) if failed else (avoided,):
        if len(replicas) > _MANY:
            compared = [*view.at(uid, times_s), *rng.sample(replicas, _COMPARED_OF_MANY)]
            if some := view.able({replica.peer_id: replica for replica in compared}.values(), outside):
                return some
        if some := view.hosts(uid, outside):
            return some
    return []


def _fit(
    hosts: list[Replica], times_s: Mapping[PeerID, float], usual_s: float, rng: random.Random
) -> list[Replica]:
    """The peers that are neither much slower nor much busier than another. `usual_s`: the usual duration of recent
    calls.
    """
    known = [replica for replica in hosts if replica.peer_id in times_s]
    others = [replica for replica in hosts if replica.peer_id not in times_s]
    least_s = max(usual_s, min((times_s[replica.peer_id] for replica in known), default=0.0))
    quick = [replica for replica in known if times_s[replica.peer_id] <= _AS_QUICK * least_s]
    if len(quick) < _QUICK:
        quick = [*others, *(replica for replica in known if times_s[replica.peer_id] <= _SLOWER * least_s)]
    elif others and rng.random() < _TRIED:
        quick = others
    least = min(replica.queued_rows for replica in quick)
    return [replica for replica in quick if replica.queued_rows <= least + _BUSIER_ROWS]
