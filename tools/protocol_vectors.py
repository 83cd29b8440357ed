"""Prints proto/vectors.json: data with which a client in another language compares its own bytes (docs/protocol.md).

    python tools/protocol_vectors.py

The peers' keys are taken from the present file. ECDSA signatures are random, so one that the code still accepts is kept
as it is. Everything else is computed.
"""

import json
import re
import ssl
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from dht.admission import BADGE_DOMAIN, Role, make_badge
from dht.invites import Invite
from dht.manifest import Manifest
from dht.receipts import Work
from dht.records import SwarmKeys, digits_of
from dht.uid import UID
from expert_server.serving.batching import Direction, Result
from expert_server.serving.call import CallTensors
from expert_server.serving.forward_cache import ForwardCache
from expert_server.serving.headers import HeaderParser
from peer import PROTOCOL_VERSION
from peer.codec import CodecName, Floats, codec_of, encode_scalars
from peer.encoding import decode, encode
from peer.errors import RecordError
from peer.identity import (
    CONTACT_DOMAIN,
    GRANT_DOMAIN,
    RECEIPT_DOMAIN,
    RECORD_DOMAIN,
    SESSION_DOMAIN,
    TLS_NAME,
    Identity,
    pem_of,
    verify,
)
from peer.kademlia.routing import first_bits, id_bytes, key_id_of, node_id_of
from peer.kademlia.validation import Entry, Subkey, digest_of, pack, pack_entries
from peer.rpc.sessions import SESSION_KEY
from peer.transport.addresses import Multiaddress
from peer.transport.endpoints import Endpoint
from peer.wire import admission_pb2, contact_pb2, credit_pb2, expert_pb2, records_pb2, session_pb2

FILE = Path(__file__).parents[1] / "proto" / "vectors.json"
EXPIRES_AT = 1_900_000_000.0
"""The Unix time at which everything in the vectors expires."""
ENDPOINT = Endpoint("192.0.2.7:31337")
WIDTH = 16
MANIFEST = Manifest.model_validate(
    {
        "name": "sauna",
        "model": {"layers": 1, "hidden": WIDTH, "heads": 2, "context": 8},
        "experts": {"grid": [2, 2], "kind": "ffn"},
        "routing": {"top_k": 2},
        "admission": {"mode": "token"},
    }
)
UIDS = (UID(0, (0, 0)), UID(0, (0, 1)))
_NUMBERS = re.compile(r"\[\s+([-\d.,\s]+?)\s+\]")
_SIGNATURES = ("signature", "grant_signature")

Vectors = dict[str, Any]


