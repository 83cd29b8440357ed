"""What all metrics have in common, and the HTTP server that exposes them to Prometheus. These are the rules for a class
that has metrics:

- Its constructor takes `metrics: CollectorRegistry | None = None` and makes `Counter`, `Gauge` and `Histogram` objects
  with `registry=metrics`. With None they count and are not exposed, which is what unit tests want. The name is not
  `registry`, because that is the DHT's.
- Joining a swarm makes one registry, `Swarm.metrics`, with `new_registry`; a role passes it to all its parts. A name
  can be registered only once, so a metric that must outlive a part is made by the part's owner.
- A label's values are a fixed set that no peer chooses. `start_at_zero` makes all of them show from the start.
- A quantity that can be read at any time is a gauge with `set_function`. The function runs on the thread of the scrape,
  so it reads plain values and lengths only. If it is not known, it is NaN, which Prometheus shows as a gap.
- Code and tests read a metric back with `total` and `totals`. There are no counters beside the metrics.
"""

import errno
import ipaddress
import logging
import selectors
import socket
import threading
import time
from collections import Counter as Counts
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, TypeVar
from wsgiref.simple_server import WSGIRequestHandler

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    make_wsgi_app,
)
from prometheus_client.exposition import ThreadingWSGIServer

from peer.bounded import Displacement, Owner
from peer.errors import PortError
from peer.formatting import endpoint, host_in, is_loopback

logger: logging.Logger = logging.getLogger(__name__)

M = TypeVar("M", Counter, Gauge, Histogram)

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Buckets for how long calls and computations take."""
_MOST_SCRAPES = 16
"""Scrapes at the same time. Neighbourhoods share them fairly; connections beyond that are closed."""
_LONGEST_SCRAPE_S = 10.0
"""How long a scrape may take in all, however its client trickles."""
_LOOK_EVERY_S = 0.5
"""How often scrapes that last too long are looked for."""
_Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def new_registry() -> CollectorRegistry:
    """An empty registry, for one peer in one swarm. Metrics do not show when they were created."""
    disable_created_metrics()  # type: ignore[no-untyped-call]  # as its documentation shows
    return CollectorRegistry()


def start_at_zero(metric: M, *values: str) -> M:
    """Creates the series for each value of the metric's only label, so that a rate includes the first event."""
    for value in values:
        metric.labels(value)
    return metric


def total(metric: Counter | Gauge | Histogram, **labels: str) -> float:
    """The metric's value, summed over all series that have these labels. For a histogram, the number of
    observations.
    """
    (family,) = metric.collect()
    wanted = {Counter: "_total", Gauge: "", Histogram: "_count"}[type(metric)]
    return sum(
        sample.value
        for sample in family.samples
        if sample.name == family.name + wanted and labels.items() <= sample.labels.items()
    )


def totals(metric: Counter, label: str) -> dict[str, float]:
    """What was counted, by the value of one label."""
    (family,) = metric.collect()
    found: dict[str, float] = {}
    for sample in family.samples:
        if sample.name == family.name + "_total":
            value = sample.labels[label]
            found[value] = found.get(value, 0.0) + sample.value
    return found


