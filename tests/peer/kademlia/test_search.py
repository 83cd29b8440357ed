"""Kademlia's iterative search (section 2.3), as a state machine over made-up networks."""

import random
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer.kademlia.search import IterativeSearch, SearchLimits

NODES = st.sets(st.integers(0, 2**16 - 1), min_size=1, max_size=60)
KEY = st.integers(0, 2**16 - 1)


def by_distance(nodes: Iterable[int], key: int) -> list[int]:
    return sorted(nodes, key=lambda node: node ^ key)


def ring(nodes: set[int]) -> dict[int, list[int]]:
    """Each node knows its two neighbours by number and two distant nodes, which is enough to reach all."""
    ordered = sorted(nodes)
    count = len(ordered)
    return {
        node: [ordered[(n + step) % count] for step in (1, -1, count // 2, count // 3)]
        for n, node in enumerate(ordered)
    }


@given(NODES, KEY, st.integers(0, 2**32))
def test_a_search_that_finds_no_value_ends_when_the_nearest_it_heard_of_have_answered(
    nodes: set[int], key: int, seed: int
) -> None:
    rng, known = random.Random(seed), ring(nodes)
    search = IterativeSearch(key, [rng.choice(sorted(nodes))], SearchLimits(front=5))
    heard, waiting = set(search.nearest()), search.ask()
    while waiting:
        node = waiting.pop(rng.randrange(len(waiting)))  # answers come in any order
        heard |= {node, *known[node]}
        search.answered(node, known[node], has_value=False)
        waiting += search.ask()
    assert search.finished
    assert search.nearest()[:5] == by_distance(heard, key)[:5]
    assert search.found_after is None


@given(NODES, KEY, st.integers(0, 2**32), st.floats(0, 0.6))
def test_no_node_is_asked_twice_once_others_answer_and_failed_ones_are_not_among_the_nearest(
    nodes: set[int], key: int, seed: int, dead: float
) -> None:
    rng = random.Random(seed)
    failing = {node for node in sorted(nodes) if rng.random() < dead}
    search = IterativeSearch(key, sorted(nodes)[:20])
    asked: list[int] = []
    while wanted := search.ask():
        asked += wanted
        for node in wanted:
            if node in failing:
                search.failed(node)
            else:
                search.answered(node, rng.sample(sorted(nodes), min(4, len(nodes))), has_value=False)
    assert len(asked) == len(set(asked)) or nodes == failing or not search.nearest()
    assert search.finished
    assert not failing & set(search.nearest())


def test_three_holders_are_enough_and_the_rounds_are_counted() -> None:
    search = IterativeSearch(0, [100, 101, 102])
    assert search.ask() == [100, 101, 102]
    search.answered(100, [1, 2, 3, 4, 5], has_value=False)
    assert search.ask() == [1, 2, 3, 4, 5]
    search.answered(102, [], has_value=True)
    for node in (1, 2):
        search.answered(node, [], has_value=True)
        assert not search.finished
    search.answered(3, [], has_value=True)
    assert search.finished
    assert search.ask() == []
    assert (search.found_after, search.rounds) == (1, 2)


def test_one_holder_more_is_asked_than_must_give_its_value() -> None:
    search = IterativeSearch(0, [1, 2, 3, 4, 5, 6, 7])
    assert search.ask() == [1, 2, 3, 4]
    search.answered(1, [], has_value=True)
    assert search.ask() == [], "three others may be enough"
    search.answered(2, [], has_value=False)
    assert search.ask() == [5]
    search.failed(3)
    assert search.ask() == [6]
    search.answered(4, [], has_value=True)
    search.answered(5, [], has_value=True)
    assert search.finished


def test_the_front_is_asked_when_too_few_of_the_holders_had_the_value() -> None:
    search = IterativeSearch(0, [1, 2, 3, 4, 5, 6, 7, 8])
    search.ask()
    search.answered(1, [], has_value=True)
    for node in (2, 3, 4):
        search.answered(node, [], has_value=False)
    assert search.ask() == [5, 6, 7]


def test_values_of_nodes_that_are_not_the_nearest_are_not_enough() -> None:
    search = IterativeSearch(0, [1, 2, 3, 4, 5, 6, 7])
    search.ask()
    search.answered(4, [], has_value=True)
    search.ask()
    for node in (5, 6, 7):
        search.answered(node, [], has_value=True)
    assert not search.finished
    search.failed(1)  # now 6 is among the nearest five
    assert search.finished


def test_a_late_answer_still_counts() -> None:
    search = IterativeSearch(0, [1, 2], SearchLimits(front=2))
    assert search.ask() == [1, 2]
    search.failed(1)
    search.answered(2, [], has_value=False)
    assert search.finished
    search.answered(1, [3], has_value=True)
    assert search.nearest() == [1, 2]
    assert search.found_after == 1


def test_this_peer_counts_without_being_asked() -> None:
    search = IterativeSearch(0, [1, 2], SearchLimits(front=3, quorum=1))
    search.holds(5, has_value=True)
    assert search.finished
    assert search.found_after == 0


def test_a_liar_who_names_nearer_nodes_forever_is_given_up() -> None:
    search, asked, node = IterativeSearch(0, [2**200]), 0, 2**200
    while wanted := search.ask():
        asked += len(wanted)
        for node in wanted:
            search.answered(node, [node - 1, node - 2, node - 3], has_value=False)
    assert search.finished
    assert asked < 110


def test_the_only_known_node_is_asked_again_when_the_request_is_lost() -> None:
    search = IterativeSearch(0, [9])
    assert search.ask() == [9]
    search.failed(9)
    assert not search.finished
    assert search.ask() == [9]
    assert search.asks_again
    search.answered(9, [1, 2], has_value=False)
    assert search.ask() == [1, 2]


def test_a_node_is_not_asked_again_when_another_has_answered() -> None:
    search = IterativeSearch(0, [1, 2])
    search.ask()
    search.answered(2, [], has_value=False)
    search.failed(1)
    assert search.finished
    assert search.ask() == []


def test_this_peers_own_answer_does_not_stand_for_that_of_others() -> None:
    search = IterativeSearch(0, [9])
    search.holds(5, has_value=False)
    search.ask()
    search.failed(9)
    assert search.ask() == [9]


def test_whoever_answered_other_keys_is_asked_when_nobody_else_answers() -> None:
    search = IterativeSearch(0, [9])
    search.ask()
    search.failed(9)
    assert search.is_stranded
    search.learn([4])
    assert search.ask() == [4]
    assert not search.asks_again


@pytest.mark.parametrize("known", [[], [7]])
def test_a_peer_that_knows_nobody_or_only_the_dead_is_finished(known: list[int]) -> None:
    search, asked = IterativeSearch(0, known), 0
    while wanted := search.ask():
        asked += len(wanted)
        for node in wanted:
            search.failed(node)
    assert search.finished
    assert asked == 3 * len(known)
    assert search.nearest() == []
