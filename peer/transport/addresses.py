"""Where a peer listens and how others reach it: network settings, endpoints and libp2p's multiaddresses.

A multiaddress such as /ip4/192.0.2.7/tcp/31337/p2p/Qm… names a peer and its endpoint; one that goes on with
/p2p-circuit/p2p/Qm… names the peer that the first one relays to. An endpoint is `host:port`, as gRPC dials it.

Strangers write both, so both have one strict grammar and one spelling. Whatever is not in it is not stored, dialled or
put on a command line.
"""

import contextlib
import errno
import ipaddress
import itertools
import re
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, Self, TypeAlias, TypeVar
from urllib.parse import unquote

import base58
import psutil
from pydantic import AfterValidator

from peer.errors import AddressError, PortError
from peer.identity import PeerID

IpAddress: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address

_MAX_CHARACTERS = 512
"""Of one address. A circuit to a host with the longest name has 420."""
_PORT = re.compile(r"[1-9][0-9]{0,4}")
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_NAME = re.compile(rf"(?:{_LABEL}\.)*(?=[a-z]){_LABEL}")
"""Its last label begins with a letter: resolvers take the likes of 127.1 and 0x7f000001 for IPv4 addresses."""
_ENDPOINT = re.compile(r"(?:\[([^\[\]]+)\]|([^\[\]:]+)):([0-9]+)")
_PEER_ID = re.compile(r"(?:Qm|12D3KooW)[1-9A-HJ-NP-Za-km-z]{44}")
_PEER_ID_FORMS = {34: b"\x12\x20", 38: b"\x00\x24\x08\x01\x12\x20"}
"""Size in bytes → how such a PeerID begins: the SHA-256 of an RSA key, or an Ed25519 key, which no peer of ours has."""


class AddressScope(IntEnum):
    """How far an IP address is valid."""

    NONE = 0
    """It names no machine that strangers may name: link-local, multicast, reserved, a cloud's metadata."""
    LOOPBACK = 1
    PRIVATE = 2
    """Of a private network, a provider's (RFC 6598), or documentation."""
    GLOBAL = 3


_METADATA = frozenset(
    map(
        ipaddress.ip_address,
        # of Amazon, Alibaba, Oracle and Azure, which are not link-local as the others'
        ("fd00:ec2::254", "fd20:ce::254", "100.100.100.200", "192.0.0.192", "168.63.129.16"),
    )
)
"""Addresses at which clouds tell a machine its secrets."""
_THIS_NETWORK = ipaddress.ip_network("0.0.0.0/8")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_UNICAST = ipaddress.ip_network("2000::/3")


