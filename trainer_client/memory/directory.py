"""What is known of one memory: its newest manifest, its encoder and codebook, and the hosts of its cells.

A memory's parts are fetched once and kept on disk. From the DHT, only what searches need is read: the regions of the
cells nearest to the queries, and the nodes that host them. If nobody hosts a cell, the index is read to learn which
regions are live. All this is kept, and read again in the background, so that later searches need no look-ups.

Shapes: Q queries, C cells in row-major order, D numbers in a vector.
"""

import asyncio
import hashlib
import logging
import os
import random
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np

from dht.announcements import NodeInfo, ReplicaState
from dht.beam_search import select_experts
from dht.library import LibraryEntry, ManifestPace, MemoryRegistry, RegionHost, contacts_of
from dht.memory import Cell, MemoryID, MemoryManifest, Part, ShardInfo, Vectors
from dht.registry import Registry, some_of
from dht.swarm import Stage
from dht.uid import coordinate_of, number_of
from dht.upkeep import UpkeepPeriod
from peer.bounded import BoundedDict
from peer.codec import Booleans, Floats, Integers
from peer.errors import LibraryError, TransferError, UnreachableError, WireError
from peer.files import write_atomically
from peer.formatting import bytes_in_words
from peer.identity import PeerID
from peer.kademlia.lookups import FRUGAL
from peer.kademlia.node import Spending
from peer.kademlia.search import DEFAULT_LIMITS, SearchLimits
from peer.loop import TimeSlices, cancel_all
from peer.platform.files import open_plainly
from peer.rates import Backoff
from peer.rpc.parts import PartClient, check_sha256
from trainer_client.memory.calls import loop_time
from trainer_client.memory.codebook import Codebook
from trainer_client.memory.encoder import Encoder, load_encoder
from trainer_client.memory.retriever import Located, Turn

logger: logging.Logger = logging.getLogger(__name__)

T = TypeVar("T")

CACHE_BYTES = 2**30
"""The limit for parts of memories on disk."""
_REFRESH_EVERY_S = 15.0
"""The shortest pause between two looks at the hosts of some regions. It grows with what they cost."""
_READ_IN_TURN = 16
"""The hosts of how many regions such a look reads."""
_RETRY_S = 15.0, 240.0
"""The pauses between readings of the hosts of a region of which searches miss something, at first and at most."""
_MOST_RETRIED = 32
"""The most regions whose hosts such a reading reads."""
_NODES_AGAIN = 128
"""The most node records of known hosts that one look reads again."""
_INDEX = -1
"""Stands for the index of live regions among the regions to read again."""
_FOLLOW_EVERY_S = 30.0
"""The pause between two looks for a newer revision."""
_USED_S = 300.0
"""For how long after a search the hosts are read again."""
_CELLS = 4096
"""The hosts of this many cells are kept: those needed last."""
_HOSTS_OF_CELL = 64
"""The most hosts of a cell that are kept."""
_READ_AT_ONCE = 512
"""Nodes in one look-up. A look-up has one deadline."""
_EMPTY = 64
"""For how many sets of avoided peers it is remembered which cells nobody else hosts."""
_GUESSED, _MOST_GUESSED = 3, 64
"""The hosts of how many cells the first search reads: for each cell that it searches, and at most. Some are read in the
background.
"""
_ROUNDS = 8
"""How often a search continues after it has found cells that nobody hosts."""
_FEW_SCORES = 2**14
"""Up to this many scores of cells are compared on the loop, which takes about a millisecond. 256 queries of a memory of
4,096 cells would take a tenth of a second.
"""
_SOURCES = 8
"""The most hosts that a part is fetched from."""


