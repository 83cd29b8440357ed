"""A volunteer's node: founds or joins a swarm, takes experts that need a host, announces and serves them."""

import asyncio
import contextlib
import logging
import os
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import grpc
from prometheus_client import CollectorRegistry

from dht.swarm import Stage, Swarm
from expert_server.averaging import Meetings
from expert_server.blocks import builder_of
from expert_server.checkpoints import Checkpoints, CheckpointStore
from expert_server.hosting import Hosting
from expert_server.metrics import NodeCollector, NodeCounts
from expert_server.replication import Replication
from expert_server.runtime import Runtime, RuntimeStats
from expert_server.servicer import EdgeLimits, ExpertServicer
from expert_server.settings import NodeSettings
from expert_server.state_servicer import StateServicer
from expert_server.transfer import Snapshots, SnapshotTaker, StateClient
from peer import PROTOCOL_VERSION, SOFTWARE_VERSION
from peer.channels import SERVER_OPTIONS, server_credentials
from peer.errors import StartError, SwarmError, UnreachableError
from peer.host import require_free_port
from peer.metrics import MetricsServer
from peer.wire import expert_pb2_grpc, records_pb2, state_pb2_grpc

logger = logging.getLogger(__name__)

_FAREWELL_S = 2.0
"""Longest that a stopping node tries to withdraw its record."""
_CALLS_GRACE_S = 1.0
"""Longest that a stopping node lets calls finish."""


class NodeState(Enum):
    """What a node does now."""

    JOINING = "joining"
    SERVING = "serving"
    UNREACHABLE = "can't reach the DHT"
    DRAINING = "draining"
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
    replicated: int
    """Of the experts, those that other nodes serve too."""
    handed_over: int
    """Experts that others took over when this node left."""


class Node:
    """A node of a swarm that was founded or joined. Made by `start`; then `run` it, and `stop` it when done."""

    def __init__(
        self,
        settings: NodeSettings,
        swarm: Swarm,
        runtime: Runtime,
        state: Path,
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
        meetings, swarm_id = Meetings(), swarm.keys.swarm_id
        self.client = StateClient(swarm_id, swarm.manifest, swarm.host.peer_id, settings.max_transfer_s)
        self.hosting = Hosting(settings, swarm, runtime, self.checkpoints, self.client, meetings, now)
        snapshots = Snapshots(settings.max_snapshots, settings.snapshot_s)
        self._snapshots = SnapshotTaker(runtime, snapshots, swarm_id, meetings.of)
        self.replication = Replication(
            settings, swarm, runtime, self.checkpoints, self.hosting, self.client, self._snapshots, meetings,
            random.Random(swarm.host.peer_id.to_bytes()),  # noqa: S311  # whom to average with is no secret
        )  # fmt: skip
        self._state = NodeState.JOINING
        self._started_at = now()
        self._dht_failures = 0
        self._failing: set[str] = set()
        """Of the rounds that a running node makes, those that failed the last time."""
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
        except SwarmError:
            await swarm.stop()
            raise
        runtime = Runtime(
            {},
            max_queued_rows=settings.max_queued_rows,
            max_batch_rows=settings.max_batch_rows,
            threads=settings.threads or os.cpu_count() or 1,
        )
        node = cls(settings, swarm, runtime, state)
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
        """Announces, adopts, replicates and averages experts, and saves its own, for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._stay_announced())
            group.create_task(self._look_around())
            group.create_task(self.replication.run())
            if self._settings.checkpoint_every_s:
                group.create_task(self.checkpoints.save_every(self._settings.checkpoint_every_s))

    async def _stay_announced(self) -> None:
        while True:
            await asyncio.sleep(self._settings.announce_every_s)
            await self._round("announce", self.hosting.announce, self._describe)

    async def _look_around(self) -> None:
        """Beside the announcements, which must not wait while states are fetched."""
        await self._round("look", self.hosting.replicate)
        while True:
            await asyncio.sleep(self._settings.announce_every_s)
            await self._round("look", self.hosting.look)

    async def _round(self, name: str, *steps: Callable[[], Awaitable[None]]) -> None:
        failures = [error for step in steps if (error := await _tried(step))]
        if failures:
            self._dht_failures += 1
            self._failing.add(name)
            again_s = self._settings.announce_every_s
            logger.warning("%s; trying again in %.0f s", failures[0], again_s)
        else:
            self._failing.discard(name)
        if self._state in {NodeState.SERVING, NodeState.UNREACHABLE}:
            self._state = NodeState.UNREACHABLE if self._failing else NodeState.SERVING

    async def stop(self) -> None:
        """Hands its experts over, saves them, withdraws, and ends. Stopping twice is harmless."""
        if self._state not in {NodeState.DRAINING, NodeState.STOPPING}:
            self._state = NodeState.DRAINING
            await self._drain()
            self._state = NodeState.STOPPING
            await self._say_goodbye()
        if self._server is not None:
            await self._server.stop(_CALLS_GRACE_S)
        await self.client.close()
        await self.runtime.stop()
        if self._metrics is not None:
            await asyncio.to_thread(self._metrics.close)
            self._metrics = None
        await self.swarm.stop()

    async def _drain(self) -> None:
        """Gives the experts up. Meanwhile the node stays announced, else nobody finds the states to fetch."""
        announcing = asyncio.create_task(self._stay_announced(), name="announce while leaving")
        try:
            await self.hosting.release(self._settings.drain_timeout_s if self.address else 0)
        finally:
            announcing.cancel()
            await asyncio.gather(announcing, return_exceptions=True)

    def hurry(self) -> None:
        """Makes a node that stops wait for nobody to take its experts over."""
        self.hosting.hurry()

    async def _say_goodbye(self) -> None:
        """Withdraws its record. A DHT that does not answer must not keep us."""
        with contextlib.suppress(UnreachableError, TimeoutError):
            async with asyncio.timeout(_FAREWELL_S):
                await self.swarm.registry.leave(self._settings.lifetime_s)

    def status(self) -> NodeStatus:
        stats = self.runtime.stats
        return NodeStatus(
            self._state,
            len(self.runtime.experts),
            self.hosting.capacity,
            self.hosting.adopted,
            stats.updates,
            stats.rows,
            stats.queued_rows,
            len(self.swarm.host.dht.protocol.routing_table.uid_to_peer_id),
            self.hosting.replicated,
            self.hosting.handed_over,
        )

    async def _serve(self, host: str) -> None:
        settings = self._settings
        require_free_port(host, settings.grpc_port)
        limits = EdgeLimits(settings.max_call_bytes, settings.max_call_s, settings.max_kept_bytes)
        servicer = ExpertServicer(self.runtime, self.swarm.manifest, self.swarm.keys.swarm_id, limits)
        self._server = grpc.aio.server(options=SERVER_OPTIONS, maximum_concurrent_rpcs=settings.max_calls)
        expert_pb2_grpc.add_ExpertServiceServicer_to_server(servicer, self._server)
        states = StateServicer(
            self._snapshots,
            self.swarm.manifest,
            self.swarm.keys.swarm_id,
            self.client.counts,
            self.replication.follow,
            max_transfers=settings.max_transfers,
            max_transfer_s=settings.max_transfer_s,
        )
        state_pb2_grpc.add_StateServiceServicer_to_server(states, self._server)
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
            self.checkpoints.counts,
            self.hosting.handed_over,
            self.replication.averagings,
            self.client.counts,
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
