"""Admission by token: a badge is valid for its peer, its swarm, its role and its time, and for nothing else."""

import contextlib
import math
from pathlib import Path
from typing import Any, cast

import pytest
from google.protobuf.message import DecodeError
from grpc import StatusCode
from hypothesis import given
from hypothesis import strategies as st
from stranger import new_identity

from dht.admission import (
    EXPORT,
    MAX_REVOKED,
    OPEN_TO_MEMBERS,
    RIGHTS,
    Denylist,
    Mode,
    Role,
    SwarmAdmission,
    make_badge,
    make_token,
    read_grant,
)
from dht.invites import Invite, InviteLedger, IssuedInvite
from dht.records import RecordValidator, SwarmKeys, sign_record
from peer.errors import ExpertError, RecordError, RevokedError, SettingsError, StartError, UserError
from peer.identity import GRANT_DOMAIN, Identity
from peer.kademlia.routing import id_bytes, key_id_of
from peer.kademlia.validation import Record, pack
from peer.rpc.sessions import OPEN_TO_ALL, Admitted, Right
from peer.transport.addresses import Multiaddress
from peer.wire import admission_pb2, records_pb2, session_pb2

NOW, LATER = 1000.0, 2000.0
SERIAL = 0xABCDEF01
FORWARD, BACKWARD, FETCH = session_pb2.RIGHT_FORWARD, session_pb2.RIGHT_BACKWARD, session_pb2.RIGHT_FETCH


@pytest.fixture(scope="module")
def founder() -> Identity:
    return new_identity()


@pytest.fixture(scope="module")
def alice() -> Identity:
    return new_identity()


@pytest.fixture(scope="module")
def bob() -> Identity:
    return new_identity()


def keys_of(founder: Identity) -> SwarmKeys:
    return SwarmKeys("sauna", founder.peer_id)


def rules(founder: Identity, mode: Mode = "token", **options: Any) -> SwarmAdmission:
    admission = SwarmAdmission(keys_of(founder), **{"now": lambda: NOW, **options})
    admission.learn(founder.public_key, mode)
    return admission


def token_of(
    founder: Identity, role: Role = Role.TRAINER, expires_at: float = LATER, swarm_id: str | None = None
) -> admission_pb2.Token:
    return make_token(founder, swarm_id or keys_of(founder).swarm_id, role, expires_at, SERIAL)


def denied(admission: SwarmAdmission, caller: Identity, badge: admission_pb2.Badge | None, said: str) -> None:
    with pytest.raises(ExpertError, match=said) as caught:
        admission.admit(caller.peer_id, {FORWARD}, badge)
    assert caught.value.status is StatusCode.PERMISSION_DENIED


def test_a_token_lets_its_holder_in_until_it_expires(founder: Identity, alice: Identity) -> None:
    badge = make_badge(token_of(founder), alice.peer_id)
    assert rules(founder).admit(alice.peer_id, {FORWARD, BACKWARD}, badge) == Admitted(SERIAL, LATER)
    denied(rules(founder, now=lambda: LATER), alice, badge, "has expired")


def test_without_a_token_only_the_founder_comes_in(founder: Identity, alice: Identity) -> None:
    denied(rules(founder), alice, None, "admits by token, and there is none")
    assert rules(founder).admit(founder.peer_id, {FORWARD, FETCH}, None) == Admitted()
    assert rules(founder, "open").admit(alice.peer_id, {FORWARD, FETCH}, None) == Admitted()


@pytest.mark.parametrize("role", Role)
def test_a_token_gives_the_rights_of_its_role_and_no_others(
    founder: Identity, alice: Identity, role: Role
) -> None:
    badge = make_badge(token_of(founder, role), alice.peer_id)
    for number in session_pb2.Right.values():
        right = cast(Right, number)
        if right in RIGHTS[role] | OPEN_TO_MEMBERS:
            rules(founder).admit(alice.peer_id, {right}, badge)
        else:
            with pytest.raises(ExpertError, match=f"a {role.word}'s token does not give") as caught:
                rules(founder).admit(alice.peer_id, {right}, badge)
            assert caught.value.status is StatusCode.PERMISSION_DENIED


