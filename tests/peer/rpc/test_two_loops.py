"""Several asyncio loops in a process, such as those of two trainers one after another, share gRPC's only queue."""

import asyncio
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from peer.loop import LoopThread


async def answer(request: bytes, context: Any) -> bytes:
    if request == b"late":
        await asyncio.sleep(0.3)
    return request


@pytest.fixture
def port(loop: LoopThread) -> Iterator[int]:
    async def serve() -> tuple[grpc.aio.Server, int]:
        server = grpc.aio.server()
        echo: Any = grpc.unary_unary_rpc_method_handler(answer)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", {"Echo": echo}),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, port

    server, port = loop.run(serve(), 60)
    yield port
    loop.run(server.stop(None), 60)


def test_what_ends_after_its_loop_is_closed_is_no_fault_of_the_next_loop(
    port: int, caplog: pytest.LogCaptureFixture
) -> None:
    left_open = []

    async def call_without_waiting() -> None:
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        left_open.append(channel)
        echo: Any = channel.unary_unary("/test/Echo")
        assert await echo(b"well", timeout=60) == b"well"
        echo(b"late", timeout=60)
        await asyncio.sleep(0.1)

    async def call() -> None:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            echo: Any = channel.unary_unary("/test/Echo")
            for _ in range(3):
                assert await echo(b"late", timeout=60) == b"late"

    first, second = LoopThread(), LoopThread()
    first.run(call_without_waiting(), 60)
    first.close()
    try:
        second.run(call(), 60)
    finally:
        second.close()
    assert [record.getMessage() for record in caplog.records] == []
