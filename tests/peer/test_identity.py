"""A peer's key: what is derived from it, and what is refused."""

import contextlib
import hashlib
import ssl
import stat
import subprocess
from datetime import UTC, datetime
from functools import partial
from importlib.resources import files
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa, utils
from cryptography.x509.oid import NameOID
from hivemind.p2p import PeerID as P2PPeerID
from hivemind.proto import crypto_pb2
from hypothesis import given
from hypothesis import strategies as st

from peer.errors import RecordError, StartError
from peer.identity import (
    CERTIFICATE_BYTES,
    RECORD_DOMAIN,
    SIGNATURE_BYTES,
    TLS_NAME,
    VALID_FROM,
    Identity,
    PeerID,
    certificate_in,
    certificate_owner,
    certificate_pem,
    is_peer_id,
    key_message,
    peer_id_of,
    pem_of,
    verify,
)

FIELD = 2**256 - 2**224 + 2**192 + 2**96 - 1
"""FIPS 186-4, appendix D.1.2.3"""
P2PD = str(files("hivemind") / "hivemind_cli" / "p2pd")


def test_peer_id_is_the_hash_of_libp2ps_message(identity: Identity) -> None:
    message = crypto_pb2.PublicKey(
        key_type=crypto_pb2.ECDSA, data=public_der(identity.key)
    ).SerializeToString()
    assert identity.peer_id.to_bytes() == b"\x12\x20" + hashlib.sha256(message).digest()
    assert peer_id_of(identity.public_key) == identity.peer_id


def test_p2pd_takes_the_key_and_has_the_same_peer_id(identity: Identity, tmp_path: Path) -> None:
    command = [P2PD, "-id", str(identity.path), "-listen", f"/unix{tmp_path}/socket"]
    with subprocess.Popen(
        [*command, "-hostAddrs", "/ip4/127.0.0.1/tcp/0"], stdout=subprocess.PIPE, text=True
    ) as p2pd:
        assert p2pd.stdout is not None
        said = next(line for line in p2pd.stdout if line.startswith("Peer ID"))
        p2pd.kill()
    assert said.split()[-1] == str(identity.peer_id)


@given(st.binary(max_size=60), st.binary(max_size=60))
def test_names_are_written_compared_and_ordered_as_hivemind_does(one: bytes, other: bytes) -> None:
    ours, theirs = (PeerID(one), PeerID(other)), (P2PPeerID(one), P2PPeerID(other))
    assert [str(name) for name in ours] == [str(name) for name in theirs]
    assert (ours[0] == ours[1]) == (theirs[0] == theirs[1])
    assert (ours[0] < ours[1]) == (theirs[0] < theirs[1])
    assert PeerID.from_base58(str(ours[0])) == ours[0]
    assert {ours[0], PeerID(one)} == {ours[0]}
    assert ours[0] != one


@given(st.binary(max_size=127))
def test_the_message_of_a_key_is_libp2ps(key: bytes) -> None:
    for message in (crypto_pb2.PrivateKey, crypto_pb2.PublicKey):
        assert key_message(key) == message(key_type=crypto_pb2.ECDSA, data=key).SerializeToString()


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


def key_file(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    data = key.private_bytes(
        serialization.Encoding.DER,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )
    kind = crypto_pb2.RSA if isinstance(key, rsa.RSAPrivateKey) else crypto_pb2.ECDSA
    return bytes(crypto_pb2.PrivateKey(key_type=kind, data=data).SerializeToString())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a key",
        b"\x08\x03\x12\x04abcd",
        b"-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----\n",
        key_file(rsa.generate_private_key(65537, 2048)),
        key_file(ec.generate_private_key(ec.SECP224R1())),
        key_file(ec.generate_private_key(ec.SECP256K1())),
    ],
    ids=["empty", "text", "wrong key", "pem", "of version 0.1", "a short curve", "another curve"],
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


@given(bit=st.integers(0, 64 * 8 - 1))
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


def public_der(
    key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey,
    encoding: serialization.Encoding = serialization.Encoding.DER,
) -> bytes:
    return key.public_key().public_bytes(encoding, serialization.PublicFormat.SubjectPublicKeyInfo)