def test_only_the_roles_that_the_manifest_names_may_export(founder: Identity, alice: Identity) -> None:
    admission = rules(founder)
    admission.learn(founder.public_key, "token", [Role.READER])
    reader, trainer = (
        make_badge(token_of(founder, role), alice.peer_id) for role in (Role.READER, Role.TRAINER)
    )
    assert admission.admit(alice.peer_id, {EXPORT}, reader) == Admitted(SERIAL, LATER)
    with pytest.raises(ExpertError, match="a trainer's token does not give export") as caught:
        admission.admit(alice.peer_id, {EXPORT}, trainer)
    assert caught.value.status is StatusCode.PERMISSION_DENIED
    admission.learn(founder.public_key, "open")
    assert admission.admit(alice.peer_id, {EXPORT}, None) == Admitted()


def test_the_dht_is_open_to_whoever_is_not_denied(founder: Identity, alice: Identity) -> None:
    starting = SwarmAdmission(keys_of(founder))
    for admission in (rules(founder), starting):
        assert admission.admit(alice.peer_id, OPEN_TO_ALL, None) == Admitted()
    for right in (FORWARD, session_pb2.RIGHT_RELAY):
        with pytest.raises(ExpertError, match="is starting"):
            starting.admit(alice.peer_id, {right}, None)
    with pytest.raises(ExpertError, match="admits by token, and there is none"):
        rules(founder).admit(alice.peer_id, OPEN_TO_MEMBERS, None)
    denying = SwarmAdmission(keys_of(founder), Denylist(None, [alice.peer_id.to_base58()]))
    with pytest.raises(ExpertError, match="denied"):
        denying.admit(alice.peer_id, OPEN_TO_ALL, None)


def test_a_badge_that_was_seen_is_of_no_use_to_another(
    founder: Identity, alice: Identity, bob: Identity
) -> None:
    badge = make_badge(token_of(founder), alice.peer_id)
    denied(rules(founder), bob, badge, "another peer's")


def test_a_badge_with_unknown_fields_that_would_be_remembered_is_refused(
    founder: Identity, alice: Identity
) -> None:
    data = make_badge(token_of(founder), alice.peer_id).SerializeToString()
    padded = admission_pb2.Badge.FromString(data + b"\xfa\x01\x80\x10" + bytes(2048))  # field 31
    denied(rules(founder), alice, padded, "bytes, more than 672")


def test_a_token_of_another_founder_or_swarm_lets_nobody_in(
    founder: Identity, alice: Identity, bob: Identity
) -> None:
    forged = make_badge(token_of(bob, swarm_id=keys_of(founder).swarm_id), alice.peer_id)
    denied(rules(founder), alice, forged, "signature is wrong")
    foreign = make_badge(token_of(founder, swarm_id="banya-123456789012"), alice.peer_id)
    denied(rules(founder), alice, foreign, "for swarm 'banya")


@pytest.mark.parametrize(
    "changes",
    [
        {"serial": 0},
        {"key": b"short"},
        {"key": bytes(33)},
        {"expires_at": math.inf},
        {"expires_at": math.nan},
    ],
)
def test_a_grant_without_a_serial_a_key_or_an_expiry_admits_nobody(
    founder: Identity, alice: Identity, changes: dict[str, Any]
) -> None:
    """Even if the founder signed it: it could not be revoked, or would never expire."""
    token = token_of(founder)
    grant = admission_pb2.Grant.FromString(token.grant)
    for name, value in changes.items():
        setattr(grant, name, value)
    token.grant = grant.SerializeToString()
    token.signature = founder.sign(token.grant, GRANT_DOMAIN)
    denied(rules(founder), alice, make_badge(token, alice.peer_id), "lacks a serial, a key or an expiry")


def test_a_token_without_its_secret_makes_no_badge(founder: Identity, alice: Identity) -> None:
    token = token_of(founder)
    token.secret = b"lost"
    with pytest.raises(RecordError, match="has no key"):
        make_badge(token, alice.peer_id)


def test_an_owner_is_warned_once_a_day_before_a_token_expires(
    founder: Identity, alice: Identity, caplog: pytest.LogCaptureFixture
) -> None:
    now, day = [NOW], 86400.0
    admission = SwarmAdmission(keys_of(founder), now=lambda: now[0])
    admission.learn(founder.public_key, "token")
    admission.warn_of_expiry()
    token = make_token(founder, keys_of(founder).swarm_id, Role.NODE, NOW + 30 * day, SERIAL)
    admission.present(token, alice.peer_id)
    warned_after = list[float]()
    for hours in range(32 * 24):
        now[0] = NOW + hours * 3600
        admission.warn_of_expiry()
        if caplog.messages:
            warned_after.append(hours / 24)
            assert "expires in" in caplog.text
            caplog.clear()
    assert warned_after == [25, 26, 27, 28, 29]


