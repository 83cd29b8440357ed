"""What a swarm stores in the DHT: the keys, the signed records and unsigned index entries, and who accepts them.

A record is signed by the peer that writes it. Its key, its owner and its expiry are inside the signed bytes, so none of
them can be changed. An index entry only says where to look: which coordinates are active, or which peers are listed. It
is small and unsigned; the records that it leads to are signed.

Nodes are listed in shards, which split as they fill up. A shard is named by two to four hex digits, and a node belongs
to every shard whose digits are a prefix of its own. It is listed in the first of them that has room. If a shard is well
filled, readers also read its child shards. So no key has more than about 330 entries, which take 15 KB. Four digits
hold 13 million nodes. Trainers are listed in the same way, in shards of one to four digits.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from google.protobuf.message import DecodeError

from dht.memory import MAX_SHARDS_OF_REGION, SHORT_ROOT_BYTES, MemoryID
from dht.uid import UID
from peer import clock
from peer.averaging import MAX_UPDATE_COUNT
from peer.bounded import BoundedDict
from peer.clock import CLOCK_TOLERANCE_S
from peer.errors import RecordError, WireError
from peer.identity import Identity, PeerID, is_peer_id, peer_id_of, verify
from peer.kademlia.routing import id_bytes, key_id_of
from peer.kademlia.validation import Record, unpack
from peer.wire import records_pb2

Rule = Callable[[records_pb2.RecordPayload, PeerID], None]
"""Raises RecordError if that peer may not write that payload."""
MAX_RECORD_BYTES = 16 * 1024
MAX_LIBRARY_BYTES = 8 * 1024
"""The limit for a publisher's list of its memories. The lists of a dozen publishers fit under one key."""
MAX_MEMORIES = 32
"""The most memories that one publisher may list."""
MAX_LIFETIME_S = 600.0
"""The longest lifetime of announcements, node records and entries of shards. Those with a later expiry are refused."""
MAX_INDEX_LIFETIME_S = 3600.0
"""The longest lifetime of index entries."""
MAX_MANIFEST_LIFETIME_S = 40 * 86400.0
"""The longest lifetime of manifests, revocations and libraries."""
MAX_REPLICAS_OF_RECORD = 512
"""The most replicas that a node may announce in one record. They take 8 KB."""
INDEX_PIECE = 128
"""The most coordinates that are marked under one key. Other peers hold the next ones, which spreads the load."""
FEWEST_DIGITS, MOST_DIGITS = 2, 4
FEWEST_TRAINER_DIGITS = 1
FULL = 192
"""A shard with this many nodes or trainers is full: new ones are listed in its child shards. A few more may be listed
at the same moment.
"""
_FOUNDERS = {"manifest_json", "revocations"}
"""Records that only the founder may write."""
_LONG_LIVED = {"manifest_json": ".manifest", "revocations": ".revoked", "library": ".library"}
"""Records with the longer lifetime, and the suffix of their keys after the swarm's id. Nothing else is stored under
these keys.
"""
_MAX_INDEX_BYTES = 128
_REFUSED = 4096
_COORDINATE_LIMIT = 4096
_verified_before = BoundedDict[bytes, None](4096)
"""Digests of the records that were verified last, because several peers answer with the same record. The records
themselves are not kept: once it is parsed, a record of 16 KiB can take half a megabyte.
"""
_SHARD_PATTERN = re.compile(r"\.nodes\.([0-9a-f]{2,4})$|\.trainers\.([0-9a-f]{1,4})$")
_PIECE_PATTERN = re.compile(r":([1-9][0-9]?)$")


