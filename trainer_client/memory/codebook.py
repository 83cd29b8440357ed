"""The codebook of a memory: the centroids of its cells, which decide where passages are stored and where to look for
them.

Shapes: B vectors, C cells in row-major order, D numbers in a vector.
"""

from collections.abc import Sequence
from math import prod
from typing import Self

import numpy as np
import numpy.typing as npt

from dht.memory import Vectors
from peer.arrays import decode_arrays, encode_arrays
from peer.codec import Floats, Integers
from peer.errors import WireError

_LARGEST = 1e3
_FEW_PRODUCTS = 2**26
"""Up to this many products are summed on this thread. BLAS would start a thread for each core, which is slow on a busy
machine: 16 vectors by 256 cells took 15 ms of CPU time instead of 0.2.
"""


class Codebook:
    """One centroid for each cell. A cell's score is the inner product with its centroid."""

    def __init__(self, centroids_CD: npt.NDArray[np.float16]) -> None:
        self.centroids_CD = centroids_CD
        self._columns_DC: Floats = np.ascontiguousarray(centroids_CD.T, np.float32)

    @classmethod
    def from_bytes(cls, data: bytes | memoryview, grid: Sequence[int], dimensions: int) -> Self:
        """Raises WireError unless there is a centroid of the right number of finite numbers for each cell of
        the grid.
        """
        arrays = decode_arrays(data)
        centroids_CD = arrays.get("centroids")
        if centroids_CD is None or len(arrays) != 1 or centroids_CD.dtype != np.float16:
            raise WireError(
                f"the codebook has the arrays {sorted(arrays)[:8]!r:.200} instead of centroids in float16"
            )
        if centroids_CD.shape != (prod(grid), dimensions):
            raise WireError(
                f"the codebook has the shape {centroids_CD.shape} instead of {(prod(grid), dimensions)}"
            )
        if not (np.abs(centroids_CD) <= _LARGEST).all():
            raise WireError("the codebook has numbers that are too large, or values that are not numbers")
        return cls(centroids_CD)

    def to_bytes(self) -> bytes:
        return encode_arrays({"centroids": self.centroids_CD})

    def scores(self, vectors_BD: Vectors) -> Floats:
        """The score of each vector for each cell, [B, C]: for unit vectors and centroids, the cosine."""
        numbers_BD = vectors_BD.astype(np.float32)
        length_B1 = np.linalg.norm(numbers_BD, axis=1, keepdims=True)
        scores_BC: Floats
        if len(numbers_BD) * self._columns_DC.size <= _FEW_PRODUCTS:
            scores_BC = np.einsum("bd,dc->bc", numbers_BD, self._columns_DC)
        else:
            scores_BC = numbers_BD @ self._columns_DC
        scores_BC /= np.where(length_B1 > 0, length_B1, np.float32(1))
        return scores_BC

    def assign(self, vectors_BD: Vectors, count: int = 2) -> Integers:
        """The numbers of the cells that are nearest to each vector, best first, [B, count]; all if there are fewer."""
        scores_BC = self.scores(vectors_BD)
        return np.argsort(-scores_BC, axis=1, kind="stable")[:, :count]
