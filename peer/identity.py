"""A peer's single key, of ECDSA on the curve P-256: it is the libp2p identity and the TLS key, and it signs records.

The PeerID is the hash of the public key (libp2p's peer-id rules). With a PeerID, anyone can check a key, a signature
and a certificate; no authority is needed. Every TLS library knows P-256. Its keys and signatures are short, and every
record in the DHT carries one of each.
"""

import hashlib
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self, TypeGuard

import base58
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.x509.oid import NameOID

from peer.errors import RecordError, StartError
from peer.files import write_atomically

TLS_NAME = "talkoot.peer"
"""The name in every certificate. It identifies nobody, because whole certificates are pinned."""

_NO_KEY = (ValueError, TypeError, UnsupportedAlgorithm)
"""What cryptography raises for bytes that are not a key, or are a key of another kind; TypeError if it needs a
password.
"""
_CURVE = ec.SECP256R1()
_KEY_MESSAGE = b"\x08\x03\x12"
"""How libp2p's message of an ECDSA key begins: field 1, the type, is 3; field 2, the key, follows with its length."""
_SERIAL_BYTES = 16
_LENGTHS_BYTES = 8
"""In DER, a certificate begins with the kinds and lengths of itself and of its signed part."""
_VERSION = bytes.fromhex("a00302010202")
"""Then its version follows, 3, and the serial number with its length."""
VALID_FROM: datetime = datetime(2025, 1, 1, tzinfo=UTC)
"""Certificates of peers are valid from then on. On a machine whose clock is earlier, no TLS connection is made."""
_VALID_UNTIL = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
"""RFC 5280's notation (4.1.2.5) for a certificate that never expires. It is valid as long as its key."""
_MULTIHASH = b"\x12\x20"
"""How a multihash by SHA-256 begins: its kind and its length."""
RECORD_DOMAIN = b"talkoot record v1\0"
SESSION_DOMAIN = b"talkoot session v1\0"
GRANT_DOMAIN = b"talkoot grant v1\0"
CONTACT_DOMAIN = b"talkoot contact v1\0"
RECEIPT_DOMAIN = b"talkoot receipt v1\0"
"""Prefixes of signed bytes, so that a signature for one purpose is not valid for another."""
PUBLIC_KEY_BYTES = 91
"""Of a public key in DER, with both coordinates of its point."""
_PUBLIC_KEY_HEAD = bytes.fromhex("3059301306072a8648ce3d020106082a8648ce3d03010703420004")
"""How it begins: with the curve and the form of its point. Other forms are refused, so that each key has one PeerID."""
SIGNATURE_BYTES = 64
"""Of a signature: r and s, 32 bytes each, big-endian (IEEE P1363)."""
_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
"""Of the curve's group. If s makes a signature valid, so does `_ORDER` - s. Only the smaller one is accepted, so that
nobody but the signer can turn a signature into another one.
"""
_MAX_CERTIFICATE_BYTES = 1024
"""The limit in DER. Ours have 355 bytes. Peers remember those of many others."""


class PeerID:
    """A peer's name: the multihash of its public key. This class accepts any bytes, so check those that others send."""

    __slots__ = ("_data", "_text")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._text = ""

    @classmethod
    def from_base58(cls, text: str) -> Self:
        """Raises ValueError."""
        return cls(base58.b58decode(text))

    def to_bytes(self) -> bytes:
        return self._data

    def to_base58(self) -> str:
        """The text is made at the first call, which takes 20 µs."""
        if not self._text:
            self._text = base58.b58encode(self._data).decode()
        return self._text

    def __str__(self) -> str:
        return self.to_base58()

    def __repr__(self) -> str:
        return f"PeerID({self})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PeerID) and self._data == other._data

    def __lt__(self, other: "PeerID") -> bool:
        """Sorts by base58 text."""
        return self.to_base58() < other.to_base58()

    def __hash__(self) -> int:
        return hash(self._data)


@dataclass(frozen=True)
class Identity:
    """A key pair and its PeerID."""

    key: ec.EllipticCurvePrivateKey
    path: Path
    peer_id: PeerID
    public_key: bytes
    """DER SubjectPublicKeyInfo."""

    @classmethod
    def load_or_create(cls, path: Path) -> "Identity":
        """Reads the key at `path`, in libp2p's format; creates it the first time. Raises StartError."""
        try:
            key = _read_key(path) if path.exists() else _write_new_key(path)
        except OSError as error:
            raise StartError(
                f"can't use the identity file {path}: {error.strerror}; pass another --state"
            ) from error
        except _NO_KEY as error:
            raise StartError(
                f"{path} does not contain a libp2p P-256 key: move it away to get a new identity"
            ) from error
        public_key = _public_bytes(key.public_key())
        return cls(key, path, peer_id_of(public_key), public_key)

    def sign(self, data: bytes, domain: bytes = RECORD_DOMAIN) -> bytes:
        """Signs the domain and the data with ECDSA and SHA-256."""
        r, s = utils.decode_dss_signature(self.key.sign(domain + data, ec.ECDSA(hashes.SHA256())))
        return r.to_bytes(SIGNATURE_BYTES // 2) + min(s, _ORDER - s).to_bytes(SIGNATURE_BYTES // 2)

    def private_key_pem(self) -> bytes:
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    def make_certificate(self) -> bytes:
        """A self-signed TLS certificate for this key, DER. It is always the same, because others pin it."""
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, TLS_NAME)])
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(self.key.public_key())
            .serial_number(_serial_number(self.peer_id))
            .not_valid_before(VALID_FROM)
            .not_valid_after(_VALID_UNTIL)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(TLS_NAME)]), critical=False)
        )
        signed = builder.sign(self.key, hashes.SHA256(), ecdsa_deterministic=True)
        return signed.public_bytes(serialization.Encoding.DER)


