"""If several hosts give a state, an expert continues with one that a hostile minority cannot distort."""

import random
from functools import cache

import pytest
import torch
from checkpoint_samples import AN_UID, MANIFEST, step
from hypothesis import given
from hypothesis import strategies as st

from expert_server.experts.expert import Expert
from expert_server.experts.format import ACCUMULATED_ROWS, BLOCK, OPTIMIZER, Checkpoint
from expert_server.hosting.whole_states import choose

RNG = random.Random(0)
seeds = st.integers(0, 2**32)


@cache
def after(updates: int) -> Checkpoint:
    return step(Expert(AN_UID, MANIFEST), updates).checkpoint()


FRESH, OLDER, ONE, OTHER = (after(updates) for updates in (0, 2, 4, 6))


def hostile(seed: int, count: int, copies_weights: bool) -> Checkpoint:
    """A hostile state: parameters of an honest state, or random ones, with random moments."""
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: tensor
        if copies_weights and name.startswith(BLOCK)
        else torch.randn(tensor.shape, generator=generator).abs()
        for name, tensor in ONE.state.items()
    }
    return Checkpoint(state, count)


@given(seeds, st.integers(1, 10**12), st.booleans(), st.permutations(range(3)))
def test_one_hostile_state_of_three_sets_no_parameter_no_moment_and_no_count(
    seed: int, count: int, copies_weights: bool, order: list[int]
) -> None:
    states = [[ONE, OTHER, hostile(seed, count, copies_weights)][n] for n in order]
    _, chosen = choose(states, FRESH, RNG)
    assert 4 <= chosen.update_count <= 6
    assert any(
        all(torch.equal(chosen.state[n], honest.state[n]) for n in honest.state if n.startswith(BLOCK))
        for honest in (ONE, OTHER)
    )
    for name in (name for name in ONE.state if name.startswith(OPTIMIZER)):
        pair = torch.stack([ONE.state[name], OTHER.state[name]])
        assert ((pair.amin(0) <= chosen.state[name]) & (chosen.state[name] <= pair.amax(0))).all()
    Expert(AN_UID, MANIFEST).import_state(chosen.state, chosen.update_count, "QmStranger")


@given(seeds, st.integers(0, 10**12), st.sampled_from([FRESH, OLDER]))
def test_of_two_the_nearer_to_what_this_node_has_is_taken(seed: int, count: int, known: Checkpoint) -> None:
    lie = hostile(seed, count, copies_weights=False)
    index, chosen = choose([lie, ONE], known, RNG)
    assert index == 1
    assert chosen.update_count == max(1, min(count, 4)), "the lower claim"
    Expert(AN_UID, MANIFEST).import_state(chosen.state, chosen.update_count, "QmStranger")


def test_one_state_is_taken_as_it_is() -> None:
    index, chosen = choose([ONE], FRESH, RNG)
    assert index == 0
    assert chosen is ONE


def test_gradients_that_others_accumulated_stay_with_them() -> None:
    others = [Checkpoint(one.state | {ACCUMULATED_ROWS: torch.tensor(5)}, 4) for one in (ONE, OTHER)]
    own = Checkpoint(FRESH.state | {ACCUMULATED_ROWS: torch.tensor(7)}, 0)
    assert ACCUMULATED_ROWS not in choose(others, FRESH, RNG)[1].state
    assert choose(others, own, RNG)[1].state[ACCUMULATED_ROWS] == 7


@pytest.mark.parametrize("trained", [0, 1, 2, 3])
def test_hosts_that_have_not_trained_are_heard_too(trained: int) -> None:
    """An expert has moments only if its update count is above 0."""
    states = [*[ONE] * trained, *[FRESH] * (3 - trained)]
    _, chosen = choose(states, FRESH, RNG)
    assert chosen.update_count == (4 if trained >= 2 else 0)
    Expert(AN_UID, MANIFEST).import_state(chosen.state, chosen.update_count, "QmStranger")
