"""Sessions: a caller that opens one has proved its identity, to this server, now, and once."""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Set
from typing import Any

import grpc
import pytest
from callers import RIGHTS, a_caller, numbered_identities
from google.protobuf.message import DecodeError
from grpc import StatusCode
from hypothesis import given
from hypothesis import strategies as st
from stranger import new_identity

from peer.errors import ExpertError
from peer.identity import SESSION_DOMAIN, Identity, PeerID, certificate_pem
from peer.loop import LoopThread
from peer.metrics import total
from peer.rpc.channels import CLIENT_OPTIONS, SERVER_OPTIONS
from peer.rpc.server import server_credentials
from peer.rpc.sessions import Admitted, Challenges, Right, SessionClient, Sessions, SessionServicer
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
    caller: Identity, server: Identity, sessions: Sessions, rights: tuple[Right, ...] = RIGHTS
) -> session_pb2.OpenRequest:
    """`sessions`: where the challenge comes from."""
    challenge = sessions.challenges.new()
    return SessionClient(caller, SWARM, rights).statement(server.peer_id, challenge)


def refused(sessions: Sessions, request: session_pb2.OpenRequest, status: StatusCode, said: str) -> None:
    with pytest.raises(ExpertError, match=said or None) as caught:
        sessions.open(request)
    assert caught.value.status is status
    assert len(sessions) == 0
    assert total(sessions.events, event="refused") >= 1


def test_a_session_knows_its_caller_and_what_it_may(server: Identity, alice: Identity) -> None:
    sessions = make_sessions(server)
    key = sessions.open(statement_of(alice, server, sessions, rights=(FORWARD,))).session
    assert sessions.find(key, FORWARD).caller == alice.peer_id
    with pytest.raises(ExpertError, match="RIGHT_BACKWARD") as caught:
        sessions.find(key, BACKWARD)
    assert caught.value.status is StatusCode.PERMISSION_DENIED
    with pytest.raises(ExpertError) as caught:
        sessions.find(b"", FORWARD)
    assert caught.value.status is StatusCode.UNAUTHENTICATED


def test_a_statement_opens_one_session_and_no_more(server: Identity, alice: Identity) -> None:
    sessions = make_sessions(server)
    request = statement_of(alice, server, sessions)
    key = sessions.open(request).session
    with pytest.raises(ExpertError, match="used before") as caught:
        sessions.open(request)
    assert caught.value.status is StatusCode.UNAUTHENTICATED
    assert sessions.find(key, FORWARD).caller == alice.peer_id  # a replay does not end it either


def test_a_statement_for_one_server_opens_nothing_at_another(
    server: Identity, alice: Identity, bob: Identity
) -> None:
    sessions = make_sessions(bob)
    request = statement_of(alice, server, sessions)
    refused(sessions, request, StatusCode.UNAUTHENTICATED, "for another server")


def test_a_challenge_is_of_use_for_half_a_minute_and_at_its_server(server: Identity, alice: Identity) -> None:
    time = [1000.0]
    sessions = make_sessions(server, clock=lambda: time[0])
    other = statement_of(alice, server, make_sessions(server))
    refused(sessions, other, StatusCode.UNAUTHENTICATED, "did not issue that challenge")
    request = statement_of(alice, server, sessions)
    time[0] = 1031.0
    refused(sessions, request, StatusCode.UNAUTHENTICATED, "too old: ask for a new one")
    request = statement_of(alice, server, sessions)
    time[0] = 1060.0
    assert sessions.open(request).session


def test_what_the_clocks_say_does_not_matter(server: Identity, alice: Identity) -> None:
    wall = [1e9]
    sessions = make_sessions(server, now=lambda: wall[0])
    request = statement_of(alice, server, sessions)
    wall[0] -= 3600
    key = sessions.open(request).session
    wall[0] += 2 * 3600
    sessions.recheck()
    assert sessions.find(key, FORWARD).caller == alice.peer_id


