"""The memories of a swarm in the DHT: which there are, who publishes them, and who hosts their shards.

All publishers list their memories under one key, each in a record of its own. The founder may publish and, in a swarm
that admits by token, librarians; records of others are refused by the peers that store and read them. For each region
of a memory, hosts announce which of its shards they have, and mark the region as active in an index, as for experts.
"""

import asyncio
import random
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

from dht.announcements import NodeInfo, ReplicaState, count, parse_node
from dht.founder_records import LIFETIME_S
from dht.memory import (
    MAX_LABEL_CHARACTERS,
    MAX_LICENSE_CHARACTERS,
    MAX_MANIFEST_BYTES,
    MAX_SHARDS,
    MAX_SHARDS_OF_REGION,
    SHORT_ROOT_BYTES,
    MemoryID,
    MemoryManifest,
    Part,
    check_grid,
    region_count,
)
from dht.records import (
    INDEX_PIECE,
    MAX_LIBRARY_BYTES,
    MAX_MEMORIES,
    parse_peer_id,
    sign_record,
)
from dht.registry import Registry, active_under, some_of
from peer.bounded import BoundedDict
from peer.errors import LibraryError, RecordError, WireError
from peer.formatting import printable
from peer.identity import Identity, PeerID
from peer.kademlia.lookups import FRUGAL, Item
from peer.kademlia.search import DEFAULT_LIMITS, SearchLimits
from peer.loop import TimeSlices
from peer.merkle import HASH_BYTES
from peer.rates import TokenBuckets
from peer.wire import records_pb2

WANTED_REPLICAS = 2
"""Replicas wanted for each shard: nodes take shards that have fewer."""
MAX_LISTED_LICENSES = 8
_RENEW_AFTER_S = LIFETIME_S / 2
_MAX_PUBLISHERS = 256
"""The most publishers whose libraries are read and remembered."""
_MAX_HOSTS = 256
"""The most hosts of one region whose records are read."""
_REGIONS_AT_ONCE = 512
"""Regions in one look-up. A look-up has one deadline."""
_LOOKED_UP_EVERY = 8
"""In one of so many rounds, `follow` looks the libraries up instead of asking a single holder."""
_MANIFEST_BYTES_PER_S, _MANIFESTS_AT_ONCE_BYTES = 16 * 2**10, 2 * MAX_MANIFEST_BYTES
_PEER_ID_BYTES = 34
_MOST_NAMED = 16
"""The most memories that an error names."""
MOST_CONTACTS = 3
"""The most regions of a memory in which a host says how to call it, which takes up to 0.8 KB at each of the region's
five holders.
"""
_SOME, _FEW = 256, 8
"""When looking for some hosts: the most regions that are read, and how many of them are read first."""


class ManifestPace:
    """Limits how fast the manifests of each publisher are fetched: small ones at once, the largest every 17 minutes.
    Otherwise, a publisher of ever new revisions would fill the lines of all hosts, searchers and dashboards. Pure:
    `now` is an argument.
    """

    def __init__(self) -> None:
        self._fetched = TokenBuckets[PeerID](_MANIFEST_BYTES_PER_S, _MANIFESTS_AT_ONCE_BYTES)

    def allows(self, entry: "LibraryEntry", now: float) -> bool:
        """Whether the entry's manifest may be fetched now. If so, it counts as fetched."""
        if self._fetched.wait_s(entry.publisher, now):
            return False
        self._fetched.take(entry.publisher, entry.manifest.size, now)
        return True


