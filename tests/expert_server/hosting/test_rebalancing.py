"""Exchanges of replicas: they are worthwhile, they come to an end, and no expert is left without a host."""

import random
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from dht.announcements import Replica, ReplicaState
from dht.uid import UID
from expert_server.hosting.placement import (
    BUSIER,
    BUSY_ROWS,
    CROWDED,
    Exchange,
    ExchangeHysteresis,
    exchange,
    preference,
)
from peer.identity import PeerID

SERVING = ReplicaState.SERVING
Hosts = dict[UID, set[PeerID]]


def uid(number: int) -> UID:
    return UID(0, (number,))


def peer(number: int) -> PeerID:
    return PeerID(b"\x12\x20" + number.to_bytes(32, "big"))


def replica(of: UID, host: PeerID, queued_rows: int = 0, state: ReplicaState = SERVING) -> Replica:
    return Replica(of, host, state, 0, queued_rows, 0.0, 1.0)


def seen(hosts: Hosts) -> dict[UID, tuple[Replica, ...]]:
    return {expert: tuple(replica(expert, host) for host in some) for expert, some in hosts.items()}


def mine(hosts: Hosts, me: PeerID) -> list[UID]:
    return [expert for expert, some in hosts.items() if me in some]


def least_keen(expert: UID, some: set[PeerID]) -> PeerID:
    return min(some, key=lambda host: preference(expert, host))


def draw_hosts(seed: int, experts: int, peers: int) -> Hosts:
    rng = random.Random(seed)
    return {
        uid(n): {peer(p) for p in rng.sample(range(peers), rng.randint(1, peers))} for n in range(experts)
    }


@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(1, 8), st.integers(1, 3))
def test_whoever_exchanges_at_the_same_moment_no_expert_loses_the_hosts_that_are_enough(
    seed: int, experts: int, peers: int, enough: int
) -> None:
    hosts = draw_hosts(seed, experts, peers)
    before, view = {e: len(some) for e, some in hosts.items()}, seen(hosts)
    wishes = {peer(p): exchange(view, mine(hosts, peer(p)), peer(p), enough) for p in range(peers)}
    for host, wish in wishes.items():
        if wish is not None:
            hosts[wish.gives].discard(host)  # and what it takes does not come about
    assert all(len(hosts[e]) >= min(enough, before[e]) for e in hosts)


@given(st.integers(0, 2**32), st.integers(2, 12), st.integers(2, 8), st.integers(1, 3))
def test_exchanges_come_to_an_end_and_each_evens_replicas_out(
    seed: int, experts: int, peers: int, enough: int
) -> None:
    hosts, rng = draw_hosts(seed, experts, peers), random.Random(seed)

    def lacking() -> int:
        return sum(max(0, enough - len(some)) for some in hosts.values())

    idle = 0
    while idle < 4 * peers:
        me = peer(rng.randrange(peers))
        wish = exchange(seen(hosts), mine(hosts, me), me, enough)
        if wish is None:
            idle += 1
            continue
        before, was_thin, idle = lacking(), len(hosts[wish.takes]) < enough, 0
        assert was_thin or CROWDED * len(hosts[wish.takes]) < len(hosts[wish.gives])
        hosts[wish.gives].remove(me)
        hosts[wish.takes].add(me)
        assert lacking() == before - was_thin
        assert all(hosts.values())


def test_nothing_is_exchanged_where_nothing_is_thin_or_busy() -> None:
    hosts = {uid(0): {peer(0), peer(1), peer(2)}, uid(1): {peer(1), peer(2)}}
    for number in range(3):
        assert exchange(seen(hosts), mine(hosts, peer(number)), peer(number), 2) is None


def test_an_idle_surplus_replica_goes_for_an_expert_whose_hosts_are_all_overloaded() -> None:
    some = {peer(0), peer(1), peer(2)}
    me = least_keen(uid(0), some)
    hosts = {uid(0): some, uid(1): {peer(8), peer(9)}}

    def wish(*queues: int, own: int = 0) -> Exchange | None:
        view = seen(hosts)
        view[uid(0)] = tuple(replace(r, queued_rows=own) for r in view[uid(0)])
        view[uid(1)] = tuple(replace(r, queued_rows=q) for r, q in zip(view[uid(1)], queues, strict=True))
        return exchange(view, [uid(0)], me, 2)

    assert wish(BUSY_ROWS, 9 * BUSY_ROWS) == Exchange(uid(0), uid(1))
    assert wish(BUSY_ROWS - 1, 9 * BUSY_ROWS) is None, "the trainers find the free host by themselves"
    assert wish(9 * BUSY_ROWS, 9 * BUSY_ROWS, own=10 * BUSY_ROWS // BUSIER) is None, "it is busy itself"


def test_what_nobody_can_give_is_not_taken_and_what_leaves_is_not_counted_on() -> None:
    some = {peer(0), peer(1), peer(2)}
    me = least_keen(uid(0), some)
    view = seen({uid(0): some})
    claimed = {uid(1): (replica(uid(1), peer(9), state=ReplicaState.CLAIMED),)}
    assert exchange({**view, **claimed}, [uid(0)], me, 2) is None
    lone = {uid(1): (replica(uid(1), peer(9)),)}
    assert exchange({**view, **lone}, [uid(0)], me, 2) == Exchange(uid(0), uid(1))
    leaving = tuple(r if r.peer_id == me else replace(r, state=ReplicaState.LEAVING) for r in view[uid(0)])
    assert exchange({uid(0): leaving, **lone}, [uid(0)], me, 2) is None


def test_a_wish_must_last_and_exchanges_are_far_apart() -> None:
    resolve, wish = ExchangeHysteresis(looks=3, pause_s=100.0), Exchange(uid(0), uid(1))
    assert [resolve.is_due(wish, now) for now in (1, 2, 3)] == [False, False, True]
    resolve.done(3)
    assert [resolve.is_due(wish, now) for now in (4, 5, 6, 102, 103)] == [False, False, False, False, True]
    resolve.done(103)
    assert not any(resolve.is_due(w, 300) for w in (wish, wish, None, wish, wish)), "it was interrupted"
    assert resolve.is_due(Exchange(uid(0), uid(7)), 301), "what is taken may change"
