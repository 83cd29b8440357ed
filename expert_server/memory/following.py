"""Follows the publishers of memories: new memories, later revisions, and memories that are no longer listed."""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from dht.library import LibraryEntry, ManifestPace, MemoryRegistry
from dht.memory import MemoryID, MemoryManifest, Part
from dht.swarm import Swarm
from expert_server.memory.fetching import PartFetcher
from expert_server.memory.hosted import HostedMemories
from expert_server.memory.shard import most_bytes
from expert_server.memory.store import parts_bytes
from expert_server.settings import NodeSettings
from peer.errors import TransferError, UnreachableError, WireError
from peer.formatting import bytes_in_words
from peer.identity import PeerID
from peer.loop import Restarts, TaskSet, tolerating
from peer.rpc.parts import check_sha256

logger: logging.Logger = logging.getLogger(__name__)

_MOST_MEMORIES = 64
"""The most memories that a node follows. If there are more, nodes follow different ones."""
_MANIFEST_S = 60.0
"""The longest wait for a manifest."""
_FETCHED_AT_ONCE = 8
_PATIENCE_S = 5.0
"""How long a look waits for manifests. Those that take longer go on arriving after it."""
_UNLISTED_S = 3600.0
"""How long a memory is kept after its publisher stopped listing it, because the DHT may fail for a while."""
_LEAST_PAUSE_S = 3.0
"""The shortest pause between two looks, however many new lists callers show."""
_HOSTS_ASKED = 6
"""Hosts that are asked for a manifest, besides the publisher and the peer that showed its list: these are all that one
fetch asks.
"""
_KEEP_EVERY_S = 3600.0
"""How often the libraries are stored again."""


@dataclass(frozen=True)
class HostingRules:
    """Which memories a node hosts, by its owner's settings."""

    disk_bytes: int
    """Disk space for memories; 0: host none."""
    refuse: frozenset[str] = frozenset()
    """Memories that are not hosted, by name or id."""
    licenses: frozenset[str] = frozenset()
    """If not empty, only passages under these licences are hosted."""

    @classmethod
    def of(cls, settings: NodeSettings) -> "HostingRules":
        return cls(
            settings.memory_disk, frozenset(settings.memory_refuse), frozenset(settings.memory_licenses)
        )

    def refusal(self, memory: MemoryID, licenses: Collection[str]) -> str:
        """Why the memory is not hosted, in words; else empty."""
        if {memory.name, str(memory)} & self.refuse:
            return "this node refuses it by name"
        if self.licenses and not licenses:
            return "it states no licence, and this node hosts only some"
        if self.licenses and (others := sorted(set(licenses) - self.licenses)):
            return f"this node does not host passages under {', '.join(others[:3])}"
        return ""


class ManifestFetches:
    """Fetches manifests one after another for each publisher, so that one whose manifests don't arrive delays none of
    the others'.
    """

    def __init__(self, restarts: Restarts) -> None:
        """`restarts`: counts fetches that fail unexpectedly."""
        self._restarts = restarts
        self._tasks = TaskSet(restarts)
        self.busy: set[PeerID] = set()
        """The publishers for which a fetch is under way."""
        self._at_once = asyncio.Semaphore(_FETCHED_AT_ONCE)

    async def start(
        self, entries: Iterable[LibraryEntry], fetch: Callable[[MemoryID], Coroutine[Any, Any, None]]
    ) -> None:
        """Calls `fetch` for each memory, except those of busy publishers. Returns when all are done, or after a few
        seconds.
        """
        due: dict[PeerID, list[MemoryID]] = {}
        for entry in entries:
            if entry.publisher not in self.busy:
                due.setdefault(entry.publisher, []).append(entry.memory)
        self.busy |= due.keys()
        tasks = [
            self._tasks.spawn(self._fetch_all(publisher, memories, fetch), "fetch manifests of memories")
            for publisher, memories in due.items()
        ]
        if tasks:
            await asyncio.wait(tasks, timeout=_PATIENCE_S)

    async def aclose(self) -> None:
        """Ends all fetches."""
        await self._tasks.aclose()

    async def _fetch_all(
        self,
        publisher: PeerID,
        memories: Iterable[MemoryID],
        fetch: Callable[[MemoryID], Coroutine[Any, Any, None]],
    ) -> None:
        try:
            for memory in memories:
                async with self._at_once:
                    with tolerating("fetch a memory's manifest", self._restarts):
                        await fetch(memory)
        finally:
            self.busy.discard(publisher)


