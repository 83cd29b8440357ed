"""Where the nodes of the DHT are reached: the newest known contact of each, within bounds. Keys cost nothing, so
anybody can make contacts of peers that do not exist. So there are separate limits for contacts of peers that this one
has reached, and for those it only heard of. If there are too many, the neighbourhood with the most loses one: it is
probably somebody who runs many peers on few machines. A peer's neighbourhood is where it was reached or called from,
whatever else its contact names.
"""

from array import array
from bisect import bisect_left
from collections import Counter as Multiset
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from prometheus_client import CollectorRegistry, Counter

from peer import clock
from peer.bounded import BoundedDict
from peer.errors import WireError
from peer.identity import PeerID
from peer.kademlia.routing import PLACE_BITS, first_bits, node_id_of
from peer.metrics import start_at_zero
from peer.parsing import ParseGuard
from peer.transport.addresses import Multiaddress
from peer.transport.contacts import LIFETIME_S, Contact, UncheckedContact
from peer.transport.endpoints import AddressScope, Endpoint, neighbourhood, scope_of
from peer.wire import contact_pb2

MOST_KNOWN = 256
"""The most peers that a request may name as known."""
_MOST_GIVEN = 256
KNOWN_OF_KEY = 32
"""The most peers that are named as known near each key: somewhat more than an answer names."""
_OLD_S = LIFETIME_S / 4
"""A contact that expires within this time is asked for again. Its peer has already published a newer one."""


@dataclass(slots=True)
class _Known:
    """A contact that has been checked. It is kept serialized: the parsed form would take 800 bytes more, and there may
    be thousands.
    """

    peer_id: PeerID
    serialized: bytes
    sequence: int
    expires_at: float
    near: str
    """The neighbourhood where the peer was reached, or else that of its first address."""
    at: Endpoint | None = None
    """Where the peer was reached."""

    @classmethod
    def of(cls, contact: Contact) -> "_Known":
        near = _near(contact.addresses[0])
        return cls(contact.peer_id, contact.serialized, contact.sequence, contact.expires_at, near)


