"""Kademlia's iterative search (section 2.3), as a state machine over invented networks."""

import random
import statistics
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer.kademlia.routing import ID_BITS, REPLICAS
from peer.kademlia.search import IterativeSearch, SearchLimits, UsualReach

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
def test_failed_nodes_are_asked_once_more_if_the_others_have_nothing_and_are_not_among_the_nearest(
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
    if search.nearest():
        assert max(asked.count(node) for node in asked) <= 2
        assert all(asked.count(node) == 1 for node in asked if node not in failing)
    assert search.finished
    assert not failing & set(search.nearest())


@given(st.integers(0, 2**32), st.floats(0, 0.6))
def test_the_front_that_is_remembered_is_the_one_that_would_be_found_now(seed: int, dead: float) -> None:
    rng = random.Random(seed)
    nodes = rng.sample(range(2**16), 80)
    holders = nodes[: rng.randrange(5)]
    search = IterativeSearch(0, nodes[:9], reach=2**12, near_of=lambda node: str(node % 40))
    waiting: list[int] = []

    def look() -> None:
        assert search._front() == search._find_front()

    while (wanted := search.ask()) or waiting:
        look()
        waiting += wanted
        node = waiting.pop(rng.randrange(len(waiting)))
        if rng.random() < dead:
            rng.choice((search.failed, search.pass_over))(node)
        else:
            search.answered(node, rng.sample(nodes, 8), has_value=node in holders)
        look()
        search.hear(rng.sample(nodes, 4))
        look()


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
    search = IterativeSearch(0, [1, 2], SearchLimits(front=2, doubt=0))
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
    assert asked < 142


def test_a_newcomer_that_overrates_the_reach_asks_the_holders_all_the_same() -> None:
    """A newcomer knows few nodes, so those within its reach seem to be all that exist. Each names nodes near itself."""
    rng = random.Random(1)
    ordered = sorted(rng.getrandbits(ID_BITS) for _ in range(4000))
    for _ in range(8):
        key = rng.getrandbits(ID_BITS)
        nearest = by_distance(ordered, key)
        places = {node: place for place, node in enumerate(nearest)}
        search = IterativeSearch(key, rng.sample(nearest[1000:], 80), reach=2**ID_BITS)
        waiting = search.ask()
        while not search.finished:
            node = waiting.pop(0)
            within = nearest[: max(20, places[node] // 2)]
            search.answered(node, rng.sample(within, 20), has_value=places[node] < REPLICAS)
            waiting += search.ask()
        assert search.found_after is not None


def test_the_only_known_node_is_asked_again_when_the_request_is_lost() -> None:
    search = IterativeSearch(0, [9])
    assert search.ask() == [9]
    search.failed(9)
    assert not search.finished
    assert search.ask() == [9]
    assert search.asks_again
    search.answered(9, [1, 2], has_value=False)
    assert search.ask() == [1, 2]


def test_a_node_is_asked_once_more_when_the_others_have_nothing() -> None:
    search = IterativeSearch(0, [1, 2])
    search.ask()
    search.answered(2, [], has_value=False)
    search.failed(1)
    assert not search.finished
    assert search.ask() == [1]
    search.failed(1)
    assert search.finished
    assert search.ask() == []


def test_a_node_is_not_asked_again_when_another_has_the_value() -> None:
    search = IterativeSearch(0, [1, 2])
    search.ask()
    search.answered(2, [], has_value=True)
    search.failed(1)
    assert search.finished
    assert search.ask() == []


# Nodes that crowd around a key and say that they store nothing


def test_if_the_nearest_have_nothing_as_many_more_are_asked() -> None:
    search = IterativeSearch(0, range(1, 40))
    asked = search.ask()
    while len(asked) < 7:
        search.answered(asked[0], [], has_value=False)
        asked += search.ask()
    for node in asked:
        search.answered(node, [], has_value=False)
    assert not search.finished
    assert search.ask() == list(range(8, 15))
    search.answered(10, [], has_value=True)
    assert search.found_after == 1


def test_all_within_reach_are_asked_though_a_crowd_of_liars_is_nearer() -> None:
    liars, holders = set(range(1, 31)), {1000, 1001, 1002, 1003}
    search = IterativeSearch(0, [*liars, *holders, *range(9000, 9100)], reach=2000)
    asked: set[int] = set()
    while wanted := search.ask():
        asked |= {*wanted}
        for node in wanted:
            search.answered(node, [], has_value=node in holders)
    assert asked >= liars | holders
    assert len(asked) <= len(liars | holders) + 7
    assert search.found_after == 1


@given(st.sets(st.integers(0, 2000), min_size=1, max_size=8))
def test_worthless_values_of_a_crowd_do_not_end_the_search_before_all_within_reach_have_answered(
    honest: set[int],
) -> None:
    search = IterativeSearch(0, [*range(2001, 2013), *honest], reach=3000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peer.kademlia.search._FIRST", 2**31)
        asked = search.ask()
    for node in set(asked) - honest:
        search.answered(node, [], has_value=True)
    assert not search.finished
    for node in honest:
        search.answered(node, [], has_value=True)
    assert search.finished


def test_records_are_stored_beyond_a_crowd() -> None:
    rng, shares = random.Random(1), []
    liars, honest = range(1, 9), range(1000, 1005)
    for _ in range(100):
        search = IterativeSearch(0, [*liars, *honest, 5000], SearchLimits(doubt=0, quorum=99), reach=2000)
        while wanted := search.ask():
            for node in wanted:
                search.answered(node, [], has_value=False)
        places, others = search.places(5, 15, rng)
        assert places[:5] == [1, 2, 3, 4, 5]
        assert {*places, *others} >= {*liars, *honest}
        shares.append(len({*places} & {*honest}))
    assert min(shares) == 5, "they all fit"


def test_of_many_nodes_on_one_machine_one_counts() -> None:
    crowd, homes = range(1, 31), range(100, 110)
    search = IterativeSearch(0, [*crowd, *homes], near_of=lambda n: "machine" if n in crowd else f"home {n}")
    asked: list[int] = []
    while wanted := search.ask():
        asked += wanted
        for node in wanted:
            search.answered(node, crowd, node in homes)
    assert search.satisfied
    assert len([node for node in asked if node in crowd]) <= 1
    assert search.places(5, 15, random.Random(1))[0] == [1, 100, 101, 102]


def test_a_node_that_is_not_where_its_contact_says_counts_for_where_it_answered() -> None:
    liars, homes = range(1, 8), range(100, 110)
    places = {node: f"claim {node}" for node in liars} | {node: f"home {node}" for node in homes}
    search = IterativeSearch(0, [*liars, *homes], near_of=places.__getitem__)
    asked: list[int] = []
    while wanted := search.ask():
        asked += wanted
        for node in wanted:
            if node in liars:
                places[node] = "machine"
            search.answered(node, [], node in homes)
    assert set(homes[:3]) <= set(asked)
    assert search.nearest()[:4] == [1, 100, 101, 102]  # of the liars, one counts


def test_a_search_on_one_machine_alone_asks_as_many_as_ever() -> None:
    alone = IterativeSearch(0, range(1, 31), near_of=lambda node: "here")
    anywhere = IterativeSearch(0, range(1, 31))
    for search in (alone, anywhere):
        while wanted := search.ask():
            for node in wanted:
                search.answered(node, [], has_value=False)
    assert alone.nearest() == anywhere.nearest()


def test_a_larger_crowd_is_drawn_from() -> None:
    rng = random.Random(1)
    search = IterativeSearch(0, range(1, 41), SearchLimits(doubt=0, quorum=99), reach=2000)
    while wanted := search.ask():
        for node in wanted:
            search.answered(node, [], has_value=False)
    drawn = [search.places(5, 15, rng)[0] for _ in range(200)]
    assert {len(places) for places in drawn} == {15}
    assert {node for places in drawn for node in places} == set(range(1, 41))


def test_a_liar_that_names_nodes_which_do_not_exist_costs_three_questions() -> None:
    honest = {node: [other for other in range(1000, 1010) if other != node] for node in range(1000, 1010)}
    search = IterativeSearch(0, [1009])
    asked: list[int] = []
    while wanted := search.ask():
        asked += wanted
        for node in wanted:
            if node == 1003:
                search.answered(node, range(1, 21), has_value=False)
            elif node in honest:
                search.answered(node, honest[node], has_value=node == 1001)
            else:
                search.failed(node)
    assert len({node for node in asked if node < 21}) <= 6
    assert search.found_after is not None


@given(st.integers(0, 2**32), st.integers(1, 8))
def test_liars_on_their_own_paths_do_not_keep_a_search_from_the_others(seed: int, liars: int) -> None:
    """Each liar names 20 nodes that don't exist and are nearer than all others."""
    rng = random.Random(seed)
    nodes = rng.sample(range(2**20, 2**21), 40)
    lying, truthful = nodes[:liars], nodes[liars:]
    holders = by_distance(truthful, 0)[:5]
    search, asked = IterativeSearch(0, rng.sample(nodes, 20)), 0
    while wanted := search.ask():
        asked += len(wanted)
        for node in wanted:
            if node in lying:
                search.answered(node, rng.sample(range(1, 2**20), 20), has_value=False)
            elif node in truthful:
                search.answered(node, by_distance(nodes, 0)[:20], has_value=node in holders)
            else:
                search.failed(node)
    assert asked <= 40 + 2 * 6 * liars
    assert search.found_after is not None


def test_the_usual_reach_follows_from_this_peers_neighbours_and_then_from_random_keys() -> None:
    usual = UsualReach()
    assert usual.distance(8, [8 ^ 1, 8 ^ 2]) == 2**160, "a swarm of fewer nodes than a key has holders"
    own = usual.distance(0, range(20, 401, 20))
    for n in range(8):
        usual.note(0, [])  # nobody answered
        assert usual.distance(0, range(20, 401, 20)) == own
        usual.note(0, [1000 * k for k in range(1, 10 + n)])
    samples = [UsualReach() for _ in range(8)]
    alone = [reach.distance(0, [1000 * k for k in range(1, 10 + n)]) for n, reach in enumerate(samples)]
    assert usual.distance(0, []) == sorted(alone)[3]


@pytest.mark.parametrize("count", [20, 150, 1000])
def test_about_five_nodes_are_within_the_usual_reach(count: int) -> None:
    """In a single swarm, there may be 3 or 10 by chance."""

    def within_reach(seed: int) -> float:
        rng, usual = random.Random(seed), UsualReach()
        nodes = [rng.getrandbits(160) for _ in range(count)]
        for key in [rng.getrandbits(160) for _ in range(32)]:
            usual.note(key, by_distance(nodes, key)[:7])
        return usual.distance(0, []) * count / 2**160

    assert 4.5 <= statistics.median(map(within_reach, range(50))) <= 5.5


@given(st.integers(0, 2**32), st.integers(4, 40))
def test_a_crowd_at_one_place_hardly_changes_the_usual_reach(seed: int, count: int) -> None:
    """There are as many liars as honest nodes, or eight."""
    rng, usual = random.Random(seed), UsualReach()
    place = rng.getrandbits(160)
    nodes = [rng.getrandbits(160) for _ in range(count)]
    nodes += [place ^ rng.getrandbits(150) for _ in range(max(8, count))]
    for key in [rng.getrandbits(160) for _ in range(32)]:
        usual.note(key, by_distance(nodes, key)[:7])
    assert usual.distance(0, []) * count / 2**160 >= 2


def test_a_search_waits_for_one_of_its_witnesses() -> None:
    search = IterativeSearch(0, [1, 2, 3, 4, 5, 6, 7])
    assert search.ask_witness(5000)
    assert search.ask_witness(6000)
    assert not search.ask_witness(6000)
    for node in search.ask():
        search.answered(node, [], has_value=True)
    assert search.satisfied
    assert not search.finished
    search.failed(5000)
    assert not search.finished
    search.answered(6000, [], has_value=False)
    assert search.finished


def test_a_search_waits_for_all_of_its_further_witnesses() -> None:
    search = IterativeSearch(0, [1, 2, 3, 4, 5, 6, 7])
    for node in search.ask():
        search.answered(node, [], has_value=True)
    for node in (5000, 6000, 7000):
        assert search.ask_witness(node, awaits_all=True)
    search.answered(5000, [], has_value=False)
    search.failed(6000)
    assert not search.finished
    search.answered(7000, [], has_value=False)
    assert search.finished


@pytest.mark.parametrize(
    ("nodes", "may_be_misled"),
    [
        pytest.param(range(1, 80), True, id="more within reach than are asked"),
        pytest.param(range(1, 40), False, id="many, and all within reach are asked"),
        pytest.param(range(201, 221), True, id="none near the key"),
        pytest.param((150, *range(201, 221)), False, id="one near the key"),
    ],
)
def test_a_search_may_be_misled_by_a_crowd_too_large_to_ask_or_when_it_gets_nowhere_near_its_key(
    nodes: Sequence[int], may_be_misled: bool
) -> None:
    search = IterativeSearch(0, nodes, reach=100)
    while asked := search.ask():
        for node in asked:
            search.answered(node, [], has_value=False)
    assert search.finished
    assert search.may_be_misled == may_be_misled


def test_a_search_does_not_wait_for_witnesses_that_failed() -> None:
    search = IterativeSearch(0, [1, 2, 3, 4, 5, 6, 7])
    search.ask_witness(5000)
    for node in search.ask():
        search.answered(node, [], has_value=True)
    search.failed(5000)
    assert search.finished


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


def test_a_node_that_was_not_asked_after_all_is_asked_later() -> None:
    search = IterativeSearch(0, range(1, 5))
    first, *others = search.ask()
    search.not_asked(first)
    for node in others:
        search.answered(node, [], has_value=False)
    assert not search.finished
    assert search.ask() == [first], "otherwise the search would wait for it for ever"
