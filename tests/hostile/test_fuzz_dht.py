"""Thousands of malformed messages to a peer's DHT and relay, over real sockets: no fault, no growth, and others
are served."""

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import mutations
import pytest
from callers import a_caller
from dht_peers import SWARM, DHTPeer, dht_peers
from grpc import StatusCode
from memory_in_use import memory_in_use
from relayed import Caller as RelayedCaller
from relayed import Served, hide, serve
from stranger import new_identities

from peer.identity import Identity, PeerID, certificate_pem
from peer.kademlia.routing import id_bytes, key_id_of
from peer.kademlia.validation import MAX_FIND_KEYS, EntryChecker, pack
from peer.loop import LoopThread
from peer.metrics import totals
from peer.rpc.channels import CLIENT_OPTIONS
from peer.rpc.sessions import Metadata
from peer.transport.contacts import OwnContact
from peer.transport.endpoints import Endpoint
from peer.wire import contact_pb2, dht_pb2, relay_pb2, session_pb2

COUNTS = [500, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(600)])]
GROWTH_BYTES = 32 * 2**20
"""The most that the process may grow, which holds callers and servers."""
CALLERS = 4
AT_ONCE = 8
"""Calls of each caller at a time."""
_CALL_S = 20.0
WRONG = {StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED, StatusCode.INTERNAL, StatusCode.UNKNOWN}
"""Statuses that mean that a peer crashed, hung or failed."""


class Fuzzer:
    """A caller in a session that sends corrupted messages."""

    def __init__(self, endpoint: Endpoint, pem: bytes, identity: Identity, seed: int) -> None:
        self.identity = identity
        self.rng = random.Random(seed)
        self.seen = Counter[StatusCode]()
        self.channel = grpc.aio.secure_channel(
            endpoint, grpc.ssl_channel_credentials(root_certificates=pem), CLIENT_OPTIONS
        )
        self._metadata: Metadata = ()

    async def begin(self, server: PeerID, swarm: str, right: "session_pb2.Right") -> None:
        client = a_caller(swarm, self.identity, (right,))
        self._metadata = await client.metadata(server, self.channel, _CALL_S)

    async def ask(self, method: str, request: bytes) -> None:
        call: Any = self.channel.unary_unary(f"/talkoot.v1.DhtService/{method}")
        status = StatusCode.OK
        try:
            await call(request, timeout=_CALL_S, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            status = error.code()
        self.seen[status] += 1

    async def stream(self, method: str, pieces: list[bytes]) -> None:
        """Sends the pieces, and cancels the call if it has not ended then."""
        make: Any = self.channel.stream_stream(f"/talkoot.v1.RelayService/{method}")
        call = make(timeout=_CALL_S, metadata=self._metadata)
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            for piece in pieces:
                await call.write(piece)
            await call.done_writing()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.2):
                    while await call.read() is not grpc.aio.EOF:
                        pass
        call.cancel()
        self.seen[await call.code()] += 1


@contextlib.asynccontextmanager
async def fuzzers(
    server: PeerID, endpoint: Endpoint, pem: bytes, swarm: str, right: "session_pb2.Right"
) -> AsyncIterator[list[Fuzzer]]:
    callers = [Fuzzer(endpoint, pem, each, n) for n, each in enumerate(new_identities(CALLERS))]
    for caller in callers:
        await caller.begin(server, swarm, right)
    try:
        yield callers
    finally:
        for caller in callers:
            await caller.channel.close()


