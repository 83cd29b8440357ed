"""Queries per second of one host of a memory, over gRPC with TLS, against FAISS without cells or network.

Both search the same vectors, each in a process of its own with a thread for each core, and they take turns. The host
looks every query up in all its shards, as FAISS does, and then in those of the eight nearest cells, as searches do.

    python -m benchmarks.memory.throughput host FOLDER
    python -m benchmarks.memory.throughput faiss FOLDER

These are the two contenders. Each prints a line when it has started, and answers each line it is sent with figures
(`benchmarks.apart`).
"""

import asyncio
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import grpc
import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from benchmarks.apart import Standby
from benchmarks.memory.built import BuiltMemory, write_memory
from benchmarks.memory.recall import K
from dht.announcements import NodeInfo
from dht.memory import MemoryManifest
from dht.uid import coordinate_of
from expert_server.memory.servicer import MemoryMetrics, MemoryServicer
from expert_server.memory.store import MemoryStore
from peer import PROTOCOL_VERSION
from peer.identity import Identity, PeerID, certificate_pem
from peer.loop import LoopThread
from peer.rates import RateLimit
from peer.rpc.calls import make_stub
from peer.rpc.channels import SERVER_OPTIONS, ChannelPool
from peer.rpc.server import server_credentials
from peer.rpc.sessions import SessionClient, Sessions, SessionServicer
from peer.transport.endpoints import Endpoint
from peer.wire import memory_pb2, memory_pb2_grpc, session_pb2, session_pb2_grpc

BATCH = 64
ASKED = 8
IN_FLIGHT = 2
"""The number of calls in flight, as from two callers, one for each core."""
_SWARM, _MEMORY = "benchmark-QmFounder", "large-QmFounder"
_LIMIT_S = 120.0
_ROUNDS = 3
Way = tuple[str, int, bool]
"""A way of measuring: its name, the number of queries in a call, and whether all shards are searched."""
WAYS: tuple[Way, ...] = (("one", 1, True), ("batch", BATCH, True), ("one_of_8_cells", 1, False))


def measure(
    memory: BuiltMemory, passages: int, texts: Sequence[str], seconds: float, folder: Path
) -> dict[str, Any]:
    """Measures in rounds of `seconds` seconds, and returns the medians. `folder`: where a memory with this many
    passages is written, each in one cell.
    """
    rows = np.random.default_rng(0).permutation(len(memory.passages))[:passages]
    vectors_ND = memory.vectors_ND[rows]
    cells_NT = memory.codebook.assign(vectors_ND, 1)
    manifest = write_memory(
        folder, memory, vectors_ND, cells_NT, lambda number: memory.passages[rows[number]]
    )
    queries_QD = memory.encoder.encode(texts)
    np.savez(folder / "vectors.npz", stored=vectors_ND, queries=queries_QD)
    requests = {way: _requests(memory, manifest, queries_QD, way) for way in WAYS}
    rates: dict[str, list[float]] = {}
    loop = LoopThread()
    with ExitStack() as stack:
        stack.callback(loop.close)
        contenders = ["host", *(["faiss"] if find_spec("faiss") else [])]
        standing = {}
        for name in contenders:
            standing[name] = Standby("benchmarks.memory.throughput", [name, str(folder)], _LIMIT_S)
            stack.callback(standing[name].close)
        calls = loop.run(_HostCalls.open(node_of(standing["host"].ask("where")), folder))
        stack.callback(lambda: loop.run(calls.close()))
        for number in range(_ROUNDS + 1):  # the first one warms up
            for way in WAYS:
                name, size, is_whole = way
                figures = {name: loop.run(calls.rate(requests[way], size, seconds), _LIMIT_S)}
                if is_whole and "faiss" in standing:
                    figures[f"faiss_{name}"] = standing["faiss"].ask(f"{size} {seconds}")["queries_per_s"]
                for key, rate in figures.items():
                    rates.setdefault(key, []).extend([rate] * (number > 0))
        memory_bytes = standing["host"].ask("memory")["bytes"]
    found: dict[str, Any] = {f"{key}_per_s": statistics.median(some) for key, some in rates.items()}
    for name, _, is_whole in WAYS:
        if is_whole and f"faiss_{name}_per_s" in found:
            found[f"{name}_vs_faiss"] = found[f"{name}_per_s"] / found[f"faiss_{name}_per_s"]
    return found | {"passages": len(vectors_ND), "host_bytes": memory_bytes}


def _requests(
    memory: BuiltMemory, manifest: MemoryManifest, queries_QD: NDArray[np.int8], way: Way
) -> list[memory_pb2.SearchRequest]:
    _, size, is_whole = way
    nearest_QA = memory.codebook.assign(queries_QD, ASKED)
    requests = []
    for begin in range(0, len(queries_QD) - size + 1, size):
        cells = {coordinate_of(int(number), manifest.grid) for number in nearest_QA[begin]}
        shards = [shard for shard in manifest.shards if is_whole or shard.cell in cells]
        requests.append(
            memory_pb2.SearchRequest(
                protocol_version=PROTOCOL_VERSION,
                swarm_id=_SWARM,
                memory=_MEMORY,
                k=K,
                vectors=queries_QD[begin : begin + size].tobytes(),
                shards=[memory_pb2.ShardQueries(root=shard.root) for shard in shards],
            )
        )
    return requests


