"""Where nodes are listed: shards split as they fill up, so that no key has more than a DHT node may hold."""

import asyncio
import random
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from loop_holds import holds

from benchmarks.simulated_p2p import Link, SimulatedIdentity, VirtualLoop, simulated_world
from benchmarks.simulated_swarm import SimulatedSwarm
from dht.records import (
    FEWEST_TRAINER_DIGITS,
    FULL,
    MOST_DIGITS,
    child_shards,
    choose_shard,
    digits_of,
    first_shards,
    shards_of,
)
from dht.registry import Registry
from dht.swarm import some_nodes
from peer.identity import PeerID
from peer.kademlia.lookups import Item
from peer.kademlia.routing import key_id_of
from peer.kademlia.validation import Entry, pack
from peer.wire import records_pb2

PEER = PeerID(b"\x12\x20" + bytes(30) + b"\xcd\xab")


@pytest.fixture
def world() -> Iterator[VirtualLoop]:
    with simulated_world() as loop:
        yield loop


def test_a_node_belongs_into_one_shard_of_each_length() -> None:
    assert digits_of(PEER.to_bytes()) == "abcd"
    assert shards_of(PEER) == ["ab", "abc", "abcd"]
    assert len(set(first_shards())) == 256
    assert "ab" in first_shards()


def test_a_node_is_listed_in_the_first_shard_with_room() -> None:
    shards = shards_of(PEER)
    assert choose_shard(shards, {}) == "ab"
    assert choose_shard(shards, {"ab": FULL - 1}) == "ab"
    assert choose_shard(shards, {"ab": FULL}) == "abc"
    assert choose_shard(shards, {"ab": FULL, "abc": FULL, "abcd": FULL}) == "abcd", "the last takes all"


