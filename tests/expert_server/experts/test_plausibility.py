"""A state from another peer is refused if no training can have produced it, and is on probation if training can
have.
"""

from collections.abc import Callable, Mapping
from functools import cache
from itertools import count
from math import sqrt
from typing import Literal

import pytest
import torch
from checkpoint_samples import WEIGHT, changed
from expert_samples import AN_UID, backward, make_manifest, random_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expert_server.experts.expert import Expert
from expert_server.experts.format import AVERAGED, BLOCK, State, moving_tensors
from expert_server.experts.guard import CHECK_EVERY_UPDATES, PROBATION_UPDATES
from expert_server.experts.plausibility import Scale, require_plausible
from peer.averaging import MAX_UPDATE_COUNT
from peer.errors import StateError

STRANGER = "QmStranger"
UPDATES = 5


def an_expert(updates: int = 0, seed: int = 0, name: Literal["adamw", "adam", "sgd"] = "adamw") -> Expert:
    return train(Expert(AN_UID, make_manifest(learning_rate=1e-3, name=name)), updates, seed)


def train(expert: Expert, updates: int, seed: int = 0) -> Expert:
    for n in range(updates):
        backward(expert, random_rows(seed + 2 * n), random_rows(seed + 2 * n + 1))
    return expert


def state_of(expert: Expert) -> State:
    return expert.export_state()


@cache
def trained_state(updates: int) -> State:
    return state_of(an_expert(updates))


def all_of(part: str, change: Callable[[Tensor], Tensor]) -> Callable[[State], State]:
    """Changes every tensor whose name starts or ends with `part`."""
    return lambda state: {
        name: change(tensor) if name.startswith(part) or name.endswith(part) else tensor
        for name, tensor in state.items()
    }


def with_one_huge(tensor: Tensor) -> Tensor:
    huge = tensor.clone()
    huge.view(-1)[0] = 1e6
    return huge


def random_like(tensor: Tensor) -> Tensor:
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))


IMPLAUSIBLE: dict[str, Callable[[State], State]] = {
    "weights of 1e30": all_of(BLOCK, lambda t: torch.full_like(t, 1e30)),
    "the largest floats": all_of(BLOCK, lambda t: torch.full_like(t, 3.4e38)),
    "ten times as large": all_of(BLOCK, lambda t: 10 * t),
    "noise": all_of(BLOCK, random_like),
    "one huge number": changed(WEIGHT, with_one_huge),
    "one large tensor": changed(WEIGHT, lambda t: 30 * t),
    "zeros": all_of(BLOCK, torch.zeros_like),
    "a hundredth": all_of(BLOCK, lambda t: t / 100),
    "moments of 1e30": all_of(".exp_avg", lambda t: torch.full_like(t, 1e30)),
    "squares of 1e30": all_of(".exp_avg_sq", lambda t: torch.full_like(t, 1e30)),
    "no squares beside moments": all_of(".exp_avg_sq", torch.zeros_like),
    "endless steps": all_of(".step", lambda t: t + 1e30),
}


@pytest.mark.parametrize("change", IMPLAUSIBLE.values(), ids=IMPLAUSIBLE)
@pytest.mark.parametrize("own_updates", [0, 300])
def test_what_no_training_makes_is_refused_and_changes_nothing(
    change: Callable[[State], State], own_updates: int
) -> None:
    expert = an_expert()
    expert.import_state(trained_state(own_updates), own_updates)
    before = state_of(expert)
    with pytest.raises(StateError):
        expert.import_state(change(trained_state(UPDATES)), UPDATES, STRANGER)
    assert_same(state_of(expert), before)
    assert (expert.update_count, expert.source) == (own_updates, "")