@dataclass(frozen=True)
class LibraryEntry:
    """One memory, as its publisher lists it."""

    memory: MemoryID
    publisher: PeerID
    manifest: Part
    revision: int
    passages: int
    """The number of passages. Each counts once, although it lies in two cells."""
    total_bytes: int
    """The size of all shards, in bytes."""
    licenses: tuple[str, ...]
    """At most 8. The manifest names all of them."""
    about: str
    shards: int
    grid: tuple[int, ...]

    @classmethod
    def of(cls, manifest: MemoryManifest, part: Part, publisher: PeerID) -> Self:
        """`part`: the manifest as a file that peers fetch."""
        return cls(
            MemoryID.of(manifest.name, publisher),
            publisher,
            part,
            manifest.revision,
            manifest.passages,
            manifest.shard_bytes,
            manifest.licenses[:MAX_LISTED_LICENSES],
            manifest.about,
            len(manifest.shards),
            manifest.grid,
        )

    @classmethod
    def parse(cls, message: records_pb2.LibraryEntry, publisher: PeerID) -> Self:
        """Raises WireError or RecordError."""
        if len(message.manifest_sha256) != HASH_BYTES or not 0 < message.manifest_bytes <= MAX_MANIFEST_BYTES:
            raise RecordError("a memory lacks a manifest")
        if message.revision < 1 or len(message.licenses) > MAX_LISTED_LICENSES or message.shards > MAX_SHARDS:
            raise RecordError("a memory has no revision, or more licences or shards than are allowed")
        return cls(
            MemoryID.of(message.name, publisher),
            publisher,
            Part(message.manifest_sha256, message.manifest_bytes),
            message.revision,
            count(message.passages),
            count(message.total_bytes),
            tuple(printable(text, MAX_LICENSE_CHARACTERS) for text in message.licenses),
            printable(message.about, MAX_LABEL_CHARACTERS),
            message.shards,
            check_grid(message.grid),
        )

    def message(self) -> records_pb2.LibraryEntry:
        return records_pb2.LibraryEntry(
            name=self.memory.name,
            manifest_sha256=self.manifest.sha256,
            manifest_bytes=self.manifest.size,
            revision=self.revision,
            passages=self.passages,
            total_bytes=self.total_bytes,
            licenses=self.licenses,
            about=self.about,
            shards=self.shards,
            grid=self.grid,
        )


@dataclass(frozen=True)
class RegionHost:
    """A peer that hosts shards of a region."""

    peer_id: PeerID
    state: ReplicaState
    """SERVING or LEAVING."""
    shards: frozenset[bytes]
    """The first 8 bytes of each root."""
    node: NodeInfo | None = field(default=None, compare=False)
    """How to call it, if that was asked for and its record of the region says so."""


@dataclass(frozen=True)
class _Library:
    """The memories that one publisher lists."""

    record: bytes
    expires_at: float
    entries: tuple[LibraryEntry, ...]


