"""Sessions: whoever opens one has proved who it is, to this server, now, and once."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Set
from typing import Any

import grpc
import pytest
from callers import RIGHTS, a_caller, new_identity
from google.protobuf.message import DecodeError
from grpc import StatusCode
from hypothesis import given
from hypothesis import strategies as st

from peer.errors import ExpertError
from peer.identity import SESSION_DOMAIN, Identity, PeerID, certificate_pem
from peer.loop import LoopThread
from peer.metrics import total
from peer.rpc.calls import server_credentials
from peer.rpc.channels import CLIENT_OPTIONS, SERVER_OPTIONS
from peer.rpc.sessions import Admitted, ReplayWindow, Right, SessionClient, Sessions, SessionServicer
from peer.wire import admission_pb2, session_pb2, session_pb2_grpc

SWARM = "sauna-abcdefghijkl"
FORWARD, BACKWARD = session_pb2.RIGHT_FORWARD, session_pb2.RIGHT_BACKWARD


@pytest.fixture(scope="module")
def server() -> Identity:
    return new_identity()


@pytest.fixture(scope="module")
def alice() -> Identity:
    return new_identity()


@pytest.fixture(scope="module")
def bob() -> Identity:
    return new_identity()


def make_sessions(server: Identity, **options: Any) -> Sessions:
    return Sessions(SWARM, server.peer_id, **{"now": lambda: 1000.0, **options})


def statement_of(
    caller: Identity, server: Identity, now: float = 1000.0, rights: tuple[Right, ...] = RIGHTS
) -> session_pb2.OpenRequest:
    return SessionClient(caller, SWARM, rights, now=lambda: now).statement(server.peer_id)


def refused(sessions: Sessions, request: session_pb2.OpenRequest, status: StatusCode, said: str) -> None:
    with pytest.raises(ExpertError, match=said or None) as caught:
        sessions.open(request)
    assert caught.value.status is status
    assert len(sessions) == 0
    assert total(sessions.events, event="refused") >= 1


def test_a_session_knows_its_caller_and_what_it_may(server: Identity, alice: Identity) -> None:
    sessions = make_sessions(server)
    key = sessions.open(statement_of(alice, server, rights=(FORWARD,))).session
    assert sessions.find(key, FORWARD).caller == alice.peer_id
    with pytest.raises(ExpertError, match="RIGHT_BACKWARD") as caught:
        sessions.find(key, BACKWARD)
    assert caught.value.status is StatusCode.PERMISSION_DENIED
    with pytest.raises(ExpertError) as caught:
        sessions.find(b"", FORWARD)
    assert caught.value.status is StatusCode.UNAUTHENTICATED


def test_a_statement_opens_one_session_and_no_more(server: Identity, alice: Identity) -> None:
    sessions, request = make_sessions(server), statement_of(alice, server)
    key = sessions.open(request).session
    with pytest.raises(ExpertError, match="seen before") as caught:
        sessions.open(request)
    assert caught.value.status is StatusCode.UNAUTHENTICATED
    assert sessions.find(key, FORWARD).caller == alice.peer_id  # a replay does not end it either


def test_a_statement_for_one_server_opens_nothing_at_another(
    server: Identity, alice: Identity, bob: Identity
) -> None:
    refused(make_sessions(bob), statement_of(alice, server), StatusCode.UNAUTHENTICATED, "for another server")


@pytest.mark.parametrize("age_s", [61.0, -61.0, float("nan"), float("inf")])
def test_a_statement_from_another_time_is_refused(server: Identity, alice: Identity, age_s: float) -> None:
    request = statement_of(alice, server, 1000.0 - age_s)
    refused(make_sessions(server), request, StatusCode.UNAUTHENTICATED, "clock")


def test_nobody_opens_a_session_in_anothers_name(server: Identity, alice: Identity, bob: Identity) -> None:
    sessions = make_sessions(server)
    request = statement_of(alice, server)
    stolen = session_pb2.OpenRequest(
        statement=request.statement,
        public_key=bob.public_key,
        signature=bob.sign(request.statement, SESSION_DOMAIN),
    )
    refused(sessions, stolen, StatusCode.UNAUTHENTICATED, "not that of the caller")
    stolen.public_key = alice.public_key
    refused(sessions, stolen, StatusCode.UNAUTHENTICATED, "signature is wrong")
    of_a_record = session_pb2.OpenRequest(
        statement=request.statement,
        public_key=alice.public_key,
        signature=alice.sign(request.statement),
    )
    refused(sessions, of_a_record, StatusCode.UNAUTHENTICATED, "signature is wrong")


@given(st.integers(0, 10**6), st.integers(1, 255))
def test_no_changed_byte_makes_another_caller(
    server: Identity, alice: Identity, position: int, change: int
) -> None:
    request = statement_of(alice, server)
    spoilt = bytearray(request.SerializeToString())
    spoilt[position % len(spoilt)] ^= change
    sessions = make_sessions(server)
    with contextlib.suppress(ExpertError, DecodeError):
        parsed = session_pb2.OpenRequest.FromString(bytes(spoilt))
        key = sessions.open(parsed).session
        # the change fell on what is not looked at: the same caller said the same
        assert sessions.find(key, FORWARD).caller == alice.peer_id
        assert parsed.statement == request.statement


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"swarm_id": "banya"}, StatusCode.FAILED_PRECONDITION),
        ({"protocol_version": 99}, StatusCode.FAILED_PRECONDITION),
        ({"nonce": b"short"}, StatusCode.INVALID_ARGUMENT),
        ({"rights": []}, StatusCode.INVALID_ARGUMENT),
        ({"rights": [FORWARD] * 17}, StatusCode.INVALID_ARGUMENT),
        ({"swarm_id": "a" * 5000}, StatusCode.INVALID_ARGUMENT),
    ],
)
def test_a_statement_that_is_not_right_is_refused(
    server: Identity, alice: Identity, changes: dict[str, Any], status: StatusCode
) -> None:
    statement = session_pb2.OpenStatement.FromString(statement_of(alice, server).statement)
    for name, value in changes.items():
        statement.ClearField(name)
        if isinstance(value, list):
            getattr(statement, name).extend(value)
        else:
            setattr(statement, name, value)
    data = statement.SerializeToString()
    request = session_pb2.OpenRequest(
        statement=data, public_key=alice.public_key, signature=alice.sign(data, SESSION_DOMAIN)
    )
    refused(make_sessions(server), request, status, "")


def test_a_caller_has_one_session_and_the_one_used_longest_ago_makes_room(server: Identity) -> None:
    sessions, now = make_sessions(server, limit=2), 1000.0
    people = [new_identity() for _ in range(3)]
    first = sessions.open(statement_of(people[0], server)).session
    again = sessions.open(statement_of(people[0], server)).session
    assert len(sessions) == 1
    with pytest.raises(ExpertError):
        sessions.find(first, FORWARD)
    second = sessions.open(statement_of(people[1], server, now)).session
    sessions.find(again, FORWARD)
    sessions.open(statement_of(people[2], server, now))
    assert (len(sessions), total(sessions.events, event="evicted")) == (2, 1)
    assert sessions.find(again, FORWARD)
    with pytest.raises(ExpertError):
        sessions.find(second, FORWARD)


def test_a_session_ends_at_its_time(server: Identity, alice: Identity) -> None:
    time = [1000.0]
    sessions = make_sessions(server, lifetime_s=10.0, now=lambda: time[0])
    reply = sessions.open(statement_of(alice, server))
    assert reply.lifetime_s == 10.0
    time[0] = 1010.0
    with pytest.raises(ExpertError) as caught:
        sessions.find(reply.session, FORWARD)
    assert caught.value.status is StatusCode.UNAUTHENTICATED
    sessions.recheck()
    assert len(sessions) == 0


class Gate:
    """Admits until it is shut."""

    open = True

    def admit(self, caller: PeerID, rights: Set[Right], badge: admission_pb2.Badge | None) -> Admitted:
        return Admitted(serial=7, expires_at=1005.0)

    def still_admits(self, caller: PeerID, serial: int) -> bool:
        assert serial == 7
        return self.open


def test_a_session_lasts_no_longer_than_its_admission(server: Identity, alice: Identity) -> None:
    gate = Gate()
    sessions = make_sessions(server, admission=gate)
    assert sessions.open(statement_of(alice, server)).lifetime_s == 5.0
    sessions.recheck()
    assert len(sessions) == 1
    gate.open = False
    sessions.recheck()
    assert len(sessions) == 0


@given(st.lists(st.tuples(st.integers(0, 30), st.floats(900, 1100)), max_size=60), st.integers(1, 8))
def test_the_window_takes_nothing_twice_however_small_it_is(
    statements: list[tuple[int, float]], limit: int
) -> None:
    window, taken = ReplayWindow(60.0, limit), set[tuple[int, float]]()
    for number, at in statements:
        try:
            window.take(b"alice", repr((number, at)).encode(), at, 1000.0)
        except ExpertError:
            continue
        assert (number, at) not in taken
        taken.add((number, at))
        assert len(window) <= limit


def test_one_caller_that_signs_for_ever_does_not_shut_the_others_out() -> None:
    window = ReplayWindow(60.0, limit=16, limit_of_caller=4)
    for n in range(100):
        with contextlib.suppress(ExpertError):
            window.take(b"mallory", bytes([n]), 1050.0 + n / 1000, 1000.0)
    for n, caller in enumerate((b"alice", b"bob", b"alice")):
        window.take(caller, bytes([n]), 1000.0, 1000.0)
    with pytest.raises(ExpertError, match="at most 4 sessions") as refused:
        window.take(b"mallory", b"more", 1001.0, 1001.0)
    assert refused.value.status is grpc.StatusCode.RESOURCE_EXHAUSTED
    with pytest.raises(ExpertError, match="seen before"):
        window.take(b"alice", bytes([0]), 1000.0, 1001.0)
    window.take(b"mallory", b"later", 1200.0, 1200.0)
    assert len(window) == 1


# Over a socket


@contextlib.asynccontextmanager
async def serving(identity: Identity, sessions: Sessions) -> AsyncIterator[grpc.aio.Channel]:
    certificate = identity.make_certificate()
    server = grpc.aio.server(options=SERVER_OPTIONS)
    session_pb2_grpc.add_SessionServiceServicer_to_server(SessionServicer(sessions), server)
    port = server.add_secure_port("127.0.0.1:0", server_credentials(identity, certificate))
    await server.start()
    credentials = grpc.ssl_channel_credentials(certificate_pem(certificate, identity.peer_id))
    try:
        async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, CLIENT_OPTIONS) as channel:
            yield channel
    finally:
        await server.stop(None)


def test_a_session_is_opened_once_and_again_when_it_has_ended(
    loop: LoopThread, server: Identity, alice: Identity
) -> None:
    async def scenario() -> None:
        sessions = Sessions(SWARM, server.peer_id)
        async with serving(server, sessions) as channel:
            own = a_caller(SWARM, alice)
            assert own.known(server.peer_id) is None
            asked = [own.metadata(server.peer_id, channel, 10.0) for _ in range(5)]
            first, *others = await asyncio.gather(*asked)
            assert others == [first] * 4
            assert (own.opened, total(sessions.events, event="opened")) == (1, 1)
            assert own.known(server.peer_id) == first
            assert sessions.find(first[0][1], FORWARD).caller == alice.peer_id
            own.ended(server.peer_id, first)
            second = await own.metadata(server.peer_id, channel, 10.0)
            assert second != first
            own.ended(server.peer_id, first)  # told late by another call: the new one stays
            assert own.known(server.peer_id) == second

    loop.run(scenario(), 120)


def test_who_is_refused_is_told_why(loop: LoopThread, server: Identity, alice: Identity) -> None:
    async def scenario() -> None:
        async with serving(server, Sessions("banya", server.peer_id)) as channel:
            with pytest.raises(ExpertError, match="belongs to swarm banya") as caught:
                await a_caller(SWARM, alice).metadata(server.peer_id, channel, 10.0)
            assert caught.value.status is StatusCode.FAILED_PRECONDITION

    loop.run(scenario(), 120)


def test_a_stolen_session_opens_nothing_at_another_server(
    loop: LoopThread, server: Identity, alice: Identity, bob: Identity
) -> None:
    async def scenario() -> None:
        here, there = Sessions(SWARM, server.peer_id), Sessions(SWARM, bob.peer_id)
        async with serving(server, here) as channel:
            stolen = await a_caller(SWARM, alice).metadata(server.peer_id, channel, 10.0)
        with pytest.raises(ExpertError) as caught:
            there.find(stolen[0][1], FORWARD)
        assert caught.value.status is StatusCode.UNAUTHENTICATED

    loop.run(scenario(), 120)