@pytest.mark.parametrize("claimed", [30_000, MAX_UPDATE_COUNT])
def test_a_claim_of_many_updates_makes_no_weights_of_1e30_plausible(claimed: int) -> None:
    with pytest.raises(StateError, match="far larger"):
        an_expert().import_state(
            IMPLAUSIBLE["weights of 1e30"](state_of(an_expert(UPDATES))), claimed, STRANGER
        )


def test_momentum_larger_than_clipped_gradients_make_it_is_refused() -> None:
    state = all_of(".momentum_buffer", lambda t: 1000 + t)(state_of(an_expert(UPDATES, name="sgd")))
    with pytest.raises(StateError, match="larger than clipped gradients"):
        an_expert(name="sgd").import_state(state, UPDATES, STRANGER)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_step_of_sgd_is_as_long_as_clipped_gradients_make_it(momentum: float) -> None:
    manifest = make_manifest(learning_rate=0.1, clip_norm=100.0, name="sgd", momentum=momentum)
    expert, name = Expert(AN_UID, manifest), WEIGHT.removeprefix(BLOCK)
    scale, state = Scale.of(dict(expert.block.named_parameters())), state_of(expert)
    step = 0.1 * 100 / (1 - momentum) / sqrt(state[WEIGHT].numel())
    # the first update counts as three steps
    largest = (3 * max(scale.tensors[name], scale.whole) + 3 * step) / scale.tensors[name] * state[WEIGHT]
    require_plausible(AN_UID, state | {WEIGHT: 0.99 * largest}, 1, [scale], manifest.optimizer)
    with pytest.raises(StateError, match="far larger"):
        require_plausible(AN_UID, state | {WEIGHT: 1.01 * largest}, 1, [scale], manifest.optimizer)


@settings(deadline=None, max_examples=20)
@given(
    st.sampled_from(["adamw", "adam", "sgd"]),
    st.floats(-5, 0).map(lambda power: 10.0**power),
    st.sampled_from([0.01, 1.0, 100.0]),
    st.integers(0, 1000),
    st.integers(1, 50),
)
def test_what_training_makes_is_plausible_to_who_never_trained(
    name: Literal["adamw", "adam", "sgd"], learning_rate: float, clip_norm: float, seed: int, updates: int
) -> None:
    manifest = make_manifest(learning_rate=learning_rate, name=name, clip_norm=clip_norm)
    trained = train(Expert(AN_UID, manifest), updates, seed)
    if not trained.guard.rollbacks:
        Expert(AN_UID, manifest).import_state(state_of(trained), updates, STRANGER)


def explode(expert: Expert) -> None:
    with torch.no_grad():
        for parameter in expert.block.parameters():
            parameter.mul_(1e4)


def assert_same(first: Mapping[str, Tensor], second: Mapping[str, Tensor], rtol: float = 0.0) -> None:
    torch.testing.assert_close(dict(first), dict(second), rtol=rtol, atol=0)


def until_rollback(expert: Expert) -> None:
    before = expert.guard.rollbacks
    for n in count():
        assert n <= CHECK_EVERY_UPDATES
        backward(expert, random_rows(n), random_rows(n + 1))
        if expert.guard.rollbacks > before:
            return


@pytest.mark.parametrize("source", [STRANGER, AVERAGED])
@pytest.mark.parametrize("updates", [0, PROBATION_UPDATES - 10])
def test_a_strangers_state_that_turns_bad_on_probation_gives_way_to_the_own_one(
    source: str, updates: int
) -> None:
    expert = an_expert(20)
    own = state_of(expert)
    expert.import_state(state_of(an_expert(UPDATES, seed=7)), 5000, source)
    train(expert, updates)
    assert (expert.source, expert.update_count) == (source, 5000 + updates)
    explode(expert)
    until_rollback(expert)
    assert_same(state_of(expert), own, rtol=2**-8)
    assert (expert.source, expert.update_count, expert.refuted) == ("", 20, source)


