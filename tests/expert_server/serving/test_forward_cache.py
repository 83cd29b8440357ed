"""Forward passes kept for their backward call: the budget holds, and what is oldest goes first."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dht.uid import UID
from expert_server.experts.graphs import ForwardGraph, Rows, SharedGraph, SharedPass, WeightVersion
from expert_server.serving.forward_cache import CachedForward, ForwardCache

AN_UID = UID(0, (0, 0))
BARE = 4 * 8 + 2 * 8  # bytes of inputs, length and position of `a_forward`


def a_version(size: int = 0) -> WeightVersion:
    """Of so many bytes, which are held for its graphs alone once it is stashed."""
    return WeightVersion([nn.Parameter(torch.zeros(size, dtype=torch.uint8), requires_grad=False)], None)


def a_stashed_version(size: int) -> WeightVersion:
    version = a_version(size)
    version.stash()
    return version


def a_forward(
    graph_bytes: int | None = 100, expires_at: float = 60.0, version: WeightVersion | None = None
) -> CachedForward:
    inputs = torch.zeros(1, 8)
    graph = None if graph_bytes is None else ForwardGraph(inputs, inputs, version or a_version(), graph_bytes)
    rows = Rows(inputs, torch.tensor([1]), torch.tensor([0]), graph=graph)
    return CachedForward(AN_UID, rows, expires_at)


def key(number: int, caller: str = "QmA") -> tuple[str, bytes, int]:
    return caller, number.to_bytes(16, "big"), 0


def test_a_forward_is_handed_over_once() -> None:
    store, forward = ForwardCache(1000), a_forward()
    assert store.put(key(1), forward, now=0.0)
    assert store.take(key(1)) is forward
    assert store.take(key(1)) is None
    assert (len(store), store.bytes) == (0, 0)


def test_another_caller_cannot_take_it() -> None:
    store = ForwardCache(1000)
    store.put(key(1), a_forward(), now=0.0)
    assert store.take(key(2)) is None
    assert store.take((*key(1)[:2], 1)) is None
    assert store.take(key(1, "QmB")) is None
    assert store.take(key(1)) is not None


def test_when_full_the_oldest_graph_goes_first_and_its_inputs_stay() -> None:
    store = ForwardCache(3 * BARE + 2 * 100)
    for number in range(3):
        assert store.put(key(number), a_forward(), now=0.0)
    graphs = [kept.rows.graph is not None for number in range(3) if (kept := store.take(key(number)))]
    assert graphs == [False, True, True]


def test_what_several_experts_share_counts_once_and_until_none_of_them_has_it() -> None:
    inputs = torch.zeros(3, 8)
    shared = SharedPass(inputs, inputs, [], [1, 1, 1], 100)
    store = ForwardCache(3 * BARE + 100)
    for index in range(3):
        forward = a_forward(None)
        graph = SharedGraph(shared, index, None)
        store.put(key(index), replace(forward, rows=replace(forward.rows, graph=graph)), now=0.0)
    assert store.bytes == 3 * BARE + 100
    for index in range(2):
        store.take(key(index))
    assert store.bytes == BARE + 100
    shared.take()
    assert store.bytes == BARE
    store.take(key(2))
    assert store.bytes == 0


def test_when_only_inputs_are_left_the_oldest_go() -> None:
    store = ForwardCache(2 * BARE)
    for number in range(3):
        assert store.put(key(number), a_forward(None), now=0.0)
    assert [store.take(key(number)) is not None for number in range(3)] == [False, True, True]


def test_what_is_over_the_budget_by_itself_is_not_kept() -> None:
    store = ForwardCache(BARE)
    assert not ForwardCache(BARE - 1).put(key(1), a_forward(), now=0.0)
    assert store.put(key(1), a_forward(graph_bytes=10**9), now=0.0)
    kept = store.take(key(1))
    assert kept is not None
    assert kept.rows.graph is None


def test_what_nobody_came_for_expires() -> None:
    store = ForwardCache(10_000)
    store.put(key(1), a_forward(expires_at=10.0), now=0.0)
    store.put(key(2), a_forward(expires_at=20.0), now=10.0)
    assert store.take(key(1)) is None
    assert store.take(key(2)) is not None


def test_a_stranger_that_fills_it_evicts_only_its_own_passes() -> None:
    store = ForwardCache(20 * (BARE + 100))
    honest = [key(number) for number in range(8)]
    assert all(store.put(each, a_forward(), now=0.0) for each in honest)
    for number in range(100):
        store.put(key(number, "stranger"), a_forward(), now=0.0)
    kept = [store.take(each) for each in honest]
    assert all(forward is not None and forward.rows.graph is not None for forward in kept)


def test_a_stranger_whose_small_graphs_hold_many_older_parameters_loses_them_first() -> None:
    store = ForwardCache(3000)
    assert store.put(key(0), a_forward(graph_bytes=1200), now=0.0)
    for number in range(20):
        store.put(key(number, "stranger"), a_forward(1, version=a_stashed_version(1000)), now=0.0)
    kept = store.take(key(0))
    assert kept is not None
    assert kept.rows.graph is not None


def test_older_parameters_count_once_however_many_graphs_hold_them() -> None:
    store, version = ForwardCache(10_000), a_version(1000)
    for number in range(2):
        store.put(key(number), a_forward(version=version), now=0.0)
    version.stash()
    assert store.bytes == 1000 + 2 * (BARE + 100)
    store.take(key(0))
    assert store.bytes == 1000 + BARE + 100
    store.take(key(1))
    assert store.bytes == 0


def test_graphs_go_when_steps_of_their_experts_brought_them_over_the_budget() -> None:
    store, versions = ForwardCache(1500), [a_version(1000), a_version(1000)]
    for number, version in enumerate(versions):
        store.put(key(number), a_forward(version=version), now=0.0)
        version.stash()
    store.take(key(2))
    assert store.bytes == 1000 + 2 * BARE + 100
    graphs = [kept.rows.graph is not None for number in range(2) if (kept := store.take(key(number)))]
    assert graphs == [False, True]


VERSIONS = st.lists(st.integers(0, 500), min_size=3, max_size=3)


@given(
    st.lists(
        st.tuples(
            st.booleans(), st.integers(0, 5), st.one_of(st.none(), st.integers(0, 400)), st.integers(0, 2)
        ),
        max_size=60,
    ),
    VERSIONS,
    st.integers(0, 800),
)
def test_the_budget_holds_and_bytes_are_those_of_what_is_kept(
    steps: list[tuple[bool, int, int | None, int]], sizes: list[int], budget: int
) -> None:
    store, versions = ForwardCache(budget), [a_stashed_version(size) for size in sizes]
    for puts, number, graph_bytes, version in steps:
        if puts:
            store.put(key(number), a_forward(graph_bytes, version=versions[version]), now=0.0)
        else:
            store.take(key(number))
        assert store.bytes <= budget
    taken = [kept.bytes for number in range(6) if (kept := store.take(key(number)))]
    assert store.bytes == 0
    assert sum(taken) <= budget


def test_any_thread_may_ask_for_the_bytes() -> None:
    store, versions = ForwardCache(10**9), [a_stashed_version(1) for _ in range(200)]
    for number, version in enumerate(versions):
        store.put(key(number), a_forward(version=version), now=0.0)
    interval, enough = sys.getswitchinterval(), threading.Event()
    sys.setswitchinterval(1e-6)

    def ask() -> int:
        asked = 0
        while not enough.is_set():
            assert store.bytes > 0
            asked += 1
        return asked

    with ThreadPoolExecutor(1) as thread:
        asking = thread.submit(ask)
        try:
            for turn in range(3000):
                store.take(key(turn % 200))
                store.put(key(turn % 200), a_forward(version=versions[turn % 200]), now=0.0)
        finally:
            enough.set()
            sys.setswitchinterval(interval)
        assert asking.result() > 0
