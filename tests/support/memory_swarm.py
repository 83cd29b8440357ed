"""A real swarm whose peers host a memory: DHT, TLS and gRPC on this machine, for tests."""

import asyncio
import contextlib
import hashlib
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from callers import numbered_identity
from memory_samples import SampleHost, SampleMemory
from real_swarm import LOCAL, MANIFEST

from dht.announcements import ReplicaState
from dht.invites import Invite
from dht.library import LibraryEntry, MemoryRegistry
from dht.memory import MemoryID, Part
from dht.swarm import Swarm, found_swarm, join_swarm
from expert_server.memory.servicer import MemoryMetrics, MemoryServicer
from peer import PROTOCOL_VERSION
from peer.host import NetworkConfig
from peer.rpc.calls import abort_on_error
from peer.rpc.sessions import Sessions
from peer.wire import memory_pb2, memory_pb2_grpc, records_pb2, session_pb2
from trainer_client.memory.memories import Memories

_LIFETIME_S = 300.0
_SEARCHER = 50
"""The number of the first searcher's identity."""


class LyingServicer(memory_pb2_grpc.MemoryServiceServicer):
    """Answers searches as a `SampleHost`, and serves the memory's other parts truthfully."""

    def __init__(self, host: SampleHost, honest: MemoryServicer, sessions: Sessions) -> None:
        self.host = host
        self._honest = honest
        self._sessions = sessions

    async def Search(self, request: memory_pb2.SearchRequest, context: Any) -> memory_pb2.SearchReply:
        async with abort_on_error(context):
            self._sessions.require(context, session_pb2.RIGHT_MEMORY)
            reply: memory_pb2.SearchReply = await self.host.answer("Search", request, 3600.0)
            return reply
        raise AssertionError("abort raises")

    async def Read(self, request: memory_pb2.ReadRequest, context: Any) -> memory_pb2.ReadReply:
        async with abort_on_error(context):
            self._sessions.require(context, session_pb2.RIGHT_MEMORY)
            reply: memory_pb2.ReadReply = await self.host.answer("Read", request, 3600.0)
            return reply
        raise AssertionError("abort raises")

    async def FetchPart(self, request: memory_pb2.FetchPartRequest, context: Any) -> None:
        await self._honest.FetchPart(request, context)


@dataclass
class MemoryHost:
    """A peer that hosts shards of the memory."""

    swarm: Swarm
    servicer: MemoryServicer
    liar: SampleHost | None

    async def stop(self) -> None:
        assert self.swarm.host.server is not None
        await self.swarm.host.server.stop(0.0)


@dataclass
class MemorySwarm:
    """The founder, which publishes a memory but hosts none of it, and the memory's hosts."""

    memory: SampleMemory
    folder: Path
    stack: contextlib.AsyncExitStack
    founder: Swarm
    hosts: list[MemoryHost] = field(default_factory=list)

    @classmethod
    async def found(
        cls, stack: contextlib.AsyncExitStack, folder: Path, memory: SampleMemory
    ) -> "MemorySwarm":
        founder = await found_swarm(numbered_identity(0), MANIFEST, NetworkConfig(LOCAL))
        stack.push_async_callback(founder.stop)
        swarm = cls(memory, folder, stack, founder)
        await swarm.publish(memory)
        return swarm

    @property
    def memory_id(self) -> MemoryID:
        return MemoryID.of(self.memory.manifest.name, self.founder.host.peer_id)

    async def publish(self, *memories: SampleMemory) -> None:
        """Lists these memories, and no others."""
        entries = []
        for memory in memories:
            data = memory.manifest.serialize()
            part = Part(hashlib.sha256(data).digest(), len(data))
            entries.append(LibraryEntry.of(memory.manifest, part, self.founder.host.peer_id))
        await MemoryRegistry(self.founder.registry).publish_library(entries)

    async def invite(self) -> Invite:
        return await self.founder.invite()

    async def host(
        self,
        roots: Collection[bytes] | None = None,
        *,
        lies: bool = False,
        memory: SampleMemory | None = None,
    ) -> MemoryHost:
        """Adds a peer with these shards; `roots` None: all. `lies`: whether it answers as its `liar` does."""
        memory = memory or self.memory
        number = len(self.hosts) + 1
        swarm = await join_swarm(numbered_identity(number), await self.invite(), NetworkConfig(LOCAL))
        self.stack.push_async_callback(swarm.stop)
        store = await asyncio.to_thread(memory.write, self.folder / f"host{number}", roots)
        name, sessions = str(self.memory_id), swarm.host.sessions
        honest = MemoryServicer(
            {name: store}, swarm.keys.swarm_id, sessions, swarm.host.upload, MemoryMetrics(), 1
        )
        self.stack.push_async_callback(honest.close)
        liar = SampleHost(memory, roots or memory.files.keys(), after_s=0.0) if lies else None
        servicer = honest if liar is None else LyingServicer(liar, honest, sessions)
        assert swarm.host.server is not None
        memory_pb2_grpc.add_MemoryServiceServicer_to_server(servicer, swarm.host.server.services)
        record = records_pb2.NodeRecord(
            addresses=[f"{LOCAL}:{swarm.host.port}"],
            certificate=swarm.host.certificate,
            protocol_version=PROTOCOL_VERSION,
            name=f"host {number}",
        )
        await swarm.registry.publish_node(record, _LIFETIME_S)
        host = MemoryHost(swarm, honest, liar)
        await self.announce(host, store.shards)
        self.hosts.append(host)
        return host

    async def announce(
        self, host: MemoryHost, roots: Collection[bytes], state: ReplicaState = ReplicaState.SERVING
    ) -> None:
        regions = {
            region: (state, [shard.root for shard in shards if shard.root in roots])
            for region, shards in self.memory.manifest.by_region.items()
            if any(shard.root in roots for shard in shards)
        }
        await MemoryRegistry(host.swarm.registry).announce(self.memory_id, regions, _LIFETIME_S)

    async def searcher(self, number: int = 0) -> Memories:
        """Adds a peer that searches."""
        identity, invite = numbered_identity(_SEARCHER + number), await self.invite()
        swarm = await join_swarm(identity, invite, NetworkConfig(LOCAL, serves_dht=False))
        self.stack.push_async_callback(swarm.stop)
        channels = swarm.host.channels(64)
        self.stack.push_async_callback(channels.close)
        memories = Memories(swarm, channels, self.folder / f"searcher{number}")
        self.stack.push_async_callback(memories.close)
        return memories
