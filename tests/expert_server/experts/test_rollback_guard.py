from collections.abc import Callable
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dht.manifest import ExpertSpec, Manifest, ModelSpec, OptimizerSpec
from dht.uid import UID
from expert_server.experts.expert import Expert
from expert_server.experts.graphs import Rows
from expert_server.experts.guard import CHECK_EVERY_UPDATES, KEEP_EVERY_UPDATES
from peer.errors import ExpertError

HIDDEN, ROWS = 16, 12
LENGTHS, POSITIONS = torch.tensor([ROWS]), torch.arange(ROWS)
UPDATES = KEEP_EVERY_UPDATES + 5

Name = Literal["adamw", "adam", "sgd"]


def make_expert(
    name: Name = "adamw", learning_rate: float = 1e-2, seed: int = 3, clip_norm: float = 1.0
) -> Expert:
    manifest = Manifest(
        name="test",
        model=ModelSpec(layers=1, hidden=HIDDEN, heads=2, context=32, feed_forward=32, seed=seed),
        experts=ExpertSpec(grid=(2, 2), kind="transformer"),
        optimizer=OptimizerSpec(
            name=name, learning_rate=learning_rate, warmup_updates=0, clip_norm=clip_norm
        ),
    )
    return Expert(UID(0, (0, 0)), manifest)


def random_rows(seed: int) -> Tensor:
    return torch.randn(ROWS, HIDDEN, generator=torch.Generator().manual_seed(seed))


def train(expert: Expert, updates: int, seed: int = 0) -> list[float]:
    """Trains on fixed targets. Returns the loss before each update."""
    losses = []
    for _ in range(updates):
        output = expert.forward(Rows(random_rows(seed), LENGTHS, POSITIONS))
        error = output - random_rows(seed + 1)
        losses.append(error.square().mean().item())
        expert.backward([Rows(random_rows(seed), LENGTHS, POSITIONS, 2 * error / error.numel())])
    return losses


def state_of(expert: Expert) -> list[Tensor]:
    parameters = list(expert.block.parameters())
    moments = [value for p in parameters for value in expert.optimizer.state[p].values()]
    return [tensor.detach().clone() for tensor in (*parameters, *moments) if torch.is_tensor(tensor)]


def poison(expert: Expert, change: Callable[[Tensor], Tensor]) -> None:
    with torch.no_grad():
        for parameter in expert.block.parameters():
            parameter.copy_(change(parameter))


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_parameters_that_are_not_finite_go_back_to_the_last_good_state(
    name: Name, caplog: pytest.LogCaptureFixture
) -> None:
    expert = make_expert(name)
    train(expert, KEEP_EVERY_UPDATES)
    good = state_of(expert)
    losses = train(expert, 5)
    poison(expert, lambda parameter: parameter * torch.nan)
    with pytest.raises(ExpertError, match="not finite"):
        train(expert, 1)
    assert (expert.guard.rollbacks, expert.update_count) == (1, UPDATES)
    for tensor, expected in zip(state_of(expert), good, strict=True):
        torch.testing.assert_close(tensor, expected, rtol=2**-8, atol=0)
    (record,) = caplog.records
    assert "expert 0.0.0 went bad (its parameter norm is nan" in record.message
    assert record.message.endswith("rolled back by 5 updates")
    after = train(expert, 40)
    assert after[-1] < losses[0]
    assert (expert.guard.rollbacks, expert.update_count) == (1, UPDATES + 40)


def test_parameters_that_explode_go_back_at_the_next_check() -> None:
    expert = make_expert()
    losses = train(expert, UPDATES)
    with torch.no_grad():
        list(expert.block.parameters())[-1].add_(1000.0)
    train(expert, CHECK_EVERY_UPDATES)
    assert (expert.guard.rollbacks, expert.update_count) == (1, UPDATES + CHECK_EVERY_UPDATES)
    assert train(expert, 40)[-1] < losses[-1]


def test_an_expert_that_turns_bad_before_its_first_update_goes_back_to_its_first_state() -> None:
    expert = make_expert()
    before = [parameter.detach().clone() for parameter in expert.block.parameters()]
    train(expert, 1)
    poison(expert, lambda parameter: torch.full_like(parameter, torch.inf))
    assert not expert.guard.check()
    for parameter, expected in zip(expert.block.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), expected, rtol=2**-8, atol=0)
    assert not expert.optimizer.state
    losses = train(expert, 30)
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_state_after_a_return_to_the_first_one_is_whole(name: Name) -> None:
    expert, other = make_expert(name), make_expert(name, seed=4)
    train(expert, 3)
    poison(expert, lambda parameter: parameter * torch.nan)
    with pytest.raises(ExpertError, match="not finite"):
        train(expert, 1)
    assert (expert.guard.rollbacks, expert.update_count) == (1, 3)
    other.import_state(expert.export_state(), expert.update_count)
    assert train(expert, 5) == train(other, 5)


def test_callers_cannot_cause_a_rollback_with_numbers_that_overflow() -> None:
    expert = make_expert()
    for _ in range(3 * CHECK_EVERY_UPDATES):
        with pytest.raises(ExpertError):
            expert.forward(Rows(torch.full((ROWS, HIDDEN), 3e38), LENGTHS, POSITIONS))
    assert expert.guard.rollbacks == 0


def test_a_graph_from_before_a_rollback_is_not_used() -> None:
    expert = make_expert()
    train(expert, 1)
    _, graph = expert.forward_with_graph(Rows(random_rows(0), LENGTHS, POSITIONS))
    assert expert.is_good(graph)
    poison(expert, lambda parameter: parameter * torch.nan)
    assert not expert.guard.check()
    assert not expert.is_good(graph)


def test_a_state_that_replaced_another_is_the_good_one_once_it_is_kept() -> None:
    expert = make_expert(learning_rate=1e-4)
    poison(expert, lambda parameter: parameter + 30.0)
    expert.guard.keep()
    assert expert.guard.check()
    poison(expert, lambda parameter: parameter * torch.nan)
    assert not expert.guard.check()
    assert all((parameter > 25).all() for parameter in expert.block.parameters())


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_fast_training_never_rolls_back(name: Name) -> None:
    expert = make_expert(name, learning_rate=1.0)
    train(expert, KEEP_EVERY_UPDATES + CHECK_EVERY_UPDATES)
    assert expert.guard.rollbacks == 0


@pytest.mark.slow
@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from(["adamw", "adam", "sgd"]),
    st.floats(-5, 0).map(lambda power: 10.0**power),
    st.integers(0, 1000),
)
def test_healthy_training_never_rolls_back(name: Name, learning_rate: float, seed: int) -> None:
    expert = make_expert(name, learning_rate, seed)
    train(expert, KEEP_EVERY_UPDATES + CHECK_EVERY_UPDATES, seed)
    assert expert.guard.rollbacks == 0


def test_a_block_that_starts_at_zero_may_grow() -> None:
    expert = make_expert()
    poison(expert, torch.zeros_like)
    expert.guard.keep()
    train(expert, UPDATES)
    assert expert.guard.rollbacks == 0
