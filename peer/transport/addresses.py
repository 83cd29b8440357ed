"""Where a peer listens and how others reach it: multiaddresses, in libp2p's notation.

A multiaddress such as /ip4/192.0.2.7/tcp/31337/p2p/Qm… names a peer and its endpoint. One that continues with
/p2p-circuit/p2p/Qm… names the peer that the first one relays to. Strangers write multiaddresses, so there is one strict
grammar and one spelling. Anything else is not stored, dialled or put on a command line.
"""

import contextlib
import errno
import ipaddress
import itertools
import re
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Self, TypeAlias, TypeVar

import base58
import psutil

from peer.errors import AddressError, PortError
from peer.identity import PeerID, is_peer_id
from peer.parsing import read_varint
from peer.transport.endpoints import (
    AddressScope,
    Endpoint,
    bounded,
    parse_ip4,
    parse_ip6,
    parse_name,
    parse_port,
)

_PEER_ID = re.compile(r"Qm[1-9A-HJ-NP-Za-km-z]{44}")


class Multiaddress(str):
    """A peer's multiaddress, parsed: the endpoint to dial, and the peer there or the peer that it relays to."""

    endpoint: Endpoint
    dialled: PeerID
    """The peer at the endpoint: the peer itself, or its relay."""
    peer_id: PeerID
    """The peer that the address leads to."""
    _parts: "_Parts"

    def __new__(cls, text: str) -> Self:
        """Raises AddressError."""
        return cls._of(_parsed(text))

    @classmethod
    def of(cls, endpoint: Endpoint, peer_id: PeerID) -> Self:
        """A multiaddress without a relay."""
        return cls(f"{multiaddress(endpoint)}/p2p/{peer_id.to_base58()}")

    @classmethod
    def decode(cls, data: bytes, peer_id: PeerID | None = None) -> Self:
        """Decodes p2pd's bytes. With `peer_id`, the bytes lack that peer. Raises AddressError."""
        parts = _decoded(data)
        return cls._of(parts if peer_id is None else [*parts, (_P2P, peer_id.to_bytes())])

    @classmethod
    def _of(cls, parts: "_Parts") -> Self:
        kinds = tuple(protocol for protocol, _ in parts)
        if kinds[1:] not in _FORMS or kinds[0] not in _HOSTS:
            raise AddressError(
                "a multiaddress of a peer is /ip4/…/tcp/…/p2p/…, optionally followed by /p2p-circuit/p2p/…"
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
        """Encodes it for p2pd. `without_peer`: leaves out the peer that it leads to."""
        return _encoded(self._parts[:-1] if without_peer else self._parts)

    def endpoint_bytes(self) -> bytes:
        """The part that says what to dial, encoded for p2pd."""
        return _encoded(self._parts[:2])


def default_listen_address() -> str:
    """The first IPv4 address of a network interface that is up, or loopback if there is none."""
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    for name, addresses in sorted(psutil.net_if_addrs().items()):
        for address in addresses:
            if name in up and address.family == socket.AF_INET and not address.address.startswith("127."):
                return str(address.address)
    return "127.0.0.1"


def require_free_port(host: str, port: int) -> None:
    """Raises PortError if the port is taken or the address does not belong to this machine. Port 0 is always free."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise PortError(
                    f"can't listen on {host}, which is not an address of this machine: pass one that `ip address` shows"
                ) from error
            raise PortError(
                f"can't listen on {host} port {port}: {error.strerror}; pass another port"
            ) from error


Address = TypeVar("Address", Endpoint, Multiaddress)


def known(kind: type[Address], texts: Iterable[str], most: int) -> tuple[Address, ...]:
    """Parses the first `most` of these texts, and leaves out those that are not addresses, or are of an unknown
    kind.
    """
    found = []
    for text in itertools.islice(texts, most):
        with contextlib.suppress(AddressError):
            found.append(kind(text))
    return tuple(dict.fromkeys(found))


def known_bytes(encoded: Iterable[bytes], peer_id: PeerID) -> list[Multiaddress]:
    """A peer's own addresses, from p2pd's bytes. Those that are not understood are left out."""
    found = []
    for data in encoded:
        with contextlib.suppress(AddressError):
            found.append(Multiaddress.decode(data, peer_id))
    return found


def multiaddress(endpoint: Endpoint) -> str:
    """The multiaddress of an endpoint, without a peer."""
    kind = "dns" if endpoint.ip is None else f"ip{endpoint.ip.version}"
    return f"/{kind}/{endpoint.host}/tcp/{endpoint.port}"


def is_circuit(data: bytes) -> bool:
    """Whether p2pd's bytes for the other end of a connection lead through a relay. False for an unknown kind."""
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
    """The size of its value, in bytes; None: the value begins with its size."""
    write: Callable[[str], bytes]
    """Encodes text. Raises AddressError."""
    read: Callable[[bytes], str]
    """Decodes a value to the text that `write` encodes to the same bytes. Raises AddressError."""


def _peer_bytes(text: str) -> bytes:
    if _PEER_ID.fullmatch(text) is None:
        raise AddressError("not a PeerID")
    return _checked_peer(base58.b58decode(text))


def _checked_peer(data: bytes) -> bytes:
    if not is_peer_id(data):
        raise AddressError("not a PeerID")
    return data


def _ascii(data: bytes) -> str:
    try:
        return data.decode("ascii")
    except UnicodeDecodeError as error:
        raise AddressError("not a host name") from error


def _host_name(name: str, code: int) -> _Protocol:
    return _Protocol(
        name, code, None, lambda text: parse_name(text).encode(), lambda data: parse_name(_ascii(data))
    )


_IP4 = _Protocol(
    "ip4", 4, 4, lambda text: parse_ip4(text).packed, lambda data: str(ipaddress.IPv4Address(data))
)
_IP6 = _Protocol(
    "ip6",
    41,
    16,
    lambda text: parse_ip6(text).packed,
    lambda data: str(parse_ip6(str(ipaddress.IPv6Address(data)))),
)
_TCP = _Protocol(
    "tcp",
    6,
    2,
    lambda text: parse_port(text).to_bytes(2, "big"),
    lambda data: str(int.from_bytes(data, "big")),
)
_P2P = _Protocol("p2p", 421, None, _peer_bytes, lambda data: PeerID(_checked_peer(data)).to_base58())
_CIRCUIT = _Protocol("p2p-circuit", 290, 0, lambda text: b"", lambda data: "")
_HOSTS = (_IP4, _IP6, _host_name("dns", 53), _host_name("dns4", 54), _host_name("dns6", 55))
_FORMS = ((_TCP, _P2P), (_TCP, _P2P, _CIRCUIT, _P2P))
"""What may follow a host."""
_BY_NAME = {protocol.name: protocol for protocol in (*_HOSTS, _TCP, _P2P, _CIRCUIT)}
_BY_CODE = {protocol.code: protocol for protocol in _BY_NAME.values()}

_Parts: TypeAlias = Sequence[tuple[_Protocol, bytes]]


def _parsed(text: str) -> _Parts:
    first, *words = bounded(text).split("/")
    if first:
        raise AddressError("a multiaddress begins with /")
    parts = []
    rest = iter(words)
    for word in rest:
        protocol = _BY_NAME.get(word)
        if protocol is None:
            raise AddressError("the multiaddress is of an unknown kind")
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
    try:
        while at < len(data):
            code, at = read_varint(data, at)
            protocol = _BY_CODE.get(code)
            if protocol is None:
                raise AddressError("the multiaddress is of an unknown kind")
            size, at = read_varint(data, at) if protocol.size is None else (protocol.size, at)
            parts.append((protocol, data[at : at + size]))
            at += size
    except IndexError:
        at = -1
    if at != len(data):
        raise AddressError("the multiaddress is cut off")
    return parts


def _varint(number: int) -> bytes:
    """The varint of a number below 2^14, such as a code or a size."""
    return bytes([number]) if number < 128 else bytes([number & 127 | 128, number >> 7])
