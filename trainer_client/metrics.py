"""A trainer's Prometheus metrics, read from its counters when they are scraped."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from dht.counts import DhtCounts
from dht.metrics import dht_metrics
from trainer_client.latencies import Latencies
from trainer_client.averaging.exchange import AveragingCounts
from trainer_client.dispatch.calls import DispatchStats
from trainer_client.training.record import Progress


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
    chore_failures: int
    """Times that something beside training failed, and began again."""
    dht: DhtCounts
    averaging: AveragingCounts | None = None
    """None: it averages with nobody."""
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
        yield CounterMetricFamily(
            "talkoot_trainer_chore_failures",
            "Times that something beside training failed, such as announcing, and began again.",
            counts.chore_failures,
        )
        yield from dht_metrics(counts.dht)
        if counts.averaging is not None:
            yield from _averaging(counts.averaging)


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


def _averaging(counts: AveragingCounts) -> Iterator[Metric]:
    ends = CounterMetricFamily(
        "talkoot_trainer_averagings",
        "Meetings with other trainers, by how they ended, and times that others took the dense part to begin with.",
        labels=["end"],
    )
    for end, count in (
        ("averaged", counts.averaged),
        ("refused", counts.refused),
        ("failed", counts.failed),
        ("given", counts.given),
    ):
        ends.add_metric([end], count)
    yield ends
    moved = CounterMetricFamily(
        "talkoot_trainer_dense_bytes", "Of dense parts to and from other trainers.", labels=["direction"]
    )
    moved.add_metric(["sent"], counts.bytes_sent)
    moved.add_metric(["received"], counts.bytes_received)
    yield moved
