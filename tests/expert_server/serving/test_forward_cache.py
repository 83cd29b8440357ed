"""Forward calls that are kept for their backward call: the memory budget holds, and the oldest are dropped first."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dht.uid import UID
from expert_server.experts.graphs import ForwardGraph, SharedGraph, SharedPass, WeightVersion
from expert_server.serving.assignment import Assignment
from expert_server.serving.forward_cache import CachedForward, ForwardCache, Graph

ROW = torch.zeros(1, 8)
ASSIGNMENT = Assignment(
    [UID(0, (0, 0)), UID(0, (0, 1)), UID(0, (1, 0))],
    lengths=np.array([1]),
    positions=np.array([0]),
    ends=np.array([1, 2, 3]),
    rows=np.zeros(3, np.int64),
    weights=np.ones(3, np.float32),
)
BARE = ROW.nbytes + 3 * ROW.nbytes + 3 + ASSIGNMENT.nbytes + 2048 + 3 * 128
"""Bytes of `a_forward`: its inputs, the updates, which of them are answered, and the overhead."""


def a_version(size: int = 0) -> WeightVersion:
    """A version of `size` bytes. Once it is stashed, only its graphs keep it alive."""
    return WeightVersion([nn.Parameter(torch.zeros(size, dtype=torch.uint8), requires_grad=False)], None)


def a_stashed_version(size: int) -> WeightVersion:
    version = a_version(size)
    version.stash()
    return version


def a_forward(expires_at: float = 60.0, is_complete: bool = True) -> CachedForward:
    return CachedForward(
        ASSIGNMENT, ROW, ROW.repeat(3, 1), np.ones(3, np.bool_), expires_at, is_complete=is_complete
    )


def a_graph(size: int = 100, version: WeightVersion | None = None) -> ForwardGraph:
    return ForwardGraph(ROW, ROW, version or a_version(), size)


def key(number: int, caller: str = "QmA") -> tuple[str, bytes]:
    return caller, number.to_bytes(16, "big")


def put(store: ForwardCache, key: tuple[str, bytes], *graphs: Graph) -> bool:
    """Adds a new call. Returns whether it is kept."""
    forward = a_forward()
    if not store.put(key, key[0], forward, 0.0):
        return False
    for expert, graph in enumerate(graphs):
        store.add_graph(key, forward, expert, graph)
    return store.complete(key, forward)


def taken(store: ForwardCache, key: tuple[str, bytes]) -> CachedForward | None:
    """The call as a backward call takes it."""
    forward = store.find(key)
    if forward is not None:
        forward.is_claimed = True
        store.take(key, forward)
    return forward


def graphs_of(store: ForwardCache, *keys: tuple[str, bytes]) -> list[list[int] | None]:
    """Takes the calls. Returns for which experts each has graphs; None if the call is gone."""
    found = [taken(store, key) for key in keys]
    return [None if forward is None else list(forward.graphs) for forward in found]


def test_a_forward_is_handed_over_once() -> None:
    store, forward = ForwardCache(10_000), a_forward()
    assert store.put(key(1), "QmA", forward, 0.0)
    assert taken(store, key(1)) is forward
    assert taken(store, key(1)) is None
    assert (len(store), store.bytes) == (0, 0)


def test_a_claimed_call_counts_and_may_lose_its_graphs_until_it_is_taken() -> None:
    store = ForwardCache(2 * BARE + 150)
    assert put(store, key(1), a_graph(100))
    claimed = store.find(key(1))
    assert claimed is not None
    claimed.is_claimed = True
    assert store.find(key(1)) is None
    assert store.bytes == BARE + 100
    assert put(store, key(2), a_graph(100))
    assert store.bytes == 2 * BARE + 100
    store.take(key(1), claimed)
    assert (len(store), store.bytes) == (1, BARE + 100)
    assert claimed.graphs == {}
    assert graphs_of(store, key(2)) == [[0]]


def test_a_repeated_call_stays_if_its_first_was_claimed() -> None:
    store = ForwardCache(10_000)
    put(store, key(1))
    claimed = store.find(key(1))
    assert claimed is not None
    claimed.is_claimed = True
    put(store, key(1), a_graph())
    store.take(key(1), claimed)
    assert graphs_of(store, key(1)) == [[0]]


def test_another_caller_cannot_take_it() -> None:
    store = ForwardCache(10_000)
    store.put(key(1), "QmA", a_forward(), 0.0)
    assert taken(store, key(2)) is None
    assert taken(store, key(1, "QmB")) is None
    assert taken(store, key(1)) is not None


def test_a_call_under_way_is_not_handed_over_and_one_that_failed_is_forgotten() -> None:
    store, forward = ForwardCache(10_000), a_forward(is_complete=False)
    store.put(key(1), "QmA", forward, 0.0)
    assert taken(store, key(1)) is None
    assert len(store) == 1
    store.discard(key(1), a_forward())
    assert len(store) == 1
    store.discard(key(1), forward)
    assert (len(store), store.bytes) == (0, 0)


def test_a_repeated_call_takes_the_place_of_the_first_which_adds_nothing_to_it() -> None:
    store, first, second = ForwardCache(10_000), a_forward(is_complete=False), a_forward(is_complete=False)
    store.put(key(1), "QmA", first, 0.0)
    store.add_graph(key(1), first, 0, a_graph())
    store.put(key(1), "QmA", second, 0.0)
    store.add_graph(key(1), first, 1, a_graph())
    assert store.bytes == BARE
    assert not store.complete(key(1), first)
    assert store.complete(key(1), second)
    assert taken(store, key(1)) is second


def test_when_full_the_oldest_graph_goes_first_and_its_call_stays() -> None:
    store = ForwardCache(3 * BARE + 3 * 100)
    for number in range(3):
        assert put(store, key(number), a_graph(), a_graph())
    assert graphs_of(store, *map(key, range(3))) == [[], [1], [0, 1]]


def test_what_several_experts_share_counts_once_and_until_none_of_them_has_it() -> None:
    shared = SharedPass(ROW.repeat(3, 1), ROW.repeat(3, 1), [], [1, 1, 1], 100)
    store = ForwardCache(3 * BARE + 100)
    for index in range(3):
        assert put(store, key(index), SharedGraph(shared, index, None))
    assert store.bytes == 3 * BARE + 100
    for index in range(2):
        taken(store, key(index))
    assert store.bytes == BARE + 100
    shared.take()
    assert store.bytes == BARE
    taken(store, key(2))
    assert store.bytes == 0


def test_when_no_graphs_are_left_the_oldest_calls_go() -> None:
    store = ForwardCache(2 * BARE)
    for number in range(3):
        assert put(store, key(number))
    assert graphs_of(store, *map(key, range(3))) == [None, [], []]


def test_what_is_over_the_budget_by_itself_is_not_kept() -> None:
    assert not put(ForwardCache(BARE - 1), key(1))
    store = ForwardCache(BARE)
    assert put(store, key(1), a_graph(10**9))
    assert graphs_of(store, key(1)) == [[]]


def test_what_nobody_came_for_expires() -> None:
    store = ForwardCache(10_000)
    store.put(key(1), "QmA", a_forward(expires_at=10.0), 0.0)
    store.put(key(2), "QmA", a_forward(expires_at=20.0), 10.0)
    assert taken(store, key(1)) is None
    assert taken(store, key(2)) is not None


def test_a_stranger_that_fills_it_evicts_only_its_own_calls() -> None:
    store = ForwardCache(20 * (BARE + 100))
    honest = [key(number) for number in range(8)]
    assert all(put(store, each, a_graph()) for each in honest)
    for number in range(100):
        put(store, key(number, "stranger"), a_graph())
    assert graphs_of(store, *honest) == [[0]] * 8


def test_many_keys_of_one_line_evict_only_their_own_calls() -> None:
    store = ForwardCache(20 * BARE)
    honest = [key(number) for number in range(8)]
    assert all(put(store, each) for each in honest)
    for number in range(100):
        store.put(key(number, f"stranger {number}"), "one line", a_forward(), 0.0)
    assert len(store) == 20
    assert graphs_of(store, *honest) == [[]] * 8


def test_a_stranger_whose_small_graphs_hold_many_older_parameters_loses_them_first() -> None:
    store = ForwardCache(20 * BARE + 3000)
    assert put(store, key(0), a_graph(1200))
    for number in range(19):
        put(store, key(number, "stranger"), a_graph(1, a_stashed_version(1000)))
    assert graphs_of(store, key(0)) == [[0]]


def test_older_parameters_count_once_however_many_graphs_hold_them() -> None:
    store, version = ForwardCache(10_000), a_version(1000)
    for number in range(2):
        put(store, key(number), a_graph(version=version))
    version.stash()
    assert store.bytes == 1000 + 2 * (BARE + 100)
    taken(store, key(0))
    assert store.bytes == 1000 + BARE + 100
    taken(store, key(1))
    assert store.bytes == 0


def test_graphs_go_when_steps_of_their_experts_brought_them_over_the_budget() -> None:
    store, versions = ForwardCache(1500 + 2 * BARE), [a_version(1000), a_version(1000)]
    for number, version in enumerate(versions):
        put(store, key(number), a_graph(version=version))
        version.stash()
    taken(store, key(2))
    assert store.bytes == 1000 + 2 * BARE + 100
    assert graphs_of(store, key(0), key(1)) == [[], [0]]


def test_to_make_room_for_a_large_call_adds_up_what_is_kept_only_once() -> None:
    asked = 0

    class Version(WeightVersion):
        @property
        def bytes(self) -> int:
            nonlocal asked
            asked += 1
            return 1000

    store = ForwardCache(100 * (BARE + 1100) + 1)
    for number in range(100):
        assert put(store, key(number), a_graph(version=Version([], None)))
    asked = 0
    inputs = torch.zeros(45 * (BARE + 1100), dtype=torch.uint8)
    large = CachedForward(ASSIGNMENT, inputs, ROW, np.ones(1, np.bool_), 60.0)
    assert store.put(key(0, "QmB"), "QmB", large, 0.0)
    assert asked < 1000, "a few times for each"


VERSIONS = st.lists(st.integers(0, 500), min_size=3, max_size=3)


@given(
    st.lists(
        st.tuples(
            st.booleans(),
            st.integers(0, 5),
            st.lists(st.tuples(st.integers(0, 400), st.integers(0, 2)), max_size=3),
        ),
        max_size=60,
    ),
    VERSIONS,
    st.integers(0, 6 * BARE + 800),
)
def test_the_budget_holds_and_bytes_are_those_of_what_is_kept(
    steps: list[tuple[bool, int, list[tuple[int, int]]]], sizes: list[int], budget: int
) -> None:
    store, versions = ForwardCache(budget), [a_stashed_version(size) for size in sizes]
    for puts, number, graphs in steps:
        if puts:
            put(store, key(number), *(a_graph(size, versions[version]) for size, version in graphs))
        else:
            taken(store, key(number))
        assert store.bytes <= budget
    own = [
        forward.bytes + sum(graph.bytes for graph in forward.graphs.values())
        for number in range(6)
        if (forward := taken(store, key(number)))
    ]
    assert store.bytes == 0
    assert sum(own) <= budget


def test_any_thread_may_ask_for_the_bytes() -> None:
    store, versions = ForwardCache(10**9), [a_stashed_version(1) for _ in range(200)]
    for number, version in enumerate(versions):
        put(store, key(number), a_graph(version=version))
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
            for turn in range(1000):
                taken(store, key(turn % 200))
                put(store, key(turn % 200), a_graph(version=versions[turn % 200]))
        finally:
            enough.set()
            sys.setswitchinterval(interval)
        assert asking.result() > 0
