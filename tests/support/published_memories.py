"""A real swarm whose founder publishes memories, for tests."""

from collections import Counter
from pathlib import Path
from typing import Any, Protocol

from memory_folders import SampleMemory
from real_swarm import Village, eventually

from dht.announcements import ReplicaState
from dht.library import LibraryEntry, MemoryRegistry
from dht.memory import MemoryID, MemoryManifest, Part
from dht.swarm import Swarm
from expert_server.memory.store import MemoryStore
from expert_server.node import Node

HOST: dict[str, Any] = {"experts": 0, "announce_every_s": 0.5, "memory_disk": "100MB"}


def memory_id(village: Village, memory: SampleMemory) -> MemoryID:
    """The id of a memory that the founder publishes."""
    return MemoryID.of(memory.manifest.name, village.identities[0].peer_id)


def folder(village: Village, number: int, memory: SampleMemory) -> Path:
    """The folder in which that node keeps the memory."""
    state = village.folder / village.identities[number].peer_id.to_base58()
    return state / "memory" / str(memory_id(village, memory))


async def publishing(village: Village, *memories: SampleMemory, **settings: Any) -> Node:
    """The founder, with all shards on disk, and its library."""
    for memory in memories:
        memory.write(folder(village, 0, memory))
    founder = await village.found(**HOST | settings)
    await list_memories(founder, *memories)
    return founder


class Described(Protocol):
    """A memory of either kind of samples."""

    @property
    def manifest(self) -> MemoryManifest: ...


async def list_memories(founder: Node, *memories: Described) -> None:
    await publish_library(founder.swarm, *memories)


async def publish_library(founder: Swarm, *memories: Described) -> None:
    publisher = founder.host.peer_id
    entries = []
    for memory in memories:
        data = memory.manifest.serialize()
        store = MemoryStore(Path(), data)
        entries.append(LibraryEntry.of(memory.manifest, Part(store.part.sha256, len(data)), publisher))
    await MemoryRegistry(founder.registry).publish_library(entries)


async def replicas(swarm: Swarm, memory: MemoryID, sample: Described) -> Counter[bytes]:
    """How many hosts serve each shard, as read from the DHT."""
    found = await MemoryRegistry(swarm.registry).region_hosts(memory, sample.manifest.by_region)
    hosts = [host for some in found.values() for host in some if host.state is ReplicaState.SERVING]
    roots = [shard.root for shard in sample.manifest.shards]
    return Counter({root: sum(root[:8] in host.shards for host in hosts) for root in roots})


async def until_hosted(swarm: Swarm, memory: MemoryID, least: int, sample: Described) -> None:
    async def hosted() -> bool:
        return min((await replicas(swarm, memory, sample)).values()) >= least

    await eventually(hosted)
