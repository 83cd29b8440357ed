"""The routing table, compared with brute force; and which peer gets which items."""

import heapq
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from peer.identity import PeerID
from peer.kademlia.routing import (
    BUCKET_SIZE,
    ID_BITS,
    ID_BYTES,
    REPLICAS,
    RoutingTable,
    id_bytes,
    id_of_bytes,
    key_id_of,
    node_id_of,
    should_hand_over,
)

IDS = st.integers(0, 2**ID_BITS - 1)
OWN = 2**ID_BITS // 3


def peer(node: int) -> PeerID:
    return PeerID(b"\x12\x20" + bytes(12) + id_bytes(node))


def filled(nodes: list[int], own: int = OWN) -> RoutingTable:
    table = RoutingTable(own)
    for node in nodes:
        table.add(node, peer(node))
    return table


def drawn(count: int, seed: int = 1) -> list[int]:
    rng = random.Random(seed)
    return [rng.getrandbits(ID_BITS) for _ in range(count)]


def live(table: RoutingTable) -> list[int]:
    """The nodes in the table, without spare nodes."""
    return [node for node, _ in table.nearest(0, 10**6)]


def elsewhere(count: int) -> list[int]:
    """Nodes in the half of the IDs that does not contain those of `far`."""
    return [node >> 1 for node in drawn(count)]


def far(count: int) -> list[int]:
    """Nodes that always share a bucket: all are in one depth-5 range that does not contain `OWN`."""
    return [(1 << ID_BITS) - 1 - n for n in range(count)]


def test_in_a_full_bucket_neighbourhoods_have_equal_shares() -> None:
    table, nodes = filled(elsewhere(40)), far(80)
    for node in nodes[:60]:
        table.add(node, peer(node), "one machine")
    assert not table.has_room(nodes[60], "one machine")
    for n, node in enumerate(nodes[60 : 60 + BUCKET_SIZE - 1]):
        assert table.has_room(node, f"home {n}")
        table.add(node, peer(node), f"home {n}")
    near = [table._near[node] for node in live(table) if node in nodes]
    assert len(near) == BUCKET_SIZE
    assert near.count("one machine") == 1
    for node in nodes:
        table.remove(node)
    assert not table._near, "nothing of them is left"


def test_a_spare_node_that_takes_the_place_of_a_crowding_one_keeps_its_neighbourhood() -> None:
    homes, (spare, *machine) = far(BUCKET_SIZE), far(3 * BUCKET_SIZE)[BUCKET_SIZE:]
    table = filled(elsewhere(40))
    for n, node in enumerate(homes):
        table.add(node, peer(node), f"home {n}")
    table.add(spare, peer(spare), "another home")
    for node in machine[: BUCKET_SIZE - 1]:
        table.add(node, peer(node), "one machine")
    for node in homes[:2]:  # two of the machine's nodes take their places
        table.remove(node)
    for node in machine[-2:]:
        table.add(node, peer(node), "one machine")
    assert spare in table
    assert spare not in live(table)
    table.add(spare, peer(spare), "another home")
    assert spare in live(table)
    assert table._near[spare] == "another home"


@given(st.lists(st.tuples(IDS, st.sampled_from(["", "here", "there"])), max_size=60), IDS)
def test_the_nearest_are_of_different_neighbourhoods_as_far_as_there_are(
    nodes: list[tuple[int, str]], key: int
) -> None:
    table = RoutingTable(OWN)
    for node, near in nodes:
        table.add(node, peer(node), near)
    named = [node for node, _ in table.nearest(key, 5)]
    assert len(named) == min(5, len(live(table)))
    by_place = [table._near[node] for node in named if node in table._near]
    others = sum(node not in table._near for node in live(table)) + len(set(table._near.values()))
    if others >= 5:
        assert len(by_place) == len(set(by_place))


@given(IDS)
def test_an_id_travels_as_20_bytes(number: int) -> None:
    assert len(id_bytes(number)) == ID_BYTES
    assert id_of_bytes(id_bytes(number)) == number


def test_a_place_follows_from_the_name_and_nothing_else() -> None:
    assert node_id_of(b"a") == node_id_of(b"a") != node_id_of(b"b")
    assert key_id_of("a") != key_id_of("b")
    assert 0 <= key_id_of("a") < 2**ID_BITS


def test_a_hundred_nodes_need_few_buckets_and_all_are_known() -> None:
    table = filled(drawn(100))
    assert 3 <= len(table._buckets) <= 10
    assert len(live(table)) == len(table) == 100


