"""A volunteer's node: founds or joins a swarm, takes experts that need a host, announces and serves them."""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import grpc
from prometheus_client import CollectorRegistry

from dht.swarm import Stage, Swarm
from expert_server.blocks import builder_of
from expert_server.checkpoints import Checkpoints, CheckpointStore
from expert_server.devices import ComputeDevice, open_devices
from expert_server.hosting import Hosting
from expert_server.metrics import NodeCollector, NodeCounts
from expert_server.runtime import Runtime, RuntimeStats
from expert_server.servicer import EdgeLimits, ExpertServicer
from expert_server.settings import NodeSettings
from peer import PROTOCOL_VERSION, SOFTWARE_VERSION
from peer.channels import SERVER_OPTIONS, server_credentials
from peer.errors import StartError, UnreachableError, UserError
from peer.host import require_free_port
from peer.metrics import MetricsServer
from peer.wire import expert_pb2_grpc, records_pb2

logger = logging.getLogger(__name__)

_FAREWELL_S = 2.0
"""Longest that a stopping node tries to withdraw its announcements."""
_CALLS_GRACE_S = 1.0
"""Longest that a stopping node lets calls finish."""
_LAST_SAVE_S = 10.0
"""Longest that a stopping node saves its experts."""


class NodeState(Enum):
    """What a node does now."""

    JOINING = "joining"
    SERVING = "serving"
    UNREACHABLE = "can't reach the DHT"
    STOPPING = "stopping"


@dataclass(frozen=True)
class NodeStatus:
    """What a node shows at a glance."""

    state: NodeState
    experts: int
    capacity: int
    """Experts it would host at most, those it would adopt included."""
    adopted: int
    updates: int
    rows: int
    queued_rows: int
    peers: int
    """DHT peers known."""


