"""Probes and dial-backs over real sockets, from good callers and bad ones."""

import asyncio
import contextlib
import itertools
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from real_swarm import eventually

from expert_server import probe
from expert_server.probe import (
    MAX_PROBE_BYTES,
    MAX_PROBE_REQUESTS,
    CallLimiter,
    ProbeLimits,
    ProbeServicer,
    call_dial_back,
    call_probe,
)
from peer import PROTOCOL_VERSION
from peer.codec import MAX_CHUNK_BYTES
from peer.errors import ExpertError, UnreachableError
from peer.identity import Identity, certificate_pem
from peer.loop import LoopThread
from peer.rates import Bandwidth, download_limit, upload_limit
from peer.rpc.channels import SERVER_OPTIONS, ChannelPool
from peer.rpc.server import server_credentials
from peer.transport.dialling import Dialling
from peer.transport.endpoints import AddressScope, address_of
from peer.wire import probe_pb2, probe_pb2_grpc

LOCAL = "127.0.0.1"
SWARM = "sauna-1"
FREE = ProbeLimits(burst=1000, all_burst=1000)
Request = probe_pb2.ProbeRequest


class Peers:
    """A node that answers probes over TLS, and a channel to it."""

    def __init__(self, servicer: ProbeServicer, port: int, channel: grpc.aio.Channel) -> None:
        self.servicer, self.port, self.channel = servicer, port, channel
        self.stub: Any = probe_pb2_grpc.ProbeServiceStub(channel)

    async def status(self, *requests: Request) -> grpc.StatusCode:
        """How a probe with these requests ends."""
        call = self.stub.Probe(iter(requests), timeout=60)
        return await ended(call)

    async def dial_status(self, port: int, swarm_id: str = SWARM) -> grpc.StatusCode:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.stub.DialBack(dial(port, swarm_id), timeout=60)
        return caught.value.code()


async def ended(call: Any) -> grpc.StatusCode:
    with contextlib.suppress(grpc.aio.AioRpcError):
        async for _ in call:
            pass
    code: grpc.StatusCode = await call.code()
    return code


def dial(port: int, swarm_id: str = SWARM) -> probe_pb2.DialBackRequest:
    return probe_pb2.DialBackRequest(protocol_version=PROTOCOL_VERSION, swarm_id=swarm_id, port=port)


def request(sent: int = 0, wanted: int = 0, swarm_id: str = SWARM) -> Request:
    return Request(
        protocol_version=PROTOCOL_VERSION, swarm_id=swarm_id, payload=bytes(sent), reply_bytes=wanted
    )


Play = Callable[[Callable[[Peers], Coroutine[Any, Any, None]], ProbeLimits], None]


@pytest.fixture
def play(loop: LoopThread, identity: Identity, tmp_path: Path) -> Play:
    @asynccontextmanager
    async def serving(limits: ProbeLimits) -> AsyncIterator[Peers]:
        servicer = ProbeServicer(SWARM, Bandwidth(), limits)
        server = grpc.aio.server(options=SERVER_OPTIONS)
        probe_pb2_grpc.add_ProbeServiceServicer_to_server(servicer, server)
        certificate = identity.make_certificate()
        port = server.add_secure_port(f"{LOCAL}:0", server_credentials(identity, certificate))
        await server.start()
        pool = ChannelPool()
        pem = certificate_pem(certificate, identity.peer_id)
        try:
            yield Peers(servicer, port, await pool.get(f"{LOCAL}:{port}", pem))
        finally:
            await pool.close()
            await server.stop(0)

    def run(scenario: Callable[[Peers], Coroutine[Any, Any, None]], limits: ProbeLimits = FREE) -> None:
        async def do() -> None:
            async with serving(limits) as peers:
                await scenario(peers)

        loop.run(do(), 120)

    return run


# What a good caller is told


