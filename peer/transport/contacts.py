"""A peer's contact: where it is reached, signed by itself. Others pass contacts on, and can't change them.

A contact is valid for an hour at most. Of two contacts of a peer, the one with the higher number is valid. It names a
few addresses of the peer's gRPC server. Addresses of another kind or an unknown form are skipped: peers behind relays
are no nodes of the DHT. So are host names, which could lead anywhere at any time.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from peer import clock
from peer.clock import CLOCK_TOLERANCE_S
from peer.errors import RecordError, WireError
from peer.identity import (
    CONTACT_DOMAIN,
    PUBLIC_KEY_BYTES,
    SIGNATURE_BYTES,
    Identity,
    PeerID,
    certificate_owner,
    pem_of,
    verify,
)
from peer.transport.addresses import known
from peer.transport.endpoints import Endpoint
from peer.wire import contact_pb2

LIFETIME_S = 3600.0
"""The longest lifetime of a contact."""
MAX_ADDRESSES = 8
MAX_CONTACT_BYTES = 2048
"""The limit for a contact, which fits the longest addresses. A usual one has 205 bytes."""
_OVERHEAD_BYTES = 16


@dataclass(frozen=True, slots=True)
class Contact:
    """A peer's addresses and certificate, checked by `UncheckedContact`."""

    peer_id: PeerID
    sequence: int
    expires_at: float
    """Unix time in seconds."""
    addresses: tuple[Endpoint, ...]
    """The addresses of its gRPC server, the best first."""
    serialized: bytes
    """The message that the peer signed."""

    @property
    def message(self) -> contact_pb2.Contact:
        """The message as the peer signed it, to be passed on."""
        return contact_pb2.Contact.FromString(self.serialized)

    @property
    def certificate_pem(self) -> bytes:
        return pem_of(contact_pb2.ContactStatement.FromString(self.message.statement).certificate)

    @classmethod
    def restore(cls, serialized: bytes) -> "Contact":
        """Restores a contact that was checked before."""
        return UncheckedContact.read(contact_pb2.Contact.FromString(serialized)).content()


@dataclass(frozen=True, slots=True)
class UncheckedContact:
    """What a contact says, before it is checked whether its peer signed it."""

    peer_id: PeerID
    statement: contact_pb2.ContactStatement
    message: contact_pb2.Contact

    @classmethod
    def read(cls, message: contact_pb2.Contact) -> "UncheckedContact":
        """Checks no signature, but reads the key that says whose contact it is. Raises WireError."""
        size = len(message.statement) + len(message.signature)
        if size > MAX_CONTACT_BYTES - _OVERHEAD_BYTES or len(message.signature) > SIGNATURE_BYTES:
            raise WireError(f"a contact has at most {MAX_CONTACT_BYTES} bytes")
        try:
            statement = contact_pb2.ContactStatement.FromString(message.statement)
            owner = certificate_owner(statement.certificate)
        except (DecodeError, RecordError) as error:
            raise WireError(f"a contact's statement can't be read: {error}") from None
        if len(statement.addresses) > MAX_ADDRESSES:
            raise WireError(f"a contact has at most {MAX_ADDRESSES} addresses")
        # built again: the peer that passed it on may have added fields
        signed = contact_pb2.Contact(statement=message.statement, signature=message.signature)
        return cls(owner, statement, signed)

    def check(self, now: float) -> Contact:
        """The contact, if its peer signed it and it is valid now. `now`: Unix time in seconds. Raises RecordError."""
        # this form also refuses NaN
        if not now < self.statement.expires_at <= now + LIFETIME_S + CLOCK_TOLERANCE_S:
            raise RecordError("the contact has expired, or is valid for more than an hour")
        content = self.content()
        key = self.statement.certificate[:PUBLIC_KEY_BYTES]
        verify(key, self.message.statement, self.message.signature, CONTACT_DOMAIN)
        return content

    def content(self) -> Contact:
        """The same contact, unchecked. Raises RecordError."""
        said = self.statement
        addresses = known(Endpoint, (address.direct for address in said.addresses), MAX_ADDRESSES)
        numeric = tuple(address for address in addresses if address.ip is not None)
        if not numeric:
            raise RecordError("the contact has no address of a known kind")
        return Contact(
            self.peer_id, said.sequence, said.expires_at, numeric, self.message.SerializeToString()
        )


class OwnContact:
    """This peer's own contact. It is signed again when its addresses change, before it expires, and if others would
    refuse it because this machine's clock was fast when it was signed.
    """

    def __init__(self, identity: Identity, certificate: bytes, now: Callable[[], float] = clock.now) -> None:
        """`certificate`: as in messages. `now`: Unix time in seconds."""
        self._identity = identity
        self._certificate = certificate
        self._now = now
        self._addresses: tuple[Endpoint, ...] = ()
        self._sequence = 0
        self._signed: contact_pb2.Contact | None = None
        self._expires_at = 0.0

    def set(self, addresses: Iterable[Endpoint]) -> None:
        """Replaces the addresses. If there are too many, the first ones are kept."""
        before, self._addresses = self._addresses, tuple(addresses)[:MAX_ADDRESSES]
        if self._addresses != before:
            self._signed = None

    def message(self) -> contact_pb2.Contact | None:
        """None while this peer has no address. It is signed once in half an hour."""
        now = self._now()
        left_s = self._expires_at - clock.earliest(now)
        if self._signed is None or not LIFETIME_S / 2 < left_s <= LIFETIME_S + CLOCK_TOLERANCE_S:
            self._signed = self._sign(now) if self._addresses else None
        return self._signed

    def _sign(self, now: float) -> contact_pb2.Contact:
        # taken from the time, so that it also grows when this peer restarts
        self._sequence = max(self._sequence + 1, int(now * 1000))
        # if this machine's clock is fast, others would refuse a contact that expires an hour later
        self._expires_at = clock.earliest(now) + LIFETIME_S
        statement = contact_pb2.ContactStatement(
            certificate=self._certificate,
            sequence=self._sequence,
            expires_at=self._expires_at,
            addresses=[contact_pb2.ContactAddress(direct=address) for address in self._addresses],
        ).SerializeToString()
        return contact_pb2.Contact(
            statement=statement, signature=self._identity.sign(statement, CONTACT_DOMAIN)
        )
