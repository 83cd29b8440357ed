"""gRPC through a relay over gRPC, between real servers."""

import asyncio
import os
import socket
import time
from collections.abc import Sequence, Set
from types import SimpleNamespace
from typing import Any

import pytest
from callers import numbered_identities
from grpc import StatusCode
from relayed import (
    CALLER,
    FAST_MBIT,
    HIDDEN,
    OTHER,
    RELAY,
    SWARM,
    Caller,
    behind_relay,
    closing,
    hide,
    serve,
    until,
)

from peer.errors import ExpertError, UnreachableError
from peer.identity import Identity, PeerID
from peer.loop import LoopThread
from peer.metrics import total
from peer.platform.sockets import probe_when_idle
from peer.relays.client import RelayClient
from peer.relays.reservations import Reservations
from peer.rpc.channels import WAYS, KnownPeer
from peer.rpc.sessions import Admitted, AllowAll, Right
from peer.transport.addresses import Multiaddress
from peer.transport.dialling import ENDPOINT_BURST, Dialling
from peer.transport.endpoints import AddressScope, Endpoint
from peer.wire import admission_pb2, relay_pb2


@pytest.fixture(scope="module")
def keys() -> list[Identity]:
    return numbered_identities(7)


def test_a_call_reaches_a_hidden_peer_with_its_certificate_pinned(
    loop: LoopThread, keys: list[Identity]
) -> None:
    async def scenario() -> None:
        async with behind_relay(keys) as (relay, hidden, caller):
            payload = os.urandom(2 * 2**20)
            for _ in range(3):
                assert await caller.ask(hidden.contact, payload) == payload
            assert [caller.pool.called_by(way) for way in WAYS] == [0, 0, 1]
            assert total(relay.relaying.bytes) > 6 * len(payload)
            impostor = KnownPeer(
                keys[RELAY].peer_id, (), relay.pem, relay_addresses=hidden.reservations.addresses
            )
            with pytest.raises(UnreachableError):  # its addresses lead to another peer
                await caller.dialler.dial(impostor.peer_id, impostor.relay_addresses)

    loop.run(scenario(), 60)


def test_several_callers_share_a_relay(loop: LoopThread, keys: list[Identity]) -> None:
    async def scenario() -> None:
        relay = await serve(keys[RELAY], FAST_MBIT)
        hidden = await hide(keys[HIDDEN], [relay])
        callers = [Caller(key) for key in keys[CALLER : CALLER + 3]]
        async with closing(relay, hidden, *callers):
            payloads = [os.urandom(2**20) for _ in callers]
            answers = [
                caller.ask(hidden.contact, payload) for caller, payload in zip(callers, payloads, strict=True)
            ]
            assert await asyncio.gather(*answers) == payloads
            assert relay.relaying._circuits.used == 3

    loop.run(scenario(), 60)


def test_when_a_relay_dies_calls_go_on_by_the_second_and_a_third_is_found(
    loop: LoopThread, keys: list[Identity]
) -> None:
    async def scenario() -> None:
        relays = [await serve(key, FAST_MBIT) for key in (keys[RELAY], keys[OTHER], keys[6])]
        hidden = await hide(keys[HIDDEN], relays, reservations=2)
        caller = Caller(keys[CALLER])
        async with closing(*relays, hidden, caller):
            assert await caller.ask(hidden.contact) == b"ping"
            first = hidden.reservations.addresses[0].dialled
            for relay in relays:
                if relay.peer_id == first:
                    await relay.stop()
            assert await caller.ask_until_answered(hidden.contact, b"again") == b"again"
            await until(lambda: len(hidden.reservations.addresses) == 2)
            assert first not in {address.dialled for address in hidden.reservations.addresses}

    loop.run(scenario(), 60)


def test_a_relay_itself_calls_the_peers_that_have_reservations_there(
    loop: LoopThread, keys: list[Identity]
) -> None:
    async def scenario() -> None:
        relay = await serve(keys[RELAY], FAST_MBIT)
        hidden = await hide(keys[HIDDEN], [relay])
        caller = Caller(keys[RELAY], relay)
        async with closing(relay, hidden, caller):
            assert await caller.ask(hidden.contact) == b"ping"

    loop.run(scenario(), 60)


def test_a_relay_whose_places_for_calls_are_taken_relays_all_the_same(
    loop: LoopThread, keys: list[Identity]
) -> None:
    async def scenario() -> None:
        relay = await serve(keys[RELAY], FAST_MBIT, most_calls=1)
        hidden = await hide(keys[HIDDEN], [relay])
        callers = [Caller(key) for key in keys[CALLER : CALLER + 3]]
        async with closing(relay, hidden, *callers):
            for caller in callers:
                assert await caller.ask(hidden.contact) == b"ping"
            assert len(relay.server.gate._slots) == 0
            assert relay.relaying._circuits.used == 3
            assert total(relay.server.gate.refused) == 0

    loop.run(scenario(), 60)


