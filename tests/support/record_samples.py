"""A record as hivemind hands it to the validator, whose clock stands still; and a swarm's keys."""

import pytest

from dht.records import (
    RecordValidator,
    SwarmKeys,
)
from dht.uid import UID
from peer.errors import RecordError
from peer.identity import Identity
from peer.kademlia.hivemind import DHTID, DHTRecord, MSGPackSerializer

NOW = 1_800_000_000.0
EXPIRES_AT = NOW + 30.0
UID_HERE = UID(1, (2, 3))
VALIDATOR = RecordValidator(lambda: NOW)


@pytest.fixture(scope="module")
def keys(identity: Identity) -> SwarmKeys:
    return SwarmKeys("sauna", identity.peer_id)


def stored(key: str, subkey: object, value: object, expires_at: float = EXPIRES_AT) -> DHTRecord:
    """What hivemind hands to the validator."""
    return DHTRecord(
        DHTID.generate(source=key).to_bytes(),
        MSGPackSerializer.dumps(subkey),
        MSGPackSerializer.dumps(value),
        expires_at,
    )


def refused(record: DHTRecord, reason: str) -> None:
    with pytest.raises(RecordError, match=reason):
        VALIDATOR.check(record)
    assert VALIDATOR.validate(record) is False
