"""The emulated link: its numbers without a network, and its proxy on loopback."""

import asyncio
import random
import socket
import time
from collections.abc import Coroutine
from dataclasses import astuple
from typing import Any

import pytest
from echo import LOCAL, echo_behind
from hypothesis import given
from hypothesis import strategies as st

from peer.errors import SettingsError
from talkoot.demo.links import Direction, Link, Proxy, Wire


def run(scenario: Coroutine[Any, Any, None], limit_s: float = 60.0) -> None:
    asyncio.run(asyncio.wait_for(scenario, limit_s))


# The text form of a link


@pytest.mark.parametrize(
    ("text", "link"),
    [
        ("100mbit,80ms", Link(100.0, 0.08)),
        ("1.5gbit", Link(1500.0)),
        ("1s", Link(None, 1.0)),
        ("512kbit, 80ms, 5ms, 0.1%", Link(0.512, 0.08, 0.005, 0.001)),
    ],
)
def test_a_link_is_read_as_people_write_it(text: str, link: Link) -> None:
    read = Link.parse(text)
    assert astuple(read) == pytest.approx(astuple(link))


@pytest.mark.parametrize(
    "text", ["", "fast", "100", "100mbit,", "-1mbit", "0mbit", "1mbit,2mbit", "1s,1s,1s", "100%", "1%,1%"]
)
def test_what_is_no_link_is_refused_with_an_example_or_its_bounds(text: str) -> None:
    with pytest.raises(
        SettingsError, match=r"not part of a link: write for example 100mbit,80ms|is not a link"
    ):
        Link.parse(text)


# The numbers of a link


sizes = st.lists(st.tuples(st.integers(1, 16384), st.floats(0, 0.1)), min_size=1, max_size=30)


@given(sizes, st.floats(0.01, 1000), st.floats(0, 2))
def test_bytes_take_their_turn_at_the_rate_and_then_half_a_round_trip(
    sizes: list[tuple[int, float]], rate_mbit: float, delay_s: float
) -> None:
    direction, now, free_at = Direction(Link(rate_mbit, delay_s)), 0.0, 0.0
    for size, pause_s in sizes:
        now += pause_s
        free_at = max(now, free_at) + 8 * size / (rate_mbit * 1e6)
        assert direction.carry(size, now, random.Random(0)) == pytest.approx(free_at + delay_s / 2)
        assert direction.backlog_s(now) == pytest.approx(free_at - now)
    assert direction.bytes_carried == sum(size for size, _ in sizes)


def test_jitter_adds_to_a_way_and_never_more_than_it_says() -> None:
    direction, rng = Direction(Link(None, 0.1, 0.02)), random.Random(0)
    ways = [direction.carry(1, 0.0, rng) for _ in range(1000)]
    assert 0.05 <= min(ways) < 0.051
    assert 0.069 < max(ways) <= 0.07


@pytest.mark.parametrize(("size", "share"), [(1448, 0.01), (10 * 1448, 1 - 0.99**10)])
def test_packets_are_lost_as_often_as_it_says_and_come_a_round_trip_later(size: int, share: float) -> None:
    direction, rng = Direction(Link(None, 0.5, loss=0.01)), random.Random(0)
    late = [direction.carry(size, 0.0, rng) for _ in range(20_000)]
    assert set(late) == {0.25, 0.75}
    assert late.count(0.75) / len(late) == pytest.approx(share, rel=0.15)


def test_chance_follows_from_the_seed_and_the_connections_number_alone() -> None:
    async def scenario() -> None:
        def numbers(seed: int) -> list[float]:
            wire = Wire(Link(), seed)
            return [rng.random() for _ in range(3) for rng in wire.next_chances()]

        assert numbers(1) == numbers(1)
        assert len(set(numbers(1) + numbers(2))) == 12

    run(scenario())


# The proxy of a link


def test_all_bytes_arrive_in_order_through_jitter_and_loss() -> None:
    sent = random.Random(0).randbytes(300_000)

    async def scenario() -> None:
        async with (
            echo_behind(Link(50.0, 0.01, 0.02, 0.002), seed=3) as echo,
            echo.connection() as (read, write),
        ):
            write.write(sent)
            write.write_eof()
            assert await read.read(-1) == sent
            assert echo.wire.there.bytes_carried == echo.wire.back.bytes_carried == len(sent)

    run(scenario())


def test_a_full_link_carries_its_rate_both_ways() -> None:
    size = 2_500_000

    async def scenario() -> None:
        async with echo_behind(Link(100.0, 0.02)) as echo, echo.connection() as (read, write):
            write.write(bytes(size))
            began = time.monotonic()
            received = await read.readexactly(size)
            seconds = time.monotonic() - began
            assert received == bytes(size)
            # It is never faster than the link. How much slower it is depends on the machine's other work.
            assert 8e-6 * size / 100.0 - 0.005 < seconds

    run(scenario())


