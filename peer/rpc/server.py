"""A gRPC server: it listens on a port and at the end of this peer's tunnel, opens sessions, and sends calls through a
gate.
"""

import logging
from typing import Any

import grpc
from prometheus_client import CollectorRegistry

from peer.errors import PortError
from peer.identity import Identity, PeerID, pem_of
from peer.loop import Restarts
from peer.rpc.channels import SERVER_OPTIONS
from peer.rpc.connections import Connections
from peer.rpc.gate import CallGate
from peer.rpc.sessions import Sessions, SessionServicer
from peer.transport.addresses import require_free_port
from peer.transport.pipes import Pipe
from peer.wire import session_pb2_grpc

logger: logging.Logger = logging.getLogger(__name__)

_MOST_STREAMS = 4096
"""How many calls gRPC lets begin at the same time. The gate ends those beyond its own limits."""
_GRPC = logging.getLogger("grpc._cython.cygrpc")


class RpcServer:
    """Serves the services that are added to `services`, even after it has started. Stop it when done."""

    def __init__(
        self,
        sessions: Sessions,
        most_calls: int,
        metrics: CollectorRegistry | None = None,
        restarts: Restarts | None = None,
    ) -> None:
        """`most_calls`: of callers in sessions, at the same time, over all services.

        `restarts`: counts handlers that fail unexpectedly.
        """
        _GRPC.addFilter(_is_of_ours)
        self.connections: Connections = Connections(metrics)
        self.gate: CallGate = CallGate(sessions, self.connections, most_calls, metrics, restarts)
        self.services: grpc.aio.Server = grpc.aio.server(
            interceptors=[self.gate], options=SERVER_OPTIONS, maximum_concurrent_rpcs=_MOST_STREAMS
        )
        session_pb2_grpc.add_SessionServiceServicer_to_server(SessionServicer(sessions), self.services)

    async def start(self, credentials: grpc.ServerCredentials, host: str, port: int) -> int:
        """Listens on an address of this machine. Returns the port. `port`: 0 for any free one. Raises PortError."""
        require_free_port(host, port)
        try:
            within = self.connections.server
            within.bound(self.services.add_secure_port(within.to_bind, credentials))
        except RuntimeError as error:
            raise PortError("can't listen in the temporary folder: set TMPDIR to another folder") from error
        await self.services.start()
        return await self.connections.listen(host, port)

    async def open_for(self, caller: PeerID, origin: str) -> Pipe:
        """See `Connections.open_for`."""
        return await self.connections.open_for(caller, origin)

    async def stop(self, grace_s: float | None) -> None:
        """Ends calls that are still in progress after the grace period. Stopping twice is harmless."""
        self.connections.stop_listening()
        await self.services.stop(grace_s)
        await self.connections.close()


def server_credentials(identity: Identity, certificate: bytes) -> grpc.ServerCredentials:
    """TLS with this peer's key and its certificate, as in messages."""
    return grpc.ssl_server_credentials([(identity.private_key_pem(), pem_of(certificate))])


def _is_of_ours(record: logging.LogRecord) -> bool:
    """Drops log lines of gRPC that report no problem: that a caller which has left took no message or status, and that
    a service was added after the start.
    """
    if str(record.msg).startswith("Cannot register method handlers"):
        return False
    error: Any = record.exc_info[1] if record.exc_info else None
    if isinstance(error, grpc.aio.InternalError):
        logger.debug("a call ended before its answer: %s", error)
        return False
    return True
