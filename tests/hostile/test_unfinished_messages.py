"""Calls whose messages never end. gRPC holds what has arrived of each, up to a MiB."""

import asyncio
import base64
import struct
from contextlib import closing as closing_it
from typing import Any

import http2_attacks
import pytest
from callers import numbered_identities, opened
from http2_attacks import frame, grpc_message, header_block
from relayed import CALLER, FAST_MBIT, HIDDEN, RELAY, SWARM, Served, closing, hide, serve, until

from peer.identity import Identity
from peer.loop import LoopThread
from peer.metrics import total
from peer.rpc.channels import ChannelPool
from peer.rpc.sessions import Metadata
from peer.wire import relay_pb2, session_pb2

SERVICE = "talkoot.v1.RelayService"
BEGUN = struct.pack("!BI", 0, 2_000_000) + bytes(1000)
"""The beginning of a message of 2 MB."""


@pytest.fixture(scope="module")
def keys() -> list[Identity]:
    return numbered_identities(3)


def in_session(served: Served, identity: Identity) -> Metadata:
    return opened(served.sessions, served.identity, SWARM, identity, rights=(session_pb2.RIGHT_RELAY,))


def send(address: str, metadata: Metadata, calls: int, data: bytes) -> http2_attacks.Connection:
    """Begins calls of `Dial` on one connection, and sends this of each."""
    connection = http2_attacks.Connection(address)
    headers = {key: base64.b64encode(bytes(value)).decode().rstrip("=") for key, value in metadata}
    block = header_block(f"/{SERVICE}/Dial", **headers)
    for _ in range(calls):
        stream = connection.next_stream()
        head = frame(http2_attacks._HEADERS, http2_attacks._END_HEADERS, stream, block)
        connection.send(head + frame(http2_attacks._DATA, 0, stream, data))
    return connection


def test_few_calls_wait_for_their_first_message_and_make_room_for_others(
    loop: LoopThread, keys: list[Identity], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peer.rpc.gate._CALLS_WITHOUT_MESSAGE", 8)

    async def scenario() -> None:
        served, pool = await serve(keys[RELAY], FAST_MBIT), ChannelPool()
        async with closing(served, pool):
            gate, metadata = served.server.gate, in_session(served, keys[CALLER])
            with closing_it(await asyncio.to_thread(send, served.endpoint, metadata, 40, BEGUN)):
                await until(lambda: total(gate.refused, reason="crowded") == 32)
                assert len(gate._own_slots[SERVICE]) == 8
                echo: Any = (await pool.reach(served.as_relay)).unary_unary("/test/Echo")
                assert await echo(b"ping", timeout=30.0) == b"ping"
                assert total(gate.refused, reason="displaced") == 1

    loop.run(scenario(), 60)


def test_a_call_with_one_message_does_not_begin_while_more_comes(
    loop: LoopThread, keys: list[Identity], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peer.rpc.gate._NEXT_MESSAGE_S", 1.0)
    monkeypatch.setattr("peer.relays.circuits.BEAT_S", 0.2)
    monkeypatch.setattr("peer.relays.reservations.BEAT_S", 0.2)

    async def scenario() -> None:
        relay = await serve(keys[RELAY], FAST_MBIT)
        hidden = await hide(keys[HIDDEN], [relay])
        async with closing(relay, hidden):
            dial = relay_pb2.DialRequest(peer_id=keys[HIDDEN].peer_id.to_bytes()).SerializeToString()
            more = grpc_message(dial) + BEGUN
            with closing_it(
                await asyncio.to_thread(send, relay.endpoint, in_session(relay, keys[CALLER]), 1, more)
            ):
                await until(lambda: total(relay.server.gate.refused, reason="slow") == 1)
            assert not total(hidden.reservations.offers)

    loop.run(scenario(), 60)
