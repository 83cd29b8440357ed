"""How a trainer shows itself: metrics for Prometheus, and a record in the DHT, from which dashboards know it."""

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge

from dht.announcements import MAX_LATENCIES, Latency
from dht.invites import Invite
from dht.swarm import Swarm
from peer import PROTOCOL_VERSION, SOFTWARE_VERSION, clock
from peer.errors import UnreachableError
from peer.metrics import MetricsServer, total
from peer.transport.addresses import default_listen_address
from peer.wire import records_pb2
from trainer_client.averaging.averager import Averaging
from trainer_client.dispatch.calls import DispatchMetrics
from trainer_client.dispatch.dispatcher import Dispatcher
from trainer_client.dispatch.policy import Latencies
from trainer_client.settings import TrainerSettings
from trainer_client.training.record import Progress

logger = logging.getLogger(__name__)

_WITHDRAW_S = 2.0
"""Longest that a trainer tries to withdraw its record when it leaves."""


class TrainingMetrics:
    """How a trainer's training goes. May be updated on any thread."""

    def __init__(self, metrics: CollectorRegistry | None = None) -> None:
        self.progress: Progress | None = None
        """After the last step; None before the first."""
        self.validated: Progress | None = None
        """After the last step with a validation; None before the first."""
        self._steps = Counter("talkoot_trainer_steps", "Training steps done.", registry=metrics)
        self._loss = Gauge("talkoot_trainer_loss_nats", "Loss of the last step, per token.", registry=metrics)
        self._tokens_per_s = Gauge(
            "talkoot_trainer_tokens_per_second", "Training speed over the last steps.", registry=metrics
        )
        self._validation_loss = Gauge(
            "talkoot_trainer_validation_loss_nats",
            "Loss of the last validation, per token.",
            registry=metrics,
        )
        self._bits_per_byte = Gauge(
            "talkoot_trainer_validation_bpb",
            "Bits per byte of the validation text, in the last validation.",
            registry=metrics,
        )
        for unknown in (self._loss, self._tokens_per_s, self._validation_loss, self._bits_per_byte):
            unknown.set(math.nan)

    def note(self, progress: Progress) -> None:
        """After a step."""
        self._steps.inc(max(0.0, progress.step - total(self._steps)))
        self._loss.set(progress.loss)
        self._tokens_per_s.set(progress.tokens_per_s)
        if progress.validation_loss is not None and progress.bits_per_byte is not None:
            self._validation_loss.set(progress.validation_loss)
            self._bits_per_byte.set(progress.bits_per_byte)
            self.validated = progress
        self.progress = progress


