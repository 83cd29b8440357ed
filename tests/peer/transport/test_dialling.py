"""Which addresses from strangers are dialled, and how often: nothing nearby, and never so often that it
harms somebody.
"""

import asyncio
import socket
import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer.identity import PeerID
from peer.metrics import totals
from peer.transport.addresses import Multiaddress
from peer.transport.dialling import (
    ENDPOINT_BURST,
    ENDPOINT_EVERY_S,
    MACHINE_BURST,
    MACHINE_EVERY_S,
    Dialling,
    nearest_scope,
    resolved,
)
from peer.transport.endpoints import AddressScope, Endpoint

VICTIM = Endpoint("44.1.1.1:443")
NEAR = {
    AddressScope.LOOPBACK: ["127.0.0.1:80", "[::1]:80"],
    AddressScope.PRIVATE: ["10.0.0.1:80", "192.168.1.1:80", "100.64.0.1:80", "[fd00::1]:80"],
    AddressScope.GLOBAL: ["44.1.1.1:80", "[2a00:1450::1]:80"],
}
NEVER = [
    "169.254.169.254:80",
    "[fd00:ec2::254]:80",
    "0.0.0.0:80",
    "224.0.0.1:80",
    "[fe80::1]:80",
    "localhost:80",
]


def peer(number: int) -> PeerID:
    return PeerID(b"\x12\x20" + number.to_bytes(32, "big"))


def at(seconds: list[float]) -> Callable[[], float]:
    """A clock that the test sets."""
    return lambda: seconds[0]


@pytest.mark.parametrize("nearest", NEAR)
def test_nothing_is_dialled_that_is_nearer_than_the_swarm(nearest: AddressScope) -> None:
    dialling = Dialling(nearest)
    for scope, texts in NEAR.items():
        assert all(dialling.begin(Endpoint(t), peer(0)) is (scope >= nearest) for t in texts)
    assert not any(dialling.begin(Endpoint(text), peer(0)) for text in NEVER)
    near = sum(len(texts) for scope, texts in NEAR.items() if scope < nearest)
    assert totals(dialling.refused, "reason") == {"near": near + len(NEVER), "often": 0}


def test_what_the_invite_names_is_dialled_wherever_it_is() -> None:
    home = Endpoint("192.168.1.1:80")
    dialling = Dialling(AddressScope.GLOBAL, [home])
    assert all(dialling.begin(home, peer(n)) for n in range(100))
    assert not dialling.begin(Endpoint("192.168.1.1:81"), peer(0))


def test_an_invite_with_a_private_address_opens_no_home_network_to_strangers() -> None:
    public, private = Endpoint("44.1.1.1:80"), Endpoint("192.168.1.5:80")
    dialling = Dialling(nearest_scope([private, public]), [private, public])
    dialling.reached(public, peer(0))
    assert dialling.begin(private, peer(0)), "the founder may be in the same network"
    assert not dialling.begin(Endpoint("192.168.1.1:80"), peer(1))
    dialling.reached(private, peer(0))
    assert dialling.begin(Endpoint("192.168.1.1:80"), peer(1)), "this peer is in the founder's network"
    assert not dialling.begin(Endpoint("127.0.0.1:80"), peer(1))


def test_no_stranger_proves_that_this_peer_is_in_its_network() -> None:
    dialling = Dialling(AddressScope.GLOBAL, [Endpoint("44.1.1.1:80")])
    dialling.reached(Endpoint("192.168.1.5:80"), peer(0))
    assert not dialling.begin(Endpoint("192.168.1.1:80"), peer(1))


@given(st.lists(st.tuples(st.floats(0, 20), st.integers(1, 3), st.integers(0, 9)), max_size=200))
def test_a_victim_is_dialled_a_few_times_a_minute_whoever_is_said_to_be_there(
    tries: list[tuple[float, int, int]],
) -> None:
    now = [0.0]
    dialling = Dialling(AddressScope.GLOBAL, clock=at(now))
    dials: list[tuple[float, int]] = []
    for pause_s, port, number in tries:
        now[0] += pause_s
        if dialling.begin(Endpoint.of("44.1.1.1", port), peer(number)):
            dials.append((now[0], port))
    for began, _ in dials:
        minute = [port for when, port in dials if began <= when <= began + 60]
        assert all(minute.count(port) <= ENDPOINT_BURST + 60 / ENDPOINT_EVERY_S for port in minute)
        assert len(minute) <= MACHINE_BURST + 60 / MACHINE_EVERY_S


