"""Peers that announce shards of memories which they do not have: nobody loses a shard by believing them."""

import asyncio
from collections.abc import Set
from pathlib import Path
from threading import get_ident
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest
from callers import numbered_identities
from grpc import StatusCode
from grpc.aio import AioRpcError, Metadata
from memory_folders import SampleMemory
from memory_peers import until
from memory_samples import peer_ids
from published_memories import HOST, folder, memory_id, publishing, until_hosted
from real_swarm import Play, Village, playing

from dht.announcements import NodeInfo, ReplicaState
from dht.library import MemoryRegistry, RegionHost
from dht.memory import MemoryID, ShardInfo
from expert_server.memory.hosting import MemoryHosting
from expert_server.memory.placement import SeenShard, ShardKey
from expert_server.memory.proofs import ReplicaProofs, believed
from expert_server.node import Node
from peer.errors import ExpertError, TransferError, WireError
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
        regions = {
            region: (ReplicaState.SERVING, [shard.root for shard in shards])
            for region, shards in MEMORY.manifest.by_region.items()
        }
        await MemoryRegistry(liar.swarm.registry).announce(memory_id(village, MEMORY), regions, 500.0)
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
        await until(lambda: bool(founder.memories._proofs.doubted()))
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
            ShardKey(memory, info.root): SeenShard(info, 0, frozenset({host}), frozenset()) for info in infos
        }
        claims = {(host, key) for key in seen}
        assert await proofs.proven(claims, seen) == claims
        assert not proofs.doubted()
        # A peer that claims a revocation where there was none has proven nothing.
        proofs._revoked = lambda memory: frozenset()
        assert await proofs.proven(claims, seen) == set()

    play(scenario)


class OneHost:
    """Proofs asked of one host that is not reached, on a clock that stands still."""

    def __init__(self, host: PeerID, failure: Exception | None) -> None:
        """`failure`: what asking for a proof raises; None: the host has no node record."""
        self.now = 1000.0
        self.host = host

        async def nodes(peers: set[PeerID]) -> dict[PeerID, Any]:
            return {} if failure is None else {host: SimpleNamespace(peer_id=host)}

        async def stub(node: object) -> tuple[object, tuple[()]]:
            assert failure is not None
            raise failure

        keys = SimpleNamespace(swarm_id="sauna")
        swarm: Any = SimpleNamespace(registry=SimpleNamespace(nodes=nodes), keys=keys)
        parts: Any = SimpleNamespace(service=lambda least_bytes: SimpleNamespace(stub=stub))
        self.proofs = ReplicaProofs(swarm, parts, lambda memory: (), clock=lambda: self.now)
        memory = MemoryID("some", "publisher")
        self.seen = {
            ShardKey(memory, info.root): SeenShard(info, 0, frozenset({host}), frozenset())
            for info in MEMORY.manifest.shards
        }

    def is_counted(self) -> bool:
        return any(shard.serving for shard in believed(self.seen, self.proofs.doubted()).values())

    def doubted_s(self) -> float:
        """Asks for proofs of all its shards. Returns how long it is doubted then, in steps of 5 s."""
        began = self.now
        assert asyncio.run(self.proofs.proven({(self.host, key) for key in self.seen}, self.seen)) == set()
        while not self.is_counted():
            self.now += 5
        return self.now - began


@pytest.mark.parametrize(
    "failure",
    [
        None,
        TransferError("its address refuses connections"),
        TimeoutError(),
        ExpertError(StatusCode.UNAVAILABLE, "no session: failed to connect"),
        ExpertError(StatusCode.RESOURCE_EXHAUSTED, "no session: too many calls are in progress"),
        AioRpcError(StatusCode.UNAUTHENTICATED, Metadata(), Metadata()),
        AioRpcError(StatusCode.NOT_FOUND, Metadata(), Metadata()),
    ],
    ids=["no record", "refused", "late", "gone", "busy", "no session", "not found"],
)
def test_a_host_that_is_not_reached_is_doubted_for_a_short_time_and_then_for_longer(
    identities: list[Identity], failure: Exception | None
) -> None:
    """Its record may be late, or old, or it has to verify its disk. All claims of one moment count as one failure."""
    host = OneHost(identities[1].peer_id, failure)
    assert [host.doubted_s() for _ in range(6)] == [15, 30, 60, 120, 240, 300]


