"""Shards of memories: what is built is found and proven, what was changed is refused, and what was revoked is gone."""

import io
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from memory_folders import shard_info, some_passages

from dht.memory import Passage, Place, ShardInfo, Vectors, by_root, prove
from expert_server.memory import shard as shard_module
from expert_server.memory.shard import (
    BLOCK,
    PrimaryShard,
    SecondaryShard,
    Shard,
    most_bytes,
    search_together,
)
from peer.errors import WireError
from peer.files import PlainFile
from peer.merkle import proves

LABELS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
PASSAGES = st.builds(
    Passage,
    text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200),
    title=LABELS,
    source=LABELS,
    offset=st.integers(0, 2**40),
    license=LABELS,
)


def opened(data: bytes, passages: list[Passage], vectors: Vectors) -> PrimaryShard:
    shard = Shard.parse(data, shard_info(data, passages, vectors), vectors.shape[1])
    assert isinstance(shard, PrimaryShard)
    return shard


@st.composite
def shards(draw: st.DrawFn) -> tuple[list[Passage], Vectors]:
    passages = draw(st.lists(PASSAGES, min_size=1, max_size=5))
    # several blocks, the last of any size
    passages = passages * draw(st.integers(1, 30))
    dimensions = draw(st.integers(1, 9))
    return passages, draw(arrays.arrays(np.int8, (len(passages), dimensions)))


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


def secondary(root: bytes, vectors: Vectors) -> tuple[Shard, ShardInfo]:
    """A shard of the same passages in another cell."""
    data = SecondaryShard.build([Place(root, position) for position in range(len(vectors))], vectors)
    info = ShardInfo((1,), SecondaryShard.root_of(data), len(vectors), len(data), is_secondary=True)
    return Shard.parse(data, info, vectors.shape[1]), info


@given(shards(), st.data(), st.booleans())
@settings(deadline=None)
def test_search_is_exact_and_never_finds_what_was_revoked(
    built: tuple[list[Passage], Vectors], data: st.DataObject, is_secondary: bool
) -> None:
    passages, vectors = built
    gone = data.draw(st.sets(st.integers(0, len(passages) - 1)))
    shard: Shard = opened(PrimaryShard.build(passages, vectors), passages, vectors)
    revoked = {shard.root: gone}
    if is_secondary:
        shard, info = secondary(shard.root, vectors)
    else:
        info = shard_info(b"", passages, vectors)
    file = shard.without(revoked)
    assert (file is None) == (not gone)
    if file is not None:
        assert len(file) <= most_bytes(info) or not is_secondary
        shard = Shard.parse(file, replace(info, size=len(file)), vectors.shape[1])
        shard.check(revoked)
    queries = data.draw(arrays.arrays(np.int8, (3, vectors.shape[1])))
    k = data.draw(st.integers(1, len(passages) + 3))
    positions, scores = shard.search(queries, k)
    exact = queries.astype(np.int64) @ vectors.T.astype(np.int64)
    for row in range(3):
        live = [position for position in range(len(passages)) if position not in gone]
        best = [position for _, position in sorted((-exact[row, position], position) for position in live)][
            :k
        ]
        assert positions[row].tolist() == best
        assert scores[row].tolist() == exact[row, best].tolist()


