"""What a trainer shows of itself: metrics to Prometheus, and a record in the DHT by which dashboards see it.

A trainer's Prometheus metrics, read from its counters when they are scraped.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from dht.announcements import MAX_LATENCIES
from dht.invites import Invite
from dht.swarm import Swarm
from peer import PROTOCOL_VERSION, SOFTWARE_VERSION
from peer.errors import UnreachableError
from peer.loop import LoopThread
from peer.metrics import MetricsServer, total
from peer.transport.addresses import default_listen_address
from peer.wire import records_pb2
from trainer_client.averaging.averager import Averaging
from trainer_client.dispatch.calls import DispatchStats
from trainer_client.dispatch.dispatcher import Dispatcher
from trainer_client.dispatch.grpc_caller import GrpcCaller
from trainer_client.dispatch.policy import Latencies, Quantiles
from trainer_client.settings import TrainerSettings
from trainer_client.training.record import Progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainerCounts:
    """What a trainer knows of itself."""

    progress: Progress | None
    """After the last step; None before the first."""
    validated: Progress | None
    """After the last step with a validation; None before the first."""
    dispatch: DispatchStats
    latencies: Latencies
    bytes_sent: int
    bytes_received: int
    fp32_bytes_sent: int
    fp32_bytes_received: int
    """What the same rows would take as fp32."""
    repeated: int
    """Backward calls made once more."""
    experts_live: int
    open_breakers: int
    banned: int
    tasks: int
    """Of the event loop."""
    relay_addresses: int = 0
    """By which other trainers reach it."""
    tunnel_streams: int = 0
    """Open now, both ways."""


class TrainerCollector(Collector):
    """No label here has a value that peers choose."""

    def __init__(self, counts: Callable[[], TrainerCounts]) -> None:
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        counts = self._counts()
        yield from _training(counts)
        yield from _calls(counts)
        yield GaugeMetricFamily(
            "talkoot_trainer_live_experts", "Experts that can be called now.", counts.experts_live
        )
        yield GaugeMetricFamily(
            "talkoot_trainer_open_breakers",
            "Nodes that are left alone for a while, as they failed or were busy.",
            counts.open_breakers,
        )
        yield GaugeMetricFamily(
            "talkoot_trainer_banned", "Nodes that are left alone for wrong answers.", counts.banned
        )
        yield GaugeMetricFamily(
            "talkoot_trainer_relay_addresses",
            "Addresses by which other trainers reach this one through relays.",
            counts.relay_addresses,
        )
        yield GaugeMetricFamily(
            "talkoot_trainer_tunnel_streams", "Streams open in tunnels, both ways.", counts.tunnel_streams
        )
        yield GaugeMetricFamily("talkoot_trainer_tasks", "Tasks on the event loop.", counts.tasks)


def _training(counts: TrainerCounts) -> Iterator[Metric]:
    progress = counts.progress
    yield CounterMetricFamily(
        "talkoot_trainer_steps", "Training steps done.", 0 if progress is None else progress.step
    )
    if progress is not None:
        yield GaugeMetricFamily(
            "talkoot_trainer_loss_nats", "Of the last step, for each token.", progress.loss
        )
        yield GaugeMetricFamily(
            "talkoot_trainer_tokens_per_second", "Tokens trained on lately.", progress.tokens_per_s
        )
    if counts.validated is not None:
        yield GaugeMetricFamily(
            "talkoot_trainer_validation_loss_nats",
            "The last one measured, for each token.",
            counts.validated.validation_loss,
        )
        yield GaugeMetricFamily(
            "talkoot_trainer_validation_bpb",
            "Bits per byte of the held-out text, the last measured.",
            counts.validated.bits_per_byte,
        )


def _calls(counts: TrainerCounts) -> Iterator[Metric]:
    stats = counts.dispatch
    yield CounterMetricFamily("talkoot_trainer_calls", "Calls to nodes.", stats.calls)
    failures = CounterMetricFamily(
        "talkoot_trainer_failures", "Calls, and parts of them, that failed, by gRPC status.", labels=["cause"]
    )
    for cause, count in stats.failures.copy().items():
        failures.add_metric([cause], count)
    yield failures
    durations = HistogramMetricFamily(
        "talkoot_trainer_call_seconds", "Duration of calls that went well.", labels=["direction"]
    )
    for direction, seen in (("forward", counts.latencies.forward), ("backward", counts.latencies.backward)):
        durations.add_metric([direction], seen.all.buckets(), seen.all.total)
    yield durations
    moved = CounterMetricFamily(
        "talkoot_trainer_bytes", "Payload to and from nodes, in bytes.", labels=["direction"]
    )
    moved.add_metric(["sent"], counts.bytes_sent)
    moved.add_metric(["received"], counts.bytes_received)
    yield moved
    plain = CounterMetricFamily(
        "talkoot_trainer_fp32_bytes", "What that payload would take as fp32, in bytes.", labels=["direction"]
    )
    plain.add_metric(["sent"], counts.fp32_bytes_sent)
    plain.add_metric(["received"], counts.fp32_bytes_received)
    yield plain
    for name, words, value in (
        (
            "reselected_rows",
            "Rows sent to other experts, as the first did not answer.",
            stats.reselected_rows,
        ),
        ("unanswered_rows", "Rows that went on with no expert.", stats.unanswered_rows),
        (
            "repeated_calls",
            "Calls made once more, since the first was lost.",
            counts.repeated + stats.repeated_forward,
        ),
        ("hedged_calls", "Forward calls sent to a second replica too.", stats.hedged_calls),
        ("hedges_won", "Parts of them that the second answered first.", stats.hedges_won),
        ("spot_checks", "Answers compared with another replica's.", stats.spot_checks),
        ("differing_answers", "Those of them that differed grossly.", stats.differing_answers),
        ("odd_answers", "Those of which a third replica told which was wrong.", stats.odd_answers),
        ("late_backward", "Gradients that did not come in time.", stats.late_backward),
        ("wrong_answers", "Answers that no honest node gives.", stats.wrong_answers),
        ("skipped_updates", "Optimizer steps that experts refused.", stats.skipped_updates),
        ("rollbacks", "Times that experts went back to a good state.", stats.rollbacks),
    ):
        yield CounterMetricFamily(f"talkoot_trainer_{name}", words, value)


_FAREWELL_S = 2.0
"""Longest that a trainer which leaves tries to withdraw its record."""
_SCRAPE_DEADLINE_S = 5.0


class TrainerAnnouncer:
    """One trainer's metrics and announcements. `run` it as a task of the loop, and `close` it at the end."""

    def __init__(
        self,
        swarm: Swarm,
        invite: Invite,
        settings: TrainerSettings,
        dispatcher: Dispatcher,
        caller: GrpcCaller,
        loop: LoopThread,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Raises StartError when the port of the metrics is taken."""
        self._registry = swarm.registry
        self._tunnels = swarm.host.tunnels
        self._settings = settings
        self._dispatcher = dispatcher
        self._caller = caller
        self._loop = loop
        self._progress: Progress | None = None
        self._validated: Progress | None = None
        self._started_at = now()
        self._averaging: Averaging | None = None
        self._news = asyncio.Event()
        # scrapes come on threads of their own, and the counters belong to the loop's
        swarm.metrics.register(TrainerCollector(lambda: loop.run(self._count(), _SCRAPE_DEADLINE_S)))
        self._metrics = MetricsServer(swarm.metrics, settings.metrics_host, settings.metrics_port)
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
                if self._averaging.relays is not None:
                    await self._averaging.relays.look()
                set_dense(record, self._averaging)
            try:
                await self._registry.publish_trainer(record, self._settings.lifetime_s)
            except UnreachableError as error:
                logger.debug("could not announce this trainer: %s", error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.announce_every_s):
                    await self._news.wait()

    def announce_averaging(self, averaging: Averaging) -> None:
        """Tells the swarm at once that this trainer averages with others. On the loop's thread."""
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
            0 if averaging is None else len(averaging.tunnel_addresses),
            int(total(self._tunnels.streams)),
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
    """Where and with what other trainers can average with this one."""
    record.addresses.extend(averaging.addresses)
    record.tunnel_addresses.extend(averaging.tunnel_addresses)
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
