"""A peer's reads and writes of its swarm's records in the DHT, and the swarm's lists of nodes and trainers.

`dht.experts` and `dht.library` read and write their own kinds of records through it.
"""

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from prometheus_client import CollectorRegistry, Counter, Histogram

from dht.admission import SwarmAdmission
from dht.announcements import NodeInfo, PeerInfo, TrainerInfo, contact_in, read_node, read_trainer
from dht.records import (
    FEWEST_DIGITS,
    FEWEST_TRAINER_DIGITS,
    MAX_LIFETIME_S,
    FounderRecord,
    SwarmKeys,
    child_shards,
    choose_shard,
    digits_of,
    first_shards,
    open_record,
    parse_peer_id,
    shards_of,
    sign_record,
)
from peer import clock
from peer.bounded import BoundedDict
from peer.errors import UnreachableError, WireError
from peer.identity import Identity, PeerID
from peer.kademlia.lookups import FRUGAL, Item, Lookups
from peer.kademlia.node import KademliaNode
from peer.kademlia.routing import key_id_of
from peer.kademlia.search import DEFAULT_LIMITS, SearchLimits
from peer.kademlia.validation import MAX_KEY_BYTES, Entry, unpack
from peer.loop import TimeSlices
from peer.metrics import SECONDS, start_at_zero
from peer.parsing import Message, ParseGuard
from peer.wire import admission_pb2, records_pb2

_HOPS = (0, 1, 2, 3, 4, 5, 6, 8, 12)


T = TypeVar("T")
Info = TypeVar("Info", bound=PeerInfo)

_SHARD_FOR_S = 600.0
"""How long a peer relies, roughly, on the shard it was last listed in before it checks again."""
_MOST_SHARDS = 4096
"""The most shards of one length that are read. Somebody could fill shards to make readers read them all."""
_NODE_STEPS, _TRAINER_STEPS = (4, 28, 224), (1, 3, 12)
"""How many shards of nodes and of trainers are read in each step, if only some peers are needed."""
_CHILDREN = 3
"""How many child shards of well-filled shards are read, if only some peers are needed."""
_LATER_S = 0.001
_MAX_WRITTEN = 16384


class Entries(dict[object, tuple[Any, float]]):
    """What was read under a key: subkey → (value, expiry)."""

    unread: int = 0
    """About how many records were not read."""


def some_of(found: Collection[T], most: int, rng: random.Random | None = None) -> list[T]:
    """All of them, or a random `most`, so that no writer can choose which are left out."""
    listed = list(found)
    return listed if len(listed) <= most else (rng or random.SystemRandom()).sample(listed, most)


def active_under(key: str, found: Mapping[object, tuple[Any, float]]) -> set[int]:
    """The coordinates of the index entries under this key."""
    return {c for c, (value, _) in found.items() if type(c) is int and value == key}


def _below(listed: Mapping[str, Collection[PeerID]]) -> list[str]:
    """The shards to read after these. `listed`: the peers in each shard."""
    return [lower for shard, some in listed.items() for lower in child_shards(shard, len(some))]


@dataclass(frozen=True)
class _PeerKind(Generic[Info]):
    """One of the two kinds of peers that a swarm lists: nodes or trainers."""

    message: Message
    record_key: Callable[[PeerID], str]
    shard_key: Callable[[str], str]
    fewest_digits: int
    """Of a shard."""
    steps: Sequence[int]
    """How many shards are read in each step, if only some peers are needed."""
    read: Callable[[records_pb2.RecordPayload, PeerID], Info | None]


