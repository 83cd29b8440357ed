"""Every parser of strangers' bytes, fed with corrupted real messages: it returns a value or raises its own error.

Each target names a format, some real messages made by the code itself, and how they are delivered to the parser. Signed
messages are corrupted first and signed afterwards, as a stranger would. `-m slow` runs each target for a minute.
"""

import contextlib
import functools
import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import base58
import mutations
import numpy as np
import pytest
import torch
from checkpoint_samples import AN_UID, MANIFEST, SWARM, make_expert, step
from expert_fakes import Request, make_call, make_node, make_peer_id, random_rows
from google.protobuf.message import DecodeError, Message
from hypothesis import given
from hypothesis import strategies as st
from memory_folders import DIMENSIONS, SampleMemory
from memory_in_use import memory_in_use
from mutations import Mutate
from pydantic import ValidationError
from scalars import scalars
from stranger import digest, new_identities, packed

from benchmarks.simulated_p2p import Link, simulated_world
from benchmarks.simulated_swarm import SimulatedSwarm
from dht.admission import RIGHTS, Role, SwarmAdmission, make_badge, make_token, parse_denied
from dht.announcements import read_node, read_replicas, read_trainer
from dht.invites import Invite
from dht.library import read_library, read_region
from dht.manifest import Manifest, parse_uid
from dht.membership import PeerStore
from dht.memory import MemoryID, MemoryManifest
from dht.receipts import Work, check_receipt, sign_receipt
from dht.records import RecordValidator, SwarmKeys, digits_of, open_record, sign_record
from dht.uid import UID
from expert_server.experts.expert import Expert
from expert_server.experts.format import StateForm, from_bytes, to_bytes
from expert_server.memory.search import search_together
from expert_server.memory.shard import PrimaryShard, Shard
from expert_server.serving.forward_cache import ForwardCache
from expert_server.serving.headers import HeaderParser
from peer import PROTOCOL_VERSION
from peer.codec import CodecName, codec_of
from peer.encoding import decode, encode
from peer.errors import AddressError, TalkootError, UserError
from peer.identity import CONTACT_DOMAIN, RECEIPT_DOMAIN, SESSION_DOMAIN
from peer.kademlia.validation import Entry, Record, pack_entries, unpack, unpack_entries, unpack_subkey
from peer.rpc.sessions import Sessions
from peer.rpc.transfer import SnapshotReceiver
from peer.transport.addresses import Multiaddress
from peer.transport.contacts import UncheckedContact
from peer.transport.endpoints import Endpoint
from peer.wire import (
    admission_pb2,
    contact_pb2,
    credit_pb2,
    dht_pb2,
    expert_pb2,
    memory_pb2,
    records_pb2,
    session_pb2,
    state_pb2,
)
from talkoot.dashboard import api
from talkoot.node import control
from trainer_client.averaging.dense_part import DenseForm, PeerDensePart, SharedParameters, require_near
from trainer_client.balancing import LoadBias
from trainer_client.dispatch.grpc_caller import ReplyAssembler
from trainer_client.memory.checks import Ask, Findings, parse_passages
from trainer_client.memory.codebook import Codebook
from trainer_client.memory.encoder import (
    DUAL,
    MAX_WORD_WEIGHT,
    STATIC,
    DualEncoder,
    StaticEncoder,
    load_encoder,
)

pytestmark = pytest.mark.filterwarnings("ignore:Parsed a serial number")  # of a spoilt certificate
NOW = 1_700_000_000.0
FOUNDER, NODE, STRANGER = new_identities(3)
KEYS = SwarmKeys("sauna", FOUNDER.peer_id)
TOKEN = make_token(FOUNDER, KEYS.swarm_id, Role.NODE, NOW + 3600, 7)
TRAINERS_TOKEN = make_token(FOUNDER, KEYS.swarm_id, Role.TRAINER, NOW + 3600, 8)
ADMISSION = SwarmAdmission(KEYS, now=lambda: NOW)
ADMISSION.learn(FOUNDER.public_key, "token")
MEMORY = MemoryID.of("python-docs", FOUNDER.peer_id)
ADDRESS = f"/ip4/192.0.2.7/tcp/31337/p2p/{NODE.peer_id.to_base58()}"
RELAYED = f"/ip4/192.0.2.8/tcp/1/p2p/{FOUNDER.peer_id.to_base58()}/p2p-circuit/p2p/{NODE.peer_id.to_base58()}"
OPEN = RecordValidator(now=lambda: NOW)


@dataclass(frozen=True)
class Target:
    """`deliver` passes bytes to the parser. It may raise `refusals` and nothing else. `kind`: of a protobuf message."""

    name: str
    mutate: Mutate
    corpus: Callable[[], Sequence[bytes]]
    deliver: Callable[[bytes], object]
    refusals: tuple[type[Exception], ...] = (TalkootError,)
    kind: type[Message] | None = None


