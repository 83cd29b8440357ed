"""A peer's single RSA key: it is the libp2p identity and the TLS key, and it signs records.

The PeerID is the hash of the public key (libp2p's peer-id rules for RSA). With a PeerID, anyone can check a key, a
signature and a certificate; no authority is needed.
"""

import hashlib
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import base58
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.x509.oid import NameOID

from peer.errors import RecordError, StartError
from peer.files import write_atomically

TLS_NAME = "talkoot.peer"
"""The name in every certificate. It identifies nobody, because whole certificates are pinned."""

_NO_KEY = (ValueError, TypeError, UnsupportedAlgorithm)
"""What cryptography raises for bytes that are not a key, or are a key of another kind; TypeError if it needs a
password.
"""
_RSA_MESSAGE = b"\x08\x00\x12"
"""How libp2p's message of an RSA key begins: field 1, the type, is 0; field 2, the key, follows with its length."""
_KEY_BITS = 2048
_SERIAL_BYTES = 16
VALID_FROM: datetime = datetime(2025, 1, 1, tzinfo=UTC)
"""Certificates of peers are valid from then on. On a machine whose clock is earlier, no TLS connection is made."""
_VALID_UNTIL = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
"""RFC 5280's notation (4.1.2.5) for a certificate that never expires. It is valid as long as its key."""
_MULTIHASH = b"\x12\x20"
"""How a multihash by SHA-256 begins: its kind and its length."""
_SIGNATURE_PADDING = padding.PSS(mgf=padding.MGF1(hashes.SHA256()), salt_length=padding.PSS.DIGEST_LENGTH)
RECORD_DOMAIN = b"talkoot record v1\0"
SESSION_DOMAIN = b"talkoot session v1\0"
GRANT_DOMAIN = b"talkoot grant v1\0"
CONTACT_DOMAIN = b"talkoot contact v1\0"
RECEIPT_DOMAIN = b"talkoot receipt v1\0"
"""Prefixes of signed bytes, so that a signature for one purpose is not valid for another."""
_MAX_PUBLIC_KEY_BYTES = 600
"""The limit in DER. A key of 4096 bits takes 550 bytes."""
_MAX_CERTIFICATE_BYTES = 2048
"""The limit in DER. With a key of 4096 bits, a certificate has 1,350 bytes. Peers remember those of many others."""
_EXPONENT = 65537
"""The exponent of all of libp2p's RSA keys. With a large one, verifying a signature would be as slow as signing."""


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

    key: rsa.RSAPrivateKey
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
                f"{path} does not contain a libp2p RSA key: move it away to get a new identity"
            ) from error
        public_key = _public_bytes(key.public_key())
        return cls(key, path, peer_id_of(public_key), public_key)

    def sign(self, data: bytes, domain: bytes = RECORD_DOMAIN) -> bytes:
        """Signs the domain and the data with RSA-PSS and SHA-256."""
        return self.key.sign(domain + data, _SIGNATURE_PADDING, hashes.SHA256())

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
            .serial_number(int.from_bytes(self.peer_id.to_bytes()[-_SERIAL_BYTES:], "big"))
            .not_valid_before(VALID_FROM)
            .not_valid_after(_VALID_UNTIL)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(TLS_NAME)]), critical=False)
        )
        signed = builder.sign(self.key, hashes.SHA256(), rsa_padding=padding.PKCS1v15())  # deterministic
        return signed.public_bytes(serialization.Encoding.DER)


def peer_id_of(public_key: bytes) -> PeerID:
    """The PeerID of a DER SubjectPublicKeyInfo: the sha2-256 multihash of libp2p's PublicKey message."""
    return PeerID(_MULTIHASH + hashlib.sha256(key_message(public_key)).digest())


def is_peer_id(data: bytes) -> bool:
    """Whether a stranger's bytes may be the PeerID of an RSA key."""
    return len(data) == 34 and data.startswith(_MULTIHASH)


def key_message(key: bytes) -> bytes:
    """libp2p's protobuf message (crypto.proto) of an RSA key in DER, public or private, of 128 to 16,383 bytes."""
    return _RSA_MESSAGE + bytes((len(key) % 128 | 128, len(key) // 128)) + key


def verify(public_key: bytes, data: bytes, signature: bytes, domain: bytes = RECORD_DOMAIN) -> None:
    """Raises RecordError unless `signature` is this key's signature of `data` in this domain."""
    if len(public_key) > _MAX_PUBLIC_KEY_BYTES:
        raise RecordError("the record's key is too long")
    try:
        key = serialization.load_der_public_key(public_key)
    except _NO_KEY as error:
        raise RecordError("the record carries no public key") from error
    if not isinstance(key, rsa.RSAPublicKey) or not 2048 <= key.key_size <= 4096:
        raise RecordError("the record's key is not an RSA key of 2048 to 4096 bits")
    if key.public_numbers().e != _EXPONENT:
        raise RecordError(f"the record's key does not have the exponent {_EXPONENT}")
    try:
        key.verify(signature, domain + data, _SIGNATURE_PADDING, hashes.SHA256())
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
    try:
        public_key = x509.load_der_x509_certificate(certificate).public_key()
    except (*_NO_KEY, x509.InvalidVersion) as error:
        raise RecordError("the record carries no certificate") from error
    if not isinstance(public_key, rsa.RSAPublicKey):
        raise RecordError("the certificate's key is not an RSA key")
    encoded = _public_bytes(public_key)
    if peer_id_of(encoded) != peer_id:
        raise RecordError(f"the certificate is not that of peer {peer_id}")
    return encoded


def _public_bytes(key: rsa.RSAPublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _key_in(message: bytes) -> bytes:
    """The key in a libp2p key message. Raises ValueError."""
    key = message[len(_RSA_MESSAGE) + 2 :]
    if not 128 <= len(key) < 2**14 or message != key_message(key):
        raise ValueError("not a libp2p message with an RSA key")
    return key


def _read_key(path: Path) -> rsa.RSAPrivateKey:
    """Checks that the numbers are those of an RSA key, which takes as long as making one. Raises one of `_NO_KEY`."""
    key = serialization.load_der_private_key(_key_in(path.read_bytes()), password=None)
    if not isinstance(key, rsa.RSAPrivateKey):
        raise TypeError("a key of another kind")
    return key


def _write_new_key(path: Path) -> rsa.RSAPrivateKey:
    key = rsa.generate_private_key(public_exponent=65537, key_size=_KEY_BITS)
    data = key.private_bytes(
        serialization.Encoding.DER,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, key_message(data), 0o600)
    return key
