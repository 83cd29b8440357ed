"""Hosts of a memory in a process of their own: the node's service over gRPC with TLS, after a round trip's wait.

    python -m benchmarks.retro.hosts FOLDER

This prints where the hosts listen, and answers the line `cpu` with its CPU seconds so far (`benchmarks.apart`).
"""

import asyncio
import json
import random
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import grpc
import torch

from benchmarks.memory.lying import REPLICAS, SWARM
from benchmarks.memory.throughput import serve
from dht.memory import MemoryID
from expert_server.memory.servicer import MemoryMetrics, MemoryServicer, ReadContext, SearchContext
from expert_server.memory.store import MemoryStore
from peer.identity import Identity
from peer.loop import LoopThread
from peer.rates import RateLimit
from peer.rpc.sessions import Sessions
from peer.wire import memory_pb2

HOSTS = 8
LIARS = HOSTS // 4
RTT_S = 0.08


def placed(roots: Iterable[bytes]) -> list[set[bytes]]:
    """The shards of each host. Each shard is at two hosts. The last hosts are those that may lie."""
    rng, found = random.Random(0), [set[bytes]() for _ in range(HOSTS)]
    for root in roots:
        # Each shard has an honest host: nothing could expose liars if they had all its replicas.
        first = rng.randrange(HOSTS - LIARS)
        others = rng.sample([n for n in range(HOSTS) if n != first], REPLICAS - 1)
        for number in (first, *others):
            found[number].add(root)
    return found


class DistantServicer(MemoryServicer):
    """A servicer whose calls take a round trip."""

    async def Search(
        self, request: memory_pb2.SearchRequest, context: SearchContext
    ) -> memory_pb2.SearchReply:
        await asyncio.sleep(RTT_S)
        return await super().Search(request, context)

    async def Read(self, request: memory_pb2.ReadRequest, context: ReadContext) -> memory_pb2.ReadReply:
        await asyncio.sleep(RTT_S)
        return await super().Read(request, context)


async def _serve(
    folder: Path, number: int, roots: set[bytes], first: Identity
) -> tuple[grpc.aio.Server, dict[str, Any]]:
    """Starts a server. Returns it, and where it listens. `first`: the host that the memory is named after."""
    identity = Identity.load_or_create(folder / f"host-{number}.key") if number else first
    sessions = Sessions(SWARM, identity.peer_id)
    store = MemoryStore.open(folder)
    for root in roots:
        store.load(root)
    memory = str(MemoryID.of(store.manifest.name, first.peer_id))
    servicer = DistantServicer({memory: store}, SWARM, sessions, RateLimit(None), MemoryMetrics(), 1)
    return await serve(identity, sessions, servicer)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    loop = LoopThread()
    roots = [shard.root for shard in MemoryStore.open(folder).manifest.shards]
    first = Identity.load_or_create(folder / "host-0.key")
    servers = [loop.run(_serve(folder, number, some, first)) for number, some in enumerate(placed(roots))]
    where = {"hosts": [place for _, place in servers]}
    print(json.dumps(where), flush=True)
    for line in sys.stdin:
        answers = {"where": where, "cpu": {"seconds": time.process_time()}}
        print(json.dumps(answers[line.strip()]), flush=True)
    for server, _ in servers:
        loop.run(server.stop(None))
    loop.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
