"""How a trainer shows itself: metrics for Prometheus, and a record in the DHT for dashboards."""

import asyncio
import contextlib
import logging
import math

from prometheus_client import CollectorRegistry, Counter, Gauge

from dht import upkeep
from dht.announcements import MAX_LATENCIES, Latency
from dht.invites import Invite
from dht.swarm import Swarm
from peer import PROTOCOL_VERSION, SOFTWARE_VERSION, clock
from peer.errors import UnreachableError
from peer.metrics import MetricsServer, total
from peer.transport.addresses import default_listen_address
from peer.transport.endpoints import near
from peer.wire import records_pb2
from trainer_client.averaging.averager import Averaging
from trainer_client.dispatch.calls import DispatchMetrics
from trainer_client.dispatch.dispatcher import Dispatcher
from trainer_client.dispatch.policy import Latencies
from trainer_client.settings import TrainerSettings

logger: logging.Logger = logging.getLogger(__name__)

_WITHDRAW_S = 2.0
"""How long a leaving trainer tries to withdraw its record."""


class TrainingMetrics:
    """How a trainer's training goes. May be updated on any thread."""

    def __init__(self, metrics: CollectorRegistry | None = None, takes_steps: bool = True) -> None:
        """`takes_steps`: False if the process may never report a step. Its number of steps is then exposed only from
        the first report on, so that it does not look like a trainer that is stuck before its first step.
        """
        self.step: int = 0
        """How many steps are done."""
        self.loss: float | None = None
        """The loss of the last step. It may be infinite or NaN, like the next two."""
        self.tokens_per_s: float | None = None
        self.validation: tuple[float, float | None] | None = None
        """The last validation: in nats per token, and in bits per byte if that is known."""
        self._steps = Counter(
            "talkoot_trainer_steps", "Training steps done.", registry=metrics if takes_steps else None
        )
        self._hidden_in = None if takes_steps else metrics
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

    def note_step(self, step: int, loss: float, tokens_per_s: float | None) -> None:
        """Called after each step."""
        if self._hidden_in is not None:
            self._hidden_in.register(self._steps)
            self._hidden_in = None
        self._steps.inc(max(0.0, step - total(self._steps)))
        self._loss.set(loss)
        self._tokens_per_s.set(math.nan if tokens_per_s is None else tokens_per_s)
        self.step, self.loss, self.tokens_per_s = step, loss, tokens_per_s

    def note_validation(self, loss: float, bits_per_byte: float | None) -> None:
        """Called after each validation."""
        self._validation_loss.set(loss)
        self._bits_per_byte.set(math.nan if bits_per_byte is None else bits_per_byte)
        self.validation = loss, bits_per_byte


