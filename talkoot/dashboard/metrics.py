"""The dashboard's Prometheus metrics: the swarm as a whole, and the dashboard itself. No label names a peer."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from talkoot.dashboard.picture import Json, Picture


@dataclass(frozen=True)
class DashboardCounts:
    """How the dashboard itself does."""

    picture: Picture | None
    reachable: bool
    readings: int
    failed_readings: int
    history_failures: int
    streams: int


class DashboardCollector(Collector):
    """Reads the last picture when it is scraped. What can't be told is left out."""

    def __init__(self, counts: Callable[[], DashboardCounts]) -> None:
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        counts = self._counts()
        yield GaugeMetricFamily(
            "talkoot_swarm_reachable", "1 while the dashboard can read the swarm.", counts.reachable
        )
        yield CounterMetricFamily(
            "talkoot_dashboard_readings", "Looks at the swarm that went well.", counts.readings
        )
        yield CounterMetricFamily(
            "talkoot_dashboard_failed_readings", "Looks at the swarm that failed.", counts.failed_readings
        )
        yield CounterMetricFamily(
            "talkoot_dashboard_history_failures",
            "Reads and writes of the history that failed.",
            counts.history_failures,
        )
        yield GaugeMetricFamily(
            "talkoot_dashboard_streams", "Pages that are kept up to date now.", counts.streams
        )
        if counts.picture is not None:
            yield GaugeMetricFamily(
                "talkoot_swarm_read_timestamp_seconds",
                "When the figures of the swarm were read.",
                counts.picture.read_at,
            )
            if counts.reachable:
                yield from _swarm(counts.picture.figures)


def _swarm(figures: Json) -> Iterator[Metric]:
    yield GaugeMetricFamily("talkoot_swarm_nodes", "Live nodes.", figures["nodes"]["live"])
    yield GaugeMetricFamily("talkoot_swarm_experts", "Experts of the model.", figures["experts"]["total"])
    yield GaugeMetricFamily(
        "talkoot_swarm_live_experts", "Experts that some node serves.", figures["experts"]["live"]
    )
    yield GaugeMetricFamily("talkoot_swarm_replicas", "Replicas that are served.", figures["replicas"])
    yield GaugeMetricFamily("talkoot_swarm_trainers", "Live trainers.", figures["trainers"])
    for key, name, words in (
        ("tokens_per_s", "talkoot_swarm_tokens_per_second", "Tokens trained on, by all trainers."),
        ("requests_per_s", "talkoot_swarm_calls_per_second", "Calls to nodes, by all trainers."),
        ("bytes_per_s", "talkoot_swarm_bytes_per_second", "Payload between trainers and nodes."),
        ("validation_loss", "talkoot_swarm_validation_loss_nats", "Lowest of all trainers, for each token."),
        (
            "bits_per_byte",
            "talkoot_swarm_bpb",
            "Bits per byte, of the trainer with the lowest validation loss.",
        ),
    ):
        if figures[key] is not None:
            yield GaugeMetricFamily(name, words, figures[key])