def test_ten_thousand_nodes_make_about_a_thousand_places() -> None:
    """This is like hivemind's table: 45 to 65 buckets, 800 to 1,100 nodes, and at most as many spare nodes."""
    nodes = drawn(10_000)
    table = filled(nodes)
    assert 45 <= len(table._buckets) <= 65
    assert 800 <= len(live(table)) <= 1100
    assert len(table) <= 2 * BUCKET_SIZE * len(table._buckets)


@given(st.integers(0, 10**6), st.integers(0, 300), st.lists(st.tuples(IDS, st.integers(1, 60)), max_size=5))
@settings(max_examples=50)
def test_the_nearest_are_those_of_brute_force_nearest_first(
    seed: int, count: int, queries: list[tuple[int, int]]
) -> None:
    table = filled(drawn(count, seed))
    known = live(table)
    for key, most in [*queries, *((node, 20) for node in known[:3])]:
        found = table.nearest(key, most)
        assert [node for node, _ in found] == heapq.nsmallest(most, known, key=key.__xor__)
        assert all(peer_id == peer(node) for node, peer_id in found)
        others = [node for node in known if node != key]
        assert [n for n, _ in table.nearest(key, most, exclude=key)] == heapq.nsmallest(
            most, others, key=key.__xor__
        )


@given(st.lists(st.tuples(st.integers(0, 80), st.booleans()), max_size=300), st.integers(0, 3))
def test_whatever_comes_and_goes_the_bounds_hold(steps: list[tuple[int, bool]], seed: int) -> None:
    nodes = [*far(60), *drawn(21, seed)]
    table, known = RoutingTable(OWN), set()
    for number, comes in steps:
        node = nodes[number]
        if comes:
            table.add(node, peer(node))
            known.add(node)
        else:
            table.remove(node)
            known.discard(node)
        assert (node in table) >= comes
        assert {n for n, _ in table} <= known
        assert len(dict(table)) == len(table)
    assert len(table) <= 2 * BUCKET_SIZE * len(table._buckets)


def test_this_peer_itself_is_never_among_the_others() -> None:
    table = filled([OWN, 1, OWN])
    assert live(table) == [1]


def test_an_empty_table_names_nobody() -> None:
    table = RoutingTable(OWN)
    assert table.nearest(1, 20) == []
    assert 1 not in table
    table.remove(1)


def test_a_full_bucket_keeps_its_nodes_and_asks_for_the_oldest() -> None:
    old, late = far(BUCKET_SIZE), far(BUCKET_SIZE + 2)[-2:]
    table = filled([*old, *elsewhere(40)])
    assert set(old) <= set(live(table))
    assert table.add(late[0], peer(late[0])) == peer(old[0])
    assert table.add(late[1], peer(late[1])) == peer(old[1]), "the first is being asked already"
    assert late[0] not in live(table)
    assert late[0] in table
    table.add(old[0], peer(old[0]))  # it answered, and is the newest now
    assert table.add(late[0], peer(late[0])) == peer(old[2])


def test_the_newest_spare_node_takes_the_place_of_one_that_is_gone() -> None:
    old, late = far(BUCKET_SIZE), far(BUCKET_SIZE + 2)[-2:]
    table = filled([*old, *elsewhere(40), *late])
    table.remove(old[3])
    assert old[3] not in table
    assert late[1] in live(table)
    assert late[0] not in live(table)


def test_spare_nodes_beyond_a_buckets_size_go_the_oldest_first() -> None:
    nodes = far(3 * BUCKET_SIZE)
    table = filled([*elsewhere(40), *nodes])
    assert set(nodes[:BUCKET_SIZE]) <= set(live(table))
    assert not any(node in table for node in nodes[BUCKET_SIZE : 2 * BUCKET_SIZE])
    assert all(node in table for node in nodes[2 * BUCKET_SIZE :])


@given(IDS, IDS, IDS, st.lists(IDS, max_size=12))
def test_a_key_is_handed_over_by_its_nearest_holder_to_one_that_becomes_a_holder(
    key: int, newcomer: int, own: int, others: list[int]
) -> None:
    if len({newcomer, own, *others}) < len(others) + 2:
        return
    nearest = heapq.nsmallest(REPLICAS, others, key=key.__xor__)
    holders_but_us = heapq.nsmallest(REPLICAS, [newcomer, *others], key=key.__xor__)
    expected = newcomer in holders_but_us and min([own, *others], key=key.__xor__) == own
    assert should_hand_over(key, newcomer, own, nearest) == expected