class PartCache:
    """Parts of memories in a folder, by their SHA-256. Several processes may use it. Don't use it on the loop."""

    def __init__(self, folder: Path, limit_bytes: int = CACHE_BYTES) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes

    def get(self, part: Part) -> bytes | None:
        """None if the part is not there, or was changed."""
        path = self._folder / part.sha256.hex()
        try:
            with os.fdopen(open_plainly(path, os.O_RDONLY), "rb") as file:
                data = check_sha256(part.sha256, file.read(part.size + 1))
            os.utime(path)  # keeps the parts that were used last
        except (OSError, WireError):
            return None
        return data

    def put(self, data: bytes) -> None:
        """Stores a part. If all parts together take too much space, drops those used longest ago."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with suppress(FileNotFoundError, FileExistsError):  # another process writes the same part
                write_atomically(self._folder / hashlib.sha256(data).hexdigest(), data, 0o600)
            self._trim()
        except OSError as error:
            logger.warning("can't keep a part of a memory in %s: %s", self._folder, error.strerror)

    def _trim(self) -> None:
        files, size = [], 0
        for path in self._folder.iterdir():
            with suppress(FileNotFoundError):  # other processes write and drop files, too
                files.append((path.stat(), path))
        for about, path in sorted(files, key=lambda f: -f[0].st_mtime):
            size += about.st_size
            if size > self._limit_bytes:
                with suppress(FileNotFoundError):
                    path.unlink()


@dataclass(frozen=True, eq=False)
class Opened:
    """A revision of a memory."""

    entry: LibraryEntry
    manifest: MemoryManifest
    filled_C: Booleans
    """Cells that have shards."""
    codebook: Codebook
    encoder: Encoder | None
    """None if searches need no queries in words."""


class MemoryParts:
    """Fetches the parts of one memory, from the disk or from its hosts."""

    def __init__(
        self,
        memory: MemoryID,
        memories: MemoryRegistry,
        client: PartClient,
        cache: PartCache,
        stage: Stage = logger.debug,
    ) -> None:
        """`stage`: called with what is being fetched, in words."""
        self._memory = memory
        self._memories = memories
        self._client = client
        self._cache = cache
        self._stage = stage
        self._nodes: list[NodeInfo] = []

    async def open(
        self, entry: LibraryEntry, before: Opened | None = None, *, with_encoder: bool = True
    ) -> Opened:
        """`before`: another open revision. All revisions of a memory have the same encoder and codebook.

        Raises TransferError if no host gives a part, UnreachableError, and WireError if a part is not what its
        publisher should have written.
        """
        self._nodes = []
        manifest = await self._part(entry, "list of shards", entry.manifest, MemoryManifest.parse)
        if (manifest.name, manifest.revision, manifest.grid) != (
            entry.memory.name, entry.revision, entry.grid,
        ):  # fmt: skip
            raise WireError(f"the manifest of {entry.memory} does not belong to revision {entry.revision}")
        filled_C = np.zeros(prod(manifest.grid), np.bool_)
        filled_C[[number_of(cell, manifest.grid) for cell in manifest.by_cell]] = True
        if before is not None:
            if manifest.index != before.manifest.index:
                raise WireError(f"revision {entry.revision} of {entry.memory} has another index")
            return Opened(entry, manifest, filled_C, before.codebook, before.encoder)
        parse_codebook = partial(Codebook.from_bytes, grid=manifest.grid, dimensions=manifest.dimensions)
        codebook = self._part(entry, "codebook", manifest.codebook, parse_codebook)
        if not with_encoder:
            return Opened(entry, manifest, filled_C, await codebook, None)
        parse_encoder = partial(load_encoder, manifest.encoder_kind, dimensions=manifest.dimensions)
        encoder = self._part(entry, "encoder", manifest.encoder, parse_encoder)
        both = asyncio.create_task(codebook), asyncio.create_task(encoder)
        try:
            return Opened(entry, manifest, filled_C, *await asyncio.gather(*both))
        finally:
            await cancel_all(both)

    async def _some_nodes(self, entry: LibraryEntry) -> list[NodeInfo]:
        """Some hosts in random order, so that readers don't all fetch from the same one."""
        if not self._nodes:
            found = await self._memories.some_nodes(entry, _SOURCES)
            self._nodes = random.SystemRandom().sample(list(found.values()), len(found))
        return self._nodes

    async def _part(self, entry: LibraryEntry, what: str, part: Part, parse: Callable[[bytes], T]) -> T:
        data = await asyncio.to_thread(self._cache.get, part)
        if data is None:
            self._stage(f"fetching the {what} of {self._memory}: {bytes_in_words(part.size)}")
            check = partial(check_sha256, part.sha256)
            name = str(self._memory)
            nodes = await self._some_nodes(entry)
            data = await self._client.fetch_any(nodes, name, part.sha256, part.size, check)
            await asyncio.to_thread(self._cache.put, data)
        return await asyncio.to_thread(parse, data)


