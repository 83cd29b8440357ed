"""Shards of memories: what is built is found and proven, what was changed is refused, and what was revoked is gone."""

import io
import zlib

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from memory_folders import shard_info, some_passages

from dht.memory import Passage, ShardInfo
from expert_server.memory import shard as shard_module
from expert_server.memory.shard import BLOCK, Shard, Vectors, most_bytes, search_together
from peer.errors import WireError
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


def opened(data: bytes, passages: list[Passage], vectors: Vectors) -> Shard:
    return Shard.parse(data, shard_info(data, passages, vectors), vectors.shape[1])


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
    data = Shard.build(passages, vectors)
    info = shard_info(data, passages, vectors)
    shard = Shard.parse(data, info, vectors.shape[1])
    shard.check(frozenset())
    assert list(shard.passages()) == passages
    for position, proven in enumerate(shard.read(range(len(passages)))):
        assert proven.passage == passages[position]
        leaf = passages[position].leaf(proven.vector)
        assert shard.leaf(position) == leaf
        assert proven.vector == vectors[position].tobytes()
        assert proves(info.root, leaf, position, info.leaves, proven.path)


@given(shards(), st.data())
@settings(deadline=None)
def test_search_is_exact_and_never_finds_what_was_revoked(
    built: tuple[list[Passage], Vectors], data: st.DataObject
) -> None:
    passages, vectors = built
    gone = data.draw(st.sets(st.integers(0, len(passages) - 1)))
    shard = opened(Shard.build(passages, vectors), passages, vectors)
    revoked = {shard.leaf(position) for position in gone}
    gone = {position for position in range(len(passages)) if shard.leaf(position) in revoked}
    file = shard.without(revoked)
    assert (file is None) == (not gone)
    if file is not None:
        shard = Shard.parse(file, shard_info(file, passages, vectors), vectors.shape[1])
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
        some.append(opened(Shard.build(passages, vectors), passages, vectors))
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
    whole = opened(Shard.build(passages, vectors), passages, vectors)
    gone = [0, BLOCK - 1, BLOCK, 3 * BLOCK + 6]
    leaves = {whole.leaf(position) for position in gone}
    file = whole.without(leaves)
    assert file is not None
    shard = Shard.parse(file, shard_info(file, passages, vectors), 8)
    assert shard.without(leaves) is None
    for position, proven in enumerate(shard.read(range(len(passages)))):
        assert shard.leaf(position) == whole.leaf(position)
        assert (proven.passage is None) == (position in gone)
        assert any(proven.vector) == (position not in gone)
    inflated = b"".join(zlib.decompress(shard._block(block)) for block in range(4))
    assert all(passages[position].text.encode() not in inflated for position in gone)
    assert passages[1].text.encode() in inflated
    # a host can't use a revocation that there was not to keep a passage from others
    with pytest.raises(WireError, match="not revoked"):
        shard.check(leaves - {whole.leaf(0)})


def test_the_file_is_small_and_the_same_each_time_and_others_can_read_it() -> None:
    passages, vectors = some_passages(1000, 256)
    data = Shard.build(passages, vectors)
    assert data == Shard.build(passages, vectors)
    assert len(data) < 1000 * (256 + 32 + 60)
    tensors = safetensors.numpy.load(data)
    assert (tensors["vectors"] == vectors).all()
    assert tensors["leaves"].shape == (1000, 32)


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_a_changed_file_is_refused(data: st.DataObject) -> None:
    passages, vectors = some_passages(BLOCK + 3, 4)
    file = bytearray(Shard.build(passages, vectors))
    info = shard_info(bytes(file), passages, vectors)
    begin = 8 + int.from_bytes(file[:8], "little")
    place = data.draw(st.integers(begin, len(file) - 1))
    file[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(WireError):
        Shard.parse(bytes(file), info, 4).check(frozenset())


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_a_changed_header_is_refused_or_says_the_same(data: st.DataObject) -> None:
    passages, vectors = some_passages(BLOCK + 3, 4)
    file = bytearray(Shard.build(passages, vectors))
    info = shard_info(bytes(file), passages, vectors)
    place = data.draw(st.integers(0, 7 + int.from_bytes(file[:8], "little")))
    file[place] ^= data.draw(st.integers(1, 255))
    try:
        shard = Shard.parse(bytes(file), info, 4)
        shard.check(frozenset())
    except WireError:
        return
    assert list(shard.passages()) == passages
    assert shard.search(vectors, 3)[1].max() == (vectors.astype(int) @ vectors.T.astype(int)).max()


@given(st.integers(0, 5000))
def test_a_cut_file_is_refused(size: int) -> None:
    passages, vectors = some_passages(BLOCK + 3, 4)
    file = Shard.build(passages, vectors)
    info = shard_info(file, passages, vectors)
    with pytest.raises(WireError):
        Shard.parse(file[: min(size, len(file) - 1)], info, 4)
    with pytest.raises(WireError):
        Shard.parse(file + bytes(1 + size), info, 4)


def test_other_dimensions_and_too_large_a_file_are_refused() -> None:
    passages, vectors = some_passages(10)
    file = Shard.build(passages, vectors)
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
    shard = opened(Shard.build(passages, vectors), passages, vectors)
    bomb = io.BytesIO()
    compressor = zlib.compressobj(9)
    for _ in range(16):
        bomb.write(compressor.compress(bytes(2**24)))
    bomb.write(compressor.flush())
    block = np.frombuffer(bomb.getvalue(), np.uint8)
    with pytest.raises(WireError, match="too large"):
        Shard(vectors, shard._leaves, shard._revoked, np.array([0, len(block)], np.int64), block).read([3])


def test_passages_whose_products_are_largest_are_exact() -> None:
    vectors = np.full((4, 1024), -128, np.int8)
    vectors[1, 0] = -127
    passages, _ = some_passages(4)
    positions, scores = opened(Shard.build(passages, vectors), passages, vectors).search(vectors[:1], 4)
    assert positions.tolist() == [[0, 2, 3, 1]]
    assert scores.tolist() == [[2**24] * 3 + [2**24 - 128]]
