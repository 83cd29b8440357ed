"""Which experts need a host or a replica most, and who of several volunteers takes one. Pure functions."""

import hashlib
import random
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from itertools import chain
from statistics import median_low
from types import MappingProxyType

from hivemind.p2p import PeerID

from dht.registry import Replica, ReplicaState
from dht.uid import UID
from peer.averaging import freshest_first, most_believed
from peer.rpc.transfer import MAX_UPDATE_COUNT

_BEHIND = 0.9
"""Replicas that average differ less in their updates: with fewer than this part one began anew."""

_OUTLIER = 10
"""So many times the updates of a middling node's experts the most popular one may have taken."""

_NO_CHECKPOINTS: Mapping[UID, int] = MappingProxyType({})


def preference(uid: UID, peer_id: PeerID) -> bytes:
    """How much a peer prefers an expert, larger is more (rendezvous hashing).

    Peers that choose at the same time mostly choose differently, and all agree who wins a contested expert.
    """
    return hashlib.sha256(f"{uid}@{peer_id.to_base58()}".encode()).digest()


def vacant(replicas: Mapping[UID, Collection[Replica]], besides: PeerID | None = None) -> list[UID]:
    """The experts that nobody hosts or has claimed, or nobody `besides` this peer."""
    return [uid for uid, hosts in replicas.items() if all(replica.peer_id == besides for replica in hosts)]


def behind(
    replicas: Mapping[UID, Collection[Replica]], checkpoints: Mapping[UID, int], peer_id: PeerID
) -> dict[UID, int]:
    """The experts that others serve, all of them with far fewer updates than this peer's checkpoint has, and how many
    updates it would bring back: their hosts died, and others began anew.

    Where somebody claims one, it may be about to come back already.
    """
    found = {}
    for uid, saved in checkpoints.items():
        others = [replica for replica in replicas.get(uid, ()) if replica.peer_id != peer_id]
        if others and all(
            r.state is not ReplicaState.CLAIMED and _is_behind(r.update_count, saved) for r in others
        ):
            found[uid] = saved - max(replica.update_count for replica in others)
    return found


def _is_behind(update_count: int, saved: int) -> bool:
    return update_count < _BEHIND * saved


def choose(
    vacancies: Collection[UID],
    room: int,
    peer_id: PeerID,
    checkpoints: Mapping[UID, int] = _NO_CHECKPOINTS,
) -> list[UID]:
    """At most `room` of the vacancies: those with the most updates in this peer's checkpoints, then by preference."""

    def rank(uid: UID) -> tuple[int, bytes]:
        return checkpoints.get(uid, 0), preference(uid, peer_id)

    return sorted(vacancies, key=rank, reverse=True)[: max(room, 0)]


def thin(
    replicas: Mapping[UID, Collection[Replica]],
    room: int,
    peer_id: PeerID,
    enough: int,
) -> list[UID]:
    """At most `room` of the experts with fewer than `enough` replicas, those with the fewest first.

    Left out are those that this peer hosts, and those that nobody could give it. A replica whose peer leaves is one
    to fetch from, but does not count.
    """

    def rank(uid: UID) -> tuple[int, bytes]:
        return -staying(replicas[uid]), preference(uid, peer_id)

    wanting = [
        uid
        for uid, hosts in replicas.items()
        if staying(hosts) < enough
        and peer_id not in {replica.peer_id for replica in hosts}
        and any(replica.state is not ReplicaState.CLAIMED for replica in hosts)
    ]
    return sorted(wanting, key=rank, reverse=True)[: max(room, 0)]