def scope_of(address: IpAddress) -> AddressScope:
    """The scope of an IP address, or of the IPv4 address in it."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return scope_of(inner)
    if address.is_loopback:
        return AddressScope.LOOPBACK
    nowhere = address.is_link_local or address.is_multicast or address.is_unspecified or address.is_reserved
    if nowhere or address in _METADATA or address in _THIS_NETWORK:
        return AddressScope.NONE
    if address.is_global and (isinstance(address, ipaddress.IPv4Address) or address in _UNICAST):
        return AddressScope.GLOBAL
    return AddressScope.PRIVATE


def ip_address(text: str) -> IpAddress:
    """Parses an IP address; an IPv4 address written as IPv6, such as ::ffff:127.0.0.1, too. Raises ValueError."""
    address = ipaddress.ip_address(text)
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address.scope_id is not None:
        raise ValueError("an address with a zone means something on one machine only")
    return address.ipv4_mapped or address


class Endpoint(str):
    """`host:port`, parsed: an IP address or a host name in its canonical form, and a port from 1 to 65535."""

    host: str
    ip: IpAddress | None
    """None if the host is a name."""
    port: int

    def __new__(cls, text: str) -> Self:
        """Raises AddressError."""
        match = _ENDPOINT.fullmatch(_bounded(text))
        if match is None:
            raise AddressError("an endpoint is an IP address or a host name, and a port: host:port")
        bracketed, plain, port = match.groups()
        ip = _ip6(bracketed) if bracketed else _ip4_or_none(plain)
        host = _name(plain) if ip is None else str(ip)
        self = super().__new__(cls, f"[{host}]:{_port(port)}" if bracketed else f"{host}:{_port(port)}")
        self.host, self.ip, self.port = host, ip, int(port)
        return self

    @classmethod
    def of(cls, host: str, port: int) -> Self:
        """Of a host without brackets. Raises AddressError."""
        return cls(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")

    def at(self, other: "Endpoint") -> "Endpoint":
        """The other one; as `Multiaddress.at` does."""
        return other

    @property
    def scope(self) -> AddressScope | None:
        """None if the host is a name, which may lead anywhere."""
        return None if self.ip is None else scope_of(self.ip)


def _host(text: str) -> str:
    try:
        return Endpoint.of(text, 1).host
    except AddressError:
        raise ValueError("must be an IP address or a host name, without a port") from None


HostName = Annotated[str, AfterValidator(_host)]
"""Where others reach a peer: an IP address, or a name that the peer looks up before it announces itself."""


class Multiaddress(str):
    """A multiaddress of a peer, parsed: the endpoint to dial, and who is there or is relayed to from there."""

    endpoint: Endpoint
    dialled: PeerID
    """Who is at the endpoint: the peer itself, or a relay that leads to it."""
    peer_id: PeerID
    """Whom it leads to."""
    _parts: "_Parts"

    def __new__(cls, text: str) -> Self:
        """Raises AddressError."""
        return cls._of(_parsed(text))

    @classmethod
    def of(cls, endpoint: Endpoint, peer_id: PeerID) -> Self:
        """Without a relay."""
        return cls(f"{multiaddress(endpoint)}/p2p/{peer_id.to_base58()}")

    @classmethod
    def decode(cls, data: bytes, peer_id: PeerID | None = None) -> Self:
        """From p2pd's bytes, which lack the peer itself if it is given. Raises AddressError."""
        parts = _decoded(data)
        return cls._of(parts if peer_id is None else [*parts, (_P2P, peer_id.to_bytes())])

    @classmethod
    def _of(cls, parts: "_Parts") -> Self:
        kinds = tuple(protocol for protocol, _ in parts)
        if kinds[1:] not in _FORMS or kinds[0] not in _HOSTS:
            raise AddressError(
                "a multiaddress of a peer is /ip4/…/tcp/…/p2p/…, and may go on /p2p-circuit/p2p/…"
            )
        self = super().__new__(cls, _text(parts))
        host, port = (protocol.read(value) for protocol, value in parts[:2])
        self.endpoint = Endpoint.of(host, int(port))
        self.dialled, self.peer_id = PeerID(parts[2][1]), PeerID(parts[-1][1])
        self._parts = tuple(parts)
        return self

    def at(self, other: Endpoint) -> "Multiaddress":
        """The same peers at another endpoint."""
        return Multiaddress(multiaddress(other) + _text(self._parts[2:]))

    @property
    def is_relayed(self) -> bool:
        """Whether it leads through a relay."""
        return len(self._parts) > 3

    @property
    def is_public(self) -> bool:
        """Whether its endpoint is an IP address that is reachable from the whole internet."""
        return self.endpoint.scope is AddressScope.GLOBAL

    def to_bytes(self, *, without_peer: bool = False) -> bytes:
        """As p2pd takes it. `without_peer`: without whom it leads to."""
        return _encoded(self._parts[:-1] if without_peer else self._parts)

    def endpoint_bytes(self) -> bytes:
        """The part that says what to dial, in the same form."""
        return _encoded(self._parts[:2])


@dataclass(frozen=True)
class NetworkConfig:
    """Where a peer listens, and how others reach it."""

    listen: str
    """The IP address to listen on."""
    port: int = 0
    """The TCP port to listen on; 0: any free one."""
    announce: Endpoint | None = None
    """Where others reach this peer, when it is not where it listens."""
    serves_dht: bool = True
    """Others connect to it, and it hosts DHT keys and relays for others; without, it is a client."""
    relays: tuple[Multiaddress, ...] = ()
    """Peers by which others reach this one, when they can't connect to it."""
    maps_port: bool = False
    """Asks the router to forward the port (UPnP, NAT-PMP)."""

    @property
    def listening(self) -> str:
        """The multiaddress to listen on, of no peer. Raises ValueError if `listen` is no IP address."""
        return f"/ip{ipaddress.ip_address(self.listen).version}/{self.listen}/tcp/{self.port}"

    @property
    def listens(self) -> bool:
        """A client listens too, unless it is on loopback: others may find a way through its router."""
        return self.serves_dht or bool(self.relays) or not self.listen.startswith("127.")


