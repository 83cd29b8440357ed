"""A peer stays in its swarm although its machine's clock was wrong for a while."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from dht.membership import Membership, PeerStore
from peer.errors import UnreachableError
from peer.identity import PeerID
from peer.transport.addresses import Multiaddress
from peer.transport.endpoints import Endpoint

OTHER = PeerID(b"\x12\x20" + bytes(32))
AT_FIRST, LATER = (Multiaddress.of(Endpoint.of(host, 31337), OTHER) for host in ("192.0.2.1", "192.0.2.2"))


class StandIn:
    """A host and a registry. The host has met some peers, and nobody answers when it joins."""

    def __init__(self, *met: PeerID) -> None:
        self.met = frozenset(met)
        self.peer_id = PeerID(b"\x12\x20" + bytes([1] * 32))
        self.joins = 0

    def peers(self) -> frozenset[PeerID]:
        return self.met

    def reached_at(self, peer_id: PeerID) -> list[Multiaddress]:
        return [LATER]

    async def join(self, addresses: Sequence[Multiaddress]) -> list[Multiaddress]:
        self.joins += 1
        return []

    async def nodes(self, peers: object, **_: bool) -> dict[PeerID, Any]:
        return {}

    def why_out(self, peer_id: PeerID) -> str:
        return ""


def membership_of(stand_in: StandIn, store: PeerStore, now: list[float]) -> Membership:
    host: Any = stand_in
    return Membership(host, host, store, dial_every_s=0.0, now=lambda: now[0])


def test_a_lonely_peer_looks_for_others_although_its_clock_was_set_back() -> None:
    async def scenario() -> None:
        alone, store, now = StandIn(), PeerStore(None), [10_000.0]
        store.add([AT_FIRST], now[0])
        membership = membership_of(alone, store, now)
        for _ in range(5):
            with suppress(UnreachableError):
                await membership.check(announced=True)
        assert alone.joins == 5
        now[0] -= 7200.0
        await membership.check(announced=True)
        assert alone.joins == 6

    asyncio.run(scenario())


def test_addresses_are_recorded_again_after_the_clock_was_set_back() -> None:
    async def scenario() -> None:
        store, now = PeerStore(None), [10_000.0]
        store.add([AT_FIRST], now[0])
        now[0] -= 7200.0
        await membership_of(StandIn(OTHER), store, now).check(announced=False)
        assert store.addresses() == [LATER]

    asyncio.run(scenario())
