"""Which way a call's gradients move an expert, in few numbers, to compare callers with each other.

Shape suffixes: R = rows, D = width, K = `_SIZE`.
"""

import secrets
from functools import cache
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expert_server.experts.graphs import Rows

_SIZE = 16
_MOST_ROWS = 256
"""The most rows of a call that a sketch is computed from."""
_TINY = np.float32(1e-12)


@cache
def _projections(width: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Two random matrices [D, K] with orthonormal columns; K is less than D. The columns for inputs sum to zero.

    Only this process knows them. Otherwise a caller could make gradients that look harmless.
    """
    rng = np.random.default_rng(secrets.randbits(128))
    matrices = rng.standard_normal((2, width, min(_SIZE, width - 1)))
    matrices[0] -= matrices[0].mean(axis=0)
    of_inputs, of_gradients = np.linalg.qr(matrices)[0].astype(np.float32)
    return of_inputs, of_gradients


def direction_of(rows: Rows) -> NDArray[np.float64]:
    """A sketch [K * K] of the gradient that a linear map from inputs to updates would get from these rows.

    Inputs count by their direction alone, and without their mean, as they do in a block that begins with a norm.
    """
    assert rows.gradients is not None, "only backward has gradients"
    step = -(-len(rows) // _MOST_ROWS)
    # numpy's calls take a third as long as torch's: with narrow experts, this is most of the time
    inputs_RD, gradients_RD = rows.inputs.numpy(), rows.gradients.numpy()
    if step > 1:
        sample = slice(secrets.randbelow(step), None, step)
        inputs_RD, gradients_RD = inputs_RD[sample], gradients_RD[sample]
    with np.errstate(over="ignore", invalid="ignore"):
        sketch = _sketch(inputs_RD, gradients_RD)
        # the sums may overflow float32 where a block that begins with a norm does not
        if not isfinite(sketch @ sketch):
            sketch = _sketch(inputs_RD.astype(np.float64), gradients_RD.astype(np.float64))
    return step * sketch


def _sketch(inputs_RD: NDArray[Any], gradients_RD: NDArray[Any]) -> NDArray[np.float64]:
    of_inputs_DK, of_gradients_DK = _projections(inputs_RD.shape[1])
    x_RK = inputs_RD @ of_inputs_DK
    x_RK /= np.sqrt(np.einsum("rk,rk->r", x_RK, x_RK))[:, None] + _TINY
    sketch_KK = (gradients_RD @ of_gradients_DK).T @ x_RK
    return sketch_KK.astype(np.float64).ravel()
