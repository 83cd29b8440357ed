"""Payloads that stall fill neither a node's memory nor its slots, however many peers send however many."""

import asyncio
import contextlib
import os
from pathlib import Path
from typing import Any

import grpc
from stranger import HostileCaller, Stranger, new_identities, new_identity
from victim import MANIFEST_TOML, NodeVictim, founder, honest_caller

from peer import PROTOCOL_VERSION
from peer.codec import CHUNK_BYTES
from peer.loop import LoopThread
from peer.wire import expert_pb2

MEMORY = 512 * 10**6
MOST = MEMORY // 8 + 256 * 2**20
"""The part of `memory` for calls under way, and freed memory that the process keeps. It was 1,900 MiB before
the limit.
"""
WIDTH = 512
TOML = MANIFEST_TOML.replace("hidden = 16", f"hidden = {WIDTH}")
STRANGERS, STREAMS, SECONDS, CALLS = 5, 11, 1.5, 12
FORWARD = "talkoot.v1.ExpertService/Forward"


def header(swarm_id: str, payload_bytes: int) -> bytes:
    rows = payload_bytes // (4 * WIDTH)
    return expert_pb2.CallRequest(
        header=expert_pb2.CallHeader(
            protocol_version=PROTOCOL_VERSION,
            swarm_id=swarm_id,
            request_id=os.urandom(16),
            width=WIDTH,
            codec=expert_pb2.CODEC_FP32,
            segment_lengths=[1] * rows,
            positions=[0] * rows,
            experts=[expert_pb2.ExpertRows(uid="0.0.0")],
        )
    ).SerializeToString()


async def stall(caller: HostileCaller, payload_bytes: int, asked: list[int]) -> None:
    """Sends a call without its last chunk, and begins again as soon as the call is broken off."""
    chunk = expert_pb2.CallRequest(chunk=bytes(CHUNK_BYTES)).SerializeToString()
    channel = caller.new_channel()
    while True:
        stream: Any = caller.stream(FORWARD, channel=channel)
        asked.append(payload_bytes)
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.UsageError):
            await stream.write(header(caller.swarm_id, payload_bytes))
            for _ in range(payload_bytes // CHUNK_BYTES - 1):
                await stream.write(chunk)
            await stream.read()
        await asyncio.sleep(0.1)


async def besiege(node: NodeVictim) -> tuple[float, int]:
    """Returns the share of honest calls that succeeded, and the largest memory of the node in bytes."""
    most, asked = node.rss_bytes, list[int]()
    async with (
        Stranger.joined(node.invite, serves_dht=False) as stranger,
        contextlib.AsyncExitStack() as stack,
    ):
        info = await stranger.node(node.invite.keys.author)
        manifest, swarm_id = stranger.swarm.manifest, stranger.keys.swarm_id
        callers = [HostileCaller(info, swarm_id, identity) for identity in new_identities(STRANGERS)]
        for caller in callers:
            stack.push_async_callback(caller.close)
            await caller.open_session()
        honest = await stack.enter_async_context(
            honest_caller(info, swarm_id, manifest, [manifest.uids()[0]], new_identity())
        )
        assert await honest.call()
        stalls = [
            asyncio.create_task(stall(caller, (1, 8, 24, 48)[number % 4] * 2**20, asked))
            for caller in callers
            for number in range(STREAMS)
        ]
        calling = asyncio.create_task(honest.call_for(SECONDS, least=CALLS))
        while not calling.done():
            most = max(most, node.rss_bytes)
            await asyncio.sleep(0.05)
        for task in stalls:
            task.cancel()
        await asyncio.gather(*stalls, return_exceptions=True)
        assert sum(asked) > MEMORY, "too little to matter"
        return honest.share, most


def test_stalled_payloads_leave_memory_and_slots_for_honest_callers(loop: LoopThread, tmp_path: Path) -> None:
    with founder(tmp_path, TOML, memory=str(MEMORY), experts=4, spare=0) as node:
        idle = node.rss_bytes
        share, most = loop.run(besiege(node), 120)
        assert share >= 0.95
        assert most - idle <= MOST
        node.until(lambda: node.metric("talkoot_call_memory_bytes") == 0, "the memory to be free again", 20)
