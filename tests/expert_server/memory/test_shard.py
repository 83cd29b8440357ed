"""Shards of memories: built passages are found and proven, changed ones are refused, and revoked ones are gone."""

import io
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_folders import shard_info, some_passages
from shard_samples import opened, secondary, shards

from dht.memory import Passage, Place, ShardInfo, Vectors, by_root, prove
from expert_server.memory.shard import (
    BLOCK,
    PrimaryShard,
    SecondaryShard,
    Shard,
    most_bytes,
)
from peer.arrays import decode_arrays, encode_arrays
from peer.errors import WireError
from peer.files import PlainFile
from peer.merkle import proves

PASSAGES, VECTORS = some_passages(BLOCK + 3, dimensions=4)
FILE = PrimaryShard.build(PASSAGES, VECTORS)
INFO = shard_info(FILE, PASSAGES, VECTORS)
GONE = {b"r" * 32: [5]}
_WHOLE, SECONDARY_INFO = secondary(b"r" * 32, VECTORS)
SECONDARY_FILE = _WHOLE.without(GONE) or b""
"""Samples that properties change, byte by byte."""


def changed(draw: st.DataObject, file: bytes, first: int, end: int) -> bytes:
    """The file with another byte in this range."""
    place = draw.draw(st.integers(first, end - 1))
    other = file[place] ^ draw.draw(st.integers(1, 255))
    return file[:place] + bytes([other]) + file[place + 1 :]


def header_end(file: bytes) -> int:
    return 8 + int.from_bytes(file[:8], "little")


@given(shards())
@settings(deadline=None)
def test_what_was_built_is_read_and_proven(built: tuple[list[Passage], Vectors]) -> None:
    passages, vectors = built
    data = PrimaryShard.build(passages, vectors)
    info = shard_info(data, passages, vectors)
    shard = opened(data, passages, vectors)
    shard.check({})
    assert list(shard.passages()) == passages
    for position, proven in enumerate(shard.read(range(len(passages)))):
        assert proven.passage == passages[position]
        leaf = passages[position].leaf(proven.vector)
        assert shard.leaf(position) == leaf
        assert proven.vector == vectors[position].tobytes()
        assert proves(info.root, leaf, position, info.leaves, proven.path)


def test_revoked_passages_leave_their_leaf_alone() -> None:
    passages, vectors = some_passages(3 * BLOCK + 7)
    whole = opened(PrimaryShard.build(passages, vectors), passages, vectors)
    gone = [0, BLOCK - 1, BLOCK, 3 * BLOCK + 6]
    file = whole.without({whole.root: gone})
    assert file is not None
    shard = opened(file, passages, vectors)
    assert shard.without({whole.root: gone}) is None
    for position, proven in enumerate(shard.read(range(len(passages)))):
        assert shard.leaf(position) == whole.leaf(position)
        assert (proven.passage is None) == (position in gone)
        assert any(proven.vector) == (position not in gone)
    inflated = b"".join(zlib.decompress(shard._block(block)) for block in range(4))
    assert all(passages[position].text.encode() not in inflated for position in gone)
    assert passages[1].text.encode() in inflated
    # A host cannot invent a revocation to keep a passage from others.
    with pytest.raises(WireError, match="still valid"):
        shard.check({whole.root: gone[1:]})


@given(shards(), st.data())
@settings(deadline=None)
def test_a_secondary_shard_proves_where_each_text_lies_or_what_stands_for_it(
    built: tuple[list[Passage], Vectors], data: st.DataObject
) -> None:
    _, vectors = built
    texts = [Place(bytes([n % 3]) * 32, n) for n in range(len(vectors))]
    file = SecondaryShard.build(texts, vectors)
    info = ShardInfo((0,), SecondaryShard.root_of(file), len(vectors), len(file), is_secondary=True)
    shard = Shard.parse(file, info, vectors.shape[1])
    gone = data.draw(st.sets(st.sampled_from(texts)))
    without = shard.without(by_root(gone))
    if without is not None:
        assert len(without) <= most_bytes(info)
        shard = Shard.parse(without, info, vectors.shape[1])
        shard.check(by_root(gone))
        with pytest.raises(WireError, match="still valid"):
            shard.check(by_root(sorted(gone)[1:]))
    for entry in shard.read(range(len(vectors))):
        proof = prove(entry.message(0), info)
        assert proof.text == texts[entry.place.position]
        assert proof.is_revoked == (proof.text in gone)
        assert proof.vector == (b"" if proof.is_revoked else vectors[entry.place.position].tobytes())
        # Nobody can claim that the vector belongs to another passage.
        spoilt = entry.message(0)
        spoilt.text_position += 1
        with pytest.raises(WireError, match="forged"):
            prove(spoilt, info)


@given(st.data())
def test_a_changed_secondary_file_is_refused(data: st.DataObject) -> None:
    file = changed(data, SECONDARY_FILE, header_end(SECONDARY_FILE), len(SECONDARY_FILE))
    with pytest.raises(WireError):
        Shard.parse(file, SECONDARY_INFO, 4).check(GONE)


