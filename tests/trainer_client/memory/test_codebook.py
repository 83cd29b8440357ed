"""Codebooks: which cells are nearest, and files that strangers invented."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from peer.arrays import encode_arrays
from peer.errors import WireError
from trainer_client.memory.codebook import Codebook

CENTROIDS = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float16)


@given(arrays_of.arrays(np.int8, (5, 4)), st.integers(1, 8))
def test_a_vector_lies_in_the_cells_with_the_largest_cosines(vectors: np.ndarray, count: int) -> None:
    cells = Codebook(CENTROIDS).assign(vectors, count)
    assert cells.shape == (5, min(count, 6))
    scores = Codebook(CENTROIDS).scores(vectors)
    assert scores.dtype == np.float32
    for vector, row, found in zip(vectors.astype(np.float64), scores, cells, strict=True):
        expected = CENTROIDS.astype(np.float64) @ vector / (np.linalg.norm(vector) or 1)
        np.testing.assert_allclose(row, expected, atol=1e-4)
        assert len(set(found)) == len(found)
        assert list(row[found]) == sorted(row, reverse=True)[:count]


def test_many_vectors_get_the_scores_of_few() -> None:
    centroids = np.random.default_rng(1).normal(size=(64, 256)).astype(np.float16)
    vectors = np.random.default_rng(2).integers(-127, 128, (5000, 256), np.int8)
    codebook = Codebook(centroids)
    np.testing.assert_allclose(codebook.scores(vectors)[-3:], codebook.scores(vectors[-3:]), atol=1e-3)


def test_a_file_gives_the_same_codebook() -> None:
    data = Codebook(CENTROIDS).to_bytes()
    again = Codebook.from_bytes(memoryview(data), (2, 3), 4)
    assert again.to_bytes() == data
    np.testing.assert_array_equal(
        again.scores(np.ones((1, 4), np.int8)), Codebook(CENTROIDS).scores(np.ones((1, 4), np.int8))
    )


@pytest.mark.parametrize(
    "data",
    [
        b"no file",
        encode_arrays({}),
        encode_arrays({"centroids": CENTROIDS.astype(np.float32)}),
        encode_arrays({"centroids": CENTROIDS[:5]}),
        encode_arrays({"centroids": CENTROIDS, "more": CENTROIDS}),
        encode_arrays({"centroids": np.full((6, 4), np.nan, np.float16)}),
        encode_arrays({"centroids": np.full((6, 4), np.inf, np.float16)}),
    ],
)
def test_a_file_that_is_no_codebook_of_this_grid_is_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        Codebook.from_bytes(data, (2, 3), 4)
