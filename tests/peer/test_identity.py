"""A peer's key: what is derived from it, and what is refused."""

import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hivemind.p2p import PeerID as P2PPeerID
from hivemind.proto import crypto_pb2
from hypothesis import given
from hypothesis import strategies as st

from peer.errors import RecordError, StartError
from peer.identity import TLS_NAME, Identity, PeerID, certificate_pem, key_message, peer_id_of, verify


def test_peer_id_is_the_one_that_hivemind_reads_from_the_file(identity: Identity) -> None:
    assert identity.peer_id.to_bytes() == P2PPeerID.from_identity(identity.path.read_bytes()).to_bytes()
    assert peer_id_of(identity.public_key) == identity.peer_id


@given(st.binary(max_size=60), st.binary(max_size=60))
def test_names_are_written_compared_and_ordered_as_hivemind_does(one: bytes, other: bytes) -> None:
    ours, theirs = (PeerID(one), PeerID(other)), (P2PPeerID(one), P2PPeerID(other))
    assert [str(name) for name in ours] == [str(name) for name in theirs]
    assert (ours[0] == ours[1]) == (theirs[0] == theirs[1])
    assert (ours[0] < ours[1]) == (theirs[0] < theirs[1])
    assert PeerID.from_base58(str(ours[0])) == ours[0]
    assert {ours[0], PeerID(one)} == {ours[0]}
    assert ours[0] != one


@given(st.binary(min_size=128, max_size=3000))
def test_the_message_of_a_key_is_libp2ps(key: bytes) -> None:
    for message in (crypto_pb2.PrivateKey, crypto_pb2.PublicKey):
        assert key_message(key) == message(key_type=crypto_pb2.RSA, data=key).SerializeToString()


def test_a_second_start_loads_the_same_key(identity: Identity) -> None:
    before = identity.path.read_bytes()
    again = Identity.load_or_create(identity.path)
    assert again.peer_id == identity.peer_id
    assert again.public_key == identity.public_key
    assert identity.path.read_bytes() == before


def test_two_peers_have_two_keys(identity: Identity, other: Identity) -> None:
    assert identity.peer_id != other.peer_id


def test_only_the_owner_can_read_the_key_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "down" / "peer.key"
    Identity.load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_a_key_half_written_before_a_crash_does_not_hinder(tmp_path: Path) -> None:
    (tmp_path / ".peer.key.new").write_bytes(b"half a k")
    identity = Identity.load_or_create(tmp_path / "peer.key")
    assert Identity.load_or_create(tmp_path / "peer.key").peer_id == identity.peer_id
    assert not (tmp_path / ".peer.key.new").exists()


def other_curve() -> bytes:
    data = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return bytes(crypto_pb2.PrivateKey(key_type=crypto_pb2.RSA, data=data).SerializeToString())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a key",
        b"\x08\x00\x12\x04abcd",
        b"-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----\n",
        other_curve(),
    ],
    ids=["empty", "text", "wrong key", "pem", "elliptic curve"],
)
def test_a_broken_file_is_named_with_a_remedy_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "peer.key"
    path.write_bytes(content)
    with pytest.raises(StartError, match="move it away to get a new identity") as caught:
        Identity.load_or_create(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == content


def test_a_truncated_key_is_refused(identity: Identity, tmp_path: Path) -> None:
    path = tmp_path / "peer.key"
    path.write_bytes(identity.path.read_bytes()[:-1])
    with pytest.raises(StartError, match="move it away"):
        Identity.load_or_create(path)


def test_a_path_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path, tmp_path / "file" / "peer.key"):
        with pytest.raises(StartError, match="can't use the identity file"):
            Identity.load_or_create(path)


@given(st.binary(max_size=100))
def test_a_signature_holds_for_its_data(identity: Identity, data: bytes) -> None:
    verify(identity.public_key, data, identity.sign(data))


@given(st.binary(max_size=40), st.binary(max_size=40))
def test_a_signature_does_not_hold_for_other_data(identity: Identity, data: bytes, changed: bytes) -> None:
    if data == changed:
        changed += b"\0"
    with pytest.raises(RecordError, match="signature is wrong"):
        verify(identity.public_key, changed, identity.sign(data))


