"""Which way a call's gradients move an expert, in few numbers, to compare callers with each other.

Shape suffixes: R = rows, D = width, K = `_SIZE`.
"""

import secrets
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.linalg import vector_norm

from expert_server.experts.graphs import Rows

_SIZE = 16
_MOST_ROWS = 256
"""The most rows of a call that a sketch is computed from."""
_TINY = 1e-12


@cache
def _projections(width: int) -> Tensor:
    """Two random matrices [D, K] with orthonormal columns; K is at most D.

    Only this process knows them. Otherwise a caller could make gradients that look harmless.
    """
    generator = torch.Generator().manual_seed(secrets.randbits(63))
    orthonormal: Tensor = torch.linalg.qr(torch.randn(2, width, _SIZE, generator=generator))[0]
    return orthonormal


def direction_of(rows: Rows) -> NDArray[np.float64]:
    """A sketch [K * K] of the gradient that a linear map from inputs to updates would get from these rows.

    Inputs count by their direction alone, as they do in a block that begins with a norm.
    """
    assert rows.gradients is not None, "only backward has gradients"
    step = -(-len(rows) // _MOST_ROWS)
    sample = slice(secrets.randbelow(step), None, step)
    of_inputs_DK, of_gradients_DK = _projections(rows.inputs.shape[1])
    x_RK = rows.inputs[sample] @ of_inputs_DK
    x_RK /= vector_norm(x_RK, dim=1, keepdim=True) + _TINY
    g_RK = rows.gradients[sample] @ of_gradients_DK
    sketch: NDArray[np.float64] = (g_RK.T @ x_RK).numpy().astype(np.float64).ravel()
    return step * sketch
