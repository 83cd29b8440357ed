"""Where this peer reaches the nodes of the DHT: the newest contact of each that it has heard of, within bounds.

Keys are cheap, and so are contacts of peers that do not exist. So contacts of peers that were really reached are kept
apart from those that were only heard of. If there are too many of those, one of the neighbourhood with the most goes,
which is that of whoever runs many peers on few machines. A neighbourhood is where a peer was reached or called from,
whatever else its contact names.
"""

import bisect
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import replace
from functools import partial
from operator import itemgetter

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
from peer.transport.endpoints import AddressScope, Endpoint, neighbourhood
from peer.wire import contact_pb2

MOST_KNOWN = 256
"""Peers that a request names as known."""
_MOST_GIVEN = 256
KNOWN_OF_KEY = 32
"""The nearest to each key: somewhat more than another peer names."""
_OLD_S = LIFETIME_S / 4
"""A contact that ends so soon is asked for again. Its peer has had a newer one for a while."""


class ContactBook:
    """The contacts that one process knows. It reads a stranger's contact once, and checks no signature in vain."""

    def __init__(
        self,
        metrics: CollectorRegistry | None = None,
        now: Callable[[], float] = clock.now,
        limit: int = 2048,
        guard: ParseGuard | None = None,
    ) -> None:
        """`now`: Unix time in seconds. `limit`: contacts, half of them of peers that were reached.

        `guard`: of this process.
        """
        self._guard = guard or ParseGuard()
        refused = Counter(
            "talkoot_contacts_refused",
            "Contacts of other peers that were malformed, or had expired or were not signed by their peer.",
            ["reason"],
            registry=metrics,
        )
        self.refused = start_at_zero(refused, "malformed", "invalid")
        self._now = now
        self._most_reached = limit // 2
        self._heard = BoundedDict[PeerID, Contact](limit - limit // 2)
        self._reached: dict[PeerID, Contact] = {}
        self._reached_at: dict[PeerID, Endpoint] = {}
        self._near: dict[str, OrderedDict[PeerID, None]] = {}
        """The reached ones by neighbourhood, the one reached longest ago first."""
        self._origins = BoundedDict[PeerID, str](limit)
        """The neighbourhoods that peers called from last."""
        self._given = BoundedDict[PeerID, tuple[Endpoint, ...]](_MOST_GIVEN)
        self._places = PlaceIndex()

    def __len__(self) -> int:
        return len(self._reached) + len(self._heard)

    def learn(self, message: contact_pb2.Contact, whose: Container[PeerID]) -> PeerID | None:
        """Whose contact it is; None if it is refused, or older than the one known. The signature is checked last.

        `whose`: contacts of any others are refused.
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
        at = self._reached_at.get(contact.peer_id)
        if at is not None and at in contact.addresses:
            self._file(contact, at)
        else:  # it is not passed on before it was reached there, too
            if known is not None:
                self._forget(contact.peer_id)
            self._places.add(contact.peer_id)
            for gone in self._heard.put(contact.peer_id, contact):
                self._places.remove(gone.peer_id)
        return contact.peer_id

    def note(self, address: Multiaddress) -> None:
        """Adds an address that the owner gave, in an invite or from disk. It needs no signature, and does not expire.

        Relayed ones are passed over: the DHT's nodes are reached directly.
        """
        if not address.is_relayed:
            given = (address.endpoint, *self._given.get(address.peer_id, ()))
            self._given[address.peer_id] = tuple(dict.fromkeys(given))[:8]

    def given(self, peer_id: PeerID) -> tuple[Endpoint, ...]:
        """Where the owner said that this peer is."""
        return self._given.get(peer_id, ())

    def get(self, peer_id: PeerID) -> Contact | None:
        """The peer's contact, with the addresses that the owner gave after its own."""
        contact = self._find(peer_id)
        given = self._given.get(peer_id)
        if contact is None or not given:
            return contact
        return replace(contact, addresses=tuple(dict.fromkeys((*contact.addresses, *given))))

    def certificate_of(self, peer_id: PeerID) -> bytes | None:
        """PEM."""
        contact = self._find(peer_id)
        return None if contact is None else contact.certificate_pem

    def message(self, peer_id: PeerID) -> contact_pb2.Contact | None:
        """The contact to pass on. Only of a peer that was reached: nobody else's may be worth anything."""
        self._find(peer_id)
        contact = self._reached.get(peer_id)
        return None if contact is None else contact.message

    def reaches(self, peer_id: PeerID) -> bool:
        """Whether the peer can be called."""
        contact = self._find(peer_id)
        return peer_id in self._given or (contact is not None and bool(contact.addresses))

    def called(self, peer_id: PeerID, near: str) -> None:
        """The peer has called, from this neighbourhood."""
        self._origins[peer_id] = near

    def neighbourhood_of(self, peer_id: PeerID) -> str:
        """Where it was reached, or else the first that its contact names; empty if it is on this machine or unknown."""
        endpoint = self._reached_at.get(peer_id)
        if endpoint is None:
            contact = self._heard.get(peer_id)
            endpoint = contact.addresses[0] if contact is not None and contact.addresses else None
        return "" if endpoint is None or endpoint.scope is AddressScope.LOOPBACK else _near(endpoint)

    def origin_of(self, peer_id: PeerID) -> str:
        """The neighbourhood that it called from; empty if it has not called lately."""
        return self._origins.get(peer_id, "")

    def reached(self, peer_id: PeerID, endpoint: Endpoint) -> None:
        """The peer has answered there."""
        contact = self.get(peer_id)
        if contact is not None and endpoint in contact.addresses:
            own = self._heard.pop(peer_id, None) or self._reached[peer_id]
            self._file(own, endpoint)
            while len(self._reached) > self._most_reached:
                most = max(self._near.values(), key=len)
                self._forget(next(iter(most)))

    def known(self, keys: Iterable[int], most: int = MOST_KNOWN) -> list[int]:
        """The first bits of the NodeIDs, near these keys, of peers whose contacts hold for a while."""
        found: dict[int, None] = {}
        until = self._now() + _OLD_S
        for key in keys:
            for place, peer_id in self._places.nearest(key, KNOWN_OF_KEY):
                contact = self._reached.get(peer_id) or self._heard[peer_id]
                if contact.expires_at > until:
                    found[place] = None
            if len(found) >= most:
                break
        return list(found)[:most]

    def _find(self, peer_id: PeerID) -> Contact | None:
        """Forgets it if it has expired."""
        contact = self._reached.get(peer_id) or self._heard.get(peer_id)
        if contact is not None and contact.expires_at <= self._now():
            self._forget(peer_id)
            return None
        return contact

    def _file(self, contact: Contact, endpoint: Endpoint) -> None:
        """Among the reached ones, as the one reached last."""
        peer_id = contact.peer_id
        self._leave(peer_id)
        self._reached[peer_id], self._reached_at[peer_id] = contact, endpoint
        self._near.setdefault(_near(endpoint), OrderedDict())[peer_id] = None

    def _forget(self, peer_id: PeerID) -> None:
        self._heard.pop(peer_id, None)
        self._leave(peer_id)
        self._places.remove(peer_id)

    def _leave(self, peer_id: PeerID) -> None:
        """Removes it from the reached ones, if it is one."""
        if self._reached.pop(peer_id, None) is None:
            return
        near = _near(self._reached_at.pop(peer_id))
        del self._near[near][peer_id]
        if not self._near[near]:
            del self._near[near]


class PlaceIndex:
    """PeerIDs by the first bits of their NodeIDs."""

    def __init__(self) -> None:
        self._sorted: list[tuple[int, PeerID]] = []

    def __iter__(self) -> Iterator[tuple[int, PeerID]]:
        return iter(self._sorted)

    def add(self, peer_id: PeerID) -> None:
        """One that is not in it."""
        bisect.insort(self._sorted, _place(peer_id))

    def remove(self, peer_id: PeerID) -> None:
        """One that is in it."""
        del self._sorted[bisect.bisect_left(self._sorted, _place(peer_id))]

    def nearest(self, key: int, count: int) -> Iterator[tuple[int, PeerID]]:
        """The nearest to a key by XOR, in any order.

        The nearest of a range of IDs are in that half of it in which the key would be, and then in the other.
        """
        bits = first_bits(key)
        ranges = [(0, len(self._sorted), 1 << PLACE_BITS - 1)]
        while ranges and count:
            first, end, bit = ranges.pop()
            if end - first <= count or not bit:
                yield from self._sorted[first : min(end, first + count)]
                count -= min(count, end - first)
                continue
            upper = (self._sorted[first][0] | bit) & -bit
            middle = bisect.bisect_left(self._sorted, upper, first, end, key=itemgetter(0))
            halves = [(first, middle, bit >> 1), (middle, end, bit >> 1)]
            ranges += halves if bits & bit else halves[::-1]


def _place(peer_id: PeerID) -> tuple[int, PeerID]:
    return first_bits(node_id_of(peer_id.to_bytes())), peer_id


def _near(endpoint: Endpoint) -> str:
    return "" if endpoint.ip is None else neighbourhood(endpoint.ip)