def lone(replicas: Mapping[UID, Collection[Replica]], peer_id: PeerID) -> dict[UID, Replica]:
    """The experts that one other peer hosts alone and of which this peer should keep a copy, with that replica.

    Of all peers that host anything, the one that prefers the expert most keeps it, besides its host.
    """
    hosts = {r.peer_id for found in replicas.values() for r in found if r.state is ReplicaState.SERVING}
    hosts.add(peer_id)
    wanted = {}
    for uid, found in replicas.items():
        serving = [replica for replica in found if replica.state is not ReplicaState.CLAIMED]
        if len(serving) == 1 and serving[0].peer_id != peer_id:
            (only,) = serving
            if peer_id == max(hosts - {only.peer_id}, key=partial(preference, uid)):
                wanted[uid] = only
    return wanted


def surplus(
    replicas: Mapping[UID, Collection[Replica]], mine: Collection[UID], peer_id: PeerID, count: int
) -> list[UID]:
    """At most `count` of the experts that this peer hosts and can give up: those with the most replicas first.

    Of an expert's hosts the one that prefers it most keeps it, so that not all give it up at the same time.
    """

    def others(uid: UID) -> list[Replica]:
        hosts = replicas.get(uid, ())
        return [r for r in hosts if r.state is ReplicaState.SERVING and r.peer_id != peer_id]

    able = [
        uid
        for uid in mine
        if any(preference(uid, other.peer_id) > preference(uid, peer_id) for other in others(uid))
    ]
    return sorted(able, key=lambda uid: (-len(others(uid)), preference(uid, peer_id)))[: max(count, 0)]


def staying(hosts: Collection[Replica]) -> int:
    """Of these replicas, those whose peers do not leave."""
    return sum(replica.state is not ReplicaState.LEAVING for replica in hosts)


def sources(hosts: Collection[Replica], besides: PeerID, rng: random.Random) -> list[Replica]:
    """The replicas of others whose state can be fetched, the freshest first, whatever a single one claims."""
    able = [r for r in hosts if r.state is not ReplicaState.CLAIMED and r.peer_id != besides]
    return freshest_first(able, lambda replica: replica.update_count, rng)


def plausible_updates(replicas: Mapping[UID, Collection[Replica]]) -> int:
    """The most updates that an expert can have taken, by what all nodes announce. Half of them can't raise it."""
    most: dict[PeerID, int] = {}
    for replica in chain.from_iterable(replicas.values()):
        if replica.state is not ReplicaState.CLAIMED:
            most[replica.peer_id] = max(replica.update_count, most.get(replica.peer_id, 0))
    return most_believed([_OUTLIER * median_low(most.values())]) if most else MAX_UPDATE_COUNT


def heirs(uids: Collection[UID], rooms: Mapping[PeerID, int]) -> dict[UID, PeerID]:
    """Who shall adopt which expert: always the peer with most room left, of several the one that prefers it most.

    Experts for which no peer has room are left out.
    """
    left = dict(rooms)
    found = {}
    for uid in uids:
        heir = max(left, key=lambda p: (left[p], preference(uid, p)), default=None)  # called at once
        if heir is None or left[heir] <= 0:
            break
        left[heir] -= 1
        found[uid] = heir
    return found


def lost_claims(
    claims: Collection[UID],
    replicas: Mapping[UID, Sequence[Replica]],
    peer_id: PeerID,
    checkpoints: Mapping[UID, int] = _NO_CHECKPOINTS,
    enough: int = 1,
) -> list[UID]:
    """Those of this peer's claims that it must give up.

    `enough` others serve the expert already, not far behind this peer's checkpoint, or claim it with a checkpoint of
    more updates, or prefer it more.
    """
    return [
        uid
        for uid in claims
        if sum(
            _outranks(replica, checkpoints.get(uid, 0), peer_id)
            for replica in replicas.get(uid, ())
            if replica.peer_id != peer_id
        )
        >= enough
    ]


def _outranks(other: Replica, update_count: int, peer_id: PeerID) -> bool:
    if other.state is not ReplicaState.CLAIMED:
        return other.state is ReplicaState.SERVING and not _is_behind(other.update_count, update_count)
    theirs = other.update_count, preference(other.uid, other.peer_id)
    return theirs > (update_count, preference(other.uid, peer_id))
