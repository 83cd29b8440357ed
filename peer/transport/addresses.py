"""Where a peer listens and how others reach it: multiaddresses, in libp2p's notation.

A multiaddress such as /ip4/192.0.2.7/tcp/31337/p2p/Qm… names a peer and its endpoint. One that continues with
/p2p-circuit/p2p/Qm… names the peer that the first one relays to. Strangers write multiaddresses, so there is one strict
grammar and one spelling. Anything else is not stored, dialled or put on a command line.
"""

import contextlib
import errno
import functools
import ipaddress
import itertools
import re
import socket
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Self, TypeVar

import base58
import psutil

from peer.errors import AddressError, PortError
from peer.identity import PeerID, is_peer_id
from peer.transport.endpoints import AddressScope, Endpoint, bounded, ip_address, neighbourhood, parse_port

_PEER = r"Qm[1-9A-HJ-NP-Za-km-z]{44}"
_TEXT = re.compile(rf"/(ip4|ip6|dns[46]?)/([^/]+)/tcp/([0-9]+)/p2p/({_PEER})(?:/p2p-circuit/p2p/({_PEER}))?")
_CODES = {"ip4": b"\x04", "ip6": b"\x29", "dns": b"\x35", "dns4": b"\x36", "dns6": b"\x37"}
"""The kinds of hosts in p2pd's bytes, as the table at https://github.com/multiformats/multiaddr lists them."""
_TCP, _P2P, _CIRCUIT = b"\x06", b"\xa5\x03\x22", b"\xa2\x02"
"""What precedes a port, and a PeerID; and the mark of a relay."""
_DIALLED = (
    rb"(?s)(?:\x04(.{4})|\x29(.{16})|([\x35-\x37])(?:[\x01-\x7f]|[\x80-\xff]\x01)([a-z0-9.-]+))"
    rb"\x06(..)\xa5\x03\x22(\x12\x20.{32})"
)
_BYTES = re.compile(_DIALLED + rb"(?:\xa2\x02\xa5\x03\x22(\x12\x20.{32}))?")
_BYTES_OF_CIRCUIT = re.compile(_DIALLED + _CIRCUIT)
_BYTES_OF_IP = re.compile(rb"(?s)\x04(.{4})|\x29(.{16})")


