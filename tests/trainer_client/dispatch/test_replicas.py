"""Which replica of each expert is called: rows go to few nodes, and no node is overloaded."""

import random
from collections import Counter
from dataclasses import replace
from math import ceil

import numpy as np
import pytest
from expert_fakes import make_manifest, make_node, make_peer_id, make_replica
from hypothesis import given
from hypothesis import strategies as st

from dht.directory import View
from dht.uid import UID
from peer.identity import PeerID
from trainer_client.dispatch.policy import Latencies
from trainer_client.dispatch.replicas import choose_replicas

UIDS = [UID(0, (number,)) for number in range(64)]
PEERS = [make_peer_id(number) for number in range(10)]


def make_view(hosts: dict[UID, list[PeerID]], queued: dict[PeerID, int] | None = None) -> View:
    replicas = {
        uid: tuple(
            replace(make_replica(uid, peer), queued_rows=(queued or {}).get(peer, 0)) for peer in peers
        )
        for uid, peers in hosts.items()
    }
    return View(make_manifest((64,)), replicas, {peer: make_node(peer) for peer in PEERS}, 1.0)


@st.composite
def placements(draw: st.DrawFn) -> dict[UID, list[PeerID]]:
    rng = random.Random(draw(st.integers(0, 99)))
    peers = PEERS[: draw(st.integers(1, 10))]
    most = draw(st.integers(0, len(peers)))
    return {uid: rng.sample(peers, rng.randint(0, most)) for uid in UIDS[: draw(st.integers(0, 64))]}


@given(placements(), st.sets(st.sampled_from(PEERS), max_size=3), st.integers(0, 99))
def test_each_expert_that_can_be_called_has_one_of_its_replicas(
    hosts: dict[UID, list[PeerID]], avoided: set[PeerID], seed: int
) -> None:
    asked = {uid: peers[:1] for uid, peers in list(hosts.items())[::3]}
    found = choose_replicas(
        hosts, make_view(hosts), random.Random(seed), frozenset(avoided), {PEERS[0]: 0.1}, asked
    )
    possible = {uid: set(peers) - avoided - set(asked.get(uid, ())) for uid, peers in hosts.items()}
    assert set(found) == {uid for uid, peers in possible.items() if peers}
    assert all(peer in possible[uid] for uid, peer in found.items())


@given(placements(), st.integers(0, 99))
def test_no_peer_is_given_more_than_one_and_a_half_times_its_share_but_what_only_it_has(
    hosts: dict[UID, list[PeerID]], seed: int
) -> None:
    found = choose_replicas(hosts, make_view(hosts), random.Random(seed))
    peers = {peer for some in hosts.values() for peer in some}
    most = ceil(1.5 * len(hosts) / max(1, len(peers)))
    alone = Counter(some[0] for some in hosts.values() if len(some) == 1)
    for peer, carried in Counter(found.values()).items():
        others = carried - alone[peer]
        # A peer gets more than that only if all other replicas have as many.
        assert carried <= max(most, alone[peer]) or others <= sum(
            peer in some and len(some) > 1 for some in hosts.values()
        )


def test_experts_that_every_peer_has_are_at_two_thirds_of_the_peers_and_rows_at_fewer_nodes() -> None:
    """The rows are top-4. If each expert's replica were drawn by itself, four experts would be at 3.4 of ten nodes."""
    hosts, rng = dict.fromkeys(UIDS, PEERS), np.random.default_rng(0)
    view, nodes, loads = make_view(hosts), [], Counter[PeerID]()
    for seed in range(100):
        found = choose_replicas(UIDS, view, random.Random(seed))
        carried = Counter(found.values())
        loads.update(carried)
        assert max(carried.values()) <= 10
        assert len(carried) == 7
        nodes += [len({found[UIDS[e]] for e in rng.choice(64, 4, replace=False)}) for _ in range(20)]
    assert np.mean(nodes) < 3.3
    assert 480 < min(loads.values()) <= max(loads.values()) < 800, "over many passes all carry as much"


