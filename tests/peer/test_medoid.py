"""Of up to three states, one is chosen that a hostile minority cannot distort."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peer.medoid import _squared_distances, elementwise_median, medoid

State = dict[str, Tensor]

numbers = st.floats(-(2.0**100), 2.0**100, width=32)
seeds = st.integers(0, 2**32)
RNG = random.Random(0)
SHAPES = {"weight": (4, 6), "bias": (6,), "scale": ()}


def trained(seed: int, move: float = 0.01) -> State:
    """A state. Those with different seeds began alike, and were trained separately."""
    begin, apart = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=begin) + move * torch.randn(shape, generator=apart)
        for name, shape in SHAPES.items()
    }


@st.composite
def anything(draw: st.DrawFn) -> State:
    """A hostile state: noise, constants, flipped or scaled parameters, or one wrong tensor."""
    honest = trained(draw(seeds))
    made: dict[str, State] = {
        "noise": {name: torch.randn_like(tensor) for name, tensor in honest.items()},
        "constant": {name: torch.full_like(tensor, draw(numbers)) for name, tensor in honest.items()},
        "scaled": {name: draw(st.floats(-3, 3)) * tensor for name, tensor in honest.items()},
        "one": honest | {"bias": torch.full((6,), draw(numbers))},
        "drifted": {name: tensor + draw(st.floats(-1, 1)) for name, tensor in honest.items()},
    }
    return made[draw(st.sampled_from(sorted(made)))]


@given(seeds, seeds, anything(), st.permutations(range(3)))
def test_of_three_an_honest_one_is_taken_or_one_as_near(
    first: int, second: int, hostile: State, order: list[int]
) -> None:
    """If the honest states are the nearest pair, one of them is chosen. The chosen state is never further from an
    honest one than the two honest ones are from each other.
    """
    states = [[trained(first), trained(second), hostile][n] for n in order]
    one, other, lie = (order.index(n) for n in range(3))
    apart = _squared_distances(states)
    taken = medoid(states, {}, RNG)
    assert max(apart[taken][one], apart[taken][other]) <= apart[one][other]
    if apart[one][other] < min(apart[lie][one], apart[lie][other]):
        assert taken != lie


@given(seeds, anything(), st.booleans())
def test_of_two_the_nearer_to_what_is_known_is_taken(seed: int, hostile: State, is_first: bool) -> None:
    known, honest = trained(0, move=0), trained(seed)
    states = [hostile, honest] if is_first else [honest, hostile]
    apart = _squared_distances([*states, known])
    taken = medoid(states, known, RNG)
    assert apart[taken][2] == min(apart[0][2], apart[1][2])


def test_a_large_tensor_decides_no_more_than_a_small_one() -> None:
    """Two of three states differ a little in a tensor with many numbers. In the third, a tensor with few numbers is
    flipped.
    """
    large = torch.ones(10_000)
    states = [
        {"large": 1.00 * large, "small": torch.ones(2)},
        {"large": 1.05 * large, "small": torch.ones(2)},
        {"large": 1.01 * large, "small": -torch.ones(2)},
    ]
    assert {medoid(states, {}, random.Random(n)) for n in range(8)} <= {0, 1}


def test_no_scale_is_set_by_the_hostile_one() -> None:
    """Huge numbers in one tensor do not hide errors in another."""
    honest = [trained(1), trained(2)]
    hostile = honest[0] | {"bias": torch.full((6,), 1e30), "weight": -honest[0]["weight"]}
    assert medoid([hostile, *honest], {}, RNG) != 0


def test_equal_states_are_drawn_and_one_is_taken_as_it_is() -> None:
    assert {medoid([trained(1)] * 3, {}, random.Random(n)) for n in range(32)} == {0, 1, 2}
    assert {medoid([trained(1)] * 2, trained(2), random.Random(n)) for n in range(32)} == {0, 1}
    assert medoid([trained(1)], {}, RNG) == 0


@given(st.lists(numbers, min_size=3, max_size=3), st.permutations(range(3)))
def test_the_median_lies_between_the_honest_numbers(values: list[float], order: list[int]) -> None:
    """This holds whichever of the three is hostile."""
    (found,) = elementwise_median([{"m": torch.tensor([values[n]])} for n in order], ["m"])["m"].tolist()
    for hostile in range(3):
        honest = [torch.tensor(v).item() for n, v in enumerate(values) if n != hostile]
        assert min(honest) <= found <= max(honest)


def test_a_moment_that_one_lacks_counts_as_zeros() -> None:
    states = [{"m": torch.tensor([3.0, -1.0])}, {"m": torch.tensor([2.0, 5.0])}, {}]
    assert elementwise_median(states, ["m"])["m"].tolist() == [2.0, 0.0]
    with pytest.raises(ValueError, match="of 2 states"):
        elementwise_median(states[:2], ["m"])
