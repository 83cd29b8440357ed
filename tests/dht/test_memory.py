"""Memories: names, passages' hashes, and manifests, with any bytes that a stranger may have written."""

import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from math import prod
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dht.memory import (
    MAX_CELLS,
    MAX_TEXT_CHARACTERS,
    MemoryID,
    MemoryManifest,
    Part,
    Passage,
    Place,
    ShardInfo,
    check_name,
    prove,
    region_count,
)
from dht.uid import coordinate_of, number_of
from peer.errors import WireError
from peer.identity import PeerID
from peer.wire import memory_pb2

PUBLISHER = PeerID(b"\x12\x20" + bytes(range(32)))
PASSAGE = Passage("A node hosts experts.", "Words", "design.md", 120, "MIT")
MANIFEST = MemoryManifest(
    "python-docs",
    3,
    "Python's documentation",
    1_800_000_000.0,
    "static",
    Part(b"e" * 32, 1000),
    256,
    Part(b"c" * 32, 2000),
    (16, 16),
    ("MIT", "PSF-2.0"),
    (ShardInfo((0, 0), b"r" * 32, 12, 3000), ShardInfo((15, 3), b"s" * 32, 1, 90, is_secondary=True)),
    frozenset({Place(b"r" * 32, 11), Place(b"r" * 32, 2)}),
)

texts = st.text(max_size=40)
passages = st.builds(Passage, texts, texts, texts, st.integers(0, 2**40), texts)


def test_a_memorys_id_names_it_and_its_publisher() -> None:
    memory = MemoryID.of("python-docs", PUBLISHER)
    assert MemoryID.parse(str(memory)) == memory
    assert memory != MemoryID.of("python-docs", PeerID(b"\x12\x20" + bytes(32)))


