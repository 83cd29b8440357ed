"""A volunteer's node: takes experts that need a host, serves and announces them, and hands them over when it leaves."""

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

from prometheus_client import Gauge

from dht.admission import RIGHTS, Role
from dht.announcements import Activity
from dht.receipts import Work
from dht.swarm import Stage, Swarm
from dht.upkeep import UpkeepPeriod
from expert_server.blocks import require_kind
from expert_server.credit import CreditServicer, ReceiptBook, ReceiptFile
from expert_server.experts.devices import ComputeDevice, open_devices
from expert_server.experts.expert import expert_bytes
from expert_server.hosting.averaging import ReplicaAveraging
from expert_server.hosting.manager import LOOKS_PER_PERIOD, HostingManager
from expert_server.hosting.replicas import CLAIM_WAIT_S, LocalReplicas
from expert_server.hosting.standby import StandbyCopies
from expert_server.memory.following import HostingRules
from expert_server.memory.hosting import MemoryHosting
from expert_server.memory.servicer import MemoryMetrics, MemoryServicer
from expert_server.pauses import LOOK_EVERY_S, PauseController
from expert_server.probe import ProbeServicer
from expert_server.reachability import ReachabilityMonitor
from expert_server.resources import (
    batch_rows_of,
    call_memory_of,
    compute_threads_of,
    disk_shortage,
    kept_bytes_of,
    most_bytes,
    require_room,
    snapshots_of,
    threads_of,
    within_memory,
)
from expert_server.server import AccessControl, HealthServicer, add_services
from expert_server.serving.runtime import Runtime
from expert_server.serving.servicer import MAX_CALL_S, BudgetLimits, CallLimits, ExpertServicer
from expert_server.settings import NodeSettings
from expert_server.state.checkpoints import Checkpoints, CheckpointStore
from expert_server.state.servicer import StateServicer
from expert_server.state.transfer import CHANNELS, SnapshotTaker, StateClient
from expert_server.status import Contribution, ContributionAccount, NodeRecordBuilder, NodeState, NodeStatus
from expert_server.swarm_news import SwarmNews
from peer import clock
from peer.errors import StartError, UnreachableError, UserError
from peer.formatting import endpoint
from peer.kademlia.node import Spending
from peer.loop import LoopLag, Restarts, RetryingRounds, cancel_all, keep_running, tolerating
from peer.metrics import MetricsServer, total
from peer.platform.processes import return_freed_memory
from peer.rates import Bandwidth, download_limit
from peer.rpc.sessions import Sessions
from peer.transport.endpoints import near

logger: logging.Logger = logging.getLogger(__name__)

_FAREWELL_S = 2.0
"""How long a stopping node tries to withdraw its record."""
_FIRST_RECORD_PAUSES_S = (0.5, 2.0, 5.0, 10.0, 20.0)
"""How long a node that starts waits before it tries again to store its record: its line may be down for a while."""
_CALLS_GRACE_S = 1.0
"""How long a stopping node lets calls finish."""
_LATELY_S = 60.0
"""A trainer that has sent gradients within this time counts as using the node now."""
_ACCOUNTS_EVERY_S = 15.0
"""How often the node saves what it has done. It forgets that much if it is killed."""


@dataclass(frozen=True)
class NodeTiming:
    """Times in seconds that no owner has a reason to change. Tests of a whole node shorten them."""

    claim_wait_s: float = CLAIM_WAIT_S
    look_every_s: float = LOOK_EVERY_S
    max_call_s: float = MAX_CALL_S


