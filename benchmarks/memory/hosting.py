"""What a memory costs its hosts in DHT calls, and how soon all shards have two replicas, in simulated swarms.

The hosts read, choose and announce with the product's code, over the real DHT code in simulated time. No shard is
transferred: each takes as long as 1 MB at 20 Mbit/s.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from itertools import cycle
from math import prod
from statistics import fmean
from typing import Any, NamedTuple
from unittest.mock import patch

from benchmarks.memory.lying import RTT_S
from benchmarks.simulated_p2p import Link, VirtualLoop, simulated_world
from benchmarks.simulated_swarm import SimulatedPeer, SimulatedSwarm
from dht.announcements import ReplicaState
from dht.library import WANTED_REPLICAS, MemoryRegistry
from dht.memory import MemoryID, MemoryManifest, Part, ShardInfo
from dht.uid import coordinate_of
from dht.upkeep import UpkeepPeriod
from expert_server.memory.hosting import MOST_TAKEN, TAKEN_AT_ONCE
from expert_server.memory.placement import MemorySurvey, Placement, SeenShard, ShardKey
from peer.errors import UnreachableError
from peer.identity import PeerID
from peer.loop import cancel_all, side_by_side

DYING_SHARE = 0.25
"""The share of the hosts that dies."""
PERIODS = 5
"""The number of periods within which all shards should have two replicas again."""
KBIT_PER_S = 20
"""What upkeep may take."""
_GRID = (16, 16)
_PERIOD_S = 10.0
"""The shortest announcement period."""
_SHARD_BYTES, _TAKING_S = 1_000_000, 0.4
_LOOK_S = 2.0
_MEASURED_S = 1800.0
_LIMIT_S = 7200.0
_MEMORY = MemoryID("simulated", 12 * "x")


class SwarmSize(NamedTuple):
    """A swarm to simulate."""

    nodes: int
    hosts: int
    """Of these nodes."""
    shards: int
    runs: int


def measure(swarms: Sequence[SwarmSize]) -> dict[str, Any]:
    """Means of all runs, by number of hosts. None: in some run, that never happened."""
    found = {}
    for size in swarms:
        runs = [_run(size, seed) for seed in range(size.runs)]
        means = {
            name: None if None in (values := [run[name] for run in runs]) else fmean(values)
            for name in runs[0]
        }
        found[str(size.hosts)] = means | {"nodes": size.nodes, "shards": size.shards, "runs": size.runs}
    return found


def _run(size: SwarmSize, seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    with simulated_world() as loop, patch("random.SystemRandom", lambda: rng):
        return loop.run_until_complete(_measure(loop, size, seed))


async def _measure(loop: VirtualLoop, size: SwarmSize, seed: int) -> dict[str, Any]:
    swarm = await SimulatedSwarm.start(loop, size.nodes, 16, Link(RTT_S), seed, with_contacts=True)
    manifest = _manifest(size.shards)
    peers = swarm.rng.sample(swarm.peers, size.hosts)
    hosting = [_Host(peer, manifest, size.nodes, random.Random(number)) for number, peer in enumerate(peers)]
    hosting[0].shards.update(manifest.by_root)  # the publisher's
    async with asyncio.TaskGroup() as group:
        tasks = {host.peer_id: group.create_task(host.run()) for host in hosting}
        hosted_s = await _until_hosted(loop, hosting)
        until_hosted = fmean(host.upkeep_bytes for host in hosting)
        await asyncio.sleep(_MEASURED_S)
        since = fmean(host.upkeep_bytes for host in hosting) - until_hosted
        figures: dict[str, Any] = {
            "regions_of_host": fmean(len(host.regions()) for host in hosting),
            "kbit_per_s": 8e-3 * since / _MEASURED_S,
            "period_s": fmean(host.period.seconds for host in hosting),
            "hosted_s": hosted_s,
            "mb_until_hosted": 1e-6 * until_hosted,
        }
        dead = {host.peer_id for host in swarm.rng.sample(hosting[1:], round(DYING_SHARE * size.hosts))}
        swarm.network.kill(dead)
        await cancel_all([tasks.pop(peer_id) for peer_id in dead])
        again_s = await _until_hosted(loop, [host for host in hosting if host.peer_id not in dead])
        await cancel_all(list(tasks.values()))
    periods = None if again_s is None else again_s / figures["period_s"]
    return figures | {"hosted_again_periods": periods}


async def _until_hosted(loop: VirtualLoop, hosts: Sequence["_Host"]) -> float | None:
    """Returns how long it took until all shards had enough replicas, in seconds; None if that was too long."""
    began = loop.time()
    while loop.time() - began < _LIMIT_S:
        replicas = Counter(root for host in hosts for root in host.shards)
        if all(replicas[root] >= WANTED_REPLICAS for root in hosts[0].manifest.by_root):
            return loop.time() - began
        await asyncio.sleep(_LOOK_S)
    return None


class _Host:
    """A host that has room for everything."""

    def __init__(self, peer: SimulatedPeer, manifest: MemoryManifest, nodes: int, rng: random.Random) -> None:
        """`nodes`: how large the swarm is, as far as the host knows."""
        self.peer_id: PeerID = peer.peer_id
        self.manifest = manifest
        self.shards = set[bytes]()
        self.period = UpkeepPeriod(_PERIOD_S, lambda: peer.registry.spent_bytes, rng)
        self._nodes = nodes
        self._registry = peer.registry
        self._memories = MemoryRegistry(peer.registry)
        self._survey = MemorySurvey(self._memories)
        self._placement = Placement(peer.peer_id, WANTED_REPLICAS)
        self._has_taken = False

    @property
    def upkeep_bytes(self) -> int:
        """The bytes of its own calls, and of as many by others: a peer answers as many as it makes, on average."""
        return 2 * self._registry.spent_bytes

    def regions(self) -> dict[int, list[bytes]]:
        """The shards that it hosts."""
        regions: dict[int, list[bytes]] = {}
        for root in self.shards:
            regions.setdefault(self.manifest.region_of[self.manifest.by_root[root]], []).append(root)
        return regions

    async def run(self) -> None:
        """Announces and takes shards until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.period.repeat(self._announce_all))
            group.create_task(self._look_around())

    async def _look_around(self) -> None:
        await self._announce_all()
        for is_between in cycle((False, True)):
            with suppress(UnreachableError):
                await self._look(is_between)
            await asyncio.sleep(self.period.drawn_s(0.5))

    async def _look(self, is_between: bool) -> None:
        manifests, lacking = {_MEMORY: self.manifest}, self._placement.lacking()
        if is_between:
            seen = await self._survey.read_again(manifests, lacking)
        else:
            is_busy, self._has_taken = self._has_taken, False
            mine = self._mine()
            seen = await self._survey.read(manifests, mine, lacking, is_busy=is_busy, is_short=False)
        self._placement.note(seen, self._mine(), is_between)
        share = self._survey.shares.get(_MEMORY, 1.0)
        wanted = self._placement.to_take({_MEMORY: share * self._nodes})
        able = [key for key in wanted if seen[key].serving]
        await side_by_side((self._take(key, seen) for key in able[:MOST_TAKEN]), TAKEN_AT_ONCE)

    async def _take(self, key: ShardKey, seen: Mapping[ShardKey, SeenShard]) -> None:
        """Takes a shard, if it still has too few replicas."""
        region = seen[key].region
        hosts = (await self._memories.region_hosts(_MEMORY, [region]))[region]
        if sum(seen[key].info.short in host.shards for host in hosts) >= WANTED_REPLICAS:
            return
        await asyncio.sleep(_TAKING_S)
        self.shards.add(key.root)
        self._has_taken = True
        await self._announce({region: self.regions()[region]})

    def _mine(self) -> Collection[ShardKey]:
        return {ShardKey(_MEMORY, root) for root in self.shards}

    async def _announce_all(self) -> None:
        await self._announce(self.regions())

    async def _announce(self, regions: Mapping[int, Collection[bytes]]) -> None:
        records = {region: (ReplicaState.SERVING, roots) for region, roots in regions.items()}
        with suppress(UnreachableError):
            await self._memories.announce(_MEMORY, records, self.period.lifetime_s)


def _manifest(shards: int) -> MemoryManifest:
    """Shards that are spread evenly over all cells."""
    cells = prod(_GRID)
    numbers = (n * max(1, cells // shards) % cells for n in range(shards))
    infos = tuple(
        ShardInfo(coordinate_of(number, _GRID), sha256(str(n).encode()).digest(), 1000, _SHARD_BYTES)
        for n, number in enumerate(numbers)
    )
    part = Part(bytes(32), 1)
    return MemoryManifest(
        name="simulated",
        revision=1,
        about="",
        created_at=0.0,
        encoder_kind="words",
        encoder=part,
        dimensions=64,
        codebook=part,
        grid=_GRID,
        licenses=(),
        shards=infos,
        revoked=frozenset(),
    )