class ProtocolVectors:
    """Makes the vectors with the keys and signatures of the present file."""

    def __init__(self, present: Mapping[str, Any]) -> None:
        self._signatures = list(_signatures(present))
        self._key_files = {name: peer["key_file"] for name, peer in present["peers"].items()}
        self._founder, self._caller = (_identity(self._key_files[name]) for name in ("founder", "caller"))
        self._keys = SwarmKeys(MANIFEST.name, self._founder.peer_id)

    def all(self) -> Vectors:
        """The contents of the whole file."""
        token = self._token()
        bootstrap = (Multiaddress.of(ENDPOINT, self._founder.peer_id),)
        return {
            "about": "Bytes are in hexadecimal. docs/protocol.md says what each of them is.",
            "protocol_version": PROTOCOL_VERSION,
            "tls_name": TLS_NAME,
            "session_metadata": SESSION_KEY,
            "domains": {
                "record": RECORD_DOMAIN.decode(),
                "session": SESSION_DOMAIN.decode(),
                "contact": CONTACT_DOMAIN.decode(),
                "receipt": RECEIPT_DOMAIN.decode(),
                "grant": GRANT_DOMAIN.decode(),
                "badge": BADGE_DOMAIN.decode(),
            },
            "peers": {
                "founder": {"key_file": self._key_files["founder"]} | _peer(self._founder),
                "caller": {"key_file": self._key_files["caller"]} | _peer(self._caller),
            },
            "swarm": {
                "name": self._keys.name,
                "swarm_id": self._keys.swarm_id,
                "manifest": MANIFEST.to_json().decode(),
                "invite": str(Invite(self._keys, bootstrap)),
                "invite_with_token": str(Invite(self._keys, bootstrap, token.SerializeToString())),
            },
            "badge": {
                "token_key": token.secret.hex(),
                "grant": token.grant.hex(),
                "grant_signature": token.signature.hex(),
                "holder_signature": make_badge(token, self._caller.peer_id).holder_signature.hex(),
            },
            "session": self._session(token),
            "dht": self._dht(),
            "codecs": _codecs(),
            "forward": self._call("forward"),
            "backward": self._call("backward"),
            "receipt": self._receipt(),
        }

    def _sign(self, identity: Identity, data: bytes, domain: bytes) -> bytes:
        for signature in self._signatures:
            try:
                verify(identity.public_key, data, signature, domain)
            except RecordError:
                continue
            return signature
        return identity.sign(data, domain)

    def _token(self) -> admission_pb2.Token:
        """A token as `talkoot invite` makes it, but with a fixed key."""
        secret = bytes(range(32))
        public = Ed25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()
        grant = admission_pb2.Grant(
            swarm_id=self._keys.swarm_id,
            role=Role.TRAINER.value,
            expires_at=EXPIRES_AT,
            serial=0x01020304,
            key=public,
        ).SerializeToString()
        signature = self._sign(self._founder, grant, GRANT_DOMAIN)
        return admission_pb2.Token(grant=grant, signature=signature, secret=secret)

    def _session(self, token: admission_pb2.Token) -> Vectors:
        challenge = bytes(range(40))
        statement = session_pb2.OpenStatement(
            protocol_version=PROTOCOL_VERSION,
            swarm_id=self._keys.swarm_id,
            server=self._founder.peer_id.to_bytes(),
            caller=self._caller.peer_id.to_bytes(),
            challenge=challenge,
            rights=[session_pb2.RIGHT_FORWARD, session_pb2.RIGHT_BACKWARD],
            badge=make_badge(token, self._caller.peer_id),
        ).SerializeToString()
        return {
            "challenge": challenge.hex(),
            "rights": ["RIGHT_FORWARD", "RIGHT_BACKWARD"],
            "statement": statement.hex(),
            "signature": self._sign(self._caller, statement, SESSION_DOMAIN).hex(),
        }

    def _receipt(self) -> Vectors:
        """The caller's receipt for the founder's node."""
        receipt = credit_pb2.Receipt(
            swarm_id=self._keys.swarm_id,
            trainer=self._caller.peer_id.to_bytes(),
            node=self._founder.peer_id.to_bytes(),
            work=Work(pairs=1200, updates=400, checks_passed=3).message(),
            all_pairs=5000,
        ).SerializeToString()
        signature = self._sign(self._caller, receipt, RECEIPT_DOMAIN)
        return {"receipt": receipt.hex(), "signature": signature.hex()}

    def _dht(self) -> Vectors:
        keys, founder = self._keys, self._founder
        peer_id = founder.peer_id.to_bytes()
        payload = records_pb2.RecordPayload(
            key=keys.manifest, expires_at=EXPIRES_AT, manifest_json=MANIFEST.to_json()
        ).SerializeToString()
        signature = self._sign(founder, founder.public_key + payload, RECORD_DOMAIN)
        record = records_pb2.SignedRecord(payload=payload, public_key=founder.public_key, signature=signature)
        contact = contact_pb2.ContactStatement(
            certificate=founder.make_certificate(),
            sequence=1,
            expires_at=EXPIRES_AT,
            addresses=[contact_pb2.ContactAddress(direct=ENDPOINT)],
        ).SerializeToString()
        entry = Entry(pack(keys.prefix(0)), EXPIRES_AT)
        stored: dict[Subkey, Entry] = dict.fromkeys((1, 2), entry)
        stored[peer_id] = Entry(pack(record.SerializeToString()), EXPIRES_AT)
        named = [
            keys.manifest,
            keys.revocations,
            keys.library,
            keys.prefix(0),
            keys.expert(UIDS[1]),
            keys.index(0, (), 300),
            keys.node(founder.peer_id),
            keys.node_shard(digits_of(peer_id)[:2]),
            keys.trainer(self._caller.peer_id),
            keys.trainer_shard(digits_of(self._caller.peer_id.to_bytes())[0]),
        ]
        return {
            "keys": {key: id_bytes(key_id_of(key)).hex() for key in named},
            "index_entry": {"key": keys.prefix(0), "subkey": pack(1).hex(), "value": entry.value.hex()},
            "record": {
                "key": keys.manifest,
                "subkey": pack(peer_id).hex(),
                "payload": payload.hex(),
                "signature": signature.hex(),
                "value": stored[peer_id].value.hex(),
            },
            "dictionary": pack_entries(stored).hex(),
            "digest": f"{digest_of(key_id_of(keys.prefix(0)), 1, entry):016x}",
            "contact": {
                "statement": contact.hex(),
                "signature": self._sign(founder, contact, CONTACT_DOMAIN).hex(),
            },
        }

    def _call(self, direction: Direction) -> Vectors:
        """A call of two rows. Row 0 is for two experts, with weights 1 and 3, and row 1 for the second expert alone."""
        inputs, gradients, codec = _numbers(2, 0), _numbers(2, 1), expert_pb2.CODEC_FP32
        header = expert_pb2.CallHeader(
            protocol_version=PROTOCOL_VERSION,
            swarm_id=self._keys.swarm_id,
            request_id=bytes(range(16)),
            width=WIDTH,
            codec=codec,
            segment_lengths=[2],
            positions=[0, 1],
            experts=[
                expert_pb2.ExpertRows(
                    uid=str(UIDS[0]), rows=[0], weights=encode_scalars(np.ones(1, np.float32), codec)
                ),
                expert_pb2.ExpertRows(
                    uid=str(UIDS[1]), weights=encode_scalars(np.array([3, 1], np.float32), codec)
                ),
            ],
        )
        sent = [inputs, gradients] if direction == "backward" else [inputs]
        chunk = b"".join(encode(tensor, header.codec) for tensor in sent)
        parsed = HeaderParser(self._keys.swarm_id, MANIFEST, 2**20, ForwardCache(0)).parse(
            header, direction, "caller", lambda _: None
        )
        assert parsed.assignment is not None, "it names no kept call"
        backwards = torch.from_numpy(gradients) if direction == "backward" else None
        tensors = CallTensors(header, parsed.assignment, torch.from_numpy(inputs), backwards)
        computed = [_numbers(1, 2), _numbers(2, 3)]
        updates = [_numbers(1, 4), _numbers(2, 5)]
        results = [
            Result(torch.from_numpy(tensor), update_count=7, updates=torch.from_numpy(update), version=9)
            for tensor, update in zip(computed, updates, strict=True)
        ]
        reply, pieces = expert_pb2.CallReply(), list[memoryview]()
        for said in tensors.replies(list(enumerate(results)), flush=False):
            if isinstance(said, expert_pb2.ExpertReply):
                reply.experts.append(said)
            else:
                reply.rows.append(said[0])
                pieces.append(said[1])
        reply.chunk = b"".join(pieces)
        vectors: Vectors = {"inputs": inputs.tolist()}
        if direction == "backward":
            vectors |= {"gradients": gradients.tolist(), "updates": [each.tolist() for each in updates]}
        return vectors | {
            "request": expert_pb2.CallRequest(header=header, chunk=chunk).SerializeToString().hex(),
            "computed": [tensor.tolist() for tensor in computed],
            "reply": reply.SerializeToString().hex(),
            "answers": decode(bytearray(reply.chunk), WIDTH, header.codec).tolist(),
        }