class Node:
    """A node of a swarm that was founded or joined. Create it with `start`; then `run` it, and `stop` it when done."""

    def __init__(
        self,
        settings: NodeSettings,
        swarm: Swarm,
        runtime: Runtime,
        state: Path,
        devices: Sequence[ComputeDevice],
        timing: NodeTiming,
    ) -> None:
        self.swarm = swarm
        self.runtime = runtime
        self.address: str = ""
        self.metrics_address: str = ""
        self._settings = settings
        self._timing = timing
        self._gpus = [device for device in devices if device.torch_device.type != "cpu"]
        self._host = ""
        self._stopping = self._drained = False
        self._metrics: MetricsServer | None = None
        swarm_id, metrics = swarm.keys.swarm_id, swarm.metrics
        self.restarts: Restarts = swarm.host.restarts
        every_s = settings.announce_every_s
        self._memory_calls = Spending()
        self._memory_period = UpkeepPeriod(every_s, lambda: self._memory_calls.bytes)
        self.period: UpkeepPeriod = UpkeepPeriod(every_s, lambda: swarm.registry.spent_bytes)
        self.traffic: Bandwidth = Bandwidth(
            swarm.host.upload, download_limit(settings.download_mbit, metrics)
        )
        self._lag = LoopLag(metrics)
        self._rounds = RetryingRounds(every_s, metrics, self.restarts)

        self.replicas: LocalReplicas = self._make_replicas(state, devices)
        self.hosting: HostingManager = HostingManager(settings, swarm, self.replicas, metrics=metrics)
        self._snapshots = SnapshotTaker(
            runtime, swarm_id, self.replicas.history.of, snapshots_of(settings, swarm.manifest)
        )
        self.averaging: ReplicaAveraging = ReplicaAveraging(
            settings,
            swarm,
            self.replicas,
            self._snapshots,
            self.hosting.adopt_from,
            lambda: self.hosting.seen,
            metrics=metrics,
            restarts=self.restarts,
        )
        self._standby = StandbyCopies(
            settings, swarm, self.replicas, lambda: self.hosting.seen, metrics=metrics
        )
        self._pauses = PauseController(
            settings, self._take_experts, self._give_up_experts, clock.now, timing.look_every_s
        )
        memory_metrics = MemoryMetrics(metrics)
        self.memories: MemoryHosting = MemoryHosting(
            state / "memory",
            HostingRules.of(settings),
            swarm,
            self.traffic.down,
            self._memory_period,
            memory_metrics.bytes.labels("received").inc,
        )

        self._receipts = ReceiptBook(
            swarm_id,
            swarm.host.peer_id,
            lambda receipt: swarm.admission.signer_of(receipt.trainer, receipt.badge),
        )
        self._access = AccessControl(swarm, state, self._receipts.note_revoked)
        self.sessions: Sessions = self._access.sessions
        self._receipt_file = ReceiptFile(state / "receipts" / swarm_id, self._receipts)
        kept_bytes = kept_bytes_of(settings, sum(device.memory_bytes for device in devices))
        self._servicer = self._make_servicer(kept_bytes)
        self._memory_servicer = MemoryServicer(
            self.memories.hosted.served,
            swarm_id,
            self.sessions,
            self.traffic.up,
            memory_metrics,
            threads_of(settings),
            note_served=self._receipts.note_served,
            hear=self.memories.publishers.hear,
        )

        rng = random.Random(swarm.host.peer_id.to_bytes())  # noqa: S311  # no secret
        self.reachability: ReachabilityMonitor = ReachabilityMonitor(settings, swarm, rng, metrics=metrics)
        self.news: SwarmNews = SwarmNews(
            swarm.registry,
            lambda: self.hosting.seen,
            lambda: self.memories.seen,
            lambda: self._servicer.trainers(_LATELY_S),
        )
        self._account = ContributionAccount(state / "contributions" / f"{swarm.keys.swarm_id}.json")
        self._records = NodeRecordBuilder(settings, swarm.host.certificate, clock.now())
        self._expert_bytes = expert_bytes(swarm.manifest)
        self._most_bytes = settings.memory or most_bytes(
            settings, swarm.manifest, self.hosting.capacity, kept_bytes
        )

    def _make_replicas(self, state: Path, devices: Sequence[ComputeDevice]) -> LocalReplicas:
        swarm, settings = self.swarm, self._settings
        swarm_id, manifest, metrics = swarm.keys.swarm_id, swarm.manifest, swarm.metrics
        store = CheckpointStore(state / "checkpoints", swarm_id, manifest, settings.checkpoints_kept)
        states = StateClient(
            swarm_id,
            manifest,
            swarm.session_client(*sorted(RIGHTS[Role.NODE])),
            self.traffic.down,
            swarm.host.channels(CHANNELS),
            metrics=metrics,
            guard=swarm.guard,
        )
        return LocalReplicas(
            swarm,
            self.runtime,
            Checkpoints(store, self.runtime, metrics),
            states,
            devices,
            period=self.period,
            claim_wait_s=self._timing.claim_wait_s,
        )

    def _make_servicer(self, kept_bytes: int) -> ExpertServicer:
        """`kept_bytes`: memory for kept forward passes."""
        limits = CallLimits(
            max_call_s=self._timing.max_call_s,
            max_kept_bytes=kept_bytes,
            budget=BudgetLimits.of(self._settings),
            max_memory_bytes=call_memory_of(self._settings),
        )
        return ExpertServicer(
            self.runtime,
            self.swarm.manifest,
            self.swarm.keys.swarm_id,
            limits,
            self.sessions,
            self.traffic,
            self.swarm.metrics,
            self._receipts.note_served,
        )

    @classmethod
    async def start(
        cls,
        settings: NodeSettings,
        swarm: Swarm,
        *,
        host: str,
        state: Path,
        stage: Stage = logger.info,
        timing: NodeTiming = NodeTiming(),
    ) -> "Node":
        """Serves on `host`, takes its first experts and announces them. Becomes the owner of the swarm, even if it
        fails.

        `state`: the node's own folder, where it keeps checkpoints. `stage`: called with each step of the start, in
        words.
        """
        try:
            require_kind(swarm.manifest)
            devices = open_devices(settings.device, settings.precision)
            settings = within_memory(settings, swarm.manifest)
            require_room(settings, swarm.manifest, max(device.memory_bytes for device in devices))
        except UserError:
            await swarm.stop()
            raise
        device_types = {device.torch_device.type for device in devices}
        runtime = Runtime(
            {},
            max_queued_rows=settings.max_queued_rows,
            max_batch_rows=batch_rows_of(device_types),
            threads=compute_threads_of(settings, device_types),
            metrics=swarm.metrics,
        )
        logger.info("computes on %s", ", ".join(map(str, devices)))
        node = cls(settings, swarm, runtime, state, devices, timing)
        if not (node.hosting.capacity or settings.memory_disk):
            logger.info(
                "this node hosts no experts and no passages. It stores DHT records, lets others join through it, and "
                "relays for nodes behind routers if it is public. To host passages, pass --memory-disk 5GB"
            )
        try:
            await node.replicas.checkpoints.open()
            await node.memories.open()
            await node._receipt_file.open(node._done())
            await runtime.start()
            await node._serve(host)
            # other peers' lists are read again and again later; a start must not depend on them
            with (
                contextlib.suppress(UnreachableError),
                tolerating("see who reaches this node", node.restarts),
            ):
                await node.reachability.begin(host, swarm.host.port, stage)
            stage("looking for experts that need a host")
            await node._publish_first_record()  # before it announces experts
            with tolerating("take the first experts", node.restarts):
                await node._pauses.look()
            if not node._pauses.hosts:
                await node._publish_record()
            node._note_work()
            await node._check_disk(state)
            return node
        except BaseException:
            await node.stop()
            raise

    async def _check_disk(self, state: Path) -> None:
        """Warns if checkpoints of its experts may not fit. A folder that can't be read has been reported."""
        with contextlib.suppress(OSError):
            experts = len(self.runtime.experts)
            shortage = await asyncio.to_thread(
                disk_shortage, state, self._settings, self.swarm.manifest, experts
            )
            if shortage:
                logger.warning("%s", shortage)

    async def _serve(self, host: str) -> None:
        """Adds the node's services to the running server, and starts /metrics."""
        settings, server = self._settings, self.swarm.host.server
        assert server is not None, "a node's host has a server"
        self._host = host
        swarm_id, up = self.swarm.keys.swarm_id, self.traffic.up
        states = StateServicer(
            self._snapshots, self.swarm.manifest, swarm_id, self.replicas.states.metrics,
            self.averaging.accept_hint, up, self.sessions,
        )  # fmt: skip
        add_services(
            server.services,
            self._servicer,
            states,
            self._memory_servicer,
            CreditServicer(self._receipts, self.sessions, up, self.swarm.metrics),
            ProbeServicer(swarm_id, self.traffic, dialling=self.swarm.host.dialling),
            HealthServicer(lambda: self.state is NodeState.SERVING),
        )
        await self.swarm.host.serve_tunnel(server.open_for)
        port = settings.announce_port or self.swarm.host.port
        self.address = endpoint(settings.announce_host or host, port)
        self._show_levels()
        self._lag.start()
        self._metrics = MetricsServer(self.swarm.metrics, settings.metrics_host, settings.metrics_port, near)
        self.metrics_address = self._metrics.address

    def _show_levels(self) -> None:
        """Exposes gauges of the node as a whole. Their functions run on the thread of a scrape."""
        loop = asyncio.get_running_loop()
        for name, words, level in (
            ("paused", "1 while the node is paused.", lambda: self.state is NodeState.PAUSED),
            (
                "memory_bytes",
                "Memory of experts, cached forward passes and calls under way, about.",
                self._memory_bytes,
            ),
            ("tasks", "Tasks on the event loop.", lambda: len(asyncio.all_tasks(loop))),
        ):
            Gauge(f"talkoot_{name}", words, registry=self.swarm.metrics).set_function(level)

    async def run(self) -> None:
        """Announces, adopts, replicates, averages and saves experts, and pauses when it should.

        It ends only by raising a group with an InviteError, once this node's token has expired or is revoked, or with a
        StartError, once a GPU has failed.
        """
        every_s = self._settings.checkpoint_every_s
        tasks: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
            "announce": self._stay_announced,
            "hear of revocations": self._access.keep_watch,
            "look around": self._look_around,
            "average with other nodes": self.averaging.run,
            "copy experts that one node hosts alone": self._standby.run,
            "announce memories": self._keep_memories_announced,
            "host memories": self._host_memories,
            "follow memories": self._follow_memories,
            "watch when to pause": self._watch_pauses,
            "hear of the swarm": self._hear_news,
            "save the contribution": partial(self._account.save_every, _ACCOUNTS_EVERY_S, self._contribution),
            "save receipts": partial(self._receipt_file.save_every, _ACCOUNTS_EVERY_S),
        }
        if every_s:
            tasks["save checkpoints"] = partial(self.replicas.checkpoints.save_every, every_s)
        async with asyncio.TaskGroup() as group:
            for name, run in tasks.items():
                group.create_task(keep_running(name, run, self.restarts), name=name)
            group.create_task(self._access.until_over(), name="end with the token")
            if self._gpus:
                watch = keep_running("watch the GPUs", self._watch_gpus, self.restarts, fatal=StartError)
                group.create_task(watch, name="watch the GPUs")

    async def _stay_announced(self) -> None:
        await self.period.repeat(self._announce)

    async def _announce(self) -> None:
        self._access.look_at_own()  # others would refuse the announcements
        await self._rounds.insist(
            "announce",
            self.reachability.check,
            self.hosting.announce,
            self._publish_record,
            partial(self.swarm.membership.check, announced=True),
        )
        await self._rounds.run("admission", self._access.look)

    async def _keep_memories_announced(self) -> None:
        """In a period of its own, so that a large memory does not delay the announcements of experts."""
        with self._memory_calls.counted():
            await self._memory_period.repeat(self._announce_memories)

    async def _announce_memories(self) -> None:
        """If the DHT does not answer, tries again after pauses that begin with the node's usual period."""
        pause_s = self.period.seconds
        while not await self._rounds.insist("announce memories", self.memories.hosted.announce_all):
            if pause_s >= self._memory_period.seconds:
                break
            await asyncio.sleep(pause_s)
            pause_s *= 2

    async def _publish_record(self) -> None:
        """Renews the node's record in the DHT."""
        activity = Activity.PAUSED if self._pauses.why else Activity.SERVING
        record = self._records.record(
            self.status(),
            Activity.LEAVING if self._stopping else activity,
            clock.now(),
            addresses=await self.swarm.host.look_up(self.reachability.addresses),
            metrics_address="" if self._metrics is None else self._metrics.offered(self._host),
            reachability=self.reachability.status.kind,
            tunnel_addresses=self.reachability.tunnel_addresses,
            relay_addresses=self.reachability.relay_addresses,
            period_s=self.period.seconds,
        )
        await self.swarm.registry.publish_node(record, self.period.lifetime_s)

    async def _publish_first_record(self) -> None:
        """Tries again if nobody takes it: those that it knows after joining may just have gone. Raises
        UnreachableError.
        """
        for pause_s in _FIRST_RECORD_PAUSES_S:
            try:
                return await self._publish_record()
            except UnreachableError as error:
                logger.warning("%s; trying again in %g s", error, pause_s)
            await asyncio.sleep(pause_s)
        return await self._publish_record()

    async def _look_around(self) -> None:
        """Looks for experts that need a host. Separate from announcements, which must not wait while states are
        fetched.
        """
        for look in self.hosting.looks():
            if self._pauses.hosts and not self._pauses.why:
                await self._rounds.run("look", look)
            await asyncio.sleep(self.period.drawn_s(1 / LOOKS_PER_PERIOD))

    async def _host_memories(self) -> None:
        """Verifies and serves the memories on disk, then takes shards that need a host."""
        await self.memories.hosted.verify()
        with self._memory_calls.counted():
            await self._rounds.run("announce memories", self.memories.hosted.announce_all)
            for look in cycle((self.memories.look, self.memories.look_again)):
                await self._rounds.run("look for shards of memories", look)
                await asyncio.sleep(self._memory_period.drawn_s(0.5))

    async def _follow_memories(self) -> None:
        with self._memory_calls.counted():
            while True:
                await self._rounds.run("follow memories", self.memories.publishers.follow)
                await self.memories.publishers.until_due(self.period.drawn_s())

    async def _hear_news(self) -> None:
        """Follows the swarm's news, and looks for a second node with this identity, until cancelled. If the DHT does
        not answer, other tasks have logged it.
        """
        while True:
            with contextlib.suppress(UnreachableError):
                await self.news.look()
                await self.swarm.membership.look_for_duplicate()
            await asyncio.sleep(self.period.drawn_s())

    async def _watch_pauses(self) -> None:
        while True:
            await asyncio.sleep(self._timing.look_every_s)
            await self._rounds.run("pauses", self._pauses.look)
            self._note_work()

    async def _watch_gpus(self) -> None:
        """Raises StartError once one has failed: this process could only answer with errors from then on."""
        while True:
            await asyncio.sleep(self._timing.look_every_s)
            for gpu in self._gpus:
                await self.runtime.run(gpu.require_working)

    async def pause(self, reason: str = "by its owner", for_s: float | None = None) -> None:
        """Gives up the experts and stays in the swarm, until `resume` or for `for_s` seconds.

        `reason`: shown to users. Meanwhile, calls are answered with NOT_FOUND. Returns when the node has paused.
        """
        await self._pauses.pause(reason, for_s)

    async def resume(self) -> None:
        """Takes experts again, first those with checkpoints here.

        Overrides the present reasons to pause (schedule, battery, load of other programs) until each no longer holds.
        """
        await self._rounds.run("pauses", self._pauses.resume)

    async def _take_experts(self) -> None:
        self.memories.resume()
        with self._memory_calls.counted():
            await self._rounds.run("announce memories", self.memories.hosted.announce_all)
        await self.hosting.take_first()  # this also announces them
        await self.swarm.keep_manifest()
        await self._publish_record()

    async def _give_up_experts(self) -> None:
        await self._release(self._settings.drain_timeout_s)
        self._servicer.forward_cache.clear()
        self._servicer.sequences.clear()
        await asyncio.to_thread(return_freed_memory)
        for gpu in self._gpus:
            await self.runtime.run(gpu.return_freed_memory)
        with contextlib.suppress(UnreachableError):
            await self._publish_record()

    async def _release(self, limit_s: float) -> None:
        """Gives up the memories, and the experts once others have all updates that only this node's replicas took."""
        await asyncio.gather(
            self.hosting.release(limit_s, self.averaging.average_last), self._release_memories(limit_s)
        )

    async def _release_memories(self, limit_s: float) -> None:
        with self._memory_calls.counted():
            await self.memories.release(limit_s)

    async def stop(self) -> None:
        """Hands the experts over, saves them, leaves the swarm, and stops all parts. Stopping twice is harmless."""
        if not self._stopping:
            self._stopping = True
            await self._pauses.end()
            await self._drain()
            self._drained = True
            await self._say_goodbye()
        if self.swarm.host.server is not None:
            await self.swarm.host.server.stop(_CALLS_GRACE_S)
        await self.replicas.states.close()
        await self.memories.close()
        await self._memory_servicer.close()
        await self.runtime.stop()
        self._lag.stop()
        if self._metrics is not None:
            self._note_work()
            await self._account.save(self._contribution())
            await self._receipt_file.save()
            await asyncio.to_thread(self._metrics.close)
            self._metrics = None
        await self.swarm.stop()

    def hurry(self) -> None:
        """Ends the wait of `stop` for others to take over the experts."""
        self.hosting.hurry()
        self.memories.hurry()

    async def _drain(self) -> None:
        """Gives up the experts. Meanwhile the node stays announced, so that others find it and fetch their states."""
        announcing = asyncio.create_task(self._stay_announced_as_leaving(), name="announce while leaving")
        try:
            can_hand_over = self.address and not self.is_token_over
            await self._release(self._settings.drain_timeout_s if can_hand_over else 0)
        finally:
            await cancel_all([announcing])

    async def _stay_announced_as_leaving(self) -> None:
        with contextlib.suppress(UnreachableError):
            await self._publish_record()  # at once: others that leave must not hand this node theirs
        async with asyncio.TaskGroup() as group:
            group.create_task(self._stay_announced())
            group.create_task(self._keep_memories_announced())

    async def _say_goodbye(self) -> None:
        """Withdraws the node's record. A DHT that does not answer must not delay the stop."""
        with contextlib.suppress(UnreachableError, TimeoutError):
            async with asyncio.timeout(_FAREWELL_S):
                await self.swarm.registry.leave(self.period.lifetime_s)

    @property
    def is_token_over(self) -> bool:
        """Whether this node's token has expired or is revoked, so that others no longer accept its records or calls."""
        return self._access.is_over

    @property
    def state(self) -> NodeState:
        if self._stopping:
            return NodeState.STOPPING if self._drained else NodeState.DRAINING
        if self._pauses.why:
            return NodeState.DRAINING if self.runtime.experts else NodeState.PAUSED
        if self._pauses.taking or not self._pauses.hosts:
            return NodeState.JOINING
        # as long as trainers call, the network is up, even if all other nodes have gone
        is_cut_off = self._rounds.are_failing and not self._servicer.trainers(_LATELY_S)
        return NodeState.UNREACHABLE if is_cut_off else NodeState.SERVING

    def status(self) -> NodeStatus:
        work, contribution = self.runtime.metrics, self._contribution()
        settings = self._settings
        return NodeStatus(
            state=self.state,
            experts=len(self.runtime.experts),
            capacity=self.hosting.capacity,
            adopted=int(total(self.hosting.adopted)),
            updates=int(total(work.updates)),
            rows=int(total(work.rows)),
            queued_rows=self.runtime.queued_rows,
            peers=len(self.swarm.host.peers()),
            pause_reason=self._pauses.in_words,
            calls=int(total(self._servicer.calls)),
            uploaded_bytes=self.traffic.up.bytes,
            downloaded_bytes=self.traffic.down.bytes,
            upload_mbit=settings.upload_mbit,
            download_mbit=settings.download_mbit,
            memory_bytes=self._memory_bytes(),
            memory_limit_bytes=self._most_bytes,
            busy_s=total(work.compute_s),
            threads=threads_of(settings),
            contributed_rows=contribution.rows,
            contributed_updates=contribution.updates,
            contributed_hours=round(contribution.served_s / 3600, 4),
            replicated=self.hosting.replicated,
            handed_over=int(total(self.hosting.handed_over)),
            reachability=self.reachability.in_words,
            reachability_advice=self.reachability.advice,
            unsteady=self.restarts.unsteady,
            memory_shards=self.memories.hosted.shards,
            memory_disk_bytes=self.memories.hosted.disk_bytes,
            memory_queries=int(total(self._memory_servicer.metrics.queries)),
            clock_warning=clock.CLOCK.warning,
            signed=self._receipts.signed,
            trained=len(self.runtime.trained),
            trainers=self._servicer.trainers(),
            trainers_now=self._servicer.trainers(_LATELY_S),
            swarm_trainers=self.news.training.trainers,
            swarm_experts=self.swarm.manifest.experts_total,
            loss=self.news.training.loss,
            loss_at_first=self.news.training.loss_at_first,
            loss_age=self.news.loss_age,
            alone=tuple(map(str, self.hosting.alone)),
            offline=self.hosting.offline,
        )

    def _memory_bytes(self) -> int:
        experts = len(self.runtime.experts) * self._expert_bytes
        kept = self._servicer.forward_cache.bytes + self._servicer.sequences.bytes
        return experts + self._servicer.memory.used + kept + self._snapshots.kept_bytes

    def _note_work(self) -> None:
        self._account.note(serves=self.state is NodeState.SERVING)

    def _done(self) -> Work:
        """The node's own count of its work for all trainers."""
        queries = int(total(self._memory_servicer.metrics.queries))
        return Work(pairs=self._contribution().rows, queries=queries)

    def _contribution(self) -> Contribution:
        work = self.runtime.metrics
        rows, updates = int(total(work.rows)), int(total(work.updates))
        return self._account.total(rows, updates, self._receipts.signed.work.pairs)
