"""What other peers answer to look-ups: the entries that the validator refuses are left out, and the others are used.

hivemind refuses a whole dictionary for one bad entry, and a peer that checks nothing stores bad entries from anybody.
"""

import random
from collections.abc import Collection
from functools import partial
from typing import Any

from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.p2p import PeerID
from hivemind.utils import MSGPackSerializer
from hivemind.utils.timed_storage import ValueWithExpiration

MAX_ENTRIES = 4096
"""Of one dictionary in one answer; of more, some are drawn, so that nobody can choose which are lost."""

Answers = dict[DHTID, tuple[ValueWithExpiration | None, dict[DHTID, PeerID]]]


def filter_answers(protocol: DHTProtocol) -> None:
    """Makes this DHT node use the good entries of dictionaries that hold bad ones too. It must have a validator."""
    protocol._validate_dictionary = partial(keep_valid, protocol.record_validator)
    protocol.call_find = partial(_find, protocol.call_find)


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


async def _find(call_find: Any, peer_id: PeerID, keys: Collection[DHTID]) -> Answers | None:
    answers = await call_find(peer_id, keys)
    if answers is None:
        return None
    return {key: (_restated(item), nearest) for key, (item, nearest) in answers.items()}


def _restated(item: ValueWithExpiration | None) -> ValueWithExpiration | None:
    """With the latest expiry of its entries, whatever the peer says: an endless one would end the search with it."""
    if item is None or not isinstance(item.value, DictionaryDHTValue):
        return item
    expiries = [entry.expiration_time for _, entry in item.value.items()]
    if not expiries:
        return None
    item.value.latest_expiration_time = max(expiries)
    return ValueWithExpiration(item.value, max(expiries))
