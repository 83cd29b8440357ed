"""Signed records: own ones are accepted; exchanged, changed or invented ones are not."""

import hashlib
import math
import os
import time
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st
from record_samples import EXPIRES_AT, NOW, UID_HERE, VALIDATOR, keys, refused, stored

from dht.records import (
    MAX_LIFETIME_S,
    MAX_MANIFEST_LIFETIME_S,
    MAX_RECORD_BYTES,
    MAX_REPLICAS_OF_RECORD,
    RecordValidator,
    SwarmKeys,
    digits_of,
    open_record,
    parse_peer_id,
    shards_of,
    sign_record,
)
from dht.uid import UID
from peer.clock import CLOCK_TOLERANCE_S
from peer.errors import RecordError, WireError
from peer.identity import RECORD_DOMAIN, Identity, PeerID, peer_id_of, verify
from peer.kademlia.routing import id_bytes, key_id_of
from peer.kademlia.validation import Record, pack
from peer.wire import admission_pb2, records_pb2

__all__ = ["keys"]

FIELD = 2**256 - 2**224 + 2**192 + 2**96 - 1
ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
GENERATOR = (
    0x6B17D1F2E12C4247F8BCE6E563A440F277037D812DEB33A0F4A13945D898C296,
    0x4FE342E2FE1A7F9B8EE7EB4A7C0F9E162BCE33576B315ECECBB6406837BF51F5,
)
"""P-256 (FIPS 186-4, appendix D.1.2.3)"""


def announcement(key: str, expires_at: float = EXPIRES_AT) -> records_pb2.RecordPayload:
    return records_pb2.RecordPayload(
        key=key,
        expires_at=expires_at,
        announcement=records_pb2.Announcement(state=records_pb2.REPLICA_STATE_SERVING, update_count=7),
    )


def manifest(keys: SwarmKeys, expires_at: float) -> records_pb2.RecordPayload:
    return records_pb2.RecordPayload(key=keys.manifest, expires_at=expires_at, manifest_json=b"{}")


def announced(identity: Identity, keys: SwarmKeys) -> tuple[str, bytes, bytes]:
    """The key, subkey and value of a valid announcement."""
    key = keys.expert(UID_HERE)
    return key, identity.peer_id.to_bytes(), sign_record(identity, announcement(key))


# What is accepted


def test_keys_name_the_swarm_with_its_author(keys: SwarmKeys, other: Identity) -> None:
    swarm_id = keys.swarm_id
    assert swarm_id == f"sauna-{keys.author.to_base58()[-12:]}"
    assert swarm_id != SwarmKeys("sauna", other.peer_id).swarm_id
    assert keys.manifest == f"{swarm_id}.manifest"
    assert keys.prefix(1) == f"{swarm_id}.1"
    assert keys.prefix(1, (2,)) == f"{swarm_id}.1.2"
    assert keys.expert(UID_HERE) == f"{swarm_id}.1.2.3"
    assert keys.node(other.peer_id) == f"{swarm_id}.node.{other.peer_id.to_base58()}"
    assert keys.node_shard("0a") == f"{swarm_id}.nodes.0a"


@given(st.integers(0, 10**15), st.integers(0, 2**32 - 1), st.floats(0, MAX_LIFETIME_S, exclude_min=True))
def test_unsealing_gives_back_what_was_sealed(
    identity: Identity, keys: SwarmKeys, updates: int, rows: int, lifetime: float
) -> None:
    key = keys.expert(UID_HERE)
    payload = announcement(key, NOW + lifetime)
    payload.announcement.update_count, payload.announcement.queued_rows = updates, rows
    unsealed = open_record(sign_record(identity, payload), key, identity.peer_id, NOW - 1e-3)
    assert unsealed.announcement == payload.announcement


def test_the_validator_accepts_every_kind_of_own_record(identity: Identity, keys: SwarmKeys) -> None:
    subkey = identity.peer_id.to_bytes()
    node = records_pb2.RecordPayload(
        key=keys.node(identity.peer_id),
        expires_at=EXPIRES_AT,
        node=records_pb2.NodeRecord(
            addresses=["203.0.113.77:65535"] * 8,
            certificate=identity.make_certificate(),
            tunnel_addresses=[f"/ip4/203.0.113.77/tcp/65535/p2p/{identity.peer_id.to_base58()}"] * 8,
        ),
    )
    days = NOW + MAX_MANIFEST_LIFETIME_S
    for payload in (announcement(keys.expert(UID_HERE)), node, manifest(keys, days)):
        VALIDATOR.check(stored(payload.key, subkey, sign_record(identity, payload), payload.expires_at))
    for digits in shards_of(identity.peer_id):
        shard = keys.node_shard(digits)
        VALIDATOR.check(stored(shard, subkey, shard))
    for layer, coordinate, following in ((1, (), 2), (1, (2,), 3), (0, (), 128), (0, (), 4095)):
        prefix = keys.index(layer, coordinate, following)
        VALIDATOR.check(stored(prefix, following, prefix))


