"""A node that has nobody to ask whether it is reachable, because all nodes of its swarm are behind routers."""

import asyncio
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from dht.announcements import Reachability
from expert_server.probe import DialledBack
from expert_server.reachability import ReachabilityMonitor
from expert_server.settings import NodeSettings
from peer.errors import UnreachableError
from peer.identity import Identity
from peer.transport.addresses import Multiaddress
from peer.transport.dialling import Dialling
from peer.transport.endpoints import AddressScope, Endpoint

PEER = "/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"
PUBLIC, NEIGHBOUR = Multiaddress(f"/ip4/44.1.1.1/tcp/1{PEER}"), Multiaddress(f"/ip4/192.168.1.9/tcp/1{PEER}")


@dataclass
class Reserved:
    """The relays over gRPC that a host reserves."""

    asked: list[str] = field(default_factory=list)
    addresses: tuple[Multiaddress, ...] = ()
    refusal: str = ""

    def keep(self, candidates: object) -> None:
        self.asked.append("keep")

    async def drop(self) -> None:
        self.asked.append("drop")


@dataclass
class LonelyHost:
    """A host that knows peers, none of which is a node of its swarm."""

    peer_id: Any
    bootstrapped_from: tuple[Multiaddress, ...]
    serves: bool = True
    announced: tuple[Endpoint, ...] = ()
    reservations: Reserved = field(default_factory=Reserved)
    tunnels: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(last_relayed=None))
    dialling: Dialling = field(default_factory=lambda: Dialling(AddressScope.GLOBAL))
    moves: int = 0
    port_mapping: Any = None
    runs_p2pd: bool = True

    def peers(self) -> frozenset[Any]:
        return frozenset()

    def serve_dht(self, serves: bool) -> None:
        self.serves = serves

    async def announce_at(self, endpoints: Sequence[Endpoint]) -> None:
        self.announced = tuple(endpoints)

    async def tunnel_through(self, relays: Sequence[Multiaddress]) -> None:
        self.moves += 1

    async def tunnel_addresses(self) -> list[Multiaddress]:
        return []


async def nobody(peers: object) -> dict[Any, Any]:
    return {}


async def after_rounds(rounds: int, host: LonelyHost, address: str) -> ReachabilityMonitor:
    """A monitor after this many rounds, each at a time when it asks."""
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
    assert second.status.looking


@pytest.mark.parametrize(
    ("known", "address"), [((NEIGHBOUR,), "192.168.1.2"), ((), "192.168.1.2"), ((PUBLIC,), "44.1.1.2")]
)
def test_neighbours_in_one_network_and_public_nodes_stay_as_they_are(
    identity: Identity, known: tuple[Multiaddress, ...], address: str
) -> None:
    host = LonelyHost(identity.peer_id, known)
    monitor = asyncio.run(after_rounds(4, host, address))
    assert monitor.status.kind is Reachability.UNKNOWN
    assert host.serves
    assert not host.reservations.asked


