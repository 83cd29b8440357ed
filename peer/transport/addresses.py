"""Where a peer listens and how others reach it: its network settings, IP addresses and libp2p's multiaddresses.

A multiaddress such as /ip4/192.0.2.7/tcp/31337/p2p/Qm… names a peer and its endpoint, or the relay that reaches it.
"""

import errno
import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias
from urllib.parse import unquote

import psutil
from hivemind.utils.multiaddr import Multiaddr

from peer.errors import PortError
from peer.identity import PeerID

IpAddress: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address

_CIRCUIT = "p2p-circuit"
_CIRCUIT_BYTES = b"\xa2\x02"
_P2P_BYTES = b"\xa5\x03"
"""Protocol codes, as varints."""


@dataclass(frozen=True)
class NetworkConfig:
    """Where a peer listens, and how others reach it."""

    listen: str
    """The IP address to listen on."""
    port: int = 0
    """The TCP port to listen on; 0: any free one."""
    announce: str | None = None
    """The multiaddress by which others reach this peer, when it is not where it listens."""
    serves_dht: bool = True
    """Others connect to it, and it hosts DHT keys and relays for others; without, it is a client."""
    relays: tuple[str, ...] = ()
    """Multiaddresses of peers by which others reach this one, when they can't connect to it."""
    maps_port: bool = False
    """Asks the router to forward the port (UPnP, NAT-PMP)."""

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


def ip_address(text: str) -> IpAddress:
    """Parses an IP address; an IPv4 address written as IPv6, such as ::ffff:127.0.0.1, too. Raises ValueError."""
    address = ipaddress.ip_address(text)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


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


def multiaddress(host: str, port: int) -> str:
    """The multiaddress of a TCP port at an IP address or host name."""
    try:
        family = f"ip{ipaddress.ip_address(host).version}"
    except ValueError:
        family = "dns"
    return f"/{family}/{host}/tcp/{port}"


def tcp_endpoint(address: str) -> tuple[str, int] | None:
    """Host and port at the start of a multiaddress, which are the relay's if there is one. None if it has none."""
    parts = address.strip("/").split("/")
    if len(parts) >= 4 and parts[0] in {"ip4", "ip6", "dns", "dns4", "dns6"} and parts[2] == "tcp":
        return parts[1], int(parts[3])
    return None


def is_relayed(address: str) -> bool:
    """Whether the address leads through a relay."""
    return f"/{_CIRCUIT}" in address


def is_public(address: str) -> bool:
    """Whether it names an IP address that is reachable from the whole internet."""
    endpoint = tcp_endpoint(address)
    try:
        return endpoint is not None and ip_address(endpoint[0]).is_global
    except ValueError:
        return False


def is_multiaddress(text: str) -> bool:
    """Whether the text is a multiaddress with an endpoint and a PeerID, such as /ip4/10.0.0.1/tcp/31337/p2p/Qm…"""
    where, _, who = text.rpartition("/p2p/")
    try:
        return bool(where and "/" not in who and Multiaddr(text) and Multiaddr(f"/p2p/{who}")["p2p"])
    except (ValueError, LookupError):  # parse errors are ValueErrors; LookupError: it names no peer
        return False


def multiaddress_bytes(address: str) -> bytes:
    """Encodes a multiaddress for p2pd. Raises ValueError.

    hivemind encodes the PeerID of a relay as a CID, but p2pd expects the bare hash.
    """
    where, *peers = address.split("/p2p/")
    encoded = bytes(Multiaddr(where).to_bytes()) if where else b""
    for peer in peers:
        name, _, rest = peer.partition("/")
        if rest not in {"", _CIRCUIT}:
            raise ValueError(f"no address of a peer: {address!r}")
        who = PeerID.from_base58(name).to_bytes()
        encoded += _P2P_BYTES + bytes([len(who)]) + who + (_CIRCUIT_BYTES if rest else b"")
    return encoded


def tunnel_addresses_of(peer_id: PeerID, addresses: Sequence[str], most: int = 8) -> tuple[str, ...]:
    """The well-formed addresses of the peer itself, among those it announces."""
    own = f"/p2p/{peer_id.to_base58()}"
    return tuple(a for a in addresses[:most] if len(a) <= 256 and a.endswith(own) and is_multiaddress(a))