class Registry:
    """One peer's access to its swarm's DHT keys. All answers are checked, and invalid ones are left out."""

    def __init__(
        self,
        dht: KademliaNode,
        keys: SwarmKeys,
        identity: Identity,
        admission: SwarmAdmission | None = None,
        *,
        guard: ParseGuard | None = None,
        deadline_s: float = 15.0,
        now: Callable[[], float] = clock.now,
        metrics: CollectorRegistry | None = None,
        rng: random.Random | None = None,
    ) -> None:
        """`admission`: the swarm's rules and this peer's badge; None accepts every record. `guard`: the process's.

        `deadline_s`: the longest time for one look-up or store, over all its keys.
        """
        self.keys = keys
        self._keys_read = Counter("talkoot_dht_keys_read", "Keys looked up in the DHT.", registry=metrics)
        self._records_stored = Counter(
            "talkoot_dht_records_stored", "Records written to it.", registry=metrics
        )
        # failed calls took as long as their deadline
        self._seconds = Histogram(
            "talkoot_dht_seconds",
            "Time of a DHT operation, which may be for many keys.",
            ["operation"],
            buckets=SECONDS,
            registry=metrics,
        )
        start_at_zero(self._seconds, "get", "store")
        self._hops = Histogram(
            "talkoot_dht_hops",
            "Questions one after another that the look-up of a key took; none when this peer holds it.",
            buckets=_HOPS,
            registry=metrics,
        )
        self.guard: ParseGuard = guard or ParseGuard()
        self.lookups: Lookups = Lookups(dht, rng=rng, guard=self.guard)
        self._dht = dht
        self._identity = identity
        self._admission = admission
        self._deadline_s = deadline_s
        self.now = now
        self.rng: random.Random = rng or random.SystemRandom()
        self._written: BoundedDict[str, float] = BoundedDict(_MAX_WRITTEN)
        """When this peer's last record under each key expires."""
        self._earlier_until: float | None = None
        """By about this time, everything that this peer wrote before its restart has expired; None: not read yet."""
        self._nodes = _PeerKind("node", keys.node, keys.node_shard, FEWEST_DIGITS, _NODE_STEPS, read_node)
        self._trainers = _PeerKind(
            "trainer", keys.trainer, keys.trainer_shard, FEWEST_TRAINER_DIGITS, _TRAINER_STEPS, read_trainer
        )
        self.contact: records_pb2.NodeRecord | None = None
        """Where this peer's last node record says that it is reached; None if it is no node."""
        self._own_shards: dict[Message, tuple[str, float]] = {}
        """For each kind of peers, the shard in which this peer is listed, and until when that is not checked again."""

    @property
    def peer_id(self) -> PeerID:
        """This peer's own."""
        return self._identity.peer_id

    @property
    def spent_bytes(self) -> int:
        """Bytes of this peer's calls to the DHT so far, without those that are counted apart, by a `Spending`."""
        return self._dht.spent_bytes - self._dht.spent_apart_bytes

    def sign_manifest(self, manifest_json: bytes, expires_at: float) -> FounderRecord:
        """The manifest's record, to be stored by `republish`."""
        payload = records_pb2.RecordPayload(
            key=self.keys.manifest, expires_at=expires_at, manifest_json=manifest_json
        )
        return FounderRecord(sign_record(self._identity, payload), payload)

    def sign_revocations(self, serials: Collection[int], expires_at: float) -> FounderRecord:
        """The record of the serials of revoked grants, to be stored by `republish`."""
        payload = records_pb2.RecordPayload(
            key=self.keys.revocations,
            expires_at=expires_at,
            revocations=admission_pb2.Revocations(serials=sorted(serials)),
        )
        return FounderRecord(sign_record(self._identity, payload), payload)

    async def republish(self, record: FounderRecord) -> None:
        """Stores a record of the founder again, so that it outlives the peers that held it."""
        author = self.keys.author.to_bytes()
        await self.store_again([Item(record.payload.key, author, record.data, record.expires_at)])

    async def store_again(self, items: Sequence[Item]) -> None:
        """Stores records that others have signed. A peer that has a later one refuses it, which is no failure."""
        await self._in_time(self.lookups.store(items))

    async def find_founder_record(self, key: str) -> FounderRecord | None:
        """The founder's record under `keys.manifest` or `keys.revocations`."""
        value, _ = (await self.get([key]))[key].get(self.keys.author.to_bytes(), (None, 0.0))
        return self.read_founder_record(key, value)

    def stored(self, key: str) -> Entries:
        """The entries under the key that this peer itself stores: as a node of the DHT, or because it has read them."""
        entries = self._dht.storage.get(key_id_of(key)).items()
        return Entries((subkey, (unpack(each.value), each.expires_at)) for subkey, each in entries)

    def stored_founder_record(self, key: str) -> FounderRecord | None:
        """The founder's record under that key which this peer itself stores."""
        value, _ = self.stored(key).get(self.keys.author.to_bytes(), (None, 0.0))
        return self.read_founder_record(key, value)

    async def ask_one(self, key: str) -> bool:
        """See `Lookups.ask_one`."""
        return await self._in_time(self.lookups.ask_one(key_id_of(key)))

    async def ask_holder(self, key: str) -> bool:
        """See `Lookups.ask_holder`."""
        return await self._in_time(self.lookups.ask_holder(key_id_of(key)))

    def tell(self, record: FounderRecord, nodes: int) -> None:
        """Begins to store a founder's record at some known nodes, drawn at random."""
        item = Item(record.payload.key, self.keys.author.to_bytes(), record.data, record.expires_at)
        self.lookups.spawn(self.lookups.tell(item, nodes))

    def read_founder_record(self, key: str, value: object) -> FounderRecord | None:
        """The founder's record for that key, from any value; None if it is not that record, or has expired."""
        if not isinstance(value, bytes):
            return None  # most often, there is no record
        author = self.keys.author
        message: Message = "manifest" if key == self.keys.manifest else "revocations"
        payload = self.guard.read(message, author, lambda: open_record(value, key, author, self.now()))
        return None if payload is None else FounderRecord(value, payload)

    def later(self, key: str, expires_at: float) -> float:
        """The expiry of this peer's next record under the key. It is later than that of the last one, because holders
        keep the record that expires last.
        """
        expires_at = max(expires_at, min(self._earlier_until or 0.0, self.now() + MAX_LIFETIME_S))
        last = self._written.get(key, 0.0)
        if last <= self.now() + MAX_LIFETIME_S + 1.0:  # a later expiry was refused
            expires_at = max(expires_at, last + _LATER_S)
        self._written[key] = expires_at
        return expires_at

    async def leave(self, lifetime_s: float) -> None:
        """Announces that this peer is no longer a node of the swarm."""
        await self.publish_node(records_pb2.NodeRecord(left=True), lifetime_s, is_listed=False)

    async def publish_node(
        self, node: records_pb2.NodeRecord, lifetime_s: float, *, is_listed: bool = True
    ) -> None:
        """Stores this peer's node record. Announce no experts before: see `later`. `is_listed`: lists the peer in its
        shard, too, where others look for nodes.
        """
        self.contact = None if node.left else contact_in(node)
        await self._publish_self(self._nodes, records_pb2.RecordPayload(node=node), lifetime_s, is_listed)

    async def publish_trainer(self, trainer: records_pb2.TrainerRecord, lifetime_s: float) -> None:
        """Stores this peer's trainer record, and lists the peer in its shard."""
        await self._publish_self(self._trainers, records_pb2.RecordPayload(trainer=trainer), lifetime_s)

    async def _publish_self(
        self,
        kind: _PeerKind[Any],
        payload: records_pb2.RecordPayload,
        lifetime_s: float,
        is_listed: bool = True,
    ) -> None:
        me, subkey = self.peer_id, self.peer_id.to_bytes()
        if self._earlier_until is None:
            # records of an earlier run may expire later than this run's, whose first periods are short. Holders keep
            # the record that expires last, so new records are made to expire after them.
            with suppress(UnreachableError):  # the next record reads it
                own = (await self._infos(kind, [me], DEFAULT_LIMITS, with_left=True)).get(me)
                # its last announcement of experts may expire later by one period
                self._earlier_until = 0.0 if own is None else own.expires_at + own.renew_every_s
        shards = [kind.shard_key(await self._own_shard(kind))] if is_listed else []
        payload.key = kind.record_key(me)
        payload.expires_at = self.later(payload.key, self.now() + lifetime_s)
        record = Item(payload.key, subkey, self.seal(payload), payload.expires_at)
        try:
            await self.store([record, *(Item(key, subkey, key, payload.expires_at) for key in shards)])
        except UnreachableError:
            self._earlier_until = None  # perhaps holders have a later record that nobody returned in time
            raise

    async def _own_shard(self, kind: _PeerKind[Any]) -> str:
        """The shard in which this peer should be listed, according to a recent check."""
        shard, until = self._own_shards.get(kind.message, ("", 0.0))
        if self.now() >= until:
            shards = shards_of(self.peer_id, kind.fewest_digits)
            listed = await self._listed(kind, shards, FRUGAL)
            shard = choose_shard(shards, {each: len(some - {self.peer_id}) for each, some in listed.items()})
            self._own_shards[kind.message] = shard, self.now() + _SHARD_FOR_S * self.rng.uniform(0.5, 1.5)
        return shard

    async def nodes(
        self, peer_ids: Collection[PeerID], *, with_left: bool = False, limits: SearchLimits = FRUGAL
    ) -> dict[PeerID, NodeInfo]:
        """The valid node records of these peers. `with_left`: includes nodes that have left in an orderly way.
        `limits`: see `Lookups.find`; by default, the look-up is cheap rather than fast.
        """
        return await self._infos(self._nodes, peer_ids, limits, with_left=with_left)

    async def trainers(
        self, peer_ids: Collection[PeerID], *, with_left: bool = False
    ) -> dict[PeerID, TrainerInfo]:
        """The valid trainer records of these peers. `with_left`: includes trainers that have left in an orderly way."""
        return await self._infos(self._trainers, peer_ids, DEFAULT_LIMITS, with_left=with_left)

    async def _infos(
        self, kind: _PeerKind[Info], peer_ids: Collection[PeerID], limits: SearchLimits, *, with_left: bool
    ) -> dict[PeerID, Info]:
        keys = {kind.record_key(peer_id): peer_id for peer_id in peer_ids}
        found = await self.get(list(keys), limits)
        infos, slices = {}, TimeSlices()
        for key, peer_id in keys.items():
            await slices.pause()
            value, _ = found[key].get(peer_id.to_bytes(), (None, 0.0))
            if value is None:
                continue
            info = self.guard.read(kind.message, peer_id, partial(self._info, kind, value, key, peer_id))
            if info is not None and (with_left or not info.left):
                infos[peer_id] = info
        return infos

    def _info(self, kind: _PeerKind[Info], value: object, key: str, peer_id: PeerID) -> Info | None:
        return kind.read(self.unseal(value, key, peer_id), peer_id)

    def why_out(self, peer_id: PeerID) -> str:
        """See `SwarmAdmission.why_out`."""
        return "" if self._admission is None else self._admission.why_out(peer_id)

    async def is_seen_by_others(self) -> bool:
        """Whether another peer returns this one's node record. After it was published, some should."""
        return await self._is_held_by_another(self.keys.node(self.peer_id), self.peer_id)

    async def duplicate(self) -> NodeInfo | None:
        """This peer's node record, if others have one that outlives all that this process wrote: another process with
        the same identity wrote it, now or before this one started. It is signed, so that no other peer can forge it.
        """
        me, key = self.peer_id, self.keys.node(self.peer_id)
        entry = await self._held_by_others(key, me.to_bytes())
        if entry is None:
            return None
        value = entry.value
        info = self.guard.read("node", me, lambda: self._info(self._nodes, unpack(value), key, me))
        is_own = info is None or info.left or info.expires_at <= self._written.get(key, math.inf)
        return None if is_own else info

    async def is_manifest_held(self) -> bool:
        """Whether another peer returns the manifest, as some do in every reachable swarm."""
        return await self._is_held_by_another(self.keys.manifest, self.keys.author)

    async def node_ids(self, most: int = 65536) -> frozenset[PeerID]:
        """The peers listed in the node shards; at most `most` of them, drawn at random.

        Anybody can list a peer that does not exist. Only its node record shows that it does.
        """
        return await self._ids(self._nodes, most)

    async def trainer_ids(self, most: int = 4096) -> frozenset[PeerID]:
        """The peers listed in the trainer shards; at most `most` of them, drawn at random."""
        return await self._ids(self._trainers, most)

    async def _ids(self, kind: _PeerKind[Any], most: int) -> frozenset[PeerID]:
        listed: set[PeerID] = set()
        shards: Sequence[str] = first_shards(kind.fewest_digits)
        while shards and len(listed) < most:
            found = await self._listed(kind, shards)
            listed.update(*found.values())
            shards = some_of(_below(found), _MOST_SHARDS)
        # a copy of a set need not compute the hashes again
        return frozenset(listed if len(listed) <= most else some_of(listed, most))

    async def some_node_ids(self, enough: int) -> frozenset[PeerID]:
        """At least `enough` peers, from as few node shards as possible; all if there are fewer."""
        found, _ = await self._some_ids(self._nodes, enough)
        return found

    async def some_trainer_ids(self, enough: int) -> tuple[frozenset[PeerID], int]:
        """At least `enough` peers, from as few trainer shards as possible, and about how many all shards list."""
        return await self._some_ids(self._trainers, enough)

    async def _some_ids(self, kind: _PeerKind[Any], enough: int) -> tuple[frozenset[PeerID], int]:
        """Reads only a few child shards of well-filled ones, and assumes that the others are like them, so that long
        lists, which anybody can make, cost little.
        """
        first = first_shards(kind.fewest_digits)
        shards, read = self.rng.sample(first, len(first)), 0
        listed: dict[str, set[PeerID]] = {}
        found: set[PeerID] = set()
        for step in kind.steps:
            some, read = shards[read : read + step], read + step
            listed |= await self._listed(kind, some, FRUGAL)
            found = found.union(*listed.values())
            if len(found) >= enough:
                break
        times = len(shards) / read
        about = times * len(found)
        while lower := _below(listed):
            some = self.rng.sample(lower, min(_CHILDREN, len(lower)))
            times *= len(lower) / len(some)
            listed = await self._listed(kind, some, FRUGAL)
            found = found.union(*listed.values())
            about += times * sum(map(len, listed.values()))
        return frozenset(found), round(about)

    async def _listed(
        self, kind: _PeerKind[Any], shards: Iterable[str], limits: SearchLimits = DEFAULT_LIMITS
    ) -> dict[str, set[PeerID]]:
        """The peers that are listed in each shard, and belong there."""
        keys = {kind.shard_key(digits): digits for digits in shards}
        found = await self.get(list(keys), limits)
        listed: dict[str, set[PeerID]] = {digits: set() for digits in keys.values()}
        slices = TimeSlices()
        for key, digits in keys.items():
            await slices.pause()
            for subkey, (value, _) in found[key].items():
                try:
                    peer_id = parse_peer_id(subkey)
                except WireError:
                    continue
                if value == key and digits_of(peer_id.to_bytes()).startswith(digits):
                    listed[digits].add(peer_id)
        return listed

    def seal(self, payload: records_pb2.RecordPayload) -> bytes:
        """Signs a payload, with this peer's badge if it has one."""
        if self._admission is not None and self._admission.badge is not None:
            payload.badge.CopyFrom(self._admission.badge)
        return sign_record(self._identity, payload)

    def unseal(self, value: object, key: str, peer_id: PeerID) -> records_pb2.RecordPayload:
        """Raises RecordError, also if the swarm's rules don't allow that peer to write this."""
        payload = open_record(value, key, peer_id, self.now())
        if self._admission is not None:
            self._admission.check_record(payload, peer_id)
        return payload

    async def _is_held_by_another(self, key: str, writer: PeerID) -> bool:
        """Whether any other peer has a record by this writer. The first that has it is enough."""
        subkey = writer.to_bytes()
        return await self._held_by_others(key, subkey, sought=subkey) is not None

    async def _held_by_others(self, key: str, subkey: bytes, sought: bytes | None = None) -> Entry | None:
        """Asks only others: a normal look-up also returns what this peer stores itself. `sought`: as in
        `Lookups.find`.
        """
        key_id = key_id_of(key)
        find = self.lookups.find([key_id], FRUGAL, besides_self=True, room=MAX_KEY_BYTES, sought=sought)
        return (await self._in_time(find))[key_id].entries.get(subkey)

    async def store(self, items: Sequence[Item]) -> None:
        """Raises UnreachableError if no peer accepted one of this peer's records, or any of the items. Of other items,
        peers may have later ones.
        """
        self._records_stored.inc(len(items))
        if not items:
            return
        accepted, me = await self._in_time(self.lookups.store(items), "store"), self.peer_id.to_bytes()
        own = [item for item in items if item.subkey == me]
        # one that was written later may have arrived before
        newest = [item for item in own if item.expires_at >= self._written.get(item.key, 0.0)]
        is_outdated = bool(own) and not newest
        if not (accepted or is_outdated) or any((i.key, i.subkey) not in accepted for i in newest):
            doubt = clock.CLOCK.doubt or "; is this machine's clock right?"
            raise UnreachableError(f"no DHT peer accepted our records{doubt}")

    async def get(
        self, keys: Collection[str], limits: SearchLimits = DEFAULT_LIMITS, room: int = MAX_KEY_BYTES
    ) -> dict[str, Entries]:
        """The entries under each key, merged from the answers of several holders.

        `limits`, `room`: see `Lookups.find`. Raises UnreachableError if nobody answered for one of the keys, because it
        may not be empty.
        """
        if not keys:
            return {}
        ids = {key: key_id_of(key) for key in keys}
        self._keys_read.inc(len(keys))
        found = await self._in_time(self.lookups.find(list(ids.values()), limits, room=room), "get")
        for result in found.values():
            self._hops.observe(result.search.rounds)
        if not all(result.someone_answered for result in found.values()):
            raise UnreachableError("no DHT peer answered")
        read, slices = {}, TimeSlices()
        for key, key_id in ids.items():
            await slices.pause()
            entries = found[key_id].entries.items()
            read[key] = Entries((subkey, (unpack(each.value), each.expires_at)) for subkey, each in entries)
            read[key].unread = found[key_id].unread
        return read

    async def _in_time(self, call: Awaitable[T], operation: str = "") -> T:
        """`operation`: the label for measuring its time; empty: it is not measured."""
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._deadline_s):
                return await call
        except TimeoutError:
            raise UnreachableError(f"the DHT did not answer within {self._deadline_s:.0f} s") from None
        finally:
            if operation:
                self._seconds.labels(operation).observe(time.monotonic() - began)
