"""The parts of `benchmarks.balance`: its figures, and trainers that share their experts."""

import numpy as np
import pytest

from benchmarks.balance import Evenness, Plan, train

TEXTS = {"sauna": b"In the sauna one must behave as in church. " * 40, "digits": b"3.14159 26535 " * 120}
SMALL = Plan(grid=(2, 3), layers=2, hidden=16, feed_forward=16, context=16, batch=4, steps=6)


def test_evenness_is_that_of_all_experts_of_a_layer() -> None:
    found = Evenness.of(np.array([[0, 2], [4, 2]]))
    assert (found.max_over_mean, found.min_over_mean) == (2, 0)
    assert found.cv == pytest.approx(np.sqrt(2) / 2)


@pytest.mark.parametrize("trainers", [1, 2])
def test_trainers_share_their_experts_and_learn(trainers: int) -> None:
    found = train(SMALL, TEXTS, trainers)
    assert len(found["layers"]) == 2
    assert found["max_over_mean"] >= 1 >= found["min_over_mean"]
    assert found["rows"] == trainers * 2 * 4 * 16 * 4, "of the last two steps, in one layer"
    assert len(found["validation_loss"]) == trainers
    assert max(found["validation_loss"]) < 6