@pytest.mark.parametrize("name", ["", "a", "A-b", "-ab", "ab-", "a" * 25, "a b", "a.b", "ab\n"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(WireError, match="is not a name for a memory"):
        check_name(name)
    with pytest.raises(WireError):
        MemoryID.parse(f"{name}-{'1' * 12}")


@given(passages, passages)
def test_passages_have_the_same_leaf_only_if_they_are_the_same(one: Passage, other: Passage) -> None:
    assert (one.leaf(b"v") == other.leaf(b"v")) == (one == other)
    assert one.leaf(b"v") != one.leaf(b"w")
    assert Passage.parse(one.message()) == one


def test_what_moves_from_one_field_to_the_next_changes_the_leaf() -> None:
    moved = replace(PASSAGE, title="Word", source="sdesign.md")
    assert moved.leaf(b"") != PASSAGE.leaf(b"")


def test_a_long_passage_is_refused() -> None:
    with pytest.raises(WireError, match="too long"):
        Passage.parse(memory_pb2.Passage(text="x" * (MAX_TEXT_CHARACTERS + 1)))


def test_a_proof_of_megabytes_is_refused_at_once() -> None:
    """Reading its hashes one by one would copy the whole proof for each: 14 s of the event loop for 3 MB."""
    proof = memory_pb2.ProvenPassage(passage=PASSAGE.message(), vector=bytes(256), path=bytes(3 * 10**6))
    began = time.thread_time()
    with pytest.raises(WireError, match="proof is too long"):
        prove(proof, MANIFEST.shards[0])
    assert time.thread_time() - began < 0.1


def test_a_manifest_comes_back_as_it_was() -> None:
    assert MemoryManifest.parse(MANIFEST.serialize()) == MANIFEST
    assert MANIFEST.by_cell[15, 3] == (MANIFEST.shards[1],)
    assert MANIFEST.passages == 12 - 2
    assert MANIFEST.revoked_in == {b"r" * 32: {2, 11}}


@pytest.mark.parametrize("publisher", ["", "1" * 11, "1" * 13, "1" * 11 + "é", "1" * 11 + "."])
def test_an_id_without_the_end_of_a_peer_id_is_refused(publisher: str) -> None:
    with pytest.raises(WireError, match="not a memory's id"):
        MemoryID.parse(f"python-docs-{publisher}")


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.data())
def test_cells_are_numbered_in_row_major_order(grid: list[int], data: st.DataObject) -> None:
    cell = tuple(data.draw(st.integers(0, size - 1)) for size in grid)
    assert coordinate_of(number_of(cell, tuple(grid)), tuple(grid)) == cell


grids = st.lists(st.integers(1, 40), min_size=1, max_size=4).filter(lambda grid: prod(grid) <= MAX_CELLS)


@given(grids)
def test_regions_are_few_and_follow_each_other(grid: list[int]) -> None:
    cells = [coordinate_of(number, grid) for number in range(prod(grid))]
    shards = tuple(ShardInfo(cell, number.to_bytes(32), 1, 90) for number, cell in enumerate(cells))
    manifest = replace(MANIFEST, grid=tuple(grid), shards=shards)
    numbers = [manifest.region_of[shard] for shard in shards]
    assert numbers == sorted(numbers)
    assert set(numbers) == set(range(region_count(grid)))
    assert min(16, len(cells)) <= region_count(grid) <= max(32, 1 + len(cells) // 16)
    assert max(Counter(numbers).values()) <= 16


@given(st.lists(st.integers(0, 255), max_size=200), st.integers(0, 200))
def test_no_region_is_too_large_and_later_revisions_move_no_shard(cells: list[int], earlier: int) -> None:
    """A region is full with 5 shards here."""
    shards = tuple(
        ShardInfo(coordinate_of(cell, (16, 16)), number.to_bytes(32), 1, 90)
        for number, cell in enumerate(cells)
    )
    with patch("dht.memory.MAX_SHARDS_OF_REGION", 5):
        before, after = (replace(MANIFEST, shards=some) for some in (shards[:earlier], shards))
        assert before.region_of.items() <= after.region_of.items()
        assert after.region_of.keys() == set(shards)
        assert all(len(some) <= 5 for some in after.by_region.values())
        assert all(region < region_count((16, 16), len(shards)) for region in after.by_region)
        for some in after.by_region.values():
            assert len({number_of(shard.cell, (16, 16)) // 16 for shard in some}) == 1


def test_a_memorys_shards_are_grouped_by_region() -> None:
    one, other, third = (
        ShardInfo(cell, bytes([n]) * 32, 1, 90) for n, cell in enumerate([(0, 0), (0, 15), (1, 0)])
    )
    assert replace(MANIFEST, shards=(one, third, other)).by_region == {0: (one, other), 1: (third,)}


def _changed(**fields: object) -> bytes:
    message = memory_pb2.MemoryManifest.FromString(MANIFEST.serialize())
    for name, value in fields.items():
        message.ClearField(name)
        if isinstance(value, list):
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    return message.SerializeToString()


@pytest.mark.parametrize(
    "fields",
    [
        {"format": 2},
        {"name": "../x"},
        {"revision": 0},
        {"created_at": float("nan")},
        {"created_at": -1.0},
        {"created_at": 1e18},
        {"grid": []},
        {"grid": [4096, 4096]},
        {"grid": [0]},
        {"grid": [2] * 5},
        {"dimensions": 0},
        {"dimensions": 2000},
        {"encoder_kind": "../x"},
        {"encoder_sha256": b"short"},
        {"encoder_bytes": 2**60},
        {"codebook_bytes": 0},
        {"licenses": ["x" * 65]},
        {"licenses": ["MIT"] * 257},
        {"revoked": [memory_pb2.RevokedPassages(shard=0, positions=[12])]},
        {"revoked": [memory_pb2.RevokedPassages(shard=1, positions=[0])]},
        {"revoked": [memory_pb2.RevokedPassages(shard=2, positions=[0])]},
        {"revoked": [memory_pb2.RevokedPassages(shard=0, positions=[1] * 65_537)]},
        {"shards": [], "revoked": []},
        {"shards": [memory_pb2.ShardEntry(cell=256, root=b"r" * 32, leaves=1, size=1)], "revoked": []},
        {"shards": [memory_pb2.ShardEntry(cell=0, root=b"r", leaves=1, size=1)], "revoked": []},
        {"shards": [memory_pb2.ShardEntry(cell=0, root=b"r" * 32, leaves=0, size=1)], "revoked": []},
        {"shards": [memory_pb2.ShardEntry(cell=0, root=b"r" * 32, leaves=1, size=2**24)], "revoked": []},
    ],
)
def test_a_manifest_that_no_memory_has_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(WireError):
        MemoryManifest.parse(_changed(**fields))


@given(st.binary(max_size=200))
def test_bytes_of_strangers_are_parsed_or_refused(data: bytes) -> None:
    try:
        parsed = MemoryManifest.parse(data)
    except WireError:
        return
    assert MemoryManifest.parse(parsed.serialize()) == parsed


@pytest.mark.parametrize("tag", [b"\x72\x00", b"\x6a\x00", b"\x7a\x00", b"\x08\x01", b"\xf8\x07\x00"])
def test_a_manifest_of_millions_of_small_fields_is_refused_before_it_is_parsed(tag: bytes) -> None:
    """The fields are empty shards, licences or revocations; one field again and again; or an unknown one."""
    with pytest.raises(WireError, match="fields"):
        MemoryManifest.parse(MANIFEST.serialize() + tag * 200_000)


def test_a_manifest_with_fields_of_a_later_version_is_parsed() -> None:
    more = b"\xa1\x06" + bytes(8) + b"\xa5\x06" + bytes(4) + b"\xa2\x06\x03abc" + b"\xa0\x06\xff\x01"
    assert MemoryManifest.parse(MANIFEST.serialize() + more) == MANIFEST
    for cut in range(1, len(more)):
        with suppress(WireError):
            assert MemoryManifest.parse(MANIFEST.serialize() + more[:cut]) == MANIFEST


def test_a_manifest_whose_shards_contradict_each_other_is_refused() -> None:
    shard = ShardInfo((0, 0), b"r" * 32, 10, 90)
    elsewhere = replace(shard, cell=(0, 1))
    for other in (replace(elsewhere, leaves=5), replace(elsewhere, is_secondary=True)):
        with pytest.raises(WireError, match="two sizes or kinds"):
            MemoryManifest.parse(replace(MANIFEST, shards=(shard, other), revoked=frozenset()).serialize())
    same = replace(MANIFEST, shards=(shard, elsewhere), revoked=frozenset())
    assert MemoryManifest.parse(same.serialize()) == same
