"""A contact is signed by its peer. It is refused if anybody has changed it, or if it says too much or is valid too
long.
"""

import math
from collections.abc import Sequence
from typing import Any

import pytest
from callers import numbered_identity
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from peer.errors import RecordError, WireError
from peer.identity import CONTACT_DOMAIN, RECORD_DOMAIN, certificate_pem
from peer.transport.contacts import MAX_ADDRESSES, MAX_CONTACT_BYTES, OwnContact, UncheckedContact
from peer.transport.endpoints import Endpoint
from peer.wire import contact_pb2

NOW = 1_800_000_000.0
HOUR = 3600.0
PEER, OTHER = numbered_identity(0), numbered_identity(1)
ADDRESS = Endpoint("192.0.2.7:4711")
CIRCUIT = f"/ip4/192.0.2.9/tcp/4711/p2p/{OTHER.peer_id}/p2p-circuit/p2p/{PEER.peer_id}"
CERTIFICATE = PEER.make_certificate()


def own(now: float = NOW) -> OwnContact:
    return OwnContact(PEER, CERTIFICATE, lambda: now)


def signed(identity: Any = PEER, domain: bytes = CONTACT_DOMAIN, **changes: Any) -> contact_pb2.Contact:
    said: dict[str, Any] = {
        "certificate": CERTIFICATE,
        "sequence": 1,
        "expires_at": NOW + HOUR,
        "addresses": [direct(ADDRESS)],
    }
    statement = contact_pb2.ContactStatement(**{**said, **changes}).SerializeToString()
    return contact_pb2.Contact(statement=statement, signature=identity.sign(statement, domain))


def direct(text: str) -> contact_pb2.ContactAddress:
    return contact_pb2.ContactAddress(direct=text)


def refused(message: contact_pb2.Contact, now: float = NOW) -> None:
    with pytest.raises((WireError, RecordError)):
        UncheckedContact.read(message).check(now)


def test_a_peers_own_contact_says_where_it_is() -> None:
    contact = own()
    assert contact.message() is None, "it is nowhere yet"
    contact.set([ADDRESS])
    message = contact.message()
    assert message is not None
    read = UncheckedContact.read(message).check(NOW)
    assert read.peer_id == PEER.peer_id
    assert read.addresses == (ADDRESS,)
    assert read.certificate_pem == certificate_pem(CERTIFICATE, PEER.peer_id)
    assert read.message == message
    contact.set([])
    assert contact.message() is None


def test_it_is_signed_again_when_it_changes_and_when_half_its_hour_is_over() -> None:
    now = NOW
    contact = OwnContact(PEER, CERTIFICATE, lambda: now)

    def sequence() -> int:
        message = contact.message()
        assert message is not None
        return UncheckedContact.read(message).check(now).sequence

    contact.set([ADDRESS])
    first = sequence()
    contact.set([ADDRESS])
    now += HOUR / 2 - 1
    assert sequence() == first
    now += 1
    renewed = sequence()
    contact.set([Endpoint("192.0.2.8:4711")])
    changed = sequence()
    now += 1
    contact = OwnContact(PEER, CERTIFICATE, lambda: now)
    contact.set([ADDRESS])
    assert first < renewed < changed < sequence(), "also after a restart"


def test_it_is_signed_again_if_the_clock_was_fast_when_it_was_signed() -> None:
    """As on a computer that has just started: its clock was two hours ahead, and is then set right."""
    now = NOW + 2 * HOUR
    contact = OwnContact(PEER, CERTIFICATE, lambda: now)
    contact.set([ADDRESS])
    early = contact.message()
    assert early is not None
    refused(early, NOW)
    now = NOW
    corrected = contact.message()
    assert corrected is not None
    assert (
        UncheckedContact.read(corrected).check(NOW).sequence > UncheckedContact.read(early).statement.sequence
    )


@given(st.data())
@settings(max_examples=300)
def test_an_altered_contact_is_refused(data: st.DataObject) -> None:
    message = signed()
    altered = bytearray(message.SerializeToString())
    place = data.draw(st.integers(0, len(altered) - 1))
    altered[place] ^= data.draw(st.integers(1, 255))
    try:
        read = contact_pb2.Contact.FromString(bytes(altered))
    except DecodeError:
        return
    refused(read)


@given(st.binary(max_size=200), st.binary(max_size=300))
def test_what_is_no_contact_is_refused(statement: bytes, signature: bytes) -> None:
    refused(contact_pb2.Contact(statement=statement, signature=signature))


@pytest.mark.parametrize(
    "changes",
    [
        {"expires_at": NOW},
        {"expires_at": NOW - 1},
        {"expires_at": NOW + HOUR + 4},
        {"expires_at": math.inf},
        {"expires_at": math.nan},
        {"addresses": []},
        {"addresses": [direct("192.0.2.7:4711")] * (MAX_ADDRESSES + 1)},
        {"addresses": [direct("evil.example:4711")]},
        {"addresses": [direct("192.0.2.7")]},
        {"addresses": [contact_pb2.ContactAddress()]},
        {"addresses": [contact_pb2.ContactAddress(relayed=CIRCUIT)]},
        {"certificate": b""},
        {"certificate": OTHER.make_certificate()},
        {"certificate": CERTIFICATE + b"x"},
        {"certificate": bytes(MAX_CONTACT_BYTES)},
        {"certificate": CERTIFICATE[:33] + OTHER.make_certificate()[33:], "identity": OTHER},
        {"identity": OTHER},
        {"domain": RECORD_DOMAIN},
    ],
)
def test_a_false_contact_is_refused(changes: dict[str, Any]) -> None:
    refused(signed(**changes))


def test_a_contact_that_is_too_long_is_refused_before_its_addresses_are_read() -> None:
    long = contact_pb2.ContactAddress(libp2p="x" * MAX_CONTACT_BYTES)
    refused(signed(addresses=[direct(ADDRESS), long]))
    with pytest.raises(WireError, match=f"at most {MAX_CONTACT_BYTES} bytes"):
        UncheckedContact.read(contact_pb2.Contact(signature=bytes(MAX_CONTACT_BYTES)))


def test_addresses_that_are_not_known_here_are_passed_over() -> None:
    addresses: Sequence[contact_pb2.ContactAddress] = [
        contact_pb2.ContactAddress(),
        contact_pb2.ContactAddress(libp2p=f"/ip4/192.0.2.7/tcp/31337/p2p/{PEER.peer_id}"),
        direct("evil.example:4711"),
        direct("[2001:db8::1]:4711"),
        direct(ADDRESS),
        direct(ADDRESS),
    ]
    read = UncheckedContact.read(signed(addresses=addresses)).check(NOW)
    assert read.addresses == ("[2001:db8::1]:4711", ADDRESS)


def test_what_others_add_is_not_passed_on() -> None:
    message = signed()
    padded = contact_pb2.Contact.FromString(message.SerializeToString() + b"\x7a\x64" + b"x" * 100)
    assert UncheckedContact.read(padded).check(NOW).message == message


def test_the_longest_contact_is_within_the_bound() -> None:
    contact = own()
    contact.set(Endpoint(f"[2001:db8:1111:1111:1111:1111:1111:{n}]:65535") for n in range(1000, 1020))
    message = contact.message()
    assert message is not None
    assert message.ByteSize() < MAX_CONTACT_BYTES / 2
    assert len(UncheckedContact.read(message).check(NOW).addresses) == MAX_ADDRESSES
