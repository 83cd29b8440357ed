"""The gRPC server of a node: its services, behind one port and behind the tunnel's exit."""

from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2_grpc

from expert_server.health import HealthServicer
from expert_server.probe import ProbeServicer
from expert_server.reaching import endpoint
from expert_server.serving.servicer import ExpertServicer
from expert_server.state.servicer import StateServicer
from peer.errors import PortError
from peer.host import require_free_port
from peer.server import make_server
from peer.rpc.sessions import SessionServicer
from peer.wire import expert_pb2_grpc, probe_pb2_grpc, session_pb2_grpc, state_pb2_grpc


@dataclass(frozen=True)
class Services:
    """What a node answers."""

    experts: ExpertServicer
    states: StateServicer
    sessions: SessionServicer
    probe: ProbeServicer
    health: HealthServicer


async def start_server(
    services: Services,
    credentials: grpc.ServerCredentials,
    host: str,
    port: int,
    max_calls: int,
    tunnel_exit: Path,
) -> tuple[grpc.aio.Server, int]:
    """Serves on an address of this machine and on a unix socket. Gives the server and its port.

    `port`: 0 for one that is free. `max_calls`: at once, of all services. Raises PortError when it can't listen there.
    """
    require_free_port(host, port)
    server = make_server(max_calls)
    expert_pb2_grpc.add_ExpertServiceServicer_to_server(services.experts, server)
    state_pb2_grpc.add_StateServiceServicer_to_server(services.states, server)
    session_pb2_grpc.add_SessionServiceServicer_to_server(services.sessions, server)
    probe_pb2_grpc.add_ProbeServiceServicer_to_server(services.probe, server)
    health_pb2_grpc.add_HealthServicer_to_server(services.health, server)
    try:
        bound = server.add_secure_port(endpoint(host, port), credentials)
        server.add_secure_port(f"unix:{tunnel_exit}", credentials)
    except RuntimeError as error:
        raise PortError(f"can't listen on {host} port {port}: pass another port") from error
    await server.start()
    return server, bound
