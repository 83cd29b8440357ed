"""The upper bound of throughput, compared with all cuts one by one."""

from itertools import chain, combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.internet.flow import ideal_throughput


@st.composite
def swarms(draw: st.DrawFn) -> tuple[list[int], list[list[int]], list[int]]:
    experts, nodes = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    demand = draw(st.lists(st.integers(0, 9), min_size=experts, max_size=experts).filter(any))
    some = st.lists(st.integers(0, nodes - 1), max_size=nodes, unique=True)
    hosts = draw(st.lists(some, min_size=experts, max_size=experts))
    capacity = draw(st.lists(st.integers(0, 1000), min_size=nodes, max_size=nodes))
    return demand, hosts, capacity


def least_ratio(demand: list[int], hosts: list[list[int]], capacity: list[int]) -> float:
    """The least ratio of capacity to demand over all sets of experts that have any demand."""
    asked = [expert for expert, rows in enumerate(demand) if rows]
    every = chain.from_iterable(combinations(asked, size) for size in range(1, len(asked) + 1))
    return min(
        sum(capacity[node] for node in {node for expert in some for node in hosts[expert]})
        / sum(demand[expert] for expert in some)
        for some in every
    )


@given(swarms())
def test_the_ideal_is_the_tightest_cut(swarm: tuple[list[int], list[list[int]], list[int]]) -> None:
    demand, hosts, capacity = swarm
    found = ideal_throughput(np.array(demand, float), hosts, np.array(capacity, float))
    assert found.as_placed == pytest.approx(least_ratio(demand, hosts, capacity), rel=1e-3, abs=1e-3)
    assert found.free == pytest.approx(sum(capacity) / sum(demand))
    assert found.as_placed <= found.free * (1 + 1e-6)


def test_trainers_that_send_less_are_the_limit() -> None:
    found = ideal_throughput(np.array([1.0, 1.0]), [[0], [0, 1]], np.array([100.0, 100.0]), wanted=30.0)
    assert found.as_placed == pytest.approx(30.0)
    assert found.free == pytest.approx(30.0)


def test_an_expert_without_a_host_lets_nothing_through() -> None:
    found = ideal_throughput(np.array([1.0, 1.0]), [[0], []], np.array([100.0]))
    assert found.as_placed == 0.0
    assert found.free == pytest.approx(50.0)
