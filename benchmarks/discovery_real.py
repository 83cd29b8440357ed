"""Choosing experts for a batch among real peers: Talkoot's directory, and the beam search of hivemind.moe.

Both sides have the same village: one process with 16 DHT peers that announce 256 experts of a 16 × 16 grid. Each of
hivemind's peers has its own p2pd. A client in another process makes the choices; its start is not counted. hivemind's
searcher passes `num_workers` where an expiration time is expected, and fails as soon as a prefix is missing. The
benchmark corrects that. Our search ends with everything that a call needs (addresses and certificates of the nodes),
hivemind's with PeerIDs.
"""

import argparse
import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from benchmarks.apart import Child, end_in_order_when_stopped, run_apart
from benchmarks.scratch import scratch_folder
from dht.announcements import ReplicaAnnouncement, ReplicaState
from dht.beam_search import select_experts
from dht.directory import Directory
from dht.experts import ExpertRegistry
from dht.manifest import Manifest
from dht.records import RecordValidator, SwarmKeys
from dht.registry import Registry
from peer import PROTOCOL_VERSION, SOFTWARE_VERSION
from peer.host import Host, NetworkConfig
from peer.identity import Identity
from peer.loop import new_loop
from peer.transport.addresses import Multiaddress
from peer.wire import records_pb2
from trainer_client.dispatch.replicas import choose_replicas

T = TypeVar("T")

GRID = (16, 16)
BATCH = 64
TOP_K = 4
TRIES = 5
"""The number of clients that choose with empty caches, one after another. Each then chooses as often again with warm
caches.
"""
_START_LIMIT_S = 240.0
_RUN_LIMIT_S = 240.0
_LIFETIME_S = 550.0
_MANIFEST = Manifest.model_validate({"name": "benchmark", "model": {"layers": 1}, "experts": {"grid": GRID}})


def batches(seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((BATCH, size)).astype(np.float32) for size in GRID]


async def talkoot_village(folder: Path, nodes: int) -> tuple[list[Multiaddress], list[Host]]:
    """Starts the peers and announces all experts. Returns the first peer's addresses, and the peers; keep a reference
    to them, or they end.
    """
    bootstrap: list[Multiaddress] = []
    hosts = []
    for n in range(nodes):
        identity = Identity.load_or_create(folder / f"{n}.key")
        host = await Host.start(
            identity, NetworkConfig("127.0.0.1"), bootstrap=bootstrap, validator=RecordValidator()
        )
        bootstrap = bootstrap or host.bootstrap_addresses()
        hosts.append(host)
    keys = SwarmKeys("benchmark", hosts[0].peer_id)
    for n, host in enumerate(hosts):
        experts = _experts(host, keys)
        uids = _MANIFEST.uids()[n::nodes]
        await experts.announce([ReplicaAnnouncement(uid, ReplicaState.SERVING) for uid in uids], _LIFETIME_S)
        record = records_pb2.NodeRecord(
            addresses=["127.0.0.1:1"],
            certificate=host.identity.make_certificate(),
            protocol_version=PROTOCOL_VERSION,
            software_version=SOFTWARE_VERSION,
        )
        await experts.registry.publish_node(record, _LIFETIME_S)
    return bootstrap, hosts


def _experts(host: Host, keys: SwarmKeys) -> ExpertRegistry:
    return ExpertRegistry(Registry(host.dht, keys, host.identity), _MANIFEST)


async def talkoot_client(folder: Path, bootstrap: Sequence[Multiaddress]) -> dict[str, list[float]]:
    keys = SwarmKeys("benchmark", bootstrap[0].peer_id)
    cold_ms: list[float] = []
    warm_ms: list[float] = []
    for n in range(TRIES):
        identity = Identity.load_or_create(folder / f"client{n}.key")
        host = await Host.start(
            identity,
            NetworkConfig("127.0.0.1", serves_dht=False),
            bootstrap=bootstrap,
            validator=RecordValidator(),
        )
        directory = Directory(_experts(host, keys), _MANIFEST, refresh_every_s=3.0)
        rng = random.Random(n)
        for k in range(TRIES + 1):
            scores = batches(100 * n + k)
            began = time.perf_counter()
            view = await directory.refresh() if k == 0 else directory.view
            chosen = select_experts(scores, view.tables(0), TOP_K)
            uids = {tuple(c) for c in chosen.coordinates.reshape(-1, len(GRID)).tolist()}
            wanted = [uid for uid in view.replicas if uid.coordinate in uids]
            hosts = choose_replicas(wanted, view, rng)
            (warm_ms if k else cold_ms).append(1000 * (time.perf_counter() - began))
            assert chosen.valid.all()
            assert len(hosts) == len(wanted)
        await host.stop()
    return {"cold_ms": cold_ms, "warm_ms": warm_ms}


