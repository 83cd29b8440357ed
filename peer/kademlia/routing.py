"""IDs, the routing table, and which keys a new peer should get. No I/O and no clock.

Kademlia (Maymounkov & Mazières 2002): peers and keys have IDs of 160 bits, and a key is stored at the peers whose IDs
are nearest to its own by XOR. A peer knows up to 20 others in each bucket, and has more buckets the nearer they are to
its own ID. The peers known for longest stay, because they are likeliest to stay online. In a full bucket,
neighbourhoods have equal shares: somebody who runs many peers on few machines makes room for others.
"""

import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache

import msgpack

from peer.identity import PeerID

ID_BYTES = 20
ID_BITS = 8 * ID_BYTES
PLACE_BITS = 64
BUCKET_SIZE = 20
"""Nodes in a bucket, and nearest nodes in an answer (k in the paper)."""
REPLICAS = 5
"""A key is stored at this many of its nearest nodes."""
_DEPTH_STEP = 5
"""Buckets far from this peer's own ID split as well, down to the next multiple of this depth (b in section 4.2)."""


@lru_cache(maxsize=4096)
def node_id_of(peer_id: bytes) -> int:
    """The peer's position in the DHT: the hash of its PeerID. The ID that a peer claims is never read."""
    return id_of_bytes(hashlib.sha1(peer_id, usedforsecurity=False).digest())


def key_id_of(key: str) -> int:
    """A key's position: the hash of its text, packed as values are."""
    return id_of_bytes(hashlib.sha1(msgpack.packb(key), usedforsecurity=False).digest())


def first_bits(node: int) -> int:
    """The first bits of a NodeID. A request names known nodes by these."""
    return node >> (ID_BITS - PLACE_BITS)


def id_of_bytes(data: bytes) -> int:
    return int.from_bytes(data, "big")


def id_bytes(number: int) -> bytes:
    """An ID on the wire: `ID_BYTES` bytes."""
    return number.to_bytes(ID_BYTES, "big")


def should_hand_over(key: int, newcomer: int, own: int, others: Sequence[int]) -> bool:
    """Whether this peer gives a key to a new peer: it does so if it is the nearest holder, and the new peer is now a
    holder.

    `others`: up to `REPLICAS` known nodes nearest to the key, nearest first, without these two.
    """
    becomes_holder = len(others) < REPLICAS or newcomer ^ key < others[-1] ^ key
    return becomes_holder and (not others or own ^ key < others[0] ^ key)


class _Bucket:
    """The nodes whose IDs share their first `depth` bits. `low` is the lowest such ID."""

    __slots__ = ("depth", "low", "nodes", "spare")

    def __init__(self, low: int, depth: int) -> None:
        self.low = low
        self.depth = depth
        self.nodes: dict[int, bytes] = {}
        """Their PeerIDs, as bytes to save memory. The node heard from longest ago comes first."""
        self.spare: dict[int, bytes] = {}
        """The replacement cache: nodes that replace those that leave, the newest last (section 4.1)."""

    def has(self, node: int) -> bool:
        return (node ^ self.low) >> (ID_BITS - self.depth) == 0

    def distance(self, key: int) -> int:
        """The distance to the nearest ID in the bucket. The buckets' distances never overlap."""
        bits = ID_BITS - self.depth
        return (self.low ^ key) >> bits << bits


