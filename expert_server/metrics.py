"""A node's Prometheus metrics, read from its counters when they are scraped."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from dht.counts import DhtCounts
from dht.metrics import dht_metrics
from dht.announcements import Reachability
from expert_server.state.checkpoints import CheckpointCounts
from expert_server.serving.runtime import RuntimeStats
from expert_server.state.transfer import TransferCounts
from peer.rpc.sessions import SessionCounts
from peer.kademlia.storage import StoreCounts
from peer.transport.tunnel import TunnelCounts


@dataclass(frozen=True)
class NodeCounts:
    """What a node counts beside its runtime."""

    experts: int
    adopted: int
    exchanged: int
    dht_failures: int
    p2pd_restarts: int
    checkpoints: CheckpointCounts
    paused: bool
    calls: int
    uploaded_bytes: int
    downloaded_bytes: int
    memory_bytes: int
    tasks: int
    """Of the event loop."""
    handed_over: int
    averagings: int
    standby_copies: int
    transfers: TransferCounts
    dht: DhtCounts
    stored: StoreCounts
    sessions_open: int
    sessions: SessionCounts
    tunnels: TunnelCounts
    reachability: Reachability
    over_budget: int


class NodeCollector(Collector):
    """No label here has a value that peers choose."""

    def __init__(self, runtime: Callable[[], RuntimeStats], node: Callable[[], NodeCounts]) -> None:
        self._runtime = runtime
        self._node = node

    def collect(self) -> Iterator[Metric]:
        stats, node = self._runtime(), self._node()
        yield from _hosting(node)
        yield from _transfers(node.transfers)
        yield from _work(stats)
        yield from dht_metrics(node.dht)
        yield from _stored(node.stored)
        yield from _tunnels(node)
        yield from _sessions(node)
        works = CounterMetricFamily(
            "talkoot_unfinished_works", "Works that brought no result, by cause.", labels=["cause"]
        )
        works.add_metric(["expired"], stats.expired)
        works.add_metric(["refused"], stats.refused)
        works.add_metric(["failed"], stats.failed)
        yield works


def _hosting(node: NodeCounts) -> Iterator[Metric]:
    saves = node.checkpoints
    for name, words, level in (
        ("experts", "Experts hosted.", node.experts),
        ("tasks", "Tasks on the event loop.", node.tasks),
        ("paused", "1 while the node is paused.", node.paused),
        (
            "memory_bytes",
            "Memory of experts, kept forward passes and waiting rows, about.",
            node.memory_bytes,
        ),
    ):
        yield GaugeMetricFamily(f"talkoot_{name}", words, level)
    for name, words, count in (
        ("experts_adopted", "Experts taken over because nobody hosted them.", node.adopted),
        ("experts_exchanged", "Replicas given up for ones that were needed more.", node.exchanged),
        ("dht_failures", "DHT rounds that failed or timed out.", node.dht_failures),
        ("experts_handed_over", "Experts that others took over when this node left.", node.handed_over),
        ("averagings", "Replicas averaged with another node's.", node.averagings),
        ("standby_copies", "Copies made of experts that one other node hosts alone.", node.standby_copies),
        ("p2pd_restarts", "Times that the libp2p daemon died and was started again.", node.p2pd_restarts),
        ("checkpoints_saved", "Checkpoints written.", saves.saved),
        ("checkpoint_failures", "Checkpoints that could not be written.", saves.failed),
        ("experts_restored", "Experts that went on from a checkpoint.", saves.restored),
        ("calls", "Forward and backward calls that came.", node.calls),
        ("calls_over_budget", "Calls refused as their caller's budget was spent.", node.over_budget),
        ("uploaded_bytes", "Payload of answers, in bytes.", node.uploaded_bytes),
        ("downloaded_bytes", "Payload of calls, in bytes.", node.downloaded_bytes),
    ):
        yield CounterMetricFamily(f"talkoot_{name}", words, count)


def _work(stats: RuntimeStats) -> Iterator[Metric]:
    yield GaugeMetricFamily("talkoot_queued_rows", "Rows that wait to be computed.", stats.queued_rows)
    for name, words, count in (
        ("rows", "Rows computed, forward and backward.", stats.rows),
        ("batches", "Batches computed.", stats.batches),
        ("updates", "Optimizer steps taken.", stats.updates),
        (
            "skipped_updates",
            "Optimizer steps skipped for gradients that were not finite.",
            stats.skipped_updates,
        ),
        ("rollbacks", "Experts rolled back to their last good state.", stats.rollbacks),
        (
            "compute_seconds",
            "Time the compute threads were busy, all together counted as one.",
            stats.busy_s,
        ),
    ):
        yield CounterMetricFamily(f"talkoot_{name}", words, count)
    for name, words, seen in (
        ("batch_rows", "Rows in a batch.", stats.batch_rows),
        ("batch_seconds", "Time to compute a batch.", stats.batch_s),
    ):
        yield HistogramMetricFamily(f"talkoot_{name}", words, buckets=seen.buckets(), sum_value=seen.total)


def _transfers(counts: TransferCounts) -> Iterator[Metric]:
    fetches = CounterMetricFamily(
        "talkoot_state_fetches", "Experts' states fetched from other nodes, by outcome.", labels=["outcome"]
    )
    fetches.add_metric(["fetched"], counts.fetched)
    fetches.add_metric(["failed"], counts.failed)
    fetches.add_metric(["broken"], counts.broken)
    yield fetches
    size = CounterMetricFamily(
        "talkoot_state_bytes", "Bytes of experts' states, to and from other nodes.", labels=["direction"]
    )
    size.add_metric(["sent"], counts.bytes_sent)
    size.add_metric(["received"], counts.bytes_received)
    yield size


def _stored(counts: StoreCounts) -> Iterator[Metric]:
    yield GaugeMetricFamily(
        "talkoot_dht_stored_bytes", "Memory of what others store here in the DHT.", counts.bytes
    )
    yield GaugeMetricFamily("talkoot_dht_stored_keys", "Keys of what others store here.", counts.keys)
    yield CounterMetricFamily(
        "talkoot_dht_displaced", "Entries that went as there was no more room.", counts.displaced
    )
    yield CounterMetricFamily(
        "talkoot_dht_messages_refused",
        "Messages that asked for or brought more than is allowed.",
        counts.refused,
    )
    yield CounterMetricFamily(
        "talkoot_dht_not_handed_over",
        "Newcomers to the DHT that were handed nothing of what is stored here, since too many came before.",
        counts.not_handed_over,
    )


def _sessions(node: NodeCounts) -> Iterator[Metric]:
    yield GaugeMetricFamily("talkoot_sessions", "Callers that are known now.", node.sessions_open)
    events = CounterMetricFamily(
        "talkoot_session_events",
        "Sessions opened, refused and ended early to make room; calls in none that is open.",
        labels=["event"],
    )
    counts = node.sessions
    events.add_metric(["opened"], counts.opened)
    events.add_metric(["refused"], counts.refused)
    events.add_metric(["evicted"], counts.evicted)
    events.add_metric(["unknown"], counts.unknown)
    yield events


def _tunnels(node: NodeCounts) -> Iterator[Metric]:
    reached = GaugeMetricFamily(
        "talkoot_reached", "How others reach this node: 1 for what is so.", labels=["way"]
    )
    for way in Reachability:
        reached.add_metric([way.name.lower()], way is node.reachability)
    yield reached
    counts = node.tunnels
    yield GaugeMetricFamily(
        "talkoot_tunnel_streams", "Streams open in tunnels, both ways.", value=counts.open
    )
    yield CounterMetricFamily("talkoot_tunnel_bytes", "Carried in tunnels, both ways.", value=counts.bytes)
    streams = CounterMetricFamily("talkoot_tunnel_opened", "Streams that others opened here.", labels=["way"])
    streams.add_metric(["relayed"], counts.relayed)
    streams.add_metric(["punched"], counts.unrelayed)
    streams.add_metric(["refused"], counts.refused)
    yield streams
