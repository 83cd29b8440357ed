"""A peer's single key, of ECDSA on the curve P-256: it is the libp2p identity and the TLS key, and it signs records.

The PeerID is the hash of the public key (libp2p's peer-id rules). With a PeerID, anyone can check a key, a signature
and a certificate; no authority is needed. Every TLS library knows P-256. Its keys and signatures are short, and every
record in the DHT carries one of each.
"""

import hashlib
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Self

import base58
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils

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
VALID_FROM: datetime = datetime(2025, 1, 1, tzinfo=UTC)
"""Certificates of peers are valid from then on. On a machine whose clock is earlier, no TLS connection is made."""
_MULTIHASH = b"\x12\x20"
"""How a multihash by SHA-256 begins: its kind and its length."""
RECORD_DOMAIN = b"talkoot record v1\0"
SESSION_DOMAIN = b"talkoot session v1\0"
GRANT_DOMAIN = b"talkoot grant v1\0"
CONTACT_DOMAIN = b"talkoot contact v1\0"
RECEIPT_DOMAIN = b"talkoot receipt v1\0"
"""Prefixes of signed bytes, so that a signature for one purpose is not valid for another."""
PUBLIC_KEY_BYTES = 33
"""Of a public key in messages: its point, compressed (SEC 1). It has one such form, and so one PeerID."""
_DER_HEAD = bytes.fromhex("3059301306072a8648ce3d020106082a8648ce3d030107034200")
"""How a public key begins in DER: with its curve. Its point follows, with both coordinates."""
SIGNATURE_BYTES = 64
"""Of a signature: r and s, 32 bytes each, big-endian (IEEE P1363)."""
_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
"""Of the curve's group. If s makes a signature valid, so does `_ORDER` - s. Only the smaller one is accepted, so that
nobody but the signer can turn a signature into another one.
"""
CERTIFICATE_BYTES = PUBLIC_KEY_BYTES + SIGNATURE_BYTES
"""Of a certificate in messages: the key, and the certificate's signature. The rest follows from the key."""
_REMEMBERED_KEYS = 1024
"""How many public keys a process remembers, with about 2 KB each: peers that are met once are usually met again."""


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

    @property
    def short(self) -> str:
        """The end of the text, by which people tell peers apart. It is not unique."""
        return self.to_base58()[-8:]

    def with_name(self, name: str | None) -> str:
        """The name that the peer has given itself, if any, and `short`, because other peers may have the same name."""
        return f"{name} ({self.short})" if name else self.short

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
    """As in messages."""

    @classmethod
    def load_or_create(cls, path: Path) -> "Identity":
        """Reads the key at `path`, in libp2p's format; creates it the first time. Raises StartError."""
        try:
            key = _read_file(path) if path.exists() else _write_new_key(path)
        except OSError as error:
            raise StartError(
                f"can't use the identity file {path}: {error.strerror}; pass another --state"
            ) from error
        except _NO_KEY as error:
            raise StartError(
                f"{path} does not contain a libp2p P-256 key: move it away to get a new identity"
            ) from error
        public_key = _compressed(key.public_key())
        return cls(key, path, peer_id_of(public_key), public_key)

    def sign(self, data: bytes, domain: bytes = RECORD_DOMAIN) -> bytes:
        """Signs the domain and the data with ECDSA and SHA-256."""
        r, s = utils.decode_dss_signature(self.key.sign(domain + data, ec.ECDSA(hashes.SHA256())))
        return _signature_of(r, min(s, _ORDER - s))

    def private_key_pem(self) -> bytes:
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    def make_certificate(self) -> bytes:
        """A self-signed TLS certificate for this key, as in messages. It is always the same, because others pin it."""
        signed = self.key.sign(
            _to_be_signed(self.public_key), ec.ECDSA(hashes.SHA256(), deterministic_signing=True)
        )
        return self.public_key + _signature_of(*utils.decode_dss_signature(signed))


@lru_cache(_REMEMBERED_KEYS)
def _read_key(public_key: bytes) -> tuple[ec.EllipticCurvePublicKey, bytes]:
    """The key, and its DER SubjectPublicKeyInfo. Raises RecordError."""
    if len(public_key) != PUBLIC_KEY_BYTES:
        raise RecordError(f"a public key has {PUBLIC_KEY_BYTES} bytes")
    try:
        key = ec.EllipticCurvePublicKey.from_encoded_point(_CURVE, public_key)
    except ValueError as error:
        raise RecordError("the public key is not on the curve P-256") from error
    point = key.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    return key, _DER_HEAD + point


