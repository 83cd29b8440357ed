"""The grammar of addresses: p2pd and hivemind understand every accepted address alike, and all others are refused."""

import copy
import ipaddress

import pytest
from hivemind.utils.multiaddr import Multiaddr
from hypothesis import given
from hypothesis import strategies as st

from peer.errors import AddressError
from peer.identity import PeerID
from peer.rpc.connections import origin_of
from peer.transport.addresses import Multiaddress, RemoteEnd, known, known_bytes, multiaddress
from peer.transport.endpoints import AddressScope, Endpoint, near, scope_of

PEER = PeerID(b"\x12\x20" + bytes(range(32)))
NAME = PEER.to_base58()
HERE = f"/ip4/127.0.0.1/tcp/80/p2p/{NAME}"
ON_LOOPBACK = "/ip4/127.0.0.1/tcp/80/p2p/"
WORDS = (
    "", "/", "ip4", "ip6", "dns", "dns4", "dns6", "tcp", "udp", "p2p", "ipfs", "p2p-circuit", "onion", "onion3", "unix",
    "quic", "ws", "1.2.3.4", "127.1", "::1", "::ffff:1.2.3.4", "fe80::1%lo", "a.b", "-a", "0", "1", "80", "65536", "-1",
    "٣", "é", "\x00", "\x1b[2J", "Qm", NAME, NAME[:-1], NAME.lower(), "aaimaq4ygg2iegci:80", "[::1]:80", "a" * 300,
)  # fmt: skip

