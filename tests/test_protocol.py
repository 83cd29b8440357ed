"""What `docs/protocol.md`, `proto/` and `proto/vectors.json` tell authors of other clients is what the code does."""

import importlib
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import descriptor_pb2

from dht.admission import check_badge
from dht.announcements import NodeInfo
from dht.invites import Invite
from dht.receipts import check_receipt
from dht.records import RecordValidator
from dht.uid import UID
from peer import PROTOCOL_VERSION
from peer.identity import PeerID, peer_id_of
from peer.kademlia.validation import Record, pack, unpack_entries
from peer.rpc.sessions import SESSION_KEY
from peer.transport.contacts import UncheckedContact
from peer.wire import admission_pb2, contact_pb2, credit_pb2, expert_pb2, session_pb2
from trainer_client.dispatch.batches import AnsweredRows, NodeBatch, NodeCall
from trainer_client.dispatch.grpc_caller import ReplyAssembler

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "protocol.md").read_text()
FILE = ROOT / "proto" / "vectors.json"
VECTORS: dict[str, Any] = json.loads(FILE.read_text())
UNITS = {"": 1, "bytes": 1, "s": 1, "KiB": 2**10, "MiB": 2**20}
FOUNDER = PeerID.from_base58(VECTORS["peers"]["founder"]["peer_id_base58"])
CALLER = PeerID.from_base58(VECTORS["peers"]["caller"]["peer_id_base58"])
VALID_AT = 1_899_999_500.0
"""A time before what is in the vectors expires."""


def data(*path: str) -> bytes:
    """The bytes at this place in the vectors."""
    found: Any = VECTORS
    for name in path:
        found = found[name]
    return bytes.fromhex(found)


def test_vectors_are_what_the_code_makes() -> None:
    tool = runpy.run_path(str(ROOT / "tools" / "protocol_vectors.py"))
    made = tool["text"](tool["ProtocolVectors"](VECTORS).all())
    assert FILE.read_text() == made, "run `make vectors`"


def test_records_and_contacts_of_the_vectors_are_accepted() -> None:
    dht = VECTORS["dht"]
    stored = unpack_entries(data("dht", "dictionary"))
    assert len(stored) == 3
    keys = dict.fromkeys((1, 2), dht["index_entry"]["key"]) | {FOUNDER.to_bytes(): dht["record"]["key"]}
    validator = RecordValidator(lambda: VALID_AT, swarm_id=VECTORS["swarm"]["swarm_id"])
    for subkey, entry in stored.items():
        key_id = bytes.fromhex(dht["keys"][keys[subkey]])
        validator.check(Record(key_id, pack(subkey), *entry))
    contact = contact_pb2.Contact(
        statement=data("dht", "contact", "statement"), signature=data("dht", "contact", "signature")
    )
    assert UncheckedContact.read(contact).check(VALID_AT).peer_id == FOUNDER


def test_invite_and_badge_of_the_vectors_are_accepted() -> None:
    invite = Invite.parse(VECTORS["swarm"]["invite_with_token"])
    assert invite.keys.swarm_id == VECTORS["swarm"]["swarm_id"]
    badge = admission_pb2.Badge(
        grant=data("badge", "grant"),
        signature=data("badge", "grant_signature"),
        holder_signature=data("badge", "holder_signature"),
    )
    founder_key = data("peers", "founder", "public_key")
    grant = check_badge(badge, CALLER, invite.keys.swarm_id, founder_key)
    assert grant.expires_at > VALID_AT
    statement = session_pb2.OpenStatement.FromString(data("session", "statement"))
    assert statement.badge == badge
    assert peer_id_of(founder_key).to_bytes() == statement.server