class _HostCalls:
    """Calls to the host, in one session."""

    def __init__(
        self, channels: ChannelPool, search: Callable[[memory_pb2.SearchRequest], Awaitable[Any]]
    ) -> None:
        self._channels = channels
        self._search = search

    @classmethod
    async def open(cls, node: NodeInfo, folder: Path) -> Self:
        channels = ChannelPool()
        sessions = SessionClient(
            Identity.load_or_create(folder / "caller.key"), _SWARM, (session_pb2.RIGHT_MEMORY,)
        )
        channel = await channels.reach(node)
        metadata = await sessions.metadata(node.peer_id, channel, 10.0)
        stub = make_stub(memory_pb2_grpc.MemoryServiceStub, channel)
        return cls(channels, lambda request: stub.Search(request, timeout=60.0, metadata=metadata))

    async def rate(self, requests: Sequence[memory_pb2.SearchRequest], queries: int, seconds: float) -> float:
        """Queries per second with some calls in flight. `queries`: the number of queries in each call."""
        began, answered, coming = time.perf_counter(), 0, itertools.cycle(requests)

        async def call() -> None:
            nonlocal answered
            while time.perf_counter() - began < seconds:
                reply = await self._search(next(coming))
                assert len(reply.found) == queries
                assert not reply.missing
                answered += queries

        await asyncio.gather(*(call() for _ in range(IN_FLIGHT)))
        return answered / (time.perf_counter() - began)

    async def close(self) -> None:
        await self._channels.close()


async def serve(
    identity: Identity, sessions: Sessions, servicer: MemoryServicer
) -> tuple[grpc.aio.Server, dict[str, Any]]:
    """Starts a server of memory. Returns it, and what `node_of` reads."""
    certificate = identity.make_certificate()
    server = grpc.aio.server(options=SERVER_OPTIONS)
    session_pb2_grpc.add_SessionServiceServicer_to_server(SessionServicer(sessions), server)
    memory_pb2_grpc.add_MemoryServiceServicer_to_server(servicer, server)
    port = server.add_secure_port("127.0.0.1:0", server_credentials(identity, certificate))
    await server.start()
    return server, {"port": port, "peer_id": identity.peer_id.to_base58(), "certificate": certificate.hex()}


def node_of(said: Mapping[str, Any]) -> NodeInfo:
    """The node record in the line that a host printed."""
    peer_id = PeerID.from_base58(said["peer_id"])
    pem = certificate_pem(bytes.fromhex(said["certificate"]), peer_id)
    address = Endpoint(f"127.0.0.1:{said['port']}")
    return NodeInfo(peer_id=peer_id, addresses=(address,), certificate_pem=pem, expires_at=math.inf)


def host(folder: Path) -> None:
    """Serves all shards, and answers lines of the standard input."""
    torch.set_num_threads(1)
    before = psutil.Process().memory_info().rss
    store = MemoryStore.open(folder)
    for root in store.roots():
        store.load(root)
    identity, loop = Identity.load_or_create(folder / "host.key"), LoopThread()
    sessions = Sessions(_SWARM, identity.peer_id)
    servicer = MemoryServicer({_MEMORY: store}, _SWARM, sessions, RateLimit(None), MemoryMetrics(), IN_FLIGHT)
    server, where = loop.run(serve(identity, sessions, servicer))
    print(json.dumps(where), flush=True)
    for line in sys.stdin:
        answers = {"where": where, "memory": {"bytes": psutil.Process().memory_info().rss - before}}
        print(json.dumps(answers[line.strip()]), flush=True)
    loop.run(server.stop(None))


def faiss_flat(folder: Path) -> None:
    """Answers lines that say how many queries to search at once and for how many seconds, with the better of
    two ways.
    """
    import faiss

    with np.load(folder / "vectors.npz") as arrays:
        stored_ND, queries_QD = arrays["stored"].astype(np.float32), arrays["queries"].astype(np.float32)
    index = faiss.IndexFlatIP(stored_ND.shape[1])
    index.add(stored_ND)
    print("{}", flush=True)
    for line in sys.stdin:
        size, seconds = int(line.split()[0]), float(line.split()[1])
        rates = []
        for workers in (1, IN_FLIGHT):  # One thread that uses all cores, or one for each core.
            search = partial(_search_flat, index, queries_QD, size, seconds / 2, IN_FLIGHT // workers)
            with ThreadPoolExecutor(workers) as pool:
                running = [pool.submit(search) for _ in range(workers)]
                rates.append(sum(each.result() for each in running))
        print(json.dumps({"queries_per_s": max(rates)}), flush=True)


def _search_flat(
    index: Any, queries_QD: NDArray[np.float32], size: int, seconds: float, threads: int
) -> float:
    """Queries per second. `threads`: those that FAISS uses for calls from this thread."""
    import faiss

    faiss.omp_set_num_threads(threads)
    began, answered = time.perf_counter(), 0
    for begin in itertools.cycle(range(0, len(queries_QD) - size + 1, size)):
        index.search(queries_QD[begin : begin + size], K)
        answered += size
        if time.perf_counter() - began >= seconds:
            break
    return answered / (time.perf_counter() - began)


if __name__ == "__main__":
    {"host": host, "faiss": faiss_flat}[sys.argv[1]](Path(sys.argv[2]))
