"""Whether an invite lets people in from anywhere, and what its founder can do when it does not. Pure."""

import ipaddress
from collections.abc import Sequence

from peer.transport.addresses import tcp_endpoint


def invite_advice(
    bootstrap: Sequence[str], host: str, dht_port: int, grpc_port: int, *, chosen: bool = True
) -> str:
    """Empty when somebody elsewhere can join by one of these multiaddresses, or when the founder chose loopback.

    `host`: where the founder listens; not `chosen`: the machine's first. A port is 0 when each run has another.
    """
    hosts = [endpoint[0] for endpoint in map(tcp_endpoint, bootstrap) if endpoint is not None]
    if not all(map(_is_private, hosts)):
        return ""
    if ipaddress.ip_address(host).is_loopback:
        return (
            ""
            if chosen
            else "nobody else can join by this invite: no network is up here. Start again once one is"
        )
    named = (
        f"it names only private addresses ({', '.join(dict.fromkeys(hosts))})"
        if hosts
        else "it names no address"
    )
    ports = f"TCP ports {dht_port} and {grpc_port}" if dht_port and grpc_port else "both TCP ports"
    fix = "" if dht_port and grpc_port else "pass --dht-port and --grpc-port, "
    return (
        f"nobody outside this network can join by this invite: {named}. Start again once others reach this machine "
        f"({fix}forward {ports} on your router to {host}, and set announce_host to the router's public address), "
        "found the swarm on a machine with a public address, or pass --bootstrap with the address of any DHT peer that "
        "has one: then others come in and are reached through it"
    )


def _is_private(host: str) -> bool:
    """A name is taken for public: whoever passes one knows why."""
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:
        return False