def test_a_secondary_file_that_names_a_shard_twice_is_refused() -> None:
    """Its leaves are those of the honest file, but each root would be compared with the revoked passages."""
    _, vectors = some_passages(10)
    texts = [Place(b"r" * 32, position) for position in range(10)]
    whole = SecondaryShard.build(texts, vectors)
    info = ShardInfo((1,), SecondaryShard.root_of(whole), 10, len(whole), is_secondary=True)
    arrays = decode_arrays(whole)
    references = arrays["references"].copy()
    references[:, 0] = np.arange(10)
    file = encode_arrays({**arrays, "roots": arrays["roots"].repeat(10, axis=0), "references": references})
    with pytest.raises(WireError, match="twice"):
        Shard.parse(file, info, vectors.shape[1])


def test_passages_whose_texts_are_in_many_shards_are_revoked_quickly() -> None:
    count = 20_000
    texts = [Place(number.to_bytes(32), number) for number in range(count)]
    vectors = np.ones((count, 1), np.int8)
    file = SecondaryShard.build(texts, vectors)
    info = ShardInfo((1,), SecondaryShard.root_of(file), count, len(file), is_secondary=True)
    shard = Shard.parse(file, info, 1)
    began = time.process_time()
    assert not shard.has_any({place.root: {place.position + 1} for place in texts})
    assert shard.has_any(by_root(texts))
    assert time.process_time() - began < 2.0


def test_a_shard_on_disk_is_read_when_it_is_needed_and_noticed_when_it_is_another(tmp_path: Path) -> None:
    passages, vectors = some_passages(3 * BLOCK)
    data = PrimaryShard.build(passages, vectors)
    second, _ = secondary(PrimaryShard.root_of(data), vectors)
    other = SecondaryShard.build([second.text_at(n) for n in range(len(second))], vectors)
    pairs: list[tuple[Shard, bytes]] = [(opened(data, passages, vectors), data), (second, other)]
    for number, (shard, content) in enumerate(pairs):
        path = tmp_path / str(number)
        path.write_bytes(content)
        on_disk = shard.on_disk(PlainFile(path), content)
        assert np.array_equal(on_disk.vectors(), vectors)
        assert on_disk.read([7, 100]) == shard.read([7, 100])
        path.write_bytes(content[:-1])
        with pytest.raises(OSError, match=str(path)):
            on_disk.vectors()
        with pytest.raises(OSError, match=str(path)):
            on_disk.read([7])


def test_the_file_is_small_and_the_same_each_time_and_others_can_read_it() -> None:
    passages, vectors = some_passages(1000, dimensions=256)
    data = PrimaryShard.build(passages, vectors)
    assert data == PrimaryShard.build(passages, vectors)
    assert len(data) < 1000 * (256 + 60)
    tensors = safetensors.numpy.load(data)
    assert (tensors["vectors"] == vectors).all()
    assert tensors["hashes"].shape == (0, 32)


@given(st.data())
def test_a_changed_file_is_refused(data: st.DataObject) -> None:
    file = changed(data, FILE, header_end(FILE), len(FILE))
    with pytest.raises(WireError):
        Shard.parse(file, INFO, 4).check({})


@given(st.data())
def test_a_changed_header_is_refused_or_says_the_same(data: st.DataObject) -> None:
    file = changed(data, FILE, 0, header_end(FILE))
    try:
        shard = Shard.parse(file, INFO, 4)
        shard.check({})
    except WireError:
        return
    assert isinstance(shard, PrimaryShard)
    assert list(shard.passages()) == PASSAGES
    assert np.array_equal(shard.vectors(), VECTORS)


@given(st.integers(0, 5000))
def test_a_cut_file_is_refused(size: int) -> None:
    with pytest.raises(WireError):
        Shard.parse(FILE[: min(size, len(FILE) - 1)], INFO, 4)
    with pytest.raises(WireError):
        Shard.parse(FILE + bytes(1 + size), INFO, 4)


def test_other_dimensions_and_too_large_a_file_are_refused() -> None:
    passages, vectors = some_passages(10, dimensions=256)
    file = PrimaryShard.build(passages, vectors)
    info = shard_info(file, passages, vectors)
    with pytest.raises(WireError):
        Shard.parse(file, info, 255)
    small = ShardInfo(info.cell, info.root, info.leaves, len(file) // 2)
    with pytest.raises(WireError, match=f"more than {most_bytes(small)}"):
        Shard.parse(file, small, 256)
    with pytest.raises(WireError):
        Shard.parse(file, ShardInfo(info.cell, info.root, info.leaves - 1, info.size), 256)


def test_another_shard_of_the_same_form_is_refused() -> None:
    passages, vectors = some_passages(BLOCK + 3)
    other = PrimaryShard.build(*some_passages(BLOCK + 3, seed=1))
    info = shard_info(other, passages, vectors)
    with pytest.raises(WireError, match="passages don't match its root"):
        Shard.parse(other, info, vectors.shape[1])


def test_a_block_that_inflates_to_far_more_is_refused_early() -> None:
    passages, vectors = some_passages(BLOCK, dimensions=4)
    arrays = decode_arrays(PrimaryShard.build(passages, vectors))
    bomb = io.BytesIO()
    compressor = zlib.compressobj(9)
    for _ in range(16):
        bomb.write(compressor.compress(bytes(2**24)))
    bomb.write(compressor.flush())
    block = np.frombuffer(bomb.getvalue(), np.uint8)
    with pytest.raises(WireError, match="too large"):
        PrimaryShard({**arrays, "offsets": np.array([0, len(block)], np.int64), "blocks": block})
