"""Serves Prometheus metrics over HTTP, on loopback unless told otherwise.

How values are spread: counts in buckets, as a Prometheus histogram has them.
"""

import errno
import ipaddress
import logging
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server

from peer.errors import PortError

logger = logging.getLogger(__name__)


class MetricsServer:
    """An HTTP server on a thread of its own. Close it when done."""

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        """Port 0 takes a free one. Raises PortError when the port is taken or the address is not this machine's."""
        ProcessCollector(registry=registry)
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=registry)
        except OSError as error:
            other = "--metrics-port" if error.errno == errno.EADDRINUSE else "--metrics-host"
            raise PortError(
                f"can't serve metrics on {host} port {port}: {error.strerror}; pass another {other}"
            ) from error
        self._server.handle_error = _note_broken_off  # type: ignore[method-assign]  # its own prints a traceback
        self._host, self._port = host, int(self._server.server_port)
        self.address = f"http://{_endpoint(host, self._port)}/metrics"

    def offered(self, reached_at: str | None) -> str:
        """Where others can scrape, `IP address:port`; empty when nobody else can.

        `reached_at`: the IP address by which others reach this peer, if it is known. Loopback is offered in a swarm
        that is all on loopback.
        """
        address, reached = _address(self._host), _address(reached_at)
        if address is not None and address.is_unspecified:
            address = reached
        if address is None or (address.is_loopback and (reached is None or not reached.is_loopback)):
            return ""
        return _endpoint(str(address), self._port)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _note_broken_off(request: Any, client_address: Any) -> None:
    logger.debug("a scrape by %s broke off", client_address, exc_info=True)


def _address(host: str | None) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return None if host is None else ipaddress.ip_address(host)
    except ValueError:
        return None


def _endpoint(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Bounds for how long calls and computations take."""


class Distribution:
    """Counts values. As large after many as after few."""

    def __init__(self, bounds: Sequence[float]) -> None:
        """`bounds`: the upper ones, ascending; there is one bucket more, for what lies beyond."""
        self.total = 0.0
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)

    @property
    def count(self) -> int:
        return sum(self._counts)

    def note(self, value: float) -> None:
        self.total += value
        self._counts[bisect_left(self._bounds, value)] += 1

    def buckets(self) -> list[tuple[str, float]]:
        """Upper bound → how many values are no larger."""
        counts, so_far = list(self._counts), 0
        found = []
        for bound, count in zip([*map(str, self._bounds), "+Inf"], counts, strict=True):
            so_far += count
            found.append((bound, float(so_far)))
        return found
