"""A program of its own that asks the router by UPnP to forward a TCP port of this machine. `port_mapping` runs it.

miniupnpc blocks, reads as much as a router sends, and parses it in C. Here it has bounded memory, can be killed, and
takes nothing else down with it. Nothing of Talkoot is imported, so that it starts in some hundredths of a second.

    python upnp.py map|unmap|look HOST PORT [EXTERNAL_PORT ...]

prints JSON: `router`, its address here; `address`, the one on the internet; `port`, the external port that leads to
HOST and PORT; `refusal`, why there is none, and all there is without miniupnpc. An empty object says that no router
answers, or none that makes sense.
"""

import ipaddress
import json
import sys
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

try:
    import miniupnpc
except ImportError:  # it has no wheels for Python 3.14 yet
    miniupnpc = None

DESCRIPTION = "talkoot"
_LEASE_S = 3600
_SEARCH_MS = {"map": 2000, "unmap": 1000, "look": 2000}
"""How long to wait for answers. A router that is already known needs less time."""
_CONFLICT, _ONLY_PERMANENT = "ConflictInMappingEntry", "OnlyPermanentLeasesSupported"
"""miniupnpc's names for the errors 718 and 725."""


def answer(command: str, host: str, port: int, external_ports: Sequence[int]) -> dict[str, Any]:
    """Does what the command says."""
    if miniupnpc is None:
        return {"refusal": "miniupnpc is not installed: use Python 3.13, or forward the port by hand"}
    igd = miniupnpc.UPnP(multicastif=host, discoverdelay=_SEARCH_MS[command])
    try:
        igd.discover()
        router = ipaddress.IPv4Address(urlsplit(igd.selectigd()).hostname or "")
        address = ipaddress.IPv4Address(igd.externalipaddress())
    except Exception:  # miniupnpc raises nothing else, and an address may be none  # noqa: BLE001
        return {}
    said: dict[str, Any] = {"router": str(router), "address": str(address)}
    if command == "map" and address.is_global:
        said |= _map(igd, host, port, external_ports)
    elif command == "unmap":
        for external in external_ports:
            if _leads_to(igd, external) == (host, port):
                igd.deleteportmapping(external, "TCP")
    return said


def _map(igd: Any, host: str, port: int, external_ports: Sequence[int]) -> dict[str, Any]:
    """Maps the first external port that is free, or renews one that already leads here."""
    refusal = "all of the ports that were tried are taken"
    for external in external_ports:
        if _leads_to(igd, external) not in {None, (host, port)}:
            continue
        for lease_s in (_LEASE_S, 0):
            try:
                igd.addportmapping(external, "TCP", host, port, DESCRIPTION, "", lease_s)
            except Exception as error:  # as above  # noqa: BLE001
                if str(error) == _ONLY_PERMANENT:
                    continue
                if str(error) != _CONFLICT:
                    refusal = str(error)
                break
            return {"port": external}
    return {"refusal": refusal}


def _leads_to(igd: Any, external: int) -> tuple[str, int] | None:
    """Where an external port leads. Some routers give a port away that another machine has, so they are asked first."""
    try:
        found = igd.getspecificportmapping(external, "TCP")
    except Exception:  # as above  # noqa: BLE001
        return None
    return None if found is None else (found[0], found[1])


if __name__ == "__main__":
    command, host, port, *external_ports = sys.argv[1:]
    json.dump(answer(command, host, int(port), [*map(int, external_ports)]), sys.stdout)
