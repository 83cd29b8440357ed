"""The standard gRPC health service, by which load balancers and orchestrators ask whether a node serves."""

from collections.abc import Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from peer.wire import expert_pb2

_SERVICES = ("", expert_pb2.DESCRIPTOR.services_by_name["ExpertService"].full_name)
"""The node as a whole, and the service that trainers call."""


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # grpc_health has no types
    """Says SERVING while the node serves experts, and NOT_SERVING before, in pauses and when it leaves."""

    def __init__(self, serves: Callable[[], bool]) -> None:
        self._serves = serves

    async def Check(self, request: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> Any:
        """NOT_FOUND for a service that is not known, as the protocol has it."""
        if request.service not in _SERVICES:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"health is known of {_SERVICES[1]!r} and of ''")
        status = health_pb2.HealthCheckResponse
        return status(status=status.SERVING if self._serves() else status.NOT_SERVING)

    async def Watch(self, request: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> None:
        """Refused, and clients fall back to Check: streams without end would take the places of calls."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "ask with Check")