def test_a_peer_that_is_much_slower_or_much_busier_than_another_is_passed_over() -> None:
    hosts = dict.fromkeys(UIDS[:8], PEERS[:2])
    slow = choose_replicas(hosts, make_view(hosts), random.Random(0), times_s={PEERS[0]: 1.0, PEERS[1]: 0.4})
    assert set(slow.values()) == {PEERS[1]}
    busy = choose_replicas(hosts, make_view(hosts, {PEERS[1]: 5000}), random.Random(0))
    assert set(busy.values()) == {PEERS[0]}
    both = choose_replicas(hosts, make_view(hosts, {PEERS[1]: 10}), random.Random(0), times_s={PEERS[0]: 0.1})
    assert set(both.values()) == set(PEERS[:2])


def test_a_stranger_that_has_every_expert_and_is_the_quickest_carries_twice_its_share_at_most() -> None:
    stranger, *others = PEERS
    hosts = {uid: [stranger, others[number % len(others)]] for number, uid in enumerate(UIDS)}
    times_s = dict.fromkeys(others, 0.1) | {stranger: 0.001}
    quick = choose_replicas(hosts, make_view(hosts), random.Random(0), times_s=times_s)
    assert Counter(quick.values())[stranger] <= ceil(1.5 * len(UIDS) / len(PEERS)), "others are quick enough"
    slow = times_s | dict.fromkeys(others, 10.0) | {make_peer_id(n): 0.1 for n in range(100, 120)}
    preferred = choose_replicas(hosts, make_view(hosts), random.Random(0), times_s=slow)
    assert Counter(preferred.values())[stranger] == ceil(2 * len(UIDS) / len(PEERS))
    busy = make_view(hosts, dict.fromkeys(others, 10_000))
    assert Counter(choose_replicas(hosts, busy, random.Random(0)).values())[stranger] <= 13


