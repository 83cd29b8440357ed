"""Chooses one of several states: the medoid, which is the one nearest to the others. Pure.

A peer that takes over a state (a node that adopts an expert, or a trainer that joins) asks up to `COMPARED` peers for
it, whatever they claim. The medoid is the state with the least sum of distances to the others. Unlike a mean, it is a
state that somebody has trained.
"""

import random
from collections.abc import Collection, Mapping, Sequence
from statistics import median

import torch
from torch import Tensor

from peer.clipping import Tensors

COMPARED = 3
"""How many states are asked for: the smallest number that has an honest majority if one of them is hostile."""


def medoid(states: Sequence[Tensors], known: Tensors, rng: random.Random) -> int:
    """The index of the state to take. Ties are broken at random.

    `states`: one to three, with the same names, shapes and float dtypes, and finite numbers. `known`: a state that this
    peer already has, a checkpoint or the initial parameters. It decides between two states: the nearer one is taken.

    If two of three states are at most d apart, the chosen one is at most d from both.
    """
    if len(states) == 1:
        return 0
    if len(states) == 2:
        squares = _squared_distances([*states, known])
        merits = [-squares[0][2], -squares[1][2]]
    else:
        squares = _squared_distances(states)
        # if the distance between the other two is the largest, this state's own distances have the least sum
        merits = [squares[1][2], squares[2][0], squares[0][1]]
    most = max(merits)
    return rng.choice([index for index, merit in enumerate(merits) if merit == most])


def elementwise_median(states: Sequence[Tensors], names: Collection[str]) -> dict[str, Tensor]:
    """The elementwise median of three states. Tensors that a state lacks count as zeros.

    For values that vary too much from state to state to be compared, such as moments. If one of the three states is
    hostile, each number lies between those of the other two. Raises ValueError unless there are three states.
    """
    if len(states) != 3:
        raise ValueError(f"the middle one of {len(states)} states was asked for, not of three")
    found = {}
    for name in names:
        like = next(state[name] for state in states if name in state)
        tensors = [state[name] if name in state else torch.zeros_like(like) for state in states]
        found[name] = torch.stack(tensors).median(dim=0).values
    return found


def _squared_distances(states: Sequence[Tensors]) -> list[list[float]]:
    """The squared distances between all pairs of states, as a matrix.

    Each tensor counts by its mean square, relative to the median of the states' own mean squares. So a large tensor
    counts no more than a small one, and one hostile state of three can't set the scale. A tensor that started as zeros
    may still be small, so it is measured relative to the whole state.
    """
    sizes = {name: [mean_square(state[name]) for state in states] for name in states[0]}
    whole = median(_whole(states[0], sizes, i) for i in range(len(states)))
    squares = [[0.0] * len(states) for _ in states]
    for name in states[0]:
        scale = max(median(sizes[name]), whole)
        for i in range(len(states)):
            for j in range(i) if scale else ():
                apart = mean_square(states[i][name].double() - states[j][name].double()) / scale
                squares[i][j] += apart
                squares[j][i] += apart
    return squares


def _whole(like: Tensors, sizes: Mapping[str, Sequence[float]], index: int) -> float:
    count = sum(tensor.numel() for tensor in like.values())
    return sum(sizes[name][index] * tensor.numel() for name, tensor in like.items()) / max(1, count)


def mean_square(tensor: Tensor) -> float:
    """The mean of the squares of a tensor's numbers; 0 if it has none."""
    return float(tensor.double().square().mean()) if tensor.numel() else 0.0
