"""A trainer behind a router is reached through relays. It maintains them, and others average with it through its
tunnel.
"""

import asyncio
import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from dense_trainers import Play, Square, are_one, ended, identities, play
from test_dense_part import make_model, trained

from dht.announcements import NodeInfo, Reachability, read_trainer
from dht.relays import RelayKeeper, is_hidden
from peer.identity import PeerID
from peer.rpc.channels import ChannelPool
from peer.transport.addresses import Multiaddress
from peer.transport.pipes import Pipe
from peer.transport.tunnel import Tunnels
from peer.wire import records_pb2
from trainer_client.averaging.averager import choose_partner

__all__ = ["identities", "play"]

RELAY = Multiaddress("/ip4/44.1.1.1/tcp/31337/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N")
RELAYED = Multiaddress(f"{RELAY}/p2p-circuit/p2p/{RELAY.peer_id}")


def circuit(peer_id: PeerID, relay: str = RELAY) -> str:
    return f"{relay}/p2p-circuit/p2p/{peer_id.to_base58()}"


@pytest.mark.parametrize(
    ("host", "hidden"),
    [
        ("127.0.0.1", False),
        ("::1", False),
        ("localhost", False),
        ("44.1.1.1", False),
        ("192.168.1.7", True),
        ("10.0.0.4", True),
        ("100.64.3.3", True),
        ("fe80::1", True),
    ],
)
def test_who_has_no_public_address_is_hidden(host: str, hidden: bool) -> None:
    assert is_hidden(host) is hidden


class KnownRelays(RelayKeeper):
    """Relays that are always reached at the same address."""

    def __init__(self, address: str) -> None:
        self.tunnel_addresses = (Multiaddress(address),)

    @property
    def relay_addresses(self) -> tuple[Multiaddress, ...]:
        return ()


def test_dense_parts_are_averaged_through_a_tunnel(play: Play, tmp_path: Path) -> None:
    async def scenario(square: Square) -> None:
        asked: list[tuple[PeerID, Sequence[str]]] = []

        async def open_stream(
            peer_id: PeerID, addresses: Sequence[str], protocol: str, deadline_s: float
        ) -> Pipe:
            asked.append((peer_id, addresses))
            pipe: Pipe = await hidden.open_for(square.identities[1].peer_id, "192.0.2.1")
            return pipe

        tunnels = Tunnels(open_stream)
        square.stack.push_async_callback(tunnels.close)
        relays = KnownRelays(circuit(square.identities[0].peer_id))
        hidden = await square.trainer(trained(make_model(), 1), 30, relays=relays)
        square.announce(hidden, reachable=False)
        other = await square.trainer(
            trained(make_model(), 2), 10, reachable=False, channels=ChannelPool(8, tunnels)
        )
        assert await other.take_whole() == 30
        await other.find_partners()
        partner = choose_partner(other.partners, (), random.Random(0))
        assert partner is not None
        await square.stepping(other.average_with(partner), hidden.part, other.part)
        await square.until(lambda: ended(hidden, "averaged") == 1, hidden.part)
        assert are_one(hidden.part, other.part)
        assert {peer_id for peer_id, _ in asked} == {hidden.peer_id}
        assert set(asked[0][1]) == {circuit(hidden.peer_id)}

    play(scenario)


def test_a_record_names_eight_addresses_of_a_tunnel_at_most_and_its_own_alone(play: Play) -> None:
    async def scenario(square: Square) -> None:
        one = await square.trainer(make_model(), 1)
        record = square.board.records[one.peer_id]
        own = [circuit(one.peer_id, RELAY.replace("31337", str(port))) for port in range(1000, 1012)]
        record.tunnel_addresses.extend([circuit(PeerID(b"\x12\x20" + bytes(32))), "nonsense", *own])
        record.relay_addresses.extend(["nonsense", f"{RELAY}", *own])
        payload = records_pb2.RecordPayload(trainer=record, expires_at=1e12)
        info = read_trainer(payload, one.peer_id)
        assert info is not None
        assert info.tunnel_addresses == tuple(own[:6]), "of the first eight, those of itself"
        assert info.relay_addresses == tuple(own[:6]), "those through relays"
        record.certificate = b""
        info = read_trainer(payload.__class__(trainer=record, expires_at=1e12), one.peer_id)
        assert info is not None
        assert info.tunnel_addresses == info.relay_addresses == (), "it serves nothing"

    play(scenario)


