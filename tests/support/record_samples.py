"""A record as hivemind passes it to the validator, whose clock stands still; and a swarm's keys."""

import pytest

from dht.records import (
    RecordValidator,
    SwarmKeys,
)
from dht.uid import UID
from peer.errors import RecordError
from peer.identity import Identity
from peer.kademlia.routing import id_bytes, key_id_of
from peer.kademlia.validation import Record, pack

NOW = 1_800_000_000.0
EXPIRES_AT = NOW + 30.0
UID_HERE = UID(1, (2, 3))
VALIDATOR = RecordValidator(lambda: NOW)


@pytest.fixture(scope="module")
def keys(identity: Identity) -> SwarmKeys:
    return SwarmKeys("sauna", identity.peer_id)


def stored(key: str, subkey: object, value: object, expires_at: float = EXPIRES_AT) -> Record:
    """What hivemind passes to the validator."""
    return Record(
        id_bytes(key_id_of(key)),
        pack(subkey),
        pack(value),
        expires_at,
    )


def refused(record: Record, reason: str) -> None:
    with pytest.raises(RecordError, match=reason):
        VALIDATOR.check(record)
    assert VALIDATOR.validate(record) is False
