"""Groups a memory's vectors into cells by spherical k-means, and chooses the two cells of each vector.

Shapes: N vectors, C cells in row-major order, D numbers in a vector.
"""

from collections.abc import Callable
from math import prod

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_matrix

from dht.memory import Vectors
from peer.codec import Floats, Integers
from trainer_client.memory.codebook import Codebook

_SAMPLE = 100_000
"""Vectors that the centroids are fitted to."""
_ROUNDS = 20
_ROWS = 4096
"""Vectors whose scores are computed at once."""
_ORTHOGONALITY = 1.0
"""How important it is that the second cell errs in another direction than the first: λ in the paper."""


def grid_for(passages: int) -> tuple[int, int]:
    """The grid for a memory of this many passages, so that cells have neither very few nor very many."""
    branches = 4 if passages < 5_000 else 16 if passages < 4_000_000 else 64
    return branches, branches


def build_codebook(
    vectors_ND: Vectors,
    grid: tuple[int, ...],
    seed: int = 0,
    watch: Callable[[int, int], None] = lambda done, rounds: None,
) -> Codebook:
    """Centroids for the cells of a grid. Deterministic for the same vectors and seed. `watch` is called after each
    round.

    All cells are fitted at once, not level by level, because searches then find more (docs/decisions.md). Then cells
    that are near each other are placed under one prefix.
    """
    rng = np.random.default_rng(seed)
    rows = np.flatnonzero(vectors_ND.any(axis=1))
    if len(rows) > _SAMPLE:
        rows = np.sort(rng.choice(rows, _SAMPLE, replace=False))
    sample_ND = _units(vectors_ND[rows])
    centroids_CD = _fitted(sample_ND, prod(grid), rng, watch)
    return Codebook(_as_tree(centroids_CD, grid, rng).astype(np.float16))


def two_cells(codebook: Codebook, vectors_ND: Vectors) -> Integers:
    """The numbers of two different cells for each vector, (N, 2), or (N, 1) if there is only one cell. The first is the
    nearest. The second errs in another direction, so that a question that misses a passage's first cell finds the
    second: Sun et al. 2023 (SOAR, arXiv 2404.00774), section 3.
    """
    centroids_CD = codebook.centroids_CD.astype(np.float32)
    found = [np.empty((0, min(2, len(centroids_CD))), np.int64)]
    for begin in range(0, len(vectors_ND), _ROWS):
        found.append(_two_cells(_units(vectors_ND[begin : begin + _ROWS]), centroids_CD))
    return np.concatenate(found)


def _two_cells(units_BD: Floats, centroids_CD: Floats) -> Integers:
    scores_BC = units_BD @ centroids_CD.T
    first_B: Integers = scores_BC.argmax(axis=1)
    if len(centroids_CD) == 1:
        return first_B.reshape(-1, 1)
    squares_C = np.einsum("cd,cd->c", centroids_CD, centroids_CD)
    error_BD = units_BD - centroids_CD[first_B]
    error_BD /= np.maximum(np.linalg.norm(error_BD, axis=1, keepdims=True), np.float32(1e-9))
    # the component of another cell's error along the first cell's
    along_BC = np.einsum("bd,bd->b", error_BD, units_BD)[:, None] - error_BD @ centroids_CD.T
    loss_BC = squares_C - 2 * scores_BC + np.float32(_ORTHOGONALITY) * along_BC**2
    loss_BC[np.arange(len(first_B)), first_B] = np.inf
    return np.stack([first_B, loss_BC.argmin(axis=1)], axis=1)


def _units(vectors: Vectors) -> Floats:
    numbers = vectors.astype(np.float32)
    numbers /= np.maximum(np.linalg.norm(numbers, axis=1, keepdims=True), np.float32(1))
    return numbers


def _fitted(
    sample_ND: Floats, count: int, rng: np.random.Generator, watch: Callable[[int, int], None]
) -> Floats:
    """Centroids by Lloyd's algorithm, as unit vectors. If there are fewer vectors than centroids, the remaining
    centroids are random.
    """
    random_CD = rng.standard_normal((count, sample_ND.shape[1])).astype(np.float32)
    random_CD /= np.linalg.norm(random_CD, axis=1, keepdims=True)
    if not len(sample_ND):
        return random_CD
    chosen = rng.permutation(len(sample_ND))[:count]
    centroids_CD = np.concatenate([sample_ND[chosen], random_CD[len(chosen) :]])
    for done in range(_ROUNDS):
        nearest_N, scores_N = _nearest(sample_ND, centroids_CD)
        members = csr_matrix(
            (np.ones(len(nearest_N), np.float32), (nearest_N, np.arange(len(nearest_N)))),
            (count, len(nearest_N)),
        )
        sums_CD = members @ sample_ND
        empty = np.flatnonzero(np.bincount(nearest_N, minlength=count) == 0)[: len(sample_ND)]
        # at the vectors that the centroids fit worst
        sums_CD[empty] = sample_ND[np.argsort(scores_N, kind="stable")[: len(empty)]]
        length_C1 = np.linalg.norm(sums_CD, axis=1, keepdims=True)
        centroids_CD = np.where(length_C1 > 1e-6, sums_CD / np.maximum(length_C1, 1e-6), centroids_CD)
        watch(done + 1, _ROUNDS)
    return centroids_CD


def _nearest(sample_ND: Floats, centroids_CD: Floats) -> tuple[Integers, Floats]:
    """The nearest centroid of each vector, and its score."""
    nearest, scores = [], []
    for begin in range(0, len(sample_ND), _ROWS):
        scores_BC = sample_ND[begin : begin + _ROWS] @ centroids_CD.T
        nearest.append(scores_BC.argmax(axis=1))
        scores.append(scores_BC.max(axis=1))
    return np.concatenate(nearest), np.concatenate(scores)


def _as_tree(centroids_CD: Floats, grid: tuple[int, ...], rng: np.random.Generator) -> Floats:
    """The centroids in row-major order of the grid: groups of equal size, of centroids that are near each other."""
    branches, *below = grid
    if not below:
        return centroids_CD
    heads = _fitted(centroids_CD, branches, rng, lambda done, rounds: None)
    places = np.repeat(heads, prod(below), axis=0)
    _, place_C = linear_sum_assignment(-(centroids_CD @ places.T).astype(np.float64))
    ordered_CD = centroids_CD[np.argsort(place_C)]
    groups = np.split(ordered_CD, branches)
    return np.concatenate([_as_tree(group, tuple(below), rng) for group in groups])