class TrainerAnnouncer:
    """One trainer's metrics and announcements. `run` it as a task of the loop, and `close` it at the end."""

    def __init__(
        self,
        swarm: Swarm,
        invite: Invite,
        settings: TrainerSettings,
        dispatcher: Dispatcher,
        takes_steps: bool,
    ) -> None:
        """Starts announcing a running loop. `takes_steps`: whether it is known to take `settings.steps` steps.

        Raises PortError if the metrics port is taken.
        """
        self._registry = swarm.registry
        self._settings = settings
        self._lifetime_s = upkeep.lifetime_s(settings.announce_every_s)
        self._steps = settings.steps if takes_steps else 0
        self._dispatcher = dispatcher
        self._started_at = clock.now()
        self._training = TrainingMetrics(swarm.metrics, takes_steps)
        self._averaging: Averaging | None = None
        self._has_announced = False
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._metrics = MetricsServer(swarm.metrics, settings.metrics_host, settings.metrics_port, near)
        self._offered = self._metrics.offered(default_listen_address(invite.bootstrap))

    def note_step(self, step: int, loss: float, tokens_per_s: float | None) -> None:
        """Called after each step, on any thread. The first step is announced at once."""
        is_first = self._training.loss is None
        self._training.note_step(step, loss, tokens_per_s)
        if is_first:
            self._loop.call_soon_threadsafe(self._news.set)

    def note_validation(self, loss: float, bits_per_byte: float | None) -> None:
        """Called after each validation, on any thread. It is announced at once."""
        self._training.note_validation(loss, bits_per_byte)
        self._loop.call_soon_threadsafe(self._news.set)

    def announce_averaging(self, averaging: Averaging) -> None:
        """Announces at once that this trainer averages with others. On the loop's thread."""
        self._averaging = averaging
        self._news.set()

    async def run(self) -> None:
        """Announces until it is cancelled. If the DHT does not answer, it tries again next time."""
        while True:
            self._news.clear()
            record = self._record()
            if self._averaging is not None:
                if self._averaging.relays is not None:
                    await self._averaging.relays.look()
                set_dense(record, self._averaging)
            self._has_announced = True
            try:
                await self._registry.publish_trainer(record, self._lifetime_s)
            except UnreachableError as error:
                logger.debug("could not announce this trainer: %s", error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.announce_every_s):
                    await self._news.wait()

    def _record(self) -> records_pb2.TrainerRecord:
        return trainer_record(
            self._settings,
            self._started_at,
            self._offered,
            self._training,
            self._dispatcher.metrics,
            self._dispatcher.latencies,
            self._steps,
        )

    async def close(self) -> None:
        """Announces that the trainer has left, with its last figures. Waits only briefly if the DHT does not answer."""
        closing = asyncio.create_task(asyncio.to_thread(self._metrics.close))
        if self._has_announced:
            left = self._record()
            left.left = True
            with contextlib.suppress(UnreachableError, TimeoutError):
                async with asyncio.timeout(_WITHDRAW_S):
                    await self._registry.publish_trainer(left, self._lifetime_s)
        await closing


def trainer_record(
    settings: TrainerSettings,
    started_at: float,
    metrics_address: str,
    training: TrainingMetrics,
    calls: DispatchMetrics,
    latencies: Latencies,
    steps: int,
) -> records_pb2.TrainerRecord:
    """A trainer's announcement. Figures that it does not have, or that are not finite, are not set.

    `steps`: of the whole run; 0: not known.
    """
    record = records_pb2.TrainerRecord(
        name=settings.name or "",
        protocol_version=PROTOCOL_VERSION,
        software_version=SOFTWARE_VERSION,
        started_at=started_at,
        renew_every_s=settings.announce_every_s,
        metrics_address=metrics_address,
        step=training.step,
        steps=steps,
        forward=_latency(latencies.calls["forward"].quantiles()),
        backward=_latency(latencies.calls["backward"].quantiles()),
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
    if training.loss is not None and math.isfinite(training.loss):
        record.loss = training.loss
    if training.tokens_per_s is not None and math.isfinite(training.tokens_per_s):
        record.tokens_per_s = training.tokens_per_s
    if training.validation is not None and math.isfinite(training.validation[0]):
        record.validation_loss, bits_per_byte = training.validation
        if bits_per_byte is not None and math.isfinite(bits_per_byte):
            record.bits_per_byte = bits_per_byte
    return record


def set_dense(record: records_pb2.TrainerRecord, averaging: Averaging) -> None:
    """Sets where other trainers can average with this one, and the form of its dense part."""
    record.addresses.extend(averaging.addresses)
    record.tunnel_addresses.extend(averaging.tunnel_addresses)
    record.relay_addresses.extend(averaging.relay_addresses)
    record.certificate = averaging.certificate
    record.dense_fingerprint = averaging.form.fingerprint
    record.dense_age = averaging.part.age


def _latency(quantiles: Latency | None) -> records_pb2.Latency | None:
    return None if quantiles is None else records_pb2.Latency(p50_s=quantiles.p50_s, p99_s=quantiles.p99_s)
