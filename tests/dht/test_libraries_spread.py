"""How publishers' libraries reach all hosts of memories in a large swarm, without flooding those that hold them."""

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.simulated_p2p import Link, SimulatedIdentity, VirtualLoop, simulated_world
from benchmarks.simulated_swarm import SimulatedSwarm
from dht.library import LibraryEntry, MemoryRegistry
from dht.memory import MemoryID, Part
from dht.registry import Registry
from peer.identity import PeerID

FOUNDER: Any = SimulatedIdentity(0)
NODES = 300
SAMPLE = LibraryEntry(
    MemoryID.of("bible", FOUNDER.peer_id), FOUNDER.peer_id, Part(b"m" * 32, 4000), 1, 9, 99, (), "", 4, (4,)
)


class Swarm:
    """A founder, and nodes of which some host memories, and so follow the libraries. Counts calls by receiver."""

    def __init__(self, swarm: SimulatedSwarm, hosts: int) -> None:
        self.simulated = swarm
        self.publisher = self.follower_at(swarm, 0, FOUNDER)
        self.hosts = [self.follower_at(swarm, n) for n in range(1, hosts + 1)]
        self.called: Counter[tuple[str, PeerID]] = Counter()
        call = swarm.network.call

        async def counted(sender: PeerID, receiver: PeerID, method: str, request: bytes) -> bytes:
            self.called[method, receiver] += 1
            return await call(sender, receiver, method, request)

        swarm.network.call = counted  # type: ignore[method-assign]  # counts

    def follower_at(self, swarm: SimulatedSwarm, number: int, identity: Any = None) -> MemoryRegistry:
        peer = swarm.peers[number]
        if identity is None:
            return MemoryRegistry(peer.registry)
        return MemoryRegistry(
            Registry(peer.dht, swarm.keys, identity, now=peer.registry.now, rng=peer.registry.rng)
        )

    async def publish(self, revision: int) -> None:
        await self.publisher.publish_library([replace(SAMPLE, revision=revision)])

    async def round(self) -> list[int]:
        """One round of all hosts. Returns the revision that each of them knows."""
        found = await asyncio.gather(*(host.follow() for host in self.hosts))
        await asyncio.sleep(10)
        return [max((e.revision for some in each.values() for e in some), default=0) for each in found]


def play(
    scenario: Callable[[Swarm], Coroutine[Any, Any, None]], monkeypatch: pytest.MonkeyPatch, hosts: int
) -> None:
    monkeypatch.setattr("dht.library._READ_BY", 10)
    monkeypatch.setattr("dht.library._KEPT_BY", 10)
    with simulated_world() as loop:
        monkeypatch.setattr("peer.clock.now", loop.unix_time)
        loop.run_until_complete(_play(loop, scenario, hosts))


async def _play(
    loop: VirtualLoop, scenario: Callable[[Swarm], Coroutine[Any, Any, None]], hosts: int
) -> None:
    simulated = await SimulatedSwarm.start(loop, NODES, 16, Link(rtt_s=0.05), seed=1, in_place=True)
    swarm = Swarm(simulated, hosts)
    await swarm.publish(1)
    while min(await swarm.round()) < 1:
        assert loop.time() < 3600
    await scenario(swarm)


@pytest.mark.parametrize(("hosts", "rounds"), [(NODES - 1, 4), (60, 8)])
def test_all_hosts_know_a_new_revision_within_a_few_rounds(
    monkeypatch: pytest.MonkeyPatch, hosts: int, rounds: int
) -> None:
    async def scenario(swarm: Swarm) -> None:
        for revision in (2, 3):
            await swarm.publish(revision)
            known = [await swarm.round() for _ in range(rounds)]
            assert known[-1] == [revision] * hosts

    play(scenario, monkeypatch, hosts)


def test_whoever_hides_a_new_library_keeps_it_from_nobody_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of the nodes store nothing, and tell nobody."""

    async def scenario(swarm: Swarm) -> None:
        for liar in swarm.simulated.peers[1::3]:
            liar.dht.storage.put = lambda key, entries: set()  # type: ignore[method-assign]
        swarm.hosts = [host for number, host in enumerate(swarm.hosts) if number % 3]
        await swarm.publish(2)
        known = [await swarm.round() for _ in range(12)]
        assert known[-1] == [2] * len(swarm.hosts)

    play(scenario, monkeypatch, NODES - 1)


def test_no_node_is_asked_much_more_than_others_and_nobody_tells_old_news(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(swarm: Swarm) -> None:
        await swarm.publish(2)
        swarm.called.clear()
        for _ in range(6):
            await swarm.round()
        told = sum(count for (method, _), count in swarm.called.items() if method == "store")
        assert NODES < told < 9 * NODES, "each tells eight others once"
        swarm.called.clear()
        rounds = 20
        for _ in range(rounds):
            await swarm.round()
        asked = Counter({peer: n for (method, peer), n in swarm.called.items() if method == "find"})
        assert max(asked.values()) < 0.1 * rounds * NODES
        assert not any(method == "store" for method, _ in swarm.called)

    play(scenario, monkeypatch, NODES - 1)


def test_a_few_hosts_store_the_libraries_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(swarm: Swarm) -> None:
        stores = []
        for _ in range(6):
            swarm.called.clear()
            await asyncio.gather(*(host.keep_libraries() for host in swarm.hosts))
            stores.append(sum(n for (method, _), n in swarm.called.items() if method == "store"))
        assert 6 * 5 * 5 < sum(stores) < 6 * 10 * 12, "ten hosts at five nodes or a few more"

    play(scenario, monkeypatch, NODES - 1)
