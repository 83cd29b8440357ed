"""Which nodes host which shards: they choose differently, all shards get enough replicas, and none loses its
last one.
"""

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dht.memory import MemoryID, ShardInfo
from expert_server.memory.placement import Placement, SeenShard, ShardKey, is_called, preference
from peer.identity import PeerID

ENOUGH = 2
MEMORY = MemoryID("docs", "abcdefghijkl")


def peer(number: int) -> PeerID:
    return PeerID(b"\x12\x20" + number.to_bytes(32))


def shard(number: int, size: int = 100) -> ShardInfo:
    return ShardInfo((number,), number.to_bytes(32), 1, size)


@dataclass
class Node:
    peer_id: PeerID
    room: int
    """The number of shards that the node has room for."""
    mine: set[ShardKey] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.placement = Placement(self.peer_id, ENOUGH)


class Town:
    """Nodes that look one after another, in a random order. Each sees what all others host."""

    def __init__(self, nodes: int, shards: int, room: int, seed: int) -> None:
        self.rng = random.Random(seed)
        self.shards = {ShardKey(MEMORY, shard(n).root): shard(n) for n in range(shards)}
        self.nodes = [Node(peer(1000 * seed + n), room) for n in range(nodes)]
        self.hosts: dict[ShardKey, set[PeerID]] = {key: set() for key in self.shards}
        self.dropped = 0

    def round(self, estimate: int | None = None) -> None:
        """Lets every node look once. `estimate`: how many nodes they think there are."""
        self.rng.shuffle(self.nodes)
        for node in self.nodes:
            self.look(node, estimate or len(self.nodes))

    def look(self, node: Node, nodes: int) -> None:
        node.placement.note(self.seen(), node.mine)
        for key in node.placement.to_take(nodes):
            if len(node.mine) >= node.room:
                for gone in node.placement.to_drop(100):
                    node.mine.discard(gone)
                    self.hosts[gone].discard(node.peer_id)
                    self.dropped += 1
            if len(node.mine) < node.room:
                node.mine.add(key)
                self.hosts[key].add(node.peer_id)

    def seen(self) -> dict[ShardKey, SeenShard]:
        return {
            key: SeenShard(info, frozenset(self.hosts[key]), frozenset()) for key, info in self.shards.items()
        }

    def counts(self) -> list[int]:
        return [len(some) for some in self.hosts.values()]


@given(
    st.integers(2, 12),
    st.integers(1, 30),
    st.integers(0, 2**32),
    st.sampled_from([None, 3, 100]),
)
@settings(deadline=None, max_examples=50)
def test_all_shards_get_enough_replicas_and_then_nothing_moves(
    nodes: int, shards: int, seed: int, estimate: int | None
) -> None:
    town = Town(nodes, shards, room=shards, seed=seed % 1000)
    for _ in range(10):
        town.round(estimate)
    assert min(town.counts()) >= ENOUGH
    before = {key: set(some) for key, some in town.hosts.items()}
    for _ in range(10):
        town.round(estimate)
    assert town.hosts == before
    assert town.dropped == 0


@given(st.integers(0, 2**32))
@settings(deadline=None, max_examples=20)
def test_room_for_just_enough_is_used_up_and_nothing_is_lost(seed: int) -> None:
    """There are twelve nodes for twenty shards with two replicas each."""
    town = Town(12, 20, room=5, seed=seed % 1000)
    had: set[ShardKey] = set()
    for _ in range(60):
        town.round()
        held = {key for key, some in town.hosts.items() if some}
        assert had <= held
        had = held
    assert min(town.counts()) >= 1
    assert sum(count >= ENOUGH for count in town.counts()) >= 18


@pytest.mark.parametrize("shards", [1, 300])
def test_a_thousand_nodes_that_see_the_same_need_do_not_all_follow_it(shards: int) -> None:
    town = Town(1000, shards, room=shards, seed=3)
    takers = Counter[ShardKey]()
    for node in town.nodes:
        node.placement.note(town.seen(), ())
        takers.update(node.placement.to_take(1000))
    assert sum(takers.values()) <= 3 * shards + 10
    assert max(takers.values(), default=0) <= 12