def test_receipt_of_the_vectors_is_accepted() -> None:
    signed = credit_pb2.SignedReceipt(
        receipt=data("receipt", "receipt"),
        public_key=data("peers", "caller", "public_key"),
        signature=data("receipt", "signature"),
    )
    receipt = check_receipt(signed, VECTORS["swarm"]["swarm_id"], FOUNDER)
    assert (receipt.trainer, receipt.work.pairs, receipt.all_pairs) == (CALLER, 1200, 5000)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_reply_of_the_vectors_is_what_a_trainer_takes(direction: Any) -> None:
    calls = VECTORS[direction]
    inputs = np.array(calls["inputs"], np.float32)
    batch = NodeBatch(
        np.arange(2),
        np.array([2]),
        np.arange(2),
        (UID(0, (0, 0)), UID(0, (0, 1))),
        np.array([[0, 1], [-1, 1]]),
    )
    node = NodeInfo(peer_id=FOUNDER, expires_at=VALID_AT)
    call = NodeCall(node, direction, batch, 1.0, inputs, np.array([[1, 3], [0, 1]], np.float32))
    assembler = ReplyAssembler(call, bytes(range(16)), inputs.shape[1], expert_pb2.CODEC_FP32)
    taken = list(assembler.take(expert_pb2.CallReply.FromString(bytes.fromhex(calls["reply"]))))
    assembler.end()
    (answered,) = (each for each in taken if isinstance(each, AnsweredRows))
    assert answered.tensor.tolist() == calls["answers"]
    computed = [np.array(each) for each in calls["computed"]]
    if direction == "forward":
        expected = [computed[0][0] / 4 + computed[1][0] * 3 / 4, computed[1][1]]
    else:
        expected = [computed[0][0] + computed[1][0], computed[1][1]]
        products = [[np.dot(g, f[row]) for row, g in rows] for rows, f in _products(calls)]
        assert answered.products is not None
        assert answered.products[0].tolist() == [products[0][0], products[1][0]]
        assert answered.products[1, 1] == products[1][1]
    np.testing.assert_array_equal(answered.tensor, expected)


def _products(calls: dict[str, Any]) -> Any:
    """For each expert: its rows with their gradients, and its updates."""
    gradients = np.array(calls["gradients"])
    updates = [np.array(each) for each in calls["updates"]]
    return [([(0, gradients[0])], updates[0]), (list(enumerate(gradients)), updates[1])]


def rows_of_the_table(heading: str) -> list[list[str]]:
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert section is not None
    rows = [line.strip("|").split(" | ") for line in section[1].splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows[1:]]


def test_limits_on_the_page_are_those_of_the_code() -> None:
    rows = rows_of_the_table("Limits")
    assert len(rows) > 30
    for what, limit, constant in rows:
        module, _, name = constant.strip("`").rpartition(".")
        number, _, unit = limit.partition(" ")
        said = int(number.replace(",", "")) * UNITS[unit]
        assert said == getattr(importlib.import_module(module), name), what


def test_the_page_names_every_domain_and_right() -> None:
    domains = re.findall(r'^\| `"(talkoot \w+ v1)\\0"` \|', PAGE, re.MULTILINE)
    assert {f"{domain}\0" for domain in domains} == {*VECTORS["domains"].values()}
    for right in session_pb2.Right.keys()[1:]:
        assert f"`{right}`" in PAGE
    for constant in (VECTORS["tls_name"], SESSION_KEY, f"The protocol version is {PROTOCOL_VERSION}."):
        assert constant in PAGE


def test_comments_in_proto_name_every_domain() -> None:
    comments = "".join(path.read_text() for path in (ROOT / "proto").glob("*.proto"))
    for domain in VECTORS["domains"].values():
        assert f'"{domain[:-1]}\\0"' in comments
    assert comments.count("r and s of 32 bytes") == comments.count("ECDSA with P-256") == 5
    for constant in (VECTORS["tls_name"], SESSION_KEY):
        assert constant in comments


def test_protoc_works_as_the_page_shows_it(tmp_path: Path) -> None:
    (line,) = re.findall(r"^protoc (.+)$", PAGE, re.MULTILINE)
    words = [word.replace("--python_out=.", f"--python_out={tmp_path}") for word in shlex.split(line)]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"--descriptor_set_out={tmp_path / 'set'}", *words]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stderr
    made = descriptor_pb2.FileDescriptorSet.FromString((tmp_path / "set").read_bytes())
    assert {service.name for file in made.file for service in file.service} >= {
        "SessionService",
        "ExpertService",
    }
    assert (tmp_path / "peer" / "wire" / "session_pb2.py").exists()