def test_a_machine_is_no_victim_at_its_many_ports_either() -> None:
    now = [0.0]
    dialling = Dialling(AddressScope.GLOBAL, clock=at(now))
    hosts = [
        ("44.1.1.1", "44.1.1.1"),
        ("2a00:1450::1", "2a00:1450::ffff:2"),
    ]  # one line has 2^64 of the latter
    for here, there in hosts:
        began = [dialling.begin(Endpoint.of((here, there)[n % 2], 1000 + n), peer(n)) for n in range(100)]
        assert began.count(True) == MACHINE_BURST
    now[0] += MACHINE_EVERY_S
    assert dialling.begin(Endpoint("44.1.1.1:9"), peer(0))
    assert not dialling.begin(Endpoint("44.1.1.1:10"), peer(0))


def test_peers_that_are_there_are_dialled_as_often_as_needed() -> None:
    dialling = Dialling(AddressScope.GLOBAL, clock=lambda: 0.0)
    for number in range(100):  # on one machine
        here = Endpoint.of("44.1.1.1", 1000 + number)
        assert dialling.begin(here, peer(number))
        dialling.reached(here, peer(number))
    first = Endpoint("44.1.1.1:1000")
    assert all(dialling.begin(first, peer(0)) for _ in range(100))
    others = [dialling.begin(first, peer(1)) for _ in range(100)]
    assert others.count(True) == ENDPOINT_BURST, "others gain nothing by it"


def test_who_claims_a_nodes_endpoint_does_not_use_up_the_nodes_dials() -> None:
    dialling = Dialling(AddressScope.GLOBAL, clock=lambda: 0.0)
    claims = [dialling.begin(VICTIM, peer(n)) for n in range(1, 100)]
    assert claims.count(True) == ENDPOINT_BURST
    assert not dialling.begin(VICTIM, peer(0))
    assert VICTIM.ip is not None
    dialling.met(peer(0), VICTIM.ip)
    assert all(dialling.begin(VICTIM, peer(0)) for _ in range(9))
    assert not dialling.begin(VICTIM, peer(1))


@pytest.mark.parametrize(
    ("hosts", "scope"),
    [
        (["127.0.0.1", "::1"], AddressScope.LOOPBACK),
        (["127.0.0.1", "44.1.1.1"], AddressScope.GLOBAL),
        (["127.0.0.1", "10.0.0.1"], AddressScope.PRIVATE),
        (["10.0.0.1", "44.1.1.1"], AddressScope.GLOBAL),
        (["44.1.1.1", "home.example"], AddressScope.GLOBAL),
        (["169.254.169.254"], AddressScope.GLOBAL),
        ([], AddressScope.GLOBAL),
    ],
)
def test_how_near_a_swarm_is(hosts: list[str], scope: AddressScope) -> None:
    assert nearest_scope([Endpoint.of(host, 1) for host in hosts]) is scope


def test_names_of_the_owner_become_the_addresses_to_which_they_lead() -> None:
    name = Multiaddress.of(Endpoint("localhost:80"), peer(0))
    numeric = Multiaddress.of(Endpoint("44.1.1.1:80"), peer(1))
    nowhere = Multiaddress.of(Endpoint("no-such-host.invalid:80"), peer(2))
    found = asyncio.run(resolved([name, numeric, nowhere]))
    assert {address.peer_id for address in found} == {peer(0), peer(1)}
    assert all(address.endpoint.ip is not None and address.endpoint.port == 80 for address in found)
    assert set(asyncio.run(resolved([Endpoint("localhost:9")]))) <= {"127.0.0.1:9", "[::1]:9"}


def test_a_silent_name_server_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()

    def look_up(*_: object, **__: object) -> None:
        answered.wait()
        raise socket.gaierror(socket.EAI_AGAIN, "no name server answers")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr("peer.transport.dialling._RESOLVE_S", 0.1)
    found: list[list[Endpoint]] = []
    running = threading.Thread(
        target=lambda: found.append(asyncio.run(resolved([Endpoint("slow.invalid:80")])))
    )
    running.start()
    running.join(20.0)
    has_ended = not running.is_alive()
    answered.set()
    running.join()
    assert has_ended
    assert found == [[]]
