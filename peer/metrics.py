"""Serves Prometheus metrics over HTTP, on loopback unless told otherwise."""

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server

from peer.errors import PortError


class MetricsServer:
    """An HTTP server on a thread of its own. Close it when done."""

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        """Port 0 takes a free one. Raises PortError when the port is taken."""
        ProcessCollector(registry=registry)
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=registry)
        except OSError as error:
            raise PortError(
                f"can't serve metrics on {host} port {port}: {error.strerror}; pass another --metrics-port"
            ) from error
        self.address = f"http://{host}:{self._server.server_port}/metrics"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