def test_reservations_are_dropped_and_kept_again(loop: LoopThread, keys: list[Identity]) -> None:
    async def scenario() -> None:
        relay = await serve(keys[RELAY], FAST_MBIT)
        hidden = await hide(keys[HIDDEN], [relay])
        async with closing(relay, hidden):
            (address,) = hidden.reservations.addresses
            assert Multiaddress(address).is_relayed
            assert address.peer_id == hidden.served.peer_id
            await hidden.reservations.drop()
            assert hidden.reservations.addresses == ()
            await until(lambda: not relay.relaying._reservations)
            hidden.reservations.keep(hidden.candidates)
            await until(lambda: len(hidden.reservations.addresses) == 1)

    loop.run(scenario(), 60)


def test_a_peer_renews_its_reservation_where_its_neighbourhood_has_no_place_left(
    loop: LoopThread, keys: list[Identity], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peer.relays.service._RESERVATIONS_NEAR", 1)

    async def scenario() -> None:
        relay = await serve(keys[RELAY], FAST_MBIT)
        hidden = await hide(keys[HIDDEN], [relay])
        again = RelayClient(keys[HIDDEN], SWARM)  # by a new connection: the first one is broken, unnoticed
        async with closing(relay, hidden, again):
            call = await again.reserve(relay.as_relay)
            await until(lambda: not hidden.reservations.addresses)
            assert relay.relaying._places.used == 1
            assert not call.done()
            call.cancel()

    loop.run(scenario(), 60)


class Members(AllowAll):
    """A relay's admission rules, and a member's badge."""

    badge: Any = None
    is_revoked = False

    def admit(self, caller: PeerID, rights: Set[Right], badge: admission_pb2.Badge | None) -> Admitted:
        if badge is None:
            raise ExpertError(StatusCode.PERMISSION_DENIED, "show a badge")
        return Admitted(serial=7)

    def still_admits(self, caller: PeerID, serial: int) -> bool:
        assert serial == 7
        return not self.is_revoked


def test_only_members_use_a_relay_and_only_as_long_as_they_are(
    loop: LoopThread, keys: list[Identity]
) -> None:
    async def scenario() -> None:
        rules, own = Members(), Members()
        relay = await serve(keys[RELAY], FAST_MBIT, admission=rules)
        client = RelayClient(keys[HIDDEN], SWARM, admission=own)
        async with closing(relay, client):
            with pytest.raises(UnreachableError, match="show a badge"):
                await client.reserve(relay.as_relay)
            own.badge = admission_pb2.Badge(grant=b"of the founder")  # known once the manifest is read
            call = await client.reserve(relay.as_relay)
            rules.is_revoked = True
            await call.write(relay_pb2.ReserveRequest())
            assert await call.code() is StatusCode.PERMISSION_DENIED
            await until(lambda: not relay.relaying._reservations)

    loop.run(scenario(), 60)


@pytest.mark.parametrize("number", [CALLER, HIDDEN])
def test_a_circuit_ends_when_one_of_its_peers_is_no_longer_admitted(
    loop: LoopThread, keys: list[Identity], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr("peer.relays.service._ADMITS_EVERY_S", 0.05)
    revoked: list[PeerID] = []

    class Revoking(AllowAll):
        def still_admits(self, caller: PeerID, serial: int) -> bool:
            return caller not in revoked

    async def scenario() -> None:
        async with behind_relay(keys, admission=Revoking()) as (relay, hidden, caller):
            assert await caller.ask(hidden.contact) == b"ping"
            await asyncio.sleep(0.2)
            assert relay.relaying._circuits.used == 1
            revoked.append(keys[number].peer_id)
            await until(lambda: not relay.relaying._circuits.used)
            await until(lambda: not caller.client.circuits and not hidden.client.circuits)

    loop.run(scenario(), 60)


def test_two_relays_are_on_two_machines_where_there_are_two(keys: list[Identity]) -> None:
    async def scenario() -> None:
        asked: list[KnownPeer] = []

        async def never(relay: KnownPeer) -> None:
            asked.append(relay)
            await asyncio.Event().wait()

        async def candidates() -> Sequence[KnownPeer]:
            hosts = ("192.0.2.1", "192.0.2.1", "192.0.2.2")
            return [
                KnownPeer(key.peer_id, (Endpoint.of(host, 1),), b"")
                for key, host in zip(keys, hosts, strict=False)
            ]

        client: Any = SimpleNamespace(peer_id=keys[-1].peer_id, reserve=never)
        reservations = Reservations(client)
        reservations.keep(candidates)
        await until(lambda: len(asked) == 2)
        assert {relay.addresses[0].host for relay in asked} == {"192.0.2.1", "192.0.2.2"}
        await reservations.close()

    asyncio.run(scenario())


def test_a_relay_that_was_reached_costs_no_dials(loop: LoopThread, keys: list[Identity]) -> None:
    async def scenario() -> None:
        dialling = Dialling(AddressScope.LOOPBACK, clock=lambda: 0.0)
        relay, client = await serve(keys[RELAY], FAST_MBIT), RelayClient(keys[CALLER], SWARM, dialling)
        async with closing(relay, client):
            await client.relay(relay.peer_id, relay.endpoint)
            stranger = keys[HIDDEN].peer_id
            for _ in range(ENDPOINT_BURST):
                assert dialling.begin(relay.endpoint, stranger)
            assert not dialling.begin(relay.endpoint, stranger)
            assert dialling.begin(relay.endpoint, relay.peer_id)

    loop.run(scenario(), 60)


def test_a_peer_that_relays_for_nobody_says_so(loop: LoopThread, keys: list[Identity]) -> None:
    async def scenario() -> None:
        relay = await serve(keys[RELAY], 0.0)
        caller = Caller(keys[CALLER])
        async with closing(relay, caller):
            at = Multiaddress(
                f"{Multiaddress.of(relay.endpoint, relay.peer_id)}/p2p-circuit/p2p/{keys[HIDDEN].peer_id}"
            )
            with pytest.raises(UnreachableError, match="no relay opens"):
                await caller.dialler.dial(keys[HIDDEN].peer_id, [at])
            assert total(relay.relaying.refused, reason="off") == 1
            hidden = await hide(keys[HIDDEN], [relay], reservations=0)
            async with closing(hidden):
                await until(lambda: hidden.reservations.refusal)
            said = f"relay {relay.peer_id} refuses: this peer relays for nobody"
            assert hidden.reservations.refusal == said

    loop.run(scenario(), 60)


def test_a_relay_carries_no_more_than_its_owner_gives(loop: LoopThread, keys: list[Identity]) -> None:
    async def scenario() -> None:
        async with behind_relay(keys, 8.0) as (_, hidden, caller):  # 1 MB/s
            await caller.ask(hidden.contact)
            began = time.monotonic()
            await caller.ask(hidden.contact, bytes(500_000))
            assert time.monotonic() - began > 0.7, "1 MB there and back, less a burst of 0.2 MB"

    loop.run(scenario(), 60)


def test_a_session_that_the_relay_forgot_is_opened_again(loop: LoopThread, keys: list[Identity]) -> None:
    async def scenario() -> None:
        async with behind_relay(keys) as (relay, hidden, caller):
            (address,) = hidden.reservations.addresses
            for _ in range(2):
                (await caller.dialler.dial(hidden.served.peer_id, [address])).close()
                for session in list(relay.sessions._sessions):
                    relay.sessions._end(session)

    loop.run(scenario(), 60)


def test_a_mistake_on_the_way_to_one_relay_is_logged_and_the_next_is_tried(
    loop: LoopThread, keys: list[Identity], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with behind_relay(keys) as (_, hidden, caller):
            (address,) = hidden.reservations.addresses
            unlucky = address.at(Endpoint("127.0.0.1:1"))
            find, mistake = caller.client.relay, ZeroDivisionError("a mistake")

            async def mistaken(peer_id: PeerID, endpoint: Endpoint) -> KnownPeer:
                if endpoint == unlucky.endpoint:
                    raise mistake
                return await find(peer_id, endpoint)

            monkeypatch.setattr(caller.client, "relay", mistaken)
            (await caller.dialler.dial(hidden.served.peer_id, [unlucky, address])).close()
            with pytest.raises(UnreachableError, match="no relay opens"):
                await caller.dialler.dial(hidden.served.peer_id, [unlucky])
        logged = [record.exc_info[1] for record in caplog.records if record.exc_info]
        assert logged == [mistake, mistake]

    loop.run(scenario(), 60)


def test_of_two_relays_the_one_that_answers_opens_the_circuit(
    loop: LoopThread, keys: list[Identity], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peer.relays.dialler.HEAD_START_S", 0.1)

    async def scenario() -> None:
        relay = await serve(keys[RELAY], FAST_MBIT)
        hidden = await hide(keys[HIDDEN], [relay])
        caller = Caller(keys[CALLER])
        with socket.create_server(("127.0.0.1", 0)) as silent:
            async with closing(relay, hidden, caller):
                (address,) = hidden.reservations.addresses
                dead = address.at(Endpoint.of("127.0.0.1", silent.getsockname()[1]))
                (await caller.dialler.dial(hidden.served.peer_id, [dead, address])).close()

    loop.run(scenario(), 60)


def test_an_idle_circuit_is_probed_before_routers_forget_it(
    loop: LoopThread, keys: list[Identity], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[socket.socket] = []

    def note(writer: asyncio.StreamWriter) -> None:
        probe_when_idle(writer)
        opened.append(socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno())))

    for module in ("peer.relays.client", "peer.rpc.connections"):
        monkeypatch.setattr(f"{module}.probe_when_idle", note)

    async def scenario() -> None:
        async with behind_relay(keys) as (_, hidden, caller):
            assert await caller.ask(hidden.contact) == b"ping"
        assert len(opened) == 4, "at both ends, and twice at the relay"
        for each in opened:
            with each:
                assert each.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                assert each.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) < 30

    loop.run(scenario(), 60)
