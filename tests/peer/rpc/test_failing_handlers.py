"""A handler that fails unexpectedly ends its own call, is counted, and tells the caller nothing."""

import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc import StatusCode

from peer.identity import Identity, certificate_pem
from peer.loop import LoopThread, Restarts
from peer.metrics import total
from peer.rpc.channels import CLIENT_OPTIONS
from peer.rpc.server import RpcServer, server_credentials
from peer.rpc.sessions import Sessions


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
    """A missing method, as in generated base classes."""
    context.set_code(StatusCode.UNIMPLEMENTED)
    raise NotImplementedError("Method not implemented!")


def test_a_call_that_breaks_its_handler_ends_alone(
    loop: LoopThread, identity: Identity, caplog: pytest.LogCaptureFixture
) -> None:
    restarts = Restarts()

    async def scenario() -> None:
        server = RpcServer(Sessions("sauna", identity.peer_id), 8, restarts=restarts)
        certificate = identity.make_certificate()
        methods: dict[str, Any] = {
            "One": grpc.unary_unary_rpc_method_handler(answer, bytes),
            "Many": grpc.stream_stream_rpc_method_handler(answers, bytes),
            "None": grpc.unary_unary_rpc_method_handler(absent, bytes),
        }
        server.services.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", methods),))
        port = await server.start(server_credentials(identity, certificate), "127.0.0.1", 0)
        trusted = grpc.ssl_channel_credentials(certificate_pem(certificate, identity.peer_id))
        try:
            async with grpc.aio.secure_channel(f"127.0.0.1:{port}", trusted, CLIENT_OPTIONS) as channel:
                one: Any = channel.unary_unary("/test/One")
                many: Any = channel.stream_stream("/test/Many")
                none: Any = channel.unary_unary("/test/None")
                assert await one(b"well", timeout=60) == b"well"
                assert [reply async for reply in many(iter([b"1", b"2"]), timeout=60)] == [b"1", b"2"]
                await ends(one(b"refuse", timeout=60), StatusCode.NOT_FOUND)
                await ends(none(b"", timeout=60), StatusCode.UNIMPLEMENTED)
                assert caplog.records == []
                await ends(one(b"break", timeout=60), StatusCode.INTERNAL)
                await ends(read(many(iter([b"1", b"break"]), timeout=60)), StatusCode.INTERNAL)
                await ends(one(b"break", timeout=60), StatusCode.INTERNAL)  # which is not logged again
                assert await one(b"well", timeout=60) == b"well"
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
    assert total(restarts.count) == 3
    assert [record.getMessage() for record in caplog.records] == [
        "could not answer a call of /test/One",
        "could not answer a call of /test/Many",
    ]
