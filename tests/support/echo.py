"""A TCP server that sends back what it receives, and a client that reaches it through an emulated link, for tests."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from talkoot.demo.links import Link, Proxy, Wire

LOCAL = "127.0.0.1"
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass
class Echo:
    """An echo server with a proxy in front of it."""

    wire: Wire
    proxy: Proxy
    port: int
    received: int = 0

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[Streams]:
        reader, writer = await asyncio.open_connection(LOCAL, self.proxy.port)
        try:
            yield reader, writer
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


@contextlib.asynccontextmanager
async def echo_behind(link: Link, *, seed: int = 0, answers: bool = True) -> AsyncIterator[Echo]:
    """`answers=False`: the server reads everything and sends nothing back."""
    found: list[Echo] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(ConnectionError):
            while data := await reader.read(2**16):
                found[0].received += len(data)
                if answers:
                    writer.write(data)
                    await writer.drain()

    server = await asyncio.start_server(serve, LOCAL, 0)
    port = server.sockets[0].getsockname()[1]
    wire = Wire(link, seed)
    proxy = await Proxy.start(wire, (LOCAL, port))
    found.append(Echo(wire, proxy, port))
    try:
        yield found[0]
    finally:
        await proxy.close()
        server.close()
        await server.wait_closed()