class MemoryRegistry:
    """One peer's access to the DHT's records about memories in its swarm. Invalid records are left out."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._keys = registry.keys
        self._known = BoundedDict[PeerID, _Library](_MAX_PUBLISHERS)
        self._asks_left = 0
        """How many more times `follow` asks a single holder before it looks the libraries up."""

    async def libraries(self) -> dict[PeerID, tuple[LibraryEntry, ...]]:
        """The memories of each publisher that may publish here. Raises UnreachableError.

        An older record never replaces one that was read before, and no memory goes back to an older revision.
        """
        key = self._keys.library
        return await self._read((await self._registry.get([key]))[key])

    async def follow(self) -> dict[PeerID, tuple[LibraryEntry, ...]]:
        """The same, for peers that do so in every round. Thousands may host memories, and a few nodes hold the
        libraries. So it usually asks only one of these; a single one may hide something for a few rounds.
        """
        key = self._keys.library
        if self._asks_left and await self._registry.ask_holder(key):
            self._asks_left -= 1
            return await self._read(self._registry.stored(key))
        found = await self.libraries()
        self._asks_left = _LOOKED_UP_EVERY - 1
        return found

    async def _read(
        self, found: Mapping[object, tuple[Any, float]]
    ) -> dict[PeerID, tuple[LibraryEntry, ...]]:
        """Takes the records that were found under the libraries' key."""
        author, slices = self._keys.author.to_bytes(), TimeSlices()
        # the founder's record is read, however many others there are
        for subkey in (*some_of(found.keys() - {author}, _MAX_PUBLISHERS - 1), author):
            value, _ = found.get(subkey, (None, 0.0))
            if value is not None:
                await slices.pause()
                self._registry.guard.read("memory", subkey, partial(self._take, subkey, value))
        return {publisher: library.entries for publisher, library in self._valid()}

    def record_of(self, publisher: PeerID) -> bytes:
        """The publisher's record that was read or stored last, for `hear`; empty if there is none."""
        known = self._known.get(publisher)
        return b"" if known is None else known.record

    def hear(self, publisher: PeerID, record: bytes, caller: PeerID) -> bool:
        """Takes a publisher's record that another peer shows. It must be signed, as in the DHT. Returns whether it is
        newer than the known one.
        """
        before = self._known.get(publisher)
        self._registry.guard.read("memory", caller, partial(self._take, publisher.to_bytes(), record))
        return self._known.get(publisher) is not before

    def saved(self) -> bytes:
        """The records that were read and are still valid, for `restore` in a later run."""
        records = sorted((publisher.to_bytes(), library.record) for publisher, library in self._valid())
        return b"".join(
            publisher + len(record).to_bytes(4, "little") + record for publisher, record in records
        )

    def restore(self, data: bytes) -> None:
        """Restores them, so that no older records take their place. Invalid ones are left out."""
        at = 0
        while at < len(data):
            publisher, begin = data[at : at + _PEER_ID_BYTES], at + _PEER_ID_BYTES + 4
            at = begin + int.from_bytes(data[begin - 4 : begin], "little")
            with suppress(RecordError, WireError):
                self._take(publisher, data[begin:at])

    async def publish_library(self, entries: Sequence[LibraryEntry], signer: Identity | None = None) -> None:
        """Stores these entries as the publisher's whole list. `signer`: the founder, if this peer runs for it.

        Raises LibraryError if they are too many for one record, and UnreachableError if no peer accepts it.
        """
        publisher = self._registry.peer_id if signer is None else signer.peer_id
        await self.libraries()
        known = self._known.get(publisher)
        # later than the last one, even if the clock was set back: of two records, peers keep the one that expires last
        after = 0.0 if known is None else known.expires_at + 1.0
        payload = records_pb2.RecordPayload(
            key=self._keys.library,
            expires_at=max(self._registry.now() + LIFETIME_S, after),
            library=records_pb2.Library(memories=[entry.message() for entry in entries]),
        )
        record = self._registry.seal(payload) if signer is None else sign_record(signer, payload)
        if len(record) > MAX_LIBRARY_BYTES or len(entries) > MAX_MEMORIES:
            raise LibraryError(
                f"your {len(entries)} memories don't fit into the DHT's record of a publisher, which has room for "
                f"{MAX_MEMORIES} in {MAX_LIBRARY_BYTES // 1024} KB: give them fewer licences or a shorter line about "
                "them, or publish some with another key"
            )
        await self._registry.store([Item(payload.key, publisher.to_bytes(), record, payload.expires_at)])
        self._known[publisher] = _Library(record, payload.expires_at, tuple(entries))

    async def keep_libraries(self) -> None:
        """Stores the records that were read again, so that they outlive their holders. Renews this peer's own when that
        is due.

        Raises UnreachableError.
        """
        if self._is_own_due():
            # the publisher may have published a later one from elsewhere, or lost the right to
            await self.libraries()
            if self._is_own_due():
                await self.publish_library(self._known[self._registry.peer_id].entries)
        items = [
            Item(self._keys.library, publisher.to_bytes(), library.record, library.expires_at)
            for publisher, library in self._valid()
        ]
        if items:
            await self._registry.store_again(items)

    def _is_own_due(self) -> bool:
        own = self._known.get(self._registry.peer_id)
        return own is not None and own.expires_at - _RENEW_AFTER_S <= self._registry.now()

    async def announce(
        self,
        memory: MemoryID,
        regions: Mapping[int, tuple[ReplicaState, Collection[bytes]]],
        lifetime_s: float,
    ) -> None:
        """Announces which shards of each region this peer hosts, by their roots or the first 8 bytes of these, and in
        some of the regions also how to call this peer. Marks the regions as active. Raises UnreachableError.
        """
        await self.store(await self.announcements(memory, regions, lifetime_s))

    async def store(self, announcements: Sequence[Item]) -> None:
        """Stores what `announcements` returned. Raises UnreachableError."""
        await self._registry.store(announcements)

    async def announcements(
        self,
        memory: MemoryID,
        regions: Mapping[int, tuple[ReplicaState, Collection[bytes]]],
        lifetime_s: float,
        most_contacts: int = MOST_CONTACTS,
    ) -> list[Item]:
        """What `announce` stores. If two overlap, those that were made later count, in whatever order they arrive.

        `most_contacts`: in how many of the regions to say how to call this peer, at most.
        """
        expires_at = self._registry.now() + lifetime_s
        items: dict[tuple[str, int | bytes], Item] = {}
        own, contact = self._registry.peer_id.to_bytes(), self._registry.contact
        hosting = [region for region, (state, _) in regions.items() if state is not ReplicaState.WITHDRAWN]
        introduced = some_of(hosting, most_contacts)
        for region, (state, roots) in regions.items():
            key = self._keys.memory_region(memory, region)
            shorts = sorted({root[:SHORT_ROOT_BYTES] for root in roots})[:MAX_SHARDS_OF_REGION]
            node = contact if region in introduced else None
            body = records_pb2.RegionRecord(state=state.value, shards=b"".join(shorts), node=node)
            until = self._registry.later(key, expires_at)
            payload = records_pb2.RecordPayload(key=key, expires_at=until, region=body)
            items[key, own] = Item(key, own, self._registry.seal(payload), until)
            if state is not ReplicaState.WITHDRAWN:
                index = self._keys.memory_index(memory, region)
                items[index, region] = Item(index, region, index, expires_at)
            await asyncio.sleep(0)  # there may be hundreds: let other tasks run
        return list(items.values())

    async def active_regions(
        self, entry: LibraryEntry, limits: SearchLimits = DEFAULT_LIMITS
    ) -> frozenset[int]:
        """The regions of a memory that some peer announces. Raises UnreachableError."""
        most = region_count(entry.grid, entry.shards)
        keys = [self._keys.memory_index(entry.memory, first) for first in range(0, most, INDEX_PIECE)]
        found = await self._registry.get(keys, limits)
        return frozenset(region for key in keys for region in active_under(key, found[key]) if region < most)

    async def region_hosts(
        self,
        memory: MemoryID,
        regions: Collection[int],
        *,
        with_contacts: bool = False,
        limits: SearchLimits = FRUGAL,
    ) -> dict[int, tuple[RegionHost, ...]]:
        """The hosts of shards of each region. `with_contacts`: how to call them, too. `limits`: other ones find them
        sooner, for more bytes. Raises UnreachableError.
        """
        hosts: dict[int, tuple[RegionHost, ...]] = {}
        wanted, slices = list(regions), TimeSlices()
        for begin in range(0, len(wanted), _REGIONS_AT_ONCE):
            some = wanted[begin : begin + _REGIONS_AT_ONCE]
            keys = {self._keys.memory_region(memory, region): region for region in some}
            found = await self._registry.get(list(keys), limits)
            for key, region in keys.items():
                hosts[region] = await self._hosts_under(key, found[key], with_contacts, slices)
        return hosts

    async def some_hosts(self, entry: LibraryEntry, most: int = 8) -> tuple[RegionHost, ...]:
        """Some peers that host shards of any region, found without reading all regions. Raises UnreachableError."""
        active = await self.active_regions(entry)
        regions = random.SystemRandom().sample(list(active), min(len(active), _SOME))
        # strangers can mark regions that nobody hosts: if the first ones are empty, the others are read
        for some in (regions[:_FEW], regions[_FEW:]):
            hosting = await self.region_hosts(entry.memory, some, with_contacts=True, limits=DEFAULT_LIMITS)
            found = [host for each in hosting.values() for host in each]
            # a host of several regions is taken from one that says how to call it
            hosts = {host.peer_id: host for host in sorted(found, key=lambda host: host.node is not None)}
            if hosts:
                return tuple(some_of(hosts.values(), most))
        return ()

    async def some_nodes(self, entry: LibraryEntry, most: int = 8) -> dict[PeerID, NodeInfo]:
        """Some peers that host shards of any region, and how to call them. Raises UnreachableError."""
        hosts = await self.some_hosts(entry, most)
        found = contacts_of(hosts)
        return found | await self._registry.nodes({host.peer_id for host in hosts} - found.keys())

    def _valid(self) -> Iterator[tuple[PeerID, _Library]]:
        """The known and unexpired libraries of publishers that may still publish: a token may have been revoked."""
        for publisher, library in list(self._known.items()):
            try:
                self._registry.unseal(library.record, self._keys.library, publisher)
            except RecordError:
                del self._known[publisher]
            else:
                yield publisher, library

    def _take(self, subkey: object, value: object) -> None:
        """Raises RecordError or WireError, and then changes nothing."""
        publisher = parse_peer_id(subkey)
        payload = self._registry.unseal(value, self._keys.library, publisher)
        assert isinstance(value, bytes), "what was opened is bytes"
        known = self._known.get(publisher)
        if known is not None and payload.expires_at <= known.expires_at:
            return
        entries = read_library(payload, publisher)
        if known is not None:
            seen = {entry.memory: entry for entry in known.entries}
            entries = tuple(_newer(seen.get(entry.memory, entry), entry) for entry in entries)
        self._known[publisher] = _Library(value, payload.expires_at, entries)

    async def _hosts_under(
        self, key: str, found: Mapping[object, tuple[Any, float]], with_contacts: bool, slices: TimeSlices
    ) -> tuple[RegionHost, ...]:
        records = [(subkey, value) for subkey, (value, _) in found.items() if isinstance(value, bytes)]
        hosts = []
        for subkey, value in some_of(records, _MAX_HOSTS):
            await slices.pause()
            read = partial(self._host, key, subkey, value, with_contacts)
            host = self._registry.guard.read("memory", subkey, read)
            if host is not None:
                hosts.append(host)
        return tuple(hosts)

    def _host(self, key: str, subkey: object, value: bytes, with_contact: bool) -> RegionHost | None:
        peer_id = parse_peer_id(subkey)
        return read_region(self._registry.unseal(value, key, peer_id), peer_id, with_contact)


