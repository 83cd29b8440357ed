"""The biases that spread rows evenly over experts, alone and in the layer."""

import math
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from byte_texts import byte_dataset
from expert_fakes import FakeSwarm, fails, make_manifest
from grpc import StatusCode
from hypothesis import given
from hypothesis import strategies as st
from router_fakes import LearningSwarm, mixtures
from torch import Tensor

from dht.directory import prefix_tables
from dht.manifest import Manifest
from peer.codec import Floats
from peer.errors import SettingsError, StateError
from trainer_client.averaging.dense_part import DenseForm, PeerDensePart, SharedParameters
from trainer_client.balancing import Load, LoadBias, LoadSum
from trainer_client.model import LanguageModel
from trainer_client.moe import RemoteMixtureOfExperts, rebalance
from trainer_client.routers import Routing, best, best_others_by_chance
from trainer_client.settings import TrainerSettings
from trainer_client.training.loop import Training

seeds = st.integers(0, 2**32 - 1)
grids = st.sampled_from([(7,), (2, 3), (2, 3, 2)])


def correct(
    bias: LoadBias, rows: Sequence[float], live: Sequence[float] | None = None, spread: float = 1.0
) -> None:
    living = np.ones(len(rows)) if live is None else np.array(live)
    load = Load(np.array(rows, np.float32), living.astype(np.float32), numbers(bias.bias), spread)
    bias.correct(load)


def numbers(tensor: Tensor) -> Floats:
    found: Floats = tensor.numpy().copy()
    return found


# The rule


@given(grids, seeds, st.integers(1, 30), st.floats(1e-3, 1e3))
def test_biases_are_centred_and_lower_than_their_average_by_the_load(
    grid: tuple[int, ...], seed: int, steps: int, spread: float
) -> None:
    rng, bias, size = np.random.default_rng(seed), LoadBias(grid), math.prod(grid)
    for _ in range(steps):
        correct(bias, rng.integers(1, 100, size).tolist(), spread=spread)
        moved = (bias.bias - bias.average_bias)[bias.average_load.argsort()]
        assert abs(bias.bias.mean()) <= 1e-5 * spread
        assert moved.abs().max() <= 2 * 0.5 * spread * (1 + 1e-4)
        assert (moved.diff() <= 1e-5 * spread).all(), "the more rows, the lower"
    assert (bias.bias.abs() <= 8 * spread).all()


@given(seeds)
def test_what_belongs_to_an_expert_that_is_not_live_stays(seed: int) -> None:
    rng, bias = np.random.default_rng(seed), LoadBias((3, 4))
    correct(bias, rng.integers(1, 100, 12).tolist())
    before = {name: buffer.clone() for name, buffer in bias.named_buffers()}
    live = rng.random(12) < 0.5
    live[0] = True
    correct(bias, (live * rng.integers(1, 100, 12)).tolist(), live.astype(float).tolist())
    for name, buffer in bias.named_buffers():
        assert torch.equal(buffer[~torch.from_numpy(live)], before[name][~torch.from_numpy(live)])


def test_a_bias_ends_at_eight_standard_deviations_and_follows_when_these_shrink() -> None:
    bias = LoadBias((4,))
    for _ in range(300):
        correct(bias, [100, 0, 0, 0], spread=2.0)
    assert bias.bias.min() == -16
    correct(bias, [1, 1, 1, 1], spread=0.5)
    assert bias.bias.abs().max() == 4


@pytest.mark.parametrize("spread", [0.0, math.nan, math.inf])
def test_nothing_changes_where_scores_say_nothing(spread: float) -> None:
    bias = LoadBias((4,))
    correct(bias, [9, 1, 1, 1], spread=spread)
    correct(bias, [0, 0, 0, 0])
    assert not bias.bias.any()
    assert (bias.average_load == 1).all()


def test_a_layer_of_many_experts_has_few_entries() -> None:
    bias = LoadBias((300, 200))
    assert len(bias.bias) == 4093
    bias.bias.copy_(torch.arange(4093))
    table = bias.table()
    assert table.shape == (300, 200)
    assert table.dtype == np.float32
    assert (table.ravel()[:4093] == np.arange(4093)).all()
    assert np.unique(table[:, 7]).size == 300, "no two experts of a column share one"