def test_expired_records_pass_so_that_they_do_not_spoil_a_whole_dictionary(
    identity: Identity, keys: SwarmKeys
) -> None:
    key = keys.expert(UID_HERE)
    past = NOW - 5
    VALIDATOR.check(
        stored(key, identity.peer_id.to_bytes(), sign_record(identity, announcement(key, past)), past)
    )


# What is refused


def test_an_unsigned_record_is_refused(identity: Identity, keys: SwarmKeys) -> None:
    key, subkey, value = announced(identity, keys)
    record = records_pb2.SignedRecord.FromString(value)
    record.ClearField("signature")
    refused(stored(key, subkey, record.SerializeToString()), "signature is wrong")
    refused(stored(key, subkey, record.payload), "can't be parsed|a public key has")


def test_a_changed_payload_is_refused(identity: Identity, keys: SwarmKeys) -> None:
    key, subkey, value = announced(identity, keys)
    record = records_pb2.SignedRecord.FromString(value)
    payload = records_pb2.RecordPayload.FromString(record.payload)
    payload.announcement.update_count += 1
    record.payload = payload.SerializeToString()
    refused(stored(key, subkey, record.SerializeToString()), "signature is wrong")
    with pytest.raises(RecordError, match="signature is wrong"):
        open_record(record.SerializeToString(), key, identity.peer_id, NOW)


def test_a_record_signed_with_another_key_is_refused(
    identity: Identity, other: Identity, keys: SwarmKeys
) -> None:
    key, subkey, value = announced(identity, keys)
    record = records_pb2.SignedRecord.FromString(value)
    record.signature = other.sign(record.public_key + record.payload)
    refused(stored(key, subkey, record.SerializeToString()), "signature is wrong")
    record.public_key, record.signature = other.public_key, other.sign(other.public_key + record.payload)
    refused(stored(key, subkey, record.SerializeToString()), "another key or subkey")
    with pytest.raises(RecordError, match="another peer's"):
        open_record(record.SerializeToString(), key, identity.peer_id, NOW)


def test_a_signature_is_of_its_key_too(identity: Identity, keys: SwarmKeys) -> None:
    """A signature has a second key under which it is valid, which anybody can compute and nobody owns (Blake-Wilson and
    Menezes 1999).
    """
    key, _, value = announced(identity, keys)
    record = records_pb2.SignedRecord.FromString(value)
    data = record.public_key + record.payload
    second = next(
        each for each in keys_of(record.signature, RECORD_DOMAIN + data) if each != identity.public_key
    )
    verify(second, data, record.signature)
    record.public_key = second
    writer = peer_id_of(second)
    refused(stored(key, writer.to_bytes(), record.SerializeToString()), "signature is wrong")
    with pytest.raises(RecordError, match="signature is wrong"):
        open_record(record.SerializeToString(), key, writer, NOW)


def keys_of(signature: bytes, data: bytes) -> list[bytes]:
    """The two keys that may have made a signature (SEC 1, section 4.1.6)."""
    r, s = int.from_bytes(signature[:32]), int.from_bytes(signature[32:])
    digest = int.from_bytes(hashlib.sha256(data).digest())
    found = []
    for head in (2, 3):
        point = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), bytes([head]) + signature[:32])
        numbers = point.public_numbers()
        x, y = added(times(s, (numbers.x, numbers.y)), times(ORDER - digest % ORDER, GENERATOR))
        x, y = times(pow(r, -1, ORDER), (x, y))
        found.append(bytes([2 + y % 2]) + x.to_bytes(32))
    return found


