"""A contact book holds the newest contact of each peer. Invented contacts push out no real ones."""

import functools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stranger import new_identities

from peer.identity import CONTACT_DOMAIN, Identity, PeerID
from peer.kademlia.contacts import MOST_KNOWN, ContactBook, PlaceIndex
from peer.kademlia.routing import first_bits, node_id_of
from peer.metrics import totals
from peer.transport.addresses import Multiaddress
from peer.transport.contacts import LIFETIME_S
from peer.transport.endpoints import Endpoint
from peer.wire import contact_pb2

NOW = 1_800_000_000.0
LIMIT = 8


@functools.cache
def named(number: int) -> Identity:
    """The identity of a peer."""
    return new_identities(1)[0]


def at(host: str = "192.0.2.7") -> Endpoint:
    return Endpoint(f"{host}:4711")


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


def contact(
    identity: Identity,
    sequence: int = 1,
    host: str = "192.0.2.7",
    lasts_s: float = LIFETIME_S,
    before: Sequence[str] = (),
) -> contact_pb2.Contact:
    """`before`: addresses that the contact names before its own."""
    named = [*before, at(host)]
    statement = contact_pb2.ContactStatement(
        certificate=identity.make_certificate(),
        sequence=sequence,
        expires_at=NOW + lasts_s,
        addresses=[contact_pb2.ContactAddress(direct=address) for address in named],
    ).SerializeToString()
    return contact_pb2.Contact(statement=statement, signature=identity.sign(statement, CONTACT_DOMAIN))


def learn(book: ContactBook, number: int, **more: Any) -> PeerID:
    identity = named(number)
    assert book.learn(contact(identity, **more), (identity.peer_id,)) == identity.peer_id
    return identity.peer_id


def book(clock: Clock | None = None, limit: int = LIMIT) -> ContactBook:
    return ContactBook(now=clock or Clock(), limit=limit)


def test_the_newest_contact_counts() -> None:
    here, identity = book(), named(0)
    messages = [contact(identity, sequence, f"192.0.2.{sequence}") for sequence in (2, 1, 3)]
    assert [here.learn(message, (identity.peer_id,)) for message in messages] == [
        identity.peer_id,
        None,
        identity.peer_id,
    ]
    known = here.get(identity.peer_id)
    assert known is not None
    assert known.addresses == ("192.0.2.3:4711",)
    assert len(here) == 1


def test_contacts_of_others_than_expected_are_refused_unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    here = book()
    monkeypatch.setattr("peer.transport.contacts.verify", None)
    assert here.learn(contact(named(0)), (named(1).peer_id,)) is None
    assert totals(here.refused, "reason") == {"malformed": 1, "invalid": 0}


def test_a_contact_that_is_known_is_not_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    here = book()
    peer_id = learn(here, 0)
    monkeypatch.setattr("peer.transport.contacts.verify", None)
    assert learn(here, 0) == peer_id


def test_a_forged_contact_replaces_nothing_and_is_counted() -> None:
    here, identity = book(), named(0)
    learn(here, 0)
    forged = contact(identity, 2, "192.0.2.66")
    forged.signature = named(1).sign(forged.statement, CONTACT_DOMAIN)
    assert here.learn(forged, (identity.peer_id,)) is None
    known = here.get(identity.peer_id)
    assert known is not None
    assert known.sequence == 1
    assert totals(here.refused, "reason") == {"malformed": 0, "invalid": 1}


def test_expired_contacts_are_dropped() -> None:
    clock = Clock()
    here = book(clock)
    reached, heard = learn(here, 0), learn(here, 1)
    here.reached(reached, at())
    clock.now += LIFETIME_S
    for peer_id in (reached, heard):
        assert here.get(peer_id) is None
        assert not here.reaches(peer_id)
        assert here.message(peer_id) is None
    assert not len(here)
    assert not here.known([0])