def test_probe_measures_clock_and_bandwidth(play: Play) -> None:
    async def scenario(peers: Peers) -> None:
        link = await call_probe(peers.channel, SWARM, now=lambda: time.time() - 60.0)
        assert link.round_trip_s > 0
        assert abs(link.clock_offset_s - 60.0) <= link.round_trip_s / 2 + 0.05
        assert link.upload_mbit > 1
        assert link.download_mbit > 1

    play(scenario, FREE)


def test_probe_respects_the_limits_of_bandwidth(play: Play) -> None:
    async def scenario(peers: Peers) -> None:
        peers.servicer._traffic = Bandwidth(upload_limit(20.0), download_limit(40.0))
        link = await call_probe(peers.channel, SWARM)
        assert link.download_mbit < 2 * 20
        assert link.upload_mbit < 2 * 40

    play(scenario, FREE)


def test_dial_back_says_whether_somebody_listens(play: Play) -> None:
    async def scenario(peers: Peers) -> None:
        with socket.create_server((LOCAL, 0)) as listener:
            listener.setblocking(False)
            port = listener.getsockname()[1]
            found = await call_dial_back(peers.channel, SWARM, port)
            assert (found.connected, found.address, found.message) == (True, LOCAL, "")
            accepted, _ = listener.accept()
            with accepted:
                accepted.settimeout(60)
                assert await asyncio.to_thread(accepted.recv, 10) == b""  # nothing was sent
        found = await call_dial_back(peers.channel, SWARM, port)
        assert not found.connected
        assert found.message

    play(scenario, FREE)


def test_no_machine_is_dialled_that_is_nearer_than_the_swarm(play: Play) -> None:
    """Behind a container's proxy, all callers seem to be on the node's own machine."""

    async def scenario(peers: Peers) -> None:
        peers.servicer._dialling = Dialling(AddressScope.PRIVATE)
        with socket.create_server((LOCAL, 0)) as listener:
            listener.setblocking(False)
            with pytest.raises(UnreachableError, match="nearer network than this swarm"):
                await call_dial_back(peers.channel, SWARM, listener.getsockname()[1])
            with pytest.raises(BlockingIOError):
                listener.accept()

    play(scenario, FREE)


def test_dial_back_does_not_wait_for_ever(play: Play) -> None:
    async def scenario(peers: Peers) -> None:
        with socket.socket() as deaf:
            deaf.bind((LOCAL, 0))
            deaf.listen(0)
            with socket.create_connection(deaf.getsockname()):  # fills the queue of those who wait
                found = await call_dial_back(peers.channel, SWARM, deaf.getsockname()[1])
                assert (found.connected, found.message) == (False, "no answer within 0 s")

    play(scenario, ProbeLimits(dial_s=0.2))


