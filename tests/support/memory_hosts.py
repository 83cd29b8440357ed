"""Peers of a swarm that fetch a whole memory from another host, and then serve and announce it themselves."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from dht.announcements import Activity, ReplicaState
from dht.library import LibraryEntry, MemoryRegistry
from dht.memory import MAX_MANIFEST_BYTES, MemoryID
from dht.swarm import Swarm
from expert_server.memory.servicer import MemoryMetrics, MemoryServicer
from expert_server.memory.store import MemoryStore
from peer import PROTOCOL_VERSION
from peer.rates import RateLimit
from peer.rpc.parts import PartClient, check_sha256
from peer.transport.endpoints import Endpoint
from peer.wire import memory_pb2_grpc, records_pb2, session_pb2

LIFETIME_S = 60.0


@dataclass
class SimpleHost:
    """Fetches all shards of a memory, and its later revisions when told to."""

    swarm: Swarm
    folder: Path
    stack: contextlib.AsyncExitStack
    store: MemoryStore | None = None

    def __post_init__(self) -> None:
        self.memories = MemoryRegistry(self.swarm.registry)
        sessions = self.swarm.session_client(session_pb2.RIGHT_MEMORY)
        self.parts = PartClient(
            self.swarm.keys.swarm_id, sessions, self.swarm.host.channels(8), RateLimit(None)
        )
        self.stack.push_async_callback(self.parts.close)

    async def entry(self) -> LibraryEntry | None:
        libraries = await self.memories.libraries()
        return next((entry for entries in libraries.values() for entry in entries), None)

    async def take(self) -> None:
        """Fetches the memory from a host."""
        entry = await self.entry()
        assert entry is not None
        contacts = list((await self.memories.some_nodes(entry)).values())

        async def fetched(name: bytes) -> bytes:
            return await self.parts.fetch_any(contacts, str(entry.memory), name, MAX_MANIFEST_BYTES, bytes)

        manifest = check_sha256(entry.manifest.sha256, await fetched(entry.manifest.sha256))
        self.store = MemoryStore.create(self.folder, manifest)
        for shard in self.store.manifest.shards:
            self.store.save(shard.root, self.store.verified(shard.root, await fetched(shard.root)))
        await serving(self.stack, self.swarm, entry.memory, self.store)

    async def follow(self) -> bool:
        """Fetches the newest revision. Returns whether it is another than the present one."""
        entry = await self.entry()
        assert entry is not None
        assert self.store is not None
        if entry.manifest == self.store.part:
            return False
        some = {
            host.peer_id
            for region in self.store.manifest.by_region
            for host in (await self.memories.region_hosts(entry.memory, [region]))[region]
        }
        contacts = (await self.swarm.registry.nodes(some)).values()
        data = await self.parts.fetch_any(
            contacts, str(entry.memory), entry.manifest.sha256, MAX_MANIFEST_BYTES, bytes
        )
        self.store.follow(check_sha256(entry.manifest.sha256, data))
        return True


async def serving(
    stack: contextlib.AsyncExitStack, swarm: Swarm, memory: MemoryID, store: MemoryStore
) -> None:
    """Makes a peer serve and announce what is in the store."""
    servicer = MemoryServicer(
        {str(memory): store}, swarm.keys.swarm_id, swarm.host.sessions, swarm.host.upload, MemoryMetrics(), 1
    )
    stack.push_async_callback(servicer.close)
    assert swarm.host.server is not None
    memory_pb2_grpc.add_MemoryServiceServicer_to_server(servicer, swarm.host.server.services)
    record = records_pb2.NodeRecord(
        addresses=[Endpoint.of("127.0.0.1", swarm.host.port)],
        certificate=swarm.host.certificate,
        protocol_version=PROTOCOL_VERSION,
        activity=Activity.SERVING.value,
    )
    await swarm.registry.publish_node(record, LIFETIME_S)
    regions = {
        region: (ReplicaState.SERVING, [shard.root for shard in shards])
        for region, shards in store.manifest.by_region.items()
    }
    await MemoryRegistry(swarm.registry).announce(memory, regions, LIFETIME_S)