def test_keys_of_another_kind_are_refused() -> None:
    points = [
        ec.generate_private_key(curve)
        .public_key()
        .public_bytes(serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint)
        for curve in (ec.SECP256K1(), ec.SECP384R1(), ec.SECP224R1())
    ]
    for key in (public_der(rsa.generate_private_key(65537, 2048)), *points):
        with pytest.raises(RecordError, match=r"has 33 bytes|not on the curve|signature is wrong"):
            verify(key, b"data", bytes(SIGNATURE_BYTES))


def test_another_form_of_a_key_is_refused_for_its_peer_would_have_a_second_name(identity: Identity) -> None:
    """SEC 1, section 2.3.3: a point may be written in full, and libraries know a hybrid form too."""
    der = public_der(identity.key)
    point = der[-65:]
    assert identity.public_key == bytes([2 + point[-1] % 2]) + point[1:33]
    hybrid = bytes([6 + point[-1] % 2]) + point[1:]
    for other in (
        der,
        point,
        hybrid,
        hybrid[:33],
        point[:33],
        b"\0" + point[1:33],
        b"\0" + identity.public_key,
    ):
        with pytest.raises(RecordError, match=r"has 33 bytes|not on the curve"):
            verify(other, b"data", identity.sign(b"data"))
        with pytest.raises(RecordError, match=r"has 33 bytes|not on the curve"):
            peer_id_of(other)


@pytest.mark.parametrize("x", [FIELD, FIELD + 5, 2**256 - 1])
def test_a_coordinate_beyond_the_field_is_refused_for_it_would_be_a_second_form(x: int) -> None:
    assert peer_id_of(b"\2" + (5).to_bytes(32)), "a point of the curve"
    with pytest.raises(RecordError, match="not on the curve"):
        peer_id_of(b"\2" + x.to_bytes(32))


def test_a_point_that_is_not_on_the_curve_is_refused() -> None:
    on_curve = [_is_on_curve(x) for x in range(64)]
    assert 16 < sum(on_curve) < 48, "half of all numbers"


def _is_on_curve(x: int) -> bool:
    try:
        peer_id_of(b"\3" + x.to_bytes(32))
    except RecordError:
        return False
    return True


def test_nobody_else_can_turn_a_signature_into_another_one(identity: Identity) -> None:
    order = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # FIPS 186-4, appendix D.1.2.3
    for number in range(8):
        data = bytes([number])
        signature = identity.sign(data)
        verify(identity.public_key, data, signature)
        other = signature[:32] + (order - int.from_bytes(signature[32:])).to_bytes(32)
        identity.key.public_key().verify(
            utils.encode_dss_signature(int.from_bytes(other[:32]), int.from_bytes(other[32:])),
            RECORD_DOMAIN + data,
            ec.ECDSA(hashes.SHA256()),
        )
        with pytest.raises(RecordError, match="signature is wrong"):
            verify(identity.public_key, data, other)


@pytest.mark.parametrize("size", [0, 63, 65, 72])
def test_a_signature_of_another_size_is_refused(identity: Identity, size: int) -> None:
    with pytest.raises(RecordError, match="signature is wrong"):
        verify(identity.public_key, b"data", (identity.sign(b"data") * 2)[:size])


@given(st.sampled_from([0, 1, 2**256 - 1]), st.sampled_from([0, 1, 2**256 - 1]))
def test_extreme_numbers_are_no_signature(identity: Identity, r: int, s: int) -> None:
    with pytest.raises(RecordError, match="signature is wrong"):
        verify(identity.public_key, b"data", r.to_bytes(32) + s.to_bytes(32))


@given(st.binary(max_size=70_000) | st.binary(min_size=33, max_size=33))
def test_any_bytes_have_a_name_or_are_no_key(data: bytes) -> None:
    with contextlib.suppress(RecordError):
        assert is_peer_id(peer_id_of(data).to_bytes())


