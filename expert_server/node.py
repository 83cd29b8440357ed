"""A volunteer's node: founds or joins a swarm, takes experts that need a host, announces and serves them."""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path

import grpc
import psutil
from prometheus_client import CollectorRegistry

from dht.manifest import Manifest
from dht.registry import Announced, Replica, ReplicaState
from dht.swarm import Stage, Swarm
from dht.uid import UID
from dht.vacancies import choose, lost_claims, vacant
from expert_server.blocks import builder_of
from expert_server.checkpoints import Checkpoints, CheckpointStore
from expert_server.expert import Expert, expert_bytes
from expert_server.metrics import NodeCollector, NodeCounts
from expert_server.runtime import Runtime, RuntimeStats
from expert_server.servicer import EdgeLimits, ExpertServicer
from expert_server.settings import NodeSettings
from peer import PROTOCOL_VERSION, SOFTWARE_VERSION
from peer.channels import SERVER_OPTIONS, server_credentials
from peer.errors import StartError, SwarmError, UnreachableError
from peer.host import require_free_port
from peer.metrics import MetricsServer
from peer.wire import expert_pb2_grpc, records_pb2

logger = logging.getLogger(__name__)

_FREE_MEMORY_SHARE = 0.25
_CLAIM_ROUNDS = 5
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
        self._room = _room(settings, swarm.manifest)
        self._spare = settings.spare if settings.spare is not None else (self._room + 1) // 2
        self._claimed_at: dict[UID, float] = {}
        self._was_vacant: set[UID] = set()
        self._had_host: set[UID] = set()
        self._state = NodeState.JOINING
        self._started_at = now()
        self._adopted = self._dht_failures = 0
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
            for _ in range(_CLAIM_ROUNDS):  # what was lost to other claims is tried elsewhere
                if not await node._take_vacant(node._room - len(runtime.experts)):
                    break
            await node._announce()
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
            await asyncio.sleep(self._settings.announce_every_s)
            failures = [
                error
                for step in (self._announce, self._describe, self._adopt)
                if (error := await _tried(step))
            ]
            if failures:
                self._dht_failures += 1
                again_s = self._settings.announce_every_s
                logger.warning("%s; trying again in %.0f s", failures[0], again_s)
            self._state = NodeState.UNREACHABLE if failures else NodeState.SERVING

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
        registry, lifetime_s = self.swarm.registry, self._settings.lifetime_s
        with contextlib.suppress(UnreachableError, TimeoutError):
            async with asyncio.timeout(_FAREWELL_S):
                await registry.withdraw(self._claimed_at, lifetime_s)
                await registry.leave(lifetime_s)
        self._claimed_at.clear()

    def status(self) -> NodeStatus:
        stats = self.runtime.stats
        return NodeStatus(
            self._state,
            len(self.runtime.experts),
            self._room + self._spare,
            self._adopted,
            stats.updates,
            stats.rows,
            stats.queued_rows,
            len(self.swarm.host.dht.protocol.routing_table.uid_to_peer_id),
        )

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

    async def _announce(self) -> None:
        """Renews what this node says of its replicas, and the manifest."""
        announced = [
            Announced(uid, ReplicaState.SERVING, expert.update_count, self._claimed_at[uid])
            for uid, expert in self.runtime.experts.items()
        ]
        queued_rows = self.runtime.stats.queued_rows
        await self.swarm.registry.announce(announced, self._settings.lifetime_s, queued_rows)
        await self.swarm.keep_manifest()

    async def _describe(self) -> None:
        """Renews what this node says of itself."""
        stats = self.runtime.stats
        record = records_pb2.NodeRecord(
            addresses=[self.address],
            certificate=self._certificate,
            protocol_version=PROTOCOL_VERSION,
            software_version=SOFTWARE_VERSION,
            expert_count=len(self.runtime.experts),
            expert_capacity=self._room + self._spare,
            rows_processed=stats.rows,
            updates=stats.updates,
            started_at=self._started_at,
            bootstrap_addresses=await self.swarm.host.bootstrap_addresses(),
        )
        await self.swarm.registry.publish_node(record, self._settings.lifetime_s)

    async def _adopt(self) -> None:
        """Takes experts that had no host at the last look either; before that they may be just changing hands.

        The spare room is for those that had a host once: a founder alone leaves the others to those who join.
        """
        replicas = await self.swarm.registry.replicas(self.swarm.manifest.uids())
        me, mine = self.swarm.host.peer_id, self.runtime.experts
        if any(me not in {r.peer_id for r in replicas[uid]} for uid in mine):
            raise UnreachableError("the DHT does not give back this node's own announcements")
        now_vacant = set(self._vacant(replicas))
        self._had_host |= set(replicas) - now_vacant
        lasting = now_vacant & self._was_vacant
        self._was_vacant = now_vacant
        saved = await self.checkpoints.newest()
        orphans = lasting & (self._had_host | saved.keys())
        room = self._room - len(mine)
        wanted = choose(orphans, room + self._spare, me, saved)
        wanted += choose(lasting - orphans, room - len(wanted), me, saved)
        taken = await self._claim(wanted)
        self._adopted += len(taken)
        if taken:
            logger.info("adopted %d experts that nobody hosted", len(taken))

    async def _take_vacant(self, room: int) -> list[UID]:
        replicas = await self.swarm.registry.replicas(self.swarm.manifest.uids())
        me, saved = self.swarm.host.peer_id, await self.checkpoints.newest()
        return await self._claim(choose(self._vacant(replicas), room, me, saved))

    def _vacant(self, replicas: Mapping[UID, Collection[Replica]]) -> list[UID]:
        """What nobody else hosts: what this node hosted before it was killed may still be announced."""
        me, mine = self.swarm.host.peer_id, self.runtime.experts
        return [uid for uid in vacant(replicas, besides=me) if uid not in mine]

    async def _claim(self, wanted: list[UID]) -> list[UID]:
        """Claims experts, waits for the claims of others, and serves those that it keeps."""
        if not wanted:
            return []
        registry, me = self.swarm.registry, self.swarm.host.peer_id
        lifetime_s, claimed_at = self._settings.lifetime_s, self._now()
        self._claimed_at |= dict.fromkeys(wanted, claimed_at)
        saved = await self.checkpoints.newest()
        claims = [Announced(uid, ReplicaState.CLAIMED, saved.get(uid, 0), claimed_at) for uid in wanted]
        await registry.announce(claims, lifetime_s)
        await asyncio.sleep(self._settings.claim_wait_s)
        lost = lost_claims(wanted, await registry.replicas(wanted), me, saved)
        for uid in lost:
            del self._claimed_at[uid]
        await registry.withdraw(lost, lifetime_s)
        kept = [uid for uid in wanted if uid not in lost]
        restored_before = self.checkpoints.counts.restored
        experts = []
        for uid in kept:
            experts.append(await self._take(uid))
            if self._now() > claimed_at + lifetime_s / 3:  # building takes long: the claims must not expire
                claimed_at = self._now()
                await registry.announce([claim for claim in claims if claim.uid in kept], lifetime_s)
        if restored := self.checkpoints.counts.restored - restored_before:
            logger.info("%d of %d experts go on from this node's checkpoints", restored, len(experts))
        await registry.announce(
            [Announced(e.uid, ReplicaState.SERVING, e.update_count, claimed_at) for e in experts], lifetime_s
        )
        return kept

    async def _take(self, uid: UID) -> Expert:
        """Serves an expert from its newest checkpoint here, else from its first parameters."""
        expert = await self.runtime.run(partial(Expert, uid, self.swarm.manifest))
        await self.checkpoints.restore(expert)
        self.runtime.add(expert)
        return expert

    def _stats(self) -> RuntimeStats:
        return self.runtime.stats

    def _counts(self) -> NodeCounts:
        return NodeCounts(
            len(self.runtime.experts), self._adopted, self._dht_failures, self.checkpoints.counts
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


def _room(settings: NodeSettings, manifest: Manifest) -> int:
    """Experts to host: as asked, else as many as fit in a quarter of the free memory."""
    if settings.experts is not None:
        return settings.experts
    fitting = int(_FREE_MEMORY_SHARE * psutil.virtual_memory().available / expert_bytes(manifest))
    return min(max(1, fitting), manifest.experts_total)
