"""Which experts need a host most, and who of several volunteers takes one. Pure functions."""

import hashlib
from collections.abc import Collection, Mapping, Sequence

from hivemind.p2p import PeerID

from dht.registry import Replica, ReplicaState
from dht.uid import UID


def preference(uid: UID, peer_id: PeerID) -> bytes:
    """How much a peer prefers an expert, larger is more (rendezvous hashing).

    Peers that choose at the same time mostly choose differently, and all agree who wins a contested expert.
    """
    return hashlib.sha256(f"{uid}@{peer_id.to_base58()}".encode()).digest()


def vacant(replicas: Mapping[UID, Collection[Replica]]) -> list[UID]:
    """The experts that nobody hosts or has claimed."""
    return [uid for uid, hosts in replicas.items() if not hosts]


def choose(vacancies: Collection[UID], room: int, peer_id: PeerID) -> list[UID]:
    """At most `room` of the vacancies, those that this peer prefers most."""
    return sorted(vacancies, key=lambda uid: preference(uid, peer_id), reverse=True)[: max(room, 0)]


def lost_claims(
    claims: Collection[UID], replicas: Mapping[UID, Sequence[Replica]], peer_id: PeerID
) -> list[UID]:
    """Those of this peer's claims that it must give up: another serves the expert already, or prefers it more."""
    return [
        uid
        for uid in claims
        if any(
            _outranks(replica, uid, peer_id)
            for replica in replicas.get(uid, ())
            if replica.peer_id != peer_id
        )
    ]


def _outranks(other: Replica, uid: UID, peer_id: PeerID) -> bool:
    return other.state is ReplicaState.SERVING or preference(uid, other.peer_id) > preference(uid, peer_id)