@given(grids, seeds, st.integers(1, 4))
def test_the_load_is_counted_by_expert(grid: tuple[int, ...], seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    live = rng.random(grid) < 0.7
    live[(0,) * len(grid)] = True
    scores = [rng.standard_normal((20, size), dtype=np.float32) for size in grid]
    found = best(scores, prefix_tables(live), k)
    load = LoadBias(grid).measure([torch.from_numpy(table) for table in scores], found, prefix_tables(live))
    counts = np.zeros(grid)
    np.add.at(counts, tuple(found.coordinates[found.valid].T), 1)
    np.testing.assert_array_equal(load.rows.reshape(grid), counts)
    np.testing.assert_array_equal(load.live.reshape(grid), live)


def test_the_spread_is_that_of_a_rows_logits() -> None:
    rng = np.random.default_rng(0)
    scores = [rng.standard_normal((500, size), dtype=np.float32) * scale for size, scale in ((9, 1), (8, 3))]
    alive = prefix_tables(np.ones((9, 8), np.bool_))
    load = LoadBias((9, 8)).measure(list(map(torch.from_numpy, scores)), best(scores, alive, 4), alive)
    logits = (scores[0][:, :, None] + scores[1][:, None, :]).reshape(500, -1)
    assert load.spread == pytest.approx(math.sqrt(logits.var(axis=1).mean()), rel=1e-4)
    listed = LoadBias((9, 8)).measure([torch.from_numpy(logits)], best([logits], alive, 4), alive)
    assert listed.spread == pytest.approx(load.spread, rel=1e-4)
    np.testing.assert_array_equal(listed.rows, load.rows)


def test_loads_of_several_threads_add_up() -> None:
    loads = LoadSum()
    both = np.ones(2, np.float32)
    each = [Load(np.array([1, n], np.float32), both, 0 * both, 2.0) for n in range(8)]
    threads = [threading.Thread(target=loads.add, args=(load,)) for load in each]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    load = loads.take()
    assert load is not None
    assert load.rows.tolist() == [8, 28]
    assert load.live.tolist() == [1, 1]
    assert load.spread == pytest.approx(2.0)
    assert loads.take() is None


def gate_that_drifts(steps: int, side: int, rows: int, seed: int) -> Iterator[list[Floats]]:
    """Scores of a gate that prefers some experts, and gradually others."""
    rng = np.random.default_rng(seed)
    liked = [rng.standard_normal(side), rng.standard_normal(side)]
    for _ in range(steps):
        liked = [some + 0.05 * rng.standard_normal(side) for some in liked]
        kinds = rng.standard_normal((rows, 4))
        yield [
            (some + 0.5 * rng.standard_normal((rows, side)) + kinds @ rng.standard_normal((4, side)) * 0.1)
            .astype(np.float32)
            for some in liked
        ]  # fmt: skip


@pytest.mark.parametrize("in_flight", [1, 9])
def test_an_uneven_gate_comes_to_fill_all_experts_evenly(in_flight: int) -> None:
    """This holds even if each step chooses with biases that are 8 steps old."""
    bias, alive = LoadBias((8, 8)), prefix_tables(np.ones((8, 8), np.bool_))
    running: deque[Load] = deque()
    loads = []
    for scores in gate_that_drifts(300, 8, 256, 0):
        found = best(scores, alive, 4, bias=bias.table())
        running.append(bias.measure(list(map(torch.from_numpy, scores)), found, alive))
        loads.append(running[-1].rows)
        if len(running) == in_flight:
            bias.correct(running.popleft())
    total = np.sum(loads[-100:], axis=0)
    assert loads[0].max() / loads[0].mean() > 5
    assert total.max() / total.mean() < 1.5
    assert total.min() / total.mean() > 0.5


# Routers


def test_chance_goes_by_the_weights_and_not_by_the_bias() -> None:
    """The bias makes the worse expert the first choice, but the better one is still kept with the probability that its
    weight of 0.9 gives.
    """
    rows = 10_000
    scores = [np.tile(np.log(np.array([[0.9, 0.1]], np.float32)), (rows, 1))]
    alive, bias = prefix_tables(np.ones(2, np.bool_)), np.array([0, 5], np.float32)
    selection = best_others_by_chance(scores, alive, 2, np.random.default_rng(0), bias)
    assert (selection.coordinates[:, :, 0] == [1, 0]).all()
    assert selection.valid.all(), "2 × 0.9 is more than 1"
    selection = best_others_by_chance(scores, alive, 2, np.random.default_rng(0), -bias)
    assert selection.valid[:, 1].mean() == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize(
    ("router", "balance", "bias", "loss"),
    [
        ("product-key", None, True, False),
        ("switch", None, False, True),
        ("glam", "both", True, True),
        ("noisy-top-k", "none", False, False),
        ("product-key", "loss", False, True),
        ("base", None, False, False),
    ],
)
def test_what_balances_follows_from_the_router_and_the_settings(
    router: str, balance: str | None, bias: bool, loss: bool
) -> None:
    given = TrainerSettings.load(router=router, balance=balance)
    routing = Routing.of(given, make_manifest((2, 3)), 0)
    assert (routing.has_bias, routing.has_balancing_loss) == (bias, loss)


@pytest.mark.parametrize("balance", ["bias", "loss", "both"])
def test_base_refuses_another_balance_beside_its_own(balance: str) -> None:
    given = TrainerSettings.load(router="base", balance=balance)
    with pytest.raises(
        SettingsError, match=f"balance: the router base balances the load itself: leave {balance} out"
    ):
        Routing.of(given, make_manifest((2, 3)), 0)


# The layer


def biased(mixture: RemoteMixtureOfExperts, *numbers: float) -> RemoteMixtureOfExperts:
    assert mixture.balance is not None
    mixture.balance.bias.copy_(torch.tensor(numbers))
    return mixture


def test_a_bias_decides_who_is_chosen_and_counts_in_no_weight() -> None:
    swarm = FakeSwarm(make_manifest((4,)))
    x_BTD = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    with mixtures(swarm, "product-key") as make_mixture:
        mixture = biased(make_mixture(0), 0, 1e3, 2e3, 3e3)
        y_BTD = mixture(x_BTD)
        (scores,) = mixture.gate(x_BTD.flatten(0, 1))
    assert swarm.rows_sent("forward", swarm.manifest.uids()[0]) == 0
    lengths, positions = torch.full((2,), 4), torch.arange(4).repeat(2)
    outputs = [swarm.block(uid)(x_BTD.flatten(0, 1), lengths, positions) for uid in swarm.manifest.uids()[1:]]
    expected = (scores[:, 1:].softmax(dim=1)[..., None] * torch.stack(outputs, dim=1)).sum(dim=1)
    torch.testing.assert_close(y_BTD.flatten(0, 1), expected)


def test_rows_that_choose_again_go_by_the_bias_too() -> None:
    swarm = FakeSwarm(make_manifest((5,)))
    uids = swarm.manifest.uids()
    swarm.behaviours[uids[0]] = fails(StatusCode.NOT_FOUND)
    with mixtures(swarm, "glam", balance="bias") as make_mixture:
        biased(make_mixture(0), 9e3, 8e3, 0, 0, 7e3)(torch.randn(2, 4, 8))
    # glam's two are 0 and 1. A row needs one answer, and gets it from 1.
    assert [swarm.rows_sent("forward", uid) for uid in uids] == [8, 8, 0, 0, 0]
    swarm = FakeSwarm(make_manifest((5,)))
    swarm.behaviours[uids[0]] = fails(StatusCode.NOT_FOUND)
    with mixtures(swarm, "switch", balance="bias") as make_mixture:
        biased(make_mixture(0), 9e3, 0, 0, 0, 7e3)(torch.randn(2, 4, 8))
    assert [swarm.rows_sent("forward", uid) for uid in uids] == [8, 0, 0, 0, 8]


def test_biases_move_once_a_step_and_not_in_evaluation() -> None:
    swarm = FakeSwarm(make_manifest((2, 3)))
    with mixtures(swarm, "product-key") as make_mixture:
        mixture = make_mixture(0)
        assert mixture.balance is not None
        mixture.eval()
        mixture(torch.randn(2, 8, 8))
        rebalance(mixture)
        assert not mixture.balance.bias.any()
        mixture.train()
        mixture(torch.randn(2, 8, 8))
        assert not mixture.balance.bias.any()
        rebalance(mixture)
        moved = numbers(mixture.balance.bias)
        assert moved.any()
        rebalance(mixture)
        mixture(torch.randn(2, 8, 8))
        mixture.begin_step(2)  # the step before was skipped
        rebalance(mixture)
        np.testing.assert_array_equal(numbers(mixture.balance.bias), moved)


def test_a_copy_that_computes_a_step_moves_the_biases_of_the_original() -> None:
    swarm = FakeSwarm(make_manifest((2, 3)))
    with mixtures(swarm, "product-key") as make_mixture:
        original, copy, alone = make_mixture(0), make_mixture(0), make_mixture(0)
        x_BTD = torch.randn(2, 8, 8)
        copy.load_state_dict(original.state_dict())
        alone.load_state_dict(original.state_dict())
        copy(x_BTD)
        rebalance(original, copy)
        alone(x_BTD)
        rebalance(alone)
        assert original.balance is not None
        assert alone.balance is not None
        assert torch.equal(original.balance.bias, alone.balance.bias)


# Biases during training, and afterwards


TEXT = b"In the sauna one must behave as in church. " * 60
SMALL = make_manifest((2, 3), layers=2, hidden=16, feed_forward=32)


@contextmanager
def training(manifest: Manifest = SMALL, **given: Any) -> Iterator[tuple[Training, LanguageModel]]:
    swarm = LearningSwarm(manifest)
    small = {"steps": 6, "batch_size": 2, "warmup_steps": 2, "validation_batches": 1}
    with mixtures(swarm, "product-key") as make_mixture:
        model = LanguageModel(manifest, make_mixture)
        yield Training(model, byte_dataset(TEXT, 16), TrainerSettings.load(**(small | given))), model


def biases_of(model: LanguageModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.named_buffers() if ".balance." in name}


def test_training_moves_the_biases_of_each_layer_and_saves_them() -> None:
    with training() as (trained, model):
        trained.run(lambda progress: None, threading.Event())
        moved = biases_of(model)
        state = trained.export_state()
    assert len(moved) == 6
    assert all(tensor.std() > 0 for tensor in moved.values())
    assert state is not None
    assert all(torch.equal(state[f"model.{name}"], tensor) for name, tensor in moved.items())
    with training() as (fresh, model):
        fresh.import_state(state, 6)
        assert all(torch.equal(tensor, moved[name]) for name, tensor in biases_of(model).items())


@pytest.mark.parametrize("number", [math.nan, pytest.param(math.inf, marks=pytest.mark.slow), 3e38])
def test_a_saved_bias_that_is_not_finite_or_would_overflow_is_refused(number: float) -> None:
    with training() as (trained, model):
        trained.run(lambda progress: None, threading.Event())
        state = trained.export_state()
        assert state is not None
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        state["model.mixtures.1.balance.bias"][2] = number
        with pytest.raises(StateError, match=r"mixtures.1.balance.bias has numbers that are not finite or"):
            trained.import_state(state, 6)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_biases_are_averaged_with_the_dense_part() -> None:
    with training() as (one, model), training() as (other, there):
        with one.part.stepping():
            for name in biases_of(model):
                model.get_buffer(name)[0] = 2.0
                there.get_buffer(name).copy_(model.get_buffer(name) - 0.5)
        before, part = biases_of(model), one.part.read()
        theirs = PeerDensePart(other.part.read().tensors, 1, 0.0, one.part.moves_to(part))
        one.part.merge("other", part, theirs, 0.5)
        with one.part.stepping():
            pass
        assert all(torch.equal(tensor, before[name] - 0.25) for name, tensor in biases_of(model).items())


@given(st.lists(st.floats(-1e9, 1e9, width=32), min_size=16, max_size=16))
def test_another_trainers_biases_move_ones_own_no_further_than_own_steps_do(theirs: list[float]) -> None:
    """Otherwise biases of 1e9 would send all rows to the experts of one node."""
    balance = LoadBias((4, 4))
    part = SharedParameters(balance)
    with part.stepping():
        balance.bias.copy_(torch.linspace(-0.25, 0.5, 16))
    own = part.read()
    lie = {name: torch.tensor(theirs) for name in own.tensors}
    part.merge("liar", own, PeerDensePart(lie, 1, 0.0, part.moves_to(own)), 0.5)
    with part.stepping():
        pass
    moved = part.read().tensors["bias"] - own.tensors["bias"]
    assert float(moved.norm()) <= 1.0001 * float(own.tensors["bias"].norm())


@given(seeds)
def test_whatever_a_new_trainer_took_over_is_within_bounds_after_a_step(seed: int) -> None:
    """In averages over ten steps, numbers of 1e9 would otherwise last for two hundred."""
    rng, balance = np.random.default_rng(seed), LoadBias((2, 4))
    for buffer in balance.buffers():
        buffer.copy_(torch.from_numpy(rng.uniform(-1e9, 1e9, 8)))
    correct(balance, list(rng.integers(1, 100, 8)), spread=0.5)
    assert float(balance.bias.abs().max()) <= 8 * 0.5
    assert float(balance.average_bias.abs().max()) <= 8 * 0.5
    assert 0 <= float(balance.average_load.min()) <= float(balance.average_load.max()) <= 8


def test_a_dense_part_with_large_biases_is_no_stranger_to_one_that_begins() -> None:
    """A new trainer takes over the dense part of others, whose biases started at zero and have grown."""
    with training() as (_, model):
        part = SharedParameters(model)
        form = DenseForm.of(model, "sauna-QmFounder")
        grown = part.read().tensors
        for name in biases_of(model):
            grown[name] = torch.full_like(grown[name], 50.0)
        assert form.from_bytes(form.to_bytes(grown, 3), 3).keys() == grown.keys()
        assert form.trained(grown).keys() == dict(model.named_parameters()).keys()
        grown["mixtures.0.balance.bias"][1] = 2e9
        with pytest.raises(StateError, match=r"balance.bias has numbers that are not finite or"):
            form.from_bytes(form.to_bytes(grown, 3), 3)
