"""How a list of revoked tokens reaches all peers of a large swarm."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.simulated_p2p import Link, SimulatedIdentity, VirtualLoop, simulated_world
from benchmarks.simulated_swarm import SimulatedPeer, SimulatedSwarm
from dht.admission import SwarmAdmission
from dht.founder_records import LIFETIME_S, Revocations
from dht.registry import Registry
from peer.identity import PeerID
from peer.kademlia.routing import key_id_of

FOUNDER: Any = SimulatedIdentity(0)
NODES, READERS = 160, 24


class Member:
    """A peer with its copy of the list. A node also hears of lists that others store at it."""

    def __init__(self, swarm: SimulatedSwarm, peer: SimulatedPeer, seed: int, identity: Any = None) -> None:
        self.peer = peer
        self.admission = SwarmAdmission(swarm.keys)
        self.admission.learn(FOUNDER.public_key, "token")
        registry = peer.registry
        if identity is not None:
            registry = Registry(peer.dht, swarm.keys, identity, now=registry.now, rng=registry.rng)
        self.revocations = Revocations(registry, self.admission, rng=random.Random(seed))

    async def listen(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            self.revocations.hear()


class Swarm:
    """Nodes, and readers that are no nodes, which all have looked once. Counts calls by receiver."""

    def __init__(self, swarm: SimulatedSwarm) -> None:
        self.founder = Member(swarm, swarm.peers[0], 0, FOUNDER)
        self.nodes = [Member(swarm, peer, n) for n, peer in enumerate(swarm.peers[1:], 1)]
        self.readers: list[Member] = []
        self.called: Counter[tuple[str, PeerID]] = Counter()
        self.simulated = swarm
        call = swarm.network.call

        async def counted(sender: PeerID, receiver: PeerID, method: str, request: bytes) -> bytes:
            self.called[method, receiver] += 1
            return await call(sender, receiver, method, request)

        swarm.network.call = counted  # type: ignore[method-assign]  # counts

    async def look(self) -> None:
        """One round of all members."""
        await asyncio.gather(*(each.revocations.refresh() for each in (*self.nodes, *self.readers)))

    def knowing(self, serial: int, members: list[Member]) -> float:
        return sum(serial in each.admission.revoked for each in members) / len(members)


def play(scenario: Callable[[Swarm], Coroutine[Any, Any, None]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dht.founder_records._READ_BY", 10)
    with simulated_world() as loop:
        monkeypatch.setattr("dht.founder_records.clock", SimpleNamespace(now=loop.unix_time))
        loop.run_until_complete(_play(loop, scenario))


async def _play(loop: VirtualLoop, scenario: Callable[[Swarm], Coroutine[Any, Any, None]]) -> None:
    simulated = await SimulatedSwarm.start(loop, NODES, 16, Link(rtt_s=0.05), seed=1, in_place=True)
    swarm = Swarm(simulated)
    for n in range(READERS):
        peer = await simulated.make_peer(serves_dht=False)
        await simulated.join(peer)
        swarm.readers.append(Member(simulated, peer, 1000 + n))
    await swarm.look()
    listening = [asyncio.ensure_future(each.listen()) for each in (swarm.founder, *swarm.nodes)]
    try:
        await scenario(swarm)
    finally:
        for task in listening:
            task.cancel()
        await asyncio.sleep(10)  # until those who tell others have done so


def test_all_nodes_know_a_new_list_within_seconds_and_the_others_after_their_next_looks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(swarm: Swarm) -> None:
        for serial in (7, 8):
            await swarm.founder.revocations.publish(range(7, serial + 1))
            await asyncio.sleep(10)
            assert swarm.knowing(serial, swarm.nodes) >= 0.97, "few others know the rest"
            assert swarm.knowing(serial, swarm.readers) == 0
            for _ in range(2):
                await swarm.look()
            assert swarm.knowing(serial, [*swarm.nodes, *swarm.readers]) == 1

    play(scenario, monkeypatch)


def test_no_node_is_asked_much_more_than_others_and_nobody_tells_old_news(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(swarm: Swarm) -> None:
        await swarm.founder.revocations.publish([7])
        await asyncio.sleep(10)
        for _ in range(3):
            await swarm.look()
        assert swarm.knowing(7, [*swarm.nodes, *swarm.readers]) == 1
        told = sum(count for (method, _), count in swarm.called.items() if method == "store")
        assert told < 9 * (NODES + READERS), "each tells eight others once"
        swarm.called.clear()
        rounds = 10
        for _ in range(rounds):
            await swarm.look()
            await asyncio.sleep(10)
        asked = Counter({peer: n for (method, peer), n in swarm.called.items() if method == "find"})
        assert max(asked.values()) < 0.1 * rounds * (NODES + READERS)
        assert not any(method == "store" for method, _ in swarm.called)

    play(scenario, monkeypatch)


def test_whoever_hides_the_list_keeps_it_from_nobody_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of the nodes store nothing, and none of them tells others."""

    async def scenario(swarm: Swarm) -> None:
        liars = swarm.nodes[::3]
        honest = [node for node in swarm.nodes if node not in liars]
        for liar in liars:
            liar.peer.dht.storage.put = lambda key, entries: set()  # type: ignore[method-assign]
        await swarm.founder.revocations.publish([7])
        await asyncio.sleep(10)
        assert swarm.knowing(7, honest) >= 0.97
        for _ in range(12):
            await swarm.look()
        assert swarm.knowing(7, [*honest, *swarm.readers]) == 1

    play(scenario, monkeypatch)


def test_an_older_list_that_is_stored_again_is_not_news(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(swarm: Swarm) -> None:
        registry = swarm.nodes[0].peer.registry
        await swarm.founder.revocations.publish([7])
        older = registry.stored_founder_record(swarm.simulated.keys.revocations)
        await asyncio.sleep(10)
        await swarm.founder.revocations.publish([7, 8])
        await asyncio.sleep(10)
        older = older or registry.stored_founder_record(swarm.simulated.keys.revocations)
        assert older is not None
        swarm.called.clear()
        registry.tell(older, 8)
        await asyncio.sleep(10)
        assert sum(count for (method, _), count in swarm.called.items() if method == "store") <= 8
        assert swarm.knowing(8, swarm.nodes) >= 0.97
        held = swarm.nodes[5].peer.dht.storage.get(key_id_of(swarm.simulated.keys.revocations))
        assert len(held) == 1

    play(scenario, monkeypatch)


def test_a_founder_restored_from_an_older_backup_keeps_what_was_revoked_since(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(swarm: Swarm) -> None:
        await swarm.founder.revocations.publish([6, 7])
        await asyncio.sleep(10)
        restored = Member(swarm.simulated, swarm.simulated.peers[0], 1, FOUNDER)
        await restored.revocations.publish([8], expired=[6])
        await asyncio.sleep(10)
        newcomer = Member(swarm.simulated, swarm.simulated.peers[1], 2)
        await newcomer.revocations.read()
        assert newcomer.admission.revoked == {7, 8}

    play(scenario, monkeypatch)


def test_a_founder_without_the_ledger_renews_what_was_revoked(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(swarm: Swarm) -> None:
        await swarm.founder.revocations.publish([7])
        await asyncio.sleep(10)
        monkeypatch.setattr("dht.founder_records._RENEW_AFTER_S", LIFETIME_S)
        restored = Member(swarm.simulated, swarm.simulated.peers[0], 1, FOUNDER)
        swarm.called.clear()
        await restored.revocations.publish([])
        assert any(method == "store" for method, _ in swarm.called)
        assert swarm.knowing(7, [restored]) == 1

    play(scenario, monkeypatch)