def test_a_caller_has_one_session_for_each_set_of_rights(server: Identity, alice: Identity) -> None:
    sessions = make_sessions(server)
    first = sessions.open(statement_of(alice, server, sessions, rights=(FORWARD,))).session
    other = sessions.open(statement_of(alice, server, sessions, rights=(session_pb2.RIGHT_DHT,))).session
    second = sessions.open(statement_of(alice, server, sessions, rights=(FORWARD,))).session
    assert sessions.find(second, FORWARD).caller == alice.peer_id
    assert sessions.find(other, session_pb2.RIGHT_DHT).caller == alice.peer_id
    with pytest.raises(ExpertError, match="belongs to no open session"):
        sessions.find(first, FORWARD)
    assert len(sessions) == 2


def test_nobody_opens_a_session_in_anothers_name(server: Identity, alice: Identity, bob: Identity) -> None:
    sessions = make_sessions(server)
    request = statement_of(alice, server, sessions)
    stolen = session_pb2.OpenRequest(
        statement=request.statement,
        public_key=bob.public_key,
        signature=bob.sign(request.statement, SESSION_DOMAIN),
    )
    refused(sessions, stolen, StatusCode.UNAUTHENTICATED, "does not belong to the named caller")
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
    sessions = make_sessions(server)
    request = statement_of(alice, server, sessions)
    spoilt = bytearray(request.SerializeToString())
    spoilt[position % len(spoilt)] ^= change
    with contextlib.suppress(ExpertError, DecodeError):
        parsed = session_pb2.OpenRequest.FromString(bytes(spoilt))
        key = sessions.open(parsed).session
        # The change was in a part that is not checked: the same caller said the same.
        assert sessions.find(key, FORWARD).caller == alice.peer_id
        assert parsed.statement == request.statement


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"swarm_id": "banya"}, StatusCode.FAILED_PRECONDITION),
        ({"protocol_version": 99}, StatusCode.FAILED_PRECONDITION),
        ({"challenge": b"short"}, StatusCode.UNAUTHENTICATED),
        ({"challenge": b""}, StatusCode.UNAUTHENTICATED),
        ({"challenge": bytes(40)}, StatusCode.UNAUTHENTICATED),
        ({"rights": []}, StatusCode.INVALID_ARGUMENT),
        ({"rights": [FORWARD, session_pb2.RIGHT_UNSPECIFIED]}, StatusCode.INVALID_ARGUMENT),
        ({"rights": [FORWARD] * 17}, StatusCode.INVALID_ARGUMENT),
        ({"swarm_id": "a" * 5000}, StatusCode.INVALID_ARGUMENT),
    ],
)
def test_a_statement_that_is_not_right_is_refused(
    server: Identity, alice: Identity, changes: dict[str, Any], status: StatusCode
) -> None:
    sessions = make_sessions(server)
    statement = session_pb2.OpenStatement.FromString(statement_of(alice, server, sessions).statement)
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
    refused(sessions, request, status, "")


def test_a_caller_has_one_session_and_the_one_used_longest_ago_makes_room(server: Identity) -> None:
    sessions = make_sessions(server, limit=2)
    people = [new_identity() for _ in range(3)]
    first = sessions.open(statement_of(people[0], server, sessions)).session
    again = sessions.open(statement_of(people[0], server, sessions)).session
    assert len(sessions) == 1
    with pytest.raises(ExpertError):
        sessions.find(first, FORWARD)
    second = sessions.open(statement_of(people[1], server, sessions)).session
    sessions.find(again, FORWARD)
    sessions.open(statement_of(people[2], server, sessions))
    assert (len(sessions), total(sessions.events, event="evicted")) == (2, 1)
    assert sessions.find(again, FORWARD)
    with pytest.raises(ExpertError):
        sessions.find(second, FORWARD)