def parsed(kind: type[Message], data: bytes) -> Any:
    """Parses as gRPC servers and clients do here: a message that cannot be parsed becomes an empty one."""
    message: Any = kind()
    try:
        message.ParseFromString(data)
    except DecodeError:
        return kind()
    return message


def serialized(*messages: Message) -> list[bytes]:
    return [message.SerializeToString() for message in messages]


def payloads() -> list[bytes]:
    """One record of each kind, with all fields."""
    node = records_pb2.NodeRecord(
        addresses=["192.0.2.7:50051", "[2001:db8::1]:1", "example.org:2"],
        certificate=NODE.make_certificate(), protocol_version=PROTOCOL_VERSION, software_version="1.2",
        expert_count=3, expert_capacity=9, rows_processed=5, updates=6, started_at=NOW - 5,
        name="sauna", activity=records_pb2.NODE_ACTIVITY_SERVING,
        metrics_address="192.0.2.7:9100", rows_per_s=1.5, renew_every_s=9.0, contributed_rows=7,
        contributed_updates=8, contributed_s=9.5, reachability=records_pb2.REACHABILITY_RELAYED,
        tunnel_addresses=[RELAYED, ADDRESS], relay_addresses=[RELAYED, ADDRESS],
    )  # fmt: skip
    latency = records_pb2.Latency(p50_s=0.1, p99_s=0.3)
    trainer = records_pb2.TrainerRecord(
        name="löyly", protocol_version=PROTOCOL_VERSION, software_version="1.2", started_at=NOW - 9, step=5, steps=9,
        loss=2.5, validation_loss=2.6, bits_per_byte=1.1, tokens_per_s=900.0, forward=latency, backward=latency,
        calls=4, bytes_sent=5, bytes_received=6, failures=[records_pb2.Failures(cause="unavailable", count=2)],
        nodes=[records_pb2.NodeLatency(peer_id=NODE.peer_id.to_bytes(), mean_s=0.5)], addresses=["192.0.2.9:1"],
        certificate=NODE.make_certificate(), dense_fingerprint=b"f" * 32, dense_age=7, tunnel_addresses=[RELAYED],
        relay_addresses=[RELAYED], metrics_address="192.0.2.7:9100", renew_every_s=9.0,
    )  # fmt: skip
    replica = records_pb2.Announcement(
        state=records_pb2.REPLICA_STATE_SERVING, update_count=3, queued_rows=1, claimed_at=NOW - 1
    )
    listed = records_pb2.LibraryEntry(
        name="python-docs", manifest_sha256=bytes(32), manifest_bytes=900, revision=3, passages=7, total_bytes=8,
        licenses=["MIT", "PSF-2.0"], about="Python's documentation", shards=4, grid=[16, 16],
    )  # fmt: skip
    library = records_pb2.Library(memories=[listed])
    placed = records_pb2.Announcement(
        state=records_pb2.REPLICA_STATE_SERVING, update_count=9, following=[1, 1]
    )
    hosting = records_pb2.Hosting(replicas=[placed], queued_rows=4)
    region = records_pb2.RegionRecord(state=records_pb2.REPLICA_STATE_SERVING, shards=bytes(24))
    return serialized(
        records_pb2.RecordPayload(key=KEYS.node(NODE.peer_id), expires_at=NOW + 60, node=node),
        records_pb2.RecordPayload(key=KEYS.trainer(NODE.peer_id), expires_at=NOW + 60, trainer=trainer),
        records_pb2.RecordPayload(
            key=KEYS.expert(UID(0, (1, 1))), expires_at=NOW + 60, announcement=replica,
            badge=make_badge(TOKEN, NODE.peer_id),
        ),
        records_pb2.RecordPayload(key=KEYS.prefix(0), expires_at=NOW + 60, hosting=hosting),
        records_pb2.RecordPayload(key=KEYS.library, expires_at=NOW + 60, library=library),
        records_pb2.RecordPayload(key=KEYS.memory_region(MEMORY, 3), expires_at=NOW + 60, region=region),
    )  # fmt: skip


def deliver_payload(data: bytes) -> None:
    """The payload is signed by its writer, stored, found by others, and read as each kind of record."""
    payload = parsed(records_pb2.RecordPayload, data)
    key = payload.key
    signed = payload.SerializeToString()
    record = records_pb2.SignedRecord(
        payload=signed, public_key=NODE.public_key, signature=NODE.sign(NODE.public_key + signed)
    ).SerializeToString()
    stored = Record(digest(key), packed(NODE.peer_id.to_bytes()), packed(record), payload.expires_at)
    OPEN.validate(stored)
    opened = open_record(record, key, NODE.peer_id, NOW)
    for read in (
        lambda: read_node(opened, NODE.peer_id),
        lambda: read_trainer(opened, NODE.peer_id),
        lambda: read_replicas(opened, AN_UID.layer, AN_UID.coordinate, NODE.peer_id),
        lambda: read_replicas(opened, AN_UID.layer, (), NODE.peer_id),
        lambda: read_library(opened, NODE.peer_id),
        lambda: read_region(opened, NODE.peer_id, with_contact=True),
        lambda: ADMISSION.check_record(opened, NODE.peer_id),
    ):
        try:
            read()
        except TalkootError:
            continue


