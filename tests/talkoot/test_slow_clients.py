"""Connections that request nothing, or don't read what they requested, are closed, so that they don't keep
others out. Nor do those that take long to parse.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvicorn

from talkoot import web

GET = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n"
ANSWER_BYTES = 32 * 2**20
Wrote = Callable[[asyncio.StreamWriter], Awaitable[None]]


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers with more than sockets can hold, or with a stream that ends by itself: /events sends little, and /flood
    as much as it can.
    """
    if scope["path"] != "/":
        web.ends_by_itself(scope)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    while scope["path"] == "/flood":
        await send({"type": "http.response.body", "body": bytes(2**14), "more_body": True})
        await asyncio.sleep(0)
    if scope["path"] == "/events":
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        await asyncio.sleep(300)
    await send({"type": "http.response.body", "body": bytes(ANSWER_BYTES)})


async def silent(writer: asyncio.StreamWriter) -> None:
    pass


async def trickling(writer: asyncio.StreamWriter) -> None:
    writer.write(GET)
    while True:
        writer.write(b"X-A: b\r\n")
        await asyncio.sleep(0.05)


async def taking_nothing(writer: asyncio.StreamWriter) -> None:
    writer.write(GET + b"\r\n")


async def taking_nothing_of_a_stream(writer: asyncio.StreamWriter) -> None:
    writer.write(GET.replace(b"/ ", b"/flood ") + b"\r\n")


async def asking_for_a_stream_behind_an_answer(writer: asyncio.StreamWriter) -> None:
    writer.write(GET + b"\r\n" + GET.replace(b"/ ", b"/events ") + b"\r\n")


async def until(condition: Callable[[], bool], limit_s: float) -> None:
    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110  # uvicorn's connections set no event
            await asyncio.sleep(0.01)


async def read_slowly(reader: asyncio.StreamReader) -> None:
    while await reader.read(2**20):  # noqa: ASYNC110  # it waits for no event, but is slow
        await asyncio.sleep(0.05)


def is_let_go(
    wrote: Wrote,
    monkeypatch: pytest.MonkeyPatch,
    keep_alive_s: int = 5,
    within_s: float = 60.0,
    *,
    reads: bool = False,
) -> bool:
    """Whether the server closes the connection in time if nobody reads from it, or, if the client `reads`, slowly."""
    monkeypatch.setattr(web, "_PATIENCE_S", 0.4)
    monkeypatch.setattr(web, "_LOOK_EVERY_S", 0.1)

    async def scenario() -> bool:
        listener = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(
            app,
            http=web.Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            timeout_keep_alive=keep_alive_s,
        )
        running = web._Server(config)
        serving = asyncio.create_task(running.serve([listener]))
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        writing = asyncio.ensure_future(wrote(writer))
        reading = asyncio.ensure_future(read_slowly(reader) if reads else asyncio.sleep(0))
        connections = running.server_state.connections
        try:
            await until(lambda: bool(connections), 60.0)
            await until(lambda: not connections, within_s)
        except TimeoutError:
            return False
        finally:
            writing.cancel()
            reading.cancel()
            running.should_exit = running.force_exit = True
            writer.transport.abort()
            await asyncio.gather(writing, reading, serving, return_exceptions=True)
        return True

    return asyncio.run(scenario())


@pytest.mark.parametrize(
    "wrote",
    [
        silent,
        trickling,
        taking_nothing,
        taking_nothing_of_a_stream,
        asking_for_a_stream_behind_an_answer,
    ],
)
def test_a_client_that_neither_asks_nor_takes_is_let_go(
    wrote: Wrote, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_let_go(wrote, monkeypatch)


def test_an_answer_that_nobody_takes_is_forgotten_once_its_connection_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert is_let_go(taking_nothing, monkeypatch, keep_alive_s=0)


def test_a_stream_that_ends_by_itself_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    async def listening(writer: asyncio.StreamWriter) -> None:
        writer.write(GET.replace(b"/ ", b"/events ") + b"\r\n")

    assert not is_let_go(listening, monkeypatch, within_s=2.0)


def test_a_stream_that_its_client_reads_slowly_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_let_go(taking_nothing_of_a_stream, monkeypatch, within_s=3.0, reads=True)


def test_silent_connections_of_one_client_make_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are. One that is being answered stays."""
    monkeypatch.setattr(web, "_MAX_CONNECTIONS", 10)

    async def small(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/events":
            await app(scope, receive, send)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    async def scenario() -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        writers: list[asyncio.StreamWriter] = []
        async with web.serving(small, listener), asyncio.timeout(60):
            reader, stream = await asyncio.open_connection(*listener.getsockname())
            stream.write(GET.replace(b"/ ", b"/events ") + b"\r\n")
            assert b"200" in await reader.readline()
            for _ in range(30):
                _, writer = await asyncio.open_connection(*listener.getsockname())
                writers.append(writer)
            asking, asked = await asyncio.open_connection(*listener.getsockname())
            asked.write(GET + b"\r\n")
            assert b"200" in await asking.readline()
            assert not stream.is_closing()
            assert not reader.at_eof()
            for writer in (stream, asked, *writers):
                writer.transport.abort()

    asyncio.run(scenario())


CHUNKED = GET.replace(b"GET", b"POST") + b"Transfer-Encoding: chunked\r\n\r\n"


def in_tiny_chunks(body: bytes) -> bytes:
    return CHUNKED + b"".join(b"1\r\n%c\r\n" % digit for digit in body) + b"0\r\n\r\n"


@pytest.mark.parametrize("before", [b"", GET + b"\r\n"])
def test_a_body_of_tiny_chunks_is_parsed_in_many_turns_of_the_loop(before: bytes) -> None:
    """It would hold the loop for a microsecond a byte, for everybody. All requests on one connection are whole. Those
    that arrive while an earlier one is answered are parsed in parts, too.
    """
    body = b"".join(b"%d" % (number % 10) for number in range(30_000))
    sent = before + 2 * in_tiny_chunks(body)
    parts = list[bytes]()

    async def reading(scope: Any, receive: Any, send: Any) -> None:
        more = True
        while more:
            message = await receive()
            parts.append(message["body"])
            more = message["more_body"]
        if scope["method"] == "GET":
            for _ in range(300):  # turns of the loop, in which the rest arrives
                await asyncio.sleep(0)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    async def scenario() -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        async with web.serving(reading, listener), asyncio.timeout(60):
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            writer.write(sent)
            for _ in range(sent.count(b"HTTP/1.1")):
                assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
            writer.transport.abort()

    asyncio.run(scenario())
    assert b"".join(parts) == 2 * body
    assert max(map(len, parts)) < 4096


def test_a_body_that_goes_wrong_after_its_answer_ends_the_connection(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """However far into the body that is. uvicorn fails as it tries to refuse what it has answered already."""

    async def early(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    async def scenario() -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        async with web.serving(early, listener), asyncio.timeout(60):
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            writer.write(CHUNKED)
            await reader.readuntil(b"ok")
            writer.write(2000 * b"1\r\nx\r\n" + b"no chunk\r\n" + 2000 * b"1\r\nx\r\n")
            with contextlib.suppress(ConnectionError):
                assert not await reader.read()
            writer.transport.abort()

    asyncio.run(scenario())
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