def test_node_that_is_gone_or_too_old_is_told(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(peers: Peers) -> None:
        async with grpc.aio.insecure_channel(f"{LOCAL}:1") as nobody:
            with pytest.raises(UnreachableError, match="UNAVAILABLE"):
                await call_probe(nobody, SWARM)
            with pytest.raises(UnreachableError, match="UNAVAILABLE"):
                await call_dial_back(nobody, SWARM, 2000)
        with pytest.raises(UnreachableError, match=r"FAILED_PRECONDITION: .*belongs to swarm sauna-1"):
            await call_probe(peers.channel, "another")

    monkeypatch.setattr(probe, "_PROBE_DEADLINE_S", 5.0)
    play(scenario, FREE)


def test_node_that_answers_nonsense_is_not_believed(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def nonsense(self: ProbeServicer, requests: Any, context: Any) -> None:
        async for _ in requests:
            await context.write(probe_pb2.ProbeReply(time=float("nan"), payload=b"x"))

    async def dialled(self: ProbeServicer, request: Any, context: Any) -> probe_pb2.DialBackReply:
        return probe_pb2.DialBackReply(connected=True, address="\x1b[31mhere")

    async def scenario(peers: Peers) -> None:
        with pytest.raises(UnreachableError, match="as it should"):
            await call_probe(peers.channel, SWARM)
        with pytest.raises(UnreachableError, match="no IP address"):
            await call_dial_back(peers.channel, SWARM, 2000)

    monkeypatch.setattr(ProbeServicer, "Probe", nonsense)
    monkeypatch.setattr(ProbeServicer, "DialBack", dialled)
    play(scenario, FREE)


# What a bad caller is told


def test_probe_of_another_swarm_is_refused(play: Play) -> None:
    async def scenario(peers: Peers) -> None:
        assert await peers.status(request(swarm_id="another")) is grpc.StatusCode.FAILED_PRECONDITION
        assert await peers.status(Request(protocol_version=99)) is grpc.StatusCode.FAILED_PRECONDITION
        assert await peers.dial_status(2000, "another") is grpc.StatusCode.FAILED_PRECONDITION

    play(scenario, FREE)


def test_probe_of_too_many_bytes_is_refused(play: Play) -> None:
    async def scenario(peers: Peers) -> None:
        fits = [request(MAX_CHUNK_BYTES // 2, MAX_CHUNK_BYTES // 2)] * 8
        assert await peers.status(*fits) is grpc.StatusCode.OK
        assert await peers.status(*fits, request(1)) is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await peers.status(*fits, request(0, 1)) is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await peers.status(request(MAX_CHUNK_BYTES + 1)) is grpc.StatusCode.INVALID_ARGUMENT
        assert await peers.status(request(0, 2**32 - 1)) is grpc.StatusCode.INVALID_ARGUMENT

    assert MAX_PROBE_BYTES == 8 * MAX_CHUNK_BYTES
    play(scenario, FREE)


def test_probe_of_too_many_requests_is_refused(play: Play) -> None:
    async def scenario(peers: Peers) -> None:
        assert await peers.status(*[request()] * MAX_PROBE_REQUESTS) is grpc.StatusCode.OK
        more = await peers.status(*[request()] * (MAX_PROBE_REQUESTS + 1))
        assert more is grpc.StatusCode.RESOURCE_EXHAUSTED

    play(scenario, FREE)


@pytest.mark.parametrize("method", ["Probe", "DialBack"])
def test_garbage_is_refused(play: Play, method: str) -> None:
    async def scenario(peers: Peers) -> None:
        path = f"/talkoot.v1.ProbeService/{method}"
        garbage = b"\xff\xff\xff\xff not protobuf"
        channel: Any = peers.channel
        if method == "Probe":
            call = channel.stream_stream(path)(iter([garbage]), timeout=60)
        else:
            call = channel.unary_stream(path)(garbage, timeout=60)
        assert await ended(call) is not grpc.StatusCode.OK
        assert (await call_probe(peers.channel, SWARM)).upload_mbit > 0

    play(scenario, FREE)


def test_caller_that_says_nothing_is_sent_away(play: Play) -> None:
    async def scenario(peers: Peers) -> None:
        idle = peers.stub.Probe()
        slow = peers.stub.Probe()
        await slow.write(request())
        for call in (idle, slow):
            assert await ended(call) is grpc.StatusCode.DEADLINE_EXCEEDED
        assert await peers.status(request()) is grpc.StatusCode.OK

    play(scenario, ProbeLimits(probe_s=0.3))


def test_caller_that_does_not_read_is_sent_away(play: Play, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(peers: Peers) -> None:
        deaf = [peers.stub.Probe(timeout=60) for _ in range(2)]
        for call in deaf:
            for _ in range(7):
                await call.write(request(0, MAX_CHUNK_BYTES))

        async def served() -> bool:
            return await peers.status(request()) is grpc.StatusCode.OK

        await eventually(served)
        for call in deaf:
            call.cancel()

    play(scenario, ProbeLimits(probe_s=0.5, burst=1000, all_burst=1000))
    assert not caplog.records


def test_few_probes_are_served_at_once(play: Play) -> None:
    async def scenario(peers: Peers) -> None:
        running = [peers.stub.Probe(timeout=60) for _ in range(2)]
        for call in running:
            await call.write(request())
            await call.read()
        assert await peers.status(request()) is grpc.StatusCode.RESOURCE_EXHAUSTED
        with pytest.raises(UnreachableError, match="RESOURCE_EXHAUSTED: other callers are being served"):
            await call_probe(peers.channel, SWARM)
        for call in running:
            await call.done_writing()
            assert await call.read() is grpc.aio.EOF
            assert await call.code() is grpc.StatusCode.OK
        assert await peers.status(request()) is grpc.StatusCode.OK

    play(scenario, FREE)


def test_callers_that_come_too_often_are_refused(play: Play) -> None:
    async def scenario(peers: Peers) -> None:
        found = [await peers.status(request()) for _ in range(4)]
        assert found == [*[grpc.StatusCode.OK] * 3, grpc.StatusCode.RESOURCE_EXHAUSTED]
        for _ in range(3):  # dials are counted apart from probes
            assert (await peers.stub.DialBack(dial(peers.port), timeout=60)).connected
        assert await peers.dial_status(peers.port) is grpc.StatusCode.RESOURCE_EXHAUSTED

    play(scenario, ProbeLimits(burst=3, every_s=60))


@pytest.mark.parametrize("port", [0, 22, 1023, 65536, 2**32 - 1])
def test_ports_of_the_system_are_not_dialled(play: Play, port: int) -> None:
    async def scenario(peers: Peers) -> None:
        assert await peers.dial_status(port) is grpc.StatusCode.INVALID_ARGUMENT

    play(scenario, FREE)


# The pure functions


def must_wait(turns: CallLimiter, caller: int) -> float:
    """How many seconds a caller is told to wait; 0 if it gets a turn."""
    try:
        with turns.turn(f"ipv4:192.{caller // 256}.{caller % 256}.7:4711"):
            return 0.0
    except ExpertError as error:
        return error.retry_after_s


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(0, 3)), max_size=80))
def test_nobody_gets_more_than_the_limits_say(steps: list[tuple[float, int]]) -> None:
    limits = ProbeLimits(burst=3, every_s=10, all_burst=5, all_every_s=4)
    now, taken = 0.0, []
    turns = CallLimiter(limits, lambda: now)
    for wait_s, caller in steps:
        now += wait_s
        if not (must_wait_s := must_wait(turns, caller)):
            taken.append((now, caller))
        else:  # what it says is true
            now, asked_at = now + must_wait_s - 1e-3, now
            assert must_wait(turns, caller) > 0
            now = asked_at
    for (first, i), (last, j) in itertools.combinations(
        list(zip([t for t, _ in taken], itertools.count())), 2
    ):
        span = last - first
        assert j - i + 1 <= limits.all_burst + span / limits.all_every_s + 1e-6
    for each in range(4):
        own = [t for t, caller in taken if caller == each]
        for i, j in itertools.combinations(range(len(own)), 2):
            assert j - i + 1 <= limits.burst + (own[j] - own[i]) / limits.every_s + 1e-6


def test_memory_of_callers_is_bounded() -> None:
    turns = CallLimiter(ProbeLimits(all_burst=10**6))
    for caller in range(3000):
        assert not must_wait(turns, caller)
    assert len(turns._each) == 1024


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:192.0.2.7:4711", "192.0.2.7"),
        ("ipv6:%5B2001:db8::1%5D:4711", "2001:db8::1"),
        ("ipv6:[2001:db8::1]:4711", "2001:db8::1"),
        ("ipv6:%5B::ffff:192.0.2.7%5D:4711", "192.0.2.7"),
        ("unix:/tmp/socket", None),
        ("ipv4:example.org:80", None),
        ("", None),
    ],
)
def test_address_of_a_caller_is_read(peer: str, address: str | None) -> None:
    found = address_of(peer)
    assert (found and str(found)) == address