def deliver_signed_record(data: bytes) -> None:
    """Delivered without signing: the key, the signature and the payload may all be corrupted."""
    OPEN.check(
        Record(digest(KEYS.node(NODE.peer_id)), packed(NODE.peer_id.to_bytes()), packed(data), NOW + 60)
    )


def signed_records() -> list[bytes]:
    return [sign_record(NODE, parsed(records_pb2.RecordPayload, data)) for data in payloads()[:1]]


def invites() -> list[bytes]:
    message = records_pb2.InviteMessage(
        name="sauna", author=FOUNDER.peer_id.to_bytes(), bootstrap_addresses=[ADDRESS, RELAYED], token=TOKEN
    )
    return serialized(message)


def deliver_invite(data: bytes) -> None:
    line: bytes = base58.b58encode_check(data[:4000])
    str(Invite.parse(f"talkoot2{line.decode()}"))


def deliver_badge(data: bytes) -> None:
    ADMISSION.admit(NODE.peer_id, RIGHTS[Role.NODE], parsed(admission_pb2.Badge, data))


def deliver_token(data: bytes) -> None:
    joining = SwarmAdmission(KEYS, now=lambda: NOW)
    joining.learn(FOUNDER.public_key, "token")
    joining.present(parsed(admission_pb2.Token, data), NODE.peer_id)


SESSIONS = Sessions(KEYS.swarm_id, FOUNDER.peer_id, ADMISSION, now=lambda: NOW)
CHALLENGE = SESSIONS.challenges.new()


def statements() -> list[bytes]:
    statement = session_pb2.OpenStatement(
        protocol_version=PROTOCOL_VERSION, swarm_id=KEYS.swarm_id, caller=STRANGER.peer_id.to_bytes(),
        server=FOUNDER.peer_id.to_bytes(), challenge=CHALLENGE, rights=RIGHTS[Role.NODE],
        badge=make_badge(TOKEN, STRANGER.peer_id),
    )  # fmt: skip
    return serialized(statement)


def deliver_statement(data: bytes) -> None:
    data = data.replace(CHALLENGE, SESSIONS.challenges.new())  # one can be used once
    request = session_pb2.OpenRequest(
        statement=data, public_key=STRANGER.public_key, signature=STRANGER.sign(data, SESSION_DOMAIN)
    )
    SESSIONS.open(request)


def headers() -> list[bytes]:
    about: dict[str, Any] = {
        "protocol_version": PROTOCOL_VERSION,
        "swarm_id": SWARM,
        "request_id": b"r" * 16,
        "width": MANIFEST.width,
        "codec": expert_pb2.CODEC_FP32,
    }
    rows = [
        expert_pb2.ExpertRows(uid="0.1.1", rows=[0, 2], weights=scalars([0.5, 1.0])),
        expert_pb2.ExpertRows(uid="0.0.1"),
    ]
    right = expert_pb2.CallHeader(
        **about, segment_lengths=[2, 1], positions=[0, 4, 1], experts=rows, keep=True
    )
    kept = expert_pb2.CallHeader(**about, kept_request_id=b"k" * 16, kept_rows=3)
    return serialized(right, kept)


HEADERS = HeaderParser(SWARM, MANIFEST, 2**20, ForwardCache(2**20))


def deliver_header(data: bytes) -> None:
    header = parsed(expert_pb2.CallHeader, data)
    for direction in ("forward", "backward"):
        with contextlib.suppress(TalkootError):
            reserved: list[int] = []
            assignment = HEADERS.parse(header, direction, "caller", reserved.append).assignment
            if assignment is not None:
                assert reserved[0] > assignment.nbytes


def replies() -> list[bytes]:
    size = 4 * 3 * 8
    computed = expert_pb2.ExpertReply(index=0, update_count=5)
    error = expert_pb2.ExpertReply(index=1, status=8, message="busy", retry_after_s=1.5)
    rows = expert_pb2.AnsweredRows(rows=range(3), masks=[1, 1, 1], payload_bytes=size)
    all_rows = expert_pb2.AnsweredRows(products=scalars(range(6)), payload_bytes=2 * size)
    both = [computed, expert_pb2.ExpertReply(index=1)]
    return serialized(
        expert_pb2.CallReply(experts=[computed], rows=[rows], chunk=bytes(size)),
        expert_pb2.CallReply(experts=[error]),
        expert_pb2.CallReply(experts=[error, computed], rows=[rows], chunk=bytes(size), kept=True),
        expert_pb2.CallReply(experts=both, rows=[all_rows], chunk=bytes(2 * size)),
    )


def tensors() -> list[bytes]:
    """For each codec: its number, the width, and three rows."""
    rows = random_rows(3, 32, seed=0)
    codecs = map(codec_of, get_args(CodecName))
    return [bytes([codec, 32]) + encode(rows, codec) for codec in codecs]


