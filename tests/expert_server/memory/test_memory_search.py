"""What a search of shards finds, and which vectors stay in memory for the next one."""

import sys
from copy import copy
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from memory_folders import shard_info, some_passages
from numpy.typing import NDArray
from shard_samples import opened, secondary, shards

from dht.memory import Passage, Vectors
from expert_server.memory import search
from expert_server.memory.search import Best, VectorCache, search_together
from expert_server.memory.shard import PrimaryShard, Shard, most_bytes
from peer.files import PlainFile


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
    _, positions, scores = search_together([shard], queries, k)
    exact = queries.astype(np.int64) @ vectors.T.astype(np.int64)
    for row in range(3):
        live = [position for position in range(len(passages)) if position not in gone]
        best = [position for _, position in sorted((-exact[row, position], position) for position in live)][
            :k
        ]
        assert positions[row].tolist() == best
        assert scores[row].tolist() == exact[row, best].tolist()


WAYS = [
    way
    for way in (search._byte_products, search._float_products, search._rounded_products)
    if search._is_right(way)
]
"""The ways to multiply vectors that are right on this processor."""


@given(st.lists(shards(), min_size=1, max_size=4), st.integers(1, 40), st.sampled_from(WAYS))
@settings(deadline=None)
def test_shards_are_searched_together_as_one(
    built: list[tuple[list[Passage], Vectors]], k: int, way: search.Way
) -> None:
    dimensions = 32  # enough for each way
    some, every = [], []
    for number, (passages, vectors) in enumerate(built):
        vectors = np.resize(vectors, (len(passages), dimensions))
        some.append(opened(PrimaryShard.build(passages, vectors), passages, vectors))
        every += [(number, position, vector) for position, vector in enumerate(vectors.astype(int))]
    query = np.array([-128, 127, 5, -3, 0, 1, 77, -77], np.int8).repeat(4)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(search, "_quickest_way", lambda queries, dimensions: way)
        found = search_together(some, query[None], k)
    ranked = sorted(
        (-int(query.astype(int) @ vector), number, position) for number, position, vector in every
    )[:k]
    numbers, positions, scores = (array[0].tolist() for array in found)
    assert [(-score, *place) for score, *place in zip(scores, numbers, positions, strict=True)] == ranked


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sign", [-1, 1])
def test_passages_that_differ_less_than_products_are_rounded_are_ranked(
    way: search.Way, sign: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "_quickest_way", lambda queries, dimensions: way)
    rng = np.random.default_rng(0)
    passages, _ = some_passages(500)
    alike = rng.integers(-100, 100, 256) + rng.integers(-1, 2, (500, 256))
    vectors = alike.astype(np.int8)
    shard: Shard = opened(PrimaryShard.build(passages, vectors), passages, vectors)
    gone = set(range(0, 500, 7))
    file = shard.without({shard.root: gone})
    assert file is not None
    shard = Shard.parse(file, replace(shard_info(b"", passages, vectors), size=len(file)), 256)
    queries = (sign * vectors[:3]).astype(np.int8)
    _, positions, scores = search_together([shard], queries, 20)
    exact = queries.astype(int) @ vectors.T.astype(int)
    rounded = torch.from_numpy(exact).bfloat16()
    assert all(len(row.unique()) < 20 for row in rounded)
    for row in range(3):
        ranked = sorted((-exact[row, position], position) for position in set(range(500)) - gone)[:20]
        assert list(zip((-scores[row]).tolist(), positions[row].tolist(), strict=True)) == ranked


@given(
    arrays.arrays(np.int32, st.integers(1, 400), elements=st.integers(-4, 4) | st.just(search.NO_SCORE)),
    st.integers(1, 40),
)
def test_the_bound_of_the_best_is_reached_by_as_many_as_are_wanted(
    products: NDArray[np.int32], k: int
) -> None:
    bound = search._bound_of_best(products, k)
    assert bound > search.NO_SCORE
    assert (products >= bound).sum() >= min(k, int((products > search.NO_SCORE).sum()))


@pytest.mark.parametrize("k", [1, 10, 128])
def test_few_products_reach_the_bound_of_the_best(k: int) -> None:
    products = np.random.default_rng(0).permutation(10_000).astype(np.int32)
    assert (products >= search._bound_of_best(products, k)).sum() < 2 * k