def test_a_session_ends_at_its_time(server: Identity, alice: Identity) -> None:
    time = [1000.0]
    sessions = make_sessions(server, lifetime_s=10.0, clock=lambda: time[0])
    reply = sessions.open(statement_of(alice, server, sessions))
    assert reply.lifetime_s == 10.0
    time[0] = 1010.0
    with pytest.raises(ExpertError) as caught:
        sessions.find(reply.session, FORWARD)
    assert caught.value.status is StatusCode.UNAUTHENTICATED
    sessions.recheck()
    assert len(sessions) == 0


class Gate:
    """An access rule that admits callers until it is shut."""

    open = True
    badge = None

    def admit(self, caller: PeerID, rights: Set[Right], badge: admission_pb2.Badge | None) -> Admitted:
        return Admitted(serial=7, expires_at=1005.0)

    def still_admits(self, caller: PeerID, serial: int) -> bool:
        assert serial == 7
        return self.open


def test_a_session_lasts_no_longer_than_its_admission(server: Identity, alice: Identity) -> None:
    gate = Gate()
    sessions = make_sessions(server, admission=gate)
    assert sessions.open(statement_of(alice, server, sessions)).lifetime_s == 5.0
    sessions.recheck()
    assert len(sessions) == 1
    gate.open = False
    sessions.recheck()
    assert len(sessions) == 0


def test_a_stranger_with_many_keys_pushes_out_its_own_sessions(server: Identity, alice: Identity) -> None:
    sessions = make_sessions(server, limit=8)
    key = sessions.open(statement_of(alice, server, sessions), near="192.0.2.1").session
    for stranger in numbered_identities(20):
        sessions.open(statement_of(stranger, server, sessions), near="198.51.100.7")
    assert len(sessions) == 8
    assert sessions.find(key, FORWARD).caller == alice.peer_id
    assert total(sessions.events, event="evicted") == 13


@given(st.lists(st.tuples(st.sampled_from(["new", "use"]), st.integers(0, 5), st.floats(0, 20))))
def test_no_challenge_is_taken_twice_and_few_are_remembered(steps: list[tuple[str, int, float]]) -> None:
    now, given, used = 0.0, dict[int, bytes](), set[bytes]()
    challenges = Challenges(30.0, clock=lambda: now)
    times: list[float] = []
    for what, number, wait_s in steps:
        now += wait_s
        if what == "new":
            given[number] = challenges.new()
        elif number in given:
            with contextlib.suppress(ExpertError):
                challenges.use(given[number])
                assert given[number] not in used
                used.add(given[number])
                times.append(now)
        assert len(set(given.values())) == len(given)
    assert len(challenges) <= sum(at >= times[-1] - 30.0 for at in times) if times else True


class CallFrom:
    """The context of a call from an address."""

    def __init__(self, address: str) -> None:
        self._address = address

    def peer(self) -> str:
        return f"ipv4:{self._address}"

    async def abort(self, status: StatusCode, said: str, metadata: Any = ()) -> None:
        raise ExpertError(status, said)