@dataclass(frozen=True)
class SwarmKeys:
    """The DHT keys of a swarm. A swarm is identified by its name and the PeerID of its manifest's author,
    the founder.
    """

    name: str
    author: PeerID

    @cached_property
    def swarm_id(self) -> str:
        """The swarm's id in keys and calls. Swarms of the same name by two authors have different ids."""
        return self.name + _author_suffix(self.author)

    @property
    def manifest(self) -> str:
        return f"{self.swarm_id}.manifest"

    @property
    def revocations(self) -> str:
        return f"{self.swarm_id}.revoked"

    def prefix(self, layer: int, coordinate: tuple[int, ...] = ()) -> str:
        return ".".join([self.swarm_id, str(layer), *map(str, coordinate)])

    def index(self, layer: int, coordinate: tuple[int, ...], following: int) -> str:
        """The key under which this next coordinate may be marked as active. A prefix in a large grid has several such
        keys.
        """
        return _piece(self.prefix(layer, coordinate), following)

    def expert(self, uid: UID) -> str:
        return self.prefix(uid.layer, uid.coordinate)

    def node(self, peer_id: PeerID) -> str:
        return f"{self.swarm_id}.node.{peer_id.to_base58()}"

    def node_shard(self, digits: str) -> str:
        return f"{self.swarm_id}.nodes.{digits}"

    def trainer(self, peer_id: PeerID) -> str:
        return f"{self.swarm_id}.trainer.{peer_id.to_base58()}"

    def trainer_shard(self, digits: str) -> str:
        return f"{self.swarm_id}.trainers.{digits}"

    @property
    def library(self) -> str:
        """The key under which all publishers list their memories, each with its PeerID as the subkey."""
        return f"{self.swarm_id}.library"

    def memory_region(self, memory: MemoryID, region: int) -> str:
        """The key under which hosts announce their shards of a memory's region."""
        return f"{self.swarm_id}.memory.{memory}.{region}"

    def memory_index(self, memory: MemoryID, region: int) -> str:
        """The key under which this region may be marked as active. A memory with many has several such keys."""
        return _piece(f"{self.swarm_id}.memory.{memory}", region)


class FounderRecord(NamedTuple):
    """A record that the swarm's founder has signed."""

    data: bytes
    payload: records_pb2.RecordPayload

    @property
    def expires_at(self) -> float:
        return self.payload.expires_at


class RecordValidator:
    """Decides which records this peer accepts, in its own DHT store and in the answers of other peers. A validator gets
    only the hash of the key, so every value names its key and the hashes are compared. Expired records pass, because
    the store drops them itself.
    """

    def __init__(
        self,
        now: Callable[[], float] = clock.now,
        rule: Rule | None = None,
        *,
        swarm_id: str | None = None,
    ) -> None:
        """`rule`: the swarm's rule for records that are otherwise valid. `swarm_id`: None to accept any swarm's
        records.
        """
        self._now = now
        self._rule = rule
        self._prefix = "" if swarm_id is None else f"{swarm_id}."
        self._refused = BoundedDict[bytes, None](_REFUSED)
        """Digests of records with wrong signatures, so that copies are not checked again."""

    def validate(self, record: Record) -> bool:
        try:
            self.check(record)
        except RecordError:
            return False
        return True

    def check(self, record: Record) -> None:
        """Raises RecordError, which says why the record is refused."""
        if not isinstance(record.value, bytes) or not isinstance(record.expires_at, int | float):
            raise RecordError("a stored value must be bytes with an expiry time")
        if len(record.value) > MAX_RECORD_BYTES + 16 or len(record.subkey) > 64:
            raise RecordError("the record is too large")
        try:
            value, subkey = unpack(record.value), unpack(record.subkey)
        except WireError as error:
            raise RecordError("the record can't be parsed") from error
        if isinstance(value, str):
            self._check_index_entry(record, value, subkey)
        elif isinstance(value, bytes):
            self._check_signed(record, value, subkey)
        else:
            raise RecordError("a value must be a record (bytes) or an index entry (text)")

    def _check_signed(self, record: Record, value: bytes, subkey: object) -> None:
        """Checks the signature last, because that costs most."""
        signed, payload = _parsed(value)
        self._check_swarm(payload.key)
        if not _is_digest_of(record.key, payload.key):
            raise RecordError("the record is stored under another key or subkey than the signed ones")
        if payload.expires_at != record.expires_at:
            raise RecordError("the record's expiry is not the signed one")
        _check_lifetime(payload.expires_at, self._now(), _longest_lifetime_s(payload))
        digest = hashlib.blake2b(value, digest_size=16).digest()
        if digest in self._refused:
            raise RecordError("the record was refused before")
        writer = peer_id_of(signed.public_key)
        if subkey != writer.to_bytes():
            raise RecordError("the record is stored under another key or subkey than the signed ones")
        try:
            _verified(value)
        except RecordError:
            self._refused[digest] = None
            raise
        if self._rule is not None:
            self._rule(payload, writer)

    def _check_swarm(self, key: str) -> None:
        if not key.startswith(self._prefix):
            raise RecordError("the record is another swarm's")

    def _check_index_entry(self, record: Record, value: str, subkey: object) -> None:
        if len(record.value) > _MAX_INDEX_BYTES or not _is_digest_of(record.key, value):
            raise RecordError("an index entry's value must be the name of its key")
        self._check_swarm(value)
        if value.endswith(tuple(_LONG_LIVED.values())):
            raise RecordError("no index entries are under such a key")
        longest_s = MAX_INDEX_LIFETIME_S
        if shard := _SHARD_PATTERN.search(value):
            longest_s = MAX_LIFETIME_S
            digits = shard[1] or shard[2]
            if not isinstance(subkey, bytes) or len(subkey) != 34 or not digits_of(subkey).startswith(digits):
                raise RecordError("a shard's subkeys are the PeerIDs that belong to it")
        elif type(subkey) is not int or not 0 <= subkey < _COORDINATE_LIMIT:  # True is not a coordinate
            raise RecordError("a prefix's subkeys are coordinates")
        elif _piece_of(value) != subkey // INDEX_PIECE:
            raise RecordError("the coordinate belongs in another piece of the prefix")
        _check_lifetime(record.expires_at, self._now(), longest_s)


