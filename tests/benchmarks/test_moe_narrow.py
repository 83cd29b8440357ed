"""All ways of computing the bound for narrow experts give the same result."""

import pytest
import torch
from torch import Tensor

from benchmarks.moe_narrow import WAYS, NarrowBound, Sizes, Way

SIZES = Sizes((3, 12, 16), (2, 3), width=8, heads=1, feed_forward=16, top_k=2)


def parameters_after_steps(way: Way) -> list[Tensor]:
    """The parameters of each expert. They start with the same values in every way."""
    torch.default_generator.manual_seed(0)
    bound = NarrowBound(SIZES, way)
    for _ in range(2):
        bound.step()
    blocks = list(bound._experts.blocks)
    if way == "loop":
        return [torch.stack(same) for same in zip(*(block.parameters() for block in blocks), strict=True)]
    return list(blocks[0].parameters())


@pytest.mark.parametrize("way", WAYS[1:])
def test_all_ways_take_the_same_steps(way: Way) -> None:
    torch.testing.assert_close(
        parameters_after_steps(way), parameters_after_steps("loop"), rtol=1e-3, atol=1e-4
    )
