"""Where Prometheus finds what to scrape: its HTTP service discovery, of every live peer that offers metrics.

An address comes from a record that anybody may write, and whoever runs Prometheus asks there. So only IP addresses
count, and only of the kind that the swarm itself uses: nobody who joins a public swarm can point at this machine or at
the network behind it.
"""

from collections.abc import Iterable
from enum import IntEnum

from peer.transport.addresses import ip_address
from talkoot.dashboard.picture import Json, Picture


class Reach(IntEnum):
    """From where an address can be reached; a swarm reaches as far as its nearest address."""

    LOOPBACK = 0
    PRIVATE = 1
    GLOBAL = 2


def targets(picture: Picture | None, bootstrap: Iterable[str]) -> list[Json]:
    """`bootstrap`: multiaddresses of the swarm's peers."""
    if picture is None:
        return []
    nearest = min(map(_reach_of_multiaddress, bootstrap), default=Reach.GLOBAL)
    groups = []
    for role, rows in (("node", picture.nodes), ("trainer", picture.trainers)):
        found = sorted(
            {
                row["metrics_address"]
                for row in rows
                if row["metrics_address"]
                and row["state"] != "gone"
                and _reach_of(row["metrics_address"].rpartition(":")[0]) >= nearest
            }
        )
        if found:
            groups.append({"targets": found, "labels": {"role": role, "swarm": picture.figures["name"]}})
    return groups


def _reach_of_multiaddress(address: str) -> Reach:
    kind, _, rest = address.strip("/").partition("/")
    if kind not in {"ip4", "ip6"}:
        return Reach.GLOBAL
    return Reach(max(Reach.LOOPBACK, _reach_of(rest.partition("/")[0])))


def _reach_of(host: str) -> int:
    """-1 for what is no address."""
    try:
        address = ip_address(host.strip("[]"))
    except ValueError:
        return -1
    if address.is_link_local or address.is_unspecified or address.is_multicast:
        return -1
    if address.is_loopback:
        return Reach.LOOPBACK
    return Reach.GLOBAL if address.is_global else Reach.PRIVATE