def sign_record(identity: Identity, payload: records_pb2.RecordPayload) -> bytes:
    """What is stored under `payload.key`, signed. The signature is of the writer's key too: otherwise, anybody could
    compute another key under which it is valid.
    """
    data = payload.SerializeToString()
    record = records_pb2.SignedRecord(
        payload=data, public_key=identity.public_key, signature=identity.sign(identity.public_key + data)
    )
    return record.SerializeToString()


def open_record(data: object, key: str, peer_id: PeerID, now: float) -> records_pb2.RecordPayload:
    """The payload of a stored value, after all checks. Raises RecordError."""
    payload = open_old_record(data, key, peer_id)
    if payload.expires_at <= clock.earliest(now):
        raise RecordError("the record has expired")
    _check_lifetime(payload.expires_at, now, _longest_lifetime_s(payload))
    return payload


def open_old_record(data: object, key: str, peer_id: PeerID) -> records_pb2.RecordPayload:
    """The payload of a value that may have expired, after all other checks. Raises RecordError."""
    if not isinstance(data, bytes):
        raise RecordError("a record must be bytes")
    payload, writer = _verified(data)
    if payload.key != key:
        raise RecordError(f"the record belongs under {payload.key[:80]!r}, not {key!r}")
    if writer != peer_id:
        raise RecordError("the record is another peer's")
    return payload


def writers_key(data: bytes) -> bytes:
    """The public key in a record that has been opened before."""
    return records_pb2.SignedRecord.FromString(data).public_key


def parse_peer_id(value: object) -> PeerID:
    """A PeerID from a DHT subkey. Raises WireError."""
    if not isinstance(value, bytes) or not is_peer_id(value):
        raise WireError("not a PeerID that is a hash")
    return PeerID(value)


