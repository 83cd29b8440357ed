"""What other peers answer and hand over: the entries that the validator refuses are left out, and the others are used.

hivemind refuses a whole dictionary for one bad entry, and a peer that checks nothing stores bad entries from anybody.
"""

import hashlib
import random
from functools import partial

from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.utils import MSGPackSerializer
from hivemind.utils.timed_storage import HeapEntry

from peer.kademlia.validation import StrictSerializer

# hivemind compares subkeys where two entries expire at the same moment. A record's is bytes and an index entry's a
# number, and both may come under one key: comparing them fails, and with it the store, or the whole answer.
HeapEntry.__lt__ = lambda one, other: one.expiration_time < other.expiration_time

MAX_ENTRIES = 4096
"""Of one dictionary in one answer; of more, some are drawn, so that nobody can choose which are lost."""


def is_rightful(node: int, peer_id: bytes) -> bool:
    """Whether this Kademlia ID is the one that peers of ours take: the hash of the PeerID. Others draw theirs."""
    return hashlib.sha1(peer_id, usedforsecurity=False).digest() == node.to_bytes(DHTID.HASH_NBYTES, "big")


def filter_answers(protocol: DHTProtocol) -> None:
    """Makes this DHT node use the good entries of dictionaries that hold bad ones too. It must have a validator."""
    protocol.serializer = StrictSerializer
    protocol._validate_dictionary = partial(keep_valid, protocol.record_validator)


def keep_valid(validator: RecordValidatorBase, key: bytes, dictionary: DictionaryDHTValue) -> bool:
    """Takes out what the validator refuses, and what is too much."""
    with dictionary.freeze():
        entries = list(dictionary.items())
    kept = set(random.sample(range(len(entries)), min(len(entries), MAX_ENTRIES)))
    for n, (subkey, entry) in enumerate(entries):
        record = DHTRecord(key, MSGPackSerializer.dumps(subkey), entry.value, entry.expiration_time)
        if n not in kept or not validator.validate(record):
            del dictionary[subkey]
    return True