def test_a_signature_does_not_hold_for_another_key(identity: Identity, other: Identity) -> None:
    with pytest.raises(RecordError, match="signature is wrong"):
        verify(other.public_key, b"data", identity.sign(b"data"))


@given(bit=st.integers(0, 256 * 8 - 1))
def test_a_changed_signature_is_refused(identity: Identity, bit: int) -> None:
    signature = bytearray(identity.sign(b"data"))
    signature[bit // 8] ^= 1 << bit % 8
    with pytest.raises(RecordError):
        verify(identity.public_key, b"data", bytes(signature))


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_garbage_instead_of_a_signature_or_key_raises_only_record_error(
    identity: Identity, garbage: bytes, signature: bytes
) -> None:
    with pytest.raises(RecordError):
        verify(identity.public_key, b"data", signature)
    with pytest.raises(RecordError):
        verify(garbage, b"data", signature)


def public_der(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def test_keys_that_are_too_weak_or_not_rsa_are_refused() -> None:
    for key in (rsa.generate_private_key(65537, 1024), ec.generate_private_key(ec.SECP256R1())):
        with pytest.raises(RecordError, match="not an RSA key of 2048 to 4096 bits"):
            verify(public_der(key), b"data", b"signature")


def test_the_certificate_belongs_to_the_key(identity: Identity) -> None:
    certificate = identity.make_certificate()
    pem = certificate_pem(certificate, identity.peer_id)
    parsed = x509.load_pem_x509_certificate(pem)
    assert parsed.public_bytes(serialization.Encoding.DER) == certificate
    assert parsed.public_key() == identity.key.public_key()
    names = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [TLS_NAME]
    assert len(certificate) < 1024, "the node record has room for a small certificate only"


def test_a_restart_makes_the_same_certificate_for_others_have_pinned_it(
    identity: Identity, other: Identity
) -> None:
    certificate = identity.make_certificate()
    assert Identity.load_or_create(identity.path).make_certificate() == certificate
    serials = {
        x509.load_der_x509_certificate(each.make_certificate()).serial_number for each in (identity, other)
    }
    assert len(serials) == 2


def test_the_private_key_is_that_of_the_certificate(identity: Identity) -> None:
    key = serialization.load_pem_private_key(identity.private_key_pem(), None)
    assert key.public_key() == identity.key.public_key()


def test_the_certificate_of_another_peer_is_refused(identity: Identity, other: Identity) -> None:
    with pytest.raises(RecordError, match="not that of peer"):
        certificate_pem(other.make_certificate(), identity.peer_id)


def test_a_certificate_with_padding_that_all_peers_would_remember_is_refused(identity: Identity) -> None:
    padding = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), bytes(2048))
    padded = (
        x509.CertificateBuilder(x509.Name([]), x509.Name([]), identity.key.public_key(), 1)
        .not_valid_before(datetime(2025, 1, 1, tzinfo=UTC))
        .not_valid_after(datetime(2099, 1, 1, tzinfo=UTC))
        .add_extension(padding, critical=False)
        .sign(identity.key, hashes.SHA256())
    )
    with pytest.raises(RecordError, match="bytes, more than 2048"):
        certificate_pem(padded.public_bytes(serialization.Encoding.DER), identity.peer_id)


@given(st.binary(max_size=200))
def test_bytes_that_are_no_certificate_are_refused(identity: Identity, garbage: bytes) -> None:
    with pytest.raises(RecordError):
        certificate_pem(garbage, identity.peer_id)


@given(position=st.integers(0, 10**6), change=st.integers(1, 255))
def test_a_changed_certificate_raises_nothing_but_record_error(
    identity: Identity, position: int, change: int
) -> None:
    certificate = bytearray(identity.make_certificate())
    certificate[position % len(certificate)] ^= change
    try:
        pem = certificate_pem(bytes(certificate), identity.peer_id)
    except RecordError:
        return
    # A change outside the key: the pinned certificate still has this peer's key.
    assert x509.load_pem_x509_certificate(pem).public_key() == identity.key.public_key()


@given(position=st.integers(0, 60), change=st.integers(1, 255))
def test_a_changed_key_raises_nothing_but_record_error(
    identity: Identity, position: int, change: int
) -> None:
    key = bytearray(identity.public_key)
    key[position] ^= change
    with pytest.raises(RecordError):
        verify(bytes(key), b"data", identity.sign(b"data"))