@given(
    st.lists(st.lists(st.integers(-5, 5), min_size=1, max_size=6), min_size=1, max_size=5), st.integers(1, 8)
)
def test_merged_results_are_those_of_one_search(shards: list[list[int]], k: int) -> None:
    best, every = Best(1, k), []
    for number, scores in enumerate(shards):
        ranked = sorted((-score, position) for position, score in enumerate(scores))[:k]
        best.add(
            np.array([0]),
            np.full((1, len(ranked)), number),
            np.array([[position for _, position in ranked]]),
            np.array([[-score for score, _ in ranked]], np.int32),
        )
        every += [(-score, number, position) for position, score in enumerate(scores)]
    expected = sorted(every)[:k]
    count = len(expected)
    found = zip(-best.scores[0, :count], best.shards[0, :count], best.positions[0, :count], strict=True)
    assert [tuple(map(int, each)) for each in found] == expected


def test_passages_whose_products_are_largest_are_exact() -> None:
    vectors = np.full((4, 1024), -128, np.int8)
    vectors[1, 0] = -127
    passages, _ = some_passages(4)
    shard = opened(PrimaryShard.build(passages, vectors), passages, vectors)
    _, positions, scores = search_together([shard], vectors[:1], 4)
    assert positions.tolist() == [[0, 2, 3, 1]]
    assert scores.tolist() == [[2**24] * 3 + [2**24 - 128]]


def on_disk(folder: Path, seed: int) -> PrimaryShard:
    passages, vectors = some_passages(50, seed)
    data = PrimaryShard.build(passages, vectors)
    path = folder / str(seed)
    path.write_bytes(data)
    return opened(data, passages, vectors).on_disk(PlainFile(path), data)


def stretches(cache: VectorCache, some: list[PrimaryShard], *numbers: int) -> list[list[int]]:
    """Which of these shards are read together. The content of each is checked."""
    found = []
    for rows_ND, together in cache.stretches([some[number] for number in numbers]):
        found.append([numbers[each] for each in together])
        assert rows_ND.tolist() == np.concatenate([EXPECTED[number] for number in found[-1]]).tolist()
    return found


EXPECTED = [some_passages(50, seed)[1] for seed in range(5)]
BYTES = EXPECTED[0].nbytes


def test_shards_that_were_searched_last_are_not_read_again(tmp_path: Path) -> None:
    some = [on_disk(tmp_path, seed) for seed in range(3)]
    cache = VectorCache(2 * BYTES, BYTES)
    for number in (0, 1, 0, 2):
        stretches(cache, some, number)
    for path in tmp_path.iterdir():
        path.unlink()
    for number in (0, 2):
        stretches(cache, some, number)
    with pytest.raises(FileNotFoundError):
        stretches(cache, some, 1)


def test_shards_that_lie_together_are_one_stretch(tmp_path: Path) -> None:
    some = [on_disk(tmp_path, seed) for seed in range(5)]
    cache = VectorCache(block_bytes=3 * BYTES)
    assert stretches(cache, some, 2, 0, 1, 3) == [[2], [0], [1], [3]]
    assert sorted(stretches(cache, some, 3, 1, 4, 2)) == [[1], [2], [3], [4]]
    assert sorted(stretches(cache, some, 0, 1, 2, 3, 4)) == [[2, 0, 1], [3, 4]]


def test_vectors_go_from_memory_with_their_shard(tmp_path: Path) -> None:
    some = [on_disk(tmp_path, seed) for seed in range(3)]
    cache = VectorCache(block_bytes=2 * BYTES)
    stretches(cache, some, 0, 1, 2)
    kept = max((rows_ND for rows_ND, _ in cache.stretches(some)), key=len)
    assert (len(kept), cache.nbytes) == (100, 4 * BYTES)
    del some[1:]
    assert cache.nbytes == 2 * BYTES
    assert kept[:50].any()
    assert not kept[50:].any()


def search_until(moment: int, cache: VectorCache, some: list[PrimaryShard], going: list[PrimaryShard]) -> int:
    """Searches for these shards, and ends the others before the search executes this line. Returns its lines."""
    lines = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal lines
        lines += frame.f_code.co_filename == search.__file__ and event == "line"
        if lines > moment:
            going.clear()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for shard in some:
            list(cache.stretches([shard]))
    finally:
        sys.settrace(before)
    return lines


def test_a_shard_may_go_at_any_moment_of_a_search(tmp_path: Path) -> None:
    samples = [on_disk(tmp_path, seed) for seed in range(5)]
    moment, lines = 0, 1
    while moment < lines:
        some, going = [copy(shard) for shard in samples[2:]], [copy(shard) for shard in samples[:2]]
        cache = VectorCache(2 * BYTES, BYTES)
        assert stretches(cache, going, 0, 1) == [[0], [1]]
        lines = search_until(moment, cache, some, going)
        going.clear()
        assert len(list(cache.stretches(some))) == 3
        assert cache.nbytes == 2 * BYTES
        some.clear()
        assert cache.nbytes == 0
        moment += 1
    assert moment > 50