def contacts_of(hosts: Iterable[RegionHost]) -> dict[PeerID, NodeInfo]:
    """How to call these hosts, as far as their records say so. The record that expires last counts."""
    nodes: dict[PeerID, NodeInfo] = {}
    for host in hosts:
        known = nodes.get(host.peer_id)
        if host.node is not None and (known is None or known.expires_at < host.node.expires_at):
            nodes[host.peer_id] = host.node
    return nodes


def read_library(payload: records_pb2.RecordPayload, publisher: PeerID) -> tuple[LibraryEntry, ...]:
    """Parses a publisher's checked record. Raises RecordError or WireError."""
    entries = tuple(LibraryEntry.parse(message, publisher) for message in payload.library.memories)
    if len({entry.memory for entry in entries}) < len(entries):
        raise RecordError("the publisher lists two memories with the same name")
    return entries


def read_region(
    payload: records_pb2.RecordPayload, peer_id: PeerID, with_contact: bool = False
) -> RegionHost | None:
    """Parses a host's checked record of a region; None if it no longer hosts any of it. Raises RecordError."""
    try:
        state = ReplicaState(payload.region.state)
    except ValueError as error:
        raise RecordError(f"the region has the unknown state {payload.region.state}") from error
    if state is ReplicaState.WITHDRAWN:
        return None
    if state is ReplicaState.CLAIMED:
        raise RecordError("a region can't be claimed")
    shards = payload.region.shards
    has_contact = with_contact and payload.region.HasField("node") and not payload.region.node.left
    return RegionHost(
        peer_id,
        state,
        frozenset(shards[at : at + SHORT_ROOT_BYTES] for at in range(0, len(shards), SHORT_ROOT_BYTES)),
        parse_node(payload.region.node, payload.expires_at, peer_id) if has_contact else None,
    )