class MetricsServer:
    """Exposes a registry over HTTP, on a thread of its own. Close it when done.

    On loopback it answers only requests for a loopback host: otherwise any web page could read a visitor's metrics,
    through a name that resolves to 127.0.0.1 (DNS rebinding).
    """

    def __init__(
        self, registry: CollectorRegistry, host: str, port: int, near: Callable[[str], str] = str
    ) -> None:
        """Port 0 takes a free one. `near`: the neighbourhood of a client, by its address. Raises PortError if the port
        is taken or the address is not this machine's.
        """
        ProcessCollector(registry=registry)
        try:
            self._server = _Server(host, port, near)
        except UnicodeError as error:  # such as an address with two dots side by side
            raise PortError(
                f"can't serve metrics on {host}, which is no host name: pass another --metrics-host"
            ) from error
        except OSError as error:
            other = "--metrics-port" if error.errno == errno.EADDRINUSE else "--metrics-host"
            raise PortError(
                f"can't serve metrics on {host} port {port}: {error.strerror}; pass another {other}"
            ) from error
        answer = make_wsgi_app(registry)
        self._server.set_app(_for_loopback_alone(answer) if is_loopback(host) else answer)
        self._host, self._port = host, int(self._server.server_port)
        self.address: str = f"http://{endpoint(host, self._port)}/metrics"
        self._thread = threading.Thread(target=self._server.serve, name="serve metrics", daemon=True)
        self._thread.start()

    def offered(self, reached_at: str | None) -> str:
        """Where others can scrape this server, as `IP address:port`; empty if nobody else can.

        `reached_at`: the IP address by which others reach this peer, if it is known. Loopback is offered in a swarm
        that is entirely on loopback.
        """
        address, reached = _address(self._host), _address(reached_at)
        if address is not None and address.is_unspecified:
            address = reached
        if address is None or (address.is_loopback and (reached is None or not reached.is_loopback)):
            return ""
        return endpoint(str(address), self._port)

    def close(self) -> None:
        self._server.end()
        self._thread.join()
        self._server.server_close()


class _Handler(WSGIRequestHandler):
    timeout = 10.0
    """Seconds to wait for each part of a request."""

    def log_message(self, format: str, *args: object) -> None: ...  # it would print every request


class _Server(ThreadingWSGIServer):
    timeout = 0.0
    """`handle_request` is called once a connection is there."""
    request_queue_size = 128
    """With the default of 5, clients that connect at the same time may wait for seconds until they try again."""

    def __init__(self, host: str, port: int, near: Callable[[str], str]) -> None:
        self._near = near
        self._lock = threading.Lock()
        self._scrapes: dict[socket.socket, tuple[Owner, float]] = {}
        """The connections that are answered, the oldest first: their neighbourhoods, and when they must end."""
        self.address_family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        self._waker, self._woken = socket.socketpair()
        super().__init__((str(address[0]), int(address[1])), _Handler)

    def serve(self) -> None:
        """Answers scrapes until `end`. Unlike `serve_forever`, it then ends at once, and not at its next look."""
        with selectors.DefaultSelector() as selector:
            selector.register(self, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while True:
                ready = {key.fileobj for key, _ in selector.select(_LOOK_EVERY_S)}
                if self._woken in ready:
                    return
                if ready:
                    self.handle_request()
                self._end_long_scrapes()

    def end(self) -> None:
        self._waker.close()

    def server_close(self) -> None:
        super().server_close()
        self._waker.close()
        self._woken.close()

    def verify_request(self, request: Any, client_address: Any) -> bool:
        owner = Owner.alone(self._near(client_address[0]))
        with self._lock:
            if len(self._scrapes) >= _MOST_SCRAPES:
                held = Counts(each for each, _ in self._scrapes.values())
                richest = Displacement(held, owner, 1).richest()
                if richest is None:
                    return False
                self._break_off(next(each for each, (of, _) in self._scrapes.items() if of == richest))
            self._scrapes[request] = owner, time.monotonic() + _LONGEST_SCRAPE_S
        return True

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                self._scrapes.pop(request, None)

    def _end_long_scrapes(self) -> None:
        with self._lock:
            now = time.monotonic()
            for request in [each for each, (_, ends_at) in self._scrapes.items() if ends_at < now]:
                self._break_off(request)

    def _break_off(self, request: socket.socket) -> None:
        """Its thread then ends by itself."""
        del self._scrapes[request]
        with suppress(OSError):
            request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("a scrape by %s broke off", client_address, exc_info=True)


def _for_loopback_alone(answer: _Application) -> _Application:
    def guarded(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if is_loopback(host_in(environ.get("HTTP_HOST", ""))):
            return answer(environ, start_response)
        start_response("421 Misdirected Request", [("Content-Type", "text/plain")])
        return [b"these metrics are served at 127.0.0.1 and localhost alone\n"]

    return guarded


def _address(host: str | None) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return None if host is None else ipaddress.ip_address(host)
    except ValueError:
        return None
