"""What this peer accepts of the values that other peers store, answer and hand over.

A value's size is checked before it is unpacked. It has one fixed type and can't be nested, because deep nesting would
crash the unpacker by a stack overflow. A dictionary is one level of entries. Entries that the validator rejects are
left out, and the others are used.
"""

import asyncio
import hashlib
import math
import random
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeGuard

import msgpack

from peer.errors import WireError
from peer.identity import PeerID
from peer.kademlia.routing import id_bytes
from peer.loop import TimeSlices
from peer.parsing import ParseGuard

MAX_MESSAGE_BYTES = 128 * 2**10
"""The limit for a message, in either direction."""
MAX_ENTRIES = 512
"""The most entries under one key. A shard of nodes is full at 192."""
MAX_KEY_BYTES = 96 * 2**10
"""All entries of one key, packed. With the nearest nodes, they fit into one message."""
MAX_ANSWER_BYTES = MAX_MESSAGE_BYTES - 8 * 2**10
"""The limit for an answer or a request, without its sender's identity."""
MAX_FIND_KEYS = 16
"""Keys in one look-up request. Their nearest nodes take 19 KiB of the answer, and three records for each 48 KiB."""
MAX_ITEMS = 256
"""Items in one request to store entries."""
MAX_DIGESTS = 2048
"""Digests in one look-up request, of entries that the caller has: 16 KiB."""
SMALL_ENTRY_BYTES = 160
"""A packed index entry is no larger. Answers include such entries even if the caller wants no others."""
ITEM_OVERHEAD_BYTES = 64
"""What an item takes in a store request besides its value."""
MAX_SUBKEY_BYTES = 64
DICTIONARY = b""
"""Stands in place of a subkey if the value is a dictionary of entries."""
_MAX_NUMBER = 2**31
_ENTRY_BYTES = 24
"""The most bytes that msgpack needs for an entry besides its subkey and value."""
_HEADER_BYTES = 32
"""The most bytes that msgpack needs for a dictionary besides its entries."""
_DICTIONARY_TYPE = 0x50
"""The msgpack extension type of a dictionary."""
_NO_BOUND = math.inf
"""Stands at the beginning of a dictionary, as the largest number of entries it may have."""

Subkey: TypeAlias = int | bytes
"""A coordinate or a PeerID."""


class Entry(NamedTuple):
    """What is stored under one subkey of a key."""

    value: bytes
    """As it is stored: packed with msgpack."""
    expires_at: float


Entries: TypeAlias = dict[Subkey, Entry]


class Record(NamedTuple):
    """An entry and where it is stored, as validators see it."""

    key: bytes
    """The key's ID."""
    subkey: bytes
    """As it is stored, like the value: packed with msgpack."""
    value: bytes
    expires_at: float


class Validator(Protocol):
    """Decides which entries a peer stores, and which it believes in answers."""

    def validate(self, record: Record) -> bool: ...


class EntryChecker:
    """Reads the entries that other peers bring. Entries that can't be read are ignored.

    Validators judge one message after another, in slices that don't hold the loop.
    """

    def __init__(self, guard: ParseGuard | None = None) -> None:
        """`guard`: the process's."""
        self._guard = guard or ParseGuard()
        self._turn = asyncio.Lock()

    def unpack(self, sender: PeerID, data: bytes) -> Entries:
        """The entries of a dictionary; empty if the data is not one."""
        return self._guard.read("dht", sender, partial(unpack_entries, data)) or {}

    async def accepted(
        self, validator: Validator | None, sender: PeerID, key: int, entries: Entries
    ) -> Entries:
        """The entries that the validator accepts; all of them if there is no validator."""
        if validator is None:
            return entries
        kept, packed = {}, id_bytes(key)
        async with self._turn:
            slices = TimeSlices()
            for subkey, entry in entries.items():
                record = Record(packed, pack(subkey), *entry)
                if self._guard.read("dht", sender, partial(validator.validate, record)):
                    kept[subkey] = entry
                await slices.pause()
        return kept


def pack(value: object) -> bytes:
    """Packs a value or a subkey."""
    packed: bytes = msgpack.packb(value)
    return packed


def unpack(data: bytes) -> str | bytes | int:
    """Unpacks a value or a subkey. Raises WireError."""
    value = _unpack(data, _refuse_type, max_array_len=0, max_map_len=0, max_ext_len=0)
    if type(value) not in (str, bytes, int):
        raise WireError("a value in the DHT must be text, bytes or a number")
    return value  # type: ignore[no-any-return]  # just checked


def unpack_subkey(data: bytes) -> Subkey:
    """Raises WireError."""
    subkey = unpack(data) if len(data) <= MAX_SUBKEY_BYTES + 2 else None
    if subkey is None or not _is_subkey(subkey):
        raise WireError("a subkey must be a coordinate or a PeerID")
    return subkey