def peer_id_of(public_key: bytes) -> PeerID:
    """The PeerID of a public key: the sha2-256 multihash of libp2p's PublicKey message. Raises RecordError."""
    _, der = _read_key(public_key)
    return PeerID(_MULTIHASH + hashlib.sha256(key_message(der)).digest())


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
    key, _ = _read_key(public_key)
    r, s = _numbers_of(signature)
    try:
        if len(signature) != SIGNATURE_BYTES or 2 * s > _ORDER:
            raise InvalidSignature
        key.verify(utils.encode_dss_signature(r, s), domain + data, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise RecordError("the signature is wrong") from None


def _signature_of(r: int, s: int) -> bytes:
    return r.to_bytes(SIGNATURE_BYTES // 2) + s.to_bytes(SIGNATURE_BYTES // 2)


def _numbers_of(signature: bytes) -> tuple[int, int]:
    """r and s."""
    half = SIGNATURE_BYTES // 2
    return int.from_bytes(signature[:half]), int.from_bytes(signature[half:])


def certificate_pem(certificate: bytes, peer_id: PeerID) -> bytes:
    """A certificate in PEM, if its key is the peer's. Its own signature is not checked: TLS proves that the other side
    has the key. Raises RecordError.
    """
    if certificate_owner(certificate) != peer_id:
        raise RecordError(f"the certificate is not that of peer {peer_id}")
    return pem_of(certificate)


def certificate_owner(certificate: bytes) -> PeerID:
    """The peer to which the key in a certificate belongs. Raises RecordError."""
    if len(certificate) != CERTIFICATE_BYTES:
        raise RecordError(f"a certificate has {CERTIFICATE_BYTES} bytes")
    return peer_id_of(certificate[:PUBLIC_KEY_BYTES])


def pem_of(certificate: bytes) -> bytes:
    """A certificate in PEM. Raises RecordError."""
    return ssl.DER_cert_to_PEM_cert(_der_of(certificate)).encode()


def certificate_in(shown: bytes) -> bytes:
    """A certificate as in messages, from what a TLS server shows in DER. Raises RecordError unless it has the form that
    peers give it.
    """
    point = shown.partition(_DER_HEAD)[2][:_POINT_BYTES]
    signed = shown.rpartition(_ECDSA_WITH_SHA256)[2][_BITS_HEAD_BYTES:]
    try:
        key = ec.EllipticCurvePublicKey.from_encoded_point(_CURVE, point)
        certificate = _compressed(key) + _signature_of(*utils.decode_dss_signature(signed))
    except (ValueError, OverflowError):
        certificate = b""
    if not certificate or _der_of(certificate) != shown:
        raise RecordError("the certificate is not one of a peer")
    return certificate


def _der_of(certificate: bytes) -> bytes:
    signed, signature = _to_be_signed(certificate[:PUBLIC_KEY_BYTES]), certificate[PUBLIC_KEY_BYTES:]
    dss = utils.encode_dss_signature(*_numbers_of(signature))
    return _der(0x30, signed, _ECDSA_WITH_SHA256, _der(0x03, b"\0", dss))


def _to_be_signed(public_key: bytes) -> bytes:
    """What a certificate says besides its signature, in DER (RFC 5280, section 4.1)."""
    _, der = _read_key(public_key)
    serial = int.from_bytes(peer_id_of(public_key).to_bytes()[-_SERIAL_BYTES:])
    return _der(
        0x30,
        _VERSION_3,
        _der(0x02, serial.to_bytes(serial.bit_length() // 8 + 1)),
        _ECDSA_WITH_SHA256,
        _NAME,
        _VALIDITY,
        _NAME,
        der,
        _EXTENSIONS,
    )


def _der(kind: int, *parts: bytes) -> bytes:
    """A value of less than 64 KB in DER: its kind, its length, and its parts."""
    content = b"".join(parts)
    size = len(content)
    digits = size.to_bytes(size.bit_length() + 7 >> 3)
    length = bytes([size]) if size < 128 else bytes([128 + len(digits)]) + digits
    return bytes([kind]) + length + content


_VERSION_3 = bytes.fromhex("a003020102")
_ECDSA_WITH_SHA256 = bytes.fromhex("300a06082a8648ce3d040302")
_NAME = _der(0x30, _der(0x31, _der(0x30, bytes.fromhex("0603550403"), _der(0x0C, TLS_NAME.encode()))))
"""The common name, of the one that signs and of the one that is signed."""
_VALIDITY = _der(0x30, _der(0x17, f"{VALID_FROM:%y%m%d%H%M%SZ}".encode()), _der(0x18, b"99991231235959Z"))
"""The end is RFC 5280's for a certificate that never expires (4.1.2.5). It is valid as long as its key."""
_EXTENSIONS = _der(
    0xA3,
    _der(
        0x30,
        bytes.fromhex("30120603551d130101ff040830060101ff020100"),  # it signs no others but itself
        _der(
            0x30,
            bytes.fromhex("0603551d11"),  # its name once more, as TLS libraries want it
            _der(0x04, _der(0x30, _der(0x82, TLS_NAME.encode()))),
        ),
    ),
)
_POINT_BYTES = 65
_BITS_HEAD_BYTES = 3
"""In DER, the bits of a signature come after their kind, their length, and how many bits are unused."""


def _compressed(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint)


def _read_file(path: Path) -> ec.EllipticCurvePrivateKey:
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