class TrainerAnnouncer:
    """One trainer's metrics and announcements. `run` it as a task of the loop, and `close` it at the end."""

    def __init__(
        self,
        swarm: Swarm,
        invite: Invite,
        settings: TrainerSettings,
        dispatcher: Dispatcher,
        now: Callable[[], float] = clock.now,
    ) -> None:
        """For a running loop. Raises PortError when the port of the metrics is taken."""
        self._registry = swarm.registry
        self._settings = settings
        self._dispatcher = dispatcher
        self._started_at = now()
        self._training = TrainingMetrics(swarm.metrics)
        self._averaging: Averaging | None = None
        self._has_announced = False
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._add_levels(swarm)
        self._metrics = MetricsServer(swarm.metrics, settings.metrics_host, settings.metrics_port)
        self._offered = self._metrics.offered(reached_at(invite))

    def note(self, progress: Progress) -> None:
        """Called after each step, on any thread. The first step is announced at once."""
        is_first = self._training.progress is None
        self._training.note(progress)
        if is_first:
            self._loop.call_soon_threadsafe(self._news.set)

    def announce_averaging(self, averaging: Averaging) -> None:
        """Announces at once that this trainer averages with others. On the loop's thread."""
        self._averaging = averaging
        self._news.set()

    async def run(self) -> None:
        """Announces until it is cancelled. If the DHT does not answer, it tries again the next time."""
        while True:
            self._news.clear()
            record = trainer_record(
                self._settings,
                self._started_at,
                self._offered,
                self._training,
                self._dispatcher.metrics,
                self._dispatcher.latencies,
            )
            if self._averaging is not None:
                if self._averaging.relays is not None:
                    await self._averaging.relays.look()
                set_dense(record, self._averaging)
            self._has_announced = True
            try:
                await self._registry.publish_trainer(record, self._settings.lifetime_s)
            except UnreachableError as error:
                logger.debug("could not announce this trainer: %s", error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.announce_every_s):
                    await self._news.wait()

    async def close(self) -> None:
        """Withdraws the record if there is one, and waits only briefly for a DHT that does not answer."""
        closing = asyncio.create_task(asyncio.to_thread(self._metrics.close))
        if self._has_announced:
            left = records_pb2.TrainerRecord(left=True)
            with contextlib.suppress(UnreachableError, TimeoutError):
                async with asyncio.timeout(_WITHDRAW_S):
                    await self._registry.publish_trainer(left, self._settings.lifetime_s)
        await closing

    def _add_levels(self, swarm: Swarm) -> None:
        loop, tunnels = self._loop, swarm.host.tunnels
        Gauge(
            "talkoot_trainer_relay_addresses",
            "Addresses by which other trainers reach this one through relays.",
            registry=swarm.metrics,
        ).set_function(lambda: 0 if self._averaging is None else len(self._averaging.relay_addresses))
        Gauge(
            "talkoot_trainer_tunnel_streams", "Streams open in tunnels, both ways.", registry=swarm.metrics
        ).set_function(lambda: total(tunnels.streams))
        Gauge("talkoot_trainer_tasks", "Tasks on the event loop.", registry=swarm.metrics).set_function(
            lambda: len(asyncio.all_tasks(loop))
        )


def trainer_record(
    settings: TrainerSettings,
    started_at: float,
    metrics_address: str,
    training: TrainingMetrics,
    calls: DispatchMetrics,
    latencies: Latencies,
) -> records_pb2.TrainerRecord:
    """What a trainer announces. Figures that it does not have, or that are not finite, are not set."""
    record = records_pb2.TrainerRecord(
        name=settings.name or "",
        protocol_version=PROTOCOL_VERSION,
        software_version=SOFTWARE_VERSION,
        started_at=started_at,
        renew_every_s=settings.announce_every_s,
        metrics_address=metrics_address,
        steps=settings.steps,
        forward=_latency(latencies.forward.quantiles()),
        backward=_latency(latencies.backward.quantiles()),
        calls=int(total(calls.calls)),
        failures=[
            records_pb2.Failures(cause=cause, count=count)
            for cause, count in calls.failures_by_cause().items()
        ],
        bytes_sent=int(total(calls.bytes, direction="sent")),
        bytes_received=int(total(calls.bytes, direction="received")),
        nodes=[
            records_pb2.NodeLatency(peer_id=peer_id.to_bytes(), mean_s=mean_s)
            for peer_id, mean_s in list(latencies.nodes.items())[-MAX_LATENCIES:]
        ],
    )
    if training.progress is not None:
        _set_progress(record, training.progress, training.validated)
    return record


def set_dense(record: records_pb2.TrainerRecord, averaging: Averaging) -> None:
    """Where and with what other trainers can average with this one."""
    record.addresses.extend(averaging.addresses)
    record.tunnel_addresses.extend(averaging.tunnel_addresses)
    record.relay_addresses.extend(averaging.relay_addresses)
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


def _latency(quantiles: Latency | None) -> records_pb2.Latency | None:
    return None if quantiles is None else records_pb2.Latency(p50_s=quantiles.p50_s, p99_s=quantiles.p99_s)


def reached_at(invite: Invite) -> str:
    """The address that others in the swarm would use: loopback when the whole swarm is there."""
    local = all(address.startswith(("/ip4/127.", "/ip6/::1/")) for address in invite.bootstrap)
    return "127.0.0.1" if local else default_listen_address()