def digits_of(peer_id: bytes) -> str:
    """The hex digits of a peer, from a hash of its PeerID. Each of its shards is named by the first two or more of
    them.
    """
    return bytes(reversed(peer_id[-MOST_DIGITS // 2 :])).hex()


def shards_of(peer_id: PeerID, fewest: int = FEWEST_DIGITS) -> list[str]:
    """All shards that a node may be listed in, the largest first. `fewest`: digits."""
    digits = digits_of(peer_id.to_bytes())
    return [digits[:count] for count in range(fewest, MOST_DIGITS + 1)]


def first_shards(fewest: int = FEWEST_DIGITS) -> list[str]:
    """The shards with the fewest digits, which readers start from."""
    return [f"{number:0{fewest}x}" for number in range(16**fewest)]


def child_shards(shard: str, listed: int) -> Iterator[str]:
    """The shards to read after this one, which lists `listed` peers. A shard that is half full may have been full
    before.
    """
    if 2 * listed >= FULL and len(shard) < MOST_DIGITS:
        for digit in range(16):
            yield f"{shard}{digit:x}"


def choose_shard(shards: Sequence[str], others: Mapping[str, int]) -> str:
    """The shard in which a peer is listed. `shards`: the result of `shards_of`. `others`: how many other peers each of
    them lists.
    """
    return next((shard for shard in shards if others.get(shard, 0) < FULL), shards[-1])


def _parsed(data: bytes) -> tuple[records_pb2.SignedRecord, records_pb2.RecordPayload]:
    """The record's content, before it is verified."""
    if len(data) > MAX_RECORD_BYTES:
        raise RecordError(f"the record has {len(data)} bytes, more than {MAX_RECORD_BYTES}")
    record, payload = records_pb2.SignedRecord(), records_pb2.RecordPayload()
    try:
        record.ParseFromString(data)
        payload.ParseFromString(record.payload)
    except DecodeError as error:
        raise RecordError("the record can't be parsed") from error
    return record, payload


def _verified(data: bytes) -> tuple[records_pb2.RecordPayload, PeerID]:
    """The payload of a record and its writer, after all checks that depend on nothing else. Raises RecordError."""
    record, payload = _parsed(data)
    writer = peer_id_of(record.public_key)
    digest = hashlib.blake2b(data, digest_size=32).digest()
    if digest in _verified_before:
        return payload, writer
    signed = records_pb2.SignedRecord(
        payload=record.payload, public_key=record.public_key, signature=record.signature
    )
    if data != signed.SerializeToString():  # anybody could make others' records larger
        raise RecordError("the record has more than its writer signed")
    _check_replicas(payload)
    _check_kind(payload, writer)
    _check_memories(payload, len(data))
    verify(record.public_key, record.public_key + record.payload, record.signature)
    _verified_before[digest] = None
    return payload, writer


def _author_suffix(author: PeerID) -> str:
    """The author's part of a swarm's id. It is infeasible to find a second key with the same 70 bits."""
    return f"-{author.to_base58()[-12:]}"


def _check_kind(payload: records_pb2.RecordPayload, writer: PeerID) -> None:
    """Raises RecordError if a long-lived record is not under its own kind of key, or such a key has another kind of
    record.

    It also does so if a founder's record is not the founder's own. So a swarm's name needs to be unique only for each
    founder, and nobody can crowd a founder's keys. Who may write a library depends on the swarm: SwarmAdmission checks
    it.
    """
    body = payload.WhichOneof("body") or ""
    ending = _LONG_LIVED.get(body)
    if ending != next((each for each in _LONG_LIVED.values() if payload.key.endswith(each)), None):
        raise RecordError("the record's kind does not match its key")
    if ending is None:
        return
    swarm_id = payload.key.removesuffix(ending)
    if "." in swarm_id:  # otherwise one writer could store records at many keys for weeks
        raise RecordError("the record's kind does not match its key")
    if body in _FOUNDERS and not swarm_id.endswith(_author_suffix(writer)):
        raise RecordError("only the swarm's founder writes this record")


def _check_replicas(payload: records_pb2.RecordPayload) -> None:
    """Raises RecordError."""
    replicas = payload.hosting.replicas
    if len(replicas) > MAX_REPLICAS_OF_RECORD:
        raise RecordError(f"the record has {len(replicas)} replicas, more than {MAX_REPLICAS_OF_RECORD}")
    for replica in (payload.announcement, *replicas):
        if replica.update_count > MAX_UPDATE_COUNT:
            raise RecordError(f"a replica claims {replica.update_count} updates, more than are possible")


def _check_memories(payload: records_pb2.RecordPayload, size: int) -> None:
    """Raises RecordError if a record about memories is larger than allowed. `size`: of the signed record."""
    if payload.HasField("library") and (
        size > MAX_LIBRARY_BYTES or len(payload.library.memories) > MAX_MEMORIES
    ):
        raise RecordError("the library has more memories than one publisher may have")
    shards = len(payload.region.shards)
    if shards % SHORT_ROOT_BYTES or shards > SHORT_ROOT_BYTES * MAX_SHARDS_OF_REGION:
        raise RecordError(f"a region's list of shards has {shards} bytes, which is not a valid length")


def _longest_lifetime_s(payload: records_pb2.RecordPayload) -> float:
    return MAX_MANIFEST_LIFETIME_S if payload.WhichOneof("body") in _LONG_LIVED else MAX_LIFETIME_S


def _check_lifetime(expires_at: float, now: float, longest_s: float) -> None:
    if not expires_at <= now + longest_s + CLOCK_TOLERANCE_S:  # this form also refuses NaN
        raise RecordError(f"the record claims to live longer than {longest_s:.0f} s")


def _piece(prefix: str, following: int) -> str:
    piece = following // INDEX_PIECE
    return f"{prefix}:{piece}" if piece else prefix


def _piece_of(key: str) -> int:
    found = _PIECE_PATTERN.search(key)
    return int(found[1]) if found else 0


def _is_digest_of(digest: bytes, key: str) -> bool:
    return id_bytes(key_id_of(key)) == digest