def test_readers_look_below_a_shard_before_it_is_full() -> None:
    assert not list(child_shards("ab", FULL // 2 - 1))
    assert list(child_shards("ab", FULL // 2)) == [f"ab{digit:x}" for digit in range(16)]
    assert not list(child_shards("abcd", 10 * FULL))
    assert len("abcd") == MOST_DIGITS


@pytest.mark.parametrize("nodes", [100_000, 1_000_000])
def test_no_shard_of_a_large_swarm_passes_32_kilobytes_and_every_node_is_found(nodes: int) -> None:
    """Nodes come one after another. Only those of one shard of 256 are added, since the others are similar."""
    rng, listed, peers = random.Random(1), Counter[str](), []
    for _ in range(nodes // 256):
        peer_id = PeerID(b"\x12\x20" + rng.randbytes(31) + b"\xab")
        shard = choose_shard(shards_of(peer_id), listed)
        listed[shard] += 1
        peers.append(shard)
    entry = len(pack([PEER.to_bytes(), b"x" * 80, 1e9]))
    assert max(listed.values()) * entry < 32_000
    read, shards = set(), ["ab"]
    while shards:
        read |= set(shards)
        shards = [lower for shard in shards for lower in child_shards(shard, listed[shard])]
    assert set(listed) <= read
    assert len(read) < 300


def test_nodes_of_a_full_shard_are_listed_below_it_and_come_back_when_there_is_room(
    world: VirtualLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dht.records.FULL", 4)
    monkeypatch.setattr("dht.registry._SHARD_FOR_S", 60.0)

    async def scenario() -> None:
        swarm = await SimulatedSwarm.start(world, 5, 5, Link(), seed=1)
        one_shard = [
            identity
            for n in range(3000)
            if (identity := SimulatedIdentity(n + 100)).peer_id.to_bytes()[-1] == 0xAB
        ]
        registries = [
            Registry(swarm.peers[0].dht, swarm.keys, identity, now=world.unix_time)  # type: ignore[arg-type]
            for identity in one_shard
        ]
        assert len(registries) > 8
        reader = swarm.peers[1].registry
        everybody = {peer.peer_id for peer in swarm.peers} | {identity.peer_id for identity in one_shard}
        for registry in registries:
            await registry.publish_node(records_pb2.NodeRecord(), 100.0)
        assert await reader.node_ids() == everybody
        assert len(await listed_in(swarm, "ab")) == 4
        await asyncio.sleep(101)
        for registry in registries[-4:]:
            await registry.publish_node(records_pb2.NodeRecord(), 100.0)
        assert len(await listed_in(swarm, "ab")) == 4, "they were listed below, and there is room now"

    world.run_until_complete(scenario())


def test_who_needs_some_trainers_reads_little_however_many_are_listed(world: VirtualLoop) -> None:
    """This matters because anybody can list peers that don't exist."""

    async def scenario() -> None:
        swarm = await SimulatedSwarm.start(world, 20, 5, Link(), seed=1)
        reader, rng = swarm.peers[3].registry, random.Random(0)
        for trainers, enough in ((3, False), (60, True), (1200, True)):
            listed = [PeerID(b"\x12\x20" + rng.randbytes(32)) for _ in range(trainers)]
            keys = [
                swarm.keys.trainer_shard(shards_of(peer_id, FEWEST_TRAINER_DIGITS)[0]) for peer_id in listed
            ]
            expires_at = world.unix_time() + 100.0
            pairs = zip(listed, keys, strict=True)
            items = [Item(key, peer_id.to_bytes(), key, expires_at) for peer_id, key in pairs]
            for first in range(0, len(items), 500):
                await swarm.peers[1].registry.store(items[first : first + 500])
            before = reader.spent_bytes
            everybody = await reader.trainer_ids(10**6)
            spent = reader.spent_bytes - before
            for _ in range(2):
                before = reader.spent_bytes
                some, about = await reader.some_trainer_ids(8)
                assert some == everybody if not enough else 8 <= len(some) < len(everybody)
                assert some <= everybody
                assert len(everybody) / 4 < about < 4 * len(everybody)
                assert reader.spent_bytes - before < spent / (8 if trainers == 1200 else 1)

    world.run_until_complete(scenario())


def test_who_needs_some_nodes_reads_few_of_their_lists(world: VirtualLoop) -> None:
    async def scenario() -> None:
        swarm = await SimulatedSwarm.start(world, 20, 5, Link(), seed=1)
        reader, rng = swarm.peers[3].registry, random.Random(0)
        listed = [PeerID(b"\x12\x20" + rng.randbytes(32)) for _ in range(3000)]
        keys = [swarm.keys.node_shard(shards_of(peer_id)[0]) for peer_id in listed]
        until = world.unix_time() + 500.0
        items = [Item(key, peer.to_bytes(), key, until) for key, peer in zip(keys, listed, strict=True)]
        for first in range(0, len(items), 500):
            await swarm.peers[1].registry.store(items[first : first + 500])
        before = reader.spent_bytes
        everybody = await reader.node_ids()
        spent = reader.spent_bytes - before
        before = reader.spent_bytes
        some = await reader.some_node_ids(32)
        assert 32 <= len(some) < len(everybody)
        assert some <= everybody
        assert reader.spent_bytes - before < 0.05 * spent

    world.run_until_complete(scenario())


@pytest.mark.parametrize("estimated", [100.0, 10_000.0], ids=["small", "large"])
def test_nodes_are_drawn_from_the_lists_and_from_those_that_a_peer_knows(
    world: VirtualLoop, monkeypatch: pytest.MonkeyPatch, estimated: float
) -> None:
    monkeypatch.setattr("peer.kademlia.lookups.Lookups.estimated_nodes", estimated)

    async def scenario() -> None:
        simulated = await SimulatedSwarm.start(world, 60, 5, Link(), seed=1, in_place=True)
        ids = [peer.peer_id for peer in simulated.peers]
        known, registry = ids[1:11], simulated.peers[0].registry
        for peers in ((), known, [ids[0], *known]):
            host = SimpleNamespace(peer_id=ids[0], peers=lambda peers=peers: frozenset(peers))
            swarm: Any = SimpleNamespace(host=host, registry=registry)
            nodes = await some_nodes(swarm, 16)
            assert 14 <= len(nodes) <= 16, "the lists may name some that it knows"
            assert len(nodes.keys() & {*known}) >= (8 if peers else 0)
            assert ids[0] not in nodes
        assert len(await some_nodes(swarm, 512)) == 59, "all others"

    world.run_until_complete(scenario())


def test_trainers_of_a_full_shard_are_listed_below_it_and_counted(
    world: VirtualLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dht.records.FULL", 4)

    async def scenario() -> None:
        swarm = await SimulatedSwarm.start(world, 5, 5, Link(), seed=1)
        trainers = [SimulatedIdentity(n + 100) for n in range(60)]
        for identity in trainers:
            registry = Registry(swarm.peers[0].dht, swarm.keys, identity, now=world.unix_time)  # type: ignore[arg-type]
            await registry.publish_trainer(records_pb2.TrainerRecord(), 500.0)
        reader, everybody = swarm.peers[1].registry, {identity.peer_id for identity in trainers}
        assert await reader.trainer_ids() == everybody
        for _ in range(3):
            some, about = await reader.some_trainer_ids(8)
            assert 8 <= len(some) < len(everybody)
            assert some <= everybody
            assert 30 < about < 120

    world.run_until_complete(scenario())


async def listed_in(swarm: SimulatedSwarm, digits: str) -> set[object]:
    key = key_id_of(swarm.keys.node_shard(digits))
    found = (await swarm.peers[2].lookups.find([key]))[key]
    now = swarm.peers[2].registry.now()
    return {subkey for subkey, entry in found.entries.items() if entry.expires_at > now}


def test_shards_that_strangers_filled_do_not_hold_the_loop(
    world: VirtualLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = FULL // 2 - 1  # so that no child shards are read

    async def scenario() -> None:
        swarm = await SimulatedSwarm.start(world, 2, 16, Link(rtt_s=0.05), seed=1)
        registry = swarm.peers[0].registry
        listed: dict[int, dict[bytes, Entry]] = {}
        for last in range(256):
            key = registry.keys.node_shard(f"{last:02x}")
            subkeys = (b"\x12\x20" + number.to_bytes(31) + bytes([last]) for number in range(count))
            listed[key_id_of(key)] = dict.fromkeys(subkeys, Entry(pack(key), 2e9))

        async def find(keys: Any, *_: Any, **__: Any) -> Any:
            search = SimpleNamespace(rounds=1)
            return {
                key: SimpleNamespace(entries=listed[key], search=search, someone_answered=True, unread=0)
                for key in keys
            }

        monkeypatch.setattr(registry.lookups, "find", find)

        async def read() -> None:
            assert len(await registry.node_ids()) == 256 * count

        longest_s, whole_s = await holds(read())
        assert longest_s < whole_s / 3

    world.run_until_complete(scenario())