def test_a_certificate_is_of_x509_and_follows_from_the_key_and_a_signature(
    identity: Identity, other: Identity
) -> None:
    """cryptography makes the same one, apart from the signature."""
    for each in (identity, other):
        certificate = each.make_certificate()
        pem = certificate_pem(certificate, each.peer_id)
        parsed = x509.load_pem_x509_certificate(pem)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, TLS_NAME)])
        expected = (
            x509.CertificateBuilder(name, name, each.key.public_key())
            .serial_number(int.from_bytes(each.peer_id.to_bytes()[-16:]))
            .not_valid_before(VALID_FROM)
            .not_valid_after(datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(TLS_NAME)]), critical=False)
            .sign(each.key, hashes.SHA256())
        )
        assert parsed.tbs_certificate_bytes == expected.tbs_certificate_bytes
        parsed.verify_directly_issued_by(parsed)
        assert len(certificate) == CERTIFICATE_BYTES
        assert certificate_owner(certificate) == each.peer_id
        assert certificate_in(shown(certificate)) == certificate


def shown(certificate: bytes) -> bytes:
    """As a TLS server shows it, in DER."""
    return ssl.PEM_cert_to_DER_cert(pem_of(certificate).decode())


def test_a_restart_makes_the_same_certificate_for_others_have_pinned_it(
    identity: Identity, other: Identity
) -> None:
    certificate = identity.make_certificate()
    assert (
        Identity.load_or_create(identity.path).make_certificate() == certificate != other.make_certificate()
    )


def test_the_private_key_is_that_of_the_certificate(identity: Identity) -> None:
    key = serialization.load_pem_private_key(identity.private_key_pem(), None)
    assert key.public_key() == identity.key.public_key()


def test_the_certificate_of_another_peer_is_refused(identity: Identity, other: Identity) -> None:
    with pytest.raises(RecordError, match="not that of peer"):
        certificate_pem(other.make_certificate(), identity.peer_id)


@given(st.binary(max_size=200) | st.binary(min_size=97, max_size=97))
def test_bytes_that_are_no_certificate_are_refused(identity: Identity, garbage: bytes) -> None:
    for parse in (partial(certificate_pem, peer_id=identity.peer_id), certificate_in):
        with pytest.raises(RecordError):
            parse(garbage)


@given(position=st.integers(0, 96), change=st.integers(1, 255))
def test_a_changed_certificate_is_refused_or_has_the_same_key_and_another_signature(
    identity: Identity, position: int, change: int
) -> None:
    certificate = bytearray(identity.make_certificate())
    certificate[position] ^= change
    try:
        pem = certificate_pem(bytes(certificate), identity.peer_id)
    except RecordError:
        assert position < 33
        return
    assert position >= 33
    assert x509.load_pem_x509_certificate(pem).public_key() == identity.key.public_key()


@given(position=st.integers(0, 10**6), change=st.integers(1, 255))
def test_what_a_server_shows_is_refused_if_it_is_not_exactly_what_its_peer_would_have_made(
    identity: Identity, position: int, change: int
) -> None:
    """A certificate may have anything in it, and every peer that pins it would have to keep it."""
    certificate = bytearray(shown(identity.make_certificate()))
    certificate[position % len(certificate)] ^= change
    try:
        read = certificate_in(bytes(certificate))
    except RecordError:
        return
    assert shown(read) == certificate


def test_a_certificate_of_another_form_is_refused(identity: Identity) -> None:
    padding = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), bytes(2048))
    padded = (
        x509.CertificateBuilder(x509.Name([]), x509.Name([]), identity.key.public_key(), 1)
        .not_valid_before(datetime(2025, 1, 1, tzinfo=UTC))
        .not_valid_after(datetime(2099, 1, 1, tzinfo=UTC))
        .add_extension(padding, critical=False)
        .sign(identity.key, hashes.SHA256())
    )
    plain = shown(identity.make_certificate())
    huge = plain.rpartition(bytes.fromhex("300a06082a8648ce3d040302"))[0]
    huge += bytes.fromhex("300a06082a8648ce3d040302") + b"\3\x4c\0"
    huge += utils.encode_dss_signature(2**270, 2**270)
    for other in (padded.public_bytes(serialization.Encoding.DER), plain + b"\0", b"\0" + plain, huge, b""):
        with pytest.raises(RecordError, match="not one of a peer"):
            certificate_in(other)


@given(position=st.integers(0, 32), change=st.integers(1, 255))
def test_a_changed_key_raises_nothing_but_record_error(
    identity: Identity, position: int, change: int
) -> None:
    key = bytearray(identity.public_key)
    key[position] ^= change
    with pytest.raises(RecordError):
        verify(bytes(key), b"data", identity.sign(b"data"))