def added(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    """The sum of two points of P-256, neither of which is the other's negative."""
    if one == other:
        slope = 3 * (one[0] ** 2 - 1) * pow(2 * one[1], -1, FIELD)
    else:
        slope = (other[1] - one[1]) * pow(other[0] - one[0], -1, FIELD)
    x = (slope**2 - one[0] - other[0]) % FIELD
    return x, (slope * (one[0] - x) - one[1]) % FIELD


def times(count: int, point: tuple[int, int]) -> tuple[int, int]:
    total = point
    for bit in f"{count:b}"[1:]:
        total = added(total, total)
        if bit == "1":
            total = added(total, point)
    return total


def test_a_record_under_another_key_is_refused(identity: Identity, keys: SwarmKeys) -> None:
    _, subkey, value = announced(identity, keys)
    elsewhere = keys.expert(UID(1, (2, 2)))
    refused(stored(elsewhere, subkey, value), "another key or subkey")
    with pytest.raises(RecordError, match="belongs under"):
        open_record(value, elsewhere, identity.peer_id, NOW)


def test_a_record_of_another_swarm_is_refused(identity: Identity, other: Identity, keys: SwarmKeys) -> None:
    _, subkey, value = announced(identity, keys)
    elsewhere = SwarmKeys("sauna", other.peer_id).expert(UID_HERE)
    refused(stored(elsewhere, subkey, value), "another key or subkey")


def test_a_record_under_another_peers_subkey_is_refused(
    identity: Identity, other: Identity, keys: SwarmKeys
) -> None:
    key, _, value = announced(identity, keys)
    for subkey in (other.peer_id.to_bytes(), "text", 0, b""):
        refused(stored(key, subkey, value), "another key or subkey")
    with pytest.raises(RecordError, match="another peer's"):
        open_record(value, key, other.peer_id, NOW)


@pytest.mark.parametrize("shift", [-1.0, 1e-3, 60.0, math.inf, math.nan])
def test_an_expiry_that_is_not_the_signed_one_is_refused(
    identity: Identity, keys: SwarmKeys, shift: float
) -> None:
    key, subkey, value = announced(identity, keys)
    refused(stored(key, subkey, value, EXPIRES_AT + shift), "not the signed one")


@pytest.mark.parametrize("lifetime", [MAX_LIFETIME_S + CLOCK_TOLERANCE_S + 1, 1e9, math.inf])
def test_a_record_that_would_live_too_long_is_refused(
    identity: Identity, keys: SwarmKeys, lifetime: float
) -> None:
    key, until = keys.expert(UID_HERE), NOW + lifetime
    value = sign_record(identity, announcement(key, until))
    refused(stored(key, identity.peer_id.to_bytes(), value, until), "live longer than 600 s")
    with pytest.raises(RecordError, match="live longer"):
        open_record(value, key, identity.peer_id, NOW)


def test_a_manifest_that_would_live_too_long_is_refused(identity: Identity, keys: SwarmKeys) -> None:
    until = NOW + MAX_MANIFEST_LIFETIME_S + CLOCK_TOLERANCE_S + 1
    value = sign_record(identity, manifest(keys, until))
    refused(stored(keys.manifest, identity.peer_id.to_bytes(), value, until), "live longer")


def test_only_the_founder_writes_under_a_founders_keys(
    identity: Identity, other: Identity, keys: SwarmKeys
) -> None:
    subkey, revocations = other.peer_id.to_bytes(), admission_pb2.Revocations(serials=[7])
    for payload in (
        manifest(keys, EXPIRES_AT),
        announcement(keys.manifest),
        records_pb2.RecordPayload(key=keys.revocations, expires_at=EXPIRES_AT, revocations=revocations),
    ):
        value = sign_record(other, payload)
        refused(stored(payload.key, subkey, value), "only the swarm's founder|kind does not match its key")
    for key in (keys.manifest, keys.revocations):
        refused(stored(key, 3, key), "no index entries")


@pytest.mark.parametrize("key", ["sauna.manifest", "sauna", ".manifest"])
def test_a_manifest_is_under_the_key_that_names_its_founder(
    identity: Identity, keys: SwarmKeys, key: str
) -> None:
    payload = manifest(keys, EXPIRES_AT)
    for wrong in (key, keys.revocations, keys.node(identity.peer_id)):
        payload.key = wrong
        value = sign_record(identity, payload)
        refused(
            stored(wrong, identity.peer_id.to_bytes(), value), "only the swarm's founder|kind does not match"
        )


def test_a_signed_expiry_that_is_no_number_is_refused(identity: Identity, keys: SwarmKeys) -> None:
    key = keys.expert(UID_HERE)
    value = sign_record(identity, announcement(key, math.nan))
    refused(stored(key, identity.peer_id.to_bytes(), value, math.nan), "not the signed one")
    with pytest.raises(RecordError, match="live longer"):
        open_record(value, key, identity.peer_id, NOW)


def test_an_expired_record_is_not_unsealed(identity: Identity, keys: SwarmKeys) -> None:
    key, _, value = announced(identity, keys)
    for now in (EXPIRES_AT, EXPIRES_AT + 1):
        with pytest.raises(RecordError, match="has expired"):
            open_record(value, key, identity.peer_id, now)


def test_an_announcement_after_more_updates_than_anybody_takes_is_refused(
    identity: Identity, keys: SwarmKeys
) -> None:
    for updates in (10**15 + 1, 2**63, 2**64 - 1):
        payload = announcement(keys.expert(UID_HERE))
        payload.announcement.update_count = updates
        record = sign_record(identity, payload)
        refused(stored(payload.key, identity.peer_id.to_bytes(), record), "more than are possible")
        with pytest.raises(RecordError, match="more than are possible"):
            open_record(record, payload.key, identity.peer_id, NOW)


def test_a_record_of_too_many_replicas_is_refused(identity: Identity, keys: SwarmKeys) -> None:
    for count, fits in ((MAX_REPLICAS_OF_RECORD, True), (MAX_REPLICAS_OF_RECORD + 1, False)):
        payload = records_pb2.RecordPayload(
            key=keys.prefix(1), expires_at=EXPIRES_AT, hosting={"replicas": [{}] * count}
        )
        record = stored(payload.key, identity.peer_id.to_bytes(), sign_record(identity, payload))
        if fits:
            VALIDATOR.check(record)
        else:
            refused(record, "more than 512")


def test_an_oversized_record_is_refused(identity: Identity, keys: SwarmKeys) -> None:
    payload = manifest(keys, EXPIRES_AT)
    payload.manifest_json = bytes(MAX_RECORD_BYTES)
    value = sign_record(identity, payload)
    refused(stored(keys.manifest, identity.peer_id.to_bytes(), value), "too large")
    with pytest.raises(RecordError, match=f"more than {MAX_RECORD_BYTES}"):
        open_record(value, keys.manifest, identity.peer_id, NOW)
    payload.manifest_json = bytes(MAX_RECORD_BYTES - 1000)
    VALIDATOR.check(stored(keys.manifest, identity.peer_id.to_bytes(), sign_record(identity, payload)))


def test_a_plain_value_is_refused(identity: Identity, keys: SwarmKeys) -> None:
    """hivemind passes an empty subkey for values that are stored without one."""
    key, _, value = announced(identity, keys)
    key_bytes = id_bytes(key_id_of(key))
    refused(Record(key_bytes, b"", pack(value), EXPIRES_AT), "can't be parsed")
    prefix = stored(keys.prefix(1), 2, keys.prefix(1))
    refused(Record(prefix.key, b"", prefix.value, EXPIRES_AT), "can't be parsed")


@pytest.mark.parametrize("value", [None, 0, 1.5, True, [], {}, [b"bytes"], ("text",)])
def test_a_value_that_is_neither_bytes_nor_text_is_refused(keys: SwarmKeys, value: object) -> None:
    refused(stored(keys.prefix(1), 2, value), "record .* or an index entry|can't be parsed")


# Hostile bytes

packed = st.one_of(
    st.binary(max_size=300),
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=6,
    ).map(pack),
)


