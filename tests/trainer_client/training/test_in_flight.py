"""Steps in flight: how many are enough, and that they compute on copies."""

import heapq
import math
import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trainer_client.training.in_flight import InFlight, InFlightController, staleness_limit


def simulate(
    limit: int, link_s: Callable[[float], float], busy_s: float, steps: int
) -> tuple[list[float], list[int]]:
    """Simulates steps that first use a link, where others may be under way too, and then one device, where they queue.

    `link_s`: how long the link takes for a step that begins at a given time. Returns when each step ended, and how many
    steps were wanted in flight then.
    """
    enough = InFlightController(limit)
    now, device_free_at = 0.0, 0.0
    under_way: list[tuple[float, float, list[bool]]] = []
    ends: list[float] = []
    counts: list[int] = []
    while len(ends) < steps:
        while len(under_way) < enough.count:
            for _, _, alone in under_way:
                alone[0] = False
            device_free_at = max(device_free_at, now + link_s(now)) + busy_s
            heapq.heappush(under_way, (device_free_at, now, [not under_way]))
        now, began, alone = heapq.heappop(under_way)
        enough.note(now - began, now, alone[0])
        ends.append(now)
        counts.append(enough.count)
    return ends, counts


def rate(ends: list[float]) -> float:
    return (len(ends) - 1) / (ends[-1] - ends[0])


@given(st.floats(0.0, 2.0), st.floats(0.001, 0.5), st.integers(0, 200))
def test_enough_in_flight_keep_the_device_busy_and_not_many_more_wait(
    link_s: float, busy_s: float, more: int
) -> None:
    needed = (link_s + busy_s) / busy_s
    limit = 64
    ends, counts = simulate(limit, lambda now: link_s, busy_s, 600 + more)
    best = min(1.0, limit / needed) / busy_s
    assert rate(ends[300:]) >= 0.9 * best
    assert max(counts[300:]) <= min(limit, math.ceil(needed + 2 * math.sqrt(needed)) + 1)


def test_a_link_that_becomes_slow_gets_more_and_one_that_becomes_fast_gets_fewer() -> None:
    _, counts = simulate(64, lambda now: 0.0 if now < 30 else 1.0 if now < 90 else 0.1, 0.1, 2500)
    assert counts[200] <= 4
    assert 11 <= max(counts[600:700]) <= 18
    assert max(counts[-200:]) <= 6


@given(st.integers(1, 8))
def test_the_limit_holds(limit: int) -> None:
    _, counts = simulate(limit, lambda now: 1.0, 0.01, 200)
    assert max(counts) <= limit


@given(st.integers(0, 10**7), st.integers(0, 1000))
def test_a_run_bears_more_steps_in_flight_the_longer_it_goes_on(step: int, more: int) -> None:
    assert 1 <= staleness_limit(step) <= staleness_limit(step + more)
    assert staleness_limit(step + 1) <= staleness_limit(step) + 1, "one by one"


def test_a_run_begins_with_one_step_at_a_time() -> None:
    assert (staleness_limit(0), staleness_limit(1)) == (1, 1)
    assert staleness_limit(1000) > 32, "and is not held back for ever"


def make_model() -> nn.Linear:
    return nn.Linear(3, 2)


def gated(gate: threading.Barrier) -> Callable[[nn.Linear], float]:
    def work(copy: nn.Linear) -> float:
        gate.wait(60)
        loss = copy(torch.ones(3)).sum()
        torch.autograd.backward(loss)
        return float(loss.detach())

    return work


def test_steps_are_under_way_at_the_same_time_on_what_the_parameters_were() -> None:
    shared, gate = make_model(), threading.Barrier(4)  # opens when all four have come
    expected = float(shared(torch.ones(3)).sum().detach())
    steps: InFlight[nn.Linear, float] = InFlight(shared, make_model, 4)
    try:
        for _ in range(4):
            steps.begin(gated(gate))
        staleness = []
        while len(steps):
            finished = steps.next()
            assert finished.result == pytest.approx(expected)
            assert not finished.alone
            staleness.append(finished.staleness)
            with torch.no_grad():
                shared.weight.add_(1.0)  # what others are computing does not see it
            steps.release(finished, updated=True)
    finally:
        steps.close()
    assert staleness == [0, 1, 2, 3]


def test_a_step_that_fails_says_so_and_others_can_end() -> None:
    shared = make_model()
    steps: InFlight[nn.Linear, float] = InFlight(shared, make_model, 2)

    def fail(copy: nn.Linear) -> float:
        raise ZeroDivisionError

    try:
        steps.begin(fail)
        with pytest.raises(ZeroDivisionError):
            steps.next()
        assert not len(steps)
    finally:
        steps.close()


def test_a_step_alone_is_known_as_such() -> None:
    steps: InFlight[nn.Linear, float] = InFlight(make_model(), make_model, 2)
    try:
        for _ in range(2):
            steps.begin(gated(threading.Barrier(1)))
            finished = steps.next()
            assert finished.alone
            assert finished.staleness == 0
            steps.release(finished, updated=False)
    finally:
        steps.close()


def test_a_step_computes_with_as_many_cores_as_its_trainer_whatever_another_thread_takes() -> None:
    own = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        steps: InFlight[nn.Linear, int] = InFlight(nn.Linear(1, 1), lambda: nn.Linear(1, 1), 1)
        other = threading.Thread(target=torch.set_num_threads, args=(1,))
        other.start()
        other.join()
        steps.begin(lambda copy: torch.get_num_threads())
        assert steps.next().result == 2
        steps.close()
    finally:
        torch.set_num_threads(own)
