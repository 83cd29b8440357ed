"""A direction says which way gradients lead, in few numbers."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from expert_server.experts.direction import direction_of
from expert_server.experts.graphs import Rows


def make_rows(count: int, width: int, *, scale: float = 1.0, sign: float = 1.0, seed: int = 0) -> Rows:
    """Their gradients follow from the inputs by one matrix, and have noise of the same size."""
    generator = torch.Generator().manual_seed(seed)
    wanted = torch.randn(width, width, generator=torch.Generator().manual_seed(99)) / width**0.5
    inputs, noise = torch.randn(2, count, width, generator=generator)
    ones = torch.ones(count, dtype=torch.int64)
    return Rows(scale * inputs, ones, torch.zeros_like(ones), sign * (inputs @ wanted + noise))


def cosine(one: Rows, other: Rows) -> float:
    a, b = direction_of(one), direction_of(other)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize(("count", "width"), [(64, 8), (100, 64), (1000, 256)])
def test_gradients_of_one_task_agree_and_flipped_ones_oppose(count: int, width: int) -> None:
    honest = [make_rows(count, width, seed=seed) for seed in range(2)]
    agreement = cosine(*honest)
    assert agreement > 0.05
    assert cosine(honest[0], make_rows(count, width, sign=-1.0, seed=2)) < -0.05


def test_the_size_of_inputs_does_not_matter() -> None:
    """A block that begins with a norm does not see it either, so it must not hide what the gradients do."""
    for scale in (1e-6, 1e6):
        np.testing.assert_allclose(
            direction_of(make_rows(20, 32)),
            direction_of(make_rows(20, 32, scale=scale)),
            rtol=1e-3,
            atol=1e-4,
        )


@pytest.mark.parametrize("width", [8, 32, 256])
def test_what_all_numbers_of_an_input_have_in_common_does_not_matter(width: int) -> None:
    """A LayerNorm takes it away, so it must not hide what the gradients do either."""
    rows = make_rows(20, width)
    shifted = replace(rows, inputs=rows.inputs + 1000)
    np.testing.assert_allclose(direction_of(rows), direction_of(shifted), rtol=0.01, atol=0.05)


def test_more_rows_weigh_more_and_only_some_are_looked_at() -> None:
    few, many = (direction_of(make_rows(count, 16)) for count in (100, 1600))
    assert 4 < np.linalg.norm(many) / np.linalg.norm(few) < 64


@pytest.mark.parametrize("width", [8, 256])
def test_a_row_whose_sums_overflow_hides_no_other_rows(width: int) -> None:
    """Some blocks' norms turn such inputs into zeros, and the block then learns from the other rows."""
    plain, hiding = make_rows(100, width), make_rows(100, width)
    hiding.inputs[0] = 3.3e38
    assert cosine(plain, hiding) > 0.5


def test_gradients_at_the_end_of_float32_have_a_direction() -> None:
    rows = make_rows(100, 32)
    assert rows.gradients is not None
    huge = Rows(rows.inputs, rows.lengths, rows.positions, rows.gradients.sign() * 3.3e38)
    assert np.isfinite(direction_of(huge)).all()