class RoutingTable:
    """The nodes that this peer knows. A bucket holds at most `BUCKET_SIZE` nodes and as many spare ones."""

    def __init__(self, own: int) -> None:
        """`own`: this peer's ID, which is never among the others."""
        self._own = own
        self._buckets = [_Bucket(0, 0)]
        """The buckets in the order of their IDs. Together they cover all IDs."""
        self._asked: set[int] = set()
        """Nodes of full buckets that are being pinged."""
        self._near: dict[int, str] = {}
        """The neighbourhoods of nodes, where they matter."""

    def __contains__(self, node: int) -> bool:
        """Includes spare nodes, as the methods below do."""
        bucket = self._bucket(node)
        return node in bucket.nodes or node in bucket.spare

    def __iter__(self) -> Iterator[tuple[int, PeerID]]:
        for bucket in self._buckets:
            for node, name in (*bucket.nodes.items(), *bucket.spare.items()):
                yield node, PeerID(name)

    def __len__(self) -> int:
        return sum(len(bucket.nodes) + len(bucket.spare) for bucket in self._buckets)

    def add(self, node: int, peer_id: PeerID, near: str = "") -> PeerID | None:
        """Adds a node that has just been heard from. `near`: its neighbourhood; empty: it counts for itself.

        If its bucket is full, the node becomes a spare one. Then the bucket's node that was heard from longest ago is
        returned: it should be pinged, and either added again or removed (section 2.2). None if there is nothing to
        ping.
        """
        if node == self._own:
            return None
        self._asked.discard(node)
        bucket = self._bucket(node)
        while node not in bucket.nodes and len(bucket.nodes) >= BUCKET_SIZE and self._splits(bucket):
            bucket = self._split(bucket, node)
        bucket.spare.pop(node, None)
        if near:
            self._near[node] = near
        else:
            self._near.pop(node, None)
        if node not in bucket.nodes and len(bucket.nodes) >= BUCKET_SIZE:
            crowding = self._crowding(bucket, near)
            if crowding is not None:
                self._keep_as_spare(bucket, crowding, bucket.nodes.pop(crowding))
        if node in bucket.nodes or len(bucket.nodes) < BUCKET_SIZE:
            bucket.nodes.pop(node, None)
            bucket.nodes[node] = peer_id.to_bytes()
            return None
        self._keep_as_spare(bucket, node, peer_id.to_bytes())
        oldest = next((known for known in bucket.nodes if known not in self._asked), None)
        if oldest is None:
            return None
        self._asked.add(oldest)
        return PeerID(bucket.nodes[oldest])

    def has_room(self, node: int, near: str) -> bool:
        """Whether there is room for the node in its bucket, or among the bucket's spare nodes.

        `near`: its neighbourhood.
        """
        bucket = self._bucket(node)
        return (
            len(bucket.nodes) < BUCKET_SIZE
            or len(bucket.spare) < BUCKET_SIZE
            or self._splits(bucket)
            or self._crowding(bucket, near) is not None
        )

    def remove(self, node: int) -> None:
        """Removes a node that did not answer. The newest spare one takes its place. Unknown nodes are ignored."""
        bucket = self._bucket(node)
        self._asked.discard(node)
        bucket.spare.pop(node, None)
        self._near.pop(node, None)
        if bucket.nodes.pop(node, None) is not None and bucket.spare:
            newest, name = bucket.spare.popitem()
            bucket.nodes[newest] = name

    def nearest(self, key: int, count: int, exclude: int | None = None) -> list[tuple[int, PeerID]]:
        """The nodes nearest to the key, nearest first, without `exclude` and spare nodes.

        Only the nearest node of each neighbourhood counts, unless there are too few.
        """
        found: list[tuple[int, bytes]] = []
        further: list[tuple[int, bytes]] = []
        places: set[str] = set()
        for bucket in sorted(self._buckets, key=lambda bucket: bucket.distance(key)):
            for distance in sorted([node ^ key for node in bucket.nodes if node != exclude]):
                node = distance ^ key
                near = self._near.get(node)
                if near is None:
                    found.append((node, bucket.nodes[node]))
                elif near not in places:
                    found.append((node, bucket.nodes[node]))
                    places.add(near)
                else:
                    further.append((node, bucket.nodes[node]))
            if len(found) >= count:
                break
        return [(node, PeerID(name)) for node, name in (*found, *further)[:count]]

    def _bucket(self, node: int) -> _Bucket:
        return self._buckets[bisect_right(self._buckets, node, key=lambda bucket: bucket.low) - 1]

    def _splits(self, bucket: _Bucket) -> bool:
        return bucket.depth < ID_BITS and (bucket.has(self._own) or bucket.depth % _DEPTH_STEP != 0)

    def _crowding(self, bucket: _Bucket, near: str) -> int | None:
        """The newest node of the largest neighbourhood, if that has at least two nodes more than this one."""
        if not near:
            return None
        count = Counter(self._near[node] for node in bucket.nodes if node in self._near)
        most = max(count, key=count.__getitem__, default="")
        if count[most] <= count[near] + 1:
            return None
        return next(node for node in reversed(bucket.nodes) if self._near.get(node) == most)

    def _keep_as_spare(self, bucket: _Bucket, node: int, name: bytes) -> None:
        bucket.spare[node] = name
        if len(bucket.spare) > BUCKET_SIZE:
            gone = next(iter(bucket.spare))
            del bucket.spare[gone]
            self._near.pop(gone, None)

    def _split(self, bucket: _Bucket, node: int) -> _Bucket:
        """Splits the bucket into halves. Returns the half to which the node belongs."""
        halves = [
            _Bucket(bucket.low, bucket.depth + 1),
            _Bucket(bucket.low + (1 << (ID_BITS - bucket.depth - 1)), bucket.depth + 1),
        ]
        for known, name in (*bucket.nodes.items(), *bucket.spare.items()):
            half = halves[halves[1].has(known)]
            room = half.nodes if len(half.nodes) < BUCKET_SIZE else half.spare
            room[known] = name
        place = self._buckets.index(bucket)
        self._buckets[place : place + 1] = halves
        return halves[halves[1].has(node)]