def unpack_entries(data: bytes) -> Entries:
    """The entries of a dictionary that another peer packed, without malformed ones. Raises WireError.

    If there are too many, a random sample is kept, so that nobody can choose which are lost.
    """
    if len(data) > MAX_MESSAGE_BYTES:
        raise WireError(f"a dictionary has {len(data)} bytes, more than is allowed")
    outer = _unpack(data, _mark_dictionary, max_array_len=0, max_map_len=0)
    if not isinstance(outer, msgpack.ExtType):
        raise WireError("not a dictionary")
    inner = _unpack(outer.data, _drop_type)
    if not isinstance(inner, list) or len(inner) not in (3, 4) or not isinstance(inner[2], list):
        raise WireError("a dictionary must have a size, an expiry and entries")
    _, _, rows, *common = inner
    if len(rows) > MAX_ENTRIES:
        rows = random.sample(rows, MAX_ENTRIES)
    if common and _is_small(common[0]):
        rows = [[row[0], *common, row[1]] if type(row) is list and len(row) == 2 else row for row in rows]
    return {row[0]: Entry(row[1], row[2]) for row in rows if _is_well_formed(row)}


def pack_entries(entries: Mapping[Subkey, Entry]) -> bytes:
    """Packs a dictionary for the wire. If several entries have the first short value, it is packed once: all index
    entries of a key have the same.
    """
    latest = max((entry.expires_at for entry in entries.values()), default=-math.inf)
    values = [value for value, _ in entries.values() if len(value) <= SMALL_ENTRY_BYTES]
    common = values[0] if values and values.count(values[0]) > 1 else None
    rows = [
        [subkey, expires_at] if value == common else [subkey, value, expires_at]
        for subkey, (value, expires_at) in entries.items()
    ]
    inner = [_NO_BOUND, latest, rows] if common is None else [_NO_BOUND, latest, rows, common]
    return pack(msgpack.ExtType(_DICTIONARY_TYPE, pack(inner)))


def packed_bytes(entries: Mapping[Subkey, Entry]) -> int:
    """An upper bound for the size that `pack_entries` returns."""
    return _HEADER_BYTES + sum(entry_bytes(subkey, entry) for subkey, entry in entries.items())


def entry_bytes(subkey: Subkey, entry: Entry) -> int:
    """An entry's share of `packed_bytes`."""
    return _ENTRY_BYTES + (len(subkey) if isinstance(subkey, bytes) else 0) + len(entry.value)


def digest_of(key: int, subkey: Subkey, entry: Entry) -> int:
    """A short name for an entry. A renewed entry has a later expiry, and so another digest."""
    name = id_bytes(key) + pack([subkey, entry.expires_at])
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big")


def large_entries(entries: Entries) -> int:
    """How many of the entries are not index entries."""
    return sum(entry_bytes(subkey, entry) > SMALL_ENTRY_BYTES for subkey, entry in entries.items())


def some_of(entries: Entries, room: int, rng: random.Random) -> Entries:
    """The small entries, and as many of the others as fit into `room` bytes, drawn at random."""
    kept = {}
    for subkey in rng.sample(list(entries), len(entries)):
        size = entry_bytes(subkey, entries[subkey])
        if size > SMALL_ENTRY_BYTES:
            if size > room:
                continue
            room -= size
        kept[subkey] = entries[subkey]
    return kept


def _unpack(data: bytes, hook: Any, **bounds: int) -> Any:
    try:
        return msgpack.unpackb(data, ext_hook=hook, raw=False, **bounds)
    except (ValueError, TypeError, RecursionError) as error:  # ValueError: includes all of msgpack's own
        raise WireError("not packed like a value in the DHT") from error


def _mark_dictionary(code: int, data: bytes) -> msgpack.ExtType:
    if code != _DICTIONARY_TYPE:
        raise ValueError("no other types are packed")
    return msgpack.ExtType(code, data)


def _drop_type(code: int, data: bytes) -> None:
    """Makes an entry with such a value malformed."""


def _refuse_type(code: int, data: bytes) -> None:
    raise ValueError("no types are packed here")


def _is_small(value: object) -> TypeGuard[bytes]:
    """Whether several entries may have this value. If it were long, a short message could make much work."""
    return isinstance(value, bytes) and len(value) <= SMALL_ENTRY_BYTES


def _is_well_formed(row: object) -> bool:
    if not isinstance(row, list) or len(row) != 3:
        return False
    subkey, value, expires_at = row
    return (
        _is_subkey(subkey)
        and isinstance(value, bytes)
        and type(expires_at) is float
        and math.isfinite(expires_at)
    )


def _is_subkey(value: object) -> TypeGuard[Subkey]:
    if type(value) is int:
        return 0 <= value < _MAX_NUMBER
    return isinstance(value, bytes) and len(value) <= MAX_SUBKEY_BYTES