def _signatures(found: object) -> Iterator[bytes]:
    if isinstance(found, dict):
        for name, value in found.items():
            if name in _SIGNATURES:
                yield bytes.fromhex(value)
            yield from _signatures(value)


def _identity(key_file: str) -> Identity:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "peer.key"
        path.write_bytes(bytes.fromhex(key_file))
        return Identity.load_or_create(path)


def _peer(identity: Identity) -> Vectors:
    peer_id, certificate = identity.peer_id.to_bytes(), identity.make_certificate()
    shown = ssl.PEM_cert_to_DER_cert(pem_of(certificate).decode())
    return {
        "public_key": identity.public_key.hex(),
        "peer_id": peer_id.hex(),
        "peer_id_base58": identity.peer_id.to_base58(),
        "node_id": id_bytes(node_id_of(peer_id)).hex(),
        "known": f"{first_bits(node_id_of(peer_id)):016x}",
        "shard_digits": digits_of(peer_id),
        "certificate": certificate.hex(),
        "certificate_der": shown.hex(),
    }


def _numbers(rows: int, seed: int) -> Floats:
    """Random multiples of 1/8 between -4 and 4: sums and products of a few are exact in any order."""
    eighths = np.random.default_rng(seed).integers(-32, 32, (rows, WIDTH), endpoint=True)
    return (eighths / 8).astype(np.float32)


def _codecs() -> Vectors:
    tensor, made = _numbers(2, 6), Vectors()
    for name in get_args(CodecName):
        data = encode(tensor, codec_of(name))
        made[name] = {
            "bytes": data.hex(),
            "decoded": decode(bytearray(data), WIDTH, codec_of(name)).tolist(),
        }
    beside = {name: encode_scalars(tensor[0], codec_of(name)).hex() for name in ("fp32", "bf16")}
    return {"numbers": tensor.tolist()} | made | {"beside": beside}


def text(vectors: Vectors) -> str:
    """The file's text, with each row of numbers on one line."""
    lines = json.dumps(vectors, indent=1)
    return _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", lines) + "\n"


if __name__ == "__main__":
    print(text(ProtocolVectors(json.loads(FILE.read_text())).all()), end="")
