"""Metrics are read back by their labels, and served over HTTP."""

import socket
import struct
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from peer.errors import PortError
from peer.metrics import MetricsServer, new_registry, start_at_zero, total


def test_a_metric_is_read_back_by_its_labels() -> None:
    moved = Counter("moved", "Bytes.", ["way"], registry=None)
    moved.labels("up").inc(3)
    moved.labels("down").inc(4)
    assert (total(moved, way="up"), total(moved)) == (3, 7)
    assert total(moved, way="sideways") == 0


def test_gauges_and_histograms_are_read_back() -> None:
    level, took = Gauge("level", "Now.", registry=None), Histogram("took", "Seconds.", registry=None)
    level.set_function(lambda: 5)
    took.observe(0.1)
    took.observe(9.0)
    assert (total(level), total(took)) == (5, 2)


def test_every_value_of_a_label_shows_from_the_start() -> None:
    registry = new_registry()
    start_at_zero(Counter("ends", "How it ended.", ["end"], registry=registry), "well", "badly")
    assert [registry.get_sample_value("ends_total", {"end": end}) for end in ("well", "badly")] == [0, 0]


def test_nothing_is_exposed_of_when_a_metric_was_made() -> None:
    registry = new_registry()
    Counter("things", "Things.", registry=registry).inc()
    assert b"created" not in generate_latest(registry)


def test_what_is_no_host_name_is_refused() -> None:
    with pytest.raises(PortError, match=r"127\.0\.\.1, .*--metrics-host"):
        MetricsServer(CollectorRegistry(), "127.0..1", 0)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def asked(server: MetricsServer, host: str) -> int:
    request = urllib.request.Request(server.address, headers={"Host": host})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_on_loopback_only_its_own_names_are_answered() -> None:
    server = MetricsServer(CollectorRegistry(), "127.0.0.1", 0)
    try:
        assert [asked(server, host) for host in ("localhost:9100", "127.0.0.1", "[::1]:1")] == [200] * 3
        assert [asked(server, host) for host in ("evil.example", "localhost.evil:1", "")] == [421] * 3
    finally:
        server.close()


def test_elsewhere_any_name_is_answered() -> None:
    server = MetricsServer(CollectorRegistry(), "0.0.0.0", 0)
    try:
        server.address = server.address.replace("0.0.0.0", "127.0.0.1")
        assert asked(server, "node.example") == 200
    finally:
        server.close()


def test_callers_that_say_nothing_take_few_threads() -> None:
    server = MetricsServer(CollectorRegistry(), "127.0.0.1", 0)
    port = int(server.address.removesuffix("/metrics").rsplit(":", 1)[1])
    before = threading.active_count()
    callers = [socket.create_connection(("127.0.0.1", port)) for _ in range(64)]
    try:
        for caller in callers[-40:]:  # these are closed
            caller.settimeout(60)
            assert caller.recv(1) == b""
        assert threading.active_count() <= before + 24
    finally:
        for caller in callers:
            caller.close()
        wait_until(lambda: threading.active_count() <= before)
        assert asked(server, "localhost") == 200
        server.close()


def test_a_scrape_that_breaks_off_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    server = MetricsServer(CollectorRegistry(), "127.0.0.1", 0)
    try:
        port = int(server.address.removesuffix("/metrics").rsplit(":", 1)[1])
        before = set(threading.enumerate())
        with socket.create_connection(("127.0.0.1", port)) as caller:
            caller.sendall(b"GET /met")
            wait_until(lambda: not before.issuperset(threading.enumerate()))  # the server reads now
            caller.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )  # closes by a reset
        wait_until(lambda: before.issuperset(threading.enumerate()))
        with urllib.request.urlopen(server.address, timeout=60) as answer:
            assert b"process_cpu_seconds_total" in answer.read()
    finally:
        server.close()
    assert "Traceback" not in capfd.readouterr().err


def test_a_server_closes_at_once_though_it_seldom_looks_for_long_scrapes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("peer.metrics._LOOK_EVERY_S", 3600.0)
    server = MetricsServer(CollectorRegistry(), "127.0.0.1", 0)
    assert asked(server, "localhost") == 200
    server.close()
    with pytest.raises(urllib.error.URLError, match="refused"):
        asked(server, "localhost")


@pytest.fixture
def trickled() -> Iterator[tuple[MetricsServer, list[socket.socket]]]:
    """A server, and more clients at one address than it serves at a time. Each has sent half of a request."""
    server = MetricsServer(CollectorRegistry(), "127.0.0.1", 0)
    clients = []
    for _ in range(20):
        client = socket.create_connection(("127.0.0.1", server._port))
        client.sendall(b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n")
        clients.append(client)
    yield server, clients
    for client in clients:
        client.close()
    server.close()


def test_clients_that_trickle_do_not_keep_others_from_the_metrics(
    trickled: tuple[MetricsServer, list[socket.socket]],
) -> None:
    server, _ = trickled
    with socket.create_connection(("127.0.0.1", server._port), 60, ("127.0.0.2", 0)) as other:
        other.sendall(b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert other.recv(12) == b"HTTP/1.0 200"


def test_a_request_that_trickles_is_ended(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr("peer.metrics._LONGEST_SCRAPE_S", 0.5)
    _, clients = request.getfixturevalue("trickled")
    wait_until(lambda: all(has_ended(client) for client in clients))


def has_ended(client: socket.socket) -> bool:
    """Sends one byte more."""
    try:
        client.sendall(b"x")
        client.settimeout(0.01)
        return client.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True
