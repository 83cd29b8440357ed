"""What strangers announce does no harm: texts are short and printable, and numbers are finite and in range."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dht.admission import Grant, Role
from dht.announcements import (
    FAILURE_CAUSES,
    MAX_LATENCIES,
    Activity,
    Latency,
    TrainerInfo,
    metrics_endpoint,
    number,
    read_node,
    read_trainer,
    renewal,
)
from dht.records import FEWEST_TRAINER_DIGITS, RecordValidator, SwarmKeys, shards_of
from peer.errors import RecordError
from peer.identity import Identity, PeerID
from peer.kademlia.routing import id_bytes, key_id_of
from peer.kademlia.validation import Record, pack
from peer.wire import admission_pb2, records_pb2

NOW = 1_700_000_000.0
PEER = PeerID(b"\x12\x20" + bytes(31) + b"\xa7")
DOUBLES = st.floats(allow_nan=True, allow_infinity=True)
COUNTS = st.integers(0, 2**64 - 1)


def read(trainer: records_pb2.TrainerRecord) -> TrainerInfo | None:
    return read_trainer(records_pb2.RecordPayload(trainer=trainer, expires_at=NOW + 30), PEER)


def some(trainer: records_pb2.TrainerRecord) -> TrainerInfo:
    info = read(trainer)
    assert info is not None
    return info


@given(st.text(), DOUBLES, DOUBLES, COUNTS, st.lists(st.tuples(st.text(max_size=20), COUNTS), max_size=40))
def test_whatever_a_trainer_says_is_bounded(
    text: str, value: float, other: float, count: int, failures: list[tuple[str, int]]
) -> None:
    info = some(
        records_pb2.TrainerRecord(
            name=text, software_version=text, metrics_address=text, started_at=value, renew_every_s=other,
            step=count, steps=count, loss=value, validation_loss=other, bits_per_byte=value, tokens_per_s=other,
            forward=records_pb2.Latency(p50_s=value, p99_s=other), calls=count,
            failures=[records_pb2.Failures(cause=cause, count=n) for cause, n in failures],
            nodes=[records_pb2.NodeLatency(peer_id=PEER.to_bytes(), mean_s=value)],
        )
    )  # fmt: skip
    for shown in (info.name, info.software_version):
        assert len(shown) <= 32
        assert shown.isprintable()
    measured = (info.loss, info.validation_loss, info.bits_per_byte, info.tokens_per_s)
    for figure in (*measured, info.started_at, info.renew_every_s, *info.node_latency_s.values()):
        assert figure is None or (math.isfinite(figure) and figure >= 0)
    assert 0 < info.renew_every_s <= 600
    assert max(info.step, info.calls, *info.failures.values(), 0) <= 2**53
    assert info.failures.keys() <= FAILURE_CAUSES


def test_what_is_sensible_comes_through() -> None:
    info = some(
        records_pb2.TrainerRecord(
            name="Aino", step=3, steps=9, loss=2.5, tokens_per_s=10.0, renew_every_s=4.0,
            backward=records_pb2.Latency(p50_s=0.1, p99_s=0.9), metrics_address="10.0.0.7:9100",
            failures=[records_pb2.Failures(cause="unavailable", count=2)],
            nodes=[records_pb2.NodeLatency(peer_id=PEER.to_bytes(), mean_s=0.25)],
        )
    )  # fmt: skip
    assert (info.name, info.step, info.steps, info.loss, info.tokens_per_s) == ("Aino", 3, 9, 2.5, 10.0)
    assert (info.forward, info.backward, info.renew_every_s) == (None, Latency(0.1, 0.9), 4.0)
    assert (info.validation_loss, info.metrics_address) == (None, "10.0.0.7:9100")
    assert (info.failures, info.node_latency_s) == ({"unavailable": 2}, {PEER: 0.25})


def test_a_trainer_is_called_only_by_plain_addresses_and_the_certificate_of_its_own_key(
    tmp_path: Path,
) -> None:
    identity = Identity.load_or_create(tmp_path / "identity.key")
    record = records_pb2.TrainerRecord(
        addresses=["192.0.2.1:4000", "unix:/run/docker.sock", "[2001:db8::1]:4000"],
        certificate=identity.make_certificate(),
        dense_fingerprint=bytes(32),
        dense_age=7,
    )
    payload = records_pb2.RecordPayload(trainer=record, expires_at=NOW + 30)
    info = read_trainer(payload, identity.peer_id)
    assert info is not None
    assert info.addresses == ("192.0.2.1:4000", "[2001:db8::1]:4000")
    assert (len(info.dense_fingerprint), info.dense_age) == (32, 7)
    with pytest.raises(RecordError, match="certificate is not that of peer"):
        read_trainer(payload, PEER)
    payload.trainer.certificate = b""
    payload.trainer.dense_fingerprint = b"short"
    without = read_trainer(payload, identity.peer_id)
    assert without is not None
    assert (without.addresses, without.certificate_pem, without.dense_fingerprint) == ((), b"", b"")


def test_a_trainer_that_left_says_so_with_its_last_figures() -> None:
    info = read(records_pb2.TrainerRecord(left=True, step=9, steps=9, validation_loss=1.5))
    assert info is not None
    assert (info.left, info.step, info.validation_loss, info.is_own_loop) == (True, 9, 1.5, False)
    bare = read(records_pb2.TrainerRecord(left=True))
    assert bare is not None
    assert (bare.left, bare.started_at) == (True, 0.0)


def test_a_node_that_left_needs_no_certificate() -> None:
    payload = records_pb2.RecordPayload(node=records_pb2.NodeRecord(left=True), expires_at=NOW + 30)
    info = read_node(payload, PEER)
    assert (info.left, info.peer_id, info.addresses) == (True, PEER, ())
    payload.node.left = False
    with pytest.raises(RecordError):
        read_node(payload, PEER)


def test_a_record_tells_the_grant_of_its_badge() -> None:
    payload = records_pb2.RecordPayload(node=records_pb2.NodeRecord(left=True), expires_at=NOW + 30)
    assert read_node(payload, PEER).grant is None
    payload.badge.grant = admission_pb2.Grant(
        swarm_id="sauna-x", role=Role.NODE.value, expires_at=NOW + 9, serial=7, key=bytes(32)
    ).SerializeToString()
    assert read_node(payload, PEER).grant == Grant("sauna-x", Role.NODE, NOW + 9, 7, bytes(32))
    payload.badge.grant = b"\xff"
    with pytest.raises(RecordError):
        read_node(payload, PEER)


def test_another_body_under_a_trainers_key_is_none() -> None:
    payload = records_pb2.RecordPayload(node=records_pb2.NodeRecord(name="x"), expires_at=NOW + 30)
    assert read_trainer(payload, PEER) is None


def test_no_more_latencies_are_read_than_a_record_should_have() -> None:
    nodes = [
        records_pb2.NodeLatency(peer_id=b"\x12\x20" + n.to_bytes(32, "big"), mean_s=1.0)
        for n in range(MAX_LATENCIES + 9)
    ]
    assert len(some(records_pb2.TrainerRecord(nodes=nodes)).node_latency_s) == MAX_LATENCIES


@pytest.mark.parametrize(
    "text",
    [
        "example.org:80", "10.0.0.1", "10.0.0.1:0", "10.0.0.1:70000", "http://10.0.0.1:80", "10.0.0.1:80/x", "::1:80",
        "0.0.0.0:80", "[::]:80", "224.0.0.1:80", "169.254.169.254:80", "999.0.0.1:80", "[fe80::1]:80", "", "a" * 9999,
        "[::ffff:0.0.0.0]:80", "[::ffff:169.254.169.254]:80", "[::ffff:224.0.0.1]:80",
    ],
)  # fmt: skip
def test_only_plain_addresses_can_be_scraped(text: str) -> None:
    assert metrics_endpoint(text) == ""


@pytest.mark.parametrize("text", ["127.0.0.1:80", "10.1.2.3:9100", "[2001:db8::1]:9100"])
def test_plain_addresses_stay_as_they_are(text: str) -> None:
    assert metrics_endpoint(text) == text


def test_absurd_numbers_count_as_not_said() -> None:
    assert [number(x) for x in (math.nan, math.inf, -1.0, 1e300, 2.0)] == [None, None, None, None, 2.0]
    assert [renewal(x) for x in (math.nan, 0.0, -1.0, 601.0, 3.0)] == [10.0, 10.0, 10.0, 10.0, 3.0]


def test_an_activity_of_a_newer_version_is_unknown() -> None:
    assert Activity.of(records_pb2.NODE_ACTIVITY_PAUSED) is Activity.PAUSED
    assert Activity.of(77) is Activity.UNKNOWN


def entry(value: str, subkey: object) -> Record:
    return Record(id_bytes(key_id_of(value)), pack(subkey), pack(value), NOW + 30)


def test_trainers_are_listed_in_shards_from_their_first_digit_on() -> None:
    keys, validator = SwarmKeys("sauna", PEER), RecordValidator(lambda: NOW)
    shards = shards_of(PEER, FEWEST_TRAINER_DIGITS)
    assert [len(shard) for shard in shards] == [1, 2, 3, 4]
    assert keys.trainer_shard(shards[0]) == f"{keys.swarm_id}.trainers.a"
    for shard in shards:
        validator.check(entry(keys.trainer_shard(shard), PEER.to_bytes()))
    for value, subkey in ((keys.trainer_shard("b"), PEER.to_bytes()), (keys.trainer_shard("a"), 3)):
        with pytest.raises(RecordError, match="belong to it"):
            validator.check(entry(value, subkey))