def test_connections_share_the_rate() -> None:
    size, count = 100_000, 5

    async def scenario() -> None:
        async with echo_behind(Link(20.0)) as echo:

            async def send() -> None:
                async with echo.connection() as (read, write):
                    write.write(bytes(size))
                    await read.readexactly(size)

            began = time.monotonic()
            await asyncio.gather(*(send() for _ in range(count)))
            assert time.monotonic() - began > 8e-6 * size * count / 20.0 - 0.005

    run(scenario())


def test_nothing_comes_back_sooner_than_the_round_trip() -> None:
    async def scenario() -> None:
        async with echo_behind(Link(None, 0.1)) as echo:
            began = time.monotonic()
            async with echo.connection() as (read, write):
                for trips in (2, 3, 4):  # the first also opens the connection
                    write.write(b"ping")
                    assert await read.readexactly(4) == b"ping"
                    assert time.monotonic() - began > trips * 0.1 - 0.005

    run(scenario())


def test_a_receiver_who_does_not_read_stops_the_sender() -> None:
    """What the link holds is bounded. The rest waits in the kernel's buffers and at the sender."""

    async def scenario() -> None:
        link = Link(800.0, 0.01)
        async with echo_behind(link) as echo:
            stuck = asyncio.Event()

            async def ignore(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                await stuck.wait()
                writer.close()

            server = await asyncio.start_server(ignore, LOCAL, 0, limit=2**16)
            proxy = await Proxy.start(echo.wire, server.sockets[0].getsockname()[:2])
            _, write = await asyncio.open_connection(LOCAL, proxy.port)
            write.write(bytes(64 * 2**20))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(write.drain(), 1.0)
            assert 0 < echo.wire.there.bytes_carried < link.most_in_flight + 12 * 2**20
            write.transport.abort()
            stuck.set()
            await proxy.close()
            server.close()

    run(scenario())


def test_a_cut_link_is_silent_until_it_is_mended_and_loses_nothing() -> None:
    async def scenario() -> None:
        async with echo_behind(Link()) as echo, echo.connection() as (read, write):
            write.write(b"before")
            assert await read.readexactly(6) == b"before"
            echo.wire.cut()
            write.write(b"during")
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(read.read(1), 0.2)
            async with echo.connection() as (other_read, other_write):
                other_write.write(b"new")
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(other_read.read(1), 0.2)
                echo.wire.mend()
                assert await other_read.readexactly(3) == b"new"
            assert await read.readexactly(6) == b"during"

    run(scenario())


def test_each_connection_takes_the_wire_of_who_opened_it() -> None:
    async def scenario() -> None:
        async with echo_behind(Link()) as echo:
            strangers, cut_off = Wire(Link()), set[int]()
            strangers.cut()

            async def wire_from(port: int) -> Wire:
                return strangers if port in cut_off else echo.wire

            proxy = await Proxy.start(echo.wire, (LOCAL, echo.port), wire_from=wire_from)
            for is_cut_off in (True, False):
                sock = socket.socket()
                sock.bind((LOCAL, 0))
                if is_cut_off:
                    cut_off.add(sock.getsockname()[1])
                sock.connect((LOCAL, proxy.port))
                read, write = await asyncio.open_connection(sock=sock)
                write.write(b"x")
                try:
                    async with asyncio.timeout(0.2 if is_cut_off else 60):
                        assert await read.readexactly(1) == b"x"
                        assert not is_cut_off
                except TimeoutError:
                    assert is_cut_off
                write.close()
            await proxy.close()

    run(scenario())


def test_nobody_listening_behind_it_is_a_reset() -> None:
    async def scenario() -> None:
        async with echo_behind(Link()) as echo:
            unused = await asyncio.start_server(lambda *_: None, LOCAL, 0)
            target = unused.sockets[0].getsockname()[:2]
            unused.close()
            proxy = await Proxy.start(echo.wire, target)
            read, write = await asyncio.open_connection(LOCAL, proxy.port)
            with pytest.raises(ConnectionResetError):
                await read.read(1)
            write.close()
            await proxy.close()

    run(scenario())


def test_many_connections_pass_at_once_and_closing_leaves_nothing() -> None:
    async def scenario() -> None:
        tasks = len(asyncio.all_tasks())
        async with echo_behind(Link(100.0, 0.01)) as echo:

            async def ask(number: int) -> None:
                async with echo.connection() as (read, write):
                    write.write(b"%d\n" % number)
                    assert await read.readline() == b"%d\n" % number

            await asyncio.gather(*map(ask, range(200)))
            read, write = await asyncio.open_connection(LOCAL, echo.proxy.port)
            write.write(b"x")
            await read.readexactly(1)
            await echo.proxy.close()
            assert await read.read() == b""
            write.close()
        async with asyncio.timeout(60):
            while len(asyncio.all_tasks()) > tasks:  # noqa: ASYNC110  # the servers' own tasks set no event
                await asyncio.sleep(0.01)

    run(scenario())