def peer_id_of(public_key: bytes) -> PeerID:
    """The PeerID of a DER SubjectPublicKeyInfo: the sha2-256 multihash of libp2p's PublicKey message."""
    return PeerID(_MULTIHASH + hashlib.sha256(key_message(public_key)).digest())


def is_peer_id(data: bytes) -> bool:
    """Whether a stranger's bytes may be a PeerID that is a hash."""
    return len(data) == 34 and data.startswith(_MULTIHASH)


def key_message(key: bytes) -> bytes:
    """libp2p's protobuf message (crypto.proto) of a P-256 key in DER, public or private, which has less than 128 bytes.
    For longer bytes, which are no such key, the result means nothing.
    """
    return _KEY_MESSAGE + bytes([len(key) % 128]) + key


def verify(public_key: bytes, data: bytes, signature: bytes, domain: bytes = RECORD_DOMAIN) -> None:
    """Raises RecordError unless `signature` is this key's signature of `data` in this domain."""
    if len(public_key) != PUBLIC_KEY_BYTES or not public_key.startswith(_PUBLIC_KEY_HEAD):
        raise RecordError("the record's key is not a P-256 key")
    try:
        key = ec.EllipticCurvePublicKey.from_encoded_point(_CURVE, public_key[len(_PUBLIC_KEY_HEAD) - 1 :])
    except ValueError as error:
        raise RecordError("the record's key is not on the curve") from error
    half = SIGNATURE_BYTES // 2
    r, s = int.from_bytes(signature[:half]), int.from_bytes(signature[half:])
    try:
        if len(signature) != SIGNATURE_BYTES or 2 * s > _ORDER:
            raise InvalidSignature
        key.verify(utils.encode_dss_signature(r, s), domain + data, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise RecordError("the record's signature is wrong") from None


def certificate_pem(certificate: bytes, peer_id: PeerID) -> bytes:
    """Converts a DER certificate to PEM, if its key is the peer's. Raises RecordError."""
    certificate_key(certificate, peer_id)
    return ssl.DER_cert_to_PEM_cert(certificate).encode()


def certificate_key(certificate: bytes, peer_id: PeerID) -> bytes:
    """The key in a DER certificate, as DER SubjectPublicKeyInfo, if it is the peer's. Raises RecordError."""
    if len(certificate) > _MAX_CERTIFICATE_BYTES:
        raise RecordError(f"the certificate has {len(certificate)} bytes, more than {_MAX_CERTIFICATE_BYTES}")
    # checked before it is parsed, because cryptography warns of serial numbers below 1, and will refuse them
    serial_number = _serial_number(peer_id)
    number = serial_number.to_bytes(serial_number.bit_length() // 8 + 1)
    head = _VERSION + bytes([len(number)]) + number
    if not serial_number or not certificate.startswith(head, _LENGTHS_BYTES):
        raise RecordError(f"the certificate is not that of peer {peer_id}")
    try:
        public_key = x509.load_der_x509_certificate(certificate).public_key()
    except (*_NO_KEY, x509.InvalidVersion) as error:
        raise RecordError("the record carries no certificate") from error
    if not _is_on_curve(public_key):
        raise RecordError("the certificate's key is not a P-256 key")
    encoded = _public_bytes(public_key)
    if peer_id_of(encoded) != peer_id:
        raise RecordError(f"the certificate is not that of peer {peer_id}")
    return encoded


def _serial_number(peer_id: PeerID) -> int:
    """Of a peer's certificate."""
    return int.from_bytes(peer_id.to_bytes()[-_SERIAL_BYTES:])


def _is_on_curve(key: object) -> TypeGuard[ec.EllipticCurvePublicKey]:
    return isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name == _CURVE.name


def _public_bytes(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Raises one of `_NO_KEY`."""
    message = path.read_bytes()
    key = message[len(_KEY_MESSAGE) + 1 :]
    if len(key) >= 128 or message != key_message(key):
        raise ValueError("not a libp2p message with a short ECDSA key")
    read = serialization.load_der_private_key(key, password=None)
    if not isinstance(read, ec.EllipticCurvePrivateKey) or read.curve.name != _CURVE.name:
        raise TypeError("a key of another kind")
    return read


def _write_new_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = ec.generate_private_key(_CURVE)
    data = key.private_bytes(
        serialization.Encoding.DER,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, key_message(data), 0o600)
    return key
