"""A peer's Prometheus metrics of the DHT, the same for nodes and trainers."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from dht.counts import DhtCounts


def dht_metrics(counts: DhtCounts) -> Iterator[Metric]:
    yield CounterMetricFamily("talkoot_dht_keys_read", "Keys looked up in the DHT.", counts.keys_read)
    yield CounterMetricFamily("talkoot_dht_records_stored", "Records written to it.", counts.records_stored)
    took = HistogramMetricFamily(
        "talkoot_dht_seconds", "Time of a DHT operation, which may be for many keys.", labels=["operation"]
    )
    for operation, seen in (("get", counts.gets), ("store", counts.stores)):
        took.add_metric([operation], seen.buckets(), seen.total)
    yield took
    hops = counts.hops
    yield HistogramMetricFamily(
        "talkoot_dht_hops",
        "Questions one after another that the look-up of a key took; none when this peer holds it.",
        buckets=hops.buckets(),
        sum_value=hops.total,
    )