def test_a_revoked_token_stays_revoked(founder: Identity, alice: Identity) -> None:
    admission, badge = rules(founder), make_badge(token_of(founder), alice.peer_id)
    admission.revoke([SERIAL])
    denied(admission, alice, badge, "was revoked")
    assert not admission.still_admits(alice.peer_id, SERIAL)
    admission.revoke([])  # an older list that somebody kept
    denied(admission, alice, badge, "was revoked")
    for start in range(1, 10):
        admission.revoke(range(start * MAX_REVOKED, 3 * start * MAX_REVOKED))
    assert len(admission.revoked) <= 2 * MAX_REVOKED


@given(st.integers(0, 10**6), st.integers(1, 255))
def test_no_changed_byte_of_a_badge_is_taken(
    founder: Identity, alice: Identity, position: int, change: int
) -> None:
    badge = BADGES.setdefault(alice.public_key, make_badge(token_of(founder), alice.peer_id))
    spoilt = bytearray(badge.SerializeToString())
    spoilt[position % len(spoilt)] ^= change
    with contextlib.suppress(DecodeError, ExpertError):
        parsed = admission_pb2.Badge.FromString(bytes(spoilt))
        rules(founder).admit(alice.peer_id, {FORWARD}, parsed)
        assert (parsed.grant, parsed.signature) == (badge.grant, badge.signature)


BADGES: dict[bytes, admission_pb2.Badge] = {}


# Records


def a_record(
    writer: Identity, founder: Identity, badge: admission_pb2.Badge | None, **body: Any
) -> tuple[records_pb2.RecordPayload, Record]:
    key = f"{keys_of(founder).swarm_id}.0.0"
    payload = records_pb2.RecordPayload(key=key, expires_at=NOW + 60, badge=badge, **body)
    stored = Record(
        id_bytes(key_id_of(key)),
        pack(writer.peer_id.to_bytes()),
        pack(sign_record(writer, payload)),
        payload.expires_at,
    )
    return payload, stored


ANNOUNCEMENT = {"announcement": records_pb2.Announcement(state=records_pb2.REPLICA_STATE_SERVING)}


def test_only_those_with_a_nodes_token_announce_experts(founder: Identity, alice: Identity) -> None:
    admission = rules(founder)
    validator = RecordValidator(now=lambda: NOW, rule=admission.check_record)
    for writer, badge, fits in (
        (alice, make_badge(token_of(founder, Role.NODE), alice.peer_id), True),
        (alice, make_badge(token_of(founder, Role.TRAINER), alice.peer_id), False),
        (alice, None, False),
        (founder, None, True),
    ):
        payload, stored = a_record(writer, founder, badge, **ANNOUNCEMENT)
        assert validator.validate(stored) is fits
        if fits:
            admission.check_record(payload, writer.peer_id)
        else:
            with pytest.raises(RecordError):
                admission.check_record(payload, writer.peer_id)


def test_the_founders_list_of_revoked_tokens_counts_as_soon_as_it_is_stored_here(
    founder: Identity, alice: Identity
) -> None:
    admission = rules(founder)
    badge = make_badge(token_of(founder, Role.NODE), alice.peer_id)
    serial = read_grant(badge.grant).serial
    payload, _ = a_record(alice, founder, badge, **ANNOUNCEMENT)
    for writer, counts in ((alice, False), (founder, True)):
        listed, _ = a_record(writer, founder, None, revocations=admission_pb2.Revocations(serials=[serial]))
        with contextlib.suppress(RecordError):
            admission.check_record(listed, writer.peer_id)
        assert (serial in admission.revoked) is counts
    with pytest.raises(RevokedError):
        admission.check_record(payload, alice.peer_id)
    older, _ = a_record(
        founder, founder, None, revocations=admission_pb2.Revocations(serials=range(1, 2 * MAX_REVOKED + 1))
    )
    admission.check_record(older, founder.peer_id)
    assert serial in admission.revoked, "a list that others store again takes nothing back"


def test_before_the_manifest_is_known_every_record_is_taken(founder: Identity, alice: Identity) -> None:
    admission = SwarmAdmission(keys_of(founder), now=lambda: NOW)
    payload, _ = a_record(alice, founder, None, **ANNOUNCEMENT)
    admission.check_record(payload, alice.peer_id)
    admission.learn(founder.public_key, "token")
    with pytest.raises(RecordError):
        admission.check_record(payload, alice.peer_id)


