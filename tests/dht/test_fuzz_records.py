"""Ten thousand spoilt records: none is taken for what it is not, and nothing is raised or kept."""

import random
import time

import psutil
import pytest
from callers import new_identity

from dht.admission import Role, SwarmAdmission, make_badge, make_token
from dht.records import RecordValidator, SwarmKeys, digits_of, sign_record
from peer.identity import Identity
from peer.kademlia.hivemind import DHTID, DHTRecord, MSGPackSerializer
from peer.wire import admission_pb2, records_pb2

NOW = 1_700_000_000.0
COUNT = 10_000


@pytest.fixture(scope="module")
def founder() -> Identity:
    return new_identity()


@pytest.fixture(scope="module")
def node() -> Identity:
    return new_identity()


def right_records(keys: SwarmKeys, founder: Identity, node: Identity) -> list[DHTRecord]:
    """One of each kind, and index entries."""
    token = make_token(founder, keys.swarm_id, Role.NODE, NOW + 3600, 7)
    badge = make_badge(token, node.peer_id)
    bodies = [
        (node, records_pb2.RecordPayload(key=f"{keys.swarm_id}.0.1.2", announcement=serving())),
        (node, records_pb2.RecordPayload(key=keys.node(node.peer_id), node=described(node))),
        (founder, records_pb2.RecordPayload(key=keys.manifest, manifest_json=b'{"name": "sauna"}')),
        (
            founder,
            records_pb2.RecordPayload(
                key=keys.revocations, revocations=admission_pb2.Revocations(serials=range(1, 50))
            ),
        ),
    ]
    records = []
    for writer, payload in bodies:
        payload.expires_at = NOW + 60
        if writer is node:
            payload.badge.CopyFrom(badge)
        records.append(stored(payload.key, writer.peer_id.to_bytes(), sign_record(writer, payload)))
    records.append(stored(keys.prefix(0), 3, keys.prefix(0)))
    shard = keys.node_shard(digits_of(node.peer_id.to_bytes())[:2])
    records.append(stored(shard, node.peer_id.to_bytes(), shard))
    return records


def serving() -> records_pb2.Announcement:
    return records_pb2.Announcement(state=records_pb2.REPLICA_STATE_SERVING, update_count=3)


def described(node: Identity) -> records_pb2.NodeRecord:
    return records_pb2.NodeRecord(addresses=["192.0.2.7:1"], certificate=node.make_certificate())


def stored(key: str, subkey: object, value: object) -> DHTRecord:
    return DHTRecord(
        DHTID.generate(source=key).to_bytes(),
        MSGPackSerializer.dumps(subkey),
        MSGPackSerializer.dumps(value),
        NOW + 60,
    )


def spoilt(record: DHTRecord, others: list[DHTRecord], rng: random.Random) -> DHTRecord:
    key, subkey, value, expiry = record.key, record.subkey, record.value, record.expiration_time
    other = rng.choice(others)
    match rng.randrange(9):
        case 0 | 1 | 2:
            value = changed(value, rng)
        case 3:
            subkey = changed(subkey, rng)
        case 4:
            key = changed(key, rng)
        case 5:
            value = value[: rng.randrange(len(value))]
        case 6:
            value = rng.randbytes(rng.randrange(400))
        case 7:
            key, subkey = other.key, other.subkey
        case _:
            expiry = rng.choice([expiry + 1, NOW + 10**7, float("nan"), float("inf"), -1.0])
    return DHTRecord(key, subkey, value, expiry)


def changed(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ rng.randint(1, 255)]) + data[at + 1 :]


def test_no_changed_record_is_taken_for_another(founder: Identity, node: Identity) -> None:
    keys = SwarmKeys("sauna", founder.peer_id)
    admission = SwarmAdmission(keys, now=lambda: NOW)
    admission.learn(founder.public_key, "token")
    validator = RecordValidator(now=lambda: NOW, rule=admission.check_record)
    right = right_records(keys, founder, node)
    assert all(map(validator.validate, right))
    rng, taken = random.Random(1), 0
    before, began = psutil.Process().memory_info().rss, time.thread_time()
    for _ in range(COUNT):
        original = rng.choice(right)
        record = spoilt(original, right, rng)
        if validator.validate(record) and record not in right:
            taken += 1
            same = (record.key, record.value) == (original.key, original.value)
            coordinate = MSGPackSerializer.loads(record.subkey)
            # index entries are not signed: another coordinate or expiry is another entry, and a right one
            assert same, record
            assert isinstance(MSGPackSerializer.loads(record.value), str), record
            assert isinstance(coordinate, int | bytes)
    assert taken < COUNT / 20
    assert psutil.Process().memory_info().rss - before < 32 * 2**20
    assert time.thread_time() - began < 60