@given(key=st.binary(max_size=40), subkey=packed, value=packed, expires_at=st.floats())
def test_hostile_bytes_are_refused_and_raise_nothing(
    key: bytes, subkey: bytes, value: bytes, expires_at: float
) -> None:
    assert VALIDATOR.validate(Record(key, subkey, value, expires_at)) is False


@given(part=st.integers(0, 2), position=st.integers(0, 10**6), change=st.integers(1, 255))
def test_a_record_with_any_one_byte_changed_is_refused(
    identity: Identity, keys: SwarmKeys, part: int, position: int, change: int
) -> None:
    record = stored(*announced(identity, keys))
    pieces = [bytearray(record.key), bytearray(record.subkey), bytearray(record.value)]
    pieces[part][position % len(pieces[part])] ^= change
    key, subkey, value = map(bytes, pieces)
    assert not VALIDATOR.validate(Record(key, subkey, value, EXPIRES_AT))


@pytest.mark.parametrize(
    "added",
    [b"\xfa\x01\x80\x10" + bytes(2048), b"\x1a\x00", b"\x0a\x00"],
    ids=["a field 31", "an empty signature before it", "an empty payload before it"],
)
def test_nobody_else_can_add_anything_to_a_record(identity: Identity, keys: SwarmKeys, added: bytes) -> None:
    """Of a field that comes several times, the last one counts, and unknown fields are kept."""
    key, subkey, value = announced(identity, keys)
    VALIDATOR.check(stored(key, subkey, value))
    for larger in (added + value, value + added):
        assert not VALIDATOR.validate(stored(key, subkey, larger))


