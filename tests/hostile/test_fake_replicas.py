"""Peers that announce shards of memories which they do not have: nobody loses a shard by believing them."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from callers import numbered_identities
from memory_folders import SampleMemory
from memory_peers import until
from published_memories import HOST, folder, memory_id, publishing, until_hosted
from real_swarm import Play, Village, playing

from dht.announcements import NodeInfo, ReplicaState
from dht.library import MemoryRegistry
from dht.memory import MemoryID
from expert_server.memory.placement import SeenShard, ShardKey
from expert_server.memory.proofs import ReplicaProofs
from expert_server.node import Node
from peer.identity import Identity, PeerID
from peer.loop import LoopThread
from peer.rpc.parts import PartClient

MEMORY = SampleMemory.make(each=30)


@pytest.fixture(scope="module")
def identities() -> list[Identity]:
    return numbered_identities(4)


@pytest.fixture
def play(loop: LoopThread, identities: list[Identity], tmp_path: Path, long_lives: None) -> Play:
    return playing(loop, identities, tmp_path)


async def pretending(village: Village, founder: Node) -> list[Node]:
    """Two nodes that announce all shards and have none."""
    invite, liars = await founder.swarm.invite(), []
    for number in (1, 2):
        liar = await village.join(number, invite, experts=0)
        await village.run(liar)
        cells = {shard.cell: (ReplicaState.SERVING, [shard.root]) for shard in MEMORY.manifest.shards}
        await MemoryRegistry(liar.swarm.registry).announce(memory_id(village, MEMORY), cells, 500.0)
        liars.append(liar)
    return liars


def test_shards_get_real_replicas_though_liars_announce_enough(play: Play) -> None:
    async def scenario(village: Village) -> None:
        founder = await publishing(village, MEMORY, drain_timeout_s=100)
        memory = memory_id(village, MEMORY)
        running = await village.run(founder)
        await until_hosted(founder.swarm, memory, 1, MEMORY)
        await pretending(village, founder)
        node = await village.join(3, await founder.swarm.invite(), **HOST)
        await village.run(node)
        # A host that leaves does not believe them either.
        running.cancel()
        await founder.stop()
        assert node.memories.hosted.shards == 4
        assert len(list((folder(village, 3, MEMORY) / "shards").iterdir())) == 4

    play(scenario)


def test_no_host_drops_a_shard_for_replicas_that_are_not_proven(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(village: Village) -> None:
        founder = await publishing(village, MEMORY)
        memory = memory_id(village, MEMORY)
        await village.run(founder)
        await until_hosted(founder.swarm, memory, 1, MEMORY)
        liars = await pretending(village, founder)
        key = ShardKey(memory, MEMORY.roots[0])
        asked = asyncio.Event()

        def keener(_: ShardKey) -> list[object]:
            asked.set()
            return [liar.swarm.host.peer_id for liar in liars]

        monkeypatch.setattr(founder.memories._placement, "to_drop", lambda size: [key])
        monkeypatch.setattr(founder.memories._placement, "keener", keener)
        monkeypatch.setattr(founder.memories.hosted, "_most_bytes", 1)
        async with asyncio.timeout(60):
            await asked.wait()
        await until(lambda: bool(founder.memories._proofs._doubted_until))
        assert founder.memories.hosted.shards == 4

    play(scenario)


def test_hosts_of_a_shard_of_which_all_is_revoked_are_not_taken_for_liars(play: Play) -> None:
    async def scenario(village: Village) -> None:
        whole = SampleMemory.make(each=30, is_twofold=True)
        gone = whole.revoking(*((whole.roots[0], n) for n in range(30)))
        founder = await publishing(village, gone)
        memory = memory_id(village, gone)
        await village.run(founder)
        node = await village.join(1, await founder.swarm.invite(), **HOST)
        await village.run(node)
        await until_hosted(founder.swarm, memory, 2, gone)
        host, proofs = founder.swarm.host.peer_id, node.memories._proofs
        infos = whole.manifest.shards[0], whole.manifest.shards[4]
        seen = {
            ShardKey(memory, info.root): SeenShard(info, frozenset({host}), frozenset()) for info in infos
        }
        claims = {(host, key) for key in seen}
        assert await proofs.proven(claims, seen) == claims
        assert not proofs._doubted_until
        # A peer that claims a revocation where there was none has proven nothing.
        proofs._revoked = lambda memory: frozenset()
        assert await proofs.proven(claims, seen) == set()

    play(scenario)


def test_a_host_whose_record_is_late_is_doubted_for_a_short_time_and_one_that_has_none_for_longer(
    identities: list[Identity],
) -> None:
    now, host = 1000.0, identities[1].peer_id

    async def nodes(peers: set[PeerID]) -> dict[PeerID, NodeInfo]:
        return {}

    swarm: Any = SimpleNamespace(registry=SimpleNamespace(nodes=nodes))
    proofs = ReplicaProofs(swarm, cast(PartClient, None), lambda memory: (), clock=lambda: now)
    info = MEMORY.manifest.shards[0]
    key = ShardKey(MemoryID("some", "publisher"), info.root)
    seen = {key: SeenShard(info, frozenset({host}), frozenset())}

    def is_counted() -> bool:
        return host in proofs.counted(seen)[key].serving

    pauses_s = list[float]()
    for _ in range(6):
        began = now
        assert asyncio.run(proofs.proven({(host, key)}, seen)) == set()
        while not is_counted():
            now += 5
        pauses_s.append(now - began)
    assert pauses_s == [15, 30, 60, 120, 240, 300]


def test_a_host_that_is_doubted_is_not_asked_for_more_proofs_meanwhile(identities: list[Identity]) -> None:
    """A host that has died stays announced for some periods, and each proof may take ten seconds."""
    now, me, host, asked = 1000.0, identities[0].peer_id, identities[1].peer_id, list[set[PeerID]]()

    async def nodes(peers: set[PeerID]) -> dict[PeerID, NodeInfo]:
        asked.append(peers)
        return {}

    swarm: Any = SimpleNamespace(registry=SimpleNamespace(nodes=nodes), host=SimpleNamespace(peer_id=me))
    proofs = ReplicaProofs(swarm, cast(PartClient, None), lambda memory: (), clock=lambda: now)
    info = MEMORY.manifest.shards[0]
    seen = {
        ShardKey(MemoryID("some", "publisher"), info.root): SeenShard(
            info, frozenset({me, host}), frozenset()
        )
    }
    for _ in range(3):
        asyncio.run(proofs.check_some(seen))
    assert asked == [{host}, set(), set()]
    now += 15
    asyncio.run(proofs.check_some(seen))
    assert asked[-1] == {host}
