"""A node that nobody can be asked about, as when all nodes of its swarm are behind routers."""

import asyncio
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

import dht.relays
from dht.announcements import Reachability
from expert_server.probe import DialledBack
from expert_server.reachability import DialledPorts, ReachabilityMonitor
from expert_server.settings import NodeSettings
from peer.identity import Identity
from peer.transport.addresses import Multiaddress
from peer.transport.dialling import Dialling
from peer.transport.endpoints import AddressScope

PEER = "/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"
PUBLIC, NEIGHBOUR = Multiaddress(f"/ip4/44.1.1.1/tcp/1{PEER}"), Multiaddress(f"/ip4/192.168.1.9/tcp/1{PEER}")


@dataclass
class LonelyHost:
    """Knows peers, of which none is a node of its swarm."""

    peer_id: Any
    bootstrap_candidates: tuple[Multiaddress, ...]
    bootstrapped_from: tuple[Multiaddress, ...] = ()
    config: SimpleNamespace = field(
        default_factory=lambda: SimpleNamespace(serves_dht=True, relays=(), port=1)
    )
    tunnels: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(last_relayed=None))

    dialling: Dialling = field(default_factory=lambda: Dialling(AddressScope.GLOBAL))

    def peers(self) -> frozenset[Any]:
        return frozenset()

    async def restart_as(self, *, serves_dht: bool, relays: tuple[Multiaddress, ...]) -> None:
        self.config = SimpleNamespace(serves_dht=serves_dht, relays=tuple(relays), port=1)

    async def tunnel_addresses(self) -> list[Multiaddress]:
        return [Multiaddress(f"{relay}/p2p-circuit{PEER}") for relay in self.config.relays]

    async def confirmed(self, addresses: Sequence[Multiaddress]) -> list[Multiaddress]:
        return list(addresses)


async def nobody(peers: object) -> dict[Any, Any]:
    return {}


async def after_rounds(rounds: int, host: LonelyHost, address: str) -> ReachabilityMonitor:
    """Rounds in which it is time to ask."""
    swarm: Any = SimpleNamespace(host=host, registry=SimpleNamespace(nodes=nobody))
    monitor = ReachabilityMonitor(
        NodeSettings.load(), swarm, random.Random(0), iter(range(0, 10**6, 1000)).__next__
    )
    await monitor.begin(address, 2)
    for _ in range(rounds - 1):
        await monitor.check()
    return monitor


def test_a_private_address_and_a_public_peer_are_enough_to_go_behind_relays(identity: Identity) -> None:
    first = asyncio.run(after_rounds(1, LonelyHost(identity.peer_id, (PUBLIC,)), "192.168.1.2"))
    assert first.status.kind is Reachability.UNKNOWN, "who was asked may have been busy"
    second = asyncio.run(after_rounds(2, LonelyHost(identity.peer_id, (PUBLIC,)), "192.168.1.2"))
    assert second.status.kind is Reachability.RELAYED
    assert second.tunnel_addresses == (f"{PUBLIC}/p2p-circuit{PEER}",)


@pytest.mark.parametrize(
    ("known", "address"), [((NEIGHBOUR,), "192.168.1.2"), ((), "192.168.1.2"), ((PUBLIC,), "44.1.1.2")]
)
def test_neighbours_in_one_network_and_public_nodes_stay_as_they_are(
    identity: Identity, known: tuple[Multiaddress, ...], address: str
) -> None:
    host = LonelyHost(identity.peer_id, known)
    monitor = asyncio.run(after_rounds(4, host, address))
    assert monitor.status.kind is Reachability.UNKNOWN
    assert host.config.serves_dht


def test_what_others_told_holds_while_nobody_can_be_asked(
    identity: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = DialledBack(True, "44.1.1.2", "")
    answers = [[DialledPorts(service=reached, dht=reached)]]

    async def dials(_: ReachabilityMonitor) -> list[DialledPorts]:
        return answers.pop() if answers else []

    monkeypatch.setattr(ReachabilityMonitor, "_dials", dials)
    host = LonelyHost(identity.peer_id, (PUBLIC,))
    monitor = asyncio.run(after_rounds(4, host, "192.168.1.2"))
    assert monitor.status.kind is Reachability.DIRECT
    assert "44.1.1.2:2" in monitor.addresses
    assert host.config.serves_dht


class HostWithoutEntrance(LonelyHost):
    """None of its relays lets anybody in."""

    moves = 0

    async def restart_as(self, *, serves_dht: bool, relays: tuple[Multiaddress, ...]) -> None:
        await super().restart_as(serves_dht=serves_dht, relays=relays)
        self.moves += 1

    async def tunnel_addresses(self) -> list[Multiaddress]:
        return []


def test_relays_that_let_nobody_in_are_replaced_ever_more_seldom(
    identity: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dht.relays, "_RELAY_S", 0.01)
    host = HostWithoutEntrance(identity.peer_id, (PUBLIC,))
    swarm: Any = SimpleNamespace(host=host, registry=SimpleNamespace(nodes=nobody))
    every_ten_s = itertools.count(0.0, 10.0).__next__
    settings = NodeSettings.load(reachability="private")

    async def scenario() -> None:
        monitor = ReachabilityMonitor(settings, swarm, random.Random(0), every_ten_s)
        await monitor.begin("192.168.1.2", 2)
        moved_at = []
        for look in range(1, 23):
            before = host.moves
            await monitor.check()
            if host.moves > before:
                moved_at.append(look)
        assert (moved_at, monitor.status.kind) == ([3, 9, 21], Reachability.RELAYED)

    asyncio.run(scenario())
