"""`MemoryHosting`: a node takes shards of memories that have too few replicas, and drops those that others serve.

What hosts and publishers say is believed only if hashes prove it. The publishers' lists are read in every announcement
period, independently of downloads, so that revoked passages disappear soon.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from weakref import WeakSet

from prometheus_client import CollectorRegistry, Counter, Gauge

from dht.announcements import Activity, NodeInfo
from dht.library import WANTED_REPLICAS, MemoryRegistry
from dht.memory import MemoryID, MemoryManifest
from dht.registry import some_of
from dht.swarm import Swarm, some_nodes
from dht.upkeep import UpkeepPeriod
from expert_server.memory.fetching import PartFetcher
from expert_server.memory.following import HostingRules, PublisherFollower
from expert_server.memory.hosted import HostedMemories
from expert_server.memory.placement import MemorySurvey, Placement, SeenShard, ShardKey, seen_shards
from expert_server.memory.proofs import ReplicaProofs, believed
from expert_server.memory.shard import most_bytes
from expert_server.memory.store import MemoryStore, parts_bytes
from peer.bounded import BoundedDict
from peer.errors import TransferError, UnreachableError, WireError
from peer.formatting import counted
from peer.identity import PeerID
from peer.kademlia.routing import BUCKET_SIZE
from peer.loop import first_of, side_by_side
from peer.metrics import start_at_zero
from peer.rates import RateLimit
from peer.rpc.parts import PartClient, check_sha256
from peer.wire import session_pb2

logger: logging.Logger = logging.getLogger(__name__)

MOST_TAKEN, TAKEN_AT_ONCE = 64, 3
"""The most shards taken in one look, and at the same time."""
_BEGIN_WITHIN_S = 60.0
"""A look begins no download later than this. Silent hosts can make a download of each of their shards take minutes."""
_LOOK_EVERY_S = 1.0
"""How often a leaving node checks whether others have the shards that only it had."""
_MOST_READ, _MOST_WATCHED = 512, 8
"""How many other nodes a leaving node reads, and how many of those that stay it watches."""
_WITHDRAW_S = 2.0
"""How long a leaving node tries to withdraw its announcements."""
_REMEMBERED = 4096
_CHANNELS = 64


class HostingMetrics:
    """What a node counts about the memories it hosts."""

    def __init__(self, hosted: HostedMemories, metrics: CollectorRegistry | None = None) -> None:
        shards = Gauge("talkoot_memory_shards", "Shards of memories served.", registry=metrics)
        shards.set_function(lambda: hosted.shards)
        size = Gauge("talkoot_memory_disk_bytes", "Bytes of memories on disk.", registry=metrics)
        size.set_function(lambda: hosted.disk_bytes)
        fetches = Counter(
            "talkoot_memory_fetches",
            "Shards of memories fetched from other hosts, by outcome.",
            ["outcome"],
            registry=metrics,
        )
        # "failed": no host gave the right bytes; "wrong": one gave others
        self.fetches: Counter = start_at_zero(fetches, "fetched", "failed", "wrong")
        self.revisions: Counter = Counter(
            "talkoot_memory_revisions", "Later revisions of memories followed.", registry=metrics
        )


class MemoryHosting:
    """The memories of one node. Open it, then run its loops; release it before the node leaves, and close it."""

    def __init__(
        self,
        folder: Path,
        rules: HostingRules,
        swarm: Swarm,
        down: RateLimit,
        period: UpkeepPeriod,
        count_received: Callable[[int], None],
    ) -> None:
        """`folder`: contains a folder for each memory. `down`: limits the download of parts. `period`: of
        announcements. `count_received`: called with the number of bytes of parts that others gave.
        """
        self._rules = rules
        self._swarm = swarm
        self._memories = memories = MemoryRegistry(swarm.registry)
        self._rng = random.SystemRandom()
        self._placement = Placement(swarm.host.peer_id, WANTED_REPLICAS)
        self.hosted: HostedMemories = HostedMemories(
            folder, rules.disk_bytes, memories, period, self._placement.forget
        )
        self._metrics = HostingMetrics(self.hosted, swarm.metrics)
        sessions, channels = swarm.session_client(session_pb2.RIGHT_MEMORY), swarm.host.channels(_CHANNELS)
        self._parts = PartClient(swarm.keys.swarm_id, sessions, channels, down, count=count_received)
        self._fetcher = PartFetcher(swarm, self._parts, period)
        self.publishers: PublisherFollower = PublisherFollower(
            self.hosted, rules, swarm, memories, self._fetcher, self._metrics.revisions.inc
        )
        self.seen: Mapping[ShardKey, SeenShard] = {}
        """The shards in the regions that the last look read."""
        self._survey = MemorySurvey(memories)
        self._proofs = ReplicaProofs(swarm, self._parts, self.hosted.revoked)
        self._completing = BoundedDict[MemoryID, asyncio.Lock](_REMEMBERED)
        self._complete = WeakSet[MemoryStore]()
        """Stores that have their encoder and codebook."""
        self._has_taken = False
        """Whether shards were taken since the last look."""
        self._is_short = False
        """Whether there was no room for a shard at the last look."""
        self._hurried = asyncio.Event()

    async def open(self) -> None:
        """Finds what the last run left on disk. Nothing is served before `hosted.verify`."""
        if self._rules.disk_bytes:
            await self.hosted.open()

    def resume(self) -> None:
        """Serves what is hosted, and takes more."""
        self._hurried.clear()
        self.hosted.resume()

    async def look(self) -> None:
        """Takes shards that have too few replicas, as far as there is room. Raises UnreachableError."""
        if not self._takes:
            return
        await self.publishers.meet()
        is_busy, self._has_taken = self._has_taken, False
        seen = await self._survey.read(
            self._manifests(),
            self.hosted.mine(),
            await asyncio.to_thread(self._placement.lacking),
            is_busy=is_busy,
            is_short=self._is_short or self.hosted.room < 0,
        )
        await self._proofs.check_some(seen)
        self.seen = seen = await self._note(seen)
        await self._shrink(-self.hosted.room, seen)
        await self._take_some(seen)

    async def look_again(self) -> None:
        """Between two looks, takes more of those shards that had too few replicas. Raises UnreachableError."""
        if not self._takes:
            return
        lacking = await asyncio.to_thread(self._placement.lacking)
        if lacking:
            seen = await self._survey.read_again(self._manifests(), lacking)
            await self._take_some(await self._note(seen, is_between=True))

    @property
    def _takes(self) -> bool:
        """Whether this node may host more."""
        hosted = self.hosted
        return bool(self._rules.disk_bytes) and not (hosted.leaving or hosted.unverified or hosted.is_full)

    def _manifests(self) -> dict[MemoryID, MemoryManifest]:
        return {memory: store.manifest for memory, store in self.hosted.stores.items()}

    async def _note(
        self, seen: Mapping[ShardKey, SeenShard], is_between: bool = False
    ) -> dict[ShardKey, SeenShard]:
        """Records what a look saw, without the announcements of doubted hosts."""
        counted_on = await asyncio.to_thread(believed, seen, self._proofs.doubted())
        await asyncio.to_thread(self._placement.note, counted_on, self.hosted.mine(), is_between)
        return counted_on

    async def _take_some(self, seen: Mapping[ShardKey, SeenShard]) -> None:
        able = {memory for memory in self.publishers.listed if not self._fetcher.is_put_off(memory)}
        wanted = [
            key
            for key in await asyncio.to_thread(self._placement.to_take, self._lookers())
            if key.memory in able and (seen[key].serving or seen[key].leaving)  # otherwise nobody can give it
        ]
        fitting = self._fitting(wanted, seen)
        if wanted and len(fitting) < len(wanted):
            fit = set(fitting)
            await self._make_room(seen, [key for key in wanted if key not in fit])
            fitting = self._fitting(wanted, seen)
        self._is_short = len(fitting) < len(wanted)
        until = time.monotonic() + _BEGIN_WITHIN_S
        before = {memory: len(store.shards) for memory, store in self.hosted.stores.items()}
        await side_by_side(
            (self._take(key, seen[key].region, until) for key in fitting[:MOST_TAKEN]), TAKEN_AT_ONCE
        )
        for memory, store in self.hosted.stores.items():
            if (taken := len(store.shards) - before.get(memory, 0)) > 0:
                logger.info(
                    "took %s of memory %s, and serves %d of %d",
                    counted(taken, "shard"),
                    memory,
                    len(store.shards),
                    len(store.manifest.shards),
                )

    def _lookers(self) -> dict[MemoryID, float]:
        """About how many nodes look at each shard of a memory in a period, if others read as many regions."""
        nodes = 1.0 + len(self._swarm.host.peers())
        if nodes > BUCKET_SIZE:  # otherwise the routing table has all
            nodes = max(nodes, self._swarm.registry.lookups.estimated_nodes)
        return {memory: nodes * share for memory, share in self._survey.shares.items()}

    async def release(self, timeout_s: float) -> int:
        """Stops serving once others have the shards that only this node has, or after `timeout_s`.

        Files stay on disk. Returns how many shards nobody else serves, as far as this node has seen. Raises nothing if
        the DHT does not answer.
        """
        self.hosted.leaving = True
        mine = self.hosted.mine()
        alone = set(mine)
        has_looked = bool(timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                await first_of(self._hand_over(alone), self._hurried.wait())
        except TimeoutError:
            pass
        except UnreachableError:
            has_looked = False
        if mine:
            shards = counted(len(mine), "shard")
            others = "they stay on disk"
            if has_looked:
                others = f"nobody else serves {len(alone)} of them" if alone else "others serve them all"
            logger.info("stopped serving %s of memories; %s", shards, others)
        self.hosted.served.clear()
        with suppress(TimeoutError, UnreachableError):  # or the announcements expire
            async with asyncio.timeout(_WITHDRAW_S):
                await self.hosted.announce_all()
        return len(alone)

    def hurry(self) -> None:
        """Ends the wait of `release`."""
        self._hurried.set()

    async def close(self) -> None:
        """Ends the calls to other hosts."""
        await self.publishers.close()
        await self._parts.close()

    # taking

    def _fitting(self, wanted: Iterable[ShardKey], seen: Mapping[ShardKey, SeenShard]) -> list[ShardKey]:
        """The shards for which there is room, in their order."""
        room, fitting, stores = self.hosted.room, [], self.hosted.stores
        begun = {memory for memory, store in stores.items() if store.shards}
        for key in wanted:
            size = most_bytes(seen[key].info)
            if key.memory not in begun and (store := stores.get(key.memory)) is not None:
                size += parts_bytes(store.manifest)
            if size <= room:
                room -= size
                fitting.append(key)
                begun.add(key.memory)
        return fitting

    async def _take(self, key: ShardKey, region: int, until: float) -> None:
        """Fetches a shard, if it still has too few replicas. If that fails, the other shards' downloads go on.

        `until`: when it is too late to begin, on the monotonic clock.
        """
        hosted, store = self.hosted, self.hosted.stores.get(key.memory)
        if (
            time.monotonic() > until
            or hosted.leaving
            or store is None
            or hosted.is_full
            or self._fetcher.is_put_off(key.memory)
        ):
            return
        verified, wrong = partial(store.verified, key.root), self._metrics.fetches.labels("wrong").inc
        try:
            shard = await self._seen_now(key, region)
            if shard is None or len(shard.serving) >= WANTED_REPLICAS or key.root in store.shards:
                return
            hosts = shard.serving | shard.leaving
            await self._complete_store(key.memory, store, hosts)
            data = await self._fetcher.fetch(
                key.memory, hosts, key.root, most_bytes(shard.info), verified, wrong
            )
            await hosted.write(key.memory, store, partial(store.save, key.root, data))
        except (TransferError, UnreachableError, WireError) as error:
            self._metrics.fetches.labels("failed").inc()
            logger.info("shard %s was not taken: %s", key, error)
        except OSError as error:
            hosted.note_full(error)
        else:
            self._has_taken = True
            self._metrics.fetches.labels("fetched").inc()
            with suppress(UnreachableError):  # or the next round announces it
                await hosted.announce(key.memory, {region})

    async def _complete_store(self, memory: MemoryID, store: MemoryStore, hosts: Collection[PeerID]) -> None:
        """Fetches the encoder and the codebook, which every host keeps. Raises TransferError, WireError and OSError."""
        async with self._completing.setdefault(memory, asyncio.Lock()):
            if store in self._complete:
                return
            if self._fetcher.is_put_off(memory):
                raise TransferError("its encoder or codebook did not arrive")
            for part in await asyncio.to_thread(store.missing_parts):
                check = partial(check_sha256, part.sha256)
                try:
                    data = await self._fetcher.fetch(memory, hosts, part.sha256, part.size, check)
                except TransferError:
                    self._fetcher.put_off(memory)
                    raise
                await self.hosted.write(memory, store, partial(store.save_part, part, data))
            self._complete.add(store)
            self._fetcher.was_complete(memory)

    async def _seen_now(self, key: ShardKey, region: int) -> SeenShard | None:
        """None if the shard is no longer in that region."""
        hosts = await self._memories.region_hosts(key.memory, [region])
        store = self.hosted.stores.get(key.memory)
        shards = () if store is None else store.manifest.by_region.get(region, ())
        # without the region's other shards: strangers may announce all of them, and each look takes many shards
        wanted = [info for info in shards if info.root == key.root]
        seen = seen_shards(key.memory, region, wanted, hosts[region])
        return believed(seen, self._proofs.doubted()).get(key)

    # dropping

    async def _make_room(self, seen: Mapping[ShardKey, SeenShard], wanted: Collection[ShardKey]) -> None:
        """Makes room for a shard that nobody else has room for. Drops memories that nobody lists, or shards that enough
        others serve.
        """
        smallest = min(most_bytes(seen[key].info) for key in wanted)
        await self.publishers.drop_unlisted(smallest)
        await self._shrink(smallest - self.hosted.room, seen)

    async def _shrink(self, size: int, seen: Mapping[ShardKey, SeenShard]) -> None:
        """Drops shards of this size in total, or as much of it as possible now, if enough others prove that they have
        them.
        """
        for key in self._placement.to_drop(size) if size > 0 else ():
            store = self.hosted.stores.get(key.memory)
            if store is None or key.root not in store.shards:
                continue
            keener = self._placement.keener(key)[: 2 * WANTED_REPLICAS]
            proven = await self._proofs.proven([(peer_id, key) for peer_id in keener], seen)
            if len(proven) < WANTED_REPLICAS:
                continue
            with suppress(TransferError):
                await self.hosted.write(key.memory, store, partial(store.drop, key.root))
                logger.info("dropped shard %s, which %s serve", key, counted(len(proven), "other node"))
                await self.hosted.announce(key.memory, {seen[key].region})

    # leaving

    async def _hand_over(self, alone: set[ShardKey]) -> None:
        """Returns when others serve all of these shards, or when all other nodes are leaving too. Shards that others
        serve are removed from the set.
        """
        await self.hosted.announce_all()
        staying = frozenset[PeerID]()
        while True:
            alone &= await self._without_other_host(alone)
            if not alone or not (staying := await self._staying(staying)):
                return
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _staying(self, before: frozenset[PeerID]) -> frozenset[PeerID]:
        """Some nodes that stay, and so may take shards. `before`: what the last look returned. Others are looked
        up only once these have gone.
        """
        if before and (found := _serving(await self._swarm.registry.nodes(before))):
            return found
        return frozenset(some_of(_serving(await some_nodes(self._swarm, _MOST_READ)), _MOST_WATCHED))

    async def _without_other_host(self, keys: Collection[ShardKey]) -> set[ShardKey]:
        alone, regions = set[ShardKey](), dict[MemoryID, set[int]]()
        # the current ones, because publishers may change or unlist them meanwhile
        manifests = self._manifests()
        for key in set(keys) & self.hosted.mine():
            if (info := manifests[key.memory].by_root.get(key.root)) is not None:
                alone.add(key)
                regions.setdefault(key.memory, set()).add(manifests[key.memory].region_of[info])
        for memory, some in regions.items():
            by_region = manifests[memory].by_region
            for region, hosts in (await self._memories.region_hosts(memory, some)).items():
                mine = [info for info in by_region[region] if ShardKey(memory, info.root) in alone]
                saying = partial(seen_shards, memory, region, mine, hosts)
                seen, claims = await asyncio.to_thread(self._claims_of_others, saying, self._proofs.doubted())
                alone -= {key for _, key in await self._proofs.proven(claims, seen)}
        return alone

    def _claims_of_others(
        self, announced: Callable[[], Mapping[ShardKey, SeenShard]], doubted: Collection[PeerID]
    ) -> tuple[dict[ShardKey, SeenShard], list[tuple[PeerID, ShardKey]]]:
        """For each of these shards, a random other host that says it serves it. Slow if many strangers do."""
        seen = believed(announced(), doubted)
        others = {key: list(shard.serving - {self._swarm.host.peer_id}) for key, shard in seen.items()}
        return seen, [(self._rng.choice(peers), key) for key, peers in others.items() if peers]


def _serving(nodes: Mapping[PeerID, NodeInfo]) -> frozenset[PeerID]:
    return frozenset(peer_id for peer_id, node in nodes.items() if node.activity is Activity.SERVING)
