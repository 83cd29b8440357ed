"""Index entries: one that does not have its key's name in the right place is refused."""

import math

import pytest
from record_samples import EXPIRES_AT, NOW, VALIDATOR, keys, refused, stored

from dht.records import (
    INDEX_PIECE,
    MAX_INDEX_LIFETIME_S,
    MAX_LIFETIME_S,
    SwarmKeys,
    shards_of,
)
from peer.clock import CLOCK_TOLERANCE_S
from peer.identity import Identity, PeerID
from peer.kademlia.validation import Entries, Entry, pack, packed_bytes

__all__ = ["keys"]


def test_an_index_entry_under_a_wrong_key_is_refused(identity: Identity, keys: SwarmKeys) -> None:
    refused(stored(keys.prefix(1), 2, keys.prefix(0)), "name of its key")
    shard, _, another = shards_of(identity.peer_id)
    subkey = identity.peer_id.to_bytes()
    refused(stored(keys.node_shard(another), subkey, keys.node_shard(shard)), "name of its key")
    refused(stored(keys.prefix(1), 2, keys.prefix(1) + " "), "name of its key")


def test_an_index_entry_in_a_foreign_shard_is_refused(identity: Identity, keys: SwarmKeys) -> None:
    subkey = identity.peer_id.to_bytes()
    for shard in shards_of(identity.peer_id):
        foreign = keys.node_shard(f"{shard[:-1]}{int(shard[-1], 16) ^ 1:x}")
        refused(stored(foreign, subkey, foreign), "PeerIDs that belong to it|can't be parsed")


@pytest.mark.parametrize("subkey", [0, None, "text", b"", b"x", bytes(33), bytes(35), [bytes(34)]])
def test_a_shard_takes_only_peer_ids(keys: SwarmKeys, subkey: object) -> None:
    shard = keys.node_shard("00")
    VALIDATOR.check(stored(shard, bytes(34), shard))
    refused(stored(shard, subkey, shard), "PeerIDs that belong to it|can't be parsed")


@pytest.mark.parametrize(
    ("piece_of", "coordinate"),
    [(0, INDEX_PIECE), (INDEX_PIECE, INDEX_PIECE - 1), (4095, 0), (INDEX_PIECE - 1, 4095)],
)
def test_a_coordinate_belongs_in_its_own_piece_of_a_prefix(
    keys: SwarmKeys, piece_of: int, coordinate: int
) -> None:
    prefix = keys.index(1, (2,), piece_of)
    refused(stored(prefix, coordinate, prefix), "another piece")


def test_no_piece_of_a_prefix_passes_32_kilobytes() -> None:
    keys = SwarmKeys("n" * 32, PeerID(b"\x12\x20" + bytes(32)))
    for coordinate in ((), (999,), (999_999,) * 3):
        longest = keys.index(999_999, coordinate, 4095)
        entries: Entries = {}
        for following in range(4095 - INDEX_PIECE + 1, 4096):
            assert keys.index(999_999, coordinate, following) == longest
            entries[following] = Entry(pack(longest), EXPIRES_AT)
        assert packed_bytes(entries) < 32_000


@pytest.mark.parametrize("subkey", [-1, 4096, 2**64 - 1, 1.0, True, False, None, "2", b"2", [2]])
def test_a_prefix_takes_only_coordinates(keys: SwarmKeys, subkey: object) -> None:
    refused(stored(keys.prefix(1), subkey, keys.prefix(1)), "subkeys are coordinates|can't be parsed")


@pytest.mark.parametrize("lifetime", [MAX_INDEX_LIFETIME_S + CLOCK_TOLERANCE_S + 1, math.inf, math.nan])
def test_an_index_entry_that_would_live_too_long_is_refused(keys: SwarmKeys, lifetime: float) -> None:
    VALIDATOR.check(stored(keys.prefix(1), 2, keys.prefix(1), NOW + MAX_INDEX_LIFETIME_S))
    refused(stored(keys.prefix(1), 2, keys.prefix(1), NOW + lifetime), "live longer than 3600 s")


@pytest.mark.parametrize("lifetime", [MAX_LIFETIME_S + CLOCK_TOLERANCE_S + 1, math.inf, math.nan])
def test_a_shards_entry_that_would_live_too_long_is_refused(keys: SwarmKeys, lifetime: float) -> None:
    """Nobody is listed for long without renewing that."""
    shard = keys.node_shard("00")
    VALIDATOR.check(stored(shard, bytes(34), shard, NOW + MAX_LIFETIME_S))
    refused(stored(shard, bytes(34), shard, NOW + lifetime), "live longer than 600 s")


def test_a_long_index_entry_is_refused() -> None:
    name = "x" * 200
    refused(stored(name, 2, name), "name of its key")
