"""Limits of a node: memory, threads, bandwidth. With real nodes and sockets."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from callers import InSession, numbered_identities, opened
from real_swarm import MANIFEST, UIDS, Play, Village, children, eventually, playing

from dht.manifest import ModelSpec
from dht.swarm import Swarm
from dht.uid import UID
from expert_server.resources import smallest_memory
from peer import PROTOCOL_VERSION
from peer.errors import SettingsError
from peer.identity import Identity
from peer.loop import LoopThread
from peer.platform.processes import usable_cores
from peer.rpc.channels import ChannelPool
from peer.wire import expert_pb2, expert_pb2_grpc


@pytest.fixture(scope="module")
def identities() -> list[Identity]:
    return numbered_identities(2)


@pytest.fixture
def play(loop: LoopThread, identities: list[Identity], tmp_path: Path) -> Play:
    return playing(loop, identities, tmp_path)


# What a node may use


def test_a_node_keeps_to_the_memory_that_it_may_take(play: Play) -> None:
    async def scenario(village: Village) -> None:
        large = MANIFEST.model_copy(update={"model": ModelSpec(layers=2, hidden=256, heads=2, context=8)})
        node = await village.found(manifest=large, memory=2 * smallest_memory(large))
        status = node.status()
        assert 1 <= status.experts <= status.capacity < len(UIDS)
        assert status.memory_bytes <= status.memory_limit_bytes == 2 * smallest_memory(large)

    play(scenario)


def test_too_little_memory_is_refused_and_nothing_is_left(play: Play) -> None:
    async def scenario(village: Village) -> None:
        before = children()
        with pytest.raises(SettingsError, match="memory: 100 bytes is too little"):
            await village.found(memory="100")
        assert children() <= before

    play(scenario)


def test_a_node_has_no_more_threads_than_cores(play: Play) -> None:
    async def scenario(village: Village) -> None:
        node = await village.found(experts=0, threads=1000)
        assert await node.runtime.run(torch.get_num_threads) == usable_cores()
        assert node.status().threads == usable_cores()

    play(scenario)


# What it sends


async def forward(stub: Any, swarm: Swarm, uid: UID, segments: int) -> float:
    """Sends rows of 32 bytes each, 8 in a segment, and receives the answers. Returns the seconds."""
    header = expert_pb2.CallHeader(
        protocol_version=PROTOCOL_VERSION,
        swarm_id=swarm.keys.swarm_id,
        request_id=time.monotonic_ns().to_bytes(16, "big"),
        width=8,
        codec=expert_pb2.CODEC_FP32,
        segment_lengths=[8] * segments,
        positions=[*range(8)] * segments,
        experts=[expert_pb2.ExpertRows(uid=str(uid))],
    )
    payload = torch.randn(8 * segments, 8).numpy().tobytes()
    chunks = [payload[n : n + 65536] for n in range(0, len(payload), 65536)]
    requests = [expert_pb2.CallRequest(header=header), *(expert_pb2.CallRequest(chunk=c) for c in chunks)]
    begin = time.monotonic()
    replies = [reply async for reply in stub.Forward(iter(requests), timeout=30)]
    assert sum(len(reply.chunk) for reply in replies) == len(payload)
    assert replies[0].experts[0].status == 0
    return time.monotonic() - begin


@pytest.mark.parametrize("direction", ["upload_mbit", "download_mbit"])
def test_a_limited_node_takes_its_time_and_lets_short_calls_through(play: Play, direction: str) -> None:
    """256 KiB at 1 Mbit/s take 2 s; a short call needs 1% of that."""

    async def scenario(village: Village) -> None:
        limit: dict[str, Any] = {direction: 1.0}
        node = await village.found(experts=1, **limit)
        (uid,) = node.runtime.experts
        pem = (await node.swarm.registry.nodes([node.swarm.host.peer_id])).popitem()[1].certificate_pem
        pool = ChannelPool()
        village.stack.push_async_callback(pool.close)
        session = opened(node.sessions, node.swarm.host.identity, node.swarm.keys.swarm_id)
        stub = InSession(expert_pb2_grpc.ExpertServiceStub(await pool.get(node.address, pem)), session)
        await forward(stub, node.swarm, uid, 1)
        long = asyncio.create_task(forward(stub, node.swarm, uid, 1024))
        spent = node.traffic.up if direction == "upload_mbit" else node.traffic.down

        async def under_way() -> bool:
            return spent.bytes > 40_000

        await eventually(under_way)
        await forward(stub, node.swarm, uid, 10)
        assert not long.done()
        size, burst = 1024 * 8 * 32, 0.2 * 125_000
        assert await long >= (size - burst) / 125_000 * 0.98
        assert spent.bytes >= size

    play(scenario)
