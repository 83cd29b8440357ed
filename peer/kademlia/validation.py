"""Unpacks what strangers packed with msgpack.

hivemind's own unpacker follows tuples within tuples as deep as they go, and at some hundred ends the whole process with
a stack overflow. Here a value has no types of theirs in it, and a dictionary is one level of entries.

What other peers answer and hand over: the entries that the validator refuses are left out, and the others are used.

hivemind refuses a whole dictionary for one bad entry, and a peer that checks nothing stores bad entries from anybody.
"""

import hashlib
import math
import random
from functools import partial
from typing import Any

import msgpack

from peer.errors import WireError
from peer.kademlia.hivemind import (
    DHTID,
    DHTProtocol,
    DHTRecord,
    DictionaryDHTValue,
    MSGPackSerializer,
    RecordValidatorBase,
)

_DICTIONARY = MSGPackSerializer._ext_types[DictionaryDHTValue]


class StrictSerializer(MSGPackSerializer):  # type: ignore[misc]  # hivemind has no types
    """In place of hivemind's, where it reads what others sent."""

    @classmethod
    def loads(cls, buf: bytes) -> object:
        """Raises WireError."""
        return unpack(buf)


def unpack(data: bytes) -> Any:
    """A plain value, or the entries of a dictionary that may be stored under a key. Raises WireError."""
    value = _unpack(data, _mark_dictionary)
    return _dictionary(value.data) if isinstance(value, msgpack.ExtType) else value


def _dictionary(data: bytes) -> DictionaryDHTValue:
    """Leaves out what can't be stored. Raises WireError."""
    value = _unpack(data, _leave_out)
    if not isinstance(value, list) or len(value) != 3 or not isinstance(value[2], list):
        raise WireError("a dictionary has a size, an expiry and entries")
    with DictionaryDHTValue().freeze() as entries:
        for entry in value[2]:
            if _is_right(entry):
                entries.store(*entry)
    return entries


def _is_right(entry: object) -> bool:
    """Whether it is a coordinate or a PeerID, what stands under it, and when that expires."""
    if not isinstance(entry, list) or len(entry) != 3:
        return False
    subkey, value, expires_at = entry
    return (
        type(subkey) in (int, bytes)
        and isinstance(value, bytes)
        and type(expires_at) in (int, float)
        and math.isfinite(expires_at)
    )


def _unpack(data: bytes, hook: Any) -> Any:
    try:
        return msgpack.unpackb(data, ext_hook=hook, raw=False)
    except (ValueError, TypeError, RecursionError) as error:  # ValueError: all of msgpack's own
        raise WireError("not packed as values of the DHT are") from error


def _mark_dictionary(code: int, data: bytes) -> msgpack.ExtType | None:
    return msgpack.ExtType(code, data) if code == _DICTIONARY else None


def _leave_out(code: int, data: bytes) -> None:
    """Such an entry is not right; the others in the dictionary may be."""


MAX_ENTRIES = 4096
"""Of one dictionary in one answer; of more, some are drawn, so that nobody can choose which are lost."""


def owns_node_id(node: int, peer_id: bytes) -> bool:
    """Whether this Kademlia ID is the one that peers of ours take: the hash of the PeerID. Others draw theirs."""
    return hashlib.sha1(peer_id, usedforsecurity=False).digest() == node.to_bytes(DHTID.HASH_NBYTES, "big")


def patch_validation(protocol: DHTProtocol) -> None:
    """Makes this DHT node use the good entries of dictionaries that hold bad ones too. It must have a validator."""
    protocol.serializer = StrictSerializer
    protocol._validate_dictionary = partial(drop_invalid_entries, protocol.record_validator)


def drop_invalid_entries(validator: RecordValidatorBase, key: bytes, dictionary: DictionaryDHTValue) -> bool:
    """Takes out what the validator refuses, and what is too much."""
    with dictionary.freeze():
        entries = list(dictionary.items())
    kept = set(random.sample(range(len(entries)), min(len(entries), MAX_ENTRIES)))
    for n, (subkey, entry) in enumerate(entries):
        record = DHTRecord(key, MSGPackSerializer.dumps(subkey), entry.value, entry.expiration_time)
        if n not in kept or not validator.validate(record):
            del dictionary[subkey]
    return True
