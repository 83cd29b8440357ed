"""Endpoints, `host:port` as gRPC dials them, and IP addresses: their grammar, scopes and neighbourhoods.

Strangers write endpoints. Whatever does not match the grammar is not stored, dialled or put on a command line.
"""

import ipaddress
import re
from enum import IntEnum
from functools import lru_cache
from typing import Annotated, Self, TypeAlias
from urllib.parse import unquote

from pydantic import AfterValidator

from peer.errors import AddressError

IpAddress: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address

_MAX_CHARACTERS = 512
"""The limit for one address. A circuit to a host with the longest name has 420 characters."""
_PORT = re.compile(r"[1-9][0-9]{0,4}")
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_NAME = re.compile(rf"(?:{_LABEL}\.)*(?=[a-z]){_LABEL}")
"""The last label begins with a letter, because resolvers read names such as 127.1 and 0x7f000001 as IPv4 addresses."""
_ENDPOINT = re.compile(r"(?:\[([^\[\]]+)\]|([^\[\]:]+)):([0-9]+)")


class AddressScope(IntEnum):
    """How far an IP address is valid."""

    NONE = 0
    """An address that strangers may not name: link-local, multicast, reserved, or a cloud's metadata service."""
    LOOPBACK = 1
    PRIVATE = 2
    """An address in a private network, in a provider's (RFC 6598), or for documentation."""
    GLOBAL = 3


_METADATA = frozenset(
    map(
        ipaddress.ip_address,
        # those of Amazon, Alibaba, Oracle and Azure; the others' are link-local
        ("fd00:ec2::254", "fd20:ce::254", "100.100.100.200", "192.0.0.192", "168.63.129.16"),
    )
)
"""Addresses at which clouds give a machine its secrets."""
_THIS_NETWORK = ipaddress.ip_network("0.0.0.0/8")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_UNICAST = ipaddress.ip_network("2000::/3")
_LINE_BITS = 56


def scope_of(address: IpAddress) -> AddressScope:
    """The scope of an IP address, or of the IPv4 address embedded in it."""
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


def ip_address(text: str | bytes) -> IpAddress:
    """Parses an IP address, also a packed one, and an IPv4 address written as IPv6, such as ::ffff:127.0.0.1. Raises
    ValueError.
    """
    address = ipaddress.ip_address(text)
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address.scope_id is not None:
        raise ValueError("an address with a zone is valid on one machine only")
    return address.ipv4_mapped or address


class Endpoint(str):
    """`host:port`, parsed: an IP address or a host name in its canonical form, and a port from 1 to 65535."""

    __slots__ = ()  # there are thousands of them

    def __new__(cls, text: str) -> Self:
        """Raises AddressError."""
        match = _ENDPOINT.fullmatch(bounded(text))
        if match is None:
            raise AddressError("an endpoint is an IP address or a host name, and a port: host:port")
        bracketed, plain, digits = match.groups()
        port = parse_port(digits)
        if bracketed:
            return super().__new__(cls, f"[{parse_ip6(bracketed)}]:{port}")
        return super().__new__(cls, f"{_ip4_or_none(plain) or parse_name(plain)}:{port}")

    @classmethod
    def of(cls, host: str, port: int) -> Self:
        """The endpoint at a host without brackets. Raises AddressError."""
        return cls(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")

    def at(self, other: "Endpoint") -> "Endpoint":
        """Returns the other endpoint; the counterpart of `Multiaddress.at`."""
        return other

    @property
    def host(self) -> str:
        return self.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self.rpartition(":")[2])

    @property
    def ip(self) -> IpAddress | None:
        """None if the host is a name."""
        return parse_ip6(self.host) if self.startswith("[") else _ip4_or_none(self.host)

    @property
    def near(self) -> str:
        """The neighbourhood of its IP address; a host name stands for itself."""
        ip = self.ip
        return self.host if ip is None else neighbourhood(ip)

    @property
    def scope(self) -> AddressScope | None:
        """None if the host is a name, which may lead anywhere."""
        ip = self.ip
        return None if ip is None else scope_of(ip)


def _host(text: str) -> str:
    try:
        return Endpoint.of(text, 1).host
    except AddressError:
        raise ValueError("must be an IP address or a host name, without a port") from None


HostName = Annotated[str, AfterValidator(_host)]
"""Where others reach a peer: an IP address, or a name that the peer looks up before it announces itself."""


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
    """What counts as one caller: an IPv4 address, or an IPv6 /56 network, which providers are advised to give each home
    (RIPE-690). A line with 256 networks of 64 bits must not count as 256 callers.
    """
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    return str(ipaddress.IPv6Network((int(address), _LINE_BITS), strict=False))


def near(client: str) -> str:
    """The neighbourhood of a client, by its address as a socket gives it; the text itself if it is no IP address."""
    try:
        return neighbourhood(ip_address(client.partition("%")[0]))
    except ValueError:
        return client


def is_public(host: str) -> bool:
    """Whether the host is an IP address that the whole internet can reach."""
    try:
        return scope_of(ip_address(host)) is AddressScope.GLOBAL
    except ValueError:
        return False


def bounded(text: str) -> str:
    """Returns the text. Raises AddressError if it is too long for an address, or not ASCII."""
    if len(text) > _MAX_CHARACTERS or not text.isascii():
        raise AddressError(f"an address has at most {_MAX_CHARACTERS} characters, all of them ASCII")
    return text


@lru_cache(4096)  # a contact's addresses are parsed again for every call to its peer
def _ip4_or_none(text: str) -> ipaddress.IPv4Address | None:
    try:
        return ipaddress.IPv4Address(text)
    except ValueError:
        return None


def parse_ip6(text: str) -> ipaddress.IPv6Address:
    """Parses an IPv6 address without a zone, and without an embedded IPv4 address. Raises AddressError."""
    try:
        address = ipaddress.IPv6Address(text)
    except ValueError as error:
        raise AddressError("not an IPv6 address") from error
    if address.scope_id is not None or address.ipv4_mapped is not None:
        raise AddressError("an IPv6 address has no zone, and an IPv4 address is written as one")
    return address


def parse_name(text: str) -> str:
    """The host name in lower case. Raises AddressError."""
    name = text.lower()
    if len(name) > 253 or _NAME.fullmatch(name) is None:
        raise AddressError("not a host name")
    return name


def parse_port(text: str) -> int:
    """Raises AddressError."""
    if _PORT.fullmatch(text) is None or int(text) > 65535:
        raise AddressError("ports are from 1 to 65535")
    return int(text)
