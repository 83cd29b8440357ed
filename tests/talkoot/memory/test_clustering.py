"""Cells: k-means finds groups, near cells share a prefix, and each passage is in two cells."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dht.memory import Vectors
from talkoot.memory.clustering import build_codebook, grid_for, two_cells
from trainer_client.memory.codebook import Codebook
from trainer_client.memory.encoder import to_vectors


def groups(count: int, each: int, dimensions: int = 16, spread: float = 0.1, seed: int = 0) -> Vectors:
    """Vectors around several directions, one group after another."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(count, dimensions)) / np.sqrt(dimensions)
    members = centers.repeat(each, 0) + spread * rng.normal(size=(count * each, dimensions)) / np.sqrt(
        dimensions
    )
    return to_vectors(members.astype(np.float32))


def test_each_group_is_found() -> None:
    cells = two_cells(build_codebook(groups(4, 50), (2, 2), seed=3), groups(4, 50))
    assert all(len(set(cells[group * 50 : group * 50 + 50, 0])) == 1 for group in range(4))
    assert len(set(cells[::50, 0])) == 4


def test_cells_that_are_near_come_under_one_prefix() -> None:
    rng = np.random.default_rng(1)
    far = np.eye(4, 16).repeat(4, 0)  # four directions, and four cells near each
    vectors = to_vectors((far + 0.3 * rng.normal(size=(16, 16)) / 4).astype(np.float32)).repeat(20, 0)
    cells = two_cells(build_codebook(vectors, (4, 4)), vectors)[:, 0]
    for direction in range(4):
        assert len(set(cells[direction * 80 : direction * 80 + 80] // 4)) == 1


@given(st.integers(0, 40), st.sampled_from([(1,), (2,), (2, 2), (4, 4), (2, 2, 2)]), st.integers(0, 3))
def test_few_vectors_are_enough(count: int, grid: tuple[int, ...], seed: int) -> None:
    vectors = np.random.default_rng(seed).integers(-9, 10, (count, 8)).astype(np.int8)
    codebook = build_codebook(vectors, grid, seed)
    cells = int(np.prod(grid))
    again = Codebook.from_bytes(codebook.to_bytes(), grid, 8)
    found = two_cells(again, vectors)
    assert found.shape == (count, min(2, cells))
    assert ((found >= 0) & (found < cells)).all()
    np.testing.assert_array_equal(found[:, 0], again.scores(vectors).argmax(axis=1))
    if cells > 1:
        assert (found[:, 0] != found[:, 1]).all()


def test_the_same_vectors_and_seed_give_the_same_codebook() -> None:
    vectors = groups(6, 30, spread=1)
    once, again, other = (build_codebook(vectors, (4, 4), seed).to_bytes() for seed in (1, 1, 2))
    assert once == again != other


def test_the_second_cell_errs_in_another_direction_than_the_first() -> None:
    """Sun et al. 2023, section 3: the second cell is not the next nearest if another one's error is orthogonal to the
    first one's.
    """
    codebook = Codebook(np.array([[1, 0.2, 0], [1, 0.3, 0], [1, 0, 0.32], [-1, 0, 0]], np.float16))
    assert two_cells(codebook, np.array([[100, 0, 0]], np.int8)).tolist() == [[0, 2]]


@pytest.mark.parametrize(
    ("passages", "grid"), [(0, (4, 4)), (4_999, (4, 4)), (5_000, (16, 16)), (10**6, (16, 16))]
)
def test_small_memories_have_few_cells(passages: int, grid: tuple[int, int]) -> None:
    assert grid_for(passages) == grid