@given(st.one_of(st.binary(max_size=300), st.none(), st.text(), st.integers(), st.lists(st.binary())))
def test_unsealing_something_else_raises_only_record_error(identity: Identity, data: object) -> None:
    with pytest.raises(RecordError):
        open_record(data, "key", identity.peer_id, NOW)


@given(st.binary(max_size=60), st.binary(max_size=60), st.binary(max_size=60))
def test_unsealing_a_record_of_hostile_fields_raises_only_record_error(
    identity: Identity, payload: bytes, public_key: bytes, signature: bytes
) -> None:
    record = records_pb2.SignedRecord(payload=payload, public_key=public_key, signature=signature)
    with pytest.raises(RecordError):
        open_record(record.SerializeToString(), "key", identity.peer_id, NOW)


@given(st.one_of(st.binary(max_size=40), st.text(), st.integers(), st.none()))
def test_only_peer_ids_that_are_hashes_are_parsed(identity: Identity, value: object) -> None:
    assert parse_peer_id(identity.peer_id.to_bytes()) == identity.peer_id
    if isinstance(value, bytes) and len(value) == 34 and value.startswith(b"\x12\x20"):
        assert parse_peer_id(value) == PeerID(value)
    else:
        with pytest.raises(WireError):
            parse_peer_id(value)


def test_the_clock_is_the_real_one_when_none_is_given(identity: Identity, keys: SwarmKeys) -> None:
    key, until = keys.expert(UID_HERE), time.time() + 30
    record = stored(key, identity.peer_id.to_bytes(), sign_record(identity, announcement(key, until)), until)
    assert RecordValidator().validate(record)
    assert not RecordValidator(lambda: until - MAX_LIFETIME_S - 60).validate(record)


def test_another_swarms_entries_are_refused_whoever_signed_them(identity: Identity, keys: SwarmKeys) -> None:
    other = SwarmKeys("saunas", identity.peer_id)
    validator = RecordValidator(lambda: NOW, swarm_id=keys.swarm_id)
    mine = identity.peer_id.to_bytes()
    for here, there in (
        (keys.expert(UID_HERE), other.expert(UID_HERE)),
        (keys.node(identity.peer_id), other.node(identity.peer_id)),
    ):
        for key, is_right in ((here, True), (there, False)):
            record = stored(key, mine, sign_record(identity, announcement(key, EXPIRES_AT)))
            assert VALIDATOR.validate(record)
            assert validator.validate(record) is is_right
    for here, there, subkey in (
        (keys.prefix(0), other.prefix(0), 3),
        (keys.node_shard(digits_of(mine)[:2]), other.node_shard(digits_of(mine)[:2]), mine),
    ):
        assert validator.validate(stored(here, subkey, here))
        assert VALIDATOR.validate(stored(there, subkey, there))
        assert not validator.validate(stored(there, subkey, there))


def test_signatures_are_checked_last_and_a_wrong_one_once(
    identity: Identity, keys: SwarmKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = 0

    def counted(*arguments: Any) -> None:
        nonlocal checks
        checks += 1
        verify(*arguments)

    monkeypatch.setattr("dht.records.verify", counted)
    validator, mine = RecordValidator(lambda: NOW, swarm_id=keys.swarm_id), identity.peer_id.to_bytes()
    key, there = keys.expert(UID_HERE), SwarmKeys("other", identity.peer_id).expert(UID_HERE)
    forged = records_pb2.SignedRecord.FromString(sign_record(identity, announcement(key, EXPIRES_AT)))
    forged.signature = os.urandom(256)
    data = forged.SerializeToString()
    for odd in (
        stored(key + "x", mine, data),
        stored(key, bytes(34), data),
        stored(key, mine, data, EXPIRES_AT + 1),
        stored(there, mine, sign_record(identity, announcement(there, EXPIRES_AT))),
    ):
        assert not validator.validate(odd)
    assert checks == 0
    for _ in range(10):
        assert not validator.validate(stored(key, mine, data))
    assert checks == 1


def test_a_key_of_a_size_that_nobody_has_is_not_even_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peer.identity.ec", None)
    with pytest.raises(RecordError, match="a public key has 33 bytes"):
        verify(bytes(10_000), b"data", b"signature")
