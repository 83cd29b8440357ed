"""Every method of every service, called by a stranger without a session: refused properly, and nothing is logged."""

import contextlib
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor
from stranger import Stranger
from victim import founder
from wire_methods import all_methods, name_of

from peer.loop import LoopThread

_ORDERLY = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNIMPLEMENTED,
}


async def outcome(channel: grpc.aio.Channel, method: MethodDescriptor, request: bytes) -> grpc.StatusCode:
    # All is sent at once: by the time of a second write, the call may have been refused.
    begin: Any = channel.unary_stream(f"/{name_of(method)}")
    call = begin(request, timeout=60.0)
    with contextlib.suppress(grpc.aio.AioRpcError):  # `code` tells
        async for _ in call:
            pass
    code: grpc.StatusCode = await call.code()
    return code


def test_every_method_refuses_strangers_in_order_and_logs_nothing(loop: LoopThread, tmp_path: Path) -> None:
    methods = all_methods()
    assert len(methods) > 20
    with founder(tmp_path) as node:

        async def scenario() -> dict[str, grpc.StatusCode]:
            async with Stranger.joined(node.invite, serves_dht=False) as stranger:
                caller = stranger.caller_of(await stranger.node(node.invite.keys.author))
                before = len(node.log_lines)
                found = {}
                for method in methods:
                    # A connection is closed after forty calls without a session.
                    channel = caller.new_channel()
                    for request in (b"", b"\xff\xff"):
                        found[f"{name_of(method)} {request!r}"] = await outcome(channel, method, request)
                assert node.log_lines[before:] == []
                return found

        found = loop.run(scenario(), 240)
        assert {name: code for name, code in found.items() if code not in _ORDERLY} == {}
        assert found["grpc.health.v1.Health/List b''"] is grpc.StatusCode.OK
        assert found["talkoot.v1.ExpertService/Forward b''"] is grpc.StatusCode.UNAUTHENTICATED
        assert node.alive