class ContactBook:
    """The contacts that one process knows. It parses and verifies each contact only once."""

    def __init__(
        self,
        metrics: CollectorRegistry | None = None,
        now: Callable[[], float] = clock.now,
        limit: int = 2048,
        guard: ParseGuard | None = None,
    ) -> None:
        """`now`: Unix time in seconds. `limit`: the most contacts; half of them are for peers that were reached.

        `guard`: the process's.
        """
        self._guard = guard or ParseGuard()
        refused = Counter(
            "talkoot_contacts_refused",
            "Contacts of other peers that were malformed, or had expired or were not signed by their peer.",
            ["reason"],
            registry=metrics,
        )
        self.refused: Counter = start_at_zero(refused, "malformed", "invalid")
        self._now = now
        self._most_reached = limit // 2
        self._heard = BoundedDict[PeerID, _Known](limit - limit // 2)
        self._reached: dict[PeerID, _Known] = {}
        """The peer that was reached longest ago comes first."""
        self._origins = BoundedDict[PeerID, str](limit)
        """The neighbourhood from which each peer called last."""
        self._given = BoundedDict[PeerID, tuple[Endpoint, ...]](_MOST_GIVEN)
        self._places = PlaceIndex()

    def __len__(self) -> int:
        return len(self._reached) + len(self._heard)

    def learn(self, message: contact_pb2.Contact, whose: Container[PeerID]) -> PeerID | None:
        """Learns a contact and returns its peer; None if it is refused, or older than the known one. Checks the
        signature last.

        `whose`: the only peers whose contacts are accepted.
        """
        try:
            said = UncheckedContact.read(message)
        except WireError:
            self.refused.labels("malformed").inc()
            return None
        if said.peer_id not in whose:
            self.refused.labels("malformed").inc()
            return None
        known, now = self._find(said.peer_id), self._now()
        if known is not None and known.sequence >= said.statement.sequence:
            return said.peer_id if known.sequence == said.statement.sequence else None
        contact = self._guard.read("dht", said.peer_id, partial(said.check, now))
        if contact is None:
            self.refused.labels("invalid").inc()
            return None
        if known is not None and known.at in contact.addresses:
            self._file(_Known.of(contact), known.at)
        else:  # not passed on until the peer was reached there, too
            if known is not None:
                self._forget(contact.peer_id)
            self._places.add(contact.peer_id)
            for gone in self._heard.put(contact.peer_id, _Known.of(contact)):
                self._places.remove(gone.peer_id)
        return contact.peer_id

    def note(self, address: Multiaddress) -> None:
        """Adds an address that the owner gave, in an invite or from disk. It needs no signature and does not expire.

        Relayed addresses are skipped: nodes of the DHT are reached directly.
        """
        if not address.is_relayed:
            given = (address.endpoint, *self._given.get(address.peer_id, ()))
            self._given[address.peer_id] = tuple(dict.fromkeys(given))[:8]

    def given(self, peer_id: PeerID) -> tuple[Endpoint, ...]:
        """The addresses that the owner gave for this peer."""
        return self._given.get(peer_id, ())

    def get(self, peer_id: PeerID) -> Contact | None:
        """The peer's contact, with the addresses that the owner gave after its own."""
        if (known := self._find(peer_id)) is None:
            return None
        contact, given = Contact.restore(known.serialized), self._given.get(peer_id, ())
        return replace(contact, addresses=tuple(dict.fromkeys((*contact.addresses, *given))))

    def certificate_of(self, peer_id: PeerID) -> bytes | None:
        """PEM."""
        contact = self.get(peer_id)
        return None if contact is None else contact.certificate_pem

    def message(self, peer_id: PeerID) -> contact_pb2.Contact | None:
        """The contact, to be passed on. None if the peer was never reached: its contact may be worthless."""
        known = self._find(peer_id)
        return None if known is None or known.at is None else contact_pb2.Contact.FromString(known.serialized)

    def reaches(self, peer_id: PeerID) -> bool:
        """Whether the peer can be called."""
        return peer_id in self._given or self._find(peer_id) is not None

    def called(self, peer_id: PeerID, near: str) -> None:
        """Records that the peer has called from this neighbourhood."""
        self._origins[peer_id] = near

    def neighbourhood_of(self, peer_id: PeerID) -> str:
        """The neighbourhood where the peer was reached, or else that of its contact's first address.

        Empty if the peer is on this machine or unknown.
        """
        known = self._reached.get(peer_id) or self._heard.get(peer_id)
        return "" if known is None else known.near

    def origin_of(self, peer_id: PeerID) -> str:
        """The neighbourhood that the peer called from; empty if it has not called lately."""
        return self._origins.get(peer_id, "")

    def reached(self, peer_id: PeerID, endpoint: Endpoint) -> None:
        """Records that the peer has answered at this endpoint."""
        known, contact = self._find(peer_id), None
        if known is not None and known.at != endpoint:
            contact = self.get(peer_id)
        if known is None or (contact is not None and endpoint not in contact.addresses):
            return
        self._heard.pop(peer_id, None)
        self._file(known, endpoint)
        while len(self._reached) > self._most_reached:
            ((most, _),) = Multiset(known.near for known in self._reached.values()).most_common(1)
            self._forget(next(peer for peer, known in self._reached.items() if known.near == most))

    def known(self, keys: Iterable[int], most: int = MOST_KNOWN) -> dict[int, PeerID]:
        """The first bits of the NodeIDs of peers near these keys whose contacts will be valid for a while."""
        found: dict[int, PeerID] = {}
        until = self._now() + _OLD_S
        for key in keys:
            for place, peer_id in self._places.nearest(key, KNOWN_OF_KEY):
                known = self._reached.get(peer_id) or self._heard[peer_id]
                if known.expires_at > until and len(found) < most:
                    found[place] = peer_id
            if len(found) >= most:
                break
        return found

    def _find(self, peer_id: PeerID) -> _Known | None:
        """The peer's contact. Forgets it if it has expired."""
        known = self._reached.get(peer_id) or self._heard.get(peer_id)
        if known is not None and known.expires_at <= self._now():
            self._forget(peer_id)
            return None
        return known

    def _file(self, known: _Known, endpoint: Endpoint) -> None:
        """Adds a contact as the one reached most recently."""
        known.at, known.near = endpoint, _near(endpoint)
        self._reached.pop(known.peer_id, None)
        self._reached[known.peer_id] = known

    def _forget(self, peer_id: PeerID) -> None:
        self._heard.pop(peer_id, None)
        self._reached.pop(peer_id, None)
        self._places.remove(peer_id)


class PlaceIndex:
    """PeerIDs by the first bits of their NodeIDs."""

    def __init__(self) -> None:
        self._places = array("Q")
        """In ascending order."""
        self._peers: list[PeerID] = []

    def __iter__(self) -> Iterator[tuple[int, PeerID]]:
        return zip(self._places, self._peers, strict=True)

    def add(self, peer_id: PeerID) -> None:
        """The PeerID must not be in the index yet."""
        place = _place(peer_id)
        number = bisect_left(self._places, place)
        self._places.insert(number, place)
        self._peers.insert(number, peer_id)

    def remove(self, peer_id: PeerID) -> None:
        """The PeerID must be in the index."""
        number = self._peers.index(peer_id, bisect_left(self._places, _place(peer_id)))
        del self._places[number], self._peers[number]

    def nearest(self, key: int, count: int) -> Iterator[tuple[int, PeerID]]:
        """The PeerIDs nearest to a key by XOR, in any order.

        In a range of IDs, the half that contains the key is nearer than the other half.
        """
        bits = first_bits(key)
        ranges = [(0, len(self._places), 1 << PLACE_BITS - 1)]
        while ranges and count:
            first, end, bit = ranges.pop()
            if end - first <= count or not bit:
                some = slice(first, min(end, first + count))
                yield from zip(self._places[some], self._peers[some], strict=True)
                count -= min(count, end - first)
                continue
            middle = bisect_left(self._places, (self._places[first] | bit) & -bit, first, end)
            halves = [(first, middle, bit >> 1), (middle, end, bit >> 1)]
            ranges += halves if bits & bit else halves[::-1]


def _place(peer_id: PeerID) -> int:
    return first_bits(node_id_of(peer_id.to_bytes()))


def _near(endpoint: Endpoint) -> str:
    """The neighbourhood of an endpoint; empty for this machine and for host names."""
    ip = endpoint.ip
    return "" if ip is None or scope_of(ip) is AddressScope.LOOPBACK else neighbourhood(ip)