class PublisherFollower:
    """The memories that publishers list and this node may host."""

    def __init__(
        self,
        hosted: HostedMemories,
        rules: HostingRules,
        swarm: Swarm,
        memories: MemoryRegistry,
        fetcher: PartFetcher,
        count_revision: Callable[[], None],
    ) -> None:
        """`count_revision` is called for each revision that was followed."""
        self.listed: Mapping[MemoryID, LibraryEntry] = {}
        """The listed memories at the last look, without refused ones."""
        self._hosted = hosted
        self._rules = rules
        self._swarm = swarm
        self._memories = memories
        self._fetcher = fetcher
        self._count_revision = count_revision
        self._rng = random.SystemRandom()
        self._refused: dict[MemoryID, Part] = {}
        """Memories that this node may not host, by the manifest from which that follows."""
        self._wrong: dict[MemoryID, LibraryEntry] = {}
        """Listed entries whose manifest turned out to be wrong, so that it is not fetched again."""
        self._unlisted: dict[MemoryID, float] = {}
        """Since when memories that are hosted here are on no list."""
        self._kept_at: float | None = None
        self._pace = ManifestPace()
        self._later, self._new = (ManifestFetches(swarm.host.restarts) for _ in range(2))
        """Fetches of later revisions, and of new memories' manifests."""
        self._adding = asyncio.Lock()
        """Held while a memory is added, so that no other takes the room that was seen."""
        self._heard = asyncio.Event()
        """Set if a caller has shown a newer list since the last look."""
        self._shown_by: dict[PeerID, PeerID] = {}
        """For each publisher, the last caller that showed a newer list of it."""

    def hear(self, caller: PeerID, memory: str, record: bytes) -> None:
        """Takes the publisher's record that lists a memory which is hosted here, from a caller. If it is newer than the
        known one, or the last look could not follow the revision in it, the next look is due at once.
        """
        entry = next((each for each in self.listed.values() if str(each.memory) == memory), None)
        if entry is None:
            return
        store = self._hosted.stores.get(entry.memory)
        is_behind = store is not None and store.manifest.revision < entry.revision
        if self._memories.hear(entry.publisher, record, caller) or is_behind:
            self._shown_by[entry.publisher] = caller
            self._heard.set()

    async def until_due(self, pause_s: float) -> None:
        """Waits until the next look: this long, or until a caller has shown a newer list."""
        least_s = min(pause_s, _LEAST_PAUSE_S)
        await asyncio.sleep(least_s)
        with suppress(TimeoutError):
            async with asyncio.timeout(pause_s - least_s):
                await self._heard.wait()

    async def follow(self) -> None:
        """Follows later revisions, and removes memories that their publisher no longer lists. Raises UnreachableError.

        The founder's node reads the lists in any case, because it renews its own.
        """
        if not self._rules.disk_bytes and self._swarm.host.peer_id != self._swarm.keys.author:
            return
        self._heard.clear()
        libraries = await self._memories.follow()
        self._shown_by = {each: caller for each, caller in self._shown_by.items() if each in libraries}
        await self._hosted.save_libraries()
        listed = {entry.memory: entry for entries in libraries.values() for entry in entries}
        self._refused = {memory: part for memory, part in self._refused.items() if memory in listed}
        self._wrong = {memory: entry for memory, entry in self._wrong.items() if listed.get(memory) == entry}
        for entry in listed.values():
            # a list names only some licences, and the manifest names all
            if self._refused.get(entry.memory) != entry.manifest:
                await self._refuses(entry, entry.licenses)
        self.listed = {memory: entry for memory, entry in listed.items() if memory not in self._refused}
        for memory in list(self._hosted.stores):
            if memory not in listed and any(MemoryID.of(memory.name, p) == memory for p in libraries):
                logger.info("no longer hosts memory %s: its publisher no longer lists it", memory)
                await self._hosted.remove(memory)
        due = [entry for entry in self.listed.values() if self._is_behind(entry)]
        await self._later.start(due, self._follow)
        now = time.monotonic()
        self._unlisted = {
            memory: self._unlisted.get(memory, now) for memory in self._hosted.stores if memory not in listed
        }
        if listed and (self._kept_at is None or now >= self._kept_at + _KEEP_EVERY_S):
            self._kept_at = now
            await self._memories.keep_libraries()

    async def meet(self) -> None:
        """Fetches the manifests of memories that are new to this node, and adds these memories. Raises
        UnreachableError.
        """
        stores = self._hosted.stores
        new = [
            entry
            for memory, entry in self.listed.items()
            if not (memory in stores or memory in self._wrong or self._fetcher.is_put_off(memory))
            and entry.publisher not in self._new.busy
        ]
        unused = [memory for memory, store in stores.items() if not store.shards]
        places = _MOST_MEMORIES - len(stores)
        if new and places <= 0 and unused:  # so that no publisher's memories take all places
            await self._hosted.remove(self._rng.choice(unused))
            places = 1
        await self._new.start(self._rng.sample(new, min(len(new), max(0, places))), self._meet)

    async def close(self) -> None:
        """Ends the fetches of manifests."""
        await self._later.aclose()
        await self._new.aclose()

    async def drop_unlisted(self, size: int) -> None:
        """Removes memories that no publisher lists any more, until there is room for this many bytes."""
        for memory, since in list(self._unlisted.items()):
            if size <= self._hosted.room:
                return
            if memory in self._hosted.stores and time.monotonic() - since >= _UNLISTED_S:
                logger.info("no longer hosts memory %s: nobody lists it, and others need the room", memory)
                await self._hosted.remove(memory)

    async def _refuses(self, entry: LibraryEntry, licenses: Collection[str]) -> bool:
        """Whether this node may not host the memory. If so, removes it."""
        memory, reason = entry.memory, self._rules.refusal(entry.memory, licenses)
        if not reason:
            self._refused.pop(memory, None)
            return False
        if memory not in self._refused:
            logger.info("does not host memory %s: %s", memory, reason)
        self._refused[memory] = entry.manifest
        if memory in self._hosted.stores:
            await self._hosted.remove(memory)
        return True

    def _is_behind(self, entry: LibraryEntry) -> bool:
        """Whether this node hosts an earlier revision of the memory, and may fetch this one."""
        store = self._hosted.stores.get(entry.memory)
        is_behind = store is not None and store.manifest.revision < entry.revision
        return is_behind and entry.memory not in self._wrong

    async def _follow(self, memory: MemoryID) -> None:
        """Follows the listed revision of a memory, if it is later than this node's."""
        entry, store = self.listed.get(memory), self._hosted.stores.get(memory)
        if entry is None or store is None or not self._is_behind(entry):
            return
        if not self._pace.allows(entry, time.monotonic()):
            return
        try:
            data, manifest = await self._fetch_manifest(entry)
            if await self._refuses(entry, manifest.licenses):
                return
            await self._hosted.follow(memory, store, data)
        except WireError as error:
            self._note_wrong(entry, error)
        except (TransferError, UnreachableError) as error:
            logger.warning(
                "revision %d of memory %s can't be followed yet: %s", entry.revision, memory, error
            )
        except OSError as error:
            self._hosted.note_full(error)
        else:
            self._count_revision()
            logger.info("follows revision %d of memory %s", entry.revision, memory)

    async def _meet(self, memory: MemoryID) -> None:
        """Adds a new memory, if it is still listed and there is room."""
        hosted, entry = self._hosted, self.listed.get(memory)
        if entry is None or hosted.leaving or hosted.is_full:
            return
        try:
            await self.drop_unlisted(entry.manifest.size)
            if entry.manifest.size > hosted.room or not self._pace.allows(entry, time.monotonic()):
                return
            data, manifest = await self._fetch_manifest(entry)
            async with self._adding:
                if await self._refuses(entry, manifest.licenses) or not self._has_room(entry, manifest):
                    return
                if len(hosted.stores) < _MOST_MEMORIES:
                    await hosted.add(memory, data)
        except WireError as error:
            self._note_wrong(entry, error)
        except (TransferError, UnreachableError) as error:
            logger.info("memory %s can't be hosted yet: %s", memory, error)
            self._fetcher.put_off(memory)
        except OSError as error:
            hosted.note_full(error)

    def _note_wrong(self, entry: LibraryEntry, error: WireError) -> None:
        self._wrong[entry.memory] = entry
        logger.warning(
            "revision %d of memory %s is not what its publisher lists, and is not used: %s",
            entry.revision, entry.memory, error,
        )  # fmt: skip

    async def _fetch_manifest(self, entry: LibraryEntry) -> tuple[bytes, MemoryManifest]:
        """Raises TransferError, and WireError if the manifest is not what its publisher lists."""
        some = await self._memories.some_hosts(entry, _HOSTS_ASKED)
        # the peer that showed the list has it, and few others may have it yet
        hosts = {host.peer_id for host in some} | {
            entry.publisher,
            self._shown_by.get(entry.publisher, entry.publisher),
        }
        name, size = entry.manifest.sha256, entry.manifest.size
        check = partial(check_sha256, name)
        try:
            async with asyncio.timeout(_MANIFEST_S):
                data = await self._fetcher.fetch(entry.memory, hosts, name, size, check)
        except TimeoutError:
            raise TransferError(f"its manifest did not arrive within {_MANIFEST_S:.0f} s") from None
        manifest = await asyncio.to_thread(MemoryManifest.parse, data)
        if (manifest.name, manifest.revision) != (entry.memory.name, entry.revision):
            raise WireError(f"its manifest belongs to revision {manifest.revision} of {manifest.name}")
        return data, manifest

    def _has_room(self, entry: LibraryEntry, manifest: MemoryManifest) -> bool:
        """Whether there is room for the new memory's smallest part. If not, logs how much is needed, and pauses
        fetching it.
        """
        smallest = min((most_bytes(shard) for shard in manifest.shards), default=0)
        need = entry.manifest.size + parts_bytes(manifest) + smallest
        if need <= self._hosted.room:
            return True
        if self._fetcher.put_off(entry.memory):
            logger.warning(
                "no room for memory %s: it needs %s at least, and --memory-disk leaves %s",
                entry.memory,
                bytes_in_words(need),
                bytes_in_words(max(0, self._hosted.room)),
            )
        return False
