"""Bytes that came as a message and are none: they count as an empty message, which whoever reads it refuses.

gRPC by itself writes a traceback into the log for each, and the caller gets None in place of a reply.
"""

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError

M = TypeVar("M")
Parse = Callable[[bytes], M]


class GarbageInterceptor(grpc.aio.ServerInterceptor):
    """For servers: of requests."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:  # no such method
            return None
        return handler._replace(request_deserializer=_or_empty(handler.request_deserializer))


def make_stub(stub: Callable[[Any], Any], channel: grpc.aio.Channel) -> Any:
    """For clients: a generated stub, of replies."""
    return stub(_Calls(channel))


class _Calls:
    """What a generated stub asks of a channel."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel

    def __getattr__(self, kind: str) -> Callable[..., Any]:
        """`kind`: such as `unary_unary`."""
        make_call = getattr(self._channel, kind)

        def make(method: str, *, response_deserializer: Parse[Any], **more: Any) -> Any:
            return make_call(method, response_deserializer=_or_empty(response_deserializer), **more)

        return make


def _or_empty(parse: Parse[M]) -> Parse[M]:
    def parsed(data: bytes) -> M:
        try:
            return parse(data)
        except DecodeError:
            return parse(b"")

    return parsed
