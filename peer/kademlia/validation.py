"""What this peer accepts of the values that other peers pack, answer and hand over.

hivemind's own unpacker follows nested tuples as deep as they go; at some hundred levels the whole process ends with a
stack overflow. Here, a value contains no types of its sender's choice, and a dictionary is one level of entries.

hivemind also rejects a whole dictionary for one bad entry, and a peer that checks nothing stores bad entries from
anybody. Here, the entries that the validator rejects are left out, and the others are used.
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
    dht_pb2,
)

CLOCK_TOLERANCE_S = 3.0
"""hivemind's own bound. With larger differences, records are rejected, or expire too early for some peers."""
MAX_ENTRIES = 4096
"""Of one dictionary in one answer. Longer ones are sampled, so that nobody can choose which entries are lost."""
_DICTIONARY = MSGPackSerializer._ext_types[DictionaryDHTValue]
_PEER_ID_PREFIXES = b"\x12\x20", b"\x00\x24\x08\x01\x12\x20"
"""Of a key's SHA-256 hash, and of an Ed25519 key as it is. 32 bytes follow."""


class StrictSerializer(MSGPackSerializer):  # type: ignore[misc]  # hivemind has no types
    """Replaces hivemind's serializer where it reads what other peers sent."""

    @classmethod
    def loads(cls, buf: bytes) -> object:
        """Raises WireError."""
        return unpack(buf)


def patch_validation(protocol: DHTProtocol) -> None:
    """Makes this DHT node use the good entries of dictionaries that also have bad ones. It must have a validator."""
    protocol.serializer = StrictSerializer
    protocol._validate_dictionary = partial(drop_invalid_entries, protocol.record_validator)


def unpack(data: bytes) -> Any:
    """A plain value, or the entries of a dictionary that may be stored under a key. Raises WireError."""
    value = _unpack(data, _mark_dictionary)
    return _dictionary(value.data) if isinstance(value, msgpack.ExtType) else value


def drop_invalid_entries(validator: RecordValidatorBase, key: bytes, dictionary: DictionaryDHTValue) -> bool:
    """Removes the entries that the validator rejects, and those beyond MAX_ENTRIES."""
    with dictionary.freeze():
        entries = list(dictionary.items())
    kept = set(random.sample(range(len(entries)), min(len(entries), MAX_ENTRIES)))
    for n, (subkey, entry) in enumerate(entries):
        record = DHTRecord(key, MSGPackSerializer.dumps(subkey), entry.value, entry.expiration_time)
        if n not in kept or not validator.validate(record):
            del dictionary[subkey]
    return True


def node_id_of(peer_id: bytes) -> DHTID:
    """The peer's place in the DHT: the hash of its PeerID. The ID that a peer claims is never read."""
    return DHTID(int.from_bytes(hashlib.sha1(peer_id, usedforsecurity=False).digest(), "big"))


def serves_keys(peer: dht_pb2.NodeInfo) -> bool:
    """Whether a peer says that it is a node of the DHT and no mere client."""
    return bool(len(peer.node_id) == DHTID.HASH_NBYTES)


def is_peer_id(name: bytes) -> bool:
    """Whether it is the PeerID of an RSA key, as Talkoot's peers have, or of an Ed25519 key, as `hivemind-dht` has."""
    return any(len(name) == len(prefix) + 32 and name.startswith(prefix) for prefix in _PEER_ID_PREFIXES)


def _unpack(data: bytes, hook: Any) -> Any:
    try:
        return msgpack.unpackb(data, ext_hook=hook, raw=False)
    except (ValueError, TypeError, RecursionError) as error:  # ValueError: all of msgpack's own
        raise WireError("not packed as values of the DHT are") from error


def _mark_dictionary(code: int, data: bytes) -> msgpack.ExtType | None:
    return msgpack.ExtType(code, data) if code == _DICTIONARY else None


def _dictionary(data: bytes) -> DictionaryDHTValue:
    """Leaves out what can't be stored. Raises WireError."""
    value = _unpack(data, _drop_nested)
    if not isinstance(value, list) or len(value) != 3 or not isinstance(value[2], list):
        raise WireError("a dictionary has a size, an expiry and entries")
    with DictionaryDHTValue().freeze() as entries:
        for entry in value[2]:
            if _is_well_formed(entry):
                entries.store(*entry)
    return entries


def _drop_nested(code: int, data: bytes) -> None:
    """An entry with such a value is malformed; the others in the dictionary may be good."""


def _is_well_formed(entry: object) -> bool:
    """Whether it is a coordinate or a PeerID, the value stored under it, and when that expires."""
    if not isinstance(entry, list) or len(entry) != 3:
        return False
    subkey, value, expires_at = entry
    return (
        type(subkey) in (int, bytes)
        and isinstance(value, bytes)
        and type(expires_at) in (int, float)
        and math.isfinite(expires_at)
    )