def deliver_tensor(data: bytes) -> None:
    number, width = (*data[:2], 0, 0)[:2]
    codec: Any = number
    numbers = decode(bytearray(data[2:]), max(1, width), codec)
    decode(bytearray(encode(numbers, codec)), max(1, width), codec)  # whatever was taken can be sent on


_REQUESTS = [
    Request(UID(0, (0, n)), [3], range(3), *random_rows(6, 8, seed=n).reshape(2, 3, 8)) for n in range(2)
]
FORWARD = make_call(make_node(make_peer_id(1)), "forward", _REQUESTS, 1.0)
BACKWARD = make_call(make_node(make_peer_id(1)), "backward", _REQUESTS, 1.0)


def deliver_reply(data: bytes) -> None:
    reply = parsed(expert_pb2.CallReply, data)
    call = BACKWARD if any(rows.products for rows in reply.rows) else FORWARD
    assembler = ReplyAssembler(call, b"r" * 16, 8, expert_pb2.CODEC_FP32)
    list(assembler.take(reply))
    with contextlib.suppress(TalkootError):
        list(assembler.take(reply))


@functools.cache
def state() -> bytes:
    return to_bytes(make_expert(3).checkpoint(), SWARM, AN_UID, 1000.0)


FORM = StateForm.of(MANIFEST)
PATIENT = MANIFEST.model_copy(
    update={"optimizer": MANIFEST.optimizer.model_copy(update={"rows_per_update": 12})}
)
"""With this manifest, a call of `step` has five rows, which are accumulated."""


@functools.cache
def patient() -> tuple[Expert, bytes]:
    """An expert that takes others' states, and such a state."""
    taker, giver = (step(Expert(AN_UID, PATIENT), calls) for calls in (0, 4))
    return taker, to_bytes(giver.checkpoint(), SWARM, AN_UID, 1000.0)


def deliver_accumulated(data: bytes) -> None:
    """The step with the accumulated gradients must leave a state that others accept."""
    expert, _ = patient()
    checkpoint = from_bytes(data, SWARM, AN_UID, 1, StateForm.of(PATIENT))
    expert.import_state(checkpoint.state, 1, "QmStranger")
    expert.end_accumulation()
    state = expert.export_state()
    expert.check_state(state, expert.update_count)


@functools.cache
def dense() -> tuple[DenseForm, SharedParameters, bytes]:
    """A dense part with biases."""
    part = SharedParameters(torch.nn.Sequential(torch.nn.Linear(3, 2), LoadBias((2, 2))))
    form = DenseForm.of(part.model, SWARM)
    return form, part, form.to_bytes(part.read().tensors, 3)


def deliver_dense(data: bytes) -> None:
    form, part, _ = dense()
    own, theirs = part.read(), form.from_bytes(data, 3)
    require_near(form.trained(own.tensors), form.trained(theirs))
    part.merge("liar", own, PeerDensePart(theirs, 3, 0.0, part.moves_to(own)), 0.5)
    with part.stepping():
        pass
    assert all(torch.equal(tensor, own.tensors[name]) for name, tensor in part.read().tensors.items())


def snapshot_headers() -> list[bytes]:
    header = state_pb2.StateHeader(update_count=3, total_bytes=9, sha256=b"s" * 32)
    return serialized(header)


def deliver_snapshot_header(data: bytes) -> None:
    receiver = SnapshotReceiver(1000, lambda size: None)
    receiver.begin(parsed(state_pb2.StateHeader, data))
    receiver.take(b"123456789")


def entries() -> list[bytes]:
    record = packed(signed_records()[0])
    names = [NODE.peer_id.to_bytes(), STRANGER.peer_id.to_bytes()]
    return [
        pack_entries({name: Entry(record, NOW + 60) for name in names}),
        pack_entries({n: Entry(packed(KEYS.prefix(0)), NOW + 60) for n in range(9)}),
    ]


def deliver_entries(data: bytes) -> None:
    key = digest(KEYS.prefix(0))
    for subkey, entry in unpack_entries(data).items():
        OPEN.validate(Record(key, packed(subkey), *entry))


def statements_of_contacts() -> list[bytes]:
    kinds: list[dict[str, Any]] = [{"direct": "192.0.2.7:1"}, {"relayed": RELAYED}, {"libp2p": ADDRESS}, {}]
    statement = contact_pb2.ContactStatement(
        certificate=NODE.make_certificate(), sequence=7, expires_at=NOW + 60,
        addresses=[contact_pb2.ContactAddress(**kind) for kind in kinds],
    )  # fmt: skip
    return serialized(statement)


def deliver_contact(data: bytes) -> None:
    """The contact is signed by its peer, and passed on."""
    contact = contact_pb2.Contact(statement=data, signature=NODE.sign(data, CONTACT_DOMAIN))
    read = UncheckedContact.read(contact).check(NOW)
    assert read.peer_id == NODE.peer_id
    assert read.certificate_pem


