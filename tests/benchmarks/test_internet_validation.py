"""The validation of the simulation: what both sides share, and experts that sleep for drawn times."""

import json
import random
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.internet.validation.drawn_times import KINDS, environment_of
from benchmarks.internet.validation.measured import Adoption, Measured, Stretch, ratio
from benchmarks.internet.validation.scenario import Hosting, Scenario, service_s
from benchmarks.internet.validation.simulated_swarm import simulate
from benchmarks.internet.validation.steady_trainers import Step
from benchmarks.village import offer_kinds
from dht.uid import UID
from expert_server.blocks import build_block

ROWS = 64


def test_a_scenario_survives_the_way_to_another_process() -> None:
    scenario = Scenario(nodes=7, grid=(2, 3))
    assert Scenario.of(json.loads(json.dumps(scenario.values()))) == scenario


def test_nodes_differ_in_speed_but_not_from_run_to_run() -> None:
    speeds = Scenario().speeds()
    assert speeds == Scenario().speeds() != Scenario(seed=1).speeds()
    assert max(speeds) > 1.5 * min(speeds)


@given(st.lists(st.sets(st.integers(0, 11), max_size=4), min_size=1, max_size=8))
def test_those_who_fall_silent_are_never_the_founder(hosts: list[set[int]]) -> None:
    scenario = Scenario(nodes=12, alone=3, others=2)
    hosting = Hosting({str(number): sorted(some) for number, some in enumerate(hosts)})
    victims = hosting.victims(scenario)
    assert 0 not in victims
    assert len(victims) == len(set(victims)) <= 5
    alone = [some for some in hosts if len(some) == 1 and some != {0}]
    assert sum(some <= set(victims) for some in alone) >= min(3, len({min(some) for some in alone}))
    assert hosting.vacant(victims) == sum(some <= set(victims) for some in hosts)
    assert hosting.replicas(range(12)) == sum(map(len, hosts))


def test_an_expert_sleeps_as_long_as_was_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows_per_s = 640.0
    environment = environment_of(offer_kinds(tmp_path / "package", KINDS), rows_per_s, 0.0, "1")
    for name in environment.keys() - {"PYTHONPATH"}:
        monkeypatch.setenv(name, environment[name])
    monkeypatch.syspath_prepend(tmp_path / "package")
    block = build_block(Scenario().manifest, UID(0, (0, 0)))
    x_RD = torch.randn(ROWS, Scenario().width, requires_grad=True)
    lengths_S, positions_R = torch.tensor([ROWS]), torch.arange(ROWS)
    began = time.monotonic()
    outputs = block(x_RD, lengths_S, positions_R)
    between = time.monotonic()
    outputs.sum().backward()
    assert between - began >= ROWS / rows_per_s / 3
    assert time.monotonic() - between >= 2 * ROWS / rows_per_s / 3
    assert x_RD.grad is not None
    assert torch.equal(outputs, block(x_RD, lengths_S, positions_R))
    assert not torch.equal(outputs[0] - x_RD[0], outputs[1] - x_RD[1])


def test_a_backward_pass_takes_twice_as_long_as_a_forward_pass() -> None:
    times = [service_s(ROWS, 10.0, 0.2, random.Random(1), backward) for backward in (False, True)]
    assert times[1] == pytest.approx(2 * times[0])
    assert sum(service_s(ROWS, 10.0, 0.0, random.Random(1), back) for back in (False, True)) == ROWS / 10


def test_upkeep_is_taken_off_what_calls_cost() -> None:
    quiet, reading = Stretch(10.0, 4, 1000.0, []), Stretch(10.0, 4, 1500.0, [])
    training = Stretch(5.0, 4, 2500.0, [Step(0, 0.0, 0.2, 0.4, 64, 1.0), Step(1, 0.0, 0.4, 0.6, 64, 0.5)])
    figures = Measured(quiet, reading, training, Adoption(3, 2, 2, [4.0, 6.0]), training).figures()
    assert figures["call_bytes_per_row"] == (2500 - 750) / 128
    assert figures["trainers_reading_kbit_per_s"] == pytest.approx(50 * 8e-3)
    assert figures["rows_per_s"] == 128 / 5
    assert figures["upkeep_kbit_per_s"] == pytest.approx(2 * 1000 * 8e-3 / 10 / 4)
    assert (figures["adopted_mean_s"], figures["adopted_all_s"]) == (5.0, 6.0)
    assert Adoption(3, 2, 1, [4.0]).all_served_s == float("inf")


SMALL = Scenario(
    nodes=6,
    trainers=2,
    alone=1,
    others=0,
    grid=(2, 2),
    announce_every_s=2.0,
    at_rest_after_s=6.0,
    quiet_s=2.0,
    reading_s=2.0,
    training_s=3.0,
    after_s=4.0,
)


@pytest.fixture(scope="module")
def simulated() -> Measured:
    return simulate(SMALL, 1)


@pytest.mark.slow
def test_the_simulated_side_measures_the_same_for_a_seed(simulated: Measured) -> None:
    assert json.dumps(simulate(SMALL, 1).figures()) == json.dumps(simulated.figures())


@pytest.mark.slow
def test_the_simulated_side_adopts_and_trains_on(simulated: Measured) -> None:
    assert simulated.adoption.vacant == len(simulated.adoption.times_s) == 1
    assert simulated.adoption.all_served_s < SMALL.adoption_limit_s
    for stretch in (simulated.training, simulated.after):
        assert {step.trainer for step in stretch.steps} == {0, 1}
        assert stretch.answered > 0.5


@pytest.mark.slow
def test_calls_take_at_least_the_time_of_links_and_processors(simulated: Measured) -> None:
    fastest = min(SMALL.sequence / speed / 3 for speed in SMALL.speeds())
    for step in simulated.training.steps:
        assert step.forward_s > SMALL.emulated_link.delay_s
        assert step.forward_s + step.backward_s > fastest
    figures = simulated.figures()
    # Rows to both experts and back, and the same for gradients, in float32.
    assert figures["call_bytes_per_row"] > 2 * 4 * SMALL.width
    assert ratio("rows_per_s", figures, [figures, figures]) == 1