def test_a_strangers_state_is_the_good_one_after_its_probation() -> None:
    expert = an_expert(20)
    expert.import_state(state_of(an_expert(UPDATES, seed=7)), 5000, STRANGER)
    train(expert, PROBATION_UPDATES - 1)
    assert expert.source == STRANGER
    train(expert, CHECK_EVERY_UPDATES)
    assert expert.source == ""
    proven = state_of(expert)
    explode(expert)
    until_rollback(expert)
    assert expert.update_count > 5000 + PROBATION_UPDATES
    assert expert.refuted == ""
    difference = state_of(expert)[WEIGHT] - proven[WEIGHT]
    assert difference.abs().max() < 0.1


def test_of_two_strangers_states_neither_is_the_good_one() -> None:
    expert = an_expert(20)
    own = state_of(expert)
    for seed, source in ((7, "QmOne"), (8, "QmOther")):
        expert.import_state(state_of(an_expert(UPDATES, seed=seed)), 5000, source)
        train(expert, PROBATION_UPDATES // 2 + 20)
    explode(expert)
    until_rollback(expert)
    assert_same(state_of(expert), own, rtol=2**-8)
    assert (expert.update_count, expert.refuted) == (20, "QmOther")


def test_the_own_state_returns_whole_where_a_stranger_gave_no_moments() -> None:
    expert = an_expert(20)
    own = state_of(expert)
    expert.import_state(state_of(an_expert()), 0, STRANGER)
    explode(expert)
    assert not expert._is_sound(expert.guard.check)
    assert_same(state_of(expert), own, rtol=2**-8)
    train(expert, 3)


def test_the_state_just_before_the_strangers_is_the_one_that_returns() -> None:
    """It is not the state that was saved some updates earlier."""
    expert = an_expert(20)
    expert.import_state(state_of(an_expert(UPDATES)), 20, STRANGER)
    assert expert._own_count == 20
    train(expert, PROBATION_UPDATES + CHECK_EVERY_UPDATES + 5)
    before = state_of(expert)
    expert.import_state(state_of(an_expert(UPDATES)), 200, AVERAGED)
    explode(expert)
    until_rollback(expert)
    assert_same(state_of(expert), before, rtol=2**-8)


def averaged_now(expert: Expert) -> None:
    expert.import_state(state_of(expert), expert.update_count, AVERAGED)


def test_averages_one_after_another_do_not_keep_an_expert_from_the_state_to_return_to() -> None:
    """Most replicas take fewer updates between two averages than a probation lasts."""
    expert, between = an_expert(20), PROBATION_UPDATES // 2 + 10
    for _ in range(4):
        averaged_now(expert)
        train(expert, between)
    before_the_last = 20 + 2 * between
    assert (expert.source, expert.update_count) == (AVERAGED, 20 + 4 * between)
    explode(expert)
    until_rollback(expert)
    assert (expert.update_count, expert.refuted) == (before_the_last, AVERAGED)


def test_an_average_is_not_kept_because_another_follows_at_once() -> None:
    expert = an_expert(20)
    averaged_now(expert)
    train(expert, PROBATION_UPDATES - 1)
    averaged_now(expert)
    train(expert, CHECK_EVERY_UPDATES - 1)
    averaged_now(expert)
    explode(expert)
    until_rollback(expert)
    assert expert.update_count == 20


def test_an_expert_that_is_bad_before_an_average_returns_to_its_good_state_and_measures_moves_from_there() -> (
    None
):
    expert = an_expert(20)
    averaged_now(expert)
    train(expert, PROBATION_UPDATES - 1)
    good = state_of(expert)
    expert.own_moves.start(moving_tensors(good))
    train(expert, 1)
    explode(expert)
    with pytest.raises(StateError, match="rolled back before its state was replaced"):
        expert.import_state(good, expert.update_count, AVERAGED)
    assert (expert.source, expert.update_count, expert.refuted) == ("", 20, AVERAGED)
    assert not expert.own_moves.present(moving_tensors(state_of(expert)))