@given(st.integers(1, 5000), st.integers(1, 2), st.integers(0, 2**32))
def test_sooner_or_later_everybody_is_called_and_nobody_is_forgotten(
    nodes: int, missing: int, seed: int
) -> None:
    key, me = ShardKey(MEMORY, seed.to_bytes(32)), peer(seed)
    called = [is_called(key, me, missing, looks, nodes) for looks in range(1, 60)]
    assert called == sorted(called)
    assert called[-1]
    assert is_called(key, me, missing, 1, missing)


@given(st.sets(st.integers(0, 50), min_size=3, max_size=12), st.integers(0, 2**32))
def test_if_all_drop_at_once_enough_are_left(hosts: set[int], number: int) -> None:
    info = shard(number % 2**32)
    key = ShardKey(MEMORY, info.root)
    serving = frozenset(map(peer, hosts))
    left = 0
    for host in serving:
        placement = Placement(host, ENOUGH)
        for _ in range(6):
            assert placement.to_drop(100) == []
            placement.note({key: SeenShard(info, serving, frozenset())}, {key})
            if placement.to_drop(100):
                break
        else:
            left += 1
            continue
        assert all(preference(key, p) > preference(key, host) for p in placement.keener(key))
    assert left == ENOUGH


def test_a_replica_is_dropped_only_for_as_much_as_is_needed() -> None:
    keys = {ShardKey(MEMORY, shard(n).root): shard(n, 100 + n) for n in range(4)}
    others = frozenset(map(peer, range(1, 40)))
    me = peer(0)
    placement = Placement(me, ENOUGH)
    for _ in range(4):
        placement.note({k: SeenShard(i, others | {me}, frozenset()) for k, i in keys.items()}, set(keys))
    assert len(placement.to_drop(50)) == 1
    assert len(placement.to_drop(200)) == 2
    assert placement.to_drop(10_000) == []


def test_a_memory_of_many_lacking_shards_takes_no_turns_of_others() -> None:
    placement, junk, own = Placement(peer(1), ENOUGH), MemoryID("junk", "abcdefghijkl"), peer(2)
    seen = {ShardKey(junk, shard(n).root): SeenShard(shard(n), frozenset(), frozenset()) for n in range(1000)}
    wanted = [ShardKey(MEMORY, shard(n).root) for n in range(10)]
    seen |= {key: SeenShard(shard(n), frozenset({own}), frozenset()) for n, key in enumerate(wanted)}
    placement.note(seen, set())
    assert set(placement.to_take(1)[:20]) >= set(wanted)


def test_a_look_between_two_at_what_is_lacking_calls_more_and_spares_nothing_sooner() -> None:
    me, others = peer(0), frozenset(map(peer, range(1, 40)))
    infos = {name: shard(number) for number, name in enumerate(("lacking", "lost", "enough", "mine"))}
    keys = {name: ShardKey(MEMORY, info.root) for name, info in infos.items()}
    serving = {"lacking": frozenset([peer(1)]), "lost": frozenset[PeerID](), "enough": others, "mine": others}
    seen = {keys[name]: SeenShard(info, serving[name], frozenset()) for name, info in infos.items()}
    placement = Placement(me, ENOUGH)
    placement.note(seen, {keys["mine"]})
    assert placement.lacking() == [keys["lacking"]], "nobody can give what is lost"
    for _ in range(20):
        placement.note({keys["lacking"]: seen[keys["lacking"]]}, {keys["mine"]})
    assert placement.lacking() == placement.to_take(1000) == [keys["lacking"]]
    placement.note(seen, {keys["mine"]})
    assert placement.to_drop(100) == [], "four whole looks have to see a replica to spare"
