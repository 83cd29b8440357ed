"""A process that makes gRPC calls and starts other processes meanwhile, as a node starts p2pd."""

import subprocess
import sys

import pytest

PROGRAM = """
import peer
import asyncio
import os
import grpc
import uvloop

async def echo(request, context):
    return request

async def main():
    handler = grpc.unary_unary_rpc_method_handler(echo)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", {"Echo": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()

    async def call_again_and_again():
        while True:
            alone = [("grpc.use_local_subchannel_pool", 1)]
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=alone) as channel:
                assert await channel.unary_unary("/test.Echo/Echo")(b"word", timeout=60) == b"word"

    async def start_others():
        for _ in range(150):
            process = await asyncio.create_subprocess_exec("true")
            assert await process.wait() == 0

    calls = [asyncio.create_task(call_again_and_again()) for _ in range(4)]
    await asyncio.gather(start_others(), start_others())
    assert not any(call.done() for call in calls)

uvloop.run(main())
os._exit(0)  # as `talkoot` ends
"""


@pytest.mark.slow
def test_starting_processes_does_not_break_grpc() -> None:
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