def with_entry(library: Sequence[LibraryEntry], entry: LibraryEntry) -> tuple[LibraryEntry, ...]:
    """A publisher's library after this memory is published. Raises LibraryError if it has a newer revision of it."""
    listed = next((each for each in library if each.memory == entry.memory), entry)
    if listed.revision > entry.revision:
        raise LibraryError(
            f"revision {listed.revision} of {entry.memory} is published, and this is revision {entry.revision}: "
            "build the next one on the newest (`talkoot memory build --base DIR`), or give this memory another name"
        )
    if listed.revision == entry.revision and listed.manifest != entry.manifest:
        raise LibraryError(
            f"another revision {entry.revision} of {entry.memory} is published: build the next one on that "
            "(`talkoot memory build --base DIR`), or give this memory another name"
        )
    return (*(each for each in library if each.memory != entry.memory), entry)


def find_memory(libraries: Mapping[PeerID, Sequence[LibraryEntry]], name: str | None) -> LibraryEntry:
    """The memory of that name or id; None: the only one. Raises LibraryError, which lists the memories."""
    listed = [entry for entries in libraries.values() for entry in entries]
    if not listed:
        raise LibraryError("no memory is published in this swarm: `talkoot memory publish` publishes one")
    found = [entry for entry in listed if name in (None, entry.memory.name, str(entry.memory))]
    if len(found) == 1:
        return found[0]
    ids = ", ".join(sorted(str(entry.memory) for entry in found or listed)[:_MOST_NAMED])
    if name is None:
        raise LibraryError(
            f"several memories are published in this swarm: pass one of them as --memory NAME: {ids}"
        )
    if found:
        raise LibraryError(f"several publishers have a memory {name!r}: pass one of {ids}")
    raise LibraryError(f"no memory {printable(name, 40)!r} is published in this swarm: pass one of {ids}")


def _newer(seen: LibraryEntry, entry: LibraryEntry) -> LibraryEntry:
    """The newer revision. `entry` is from the later list, and wins a tie."""
    return entry if entry.revision >= seen.revision else seen