def test_a_flood_from_one_neighbourhood_costs_few_signatures_and_a_newcomer_elsewhere_one_turn(
    server: Identity, alice: Identity, bob: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = make_sessions(server)
    servicer, checked, open_ = SessionServicer(sessions), list[session_pb2.OpenRequest](), sessions.open

    def note(request: session_pb2.OpenRequest, near: str) -> Any:
        checked.append(request)
        return open_(request, near)

    monkeypatch.setattr(sessions, "open", note)

    def ask(caller: Identity, address: str, **fields: Any) -> tuple[session_pb2.OpenRequest, Any]:
        request = statement_of(caller, server, sessions)
        for name, value in fields.items():
            setattr(request, name, value)
        context: Any = CallFrom(address)
        return request, asyncio.ensure_future(servicer.Open(request, context))

    async def scenario() -> None:
        flood = [ask(alice, f"198.51.100.1:{1000 + n}", signature=bytes(64))[1] for n in range(400)]
        await asyncio.sleep(0)  # all of them ask
        before = len(checked)
        assert 0 < before < 100
        newcomer, opened = ask(bob, "203.0.113.7:1000")
        assert (await opened).session
        assert checked.index(newcomer) - before <= 2
        for each in flood:
            each.cancel()
        errors = await asyncio.gather(*flood, return_exceptions=True)
        assert sum("too many open sessions now" in str(error) for error in errors) > 50
        assert not any(isinstance(error, session_pb2.OpenReply) for error in errors)

    asyncio.run(scenario())


# Over a real socket


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
            assert total(sessions.events, event="opened") == 1
            assert own.known(server.peer_id) == first
            assert sessions.find(first[0][1], FORWARD).caller == alice.peer_id
            assert await own.metadata(server.peer_id, channel, 10.0) == first, "one session for many calls"
            own.ended(server.peer_id, first)
            second = await own.metadata(server.peer_id, channel, 10.0)
            assert second != first
            own.ended(server.peer_id, first)  # told late by another call: the new one stays
            assert own.known(server.peer_id) == second

    loop.run(scenario(), 120)


def test_a_caller_with_more_time_than_the_one_it_waits_for_opens_a_session_itself(
    loop: LoopThread, server: Identity, alice: Identity
) -> None:
    async def scenario() -> None:
        async with serving(server, Sessions(SWARM, server.peer_id)) as channel:
            own = a_caller(SWARM, alice)
            asked = [own.metadata(server.peer_id, channel, deadline_s) for deadline_s in (0.0, 100.0)]
            late, patient = await asyncio.gather(*asked, return_exceptions=True)
            assert isinstance(late, ExpertError)
            assert late.status is StatusCode.DEADLINE_EXCEEDED
            assert patient == own.known(server.peer_id)

    loop.run(scenario(), 120)


@pytest.mark.parametrize("given", ["_RANDOM_BYTES", "_SESSION_BYTES"])
def test_a_challenge_or_session_that_is_too_long_is_refused(
    loop: LoopThread, server: Identity, alice: Identity, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    """A caller remembers sessions, and signs challenges."""
    monkeypatch.setattr(f"peer.rpc.sessions.{given}", 65)

    async def scenario() -> None:
        async with serving(server, Sessions(SWARM, server.peer_id)) as channel:
            own = a_caller(SWARM, alice)
            with pytest.raises(ExpertError, match="gave no usable") as caught:
                await own.metadata(server.peer_id, channel, 10.0)
            assert caught.value.status is StatusCode.DATA_LOSS
            assert own.known(server.peer_id) is None

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


@pytest.mark.parametrize("lifetime_s", [math.inf, math.nan, -math.inf, -1.0, 0.0, 1e-300, 1e300])
def test_whatever_lifetime_a_server_names_its_session_is_used_and_renewed(
    loop: LoopThread, server: Identity, alice: Identity, monkeypatch: pytest.MonkeyPatch, lifetime_s: float
) -> None:
    async def scenario() -> None:
        sessions = Sessions(SWARM, server.peer_id)
        open_session = sessions.open

        def lying(request: session_pb2.OpenRequest, *more: Any) -> session_pb2.OpenReply:
            reply = open_session(request, *more)
            reply.lifetime_s = lifetime_s
            return reply

        monkeypatch.setattr(sessions, "open", lying)
        async with serving(server, sessions) as channel:
            own = a_caller(SWARM, alice)
            first = await own.metadata(server.peer_id, channel, 10.0)
            assert sessions.find(first[0][1], FORWARD).caller == alice.peer_id
            assert await own.metadata(server.peer_id, channel, 10.0) == first, "one session for many calls"
            own.ended(server.peer_id, first)
            second = await own.metadata(server.peer_id, channel, 10.0)
            assert sessions.find(second[0][1], FORWARD).caller == alice.peer_id
            assert second != first

    loop.run(scenario(), 120)
