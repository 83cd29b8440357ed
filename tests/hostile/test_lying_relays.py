"""Relays over gRPC among strangers: hostile callers of a relay, hostile peers behind one, and relays that lie."""

import asyncio
import contextlib
import itertools
import math
import os
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc
import pytest
from callers import numbered_identities
from grpc import StatusCode
from relayed import (
    CALLER,
    FAST_MBIT,
    HIDDEN,
    LOCAL,
    OTHER,
    RELAY,
    SWARM,
    Caller,
    Served,
    behind_relay,
    closing,
    hide,
    serve,
    until,
)

from peer.bounded import Owner
from peer.errors import UnreachableError
from peer.identity import Identity, certificate_pem
from peer.loop import LoopThread
from peer.metrics import total
from peer.rates import RateLimit
from peer.relays.client import RelayClient
from peer.relays.service import RelayServicer
from peer.rpc.channels import CLIENT_OPTIONS, KnownPeer
from peer.rpc.connections import MARK, NAME_BYTES, Connections
from peer.rpc.sessions import SESSION_KEY, Metadata, Session, SessionClient, Sessions
from peer.transport.addresses import Multiaddress
from peer.transport.pipes import ByteStream, Pipe, SocketStream, aborting
from peer.wire import relay_pb2, relay_pb2_grpc, session_pb2


@pytest.fixture(scope="module")
def keys() -> list[Identity]:
    return numbered_identities(6)


class Rude:
    """Sends a relay any messages."""

    def __init__(self, served: Served, identity: Identity, near: str = "127.0.0.1") -> None:
        """`near`: the neighbourhood that the peer claims to be in."""
        client = SessionClient(identity, SWARM, (session_pb2.RIGHT_RELAY,))
        opening = client.statement(served.peer_id, served.sessions.challenges.new())
        session = served.sessions.open(opening, near).session
        self.metadata: Metadata = ((SESSION_KEY, session),)
        self.identity = identity
        self.endpoint = served.endpoint
        credentials = grpc.ssl_channel_credentials(root_certificates=served.pem)
        self.channel = grpc.aio.secure_channel(served.endpoint, credentials, CLIENT_OPTIONS)
        self.stub: Any = relay_pb2_grpc.RelayServiceStub(self.channel)
        self.calls: list[Any] = []
        self.pipes: list[Pipe] = []

    async def reserve(self, requests: int = 1) -> Any:
        call = self.stub.Reserve(metadata=self.metadata)
        self.calls.append(call)
        for _ in range(requests):
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await call.write(relay_pb2.ReserveRequest())
        return call

    async def reserved(self) -> Any:
        """A reservation that the relay has confirmed, so that others may dial."""
        call = await self.reserve()
        assert not (await call.read()).circuit
        return call

    async def dial(self, peer_id: bytes) -> Any:
        call = self.stub.Dial(relay_pb2.DialRequest(peer_id=peer_id), metadata=self.metadata)
        self.calls.append(call)
        await asyncio.sleep(0)
        return call

    async def connect(self, *data: bytes) -> Pipe:
        """Opens a connection and sends these bytes, in several segments."""
        pipe = await asyncio.open_connection(self.endpoint.host, self.endpoint.port)
        self.pipes.append(pipe)
        for number, each in enumerate(data):
            if number:
                await asyncio.sleep(0.02)
            pipe[1].write(each)
            await pipe[1].drain()
        return pipe

    async def close(self) -> None:
        for _, writer in self.pipes:
            writer.close()
        for call in self.calls:
            call.cancel()
        await self.channel.close()


async def offered(reservation: Any) -> Any:
    """The next reply that announces a caller."""
    async with asyncio.timeout(60):
        while not (reply := await reservation.read()).circuit:
            pass
    return reply


async def status_of(call: Any) -> StatusCode:
    """The call's status. gRPC may hold it back until the replies before it have been read."""
    async with asyncio.timeout(60):
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while await call.read() is not grpc.aio.EOF:
                pass
        status: StatusCode = await call.code()
    return status


async def is_closed(pipe: Pipe) -> bool:
    async with asyncio.timeout(60):
        with contextlib.suppress(ConnectionError):
            return await pipe[0].read() == b""
        return True


@contextlib.asynccontextmanager
async def relayed(keys: list[Identity]) -> AsyncIterator[tuple[Served, Rude, Rude]]:
    """A relay, and two peers who call it by hand: one to be dialled, and one who dials."""
    relay = await serve(keys[RELAY], FAST_MBIT)
    target, caller = Rude(relay, keys[HIDDEN]), Rude(relay, keys[CALLER])
    async with closing(relay, target, caller):
        yield relay, target, caller