@pytest.mark.parametrize(
    "failure",
    [
        ExpertError(StatusCode.DATA_LOSS, "the server gave no usable session"),
        AioRpcError(StatusCode.INTERNAL, Metadata(), Metadata()),
        WireError("a proof that leads to another root"),
    ],
    ids=["no usable session", "fails", "wrong"],
)
def test_a_host_that_gives_a_wrong_proof_or_fails_is_doubted_for_long_at_once(
    identities: list[Identity], failure: Exception
) -> None:
    assert OneHost(identities[1].peer_id, failure).doubted_s() == 300


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
            info, 0, frozenset({me, host}), frozenset()
        )
    }
    for _ in range(3):
        asyncio.run(proofs.check_some(seen))
    assert asked == [{host}, set(), set()]
    now += 15
    asyncio.run(proofs.check_some(seen))
    assert asked[-1] == {host}


class Counting(frozenset[Any]):
    """Counts how often somebody looks for an element, and remembers in which threads others are taken from it."""

    looked = 0
    threads: ClassVar[set[int]] = set()

    def __contains__(self, element: object) -> bool:
        Counting.looked += 1
        return super().__contains__(element)

    def __sub__(self, other: Set[object]) -> frozenset[Any]:
        Counting.threads.add(get_ident())
        return super().__sub__(other)


def test_strangers_that_announce_all_shards_of_a_region_are_looked_at_only_for_the_shard_to_take() -> None:
    """Before each download, a node looks again who has the shard, on its event loop."""
    memory, peers = MemoryID("some", "publisher"), peer_ids(150)
    shards = [ShardInfo((0,), number.to_bytes(8) + bytes(24), 100, 30_000) for number in range(256)]
    announced = Counting(shard.short for shard in shards)
    hosts = [RegionHost(peer, ReplicaState.SERVING, announced) for peer in peers]

    async def region_hosts(memory: MemoryID, regions: list[int]) -> Any:
        return dict.fromkeys(regions, hosts)

    store = SimpleNamespace(manifest=SimpleNamespace(by_region={5: shards}))
    hosting: Any = SimpleNamespace(
        _memories=SimpleNamespace(region_hosts=region_hosts),
        hosted=SimpleNamespace(stores={memory: store}),
        _proofs=SimpleNamespace(doubted=lambda: frozenset(peers[:50])),
    )
    Counting.looked = 0
    key = ShardKey(memory, shards[7].root)
    seen = asyncio.run(MemoryHosting._seen_now(hosting, key, 5))
    assert seen == SeenShard(shards[7], 5, frozenset(peers[50:]), frozenset())
    assert Counting.looked == len(peers)
    assert asyncio.run(MemoryHosting._seen_now(hosting, ShardKey(memory, b"another"), 5)) is None


def test_claims_of_many_strangers_are_drawn_off_the_loop() -> None:
    memory, (me, *peers) = MemoryID("some", "publisher"), peer_ids(20)
    infos = [ShardInfo((0,), number.to_bytes(32), 100, 30_000) for number in range(64)]
    seen = {
        ShardKey(memory, info.root): SeenShard(info, 0, Counting((me, *peers)), frozenset()) for info in infos
    }
    drawn = set[PeerID]()

    async def nodes(asked: set[PeerID]) -> dict[PeerID, NodeInfo]:
        drawn.update(asked)
        return {}

    swarm: Any = SimpleNamespace(registry=SimpleNamespace(nodes=nodes), host=SimpleNamespace(peer_id=me))
    proofs = ReplicaProofs(swarm, cast(PartClient, None), lambda memory: ())
    Counting.threads.clear()
    asyncio.run(proofs.check_some(seen))
    assert get_ident() not in Counting.threads
    assert Counting.threads
    assert drawn <= set(peers)
    assert len(drawn) > 1
