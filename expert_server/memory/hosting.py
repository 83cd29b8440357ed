"""`MemoryHosting`: a node takes shards of memories, verifies, serves and announces them, and follows their publishers.

Revisions are looked for in every announcement period, apart from downloads, so that what was revoked goes soon. Shards
that have too few replicas are taken from any host that has them. Nothing that a host or a publisher says is believed
but what hashes prove.
"""

import asyncio
import errno
import logging
import math
import random
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge

from dht.announcements import NodeInfo, ReplicaState
from dht.library import WANTED_REPLICAS, LibraryEntry, MemoryRegistry
from dht.memory import Cell, MemoryID, MemoryManifest, Part, Place
from dht.swarm import Swarm
from dht.upkeep import UpkeepPeriod
from expert_server.memory.placement import MemorySurvey, Placement, SeenShard, ShardKey, seen_shards
from expert_server.memory.proofs import ReplicaProofs
from expert_server.memory.shard import most_bytes
from expert_server.memory.store import MemoryStore, parts_bytes
from expert_server.settings import NodeSettings
from peer.bounded import BoundedDict
from peer.errors import TransferError, UnreachableError, WireError
from peer.files import PlainFile, write_atomically
from peer.formatting import bytes_in_words, counted
from peer.identity import PeerID
from peer.loop import first_of, side_by_side, tolerating
from peer.metrics import start_at_zero
from peer.rpc.parts import PartClient, has_sha256

logger = logging.getLogger(__name__)

_MOST_MEMORIES = 64
"""That a node follows. Of more, each follows others."""
_MOST_TAKEN, _TAKEN_AT_ONCE = 64, 3
"""Shards in one look, and at the same time."""
_FULL_PAUSE_S = 600.0
"""How long a node takes nothing after its disk was full."""
_MANIFEST_S = 60.0
"""Longest that a manifest is waited for: those of other memories wait meanwhile."""
_FOLLOWED_AT_ONCE = 8
_PUT_OFF_S = 600.0
"""Longest that a memory is left alone whose parts did not come."""
_UNLISTED_S = 3600.0
"""How long a memory is kept for certain that nobody lists: the DHT may fail for a while."""
_KEEP_EVERY_S = 3600.0
"""How often the libraries are stored again."""
_LOOK_EVERY_S = 1.0
"""How often a node that leaves looks whether others have what it alone had."""
_WITHDRAW_S = 2.0
"""Longest that a node which leaves tries to withdraw its announcements."""
_REMEMBERED = 4096
_LIBRARIES = "libraries"
"""The file with what publishers list, beside the folders of the memories. No memory is called that."""


@dataclass(frozen=True)
class HostingRules:
    """What an owner lets a node host."""

    disk_bytes: int
    """0: nothing."""
    refuse: frozenset[str] = frozenset()
    """Memories, by name or id."""
    licenses: frozenset[str] = frozenset()
    """If any, the only ones of which passages may be hosted."""

    @classmethod
    def of(cls, settings: NodeSettings) -> "HostingRules":
        return cls(
            settings.memory_disk, frozenset(settings.memory_refuse), frozenset(settings.memory_licenses)
        )

    def refusal(self, memory: MemoryID, licenses: Iterable[str]) -> str:
        """Why it is not hosted, in words; else empty."""
        if {memory.name, str(memory)} & self.refuse:
            return "this node refuses it by name"
        if self.licenses and (others := sorted(set(licenses) - self.licenses)):
            return f"this node does not host passages under {', '.join(others[:3])}"
        return ""


