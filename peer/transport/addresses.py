"""libp2p's addresses, such as /ip4/192.0.2.7/tcp/31337/p2p/Qm…: where a peer is, and by which relay it is reached."""

import ipaddress
from collections.abc import Sequence
from typing import TypeAlias

from hivemind.p2p import PeerID
from hivemind.utils.multiaddr import Multiaddr

_CIRCUIT = "p2p-circuit"
_CIRCUIT_BYTES = b"\xa2\x02"
_P2P_BYTES = b"\xa5\x03"
"""The codes of both protocols, as varints."""


IpAddress: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address


def ip_address(text: str) -> IpAddress:
    """An IPv4 address also where it is written as IPv6, such as ::ffff:127.0.0.1. Raises ValueError."""
    address = ipaddress.ip_address(text)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def multiaddress(host: str, port: int) -> str:
    """Of an IP address or host name, and a TCP port."""
    try:
        family = f"ip{ipaddress.ip_address(host).version}"
    except ValueError:
        family = "dns"
    return f"/{family}/{host}/tcp/{port}"


def tcp_endpoint(address: str) -> tuple[str, int] | None:
    """Host and port of a multiaddress that begins with them; of the relay where there is one."""
    parts = address.strip("/").split("/")
    if len(parts) >= 4 and parts[0] in {"ip4", "ip6", "dns", "dns4", "dns6"} and parts[2] == "tcp":
        return parts[1], int(parts[3])
    return None


def is_relayed(address: str) -> bool:
    """Whether the address leads through a relay."""
    return f"/{_CIRCUIT}" in address


def is_public(address: str) -> bool:
    """Whether it names an IP address that the whole internet reaches."""
    endpoint = tcp_endpoint(address)
    try:
        return endpoint is not None and ip_address(endpoint[0]).is_global
    except ValueError:
        return False


def is_multiaddress(text: str) -> bool:
    """Whether the text is a multiaddress that says who and where a peer is, such as /ip4/10.0.0.1/tcp/31337/p2p/Qm…"""
    where, _, who = text.rpartition("/p2p/")
    try:
        return bool(where and "/" not in who and Multiaddr(text) and Multiaddr(f"/p2p/{who}")["p2p"])
    except (
        ValueError,
        LookupError,
    ):  # of the former are its parse errors; the latter for a protocol it lacks
        return False


def multiaddress_bytes(address: str) -> bytes:
    """As p2pd reads it. Raises ValueError.

    hivemind writes the PeerID of a relay as a CID, which p2pd refuses: it expects the bare hash.
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
    """Of what a peer says, what are well-formed addresses of itself."""
    own = f"/p2p/{peer_id.to_base58()}"
    return tuple(a for a in addresses[:most] if len(a) <= 256 and a.endswith(own) and is_multiaddress(a))
