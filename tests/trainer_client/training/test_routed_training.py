"""Training with each router: real experts that are trained, and no network."""

import threading
from typing import get_args

import numpy as np
import pytest
import torch
from byte_texts import byte_dataset
from expert_fakes import FakeSwarm, make_manifest
from router_fakes import LearningSwarm, mixtures

from trainer_client.model import LanguageModel
from trainer_client.settings import RouterName, TrainerSettings
from trainer_client.training.loop import Training
from trainer_client.training.record import Progress, Summary

TEXT = b"In the sauna one must behave as in church. " * 60


def train_with(name: RouterName) -> tuple[Summary, LearningSwarm, list[Progress], set[str]]:
    """Also returns the names of the gates' parameters that training has changed."""
    swarm = LearningSwarm(make_manifest((2, 3), hidden=16, feed_forward=32))
    values = TrainerSettings.load(
        steps=30, batch_size=4, warmup_steps=2, learning_rate=1e-2, validation_batches=2
    )
    seen: list[Progress] = []
    with mixtures(swarm, name) as make_mixture:
        model = LanguageModel(swarm.manifest, make_mixture)
        before = {key: value.clone() for key, value in model.mixtures.named_parameters()}
        summary = Training(model, byte_dataset(TEXT, 16), values).run(seen.append, threading.Event())
    moved = {key for key, value in model.mixtures.named_parameters() if not torch.equal(value, before[key])}
    assert moved <= before.keys()
    return summary, swarm, seen, before.keys() - moved


@pytest.mark.parametrize(
    "name",
    [
        name if name == "product-key" else pytest.param(name, marks=pytest.mark.slow)
        for name in get_args(RouterName)
    ],
)
def test_a_model_learns_with_each_router(name: RouterName) -> None:
    summary, swarm, seen, unmoved = train_with(name)
    assert summary.validation_loss_last is not None
    assert summary.validation_loss_last < summary.validation_loss_first - 1
    assert summary.skipped_steps == 0
    assert sum(expert.update_count for expert in swarm.experts.values()) >= 30
    assert not unmoved, "the whole gate learns"
    assert summary.load_cv == pytest.approx(np.mean([progress.load_cv for progress in seen]))
    assert summary.load_max_over_mean == pytest.approx(
        np.mean([progress.load_max_over_mean for progress in seen])
    )
    assert summary.load_cv is not None
    assert summary.load_max_over_mean is not None
    if name == "base":  # 64 rows for 6 experts: 11 for four of them, 10 for two
        assert summary.load_max_over_mean == pytest.approx(11 / (64 / 6))
    else:
        assert summary.load_cv > 0.05
        assert summary.load_max_over_mean > 1.1


@pytest.mark.parametrize("name", ["noisy-top-k", "switch", "glam"])
def test_the_balancing_loss_alone_evens_the_load_out(name: RouterName) -> None:
    swarm = FakeSwarm(make_manifest((2, 3)))
    x_BTD = torch.randn(4, 16, 8, generator=torch.Generator().manual_seed(0))
    with mixtures(swarm, name, balance_weight=1.0) as make_mixture:
        mixture = make_mixture(0)
        bias = mixture.gate.linear.bias
        bias.data[[0, 2]] += 1.5  # nearly all rows want expert (0, 0)
        spreads = []
        for _ in range(30):
            mixture(x_BTD)
            assert mixture.routed is not None
            assert mixture.routed.spread is not None
            assert mixture.routed.balancing_loss is not None
            spreads.append(mixture.routed.spread.cv)
            (gradient,) = torch.autograd.grad(mixture.routed.balancing_loss, bias)
            bias.data -= 2 * gradient
    assert np.mean(spreads[-5:]) < 0.6 * spreads[0]


@pytest.mark.parametrize("name", ["product-key", "base"])
def test_routers_without_a_balancing_loss_add_nothing_to_the_loss(name: RouterName) -> None:
    swarm = FakeSwarm(make_manifest((2, 3)))
    with mixtures(swarm, name) as make_mixture:
        model = LanguageModel(swarm.manifest, make_mixture)
        model(torch.zeros(1, 4, dtype=torch.int64))
    assert model.balancing_loss() is None
    assert model.load_spread() is not None


def test_the_weighted_balancing_losses_of_all_layers_are_added() -> None:
    swarm = FakeSwarm(make_manifest((2, 3), layers=3))
    with mixtures(swarm, "glam", balance_weight=0.5) as make_mixture:
        model = LanguageModel(swarm.manifest, make_mixture)
        assert model.balancing_loss() is None
        model(torch.randint(256, (2, 8)))
    total = model.balancing_loss()
    assert total is not None
    # Each figure is about 1 if experts are chosen about evenly.
    assert total.item() == pytest.approx(3 * 0.5, rel=0.3)


def test_what_one_thread_routed_is_not_seen_by_another() -> None:
    swarm = FakeSwarm(make_manifest((2, 3)))
    seen: list[object] = []
    with mixtures(swarm, "glam") as make_mixture:
        mixture = make_mixture(0)
        mixture(torch.ones(1, 4, 8))
        other = threading.Thread(target=lambda: seen.append(mixture.routed))
        other.start()
        other.join()
    assert mixture.routed is not None
    assert seen == [None]
