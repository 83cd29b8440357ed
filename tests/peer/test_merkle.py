"""Merkle trees, compared with the recursive definition of RFC 9162, and attacked by forgers."""

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from peer.merkle import MerkleTree, leaf_hash, proves


def defined_root(leaves: list[bytes]) -> bytes:
    """The definition in section 2.1.1: split at the largest power of two below the number of leaves."""
    if len(leaves) == 1:
        return leaves[0]
    k = 1 << (len(leaves) - 1).bit_length() - 1
    return hashlib.sha256(b"\1" + defined_root(leaves[:k]) + defined_root(leaves[k:])).digest()


def hashes(count: int) -> list[bytes]:
    return [leaf_hash(n.to_bytes(2)) for n in range(count)]


def test_a_leafs_hash_is_that_of_its_data_after_a_byte_of_zero() -> None:
    assert leaf_hash(b"ab", b"c") == hashlib.sha256(b"\0abc").digest()


@given(st.integers(1, 200))
def test_the_root_is_the_one_that_the_rfc_defines(count: int) -> None:
    assert MerkleTree(hashes(count)).root == defined_root(hashes(count))


@given(st.integers(1, 200), st.data())
def test_a_leafs_path_proves_it_and_nothing_else(count: int, data: st.DataObject) -> None:
    leaves = hashes(count)
    tree = MerkleTree(leaves)
    position = data.draw(st.integers(0, count - 1))
    path = tree.path(position)
    assert proves(tree.root, leaves[position], position, count, path)

    other = data.draw(st.integers(-1, count))
    assert proves(tree.root, leaves[position], other, count, path) == (other == position)
    assert not proves(tree.root, leaf_hash(b"forged"), position, count, path)
    assert not proves(tree.root, leaves[position], position, count, [*path, leaf_hash(b"more")])
    if path:
        at = data.draw(st.integers(0, len(path) - 1))
        assert not proves(tree.root, leaves[position], position, count, path[:at] + path[at + 1 :])
        wrong = [*path[:at], leaf_hash(b"wrong"), *path[at + 1 :]]
        assert not proves(tree.root, leaves[position], position, count, wrong)


def test_an_inner_node_is_no_leaf() -> None:
    leaves = hashes(4)
    inner = MerkleTree(leaves[:2]).root
    tree = MerkleTree(leaves)
    assert (
        tree.root == MerkleTree([inner, MerkleTree(leaves[2:]).root]).root
    )  # a smaller tree, of inner nodes
    assert not proves(tree.root, inner, 0, 4, [MerkleTree(leaves[2:]).root])