class HostingMetrics:
    """What a node counts of what it hosts."""

    def __init__(self, hosting: "MemoryHosting", metrics: CollectorRegistry | None = None) -> None:
        shards = Gauge("talkoot_memory_shards", "Shards of memories served.", registry=metrics)
        shards.set_function(lambda: hosting.shards)
        size = Gauge("talkoot_memory_disk_bytes", "Bytes of memories on disk.", registry=metrics)
        size.set_function(lambda: hosting.disk_bytes)
        fetches = Counter(
            "talkoot_memory_fetches",
            "Shards of memories fetched from other hosts, by outcome.",
            ["outcome"],
            registry=metrics,
        )
        # "failed": no host gave the right bytes; "wrong": one gave others
        self.fetches = start_at_zero(fetches, "fetched", "failed", "wrong")
        self.revisions = Counter(
            "talkoot_memory_revisions", "Later revisions of memories followed.", registry=metrics
        )


class MemoryHosting:
    """The memories of one node. Open it, then run its loops; release it before the node goes."""

    def __init__(
        self,
        folder: Path,
        rules: HostingRules,
        swarm: Swarm,
        parts: PartClient,
        *,
        period: UpkeepPeriod,
        metrics: CollectorRegistry | None = None,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`folder`: has a folder for each memory. `parts`: fetches from others. `period`: of announcements."""
        self.served: dict[str, MemoryStore] = {}
        """What the service answers from, by memory."""
        self._folder = folder
        self._rules = rules
        self._swarm = swarm
        self._peer_id = swarm.host.peer_id
        self._memories = memories = MemoryRegistry(swarm.registry)
        self._parts = parts
        self._period = period
        self._rng = rng or random.SystemRandom()
        self._clock = clock
        self._stores: dict[MemoryID, MemoryStore] = {}
        self._unverified: dict[MemoryID, list[bytes]] = {}
        """Shards found on disk at the start."""
        self._listed: dict[MemoryID, LibraryEntry] = {}
        """What publishers offered at the last look, and this node may host."""
        self._refused: dict[MemoryID, Part] = {}
        """What this node may not host, by the manifest that says so."""
        self._announced: dict[MemoryID, set[Cell]] = {}
        self._survey = MemorySurvey(memories, rng)
        self._proofs = ReplicaProofs(swarm, parts, self._revoked, rng, clock)
        self._placement = Placement(self._peer_id, WANTED_REPLICAS)
        self._wrong = BoundedDict[tuple[PeerID, bytes], None](_REMEMBERED)
        """Who gave wrong bytes for what."""
        self._writing = asyncio.Lock()
        """Held while a store changes its files. Not while others are waited for."""
        self._completing = BoundedDict[MemoryID, asyncio.Lock](_REMEMBERED)
        self._put_off = BoundedDict[MemoryID, tuple[float, float]](_REMEMBERED)
        """Until when memories are left alone whose manifest, encoder or codebook did not come, and for how long."""
        self._unlisted: dict[MemoryID, float] = {}
        """Since when memories that are hosted here are in nobody's list."""
        self._complete_memories: set[MemoryID] = set()
        """Those whose encoder and codebook are here."""
        self._full_until = 0.0
        self._kept_at: float | None = None
        self._saved_libraries = b""
        self._leaving = True
        self._hurried = asyncio.Event()
        self._metrics = HostingMetrics(self, metrics)

    @property
    def shards(self) -> int:
        return sum(len(store.shards) for store in self.served.values())

    @property
    def disk_bytes(self) -> int:
        return sum(store.nbytes for store in self._stores.values())

    async def open(self) -> None:
        """Finds what is on disk from the last run. Nothing is served before it was verified: see `verify`."""
        if not self._rules.disk_bytes:
            return
        self._memories.restore(await asyncio.to_thread(self._read_libraries))
        found = await asyncio.to_thread(self._found)
        self._stores = {memory: store for memory, (store, _) in found.items()}
        self._unverified = {memory: roots for memory, (_, roots) in found.items()}

    async def verify(self) -> None:
        """Verifies what is on disk and serves it, shard by shard."""
        for memory, roots in list(self._unverified.items()):
            store = self._stores.get(memory)
            while roots and store is not None:
                root = roots.pop()
                async with self._writing:
                    if root not in store.manifest.by_root or self._stores.get(memory) is not store:
                        continue
                    try:
                        await asyncio.to_thread(store.load, root)
                    except (WireError, OSError) as error:
                        with suppress(OSError):
                            await asyncio.to_thread(store.drop, root)
                        logger.warning(
                            "shard %s on disk is not used, and will be fetched again: %s",
                            ShardKey(memory, root),
                            error,
                        )
            self._unverified.pop(memory, None)

    def resume(self) -> None:
        """Serves what is hosted, and takes more."""
        self._leaving = False
        self._hurried.clear()
        self.served.update({str(memory): store for memory, store in self._stores.items()})

    async def announce(self) -> None:
        """Renews the announcements of all cells. Raises UnreachableError."""
        for memory in {*self._stores, *self._announced}:
            await self._announce(memory)

    async def follow(self) -> None:
        """Follows what publishers list: their later revisions, and what they no longer list. Raises UnreachableError.

        The founder's node reads the lists in any case, to renew its own.
        """
        if not self._rules.disk_bytes and self._peer_id != self._swarm.keys.author:
            return
        libraries = await self._memories.libraries()
        await self._save_libraries()
        listed = {entry.memory: entry for entries in libraries.values() for entry in entries}
        self._refused = {memory: part for memory, part in self._refused.items() if memory in listed}
        for entry in listed.values():
            # a list names few licences, and the manifest all of them
            if self._refused.get(entry.memory) != entry.manifest:
                await self._refuses(entry, entry.licenses)
        self._listed = {memory: entry for memory, entry in listed.items() if memory not in self._refused}
        for memory in list(self._stores):
            if memory not in listed and any(MemoryID.of(memory.name, p) == memory for p in libraries):
                logger.info("no longer hosts memory %s: its publisher no longer lists it", memory)
                await self._remove(memory)
        latest = [
            (store, self._listed[memory]) for memory, store in self._stores.items() if memory in self._listed
        ]
        due = [(store, entry) for store, entry in latest if entry.revision > store.manifest.revision]
        await side_by_side((self._follow(store, entry) for store, entry in due), _FOLLOWED_AT_ONCE)
        now = self._clock()
        self._unlisted = {
            memory: self._unlisted.get(memory, now) for memory in self._stores if memory not in listed
        }
        if listed and (self._kept_at is None or now >= self._kept_at + _KEEP_EVERY_S):
            self._kept_at = now
            await self._memories.keep_libraries()

    async def look(self) -> None:
        """Takes shards that have too few replicas, as far as there is room. Raises UnreachableError."""
        if (
            self._leaving
            or not self._rules.disk_bytes
            or self._unverified
            or self._clock() < self._full_until
        ):
            return
        await self._meet()
        manifests = {memory: store.manifest for memory, store in self._stores.items()}
        seen = await self._survey.read(manifests, self._mine())
        await self._proofs.check_some(seen)
        seen = await asyncio.to_thread(self._proofs.counted, seen)
        await asyncio.to_thread(self._placement.note, seen, self._mine())
        await self._shrink(self.disk_bytes - self._rules.disk_bytes, seen)
        nodes = len(self._swarm.host.peers()) + 1
        able = {memory for memory in self._listed if not self._is_put_off(memory)}
        wanted = [
            key
            for key in await asyncio.to_thread(self._placement.to_take, nodes)
            if key.memory in able and seen[key].serving | seen[key].leaving  # else nobody can give it
        ]
        fitting = self._fitting(wanted, seen)
        if wanted and len(fitting) < len(wanted):
            fit = set(fitting)
            await self._make_room(seen, [key for key in wanted if key not in fit])
            fitting = self._fitting(wanted, seen)
        await side_by_side(
            (self._take(key, seen[key].info.cell) for key in fitting[:_MOST_TAKEN]), _TAKEN_AT_ONCE
        )

    async def release(self, timeout_s: float) -> int:
        """Serves nothing any more, once others have what this node alone has, but after `timeout_s` at the latest.

        Files stay on disk. Returns how many shards nobody else serves. Raises nothing if the DHT does not answer.
        """
        self._leaving = True
        mine = self._mine()
        alone = set(mine)
        with suppress(TimeoutError, UnreachableError):
            async with asyncio.timeout(timeout_s):
                await first_of(self._hand_over(alone), self._until_hurried())
        if mine:
            logger.info(
                "stopped serving %s of memories; nobody else serves %d of them",
                counted(len(mine), "shard"),
                len(alone),
            )
        self.served.clear()
        with suppress(TimeoutError, UnreachableError):  # or they expire
            async with asyncio.timeout(_WITHDRAW_S):
                await self.announce()
        return len(alone)

    def hurry(self) -> None:
        """Ends the wait of `release`."""
        self._hurried.set()

    # what is hosted

    def _found(self) -> dict[MemoryID, tuple[MemoryStore, list[bytes]]]:
        """What is on disk of each memory, with the roots of its shards."""
        found = {}
        for path in sorted(self._folder.iterdir()) if self._folder.is_dir() else ():
            if path.name == _LIBRARIES:
                continue
            try:
                memory, store = MemoryID.parse(path.name), MemoryStore.open(path)
                found[memory] = store, store.roots()
            except (WireError, OSError) as error:
                logger.warning("%s is not used: %s", path, error)
        return found

    def _read_libraries(self) -> bytes:
        """What publishers listed in the last run."""
        try:
            return PlainFile(self._folder / _LIBRARIES)[:]
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                logger.warning("%s is not used: %s", self._folder / _LIBRARIES, error.strerror)
            return b""

    async def _save_libraries(self) -> None:
        """Or after a restart, an older list that somebody stored again would be believed."""
        async with self._writing:
            data = self._memories.saved()
            if data != self._saved_libraries and self._stores:
                try:
                    await asyncio.to_thread(write_atomically, self._folder / _LIBRARIES, data)
                except OSError as error:
                    self._note_full(error)
                else:
                    self._saved_libraries = data

    def _mine(self) -> set[ShardKey]:
        return {ShardKey(memory, root) for memory, store in self._stores.items() for root in store.shards}

    def _revoked(self, memory: MemoryID) -> Collection[Place]:
        store = self._stores.get(memory)
        return () if store is None else store.manifest.revoked

    async def _announce(self, memory: MemoryID) -> None:
        cells: dict[Cell, list[bytes]] = {}
        if (store := self.served.get(str(memory))) is not None:
            for root in store.shards:
                cells.setdefault(store.manifest.by_root[root].cell, []).append(root)
        state = ReplicaState.LEAVING if self._leaving else ReplicaState.SERVING
        records: dict[Cell, tuple[ReplicaState, Collection[bytes]]] = {
            cell: (state, roots) for cell, roots in cells.items()
        }
        for cell in self._announced.get(memory, set()) - cells.keys():
            records[cell] = ReplicaState.WITHDRAWN, ()
        if records:
            await self._memories.announce(memory, records, self._period.lifetime_s)
        self._announced[memory] = set(cells)
        if not cells:
            del self._announced[memory]

    # following

    async def _refuses(self, entry: LibraryEntry, licenses: Collection[str]) -> bool:
        """Whether this node may not host the memory. Then it is removed."""
        memory, reason = entry.memory, self._rules.refusal(entry.memory, licenses)
        if not reason:
            self._refused.pop(memory, None)
            return False
        if memory not in self._refused:
            logger.info("does not host memory %s: %s", memory, reason)
        self._refused[memory] = entry.manifest
        if memory in self._stores:
            await self._remove(memory)
        return True

    async def _remove(self, memory: MemoryID) -> None:
        async with self._writing:
            store = self._stores.pop(memory, None)
            if store is None:  # somebody else did
                return
            self.served.pop(str(memory), None)
            self._unverified.pop(memory, None)
            self._complete_memories.discard(memory)
            self._placement.forget(memory)
            await asyncio.to_thread(store.remove)
        await self._announce(memory)

    async def _follow(self, store: MemoryStore, entry: LibraryEntry) -> None:
        with tolerating("follow a memory"):
            await self._follow_to(store, entry)

    async def _follow_to(self, store: MemoryStore, entry: LibraryEntry) -> None:
        memory = entry.memory
        try:
            data = await self._fetch_manifest(entry)
            manifest = await asyncio.to_thread(MemoryManifest.parse, data)
            if await self._refuses(entry, manifest.licenses):
                return
            async with self._writing:
                if self._stores.get(memory) is not store:
                    return
                await asyncio.to_thread(store.follow, data)
        except (TransferError, WireError) as error:
            logger.warning(
                "revision %d of memory %s can't be followed yet: %s", entry.revision, memory, error
            )
            return
        except OSError as error:
            self._note_full(error)
            return
        self._placement.forget(memory)
        self._metrics.revisions.inc()
        logger.info("follows revision %d of memory %s", entry.revision, memory)
        await self._announce(memory)

    async def _fetch_manifest(self, entry: LibraryEntry) -> bytes:
        hosts = {host.peer_id for host in await self._memories.some_hosts(entry.memory, entry.grid)} | {
            entry.publisher
        }
        name = entry.manifest.sha256
        try:
            async with asyncio.timeout(_MANIFEST_S):
                return await self._parts.fetch_any(
                    await self._contacts(hosts, name),
                    str(entry.memory),
                    name,
                    entry.manifest.size,
                    partial(has_sha256, name),
                )
        except TimeoutError:
            raise TransferError(f"its manifest did not come within {_MANIFEST_S:.0f} s") from None

    async def _meet(self) -> None:
        """Fetches the manifests of memories that are new here."""
        room = _MOST_MEMORIES - len(self._stores)
        new = [
            memory for memory in self._listed if memory not in self._stores and not self._is_put_off(memory)
        ]
        unused = [memory for memory, store in self._stores.items() if not store.shards]
        if new and room <= 0 and unused:  # so that nobody's memories take the places of all others
            await self._remove(self._rng.choice(unused))
            room = 1
        for memory in self._rng.sample(new, min(len(new), max(0, room))):
            entry = self._listed.get(memory)
            if entry is None:  # not any more
                continue
            await self._drop_unlisted(entry.manifest.size)
            if self.disk_bytes + entry.manifest.size > self._rules.disk_bytes:
                continue
            try:
                data = await self._fetch_manifest(entry)
                manifest = await asyncio.to_thread(MemoryManifest.parse, data)
                if await self._refuses(entry, manifest.licenses) or not self._has_room(entry, manifest):
                    continue
                async with self._writing:
                    store = await asyncio.to_thread(MemoryStore.create, self._folder / str(memory), data)
            except (TransferError, WireError) as error:
                logger.info("memory %s can't be hosted yet: %s", memory, error)
                self._leave_alone(memory)
                continue
            except OSError as error:
                self._note_full(error)
                return
            self._stores[memory] = store
            if not self._leaving:
                self.served[str(memory)] = store

    def _has_room(self, entry: LibraryEntry, manifest: MemoryManifest) -> bool:
        """Whether anything of a new memory fits. If not, says what would, and leaves it alone for a while."""
        smallest = min((most_bytes(shard) for shard in manifest.shards), default=0)
        need = entry.manifest.size + parts_bytes(manifest) + smallest
        left = self._rules.disk_bytes - self.disk_bytes
        if need <= left:
            return True
        if entry.memory not in self._put_off:
            logger.warning(
                "no room for memory %s: it needs %s at least, and --memory-disk leaves %s",
                entry.memory,
                bytes_in_words(need),
                bytes_in_words(max(0, left)),
            )
        self._leave_alone(entry.memory)
        return False

    # taking and dropping

    def _fitting(self, wanted: Iterable[ShardKey], seen: Mapping[ShardKey, SeenShard]) -> list[ShardKey]:
        """Those for which there is room, in their order."""
        room, fitting = self._rules.disk_bytes - self.disk_bytes, []
        begun = {memory for memory, store in self._stores.items() if store.shards}
        for key in wanted:
            size = most_bytes(seen[key].info)
            if key.memory not in begun and (store := self._stores.get(key.memory)) is not None:
                size += parts_bytes(store.manifest)
            if size <= room:
                room -= size
                fitting.append(key)
                begun.add(key.memory)
        return fitting

    async def _take(self, key: ShardKey, cell: Cell) -> None:
        """Fetches a shard, if it still has too few replicas."""
        store = self._stores.get(key.memory)
        if self._leaving or store is None or self._clock() < self._full_until or self._is_put_off(key.memory):
            return
        shard = (await self._seen_now(key, cell)).get(key)
        if shard is None or len(shard.serving) >= WANTED_REPLICAS or key.root in store.shards:
            return
        hosts = (shard.serving | shard.leaving) - {self._peer_id}

        def wrong(peer_id: PeerID) -> None:
            self._wrong[peer_id, key.root] = None
            self._metrics.fetches.labels("wrong").inc()

        try:
            await self._complete(key.memory, store, hosts)
            data = await self._parts.fetch_any(
                await self._contacts(hosts, key.root),
                str(key.memory),
                key.root,
                most_bytes(shard.info),
                partial(store.verified, key.root),
                wrong,
            )
            async with self._writing:
                if self._stores.get(key.memory) is not store:
                    return
                await asyncio.to_thread(store.save, key.root, data)
        except (TransferError, WireError) as error:
            self._metrics.fetches.labels("failed").inc()
            logger.info("shard %s was not taken: %s", key, error)
            return
        except OSError as error:
            self._note_full(error)
            return
        self._metrics.fetches.labels("fetched").inc()
        await self._announce(key.memory)

    async def _complete(self, memory: MemoryID, store: MemoryStore, hosts: Collection[PeerID]) -> None:
        """Fetches the encoder and the codebook, which every host keeps. Raises TransferError, WireError and OSError."""
        async with self._completing.setdefault(memory, asyncio.Lock()):
            if memory in self._complete_memories:
                return
            if self._is_put_off(memory):
                raise TransferError("its encoder or codebook did not come")
            for part in await asyncio.to_thread(store.missing_parts):
                name = part.sha256
                nodes = await self._contacts(hosts, name)
                check = partial(has_sha256, name)
                try:
                    data = await self._parts.fetch_any(nodes, str(memory), name, part.size, check)
                except TransferError:
                    self._leave_alone(memory)
                    raise
                async with self._writing:
                    if self._stores.get(memory) is not store:
                        raise TransferError("it is no longer hosted here")
                    await asyncio.to_thread(store.save_part, part, data)
            self._complete_memories.add(memory)
            self._put_off.pop(memory, None)

    def _is_put_off(self, memory: MemoryID) -> bool:
        until, _ = self._put_off.get(memory, (-math.inf, 0.0))
        return self._clock() < until

    def _leave_alone(self, memory: MemoryID) -> None:
        """For one announcement period, as its first hosts may not be known yet; then for twice as long each time."""
        _, pause_s = self._put_off.get(memory, (0.0, self._period.seconds / 2))
        pause_s = min(2 * pause_s, _PUT_OFF_S)
        self._put_off[memory] = self._clock() + pause_s, pause_s

    async def _contacts(self, hosts: Iterable[PeerID], name: bytes) -> list[NodeInfo]:
        """How to call them, in random order, those last that gave something else for it before."""
        nodes = list((await self._swarm.registry.nodes(set(hosts) - {self._peer_id})).values())
        self._rng.shuffle(nodes)
        return sorted(nodes, key=lambda node: (node.peer_id, name) in self._wrong)

    async def _seen_now(self, key: ShardKey, cell: Cell) -> dict[ShardKey, SeenShard]:
        hosts = await self._memories.cell_hosts(key.memory, [cell])
        store = self._stores.get(key.memory)
        shards = () if store is None else store.manifest.by_cell.get(cell, ())
        return self._proofs.counted(seen_shards(key.memory, shards, hosts[cell]))

    async def _make_room(self, seen: Mapping[ShardKey, SeenShard], wanted: Collection[ShardKey]) -> None:
        """Drops what nobody lists, or others serve often enough, for a shard that nobody else has room for."""
        smallest = min(most_bytes(seen[key].info) for key in wanted)
        await self._drop_unlisted(smallest)
        await self._shrink(smallest - (self._rules.disk_bytes - self.disk_bytes), seen)

    async def _drop_unlisted(self, size: int) -> None:
        """Removes memories that no publisher lists any more, until there is room for so many bytes."""
        for memory, since in list(self._unlisted.items()):
            if self.disk_bytes + size <= self._rules.disk_bytes:
                return
            if memory in self._stores and self._clock() - since >= _UNLISTED_S:
                logger.info("no longer hosts memory %s: nobody lists it, and others need the room", memory)
                await self._remove(memory)

    async def _shrink(self, size: int, seen: Mapping[ShardKey, SeenShard]) -> None:
        """Drops shards of so many bytes, if enough others prove that they have them."""
        for key in self._placement.to_drop(size) if size > 0 else ():
            store = self._stores.get(key.memory)
            if store is None or key.root not in store.shards:
                continue
            keener = self._placement.keener(key)[: 2 * WANTED_REPLICAS]
            proven = await self._proofs.proven([(peer_id, key) for peer_id in keener], seen)
            if len(proven) < WANTED_REPLICAS:
                continue
            async with self._writing:
                await asyncio.to_thread(store.drop, key.root)
            logger.info("dropped shard %s, which %s serve", key, counted(len(proven), "other node"))
            await self._announce(key.memory)

    # leaving

    async def _hand_over(self, alone: set[ShardKey]) -> None:
        """Returns when others serve all of these shards. Those that they serve are removed from the set."""
        await self.announce()
        while True:
            alone &= await self._without_other_host(alone)
            if not alone:
                return
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _until_hurried(self) -> None:
        await self._hurried.wait()

    async def _without_other_host(self, keys: Collection[ShardKey]) -> set[ShardKey]:
        cells: dict[MemoryID, set[Cell]] = {}
        alone = set(keys) & self._mine()
        for key in alone:
            cells.setdefault(key.memory, set()).add(self._stores[key.memory].manifest.by_root[key.root].cell)
        for memory, some in cells.items():
            manifest = self._stores[memory].manifest
            for cell, hosts in (await self._memories.cell_hosts(memory, some)).items():
                seen = self._proofs.counted(seen_shards(memory, manifest.by_cell[cell], hosts))
                others = {key: list(seen[key].serving - {self._peer_id}) for key in alone & seen.keys()}
                claims = [(self._rng.choice(peers), key) for key, peers in others.items() if peers]
                alone -= {key for _, key in await self._proofs.proven(claims, seen)}
        return alone

    def _note_full(self, error: OSError) -> None:
        self._full_until = self._clock() + _FULL_PAUSE_S
        cause = "the disk is full" if error.errno == errno.ENOSPC else (error.strerror or str(error))
        logger.warning(
            "can't write to %s: %s; what is hosted stays, and nothing more is taken for %.0f minutes. Free some space, "
            "or lower --memory-disk",
            self._folder,
            cause,
            _FULL_PAUSE_S / 60,
        )
