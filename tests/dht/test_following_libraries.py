"""How hosts of memories follow the publishers' libraries in a large swarm, without flooding the few that hold them."""

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.simulated_p2p import Link, SimulatedIdentity, VirtualLoop, simulated_world
from benchmarks.simulated_swarm import SimulatedPeer, SimulatedSwarm
from dht.library import LibraryEntry, MemoryRegistry
from dht.memory import MemoryID, Part
from dht.registry import Registry
from peer.identity import PeerID
from peer.kademlia.routing import REPLICAS, key_id_of

FOUNDER: Any = SimulatedIdentity(0)
NODES, HOSTS = 80, 50
SAMPLE = LibraryEntry(
    MemoryID.of("bible", FOUNDER.peer_id), FOUNDER.peer_id, Part(b"m" * 32, 4000), 1, 9, 99, (), "", 4, (4,)
)
DAY_S = 86400.0


class Swarm:
    """A founder, and nodes of which most host memories. All hosts know revision 1. Counts calls by method and
    receiver.
    """

    def __init__(self, swarm: SimulatedSwarm) -> None:
        self.simulated = swarm
        self.publisher = self.founder_at(0)
        self.hosts = [MemoryRegistry(peer.registry) for peer in swarm.peers[1 : HOSTS + 1]]
        self.called: Counter[tuple[str, PeerID]] = Counter()
        call = swarm.network.call

        async def counted(sender: PeerID, receiver: PeerID, method: str, request: bytes) -> bytes:
            self.called[method, receiver] += 1
            return await call(sender, receiver, method, request)

        swarm.network.call = counted  # type: ignore[method-assign]  # counts

    def founder_at(self, number: int) -> MemoryRegistry:
        peer = self.simulated.peers[number]
        registry = peer.registry
        return MemoryRegistry(
            Registry(peer.dht, self.simulated.keys, FOUNDER, now=registry.now, rng=registry.rng)
        )

    def holders(self) -> list[SimulatedPeer]:
        """The nodes that hold the libraries, if all is well."""
        key = key_id_of(self.simulated.keys.library)
        return sorted(self.simulated.peers, key=lambda peer: peer.dht.node_id ^ key)[:REPLICAS]

    async def publish(self, revision: int) -> None:
        await self.publisher.publish_library([replace(SAMPLE, revision=revision)])

    async def round(self) -> list[int]:
        """One round of all hosts. Returns the revision that each of them knows."""
        found = await asyncio.gather(*(host.follow() for host in self.hosts))
        await asyncio.sleep(10)
        return [revision_in(each) for each in found]


def revision_in(found: dict[PeerID, tuple[LibraryEntry, ...]]) -> int:
    return max((entry.revision for entries in found.values() for entry in entries), default=0)


def play(scenario: Callable[[Swarm], Coroutine[Any, Any, None]], monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated_world() as loop:
        monkeypatch.setattr("peer.clock.now", loop.unix_time)
        loop.run_until_complete(_play(loop, scenario))


async def _play(loop: VirtualLoop, scenario: Callable[[Swarm], Coroutine[Any, Any, None]]) -> None:
    simulated = await SimulatedSwarm.start(loop, NODES, 16, Link(rtt_s=0.05), seed=1, in_place=True)
    swarm = Swarm(simulated)
    await swarm.publish(1)
    assert await swarm.round() == [1] * HOSTS
    await scenario(swarm)


def test_all_hosts_see_a_new_revision_in_their_next_round(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(swarm: Swarm) -> None:
        for revision in range(2, 8):
            await swarm.publish(revision)
            assert await swarm.round() == [revision] * HOSTS

    play(scenario, monkeypatch)


def test_following_costs_a_third_of_the_calls_of_looking_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(swarm: Swarm) -> None:
        for _ in range(3):
            # until they know the nodes near the key
            await asyncio.gather(*(host.libraries() for host in swarm.hosts))
        swarm.called.clear()
        for _ in range(8):
            await asyncio.gather(*(host.libraries() for host in swarm.hosts))
        looking_up = swarm.called.total()
        swarm.called.clear()
        for _ in range(8):
            await swarm.round()
        assert swarm.called.total() < looking_up / 3

    play(scenario, monkeypatch)


def test_holders_that_hide_a_new_revision_do_so_for_eight_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of five have nothing new for anybody."""

    async def scenario(swarm: Swarm) -> None:
        for liar in swarm.holders()[:2]:
            liar.dht.storage.put = lambda key, entries: set()  # type: ignore[method-assign]
        await swarm.publish(2)
        known = [await swarm.round() for _ in range(8)]
        assert 1 in known[0], "some hosts ask a liar"
        assert known[-1] == [2] * HOSTS

    play(scenario, monkeypatch)


def test_whom_no_holder_answers_looks_the_libraries_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(swarm: Swarm) -> None:
        dead = {peer.peer_id for peer in swarm.holders()}
        swarm.simulated.network.kill(dead)
        await swarm.publish(2)
        swarm.hosts = [host for host in swarm.hosts if host._registry.peer_id not in dead]
        known = await swarm.round()
        assert known.count(2) > 0.97 * len(known), "a few ask others first that were near the key, too"
        for _ in range(7):
            known = await swarm.round()
        assert known == [2] * len(known)

    play(scenario, monkeypatch)


def test_a_publisher_that_renews_its_library_keeps_a_later_one_from_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(swarm: Swarm) -> None:
        node = swarm.founder_at(HOSTS + 1)
        assert revision_in(await node.follow()) == 1
        await asyncio.sleep(16 * DAY_S)
        await swarm.publish(2)
        monkeypatch.setattr(node._registry, "ask_holder", _answers_nothing_new)
        assert revision_in(await node.follow()) == 1
        await node.keep_libraries()
        assert revision_in(await swarm.hosts[0].libraries()) == 2

    play(scenario, monkeypatch)


async def _answers_nothing_new(key: str) -> bool:
    return True
