"""A receipt is valid for its trainer, its node, its swarm and its totals, and for nothing else."""

from dataclasses import astuple, replace

import pytest
from callers import numbered_identity
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from receipts import histories, works

from dht.admission import MAX_BADGE_BYTES, MAX_GRANT_BYTES, Role, SwarmAdmission, make_badge, make_token
from dht.announcements import read_node
from dht.receipts import MAX_RECEIPT_BYTES, MOST, SignedWork, Work, check_receipt, sign_receipt
from dht.records import SwarmKeys
from peer.errors import RecordError
from peer.identity import CONTACT_DOMAIN, RECORD_DOMAIN, SIGNATURE_BYTES
from peer.wire import admission_pb2, credit_pb2, records_pb2

SWARM = "sauna-QmFounder"
TRAINER, NODE, OTHER = (numbered_identity(number) for number in (1, 2, 3))
WORK = Work(100, 20, 3, 2, 1)


def signed(work: Work = WORK, all_pairs: int = 500) -> credit_pb2.SignedReceipt:
    return sign_receipt(TRAINER, SWARM, NODE.peer_id, work, all_pairs)


def forged(domain: bytes | None = None, signer: object = None, **changes: object) -> credit_pb2.SignedReceipt:
    """A receipt with any contents, signed correctly."""
    receipt = credit_pb2.Receipt.FromString(signed().receipt)
    for name, value in changes.items():
        if name == "work":
            receipt.work.CopyFrom(value)  # type: ignore[arg-type]  # the tests give messages
        else:
            setattr(receipt, name, value)
    data = receipt.SerializeToString()
    signature = (
        TRAINER.sign(data)
        if domain == RECORD_DOMAIN
        else TRAINER.sign(data, domain or b"talkoot receipt v1\0")
    )
    return credit_pb2.SignedReceipt(receipt=data, public_key=TRAINER.public_key, signature=signature)


def refused(receipt: credit_pb2.SignedReceipt, said: str) -> None:
    with pytest.raises(RecordError, match=said):
        check_receipt(receipt, SWARM, NODE.peer_id)


@given(works(MOST))
@settings(max_examples=20, deadline=None)
def test_it_says_what_was_signed(work: Work) -> None:
    found = check_receipt(signed(work, MOST), SWARM, NODE.peer_id)
    assert (found.trainer, found.work, found.all_pairs) == (TRAINER.peer_id, work, MOST)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_with_any_byte_changed_it_is_refused(data: st.DataObject) -> None:
    whole = bytearray(signed().SerializeToString())
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    try:
        changed = credit_pb2.SignedReceipt.FromString(bytes(whole))
    except DecodeError:
        return
    with pytest.raises(RecordError):
        check_receipt(changed, SWARM, NODE.peer_id)


def test_it_is_good_for_one_node_of_one_swarm() -> None:
    with pytest.raises(RecordError, match="another node"):
        check_receipt(signed(), SWARM, OTHER.peer_id)
    with pytest.raises(RecordError, match="for swarm"):
        check_receipt(signed(), "other-QmFounder", NODE.peer_id)


def test_nobody_signs_for_another_or_for_itself() -> None:
    refused(forged(trainer=OTHER.peer_id.to_bytes()), "not its trainer's")
    with pytest.raises(RecordError, match="its own work"):
        check_receipt(forged(node=TRAINER.peer_id.to_bytes()), SWARM, TRAINER.peer_id)


@pytest.mark.parametrize("domain", [RECORD_DOMAIN, CONTACT_DOMAIN])
def test_a_signature_for_another_purpose_is_none(domain: bytes) -> None:
    refused(forged(domain), "signature is wrong")


