"""The metrics' HTTP server."""

import socket
import struct
import time
import urllib.request

import pytest
from prometheus_client import CollectorRegistry

from peer.metrics import MetricsServer


def test_a_scrape_that_breaks_off_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    server = MetricsServer(CollectorRegistry(), "127.0.0.1", 0)
    try:
        port = int(server.address.removesuffix("/metrics").rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port)) as caller:
            caller.sendall(b"GET /met")
            time.sleep(0.1)  # the server reads now
            caller.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )  # closes by a reset
        time.sleep(0.2)
        with urllib.request.urlopen(server.address, timeout=10) as answer:
            assert b"process_cpu_seconds_total" in answer.read()
    finally:
        server.close()
    assert "Traceback" not in capfd.readouterr().err