def test_a_founder_that_waits_for_others_does_not_say_in_each_round_that_it_asks(
    identity: Identity, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        asyncio.run(after_rounds(4, LonelyHost(identity.peer_id, ()), "192.168.1.2"))
    assert caplog.messages.count("asking others whether they reach this machine") == 1


def test_what_others_told_holds_while_nobody_can_be_asked(
    identity: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [[DialledBack(True, "44.1.1.2", "")]]

    async def dials(_: ReachabilityMonitor) -> list[DialledBack]:
        return answers.pop() if answers else []

    monkeypatch.setattr(ReachabilityMonitor, "_dials", dials)
    host = LonelyHost(identity.peer_id, (PUBLIC,))
    monitor = asyncio.run(after_rounds(4, host, "192.168.1.2"))
    assert monitor.status.kind is Reachability.DIRECT
    assert monitor.addresses == host.announced == ("44.1.1.2:2", "192.168.1.2:2")
    assert host.serves


def test_one_node_that_answers_does_not_decide_while_others_stall_or_are_dead(
    identity: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nodes of one neighbourhood are asked after all others."""
    monkeypatch.setattr("expert_server.reachability._ASK_ONE_S", 0.5)
    near = [_node(f"44.1.1.1:{port}") for port in range(1, 4)]
    stalls, dead, honest = _node("44.2.1.1:1"), _node("44.3.1.1:1"), [_node(f"44.4.1.{n}:1") for n in (1, 2)]
    asked: list[Any] = []

    async def some(*_: object) -> list[Any]:
        return [*near, stalls, dead, *honest]

    async def ask(_: ReachabilityMonitor, pool: object, node: Any) -> DialledBack:
        asked.append(node)
        if node is stalls:
            await asyncio.sleep(60)
        if node is dead:
            raise UnreachableError("it is dead")
        return DialledBack(node not in near, "44.1.1.2", "")

    monkeypatch.setattr("expert_server.reachability.sample_nodes", some)
    monkeypatch.setattr(ReachabilityMonitor, "_ask_to_dial", ask)
    monitor = asyncio.run(after_rounds(1, LonelyHost(identity.peer_id, (PUBLIC,)), "192.168.1.2"))
    assert monitor.status.kind is Reachability.DIRECT
    assert asked == [near[0], stalls, dead, *honest]


def _node(endpoint: str) -> Any:
    return SimpleNamespace(addresses=(Endpoint(endpoint),), peer_id=endpoint)


@pytest.mark.parametrize("mode", ["public", "private"])
def test_the_owner_decides(identity: Identity, mode: str) -> None:
    host = LonelyHost(identity.peer_id, (PUBLIC,))
    swarm: Any = SimpleNamespace(host=host, registry=SimpleNamespace(nodes=nobody))
    monitor = ReachabilityMonitor(NodeSettings.load(reachability=mode), swarm, random.Random(0), lambda: 0.0)

    async def scenario() -> None:
        await monitor.begin("192.168.1.2", 2)
        await monitor.check()

    asyncio.run(scenario())
    assert host.serves is (mode == "public")
    assert host.reservations.asked == ([] if mode == "public" else ["keep"])
    assert monitor.status.looking is (mode == "private")


def test_a_reservation_is_announced_as_long_as_it_holds(identity: Identity) -> None:
    host = LonelyHost(identity.peer_id, (PUBLIC,))
    through = Multiaddress(f"{PUBLIC}/p2p-circuit{PEER}")

    async def scenario() -> None:
        monitor = await after_rounds(2, host, "192.168.1.2")
        host.reservations.addresses = (through,)
        await monitor.check()
        assert (monitor.relay_addresses, monitor.status.in_words) == ((through,), "relayed by 1 relay")
        host.reservations.addresses = ()
        await monitor.check()
        assert (monitor.relay_addresses, monitor.status.looking) == ((), True)

    asyncio.run(scenario())


@dataclass
class Mapping:
    """The ports that a router forwards."""

    external: Endpoint | None = None
    in_words: str = "no router answers UPnP"
    renewals: int = 0

    def renew(self) -> None:
        self.renewals += 1


FORWARDED = Endpoint("44.1.1.2:40000")


def test_the_port_that_a_router_forwards_is_tried_at_once_and_announced_when_others_get_in(
    identity: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    async def dials(monitor: ReachabilityMonitor) -> list[DialledBack]:
        tried.append(monitor._announced_port)
        return [DialledBack(tried[-1] == 40000, "44.1.1.2", "")]

    monkeypatch.setattr(ReachabilityMonitor, "_dials", dials)
    host = LonelyHost(identity.peer_id, (PUBLIC,), port_mapping=Mapping())
    swarm: Any = SimpleNamespace(host=host, registry=SimpleNamespace(nodes=nobody))
    monitor = ReachabilityMonitor(NodeSettings.load(port=2), swarm, random.Random(0), lambda: 0.0)

    async def scenario() -> None:
        await monitor.begin("192.168.1.2", 2)
        assert monitor.status.kind is Reachability.RELAYED
        assert monitor.advice == "no router answers UPnP: forward TCP port 2 on your router to 192.168.1.2"
        assert host.port_mapping.renewals == 1
        host.port_mapping = Mapping(FORWARDED, "the router at 192.168.1.1 forwards port 40000")
        await monitor.check()
        assert host.announced == monitor.addresses == (FORWARDED, "192.168.1.2:2")
        assert monitor.in_words == "direct: the router at 192.168.1.1 forwards port 40000"
        await monitor.check()
        host.port_mapping = Mapping()
        await monitor.check()  # others may be wrong
        await monitor.check()
        assert monitor.status.kind is Reachability.RELAYED
        assert FORWARDED not in monitor.addresses

    asyncio.run(scenario())
    assert tried == [2, 40000, 2, 2], "asked when the router changed its mind, and not in between"


def test_a_founder_that_knows_nobody_announces_what_its_router_forwards(identity: Identity) -> None:
    host = LonelyHost(identity.peer_id, (), port_mapping=Mapping(FORWARDED))
    monitor = asyncio.run(after_rounds(1, host, "192.168.1.2"))
    assert monitor.addresses == (FORWARDED, "192.168.1.2:2")


@pytest.mark.parametrize(
    ("mode", "address", "said"),
    [
        ("public", "44.1.1.2", 'not checked: reachability = "public" is set'),
        ("auto", "127.0.0.1", "not checked: only this machine is in the swarm"),
    ],
)
def test_nobody_is_called_direct_who_was_not_dialled_back(
    identity: Identity, mode: str, address: str, said: str
) -> None:
    host = LonelyHost(identity.peer_id, ())
    swarm: Any = SimpleNamespace(host=host, registry=SimpleNamespace(nodes=nobody))
    monitor = ReachabilityMonitor(NodeSettings.load(reachability=mode, port=2), swarm, random.Random(0))
    asyncio.run(monitor.begin(address, 2))
    assert (monitor.status.kind, monitor.in_words, monitor.advice) == (Reachability.UNKNOWN, said, "")
    assert host.serves
    assert host.announced == monitor.addresses == (f"{address}:2",)