class FakeSwarm:
    """A host whose tunnel is reachable from the second look after a move, if `finds` is set."""

    def __init__(self, nodes: list[NodeInfo]) -> None:
        self.host = self.reservations = self
        self.registry = SimpleNamespace(nodes=self.find)
        self.nodes = nodes
        self.searches = 0
        self.moves: list[Sequence[str]] = []
        self.finds = True
        self.runs_p2pd = True
        self.reserved: list[str] = []
        self.addresses: tuple[Multiaddress, ...] = ()
        self._looks = 0

    async def find(self, peers: object) -> dict[PeerID, NodeInfo]:
        self.searches += 1
        return {node.peer_id: node for node in self.nodes}

    def peers(self) -> frozenset[PeerID]:
        return frozenset()

    def keep(self, candidates: object) -> None:
        self.reserved.append("keep")

    async def drop(self) -> None:
        self.reserved.append("drop")

    async def tunnel_through(self, relays: Sequence[str]) -> None:
        self.moves.append(relays)
        self._looks = 0

    async def tunnel_addresses(self) -> list[Multiaddress]:
        self._looks += 1
        is_found = self.finds and self.moves and self._looks > 1
        return [RELAYED] if is_found else []


def relay_node(reachability: Reachability = Reachability.DIRECT) -> NodeInfo:
    addresses = (RELAY, RELAYED, Multiaddress(RELAY.replace("44.1.1.1", "192.168.1.4")))
    return NodeInfo(
        peer_id=RELAY.peer_id,
        addresses=(RELAY.endpoint,),
        expires_at=1e12,
        reachability=reachability,
        tunnel_addresses=addresses,
    )


@pytest.fixture
def swarm() -> FakeSwarm:
    return FakeSwarm([relay_node()])


def test_relays_of_both_kinds_are_taken_and_given_up(swarm: Any) -> None:
    async def scenario() -> None:
        relayed = RelayKeeper(swarm, 2, random.Random(0))
        await relayed.begin()
        assert (swarm.moves, swarm.reserved) == ([[RELAY]], ["keep"]), "over libp2p only public ones"
        await relayed.look()
        await relayed.look()
        assert relayed.tunnel_addresses == (RELAYED,)
        await relayed.end()
        assert (swarm.moves, swarm.reserved) == ([[RELAY], []], ["keep", "drop"])
        assert not relayed.tunnel_addresses

    asyncio.run(scenario())


def test_nodes_that_others_may_reach_are_relays(
    swarm: Any,
) -> None:
    async def scenario() -> None:
        relayed = RelayKeeper(swarm, 2, random.Random(0))
        assert await relayed._candidates() == swarm.nodes
        for kind in Reachability:
            swarm.nodes = [relay_node(kind)]
            may_relay = kind in {Reachability.DIRECT, Reachability.UNKNOWN}
            assert await relayed._candidates() == (swarm.nodes if may_relay else [])

    asyncio.run(scenario())


def ten_seconds_apart() -> Iterator[float]:
    """The times of looks."""
    return itertools.count(0.0, 10.0)


def test_relays_that_let_nobody_in_are_replaced_ever_more_seldom(swarm: Any) -> None:
    async def scenario() -> None:
        swarm.finds = False
        relayed = RelayKeeper(swarm, 1, random.Random(0), ten_seconds_apart().__next__)
        await relayed.begin()
        for looks in (4, 6, 12):
            before = len(swarm.moves)
            for _ in range(looks - 1):
                await relayed.look()
            assert len(swarm.moves) == before
            await relayed.look()
            assert len(swarm.moves) == before + 1
        swarm.finds = True
        for _ in range(2):
            await relayed.look()
        assert relayed.tunnel_addresses

    asyncio.run(scenario())


def test_without_p2pd_nobody_is_looked_for_as_its_relay(swarm: Any) -> None:
    async def scenario() -> None:
        swarm.finds = swarm.runs_p2pd = False
        relayed = RelayKeeper(swarm, 4, random.Random(0), ten_seconds_apart().__next__)
        await relayed.begin()
        for _ in range(12):
            await relayed.look()
        assert (swarm.reserved, swarm.moves, swarm.searches) == (["keep"], [], 0)

    asyncio.run(scenario())


def test_where_nobody_can_be_a_relay_the_daemon_is_left_alone(swarm: Any) -> None:
    async def scenario() -> None:
        swarm.nodes = []
        relayed = RelayKeeper(swarm, 4, random.Random(0), ten_seconds_apart().__next__)
        await relayed.begin()
        assert (swarm.moves, swarm.searches) == ([], 1)
        for _ in range(12):
            await relayed.look()
        assert (swarm.moves, swarm.searches) == ([], 4), (
            "looked for every half minute: nothing is cut by that"
        )

    asyncio.run(scenario())