def default_listen_address() -> str:
    """The first IPv4 address of a network interface that is up, or loopback if there is none."""
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    for name, addresses in sorted(psutil.net_if_addrs().items()):
        for address in addresses:
            if name in up and address.family == socket.AF_INET and not address.address.startswith("127."):
                return str(address.address)
    return "127.0.0.1"


def require_free_port(host: str, port: int) -> None:
    """Raises PortError if the port is taken or the address is not this machine's. Port 0 is always free."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise PortError(
                    f"can't listen on {host}, which is no address of this machine: pass one that `ip address` shows"
                ) from error
            raise PortError(
                f"can't listen on {host} port {port}: {error.strerror}; pass another port"
            ) from error


Address = TypeVar("Address", Endpoint, Multiaddress)


def address_of(peer: str) -> IpAddress | None:
    """The IP address in gRPC's name of a peer, such as `ipv4:192.0.2.7:4711` or `ipv6:%5B::1%5D:4711`."""
    kind, _, rest = unquote(peer).partition(":")
    if kind not in {"ipv4", "ipv6"}:
        return None
    host = rest.rpartition(":")[0].strip("[]")
    try:
        return ip_address(host)
    except ValueError:
        return None


def neighbourhood(address: IpAddress) -> str:
    """What counts as one caller: an IPv4 address, or the 2^64 IPv6 addresses that one line usually has."""
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    return str(ipaddress.IPv6Network((int(address) >> 64 << 64, 64)))


def known(kind: type[Address], texts: Iterable[str], most: int) -> tuple[Address, ...]:
    """The first `most` of these texts, without those that are no address, or one of a kind that is not known here."""
    found = []
    for text in itertools.islice(texts, most):
        with contextlib.suppress(AddressError):
            found.append(kind(text))
    return tuple(dict.fromkeys(found))


def known_bytes(encoded: Iterable[bytes], peer_id: PeerID) -> list[Multiaddress]:
    """The same of a peer's own addresses, from p2pd's bytes."""
    found = []
    for data in encoded:
        with contextlib.suppress(AddressError):
            found.append(Multiaddress.decode(data, peer_id))
    return found


def multiaddress(endpoint: Endpoint) -> str:
    """The multiaddress of an endpoint, whoever is there."""
    kind = "dns" if endpoint.ip is None else f"ip{endpoint.ip.version}"
    return f"/{kind}/{endpoint.host}/tcp/{endpoint.port}"


def is_public(host: str) -> bool:
    """Whether it is an IP address that is reachable from the whole internet."""
    try:
        return scope_of(ip_address(host)) is AddressScope.GLOBAL
    except ValueError:
        return False


def is_circuit(data: bytes) -> bool:
    """Whether p2pd's bytes for the other end of a connection lead through a relay. Those of an unknown kind do not."""
    try:
        return any(protocol is _CIRCUIT for protocol, _ in _decoded(data))
    except AddressError:
        return False


@dataclass(frozen=True)
class _Protocol:
    """One part of a multiaddress, as its table at https://github.com/multiformats/multiaddr lists it."""

    name: str
    code: int
    size: int | None
    """Of its value, in bytes; None: the size comes first."""
    write: Callable[[str], bytes]
    """From text. Raises AddressError."""
    read: Callable[[bytes], str]
    """To the text from which `write` makes the same bytes. Raises AddressError."""


def _bounded(text: str) -> str:
    if len(text) > _MAX_CHARACTERS or not text.isascii():
        raise AddressError(f"an address has at most {_MAX_CHARACTERS} characters, all of them ASCII")
    return text


def _ip4_or_none(text: str) -> ipaddress.IPv4Address | None:
    try:
        return ipaddress.IPv4Address(text)
    except ValueError:
        return None


def _ip4(text: str) -> ipaddress.IPv4Address:
    address = _ip4_or_none(text)
    if address is None:
        raise AddressError("not an IPv4 address")
    return address


def _ip6(text: str) -> ipaddress.IPv6Address:
    """Without a zone, and no IPv4 address in disguise."""
    try:
        address = ipaddress.IPv6Address(text)
    except ValueError as error:
        raise AddressError("not an IPv6 address") from error
    if address.scope_id is not None or address.ipv4_mapped is not None:
        raise AddressError("an IPv6 address has no zone, and an IPv4 address is written as one")
    return address