@pytest.mark.parametrize("replicas", [2, 10, 40])
def test_replicas_that_failed_are_called_only_if_an_expert_has_no_others(replicas: int) -> None:
    uid, peers = UIDS[0], [make_peer_id(number) for number in range(replicas)]
    hosts = tuple(make_replica(uid, peer) for peer in peers)
    view = View(make_manifest((64,)), {uid: hosts}, {peer: make_node(peer) for peer in peers}, 1.0)

    def called(failed: list[PeerID]) -> set[PeerID]:
        seconds = {peers[0]: 0.1}
        return {
            choose_replicas([uid], view, random.Random(seed), times_s=seconds, failed={uid: failed})[uid]
            for seed in range(50)
        }

    assert called(peers[:-1]) == {peers[-1]}
    assert peers[0] not in called(peers[: replicas // 2])
    assert peers[0] in called(peers)


def test_of_two_replicas_the_much_faster_is_called_or_else_each_half_of_the_time() -> None:
    uid, (first, second, *_) = UIDS[0], PEERS
    view, rng = make_view({uid: [first, second]}, {first: 9, second: 1}), random.Random(1)

    def calls_of_first(times_s: dict[PeerID, float]) -> int:
        return sum(choose_replicas([uid], view, rng, times_s=times_s)[uid] == first for _ in range(200))

    assert 70 < calls_of_first({}) < 130
    assert 70 < calls_of_first({first: 0.1}) < 130
    assert 70 < calls_of_first({first: 0.1, second: 0.15}) < 130
    assert calls_of_first({first: 0.1, second: 0.25}) == 200


def test_of_many_replicas_those_that_are_as_quick_as_usual_are_called_and_now_and_then_untried_ones() -> None:
    uid, rng = UIDS[0], random.Random(2)
    *quick, slower, untried = PEERS[:5]
    times_s = dict.fromkeys(quick, 0.1) | {slower: 0.15} | {make_peer_id(n): 0.1 for n in range(100, 110)}
    view = make_view({uid: [*quick, slower, untried]})

    def calls(times_s: dict[PeerID, float]) -> Counter[PeerID]:
        return Counter(choose_replicas([uid], view, rng, times_s=times_s)[uid] for _ in range(640))

    called = calls(times_s)
    assert all(called[peer] > 150 for peer in quick)
    assert called[slower] == 0
    assert 20 < called[untried] < 80
    del times_s[quick[0]]  # with two such replicas, any may be called that is not much slower
    called = calls(times_s)
    assert all(80 < called[peer] < 180 for peer in PEERS[:5])


@pytest.mark.parametrize("seed", range(5))
def test_each_replica_takes_its_part_of_the_calls_whatever_else_its_peer_hosts(seed: int) -> None:
    """The first peers host an expert alone each, or several, as those do that were there first."""
    rng, hosts = random.Random(seed), dict[UID, list[PeerID]]()
    early, late = PEERS[:5], PEERS[5:8]
    for number, uid in enumerate(UIDS[:16]):
        hosts[uid] = [early[number % 5]]
    for uid in rng.sample(UIDS[:16], 8):
        hosts[uid].append(rng.choice(late))
    view, called = make_view(hosts), Counter[tuple[UID, PeerID]]()
    for _ in range(400):
        called.update(choose_replicas(hosts, view, rng).items())
    for uid, (one, *others) in hosts.items():
        for other in others:
            assert min(called[uid, one], called[uid, other]) > 100, (
                "a replica that is not called falls behind"
            )


def test_of_many_replicas_some_are_drawn_and_if_none_of_them_can_be_called_others_are() -> None:
    many = [make_peer_id(number) for number in range(100)]
    hosts = dict.fromkeys(UIDS, many)
    view = replace(make_view(hosts), nodes={peer: make_node(peer) for peer in many})
    found = choose_replicas(hosts, view, random.Random(0))
    assert len(set(found.values())) == len(UIDS), "with so many peers each has one expert"
    only = many[7]
    found = choose_replicas(hosts, view, random.Random(0), frozenset(many) - {only})
    assert found == dict.fromkeys(UIDS, only)
    assert choose_replicas(hosts, view, random.Random(0), frozenset(many)) == {}


def learn(true_s: dict[PeerID, float], passes: int) -> tuple[Counter[PeerID], Latencies]:
    """Calls one expert's replicas once a second, by the times of earlier calls. Returns how often each was called in
    the second half.
    """
    (uid, *_), rng, latencies = UIDS, random.Random(0), Latencies()
    hosts = {uid: list(true_s)}
    view = replace(make_view(hosts), nodes={peer: make_node(peer) for peer in true_s})
    called: Counter[PeerID] = Counter()
    for second in range(passes):
        peer = choose_replicas([uid], view, rng, times_s=latencies.nodes_lately(second))[uid]
        latencies.note_node(peer, true_s[peer] * rng.uniform(0.8, 1.25), second)
        called[peer] += second >= passes // 2
    return called, latencies


@pytest.mark.parametrize("replicas", [8, 60])
def test_a_trainer_learns_which_of_many_replicas_are_quick_and_seldom_tries_others(replicas: int) -> None:
    """If replicas were drawn evenly, a third of the calls would be slow."""
    peers = [make_peer_id(number) for number in range(replicas)]
    true_s = {peer: 2.0 if number % 3 == 0 else 0.2 for number, peer in enumerate(peers)}
    called, _ = learn(true_s, 2000)
    assert sum(count for peer, count in called.items() if true_s[peer] > 1) < 0.08 * called.total()
    assert sum(count > 0 for peer, count in called.items() if true_s[peer] < 1) > replicas // 3


def test_who_answers_at_once_takes_no_calls_from_others_that_are_quick_enough() -> None:
    stranger, *others = [make_peer_id(number) for number in range(8)]
    called, latencies = learn(dict.fromkeys(others, 0.2) | {stranger: 0.001}, 2000)
    assert len(latencies.nodes) == 8, "all are tried"
    assert called[stranger] < 2 * called.total() / 8
