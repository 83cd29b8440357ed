"""Which connections a server keeps when there are too many, and how long one may remain unproven."""

import asyncio
import socket
import time
from dataclasses import replace
from functools import partial

import pytest
from callers import numbered_identities
from relayed import LOCAL, closing, serve, until

from peer.loop import LoopThread
from peer.metrics import total
from peer.rpc import connections
from peer.rpc.connections import Connection, ConnectionTable, _listening_socket


def connection(origin: str, began_at: float = 0.0, spoken: bool = False) -> Connection:
    return Connection("unix:", origin, lambda: None, began_at, spoken)


def test_silent_connections_make_room_for_others_and_proven_ones_stay() -> None:
    table = ConnectionTable(16)  # four of them unproven
    (trainer,) = numbered_identities(1)
    proven = connection("home")
    table.add(proven)
    table.prove(proven, trainer.peer_id)
    silent = [connection("here") for _ in range(4)]
    assert [table.add(one) for one in silent] == [None] * 4
    speaks = connection("here", spoken=True)
    assert table.add(speaks) is silent[0]
    assert table.add(connection("there")) is silent[1]
    assert proven in table
    assert speaks in table
    assert len(table) == 5


def test_one_caller_has_a_bounded_number_and_the_idle_one_goes() -> None:
    table = ConnectionTable(4096)
    (stranger,) = numbered_identities(1)
    many = [connection("here") for _ in range(104)]
    many[0].calls = 1
    closed = []
    for one in many:
        table.add(one)
        closed.append(table.prove(one, stranger.peer_id))
    assert [one for one in closed if one is not None] == many[1:9]
    assert len(table) == 96


def test_a_connection_must_say_something_soon_and_prove_itself_later() -> None:
    table = ConnectionTable(16)
    silent, speaks, calls = connection("here"), connection("here", spoken=True), connection("here")
    calls.calls = 1
    for one in (silent, speaks, calls):
        table.add(one)
    assert table.overdue(4.0) == []
    assert table.overdue(6.0) == [silent]
    assert table.overdue(21.0) == [silent, speaks]
    table.remove(silent)
    table.remove(silent)
    assert table.overdue(21.0) == [speaks]


def test_the_neighbourhood_that_reads_least_makes_room() -> None:
    table = ConnectionTable(64)
    deaf = [replace(connection("here"), unsent=partial(int, size)) for size in (2, 9, 5)]
    slow = replace(connection("there"), unsent=partial(int, 7))
    idle = connection("here")
    for one in (*deaf, slow, idle):
        table.add(one)
    assert table.unread(23) == []
    assert table.unread(22) == [deaf[1]]
    assert table.unread(13) == [deaf[1], deaf[2]]
    assert set(table.unread(0)) == {*deaf, slow}, "but not the one for which nothing waits"


def test_connections_that_were_closed_leave_the_line_for_handshakes(
    loop: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peer.rpc.connections._STARTS_PER_S", 1.0)
    monkeypatch.setattr("peer.rpc.connections._STARTS_AT_ONCE", 1.0)

    async def scenario() -> None:
        served = await serve(numbered_identities(1)[0])
        connections = served.server.connections
        connections._table = ConnectionTable(32)  # eight of them unproven
        held = []
        async with closing(served):
            for number in range(100):
                source = (f"127.66.0.{number + 1}", 0)
                _, writer = await asyncio.open_connection(LOCAL, served.endpoint.port, local_addr=source)
                writer.write(b"\x16")
                held.append(writer)
                await until(lambda: all(each.has_spoken for each in connections._table.all()))
            await until(lambda: len(connections._starts._line) <= 8, 20.0)
            assert total(connections.closed, reason="crowded") > 80
            for writer in held:
                writer.close()

    loop.run(scenario(), 60)


def test_new_connections_of_one_neighbourhood_wait_for_each_other_but_others_do_not(
    loop: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peer.rpc.connections._NEAR_STARTS_AT_ONCE", 4.0)
    monkeypatch.setattr("peer.rpc.connections._NEAR_STARTS_PER_S", 2.0)

    async def scenario() -> None:
        served = await serve(numbered_identities(1)[0])
        connections, held = served.server.connections, []

        async def begin(source: str) -> None:
            _, writer = await asyncio.open_connection(LOCAL, served.endpoint.port, local_addr=(source, 0))
            writer.write(b"\x16")
            held.append(writer)

        def begun(source: str) -> int:
            return sum(each.origin == source for each in connections._by_name.values())

        async with closing(served):
            began = time.monotonic()
            for _ in range(8):
                await begin("127.66.0.1")
            await until(lambda: begun("127.66.0.1") >= 4)
            await begin("127.66.0.2")
            await until(lambda: begun("127.66.0.2") == 1)
            assert begun("127.66.0.1") <= 5 + 2 * (time.monotonic() - began)
            await until(lambda: begun("127.66.0.1") == 8)
            assert time.monotonic() - began > 1.0, "the last ones waited"
            for writer in held:
                writer.close()

    loop.run(scenario(), 60)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_small_answers_do_not_wait_until_the_caller_has_acknowledged_others(host: str) -> None:
    with _listening_socket(host, 0) as listening:
        port = listening.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)), listening.accept()[0] as accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_after_a_flood_has_left_a_newcomer_makes_room_for_nobody(
    loop: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A moment ago too few descriptors were left. Then the connections of the flood closed."""
    monkeypatch.setattr(connections, "_most_descriptors", lambda: 3000)
    used = 200
    monkeypatch.setattr(connections, "open_descriptors", lambda: used)
    closed: list[str] = []

    async def scenario() -> None:
        nonlocal used
        server = connections.Connections()
        used = 3010
        flood = [replace(connection("flood"), close=partial(closed.append, "flood")) for _ in range(9)]
        for number, each in enumerate(flood):
            server.add(each, descriptor=2995 + number)
        assert "flood" in closed
        for each in flood:
            server.forget(each)
        used = 200
        server.add(replace(connection("home"), close=partial(closed.append, "home")), descriptor=200)
        assert closed.count("home") == 0
        await server.close()

    loop.run(scenario(), 10)