def test_made_up_contacts_never_push_out_reached_ones() -> None:
    here = book()
    reached = [learn(here, number) for number in range(LIMIT // 2)]
    for peer_id in reached:
        here.reached(peer_id, at())
    made_up = [learn(here, number) for number in range(20, 40)]
    assert all(here.reaches(peer_id) for peer_id in reached)
    assert [here.reaches(peer_id) for peer_id in made_up] == [False] * 16 + [True] * 4
    assert not any(here.message(peer_id) for peer_id in made_up), "nor are they passed on"
    assert len(here) == LIMIT


def test_whoever_runs_many_peers_on_one_machine_pushes_out_its_own() -> None:
    here = book()
    honest = [learn(here, number, host=f"192.0.2.{number + 1}") for number in range(2)]
    for number, peer_id in enumerate(honest):
        here.reached(peer_id, at(f"192.0.2.{number + 1}"))
    for number in range(20, 40):
        elsewhere = [at(f"203.0.113.{number}")]
        peer_id = learn(here, number, host="198.51.100.1", before=elsewhere)
        here.reached(peer_id, at("198.51.100.1"))
    assert all(here.message(peer_id) for peer_id in honest), "whatever else its peers say that they are at"
    assert len(here) == LIMIT // 2


def test_a_reached_peer_that_names_another_address_is_not_passed_on_before_it_is_reached_there() -> None:
    here, victim = book(), at("203.0.113.9")
    peer_id = learn(here, 0)
    here.reached(peer_id, at())
    assert here.message(peer_id)
    learn(here, 0, sequence=2, host=victim.host)
    here.reached(peer_id, at())
    assert here.message(peer_id) is None
    assert here.get(peer_id), "it may be tried"
    here.reached(peer_id, victim)
    assert here.message(peer_id)
    learn(here, 0, sequence=3, host=victim.host, before=[at()])
    assert here.message(peer_id), "it has one more, and is still there"


def test_addresses_of_the_owner_come_after_the_peers_own() -> None:
    here, identity = book(), named(0)
    given_at = Endpoint("198.51.100.9:4711")
    here.note(Multiaddress.of(given_at, identity.peer_id))
    assert here.reaches(identity.peer_id)
    assert here.get(identity.peer_id) is None, "it has no certificate yet"
    assert here.given(identity.peer_id) == (given_at,)
    learn(here, 0)
    known = here.get(identity.peer_id)
    assert known is not None
    assert known.addresses == ("192.0.2.7:4711", given_at)
    circuit = f"/ip4/192.0.2.9/tcp/1/p2p/{identity.peer_id}/p2p-circuit/p2p/{named(1).peer_id}"
    here.note(Multiaddress(circuit))
    assert not here.reaches(named(1).peer_id)


def test_a_request_names_the_known_ones_near_its_keys_whose_contacts_hold() -> None:
    here = book(limit=64)
    peers = [learn(here, number) for number in range(10)]
    learn(here, 10, lasts_s=60)
    places = {first_bits(node_id_of(peer_id.to_bytes())) for peer_id in peers}
    assert set(here.known([0])) == places
    assert len(here.known(range(0, 2**160, 2**156))) == len(places) <= MOST_KNOWN


@given(
    st.sets(st.binary(min_size=32, max_size=32), max_size=60), st.integers(0, 2**160 - 1), st.integers(1, 40)
)
def test_the_nearest_to_a_key_are_found(names: set[bytes], key: int, count: int) -> None:
    index, peers = PlaceIndex(), [PeerID(name) for name in names]
    for peer_id in peers:
        index.add(peer_id)
    nearest = sorted(peers, key=lambda peer_id: node_id_of(peer_id.to_bytes()) ^ key)[:count]
    assert {peer_id for _, peer_id in index.nearest(key, count)} == set(nearest)
    for peer_id in peers[::2]:
        index.remove(peer_id)
    assert {peer_id for _, peer_id in index} == set(peers[1::2])


@given(st.lists(st.tuples(st.sampled_from(["learn", "reach", "forget"]), st.integers(0, 12)), max_size=60))
def test_the_bounds_and_the_order_hold_whatever_happens(events: list[tuple[str, int]]) -> None:
    clock = Clock()
    here = book(clock)
    for number, (event, peer) in enumerate(events):
        peer_id = named(peer).peer_id
        if event == "learn":
            learn(here, peer, sequence=number, host=f"192.0.2.{peer % 3}")
        elif event == "reach":
            here.reached(peer_id, at(f"192.0.2.{peer % 3}"))
        else:
            clock.now = NOW + LIFETIME_S
            here.get(peer_id)
            clock.now = NOW
        assert len(here._reached) <= LIMIT // 2
        assert len(here._heard) <= LIMIT // 2
        assert not here._reached.keys() & here._heard.keys()
        assert [peer_id for _, peer_id in here._places] == sorted(
            [*here._reached, *here._heard], key=lambda peer_id: node_id_of(peer_id.to_bytes())
        )
        assert all(known.at is not None for known in here._reached.values())
        assert all(known.at is None for known in here._heard.values())
