"""Connections that ask for nothing, or don't take what they asked for, don't stay: they would keep other pages out."""

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvicorn

from talkoot.dashboard import server

GET = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n"
ANSWER_BYTES = 32 * 2**20
Wrote = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers with more than sockets hold, unless it is asked for the event stream, which stays open."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if scope["path"] == "/events":
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        await asyncio.sleep(30)
    await send({"type": "http.response.body", "body": bytes(ANSWER_BYTES)})


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    pass


async def trickling(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(GET)
    while True:
        writer.write(b"X-A: b\r\n")
        await asyncio.sleep(0.05)


async def taking_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.transport.pause_reading()  # type: ignore[attr-defined]  # a socket's
    writer.write(GET + b"\r\n")
    await asyncio.sleep(1.0)
    writer.transport.resume_reading()  # type: ignore[attr-defined]


def play(wrote: Wrote, monkeypatch: pytest.MonkeyPatch) -> int | None:
    """How many bytes came until the connection ended; None if it did not within seconds."""
    monkeypatch.setattr(server, "_PATIENCE_S", 0.4)
    monkeypatch.setattr(server, "_LOOK_EVERY_S", 0.1)

    async def scenario() -> int | None:
        came = 0
        listener = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(app, http=server.Page, ws="none", lifespan="off", log_config=None)
        running = server._Server(config)
        serving = asyncio.create_task(running.serve([listener]))
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        writing = asyncio.ensure_future(wrote(reader, writer))
        try:
            async with asyncio.timeout(2.0):
                while data := await reader.read(2**20):
                    came += len(data)
        except ConnectionError:
            pass
        except TimeoutError:
            return None
        finally:
            writing.cancel()
            running.should_exit = running.force_exit = True
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            await asyncio.gather(writing, serving, return_exceptions=True)
        return came

    return asyncio.run(scenario())


@pytest.mark.parametrize("wrote", [silent, trickling, taking_nothing])
def test_a_page_that_neither_asks_nor_takes_is_let_go(wrote: Wrote, monkeypatch: pytest.MonkeyPatch) -> None:
    came = play(wrote, monkeypatch)
    assert came is not None
    assert came < ANSWER_BYTES


def test_an_event_stream_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    async def listening(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(GET.replace(b"/ ", b"/events ") + b"\r\n")

    assert play(listening, monkeypatch) is None
