"""A handler that fails unexpectedly ends its own call, is counted, and tells the caller nothing."""

import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc import StatusCode

from peer.loop import LoopThread, Restarts
from peer.rpc.calls import make_server


async def answer(request: bytes, context: Any) -> bytes:
    if request == b"break":
        raise TypeError("a secret")
    if request == b"refuse":
        await context.abort(StatusCode.NOT_FOUND, "no such thing")
    return request


async def answers(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
    async for request in requests:
        yield await answer(request, context)


def absent(request: bytes, context: Any) -> None:
    """As generated base classes have it."""
    context.set_code(StatusCode.UNIMPLEMENTED)
    raise NotImplementedError("Method not implemented!")


def test_a_call_that_breaks_its_handler_ends_alone(
    loop: LoopThread, caplog: pytest.LogCaptureFixture
) -> None:
    restarts = Restarts()

    async def scenario() -> None:
        server = make_server(8, restarts)
        methods: dict[str, Any] = {
            "One": grpc.unary_unary_rpc_method_handler(answer, bytes),
            "Many": grpc.stream_stream_rpc_method_handler(answers, bytes),
            "None": grpc.unary_unary_rpc_method_handler(absent, bytes),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", methods),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                one: Any = channel.unary_unary("/test/One")
                many: Any = channel.stream_stream("/test/Many")
                none: Any = channel.unary_unary("/test/None")
                assert await one(b"well", timeout=20) == b"well"
                assert [reply async for reply in many(iter([b"1", b"2"]), timeout=20)] == [b"1", b"2"]
                await ends(one(b"refuse", timeout=20), StatusCode.NOT_FOUND)
                await ends(none(b"", timeout=20), StatusCode.UNIMPLEMENTED)
                assert caplog.records == []
                await ends(one(b"break", timeout=20), StatusCode.INTERNAL)
                await ends(read(many(iter([b"1", b"break"]), timeout=20)), StatusCode.INTERNAL)
                assert await one(b"well", timeout=20) == b"well"
        finally:
            await server.stop(None)

    async def read(stream: Any) -> None:
        async for reply in stream:
            assert reply == b"1"

    async def ends(call: Any, code: StatusCode) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await call
        assert ended.value.code() is code
        assert "secret" not in str(ended.value.details())

    with caplog.at_level(logging.WARNING):
        loop.run(scenario(), 60)
    assert restarts.total == 2
    assert [record.getMessage() for record in caplog.records] == ["could not answer a call"] * 2
