"""The memories that a node hosts: on its disk, served, and announced."""

import asyncio
import errno
import logging
import shutil
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from dht.announcements import ReplicaState
from dht.library import MOST_CONTACTS, MemoryRegistry
from dht.memory import MemoryID, Place
from dht.upkeep import LONGEST_LIFETIME_S, UpkeepPeriod
from expert_server.memory.placement import ShardKey
from expert_server.memory.store import GONE, MemoryStore
from peer.errors import TransferError, UnreachableError, WireError
from peer.files import PlainFile, sweep, write_atomically

logger: logging.Logger = logging.getLogger(__name__)

_MARGIN_S = 5.0
"""How much longer announcements live at the start than those of an earlier run can."""
_FULL_PAUSE_S = 600.0
"""How long a node takes nothing more after its disk was full."""
_LIBRARIES = "libraries"
"""The file with the publishers' lists, beside the folders of the memories. No memory may have this name."""


class HostedMemories:
    """What a node hosts of memories. Nothing is served before it has been verified."""

    def __init__(
        self,
        folder: Path,
        most_bytes: int,
        memories: MemoryRegistry,
        period: UpkeepPeriod,
        changed: Callable[[MemoryID], None],
    ) -> None:
        """`folder`: contains a folder for each memory. `changed` is called with memories that are removed or have a new
        revision.
        """
        self.stores: dict[MemoryID, MemoryStore] = {}
        self.served: dict[str, MemoryStore] = {}
        """The stores that the service answers from, by memory."""
        self.unverified: dict[MemoryID, list[bytes]] = {}
        """Shards that were on disk at the start and have not been verified yet."""
        self.leaving: bool = True
        """Whether this node announces that its replicas leave, and takes nothing more."""
        self._folder = folder
        self._most_bytes = most_bytes
        self._memories = memories
        self._period = period
        self._changed = changed
        self._announced: dict[MemoryID, dict[int, object]] = {}
        """The announced regions, each with a mark of its last announcement."""
        self._failed_at: dict[MemoryID, float] = {}
        """When the last announcement of a memory failed."""
        self._announcing = asyncio.Lock()
        """Held while announcements are made, which takes a while if there are many. Otherwise what was true before
        might overwrite what is true now.
        """
        self._outlives = 0.0
        """Until when announcements of an earlier run may live, on the monotonic clock. This run's expire later, because
        the DHT keeps the announcement that expires last.
        """
        self._writing = asyncio.Lock()
        """Held while a store changes its files, but not while waiting for other peers."""
        self._full_until = 0.0
        self._saved_libraries = b""

    @property
    def shards(self) -> int:
        return sum(len(store.shards) for store in self.served.values())

    @property
    def disk_bytes(self) -> int:
        return sum(store.nbytes for store in self.stores.values())

    @property
    def room(self) -> int:
        """How many more bytes may be taken. Negative if the owner has lowered the limit."""
        return self._most_bytes - self.disk_bytes

    @property
    def is_full(self) -> bool:
        """Whether the disk was full a short time ago."""
        return time.monotonic() < self._full_until

    def mine(self) -> set[ShardKey]:
        return {
            ShardKey(memory, info.root) for memory, store in self.stores.items() for info in store.served()
        }

    def revoked(self, memory: MemoryID) -> Collection[Place]:
        """The passages of a memory that its publisher has revoked."""
        store = self.stores.get(memory)
        return () if store is None else store.manifest.revoked

    async def open(self) -> None:
        """Finds what the last run left on disk."""
        self._memories.restore(await asyncio.to_thread(self._read_libraries))
        found = await asyncio.to_thread(self._found)
        self.stores = {memory: store for memory, (store, _) in found.items()}
        self.unverified = {memory: roots for memory, (_, roots) in found.items()}
        if found:
            self._outlives = time.monotonic() + LONGEST_LIFETIME_S + _MARGIN_S

    async def verify(self) -> None:
        """Verifies what is on disk and serves it, shard by shard."""
        for memory, roots in list(self.unverified.items()):
            store = self.stores.get(memory)
            while roots and store is not None:
                async with self._writing:
                    root = roots[-1]
                    if root in store.manifest.by_root and self.stores.get(memory) is store:
                        await self._load(memory, store, root)
                    roots.pop()  # only now: if this is cut off, the shard is verified the next time
            self.unverified.pop(memory, None)

    async def _load(self, memory: MemoryID, store: MemoryStore, root: bytes) -> None:
        """Serves a shard that is on disk. If the file is not that shard, it is removed."""
        try:
            await asyncio.to_thread(store.load, root)
        except WireError as error:
            with suppress(OSError):
                await asyncio.to_thread(store.drop, root)
            logger.warning(
                "shard %s on disk is not used, and will be fetched again: %s", ShardKey(memory, root), error
            )
        except OSError as error:
            # Perhaps it is only for want of space or descriptors. No other host may have the shard.
            logger.warning(
                "shard %s on disk can't be used before the next start: %s", ShardKey(memory, root), error
            )

    def resume(self) -> None:
        """Serves what is hosted."""
        self.leaving = False
        self.served.update({str(memory): store for memory, store in self.stores.items()})

    async def announce_all(self) -> None:
        """Renews the announcements of all regions. Raises UnreachableError at the first memory for which that fails.
        The next time, this memory comes last: strangers may sit around one of its keys, or it may be too large for the
        line.
        """
        memories = {*self.stores, *self._announced}
        self._failed_at = {memory: at for memory, at in self._failed_at.items() if memory in memories}
        for memory in sorted(memories, key=lambda each: self._failed_at.get(each, 0.0)):
            try:
                await self.announce(memory)
            except UnreachableError:
                self._failed_at[memory] = time.monotonic()
                raise
            self._failed_at.pop(memory, None)

    async def announce(self, memory: MemoryID, only: Collection[int] | None = None) -> None:
        """Announces which shards of a memory this node hosts. `only`: the regions that have changed; None: all. Raises
        UnreachableError.
        """
        async with self._announcing:
            regions, announced = self._regions(memory, only), self._announced.setdefault(memory, {})
            gone = (announced if only is None else announced.keys() & only) - regions.keys()
            most_contacts = MOST_CONTACTS if only is None else max(0, MOST_CONTACTS - len(announced))
            mark = object()
            announced.update(dict.fromkeys(regions.keys() | gone, mark))
            state = ReplicaState.LEAVING if self.leaving else ReplicaState.SERVING
            records: dict[int, tuple[ReplicaState, Collection[bytes]]] = {
                region: (state, roots) for region, roots in regions.items()
            }
            records |= dict.fromkeys(gone, (ReplicaState.WITHDRAWN, ()))
            lifetime_s = max(self._period.lifetime_s, self._outlives - time.monotonic())
            items = await self._memories.announcements(memory, records, lifetime_s, most_contacts)
        if items:
            await self._memories.store(items)
        for region in gone:
            if announced.get(region) is mark:  # otherwise it was announced again meanwhile
                del announced[region]
        if not announced:
            self._announced.pop(memory, None)

    def _regions(self, memory: MemoryID, only: Collection[int] | None) -> dict[int, list[bytes]]:
        """The shards of a memory that are served, by region. `only`: of these regions; None: of all."""
        regions: dict[int, list[bytes]] = {}
        if (store := self.served.get(str(memory))) is not None:
            by_region, shards = store.manifest.by_region, store.shards
            for region in by_region if only is None else only:
                if roots := [info.root for info in by_region.get(region, ()) if info.root in shards]:
                    regions[region] = roots
        return regions

    async def add(self, memory: MemoryID, manifest: bytes) -> None:
        """Adds a memory without any shards. Raises WireError, and OSError if the disk is full."""
        async with self._writing:
            store = await asyncio.to_thread(MemoryStore.create, self._folder / str(memory), manifest)
        self.stores[memory] = store
        if not self.leaving:
            self.served[str(memory)] = store

    async def remove(self, memory: MemoryID) -> None:
        """Stops hosting a memory, and announces that. Raises UnreachableError."""
        async with self._writing:
            store = self.stores.pop(memory, None)
            if store is None:  # another task has removed it
                return
            self.served.pop(str(memory), None)
            self.unverified.pop(memory, None)
            self._changed(memory)
            await asyncio.to_thread(store.remove)
        await self.announce(memory)

    async def write(self, memory: MemoryID, store: MemoryStore, change: Callable[[], None]) -> None:
        """Lets a store change its files. Raises what `change` raises, and TransferError if the memory is no longer
        hosted.
        """
        async with self._writing:
            if self.stores.get(memory) is not store:
                raise TransferError("it is no longer hosted here")
            await asyncio.to_thread(change)

    async def follow(self, memory: MemoryID, store: MemoryStore, manifest: bytes) -> None:
        """Updates to a later revision. Raises what `write` and `MemoryStore.follow` raise."""
        await self.write(memory, store, lambda: store.follow(manifest))
        self._changed(memory)
        with suppress(UnreachableError):  # or the next round announces it
            await self.announce(memory)

    async def save_libraries(self) -> None:
        """Saves the publishers' lists. Otherwise, after a restart, an older list that somebody stored again would be
        believed.
        """
        async with self._writing:
            data = self._memories.saved()
            if data != self._saved_libraries and self.stores:
                try:
                    await asyncio.to_thread(write_atomically, self._folder / _LIBRARIES, data)
                except OSError as error:
                    self.note_full(error)
                else:
                    self._saved_libraries = data

    def note_full(self, error: OSError) -> None:
        """Warns that the disk could not be written, and takes nothing more for a while."""
        self._full_until = time.monotonic() + _FULL_PAUSE_S
        cause = "the disk is full" if error.errno == errno.ENOSPC else (error.strerror or str(error))
        logger.warning(
            "can't write to %s: %s; this node keeps what it hosts, and takes nothing more for %.0f minutes. Free some "
            "space, or lower --memory-disk",
            self._folder,
            cause,
            _FULL_PAUSE_S / 60,
        )

    def _found(self) -> dict[MemoryID, tuple[MemoryStore, list[bytes]]]:
        """What is on disk of each memory, with the roots of its shards. Removes what a killed process left."""
        found = {}
        sweep(self._folder)
        for path in sorted(self._folder.iterdir()) if self._folder.is_dir() else ():
            if path.name == _LIBRARIES:
                continue
            try:
                if path.match(f".*{GONE}"):
                    shutil.rmtree(path)
                    continue
                memory, store = MemoryID.parse(path.name), MemoryStore.open(path)
                store.sweep()
                found[memory] = store, store.roots()
            except (WireError, OSError) as error:
                logger.warning("%s is not used: %s", path, error)
        return found

    def _read_libraries(self) -> bytes:
        """The publishers' lists as the last run saved them."""
        try:
            return PlainFile(self._folder / _LIBRARIES)[:]
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                logger.warning("%s is not used: %s", self._folder / _LIBRARIES, error.strerror)
            return b""
