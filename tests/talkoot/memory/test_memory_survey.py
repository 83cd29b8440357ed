"""How many replicas the shards of a memory have, according to the DHT."""

from collections.abc import Collection, Iterator
from dataclasses import replace

import pytest
from simulated_readings import memory
from three_hosts import Swarm, swarm_for, three_hosts

from dht.announcements import ReplicaState
from dht.library import MemoryRegistry
from dht.memory import Cell
from peer.loop import LoopThread
from talkoot.memory.replication import survey

LIFETIME_S = 60.0
Cells = dict[Cell, tuple[ReplicaState, Collection[bytes]]]
A, B, C = (bytes([number]) * 32 for number in (1, 2, 3))


@pytest.fixture
def swarm(loop: LoopThread, request: pytest.FixtureRequest) -> Iterator[Swarm]:
    with three_hosts(loop) as hosts:
        yield swarm_for(loop, hosts, request)


def test_replicas_are_counted_by_shard(swarm: Swarm) -> None:
    """One host leaves, and nobody announces one of the shards."""
    entry = replace(memory(shards=4).entry, grid=(2, 2))
    announced: tuple[Cells, ...] = (
        {(0, 1): (ReplicaState.SERVING, [A, B]), (1, 0): (ReplicaState.SERVING, [C])},
        {(0, 1): (ReplicaState.SERVING, [A])},
        {(1, 0): (ReplicaState.LEAVING, [C])},
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
        for n, cells in enumerate(announced):
            await MemoryRegistry(swarm.registry(n)).announce(entry.memory, cells, LIFETIME_S)
        found = await survey(MemoryRegistry(swarm.registry(0)), entry)
        assert found.replicas == {A[:8]: 2, B[:8]: 1, C[:8]: 1}
        assert (found.served, found.fewest, found.mean, found.below(), found.below(1)) == (3, 0, 1.0, 3, 1)
        assert found.hosts == {swarm.hosts[0].peer_id, swarm.hosts[1].peer_id}
        assert found.is_whole

    swarm.run(scenario())


def test_no_more_shards_are_counted_than_a_memory_may_have(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("talkoot.memory.replication.MAX_SHARDS", 2)
    entry = replace(memory(shards=2).entry, grid=(2, 2))

    async def scenario() -> None:
        for n in range(2):
            announced: Cells = {(0, 1): (ReplicaState.SERVING, [A, B, C])}
            await MemoryRegistry(swarm.registry(n)).announce(entry.memory, announced, LIFETIME_S)
        found = await survey(MemoryRegistry(swarm.registry(0)), entry)
        assert list(found.replicas.values()) == [2, 2]

    swarm.run(scenario())
