"""The parts of `benchmarks.digits`: what is held out, and a classifier that learns with several batches in flight."""

import tomllib

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.digits import Classifier, Digits, Plan, accuracy, train
from dht.manifest import Manifest
from talkoot.train.local import LocalSwarm
from trainer_client.settings import TrainerSettings


def two_digits() -> Digits:
    """Images that differ only in their first half."""
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 2
    images = rng.random((120, 64)) / 2
    images[:, :32] += labels[:, None] / 2
    return Digits.split(images, labels)


def test_a_third_is_held_out_and_nothing_is_in_both() -> None:
    numbers = np.repeat(np.arange(30)[:, None], 64, axis=1)
    digits = Digits.split(numbers, np.arange(30))
    assert (len(digits.labels), len(digits.test_labels)) == (20, 10)
    assert {*digits.labels.tolist(), *digits.test_labels.tolist()} == set(range(30))
    torch.testing.assert_close(digits.images[:, 0], digits.labels.float())


def test_a_batch_follows_from_its_step() -> None:
    digits = two_digits()
    images, labels = digits.batch(3, 16)
    again, other = digits.batch(3, 16), digits.batch(4, 16)
    torch.testing.assert_close((images, labels), again)
    assert not images.equal(other[0])


def trained(in_flight: int, steps: int) -> tuple[float, float]:
    """The mean staleness, and the accuracy on held-out images."""
    digits, plan = two_digits(), Plan(steps=steps, batch=16, hidden=16, learning_rate=5e-3, warmup=5)
    swarm = LocalSwarm(Manifest.model_validate(tomllib.loads(plan.manifest)), TrainerSettings(seed=0))

    def make_model() -> nn.Module:
        return Classifier(swarm.mixture, plan.hidden)

    torch.default_generator.manual_seed(0)
    model = make_model()
    staleness = train(model, make_model, digits, plan, in_flight)
    return staleness, accuracy(model, digits.test_images, digits.test_labels)


@pytest.mark.slow
def test_a_classifier_learns_with_batches_in_flight() -> None:
    staleness, found = trained(in_flight=3, steps=160)
    assert 0 < staleness <= 2
    assert found > 0.95


def test_a_batch_is_stale_by_those_in_flight_besides_it() -> None:
    staleness, _ = trained(in_flight=1, steps=8)
    assert staleness == 0
    staleness, _ = trained(in_flight=3, steps=8)
    assert 0 < staleness <= 2
