"""What a peer knows of others beside its routing table: whom it heard of, and how long they take to answer."""

from collections.abc import Mapping

from hivemind.dht.routing import DHTID
from hivemind.p2p import PeerID

from peer.answers import is_rightful

_LEAST_PATIENCE_S, _MOST_PATIENCE_S = 0.3, 3.0
_HEARSAY_SHIFT = 8 * DHTID.HASH_NBYTES - 8
_HEARSAY_BUCKET = 16
"""Nodes remembered for each first byte of their IDs, those that were named last."""


class Contacts:
    """Kademlia ID → PeerID of the nodes that some look-ups heard of. A PeerID is made when it is needed."""

    def __init__(self) -> None:
        self._heard: dict[int, bytes] = {}
        self._made: dict[int, PeerID] = {}

    def __getitem__(self, node: int) -> PeerID:
        if node not in self._made:
            self._made[node] = PeerID(self._heard[node])
        return self._made[node]

    def know(self, peers: Mapping[int, PeerID]) -> None:
        for node, peer in peers.items():
            self._made.setdefault(node, peer)

    def hear(self, peers: Mapping[int, bytes]) -> None:
        """Of several that are named for one place, the first counts, unless it is another's own."""
        for node, peer in peers.items():
            known = self._heard.get(node)
            if known is None and node not in self._made:
                self._heard[node] = peer
            elif known not in (None, peer) and is_rightful(node, peer):
                self._heard[node] = peer
                self._made.pop(node, None)


class RoundTrips:
    """How long a call takes, by the calls before: the estimate by which TCP sends again (RFC 6298)."""

    def __init__(self) -> None:
        self._mean_s: float | None = None
        self._deviation_s = 0.0

    def note(self, took_s: float) -> None:
        if self._mean_s is None:
            self._mean_s, self._deviation_s = took_s, took_s / 2
        else:
            self._deviation_s += (abs(took_s - self._mean_s) - self._deviation_s) / 4
            self._mean_s += (took_s - self._mean_s) / 8

    @property
    def patience_s(self) -> float:
        """After so long an answer is late."""
        if self._mean_s is None:
            return 1.0
        return min(max(self._mean_s + 4 * self._deviation_s, _LEAST_PATIENCE_S), _MOST_PATIENCE_S)


class Hearsay:
    """Nodes that others named lately. Not asked yet, so not for the routing table, but good places to start from."""

    def __init__(self) -> None:
        self._buckets: dict[int, dict[int, bytes]] = {}

    def note(self, peers: Mapping[int, bytes]) -> None:
        for node, peer in peers.items():
            bucket = self._buckets.setdefault(node >> _HEARSAY_SHIFT, {})
            known = bucket.pop(node, peer)
            bucket[node] = peer if known == peer or is_rightful(node, peer) else known
            if len(bucket) > _HEARSAY_BUCKET:
                del bucket[next(iter(bucket))]

    def forget(self, node: int) -> None:
        self._buckets.get(node >> _HEARSAY_SHIFT, {}).pop(node, None)

    def near(self, key: int) -> Mapping[int, bytes]:
        """Those that share the first byte with the key."""
        return self._buckets.get(key >> _HEARSAY_SHIFT, {})