class Node:
    """A node of a swarm that was founded or joined. Made by `start`; then `run` it, and `stop` it when done."""

    def __init__(
        self,
        settings: NodeSettings,
        swarm: Swarm,
        runtime: Runtime,
        state: Path,
        devices: Sequence[ComputeDevice],
        now: Callable[[], float] = time.time,
    ) -> None:
        self.swarm = swarm
        self.runtime = runtime
        self.address = ""
        self.metrics_address = ""
        self._settings = settings
        self._now = now
        store = CheckpointStore(state / "checkpoints", swarm.keys.swarm_id, settings.checkpoints_kept)
        self.checkpoints = Checkpoints(store, runtime)
        self.hosting = Hosting(settings, swarm, runtime, self.checkpoints, devices, now)
        self._state = NodeState.JOINING
        self._started_at = now()
        self._dht_failures = 0
        self._certificate = swarm.host.identity.make_certificate()
        self._server: grpc.aio.Server | None = None
        self._metrics: MetricsServer | None = None

    @classmethod
    async def start(
        cls, settings: NodeSettings, swarm: Swarm, *, host: str, state: Path, stage: Stage = logger.info
    ) -> "Node":
        """Serves on `host`, takes its first experts and announces them. Takes over the swarm, also when it fails.

        `state`: the node's own folder, where it keeps checkpoints.
        """
        try:
            builder_of(swarm.manifest.experts.kind)
            devices = open_devices(settings.device, settings.precision)
        except UserError:
            await swarm.stop()
            raise
        runtime = Runtime(
            {},
            max_queued_rows=settings.max_queued_rows,
            max_batch_rows=settings.max_batch_rows,
            threads=settings.threads or os.cpu_count() or 1,
        )
        logger.info("computes on %s", ", ".join(map(str, devices)))
        node = cls(settings, swarm, runtime, state, devices)
        try:
            await node.checkpoints.open()
            await runtime.start()
            await node._serve(host)
            stage("looking for experts that need a host")
            await node.hosting.take_first()
            await node.hosting.announce()
            await node._describe()
            node._state = NodeState.SERVING
            return node
        except BaseException:
            await node.stop()
            raise

    async def run(self) -> None:
        """Announces, adopts experts that nobody hosts, and saves its own, for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._stay_announced())
            if self._settings.checkpoint_every_s:
                group.create_task(self.checkpoints.save_every(self._settings.checkpoint_every_s))

    async def _stay_announced(self) -> None:
        while True:
            await self.swarm.host.pause(self._settings.announce_every_s)
            failures = [
                error
                for step in (self.hosting.announce, self._describe, self._stay_member, self.hosting.adopt)
                if (error := await _tried(step))
            ]
            if failures:
                self._dht_failures += 1
                again_s = self._settings.announce_every_s
                logger.warning("%s; trying again in %.0f s", failures[0], again_s)
            self._state = NodeState.UNREACHABLE if failures else NodeState.SERVING

    async def _stay_member(self) -> None:
        await self.swarm.membership.check(announced=True)

    async def stop(self) -> None:
        """Withdraws, lets calls finish for a moment, saves the experts, and ends. Stopping twice is harmless."""
        if self._state is not NodeState.STOPPING:
            self._state = NodeState.STOPPING
            await self._say_goodbye()
        if self._server is not None:
            await self._server.stop(_CALLS_GRACE_S)
        await self.checkpoints.save_all_within(_LAST_SAVE_S)
        await self.runtime.stop()
        if self._metrics is not None:
            await asyncio.to_thread(self._metrics.close)
            self._metrics = None
        await self.swarm.stop()

    async def _say_goodbye(self) -> None:
        """Withdraws what was announced. A DHT that does not answer must not keep us."""
        with contextlib.suppress(UnreachableError, TimeoutError):
            async with asyncio.timeout(_FAREWELL_S):
                await self.hosting.withdraw()
                await self.swarm.registry.leave(self._settings.lifetime_s)

    def status(self) -> NodeStatus:
        stats = self.runtime.stats
        return NodeStatus(
            self._state_now(),
            len(self.runtime.experts),
            self.hosting.capacity,
            self.hosting.adopted,
            stats.updates,
            stats.rows,
            stats.queued_rows,
            len(self.swarm.host.peers()),
        )

    def _state_now(self) -> NodeState:
        is_cut_off = self._state is NodeState.SERVING and not self.swarm.host.alive
        return NodeState.UNREACHABLE if is_cut_off else self._state

    async def _serve(self, host: str) -> None:
        settings = self._settings
        require_free_port(host, settings.grpc_port)
        limits = EdgeLimits(settings.max_call_bytes, settings.max_call_s, settings.max_kept_bytes)
        servicer = ExpertServicer(self.runtime, self.swarm.manifest, self.swarm.keys.swarm_id, limits)
        self._server = grpc.aio.server(options=SERVER_OPTIONS, maximum_concurrent_rpcs=settings.max_calls)
        expert_pb2_grpc.add_ExpertServiceServicer_to_server(servicer, self._server)
        credentials = server_credentials(self.swarm.host.identity, self._certificate)
        try:
            port = self._server.add_secure_port(_endpoint(host, settings.grpc_port), credentials)
        except RuntimeError as error:
            raise StartError(
                f"can't listen on {host} port {settings.grpc_port}: pass another port"
            ) from error
        await self._server.start()
        self.address = _endpoint(host, port)
        registry = CollectorRegistry()
        registry.register(NodeCollector(self._stats, self._counts))
        self._metrics = MetricsServer(registry, "127.0.0.1", settings.metrics_port)
        self.metrics_address = self._metrics.address

    async def _describe(self) -> None:
        """Renews what this node says of itself."""
        stats = self.runtime.stats
        record = records_pb2.NodeRecord(
            addresses=[self.address],
            certificate=self._certificate,
            protocol_version=PROTOCOL_VERSION,
            software_version=SOFTWARE_VERSION,
            expert_count=len(self.runtime.experts),
            expert_capacity=self.hosting.capacity,
            rows_processed=stats.rows,
            updates=stats.updates,
            started_at=self._started_at,
            bootstrap_addresses=await self.swarm.host.bootstrap_addresses(),
        )
        await self.swarm.registry.publish_node(record, self._settings.lifetime_s)

    def _stats(self) -> RuntimeStats:
        return self.runtime.stats

    def _counts(self) -> NodeCounts:
        return NodeCounts(
            len(self.runtime.experts),
            self.hosting.adopted,
            self._dht_failures,
            self.swarm.host.restarts,
            self.checkpoints.counts,
        )


def _endpoint(host: str, port: int) -> str:
    """`host:port`, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def _tried(step: Callable[[], Awaitable[None]]) -> UnreachableError | None:
    """Runs it; gives back what the DHT did not do."""
    try:
        await step()
    except UnreachableError as error:
        return error
    return None