@pytest.mark.parametrize(
    "work",
    [
        Work(),
        Work(pairs=MOST + 1),
        Work(pairs=2**64 - 1),
        Work(pairs=10, updates=11),
        Work(pairs=10, checks_passed=6, checks_failed=5),
        Work(queries=MOST + 1),
        Work(updates=1, queries=9),
    ],
)
def test_totals_that_make_no_sense_are_refused(work: Work) -> None:
    refused(forged(work=work.message(), all_pairs=MOST), "don't fit together")


def test_a_node_has_no_more_than_all_nodes_have() -> None:
    refused(forged(all_pairs=WORK.pairs - 1), "don't fit together")


def test_what_is_too_large_or_no_message_is_refused_before_its_signature_is_checked() -> None:
    refused(forged(swarm_id="s" * MAX_RECEIPT_BYTES), "bytes, more than")
    refused(credit_pb2.SignedReceipt(receipt=b"\xff\xff"), "can't be parsed")
    refused(credit_pb2.SignedReceipt(), "for swarm ''")


def test_the_largest_receipt_with_the_largest_badge_is_accepted() -> None:
    badge = admission_pb2.Badge(
        grant=bytes(MAX_GRANT_BYTES), signature=bytes(SIGNATURE_BYTES), holder_signature=bytes(64)
    )
    assert badge.ByteSize() <= MAX_BADGE_BYTES
    badge.holder_signature += bytes(MAX_BADGE_BYTES - badge.ByteSize())
    swarm = f"{'s' * 32}-{'p' * 12}"
    work = Work(MOST, MOST, MOST, MOST // 2, MOST // 2)
    largest = sign_receipt(TRAINER, swarm, NODE.peer_id, work, MOST, badge)
    assert check_receipt(largest, swarm, NODE.peer_id).work == work


@given(histories())
def test_the_greater_receipt_is_the_newer_one(history: list[Work]) -> None:
    assert sorted(history) == history
    assert max(history) == history[-1]


def test_what_a_node_says_is_cut_to_what_json_can_hold() -> None:
    said = credit_pb2.SignedWork(work=Work(2**64 - 1, 5).message(), trainers=3)
    record = records_pb2.RecordPayload(
        node=records_pb2.NodeRecord(certificate=NODE.make_certificate(), signed=said)
    )
    node = read_node(record, NODE.peer_id)
    assert node is not None
    assert node.signed == SignedWork(Work(MOST, 5), 3)
    assert all(number <= MOST for number in astuple(node.signed.work))


def test_in_a_swarm_that_admits_by_token_a_trainers_token_signs() -> None:
    founder, keys = OTHER, SwarmKeys("sauna", OTHER.peer_id)
    admission = SwarmAdmission(keys)
    admission.learn(founder.public_key, "token")

    def badge(role: Role, serial: int) -> admission_pb2.Badge:
        # The badge has expired, but the work was done before.
        return make_badge(make_token(founder, keys.swarm_id, role, 1.0, serial), TRAINER.peer_id)

    assert admission.signer_of(TRAINER.peer_id, badge(Role.TRAINER, 7)) == 7
    assert admission.signer_of(TRAINER.peer_id, badge(Role.READER, 8)) == 8
    assert admission.signer_of(founder.peer_id, None) == 0
    with pytest.raises(RecordError, match="another peer's"):
        admission.signer_of(NODE.peer_id, badge(Role.TRAINER, 7))
    with pytest.raises(RecordError, match="does not allow"):
        admission.signer_of(TRAINER.peer_id, badge(Role.NODE, 9))
    with pytest.raises(RecordError, match="the badge is missing"):
        admission.signer_of(TRAINER.peer_id, None)
    admission.revoke([7])
    with pytest.raises(RecordError, match="revoked"):
        admission.signer_of(TRAINER.peer_id, badge(Role.TRAINER, 7))
    admission.learn(founder.public_key, "open")
    assert admission.signer_of(TRAINER.peer_id, None) is None


def test_of_equal_pairs_any_other_total_makes_a_receipt_newer() -> None:
    assert replace(WORK, checks_failed=2) > WORK
