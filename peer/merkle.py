"""Merkle trees over the leaves of a memory's shard, as in RFC 9162, section 2.1: roots, and proofs of single leaves.

A leaf is hashed with a prefix byte of 0 and an inner node with a prefix byte of 1, so that neither passes for the
other.
"""

import hashlib
from collections.abc import Sequence

HASH_BYTES = 32


def leaf_hash(*data: bytes) -> bytes:
    """The hash of a leaf with this data. The parts are joined."""
    hashed = hashlib.sha256(b"\0")
    for part in data:
        hashed.update(part)
    return hashed.digest()


class MerkleTree:
    """All levels of the tree over some leaf hashes."""

    def __init__(self, leaves: Sequence[bytes]) -> None:
        """`leaves`: the hashes of at least one leaf."""
        assert leaves, "an empty tree proves nothing"
        self._levels = [list(leaves)]
        while len(level := self._levels[-1]) > 1:
            above = [_inner(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
            # a node without a sibling moves up unchanged, which gives the tree of the RFC: its left part is always
            # complete
            self._levels.append(above + level[len(level) & ~1 :])

    @property
    def root(self) -> bytes:
        return self._levels[-1][0]

    def path(self, position: int) -> list[bytes]:
        """The proof for a leaf: the sibling hashes on the way from that leaf to the root."""
        assert 0 <= position < len(self._levels[0]), f"no leaf {position}"
        path = []
        for level in self._levels[:-1]:
            if (sibling := position ^ 1) < len(level):
                path.append(level[sibling])
            position //= 2
        return path


def proves(root: bytes, leaf: bytes, position: int, leaves: int, path: Sequence[bytes]) -> bool:
    """Whether the path proves that the tree with this root and number of leaves has that leaf hash at that position."""
    if not 0 <= position < leaves:
        return False
    hashed, last, used = leaf, leaves - 1, 0
    while last:
        if position % 2 or position < last:  # it has a sibling
            if used == len(path):
                return False
            beside = path[used]
            hashed = _inner(beside, hashed) if position % 2 else _inner(hashed, beside)
            used += 1
        position, last = position // 2, last // 2
    return used == len(path) and hashed == root


def _inner(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()