async def hivemind_village(folder: Path, nodes: int) -> tuple[list[str], list[Any]]:
    from types import SimpleNamespace

    from hivemind.dht.node import DHTNode
    from hivemind.moe.server.dht_handler import _declare_experts
    from hivemind.utils import get_dht_time

    options: dict[str, Any] = {
        "host_maddrs": ["/ip4/127.0.0.1/tcp/0"],
        "nat_port_map": False,
        "auto_nat": False,
    }
    uids = [f"expert.{i}.{j}" for i in range(GRID[0]) for j in range(GRID[1])]
    bootstrap: list[str] = []
    made = []
    for _ in range(nodes):
        node = await DHTNode.create(initial_peers=bootstrap, **options)
        bootstrap = bootstrap or [str(address) for address in await node.get_visible_maddrs()]
        made.append(node)
    for n, node in enumerate(made):
        dht = SimpleNamespace(num_workers=None, peer_id=node.peer_id)
        await _declare_experts(dht, node, uids[n::nodes], get_dht_time() + _LIFETIME_S)
    return bootstrap, made


def hivemind_client(bootstrap: Sequence[str]) -> dict[str, list[float]]:
    from hivemind import DHT

    from benchmarks.rival_search import RepairedSearcher

    cold_ms: list[float] = []
    warm_ms: list[float] = []
    for n in range(TRIES):
        dht = DHT(initial_peers=list(bootstrap), start=True, client_mode=True)
        searcher = RepairedSearcher(dht, "expert.", GRID)
        for k in range(TRIES + 1):
            scores = batches(100 * n + k)
            began = time.perf_counter()
            found = searcher.batch_find_best_experts(scores, TOP_K)
            (warm_ms if k else cold_ms).append(1000 * (time.perf_counter() - began))
            assert all(len(row) == TOP_K for row in found)
        dht.shutdown()
    return {"cold_ms": cold_ms, "warm_ms": warm_ms}


def run_pair(side: str, nodes: int) -> dict[str, list[float]]:
    """Runs a village and its client, each in a process session of its own, so that none of its processes are left
    afterwards. Raises TimeoutError if the village is not ready in time, and SystemExit if either fails.
    """
    with (
        scratch_folder() as folder,
        closing(Child(__name__, [side, "village", str(folder), str(nodes)])) as village,
    ):
        bootstrap = village.hear(_START_LIMIT_S)["bootstrap"]
        return run_apart(__name__, [side, "client", str(folder), *bootstrap], _RUN_LIMIT_S)


async def _village(side: str, folder: Path, nodes: int) -> None:
    """Starts all peers, prints the addresses of the first, and runs until it is killed."""
    make: Callable[[Path, int], Awaitable[tuple[Sequence[str], object]]]
    make = talkoot_village if side == "talkoot" else hivemind_village
    bootstrap, _peers = await make(folder, nodes)
    print(json.dumps({"bootstrap": list(map(str, bootstrap))}), flush=True)
    await asyncio.Event().wait()


def _run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine on the event loop that Talkoot's processes use."""
    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(coroutine)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="one part of the comparison; benchmarks.discovery starts them"
    )
    parser.add_argument("side", choices=["talkoot", "hivemind"])
    parser.add_argument("part", choices=["village", "client"])
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "rest", nargs="+", help="of a village, its peers; of a client, the addresses to join by"
    )
    options = parser.parse_args()
    end_in_order_when_stopped()
    if options.part == "village":
        _run(_village(options.side, options.folder, int(options.rest[0])))
        return
    if options.side == "talkoot":
        result = _run(talkoot_client(options.folder, [*map(Multiaddress, options.rest)]))
    else:
        result = hivemind_client(options.rest)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