labels = st.from_regex(r"[a-z]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)
names = st.lists(labels, min_size=1, max_size=5).map(".".join)
ports = st.integers(1, 65535)
peers = st.binary(min_size=32, max_size=32).map(lambda digest: PeerID(b"\x12\x20" + digest).to_base58())
ip6 = st.ip_addresses(v=6).map(str).filter(lambda text: not text.startswith("::ffff:"))
hosts = st.one_of(
    st.ip_addresses(v=4).map(lambda ip: f"/ip4/{ip}"),
    ip6.map("/ip6/{}".format),
    st.tuples(st.sampled_from(["dns", "dns4", "dns6"]), names).map(lambda pair: "/{}/{}".format(*pair)),
)
direct = st.builds("{}/tcp/{}/p2p/{}".format, hosts, ports, peers)
multiaddresses = st.one_of(direct, st.builds("{}/p2p-circuit/p2p/{}".format, direct, peers))
endpoints = st.one_of(
    st.builds("{}:{}".format, st.ip_addresses(v=4), ports),
    st.builds("[{}]:{}".format, ip6, ports),
    st.builds("{}:{}".format, names, ports),
)
arbitrary = st.one_of(
    st.text(),
    st.lists(st.sampled_from(WORDS), max_size=12).map("/".join),
    st.lists(st.sampled_from(WORDS), max_size=12).map(lambda words: "/" + "/".join(words)),
    st.lists(st.sampled_from(WORDS), max_size=4).map(":".join),
    st.tuples(multiaddresses, st.integers(0, 200), st.sampled_from([*WORDS, "/", "\n", "%"])).map(
        lambda made: made[0][: made[1]] + made[2] + made[0][made[1] :]
    ),
)


@given(multiaddresses)
def test_a_multiaddress_has_one_spelling_and_p2pd_and_hivemind_read_the_same(text: str) -> None:
    address = Multiaddress(text)
    assert address == text == Multiaddress(address)
    assert Multiaddress.decode(address.to_bytes()) == address
    assert Multiaddress.decode(address.to_bytes(without_peer=True), address.peer_id) == address
    assert str(Multiaddr(address.to_bytes())) == str(Multiaddr(text))
    assert address.is_relayed == ("p2p-circuit" in text)
    assert text.split("/p2p/")[1].removesuffix("/p2p-circuit") == address.dialled.to_base58()
    assert text.endswith(address.peer_id.to_base58())
    assert copy.deepcopy(address).endpoint == address.endpoint
    if not address.is_relayed:
        assert Multiaddress.of(address.endpoint, address.peer_id).endpoint == address.endpoint


@given(multiaddresses)
def test_p2pd_says_from_which_neighbourhood_a_stream_comes(text: str) -> None:
    address = Multiaddress(text)
    end = RemoteEnd.decode(address.to_bytes(without_peer=True))
    assert end.is_relayed is address.is_relayed
    if address.is_relayed:
        assert end.neighbourhood == f"relay {address.dialled}"
    else:
        assert end.neighbourhood == origin_of(
            f"ipv{4 if '.' in address.endpoint.host else 6}:{address.endpoint}"
        )


@given(endpoints)
def test_an_endpoint_has_one_spelling(text: str) -> None:
    endpoint = Endpoint(text)
    assert endpoint == text == Endpoint.of(endpoint.host, endpoint.port) == Endpoint(endpoint)
    assert endpoint.ip is None or str(endpoint.ip) == endpoint.host
    assert Multiaddress(f"{multiaddress(endpoint)}/p2p/{NAME}").endpoint == endpoint


@given(arbitrary)
def test_no_text_raises_anything_but_the_parsers_own_error(text: str) -> None:
    for kind in (Endpoint, Multiaddress):
        try:
            address = kind(text)
        except AddressError:
            continue
        assert address.isascii()
        assert address.isprintable()
        assert len(address) <= 512
        assert kind(address) == address
    assert len(known(Multiaddress, [text, HERE, text], 2)) in (1, 2)


@given(st.one_of(st.binary(), multiaddresses.map(lambda text: Multiaddress(text).to_bytes()[:-35])))
def test_no_bytes_raise_anything_but_the_parsers_own_error(data: bytes) -> None:
    assert all(address.peer_id == PEER for address in known_bytes([data], PEER))
    try:
        address = Multiaddress.decode(data)
    except AddressError:
        pass
    else:
        assert address.to_bytes() == data
    RemoteEnd.decode(data)


@pytest.mark.parametrize(
    "text",
    [
        "", "/", NAME, f"/p2p/{NAME}", "localhost:80", "/ip4/127.0.0.1/tcp/80", f"{ON_LOOPBACK}x",
        f"/ip4/127.0.0.1/tcp/80,/p2p/{NAME}", f"/ip4/127.0.0.1/tcp/99999/p2p/{NAME}",
        f"/ip4/127.0.0.1/tcp/0/p2p/{NAME}",
        f"/ip4/1.2.3/tcp/80/p2p/{NAME}", f"{HERE}/", f"/ip4/127.0.0.1/tcp/80/ipfs/{NAME}", f"/p2p/{NAME}{HERE}",
        f"/ip4/127.0.0.1/tcp/x/p2p/{NAME}", f"/ip4/127.0.0.1/tcp/080/p2p/{NAME}", f"{ON_LOOPBACK}1{NAME[1:]}",
        f"/ip4/127.0.0.1/tcp/80/p2p/{NAME}/ip4/127.0.0.1/p2p/{NAME}", f"/dns/127.1/tcp/80/p2p/{NAME}",
        f"/onion/aaimaq4ygg2iegci:80/dns/a/p2p/{NAME}", f"/ip6/::ffff:127.0.0.1/tcp/80/p2p/{NAME}",
        f"/ip6/fe80::1%eth0/tcp/80/p2p/{NAME}", f"{HERE}/p2p-circuit", f"{HERE}/p2p-circuit{HERE}", f" {HERE}",
        f"/ip4/127.0.0.1/udp/80/p2p/{NAME}", f"{HERE}\n", f"{HERE},{HERE}", f"--x={HERE}", HERE[:-1], HERE + "1",
    ],
)  # fmt: skip
def test_what_is_no_address_of_a_peer(text: str) -> None:
    assert Multiaddress(HERE) == HERE
    with pytest.raises(AddressError):
        Multiaddress(text)


@pytest.mark.parametrize(
    "text",
    [
        "", ":", ":80", "a:", "a:0", "a:65536", "a:080", "a:-1", "a b:1", "a_b:1", "unix:/run/docker.sock", "::1:80",
        "127.1:80", "0x7f000001:80", "2130706433:80", "0177.0.0.1:80", "1.2.3.4.:80", "[::1]", "[1.2.3.4]:80",
        "[::ffff:127.0.0.1]:80", "[fe80::1%eth0]:80", "dns:///a:80", "a:80/x", "a:٣", "é:80", "a..b:80", "-a:80",
    ],
)  # fmt: skip
def test_what_is_no_endpoint(text: str) -> None:
    with pytest.raises(AddressError):
        Endpoint(text)


def test_kinds_that_are_not_known_are_skipped_and_the_others_stay() -> None:
    quic = f"/ip4/127.0.0.1/udp/80/quic-v1/p2p/{NAME}"
    assert known(Multiaddress, [quic, HERE, "x", HERE], 8) == (HERE,)
    assert known(Multiaddress, [quic, HERE], 1) == ()
    assert known(Endpoint, ["Home.Example:80", "[2001:DB8::0:1]:80"], 8) == (
        "home.example:80",
        "[2001:db8::1]:80",
    )


@pytest.mark.parametrize(
    ("text", "scope"),
    [
        ("127.0.0.1", "LOOPBACK"), ("127.255.0.1", "LOOPBACK"), ("::1", "LOOPBACK"),
        ("::ffff:127.0.0.1", "LOOPBACK"), ("2002:7f00:1::", "LOOPBACK"), ("64:ff9b::7f00:1", "LOOPBACK"),
        ("10.0.0.1", "PRIVATE"), ("192.168.1.1", "PRIVATE"), ("172.16.0.1", "PRIVATE"),
        ("100.64.0.1", "PRIVATE"), ("fd00::1", "PRIVATE"), ("fec0::1", "PRIVATE"), ("2002:0a00:1::", "PRIVATE"),
        ("192.0.2.1", "PRIVATE"), ("2001:db8::1", "PRIVATE"), ("2001::1", "PRIVATE"), ("0.0.0.0", "NONE"),
        ("0.1.2.3", "NONE"), ("::", "NONE"), ("224.0.0.1", "NONE"), ("255.255.255.255", "NONE"),
        ("240.0.0.1", "NONE"), ("169.254.169.254", "NONE"), ("fe80::1", "NONE"), ("ff02::1", "NONE"),
        ("fd00:ec2::254", "NONE"), ("100.100.100.200", "NONE"), ("168.63.129.16", "NONE"),
        ("64:ff9b::a9fe:a9fe", "NONE"), ("8.8.8.8", "GLOBAL"), ("2a00:1450::1", "GLOBAL"),
        ("2002:0808:0808::1", "GLOBAL"), ("64:ff9b::808:808", "GLOBAL"),
    ],
)  # fmt: skip
def test_the_scope_of_an_address(text: str, scope: str) -> None:
    assert scope_of(ipaddress.ip_address(text)) is AddressScope[scope]


@given(st.ip_addresses())
def test_every_address_has_a_scope(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    assert scope_of(address) is not AddressScope.GLOBAL or address.is_global or address.version == 6


def test_all_networks_of_one_line_are_one_neighbourhood() -> None:
    line = {origin_of(f"ipv6:[2a00:1450:4001:8{n:03x}::{n:x}]:{n}") for n in range(1, 256)}
    assert line == {"2a00:1450:4001:8000::/56"}
    assert origin_of("ipv6:[2a00:1450:4001:8100::1]:1") not in line, "another line"
    assert origin_of("ipv4:44.1.1.1:1") != origin_of("ipv4:44.1.1.2:1")


@pytest.mark.parametrize(
    ("client", "neighbourhood"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),  # a client over IPv4 of a server that listens on both
        ("2001:db8:0:17::1", "2001:db8::/56"),
        ("fe80::1%eth0", "fe80::/56"),
        ("testclient", "testclient"),
    ],
)
def test_a_clients_address_tells_its_neighbourhood(client: str, neighbourhood: str) -> None:
    assert near(client) == neighbourhood


def test_a_host_name_is_a_neighbourhood_by_itself() -> None:
    assert Endpoint("example.org:1").near == "example.org"
    assert Endpoint("[2001:db8:0:17::1]:1").near == "2001:db8::/56"