async def in_turns(callers: list[Fuzzer], count: int, send: Callable[[Fuzzer], Awaitable[None]]) -> None:
    async def go_on(caller: Fuzzer) -> None:
        for _ in range(count // (CALLERS * AT_ONCE)):
            await send(caller)

    await asyncio.gather(*(go_on(caller) for caller in callers for _ in range(AT_ONCE)))


def contact_of(identity: Identity, addresses: list[str]) -> contact_pb2.Contact:
    own = OwnContact(identity, identity.make_certificate())
    own.set(addresses=map(Endpoint, addresses))
    contact = own.message()
    assert contact is not None
    return contact


def questions(caller: Identity, other: contact_pb2.Contact) -> list[tuple[str, bytes]]:
    """Valid requests, apart from others' contacts and addresses where nobody is."""
    addresses = [f"127.0.{n}.1:{n + 1}" for n in range(8)]
    own = dht_pb2.NodeInfo(node_id=bytes(20), contact=contact_of(caller, addresses))
    another = dht_pb2.NodeInfo(node_id=bytes(20), contact=other)
    until = time.time() + 60
    keys = [id_bytes(key_id_of(f"key {n}")) for n in range(MAX_FIND_KEYS)]
    rows = dht_pb2.StoreRequest(
        keys=keys[:3],
        subkeys=[pack(n) for n in range(3)],
        values=[pack("value")] * 3,
        expiration_time=[until] * 3,
        in_cache=[False] * 3,
        peer=own,
    )
    known = [n * 2**55 for n in range(256)]
    return [
        (method, message.SerializeToString())
        for method, message in [
            ("Ping", dht_pb2.PingRequest(peer=own)),
            ("Ping", dht_pb2.PingRequest(peer=another, validate=True)),
            ("Store", rows),
            ("Find", dht_pb2.FindRequest(keys=keys, peer=own, known=known)),
            ("Find", dht_pb2.FindRequest(keys=keys[:1], peer=another)),
        ]
    ]


@pytest.mark.parametrize("count", COUNTS)
def test_no_messages_stop_a_dht_node_make_it_grow_or_fill_its_table(loop: LoopThread, count: int) -> None:
    async def scenario() -> None:
        async with dht_peers(2) as (victim, honest):
            pem = certificate_pem(victim.identity.make_certificate(), victim.peer_id)
            contact = honest.own.message()
            assert contact is not None
            async with fuzzers(victim.peer_id, victim.endpoint, pem, SWARM, session_pb2.RIGHT_DHT) as callers:
                right = {caller: questions(caller.identity, contact) for caller in callers}

                async def send(caller: Fuzzer) -> None:
                    method, request = caller.rng.choice(right[caller])
                    for _ in range(caller.rng.randint(1, 3)):
                        request = mutations.protobuf(request, caller.rng)
                    if caller.rng.random() < 0.1:
                        request += request  # each field twice
                    await caller.ask(method, request)

                await in_turns(callers, 200, send)
                before = memory_in_use()
                await asyncio.gather(in_turns(callers, count, send), asks(honest, victim, 20))
                seen = sum((caller.seen for caller in callers), Counter[StatusCode]())
                assert not WRONG & seen.keys(), seen
                assert seen[StatusCode.OK] > count / 2
            assert not sum(totals(victim.handlers.guard.failures, "message").values())
            assert memory_in_use() - before < GROWTH_BYTES
            assert {peer_id for _, peer_id in victim.node.table} == {honest.peer_id}
            assert len(victim.book) <= 1 + CALLERS
            await until(lambda: not victim.handlers._under_way and not victim.node._called_back)
            await asks(honest, victim, 1)

    loop.run(asyncio.wait_for(scenario(), 500), 510)


async def asks(honest: DHTPeer, victim: DHTPeer, times: int) -> None:
    for _ in range(times):
        assert await honest.node.find(victim.peer_id, [1], EntryChecker()) is not None
        await asyncio.sleep(0.01)


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not is_so():  # noqa: ASYNC110  # what others do
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("count", COUNTS)
def test_no_messages_stop_a_relay_make_it_grow_or_keep_others_out(loop: LoopThread, count: int) -> None:
    async def scenario() -> None:
        keys = new_identities(3)
        relay: Served = await serve(keys[0], 1000.0)
        hidden = await hide(keys[1], [relay])
        caller = RelayedCaller(keys[2])
        messages = [relay_pb2.DialRequest(peer_id=keys[1].peer_id.to_bytes()), relay_pb2.ReserveRequest()]
        right = [message.SerializeToString() for message in messages]

        async def send(stranger: Fuzzer) -> None:
            rng = stranger.rng
            method = rng.choice(("Reserve", "Dial"))
            spoilt = [mutations.protobuf(rng.choice(right), rng) for _ in range(rng.randint(1, 3))]
            await stranger.stream(method, spoilt)

        try:
            async with fuzzers(
                relay.peer_id, relay.endpoint, relay.pem, "sauna", session_pb2.RIGHT_RELAY
            ) as strangers:
                await in_turns(strangers, 100, send)
                before = memory_in_use()
                await in_turns(strangers, count, send)
                seen = sum((stranger.seen for stranger in strangers), Counter[StatusCode]())
                assert not (WRONG - {StatusCode.UNAVAILABLE}) & seen.keys(), seen
            assert await caller.ask(hidden.contact) == b"ping"
            await caller.close()
            await until(lambda: not relay.relaying._circuits.used)
            await until(lambda: relay.relaying._reservations.keys() == {keys[1].peer_id})
            assert memory_in_use() - before < GROWTH_BYTES
        finally:
            await hidden.close()
            await relay.stop()

    loop.run(asyncio.wait_for(scenario(), 500), 510)
