"""Which experts need a host most, and who of several volunteers takes one. Pure functions."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType

from hivemind.p2p import PeerID

from dht.registry import Replica, ReplicaState
from dht.uid import UID

_NO_CHECKPOINTS: Mapping[UID, int] = MappingProxyType({})


def preference(uid: UID, peer_id: PeerID) -> bytes:
    """How much a peer prefers an expert, larger is more (rendezvous hashing).

    Peers that choose at the same time mostly choose differently, and all agree who wins a contested expert.
    """
    return hashlib.sha256(f"{uid}@{peer_id.to_base58()}".encode()).digest()


def vacant(replicas: Mapping[UID, Collection[Replica]], besides: PeerID | None = None) -> list[UID]:
    """The experts that nobody hosts or has claimed, or nobody `besides` this peer."""
    return [uid for uid, hosts in replicas.items() if all(replica.peer_id == besides for replica in hosts)]


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


def lost_claims(
    claims: Collection[UID],
    replicas: Mapping[UID, Sequence[Replica]],
    peer_id: PeerID,
    checkpoints: Mapping[UID, int] = _NO_CHECKPOINTS,
) -> list[UID]:
    """Those of this peer's claims that it must give up.

    Another serves the expert already, or claims it with a checkpoint of more updates, or prefers it more.
    """
    return [
        uid
        for uid in claims
        if any(
            _outranks(replica, checkpoints.get(uid, 0), peer_id)
            for replica in replicas.get(uid, ())
            if replica.peer_id != peer_id
        )
    ]


def _outranks(other: Replica, update_count: int, peer_id: PeerID) -> bool:
    theirs = other.update_count, preference(other.uid, other.peer_id)
    return other.state is ReplicaState.SERVING or theirs > (update_count, preference(other.uid, peer_id))