class Multiaddress(str):
    """A peer's multiaddress, parsed: the endpoint to dial, and the peer there or the peer that it relays to."""

    endpoint: Endpoint
    dialled: PeerID
    """The peer at the endpoint: the peer itself, or its relay."""
    peer_id: PeerID
    """The peer that the address leads to."""

    def __new__(cls, text: str) -> Self:
        """Raises AddressError."""
        match = _TEXT.fullmatch(bounded(text))
        if match is None:
            raise AddressError(
                "a multiaddress of a peer is /ip4/…/tcp/…/p2p/…, optionally followed by /p2p-circuit/p2p/…"
            )
        kind, host, port, dialled, target = match.groups()
        endpoint = Endpoint.of(host, parse_port(port))
        if kind[:3] != _kind_of(endpoint):
            raise AddressError(f"not a host of kind {kind}")
        circuit = "" if target is None else f"/p2p-circuit/p2p/{target}"
        self = super().__new__(cls, f"/{kind}/{endpoint.host}/tcp/{port}/p2p/{dialled}{circuit}")
        self.endpoint, self.dialled = endpoint, _parse_peer(dialled)
        self.peer_id = self.dialled if target is None else _parse_peer(target)
        return self

    @classmethod
    def of(cls, endpoint: Endpoint, peer_id: PeerID, relay: PeerID | None = None) -> Self:
        """`relay`: the peer at the endpoint, if the address leads through a relay."""
        way = f"{peer_id}" if relay is None else f"{relay}/p2p-circuit/p2p/{peer_id}"
        return cls(f"{multiaddress(endpoint)}/p2p/{way}")

    @classmethod
    def decode(cls, data: bytes, peer_id: PeerID | None = None) -> Self:
        """Decodes p2pd's bytes. With `peer_id`, the bytes lack that peer. Raises AddressError."""
        if peer_id is not None:
            data += _P2P + peer_id.to_bytes()
        match = _BYTES.fullmatch(data)
        if match is None:
            raise AddressError("the multiaddress is of an unknown kind, or cut off")
        ip4, ip6, code, name, port, dialled, target = match.groups()
        if name is None:
            kind, host = "ip4" if ip6 is None else "ip6", str(ipaddress.ip_address(ip4 or ip6))
        else:
            kind, host = next(kind for kind, its_code in _CODES.items() if its_code == code), name.decode()
        circuit = "" if target is None else f"/p2p-circuit/p2p/{PeerID(target)}"
        address = cls(f"/{kind}/{host}/tcp/{int.from_bytes(port, 'big')}/p2p/{PeerID(dialled)}{circuit}")
        if address.to_bytes() != data:
            raise AddressError("the multiaddress is not written in the shortest way")
        return address

    def at(self, other: Endpoint) -> "Multiaddress":
        """The same peers at another endpoint."""
        return Multiaddress.of(other, self.peer_id, self.dialled if self.is_relayed else None)

    @property
    def is_relayed(self) -> bool:
        """Whether it leads through a relay."""
        return "/p2p-circuit/" in self

    @property
    def is_public(self) -> bool:
        """Whether its endpoint is an IP address that is reachable from the whole internet."""
        return self.endpoint.scope is AddressScope.GLOBAL

    def to_bytes(self, *, without_peer: bool = False) -> bytes:
        """Encodes it for p2pd. `without_peer`: leaves out the peer that it leads to."""
        data = self.endpoint_bytes()
        if self.is_relayed:
            data += _P2P + self.dialled.to_bytes() + _CIRCUIT
        return data if without_peer else data + _P2P + self.peer_id.to_bytes()

    def endpoint_bytes(self) -> bytes:
        """The part that says what to dial, encoded for p2pd."""
        host, ip = self.endpoint.host.encode(), self.endpoint.ip
        size = bytes([len(host)] if len(host) < 128 else [len(host) & 127 | 128, 1])
        code = _CODES[self.split("/", 2)[1]]
        return (
            code + (size + host if ip is None else ip.packed) + _TCP + self.endpoint.port.to_bytes(2, "big")
        )


def default_listen_address(swarm: Collection[Multiaddress] = ()) -> str:
    """The first IPv4 address of a network interface that is up. Loopback if there is none, or if all addresses of the
    swarm that this machine knows are there: then the whole swarm is on this machine.
    """
    if swarm and all(address.endpoint.scope is AddressScope.LOOPBACK for address in swarm):
        return "127.0.0.1"
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    for name, addresses in sorted(psutil.net_if_addrs().items()):
        for address in addresses:
            if name in up and address.family == socket.AF_INET and not address.address.startswith("127."):
                return str(address.address)
    return "127.0.0.1"


def family_of(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def require_free_port(host: str, port: int) -> None:
    """Raises PortError if the port is taken or the address does not belong to this machine. Port 0 is always free."""
    with socket.socket(family_of(host)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise PortError(
                    f"can't listen on {host}, which is not an address of this machine: pass one that `ip address` "
                    "shows. If others reach this machine there through a router, set announce_host to it instead"
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
    return f"/{_kind_of(endpoint)}/{endpoint.host}/tcp/{endpoint.port}"


@dataclass(frozen=True)
class RemoteEnd:
    """The other end of a connection, as far as it says who may be the same person."""

    neighbourhood: str
    is_relayed: bool

    @classmethod
    def through(cls, relay: PeerID) -> Self:
        """All peers that come through one relay are one neighbourhood."""
        return cls(f"relay {relay}", True)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Decodes p2pd's bytes. Ends of unknown kinds are one neighbourhood."""
        if (circuit := _BYTES_OF_CIRCUIT.match(data)) is not None:
            return cls.through(PeerID(circuit[6]))
        ip = _BYTES_OF_IP.match(data)
        return cls("somewhere" if ip is None else neighbourhood(ip_address(ip[1] or ip[2])), False)


def _kind_of(endpoint: Endpoint) -> str:
    return "dns" if endpoint.ip is None else f"ip{endpoint.ip.version}"


@functools.lru_cache(4096)  # relays and other peers appear in many records, which are renewed all the time
def _parse_peer(text: str) -> PeerID:
    data: bytes = base58.b58decode(text)
    if not is_peer_id(data):
        raise AddressError("not a PeerID")
    return PeerID(data)
