"""Strangers call a host of memories in ways that no retriever would, over real connections, through a node's gate."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from callers import numbered_identity
from grpc import StatusCode
from memory_folders import DIMENSIONS, SampleMemory
from memory_peers import SWARM, Library, in_library, search_request, until
from stranger import HostileCaller

from dht.announcements import NodeInfo
from dht.memory import MemoryID
from expert_server.memory.servicer import MemoryMetrics, MemoryServicer
from peer.identity import certificate_pem
from peer.loop import LoopThread
from peer.rates import RateLimit
from peer.rpc.server import RpcServer, server_credentials
from peer.rpc.sessions import Sessions
from peer.transport.endpoints import Endpoint
from peer.wire import memory_pb2, memory_pb2_grpc, session_pb2, state_pb2

MEMORY = SampleMemory.make(each=100)
HOST = numbered_identity(1)
ID = MemoryID.of(MEMORY.manifest.name, HOST.peer_id)


def attacking(
    loop: LoopThread, folder: Path, attack: Callable[[HostileCaller], Coroutine[Any, Any, None]]
) -> None:
    async def run() -> None:
        async with contextlib.AsyncExitStack() as stack:
            sessions = Sessions(SWARM, HOST.peer_id)
            server = RpcServer(sessions, 64)
            stores = {str(ID): MEMORY.write(folder / "memory")}
            servicer = MemoryServicer(stores, SWARM, sessions, RateLimit(None), MemoryMetrics(), 1)
            stack.push_async_callback(servicer.close)
            memory_pb2_grpc.add_MemoryServiceServicer_to_server(servicer, server.services)
            certificate = HOST.make_certificate()
            port = await server.start(server_credentials(HOST, certificate), "127.0.0.1", 0)
            stack.push_async_callback(server.stop, None)
            pem, address = certificate_pem(certificate, HOST.peer_id), Endpoint(f"127.0.0.1:{port}")
            node = NodeInfo(peer_id=HOST.peer_id, addresses=(address,), certificate_pem=pem, expires_at=1e12)
            stranger = HostileCaller(node, SWARM)
            stack.push_async_callback(stranger.close)
            await stranger.open_session(rights=(session_pb2.RIGHT_MEMORY,))
            await attack(stranger)

    loop.run(run(), 120)


def test_a_call_of_millions_of_tiny_fields_is_not_parsed(loop: LoopThread, tmp_path: Path) -> None:
    """The fields are shards, queries, and unknown ones. Parsing them would block the loop for long, or hold memory for
    as long as the call waits.
    """

    async def attack(stranger: HostileCaller) -> None:
        queries = np.zeros((256, DIMENSIONS), np.int8).tobytes()
        right = search_request(ID, 5, queries, *MEMORY.roots)
        for wanted in right.shards:
            wanted.queries.extend(range(256))
        data = right.SerializeToString()
        answer = await stranger.unary("talkoot.v1.MemoryService/Search", data)
        assert len(memory_pb2.SearchReply.FromString(answer).found) == 256
        for tag in (b"\x32\x00", b"\x28\x01", b"\xf8\x07\x00"):
            with pytest.raises(grpc.aio.AioRpcError, match="protocol version") as refused:
                await stranger.unary("talkoot.v1.MemoryService/Search", data + tag * 2**19)
            assert refused.value.code() is StatusCode.FAILED_PRECONDITION

    attacking(loop, tmp_path, attack)


class Trickler(memory_pb2_grpc.MemoryServiceServicer):
    """Sends parts that never end."""

    def __init__(self) -> None:
        self.asked = self.ended = 0

    async def FetchPart(self, request: Any, context: Any) -> AsyncIterator[state_pb2.FetchReply]:
        self.asked += 1
        try:
            yield state_pb2.FetchReply(header=state_pb2.StateHeader(total_bytes=1000, sha256=bytes(32)))
            while True:
                yield state_pb2.FetchReply(chunk=b"1")
                await asyncio.sleep(0.05)
        finally:
            self.ended += 1


def test_peers_whose_parts_trickle_hold_up_nobody(
    loop: LoopThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peer.rpc.transfer._FAIR_S", 0.2)

    async def scenario(library: Library) -> None:
        tricklers = [Trickler() for _ in range(3)]
        for number, trickler in enumerate(tricklers, 2):
            identity = numbered_identity(number)
            await library.serve_any(identity, Sessions(SWARM, identity.peer_id), trickler)
        await library.host(1, MEMORY)
        client, name = library.client(), MEMORY.manifest.codebook.sha256
        nodes = [library.node(number) for number in (2, 3, 4, 1)]
        for _ in range(2):
            async with asyncio.timeout(60):  # ten more seconds for each that is waited for to the end
                data = await client.fetch_any(
                    nodes, str(library.memory_id(MEMORY)), name, 1000, lambda data: data
                )
            assert data == MEMORY.codebook
        # The second time, the others were known.
        assert [trickler.asked for trickler in tricklers] == [1, 1, 1]
        await until(lambda: all(trickler.ended for trickler in tricklers))

    in_library(loop, tmp_path, scenario)