async def connect(reservation: Any, target: Rude, caller: Rude) -> tuple[Any, Pipe, Pipe]:
    """The caller's call, and the two ends of a circuit."""
    dialled = await caller.dial(target.identity.peer_id.to_bytes())
    offer = await offered(reservation)
    assert offer.caller == caller.identity.peer_id.to_bytes()
    accepted = await target.connect(MARK + offer.circuit)
    reply = await dialled.read()
    assert reply.circuit != offer.circuit
    return dialled, await caller.connect(MARK + reply.circuit), accepted


STRANGE = {
    "unknown": MARK + bytes(NAME_BYTES),
    "and more": MARK + bytes(NAME_BYTES + 100_000),
    "not quite the mark": MARK[:-1] + b"?" + bytes(NAME_BYTES),
    "no name": MARK,
    "one byte": MARK[:1],
}


@pytest.mark.parametrize("data", STRANGE.values(), ids=STRANGE.keys())
def test_a_connection_with_a_name_that_nobody_expects_is_closed(
    loop: LoopThread, keys: list[Identity], data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        relay = await serve(keys[RELAY], FAST_MBIT)
        target, caller, stranger = (Rude(relay, keys[n]) for n in (HIDDEN, CALLER, OTHER))
        async with closing(relay, target, caller, stranger):
            _, here, there = await connect(await target.reserved(), target, caller)
            # only now: on a busy machine, a second may be too short for the others
            monkeypatch.setattr("peer.rpc.connections._FIRST_BYTES_S", 1.0)
            assert await is_closed(await stranger.connect(data))
            closed = relay.server.connections.closed
            is_named = len(data) >= len(MARK) + NAME_BYTES and data.startswith(MARK)
            assert total(closed, reason="unexpected") == is_named
            here[1].write(b"still here")
            assert await there[0].readexactly(10) == b"still here"
            assert len(relay.server.connections._table) == 4, "two ends, and two channels"

    loop.run(scenario(), 60)


def test_a_name_may_arrive_in_pieces_and_with_what_follows_it(loop: LoopThread, keys: list[Identity]) -> None:
    async def scenario() -> None:
        async with relayed(keys) as (relay, target, caller):
            reservation = await target.reserved()
            dialled = await caller.dial(keys[HIDDEN].peer_id.to_bytes())
            begin, payload = MARK + (await offered(reservation)).circuit, os.urandom(1_000_000)
            there = await target.connect(begin[:1], begin[1:20], begin[20:] + b"early")
            here = await caller.connect(MARK + (await dialled.read()).circuit + payload[:300_000])
            assert await here[0].readexactly(5) == b"early"
            here[1].write(payload[300_000:])
            assert await there[0].readexactly(len(payload)) == payload
            there[1].close()
            assert await is_closed(here)
            assert await status_of(dialled) is StatusCode.OK
            assert relay.relaying._circuits.used == 0
            assert not relay.server.connections._expected

    loop.run(scenario(), 60)


def test_a_caller_that_does_not_open_its_end_gives_up_its_place(
    loop: LoopThread, keys: list[Identity], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peer.relays.service.ACCEPT_S", 0.3)

    async def scenario() -> None:
        async with relayed(keys) as (relay, target, caller):
            reservation = await target.reserved()
            dialled = await caller.dial(keys[HIDDEN].peer_id.to_bytes())
            accepted = await target.connect(MARK + (await offered(reservation)).circuit)
            reply = await dialled.read()
            assert await is_closed(accepted)
            assert await status_of(dialled) is StatusCode.UNAVAILABLE
            assert await is_closed(await caller.connect(MARK + reply.circuit))
            assert relay.relaying._circuits.used == 0

    loop.run(scenario(), 60)


def test_malformed_calls_by_the_hundred_leave_nothing(loop: LoopThread, keys: list[Identity]) -> None:
    async def scenario() -> None:
        relay = await serve(keys[RELAY], FAST_MBIT)
        stranger = Rude(relay, keys[CALLER])
        peer_ids = [b"", b"x", keys[HIDDEN].peer_id.to_bytes() + b"x", bytes(34)]
        async with closing(relay, stranger):
            for peer_id in itertools.islice(itertools.cycle(peer_ids), 200):
                assert await status_of(await stranger.dial(peer_id)) is StatusCode.INVALID_ARGUMENT
            assert total(relay.relaying.refused, reason="malformed") == 200
            assert not relay.server.connections._expected
            assert relay.relaying._circuits.used == relay.relaying._places.used == 0

    loop.run(scenario(), 60)


def test_a_circuits_call_holds_no_large_request(loop: LoopThread, keys: list[Identity]) -> None:
    """The call lasts as long as the circuit, and a message may have 3 MB."""
    unknown = b"\xfa\x01\xa0\x8d\x06" + bytes(100_000)  # field 31, and its length
    dial = relay_pb2.DialRequest(peer_id=keys[HIDDEN].peer_id.to_bytes())

    async def scenario() -> None:
        async with relayed(keys) as (relay, target, caller):
            await target.reserved()
            dial.MergeFromString(unknown)
            assert (
                await status_of(caller.stub.Dial(dial, metadata=caller.metadata))
                is StatusCode.INVALID_ARGUMENT
            )
            assert total(relay.relaying.refused, reason="malformed") == 1

    loop.run(scenario(), 60)


def test_a_flood_of_reservations_from_one_neighbourhood_keeps_nobody_out(
    loop: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peer.relays.service._RESERVATIONS", 4)
    monkeypatch.setattr("peer.relays.service._RESERVATIONS_NEAR", 2)

    async def scenario() -> None:
        relay = await serve(numbered_identities(1)[0], FAST_MBIT)
        keys = numbered_identities(7)
        crowd = [Rude(relay, key, f"192.0.2.{number % 2}") for number, key in enumerate(keys[1:5])]
        more, newcomer = Rude(relay, keys[5], "192.0.2.1"), Rude(relay, keys[6], "198.51.100.1")
        async with closing(relay, more, newcomer, *crowd):
            held = await asyncio.gather(*(each.reserve() for each in crowd))
            await asyncio.gather(*(call.read() for call in held))
            assert len(relay.relaying._reservations) == 4
            assert await status_of(await more.reserve()) is StatusCode.RESOURCE_EXHAUSTED
            await newcomer.reserved()
            await until(lambda: len(relay.relaying._reservations) == 4)
            assert newcomer.identity.peer_id in relay.relaying._reservations
            assert total(relay.relaying.refused, reason="displaced") == 1

    loop.run(scenario(), 60)


def test_one_neighbourhood_gets_few_reservations_though_there_is_room(
    loop: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peer.relays.service._RESERVATIONS_NEAR", 2)

    async def scenario() -> None:
        keys = numbered_identities(5)
        relay = await serve(keys[RELAY], FAST_MBIT)
        crowd = [Rude(relay, key, "192.0.2.1") for key in keys[1:4]]
        other = Rude(relay, keys[4], "198.51.100.1")
        async with closing(relay, other, *crowd):
            for each in (*crowd[:2], other):
                await each.reserved()
            assert await status_of(await crowd[2].reserve()) is StatusCode.RESOURCE_EXHAUSTED
            assert relay.relaying._reservations.keys() == {keys[n].peer_id for n in (1, 2, 4)}
            assert total(relay.relaying.refused, reason="crowded") == 1

    loop.run(scenario(), 60)


def test_circuits_that_fill_a_relay_make_room_for_a_newcomer(
    loop: LoopThread, keys: list[Identity], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peer.relays.service._CIRCUITS", 4)
    monkeypatch.setattr("peer.relays.service._CIRCUITS_TO_TARGET", 4)

    async def scenario() -> None:
        relay = await serve(keys[RELAY], FAST_MBIT)
        target, crowd = Rude(relay, keys[HIDDEN]), Rude(relay, keys[CALLER])
        newcomer = Rude(relay, keys[OTHER], "198.51.100.1")
        async with closing(relay, target, crowd, newcomer):
            reservation = await target.reserved()
            dialled = []
            for who in (*4 * [crowd], newcomer):
                dialled.append((await connect(reservation, target, who))[0])
            assert await status_of(dialled[3]) is StatusCode.RESOURCE_EXHAUSTED
            assert [call.done() for call in dialled] == [False, False, False, True, False], "one, and no more"
            assert relay.relaying._circuits.used == 4
            again = await crowd.dial(keys[HIDDEN].peer_id.to_bytes())
            assert await status_of(again) is StatusCode.RESOURCE_EXHAUSTED
            assert relay.relaying._of_callers == {keys[CALLER].peer_id: 3, keys[OTHER].peer_id: 1}

    loop.run(scenario(), 60)


def test_nobody_loses_a_circuit_for_a_caller_that_gets_none(
    loop: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peer.relays.service._CIRCUITS", 4)
    monkeypatch.setattr("peer.relays.service._CIRCUITS_TO_TARGET", 1)

    async def scenario() -> None:
        keys = numbered_identities(7)
        relay = await serve(keys[RELAY], FAST_MBIT)
        honest, stranger = Rude(relay, keys[1], "192.0.2.1"), Rude(relay, keys[2], "198.51.100.1")
        targets = [Rude(relay, key) for key in keys[3:]]
        async with closing(relay, honest, stranger, *targets):
            for target in targets:
                reservation = await target.reserved()
                await connect(reservation, target, stranger if target is targets[-1] else honest)
            again = await stranger.dial(targets[-1].identity.peer_id.to_bytes())
            assert await status_of(again) is StatusCode.RESOURCE_EXHAUSTED
            assert relay.relaying._circuits.used == 4
            assert not total(relay.relaying.refused, reason="displaced")

    loop.run(scenario(), 60)


def test_a_caller_need_not_wait_until_a_peer_sees_that_a_strangers_circuit_has_ended(
    loop: LoopThread, keys: list[Identity], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "peer.relays.service._CIRCUITS_TO_TARGET", 33
    )  # the last of 32 seems to be open still

    async def scenario() -> None:
        relay = await serve(keys[RELAY], FAST_MBIT)
        hidden = await hide(keys[HIDDEN], [relay])
        stranger, caller = Rude(relay, keys[OTHER], "192.0.2.1"), Caller(keys[CALLER])
        async with closing(relay, hidden, stranger, caller):
            for _ in range(32):
                dialled = await stranger.dial(keys[HIDDEN].peer_id.to_bytes())
                await stranger.connect(MARK + (await dialled.read()).circuit)
            await until(lambda: hidden.client.circuits == 32)
            assert await caller.ask(hidden.contact) == b"ping"
            assert not total(hidden.reservations.offers, outcome="refused")

    loop.run(scenario(), 60)


def test_a_write_after_a_reset_fails_like_any_other(loop: LoopThread) -> None:
    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            pipe = await asyncio.open_connection(*listening.getsockname())
            accepted, _ = listening.accept()
            accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            accepted.close()
            await until(pipe[1].is_closing)
            await asyncio.sleep(0.1)
            with pytest.raises(OSError, match="closed the connection"):
                await SocketStream(pipe).write(b"late")

    loop.run(scenario(), 60)


def test_a_circuit_that_floods_leaves_another_its_share(loop: LoopThread, keys: list[Identity]) -> None:
    upload = RateLimit(None)

    def make_relay(sessions: Sessions, connections: Connections, mbit: float) -> RelayServicer:
        return RelayServicer(sessions, connections, mbit, upload)

    async def flood(end: Pipe) -> None:
        while True:
            end[1].write(bytes(2**16))
            await end[1].drain()

    async def scenario() -> None:
        relay = await serve(keys[RELAY], 32.0, make_relay)
        target, flooding, modest = (Rude(relay, keys[n]) for n in (HIDDEN, CALLER, OTHER))
        async with closing(relay, target, flooding, modest):
            received = [0, 0]

            async def count(number: int, end: Pipe) -> None:
                while data := await end[0].read(2**16):
                    received[number] += len(data)

            reservation = await target.reserved()
            tasks = []
            for number, who in enumerate((flooding, modest)):
                _, here, there = await connect(reservation, target, who)
                tasks += [asyncio.create_task(flood(here)), asyncio.create_task(count(number, there))]
                await until(lambda: received[0] > 2**20)
            received[0] = 0
            await until(lambda: received[1] > 2**20)
            assert received[0] < 2 * received[1]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert upload.bytes >= sum(received)

    loop.run(scenario(), 60)


def test_many_circuits_of_one_neighbourhood_leave_another_its_share(
    loop: LoopThread, keys: list[Identity]
) -> None:
    received: Counter[str] = Counter()

    async def flood(end: Pipe) -> None:
        while True:
            end[1].write(bytes(2**16))
            await end[1].drain()

    async def count(name: str, end: Pipe) -> None:
        while data := await end[0].read(2**16):
            received[name] += len(data)

    async def scenario() -> None:
        relay = await serve(keys[RELAY], 32.0)
        target = Rude(relay, keys[HIDDEN])
        many, modest = Rude(relay, keys[CALLER], "192.0.2.1"), Rude(relay, keys[OTHER], "198.51.100.1")
        async with closing(relay, target, many, modest), asyncio.TaskGroup() as tasks:
            reservation = await target.reserved()
            carrying = []
            for name, who in (*12 * [("many", many)], ("modest", modest)):
                _, here, there = await connect(reservation, target, who)
                carrying += [tasks.create_task(flood(here)), tasks.create_task(count(name, there))]
            await until(lambda: received["many"] > 2**21)
            received.clear()
            await until(lambda: received["modest"] > 2**20)
            assert received["many"] < 3 * received["modest"]
            for task in carrying:
                task.cancel()

    loop.run(scenario(), 60)


def test_a_stalled_circuit_holds_the_sender_back_and_costs_no_memory(
    loop: LoopThread, keys: list[Identity]
) -> None:
    async def scenario() -> None:
        relay = await serve(keys[RELAY], FAST_MBIT)
        target, caller = Rude(relay, keys[HIDDEN]), Rude(relay, keys[CALLER])
        piece = os.urandom(2**16)
        async with closing(relay, target, caller):
            _, here, there = await connect(await target.reserved(), target, caller)
            sent = 0
            there[0]._transport.pause_reading()  # type: ignore[attr-defined]  # it never reads
            with contextlib.suppress(TimeoutError):
                while True:
                    async with asyncio.timeout(1.0):
                        here[1].write(piece)
                        sent += len(piece)
                        await here[1].drain()
                    assert sent < 64 * 2**20
            connections = relay.server.connections._table.all()
            assert 0 < sum(each.unsent() for each in connections) <= 2**17
            carried = total(relay.relaying.bytes)
            assert carried <= sent, "it sends no more than it receives"
            assert sent - carried < 16 * 2**20, "the rest waits in the sockets"

    loop.run(scenario(), 60)


def test_nobody_is_dialled_for_a_peer_that_is_not_here_or_does_not_accept(
    loop: LoopThread, keys: list[Identity], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peer.relays.service.ACCEPT_S", 0.3)

    async def scenario() -> None:
        async with relayed(keys) as (relay, target, caller):
            absent = await caller.dial(keys[OTHER].peer_id.to_bytes())
            assert await status_of(absent) is StatusCode.NOT_FOUND
            reservation = await target.reserved()
            silent = await caller.dial(keys[HIDDEN].peer_id.to_bytes())
            assert await status_of(silent) is StatusCode.UNAVAILABLE
            assert await is_closed(await target.connect(MARK + (await offered(reservation)).circuit))
            assert not relay.server.connections._expected
            assert relay.relaying._circuits.used == 0

    loop.run(scenario(), 60)


def test_each_end_of_a_circuit_is_opened_only_once(loop: LoopThread, keys: list[Identity]) -> None:
    async def scenario() -> None:
        relay = await serve(keys[RELAY], FAST_MBIT)
        target, caller, thief = (Rude(relay, keys[n]) for n in (HIDDEN, CALLER, OTHER))
        async with closing(relay, target, caller, thief):
            reservation = await target.reserved()
            dialled = await caller.dial(keys[HIDDEN].peer_id.to_bytes())
            theirs = MARK + (await offered(reservation)).circuit
            accepted = await target.connect(theirs)
            ours = MARK + (await dialled.read()).circuit
            assert await is_closed(await thief.connect(theirs))
            opened = await caller.connect(ours)
            for name in (theirs, ours):
                assert await is_closed(await thief.connect(name))
            accepted[1].write(b"still here")
            assert await opened[0].readexactly(10) == b"still here"

    loop.run(scenario(), 60)


def test_one_caller_has_few_circuits_and_dials_seldom(
    loop: LoopThread, keys: list[Identity], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peer.relays.service._CIRCUITS_OF_CALLER", 8)
    monkeypatch.setattr("peer.relays.service._DIALS_AT_ONCE", 16)

    async def scenario() -> None:
        async with relayed(keys) as (relay, target, caller):
            await target.reserved()
            calls = [await caller.dial(keys[HIDDEN].peer_id.to_bytes()) for _ in range(40)]
            await until(lambda: sum(call.done() for call in calls) == 32)
            refused = (
                total(relay.relaying.refused, reason="crowded"),
                total(relay.relaying.refused, reason="hasty"),
            )
            assert sum(refused) == 32
            assert min(refused) > 0
            assert relay.relaying._circuits.used == 8

    loop.run(scenario(), 60)


def test_dials_that_flood_one_peer_leave_another_its_callers(
    loop: LoopThread, keys: list[Identity], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peer.relays.service._TURNS_PER_S", 0.01)
    monkeypatch.setattr("peer.relays.service._TURNS_AT_ONCE", 1)

    async def scenario() -> None:
        relay = await serve(keys[RELAY], FAST_MBIT)
        flooded, other, caller = (Rude(relay, keys[number]) for number in (HIDDEN, OTHER, CALLER))
        async with closing(relay, flooded, other, caller):
            await flooded.reserved()
            reservation = await other.reserved()
            for _ in range(8):
                await caller.dial(keys[HIDDEN].peer_id.to_bytes())
            await until(lambda: total(relay.relaying.refused, reason="hasty"))
            await caller.dial(keys[OTHER].peer_id.to_bytes())
            assert (await offered(reservation)).caller == keys[CALLER].peer_id.to_bytes()

    loop.run(scenario(), 60)


def test_a_peer_that_says_too_often_that_it_is_there_loses_its_reservation(
    loop: LoopThread, keys: list[Identity]
) -> None:
    async def scenario() -> None:
        relay = await serve(keys[RELAY], FAST_MBIT)
        target = Rude(relay, keys[HIDDEN])
        async with closing(relay, target):
            await status_of(await target.reserve(100))
            assert total(relay.relaying.refused, reason="hasty") == 1
            await until(lambda: not relay.relaying._reservations)

    loop.run(scenario(), 60)


def meddling(change: Callable[[bytes, int], list[bytes]]) -> type[RelayServicer]:
    """A relay that alters what it copies. `change` takes some bytes and their number."""

    class Meddler(RelayServicer):
        def _end(self, pipe: Pipe, owner: Owner) -> ByteStream:
            end, numbers = super()._end(pipe, owner), itertools.count()

            async def write(data: bytes) -> None:
                for each in change(data, next(numbers)):
                    await SocketStream(pipe).write(each)

            end.write = write  # type: ignore[method-assign]  # what a hostile relay does
            return end

    return Meddler


def altered(data: bytes, number: int) -> list[bytes]:
    return [data[:-1] + bytes([data[-1] ^ 1])] if number > 3 else [data]


CHANGES: dict[str, Callable[[bytes, int], list[bytes]]] = {
    "alters": altered,
    "alters at once": lambda data, number: [bytes(len(data))],
    "drops": lambda data, number: [] if number > 3 else [data],
    "duplicates": lambda data, number: [data, data] if number > 3 else [data],
    "adds": lambda data, number: [data, os.urandom(100)] if number > 3 else [data],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_a_relay_does_to_the_bytes_breaks_the_circuit_and_nothing_else(
    loop: LoopThread, keys: list[Identity], change: Callable[[bytes, int], list[bytes]]
) -> None:
    async def scenario() -> None:
        async with behind_relay(keys, make_relay=meddling(change)) as (_, hidden, caller):
            channel = await caller.pool.reach(hidden.contact)
            method: Any = channel.unary_unary("/test/Echo")
            with pytest.raises(grpc.aio.AioRpcError):
                await method(os.urandom(300_000), timeout=0.5)
            assert not hidden.served.echoes

    loop.run(scenario(), 60)


def test_a_relay_that_cuts_and_delays_only_slows_down(loop: LoopThread, keys: list[Identity]) -> None:
    class Slow(RelayServicer):
        def _end(self, pipe: Pipe, owner: Owner) -> ByteStream:
            end = super()._end(pipe, owner)
            write = end.write

            async def cut(data: bytes) -> None:
                for each in filter(None, (data[: len(data) // 2], data[len(data) // 2 :])):
                    await asyncio.sleep(0.01)
                    await write(each)

            end.write = cut  # type: ignore[method-assign]  # what a hostile relay does
            return end

    async def scenario() -> None:
        async with behind_relay(keys, make_relay=Slow) as (_, hidden, caller):
            payload = os.urandom(300_000)
            assert await caller.ask(hidden.contact, payload) == payload

    loop.run(scenario(), 60)


def test_a_relay_can_put_nobody_else_in_the_place_of_a_peer(loop: LoopThread, keys: list[Identity]) -> None:
    async def scenario() -> None:
        relay = await serve(keys[RELAY], FAST_MBIT)
        impostor = await hide(keys[OTHER], [relay])
        caller = Caller(keys[CALLER])
        relay.relaying._reservations[keys[HIDDEN].peer_id] = relay.relaying._reservations[keys[OTHER].peer_id]
        at = Multiaddress(
            f"{Multiaddress.of(relay.endpoint, relay.peer_id)}/p2p-circuit/p2p/{keys[HIDDEN].peer_id}"
        )
        async with closing(relay, impostor, caller):
            pem = certificate_pem(keys[HIDDEN].make_certificate(), keys[HIDDEN].peer_id)
            channel = await caller.pool.get(await caller.dialler.open_to(keys[HIDDEN].peer_id, [at]), pem)
            method: Any = channel.unary_unary("/test/Echo")
            with pytest.raises(grpc.aio.AioRpcError):
                await method(b"", timeout=0.5)
            assert not impostor.served.echoes

    loop.run(scenario(), 60)


class Swallowing(RelayServicer):
    """A relay that says that circuits are open, and passes nothing on."""

    was_used = False

    async def _carry(self, here: ByteStream, there: ByteStream, sessions: Sequence[Session]) -> None:
        self.was_used = True
        while await here.read():
            pass


class Shutting(Swallowing):
    """A relay that closes each circuit at once."""

    async def _carry(self, here: ByteStream, there: ByteStream, sessions: Sequence[Session]) -> None:
        self.was_used = True


@pytest.mark.parametrize("kind", [Swallowing, Shutting])
def test_calls_get_round_a_relay_that_only_pretends_to_open_circuits(
    loop: LoopThread, keys: list[Identity], kind: type[Swallowing], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peer.relays.dialler._ANSWER_S", 1.0)

    async def scenario() -> None:
        bad, good = await serve(keys[RELAY], FAST_MBIT, kind), await serve(keys[OTHER], FAST_MBIT)
        hidden = await hide(keys[HIDDEN], [bad, good], reservations=2)
        caller = Caller(keys[CALLER])
        bad_first = sorted(hidden.reservations.addresses, key=lambda at: at.dialled != bad.peer_id)
        contact = KnownPeer(hidden.served.peer_id, (), hidden.served.pem, relay_addresses=bad_first)
        async with closing(bad, good, hidden, caller):
            assert await caller.ask(contact) == b"ping"
            assert isinstance(bad.relaying, kind)
            assert bad.relaying.was_used

    loop.run(scenario(), 60)


class Deaf(RelayServicer):
    """A relay that soon reads nothing more of what the peer behind it sends, and then ends its own side only."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.ending = asyncio.Event()

    async def _carry(self, here: ByteStream, there: ByteStream, sessions: Sequence[Session]) -> None:
        async def pass_on(source: ByteStream, target: ByteStream, most: float) -> None:
            passed = 0
            while passed < most and (data := await source.read()):
                await target.write(data)
                passed += len(data)

        assert isinstance(there, SocketStream)
        async with asyncio.TaskGroup() as tasks:
            carrying = [
                tasks.create_task(pass_on(there, here, 2**14)),
                tasks.create_task(pass_on(here, there, math.inf)),
            ]
            await self.ending.wait()
            for task in carrying:
                task.cancel()
        there._writer.write_eof()
        await asyncio.Event().wait()


def test_a_relay_that_stops_reading_keeps_no_socket_of_a_peer_open(
    loop: LoopThread, keys: list[Identity]
) -> None:
    async def send_without_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError), aborting((reader, writer)):
            while not writer.is_closing():
                writer.write(bytes(2**16))
                await writer.drain()

    async def scenario() -> None:
        relay = await serve(keys[RELAY], FAST_MBIT, Deaf)
        hidden = await hide(keys[HIDDEN], [relay])
        caller = Caller(keys[CALLER])
        server = await asyncio.start_server(send_without_end, LOCAL, 0)
        port = server.sockets[0].getsockname()[1]
        hidden.reservations.set_exit(lambda *who: asyncio.open_connection(LOCAL, port))
        assert isinstance(relay.relaying, Deaf)
        pipes: list[Pipe] = []
        connect_to = hidden.client.connect

        async def connect_and_note(relay: KnownPeer, circuit: bytes) -> Pipe:
            pipes.append(await connect_to(relay, circuit))
            return pipes[-1]

        hidden.client.connect = connect_and_note  # type: ignore[method-assign]  # to see its socket
        async with server, closing(relay, hidden, caller):
            circuit = await caller.client.dial(relay.as_relay, hidden.served.peer_id)
            waiting = [0]

            def is_stuck() -> bool:
                """Whether nothing of what is to be sent has left for half a second."""
                waiting.append(pipes[0][1].transport.get_write_buffer_size() if pipes else 0)
                return len(waiting) > 50 and 0 < waiting[-1] == min(waiting[-50:]) == max(waiting[-50:])

            await until(is_stuck)
            relay.relaying.ending.set()
            await until(lambda: not hidden.client.circuits)
            async with asyncio.timeout(10.0):
                await pipes[0][1].wait_closed()
            circuit.close()

    loop.run(scenario(), 60)


class Flooding(RelayServicer):
    """A relay that adds replies without end that nobody wants."""

    written = 0

    async def Dial(self, request: Any, context: Any) -> None:
        await context.write(relay_pb2.DialReply(circuit=os.urandom(NAME_BYTES)))
        while True:
            await context.write(relay_pb2.DialReply(circuit=bytes(10_000)))
            self.written += 10_000


def test_replies_that_a_relay_adds_take_little_of_a_callers_memory(
    loop: LoopThread, keys: list[Identity]
) -> None:
    async def scenario() -> None:
        relay = await serve(keys[RELAY], FAST_MBIT, Flooding)
        client = RelayClient(keys[CALLER], SWARM)
        assert isinstance(relay.relaying, Flooding)
        async with closing(relay, client):
            circuit = await client.dial(relay.as_relay, keys[HIDDEN].peer_id)
            before = -1
            while relay.relaying.written != before:
                before = relay.relaying.written
                await asyncio.sleep(0.5)
            assert before < 2**20
            circuit.close()

    loop.run(scenario(), 60)


class Calling(RelayServicer):
    """A relay that announces callers as fast as it can."""

    pause_s = 0.0

    async def Reserve(self, requests: Any, context: Any) -> None:
        await context.write(relay_pb2.ReserveReply())
        while True:
            caller = b"\x12\x20" + os.urandom(32)
            await context.write(relay_pb2.ReserveReply(circuit=os.urandom(16), caller=caller))
            await asyncio.sleep(self.pause_s)


class CallingOften(Calling):
    pause_s = 0.005


@pytest.mark.parametrize("kind", [Calling, CallingOften])
def test_a_relay_that_names_callers_without_end_is_given_up(
    loop: LoopThread, keys: list[Identity], kind: type[RelayServicer]
) -> None:
    async def scenario() -> None:
        relay = await serve(keys[RELAY], FAST_MBIT, kind)
        hidden = await hide(keys[HIDDEN], [relay])
        reservations, most = hidden.reservations, 0

        def is_given_up() -> bool:
            nonlocal most
            most = max(most, len(reservations._accepting))
            return not reservations.addresses

        async with closing(relay, hidden):
            await until(is_given_up)
            assert 0 < most <= 32
            assert total(reservations.offers, outcome="refused") > 0
            origins = {each.origin for each in hidden.served.server.connections._table.all()}
            assert origins <= {f"relay {relay.peer_id}"}

    loop.run(scenario(), 60)


def test_a_relay_that_answers_nonsense_is_left_alone(loop: LoopThread, keys: list[Identity]) -> None:
    class Babbling(RelayServicer):
        async def Reserve(self, requests: Any, context: Any) -> None:
            await context.write(relay_pb2.ReserveReply(circuit=b"x"))

    async def scenario() -> None:
        relay = await serve(keys[RELAY], FAST_MBIT, Babbling)
        hidden = await hide(keys[HIDDEN], [relay], reservations=0)
        async with closing(relay, hidden):
            with pytest.raises(UnreachableError, match="not empty"):
                await hidden.client.reserve(relay.as_relay)
            await until(lambda: hidden.reservations._pauses.held_back(0.0))
            assert not hidden.reservations.addresses

    loop.run(scenario(), 60)


def test_what_a_relay_says_when_it_ends_a_reservation_is_told_in_one_printable_line(
    loop: LoopThread, keys: list[Identity]
) -> None:
    class Shouting(RelayServicer):
        async def Reserve(self, requests: Any, context: Any) -> None:
            await context.write(relay_pb2.ReserveReply())
            await context.abort(StatusCode.UNAVAILABLE, "\x1b[2Jyou have won\n" + 1_000 * "!")

    async def scenario() -> None:
        relay = await serve(keys[RELAY], FAST_MBIT, Shouting)
        hidden = await hide(keys[HIDDEN], [relay], reservations=0)
        async with closing(relay, hidden):
            await until(lambda: hidden.reservations.refusal)
            said = hidden.reservations.refusal
            assert said.startswith(f"relay {relay.peer_id} has gone: [2Jyou have won !!!")
            assert said.isprintable()
            assert len(said) < 400

    loop.run(scenario(), 60)
