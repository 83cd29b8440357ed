"""A server that answers every call with bytes that are not a message, for tests."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc

from peer.identity import Identity
from peer.rpc.channels import SERVER_OPTIONS
from peer.rpc.server import server_credentials


class _Garbage(grpc.GenericRpcHandler):
    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        return grpc.stream_stream_rpc_method_handler(_answer)


async def _answer(requests: Any, context: Any) -> AsyncIterator[bytes]:
    yield b"\xff\xff\xff"


@contextlib.asynccontextmanager
async def garbage_server(identity: Identity, certificate: bytes, port: int = 0) -> AsyncIterator[int]:
    """Yields its port on 127.0.0.1. `port`: 0 for a free one."""
    server = grpc.aio.server(handlers=[_Garbage()], options=SERVER_OPTIONS)
    port = server.add_secure_port(f"127.0.0.1:{port}", server_credentials(identity, certificate))
    await server.start()
    try:
        yield port
    finally:
        await server.stop(None)
