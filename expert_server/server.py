"""A node's services on its gRPC server, its health service, and access control."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NoReturn

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dht.admission import invite_error
from dht.invites import InviteLedger
from dht.swarm import Swarm
from expert_server.credit import CreditServicer
from expert_server.memory.servicer import MemoryServicer
from expert_server.probe import ProbeServicer
from expert_server.serving.servicer import ExpertServicer
from expert_server.state.servicer import StateServicer
from peer import clock
from peer.errors import ExpiredTokenError, InviteError, RecordError, StartError, UnreachableError
from peer.rpc.sessions import Sessions
from peer.wire import (
    credit_pb2_grpc,
    expert_pb2,
    expert_pb2_grpc,
    memory_pb2_grpc,
    probe_pb2_grpc,
    state_pb2_grpc,
)

logger: logging.Logger = logging.getLogger(__name__)

_SERVICES = ("", expert_pb2.DESCRIPTOR.services_by_name["ExpertService"].full_name)
"""The node as a whole, and the service that trainers call."""


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # grpc_health has no types
    """The standard gRPC health service: SERVING while the node serves experts, else NOT_SERVING.

    Load balancers and orchestrators ask it. A node that starts, pauses or leaves is not serving.
    """

    def __init__(self, serves: Callable[[], bool]) -> None:
        self._serves = serves

    async def Check(self, request: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> Any:
        """Answers NOT_FOUND for an unknown service, as the protocol requires."""
        if request.service not in _SERVICES:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"health is known of {_SERVICES[1]!r} and of ''")
        return self._status()

    async def List(self, request: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> Any:
        return health_pb2.HealthListResponse(statuses=dict.fromkeys(_SERVICES, self._status()))

    async def Watch(self, request: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> None:
        """Refused, so that clients fall back to Check: endless streams would take up the places of calls."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "ask with Check")

    def _status(self) -> Any:
        status = health_pb2.HealthCheckResponse
        return status(status=status.SERVING if self._serves() else status.NOT_SERVING)


def add_services(
    server: grpc.aio.Server,
    experts: ExpertServicer,
    states: StateServicer,
    memories: MemoryServicer,
    credit: CreditServicer,
    probe: ProbeServicer,
    health: HealthServicer,
) -> None:
    expert_pb2_grpc.add_ExpertServiceServicer_to_server(experts, server)
    state_pb2_grpc.add_StateServiceServicer_to_server(states, server)
    memory_pb2_grpc.add_MemoryServiceServicer_to_server(memories, server)
    credit_pb2_grpc.add_CreditServiceServicer_to_server(credit, server)
    probe_pb2_grpc.add_ProbeServiceServicer_to_server(probe, server)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)


_REVOKED = (
    "the swarm's founder has revoked this node's invite: it has left the swarm. Its experts' checkpoints and its "
    "memories stay. If you think that this is a mistake, ask the founder for a new invite, and start the node with it: "
    "it continues with them"
)
_EXPIRED = (
    "this node's invite has expired: it has left the swarm. Ask the swarm's founder for a new one, and start the node "
    "with it as before: `talkoot node --join NEW_INVITE`, or `talkoot service install --join NEW_INVITE` for a "
    "service. Its experts' checkpoints stay, and it continues with them"
)


_WATCH_EVERY_S = 1.0
"""How often a node looks whether it has heard of revocations, and a founder's node whether its owner has revoked."""


class AccessControl:
    """Who may call this node. Call `look` in every announcement period, and `keep_watch` as a task, to keep that up to
    date.
    """

    def __init__(self, swarm: Swarm, state: Path, note_revoked: Callable[[Collection[int]], None]) -> None:
        """`state`: the node's state folder; a founder's contains the ledger of its invites. `note_revoked`: called with
        the serials of revoked tokens when there may be more of them.
        """
        self.sessions: Sessions = swarm.host.sessions
        self._swarm = swarm
        self._note_revoked = note_revoked
        self._ledger = InviteLedger(state) if swarm.host.peer_id == swarm.keys.author else None
        self._end: InviteError | None = None
        self._ended = asyncio.Event()
        """Set once this node's own token has expired or is revoked."""
        # read before anybody is served: revocations made while this node was away are not in the DHT yet
        swarm.admission.revoke(self._listed()[0])

    async def look(self) -> None:
        """Reads the denylist and the revocations, and ends the sessions of the peers that they name.

        A founder's node first publishes its owner's revocations. Raises UnreachableError.
        """
        if self._ledger is not None:
            revoked, expired = self._listed()
            await self._swarm.revocations.publish(revoked, expired)
        try:
            await self._swarm.refresh_admission()
        finally:
            self._apply()

    async def keep_watch(self) -> None:
        """Applies revocations within a second, when this node hears of them or its owner makes them, until cancelled.

        Nodes near the key of the founder's list hear of it when the founder stores it there, and tell others.
        """
        known = self._swarm.admission.revoked
        while True:
            await asyncio.sleep(_WATCH_EVERY_S)
            if self._ledger is not None and self._ledger.has_changed():
                with contextlib.suppress(UnreachableError):  # in that case, `look` publishes them later
                    await self.look()
            if (revoked := self._swarm.admission.revoked) != known:
                known = revoked
                self._swarm.revocations.hear()
                self._apply()

    def _apply(self) -> None:
        self.sessions.recheck()
        self._note_revoked(self._swarm.admission.revoked)
        self.look_at_own()

    @property
    def is_over(self) -> bool:
        """Whether this node's token has expired, or the founder has revoked it."""
        return self._ended.is_set()

    async def until_over(self) -> NoReturn:
        """Raises InviteError once this node's token has expired, or the founder has revoked it."""
        while self._end is None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._swarm.admission.expires_in_s):
                    await self._ended.wait()
            self.look_at_own()
        raise self._end

    def _listed(self) -> tuple[list[int], list[int]]:
        """The serials that the owner of a founder's node has revoked, and those that have expired."""
        if self._ledger is None:
            return [], []
        now = clock.now()
        try:
            return self._ledger.revoked(now), self._ledger.expired(now)
        except StartError as error:
            logger.warning("%s; until then nothing more is revoked", error)
            return [], []

    def look_at_own(self) -> None:
        """Ends the node if its own token has expired or was revoked, because others then ignore it."""
        try:
            self._swarm.admission.check_own()
        except RecordError as error:
            words = _EXPIRED if isinstance(error, ExpiredTokenError) else _REVOKED
            self._end = invite_error(error, words + clock.CLOCK.doubt)
            self._ended.set()