def _name(text: str) -> str:
    name = text.lower()
    if len(name) > 253 or _NAME.fullmatch(name) is None:
        raise AddressError("not a host name")
    return name


def _port(text: str) -> int:
    if _PORT.fullmatch(text) is None or int(text) > 65535:
        raise AddressError("ports are from 1 to 65535")
    return int(text)


def _peer_bytes(text: str) -> bytes:
    if _PEER_ID.fullmatch(text) is None:
        raise AddressError("not a PeerID")
    data: bytes = base58.b58decode(text)
    if _peer_text(data) != text:
        raise AddressError("not a PeerID")
    return data


def _peer_text(data: bytes) -> str:
    form = _PEER_ID_FORMS.get(len(data))
    if form is None or not data.startswith(form):
        raise AddressError("not a PeerID")
    text: bytes = base58.b58encode(data)
    return text.decode()


def _ascii(data: bytes) -> str:
    try:
        return data.decode("ascii")
    except UnicodeDecodeError as error:
        raise AddressError("not a host name") from error


def _host_name(name: str, code: int) -> _Protocol:
    return _Protocol(name, code, None, lambda text: _name(text).encode(), lambda data: _name(_ascii(data)))


_IP4 = _Protocol("ip4", 4, 4, lambda text: _ip4(text).packed, lambda data: str(ipaddress.IPv4Address(data)))
_IP6 = _Protocol(
    "ip6", 41, 16, lambda text: _ip6(text).packed, lambda data: str(_ip6(str(ipaddress.IPv6Address(data))))
)
_TCP = _Protocol(
    "tcp", 6, 2, lambda text: _port(text).to_bytes(2, "big"), lambda data: str(int.from_bytes(data, "big"))
)
_P2P = _Protocol("p2p", 421, None, _peer_bytes, _peer_text)
_CIRCUIT = _Protocol("p2p-circuit", 290, 0, lambda text: b"", lambda data: "")
_HOSTS = (_IP4, _IP6, _host_name("dns", 53), _host_name("dns4", 54), _host_name("dns6", 55))
_FORMS = ((_TCP, _P2P), (_TCP, _P2P, _CIRCUIT, _P2P))
"""What may follow a host."""
_BY_NAME = {protocol.name: protocol for protocol in (*_HOSTS, _TCP, _P2P, _CIRCUIT)}
_BY_CODE = {protocol.code: protocol for protocol in _BY_NAME.values()}

_Parts: TypeAlias = Sequence[tuple[_Protocol, bytes]]


def _parsed(text: str) -> _Parts:
    first, *words = _bounded(text).split("/")
    if first:
        raise AddressError("a multiaddress begins with /")
    parts = []
    rest = iter(words)
    for word in rest:
        protocol = _BY_NAME.get(word)
        if protocol is None:
            raise AddressError("a multiaddress of a kind that is not known here")
        parts.append((protocol, b"" if protocol.size == 0 else protocol.write(next(rest, ""))))
    return parts


def _text(parts: _Parts) -> str:
    return "".join(f"/{p.name}" if p.size == 0 else f"/{p.name}/{p.read(value)}" for p, value in parts)


def _encoded(parts: _Parts) -> bytes:
    return b"".join(
        _varint(p.code) + (_varint(len(value)) if p.size is None else b"") + value for p, value in parts
    )


def _decoded(data: bytes) -> _Parts:
    parts = []
    at = 0
    while at < len(data):
        code, at = _read_varint(data, at)
        protocol = _BY_CODE.get(code)
        if protocol is None:
            raise AddressError("a multiaddress of a kind that is not known here")
        size, at = _read_varint(data, at) if protocol.size is None else (protocol.size, at)
        value = data[at : at + size]
        if len(value) != size:
            raise AddressError("a multiaddress that is cut off")
        parts.append((protocol, value))
        at += size
    return parts


def _varint(number: int) -> bytes:
    """Of a number below 2^14, as codes and sizes are."""
    return bytes([number]) if number < 128 else bytes([number & 127 | 128, number >> 7])


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """The number, and where it ends."""
    number = shift = 0
    while at < len(data) and shift < 14:
        byte = data[at]
        number |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return number, at
    raise AddressError("a multiaddress that is cut off")
