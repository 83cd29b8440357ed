"""How many replicas the shards of a memory have, according to the DHT."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from loop_holds import pauses
from memory_samples import peer_ids
from simulated_readings import memory
from three_hosts import Swarm, swarm_for, three_hosts

from dht.announcements import ReplicaState
from dht.library import LibraryEntry, MemoryRegistry, RegionHost
from dht.memory import MemoryID, ShardInfo
from peer.loop import LoopThread
from talkoot.memory.publish import Publication
from talkoot.memory.replication import survey

LIFETIME_S = 60.0
Regions = dict[int, tuple[ReplicaState, Collection[bytes]]]
A, B, C = (bytes([number]) * 32 for number in (1, 2, 3))


@pytest.fixture
def swarm(loop: LoopThread, request: pytest.FixtureRequest) -> Iterator[Swarm]:
    with three_hosts(loop) as hosts:
        yield swarm_for(loop, hosts, request)


def test_replicas_are_counted_by_shard(swarm: Swarm, monkeypatch: pytest.MonkeyPatch) -> None:
    """One host leaves, and nobody announces one of the shards."""
    monkeypatch.setattr("talkoot.memory.replication._REGIONS_AT_ONCE", 1)
    entry = replace(memory(shards=4).entry, grid=(2, 2))
    announced: tuple[Regions, ...] = (
        {1: (ReplicaState.SERVING, [A, B]), 2: (ReplicaState.SERVING, [C])},
        {1: (ReplicaState.SERVING, [A])},
        {2: (ReplicaState.LEAVING, [C])},
    )

    async def scenario() -> None:
        nobody = await survey(MemoryRegistry(swarm.registry(0)), entry)
        assert (nobody.served, nobody.fewest, nobody.mean, nobody.below(), nobody.hosts) == (
            0,
            0,
            0.0,
            4,
            frozenset(),
        )
        for n, regions in enumerate(announced):
            await MemoryRegistry(swarm.registry(n)).announce(entry.memory, regions, LIFETIME_S)
        found = await survey(MemoryRegistry(swarm.registry(0)), entry)
        assert found.replicas == {A[:8]: 2, B[:8]: 1, C[:8]: 1}
        assert (found.served, found.fewest, found.mean, found.below(), found.below(1)) == (3, 0, 1.0, 3, 1)
        assert found.hosts == {swarm.hosts[0].peer_id, swarm.hosts[1].peer_id}

    swarm.run(scenario())


def test_no_more_shards_are_counted_than_a_memory_may_have(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("talkoot.memory.replication.MAX_SHARDS", 2)
    entry = replace(memory(shards=2).entry, grid=(2, 2))

    async def scenario() -> None:
        for n in range(2):
            announced: Regions = {1: (ReplicaState.SERVING, [A, B, C])}
            await MemoryRegistry(swarm.registry(n)).announce(entry.memory, announced, LIFETIME_S)
        found = await survey(MemoryRegistry(swarm.registry(0)), entry)
        assert list(found.replicas.values()) == [2, 2]

    swarm.run(scenario())


def test_strangers_that_announce_all_shards_do_not_hold_the_loop() -> None:
    regions, shards = range(4), frozenset(number.to_bytes(8) for number in range(1024))
    hosts = tuple(RegionHost(peer, ReplicaState.SERVING, shards) for peer in peer_ids(256))
    entry = replace(memory(shards=2).entry, grid=(4,))

    async def active_regions(entry: LibraryEntry) -> Collection[int]:
        return regions

    async def region_hosts(
        memory: MemoryID, regions: Collection[int]
    ) -> Mapping[int, tuple[RegionHost, ...]]:
        return dict.fromkeys(regions, hosts)

    memories: Any = SimpleNamespace(active_regions=active_regions, region_hosts=region_hosts)

    async def count() -> None:
        assert set((await survey(memories, entry)).replicas.values()) == {len(regions) * len(hosts)}

    assert pauses(count, 1 / 5)


def test_strangers_that_announce_all_shards_do_not_hold_a_publishers_loop() -> None:
    peers = peer_ids(256)
    by_region = {
        region: [ShardInfo((region,), bytes([region, n]) * 16, 100, 3000) for n in range(16)]
        for region in range(16)
    }
    found = {
        region: tuple(
            RegionHost(peer, ReplicaState.SERVING, frozenset(s.short for s in shards)) for peer in peers
        )
        for region, shards in by_region.items()
    }

    async def region_hosts(
        memory: MemoryID, regions: Collection[int]
    ) -> Mapping[int, tuple[RegionHost, ...]]:
        return found

    async def proven(claims: Collection[Any], seen: Any) -> set[Any]:
        return {*claims}

    publication: Any = Publication.__new__(Publication)  # without its server
    publication.swarm = SimpleNamespace(host=SimpleNamespace(peer_id=None))
    publication.entry, publication._proven = memory(shards=256).entry, set()
    publication.manifest = SimpleNamespace(by_region=by_region)
    publication.memories = SimpleNamespace(region_hosts=region_hosts)
    publication._proofs = SimpleNamespace(doubted=frozenset, proven=proven)

    async def look() -> None:
        counted = sum(map(len, (await publication.replication()).by_root.values()))
        assert counted == len(publication._proven) > 0

    assert pauses(look, 1 / 5)