@given(st.lists(shards(), min_size=1, max_size=4), st.integers(1, 40), st.booleans())
@settings(deadline=None)
def test_shards_are_searched_together_as_one(
    built: list[tuple[list[Passage], Vectors]], k: int, has_instructions: bool
) -> None:
    """With and without the processor's products of bytes."""
    dimensions = 18  # enough for the processor's products of bytes
    some, every = [], []
    for number, (passages, vectors) in enumerate(built):
        vectors = np.resize(vectors, (len(passages), dimensions))
        some.append(opened(PrimaryShard.build(passages, vectors), passages, vectors))
        every += [(number, position, vector) for position, vector in enumerate(vectors.astype(int))]
    query = np.array([-128, 127, 5, -3, 0, 1, 77, -77, 2], np.int8).repeat(2)
    with pytest.MonkeyPatch.context() as patched:
        if not has_instructions:
            patched.setattr(shard_module, "_multiplies_bytes_exactly", lambda: False)
        found = search_together(some, query[None], k)
    ranked = sorted(
        (-int(query.astype(int) @ vector), number, position) for number, position, vector in every
    )[:k]
    numbers, positions, scores = (array[0].tolist() for array in found)
    assert [(-score, *place) for score, *place in zip(scores, numbers, positions, strict=True)] == ranked


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
    # a host can't use a revocation that there was not to keep a passage from others
    with pytest.raises(WireError, match="not revoked"):
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
        with pytest.raises(WireError, match="not revoked"):
            shard.check(by_root(sorted(gone)[1:]))
    for entry in shard.read(range(len(vectors))):
        proof = prove(entry.message(0), info)
        assert proof.text == texts[entry.place.position]
        assert proof.is_revoked == (proof.text in gone)
        assert proof.vector == (b"" if proof.is_revoked else vectors[entry.place.position].tobytes())
        # nobody can say that it is another passage's
        spoilt = entry.message(0)
        spoilt.text_position += 1
        with pytest.raises(WireError, match="forged"):
            prove(spoilt, info)


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_a_changed_secondary_file_is_refused(data: st.DataObject) -> None:
    _, vectors = some_passages(BLOCK + 3, 4)
    whole, info = secondary(b"r" * 32, vectors)
    file = bytearray(whole.without({b"r" * 32: [5]}) or b"")
    begin = 8 + int.from_bytes(file[:8], "little")
    place = data.draw(st.integers(begin, len(file) - 1))
    file[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(WireError):
        Shard.parse(bytes(file), info, 4).check({b"r" * 32: [5]})


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
        here, there = shard.search(vectors[:3], 9), on_disk.search(vectors[:3], 9)
        assert np.array_equal(here[0], there[0])
        assert np.array_equal(here[1], there[1])
        assert on_disk.read([7, 100]) == shard.read([7, 100])
        path.write_bytes(content[:-1])
        with pytest.raises(OSError, match=str(path)):
            on_disk.search(vectors[:3], 9)
        with pytest.raises(OSError, match=str(path)):
            on_disk.read([7])


def test_the_file_is_small_and_the_same_each_time_and_others_can_read_it() -> None:
    passages, vectors = some_passages(1000, 256)
    data = PrimaryShard.build(passages, vectors)
    assert data == PrimaryShard.build(passages, vectors)
    assert len(data) < 1000 * (256 + 32 + 60)
    tensors = safetensors.numpy.load(data)
    assert (tensors["vectors"] == vectors).all()
    assert tensors["leaves"].shape == (1000, 32)


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_a_changed_file_is_refused(data: st.DataObject) -> None:
    passages, vectors = some_passages(BLOCK + 3, 4)
    file = bytearray(PrimaryShard.build(passages, vectors))
    info = shard_info(bytes(file), passages, vectors)
    begin = 8 + int.from_bytes(file[:8], "little")
    place = data.draw(st.integers(begin, len(file) - 1))
    file[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(WireError):
        Shard.parse(bytes(file), info, 4).check({})


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_a_changed_header_is_refused_or_says_the_same(data: st.DataObject) -> None:
    passages, vectors = some_passages(BLOCK + 3, 4)
    file = bytearray(PrimaryShard.build(passages, vectors))
    info = shard_info(bytes(file), passages, vectors)
    place = data.draw(st.integers(0, 7 + int.from_bytes(file[:8], "little")))
    file[place] ^= data.draw(st.integers(1, 255))
    try:
        shard = Shard.parse(bytes(file), info, 4)
        shard.check({})
    except WireError:
        return
    assert isinstance(shard, PrimaryShard)
    assert list(shard.passages()) == passages
    assert shard.search(vectors, 3)[1].max() == (vectors.astype(int) @ vectors.T.astype(int)).max()


@given(st.integers(0, 5000))
def test_a_cut_file_is_refused(size: int) -> None:
    passages, vectors = some_passages(BLOCK + 3, 4)
    file = PrimaryShard.build(passages, vectors)
    info = shard_info(file, passages, vectors)
    with pytest.raises(WireError):
        Shard.parse(file[: min(size, len(file) - 1)], info, 4)
    with pytest.raises(WireError):
        Shard.parse(file + bytes(1 + size), info, 4)


def test_other_dimensions_and_too_large_a_file_are_refused() -> None:
    passages, vectors = some_passages(10)
    file = PrimaryShard.build(passages, vectors)
    info = shard_info(file, passages, vectors)
    with pytest.raises(WireError):
        Shard.parse(file, info, 9)
    small = ShardInfo(info.cell, info.root, info.leaves, len(file) // 2)
    with pytest.raises(WireError, match=f"at most {most_bytes(small)}"):
        Shard.parse(file, small, 8)
    with pytest.raises(WireError):
        Shard.parse(file, ShardInfo(info.cell, info.root, info.leaves - 1, info.size), 8)


def test_a_block_that_inflates_to_far_more_is_refused_early() -> None:
    passages, vectors = some_passages(BLOCK, 4)
    shard = opened(PrimaryShard.build(passages, vectors), passages, vectors)
    bomb = io.BytesIO()
    compressor = zlib.compressobj(9)
    for _ in range(16):
        bomb.write(compressor.compress(bytes(2**24)))
    bomb.write(compressor.flush())
    block = np.frombuffer(bomb.getvalue(), np.uint8)
    with pytest.raises(WireError, match="too large"):
        PrimaryShard(vectors, shard._leaves, shard._revoked, np.array([0, len(block)], np.int64), block).read(
            [3]
        )


def test_passages_whose_products_are_largest_are_exact() -> None:
    vectors = np.full((4, 1024), -128, np.int8)
    vectors[1, 0] = -127
    passages, _ = some_passages(4)
    positions, scores = opened(PrimaryShard.build(passages, vectors), passages, vectors).search(
        vectors[:1], 4
    )
    assert positions.tolist() == [[0, 2, 3, 1]]
    assert scores.tolist() == [[2**24] * 3 + [2**24 - 128]]