class _HostsOfCell(NamedTuple):
    """What each host has of one cell: the roots of its shards."""

    serving: dict[PeerID, frozenset[bytes]]
    leaving: dict[PeerID, frozenset[bytes]]


class MemoryDirectory:
    """One memory, as a retriever needs it. `open` it, then run `keep_fresh` as a task that somebody owns."""

    def __init__(
        self, memories: MemoryRegistry, registry: Registry, parts: MemoryParts, opened: Opened
    ) -> None:
        self._memories = memories
        self._registry = registry
        self._parts = parts
        self._opened = opened
        self._active_C: Booleans | None = None
        self._hosts = BoundedDict[Cell, _HostsOfCell](_CELLS)
        self._nodes: dict[PeerID, NodeInfo] = {}
        self._empty: dict[frozenset[PeerID], Booleans] = {}
        """For each set of avoided peers, the cells that nobody else hosts. Cleared whenever more is known."""
        self._reading = asyncio.Lock()
        self._reading_ahead: asyncio.Task[None] | None = None
        """The task that reads cells which the first search does not search, but which may have its texts."""
        self._retries = Backoff[int](*_RETRY_S, most=_CELLS)
        """Regions of which searches missed something."""
        self._retrying: asyncio.Task[None] | None = None
        self._spending = Spending()
        """The DHT calls for what is read again."""
        self._following = asyncio.Lock()
        self._pace = ManifestPace()
        self._used_at = loop_time()

    @classmethod
    async def open(
        cls, entry: LibraryEntry, memories: MemoryRegistry, registry: Registry, parts: MemoryParts
    ) -> Self:
        """Raises LibraryError if no host gives the memory's parts, and UnreachableError if the DHT does not answer."""
        try:
            return cls(memories, registry, parts, await parts.open(entry))
        except TransferError as error:
            raise LibraryError(
                f"no live host of memory {entry.memory} could send its index ({error}): wait until a "
                "node that hosts it, or "
                "its publisher, is back"
            ) from error
        except WireError as error:
            raise LibraryError(f"memory {entry.memory} can't be used: {error}") from error

    @property
    def memory(self) -> MemoryID:
        return self._opened.entry.memory

    @property
    def manifest(self) -> MemoryManifest:
        return self._opened.manifest

    @property
    def nodes(self) -> Collection[NodeInfo]:
        """The nodes that host the cells of recent searches."""
        return self._nodes.values()

    def encode(self, texts: Sequence[str], turn: Turn | None = None) -> tuple[Vectors, Floats]:
        vectors_QD = self._encoder.encode_questions(texts)
        vectors_QD = vectors_QD if turn is None else turn(vectors_QD)
        return vectors_QD, self._opened.codebook.scores(vectors_QD)

    @property
    def word_weight(self) -> float:
        return self._encoder.word_weight

    def rarity(self, words: Iterable[str]) -> list[float]:
        return self._encoder.rarity(words)

    async def locate(self, scores_QC: Floats, count: int, avoided: frozenset[PeerID]) -> Located:
        self._used_at = loop_time()
        opened = self._opened
        grid = opened.manifest.grid
        async with self._reading:  # concurrent searches need the same cells
            for _ in range(_ROUNDS):
                live_C = opened.filled_C & ~self._known_empty(avoided)
                if self._active_C is not None:
                    live_C &= self._active_C
                chosen_Qk, valid_Qk = await _nearest(scores_QC, live_C, count)
                cells = {
                    number: coordinate_of(number, grid) for number in np.unique(chosen_Qk[valid_Qk]).tolist()
                }
                unknown = [cell for cell in cells.values() if cell not in self._hosts]
                if not unknown:
                    break
                if not self._hosts:  # the next nearest cells have texts
                    further_Qk, are_valid_Qk = await _nearest(scores_QC, live_C, _GUESSED * count)
                    further = np.setdiff1d(further_Qk[are_valid_Qk], list(cells))[
                        : max(0, _MOST_GUESSED - len(cells))
                    ]
                    ahead = self._regions_of(coordinate_of(number, grid) for number in further.tolist())
                    reading = self._read_hosts(ahead - self._regions_of(unknown))
                    self._reading_ahead = self._registry.lookups.spawn(reading)
                await self._read_hosts(self._regions_of(unknown))
                if self._active_C is None and not all(any(self._hosts.get(cell, ())) for cell in unknown):
                    self._active_C = await self._read_active()
        nodes, hosts = self._nodes, await self._askable(cells.values(), avoided)
        best_Qk, filled_Qk = await _nearest(scores_QC, opened.filled_C, count)
        missing_Qk = filled_Qk & ~live_C[best_Qk]
        return Located(
            opened.manifest,
            [
                [cells[number] for number in chosen_k[valid_k].tolist()]
                for chosen_k, valid_k in zip(chosen_Qk, valid_Qk, strict=True)
            ],
            [
                [coordinate_of(number, grid) for number in best_k[missing_k].tolist()]
                for best_k, missing_k in zip(best_Qk, missing_Qk, strict=True)
            ],
            hosts,
            nodes,
        )

    def note(self, searched: Collection[Cell], missing: Collection[Cell]) -> None:
        known = self._hosts.keys() & missing
        lacking = self._regions_of(known)
        if len(known) < len(missing):  # the index says that nobody hosts the others
            lacking.add(_INDEX)
        for region in {_INDEX, *self._regions_of(searched)} - lacking:
            self._retries.succeeded(region)
        if self._retrying is not None and not self._retrying.done():
            return
        now = loop_time()
        due = [region for region in lacking if not self._retries.holds_back(region, now)][:_MOST_RETRIED]
        if due:
            for region in due:
                self._retries.failed(region, now)
            with self._spending.counted():
                self._retrying = self._registry.lookups.spawn(self._read_again(due))

    async def _read_again(self, regions: Sequence[int]) -> None:
        if _INDEX in regions:
            self._active_C = await self._read_active(FRUGAL)
        await self._read_hosts([region for region in regions if region != _INDEX], again=True)

    async def hosts_of(
        self, shards: Collection[ShardInfo], located: Located, avoided: frozenset[PeerID]
    ) -> Located:
        async with self._reading:
            cells = {shard.cell for shard in shards}
            if self._reading_ahead is not None and cells - self._hosts.keys():
                await asyncio.wait([self._reading_ahead])
            if unknown := cells - self._hosts.keys():
                await self._read_hosts(self._regions_of(unknown))
        nodes, hosts = self._nodes, await self._askable(cells, avoided)
        return replace(located, hosts={**located.hosts, **hosts}, nodes={**located.nodes, **nodes})

    async def follow(self) -> MemoryManifest:
        async with self._following:
            libraries = await self._memories.libraries()
            listed = (
                entry for entries in libraries.values() for entry in entries if entry.memory == self.memory
            )
            entry = next(listed, self._opened.entry)
            if entry.revision > self._opened.entry.revision and self._pace.allows(entry, loop_time()):
                try:
                    self._opened = await self._parts.open(entry, self._opened)
                except (TransferError, WireError) as error:
                    raise UnreachableError(f"revision {entry.revision} of {self.memory}: {error}") from error
                # of these, only the shards of the previous revision are known
                self._forget_hosts()
                logger.info("memory %s now has revision %d", self.memory, entry.revision)
            return self._opened.manifest

    async def refresh(self) -> None:
        """Reads the hosts again of some of the regions that searches needed: those read longest ago. Raises
        UnreachableError.
        """
        due = set[int]()
        for cell in self._hosts:
            due |= self._regions_of([cell])
            if len(due) >= _READ_IN_TURN:
                break
        await self._read_hosts(due, again=True)
        known = set[PeerID]().union(*(peers for hosts in self._hosts.values() for peers in hosts))
        self._nodes = {peer_id: node for peer_id, node in self._nodes.items() if peer_id in known}
        self._empty.clear()

    async def keep_fresh(self) -> None:
        """Refreshes all this for ever: the hosts as long as somebody searches. It follows new revisions even if nobody
        does, because a trainer that has all passages on its disk must learn which are revoked. If the DHT does not
        answer, what is known stays.
        """
        period = UpkeepPeriod(_REFRESH_EVERY_S, lambda: self._spending.bytes)
        with self._spending.counted():
            async with asyncio.TaskGroup() as group:
                group.create_task(period.repeat(self._refresh_while_used))
                group.create_task(self._keep_following())

    async def _keep_following(self) -> None:
        while True:
            await asyncio.sleep(_FOLLOW_EVERY_S)
            await self._try(self.follow)

    async def _refresh_while_used(self) -> None:
        if loop_time() - self._used_at > _USED_S:
            self._forget()
        else:
            await self._try(self.refresh)

    async def _try(self, work: Callable[[], Coroutine[Any, Any, object]]) -> None:
        try:
            await work()
        except UnreachableError as error:
            logger.debug("can't refresh the view of memory %s: %s", self.memory, error)

    def _forget(self) -> None:
        """Makes the next search read the hosts again."""
        self._active_C = None
        self._nodes = {}
        self._forget_hosts()

    def _forget_hosts(self) -> None:
        self._hosts.clear()
        self._empty.clear()
        self._retries = Backoff(*_RETRY_S, most=_CELLS)

    @property
    def _encoder(self) -> Encoder:
        assert self._opened.encoder is not None, "it was opened without"
        return self._opened.encoder

    async def _read_active(self, limits: SearchLimits = DEFAULT_LIMITS) -> Booleans:
        opened = self._opened
        active_C = np.zeros(prod(opened.manifest.grid), np.bool_)
        active = await self._memories.active_regions(opened.entry, limits)
        shards = (shard for region in active for shard in opened.manifest.by_region.get(region, ()))
        active_C[[number_of(shard.cell, opened.manifest.grid) for shard in shards]] = True
        return active_C

    def _regions_of(self, cells: Iterable[Cell]) -> set[int]:
        by_cell, region_of = self._opened.manifest.by_cell, self._opened.manifest.region_of
        return {region_of[shard] for cell in cells for shard in by_cell.get(cell, ())}

    async def _read_hosts(self, regions: Collection[int], *, again: bool = False) -> None:
        """`again`: reads node records of all hosts, which say who has left. Otherwise only those of hosts that are not
        known and don't say in a region how to call them.
        """
        limits = FRUGAL if again else DEFAULT_LIMITS
        found = await self._memories.region_hosts(
            self.memory, regions, with_contacts=not again, limits=limits
        )
        hosts = [host for some in found.values() for host in some]
        contacts = contacts_of(hosts)
        peers = {host.peer_id for host in hosts}
        wanted = some_of(peers, _NODES_AGAIN) if again else list(peers - contacts.keys() - self._nodes.keys())
        for at in range(0, len(wanted), _READ_AT_ONCE):
            asked = set(wanted[at : at + _READ_AT_ONCE])
            nodes = await self._registry.nodes(asked, limits=limits)
            # records expire; a search in progress keeps the nodes that it has
            kept = {peer_id: node for peer_id, node in self._nodes.items() if peer_id not in asked}
            self._nodes = kept | nodes
        # not before, because `refresh` drops nodes that host no known cell
        self._nodes = contacts | self._nodes
        # the records of very many hosts are also freed region by region
        del hosts
        slices = TimeSlices()
        for region in sorted(found):
            for cell in {shard.cell for shard in self._opened.manifest.by_region.get(region, ())}:
                of_cell = self._regions_of([cell])
                # if one is missing, the cell was set with an earlier region, or not all of its hosts were read
                if of_cell <= found.keys():
                    manifest = self._opened.manifest  # there may be a later one by now
                    hosts_of_cell = [host for each in of_cell for host in found[each]]
                    self._hosts[cell] = self._having(manifest.by_cell.get(cell, ()), hosts_of_cell)
                    if self._active_C is not None and any(self._hosts[cell]):
                        self._active_C[number_of(cell, manifest.grid)] = True
                    self._empty.clear()  # now: this may be cancelled at the next line
                await slices.pause()
            del found[region]
        self._empty.clear()  # `_nodes` may have changed, too

    def _having(self, shards: Iterable[ShardInfo], hosts: Iterable[RegionHost]) -> _HostsOfCell:
        """The hosts that have some of a cell's shards; not all hosts if there are very many. Other shards that they
        announce are dropped to save memory.
        """
        known = {shard.short: shard.root for shard in shards}
        having = _HostsOfCell({}, {})
        for host in some_of([h for h in hosts if not known.keys().isdisjoint(h.shards)], _HOSTS_OF_CELL):
            theirs = having.serving if host.state is ReplicaState.SERVING else having.leaving
            roots = frozenset(root for short, root in known.items() if short in host.shards)
            theirs[host.peer_id] = theirs.get(host.peer_id, frozenset()) | roots
        return having

    async def _askable(
        self, cells: Iterable[Cell], avoided: frozenset[PeerID]
    ) -> dict[Cell, Mapping[PeerID, Set[bytes]]]:
        """For each cell, the hosts to ask, and what each has of it: the roots of its shards. Those that leave, such as
        the publisher, are asked only for shards that no others have.
        """
        nodes, slices, found = self._nodes, TimeSlices(), dict[Cell, Mapping[PeerID, Set[bytes]]]()
        # the cells' hosts may be forgotten, or read again, while other tasks run
        for cell, hosts in [(cell, self._hosts.get(cell, _HostsOfCell({}, {}))) for cell in cells]:
            serving, leaving = (
                {peer: roots for peer, roots in some.items() if peer not in avoided and peer in nodes}
                for some in hosts
            )
            served = frozenset[bytes]().union(*serving.values()) if leaving else frozenset[bytes]()
            found[cell] = serving | {
                peer: rest for peer, roots in leaving.items() if (rest := roots - served)
            }
            await slices.pause()
        return found

    def _known_empty(self, avoided: frozenset[PeerID]) -> Booleans:
        empty_C = self._empty.get(avoided)
        if empty_C is None:
            if len(self._empty) >= _EMPTY:  # hosts fail and come back: only current entries are kept
                self._empty.clear()
            grid = self._opened.manifest.grid
            empty_C = self._empty[avoided] = np.zeros(prod(grid), np.bool_)
            empty = [
                number_of(cell, grid)
                for cell, hosts in self._hosts.items()
                if not any(peer not in avoided and peer in self._nodes for some in hosts for peer in some)
            ]
            empty_C[empty] = True
        return empty_C


async def _nearest(scores_QC: Floats, among_C: Booleans, count: int) -> tuple[Integers, Booleans]:
    """The numbers of the cells with the highest scores, and a mask of the valid ones. Both [Q, at most count].

    This is the beam search over a grid of one dimension, in which all experts are weighed.
    """
    search = partial(select_experts, [scores_QC], [among_C], min(count, max(1, int(among_C.sum()))))
    chosen = await asyncio.to_thread(search) if scores_QC.size > _FEW_SCORES else search()
    return chosen.coordinates[..., 0], chosen.valid
