"""What a trainer shows of itself: metrics to Prometheus, and a record in the DHT by which dashboards see it."""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry

from dht.invites import Invite
from dht.announcements import MAX_LATENCIES
from dht.swarm import Swarm
from peer import PROTOCOL_VERSION, SOFTWARE_VERSION
from peer.errors import UnreachableError
from peer.host import default_listen_address
from peer.loop import LoopThread
from peer.metrics import MetricsServer
from peer.wire import records_pb2
from trainer_client.averaging.averager import Averaging
from trainer_client.chores import Chores
from trainer_client.dispatch.dispatcher import Dispatcher
from trainer_client.dispatch.grpc_caller import GrpcCaller
from trainer_client.latencies import Quantiles
from trainer_client.metrics import TrainerCollector, TrainerCounts
from trainer_client.training.record import Progress
from trainer_client.settings import TrainerSettings

logger = logging.getLogger(__name__)

_FAREWELL_S = 2.0
"""Longest that a trainer which leaves tries to withdraw its record."""
_SCRAPE_DEADLINE_S = 5.0


class Presence:
    """One trainer's metrics and announcements. `run` it as a task of the loop, and `close` it at the end."""

    def __init__(
        self,
        swarm: Swarm,
        invite: Invite,
        settings: TrainerSettings,
        dispatcher: Dispatcher,
        caller: GrpcCaller,
        chores: Chores,
        loop: LoopThread,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Raises StartError when the port of the metrics is taken."""
        self._registry = swarm.registry
        self._tunnels = swarm.host.tunnels.counts
        self._settings = settings
        self._dispatcher = dispatcher
        self._caller = caller
        self._chores = chores
        self._loop = loop
        self._progress: Progress | None = None
        self._validated: Progress | None = None
        self._started_at = now()
        self._averaging: Averaging | None = None
        self._news = asyncio.Event()
        collected = CollectorRegistry()
        # scrapes come on threads of their own, and the counters belong to the loop's
        collected.register(TrainerCollector(lambda: loop.run(self._count(), _SCRAPE_DEADLINE_S)))
        self._metrics = MetricsServer(collected, settings.metrics_host, settings.metrics_port)
        self._offered = self._metrics.offered(reached_at(invite))

    @property
    def metrics_address(self) -> str:
        return self._metrics.address

    def note(self, progress: Progress) -> None:
        """How it goes, after a step; the first is told at once. May be called on any thread."""
        if self._progress is None:
            self._loop.loop.call_soon_threadsafe(self._news.set)
        self._progress = progress
        if progress.validation_loss is not None:
            self._validated = progress

    async def run(self) -> None:
        """For ever. When the DHT does not answer, it is tried again the next time."""
        while True:
            self._news.clear()
            record = trainer_record(await self._count(), self._settings, self._started_at, self._offered)
            if self._averaging is not None:
                if self._averaging.relayed is not None:
                    await self._averaging.relayed.look()
                set_dense(record, self._averaging)
            try:
                await self._registry.publish_trainer(record, self._settings.lifetime_s)
            except UnreachableError as error:
                logger.debug("could not announce this trainer: %s", error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.announce_every_s):
                    await self._news.wait()

    def averages(self, averaging: Averaging) -> None:
        """The swarm shall know at once. On the loop's thread."""
        self._averaging = averaging
        self._news.set()

    async def close(self) -> None:
        """Withdraws the record; a DHT that does not answer must not keep us."""
        closing = asyncio.create_task(asyncio.to_thread(self._metrics.close))
        left = records_pb2.TrainerRecord(left=True)
        with contextlib.suppress(UnreachableError, TimeoutError):
            async with asyncio.timeout(_FAREWELL_S):
                await self._registry.publish_trainer(left, self._settings.lifetime_s)
        await closing

    async def _count(self) -> TrainerCounts:
        dispatcher, averaging = self._dispatcher, self._averaging
        return TrainerCounts(
            self._progress,
            self._validated,
            dispatcher.stats,
            dispatcher.latencies,
            self._caller.bytes_sent,
            self._caller.bytes_received,
            self._caller.fp32_bytes_sent,
            self._caller.fp32_bytes_received,
            self._caller.repeated,
            dispatcher.live_experts(),
            dispatcher.open_breakers(),
            dispatcher.banned(),
            len(asyncio.all_tasks()),
            self._chores.failures,
            self._registry.counts,
            None if averaging is None else averaging.counts,
            0 if averaging is None or averaging.relayed is None else len(averaging.relayed.addresses),
            self._tunnels.open,
        )


def trainer_record(
    counts: TrainerCounts, settings: TrainerSettings, started_at: float, metrics_address: str
) -> records_pb2.TrainerRecord:
    """What a trainer says of itself. Figures that it has not, or that are not finite, are not set."""
    record = records_pb2.TrainerRecord(
        name=settings.name or "",
        protocol_version=PROTOCOL_VERSION,
        software_version=SOFTWARE_VERSION,
        started_at=started_at,
        renew_every_s=settings.announce_every_s,
        metrics_address=metrics_address,
        steps=settings.steps,
        forward=_latency(counts.latencies.forward.quantiles()),
        backward=_latency(counts.latencies.backward.quantiles()),
        calls=counts.dispatch.calls,
        failures=[
            records_pb2.Failures(cause=cause, count=count)
            for cause, count in counts.dispatch.failures.items()
        ],
        bytes_sent=counts.bytes_sent,
        bytes_received=counts.bytes_received,
        nodes=[
            records_pb2.NodeLatency(peer_id=peer_id.to_bytes(), mean_s=mean_s)
            for peer_id, mean_s in list(counts.latencies.nodes.items())[-MAX_LATENCIES:]
        ],
    )
    if counts.progress is not None:
        _set_progress(record, counts.progress, counts.validated)
    return record


def set_dense(record: records_pb2.TrainerRecord, averaging: Averaging) -> None:
    """By what others average with it."""
    record.addresses.extend(averaging.addresses)
    if averaging.relayed is not None:
        record.tunnel_addresses.extend(averaging.relayed.addresses)
    record.certificate = averaging.certificate
    record.dense_fingerprint = averaging.form.fingerprint
    record.dense_age = averaging.part.age


def _set_progress(record: records_pb2.TrainerRecord, progress: Progress, validated: Progress | None) -> None:
    record.step, record.steps = progress.step, progress.steps
    record.tokens_per_s = progress.tokens_per_s
    if math.isfinite(progress.loss):
        record.loss = progress.loss
    if validated is None or validated.validation_loss is None or validated.bits_per_byte is None:
        return
    if math.isfinite(validated.validation_loss):
        record.validation_loss = validated.validation_loss
        record.bits_per_byte = validated.bits_per_byte


def _latency(quantiles: Quantiles | None) -> records_pb2.Latency | None:
    return None if quantiles is None else records_pb2.Latency(p50_s=quantiles.p50_s, p99_s=quantiles.p99_s)


def reached_at(invite: Invite) -> str:
    """The address that others in the swarm would use: loopback when the whole swarm is there."""
    local = all(address.startswith(("/ip4/127.", "/ip6/::1/")) for address in invite.bootstrap)
    return "127.0.0.1" if local else default_listen_address()
