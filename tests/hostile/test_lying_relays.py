"""Relays over gRPC among strangers: hostile callers of a relay, hostile peers behind one, and relays that lie."""

import asyncio
import contextlib
import itertools
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
from callers import numbered_identities
from grpc import StatusCode
from hypothesis import given
from hypothesis import strategies as st
from relayed import SWARM, Caller, Served, closing, hide, serve, until

from peer.errors import ExpertError, UnreachableError
from peer.identity import Identity, certificate_pem
from peer.loop import LoopThread
from peer.metrics import total
from peer.rates import RateLimit
from peer.relays.pieces import PIECE_BYTES, read_circuit, read_piece, read_target
from peer.relays.service import RelayServicer
from peer.rpc.channels import CLIENT_OPTIONS
from peer.rpc.sessions import SESSION_KEY, Metadata, SessionClient, Sessions
from peer.transport.addresses import Multiaddress
from peer.wire import relay_pb2, relay_pb2_grpc, session_pb2

RELAY, HIDDEN, CALLER, OTHER = range(4)
FAST_MBIT = 10_000.0
Piece = relay_pb2.CircuitPiece


@pytest.fixture(scope="module")
def keys() -> list[Identity]:
    return numbered_identities(6)


def play(loop: LoopThread, scenario: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        await scenario()

    loop.run(run(), 60)


class Rude:
    """Sends a relay any messages."""

    def __init__(self, served: Served, identity: Identity, near: str = "127.0.0.1") -> None:
        """`near`: the neighbourhood that the peer claims to be in."""
        client = SessionClient(identity, SWARM, (session_pb2.RIGHT_RELAY,))
        opening = client.statement(served.peer_id, served.sessions.challenges.new())
        session = served.sessions.open(opening, near).session
        self.metadata: Metadata = ((SESSION_KEY, session),)
        self.identity = identity
        credentials = grpc.ssl_channel_credentials(root_certificates=served.pem)
        self.channel = grpc.aio.secure_channel(served.endpoint, credentials, CLIENT_OPTIONS)
        self.stub: Any = relay_pb2_grpc.RelayServiceStub(self.channel)
        self.calls: list[Any] = []

    async def begin(self, method: str, *messages: Any) -> Any:
        """Starts a call and sends these messages."""
        call = getattr(self.stub, method)(metadata=self.metadata)
        self.calls.append(call)
        for message in messages:
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await call.write(message)
        return call

    async def reserve(self) -> Any:
        return await self.begin("Reserve", relay_pb2.ReserveRequest())

    async def dial(self, identity: Identity, *data: bytes) -> Any:
        pieces = [Piece(data=each) for each in data]
        return await self.begin("Dial", Piece(peer_id=identity.peer_id.to_bytes()), *pieces)

    async def close(self) -> None:
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


@contextlib.asynccontextmanager
async def connected(relay: Served, target: Rude, caller: Rude) -> AsyncIterator[tuple[Any, Any]]:
    """The two ends of a circuit."""
    reservation = await target.reserve()
    assert not (await reservation.read()).circuit
    dialled = await caller.dial(target.identity)
    offer = await offered(reservation)
    assert offer.caller == caller.identity.peer_id.to_bytes()
    accepted = await target.begin("Accept", Piece(circuit=offer.circuit))
    assert not (await accepted.read()).ByteSize()
    assert not (await dialled.read()).ByteSize()
    yield dialled, accepted


@given(st.binary(max_size=40), st.binary(max_size=40), st.binary(max_size=20))
def test_pieces_are_parsed_strictly(data: bytes, peer_id: bytes, circuit: bytes) -> None:
    piece = Piece(data=data, peer_id=peer_id, circuit=circuit)
    for read in (read_piece, read_target, read_circuit):
        with contextlib.suppress(ExpertError):
            read(piece)
            assert sum(map(bool, (data, peer_id, circuit))) <= 1


@pytest.mark.parametrize(
    "piece",
    [
        Piece(data=b"x" * (PIECE_BYTES + 1)),
        Piece(data=b"x", peer_id=b"y"),
        Piece(circuit=secrets.token_bytes(16)),
    ],
)
def test_a_malformed_piece_ends_its_circuit_alone(loop: LoopThread, keys: list[Identity], piece: Any) -> None:
    async def scenario() -> None:
        relay = await serve(keys[RELAY], FAST_MBIT)
        target, caller = Rude(relay, keys[HIDDEN]), Rude(relay, keys[CALLER])
        async with closing(relay, target, caller), connected(relay, target, caller) as (dialled, accepted):
            await dialled.write(Piece(data=b"hello"))
            assert (await accepted.read()).data == b"hello"
            await dialled.write(piece)
            assert await status_of(dialled) is StatusCode.INVALID_ARGUMENT
            await status_of(accepted)
            assert relay.relaying._circuits.used == 0
            assert keys[HIDDEN].peer_id in relay.relaying._reservations

    play(loop, scenario)


def test_malformed_calls_by_the_hundred_leave_nothing(loop: LoopThread, keys: list[Identity]) -> None:
    async def scenario() -> None:
        relay = await serve(keys[RELAY], FAST_MBIT)
        stranger = Rude(relay, keys[CALLER])
        pieces = [
            Piece(),
            Piece(peer_id=b"x"),
            Piece(data=b"x", peer_id=keys[HIDDEN].peer_id.to_bytes()),
            Piece(circuit=b"x"),
            Piece(circuit=bytes(17)),
            Piece(peer_id=bytes(34)),
        ]
        async with closing(relay, stranger):
            for piece in itertools.islice(itertools.cycle(pieces), 150):
                for method in ("Dial", "Accept"):
                    call = await stranger.begin(method, piece)
                    assert await status_of(call) is StatusCode.INVALID_ARGUMENT
            assert total(relay.relaying.refused, reason="malformed") == 300
            assert not relay.relaying._offered
            assert relay.relaying._circuits.used == relay.relaying._places.used == 0

    play(loop, scenario)


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
            assert not (await (await newcomer.reserve()).read()).circuit
            await until(lambda: len(relay.relaying._reservations) == 4)
            assert newcomer.identity.peer_id in relay.relaying._reservations
            assert total(relay.relaying.refused, reason="displaced") == 1

    play(loop, scenario)


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
                assert not (await (await each.reserve()).read()).circuit
            assert await status_of(await crowd[2].reserve()) is StatusCode.RESOURCE_EXHAUSTED
            assert relay.relaying._reservations.keys() == {keys[n].peer_id for n in (1, 2, 4)}
            assert total(relay.relaying.refused, reason="crowded") == 1

    play(loop, scenario)


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
            reservation = await target.reserve()
            dialled = []
            for who in (*4 * [crowd], newcomer):
                dialled.append(await who.dial(keys[HIDDEN]))
                accepted = await target.begin("Accept", Piece(circuit=(await offered(reservation)).circuit))
                assert not (await accepted.read()).ByteSize()
                assert not (await dialled[-1].read()).ByteSize()
            assert await status_of(dialled[3]) is StatusCode.RESOURCE_EXHAUSTED
            assert [call.done() for call in dialled] == [False, False, False, True, False], "one, and no more"
            assert relay.relaying._circuits.used == 4
            assert await status_of(await crowd.dial(keys[HIDDEN])) is StatusCode.RESOURCE_EXHAUSTED
            assert relay.relaying._of_callers == {keys[CALLER].peer_id: 3, keys[OTHER].peer_id: 1}

    play(loop, scenario)


def test_a_circuit_that_floods_leaves_another_its_share(loop: LoopThread, keys: list[Identity]) -> None:
    upload = RateLimit(None)

    def make_relay(sessions: Sessions, mbit: float) -> RelayServicer:
        return RelayServicer(sessions, mbit, upload)

    async def flood(call: Any) -> None:
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
            while True:
                await call.write(Piece(data=bytes(PIECE_BYTES)))

    async def scenario() -> None:
        relay = await serve(keys[RELAY], 32.0, make_relay)
        target, flooding, modest = (Rude(relay, keys[n]) for n in (HIDDEN, CALLER, OTHER))
        async with closing(relay, target, flooding, modest):
            received = [0, 0]

            async def count(number: int, call: Any) -> None:
                async for piece in call:
                    received[number] += len(piece.data)

            reservation = await target.reserve()
            tasks = []
            for number, who in enumerate((flooding, modest)):
                dialled = await who.dial(keys[HIDDEN])
                accepted = await target.begin("Accept", Piece(circuit=(await offered(reservation)).circuit))
                tasks += [
                    asyncio.create_task(flood(dialled)),
                    asyncio.create_task(count(number, accepted)),
                ]
                await until(lambda: received[0] > 2**20)
            received[0] = 0
            await until(lambda: received[1] > 2**20)
            assert received[0] < 2 * received[1]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert upload.bytes >= sum(received)

    play(loop, scenario)


def test_a_stalled_circuit_holds_the_sender_back_and_costs_no_memory(
    loop: LoopThread, keys: list[Identity]
) -> None:
    async def scenario() -> None:
        relay = await serve(keys[RELAY], FAST_MBIT)
        target, caller = Rude(relay, keys[HIDDEN]), Rude(relay, keys[CALLER])
        piece = Piece(data=os.urandom(PIECE_BYTES))
        async with closing(relay, target, caller), connected(relay, target, caller) as (dialled, _):
            sent = 0
            with contextlib.suppress(TimeoutError):
                while True:  # the other end never reads
                    async with asyncio.timeout(1.0):
                        await dialled.write(piece)
                    sent += PIECE_BYTES
                    assert sent < 64 * 2**20
            carried = total(relay.relaying.bytes)
            assert carried <= sent + PIECE_BYTES, "it sends no more than it receives"
            assert sent - carried < 8 * 2**20, "the rest waits in windows"

    play(loop, scenario)


def test_nobody_is_dialled_for_a_peer_that_is_not_here_or_does_not_accept(
    loop: LoopThread, keys: list[Identity], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peer.relays.service.ACCEPT_S", 0.3)

    async def scenario() -> None:
        relay = await serve(keys[RELAY], FAST_MBIT)
        target, caller = Rude(relay, keys[HIDDEN]), Rude(relay, keys[CALLER])
        async with closing(relay, target, caller):
            assert await status_of(await caller.dial(keys[OTHER])) is StatusCode.NOT_FOUND
            reservation = await target.reserve()
            await reservation.read()
            assert await status_of(await caller.dial(keys[HIDDEN])) is StatusCode.UNAVAILABLE
            late = await target.begin("Accept", Piece(circuit=(await offered(reservation)).circuit))
            assert await status_of(late) is StatusCode.NOT_FOUND
            assert not relay.relaying._offered
            assert relay.relaying._circuits.used == 0

    play(loop, scenario)


def test_only_the_peer_that_was_dialled_accepts_and_only_once(loop: LoopThread, keys: list[Identity]) -> None:
    async def scenario() -> None:
        relay = await serve(keys[RELAY], FAST_MBIT)
        target, caller, thief = (Rude(relay, keys[n]) for n in (HIDDEN, CALLER, OTHER))
        async with closing(relay, target, caller, thief):
            reservation = await target.reserve()
            await reservation.read()
            dialled = await caller.dial(keys[HIDDEN])
            named = Piece(circuit=(await offered(reservation)).circuit)
            assert await status_of(await thief.begin("Accept", named)) is StatusCode.NOT_FOUND
            accepted = await target.begin("Accept", named)
            assert not (await accepted.read()).ByteSize()
            assert not (await dialled.read()).ByteSize()
            for who in (target, thief, caller):
                assert await status_of(await who.begin("Accept", named)) is StatusCode.NOT_FOUND
            await accepted.write(Piece(data=b"still here"))
            assert (await dialled.read()).data == b"still here"

    play(loop, scenario)


def test_one_caller_has_few_circuits_and_dials_seldom(
    loop: LoopThread, keys: list[Identity], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peer.relays.service._CIRCUITS_OF_CALLER", 8)
    monkeypatch.setattr("peer.relays.service._DIALS_AT_ONCE", 16)

    async def scenario() -> None:
        relay = await serve(keys[RELAY], FAST_MBIT)
        target, caller = Rude(relay, keys[HIDDEN]), Rude(relay, keys[CALLER])
        async with closing(relay, target, caller):
            reservation = await target.reserve()
            await reservation.read()
            calls = [await caller.dial(keys[HIDDEN]) for _ in range(40)]
            await until(lambda: sum(call.done() for call in calls) == 32)
            refused = (
                total(relay.relaying.refused, reason="crowded"),
                total(relay.relaying.refused, reason="hasty"),
            )
            assert sum(refused) == 32
            assert min(refused) > 0
            assert relay.relaying._circuits.used == 8

    play(loop, scenario)


def test_dials_that_flood_one_peer_leave_another_its_callers(
    loop: LoopThread, keys: list[Identity], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peer.relays.service._TURNS_PER_S", 0.01)
    monkeypatch.setattr("peer.relays.service._TURNS_AT_ONCE", 1)

    async def scenario() -> None:
        relay = await serve(keys[RELAY], FAST_MBIT)
        flooded, other, caller = (Rude(relay, keys[number]) for number in (HIDDEN, OTHER, CALLER))
        async with closing(relay, flooded, other, caller):
            await (await flooded.reserve()).read()
            reservation = await other.reserve()
            await reservation.read()
            for _ in range(8):
                await caller.dial(keys[HIDDEN])
            await until(lambda: total(relay.relaying.refused, reason="hasty"))
            await caller.dial(keys[OTHER])
            assert (await offered(reservation)).caller == keys[CALLER].peer_id.to_bytes()

    play(loop, scenario)


def test_a_peer_that_says_too_often_that_it_is_there_loses_its_reservation(
    loop: LoopThread, keys: list[Identity]
) -> None:
    async def scenario() -> None:
        relay = await serve(keys[RELAY], FAST_MBIT)
        target = Rude(relay, keys[HIDDEN])
        async with closing(relay, target):
            call = await target.begin("Reserve", *100 * [relay_pb2.ReserveRequest()])
            await status_of(call)
            assert total(relay.relaying.refused, reason="hasty") == 1
            await until(lambda: not relay.relaying._reservations)

    play(loop, scenario)


def meddling(change: Callable[[bytes, int], list[bytes]]) -> type[RelayServicer]:
    """A relay that alters the pieces that it forwards. `change` takes a piece's data and number."""

    class Meddler(RelayServicer):
        async def _carry(self, here: Any, there: Any) -> None:
            numbers = itertools.count()
            async for piece in here.pieces:
                if not piece.data:
                    continue
                for data in change(piece.data, next(numbers)):
                    await there.context.write(Piece(data=data))

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
        relay = await serve(keys[RELAY], FAST_MBIT, meddling(change))
        hidden = await hide(keys[HIDDEN], [relay])
        caller = Caller(keys[CALLER])
        async with closing(relay, hidden, caller):
            channel = await caller.pool.reach(hidden.contact)
            method: Any = channel.unary_unary("/test/Echo")
            with pytest.raises(grpc.aio.AioRpcError):
                await method(os.urandom(300_000), timeout=0.5)
            assert not hidden.served.echoes

    play(loop, scenario)


def test_a_relay_that_cuts_and_delays_only_slows_down(loop: LoopThread, keys: list[Identity]) -> None:
    class Slow(RelayServicer):
        async def _carry(self, here: Any, there: Any) -> None:
            async for piece in here.pieces:
                half = len(piece.data) // 2
                for data in filter(None, (piece.data[:half], piece.data[half:])):
                    await asyncio.sleep(0.01)
                    await there.context.write(Piece(data=data))

    async def scenario() -> None:
        relay = await serve(keys[RELAY], FAST_MBIT, Slow)
        hidden = await hide(keys[HIDDEN], [relay])
        caller = Caller(keys[CALLER])
        async with closing(relay, hidden, caller):
            payload = os.urandom(300_000)
            assert await caller.ask(hidden.contact, payload) == payload

    play(loop, scenario)


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

    play(loop, scenario)


class Calling(RelayServicer):
    """A relay that announces callers as fast as it can, and says that each circuit is open."""

    pause_s = 0.0

    async def Reserve(self, requests: Any, context: Any) -> None:
        await context.write(relay_pb2.ReserveReply())
        while True:
            caller = b"\x12\x20" + os.urandom(32)
            await context.write(relay_pb2.ReserveReply(circuit=os.urandom(16), caller=caller))
            await asyncio.sleep(self.pause_s)

    async def Accept(self, pieces: Any, context: Any) -> None:
        await context.write(Piece())
        async for _ in pieces:
            pass


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

    play(loop, scenario)


def test_a_relay_that_answers_nonsense_is_left_alone(loop: LoopThread, keys: list[Identity]) -> None:
    class Babbling(RelayServicer):
        async def Reserve(self, requests: Any, context: Any) -> None:
            await context.write(relay_pb2.ReserveReply(circuit=b"x"))

    async def scenario() -> None:
        relay = await serve(keys[RELAY], FAST_MBIT, Babbling)
        hidden = await hide(keys[HIDDEN], [relay], reservations=0)
        async with closing(relay, hidden):
            with pytest.raises(UnreachableError, match="not empty"):
                await hidden.client.open("Reserve", relay.as_relay, relay_pb2.ReserveRequest())
            await until(lambda: hidden.reservations._pauses.held_back(0.0))
            assert not hidden.reservations.addresses

    play(loop, scenario)


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

    play(loop, scenario)