def deliver_value(data: bytes) -> None:
    for read in (unpack, unpack_subkey):
        try:
            read(data)
        except TalkootError:
            continue
    OPEN.check(Record(digest(KEYS.prefix(0)), packed(3), data, NOW + 60))


def deliver_known_peers(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "peers.json"
        path.write_bytes(data)
        PeerStore(path).addresses()


def known_peers() -> list[bytes]:
    return [json.dumps({"peers": [{"addresses": [ADDRESS, RELAYED], "met_at": NOW}] * 2}).encode()]


def manifest() -> list[bytes]:
    return [MANIFEST.to_json()]


def queries() -> list[bytes]:
    return [
        b"metric=loss&points=300&since=1700000000.5",
        b"page=2&per_page=50&sort=updates&order=desc&state=serving",
    ]


def deliver_query(data: bytes) -> None:
    pairs = (pair.partition("=") for pair in data.decode(errors="replace").split("&"))
    query = {key: value for key, _, value in pairs}
    for ask in (
        lambda: api.history_query(query, NOW),
        lambda: api.nodes(None, query),
        lambda: api.trainers(None, query),
        lambda: api.experts(None, query),
        lambda: api.leaderboard(None, query),
    ):
        try:
            ask()
        except api.ApiError:
            continue


def deliver_address(data: bytes) -> None:
    text = data.decode(errors="replace")
    for kind in (Multiaddress, Endpoint):
        with contextlib.suppress(AddressError):
            assert kind(kind(text)) == kind(text)
    opened = records_pb2.RecordPayload(
        expires_at=NOW + 60,
        node=records_pb2.NodeRecord(
            certificate=NODE.make_certificate(), addresses=[text],
            tunnel_addresses=[text], relay_addresses=[text], metrics_address=text,
        ),
    )  # fmt: skip
    node = read_node(opened, NODE.peer_id)
    assert node is not None


def addresses() -> list[bytes]:
    texts = (
        ADDRESS,
        RELAYED,
        "192.0.2.7:1",
        "[2001:db8::1]:9100",
        "example.org:80",
        "/dns4/example.org/tcp/1/p2p/Q",
    )
    return [text.encode() for text in texts]


@functools.cache
def memory() -> SampleMemory:
    return SampleMemory.make(each=70, is_twofold=True)


def memory_manifests() -> list[bytes]:
    sample = memory()
    return [
        sample.manifest.serialize(),
        sample.revoking((sample.roots[0], 3)).manifest.serialize(),
    ]


def deliver_memory_manifest(data: bytes) -> None:
    parsed = MemoryManifest.parse(data)
    assert MemoryManifest.parse(parsed.serialize()) == parsed
    assert sum(map(len, parsed.by_cell.values())) == len(parsed.shards)


def shards() -> list[bytes]:
    return whole_and_without_a_passage(0)


def secondary_shards() -> list[bytes]:
    return whole_and_without_a_passage(4)


def whole_and_without_a_passage(number: int) -> list[bytes]:
    sample = memory()
    info = sample.manifest.shards[number]
    data = sample.files[info.root]
    shard = Shard.parse(data, info, DIMENSIONS)
    return [data, shard.without({sample.roots[0]: [3]}) or b""]


def deliver_shard(data: bytes) -> None:
    sample = memory()
    root = sample.roots[0]
    shard = Shard.parse(data, sample.manifest.by_root[root], DIMENSIONS)
    search_together([shard], np.ones((2, DIMENSIONS), np.int8), 5)
    shard.check({root: [3]})
    assert isinstance(shard, PrimaryShard)
    assert {passage for passage in shard.passages() if passage} <= set(sample.passages[root][0])


def deliver_secondary_shard(data: bytes) -> None:
    sample = memory()
    shard = Shard.parse(data, sample.manifest.shards[4], DIMENSIONS)
    search_together([shard], np.ones((2, DIMENSIONS), np.int8), 5)
    shard.check({sample.roots[0]: [3]})
    assert all(shard.text_at(n) == (sample.roots[0], n) for n in range(len(shard)))


def encoders() -> list[bytes]:
    rng = np.random.default_rng(0)
    vectors = rng.integers(-127, 128, (3, DIMENSIONS), np.int8)
    ones = np.ones(3, np.float32)
    return [StaticEncoder(["sauna", "löyly", "kiuas"], vectors, ones, 2 * ones).to_bytes()]


def dual_encoders() -> list[bytes]:
    static = StaticEncoder.from_bytes(encoders()[0])
    return [DualEncoder(static, static, 1.0).to_bytes()]


def deliver_encoder(data: bytes, kind: str = STATIC) -> None:
    encoder = load_encoder(kind, data, DIMENSIONS)
    texts = ["Sauna: löyly?", ""]
    assert encoder.encode(texts).shape == encoder.encode_questions(texts).shape == (2, DIMENSIONS)
    assert min(encoder.rarity(["sauna", "x"])) >= 0
    assert 0 <= encoder.word_weight <= MAX_WORD_WEIGHT


def deliver_dual_encoder(data: bytes) -> None:
    deliver_encoder(data, DUAL)


def deliver_codebook(data: bytes) -> None:
    scores = Codebook.from_bytes(data, (2, 2), DIMENSIONS).scores(np.ones((3, DIMENSIONS), np.int8))
    assert np.isfinite(scores).all()


def memory_requests() -> list[bytes]:
    """The requests whose replies are corrupted."""
    sample = memory()
    request = memory_pb2.SearchReply(
        found=[
            memory_pb2.Found(
                shards=[0, 1, 2], positions=[3, 69, 3], scores=[40, -4, -5], texts=[0, 0, 1],
                text_positions=[0, 0, 3],
            )
        ],
        missing=[3],
        text_roots=[sample.roots[0]],
    )  # fmt: skip
    return serialized(request)


def deliver_search_reply(data: bytes) -> None:
    infos = memory().manifest.shards
    ask = Ask((*infos[:2], *infos[4:6]), ((0,),) * 4, 5)
    answer = ask.parse(parsed(memory_pb2.SearchReply, data), NODE.peer_id)
    findings = Findings(memory().manifest, np.ones((1, DIMENSIONS), np.int8), 5)
    findings.add(answer)
    for place in findings.unproven():
        assert place.position < memory().manifest.by_root[place.root].leaves


def read_replies() -> list[bytes]:
    sample = memory()
    reply = memory_pb2.ReadReply()
    for number, info in enumerate((sample.manifest.shards[0], sample.manifest.shards[4])):
        shard = Shard.parse(sample.files[info.root], info, DIMENSIONS)
        reply.passages.extend(entry.message(number) for entry in shard.read([3, 69]))
    return serialized(reply)


def deliver_read_reply(data: bytes) -> None:
    sample = memory()
    root, second = sample.roots[0], sample.roots[4]
    asked = {root: [3, 69], second: [3, 69]}
    reply = parsed(memory_pb2.ReadReply, data)
    for place, proven in parse_passages(reply, asked, sample.manifest, NODE.peer_id).items():
        assert proven.text == (root, place.position)
        assert proven.passage == (sample.passages[root][0][place.position] if place.root == root else None)


def signed_receipt() -> credit_pb2.SignedReceipt:
    badge = make_badge(TRAINERS_TOKEN, NODE.peer_id)
    return sign_receipt(NODE, KEYS.swarm_id, STRANGER.peer_id, Work(100, 20, 3, 2, 1), 500, badge)


def receipts() -> list[bytes]:
    return [signed_receipt().receipt]


def deliver_receipt(data: bytes) -> None:
    """The receipt is signed whatever it says, and kept if it is valid."""
    signature = NODE.sign(data, RECEIPT_DOMAIN)
    badge = make_badge(TRAINERS_TOKEN, NODE.peer_id)
    signed = credit_pb2.SignedReceipt(
        receipt=data, public_key=NODE.public_key, signature=signature, badge=badge
    )
    deliver_signed_receipt(signed.SerializeToString())


def deliver_signed_receipt(data: bytes) -> None:
    receipt = check_receipt(parsed(credit_pb2.SignedReceipt, data), KEYS.swarm_id, STRANGER.peer_id)
    assert receipt.trainer == NODE.peer_id
    assert receipt.work.is_sane
    ADMISSION.signer_of(receipt.trainer, receipt.badge)


TARGETS = [
    Target("memory's manifest", mutations.protobuf, memory_manifests, deliver_memory_manifest,
           kind=memory_pb2.MemoryManifest),
    Target("shard", mutations.safetensors, shards, deliver_shard),
    Target("secondary shard", mutations.safetensors, secondary_shards, deliver_secondary_shard),
    Target("encoder", mutations.safetensors, encoders, deliver_encoder),
    Target("dual encoder", mutations.safetensors, dual_encoders, deliver_dual_encoder),
    Target("codebook", mutations.safetensors,
           lambda: [Codebook(np.ones((4, DIMENSIONS), np.float16)).to_bytes()], deliver_codebook),
    Target("search reply", mutations.protobuf, memory_requests, deliver_search_reply,
           kind=memory_pb2.SearchReply),
    Target("read reply", mutations.protobuf, read_replies, deliver_read_reply,
           kind=memory_pb2.ReadReply),
    Target("record", mutations.protobuf, payloads, deliver_payload,
           kind=records_pb2.RecordPayload),
    Target("signed record", mutations.protobuf, signed_records, deliver_signed_record,
           kind=records_pb2.SignedRecord),
    Target("receipt", mutations.protobuf, receipts, deliver_receipt,
           kind=credit_pb2.Receipt),
    Target("signed receipt", mutations.protobuf, lambda: serialized(signed_receipt()), deliver_signed_receipt,
           kind=credit_pb2.SignedReceipt),
    Target("DHT value", mutations.packed, lambda: [packed(KEYS.prefix(0))], deliver_value),
    Target("DHT entries", mutations.packed, entries, deliver_entries),
    Target("contact", mutations.protobuf, statements_of_contacts, deliver_contact,
           kind=contact_pb2.ContactStatement),
    Target("address", mutations.text, addresses, deliver_address),
    Target("encoded address", mutations.mutate_bytes,
           lambda: [Multiaddress(text).to_bytes() for text in (ADDRESS, RELAYED)], Multiaddress.decode),
    Target("invite", mutations.protobuf, invites, deliver_invite, (UserError,), records_pb2.InviteMessage),
    Target("invite line", mutations.text, lambda: [str(Invite(KEYS, (Multiaddress(ADDRESS),))).encode()],
           lambda data: Invite.parse(data.decode(errors="replace")), (UserError,)),
    Target("manifest", mutations.json_text, manifest, Manifest.from_json),
    Target("token", mutations.protobuf, lambda: serialized(TOKEN), deliver_token,
           kind=admission_pb2.Token),
    Target("badge", mutations.protobuf, lambda: serialized(make_badge(TOKEN, NODE.peer_id)), deliver_badge,
           kind=admission_pb2.Badge),
    Target("session statement", mutations.protobuf, statements, deliver_statement,
           kind=session_pb2.OpenStatement),
    Target("call header", mutations.protobuf, headers, deliver_header,
           kind=expert_pb2.CallHeader),
    Target("call reply", mutations.protobuf, replies, deliver_reply,
           kind=expert_pb2.CallReply),
    Target("snapshot header", mutations.protobuf, snapshot_headers, deliver_snapshot_header,
           kind=state_pb2.StateHeader),
    Target("state", mutations.safetensors, lambda: [state()],
           lambda data: from_bytes(data, SWARM, AN_UID, 3, FORM)),
    Target("accumulated gradients", mutations.safetensors, lambda: [patient()[1]], deliver_accumulated),
    Target("dense part", mutations.safetensors, lambda: [dense()[2]], deliver_dense),
    Target("tensor", mutations.mutate_bytes, tensors, deliver_tensor),
    Target("expert's UID", mutations.text, lambda: [b"1.0.1", b"0.1.1"],
           lambda data: parse_uid(data.decode(errors="replace"), MANIFEST)),
    Target("known peers", mutations.json_text, known_peers, deliver_known_peers),
    Target("denied peer", mutations.text, lambda: [NODE.peer_id.to_base58().encode()],
           lambda data: parse_denied(data.decode(errors="replace"))),
    Target("control request", mutations.json_text,
           lambda: [control.ControlRequest(command="pause", for_s=60).model_dump_json().encode()],
           control._parse, (UserError, ValidationError)),
    Target("dashboard query", mutations.text, queries, deliver_query),
]  # fmt: skip
by_name = pytest.mark.parametrize("target", TARGETS, ids=[target.name for target in TARGETS])


@functools.cache
def corpus_of(name: str) -> tuple[bytes, ...]:
    (target,) = (target for target in TARGETS if target.name == name)
    return tuple(target.corpus())


def attack(target: Target, seed: int) -> None:
    """Delivers one corrupted message."""
    rng = random.Random(seed)
    data = target.mutate(rng.choice(corpus_of(target.name)), rng)
    try:
        target.deliver(data)
    except target.refusals:
        pass
    except Exception as error:
        error.add_note(f"target {target.name}, seed {seed}, message {data[:2000]!r}")
        raise


@by_name
def test_the_real_messages_are_taken(target: Target) -> None:
    """Otherwise their corrupted forms would be refused too early to reach any code."""
    for data in corpus_of(target.name):
        target.deliver(data)


@by_name
def test_a_spoilt_message_gives_a_value_or_the_parsers_own_error(target: Target) -> None:
    @given(st.integers(0, 2**64))
    def spoil(seed: int) -> None:
        for more in range(3):
            attack(target, 3 * seed + more)

    spoil()


@pytest.mark.parametrize(
    "target", [target for target in TARGETS if target.kind], ids=lambda target: target.name
)
def test_a_field_at_the_edge_of_its_type_gives_a_value_or_the_parsers_own_error(target: Target) -> None:
    """Every field: NaN, the ends of integers, unknown numbers of enumerations, empty and endless texts and lists."""
    assert target.kind is not None
    for data in corpus_of(target.name):
        for what, spoilt in mutations.edges(parsed(target.kind, data), longest=50_000, many=5_000):
            try:
                target.deliver(spoilt)
            except target.refusals:
                continue
            except Exception as error:
                error.add_note(f"target {target.name}, {what}")
                raise


def test_a_spoilt_request_of_the_dht_gets_an_answer() -> None:
    """The answer comes from another peer's handlers, over a network within this process."""
    with simulated_world() as world:

        async def scenario() -> None:
            swarm = await SimulatedSwarm.start(world, 1, 4, Link(rtt_s=0.1), seed=1)
            peer, until = swarm.peers[0], world.unix_time() + 60
            key = digest(swarm.keys.prefix(0))
            info = dht_pb2.NodeInfo(node_id=digest("node"))
            real = {
                "ping": dht_pb2.PingRequest(peer=info, validate=True),
                "find": dht_pb2.FindRequest(keys=[key, digest("other")], peer=info),
                "store": dht_pb2.StoreRequest(
                    keys=[key, key], subkeys=[packed(3), b""], values=[packed(swarm.keys.prefix(0)), entries()[0]],
                    expiration_time=[until, until], in_cache=[False, False], peer=info,
                ),
            }  # fmt: skip
            for seed in range(300):
                rng = random.Random(seed)
                name = rng.choice(list(real))
                request = mutations.protobuf(real[name].SerializeToString(), rng)
                answer = await peer.transport.handlers[name](STRANGER.peer_id, request)
                assert isinstance(answer, bytes), (name, seed)
            await peer.experts.prefixes([(0, ())], 2)

        world.run_until_complete(scenario())


def right_records() -> list[Record]:
    """One record of each kind, and index entries."""
    badge = make_badge(TOKEN, NODE.peer_id)
    bodies = [parsed(records_pb2.RecordPayload, data) for data in payloads()]
    libraries = [body for body in bodies if body.WhichOneof("body") == "library"]
    bodies = [body for body in bodies if body.WhichOneof("body") not in ("trainer", "library")]
    revoked = admission_pb2.Revocations(serials=range(1, 50))
    signed = (
        [(NODE, body) for body in bodies]
        + [(FOUNDER, body) for body in libraries]
        + [
            (FOUNDER, records_pb2.RecordPayload(key=KEYS.manifest, manifest_json=b'{"name": "sauna"}')),
            (FOUNDER, records_pb2.RecordPayload(key=KEYS.revocations, revocations=revoked)),
        ]
    )
    records = []
    for writer, payload in signed:
        payload.expires_at = NOW + 60
        if writer is NODE:
            payload.badge.CopyFrom(badge)
        records.append(stored(payload.key, writer.peer_id.to_bytes(), sign_record(writer, payload)))
    shard = KEYS.node_shard(digits_of(NODE.peer_id.to_bytes())[:2])
    return [
        *records,
        stored(KEYS.prefix(0), 3, KEYS.prefix(0)),
        stored(shard, NODE.peer_id.to_bytes(), shard),
    ]


def stored(key: str, subkey: object, value: object) -> Record:
    return Record(digest(key), packed(subkey), packed(value), NOW + 60)


def spoilt(record: Record, others: list[Record], rng: random.Random) -> Record:
    key, subkey, value, expiry = record.key, record.subkey, record.value, record.expires_at
    other = rng.choice(others)
    match rng.randrange(7):
        case 0 | 1:
            value = mutations.mutate_bytes(value, rng)
        case 2:
            value = mutations.packed(value, rng)
        case 3:
            subkey = mutations.mutate_bytes(subkey, rng)
        case 4:
            key = mutations.mutate_bytes(key, rng)
        case 5:
            key, subkey = other.key, other.subkey
        case _:
            expiry = rng.choice([expiry + 1, NOW + 10**7, float("nan"), float("inf"), -1.0])
    return Record(key, subkey, value, expiry)


def as_read(record: Record) -> Record:
    """The record as readers take it: if a field of the signed message comes twice, the last one counts."""
    value = unpack(record.value)
    if not isinstance(value, bytes):
        return record
    message = parsed(records_pb2.SignedRecord, value)
    again = records_pb2.SignedRecord(
        payload=message.payload, public_key=message.public_key, signature=message.signature
    )
    return Record(record.key, record.subkey, packed(again.SerializeToString()), record.expires_at)


def test_no_changed_record_is_taken_for_another() -> None:
    validator = RecordValidator(now=lambda: NOW, rule=ADMISSION.check_record, swarm_id=KEYS.swarm_id)
    right = right_records()
    assert all(map(validator.validate, right))
    rng, taken, count = random.Random(1), 0, 10_000
    before, began = memory_in_use(), time.thread_time()
    for _ in range(count):
        original = rng.choice(right)
        record = spoilt(original, right, rng)
        if validator.validate(record) and as_read(record) not in right:
            taken += 1
            same = (record.key, record.value) == (original.key, original.value)
            # Index entries are not signed: with another coordinate or expiration time, one is a different valid entry.
            assert same, record
            assert isinstance(unpack(record.value), str), record
            assert isinstance(unpack(record.subkey), int | bytes)
    assert taken < count / 20
    assert memory_in_use() - before < 32 * 2**20
    assert time.thread_time() - began < 60


@pytest.mark.slow
@by_name
def test_a_minute_of_spoilt_messages(target: Target) -> None:
    seed, ends = time.time_ns(), time.monotonic() + 60
    while time.monotonic() < ends:
        seed += 1
        attack(target, seed)