def test_another_swarms_records_are_not_ruled_over(founder: Identity, alice: Identity) -> None:
    payload, _ = a_record(alice, founder, None, **ANNOUNCEMENT)
    payload.key = f"{SwarmKeys('other', founder.peer_id).swarm_id}.0.0"
    rules(founder).check_record(payload, alice.peer_id)


def test_a_denied_peers_records_and_calls_are_not_taken(founder: Identity, alice: Identity) -> None:
    admission = rules(founder, "open", denylist=Denylist(denied=[alice.peer_id.to_base58()]))
    denied(admission, alice, None, "denied you")
    with pytest.raises(RecordError, match="denied"):
        admission.check_record(a_record(alice, founder, None, **ANNOUNCEMENT)[0], alice.peer_id)


def test_long_lives_are_for_manifests_and_revocations_under_their_own_keys(founder: Identity) -> None:
    validator, keys = RecordValidator(now=lambda: NOW), keys_of(founder)
    revocations = admission_pb2.Revocations(serials=[1])
    for key, fits in ((keys.revocations, True), (f"{keys.swarm_id}.0.0", False)):
        payload = records_pb2.RecordPayload(key=key, expires_at=NOW + 86400, revocations=revocations)
        stored = Record(
            id_bytes(key_id_of(key)),
            pack(founder.peer_id.to_bytes()),
            pack(sign_record(founder, payload)),
            payload.expires_at,
        )
        assert validator.validate(stored) is fits


# Invites, the founder's list, and the denylist


def test_an_invite_carries_a_token_and_does_not_show_it_by_chance(founder: Identity) -> None:
    token = token_of(founder).SerializeToString()
    address = f"/ip4/192.0.2.7/tcp/31337/p2p/{founder.peer_id.to_base58()}"
    invite = Invite(keys_of(founder), (Multiaddress(address),), token)
    assert Invite.parse(str(invite)) == invite
    assert len(str(invite)) < 1024
    assert "token" not in repr(invite)
    assert Invite.parse(str(Invite(keys_of(founder), (Multiaddress(address),)))).token == b""


def issued(serial: int, expires_at: float = LATER) -> IssuedInvite:
    return IssuedInvite(serial=serial, role=Role.NODE, name="bob", made_at=NOW, expires_at=expires_at)


def test_the_list_knows_what_was_made_and_what_is_revoked(tmp_path: Path) -> None:
    ledger = InviteLedger(tmp_path)
    assert ledger.read() == ()
    ledger.add(issued(1))
    ledger.add(issued(2))
    assert ledger.revoke("00000002", NOW).revoked
    assert InviteLedger(tmp_path).revoked(NOW) == [2]
    assert ledger.revoked(LATER) == []  # expired by itself
    assert (ledger.expired(NOW), ledger.expired(LATER)) == ([], [1, 2])
    with pytest.raises(UserError, match="--list"):
        ledger.revoke("00000003", NOW)
    (tmp_path / "invites.json").write_text("{")
    with pytest.raises(StartError, match="restore it"):
        ledger.read()


def test_the_mark_that_windows_puts_before_a_text_spares_nobody(tmp_path: Path, alice: Identity) -> None:
    path = tmp_path / "denylist"
    path.write_text(f"{alice.peer_id}\r\n", encoding="utf-8-sig")
    denylist = Denylist(path)
    denylist.reread()
    assert alice.peer_id in denylist


def test_the_denylist_is_read_again_when_it_changes(tmp_path: Path, alice: Identity, bob: Identity) -> None:
    path = tmp_path / "denylist"
    denylist = Denylist(path, [bob.peer_id.to_base58()])
    assert (alice.peer_id in denylist, bob.peer_id in denylist) == (False, True)
    denylist.reread()
    assert len(denylist) == 1
    path.write_text(f"# a heading\n\nnonsense\n{alice.peer_id.to_base58()}  # sends noise\n")
    denylist.reread()
    assert alice.peer_id in denylist
    assert len(denylist) == 2
    path.unlink()
    denylist.reread()
    assert alice.peer_id not in denylist
    with pytest.raises(SettingsError, match=r"^deny: 'Qm' is not a PeerID"):
        Denylist(None, ["Qm"])
