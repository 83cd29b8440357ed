"""Training on a small placed swarm: the calls, the trainers, and the figures."""

import asyncio
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest

from benchmarks.internet.calls import Calls, Costs, Sent
from benchmarks.internet.drawn_trainers import KnownTimes
from benchmarks.internet.training import TrainingFigures, play
from benchmarks.internet.window import Announced, PlacedSwarm, Window
from benchmarks.simulated_p2p import VirtualLoop
from dht.directory import NOBODY
from dht.manifest import Manifest
from dht.uid import UID
from trainer_client.dispatch.replicas import choose_replicas

WINDOW = Window(seconds=4.0, warm_up_s=1.0, sequences=2, length=32, in_flight=2)


@dataclass(frozen=True)
class Machine:
    up_bps: float = 20e6
    down_bps: float = 100e6
    rtt_s: float = 0.02
    nat: bool = False
    rows_per_s: float = 2_000.0
    is_hostile: bool = False


def make_swarm(machines: Sequence[Machine], replicas: int = 2) -> PlacedSwarm:
    """Expert n of a 4 × 4 grid in one layer is at the machines n, n + 1 and so on."""
    values = {
        "name": "window",
        "model": {"layers": 1, "hidden": 64},
        "experts": {"grid": (4, 4), "width": 64},
    }
    manifest = Manifest.founded(values)
    count = len(machines)
    hosts: Mapping[UID, Sequence[int]] = {
        uid: [(number + n) % count for n in range(replicas)] for number, uid in enumerate(manifest.uids())
    }
    return PlacedSwarm(manifest, machines, hosts)


def train(swarm: PlacedSwarm, trainers: int = 3, window: Window = WINDOW, seed: int = 1) -> TrainingFigures:
    return play(swarm, [Machine()] * trainers, window, seed)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_figures() -> None:
    swarm, window = make_swarm([Machine()] * 8), replace(WINDOW, seconds=2.0, real=1)
    assert train(swarm, 3, window) == train(swarm, 3, window)


@pytest.mark.slow
def test_drawn_trainers_train_as_fast_as_the_real_ones_that_they_repeat() -> None:
    swarm = make_swarm([Machine()] * 8)
    real = train(swarm, 4)
    drawn = train(swarm, 4, replace(WINDOW, real=1))
    assert drawn.tokens_per_s == pytest.approx(real.tokens_per_s, rel=0.25)
    assert real.answered_rows == 1.0
    assert real.tokens_per_s <= 1.1 * real.ideal_as_placed


def test_slow_hosts_hold_training_up_as_far_as_the_flow_says() -> None:
    # Each expert is only at the node that computes 200 rows a second.
    one = make_swarm([Machine(rows_per_s=200.0)], replicas=1)
    figures = train(one, 2, Window(seconds=10.0, warm_up_s=5.0, sequences=2, length=8, in_flight=3))
    assert figures.ideal_as_placed == pytest.approx(200 / 4, rel=0.05)
    assert 0.6 <= figures.of_placed <= 1.1


@pytest.mark.slow
def test_the_flow_carries_what_experts_answered_and_not_what_an_overloaded_one_let_go() -> None:
    machines = [Machine()] * 8
    swarm = make_swarm(machines)
    first = swarm.manifest.uids()[0]
    overloaded = replace(
        swarm, machines=[*machines, Machine(rows_per_s=1.0)], hosts={**swarm.hosts, first: [8]}
    )
    figures = train(overloaded)
    assert figures.answered_slots < 1.0
    assert 0 < figures.of_placed <= 1.1


@pytest.mark.slow
def test_a_hostile_node_is_avoided() -> None:
    machines = [Machine(is_hostile=number == 2) for number in range(8)]
    assert train(make_swarm(machines)).answered_rows == 1.0


def test_a_lone_call_takes_what_lines_and_processors_take() -> None:
    node, trainer = Machine(down_bps=4e6, up_bps=1e6, rows_per_s=100.0), Machine(up_bps=2e6, rtt_s=0.2)
    calls = Calls([node, trainer], 1, 100, np.random.default_rng(0), Costs(call_s=0.0, jitter=0.0))
    sent = Sent(np.array([0]), np.array([50]), np.array([90]), np.array([2]))
    there, back = sent.bytes(True, 100)

    async def once() -> float:
        (tag,) = calls.begin(1, sent, True, 0.0, 60.0, -1, np.array([0]))
        answer = asyncio.ensure_future(calls.answer(int(tag)))
        while not answer.done():
            await asyncio.sleep(calls.now - asyncio.get_running_loop().time())
            calls.step()
        return asyncio.get_running_loop().time()

    loop = VirtualLoop()
    took_s = loop.run_until_complete(once())
    loop.close()
    rtt_s = 0.02 + 0.2
    links_s = 8 * there[0] / 2e6 + 8 * back[0] / 1e6
    assert took_s == pytest.approx(rtt_s + links_s + 90 / 3 / 100, abs=0.021)


@pytest.mark.parametrize("seed", range(20))
def test_drawn_trainers_choose_replicas_as_often_as_real_ones_do(seed: int) -> None:
    draw, times = random.Random(seed), 2000
    swarm = make_swarm([Machine()] * 8, replicas=draw.randint(1, 8))
    uid = swarm.manifest.uids()[0]
    hosts = swarm.hosts[uid]
    rng = np.random.default_rng(seed)
    announced = Announced(swarm, Calls(swarm.machines, 8, 100, rng), WINDOW, rng)
    announced.queued[:] = [draw.choice([0, 0, 0, 900, 5000]) for _ in range(8)]
    called = draw.sample(range(8), draw.randint(0, 8))
    took_s = [draw.choice([0.1, 0.11, 0.12, 0.14, 0.3]) for _ in called]

    known = KnownTimes(1, 8, announced, rng)
    known.note(0, np.array(called, np.int64), np.array(took_s), 1.0)
    drawn = Counter(known.choose(0, np.tile(hosts, (times, 1)), 2.0).tolist())

    names = swarm.peer_ids
    seconds = {names[node]: time_s for node, time_s in zip(called, took_s, strict=True)}
    real = Counter(
        names.index(choose_replicas([uid], announced.view(), draw, NOBODY, seconds)[uid])
        for _ in range(times)
    )
    assert drawn.keys() == real.keys()
    for node, count in real.items():
        assert drawn[node] == pytest.approx(count, abs=0.06 * times)


def test_lone_steps_are_measured_while_the_others_train_and_decide_how_many_are_in_flight() -> None:
    swarm, window = make_swarm([Machine()] * 8), replace(WINDOW, real=1, in_flight=6)
    alone = train(swarm, 1, replace(window, in_flight=1)).overhead_s
    among = train(swarm, 4, replace(window, probing=4)).overhead_s
    assert 0 < alone < among
    assert train(swarm, 4, window).overhead_s == 0, "no trainer has a lone step"
    few, more = (
        train(swarm, 4, replace(window, in_flight=None, overhead_s=lone_s)).in_flight
        for lone_s in (0.0, 30.0)
    )
    assert 2 <= few < more
